"""Two ways to spend a few more bits where they count: a low-rank correction, and finer steps for salient columns.

A low-rank correction (LQER: Zhang et al. 2024, arXiv 2402.02446) makes up for what rounding leaves, E = W - Q, by two
thin factors, themselves rounded. With the inputs' second moments H = S S^T the factors are those of the singular values
of E S: the directions that the outputs notice. Finer steps go to the columns that matter most (after AWQ, Lin et al.
2023, arXiv 2306.00978; parameter-golf PR #1908): by the root mean square of their input times the mean magnitude of
their weights.

R rows, C columns, K rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from golf.quant.gptq import StepSizes, check_finite, checked_hessian, factor_and_damped
from golf.quant.grid import QuantizedTensor, dequantize_tensor, group_width
from golf.quant.tensor_classes import QuantError
from lab.rates.grids import QuantSpec, grid_of, round_to_nearest


@dataclass(frozen=True)
class LowRankOptions:
    """Four levels for the left factor and 15 for the right one by the field's experience (parameter-golf PR #1797)."""

    rank: int = 4
    left: QuantSpec = QuantSpec(2, "tensor", symmetric=False, scale_rule="mse")
    right: QuantSpec = QuantSpec(4, "group", 64, scale_rule="mse")
    damping: float = 0.01


def root_of_inputs(hessian_CC: Tensor | None, columns: int, damping: float) -> Tensor:
    """Returns S with S S^T = H damped; the identity without H."""
    if hessian_CC is None:
        return torch.eye(columns, dtype=torch.float64)
    factor_CC, damped_CC = factor_and_damped(checked_hessian(hessian_CC.cpu(), columns), damping)
    return damped_CC @ factor_CC.T  # H U^T U = 1, so this is U^-1, and U^-1 U^-T = H


def leading_directions(error_RC: Tensor, rank: int) -> Tensor:
    """Returns left_RK, orthonormal: the first left singular vectors, the largest entry of each positive."""
    left_RK = torch.linalg.svd(error_RC, full_matrices=False).U[:, :rank]
    largest_1K = left_RK.abs().argmax(0, keepdim=True)
    return left_RK * left_RK.gather(0, largest_1K).sign()


def with_low_rank(
    weight_RC: Tensor,
    entry: QuantizedTensor,
    hessian_CC: Tensor | None = None,
    options: LowRankOptions = LowRankOptions(),
) -> QuantizedTensor:
    """Returns `entry` with the rounded factors of what it lacks of `weight_RC`, in the metric of H where that is given.

    The right factor is fitted to the rounded left one by least squares. Raises QuantError.
    """
    check_finite(weight_RC, "the weight matrix")
    rows, columns = weight_RC.shape
    if not 1 <= options.rank <= min(rows, columns):
        raise QuantError(f"a correction of {rows} x {columns} weights has rank 1 to {min(rows, columns)}")
    error_RC = weight_RC.detach().cpu().double() - dequantize_tensor(replace(entry, low_rank=None)).double()
    seen_RC = error_RC @ root_of_inputs(hessian_CC, columns, options.damping)
    left = round_to_nearest(leading_directions(seen_RC, options.rank).float(), options.left)
    left_RK = dequantize_tensor(left).double()
    # Whatever H: the B of least |(E - left B) S| has left B = the projection of E, for S has an inverse.
    right_KC = torch.linalg.pinv(left_RK) @ error_RC
    return replace(entry, low_rank=(left, round_to_nearest(right_KC.float(), options.right)))


def weighted_error(weight_RC: Tensor, entry: QuantizedTensor, hessian_CC: Tensor | None = None) -> float:
    """Returns tr(E H E^T) of what `entry` lacks of the weights; without H the sum of squares."""
    error_RC = weight_RC.detach().cpu().double() - dequantize_tensor(entry).double()
    moved_RC = error_RC if hessian_CC is None else error_RC @ hessian_CC.cpu().double()
    return float((moved_RC * error_RC).sum())


def correct_worst(
    weights: Mapping[str, Tensor],
    entries: Mapping[str, QuantizedTensor],
    hessians: Mapping[str, Tensor],
    count: int,
    options: LowRankOptions = LowRankOptions(),
) -> dict[str, QuantizedTensor]:
    """Returns `entries`, those `count` tensors corrected that gain most by it in the metric of their H.

    Tensors without H are measured by squares: give all or none.
    """
    gains, corrected = {}, {}
    for name, entry in entries.items():
        if min(entry.codes_RC.shape) >= options.rank:
            corrected[name] = with_low_rank(weights[name], entry, hessians.get(name), options)
            before, after = (weighted_error(weights[name], e, hessians.get(name)) for e in (entry, corrected[name]))
            gains[name] = before - after
    chosen = sorted(gains, key=lambda name: (-gains[name], name))[:count]
    return {name: corrected[name] if name in chosen and gains[name] > 0 else entries[name] for name in entries}


def column_saliency(weight_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """Returns saliency_C, float64, in units of the root of H's."""
    return hessian_CC.diagonal().double().cpu().sqrt() * weight_RC.detach().cpu().double().abs().mean(dim=0)


def most_salient_group(weight_RC: Tensor, hessian_CC: Tensor, width: int) -> slice:
    """Returns the group of at most `width` neighbouring columns of greatest mean saliency; of equal ones the first."""
    columns = weight_RC.size(1)
    width = group_width(columns, -(-columns // width))
    saliency_C = column_saliency(weight_RC, hessian_CC)
    start = max(range(0, columns, width), key=lambda c: (float(saliency_C[c : c + width].mean()), -c))
    return slice(start, min(start + width, columns))


def protected_steps(
    weight_RC: Tensor, hessian_CC: Tensor, spec: QuantSpec, width: int = 64, finer_bits: int = 2
) -> tuple[QuantSpec, StepSizes]:
    """Returns the grid and steps for `quantize` that give the most salient group of columns `finer_bits` more bits.

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
