"""A low-rank correction of the rounding error (LQER: Zhang et al. 2024, arXiv 2402.02446).

What rounding leaves, E = W - Q, is made up for by two thin factors, themselves rounded. With the inputs' second
moments H = S S^T the factors are those of the singular values of E S: the directions that the outputs notice.

R rows, C columns, K rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from golf.quant.gptq import checked_hessian, factor_and_damped
from golf.quant.grid import QuantizedTensor, dequantize_tensor
from golf.quant.rtn import check_finite, round_to_nearest
from golf.quant.spec import QuantSpec
from golf.quant.tensor_classes import QuantError


@dataclass(frozen=True)
class LowRankOptions:
    """Four levels for the left factor and 15 for the right one by the field's experience (parameter-golf PR #1797)."""

    rank: int = 4
    left: QuantSpec = QuantSpec(2, "tensor", symmetric=False, scale_rule="mse")
    right: QuantSpec = QuantSpec(4, "group", 64, scale_rule="mse")
    damping: float = 0.01


def root_of_inputs(hessian_CC: Tensor | None, columns: int, damping: float) -> Tensor:
    """S with S S^T = H damped; the identity without H."""
    if hessian_CC is None:
        return torch.eye(columns, dtype=torch.float64)
    factor_CC, damped_CC = factor_and_damped(checked_hessian(hessian_CC.cpu(), columns), damping)
    return damped_CC @ factor_CC.T  # H U^T U = 1, so this is U^-1, and U^-1 U^-T = H


def leading_directions(error_RC: Tensor, rank: int) -> Tensor:
    """left_RK, orthonormal: the first left singular vectors, the largest entry of each positive."""
    left_RK = torch.linalg.svd(error_RC, full_matrices=False).U[:, :rank]
    largest_1K = left_RK.abs().argmax(0, keepdim=True)
    return left_RK * left_RK.gather(0, largest_1K).sign()


def with_low_rank(
    weight_RC: Tensor,
    entry: QuantizedTensor,
    hessian_CC: Tensor | None = None,
    options: LowRankOptions = LowRankOptions(),
) -> QuantizedTensor:
    """`entry` with the rounded factors of what it lacks of `weight_RC`, in the metric of H where that is given.

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
    """tr(E H E^T) of what `entry` lacks of the weights; without H the sum of squares."""
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
    """`entries` with corrections of those `count` tensors that lose the largest errors by it, in the metric of their H.

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
