"""The plan on paper is what training does: the same steps, the same acts, and a word for what would never happen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.config.config import Config, build_config, with_knobs
from golf.config.knobs import ConfigError
from golf.config.presets import PRESETS
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.trainer import Trainer
from golf.runtime import Runtime, Stopwatch
from lab.machine.plan import (
    ADAPTING_SPEED,
    CORRECTING_SPEED,
    EXPECTED_STEP_SECONDS,
    EXPECTED_VAL_TOKENS,
    MIXING_SPEED,
    SCORING_SPEED,
    Moment,
    forecast_scoring_seconds,
    plan_lines,
    plan_run,
    simulate_training,
    timeline,
)

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", threads="1",
    train_batch_tokens="32", micro_batch_tokens="32", eval_seq_len="32", eval_stride="8",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd",
)  # fmt: skip


class ConstantStopwatch(Stopwatch):
    """Every step takes the same time."""

    def __init__(self, step_seconds: float):
        self.time, self.step_seconds = 0.0, step_seconds
        super().__init__(now=lambda: self.time)

    def start(self) -> None:
        super().start()
        self.time += self.step_seconds


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "tiny_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(2, 64, 6000))
    return path


BUDGETS = {
    "seconds bind": dict(iterations="20000", max_wallclock_seconds="10", qat_start="0.5", swa_start="0.4"),
    "steps bind": dict(iterations="37", max_wallclock_seconds="600", qat_start="0.3", swa_start="0.7"),
    "steps alone": dict(iterations="12", max_wallclock_seconds="0", swa_snapshots="4"),
    "a cap between two steps": dict(max_wallclock_seconds="10.2", swa_start="0.93", swa_snapshots="48"),
    "all at the end": dict(max_wallclock_seconds="5", qat_start="0.94", swa_start="0.9", warmdown_fraction="0.06"),
    "warmdown all along": dict(iterations="9", warmdown_fraction="1", qat_enabled="0", swa_enabled="0"),
    "one step": dict(iterations="1", max_wallclock_seconds="0.1"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_training_does_what_was_planned(name, shard):
    config = build_config("local", {}, TINY | BUDGETS[name])
    stream, clock = TokenStream([shard]), ConstantStopwatch(0.25)
    trainer = Trainer(build_model(config.model, 0), config, Runtime(torch.device("cpu")), stream, clock)
    reports = list(trainer.steps())
    trainer.finish()
    acts = plan_run(config, 0.25).acts
    assert [Moment(r.step, r.elapsed, r.progress) for r in reports] == acts["training"]
    told = {name: (t.first, t.last, t.count) for name, t in trainer.audit.records.items()}
    for feature in {"qat", "warmdown", "muon_momentum_warmup", "swa"} & told.keys():
        steps = [moment.step for moment in acts[feature]] or [None]
        assert told[feature] == (steps[0], steps[-1], len(acts[feature])), feature
    seconds, cap = len(reports) * 0.25, config.train.max_wallclock_seconds or 1e9
    assert len(reports) in (1, config.train.iterations) or cap - 0.75 <= seconds <= cap


def problems(step_seconds: float = 0.25, **knobs: str) -> list[str]:
    return plan_run(build_config("local", {}, TINY | knobs), step_seconds, val_tokens=100).problems


def test_presets_have_no_problem():
    for preset in PRESETS:
        assert plan_run(build_config(preset, {}, {})).problems == [], preset
        assert preset in EXPECTED_STEP_SECONDS and preset in EXPECTED_VAL_TOKENS


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (dict(swa_start="0.98"), ["swa gets 1 of the two snapshots that it needs", "lower swa_start"]),
        (dict(qat_start="0.99"), ["qat never acts", "lower qat_start"]),
        (dict(warmdown_fraction="0.01"), ["warmdown never acts", "set warmdown_fraction=0"]),
        (dict(holdout_every="51"), ["holdout never acts", "set holdout_every=0"]),
        (dict(muon_momentum_warmup_fraction="0.99"), ["never reaches muon_momentum=0.95"]),
    ],
)
def test_what_would_never_act_is_a_problem(knobs, words):
    """20,000 steps on paper, 50 under the cap; at 500 steps each of them acts."""
    budget = dict(iterations="20000", max_wallclock_seconds="12.75")
    (problem,) = problems(**(budget | knobs))
    assert problem.startswith("in 50 steps ") and all(word in problem for word in words)
    assert problems(0.025, **(budget | knobs)) == []


def test_the_same_weights_twice_are_no_average():
    """A run of one step: due at its end, and due again when the run is over."""
    plan = plan_run(build_config("local", {}, TINY | dict(iterations="1")), 0.25, val_tokens=100)
    assert len(plan.acts["swa"]) in (1, 2) and any("swa gets 1 of the two" in problem for problem in plan.problems)


def test_what_is_switched_off_or_acts_from_the_first_step_is_no_problem():
    assert problems(iterations="3", swa_enabled="0", qat_enabled="0", warmdown_fraction="0", holdout_every="0") == []
    assert problems(iterations="50", muon_momentum_start="0.95", muon_momentum_warmup_fraction="1") == []
    config = build_config("local", {}, TINY | dict(iterations="50", warmdown_fraction="1"))
    plan = plan_run(config, 0.1, val_tokens=100)
    assert plan.problems == [] and plan.acts["warmdown"][0].step == 2  # the first step has all of the rate
    assert (plan.acts["warmdown"][0], "learning rate falls from here on (cosine)") in timeline(plan)


def test_bytes_and_seconds_that_can_not_be_kept_are_problems():
    config = build_config("local", {}, {"quantizer": "rtn", "codec": "zstd"})
    over = replace(config, run=replace(config.run, limit_bytes=300_000))
    assert ["limit_bytes" in problem for problem in plan_run(over).problems] == [True]
    assert plan_run(config, bytes_code=40_000).problems == [], "part of the forecast is over: fitting is for that"
    assert "weights get coarser" in "\n".join(plan_lines(plan_run(config, bytes_code=40_000)))
    (problem,) = plan_run(config, bytes_code=400_000).problems
    assert "fewer parameters" in problem
    slow = replace(config, score=replace(config.score, max_eval_seconds=2.0))
    (problem,) = plan_run(slow).problems
    assert "raise eval_stride" in problem
    assert plan_run(replace(slow, score=replace(slow.score, max_eval_seconds=0.0))).problems == []


def test_a_fit_is_expected_to_fill_its_limit():
    config = build_config("local", {}, {})
    plan = plan_run(config, bytes_code=70_000)
    assert plan.bytes_model == (500_000 - 1_000 - 70_000 - 500, 500_000 - 1_000 - 70_000) and plan.problems == []
    loose = plan_run(replace(config, run=replace(config.run, limit_bytes=16_000_000)))
    assert loose.bytes_model[1] < 1_000_000, "finer than int8 codes are not"


@pytest.mark.parametrize("step_seconds", [0.0, -1.0, float("nan"), float("inf"), 1e-5])
def test_a_time_that_no_step_takes_is_refused(step_seconds):
    with pytest.raises(ConfigError, match="give the milliseconds of a real step"):
        plan_run(build_config("local", {}, {"iterations": "0"}), step_seconds)


def test_rows_that_can_not_be_dealt_are_refused_before_the_run():
    config = build_config("leaderboard", {}, {})
    assert plan_run(config, world_size=8).problems == []
    with pytest.raises(ConfigError, match="can't be dealt evenly to 7 processes"):
        plan_run(config, world_size=7)


def test_scoring_forecast():
    """100 windows of 32 tokens are 3,200 tokens; training does 32 in 0.5 s."""
    config = build_config("local", {}, TINY)
    plain = replace(config, score=replace(config.score, mixture=False, adapter_rank=0))
    tokens = 32 + 99 * 8 + 1
    assert forecast_scoring_seconds(plain, tokens, 0.5) == (50 / SCORING_SPEED[1], 50 / SCORING_SPEED[0])
    counted = replace(config, score=replace(config.score, mixture=True, adapter_rank=0, mixture_parts=2))
    for successors, (slow, fast) in ((0, MIXING_SPEED), (128, CORRECTING_SPEED)):
        mixed = replace(counted, score=replace(counted.score, mixture_successors=successors))
        least, most = forecast_scoring_seconds(mixed, tokens, 0.5)
        assert (least - 50 / 6.0, most - 50 / 1.3) == pytest.approx((tokens / 2 / fast, tokens / 2 / slow))
    least, most = forecast_scoring_seconds(replace(plain, score=replace(plain.score, adapter_rank=8)), tokens, 0.5)
    assert (least, most) == pytest.approx((50 / ADAPTING_SPEED[1], (100 + 3) * 0.5 / ADAPTING_SPEED[0]))


def test_the_frontier_s_adaptive_score_is_planned_within_its_limit():
    plan = plan_run(build_config("frontier", {}, {}))
    assert plan.problems == [] and plan.scoring_seconds[0] < 600


def test_presets_are_planned_with_what_they_score_with():
    own_text = build_config("local", {}, {"corpus": "my.txt"})
    assert plan_run(own_text).scoring_seconds is None and plan_run(own_text, val_tokens=10**6).scoring_seconds
    least, most = plan_run(build_config("local", {}, {})).scoring_seconds
    assert least < 39.6 and most > 54.5  # three seeds, of which 2 to 4 s are less by now


def test_lines_are_a_table():
    config = build_config("leaderboard", {}, {})
    lines = plan_lines(plan_run(config))
    assert lines[0] == "plan of leaderboard: 6,607 steps in 599.9 s"  # the recipe's log: 6,606 steps
    assert "assumed" in lines[1] and "90.8 ms" in lines[1] and "8xH100" in lines[1]
    begin = lines[2].index("what happens")
    rows = [line for line in lines[3:] if line[:begin].strip()[:1].isdigit()]
    assert len(rows) == 11 and all(row[begin - 3] == "%" and row[begin - 1] == " " for row in rows)
    assert any(row.endswith("snapshot 48 of 48 for the average") for row in rows)
    assert rows[-1].endswith("training ends: its seconds are used up")
    assert lines[-2].startswith("bytes of artifact without code: ") and lines[-1].startswith("seconds of scoring: ")
    given_time = plan_lines(plan_run(config, 0.2, bytes_code=60_000))
    assert "200 ms (as given)" in given_time[1] and "artifact and code" in given_time[-2]
    short = with_knobs(config, {"iterations": 40})
    assert plan_lines(plan_run(short))[-1] == (
        "problem: in 40 steps holdout never acts: train longer, or set holdout_every=0"
    )


@given(
    st.integers(0, 300), st.floats(0, 60), st.floats(0.2, 3), st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 0.99),
    st.integers(0, 40), st.floats(0, 10),
)  # fmt: skip
@settings(max_examples=150)
def test_nothing_is_planned_after_the_end(iterations, seconds, step_seconds, warmdown, qat, swa, every, checkpoint):
    if not iterations and seconds < 1:
        seconds += 1
    knobs = dict(
        iterations=iterations, max_wallclock_seconds=seconds, warmdown_fraction=warmdown, qat_start=qat, swa_start=swa,
        holdout_every=every, checkpoint_seconds=checkpoint,
    )  # fmt: skip
    config: Config = with_knobs(build_config("local", {}, {"quantizer": "rtn"}), knobs)
    acts = simulate_training(config, step_seconds)
    end = acts["training"][-1]
    assert 1 <= end.step <= (iterations or 10**9)
    assert end.step == 1 or end.seconds <= (seconds or 10**9), "only the first step may pass the cap"
    for feature, moments in acts.items():
        assert moments == sorted(moments)
        assert len(set(moments)) == len(moments) or feature == "swa", "the last weights may count twice in the average"
        assert all(1 <= m.step <= end.step and 0 <= m.seconds <= end.seconds and 0 <= m.progress <= 1 for m in moments)
    steps = acts["muon_momentum_warmup"] + acts["muon_momentum"]
    assert [moment.step for moment in steps] == list(range(1, end.step + 1)), "one or the other, warm-up first"
