"""The trellis grid: the halves against the walk, the search against brute force, and what it wins."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.quant.gptq import StepSizes, factor_and_damped
from golf.quant.grid import QuantizedTensor, dequantize_tensor, same_stored
from golf.quant.trellis import TRELLIS_STATES, trellis_halves
from golf.quant.trellis_search import HALF_CODES, TRELLIS_BLOCK, quantize_trellis, trellis_steps


def walked_halves(codes_RC):
    next_SZ, _ = trellis_steps(codes_RC.device)
    state_R, halves = torch.zeros(len(codes_RC), dtype=torch.int64), []
    for parity_R in (codes_RC & 1).long().T:
        halves.append(state_R & 1)
        state_R = next_SZ[state_R, parity_R]
    return torch.stack(halves, 1)


def entropy(codes_N):
    share_K = codes_N.unique(return_counts=True)[1].double() / codes_N.numel()
    return -(share_K * share_K.log2()).sum().item()


def correlated(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix_CC = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x_NC = torch.randn(4 * columns, columns, generator=generator) @ mix_CC
    return torch.randn(rows, columns, generator=generator), (x_NC.T @ x_NC / len(x_NC)).double()


def steps(rows, columns, step):
    return StepSizes(torch.full((rows, 1), step).half(), torch.ones(columns).half())


@given(st.integers(1, 70), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_halves_follow_the_walk(columns, seed):
    codes_RC = torch.randint(-126, 126, (3, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(trellis_halves(codes_RC).long(), walked_halves(codes_RC))


def test_every_state_is_reached_from_two():
    next_SZ, from_SA = trellis_steps(torch.device("cpu"))
    assert next_SZ.flatten().bincount(minlength=TRELLIS_STATES).eq(2).all()
    assert torch.equal(next_SZ.flatten()[from_SA], torch.arange(TRELLIS_STATES)[:, None].expand(-1, 2))


def test_search_finds_the_best_walk_when_columns_are_independent():
    weight_RC = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    entry = quantize_trellis(weight_RC, torch.eye(7), steps(5, 7, 0.75))
    found_R = (dequantize_tensor(entry) - weight_RC).square().sum(1)
    best_R, scale = torch.full((5,), torch.inf), 0.375
    for parities in itertools.product((0, 1), repeat=7):
        parity_1C = torch.tensor([parities], dtype=torch.int8)
        first_C = 2 * parity_1C + walked_halves(parity_1C)
        nearest_RC = first_C + 4 * ((weight_RC / scale - first_C) / 4).round()
        best_R = torch.minimum(best_R, (nearest_RC * scale - weight_RC).square().sum(1))
    torch.testing.assert_close(found_R, best_R)


def test_error_feedback_lowers_the_error_of_the_outputs():
    weight_RC, hessian_CC = correlated(40, TRELLIS_BLOCK + 30)
    hessian_CC[0] *= 9
    hessian_CC[:, 0] *= 9  # one strong input, far from the mean
    errors = []
    for factor_CC in (factor_and_damped(hessian_CC, 0.01)[0], torch.eye(len(hessian_CC))):
        entry = quantize_trellis(weight_RC, factor_CC, steps(40, len(hessian_CC), 0.8))
        error_RC = (dequantize_tensor(entry) - weight_RC).double()
        errors.append(((error_RC @ hessian_CC) * error_RC).sum().item())
    assert errors[0] < 0.9 * errors[1]


def test_codes_stay_in_range_and_rows_of_zeros_stay_zero():
    weight_RC = torch.tensor([[1e3, -1e3, 5.0], [0.0, 0.0, 0.0]])
    entry = quantize_trellis(weight_RC, torch.eye(3), steps(2, 3, 0.02))
    assert entry.codes_RC.min() >= -2 * HALF_CODES and entry.codes_RC.max() <= 2 * HALF_CODES - 1
    assert (dequantize_tensor(entry)[1] == 0).all()


def test_wins_a_seventh_of_a_bit_over_rounding():
    weight_RC, _ = correlated(300, 256)
    rounded_RC = (weight_RC / 0.4).round()
    gap = entropy(rounded_RC) + 0.5 * math.log2((rounded_RC * 0.4 - weight_RC).square().mean())
    entry = quantize_trellis(weight_RC, torch.eye(256), steps(300, 256, 0.4))
    error = (dequantize_tensor(entry) - weight_RC).square().mean()
    assert 1 / 7 < gap - entropy(entry.codes_RC) - 0.5 * math.log2(error) < 0.254  # the bound is 1/2 log2(2 pi e / 12)


def test_same_codes_from_the_same_input_and_the_flag_counts():
    weight_RC, hessian_CC = correlated(8, 140)
    factor_CC, _ = factor_and_damped(hessian_CC, 0.01)
    first, second = (quantize_trellis(weight_RC, factor_CC, steps(8, 140, 0.4)) for _ in range(2))
    assert same_stored(first, second)
    plain = QuantizedTensor(first.codes_RC, first.scale_SG, first.bits, first.column_scale_C)
    assert not same_stored(first, plain) and not torch.equal(dequantize_tensor(first), dequantize_tensor(plain))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_narrow_matrices(columns):
    weight_RC = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    entry = quantize_trellis(weight_RC, torch.eye(columns), steps(4, columns, 0.1))
    assert (dequantize_tensor(entry) - weight_RC).abs().max() <= 0.15
