"""The frontier's stack on several processes: a toy twin with every technique on has the losses of one process."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from golf.config.config import Config, build_config
from golf.data.loader import BatchPrefetcher, TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.optim.optimizers import Optimizers, set_gradients
from golf.run.trainer import Trainer
from golf.runtime import Runtime

RANKS, STEPS = 4, 24
TOLERANCE = 1e-6
"""Nats of a step's loss. One process takes the same rows in four passes, so only the order of sums differs: 1.5e-7 was
seen."""
TOY = dict(
    vocab_size="64", num_layers="5", model_dim="32", train_seq_len="32", short_seq_len="16", rope_dims="4",
    iterations=str(STEPS), max_wallclock_seconds="0", train_batch_tokens="256", micro_batch_tokens="64",
    warmup_steps="1", threads="1", eval_seq_len="32", eval_stride="8",
    quantizer="rtn", holdout_every="0",
)  # fmt: skip
TECHNIQUES = {
    "depth_recurrence", "norm_by_depth", "exclusive_attention", "partial_rope", "lanes", "document_attention",
    "short_seq", "warmdown", "muon_momentum_warmup", "grad_clip",
}  # fmt: skip
LEARNED = {"attention_gate": "blocks.0.attn.gate", "smear_gate": "smear.gate", "skip_gates": "skip_gates"}
"""Features that show in a weight which is zero at first."""
MISTAKES = ("gradients stay local", "updates stay local", "all read the same rows")


def toy_twin() -> Config:
    return build_config("frontier-base-local", {}, TOY)


def make_mistake(name: str, patch: pytest.MonkeyPatch) -> None:
    """Plants in the optimizers or the trainer what a port to several GPUs would forget."""
    if name == "gradients stay local":

        def forget(optimizers: Optimizers) -> None:
            torch.cat([parameter.grad.flatten() for parameter in optimizers.parameters], out=optimizers.message_N)
            set_gradients(optimizers.parameters, optimizers.message_N)

        patch.setattr(Optimizers, "sum_gradients", forget)
    elif name == "updates stay local":

        def repeat(updates_N: torch.Tensor, own_N: torch.Tensor) -> None:
            updates_N.copy_(own_N.repeat(RANKS))

        patch.setattr("golf.optim.optimizers.gather_updates", repeat)
    elif name:
        patch.setattr("golf.run.trainer.BatchPrefetcher", lambda *given: BatchPrefetcher(*given[:3], 0, *given[4:]))


def train_losses(shard: Path, runtime: Runtime) -> tuple[list[float], Trainer]:
    torch.set_num_threads(1)
    config = toy_twin()
    trainer = Trainer(build_model(config.model, config.run.seed), config, runtime, TokenStream([shard]))
    trainer.warm_up()
    losses = [report.train_loss for report in trainer.steps()]
    trainer.finish()
    return losses, trainer


def train_as_rank(rank: int, port: int, shard: Path, out: Path) -> None:
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    for mistake in ("", *MISTAKES):
        with pytest.MonkeyPatch.context() as patch:
            make_mistake(mistake, patch)
            losses, trainer = train_losses(shard, Runtime(torch.device("cpu"), rank, RANKS))
        state = trainer.average.mean | {f"last.{name}": part for name, part in trainer.model.state_dict().items()}
        weights_N = torch.cat([weight.flatten() for weight in state.values()])
        np.savez(out / f"{mistake}{rank}.npz", losses=losses, weights=weights_N.numpy())
    dist.destroy_process_group()
    os._exit(0)  # see golf.runtime.leave: Python's own tidying may abort a process of a group


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    """A walk through the vocabulary, in documents of about 40 tokens."""
    path = tmp_path_factory.mktemp("shards") / "toy_train_000000.bin"
    generator = np.random.default_rng(0)
    walk = generator.integers(-2, 3, 12_000).cumsum() % 61 + 3
    walk[generator.random(12_000) < 1 / 40] = toy_twin().model.bos_id
    write_shard(path, walk)
    return path


@pytest.fixture(scope="module")
def runs(shard, tmp_path_factory) -> SimpleNamespace:
    """Losses and trainer of one process; losses and weights of four, by mistake and rank."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train_as_rank, (port, shard, out), nprocs=RANKS)
    ranks = {name: [np.load(out / f"{name}{rank}.npz") for rank in range(RANKS)] for name in ("", *MISTAKES)}
    alone, trainer = train_losses(shard, Runtime(torch.device("cpu")))
    return SimpleNamespace(alone=np.array(alone), trainer=trainer, ranks=ranks)


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(runs):
    ranks = runs.ranks[""]
    assert len(runs.alone) == STEPS and runs.alone[-1] < runs.alone[0] - 0.5, "the curve must move to mean something"
    assert all(np.array_equal(rank[key], ranks[0][key]) for rank in ranks for key in ("losses", "weights"))
    assert ranks[0]["losses"][0] == runs.alone[0], "before the first update nothing may differ"
    assert np.abs(ranks[0]["losses"] - runs.alone).max() < TOLERANCE


@pytest.mark.slow
def test_every_technique_was_on(runs):
    records = runs.trainer.audit.records
    assert records.keys() >= TECHNIQUES | LEARNED.keys()
    assert [name for name in TECHNIQUES if not (records[name].count and records[name].proven)] == []
    weights = runs.trainer.model.state_dict()
    assert all(weights[name].any() for name in LEARNED.values())


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(runs, mistake):
    ranks = runs.ranks[mistake]
    assert np.abs(ranks[0]["losses"] - runs.alone).max() > 10_000 * TOLERANCE
