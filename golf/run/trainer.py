"""The training loop: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from golf.config.config import Config, ConfigError, UserError
from golf.config.site_quantizers import activation_sites
from golf.data.loader import BatchPrefetcher, TokenStream, order_stream
from golf.model.gpt import GPT
from golf.optim.average import WeightAverage
from golf.optim.groups import Optimizers, average_gradients
from golf.optim.schedule import learning_rate_scale, muon_momentum, training_budget
from golf.quant.qat import (
    count_activation_quantizers,
    install_fake_quantization,
    remove_fake_quantization,
    without_activation_quantizers,
)
from golf.quant.site_grid import activation_calls
from golf.run.checkpoint import TrainingState, generator_tensors, restore_generators
from golf.run.feature_audit import FeatureAudit
from golf.runtime import Runtime, Stopwatch

STEP_MARGIN = 1.5
"""A step may take so many times the longest of the last hundred: the cap holds on a machine that stumbles."""

MODEL_FEATURES = {"document_attention", "attention_window", "activation_quantizers", "knowledge_tokens"}
"""Of the audit: they act in every step."""


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
        if config.train.knowledge_frozen:
            model.knowledge.requires_grad_(False)
        ordered = order_stream(stream, config.data.row_order, config.model.bos_id, config.run.seed)
        self.batches = BatchPrefetcher(
            ordered, config.train.train_batch_tokens, config.model.train_seq_len, runtime.rank, runtime.world_size,
            runtime.device, config.data.row_order,
        )  # fmt: skip
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if runtime.compiles else model
        self.optimizers = self.new_optimizers()
        self.average = WeightAverage(config.average)
        self.budget = training_budget(config)
        self.micro_steps = count_micro_steps(config, runtime.world_size)
        self.clock = clock or Stopwatch()
        self.recent_seconds: deque[float] = deque([0.0], maxlen=100)
        self.audit = FeatureAudit(config)
        self.fake_quantized, self.seq_len = False, config.model.train_seq_len
        self.step = self.averaged_step = 0
        self.lost_seconds = 0.0
        """Training time that kills made void: it is on the clock, its steps are not in the weights."""
        self.stop_agreed = False

    def new_optimizers(self) -> Optimizers:
        return Optimizers(self.model, self.config.optim, self.runtime)

    def warm_up(self) -> None:
        """Compile and touch everything that training will run, then put weights and optimizers back."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        changes = 0.0, self.config.quant.qat_start, self.config.train.short_seq_fraction
        for fake_quantized, self.seq_len in sorted({self.phase(share) for share in changes}, reverse=True):
            self.set_fake_quantization(fake_quantized)
            for step in range(self.config.train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(lr_scale=0.0, muon_momentum=self.config.optim.muon_momentum_start)
                self.runtime.print(f"warmup_step:{step + 1}/{self.config.train.warmup_steps}")
            self.model.load_state_dict(before)
            if fake_quantized:
                self.prove_fake_quantization()
            self.model.load_state_dict(before)
        self.optimizers = self.new_optimizers()

    def phase(self, progress: float) -> tuple[bool, int]:
        """(whether weights pass through the export grid, tokens in a row) at a share of the budget."""
        quant, train = self.config.quant, self.config.train
        short = progress < train.short_seq_fraction
        seq_len = train.short_seq_len if short else self.config.model.train_seq_len
        return quant.qat_enabled and progress >= quant.qat_start, seq_len

    def prove_fake_quantization(self) -> None:
        """The step as it is compiled must see the export grid: its loss is that of the model with it, and not that of
        the model without."""
        batch = next(self.micro_batches(0))
        compiled = self.forward(*batch).item()
        with torch.no_grad():
            on = self.model(*batch).item()
            self.set_fake_quantization(False)
            off = self.model(*batch).item()
        self.set_fake_quantization(True)
        holds = abs(compiled - on) < abs(off - on) / 2
        if not holds:
            self.runtime.print("feature audit: the compiled step does not see the quantization grid: this run is INVALID")
        self.audit.verify("qat", holds, f"loss without the grid {off:.6f}, on it {on:.6f}, compiled {compiled:.6f}")

    def prove_model_features(self) -> None:
        """The step as it is compiled must have what the model is configured with."""
        model = self.config.model
        if model.document_attention:
            self.prove_document_attention()
        if activation_sites(model):
            self.prove_activation_quantizers(next(self.micro_batches(0)))
        if model.attention_window:
            unlimited = changed_model(self.model, attention_window=0)
            self.prove_effect("attention_window", next(self.micro_batches(0)), unlimited)
        if model.knowledge_tokens:
            self.prove_effect("knowledge_tokens", next(self.micro_batches(0)), other_knowledge(self.model))

    def prove_document_attention(self) -> None:
        batches = (batch for step in range(100) for batch in self.micro_batches(step))
        batch = next((batch for batch in batches if (batch[0][:, 1:] == self.config.model.bos_id).any()), None)
        if batch is None:
            self.audit.verify("document_attention", False, "no row of 100 batches holds the start of a document")
        else:
            self.prove_effect("document_attention", batch, changed_model(self.model, document_attention=False))

    def prove_activation_quantizers(self, batch: tuple[Tensor, Tensor]) -> None:
        """The compiled step calls each of them once; what 8 bits change is less than what bf16 rounds, so the loss
        only has to change."""
        before, sites = activation_calls(), count_activation_quantizers(self.model)
        self.forward(*batch).item()
        calls = activation_calls() - before
        with torch.no_grad():
            on = self.model(*batch).item()
            with without_activation_quantizers(self.model):
                off = self.model(*batch).item()
        effect = f"{calls} calls of {sites} quantizers in a compiled step, loss with them {on:.6f}, without {off:.6f}"
        self.audit.verify("activation_quantizers", calls == sites and on != off, effect)

    def prove_effect(self, feature: str, batch: tuple[Tensor, Tensor], without: AbstractContextManager[None]) -> None:
        """The compiled loss is that of the model, and not that of the model `without` the feature."""
        compiled = self.forward(*batch).item()
        with torch.no_grad():
            on = self.model(*batch).item()
            with without:
                off = self.model(*batch).item()
        effect = f"loss with it {on:.6f}, without {off:.6f}, compiled {compiled:.6f}"
        self.audit.verify(feature, abs(compiled - on) < abs(off - on) / 2, effect)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """inputs_BT and targets_BT of each forward pass of `step`; its tokens are the same for rows of every length."""
        parts = (part_BT.view(-1, self.seq_len).chunk(self.micro_steps) for part_BT in self.batches.get(step))
        return zip(*parts, strict=True)

    def set_fake_quantization(self, wanted: bool) -> None:
        if wanted and not self.fake_quantized:
            install_fake_quantization(self.model, self.config.quant)
        elif self.fake_quantized and not wanted:
            remove_fake_quantization(self.model)
        self.fake_quantized = wanted

    def accumulate_gradients(self, step: int) -> Tensor:
        """Leave in .grad the gradient of the global batch of `step`; returns its mean loss over all ranks."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for inputs_BT, targets_BT in self.micro_batches(step):
            loss = self.forward(inputs_BT, targets_BT)
            (loss / self.micro_steps).backward()
            loss_sum += loss.detach()
        average_gradients(self.optimizers.parameters, self.runtime.world_size)
        return self.runtime.sum_over_ranks(loss_sum / (self.micro_steps * self.runtime.world_size))

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
        """Train until the budget is used up; the clock stands still while the caller looks at a report.

        Once any rank's `stop_requested` says so, `stop_agreed` is set on all of them, after the same step.
        """
        elapsed = self.clock.seconds
        while not self.budget.exhausted(self.step, elapsed, STEP_MARGIN * max(self.recent_seconds)):
            self.clock.start()
            progress = self.budget.progress(self.step, elapsed)
            train_loss, gradient_norm, lr_scale = self.take_step(progress)
            self.runtime.synchronize()
            self.step += 1
            now, stop = self.runtime.max_over_ranks(self.clock.seconds, float(stop_requested()))
            self.observe(self.budget.progress(self.step, now))
            self.clock.stop()
            self.recent_seconds.append(now - elapsed)
            elapsed, self.stop_agreed = now, stop > 0
            loss = train_loss.item()
            if not math.isfinite(loss):  # the same on every rank, so all stop
                raise TrainingError(f"the loss is {loss} at step {self.step}: lower matrix_lr or embed_lr")
            self.note_acts(progress, gradient_norm)
            yield StepReport(self.step, loss, elapsed, self.budget.progress(self.step, elapsed), lr_scale)

    def observe(self, progress: float) -> None:
        """Let the average take a snapshot if one is due."""
        if self.average.observe(self.model, progress):
            self.audit.count("swa", self.step)
            self.averaged_step = self.step

    def take_step(self, progress: float) -> tuple[Tensor, Tensor | None, float]:
        """(loss, norm of the gradients where they are clipped, learning-rate scale)"""
        fake_quantized, self.seq_len = self.phase(progress)
        self.set_fake_quantization(fake_quantized)
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        norm = self.optimizers.step(lr_scale, muon_momentum(progress, self.config.optim))
        return train_loss, norm, lr_scale

    def note_acts(self, progress: float, gradient_norm: Tensor | None) -> None:
        """Tell the audit what acted in the step that is over."""
        optim, step = self.config.optim, self.step
        if self.fake_quantized:
            self.audit.count("qat", step)
        for feature in MODEL_FEATURES & self.audit.advice.keys():
            self.audit.count(feature, step)
        if (short := self.config.train.short_seq_len) == self.seq_len:
            self.audit.count("short_seq", step)
        elif short:
            self.audit.verify("short_seq", True, f"rows of {short} tokens, then of {self.seq_len}")
        lr_scale = learning_rate_scale(progress, self.config.train)
        if lr_scale < 1:
            self.audit.count("warmdown", step)
            self.audit.verify("warmdown", True, f"learning rate down to {lr_scale:.4f} of its height")
        momentum = muon_momentum(progress, optim)
        if momentum != optim.muon_momentum and "muon_momentum_warmup" in self.audit.records:
            self.audit.count("muon_momentum_warmup", step)
            effect = f"momentum from {optim.muon_momentum_start} to {momentum:.4f}"
            self.audit.verify("muon_momentum_warmup", True, effect)
        if gradient_norm is not None and (norm := gradient_norm.item()) > optim.grad_clip_norm:
            self.audit.count("grad_clip", step)
            self.audit.verify("grad_clip", True, f"norm {norm:.3f} cut to {optim.grad_clip_norm}")

    def finish(self) -> None:
        """The last weights count in the average, however early the cap struck."""
        self.prove_model_features()
        self.batches.close()
        self.set_fake_quantization(False)
        if self.step != self.averaged_step:
            self.observe(progress=1.0)

    def state(self) -> TrainingState:
        """All that it takes to go on after the last step."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = self.optimizers.state_tensors(names) | generator_tensors()
        if self.runtime.is_main:  # the same on every rank
            tensors |= {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
            tensors |= {f"average.{name}": mean for name, mean in self.average.mean.items()}
        numbers = {
            "step": self.step,
            "elapsed": self.clock.seconds,
            "lost_seconds": self.lost_seconds,
            "recent_seconds": list(self.recent_seconds),
            "average": [self.average.count, self.average.slots_used, self.averaged_step],
            "witness": self.audit.record(),
        }
        return TrainingState(tensors, numbers)

    def load_state(self, state: TrainingState, latest: float) -> None:
        """Go on from `state`. The clock goes on from `latest`, the last reading of a process that was killed later."""
        device, numbers = self.runtime.device, state.numbers
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
        for name, tensor in state.tensors.items():
            kind, _, rest = name.partition(".")
            parts.get(kind, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.mean = {name: mean.to(device) for name, mean in parts["average"].items()}
        self.average.count, self.average.slots_used, self.averaged_step = numbers["average"]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizers.load_state_tensors(state.tensors, names)
        restore_generators(state.tensors)
        self.step, self.clock.total = numbers["step"], max(numbers["elapsed"], latest)
        self.lost_seconds = numbers["lost_seconds"] + self.clock.total - numbers["elapsed"]
        self.recent_seconds.extend(numbers["recent_seconds"])
        self.audit = FeatureAudit(self.config, numbers["witness"])


@contextmanager
def changed_model(model: GPT, **fields: Any) -> Iterator[None]:
    """Within it, `model` is configured otherwise."""
    config = model.config
    model.config = replace(config, **fields)
    yield
    model.config = config


@contextmanager
def other_knowledge(model: GPT) -> Iterator[None]:
    """Within it, the knowledge tokens of `model` point the other way."""
    model.knowledge.neg_()
    yield
    model.knowledge.neg_()


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
