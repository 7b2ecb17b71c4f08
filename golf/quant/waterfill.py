"""Chooses step sizes for the least loss at a given size, where every code's error costs the same.

With an entropy coder behind it a weight w on a grid of step s costs about log2(|w| / s) bits and s^2 / 12 of squared
error, which GPTQ turns into row_weight_r * s^2 / (12 U_cc^2) nats (golf/quant/calibration.py for the row weights,
golf/quant/gptq.py for U). The least sum of both over all weights of all matrices is reached where every weight has the
same cost per squared step (reverse water-filling, Cover and Thomas, Elements of Information Theory, section 13.3.3):
one water level for the whole model gives all steps,

    step_rc = sqrt(level / row_weight_r) * U_cc,

the product of a scale for the row and one for the column. Both lie on a logarithmic grid, so that they are cheap to
send. R rows, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from golf.quant.calibration import LayerStatistics
from golf.quant.gptq import (
    CODE_BITS,
    CODE_CLIP,
    RATE_PASSES,
    ColumnGrid,
    GptqProblem,
    StepSizes,
    gptq_problem,
    rate_price,
)
from golf.quant.grid import FP16_MAX, FP16_TINY, QuantizedTensor, dequantize_tensor
from golf.quant.rate import HIGH_RATE_SLOPE, class_entropy
from golf.quant.tensor_classes import QuantError
from golf.quant.trellis_search import quantize_trellises

UP_SUFFIX, DOWN_SUFFIX = ".mlp.fc.weight", ".mlp.proj.weight"


def hidden_order(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Returns order_H: units by falling product of the L2 norms of their two vectors; ties by their old place."""
    strength_H = up_HD.double().norm(dim=1) * down_DH.double().norm(dim=0)
    return strength_H.argsort(descending=True, stable=True)


