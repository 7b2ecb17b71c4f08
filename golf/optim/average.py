"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407) over the last part of the budget."""

import torch
from torch import Tensor, nn

from golf.config.config import AverageConfig


class WeightAverage:
    """The running mean of evenly spaced snapshots, accumulated in fp32 whatever the dtype of the weights.

    Snapshots fall due at progress start + (1 - start) k / n for k = 1 .. n, so that the last weights count too.
    """

    def __init__(self, config: AverageConfig):
        self.enabled, self.start, self.snapshots = config.swa_enabled, config.swa_start, config.swa_snapshots
        self.count = 0
        self.slots_used = 0
        self.mean: dict[str, Tensor] = {}

    def slots_due(self, progress: float) -> int:
        return int((progress - self.start) / (1 - self.start) * self.snapshots + 1e-9)

    @torch.no_grad()
    def observe(self, model: nn.Module, progress: float) -> bool:
        """Take a snapshot if one is due; True if it was taken (slots missed between two steps count as one)."""
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
