"""Averages weights: snapshots of the last part of the budget (SWA: Izmailov et al. 2018, arXiv 1803.05407), or all
steps with exponentially falling shares (EMA)."""

import math

import torch
from torch import Tensor, nn

from golf.config.features import Auditor, Feature, register_feature
from golf.config.training import AverageConfig


class WeightAverage:
    """Keeps the running mean of evenly spaced snapshots, accumulated in fp32 whatever the dtype of the weights.

    Snapshots fall due at progress start + (1 - start) k / n for k = 1 .. n, so that the last weights count too.
    """

    def __init__(self, config: AverageConfig):
        self.config, self.enabled = config, config.swa_enabled
        self.start, self.snapshots = config.swa_start, config.swa_snapshots
        self.count = 0
        self.seen = 0
        """Slots of snapshots that are used."""
        self.last_step = 0
        """Training step of the last weights that count."""
        self.mean: dict[str, Tensor] = {}

    def slots_due(self, progress: float) -> int:
        return int((progress - self.start) / (1 - self.start) * self.snapshots + 1e-9)

    def observe(self, model: nn.Module, progress: float) -> bool:
        """Takes a snapshot if one is due; returns whether it did (slots missed between two steps count as one)."""
        if not self.enabled or self.slots_due(progress) <= self.seen:
            return False
        self.seen = self.slots_due(progress)
        self.add(model, 1 / (self.count + 1))
        return True

    @torch.no_grad()
    def add(self, model: nn.Module, share: float) -> None:
        """Moves the mean towards a model's weights by a share of the way."""
        self.count += 1
        for name, weight in model.state_dict().items():
            if name not in self.mean:
                self.mean[name] = weight.detach().float().clone()
            else:
                self.mean[name].lerp_(weight.detach().float(), share)

    def observe_step(self, model: nn.Module, progress: float, step: int, audit: Auditor) -> None:
        """Takes a snapshot after a step if one is due, and counts it."""
        if self.observe(model, progress):
            self.last_step = step
            audit.count("swa", step)


class ExponentialAverage(WeightAverage):
    """Takes in every step; what it held fades by e for each `ema_fraction` of the budget. `seen` is the share of the
    budget up to the last step."""

    def observe_step(self, model: nn.Module, progress: float, step: int, audit: Auditor) -> None:
        self.add(model, -math.expm1((self.seen - progress) / self.config.ema_fraction))
        self.seen, self.last_step = progress, step
        audit.count("ema", step)


def new_average(config: AverageConfig) -> WeightAverage:
    """Returns the average that the configuration asks for."""
    return ExponentialAverage(config) if config.ema_fraction else WeightAverage(config)


def averaged_weights(
    last: dict[str, Tensor], mean: dict[str, Tensor], snapshots: int, config: AverageConfig, audit: Auditor
) -> dict[str, Tensor]:
    """Returns the mean of the weights of at least two steps, or its blend with the last weights; else the last."""
    if snapshots < 2:
        return last
    if config.ema_fraction:
        mean = {name: last[name].lerp(part, config.ema_blend) for name, part in mean.items()}
    moved = max((mean[name] - last[name]).abs().max().item() for name in last)
    effect = f"mean of {snapshots} snapshots, at most {moved:.3g} from the last weights"
    audit.verify("ema" if config.ema_fraction else "swa", moved > 0, effect)
    return mean


register_feature(Feature("swa", lambda config: config.average.swa_enabled, "train longer, or lower swa_start"))
register_feature(Feature("ema", lambda config: config.average.ema_fraction > 0, "train longer, or set ema_fraction=0"))
