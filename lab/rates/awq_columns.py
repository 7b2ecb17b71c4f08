"""Finer steps for the columns that matter most (after AWQ, Lin et al. 2023, arXiv 2306.00978; parameter-golf PR #1908).

A column matters by the root mean square of its input times the mean magnitude of its weights. R rows, C columns.
"""

import torch
from torch import Tensor

from golf.quant.grid import group_width
from golf.quant.rtn import StepSizes, grid_of
from golf.quant.spec import QuantSpec
from golf.quant.tensor_classes import QuantError


def column_saliency(weight_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """saliency_C, float64, in units of the root of H's."""
    return hessian_CC.diagonal().double().cpu().sqrt() * weight_RC.detach().cpu().double().abs().mean(dim=0)


def most_salient_group(weight_RC: Tensor, hessian_CC: Tensor, width: int) -> slice:
    """The group of at most `width` neighbouring columns of greatest mean saliency; of equal ones the first."""
    columns = weight_RC.size(1)
    width = group_width(columns, -(-columns // width))
    saliency_C = column_saliency(weight_RC, hessian_CC)
    start = max(range(0, columns, width), key=lambda c: (float(saliency_C[c : c + width].mean()), -c))
    return slice(start, min(start + width, columns))


def protected_steps(
    weight_RC: Tensor, hessian_CC: Tensor, spec: QuantSpec, width: int = 64, finer_bits: int = 2
) -> tuple[QuantSpec, StepSizes]:
    """The grid and steps for `quantize` that give the most salient group of columns `finer_bits` more bits.

    The other columns keep the steps of `spec`, and codes beyond its range only where its rule would have clipped.
    Raises QuantError.
    """
    if not (spec.symmetric and spec.bits >= 2 and finer_bits >= 1 and spec.bits + finer_bits <= 8 and width >= 1):
        raise QuantError(f"columns of a symmetric grid of 2 bits or more can have up to 8: {spec.bits} + {finer_bits}")
    scale_SG, _ = grid_of(weight_RC.detach().float(), spec)
    column_scale_C = torch.ones(weight_RC.size(1))
    column_scale_C[most_salient_group(weight_RC, hessian_CC, width)] = 0.5**finer_bits
    steps = StepSizes(scale_SG.half().cpu(), column_scale_C.half())
    return QuantSpec(spec.bits + finer_bits), steps