def mlp_blocks(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the prefixes of the MLPs in `state`. Raises QuantError where one lacks a matrix, or theirs do not fit."""
    prefixes = [name.removesuffix(UP_SUFFIX) for name in state if name.endswith(UP_SUFFIX)]
    for prefix in prefixes:
        up, down = state[prefix + UP_SUFFIX], state.get(prefix + DOWN_SUFFIX)
        if down is None or up.dim() != 2 or down.shape != (up.size(1), up.size(0)):
            raise QuantError(f"{prefix}{UP_SUFFIX} has no {DOWN_SUFFIX} that fits it")
    return prefixes


def hidden_orders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns hidden_order of every MLP by its prefix. Raises QuantError."""
    return {block: hidden_order(state[block + UP_SUFFIX], state[block + DOWN_SUFFIX]) for block in mlp_blocks(state)}


def permute_statistics(
    statistics: Mapping[str, LayerStatistics], orders: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """Returns the statistics of weights whose hidden units are in `orders` (by prefix)."""
    permuted = dict(statistics)
    for prefix, order_H in orders.items():
        up, down = statistics[prefix + UP_SUFFIX], statistics[prefix + DOWN_SUFFIX]
        permuted[prefix + UP_SUFFIX] = LayerStatistics(up.hessian_CC, up.row_weight_R[order_H])
        permuted[prefix + DOWN_SUFFIX] = LayerStatistics(down.hessian_CC[order_H][:, order_H], down.row_weight_R)
    return permuted


def permute_hidden_units(state: Mapping[str, Tensor], orders: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reorders each MLP's units by `orders` (by prefix, "blocks.0"), or by hidden_order; the function stays the same.

    Raises QuantError for an order that is no permutation.
    """
    permuted = dict(state)
    orders = hidden_orders(state) if orders is None else orders
    for prefix in mlp_blocks(state):
        up_HD, down_DH, order_H = state[prefix + UP_SUFFIX], state[prefix + DOWN_SUFFIX], orders[prefix]
        if not torch.equal(order_H.sort().values.cpu(), torch.arange(len(up_HD))):
            raise QuantError(f"the order of {prefix}'s units is no permutation of {len(up_HD)}")
        permuted[prefix + UP_SUFFIX] = up_HD[order_H].contiguous()
        permuted[prefix + DOWN_SUFFIX] = down_DH[:, order_H].contiguous()
    return permuted


STEPS_PER_OCTAVE = 16
CODE_ROOM = 0.9
"""Share of the largest code that the original weights may reach: error feedback moves them."""
RD_LAMBDA = 0.15
"""Weight of a code's bits against its error. In theory 1; but codes that are all moved towards zero have errors that
add up, and the divergence from the unquantized model is least near this value (docs/LOG.md)."""
LEAST_ROW_WEIGHT = 1e-4
"""Smallest row weight, as a share of the mean row's: a row that calibration never saw act may act after all."""


def nearest_on_log_grid(scale: Tensor) -> Tensor:
    """Returns the fp16 values m / 1024 * 2^e nearest to `scale` in ratio, m one of STEPS_PER_OCTAVE whole numbers an
    octave."""
    k = (scale.double().clamp(FP16_TINY, FP16_MAX / 2).log2() * STEPS_PER_OCTAVE).round()
    octave = (k / STEPS_PER_OCTAVE).floor()
    mantissa = (1024 * torch.exp2(k / STEPS_PER_OCTAVE - octave)).round()
    return (mantissa / 1024 * torch.exp2(octave)).half()


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """Holds a matrix with all that does not depend on the water level."""

    weight_RC: Tensor
    factor_CC: Tensor
    damped_CC: Tensor
    damping_C: Tensor
    """What `damped_CC` has more than the statistics on its diagonal."""
    row_weight_R: Tensor

    def sample(self, stride: int) -> "PreparedMatrix":
        """Returns every `stride`-th row as a matrix."""
        return replace(self, weight_RC=self.weight_RC[::stride], row_weight_R=self.row_weight_R[::stride])

    @property
    def problem(self) -> GptqProblem:
        """Returns what GPTQ wants to know."""
        return GptqProblem(self.weight_RC.double().T.unsqueeze(1), [self.factor_CC], [self.damped_CC])

    def step_sizes(self, level: float) -> StepSizes:
        """Returns scales of rows and columns at a water level, coarse enough for the weights to stay within int8
        codes."""
        column_C = self.factor_CC.diagonal()
        center = column_C.log().mean().exp()
        column_C = nearest_on_log_grid(column_C / center)
        row_R = (level / self.row_weight_R).sqrt() * center
        most_R = (self.weight_RC.double().abs() / column_C.double()).amax(dim=1)
        row_R = torch.maximum(row_R, most_R / (CODE_ROOM * CODE_CLIP))
        return StepSizes(nearest_on_log_grid(row_R).unsqueeze(1), column_C)

    def quantize(self, level: float, rd_lambda: float = RD_LAMBDA, trellis: bool = True) -> QuantizedTensor:
        """Returns quantize_matrices of this one alone."""
        return quantize_matrices([self], level, rd_lambda, trellis)[0]

    def cost(self, entry: QuantizedTensor, level: float) -> float:
        """Returns nats per token: the predicted loss, and the codes' bits at the level's price."""
        bits = class_entropy(entry.codes_RC.float()) * entry.codes_RC.numel()
        return self.loss_added(dequantize_tensor(entry)) + 0.5 * HIGH_RATE_SLOPE * level * bits

    def codes_not_nearest(self, entry: QuantizedTensor | Tensor) -> int:
        """Counts the codes that differ from rounding each weight alone with the steps of `entry`.

        Counts all codes of a trellis, which has no nearest code; fp16 has no codes.
        """
        if isinstance(entry, Tensor):
            return 0
        if entry.trellis:
            return entry.codes_RC.numel()
        step_RC = (entry.scale_SG.float() * entry.column_scale_C.float()).to(self.weight_RC.device)
        nearest_RC = (self.weight_RC / step_RC).round().clamp(-CODE_CLIP, CODE_CLIP)
        return int((nearest_RC.to(torch.int8).cpu() != entry.codes_RC).sum())

    def loss_added(self, restored_RC: Tensor) -> float:
        """Returns the predicted added loss, nats per token."""
        error_RC = restored_RC.to(self.weight_RC.device).double() - self.weight_RC.double()
        cost_R = ((error_RC @ self.damped_CC) * error_RC).sum(1) - error_RC.square() @ self.damping_C
        return 0.5 * float(cost_R @ self.row_weight_R)


def quantize_matrices(
    matrices: Sequence[PreparedMatrix], level: float, rd_lambda: float = RD_LAMBDA, trellis: bool = True
) -> list[QuantizedTensor]:
    """Quantizes matrices of one shape by GPTQ with the steps of `level`, choosing each code by its error and its bits
    at the level's price.

    Takes the codes of a trellis where they cost less. A matrix gets the same codes in any company.
    """
    scales = [matrix.step_sizes(level) for matrix in matrices]
    plain = quantize_plain(matrices, scales, level, rd_lambda)
    if not trellis:
        return plain
    factors = [matrix.factor_CC for matrix in matrices]
    woven = quantize_trellises([matrix.weight_RC for matrix in matrices], factors, scales)
    return [
        min(entries, key=lambda entry, matrix=matrix: matrix.cost(entry, level))
        for matrix, *entries in zip(matrices, plain, woven, strict=True)
    ]


def join_problems(matrices: Sequence[PreparedMatrix]) -> GptqProblem:
    """Returns the problems of matrices of one shape as one."""
    weight_CMR = torch.cat([matrix.problem.weight_CMR for matrix in matrices], 1)
    return GptqProblem(weight_CMR, [matrix.factor_CC for matrix in matrices], [matrix.damped_CC for matrix in matrices])


def quantize_plain(
    matrices: Sequence[PreparedMatrix], scales: Sequence[StepSizes], level: float, rd_lambda: float
) -> list[QuantizedTensor]:
    """Quantizes matrices of one shape without trellises."""
    grid, price, problem = ColumnGrid(scales, matrices[0].weight_RC.device), None, join_problems(matrices)
    level_MRC = problem.round_columns(grid)
    for _ in range(RATE_PASSES if rd_lambda else 0):
        slope = rd_lambda * (HIGH_RATE_SLOPE * level)
        price = rate_price(level_MRC, slope, [matrix.row_weight_R for matrix in matrices])
        level_MRC = problem.round_columns(grid, price)
    code_MRC = problem.descend(level_MRC, grid, price).to(torch.int8).cpu().contiguous()
    return [
        QuantizedTensor(code_RC, one.scale_SG.cpu(), CODE_BITS, one.column_scale_C.cpu())
        for code_RC, one in zip(code_MRC, scales, strict=True)
    ]


def prepare_matrix(weight_RC: Tensor, statistics: LayerStatistics, damping: float = 0.01) -> PreparedMatrix:
    """Prepares a matrix for any water level. Raises QuantError for weights or statistics that are not finite or don't
    fit.

    Columns keep their natural order: with steps of their own, act-order changes nothing (docs/LOG.md), and a trellis
    runs from left to right.
    """
    weight_RC = weight_RC.detach().float()
    statistics = LayerStatistics(
        *(part.to(weight_RC.device) for part in (statistics.hessian_CC, statistics.row_weight_R))
    )
    row_weight_R = statistics.row_weight_R.clamp_min(
        LEAST_ROW_WEIGHT * statistics.row_weight_R.mean().clamp_min(1e-300)
    )
    problem = gptq_problem(weight_RC, statistics.hessian_CC, damping)
    damping_C = problem.damped[0].diagonal() - statistics.hessian_CC.diagonal()
    return PreparedMatrix(weight_RC, problem.factor_CC, problem.damped[0], damping_C, row_weight_R)
