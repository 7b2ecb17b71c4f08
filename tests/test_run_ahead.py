"""The host that queues a step before it reads the last: the same training, no waiting device, a cap that holds.

A device that computes while the host goes on stands in for CUDA: its time is counted, not measured.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from golf.config.config import build_config
from golf.model.init import build_model
from golf.optim.schedule import Budget
from golf.run.checkpoint import CheckpointWriter, newest_checkpoint, read_checkpoint
from golf.run.folder import RunFolder
from golf.run.ledger import Ledger
from golf.run.session import Interrupted, Interruption
from golf.run.train_loop import take_steps, take_up_checkpoint
from golf.run.trainer import StepReport, Trainer, TrainingError
from golf.runtime import Runtime, Stopwatch

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="12",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="128", warmup_steps="0", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.25", swa_snapshots="4", qat_start="0.5", compile="off",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd", grad_clip_norm="0.3", holdout_every="0",
)  # fmt: skip
LAUNCH = 0.25
"""Seconds in which the host queues a step."""


class Device:
    """Has a queue of steps; the host's clock goes on while they run, and jumps where it waits for one."""

    def __init__(self, seconds: Callable[[int], float]):
        self.seconds, self.now, self.free, self.idle = seconds, 0.0, 0.0, 0.0

    def queue(self, step: int) -> None:
        self.now += LAUNCH
        self.idle += max(0.0, self.now - self.free) if step else 0.0
        self.free = max(self.free, self.now) + self.seconds(step)


class Event:
    def __init__(self, device: Device):
        self.device, self.done = device, 0.0

    def record(self) -> None:
        self.done = self.device.free

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.done)


@pytest.fixture
def start(tiny_stream, monkeypatch) -> Callable[..., Trainer]:
    """Makes trainers on a device whose steps take so many seconds; they run ahead unless told otherwise."""
    torch.set_num_threads(1)

    def build(seconds: Callable[[int], float] = lambda step: 1.0, ahead: bool = True, **knobs: str) -> Trainer:
        config, device = build_config("local", {}, TINY | knobs), Device(seconds)
        runtime = Runtime(torch.device("cpu"))
        clock = Stopwatch(lambda: device.now)
        trainer = Trainer(build_model(config.model, 0), config, runtime, tiny_stream, clock)
        monkeypatch.setattr(torch.cpu, "Event", lambda: Event(device))
        take_step = trainer.take_step
        trainer.take_step = lambda progress: (device.queue(trainer.step), take_step(progress))[1]
        trainer.device, trainer.runs_ahead, trainer.waits = device, ahead, False
        return trainer

    return build


def test_on_a_cpu_nothing_is_queued_ahead(tiny_stream):
    config = build_config("local", {}, TINY)
    trainer = Trainer(build_model(config.model, 0), config, Runtime(torch.device("cpu")), tiny_stream)
    trainer.waits = False
    for report in trainer.steps():
        assert not trainer.queued and trainer.step == report.step and trainer.clock.started is None


def test_the_training_is_the_same_and_the_device_does_not_wait(start):
    """The host logs for half a second after each report; a device that it waits for is idle then."""
    seen = []
    for ahead in (False, True):
        trainer, reports = start(ahead=ahead), []
        for report in trainer.steps():
            reports.append((report.step, report.train_loss, report.lr_scale))
            trainer.device.now += 0.5
        assert not trainer.queued and trainer.clock.started is None
        seen.append((reports, trainer.model.state_dict(), trainer.audit.record(), trainer.average, trainer))
    (one, weights, audit, average, waiting), (other, same, same_audit, same_average, ahead) = seen
    assert one == other and [step for step, _, _ in one] == list(range(1, 13))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert audit == same_audit and audit["grad_clip"]["count"] and audit["qat"]["first"] == 7
    assert (average.count, average.last_step) == (same_average.count, same_average.last_step) == (4, 12)
    assert all(torch.equal(average.mean[name], same_average.mean[name]) for name in average.mean)
    assert waiting.device.idle == 11 * (LAUNCH + 0.5) and ahead.device.idle == 0
    assert (waiting.clock.seconds, ahead.clock.seconds) == (12 * (1 + LAUNCH), 12 + LAUNCH)


def test_what_takes_the_host_long_while_the_device_trains_is_on_the_clock(start):
    trainer = start(ahead=True, iterations="4")
    for _ in trainer.steps():
        trainer.device.now += 10 * bool(trainer.queued)
    assert trainer.clock.seconds == pytest.approx(3 * 10 + 1 + LAUNCH, abs=2)


CAPPED = dict(iterations="0", max_wallclock_seconds="30", qat_enabled="0")


@pytest.mark.parametrize("seconds", [lambda step: 1.0, lambda step: (1.0, 1.4)[step % 7 == 5], lambda step: 0.1])
def test_the_cap_is_never_crossed(start, seconds):
    trainer = start(seconds, **CAPPED)
    reports = list(trainer.steps())
    assert trainer.clock.seconds <= 30 and trainer.device.free <= 30
    assert trainer.clock.seconds == reports[-1].elapsed > 30 - 3, "and the end is not given away"
    assert len(reports) == trainer.step == reports[-1].step


