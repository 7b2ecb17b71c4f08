"""GPTQ rounds column after column and lets the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the second moments of the inputs, H = sum x x^T, the error of a
rounded row e is e H e^T. U is the upper factor of H^-1 = U^T U, and rounding column j moves the columns k > j by
-(w_j - q_j) / U_jj * U_jk, the move of least error. Columns are numbered in the order in which they are rounded.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns. Factors and weights are transposed, CR: a
column's weights lie side by side. A level is a code less its zero point, so that weight = level * step for every grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from golf.quant.grid import grid_clip
from golf.quant.rate import CodeCosts, cheapest_level, learn_costs
from golf.quant.tensor_classes import QuantError

DAMPING_TRIALS = 7
DESCENT_PASSES = 3
"""They lower the error by 1 % with steps for rows, by 4 to 6 % with steps for columns, at equal entropy."""
RATE_PASSES = 2
"""Times that the rounding is done again with the costs of the codes of the time before."""
CODE_BITS = 8
"""Codes are as large as int8 holds: the coder pays for what is used."""
CODE_CLIP = grid_clip(CODE_BITS)


@dataclass(frozen=True, eq=False)
class StepSizes:
    """Given steps: that of weight (r, c) is scale_rg * column_scale_c, g the group of column c."""

    scale_SG: Tensor
    """fp16, within FP16_TINY..FP16_MAX."""
    column_scale_C: Tensor | None = None
    """fp16, positive; None: 1 for every column."""


def check_finite(weight: Tensor, what: str) -> None:
    """Raises QuantError for NaN or infinite values, naming `what` has them."""
    if not torch.isfinite(weight).all():
        raise QuantError(f"{what} has NaN or infinite values: nothing to quantize")


def factor_and_damped(hessian_CC: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns U_CC in float64, upper, and the matrix whose inverse is U^T U: H + damping * mean(diag H) * 1, with ten
    times as much damping until that has a factor; the identity where all inputs are zero.

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


def checked_hessian(hessian_CC: Tensor, columns: int) -> Tensor:
    """Returns H in float64, made symmetric to the last bit. Raises QuantError for what is no H of so many columns."""
    if hessian_CC.shape != (columns, columns):
        raise QuantError(f"the Hessian is {tuple(hessian_CC.shape)}, the weights have {columns} columns")
    check_finite(hessian_CC, "the Hessian")
    hessian_CC = hessian_CC.double()
    if (hessian_CC.diagonal() < 0).any():
        raise QuantError("the Hessian has negative values on its diagonal: it is no matrix of second moments")
    return (hessian_CC + hessian_CC.T) / 2


class ColumnGrid:
    """Gives the grid of one column after the other: here int8 codes with given steps, one group of columns."""

    def __init__(self, scales: StepSizes, device: torch.device):
        self.scale_1S = scales.scale_SG.to(device).float().T
        self.column_scale_C = scales.column_scale_C.to(device).float()

    def begin_column(self, column: int, moved: Callable[[Tensor], Tensor]) -> None:
        """Is called before a column is rounded, for a grid that chooses its steps then.

        `moved` gives the weights_NR of N columns as the errors so far have moved them.
        """

    def column(self, column: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns step_1S of a column, and its smallest and largest level."""
        return self.scale_1S * self.column_scale_C[column], -CODE_CLIP, CODE_CLIP

    def nearest(self, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Returns the level nearest to ratio = weight / step, halves to even."""
        return ratio.round().clamp(low, high)


@dataclass(frozen=True, eq=False)
class RatePrice:
    """Holds what codes cost: bits, and for each row the error in units of H that is worth a bit."""

    costs: CodeCosts
    slope_1R: Tensor


@dataclass(frozen=True, eq=False)
class GptqProblem:
    """A matrix and its inputs."""

    weight_CR: Tensor
    """float64."""
    factor_CC: Tensor
    """U."""
    damped_CC: Tensor
    """What U factors the inverse of."""
    block: int = 128
    """Columns between two updates of all columns that are left. No effect on the result."""

    def round_columns(self, grid: ColumnGrid, price: RatePrice | None = None) -> Tensor:
        """Returns level_RC, each code the nearest one or, at a price, the cheapest one of error and bits."""
        columns, factor_CC = len(self.weight_CR), self.factor_CC
        weight_CR, error_CR = self.weight_CR.clone(), torch.empty_like(self.weight_CR)
        level_CR = torch.empty_like(self.weight_CR, dtype=torch.float32)

        def moved(start: int, now: int, places: Tensor | slice) -> Tensor:
            return weight_CR[places] - factor_CC[start:now, places].T @ error_CR[start:now]

        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            for now in range(start, stop):
                grid.begin_column(now, partial(moved, start, now))
                weight_1R = moved(start, now, slice(now, now + 1))
                level_1R, step_1S = self.round_column(weight_1R, now, grid, factor_CC[now, now], price)
                level_CR[now] = level_1R[0]
                error_CR[now] = (weight_1R - level_1R.double() * step_1S.double())[0] / factor_CC[now, now]
            weight_CR[stop:] -= factor_CC[start:stop, stop:].T @ error_CR[start:stop]
        return level_CR.T

    def descend(
        self, level_RC: Tensor, grid: ColumnGrid, price: RatePrice | None = None, passes: int = DESCENT_PASSES
    ) -> Tensor:
        """Returns level_RC after some passes over the columns that choose each code anew for the errors of all others.

        Coordinate descent on e H e^T (and the bits): no pass makes it worse but for the damping and costs that change.
        """
        damped_CC, columns = self.damped_CC, len(self.weight_CR)
        step_CS = torch.cat([grid.column(column)[0] for column in range(columns)]).double()
        level_CR = level_RC.T.clone()
        error_CR = self.weight_CR - level_CR * step_CS
        for start in [*range(0, columns, self.block)] * passes:
            stop = min(start + self.block, columns)
            inner_BB, before_BR = damped_CC[start:stop, start:stop], error_CR[start:stop].clone()
            pull_BR = damped_CC[start:stop] @ error_CR - inner_BB @ before_BR
            for now in range(start, stop):
                power = damped_CC[now, now]
                others_1R = pull_BR[now - start] + inner_BB[now - start] @ error_CR[start:stop]
                best_1R = self.weight_CR[now] + others_1R / power - error_CR[now]
                level_1R, step_1S = self.round_column(best_1R[None], now, grid, power.rsqrt(), price)
                level_CR[now] = level_1R[0]
                error_CR[now] = (self.weight_CR[now] - level_1R.double() * step_1S.double())[0]
        return level_CR.T

    @staticmethod
    def round_column(
        weight_1R: Tensor, column: int, grid: ColumnGrid, factor: Tensor, price: RatePrice | None
    ) -> tuple[Tensor, Tensor]:
        """Returns level_1R and step_1S of a column."""
        step_1S, low, high = grid.column(column)
        ratio_1R = weight_1R.float() / step_1S
        if price is None:
            return grid.nearest(ratio_1R, low, high), step_1S
        price_1R = (price.slope_1R * (factor / step_1S.double()).square()).float()
        return cheapest_level(ratio_1R, low, high, price.costs, column, price_1R), step_1S


def gptq_problem(weight_RC: Tensor, hessian_CC: Tensor, damping: float) -> GptqProblem:
    """Returns the problem of fp32 weights and H of their inputs, on the weights' device. Raises QuantError."""
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    return GptqProblem(weight_RC.double().T.contiguous(), *factor_and_damped(hessian_CC, damping))


def rate_price(level_RC: Tensor, slope: float, row_weight_R: Tensor, most: int = CODE_CLIP) -> RatePrice:
    """Returns the costs of codes like these, of magnitudes up to `most`, at `slope` of weighted error for a bit."""
    return RatePrice(learn_costs(level_RC, most), (slope / row_weight_R.clamp(min=1e-300))[None])
