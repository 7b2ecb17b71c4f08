"""GPTQ: round column after column and let the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the second moments of the inputs, H = sum x x^T, the error of a
rounded row e is e H e^T. Columns come in the order of their inputs' power; the rest of the way U is the upper factor
of H^-1 = U^T U, and rounding column j moves the columns k > j by -(w_j - q_j) / U_jj * U_jk, the move of least error.

R rows, C columns, B columns of a block, G groups of columns. Factors and weights are transposed, CR: a column's
weights lie side by side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.grid import QuantizedTensor, grid_clip, group_width
from golf.quant.rate import HIGH_RATE_SLOPE, CodeCosts, cheapest_level, learn_costs
from golf.quant.rtn import (
    StepSizes,
    check_finite,
    check_step_sizes,
    choose_steps,
    grid_of,
    level_range,
    nearest_level,
    round_to_nearest,
    step_matrix,
    stored_form,
)
from golf.quant.spec import QuantSpec
from golf.quant.tensor_classes import QuantError

DAMPING_TRIALS = 7
DESCENT_PASSES = 3


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
    """Passes of coordinate descent after GPTQ. Three lower the error by 1 % with steps for rows, by 4 to 6 % with steps
    for columns, at equal entropy."""
    rate_passes: int = 2
    """Times that the rounding is done again with the costs of the codes of the time before."""
    row_weight_R: Tensor | None = None
    """Weight of each row's error beside the bits; None: 1."""


GPTQ_DEFAULTS = GptqOptions()


