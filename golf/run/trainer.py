"""Trains the model: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf.config.config import Config
from golf.config.features import Feature, StepFacts, register_feature
from golf.config.knobs import ConfigError, UserError
from golf.data.loader import BatchPrefetcher, TokenStream, order_stream
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.optim.average import WeightAverage
from golf.optim.optimizers import Optimizers
from golf.optim.schedule import learning_rate_scale, training_budget
from golf.quant.grid import RowGrids
from golf.quant.qat import install_activation_quantizers, install_fake_quantization, remove_fake_quantization
from golf.run.checkpoint import TrainingState, features_of, generator_tensors, restore_generators
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
    """Returns a trainer of a new model with its initial weights and activation quantizers."""
    model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
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
        for length in filter(None, (config.model.train_seq_len, config.train.short_seq_len)):
            model.keep_rotary(length)
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if runtime.compiles else model
        self.optimizers = self.new_optimizers()
        self.average = WeightAverage(config.average)
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

    def new_optimizers(self) -> Optimizers:
        return Optimizers(self.model, self.config.optim, self.runtime)

    def warm_up(self) -> None:
        """Compiles and touches everything that training will run, then restores weights and optimizers."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        changes = 0.0, self.config.quant.qat_start, self.config.train.short_seq_fraction
        for fake_quantized, self.seq_len in sorted({self.phase(share) for share in changes}, reverse=True):
            self.set_fake_quantization(fake_quantized)
            for step in range(self.config.train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(progress=0.0, lr_scale=0.0)
                self.runtime.print(f"warmup_step:{step + 1}/{self.config.train.warmup_steps}")
            self.model.load_state_dict(before)
            self.verify_features(at_start=True)
            self.model.load_state_dict(before)
        self.optimizers = self.new_optimizers()

    def phase(self, progress: float) -> tuple[bool, int]:
        """Returns (whether weights pass through the export grid, tokens in a row) at a share of the budget."""
        quant, train = self.config.quant, self.config.train
        short = progress < train.short_seq_fraction
        seq_len = train.short_seq_len if short else self.config.model.train_seq_len
        return quant.qat_enabled and progress >= quant.qat_start, seq_len

    def verify_features(self, at_start: bool) -> None:
        """Verifies that the step, as it is compiled now, has the features that are on."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return (batch for step in range(MOST_BATCHES) for batch in self.micro_batches(step))

        facts = self.facts(1.0, None)
        for line in verify_features(self.audit, facts, self.forward, self.model, batches, at_start):
            self.runtime.print(line)

    def facts(self, progress: float, gradient_norm: float | None) -> StepFacts:
        return StepFacts(progress, self.seq_len, self.fake_quantized, gradient_norm)

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
        """Leaves this rank's part of the gradient of `step` in .grad; returns the mean loss over all ranks."""
        self.row_grids.renew()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for inputs_BT, targets_BT in self.micro_batches(step):
            loss = self.forward(inputs_BT, targets_BT)
            (loss / (self.micro_steps * self.runtime.world_size)).backward()
            loss_sum += loss.detach()
        return self.runtime.sum_over_ranks(loss_sum / (self.micro_steps * self.runtime.world_size))

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
        """Trains until the budget is used up, and yields a report of each step, outside the clock.

        Once any rank's `stop_requested` returns True, `stop_agreed` is set on all of them, after the same step.
        """
        elapsed = self.clock.seconds
        while not self.budget.exhausted(self.step, elapsed, STEP_MARGIN * max(self.recent_seconds)):
            self.clock.start()
            progress = self.budget.progress(self.step, elapsed)
            train_loss, gradient_norm, lr_scale = self.take_step(progress)
            self.runtime.synchronize()
            self.step += 1
            now, stop = self.runtime.max_over_ranks(self.clock.seconds, float(stop_requested()))
            self.average.observe_step(self.model, self.budget.progress(self.step, now), self.step, self.audit)
            self.clock.stop()
            self.recent_seconds.append(now - elapsed)
            elapsed, self.stop_agreed = now, stop > 0
            loss = train_loss.item()
            if not math.isfinite(loss):  # the loss is the same on every rank, so all stop
                raise TrainingError(f"the loss is {loss} at step {self.step}: lower matrix_lr or embed_lr")
            norm = None if gradient_norm is None else gradient_norm.item()
            self.audit.note_step(self.step, self.facts(progress, norm))
            yield StepReport(self.step, loss, elapsed, self.budget.progress(self.step, elapsed), lr_scale)

    def take_step(self, progress: float) -> tuple[Tensor, Tensor | None, float]:
        """Returns (loss, norm of the gradients where they are clipped, learning-rate scale)."""
        fake_quantized, self.seq_len = self.phase(progress)
        self.set_fake_quantization(fake_quantized)
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        norm = self.optimizers.step(progress, lr_scale)
        return train_loss, norm, lr_scale

    def finish(self) -> None:
        """Ends training: the last weights count in the average, even if the cap came early."""
        self.verify_features(at_start=False)
        self.batches.close()
        self.set_fake_quantization(False)
        if self.step != self.average.last_step:
            self.average.observe_step(self.model, 1.0, self.step, self.audit)

    def state(self) -> TrainingState:
        """Returns all the state that resuming after the last step needs."""
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
            "average": [self.average.count, self.average.slots_used, self.average.last_step],
            "features": self.audit.record(),
        }
        return TrainingState(tensors, numbers)

    def load_state(self, state: TrainingState, latest: float) -> None:
        """Resumes from `state`, with the clock at `latest`, the last reading of a process that was killed later."""
        device, numbers = self.runtime.device, state.numbers
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
        for name, tensor in state.tensors.items():
            kind, _, rest = name.partition(".")
            parts.get(kind, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.mean = {name: mean.to(device) for name, mean in parts["average"].items()}
        self.average.count, self.average.slots_used, self.average.last_step = numbers["average"]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizers.load_state_tensors(state.tensors, names)
        restore_generators(state.tensors)
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
    short = config.train.short_seq_len
    return facts.seq_len == short, "" if facts.seq_len == short else f"rows of {short} tokens, then of {facts.seq_len}"


register_feature(
    Feature(
        "short_seq", lambda config: config.train.short_seq_len > 0,
        "train longer, or set short_seq_len=0 short_seq_fraction=0", short_rows_act,
    )
)  # fmt: skip
