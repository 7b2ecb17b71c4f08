"""The training loop: same curve for every world size, same bytes for the same seed, features that act."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from golf.config.config import Config, build_config
from golf.config.knobs import ConfigError
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.trainer import Trainer, TrainingError, count_micro_steps
from golf.runtime import Runtime, Stopwatch

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="12",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="128", warmup_steps="1", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.5",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd",
)  # fmt: skip


def tiny_config(**overrides: str) -> Config:
    return build_config("local", {}, TINY | overrides)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "tiny_train_000000.bin"
    walk = np.random.default_rng(0).integers(-2, 3, 5000).cumsum() % 62 + 2
    write_shard(path, walk)
    return path


def train_losses(config: Config, shard: Path, runtime: Runtime) -> tuple[list[float], Trainer]:
    torch.set_num_threads(1)
    model = build_model(config.model, config.run.seed)
    trainer = Trainer(model, config, runtime, TokenStream([shard]))
    trainer.warm_up()
    losses = [report.train_loss for report in trainer.steps()]
    trainer.finish()
    return losses, trainer


def world_configs() -> list[tuple[Config, float]]:
    """Configurations with the largest difference allowed between loss curves.

    On the grid a difference of the last bit is a whole code now and then, and grows: the two curves part slowly.
    """
    return [(tiny_config(qat_enabled="0"), 1e-4), (tiny_config(qat_start="0"), 2e-2)]


def train_as_rank(rank: int, world_size: int, port: int, shard: Path, out: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for number, (config, _) in enumerate(world_configs()):
        losses, trainer = train_losses(config, shard, Runtime(torch.device("cpu"), rank, world_size))
        flat_weights = torch.cat([weight.flatten() for weight in trainer.model.state_dict().values()])
        np.savez(out / f"config{number}rank{rank}.npz", losses=losses, weights=flat_weights.numpy())
    dist.destroy_process_group()
    os._exit(0)  # see golf.runtime.leave: Python's own tidying may abort a process of a group


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_curve_does_not_depend_on_the_world_size(world_size, shard, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train_as_rank, (world_size, port, shard, tmp_path), nprocs=world_size)
    for number, (config, tolerance) in enumerate(world_configs()):
        alone, _ = train_losses(config, shard, Runtime(torch.device("cpu")))
        ranks = [np.load(tmp_path / f"config{number}rank{rank}.npz") for rank in range(world_size)]
        assert np.abs(ranks[0]["losses"] - alone).max() < tolerance
        assert alone[-1] < alone[0] - 0.2, "the curve must move for the comparison to mean something"
        assert all(np.array_equal(rank["weights"], ranks[0]["weights"]) for rank in ranks)


def test_micro_steps_do_not_change_the_curve(shard):
    config = tiny_config(qat_enabled="0")
    whole, _ = train_losses(config, shard, Runtime(torch.device("cpu")))
    config = replace(config, train=replace(config.train, micro_batch_tokens=32))
    parts, trainer = train_losses(config, shard, Runtime(torch.device("cpu")))
    assert trainer.micro_steps == 4
    assert np.abs(np.subtract(whole, parts)).max() < 1e-4


def test_rows_that_can_not_be_dealt_evenly_are_refused():
    with pytest.raises(ConfigError, match="8 rows of 16"):
        count_micro_steps(tiny_config(), world_size=3)


def test_same_seed_same_bits_and_warm_up_leaves_no_trace(shard):
    runtime = Runtime(torch.device("cpu"))
    first, trainer = train_losses(tiny_config(warmup_steps="3"), shard, runtime)
    second, other = train_losses(tiny_config(warmup_steps="0"), shard, runtime)
    assert first == second
    states = trainer.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_features_that_were_armed_acted(shard):
    _, trainer = train_losses(tiny_config(qat_start="0.5", swa_snapshots="4"), shard, Runtime(torch.device("cpu")))
    records = trainer.audit.records
    assert (records["qat"].first, records["qat"].last, records["qat"].count) == (7, 12, 6)
    assert records["qat"].proven and records["swa"].count == trainer.average.count == 4
    acting = ("warmdown", "muon_momentum_warmup", "grad_clip")
    assert all(records[feature].count and records[feature].proven for feature in acting)


def test_a_feature_that_never_acted_is_found(shard):
    config = tiny_config(iterations="20000")
    config = replace(config, average=replace(config.average, swa_start=0.9))
    trainer = Trainer(build_model(config.model, 0), config, Runtime(torch.device("cpu")), TokenStream([shard]))
    trainer.budget = replace(trainer.budget, iterations=3)  # the run ends long before the horizon it was given
    trainer.average.slots_due = lambda progress: 0
    list(trainer.steps())
    trainer.finish()
    assert trainer.audit.records["swa"].count == 0
    assert any(finding.startswith("swa was switched on and never acted") for finding in trainer.audit.findings())


class FakeStopwatch(Stopwatch):
    """Every step takes one second."""

    def __init__(self):
        self.time = 0.0
        super().__init__(now=lambda: self.time)

    def start(self) -> None:
        super().start()
        self.time += 1.0


def test_quantization_and_averaging_start_at_their_share_of_the_seconds(shard):
    knobs = dict(iterations="20000", max_wallclock_seconds="20", qat_start="0.5", swa_start="0.4", swa_snapshots="6")
    config = tiny_config(**knobs)
    model = build_model(config.model, 0)
    trainer = Trainer(model, config, Runtime(torch.device("cpu")), TokenStream([shard]), FakeStopwatch())
    quantized = [(report.elapsed, trainer.fake_quantized) for report in trainer.steps()]
    trainer.finish()
    assert [seconds for seconds, _ in quantized] == list(range(1, 20))  # half a step is kept for one that stumbles
    assert [flag for _, flag in quantized] == [False] * 10 + [True] * 9
    assert trainer.average.count == 6


def test_a_loss_that_is_no_number_stops_the_run(shard):
    trainer = Trainer(
        build_model(tiny_config().model, 0), tiny_config(), Runtime(torch.device("cpu")), TokenStream([shard])
    )
    with torch.no_grad():
        trainer.model.tok_emb.weight[5] = float("nan")
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        list(trainer.steps())


def test_quantization_acts_in_the_compiled_graph_too(shard):
    """A flag that torch.compile folds into a constant is the field's most common dead feature."""
    config = tiny_config(mlp_bits="2", attn_bits="2")
    trainer = Trainer(build_model(config.model, 0), config, Runtime(torch.device("cpu")), TokenStream([shard]))
    trainer.forward = torch.compile(trainer.model, backend="eager", dynamic=False, fullgraph=True)
    losses = []
    for wanted in (False, True, False):
        trainer.set_fake_quantization(wanted)
        losses.append(trainer.accumulate_gradients(0).item())
    assert losses[0] == losses[2] != losses[1]
