"""Exports a state dict: codes and scales for the matrices, fp16 for the rest; prunes it first where that can act.

Magnitude pruning (Han et al. 2015, arXiv 1506.02626) acts on weights that go to a coarse grid. On a 5- or 6-bit grid
most of a matrix's smallest weights round to zero anyway; the report says how many codes the pruning really changed, and
a matrix in which it would change none is left as it is. So are tensors that are stored as fp16: zeros there save next
to nothing and cost accuracy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from golf.config.features import Feature, register_feature
from golf.config.quantization import QuantConfig
from golf.quant.grid import FP16_MAX, QuantizedState, QuantizedTensor, grid_clip, quantize_rows
from golf.quant.site_grid import weight_codes
from golf.quant.site_operator import shared_gamma
from golf.quant.tensor_classes import FP16_BITS, QuantError, bits_of, shared_weights, tensor_class, weight_site


@dataclass(frozen=True)
class PruneReport:
    """Reports what pruning did to one tensor."""

    name: str
    weights: int
    zeroed: int
    """Weights that were not zero and now are; 0 where pruning was skipped because no code would change."""
    codes_changed: int
    """Integer codes of the exported tensor that differ from those without pruning."""


def zero_smallest(weight_RC: Tensor, share: float) -> Tensor:
    """Returns a copy in which the floor(share * elements) weights of smallest magnitude are zero.

    Weights that are zero already count among them; of equal magnitudes the first in row order go first.
    """
    assert 0 <= share < 1
    pruned_N = weight_RC.flatten().clone()
    order_N = torch.argsort(pruned_N.abs(), stable=True)
    pruned_N[order_N[: int(share * pruned_N.numel())]] = 0.0
    return pruned_N.view_as(weight_RC)


def prune_tensor(name: str, weight_RC: Tensor, bits: int, share: float) -> tuple[Tensor, PruneReport]:
    """Returns the pruned matrix, or the matrix as it is where pruning would change none of its codes, and a report."""
    pruned_RC = zero_smallest(weight_RC, share)
    codes_changed = int((quantize_rows(weight_RC, bits)[0] != quantize_rows(pruned_RC, bits)[0]).sum())
    if codes_changed == 0:
        pruned_RC = weight_RC
    zeroed = int(((weight_RC != 0) & (pruned_RC == 0)).sum())
    return pruned_RC, PruneReport(name, weight_RC.numel(), zeroed, codes_changed)


def prune_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], list[PruneReport]]:
    """Zeroes prune_frac of each quantized matrix where that changes codes, and reports on each matrix.

    Tensors in `tensor_bits` get those bits instead of their class's.
    """
    pruned, reports = dict(state), []
    for name, tensor in state.items():
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        if bits < FP16_BITS and quant.prune_frac > 0:
            pruned[name], report = prune_tensor(name, tensor, bits, quant.prune_frac)
            reports.append(report)
    return pruned, reports


def check_storable(name: str, tensor: Tensor, bits: int) -> None:
    """Raises QuantError where fp16 weights or scales could not hold the values of `tensor`."""
    if not torch.isfinite(tensor).all():
        raise QuantError(f"tensor {name!r} has NaN or infinite values: the weights are broken, nothing to export")
    limit = FP16_MAX if bits == FP16_BITS else FP16_MAX * grid_clip(bits)
    if tensor.numel() and tensor.abs().max() > limit:
        raise QuantError(f"tensor {name!r} has values beyond {limit:,.0f}, the most that {bits} bits can store")


def quantize_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> QuantizedState:
    """Quantizes each tensor to the form of its class under `quant`, on the CPU.

    Tensors in `tensor_bits` get those bits; those for which the configuration names a quantizer go on its grid. Raises
    QuantError.
    """
    for name in (tensor_bits or {}).keys() - state.keys():
        raise QuantError(f"tensor_bits names {name!r}, which is no tensor of the model")
    stored: QuantizedState = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().float()
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        check_storable(name, tensor, bits)
        if site := weight_site(name, quant):
            shared = tuple(shared_weights(name, site, state))
            codes_RC, scale_SG = weight_codes(tensor, site, shared_gamma(shared) if shared else None)
            stored[name] = QuantizedTensor(codes_RC, scale_SG, site.bits)
        elif bits == FP16_BITS:
            stored[name] = tensor.half()
        else:
            codes_RC, scale_R = quantize_rows(tensor, bits)
            stored[name] = QuantizedTensor(codes_RC, scale_R.unsqueeze(1), bits)
    return stored


def quantized_parameters(shapes: Mapping[str, Sequence[int]], quant: QuantConfig) -> int:
    """Counts the parameters that `quant` puts on a grid; the rest is exported as fp16."""
    if quant.quantizer == "waterfill":
        return sum(prod(shape) for name, shape in shapes.items() if tensor_class(name, shape) != "small")
    return sum(prod(shape) for name, shape in shapes.items() if bits_of(name, shape, quant) < FP16_BITS)


def pruning_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (codes that pruning changed, whether there are any, the effect)."""
    changed, codes = files["pruning"]["pruned_codes"], files["pruning"]["codes"]
    return changed, changed > 0, f"changed {changed} of {codes} codes"


register_feature(
    Feature("prune", lambda config: config.quant.prune_frac > 0, "set prune_frac=0, or raise it", in_files=pruning_acts)
)