def factor_and_damped(hessian_CC: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U_CC in float64, upper, and the matrix whose inverse is U^T U: H + damping * mean(diag H) * 1, with more damping
    where that has no factor; the identity where all inputs are zero.

    Without an explicit inverse: where F turns both orders round, F H F = L L^T makes U = F L^-1 F. Raises QuantError.
    """
    mean = hessian_CC.diagonal().mean()
    identity_CC = torch.eye(hessian_CC.size(0), dtype=torch.float64, device=hessian_CC.device)
    if mean == 0:
        return identity_CC, identity_CC
    for trial in range(DAMPING_TRIALS):
        damped_CC = hessian_CC + identity_CC * (mean * damping * 10**trial)
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC.flip(0, 1))
        if not failed and torch.isfinite(lower_CC).all():
            return torch.linalg.solve_triangular(lower_CC, identity_CC, upper=False).flip(0, 1), damped_CC
    raise QuantError(
        f"the Hessian has no Cholesky factor even with {damping * 10 ** (DAMPING_TRIALS - 1):g} of its mean diagonal "
        "added: it is no matrix of second moments"
    )


def input_factor(hessian_CC: Tensor, damping: float) -> Tensor:
    """U_CC of factor_and_damped."""
    return factor_and_damped(hessian_CC, damping)[0]


def checked_hessian(hessian_CC: Tensor, columns: int) -> Tensor:
    """H in float64, made symmetric to the last bit. Raises QuantError."""
    if hessian_CC.shape != (columns, columns):
        raise QuantError(f"the Hessian is {tuple(hessian_CC.shape)}, the weights have {columns} columns")
    check_finite(hessian_CC, "the Hessian")
    hessian_CC = hessian_CC.double()
    if (hessian_CC.diagonal() < 0).any():
        raise QuantError("the Hessian has negative values on its diagonal: it is no matrix of second moments")
    return (hessian_CC + hessian_CC.T) / 2


class ColumnGrid:
    """Step and range of levels of one column after the other.

    Where groups have steps of their own by a rule, those of a group are chosen when its first column is due, from
    its weights as they have been moved by then. Groups are neighbours in the matrix, in whatever order they come.
    """

    def __init__(self, weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None):
        rows, columns = weight_RC.shape
        self.spec, self.columns = spec, columns
        self.column_scale_C = None
        late = scales is None and spec.granularity == "group"
        if late:
            groups = -(-columns // spec.group_size)
        elif scales is None:
            scale_SG, zero_SG = grid_of(weight_RC.float(), spec)
            groups = scale_SG.size(1)
        else:
            scale_SG, zero_SG = scales.scale_SG.to(weight_RC.device).float(), None
            groups = scale_SG.size(1)
            if scales.column_scale_C is not None:
                self.column_scale_C = scales.column_scale_C.to(weight_RC.device).float()
        self.width = group_width(columns, groups)
        self.step_G1S: list[Tensor | None] = [None] * groups if late else list(scale_SG.T[:, None])
        self.zero_G1S: list[Tensor | None] = [None] * groups if late or zero_SG is None else list(zero_SG.T[:, None])

    def undecided(self, column: int) -> Tensor | None:
        """The columns of the column's group, where their steps have still to be chosen."""
        group = column // self.width
        if self.step_G1S[group] is not None:
            return None
        return torch.arange(group * self.width, min((group + 1) * self.width, self.columns))

    def decide(self, column: int, weight_NR: Tensor) -> None:
        """Choose the steps of the column's group for these weights of its columns."""
        step_R1, zero_R1 = choose_steps(weight_NR.T.float(), self.spec)
        self.step_G1S[column // self.width] = step_R1.T
        self.zero_G1S[column // self.width] = None if zero_R1 is None else zero_R1.T

    def column(self, column: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """step_1S of a column, and its smallest and largest level."""
        step_1S = self.step_G1S[column // self.width]
        if self.column_scale_C is not None:
            step_1S = step_1S * self.column_scale_C[column]
        return step_1S, *level_range(self.spec, self.zero_G1S[column // self.width])

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """scale_SG and zero_SG, once every group has been met."""
        zero_SG = None if self.zero_G1S[0] is None else torch.cat(self.zero_G1S).T
        return torch.cat(self.step_G1S).T, zero_SG


@dataclass(frozen=True, eq=False)
class RatePrice:
    """What codes cost: bits, and for each row the error in units of H that is worth a bit."""

    costs: CodeCosts
    slope_1R: Tensor


@dataclass(frozen=True, eq=False)
class GptqProblem:
    """A matrix and its inputs in the order in which columns are rounded."""

    weight_CR: Tensor
    """float64, columns in that order."""
    factor_CC: Tensor
    """U, in that order."""
    damped_CC: Tensor
    """What U factors the inverse of, in that order."""
    order: list[int]
    """Which column of the matrix comes when."""
    block: int

    def round_columns(self, grid: ColumnGrid, price: RatePrice | None = None) -> Tensor:
        """level_RC in the order of the matrix."""
        columns, factor_CC = len(self.order), self.factor_CC
        weight_CR, error_CR = self.weight_CR.clone(), torch.empty_like(self.weight_CR)
        level_CR = torch.empty_like(self.weight_CR, dtype=torch.float32)
        place_C = torch.tensor(self.order).argsort()
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            for now in range(start, stop):
                column = self.order[now]
                members = grid.undecided(column)
                if members is not None:
                    place_N = place_C[members].to(weight_CR.device)
                    grid.decide(column, weight_CR[place_N] - factor_CC[start:now, place_N].T @ error_CR[start:now])
                weight_1R = weight_CR[now : now + 1] - factor_CC[start:now, now : now + 1].T @ error_CR[start:now]
                level_1R, step_1S = self.round_column(weight_1R, column, grid, factor_CC[now, now], price)
                level_CR[column] = level_1R[0]
                error_CR[now] = (weight_1R - level_1R.double() * step_1S.double())[0] / factor_CC[now, now]
            weight_CR[stop:] -= factor_CC[start:stop, stop:].T @ error_CR[start:stop]
        return level_CR.T

    def descend(
        self, level_RC: Tensor, grid: ColumnGrid, price: RatePrice | None = None, passes: int = DESCENT_PASSES
    ) -> Tensor:
        """level_RC after some passes over the columns that choose each code anew for the errors of all others.

        Coordinate descent on e H e^T (and the bits): no pass makes it worse but for the damping and costs that change.
        """
        damped_CC, columns = self.damped_CC, len(self.order)
        step_CS = torch.cat([grid.column(column)[0] for column in self.order]).double()
        level_CR = level_RC.T[self.order].contiguous()
        error_CR = self.weight_CR - level_CR * step_CS
        for start in [*range(0, columns, self.block)] * passes:
            stop = min(start + self.block, columns)
            inner_BB, before_BR = damped_CC[start:stop, start:stop], error_CR[start:stop].clone()
            pull_BR = damped_CC[start:stop] @ error_CR - inner_BB @ before_BR
            for now in range(start, stop):
                power = damped_CC[now, now]
                others_1R = pull_BR[now - start] + inner_BB[now - start] @ error_CR[start:stop]
                best_1R = self.weight_CR[now] + others_1R / power - error_CR[now]
                level_1R, step_1S = self.round_column(best_1R[None], self.order[now], grid, power.rsqrt(), price)
                level_CR[now] = level_1R[0]
                error_CR[now] = (self.weight_CR[now] - level_1R.double() * step_1S.double())[0]
        found_CR = torch.empty_like(level_CR)
        found_CR[self.order] = level_CR
        return found_CR.T

    @staticmethod
    def round_column(
        weight_1R: Tensor, column: int, grid: ColumnGrid, factor: Tensor, price: RatePrice | None
    ) -> tuple[Tensor, Tensor]:
        """level_1R and step_1S of a column."""
        step_1S, low, high = grid.column(column)
        ratio_1R = weight_1R.float() / step_1S
        if price is None:
            return nearest_level(ratio_1R, low, high, grid.spec), step_1S
        price_1R = (price.slope_1R * (factor / step_1S.double()).square()).float()
        return cheapest_level(ratio_1R, low, high, price.costs, column, price_1R), step_1S


def gptq_problem(weight_RC: Tensor, hessian_CC: Tensor, options: GptqOptions) -> GptqProblem:
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    order_C = torch.arange(weight_RC.size(1), device=weight_RC.device)
    if options.act_order:
        order_C = hessian_CC.diagonal().argsort(descending=True, stable=True)
    factor_CC, damped_CC = factor_and_damped(hessian_CC[order_C][:, order_C], options.damping)
    return GptqProblem(weight_RC.double().T[order_C], factor_CC, damped_CC, order_C.tolist(), options.block)


def rate_price(problem: GptqProblem, level_RC: Tensor, grid: ColumnGrid, options: GptqOptions) -> RatePrice:
    """Costs of codes like these, and a bit's price: the loss of error by a bit where all steps are made finer at once.

    That of D = sum of row_weight_r step_rc^2 / U_cc^2 / 12, which falls by 2 ln 2 of its mean for a bit more in each.
    """
    scale_SG, zero_SG = grid.parts()
    rows, columns = level_RC.shape
    weight_R = torch.ones(rows, dtype=torch.float64, device=level_RC.device)
    if options.row_weight_R is not None:
        weight_R = options.row_weight_R.to(weight_R)
    slope = options.rate_slope
    if slope is None:
        step_SC = step_matrix(scale_SG, grid.column_scale_C, columns).double()
        power_C = torch.empty(columns, dtype=torch.float64, device=level_RC.device)
        power_C[problem.order] = problem.factor_CC.diagonal().square().reciprocal()
        slope = float(HIGH_RATE_SLOPE * (weight_R[:, None] * step_SC.square() * power_C).mean())
    most = grid_clip(grid.spec.bits) if zero_SG is None else 2**grid.spec.bits - 1
    return RatePrice(learn_costs(level_RC, most), (options.rd_lambda * slope / weight_R.clamp(min=1e-300))[None])


def quantize_matrix(
    weight_RC: Tensor,
    spec: QuantSpec,
    hessian_CC: Tensor | None = None,
    options: GptqOptions = GPTQ_DEFAULTS,
    scales: StepSizes | None = None,
) -> QuantizedTensor:
    """Codes, steps and zero points of a matrix: rounded to nearest, or by GPTQ where H of its inputs is given.

    `scales` are steps to use instead of those of the spec's rule and granularity; they go with symmetric grids.
    H may be the sum or the mean of x x^T; without inputs in a column, the column is rounded to nearest. Raises
    QuantError for what is not finite, does not fit, or is no H.
    """
    check_quantizable(weight_RC, spec, options, scales)
    if hessian_CC is None:
        return round_to_nearest(weight_RC, spec, scales)
    weight_RC = weight_RC.detach().float()
    problem = gptq_problem(weight_RC, hessian_CC, options)
    grid = ColumnGrid(weight_RC, spec, scales)
    level_RC, price = problem.round_columns(grid), None
    if options.rd_lambda > 0 and not (spec.bits == 1 and spec.symmetric):
        for _ in range(options.rate_passes):
            price = rate_price(problem, level_RC, grid, options)
            grid = ColumnGrid(weight_RC, spec, scales)
            level_RC = problem.round_columns(grid, price)
    if options.descent_passes > 0:
        level_RC = problem.descend(level_RC, grid, price, options.descent_passes)
    return stored_form(level_RC, *grid.parts(), spec, grid.column_scale_C)


def check_quantizable(weight_RC: Tensor, spec: QuantSpec, options: GptqOptions, scales: StepSizes | None) -> None:
    if weight_RC.dim() != 2 or not weight_RC.numel():
        raise QuantError(f"weights of shape {tuple(weight_RC.shape)} are no matrix to quantize")
    check_finite(weight_RC, "the weight matrix")
    if not (options.damping > 0 and options.block > 0 and options.rd_lambda >= 0 and options.rate_passes > 0):
        raise QuantError("damping, block and rate_passes are above 0, rd_lambda is not below 0")
    if scales is not None:
        check_step_sizes(scales, *weight_RC.shape)
        if not spec.symmetric:
            raise QuantError("given steps go with a symmetric grid: they come without zero points")
