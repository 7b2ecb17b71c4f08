"""Steps by every rule of a QuantSpec, and rounding to nearest.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, N weights that share a step.
A level is a code less its zero point, so that weight = level * step for every grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.grid import FP16_MAX, FP16_TINY, QuantizedTensor, grid_clip, group_width, spread_groups
from golf.quant.spec import QuantSpec
from golf.quant.tensor_classes import QuantError

MSE_COARSE = tuple(0.92**k for k in range(30))
"""Shares of the full range that the search for the least squared error tries first, down to 0.09."""
MSE_FINE = tuple(0.92 ** (k / 5) for k in (-4, -3, -2, -1, 1, 2, 3, 4))
"""And then, around the best of them."""


@dataclass(frozen=True, eq=False)
class StepSizes:
    """Steps that somebody else chose: that of weight (r, c) is scale_rg * column_scale_c, g the group of column c."""

    scale_SG: Tensor
    """fp16, within FP16_TINY..FP16_MAX; S is R or 1."""
    column_scale_C: Tensor | None = None
    """fp16, positive."""


def check_finite(weight: Tensor, what: str) -> None:
    if not torch.isfinite(weight).all():
        raise QuantError(f"{what} has NaN or infinite values: nothing to quantize")


def check_step_sizes(scales: StepSizes, rows: int, columns: int) -> None:
    """Raise QuantError unless the steps fit a matrix of that shape."""
    scale_SG, column_scale_C = scales.scale_SG, scales.column_scale_C
    fits = scale_SG.dim() == 2 and scale_SG.size(0) in (1, rows) and 1 <= scale_SG.size(1) <= max(columns, 1)
    if column_scale_C is not None:
        fits = fits and column_scale_C.shape == (columns,)
    if not fits:
        raise QuantError(f"steps of shape {tuple(scale_SG.shape)} do not fit {rows} x {columns} weights")
    for name, part in (("scale_SG", scale_SG), ("column_scale_C", column_scale_C)):
        if part is not None and (part.dtype != torch.float16 or not (part.isfinite() & (part > 0)).all()):
            raise QuantError(f"{name} must be fp16, finite and above zero")


def level_range(spec: QuantSpec, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """Smallest and largest level, `zero` being the code in 0..2^bits - 1 that stands for 0."""
    if zero is None:
        return -grid_clip(spec.bits), grid_clip(spec.bits)
    return -zero, 2**spec.bits - 1 - zero


def nearest_level(ratio: Tensor, low: Tensor | float, high: Tensor | float, spec: QuantSpec) -> Tensor:
    """Level nearest to ratio = weight / step, halves to even; without 0 for a symmetric grid of 1 bit."""
    if spec.bits == 1 and spec.symmetric:
        return torch.where(ratio >= 0, 1.0, -1.0)
    return ratio.round().clamp(low, high)


def fp16_step(step: Tensor) -> Tensor:
    """The fp32 value of the fp16 step, within fp16's normal range."""
    return step.clamp(FP16_TINY, FP16_MAX).half().float()


def smallest_of(values_SN: Tensor, share: float) -> Tensor:
    """(S, 1): the value that `share` of each row does not exceed."""
    rank = min(max(round(share * values_SN.size(1)), 1), values_SN.size(1))
    return values_SN.kthvalue(rank, dim=1, keepdim=True).values


