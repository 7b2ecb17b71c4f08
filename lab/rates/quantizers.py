"""Quantizes a matrix on any grid: rounded to nearest, or by GPTQ in the order of its inputs' power.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, N a few columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from golf.quant.gptq import (
    RATE_PASSES,
    ColumnGrid,
    GptqProblem,
    RatePrice,
    StepSizes,
    check_finite,
    checked_hessian,
    gptq_problem,
    rate_price,
)
from golf.quant.grid import QuantizedTensor, grid_clip, group_width
from golf.quant.rate import HIGH_RATE_SLOPE
from golf.quant.tensor_classes import QuantError
from lab.rates.grids import (
    QuantSpec,
    choose_steps,
    chosen_grid,
    group_columns,
    level_range,
    nearest_level,
    round_to_nearest,
    step_matrix,
    stored_form,
)


@dataclass(frozen=True, eq=False)
class GptqOptions:
    """How the weights are rounded."""

    damping: float = 0.01
    """Share of the mean of H's diagonal that is added to the diagonal; ten times as much until H has a factor."""
    block: int = 128
    """Columns between two updates of all columns that are left. No effect on the result."""
    act_order: bool = True
    """Columns in descending order of H's diagonal; off: from left to right."""
    rd_lambda: float = 0.0
    """How much a code's bits count in its choice; 1: as much as they cost in error where the step is made finer."""
    rate_slope: float | None = None
    """Error per bit in the unit of H (and row_weight_R), instead of that of rd_lambda = 1, for one price in many
    tensors; times rd_lambda."""
    descent_passes: int = 0
    """Passes of coordinate descent after GPTQ."""
    rate_passes: int = RATE_PASSES
    row_weight_R: Tensor | None = None
    """Weight of each row's error beside the bits; None: 1."""


GPTQ_DEFAULTS = GptqOptions()


