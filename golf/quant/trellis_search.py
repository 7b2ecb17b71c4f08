"""Finds codes of the trellis grid (trellis.py) by Viterbi's search inside GPTQ's error feedback.

Every row keeps one survivor for each state, and each survivor feeds the errors of its own past to the columns ahead.
Survivors change places at every column, so what each has fed moves with it: within a run of a few columns at every
column, and for the columns after it once, when the run ends.

M matrices of one shape, R rows, C columns, B columns of a block, K of a run, S states of the trellis, Z parities, A
arms that lead to a state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from golf.quant.gptq import StepSizes, add_products, corners
from golf.quant.grid import QuantizedTensor
from golf.quant.trellis import PARITY_H0, PARITY_H1, TRELLIS_STATES

TRELLIS_BLOCK, TRELLIS_RUN = 128, 16
"""Columns over which survivors compete; the winner's error goes to the later columns. The next block starts in its
state: that costs 0.005 bit a weight against survivors that live on. And columns of a run: no effect on the result but
the order of sums."""
HALF_CODES = 63
"""Bound of half a code: codes stay in -126..125."""


def trellis_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns next_SZ, the state after each state and parity; from_SA, the two (state * 2 + parity) that lead to a
    state."""
    state_S, parity_Z = torch.arange(TRELLIS_STATES, device=device), torch.arange(2, device=device)
    next_SZ = (state_S >> 1 ^ (state_S & 1) * (PARITY_H0 >> 1))[:, None] ^ parity_Z * (PARITY_H1 >> 1)
    return next_SZ, next_SZ.flatten().argsort(stable=True).view(TRELLIS_STATES, 2)


