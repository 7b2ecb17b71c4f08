"""Rows whose length changes during the run: the tokens of a step stay, only where attention begins again moves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from golf.config.config import Config, build_config
from golf.config.knobs import ConfigError
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.trainer import Trainer
from golf.runtime import Runtime

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="8",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="64", warmup_steps="1", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.5", compile="off", qat_enabled="0",
    quantizer="rtn", prune_frac="0.05", codec="zstd",
)  # fmt: skip
SHORT = dict(short_seq_len="4", short_seq_fraction="0.5")


def tiny_config(**knobs: str) -> Config:
    return build_config("local", {}, TINY | SHORT | knobs)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "tiny_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(-2, 3, 5000).cumsum() % 62 + 2)
    return path


class Watched(Trainer):
    """Notes what every forward pass is given."""

    def __init__(self, config: Config, shard: Path):
        torch.set_num_threads(1)
        super().__init__(build_model(config.model, 0), config, Runtime(torch.device("cpu")), TokenStream([shard]))
        self.seen: list[torch.Tensor] = []
        self.forward = self.watch

    def watch(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        self.seen.append(inputs_BT)
        return self.model(inputs_BT, targets_BT)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [tuple(inputs_BT.shape) for inputs_BT in self.seen]


def test_rows_are_short_for_their_share_of_the_budget(shard):
    trainer = Watched(tiny_config(), shard)
    list(trainer.steps())
    assert trainer.shapes == [(16, 4)] * 8 + [(4, 16)] * 8  # two passes a step
    record = trainer.audit.records["short_seq"]
    assert (record.first, record.last, record.count, record.proven) == (1, 4, 4, True)
    assert record.effect == "shorter rows first, then rows of 16 tokens"


@pytest.mark.parametrize("order", ["sequential", "spread"])
def test_a_step_has_the_same_tokens_in_rows_of_every_length(shard, order):
    short, whole = (
        Watched(tiny_config(row_order=order), shard),
        Watched(tiny_config(row_order=order, short_seq_len="0", short_seq_fraction="0"), shard),
    )
    for trainer in (short, whole):
        list(trainer.steps())
    for one, other in zip(short.seen, whole.seen, strict=True):
        assert torch.equal(one.flatten(), other.flatten())


def test_the_warm_up_meets_every_shape_that_training_will(shard):
    trainer = Watched(tiny_config(qat_enabled="1", qat_start="0.25", warmup_steps="1"), shard)
    met = []
    trainer.watch_phase = lambda: met.append((trainer.fake_quantized, trainer.seq_len))
    forward = trainer.forward
    trainer.forward = lambda *batch: (trainer.watch_phase(), forward(*batch))[1]
    trainer.warm_up()
    warmed = set(met)
    met.clear()
    list(trainer.steps())
    assert set(met) == warmed == {(False, 4), (True, 4), (True, 16)}


def test_warm_up_leaves_no_trace(shard):
    curves = []
    for steps in ("0", "2"):
        trainer = Watched(tiny_config(warmup_steps=steps), shard)
        trainer.warm_up()
        curves.append([report.train_loss for report in trainer.steps()])
    assert curves[0] == curves[1]


def test_a_training_is_taken_up_among_short_rows(shard):
    whole = Watched(tiny_config(), shard)
    losses = [report.train_loss for report in whole.steps()]
    for taken in (2, 5):
        first, second = Watched(tiny_config(), shard), Watched(tiny_config(), shard)
        for _, _ in zip(range(taken), first.steps(), strict=False):
            pass
        second.warm_up()
        second.load_state(first.state(), 0.0)
        assert [report.train_loss for report in second.steps()] == losses[taken:]
        assert second.audit.record()["short_seq"] == whole.audit.record()["short_seq"]


def test_short_rows_that_never_end_are_found(shard):
    trainer = Watched(tiny_config(), shard)
    for _, _ in zip(range(3), trainer.steps(), strict=False):
        pass
    found = [finding for finding in trainer.audit.findings() if finding.startswith("short_seq")]
    assert len(found) == 1 and "its effect was not seen" in found[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"short_seq_len": "5"}, {"short_seq_len": "16"}, {"short_seq_len": "32"}, {"short_seq_fraction": "0"},
        {"short_seq_fraction": "1"}, {"short_seq_len": "0"}, {"short_seq_len": "-4"},
    ],
)  # fmt: skip
def test_lengths_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match="short_seq"):
        tiny_config(**wrong)