class SpecGrid(ColumnGrid):
    """Gives the grid of a spec column by column, or that of given steps; column j is column order_C[j] of the matrix.

    Where groups have steps of their own by a rule, those of a group are chosen when its first column is due, from
    its weights as they have been moved by then. Groups are neighbours in the matrix, in whatever order they come.
    """

    run = 1
    """Every column is begun by itself: neighbours in the order may be of different groups."""

    def __init__(self, weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None, order_C: Tensor):
        columns, self.spec, self.place_C = weight_RC.size(1), spec, order_C.argsort()
        if scales is None and spec.granularity == "group":
            self.width, self.given_column_scale_C = group_columns(columns, spec), None
            self.steps_G: list[tuple[Tensor, Tensor | None] | None] = [None] * -(-columns // self.width)
        else:
            scale_SG, zero_SG, self.given_column_scale_C = chosen_grid(weight_RC, spec, scales)
            self.width = group_width(columns, scale_SG.size(1))
            zeros = [None] * scale_SG.size(1) if zero_SG is None else zero_SG.T[:, None]
            self.steps_G = list(zip(scale_SG.T[:, None], zeros, strict=True))
        self.group_C = (order_C // self.width).tolist()
        given_C = self.given_column_scale_C
        self.column_scale_C = torch.ones_like(weight_RC[0]) if given_C is None else given_C[order_C]

    def begin_run(self, column: int, moved: Callable[[Tensor], Tensor]) -> None:
        """Chooses the steps of the column's group where they have still to be chosen."""
        group = self.group_C[column]
        if self.steps_G[group] is None:
            weight_NR = moved(self.place_C[group * self.width : (group + 1) * self.width])
            step_R1, zero_R1 = choose_steps(weight_NR.T.float(), self.spec)
            self.steps_G[group] = step_R1.T, None if zero_R1 is None else zero_R1.T

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns step_11S of a column, and its smallest and largest level."""
        step_1S, zero_1S = self.steps_G[self.group_C[start]]
        return (step_1S * self.column_scale_C[start])[None], *level_range(self.spec, zero_1S)

    def nearest(self, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Returns nearest_level of the spec."""
        return nearest_level(ratio, low, high, self.spec)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Returns scale_SG and zero_SG, once every group has been met."""
        steps, zeros = zip(*self.steps_G, strict=True)
        return torch.cat(steps).T, None if zeros[0] is None else torch.cat(zeros).T


def ordered_problem(weight_RC: Tensor, hessian_CC: Tensor, options: GptqOptions) -> tuple[GptqProblem, Tensor]:
    """Returns the problem in the order in which columns are rounded, and order_C. Raises QuantError."""
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    order_C = torch.arange(weight_RC.size(1), device=weight_RC.device)
    if options.act_order:
        order_C = hessian_CC.diagonal().argsort(descending=True, stable=True)
    problem = gptq_problem(weight_RC[:, order_C], hessian_CC[order_C][:, order_C], options.damping)
    return replace(problem, block=options.block), order_C


def price_of_codes(problem: GptqProblem, level_RC: Tensor, grid: SpecGrid, options: GptqOptions) -> RatePrice:
    """Returns costs of codes like these, and a bit's price: the loss of error by a bit where all steps are made finer.

    That of D = sum of row_weight_r step_rc^2 / U_cc^2 / 12, which falls by 2 ln 2 of its mean for a bit more in each.
    """
    weight_R, slope = torch.ones_like(level_RC[:, 0], dtype=torch.float64), options.rate_slope
    if options.row_weight_R is not None:
        weight_R = options.row_weight_R.to(weight_R)
    if slope is None:
        step_SC = step_matrix(grid.parts()[0], grid.given_column_scale_C, level_RC.size(1)).double()
        power_C = problem.factor_CC.diagonal().square().reciprocal()[grid.place_C]
        slope = float(HIGH_RATE_SLOPE * (weight_R[:, None] * step_SC.square() * power_C).mean())
    most = grid_clip(grid.spec.bits) if grid.spec.symmetric else 2**grid.spec.bits - 1
    return rate_price([level_RC], options.rd_lambda * slope, [weight_R], most)


def quantize_matrix(
    weight_RC: Tensor,
    spec: QuantSpec,
    hessian_CC: Tensor | None = None,
    options: GptqOptions = GPTQ_DEFAULTS,
    scales: StepSizes | None = None,
) -> QuantizedTensor:
    """Returns codes, steps and zero points of a matrix: rounded to nearest, or by GPTQ where H of its inputs is given.

    `scales` are steps to use instead of those of the spec's rule and granularity; they go with symmetric grids.
    H may be the sum or the mean of x x^T; without inputs in a column, the column is rounded to nearest. Raises
    QuantError for what is not finite, does not fit, or is no H.
    """
    check_quantizable(weight_RC, spec, options, scales)
    if hessian_CC is None:
        return round_to_nearest(weight_RC, spec, scales)
    weight_RC = weight_RC.detach().float()
    problem, order_C = ordered_problem(weight_RC, hessian_CC, options)
    grid = SpecGrid(weight_RC, spec, scales, order_C)
    (level_RC,), price = problem.round_columns(grid), None
    if options.rd_lambda > 0 and not (spec.bits == 1 and spec.symmetric):
        for _ in range(options.rate_passes):
            price = price_of_codes(problem, level_RC, grid, options)
            grid = SpecGrid(weight_RC, spec, scales, order_C)
            (level_RC,) = problem.round_columns(grid, price)
    if options.descent_passes > 0:
        (level_RC,) = problem.descend(level_RC[None], grid, price, options.descent_passes)
    return stored_form(level_RC[:, grid.place_C], *grid.parts(), spec, grid.given_column_scale_C)


def check_quantizable(weight_RC: Tensor, spec: QuantSpec, options: GptqOptions, scales: StepSizes | None) -> None:
    """Raises QuantError for what `quantize_matrix` cannot work on."""
    if weight_RC.dim() != 2 or not weight_RC.numel():
        raise QuantError(f"weights of shape {tuple(weight_RC.shape)} are no matrix to quantize")
    check_finite(weight_RC, "the weight matrix")
    if not (options.damping > 0 and options.block > 0 and options.rd_lambda >= 0 and options.rate_passes > 0):
        raise QuantError("damping, block and rate_passes are above 0, rd_lambda is not below 0")
    if scales is not None:
        check_step_sizes(scales, *weight_RC.shape)
        if not spec.symmetric:
            raise QuantError("given steps go with a symmetric grid: they come without zero points")


def check_step_sizes(scales: StepSizes, rows: int, columns: int) -> None:
    """Raises QuantError unless the steps fit a matrix of that shape."""
    scale_SG, column_scale_C = scales.scale_SG, scales.column_scale_C
    fits = scale_SG.dim() == 2 and scale_SG.size(0) in (1, rows) and 1 <= scale_SG.size(1) <= max(columns, 1)
    if column_scale_C is not None:
        fits = fits and column_scale_C.shape == (columns,)
    if not fits:
        raise QuantError(f"steps of shape {tuple(scale_SG.shape)} do not fit {rows} x {columns} weights")
    for name, part in (("scale_SG", scale_SG), ("column_scale_C", column_scale_C)):
        if part is not None and (part.dtype != torch.float16 or not (part.isfinite() & (part > 0)).all()):
            raise QuantError(f"{name} must be fp16, finite and above zero")
