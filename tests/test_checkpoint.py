"""Checkpoints: what is taken up is exactly what was left, whatever happened to the disk in between."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import golf.run.checkpoint
from golf.config.config import Config, build_config
from golf.data.loader import TokenStream
from golf.model.init import build_model
from golf.optim.optimizers import Optimizers, parameters_of_group
from golf.run.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    TrainingState,
    checkpoint_path,
    generator_tensors,
    newest_checkpoint,
    read_checkpoint,
    restore_generators,
)
from golf.run.folder import RunFolder
from golf.run.ledger import Ledger
from golf.run.session import Interrupted, Interruption
from golf.run.train_loop import take_steps, take_up_checkpoint
from golf.run.trainer import Trainer
from golf.runtime import Log, Runtime, Stopwatch

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="12",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="128", warmup_steps="1", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.3", swa_snapshots="6", qat_start="0.5", compile="off",
    checkpoint_seconds="1",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd",
)  # fmt: skip


class SteadyStopwatch(Stopwatch):
    """Every step is one second, every copy of a checkpoint COPY seconds."""

    def __init__(self):
        self.time = 0.0
        super().__init__(now=lambda: self.time)

    def start(self) -> None:
        super().start()
        self.time += 1.0

    def __enter__(self) -> None:
        self.start()
        self.time += COPY - 1.0


COPY = 2.8


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def tiny_config(**overrides: str) -> Config:
    return build_config("local", {}, TINY | overrides)


def new_trainer(tiny_stream: TokenStream, config: Config | None = None) -> Trainer:
    config = config or tiny_config()
    runtime = Runtime(torch.device("cpu"), log=Log())
    trainer = Trainer(build_model(config.model, config.run.seed), config, runtime, tiny_stream, SteadyStopwatch())
    trainer.warm_up()
    return trainer


def take(trainer: Trainer, count: int) -> list[float]:
    return [report.train_loss for _, report in zip(range(count), trainer.steps(), strict=False)]


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def written(folder: Path, state: TrainingState, step: int) -> list[Path]:
    """The files of a checkpoint that one process wrote."""
    writer = CheckpointWriter(folder, 0, 1)
    path = writer.write(state, step)
    writer.close()
    return [path]


# ---- state -> file -> state ----


def test_a_state_comes_back_bit_for_bit(tiny_stream, folder):
    trainer = new_trainer(tiny_stream)
    take(trainer, 8)
    state = trainer.state()
    kinds = {name.partition(".")[0] for name in state.tensors}
    assert kinds == {"model", "average", "optimizer", "rng"}
    entries = {name.rpartition(".")[2] for name in state.tensors if name.startswith("optimizer.")}
    assert entries == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    assert len([n for n in state.tensors if n.endswith((".momentum", ".exp_avg"))]) == len(
        list(trainer.model.parameters())
    )
    back = read_checkpoint(written(folder.checkpoints, state, 8))
    assert same_tensors(back.tensors, {name: state.tensors[name] for name in back.tensors})
    assert set(back.tensors) == set(state.tensors) and back.numbers == state.numbers


def test_what_is_written_is_the_state_at_that_moment(tiny_stream, folder, monkeypatch):
    """Training goes on while the thread writes."""
    trainer = new_trainer(tiny_stream)
    take(trainer, 2)
    state = trainer.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    save, trained = golf.run.checkpoint.save_file, threading.Event()
    monkeypatch.setattr(golf.run.checkpoint, "save_file", lambda *what: trained.wait(600) and save(*what))
    writer = CheckpointWriter(folder.checkpoints, 0, 1)
    path = writer.write(state, 2)
    take(trainer, 2)
    trained.set()
    writer.close()
    assert not torch.equal(trainer.model.tok_emb.weight, before["model.tok_emb.weight"])
    back = read_checkpoint([path]).tensors
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_torchs_generator_goes_on_where_it_was():
    torch.manual_seed(5)
    states = {name: tensor.clone() for name, tensor in generator_tensors().items()}
    first = torch.rand(3)
    torch.manual_seed(9)
    assert not torch.equal(torch.rand(3), first)
    restore_generators(states)
    assert torch.equal(torch.rand(3), first)


def test_nobody_draws_from_the_generators_that_no_checkpoint_holds(repository):
    drawn = re.compile(r"(?<![.\w])random\.\w+\(|\bnp\.random\.(?!Philox\b|default_rng\b)\w+")
    assert drawn.search("random.random()") and drawn.search("np.random.rand()"), "planted"
    files = [repository / "train_gpt.py", *(repository / "golf").rglob("*.py")]
    assert [f"{file}: {found[0]}" for file in files for found in drawn.finditer(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("parted_at", [[3], [5, 9], [12]])
def test_steps_in_parts_are_the_steps_of_one_process(tiny_stream, folder, parted_at):
    """QAT starts after step 6, and the averaging of weights after step 3."""
    whole = new_trainer(tiny_stream)
    losses = take(whole, 99)
    whole.finish()
    parts, trainer = [], new_trainer(tiny_stream)
    for step in parted_at:
        parts += take(trainer, step - trainer.step)
        files = written(folder.checkpoints, trainer.state(), step)
        trainer.batches.close()
        trainer = new_trainer(tiny_stream)
        trainer.load_state(read_checkpoint(files), latest=0.0)
        assert trainer.step == step
    parts += take(trainer, 99)
    trainer.finish()
    assert parts == losses and len(losses) == 12
    one, other = whole.state(), trainer.state()
    assert same_tensors(dict(sorted(one.tensors.items())), dict(sorted(other.tensors.items())))
    keys = ("step", "average", "features")
    assert [one.numbers[key] for key in keys] == [other.numbers[key] for key in keys]
    assert one.numbers["features"]["qat"]["first"] == 7 and one.numbers["average"][0] == 6


def test_momentum_of_another_ranks_matrix_is_not_taken_over(tiny_stream):
    """It would grow old here, be written into this rank's next checkpoint, and win over the fresh one."""
    config = tiny_config()
    model = build_model(config.model, 0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ranks = [Optimizers(model, config.optim, Runtime(torch.device("cpu"), rank, 2)) for rank in range(2)]
    matrices = parameters_of_group(model, "matrix")
    everything = {f"optimizer.{names[matrix]}.momentum": torch.full_like(matrix, 3.0) for matrix in matrices}
    kept = []
    for optimizers in ranks:
        optimizers.load_state_tensors(everything, names)
        kept.append({name for name in optimizers.state_tensors(names) if name.endswith(".momentum")})
    assert kept[0] | kept[1] == set(everything) and not kept[0] & kept[1] and all(kept)


# ---- the writer ----

SMALL = TrainingState({"model.a": torch.arange(6.0)}, {"step": 1})


def test_the_last_two_are_kept(folder):
    writer = CheckpointWriter(folder.checkpoints, 0, 1)
    for step in (1, 2, 3, 10):
        writer.write(SMALL, step)
    writer.close()
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step0000003-rank0of1.safetensors", "step0000010-rank0of1.safetensors"]


def test_the_newest_is_the_newest_that_all_ranks_have_written(folder):
    for step, ranks in ((10, (0, 1)), (20, (0, 1)), (30, (0,)), (40, (1,))):
        for rank in ranks:
            checkpoint_path(folder.checkpoints, step, rank, 2).touch()
    assert [path.name for path in newest_checkpoint(folder.checkpoints)] == [
        "step0000020-rank0of2.safetensors",
        "step0000020-rank1of2.safetensors",
    ]
    assert newest_checkpoint(folder.checkpoints / "none") == []


def test_a_rank_that_is_ahead_keeps_what_the_others_need(folder):
    slow, fast = (CheckpointWriter(folder.checkpoints, rank, 2) for rank in (1, 0))
    slow.write(SMALL, 10)
    slow.wait()
    for step in (10, 20, 30, 40):
        fast.write(SMALL, step)
    fast.wait()
    assert [path.name[:11] for path in newest_checkpoint(folder.checkpoints)] == ["step0000010"] * 2
    for step in (40, 50):
        slow.write(SMALL, step)
    slow.close()
    fast.write(SMALL, 50)
    fast.close()
    assert len(list(folder.checkpoints.iterdir())) == 4


def test_parts_of_all_ranks_make_one_state(folder):
    for rank in range(2):
        tensors = {"rng.torch": torch.tensor([rank]), f"optimizer.m{rank}.momentum": torch.tensor([rank])}
        writer = CheckpointWriter(folder.checkpoints, rank, 2)
        writer.write(TrainingState(tensors, {"step": 7, "rank": rank}), 7)
        writer.close()
    state = read_checkpoint(newest_checkpoint(folder.checkpoints))
    assert {name: int(value) for name, value in state.tensors.items()} == {
        "rng.torch": 0, "optimizer.m0.momentum": 0, "optimizer.m1.momentum": 1,
    }  # fmt: skip
    assert state.numbers == {"step": 7, "rank": 0}


def fail_once(monkeypatch, folder: Path, left: bytes = b"") -> None:
    """The next checkpoint gets no further than `left`: the disk is full."""
    save = golf.run.checkpoint.save_file

    def full(tensors, path, metadata):
        monkeypatch.setattr(golf.run.checkpoint, "save_file", save)
        Path(path).write_bytes(left)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(golf.run.checkpoint, "save_file", full)


@pytest.mark.parametrize("following", ["write", "close"])
def test_a_write_that_fails_is_told_by_the_next_call_and_harms_no_file(folder, monkeypatch, following):
    (old,) = written(folder.checkpoints, SMALL, 1)
    content = old.read_bytes()
    writer = CheckpointWriter(folder.checkpoints, 0, 1)
    fail_once(monkeypatch, folder.checkpoints, b"half a file")
    writer.write(SMALL, 2)
    with pytest.raises(OSError, match="No space left"):
        writer.write(SMALL, 3) if following == "write" else writer.close()
    assert list(folder.checkpoints.iterdir()) == [old] and old.read_bytes() == content
    assert newest_checkpoint(folder.checkpoints) == [old]


def test_what_a_killed_process_left_half_written_is_ignored_and_cleared_away(folder):
    files = written(folder.checkpoints, SMALL, 1)
    torn = folder.checkpoints / ".step0000002-rank0of1.safetensors.77.tmp"
    other = folder.checkpoints / ".step0000002-rank1of2.safetensors.78.tmp"
    for path in (torn, other):
        path.write_bytes(files[0].read_bytes()[:40])
    assert newest_checkpoint(folder.checkpoints) == files
    CheckpointWriter(folder.checkpoints, 0, 1).close()
    assert not torn.exists() and other.exists(), "another rank's may be at work"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no numbers", "gone"])
def test_a_damaged_file_is_one_clear_line(folder, damage):
    (path,) = written(folder.checkpoints, SMALL, 1)
    if damage == "gone":
        path.unlink()
    elif damage == "no numbers":
        golf.run.checkpoint.save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    else:
        path.write_bytes({"cut": path.read_bytes()[:-3], "empty": b"", "text": b"no checkpoint at all"}[damage])
    with pytest.raises(CheckpointError, match="can't be read .*remove it, and the one before is used") as caught:
        read_checkpoint([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- the loop ----


@pytest.fixture
def start(tiny_stream, folder, monkeypatch) -> Callable[..., tuple[Trainer, SimpleNamespace]]:
    """A trainer that took up what there is, with what `take_steps` needs of a session."""

    def build(**knobs: str) -> tuple[Trainer, SimpleNamespace]:
        trainer = new_trainer(tiny_stream, tiny_config(**knobs))
        take_up_checkpoint(trainer, folder)
        session = SimpleNamespace(folder=folder, interruption=Interruption(), ledger=Ledger("setup"))
        return trainer, session

    return build


def go(trainer: Trainer, session: SimpleNamespace) -> None:
    writer = CheckpointWriter(session.folder.checkpoints, 0, 1)
    try:
        take_steps(trainer, None, session, writer)
    finally:
        writer.close()


def clock_of(folder: RunFolder) -> float:
    return max(row["elapsed"] for row in folder.metrics_rows())


@pytest.mark.parametrize("after", [2, 13, 15, 16, 18, 19])
def test_the_cap_holds_although_checkpoints_are_on_the_clock(start, folder, after):
    trainer, session = start(iterations="0", max_wallclock_seconds="400", checkpoint_seconds=str(after))
    trainer.clock.total = 380.0
    go(trainer, session)
    assert 395 < trainer.clock.seconds <= 400
    on_the_clock = trainer.clock.seconds - 380 - trainer.step
    assert (on_the_clock > 1) == (after < 16), "copies count, but for those that would come within the last percent"


def test_a_stop_leaves_a_checkpoint_that_costs_no_training_time(start, folder):
    trainer, session = start(iterations="0", max_wallclock_seconds="40", checkpoint_seconds="0")
    session.interruption.signal = 15
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 1; go on with --resume"):
        go(trainer, session)
    (path,) = newest_checkpoint(folder.checkpoints)
    assert read_checkpoint([path]).numbers["elapsed"] == clock_of(folder) == 1.0
    trainer, _ = start(iterations="0", max_wallclock_seconds="40")
    assert (trainer.step, trainer.clock.seconds, trainer.lost_seconds) == (1, 1.0, 0.0)


def test_lost_time_stays_on_the_clock_however_often_a_run_is_killed(start, folder, capsys):
    """Rows of steps that are taken again go; the clock's last reading must outlive them, also where the next process
    is killed before its first step."""
    trainer, _ = start(iterations="0", max_wallclock_seconds="40")
    take(trainer, 3)
    written(folder.checkpoints, trainer.state(), 3)
    for step in range(1, 10):
        folder.append_metrics({"step": step, "elapsed": float(step), "train_loss": 1.0})
    for _ in range(3):
        trainer, _ = start(iterations="0", max_wallclock_seconds="40")
        assert (trainer.step, trainer.clock.seconds, trainer.lost_seconds) == (3, 9.0, 6.0)
        assert [row["step"] for row in folder.metrics_rows() if "train_loss" in row] == [1, 2, 3]
    assert "resume: from step 3, clock at 9.0 s, 6.0 s of training lost" in capsys.readouterr().out
    next(path for path in folder.checkpoints.iterdir()).unlink()
    for _ in range(2):
        trainer, _ = start(iterations="0", max_wallclock_seconds="40")
        assert (trainer.step, trainer.clock.seconds, trainer.lost_seconds) == (0, 9.0, 9.0)


def test_a_new_run_takes_up_nothing(start, folder, capsys):
    trainer, _ = start()
    assert (trainer.step, trainer.clock.seconds) == (0, 0.0) and "resume" not in capsys.readouterr().out


def test_a_torn_row_of_metrics_is_no_row(start, folder):
    row = {"step": 1, "elapsed": 2.0, "train_loss": 1.0}
    folder.metrics.write_text(json.dumps(row) + '\n{"step": 2, "ela')
    trainer, _ = start()
    assert trainer.clock.seconds == 2.0
    folder.append_metrics(row)
    assert folder.metrics_rows()[-1] == row
