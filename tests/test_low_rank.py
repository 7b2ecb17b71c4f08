"""The correction lowers the error that it is meant for, the same way every time, and is what is stored."""

import dataclasses

import pytest
import torch

from golf.quant.grid import dequantize_tensor, same_stored
from golf.quant.tensor_classes import QuantError
from lab.rates.corrections import LowRankOptions, correct_worst, leading_directions, weighted_error, with_low_rank
from lab.rates.grids import QuantSpec
from lab.rates.quantizers import quantize_matrix

torch.set_num_threads(1)
FINE = LowRankOptions(3, QuantSpec(8), QuantSpec(8))


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def second_moments(columns: int, seed: int) -> torch.Tensor:
    inputs_NC = matrix(4 * columns, columns, seed).double() @ matrix(columns, columns, seed + 1).double()
    inputs_NC[:, : columns // 4] *= 8
    return inputs_NC.T @ inputs_NC


def planted(rank: int, rows: int = 40, columns: int = 56):
    """Weights whose rounding error is exactly of low rank."""
    entry = quantize_matrix(matrix(rows, columns, 0), QuantSpec(4))
    extra_RC = matrix(rows, rank, 1) @ matrix(rank, columns, 2)
    return dequantize_tensor(entry) + extra_RC, entry


def test_an_error_of_low_rank_is_taken_away():
    weight_RC, entry = planted(3)
    corrected = with_low_rank(weight_RC, entry, options=FINE)
    assert weighted_error(weight_RC, corrected) < 1e-3 * weighted_error(weight_RC, entry)
    left, right = corrected.low_rank
    assert left.codes_RC.shape == (40, 3) and right.codes_RC.shape == (3, 56)
    assert torch.equal(corrected.codes_RC, entry.codes_RC) and entry.low_rank is None


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_fields_factors_lower_the_error(seed, hessian):
    """Two and four bits, rank 4: below the error without, and not below what four exact factors leave."""
    weight_RC = matrix(48, 96, 10 * seed)
    hessian_CC = second_moments(96, 10 * seed + 3) if hessian else torch.eye(96)
    entry = quantize_matrix(weight_RC, QuantSpec(3), hessian_CC)
    corrected = with_low_rank(weight_RC, entry, hessian_CC)
    root_CC = torch.linalg.cholesky(hessian_CC.double())
    values_K = torch.linalg.svdvals((weight_RC - dequantize_tensor(entry)).double() @ root_CC).square()
    before, after = (weighted_error(weight_RC, e, hessian_CC) for e in (entry, corrected))
    assert float(values_K[4:].sum()) <= after < before
    assert before - after > 0.3 * float(values_K[:4].sum())
    assert [part.bits for part in corrected.low_rank] == [2, 4]


def test_the_metric_of_the_inputs_is_what_counts():
    weight_RC, hessian_CC = matrix(48, 96, 5), second_moments(96, 6)
    entry = quantize_matrix(weight_RC, QuantSpec(3))
    with_metric, without = (
        with_low_rank(weight_RC, entry, hessian_CC, FINE),
        with_low_rank(weight_RC, entry, None, FINE),
    )
    assert weighted_error(weight_RC, with_metric, hessian_CC) < 0.9 * weighted_error(weight_RC, without, hessian_CC)
    assert weighted_error(weight_RC, without) < weighted_error(weight_RC, with_metric)


def test_signs_are_fixed():
    error_RC = matrix(20, 30, 7).double()
    left_RK = leading_directions(error_RC, 4)
    assert torch.equal(leading_directions(error_RC.flip(1), 4).sign(), left_RK.sign())
    assert (left_RK.gather(0, left_RK.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(left_RK.T @ left_RK, torch.eye(4).double())
    weight_RC, entry = planted(3)
    assert same_stored(with_low_rank(weight_RC, entry), with_low_rank(weight_RC, entry))


def test_the_worst_tensors_are_corrected():
    weights = {f"t{i}": matrix(40, 56, i) * (1 + i % 3) for i in range(5)}
    entries = {name: quantize_matrix(weight, QuantSpec(3)) for name, weight in weights.items()}
    entries["small"], weights["small"] = quantize_matrix(matrix(2, 40, 9), QuantSpec(2)), matrix(2, 40, 9)
    corrected = correct_worst(weights, entries, {}, 1)
    assert [name for name, entry in corrected.items() if entry.low_rank] == ["t2"]
    assert list(corrected) == list(entries)
    hessians = {name: torch.eye(56) for name in weights if name != "small"} | {"t1": 1e6 * torch.eye(56)}
    corrected = correct_worst(weights, entries, hessians, 2)
    assert {name for name, entry in corrected.items() if entry.low_rank} == {"t1", "t2"}
    assert all(same_stored(dataclasses.replace(corrected[name], low_rank=None), entries[name]) for name in entries)


def test_nothing_to_correct_is_left_alone():
    entry = quantize_matrix(matrix(40, 56, 0), QuantSpec(4))
    corrected = correct_worst({"t": dequantize_tensor(entry)}, {"t": entry}, {}, 1)
    assert corrected["t"] is entry


def test_what_cannot_be_corrected_is_refused():
    weight_RC, entry = planted(3)
    with pytest.raises(QuantError, match="rank 1 to 40"):
        with_low_rank(weight_RC, entry, options=LowRankOptions(41))
    with pytest.raises(QuantError, match="NaN"):
        with_low_rank(weight_RC * float("nan"), entry)
    with pytest.raises(QuantError, match="Hessian"):
        with_low_rank(weight_RC, entry, torch.eye(5))
