"""Step sizes by water level: the log grid, the level's law, the price of a bit, the choice of a trellis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.quant.calibration import LayerStatistics
from golf.quant.gptq import StepSizes
from golf.quant.grid import FP16_MAX, FP16_TINY, dequantize_tensor, same_stored
from golf.quant.rate import class_entropy
from golf.quant.tensor_classes import QuantError
from golf.quant.waterfill import STEPS_PER_OCTAVE, nearest_on_log_grid, prepare_matrix, quantize_plain


def problem(rows=48, columns=40, seed=0, spread=1.5):
    """Correlated inputs whose columns differ in size, and rows that differ in what they are worth."""
    generator = torch.Generator().manual_seed(seed)
    size_C = torch.exp(spread * torch.randn(columns, generator=generator))
    mix_CC = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x_NC = torch.randn(8 * columns, columns, generator=generator) @ mix_CC * size_C
    row_weight_R = torch.exp(spread * torch.randn(rows, generator=generator)).double() * 1e-3
    weight_RC = torch.randn(rows, columns, generator=generator)
    return weight_RC, LayerStatistics((x_NC.T @ x_NC / len(x_NC)).double(), row_weight_R)


@given(st.floats(FP16_TINY, FP16_MAX / 2))
@settings(max_examples=300)
def test_log_grid_is_near_in_ratio_and_has_few_mantissas(scale):
    value = nearest_on_log_grid(torch.tensor([scale], dtype=torch.float64))
    assert value.dtype == torch.float16
    assert abs(math.log2(value.item() / scale)) <= 0.5 / STEPS_PER_OCTAVE + 1e-3
    again = nearest_on_log_grid(value)
    assert torch.equal(again, value)
    fraction = math.frexp(value.item())[0] * 2048
    assert fraction == int(fraction)


def test_log_grid_has_sixteen_values_an_octave():
    values = nearest_on_log_grid(torch.logspace(0, 3, 4000, base=2, dtype=torch.float64)[:-1])
    assert len(values.unique()) == 3 * STEPS_PER_OCTAVE + 1


def test_every_code_costs_the_same_at_a_level():
    weight_RC, statistics = problem(spread=0.5)
    matrix = prepare_matrix(weight_RC, statistics)
    level = 1e-5
    scales = matrix.step_sizes(level)
    step_RC = scales.scale_SG.double() * scales.column_scale_C.double()
    diagonal_C = matrix.problem.factor_CC.diagonal()
    cost_RC = matrix.row_weight_R[:, None] * (step_RC / diagonal_C) ** 2
    bound_R = step_RC.amin(1) * 0.9 * 127 / weight_RC.abs().amax(1) > 1.2  # rows that int8 does not bind
    assert bound_R.any()
    assert (cost_RC[bound_R] / level).log2().abs().max() <= 2 * 2 * (0.5 / STEPS_PER_OCTAVE + 1e-3)


def test_codes_stay_within_int8_however_fine_the_level():
    weight_RC, statistics = problem()
    matrix = prepare_matrix(weight_RC, statistics)
    entry = matrix.quantize(1e-30, trellis=False)
    assert entry.codes_RC.abs().max() <= 127
    assert matrix.loss_added(dequantize_tensor(entry)) < 2e-4 * matrix.loss_added(torch.zeros_like(weight_RC))


def test_a_coarser_level_takes_fewer_bits_and_more_loss():
    weight_RC, statistics = problem()
    matrix = prepare_matrix(weight_RC, statistics)
    entries = [matrix.quantize(level, trellis=False) for level in (1e-5, 1e-4, 1e-3)]
    bits = [class_entropy(entry.codes_RC.float()) for entry in entries]
    losses = [matrix.loss_added(dequantize_tensor(entry)) for entry in entries]
    assert bits[0] > bits[1] > bits[2] and losses[0] < losses[1] < losses[2]


def uniform_steps(matrix, weight_RC, level):
    """One step for all codes, of the mean cost that `level` has."""
    scales = matrix.step_sizes(level)
    step_RC = scales.scale_SG.double() * scales.column_scale_C.double()
    flat = step_RC.log().mean().exp()
    return StepSizes(nearest_on_log_grid(flat.expand(len(weight_RC), 1)), torch.ones(weight_RC.size(1)).half())


def test_the_level_beats_one_step_for_all_at_the_same_bits():
    weight_RC, statistics = problem(rows=128, columns=64)
    matrix = prepare_matrix(weight_RC, statistics)
    for level in (1e-5, 1e-4):
        steps = [matrix.step_sizes(level)], [uniform_steps(matrix, weight_RC, level)]
        (by_level,), (flat,) = (quantize_plain([matrix], scales, level, 0.0) for scales in steps)
        bits = [class_entropy(entry.codes_RC.float()) for entry in (by_level, flat)]
        losses = [matrix.loss_added(dequantize_tensor(entry)) for entry in (by_level, flat)]
        assert 0.5 * math.log2(losses[1] / losses[0]) + bits[1] - bits[0] > 0.3  # bits a weight


def test_a_trellis_is_taken_where_it_costs_less():
    weight_RC, statistics = problem(rows=128, columns=64, spread=0.3)
    matrix = prepare_matrix(weight_RC, statistics)
    plain, best = (matrix.quantize(1e-5, trellis=trellis) for trellis in (False, True))
    assert best.trellis and matrix.cost(best, 1e-5) < matrix.cost(plain, 1e-5)
    coarse = matrix.quantize(1.0)
    assert not coarse.trellis and matrix.cost(coarse, 1.0) <= matrix.cost(matrix.quantize(1.0, trellis=False), 1.0)


def test_not_nearest_counts_what_feedback_moved():
    weight_RC, statistics = problem()
    matrix = prepare_matrix(weight_RC, statistics)
    assert matrix.codes_not_nearest(matrix.quantize(1e-5, trellis=False)) > 0
    still = prepare_matrix(weight_RC, LayerStatistics(torch.eye(40).double(), statistics.row_weight_R))
    assert still.codes_not_nearest(still.quantize(1e-5, rd_lambda=0.0, trellis=False)) == 0


def test_rows_that_calibration_never_saw_act_have_steps():
    weight_RC, statistics = problem()
    statistics.row_weight_R[3] = 0.0
    entry = prepare_matrix(weight_RC, statistics).quantize(1e-5)
    assert entry.scale_SG.isfinite().all() and (entry.scale_SG > 0).all()
    empty = LayerStatistics(torch.zeros(40, 40).double(), torch.zeros(48).double())
    assert dequantize_tensor(prepare_matrix(weight_RC, empty).quantize(1e-5)).isfinite().all()


def test_deterministic_and_bad_input_named():
    weight_RC, statistics = problem()
    first, second = (prepare_matrix(weight_RC, statistics).quantize(1e-4) for _ in range(2))
    assert same_stored(first, second)
    with pytest.raises(QuantError, match="NaN"):
        prepare_matrix(weight_RC, LayerStatistics(statistics.hessian_CC * float("nan"), statistics.row_weight_R))
    with pytest.raises(QuantError, match="40 columns"):
        prepare_matrix(weight_RC, LayerStatistics(torch.eye(3).double(), statistics.row_weight_R))
