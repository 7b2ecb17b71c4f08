"""Finds codes of the trellis grid (trellis.py) by Viterbi's search inside GPTQ's error feedback.

Every row keeps one survivor for each state, and each survivor feeds the errors of its own past to the columns ahead.

R rows, C columns, B columns of a block, S states of the trellis, Z parities, A arms that lead to a state.
"""

import torch
from torch import Tensor

from golf.quant.gptq import StepSizes
from golf.quant.grid import QuantizedTensor
from golf.quant.trellis import PARITY_H0, PARITY_H1, TRELLIS_STATES

TRELLIS_BLOCK = 128
"""Columns over which survivors compete; the winner's error goes to the later columns. The next block starts in its
state: that costs 0.005 bit a weight against survivors that live on."""
HALF_CODES = 63
"""Bound of half a code: codes stay in -126..125."""


def trellis_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns next_SZ, the state after each state and parity; from_SA, the two (state * 2 + parity) that lead to a
    state."""
    state_S, parity_Z = torch.arange(TRELLIS_STATES, device=device), torch.arange(2, device=device)
    next_SZ = (state_S >> 1 ^ (state_S & 1) * (PARITY_H0 >> 1))[:, None] ^ parity_Z * (PARITY_H1 >> 1)
    return next_SZ, next_SZ.flatten().argsort(stable=True).view(TRELLIS_STATES, 2)


def search_block(
    weight_RB: Tensor, factor_BB: Tensor, scale_RB: Tensor, state_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes_RB, errors_RB over the factor's diagonal, and the end state_R, of each row's best walk from
    `state_R`.

    The cost of a walk is the sum of (error / factor_jj)^2, GPTQ's.
    """
    rows, columns = weight_RB.shape
    next_SZ, from_SA = trellis_steps(weight_RB.device)
    half_S = torch.arange(TRELLIS_STATES, device=weight_RB.device) & 1
    first_SZ = half_S[:, None] + torch.tensor([0, 2], device=half_S.device)
    cost_RS = torch.full((rows, TRELLIS_STATES), torch.inf, device=weight_RB.device).scatter_(1, state_R[:, None], 0.0)
    error_RSB = weight_RB.new_zeros(rows, TRELLIS_STATES, columns)
    code_RSB = torch.zeros(rows, TRELLIS_STATES, columns, dtype=torch.int8, device=weight_RB.device)
    for j in range(columns):
        scale_R11 = scale_RB[:, j, None, None]
        value_RS1 = (weight_RB[:, j, None] - error_RSB[:, :, :j] @ factor_BB[:j, j])[:, :, None]
        turns_RSZ = ((value_RS1 / scale_R11 - first_SZ) / 4).round().clamp(-HALF_CODES, HALF_CODES - 1)
        point_RSZ = first_SZ + 4 * turns_RSZ
        errors_RSZ = (value_RS1 - point_RSZ * scale_R11) / factor_BB[j, j]
        cost_RS, arm_RS = (cost_RS[:, :, None] + errors_RSZ**2).flatten(1)[:, from_SA].min(2)
        chosen_RS = from_SA.expand(rows, -1, -1).gather(2, arm_RS[:, :, None])[:, :, 0]
        past_RSB = (chosen_RS // 2)[:, :, None].expand(-1, -1, j)
        error_RSB[:, :, :j], code_RSB[:, :, :j] = error_RSB.gather(1, past_RSB), code_RSB.gather(1, past_RSB)
        error_RSB[:, :, j] = errors_RSZ.flatten(1).gather(1, chosen_RS)
        code_RSB[:, :, j] = ((point_RSZ - half_S[:, None]) / 2).flatten(1).gather(1, chosen_RS).to(torch.int8)
    best_R = cost_RS.argmin(1)
    row_R = torch.arange(rows, device=weight_RB.device)
    return code_RSB[row_R, best_R], error_RSB[row_R, best_R], best_R


def quantize_trellis(weight_RC: Tensor, factor_CC: Tensor, scales: StepSizes) -> QuantizedTensor:
    """Finds codes whose points are near `weight_RC` in the metric of H, with factor_CC the upper U of H^-1 = U^T U.

    Columns are in their natural order. `scales` are steps of the coarse grid, halved here. Runs in fp32: it only
    compares survivors, and stores whole numbers.
    """
    scale_S1 = scales.scale_SG * 0.5
    column_C = scales.column_scale_C if scales.column_scale_C is not None else torch.ones_like(weight_RC[0]).half()
    scale_RC = (scale_S1.float() * column_C.float()).expand_as(weight_RC)
    weight_RC, factor_CC = weight_RC.float().clone(), factor_CC.float()
    codes_RC = torch.empty_like(weight_RC, dtype=torch.int8)
    state_R = torch.zeros(len(weight_RC), dtype=torch.int64, device=weight_RC.device)
    for start in range(0, weight_RC.size(1), TRELLIS_BLOCK):
        block, later = slice(start, start + TRELLIS_BLOCK), slice(start + TRELLIS_BLOCK, None)
        found = search_block(weight_RC[:, block], factor_CC[block, block], scale_RC[:, block], state_R)
        codes_RC[:, block], errors_RB, state_R = found
        weight_RC[:, later] -= errors_RB @ factor_CC[block, later]
    return QuantizedTensor(codes_RC.cpu(), scale_S1.cpu(), 8, column_C.cpu(), trellis=True)


def quantize_trellises(weights, factors, scales):
    return [quantize_trellis(*one) for one in zip(weights, factors, scales, strict=True)]
