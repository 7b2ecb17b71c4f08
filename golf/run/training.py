"""The training loop: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.config import Config, ConfigError, UserError
from golf.data.loader import BatchPrefetcher, TokenStream
from golf.model.gpt import GPT
from golf.optim.average import WeightAverage
from golf.optim.groups import Optimizers, average_gradients
from golf.optim.schedule import Budget, learning_rate_scale, muon_momentum
from golf.quant.qat import install_fake_quantization, remove_fake_quantization
from golf.runtime import Runtime, Stopwatch


class TrainingError(UserError):
    """A training that can't go on."""


@dataclass(frozen=True)
class StepReport:
    """One finished step: what the log, the metrics file and the progress line are made from."""

    step: int
    train_loss: float
    elapsed: float
    """Seconds on the training clock."""
    progress: float
    """Share of the budget that is used up."""
    lr_scale: float


class Trainer:
    """A model with its optimizers, average and clock."""

    def __init__(
        self, model: GPT, config: Config, runtime: Runtime, stream: TokenStream, clock: Stopwatch | None = None
    ):
        self.model, self.config, self.runtime = model, config, runtime
        self.batches = BatchPrefetcher(
            stream, config.train.train_batch_tokens, config.model.train_seq_len, runtime.rank, runtime.world_size,
            runtime.device, config.data.row_order,
        )  # fmt: skip
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if runtime.compiles else model
        self.optimizers = self.new_optimizers()
        self.average = WeightAverage(config.average)
        self.budget = Budget(config.train.iterations, config.train.max_wallclock_seconds)
        self.micro_steps = count_micro_steps(config, runtime.world_size)
        self.clock = clock or Stopwatch()
        self.fake_quantized = False
        self.fake_quantized_steps = 0
        self.step = 0

    def new_optimizers(self) -> Optimizers:
        return Optimizers(self.model, self.config.optim, self.runtime)

    def warm_up(self) -> None:
        """Compile and touch everything that training will run, then put weights and optimizers back."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        quant = self.config.quant
        graphs = {False, True} if quant.qat_enabled and quant.qat_start > 0 else {quant.qat_enabled}
        for fake_quantized in sorted(graphs, reverse=True):
            self.set_fake_quantization(fake_quantized)
            for step in range(self.config.train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(lr_scale=0.0, muon_momentum=self.config.optim.muon_momentum_start)
                self.runtime.print(f"warmup_step:{step + 1}/{self.config.train.warmup_steps}")
        self.model.load_state_dict(before)
        self.optimizers = self.new_optimizers()

    def set_fake_quantization(self, wanted: bool) -> None:
        if wanted and not self.fake_quantized:
            install_fake_quantization(self.model, self.config.quant)
        elif self.fake_quantized and not wanted:
            remove_fake_quantization(self.model)
        self.fake_quantized = wanted

    def accumulate_gradients(self, step: int) -> Tensor:
        """Leave in .grad the gradient of the global batch of `step`; returns its mean loss over all ranks."""
        inputs_BT, targets_BT = self.batches.get(step)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        micro_batches = zip(inputs_BT.chunk(self.micro_steps), targets_BT.chunk(self.micro_steps), strict=True)
        for micro_inputs_BT, micro_targets_BT in micro_batches:
            loss = self.forward(micro_inputs_BT, micro_targets_BT)
            (loss / self.micro_steps).backward()
            loss_sum += loss.detach()
        average_gradients(self.optimizers.parameters, self.runtime.world_size)
        return self.runtime.sum_over_ranks(loss_sum / (self.micro_steps * self.runtime.world_size))

    def steps(self) -> Iterator[StepReport]:
        """Train until the budget is used up; the clock stands still while the caller looks at a report."""
        recent_seconds: deque[float] = deque([0.0], maxlen=10)
        elapsed = 0.0
        while not self.budget.exhausted(self.step, elapsed, max(recent_seconds)):
            self.clock.start()
            progress = self.budget.progress(self.step, elapsed)
            train_loss, lr_scale = self.take_step(progress)
            self.runtime.synchronize()
            self.step += 1
            now = self.runtime.max_over_ranks(self.clock.seconds)
            self.average.observe(self.model, self.budget.progress(self.step, now))
            self.clock.stop()
            recent_seconds.append(now - elapsed)
            elapsed = now
            loss = train_loss.item()
            if not math.isfinite(loss):  # the same on every rank, so all stop
                raise TrainingError(f"the loss is {loss} at step {self.step}: lower matrix_lr or tied_embed_lr")
            yield StepReport(self.step, loss, elapsed, self.budget.progress(self.step, elapsed), lr_scale)

    def take_step(self, progress: float) -> tuple[Tensor, float]:
        quant = self.config.quant
        self.set_fake_quantization(quant.qat_enabled and progress >= quant.qat_start)
        self.fake_quantized_steps += self.fake_quantized
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        self.optimizers.step(lr_scale, muon_momentum(progress, self.config.optim))
        return train_loss, lr_scale

    def finish(self) -> None:
        """Put the averaged weights in place, without the training grid."""
        self.batches.close()
        self.set_fake_quantization(False)
        if self.config.average.swa_enabled:
            self.average.observe(self.model, progress=1.0)  # the last weights count, however early the cap struck
            self.average.apply_to(self.model)


def count_micro_steps(config: Config, world_size: int) -> int:
    """Forward passes per step and rank: the fewest equal parts that fit in `micro_batch_tokens`."""
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