def weight_range(weight_SN: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(S, 1) each: the least and greatest weight that the grid must hold by the rule, 0 included."""
    magnitude_SN, parameter = weight_SN.abs(), spec.rule_parameter
    if spec.symmetric:
        if spec.scale_rule == "percentile":
            high_S1 = smallest_of(magnitude_SN, parameter / 100)
        elif spec.scale_rule == "std":
            high_S1 = parameter * weight_SN.std(dim=1, correction=0, keepdim=True)
        elif spec.scale_rule == "absmean":
            high_S1 = parameter * magnitude_SN.mean(dim=1, keepdim=True)
        else:
            high_S1 = magnitude_SN.amax(dim=1, keepdim=True)
        return -high_S1, high_S1
    if spec.scale_rule == "percentile":
        low_S1, high_S1 = -smallest_of(-weight_SN, parameter / 100), smallest_of(weight_SN, parameter / 100)
    elif spec.scale_rule == "std":
        mean_S1, spread_S1 = weight_SN.mean(1, keepdim=True), weight_SN.std(1, correction=0, keepdim=True)
        low_S1, high_S1 = mean_S1 - parameter * spread_S1, mean_S1 + parameter * spread_S1
    else:
        low_S1, high_S1 = weight_SN.amin(dim=1, keepdim=True), weight_SN.amax(dim=1, keepdim=True)
    return low_S1.clamp(max=0), high_S1.clamp(min=0)


def step_and_zero(low_S1: Tensor, high_S1: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """fp32 values of the fp16 step, and the code of 0, of grids that reach from low to high."""
    if spec.symmetric:
        # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
        return fp16_step(high_S1 / torch.full_like(high_S1, grid_clip(spec.bits))), None
    most = 2**spec.bits - 1
    step_S1 = fp16_step((high_S1 - low_S1) / torch.full_like(high_S1, most))
    return step_S1, (-low_S1 / step_S1).round().clamp(0, most)


def squared_error(
    weight_SN: Tensor, step_S1: Tensor, zero_S1: Tensor | None, spec: QuantSpec, importance_SN: Tensor | None
) -> Tensor:
    """(S, 1) in float64: what rounding to nearest leaves of each row, each weight's square times its importance."""
    level_SN = nearest_level(weight_SN / step_S1, *level_range(spec, zero_S1), spec)
    error_SN = (weight_SN - level_SN * step_S1).square()
    if importance_SN is not None:
        error_SN = error_SN * importance_SN
    return error_SN.sum(dim=1, keepdim=True, dtype=torch.float64)


def least_error_share(error_of: Callable[[Tensor], Tensor], ones_S1: Tensor) -> Tensor:
    """The share of its range, for each row, at which `error_of` is least; of equal ones the first tried."""
    best_S1, least_S1 = ones_S1, error_of(ones_S1)
    for shares in (MSE_COARSE[1:], MSE_FINE):
        center_S1 = best_S1 if shares is MSE_FINE else ones_S1
        for share in shares:
            tried_S1 = (center_S1 * share).clamp(max=1.0)
            error_S1 = error_of(tried_S1)
            better_S1 = error_S1 < least_S1
            best_S1 = torch.where(better_S1, tried_S1, best_S1)
            least_S1 = torch.where(better_S1, error_S1, least_S1)
    return best_S1


def choose_steps(
    weight_SN: Tensor, spec: QuantSpec, importance_SN: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """fp32 values of the fp16 step and the code of 0, (S, 1) each, for rows of fp32 weights that share them.

    `importance_SN` (or one that broadcasts) weighs squared errors in the search of rule "mse".
    """
    low_S1, high_S1 = weight_range(weight_SN, spec)
    if spec.scale_rule != "mse":
        return step_and_zero(low_S1, high_S1, spec)
    if spec.bits == 1 and spec.symmetric:  # the step of least squared error is the mean magnitude
        total = weight_SN.abs().mean(1, keepdim=True)
        if importance_SN is not None:
            shares_SN = importance_SN.expand_as(weight_SN)
            total = (weight_SN.abs() * shares_SN).sum(1, keepdim=True) / shares_SN.sum(1, keepdim=True).clamp(min=1e-30)
        return fp16_step(total), None

    def error_of(share_S1: Tensor) -> Tensor:
        return squared_error(
            weight_SN, *step_and_zero(low_S1 * share_S1, high_S1 * share_S1, spec), spec, importance_SN
        )

    share_S1 = least_error_share(error_of, torch.ones_like(high_S1))
    return step_and_zero(low_S1 * share_S1, high_S1 * share_S1, spec)


def grid_of(weight_RC: Tensor, spec: QuantSpec, importance_C: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """scale_SG (fp32 values of fp16 steps) and zero_SG (codes of 0, or None) of fp32 weights by the spec's rule."""
    rows, columns = weight_RC.shape
    if spec.granularity == "tensor":
        importance = None if importance_C is None else importance_C.expand(rows, columns).reshape(1, -1)
        return choose_steps(weight_RC.reshape(1, -1), spec, importance)
    width = columns
    if spec.granularity == "group":
        width = group_width(columns, -(-columns // spec.group_size))
    parts = [
        choose_steps(
            weight_RC[:, c : c + width], spec, None if importance_C is None else importance_C[None, c : c + width]
        )
        for c in range(0, columns, width)
    ]
    zeros = [zero_S1 for _, zero_S1 in parts if zero_S1 is not None]
    return torch.cat([step_S1 for step_S1, _ in parts], dim=1), torch.cat(zeros, dim=1) if zeros else None


def stored_form(
    level_RC: Tensor, scale_SG: Tensor, zero_SG: Tensor | None, spec: QuantSpec, column_scale_C: Tensor | None
) -> QuantizedTensor:
    """Levels, steps and codes of 0 as they are stored, on the CPU: 8-bit codes with a zero point less 128."""
    if zero_SG is not None:
        shift = 128 if spec.bits == 8 else 0
        level_RC = level_RC + spread_groups(zero_SG, level_RC.size(1)) - shift
        zero_SG = (zero_SG - shift).to(torch.int8).cpu()
    codes_RC, scale_SG = level_RC.to(torch.int8).cpu(), scale_SG.half().cpu()
    if column_scale_C is not None:
        column_scale_C = column_scale_C.half().cpu()
    return QuantizedTensor(codes_RC, scale_SG, spec.bits, column_scale_C, zero_SG)


def step_matrix(scale_SG: Tensor, column_scale_C: Tensor | None, columns: int) -> Tensor:
    """step_SC (or one that broadcasts), fp32: products of two fp16 numbers are exact."""
    step_SC = spread_groups(scale_SG.float(), columns)
    return step_SC if column_scale_C is None else step_SC * column_scale_C.float()


def round_to_nearest(weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None = None) -> QuantizedTensor:
    """Codes of least error for each weight by itself. Rule "absmax" per row is grid.quantize_rows, bit for bit."""
    weight_RC = weight_RC.float()
    if scales is None:
        (scale_SG, zero_SG), column_scale_C = grid_of(weight_RC, spec), None
    else:
        scale_SG, zero_SG, column_scale_C = scales.scale_SG.to(weight_RC.device), None, scales.column_scale_C
        if column_scale_C is not None:
            column_scale_C = column_scale_C.to(weight_RC.device)
    columns = weight_RC.size(1)
    ratio_RC = weight_RC / step_matrix(scale_SG, column_scale_C, columns)
    zero_SC = None if zero_SG is None else spread_groups(zero_SG, columns)
    level_RC = nearest_level(ratio_RC, *level_range(spec, zero_SC), spec)
    return stored_form(level_RC, scale_SG, zero_SG, spec, column_scale_C)
