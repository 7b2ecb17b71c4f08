"""Averages weights over the last part of the budget (SWA: Izmailov et al. 2018, arXiv 1803.05407)."""

import torch
from torch import Tensor, nn

from golf.config.features import Auditor, Feature, register_feature
from golf.config.training import AverageConfig


class WeightAverage:
    """Keeps the running mean of evenly spaced snapshots, accumulated in fp32 whatever the dtype of the weights.

    Snapshots fall due at progress start + (1 - start) k / n for k = 1 .. n, so that the last weights count too.
    """

    def __init__(self, config: AverageConfig):
        self.enabled, self.start, self.snapshots = config.swa_enabled, config.swa_start, config.swa_snapshots
        self.count = 0
        self.slots_used = 0
        self.last_step = 0
        """Training step of the last snapshot."""
        self.mean: dict[str, Tensor] = {}

    def slots_due(self, progress: float) -> int:
        return int((progress - self.start) / (1 - self.start) * self.snapshots + 1e-9)

    @torch.no_grad()
    def observe(self, model: nn.Module, progress: float) -> bool:
        """Takes a snapshot if one is due; returns whether it did (slots missed between two steps count as one)."""
        if not self.enabled or self.slots_due(progress) <= self.slots_used:
            return False
        self.slots_used = self.slots_due(progress)
        self.count += 1
        for name, weight in model.state_dict().items():
            if name not in self.mean:
                self.mean[name] = weight.detach().float().clone()
            else:
                self.mean[name].lerp_(weight.detach().float(), 1 / self.count)
        return True

    def observe_step(self, model: nn.Module, progress: float, step: int, audit: Auditor) -> None:
        """Takes a snapshot after a step if one is due, and counts it."""
        if self.observe(model, progress):
            self.last_step = step
            audit.count("swa", step)


def averaged_weights(
    last: dict[str, Tensor], mean: dict[str, Tensor], snapshots: int, audit: Auditor
) -> dict[str, Tensor]:
    """Returns the mean of the snapshots where at least two were taken, else the last weights."""
    if snapshots < 2:
        return last
    moved = max((mean[name] - last[name]).abs().max().item() for name in last)
    audit.verify("swa", moved > 0, f"mean of {snapshots} snapshots, at most {moved:.3g} from the last weights")
    return mean


register_feature(Feature("swa", lambda config: config.average.swa_enabled, "train longer, or lower swa_start"))
