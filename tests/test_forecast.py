"""The line before the first step: how many the budget holds, and what runs on record scored with so many."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from golf.config.config import build_config
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.forecast import (
    ALIKE,
    RECORDED_SCORES,
    forecast_budget,
    forecast_line,
    scores_on_record,
)
from golf.run.trainer import Trainer
from golf.runtime import Runtime

TOY = dict(
    vocab_size="64", model_dim="32", train_seq_len="32", short_seq_len="16", rope_dims="4", train_batch_tokens="128",
    micro_batch_tokens="128", warmup_steps="1", threads="1", eval_seq_len="32", eval_stride="8", quantizer="rtn",
)  # fmt: skip


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    path = tmp_path_factory.mktemp("shards") / "toy_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(-2, 3, 5000).cumsum() % 61 + 3)
    return TokenStream([path])


def toy_trainer(stream: TokenStream, **knobs: str) -> Trainer:
    torch.set_num_threads(1)
    config = build_config("frontier-base-local", {}, TOY | knobs)
    return Trainer(build_model(config.model, config.run.seed), config, Runtime(torch.device("cpu")), stream)


SECONDS = {(False, 16, False): 0.5, (False, 32, False): 1.0, (False, 32, True): 2.0}


@pytest.mark.parametrize(
    ("iterations", "seconds", "found"),
    [
        ("0", "600", (464, 598)),  # 120 steps in 60 s, 150 in 150 s, 194 in 388 s; one more could end too late
        ("300", "0", (300, 480)),  # 30 steps of half a second, 75 of one, 195 of two
        ("300", "600", (300, 480)),
        ("450", "600", (389, 598)),  # 45 and 113 steps, by their number; then 231, and time is up
    ],
)
def test_steps_are_those_that_the_training_would_take(stream, monkeypatch, iterations, seconds, found):
    """Short rows for a tenth, blocks that repeat from 35 % on: each phase has its time, and both limits count."""
    trainer = toy_trainer(stream, iterations=iterations, max_wallclock_seconds=seconds)
    monkeypatch.setattr("golf.run.forecast.time_phase", lambda trainer, phase: SECONDS[phase])
    steps, elapsed = forecast_budget(trainer)
    assert (steps, round(elapsed)) == found
    assert elapsed <= 600


def test_it_leaves_no_trace(stream):
    curves, weights = [], []
    for timed in (False, True):
        trainer = toy_trainer(stream, iterations="6", max_wallclock_seconds="0")
        trainer.warm_up()
        if timed:
            line = forecast_line(trainer, "another text")
        curves.append([report.train_loss for report in trainer.steps()])
        weights.append(trainer.model.state_dict())
        trainer.finish()
    assert curves[0] == curves[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert trainer.clock.seconds > 0 and line.startswith("forecast: ") and "about 6 steps in " in line
    assert "scored" not in line, "this is no configuration that has a record"


def test_timing_is_off_the_training_clock(stream):
    trainer = toy_trainer(stream, iterations="6", max_wallclock_seconds="0")
    forecast_line(trainer, "")
    assert trainer.clock.seconds == 0.0 and trainer.step == 0


def test_the_scores_are_those_of_runs_in_records(repository):
    """Rows with more digits than they show are not asked for: the line prints three."""
    found = {}
    for path in (repository / "records").glob("track_*/*/runs/*/result.json"):
        result = json.loads(path.read_text())
        found.setdefault((result["config_hash"], result["data_id"]), []).append(
            (result["steps"], round(result["val_bpb"], 4))
        )
    assert {key: sorted(found[key]) for key in RECORDED_SCORES} == {
        key: sorted(rows) for key, rows in RECORDED_SCORES.items()
    }


def test_a_score_is_said_of_the_presets_own_configuration_and_text_alone(monkeypatch):
    config = build_config("local", {}, {})
    monkeypatch.setattr("golf.run.forecast.RECORDED_SCORES", {("hash", "text"): ((100, 1.25), (120, 1.2), (400, 1.1))})
    monkeypatch.setattr(
        "golf.run.forecast.config_hash", lambda given: "hash" if given.model == config.model else "other"
    )
    assert scores_on_record(config, "text", 110) == "; runs of local with 100 to 120 steps scored 1.200 to 1.250"
    assert scores_on_record(config, "text", 120 * ALIKE).endswith("with 120 to 120 steps scored 1.200 to 1.200")
    far = scores_on_record(config, "text", 20)
    assert far == "; runs of local with 100 to 400 steps scored 1.100 to 1.250, none on record had so many as this"
    assert scores_on_record(config, "my own text", 110) == ""
    assert scores_on_record(replace(config, model=replace(config.model, model_dim=96)), "text", 110) == ""