def take_step(
    value_MSR: Tensor, scale_M1R: Tensor, diagonal_M11: Tensor, cost_MSR: Tensor, from_SA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the arm_MSR (second or first) by which each state is reached at the least cost after a column, and of the
    walks there cost_MSR, error_MSR over the factor's diagonal, and code_MSR.

    The cost of a walk is the sum of (error / factor_jj)^2, GPTQ's.
    """
    state_S, parity_Z1 = (
        torch.arange(TRELLIS_STATES, device=from_SA.device),
        torch.arange(2, device=from_SA.device)[:, None],
    )
    first_SZ1 = (state_S & 1)[:, None, None] + 2 * parity_Z1
    value_MS1R, scale_M11R = value_MSR.unsqueeze(2), scale_M1R.unsqueeze(2)
    turns_MSZR = (value_MS1R / scale_M11R).sub(first_SZ1).div_(4).round_().clamp_(-HALF_CODES, HALF_CODES - 1)
    error_MSZR = (value_MS1R - (first_SZ1 + 4 * turns_MSZR) * scale_M11R).div_(diagonal_M11.unsqueeze(2))
    costs_MSZR = error_MSZR.square().add_(cost_MSR.unsqueeze(2))
    first_MSR, second_MSR = (costs_MSZR.flatten(1, 2).index_select(1, from_S) for from_S in from_SA.T)
    arm_MSR = second_MSR < first_MSR
    found = [either(arm_MSR, part.flatten(1, 2), from_SA) for part in (error_MSZR, turns_MSZR.mul_(2).add_(parity_Z1))]
    return arm_MSR, torch.minimum(first_MSR, second_MSR), *found


def either(arm_MSR: Tensor, part: Tensor, from_SA: Tensor) -> Tensor:
    """Returns what stands in the last but one dimension of `part` where each state's better arm comes from."""
    first, second = (part.index_select(-2, from_S) for from_S in from_SA.T)
    return torch.where(arm_MSR, second, first)


def walk_run(
    ahead_KMSR: Tensor, factors: Sequence[Tensor], scale_KMR: Tensor, cost_MSR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the survivors after a run's columns: cost_MSR, the origin_MSR in which each was before it, and on its way
    error_KMSR and code_KMSR.

    `ahead_KMSR` holds the weights as each survivor's errors so far have moved them.
    """
    inner_KKM1, diagonal_KM1 = corners(factors, 0, len(ahead_KMSR))
    from_SA = trellis_steps(cost_MSR.device)[1]
    steps, state_S1 = [], torch.arange(TRELLIS_STATES, device=cost_MSR.device)[:, None]
    for k, scale_MR in enumerate(scale_KMR):
        diagonal_M11 = diagonal_KM1[k].unsqueeze(1)
        arm_MSR, cost_MSR, error_MSR, code_MSR = take_step(
            ahead_KMSR[0], scale_MR.unsqueeze(1), diagonal_M11, cost_MSR, from_SA
        )
        steps.append((either(arm_MSR, state_S1, from_SA // 2), error_MSR, code_MSR.to(torch.int8)))
        ahead_KMSR = either(arm_MSR, ahead_KMSR[1:], from_SA // 2)
        ahead_KMSR.addcmul_(inner_KKM1[k, k + 1 :].unsqueeze(2), error_MSR, value=-1)
    origin_MSR, ways = state_S1.expand_as(cost_MSR), []
    for before_MSR, *parts in reversed(steps):
        ways.append([part_MSR.gather(1, origin_MSR) for part_MSR in parts])
        origin_MSR = before_MSR.gather(1, origin_MSR)
    error_KMSR, code_KMSR = (torch.stack(parts) for parts in zip(*reversed(ways), strict=True))
    return cost_MSR, origin_MSR, error_KMSR, code_KMSR


def search_block(
    weight_BMR: Tensor, factors: Sequence[Tensor], scale_BMR: Tensor, state_MR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes_BMR, errors_BMR over the factors' diagonals, and the end state_MR, of each row's best walk from
    `state_MR`. The factors are those of the block's columns."""
    ahead_BMSR = weight_BMR.unsqueeze(2).repeat(1, 1, TRELLIS_STATES, 1)
    cost_MSR = torch.full_like(ahead_BMSR[0], torch.inf).scatter_(1, state_MR.unsqueeze(1), 0.0)
    runs = []
    for start in range(0, len(weight_BMR), TRELLIS_RUN):
        run, later = slice(start, start + TRELLIS_RUN), slice(start + TRELLIS_RUN, None)
        ahead_KMSR, ahead_BMSR = ahead_BMSR[:TRELLIS_RUN], ahead_BMSR[TRELLIS_RUN:]
        own = [factor_BB[run, run] for factor_BB in factors]
        cost_MSR, origin_MSR, error_KMSR, code_KMSR = walk_run(ahead_KMSR, own, scale_BMR[run], cost_MSR)
        ahead_BMSR = ahead_BMSR.gather(2, origin_MSR.expand_as(ahead_BMSR))
        moves = [factor_BB[run, later].T for factor_BB in factors]
        add_products(ahead_BMSR.flatten(2), moves, error_KMSR.flatten(2), -1)
        runs.append((origin_MSR, error_KMSR, code_KMSR))
    best_MR = cost_MSR.argmin(1)
    state_M1R, found = best_MR.unsqueeze(1), []
    for origin_MSR, *parts in reversed(runs):
        found.append([part.gather(2, state_M1R.expand(len(part), -1, -1, -1)).squeeze(2) for part in parts])
        state_M1R = origin_MSR.gather(1, state_M1R)
    errors_BMR, codes_BMR = (torch.cat(parts) for parts in zip(*reversed(found), strict=True))
    return codes_BMR, errors_BMR, best_MR


def quantize_trellises(
    weights: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[StepSizes]
) -> list[QuantizedTensor]:
    """Finds codes whose points are near each weight_RC, all of one shape, in the metric of H, with factor_CC the upper
    U of H^-1 = U^T U.

    Columns are in their natural order. `scales` are steps of the coarse grid, halved here. Runs in fp32: it only
    compares survivors, and stores whole numbers.
    """
    halves = [one.scale_SG * 0.5 for one in scales]
    columns = [
        torch.ones_like(weights[0][0]).half() if one.column_scale_C is None else one.column_scale_C for one in scales
    ]
    steps = [half_S1.float() * column_C.float() for half_S1, column_C in zip(halves, columns, strict=True)]
    scale_CMR = torch.stack([step.expand_as(weight).T for step, weight in zip(steps, weights, strict=True)], 1)
    weight_CMR = torch.stack([weight_RC.float().T for weight_RC in weights], 1)
    factors = [factor_CC.float() for factor_CC in factors]
    codes, state_MR = [], torch.zeros_like(weight_CMR[0], dtype=torch.int64)
    for start in range(0, len(weight_CMR), TRELLIS_BLOCK):
        block, later = slice(start, start + TRELLIS_BLOCK), slice(start + TRELLIS_BLOCK, None)
        own = [factor_CC[block, block] for factor_CC in factors]
        codes_BMR, errors_BMR, state_MR = search_block(weight_CMR[block], own, scale_CMR[block], state_MR)
        add_products(weight_CMR[later], [factor_CC[block, later].T for factor_CC in factors], errors_BMR, -1)
        codes.append(codes_BMR.cpu())
    return [
        QuantizedTensor(code_RC, half_S1.cpu(), 8, column_C.cpu(), trellis=True)
        for code_RC, half_S1, column_C in zip(
            torch.cat(codes).permute(1, 2, 0).contiguous(), halves, columns, strict=True
        )
    ]


def quantize_trellis(weight_RC: Tensor, factor_CC: Tensor, scales: StepSizes) -> QuantizedTensor:
    """Returns quantize_trellises of a single matrix."""
    return quantize_trellises([weight_RC], [factor_CC], [scales])[0]
