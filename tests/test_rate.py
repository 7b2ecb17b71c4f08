"""Rounding that minds the bits pays what it saves, at the price that it is told; and descent makes nothing worse."""

import math

import numpy as np
import pytest
import torch

from golf.quant.gptq import StepSizes
from golf.quant.grid import dequantize_tensor, same_stored
from golf.quant.rate import CodeCosts, cheapest_level, class_entropy, expected_classes, learn_costs
from lab.rates.grids import QuantSpec, parse_quantizer
from lab.rates.quantizers import GptqOptions, ordered_problem, quantize_matrix

torch.set_num_threads(1)


def problem(seed: int, rows: int = 64, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of unequal size, correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
    mix_CC = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs_NC = torch.randn(4 * columns, columns, generator=generator) @ mix_CC
    return weight_RC, (inputs_NC.T @ inputs_NC).double()


def error_and_entropy(weight_RC, entry, hessian_CC) -> tuple[float, float]:
    error_RC = (weight_RC - dequantize_tensor(entry)).double()
    return float(((error_RC @ hessian_CC) * error_RC).sum()), class_entropy(entry.codes_RC)


def rounded(weight_RC, hessian_CC, step: float, **options):
    scales = StepSizes(torch.tensor([[step]]).half())
    return quantize_matrix(weight_RC, QuantSpec(8), hessian_CC, GptqOptions(**options), scales)


def test_more_weight_on_the_rate_means_fewer_bits_and_more_error():
    points = []
    for rd_lambda in (0.0, 0.5, 1.0, 2.0):
        found = [error_and_entropy(w, rounded(w, h, 0.4, rd_lambda=rd_lambda), h) for w, h in map(problem, range(4))]
        points.append(np.mean(found, axis=0))
    errors, entropies = zip(*points, strict=True)
    assert all(np.diff(errors) > 0) and all(np.diff(entropies) < -0.005)


@pytest.mark.parametrize("step", [0.7, 1.4])
def test_it_beats_a_coarser_step(step):
    """At the entropy that it reaches, a coarser grid without it has the larger error."""
    for seed in range(3):
        weight_RC, hessian_CC = problem(seed, 128)
        error, bits = error_and_entropy(weight_RC, rounded(weight_RC, hessian_CC, step, rd_lambda=0.5), hessian_CC)
        coarser = [rounded(weight_RC, hessian_CC, step * f) for f in np.geomspace(0.98, 1.6, 9)]
        errors, entropies = zip(*(error_and_entropy(weight_RC, entry, hessian_CC) for entry in coarser), strict=True)
        assert min(entropies) < bits < max(entropies)
        assert error < np.exp(np.interp(-bits, -np.array(entropies), np.log(errors)))


def test_a_price_of_zero_changes_nothing():
    weight_RC, hessian_CC = problem(0)
    assert same_stored(rounded(weight_RC, hessian_CC, 0.5), rounded(weight_RC, hessian_CC, 0.5, rd_lambda=1e-12))


def test_a_given_slope_is_the_default_one_in_another_unit():
    """Weight 1 is the slope of a uniform quantizer: 2 ln 2 of D = mean(step^2 / U_jj^2) / 12."""
    weight_RC, hessian_CC = problem(1)
    factor_C = ordered_problem(weight_RC, hessian_CC, GptqOptions())[0].factor_CC.diagonal()
    slope = 2 * math.log(2) * 0.5**2 / 12 * float(factor_C.square().reciprocal().mean())
    default = rounded(weight_RC, hessian_CC, 0.5, rd_lambda=0.7)
    assert same_stored(default, rounded(weight_RC, hessian_CC, 0.5, rd_lambda=0.7, rate_slope=slope))
    heavy_R = torch.full((64,), 3.0)
    assert same_stored(default, rounded(weight_RC, hessian_CC, 0.5, rd_lambda=0.7, row_weight_R=heavy_R))
    options = {"rd_lambda": 0.7, "rate_slope": 3 * slope, "row_weight_R": heavy_R}
    assert same_stored(default, rounded(weight_RC, hessian_CC, 0.5, **options))


def test_heavy_rows_are_rounded_for_error_and_light_ones_for_bits():
    weight_RC, hessian_CC = problem(2)
    weight_R = torch.where(torch.arange(64) < 32, 100.0, 0.01)
    entry = rounded(weight_RC, hessian_CC, 1.0, rd_lambda=0.1, row_weight_R=weight_R)
    plain = rounded(weight_RC, hessian_CC, 1.0)
    zeros_R = (entry.codes_RC == 0).float().mean(1) - (plain.codes_RC == 0).float().mean(1)
    assert zeros_R[32:].mean() > 0.2 and zeros_R[:32].mean() < 0.05


@pytest.mark.parametrize("text", ["gptq3", "gptq2-absmean", "gptq4-zp", "gptq3-g32", "gptq8-g32-zp", "gptq1"])
def test_codes_stay_on_their_grid(text):
    spec = parse_quantizer(text)[1]
    weight_RC, hessian_CC = problem(3)
    entry = quantize_matrix(weight_RC, spec, hessian_CC, GptqOptions(rd_lambda=1.0, descent_passes=2))
    shift = 0 if spec.symmetric or spec.bits < 8 else 128
    low, high = (-(2 ** (spec.bits - 1)) + 1, 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
    if text == "gptq1":
        assert set(entry.codes_RC.unique().tolist()) == {-1, 1}
    else:
        assert entry.codes_RC.int().min() >= low - shift and entry.codes_RC.int().max() <= high - shift
    assert dequantize_tensor(entry).isfinite().all()


def test_the_cheapest_level_is_the_cheapest():
    """Against every level from low to high, for costs that rise with the magnitude."""
    generator = torch.Generator().manual_seed(0)
    bits_M = torch.tensor([0.5, 2.0, 3.5, 5.0, 7.0, 9.0])
    costs = CodeCosts(bits_M, 6, torch.zeros(1, 400, dtype=torch.int64))
    ratio_1R, price_1R = torch.randn(1, 400, generator=generator) * 3, torch.rand(1, 400, generator=generator) * 0.3
    levels_N1 = torch.arange(-4.0, 6.0)[:, None]
    cost_NR = (ratio_1R - levels_N1).square() + price_1R * bits_M[levels_N1.abs().long()]
    best_1R = levels_N1[cost_NR.argmin(0)].T
    assert torch.equal(cheapest_level(ratio_1R, -4, 5, costs, 0, price_1R), best_1R)
    tie = cheapest_level(
        torch.tensor([[0.5, -0.5]]), -4, 5, CodeCosts(torch.zeros(6), 6, costs.offset_CR[:, :2]), 0, torch.ones(1, 2)
    )
    assert tie.abs().tolist() == [[0.0, 0.0]]


def test_costs_are_those_of_the_distribution():
    level_RC = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 4, 300)
    level_RC = level_RC.round()
    costs = learn_costs(level_RC, 127)
    spent = sum(float(costs.of(c, level_RC[:, c].abs()[None]).double().sum()) for c in range(300))
    assert abs(spent / level_RC.numel() / class_entropy(level_RC) - 1) < 0.01
    counts = torch.bincount(level_RC.flatten().long() + 128).double()
    share = counts[counts > 0] / level_RC.numel()
    assert class_entropy(level_RC) < 0.95 * float(-(share * share.log2()).sum())  # classes know more than none
    assert costs.bits_F.isfinite().all() and (costs.bits_F > 0).all()
    sizes = torch.bincount(expected_classes(level_RC).flatten()).double()
    assert len(sizes) == 16 and sizes.max() < 1.1 * sizes.min()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_costs_of_constant_levels_are_finite(level):
    costs = learn_costs(torch.full((4, 5), level), 127)
    assert costs.bits_F.isfinite().all() and class_entropy(torch.full((4, 5), level)) == 0


@pytest.mark.parametrize("text", ["gptq4", "gptq3-zp", "gptq2-absmean", "gptq4-g32", "gptq1"])
@pytest.mark.parametrize("act_order", [False, True])
def test_descent_lowers_the_error(text, act_order):
    spec = parse_quantizer(text)[1]
    for seed in range(4):
        weight_RC, hessian_CC = problem(seed)
        damped_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(96).double()
        errors = [
            error_and_entropy(
                weight_RC,
                quantize_matrix(weight_RC, spec, hessian_CC, GptqOptions(descent_passes=passes, act_order=act_order)),
                damped_CC,
            )[0]
            for passes in (0, 1, 3)
        ]
        assert errors[1] < errors[0] and errors[2] <= errors[1]


def test_descent_ends_where_no_single_code_can_do_better():
    weight_RC, hessian_CC = problem(5, 8, 24)
    entry = quantize_matrix(weight_RC, QuantSpec(4), hessian_CC, GptqOptions(descent_passes=50, damping=1e-9))
    least, _ = error_and_entropy(weight_RC, entry, hessian_CC)
    for place in np.ndindex(8, 24):
        for move in (-1, 1):
            if abs(int(entry.codes_RC[place]) + move) <= 7:
                entry.codes_RC[place] += move
                assert error_and_entropy(weight_RC, entry, hessian_CC)[0] >= least * (1 - 1e-6)
                entry.codes_RC[place] -= move


@pytest.mark.parametrize("rd_lambda", [0.0, 1.0])
def test_block_size_has_no_effect_on_descent(rd_lambda):
    weight_RC, hessian_CC = problem(6, 16, 50)
    entries = [
        quantize_matrix(
            weight_RC, QuantSpec(4), hessian_CC, GptqOptions(block=block, rd_lambda=rd_lambda, descent_passes=2)
        )
        for block in (1, 16, 128)
    ]
    assert all(same_stored(entries[0], entry) for entry in entries[1:])
