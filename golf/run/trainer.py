"""Trains the model: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from golf.config.config import Config
from golf.config.features import Feature, StepFacts, register_feature
from golf.config.knobs import ConfigError, UserError
from golf.data.loader import BatchPrefetcher, TokenStream, order_stream
from golf.data.tokenizer import load_tokenizer
from golf.model.fused import install_fused
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.model.segments import check_flash
from golf.optim.average import new_average
from golf.optim.optimizers import Optimizers
from golf.optim.prefix_target import PrefixObjective, prefix_weight
from golf.optim.schedule import learning_rate_scale, training_budget
from golf.quant.grid import RowGrids
from golf.quant.qat import install_activation_quantizers, install_fake_quantization, remove_fake_quantization
from golf.run.checkpoint import TrainingState, features_of, generator_tensors, restore_generators, tensors_under
from golf.run.feature_audit import FeatureAudit
from golf.run.proofs import MOST_BATCHES, verify_features
from golf.runtime import Runtime, Stopwatch

STEP_MARGIN = 1.5
"""Multiple of the longest of the last hundred steps that a step may take, so that a slow step still ends within the
cap."""


class TrainingError(UserError):
    """Reports a training that can't continue."""


@dataclass(frozen=True)
class StepReport:
    """Describes one finished step, for the log, the metrics file and the progress line."""

    step: int
    train_loss: float
    elapsed: float
    """Seconds on the training clock."""
    progress: float
    """Share of the budget that is used up."""
    lr_scale: float


def new_trainer(config: Config, runtime: Runtime, stream: TokenStream) -> "Trainer":
    """Returns a trainer of a new model with its initial weights and activation quantizers.

    Raises ConfigError where the device can't run the model's attention.
    """
    if config.model.document_attention or config.model.attention_window:
        check_flash(config.model, runtime.device)
    model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
    if config.run.kernels != "off" and runtime.device.type == "cuda":
        install_fused(model)
    return Trainer(install_activation_quantizers(model), config, runtime, stream)


