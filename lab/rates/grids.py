"""Describes grids by a short text: bits, granularity, symmetry, the rule that chooses the steps; and rounding to
nearest on them.

A level is a code less its zero point, so that weight = level * step for every grid.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, N weights that share a step.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.gptq import StepSizes
from golf.quant.grid import FP16_MAX, FP16_TINY, QuantizedTensor, grid_clip, group_width, spread_groups
from golf.quant.tensor_classes import QuantError

SCALE_RULES = {"absmax": 1.0, "percentile": 99.9, "mse": 1.0, "std": 3.0, "absmean": 1.0}
"""Rules for the step, and the parameter that each has when none is given."""
RULE_TEXTS = {"absmax": "absmax", "percentile": "pct", "mse": "mse", "std": "sd", "absmean": "absmean"}
QUANTIZER_METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """A grid of 2^bits - 1 codes around 0, or with a zero point of 2^bits codes from 0 on (1 bit: -1 and 1).

    Raises QuantError for what is no grid.
    """

    bits: int
    """1 to 8. Symmetric: 1 is binary {-1, 1}, 2 is ternary {-1, 0, 1}, b is -(2^(b-1) - 1) .. 2^(b-1) - 1."""
    granularity: str = "row"
    """What shares a step: tensor, row, or group (of neighbouring columns of a row)."""
    group_size: int = 0
    """Most columns of a group; groups of a row are as equal as stored.group_width makes them."""
    symmetric: bool = True
    """False: each step comes with the code that stands for 0, itself a code of the grid."""
    scale_rule: str = "absmax"
    """absmax: the largest magnitude gets the largest code; percentile: that of all magnitudes; mse: the shrunk absmax
    range of least squared error; std: k standard deviations get the largest code (the field's SDClip); absmean: a
    multiple of the mean magnitude (ternary: BitNet b1.58, arXiv 2402.17764; binary: XNOR-Net, arXiv 1603.05279)."""
    parameter: float | None = None
    """percentile: 50 < p <= 100; std: k; absmean: the multiple; absmax and mse have none. None: SCALE_RULES."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise QuantError(f"bits are 1 to 8, not {self.bits}")
        if self.granularity not in ("tensor", "row", "group"):
            raise QuantError(f"granularity is tensor, row or group, not {self.granularity!r}")
        if (self.group_size > 0) != (self.granularity == "group"):
            raise QuantError(f"granularity {self.granularity!r} and group_size {self.group_size} do not fit together")
        if self.scale_rule not in SCALE_RULES:
            raise QuantError(f"scale rule is one of {', '.join(SCALE_RULES)}, not {self.scale_rule!r}")
        self.check_parameter()

    def check_parameter(self) -> None:
        rule, value = self.scale_rule, self.rule_parameter
        if rule in ("absmax", "mse") and self.parameter is not None:
            raise QuantError(f"scale rule {rule!r} has no parameter, {self.parameter:g} was given")
        if not (50 < value <= 100 if rule == "percentile" else 0 < value < 1e4):
            raise QuantError(f"{value:g} is no parameter of scale rule {rule!r}")
        if rule == "absmean" and (self.bits > 2 or not self.symmetric):
            raise QuantError("scale rule 'absmean' is for symmetric grids of 1 and 2 bits")

    @property
    def rule_parameter(self) -> float:
        return SCALE_RULES[self.scale_rule] if self.parameter is None else self.parameter


NAIVE_INT8 = QuantSpec(8)
"""The small-GPT study's naive quantizer: int8, per row, symmetric, max/127 (its zero rows are 0/0, ours are zero)."""

METHOD_PATTERN = re.compile(
    r"(?P<method>[a-z]+)(?P<bits>\d+)(?:-(?P<tensor>tensor)|-g(?P<group>\d+))?(?P<zero>-zp)?"
    rf"(?:-(?P<rule>{'|'.join(RULE_TEXTS.values())})(?P<parameter>\d+(?:\.\d+)?)?)?"
)


def parse_quantizer(text: str) -> tuple[str, QuantSpec]:
    """Reads METHOD BITS [-tensor | -gN] [-zp] [-RULE[PARAMETER]], such as rtn8, gptq4-g64, rtn3-zp-mse.

    Rules: absmax (the default), pctP, mse, sdK (gptq6-sd12.85), absmeanM. Raises QuantError.
    """
    match = METHOD_PATTERN.fullmatch(text)
    if match is None or match["method"] not in QUANTIZER_METHODS:
        raise QuantError(
            f"no quantizer {text!r}: rtn or gptq, bits, then -tensor or -gN, -zp, and one of -absmax -pct99.9 -mse "
            "-sd3 -absmean, such as gptq4-g64 or rtn3-zp-mse"
        )
    rules = {short: rule for rule, short in RULE_TEXTS.items()}
    spec = QuantSpec(
        bits=int(match["bits"]),
        granularity="tensor" if match["tensor"] else "group" if match["group"] else "row",
        group_size=int(match["group"] or 0),
        symmetric=not match["zero"],
        scale_rule=rules[match["rule"] or "absmax"],
        parameter=None if match["parameter"] is None else float(match["parameter"]),
    )
    return match["method"], spec


MSE_COARSE = tuple(0.92**k for k in range(30))
"""Shares of the full range that the search for the least squared error tries first, down to 0.09."""
MSE_FINE = tuple(0.92 ** (k / 5) for k in (-4, -3, -2, -1, 1, 2, 3, 4))
"""And then, around the best of them."""


def level_range(spec: QuantSpec, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """Returns the smallest and largest level, `zero` being the code in 0..2^bits - 1 that stands for 0."""
    if zero is None:
        return -grid_clip(spec.bits), grid_clip(spec.bits)
    return -zero, 2**spec.bits - 1 - zero


def nearest_level(ratio: Tensor, low: Tensor | float, high: Tensor | float, spec: QuantSpec) -> Tensor:
    """Returns the level nearest to ratio = weight / step, halves to even; without 0 for a symmetric grid of 1 bit."""
    if spec.bits == 1 and spec.symmetric:
        return torch.where(ratio >= 0, 1.0, -1.0)
    return ratio.round().clamp(low, high)


def fp16_step(step: Tensor) -> Tensor:
    """Returns the fp32 value of the fp16 step, within fp16's normal range."""
    return step.clamp(FP16_TINY, FP16_MAX).half().float()


def smallest_of(values_SN: Tensor, share: float) -> Tensor:
    """Returns (S, 1): the value that `share` of each row does not exceed."""
    rank = min(max(round(share * values_SN.size(1)), 1), values_SN.size(1))
    return values_SN.kthvalue(rank, dim=1, keepdim=True).values


def weight_range(weight_SN: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Returns (S, 1) each: the least and greatest weight that the grid must hold by the rule, 0 included."""
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
    """Returns the fp32 values of the fp16 step, and the code of 0, of grids that reach from low to high."""
    if spec.symmetric:
        # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
        return fp16_step(high_S1 / torch.full_like(high_S1, grid_clip(spec.bits))), None
    most = 2**spec.bits - 1
    step_S1 = fp16_step((high_S1 - low_S1) / torch.full_like(high_S1, most))
    return step_S1, (-low_S1 / step_S1).round().clamp(0, most)


def squared_error(
    weight_SN: Tensor, step_S1: Tensor, zero_S1: Tensor | None, spec: QuantSpec, importance_SN: Tensor | None
) -> Tensor:
    """Returns (S, 1) in float64: the squared errors of rounding a row to nearest, each times its importance."""
    level_SN = nearest_level(weight_SN / step_S1, *level_range(spec, zero_S1), spec)
    error_SN = (weight_SN - level_SN * step_S1).square()
    if importance_SN is not None:
        error_SN = error_SN * importance_SN
    return error_SN.sum(dim=1, keepdim=True, dtype=torch.float64)


def least_error_share(error_of: Callable[[Tensor], Tensor], ones_S1: Tensor) -> Tensor:
    """Returns the share of its range, for each row, at which `error_of` is least; of equal ones the first tried."""
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
    """Returns the fp32 value of the fp16 step and the code of 0, (S, 1) each, for rows of weights that share them.

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


def group_columns(columns: int, spec: QuantSpec) -> int:
    """Returns how many neighbouring columns share a row's step."""
    return group_width(columns, -(-columns // spec.group_size)) if spec.group_size else columns


def grid_of(weight_RC: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Returns scale_SG (fp32 values of fp16 steps) and zero_SG (codes of 0, or None) of fp32 weights by the rule."""
    weight_SN = weight_RC.reshape(1, -1) if spec.granularity == "tensor" else weight_RC
    parts = weight_SN.split(group_columns(weight_SN.size(1), spec), dim=1)
    steps, zeros = zip(*(choose_steps(part_SN, spec) for part_SN in parts), strict=True)
    return torch.cat(steps, dim=1), None if spec.symmetric else torch.cat(zeros, dim=1)


def chosen_grid(
    weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns scale_SG and zero_SG by the spec's rule, or those of `scales`, and column_scale_C; fp32."""
    if scales is None:
        return *grid_of(weight_RC, spec), None
    column_scale_C = scales.column_scale_C
    if column_scale_C is not None:
        column_scale_C = column_scale_C.to(weight_RC.device).float()
    return scales.scale_SG.to(weight_RC.device).float(), None, column_scale_C


def stored_form(
    level_RC: Tensor, scale_SG: Tensor, zero_SG: Tensor | None, spec: QuantSpec, column_scale_C: Tensor | None
) -> QuantizedTensor:
    """Returns levels, steps and codes of 0 as they are stored, on the CPU: 8-bit codes with a zero point less 128."""
    if zero_SG is not None:
        shift = 128 if spec.bits == 8 else 0
        level_RC = level_RC + spread_groups(zero_SG, level_RC.size(1)) - shift
        zero_SG = (zero_SG - shift).to(torch.int8).cpu()
    codes_RC, scale_SG = level_RC.to(torch.int8).cpu(), scale_SG.half().cpu()
    if column_scale_C is not None:
        column_scale_C = column_scale_C.half().cpu()
    return QuantizedTensor(codes_RC, scale_SG, spec.bits, column_scale_C, zero_SG)


def step_matrix(scale_SG: Tensor, column_scale_C: Tensor | None, columns: int) -> Tensor:
    """Returns step_SC (or one that broadcasts), fp32: products of two fp16 numbers are exact."""
    step_SC = spread_groups(scale_SG.float(), columns)
    return step_SC if column_scale_C is None else step_SC * column_scale_C.float()


def round_to_nearest(weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None = None) -> QuantizedTensor:
    """Returns each weight's code of least error. Rule "absmax" per row is grid.quantize_rows, bit for bit."""
    weight_RC = weight_RC.float()
    scale_SG, zero_SG, column_scale_C = chosen_grid(weight_RC, spec, scales)
    ratio_RC = weight_RC / step_matrix(scale_SG, column_scale_C, weight_RC.size(1))
    zero_SC = None if zero_SG is None else spread_groups(zero_SG, weight_RC.size(1))
    level_RC = nearest_level(ratio_RC, *level_range(spec, zero_SC), spec)
    return stored_form(level_RC, scale_SG, zero_SG, spec, column_scale_C)