def test_without_the_margin_of_the_queued_step_the_cap_would_be_crossed(start, monkeypatch):
    """Planted: a budget that forgets the step in the queue."""

    def forgetful(self: Budget, step: int, elapsed: float, seconds: float) -> bool:
        return elapsed + seconds / (len(trainer.queued) + 1) > self.seconds

    trainer = start(**CAPPED | {"max_wallclock_seconds": "30.2"})
    monkeypatch.setattr(Budget, "exhausted", forgetful)
    list(trainer.steps())
    assert trainer.clock.seconds > 30.2


def test_averaging_and_quantization_follow_the_time_one_step_late(start):
    trainer = start(iterations="0", max_wallclock_seconds="20", swa_start="0.4", swa_snapshots="6")
    reports = list(trainer.steps())
    began = reports[trainer.audit.records["qat"].first - 1].elapsed
    trainer.finish()
    assert 10 < began <= 13
    assert trainer.average.count >= 5 and trainer.average.last_step == trainer.step


def test_two_messages_a_step(start, monkeypatch):
    """All gradients are one, and what the hosts agree on is the other."""
    messages, send = [], Runtime.sum_over_ranks
    monkeypatch.setattr(Runtime, "sum_over_ranks", lambda self, t: (messages.append(tuple(t.shape)), send(self, t))[1])
    trainer = start()
    list(trainer.steps())
    gradients = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert messages.count((3, 1)) == 12, "loss, time and stop of one rank"
    assert messages.count((gradients,)) == 12 and len(messages) == 24


def test_a_loss_that_is_no_number_stops_one_step_late(start):
    trainer = start()
    with torch.no_grad():
        trainer.model.tok_emb.weight[5] = float("nan")
    with pytest.raises(TrainingError, match="the loss is nan at step 1:"):
        list(trainer.steps())
    assert trainer.step == 2, "the second was queued by then"


def test_a_state_is_not_taken_while_a_step_is_queued(start):
    trainer = start()
    next(trainer.steps())
    with pytest.raises(AssertionError):
        trainer.state()


# ---- the loop ----


def go(trainer: Trainer, folder: RunFolder, interruption: Interruption | None = None) -> None:
    session = SimpleNamespace(folder=folder, interruption=interruption or Interruption(), ledger=Ledger("setup"))
    writer = CheckpointWriter(folder.checkpoints, 0, 1)
    try:
        take_steps(trainer, None, session, writer)
    finally:
        writer.close()


def rows_of(folder: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["train_loss"]) for row in folder.metrics_rows()]


@pytest.fixture
def new_folder(tmp_path) -> Callable[[str], RunFolder]:
    def make(name: str) -> RunFolder:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        return RunFolder(tmp_path / name)

    return make


def test_a_checkpoint_is_of_a_step_that_was_read_and_resumes_bit_for_bit(start, new_folder):
    folder, whole = new_folder("a"), start(checkpoint_seconds="4")
    go(whole, folder)
    assert [step for step, _ in rows_of(folder)] == list(range(1, 13))
    (path,) = newest_checkpoint(folder.checkpoints)
    taken = read_checkpoint([path]).numbers["step"]
    assert 2 < taken < 12
    for row in (rows := folder.metrics_rows()):
        if row["step"] == taken:
            assert read_checkpoint([path]).numbers["elapsed"] == row["elapsed"]
    resumed = start(checkpoint_seconds="0")
    take_up_checkpoint(resumed, folder)
    assert resumed.step == taken
    losses = [(report.step, report.train_loss) for report in resumed.steps()]
    assert losses == [(row["step"], row["train_loss"]) for row in rows if row["step"] > taken]
    weights = resumed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())
    assert all(torch.equal(mean, resumed.average.mean[name]) for name, mean in whole.average.mean.items())
    assert resumed.audit.record() == whole.audit.record()


def test_a_stop_waits_for_the_queued_step(start, new_folder):
    folder, interruption = new_folder("b"), Interruption()
    trainer = start(checkpoint_seconds="0")
    read = trainer.read_step

    def stopped_at_five(elapsed: float, stop: bool) -> StepReport:
        interruption.signal = 15 if trainer.queued[0][0] >= 4 else 0
        return read(elapsed, stop)

    trainer.read_step = stopped_at_five
    with pytest.raises(Interrupted, match="after step 6; go on with --resume"):
        go(trainer, folder, interruption)
    (path,) = newest_checkpoint(folder.checkpoints)
    assert read_checkpoint([path]).numbers["step"] == 6 == rows_of(folder)[-1][0]


def test_held_out_text_is_scored_with_the_weights_of_its_step(start, new_folder, monkeypatch):
    seen = []

    def score(trainer: Trainer, data: None, report: StepReport, folder: RunFolder) -> None:
        assert not trainer.queued and trainer.step == report.step and trainer.clock.started is None
        seen.append(report.step)

    monkeypatch.setattr("golf.run.train_loop.eval_holdout", score)
    trainer = start(holdout_every="4")
    ahead = []
    read = trainer.read_step
    trainer.read_step = lambda elapsed, stop: (ahead.append(len(trainer.queued)), read(elapsed, stop))[1]
    go(trainer, new_folder("c"))
    assert seen == [4, 8, 12]
    assert ahead.count(2) >= 6, "the other steps are queued ahead"
