"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626) where it can act: on weights that go to a coarse grid.

On a 5- or 6-bit row grid most of a matrix's smallest weights round to zero anyway; the report says how many
codes the pruning really changed, and a matrix in which it would change none is left as it is. So are tensors
that are stored as fp16: zeros there save next to nothing and cost accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.config.config import QuantConfig
from golf.quant.grid import quantize_rows
from golf.quant.tensor_classes import FP16_BITS, bits_of


@dataclass(frozen=True)
class PruneReport:
    """What pruning did to one tensor."""

    name: str
    weights: int
    zeroed: int
    """Weights that were not zero and now are; 0 where pruning was left off because no code would change."""
    codes_changed: int
    """Integer codes of the exported tensor that differ from those without pruning."""


def zero_smallest(weight_RC: Tensor, share: float) -> Tensor:
    """A copy in which the floor(share * elements) weights of smallest magnitude are zero.

    Weights that are zero already count among them; of equal magnitudes the first in row order go first.
    """
    assert 0 <= share < 1
    pruned_N = weight_RC.flatten().clone()
    order_N = torch.argsort(pruned_N.abs(), stable=True)
    pruned_N[order_N[: int(share * pruned_N.numel())]] = 0.0
    return pruned_N.view_as(weight_RC)


def prune_tensor(name: str, weight_RC: Tensor, bits: int, share: float) -> tuple[Tensor, PruneReport]:
    """The pruned matrix, or the matrix as it is where pruning would change none of its codes."""
    pruned_RC = zero_smallest(weight_RC, share)
    codes_changed = int((quantize_rows(weight_RC, bits)[0] != quantize_rows(pruned_RC, bits)[0]).sum())
    if codes_changed == 0:
        pruned_RC = weight_RC
    zeroed = int(((weight_RC != 0) & (pruned_RC == 0)).sum())
    return pruned_RC, PruneReport(name, weight_RC.numel(), zeroed, codes_changed)


def prune_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], list[PruneReport]]:
    """`state` with prune_frac of each quantized matrix set to zero where that changes codes, and a report of each.

    Tensors in `tensor_bits` get those bits instead of their class's.
    """
    pruned, reports = dict(state), []
    for name, tensor in state.items():
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        if bits < FP16_BITS and quant.prune_frac > 0:
            pruned[name], report = prune_tensor(name, tensor, bits, quant.prune_frac)
            reports.append(report)
    return pruned, reports