class Trainer:
    """Trains a model with its optimizers, average and clock."""

    def __init__(
        self, model: GPT, config: Config, runtime: Runtime, stream: TokenStream, clock: Stopwatch | None = None
    ):
        self.model, self.config, self.runtime = model, config, runtime
        if config.train.knowledge_frozen:
            model.knowledge.requires_grad_(False)
        ordered = order_stream(stream, config.data.row_order, config.model.bos_id, config.run.seed)
        self.batches = BatchPrefetcher(
            ordered, config.train.train_batch_tokens, config.model.train_seq_len, runtime.rank, runtime.world_size,
            runtime.device, config.data.row_order,
        )  # fmt: skip
        for length in self.seq_lens():
            model.keep_rotary(length)
        self.objective = model
        if config.train.prefix_weight:
            self.objective = PrefixObjective(model, load_tokenizer(config.data.tokenizer_path))
        compiled = runtime.compiles
        self.forward = torch.compile(self.objective, dynamic=False, fullgraph=True) if compiled else self.objective
        self.optimizers = Optimizers(model, config.optim, runtime)
        self.average = new_average(config.average)
        self.budget = training_budget(config)
        self.micro_steps = count_micro_steps(config, runtime.world_size)
        self.clock = clock or Stopwatch()
        self.recent_seconds: deque[float] = deque([0.0], maxlen=100)
        self.audit = FeatureAudit(config)
        self.fake_quantized, self.row_grids, self.seq_len = False, RowGrids(), config.model.train_seq_len
        self.step = 0
        self.lost_seconds = 0.0
        """Training time that kills wasted: it is on the clock, its steps are not in the weights."""
        self.stop_agreed = False
        self.runs_ahead, self.waits = runtime.device.type == "cuda", True
        """Whether a step may be queued before the last is read, and whether whoever takes the reports wants none."""
        self.queued: deque[tuple[int, StepFacts, float, Tensor, torch.Event]] = deque()
        """Number, facts but for the norm, learning-rate scale, loss and norm, and end of each step not yet read."""

    def warm_up(self) -> None:
        """Compiles and touches everything that training will run, then restores weights and optimizers."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        train = self.config.train
        for phase in sorted(set(map(self.phase, self.phase_starts())), reverse=True):
            self.enter(phase)
            for step in range(train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(progress=0.0, lr_scale=0.0)
                self.runtime.print(f"warmup_step:{step + 1}/{train.warmup_steps}")
            self.model.load_state_dict(before)
            self.verify_features(at_start=True)
            self.model.load_state_dict(before)
        self.optimizers = Optimizers(self.model, self.config.optim, self.runtime)

    def seq_lens(self) -> list[int]:
        """Returns the lengths that rows have in training."""
        train = self.config.train
        return list(filter(None, (train.short_seq_len, train.middle_seq_len, self.config.model.train_seq_len)))

    def phase_starts(self) -> list[float]:
        """Returns the shares of the budget at which another phase may begin."""
        quant, train = self.config.quant, self.config.train
        return sorted({0.0, quant.qat_start, train.short_seq_fraction, train.middle_seq_fraction, train.loop_start})

    def phase(self, progress: float) -> tuple[bool, int, bool]:
        """Returns (whether weights pass through the export grid, tokens in a row, whether blocks repeat) at a share of
        the budget."""
        quant, train, seq_len = self.config.quant, self.config.train, self.config.model.train_seq_len
        if train.middle_seq_len and progress < train.middle_seq_fraction:
            seq_len = train.middle_seq_len
        if train.short_seq_len and progress < train.short_seq_fraction:
            seq_len = train.short_seq_len
        looping = progress >= train.loop_start if train.loop_start else True
        return quant.qat_enabled and progress >= quant.qat_start, seq_len, looping

    def enter(self, phase: tuple[bool, int, bool]) -> None:
        """Makes the next forward passes those of a phase."""
        fake_quantized, self.seq_len, self.model.looping = phase
        self.set_fake_quantization(fake_quantized)

    def verify_features(self, at_start: bool) -> None:
        """Verifies that the step, as it is compiled now, has the features that are on."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return (batch for step in range(MOST_BATCHES) for batch in self.micro_batches(step))

        for line in verify_features(self.audit, self.facts(1.0), self.forward, self.model, batches, at_start):
            self.runtime.print(line)

    def facts(self, progress: float) -> StepFacts:
        return StepFacts(progress, self.seq_len, self.fake_quantized, None)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns inputs_BT and targets_BT of each forward pass of `step`, which has the same tokens for every row
        length."""
        parts = (part_BT.view(-1, self.seq_len).chunk(self.micro_steps) for part_BT in self.batches.get(step))
        return zip(*parts, strict=True)

    def set_fake_quantization(self, wanted: bool) -> None:
        if self.config.quant.qat_enabled and wanted != self.fake_quantized:
            if wanted:
                _, self.row_grids = install_fake_quantization(self.model, self.config.quant)
            else:
                remove_fake_quantization(self.model)
                self.row_grids = RowGrids()
        self.fake_quantized = wanted

    def accumulate_gradients(self, step: int) -> Tensor:
        """Leaves this rank's part of the gradient of `step` in .grad; returns its share of the mean loss."""
        self.row_grids.renew()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for inputs_BT, targets_BT in self.micro_batches(step):
            loss = self.forward(inputs_BT, targets_BT)
            (loss / (self.micro_steps * self.runtime.world_size)).backward()
            loss_sum += loss.detach()
        return loss_sum / (self.micro_steps * self.runtime.world_size)

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
        """Trains until the budget is used up, and yields a report of each step.

        Where nothing is `queued` then, the state is that of the step, and the clock stands still. On CUDA, unless
        `waits` is set, the next step is queued before the numbers of the last are read: the device never waits for the
        host, the clock goes on, and of the budget one more step is kept free.

        Once any rank's `stop_requested` returns True, `stop_agreed` is set on all of them, after the same step.
        """
        elapsed = self.clock.seconds
        while True:
            steps = len(self.queued)
            over = self.budget.exhausted(self.step, elapsed, (steps + 1) * STEP_MARGIN * max(self.recent_seconds))
            if not over and steps <= (self.runs_ahead and not self.waits):
                self.queue_step(elapsed)
            elif steps:
                report = self.read_step(elapsed, stop_requested())
                elapsed = report.elapsed
                yield report
            else:
                return

    def queue_step(self, elapsed: float) -> None:
        """Starts a step and the copy of its numbers to the host; `elapsed` is the last time that ranks agreed on."""
        progress = self.budget.progress(self.step, elapsed)
        if self.queued:  # the weights of the step before are there now, and not when its numbers are read
            self.average.observe_step(self.model, progress, self.step, self.audit)
        else:
            self.clock.start()
        loss, norm, lr_scale = self.take_step(progress)
        numbers_N = torch.stack([loss] if norm is None else [loss, norm.double()]).to("cpu", non_blocking=True)
        done = torch.get_device_module(self.runtime.device).Event()
        done.record()
        self.step += 1
        self.queued.append((self.step, self.facts(progress), lr_scale, numbers_N, done))

    def read_step(self, elapsed: float, stop: bool) -> StepReport:
        """Waits for the oldest queued step, and agrees with the other ranks on loss and time in one message."""
        step, facts, lr_scale, numbers_N, done = self.queued.popleft()
        done.synchronize()
        loss, norm = (*numbers_N.tolist(), None)[:2]
        loss, now, stop = self.runtime.values_of_ranks(loss, self.clock.seconds, stop)
        loss, now, self.stop_agreed = sum(loss), max(now), any(stop)
        progress = self.budget.progress(step, now)
        if not self.queued:
            self.average.observe_step(self.model, progress, step, self.audit)
            self.clock.stop()
        self.recent_seconds.append(now - elapsed)
        if not math.isfinite(loss):  # the loss is the same on every rank, so all stop
            raise TrainingError(f"the loss is {loss} at step {step}: lower matrix_lr or embed_lr")
        self.audit.note_step(step, replace(facts, gradient_norm=norm))
        return StepReport(step, loss, now, progress, lr_scale)

    def take_step(self, progress: float) -> tuple[Tensor, Tensor | None, float]:
        """Returns (this rank's share of the loss, norm of gradients where they are clipped, learning-rate scale)."""
        self.enter(self.phase(progress))
        if self.config.train.prefix_weight:
            self.objective.weight.fill_(prefix_weight(progress, self.config.train))
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        norm = self.optimizers.step(progress, lr_scale)
        return train_loss, norm, lr_scale

    def finish(self) -> None:
        """Ends training: the last weights count in the average, even if the cap came early."""
        self.enter(self.phase(1.0))  # a process that resumed behind the last step has not been in it
        self.verify_features(at_start=False)
        self.batches.close()
        self.set_fake_quantization(False)
        if self.step != self.average.last_step:
            self.average.observe_step(self.model, 1.0, self.step, self.audit)

    def state(self) -> TrainingState:
        """Returns all the state that resuming after the last step needs."""
        assert not self.queued
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = self.optimizers.state_tensors(names) | generator_tensors()
        if self.runtime.is_main:  # equal on every rank
            tensors |= {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
            tensors |= {f"average.{name}": mean for name, mean in self.average.mean.items()}
        numbers = {
            "step": self.step,
            "elapsed": self.clock.seconds,
            "lost_seconds": self.lost_seconds,
            "recent_seconds": list(self.recent_seconds),
            "average": [self.average.count, self.average.seen, self.average.last_step],
            "features": self.audit.record(),
        }
        return TrainingState(tensors, numbers)

    def load_state(self, state: TrainingState, latest: float) -> None:
        """Resumes from `state`, with the clock at `latest`, the last reading of a process that was killed later."""
        tensors, numbers = state.tensors, state.numbers
        self.model.load_state_dict(tensors_under("model.", tensors))
        means = tensors_under("average.", tensors)
        self.average.mean = {name: mean.to(self.runtime.device) for name, mean in means.items()}
        self.average.count, self.average.seen, self.average.last_step = numbers["average"]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizers.load_state_tensors(tensors, names)
        restore_generators(tensors)
        self.step, self.clock.total = numbers["step"], max(numbers["elapsed"], latest)
        self.lost_seconds = numbers["lost_seconds"] + self.clock.total - numbers["elapsed"]
        self.recent_seconds.extend(numbers["recent_seconds"])
        self.audit = FeatureAudit(self.config, features_of(numbers))


def count_micro_steps(config: Config, world_size: int) -> int:
    """Returns forward passes per step and rank: the fewest equal parts that fit in `micro_batch_tokens`.

    Raises ConfigError where the rows can't be divided equally among the ranks.
    """
    seq_len = config.model.train_seq_len
    rows, rest = divmod(config.train.train_batch_tokens // seq_len, world_size)
    if rest or rows == 0:
        raise ConfigError(
            f"a step of {config.train.train_batch_tokens} tokens is {rows * world_size + rest} rows of {seq_len}: "
            f"they can't be dealt evenly to {world_size} processes"
        )
    return next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq_len <= config.train.micro_batch_tokens
    )


def short_rows_act(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step had short rows, and at the first step with long ones after them the effect."""
    short = facts.seq_len < config.model.train_seq_len
    return short, "" if short else f"shorter rows first, then rows of {facts.seq_len} tokens"


register_feature(
    Feature(
        "short_seq", lambda config: max(config.train.short_seq_len, config.train.middle_seq_len) > 0,
        "train longer, or set the lengths and fractions of short_seq and middle_seq to 0", short_rows_act,
    )
)  # fmt: skip
