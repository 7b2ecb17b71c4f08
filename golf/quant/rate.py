"""Prices what a code costs to send, for rounding that minds it.

An adaptive coder predicts the size of a code from what it has seen of the code's row and column. Here each code is
put into one of a few classes by the size that its row and its column let one expect, and costs -log2 of the share
of its magnitude in that class, and a bit for the sign.

M matrices of one shape, R rows, C columns, N a few candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATE_CLASSES = 16
"""Classes of expected magnitude, equally full."""
PRIOR_COUNT = 16.0
"""Weight of the distribution over all classes in that of each, in codes."""
HIGH_RATE_SLOPE = 2 * math.log(2) / 12
"""-dD/dR in squared steps per bit of a uniform quantizer with D = step^2 / 12 and R = const - log2(step)."""


@dataclass(frozen=True, eq=False)
class CodeCosts:
    """Bits of each magnitude in each class, and each weight's class."""

    bits_F: Tensor
    """float32, RATE_CLASSES tables of `width` magnitudes one after the other."""
    width: int
    offset_CR: Tensor
    """Where the table of the weight's class begins; CMR for several matrices."""

    def of(self, column: int, magnitude_NR: Tensor) -> Tensor:
        """Returns bits_NR of candidate magnitudes of a column's weights."""
        place_NR = (magnitude_NR + self.offset_CR[column]).int()
        return self.bits_F.index_select(0, place_NR.flatten()).view_as(place_NR)


def expected_classes(level_RC: Tensor) -> Tensor:
    """Returns int64 classes_RC, equally full but for ties, by the product of the row's and column's mean magnitudes."""
    magnitude_RC = level_RC.abs().double()
    expected_RC = magnitude_RC.mean(1, keepdim=True) * magnitude_RC.mean(0, keepdim=True)
    sorted_N = expected_RC.flatten().sort().values
    edges = [sorted_N[len(sorted_N) * k // RATE_CLASSES] for k in range(1, RATE_CLASSES)]
    return torch.bucketize(expected_RC, torch.stack(edges), right=True)


def class_counts(class_RC: Tensor, value_RC: Tensor, width: int) -> Tensor:
    """Returns float64 counts_KM of the values 0..width - 1 in each class."""
    cells_N = (class_RC * width + value_RC).flatten()
    return torch.bincount(cells_N, minlength=RATE_CLASSES * width).view(RATE_CLASSES, width).double()


def learn_costs(level_RC: Tensor, most: int) -> CodeCosts:
    """Returns the costs under the distribution of these levels, for levels of magnitude 0..most."""
    width = most + 1
    class_RC = expected_classes(level_RC)
    counts_KM = class_counts(class_RC, level_RC.abs().long(), width)
    overall_M = counts_KM.sum(0) + 0.5  # half a code: what has not been seen is dear, not impossible
    counts_KM = counts_KM + PRIOR_COUNT * overall_M / overall_M.sum()
    bits_KM = -torch.log2(counts_KM / counts_KM.sum(1, keepdim=True))
    bits_KM[:, 1:] += 1.0
    return CodeCosts(bits_KM.flatten().float(), width, (class_RC * width).T.float())


def join_costs(costs: Sequence[CodeCosts]) -> CodeCosts:
    """Returns the costs of several matrices of one shape and width of tables."""
    size = len(costs[0].bits_F)
    offset_CMR = torch.stack([one.offset_CR + number * size for number, one in enumerate(costs)], 1)
    return CodeCosts(torch.cat([one.bits_F for one in costs]), costs[0].width, offset_CMR)


def cheapest_level(
    ratio_MR: Tensor, low: Tensor | float, high: Tensor | float, costs: CodeCosts, column: int, price_MR: Tensor
) -> Tensor:
    """Returns level_MR of least (ratio - level)^2 + price * bits in a column, among 0 and the three next to the ratio.

    Magnitudes floor|ratio| - 1, + 0 and + 1, within low..high; of equal costs the smallest magnitude wins.
    """
    size_MR = ratio_MR.abs()
    next_N11 = torch.tensor([-math.inf, -1, 0, 1], device=ratio_MR.device).view(4, 1, 1)
    magnitude_NMR = (size_MR.floor() + next_N11).clamp_(min=0)
    magnitude_NMR = torch.minimum(magnitude_NMR, torch.where(ratio_MR >= 0, high, -low))
    cost_NMR = (size_MR - magnitude_NMR).square_().add_(price_MR * costs.of(column, magnitude_NMR))
    magnitude_NMR.masked_fill_(cost_NMR > cost_NMR.amin(0), math.inf)
    return magnitude_NMR.amin(0).copysign(ratio_MR)


def class_entropy(level_RC: Tensor) -> float:
    """Returns the bits per code that an ideal adaptive coder with these classes would send."""
    counts_KM = class_counts(expected_classes(level_RC), level_RC.long() + 128, 256)
    share_KM = counts_KM / counts_KM.sum(1, keepdim=True).clamp(min=1)
    return float(-(counts_KM * share_KM.clamp(min=1e-300).log2()).sum() / max(level_RC.numel(), 1))
