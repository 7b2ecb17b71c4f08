"""GPTQ rounds column after column and lets the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the second moments of the inputs, H = sum x x^T, the error of a
rounded row e is e H e^T. U is the upper factor of H^-1 = U^T U, and rounding column j moves the columns k > j by
-(w_j - q_j) / U_jj * U_jk, the move of least error. Columns are numbered in the order in which they are rounded.

Matrices of one shape are rounded together, in one loop over their columns: on a GPU the loop's launches take the time,
whatever they work on. What combines weights is either elementwise or a product of one matrix alone, so that a matrix
gets the same codes in whatever company it is.

M matrices, R rows, C columns, K columns of a run, B of a block, S rows of scales (R, or 1 for all), G groups of
columns. Weights are transposed, CMR: a column's weights lie side by side. A level is a code less its zero point, so
that weight = level * step for every grid.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from golf.quant.grid import grid_clip
from golf.quant.rate import CodeCosts, cheapest_level, join_costs, learn_costs
from golf.quant.tensor_classes import QuantError

DAMPING_TRIALS = 7
RUN = 16
"""Columns whose errors move each other elementwise; those of the block that follow are moved once for a run."""
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
    """Gives the grids of all columns: here int8 codes with given steps, one group of columns."""

    run = RUN
    """Most columns of a run: 1 where every column has to be begun."""

    def __init__(self, scales: Sequence[StepSizes], device: torch.device):
        self.scale_MS = torch.cat([one.scale_SG.T for one in scales]).to(device).float()
        self.column_scale_CM1 = torch.stack([one.column_scale_C for one in scales], 1)[:, :, None].to(device).float()

    def begin_run(self, column: int, moved: Callable[[Tensor], Tensor]) -> None:
        """Is called before a run that begins with `column` is rounded, for a grid that chooses its steps then.

        `moved` gives the weights_KR of K columns (by number, of a single matrix) as the errors so far have moved them.
        """

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns step_KMS of a run's columns, and their smallest and largest level."""
        return self.scale_MS * self.column_scale_CM1[start:stop], -CODE_CLIP, CODE_CLIP

    def nearest(self, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Returns the level nearest to ratio = weight / step, halves to even."""
        return ratio.round().clamp(low, high)


@dataclass(frozen=True, eq=False)
class RatePrice:
    """Holds what codes cost: bits, and for each row the error in units of H that is worth a bit."""

    costs: CodeCosts
    slope_MR: Tensor


class ColumnRun:
    """Rounds columns `start` to `stop` one by one, with what can be known of all of them in advance."""

    def __init__(self, start: int, stop: int, grid: ColumnGrid, factor_KM1: Tensor, price: RatePrice | None):
        self.start, self.grid, self.price = start, grid, price
        self.step_KMS, self.low, self.high = grid.columns(start, stop)
        self.exact_KMS = self.step_KMS.double()
        if price:
            self.price_KMR = (price.slope_MR * (factor_KM1 / self.exact_KMS).square()).float()

    def round(self, k: int, weight_MR: Tensor) -> tuple[Tensor, Tensor]:
        """Returns level_MR of column `start` + k, and the float64 value_MR that they stand for."""
        ratio_MR = weight_MR.float() / self.step_KMS[k]
        if self.price:
            costs, column = self.price.costs, self.start + k
            level_MR = cheapest_level(ratio_MR, self.low, self.high, costs, column, self.price_KMR[k])
        else:
            level_MR = self.grid.nearest(ratio_MR, self.low, self.high)
        return level_MR, level_MR * self.exact_KMS[k]


def add_products(sum_KMR: Tensor, factors: Sequence[Tensor], part_BMR: Tensor, sign: int) -> None:
    """Adds sign * factor_KB @ part_BR to each matrix in place.

    One product a matrix: in a batch of products the order of a sum may depend on their number.
    """
    for m, factor_KB in enumerate(factors):
        sum_KMR[:, m].addmm_(factor_KB, part_BMR[:, m], alpha=sign)


def corners(factors: Sequence[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Returns inner_KKM1 of all matrices, rows and columns `start` to `stop`, and their diagonals_KM1."""
    inner_KKM1 = torch.stack([factor_CC[start:stop, start:stop] for factor_CC in factors], 2)[..., None]
    return inner_KKM1, inner_KKM1.diagonal().movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class GptqProblem:
    """Holds matrices of one shape and their inputs."""

    weight_CMR: Tensor
    """float64."""
    factors: Sequence[Tensor]
    """U_CC of each matrix."""
    damped: Sequence[Tensor]
    """What U factors the inverse of."""
    block: int = 128
    """Columns between two updates of all columns that are left. No effect on the result but the order of sums."""

    @property
    def factor_CC(self) -> Tensor:
        """Returns U of a single matrix."""
        (factor_CC,) = self.factors
        return factor_CC

    def runs(self, run: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields the start and the end of each run of columns, and those of its block."""
        columns = len(self.weight_CMR)
        for first in range(0, columns, self.block):
            last = min(first + self.block, columns)
            for start in range(first, last, run):
                yield start, min(start + run, last), first, last

    def round_columns(self, grid: ColumnGrid, price: RatePrice | None = None) -> Tensor:
        """Returns level_MRC, each code the nearest one or, at a price, the cheapest one of error and bits."""
        weight_CMR, error_CMR = self.weight_CMR.clone(), torch.empty_like(self.weight_CMR)
        level_CMR = torch.empty_like(self.weight_CMR, dtype=torch.float32)

        def moved(start: int, first: int, last: int, place_K: Tensor) -> Tensor:
            factor_BK = self.factor_CC[first:start, place_K] * (place_K >= last)  # the block's own have been moved
            return weight_CMR[place_K, 0] - factor_BK.T @ error_CMR[first:start, 0]

        def move(columns: slice, by: slice) -> None:
            add_products(
                weight_CMR[columns], [factor_CC[by, columns].T for factor_CC in self.factors], error_CMR[by], -1
            )

        for start, stop, first, last in self.runs(grid.run):
            grid.begin_run(start, partial(moved, start, first, last))
            inner_KKM1, diagonal_KM1 = corners(self.factors, start, stop)
            run = ColumnRun(start, stop, grid, diagonal_KM1, price)
            for k, weight_MR in enumerate(weight_CMR[start:stop]):
                level_CMR[start + k], value_MR = run.round(k, weight_MR)
                error_CMR[start + k] = (weight_MR - value_MR) / diagonal_KM1[k]
                weight_CMR[start + k + 1 : stop].addcmul_(inner_KKM1[k, k + 1 :], error_CMR[start + k], value=-1)
            move(slice(stop, last), slice(start, stop))
            if stop == last:
                move(slice(last, None), slice(first, last))
        return level_CMR.permute(1, 2, 0)

    def descend(
        self, level_MRC: Tensor, grid: ColumnGrid, price: RatePrice | None = None, passes: int = DESCENT_PASSES
    ) -> Tensor:
        """Returns level_MRC after some passes over the columns that choose each code anew for the errors of all others.

        Coordinate descent on e H e^T (and the bits): no pass makes it worse but for the damping and costs that change.
        """
        level_CMR = level_MRC.permute(2, 0, 1).contiguous()
        steps = [grid.columns(start, stop)[0] for start, stop, _, _ in self.runs(grid.run)]
        error_CMR = self.weight_CMR - level_CMR * torch.cat(steps).double()
        for start, stop, first, last in [*self.runs(grid.run)] * passes:
            if start == first:
                pull_BMR = torch.zeros_like(error_CMR[first:last])
                add_products(pull_BMR, [damped_CC[first:last] for damped_CC in self.damped], error_CMR, 1)
            inner_KKM1, power_KM1 = corners(self.damped, start, stop)
            run, before_KMR = ColumnRun(start, stop, grid, power_KM1.rsqrt(), price), error_CMR[start:stop].clone()
            pull_KMR, change_KMR = pull_BMR[start - first : stop - first], torch.empty_like(before_KMR)
            for k, weight_MR in enumerate(self.weight_CMR[start:stop]):
                best_MR = weight_MR + pull_KMR[k] / power_KM1[k] - before_KMR[k]
                level_CMR[start + k], value_MR = run.round(k, best_MR)
                error_CMR[start + k] = weight_MR - value_MR
                change_KMR[k] = error_CMR[start + k] - before_KMR[k]
                pull_KMR[k + 1 :].addcmul_(inner_KKM1[k, k + 1 :], change_KMR[k])
            later = [damped_CC[stop:last, start:stop] for damped_CC in self.damped]
            add_products(pull_BMR[stop - first :], later, change_KMR, 1)
        return level_CMR.permute(1, 2, 0)


def gptq_problem(weight_RC: Tensor, hessian_CC: Tensor, damping: float) -> GptqProblem:
    """Returns the problem of fp32 weights and H of their inputs, on the weights' device. Raises QuantError."""
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    factor_CC, damped_CC = factor_and_damped(hessian_CC, damping)
    return GptqProblem(weight_RC.double().T.unsqueeze(1), [factor_CC], [damped_CC])


def rate_price(
    levels: Sequence[Tensor], slope: float, row_weights: Sequence[Tensor], most: int = CODE_CLIP
) -> RatePrice:
    """Returns the costs of each matrix's codes, if like its level_RC, of magnitudes up to `most`, at `slope` of error,
    weighted by row_weight_R, for a bit."""
    costs = join_costs([learn_costs(level_RC, most) for level_RC in levels])
    return RatePrice(costs, slope / torch.stack(list(row_weights)).clamp(min=1e-300))
