"""Quantizers of sites against brute force, and their gradients against closed forms and autograd in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.config.site_quantizers import SiteQuantizer, parse_site
from golf.quant.grid import QuantizedTensor, dequantize_tensor, grid_values
from golf.quant.site_grid import site_grid, surrogate_slope, weight_codes
from golf.quant.site_operator import quantize_activation, quantize_weight, shared_gamma, site_value
from lab.rates.grids import QuantSpec, round_to_nearest

torch.set_num_threads(1)
WEIGHT_TEXTS = [
    "binary", "binary-row", "ternary", "ternary-row", "ternary-g5", "ternary-t0.7", "ternary-row-leastsq",
    "ternary-g5-leastsq-t0.7", "ternary-row-absmax", "int2", "int4-tensor", "int4-g5", "int8",
]  # fmt: skip
ACTIVATION_TEXTS = [
    "int8", "int4", "int2", "ternary", "ternary-leastsq", "binary", "unsigned8", "twosided8", "tanh-ternary",
    "sigmoid-binary", "unit-ternary", "tanh-int4",
]  # fmt: skip


def weights(seed: int = 0, rows: int = 6, columns: int = 13) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.3


# ---- values ----


@given(st.sampled_from(WEIGHT_TEXTS), st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 3e4]))
@settings(max_examples=120, deadline=None)
def test_what_trains_is_what_is_exported_bit_for_bit(text, seed, size):
    weight_RC, site = weights(seed) * size, parse_site(text, False)
    codes_RC, scale_SG = weight_codes(weight_RC, site)
    exported_RC = dequantize_tensor(QuantizedTensor(codes_RC, scale_SG, site.bits))
    trained_RC = quantize_weight(weight_RC, site)
    assert torch.equal(trained_RC.view(torch.int32), exported_RC.view(torch.int32))
    assert int(codes_RC.min()) >= site.low and int(codes_RC.max()) <= site.high
    assert not (site.is_binary and (codes_RC == 0).any())


@given(st.sampled_from(WEIGHT_TEXTS), st.integers(0, 10_000))
@settings(max_examples=120, deadline=None)
def test_codes_are_the_nearest_by_brute_force(text, seed):
    weight_RC, site = weights(seed), parse_site(text, False)
    grid = site_grid(weight_RC, site, False)
    step_RC = grid.spread(grid.step).expand_as(weight_RC).double()
    levels_L = torch.tensor([-1, 1] if site.is_binary else range(site.low, site.high + 1), dtype=torch.float64)
    distance_RCL = (weight_RC.double().unsqueeze(-1) - step_RC.unsqueeze(-1) * levels_L).abs()
    nearest_RC = distance_RCL.amin(-1)
    own_RC = (weight_RC.double() - step_RC * grid.codes_RC.double()).abs()
    assert (own_RC <= nearest_RC + 1e-9).all()


def test_ternary_is_the_published_rule():
    """gamma = mean |W|, code = clip(round(W / gamma), -1, 1): BitNet b1.58 (arXiv 2402.17764)."""
    weight_RC = weights(3, 64, 64)
    gamma = weight_RC.abs().mean().half().float()
    value_RC = quantize_weight(weight_RC, parse_site("ternary", False))
    assert torch.equal(value_RC, gamma * (weight_RC / gamma).round().clamp(-1, 1))
    zero_share = (value_RC == 0).float().mean().item()
    assert abs(zero_share - 0.311) < 0.03, "of Gaussian weights 31 % are zero"


def test_a_threshold_is_where_it_says_and_least_squares_fits():
    weight_RC, site = weights(4, 32, 32), parse_site("ternary-leastsq-t0.7", False)
    gamma = weight_RC.abs().mean()
    codes_RC, scale_SG = weight_codes(weight_RC, site)
    clear_RC = (weight_RC.abs() / gamma - 0.7).abs() > 1e-3
    assert torch.equal((codes_RC != 0)[clear_RC], (weight_RC.abs() > 0.7 * gamma)[clear_RC])
    best = (weight_RC * codes_RC).sum() / codes_RC.abs().sum()
    assert abs(scale_SG.item() - best.item()) < 1e-3 * best.item()
    errors = [((weight_RC - scale * codes_RC) ** 2).sum() for scale in (best * 0.97, best, best * 1.03)]
    assert errors[1] == min(errors)


@pytest.mark.parametrize("text", ["int8", "int4"])
def test_integers_by_row_are_the_grid_of_the_recipe(text):
    weight_RC = weights(5, 8, 40)
    assert torch.equal(quantize_weight(weight_RC, parse_site(text, False)), grid_values(weight_RC, int(text[-1])))


@pytest.mark.parametrize(
    "text, spec",
    [
        ("ternary", QuantSpec(2, "tensor", scale_rule="absmean")),
        ("binary-row", QuantSpec(1, "row", scale_rule="absmean")),
        ("int3-tensor", QuantSpec(3, "tensor")),
    ],
)
def test_rounding_after_training_has_the_same_grid(text, spec):
    weight_RC = weights(6, 12, 30)
    codes_RC, scale_SG = weight_codes(weight_RC, parse_site(text, False))
    other = round_to_nearest(weight_RC, spec)
    assert torch.equal(codes_RC, other.codes_RC) and torch.equal(scale_SG.expand_as(other.scale_SG), other.scale_SG)


def test_activations_have_a_step_for_each_token_and_head():
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[None, :, None]
    got_BTD = quantize_activation(x_BTD, parse_site("int8", True))
    for b in range(2):
        for t in range(5):
            step = x_BTD[b, t].abs().max() / 127
            assert torch.equal(got_BTD[b, t], (x_BTD[b, t] / step).round().clamp(-127, 127) * step)
    assert torch.equal(quantize_activation(x_BTD[:, 2:3], parse_site("int8", True)), got_BTD[:, 2:3]), (
        "no token sees another"
    )


def test_squashed_values_have_a_fixed_step():
    x = torch.tensor([[-3.0, -0.55, -0.54, 0.0, 0.54, 0.55, 3.0]])  # atanh(1/2) = 0.5493
    assert quantize_activation(x, parse_site("tanh-ternary", True)).tolist() == [[-1, -1, 0, 0, 0, 1, 1]]
    assert quantize_activation(x, parse_site("sigmoid-binary", True)).tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert quantize_activation(x, parse_site("unit-ternary", True)).tolist() == [[-1, -1, -1, 0, 1, 1, 1]]
    up, down = quantize_activation(torch.tensor([[2.54, 1.271, -0.127]]), parse_site("twosided8", True))[0, [1, 2]]
    assert abs(up - 1.28) < 1e-6 and abs(down + 0.127) < 1e-6
    y = torch.tensor([[0.0, 1.0, 2.55]])
    torch.testing.assert_close(quantize_activation(y, parse_site("unsigned8", True)), y)


@pytest.mark.parametrize("text", ACTIVATION_TEXTS)
def test_zeros_low_precision_and_empty_rows_are_no_trouble(text):
    site = parse_site(text, True)
    zeros = quantize_activation(torch.zeros(3, 8), site)
    assert zeros.isfinite().all() and zeros.abs().max() <= 1e-5
    assert quantize_activation(torch.ones(2, 3, 8, dtype=torch.bfloat16), site).dtype == torch.bfloat16
    x = torch.rand(1, 1, 4, 8, requires_grad=True)
    quantize_activation(x, site).sum().backward()
    assert x.grad.isfinite().all()


# ---- gradients ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ternary-ste", [1, 1, 1, 1, 1]),
        ("ternary-clipped", [1, 1, 1, 1, 0]),
        ("ternary-dge5", [0.2, 0.2 * 0.5**-0.8, 3, 0.2, 0]),
        ("ternary-dge3", [1 / 3, 0.5 ** (-2 / 3) / 3, 3, 1 / 3, 0]),
        ("ternary-dge8c9", [1 / 8, 0.5 ** (-7 / 8) / 8, 9, 1 / 8, 0]),
        ("ternary-fork", [0.2 * 0.5**-0.8, 0.2 * 0.25**-0.8, 3, 0.2 * 0.5**-0.8, 3]),
        ("binary-dge5", [3, 0.2 * 0.25**-0.8, 0.2 * 0.5**-0.8, 0.2, 0]),
    ],
)
def test_slopes_are_those_of_the_closed_forms(text, expected):
    """At u = 0, 1/4, 1/2, 1, 3/2, and mirrored."""
    u = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5])
    site = parse_site(text, False)
    torch.testing.assert_close(surrogate_slope(u, site), torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(surrogate_slope(-u, site), torch.tensor(expected, dtype=torch.float32))


def test_the_estimator_integrates_to_one_step_and_the_fork_does_not():
    """Uncut, dge is the derivative of a function that rises by one step between two codes; the fork's is 1.741 as
    steep (2^0.8, the factor 2 that it lacks), and cut at 3 its mean is 0.928."""
    u = ((torch.arange(2_000_000) + 0.5) / 2_000_000).double()
    uncut, dge5, fork = (parse_site(f"ternary-{gradient}", False) for gradient in ("dge2c1000000", "dge5", "fork"))
    assert abs(surrogate_slope(u, uncut).mean().item() - 1) < 2e-3
    assert abs((surrogate_slope(u, fork) / surrogate_slope(u, dge5))[400_000].item() - 2**0.8) < 1e-6
    assert abs(surrogate_slope(u, fork).mean().item() - 0.928) < 0.001


def exact_basis(x: torch.Tensor, site: SiteQuantizer, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(step, scale) at every element of `x`, what shares one being a block, in float64 and differentiable."""
    if site.scale == "unit":
        return (torch.full_like(x, 1 / site.high),) * 2
    if site.scale == "twosided":
        return (torch.where(x > 0, x.amax(1, True), -x.amin(1, True)) / site.high,) * 2
    if site.granularity == "tensor":
        x, codes, shape = x.reshape(1, -1), codes.reshape(1, -1), x.shape
    width = math.ceil(x.size(1) / math.ceil(x.size(1) / site.group_size)) if site.group_size else x.size(1)
    steps, scales = [], []
    for part, c in zip(x.split(width, 1), codes.split(width, 1), strict=True):
        largest, mean = part.abs().amax(1, True) / site.high, part.abs().mean(1, True)
        steps.append((largest if site.scale == "absmax" else mean * 2 * site.threshold).expand_as(part))
        fitted = (part * c).sum(1, True) / c.square().sum(1, True).clamp_min(1)
        scale = {"absmax": largest, "absmean": mean, "leastsq": fitted}[site.scale]
        scales.append(scale.expand_as(part))
    joined = [torch.cat(values, 1) for values in (steps, scales)]
    return tuple(value.reshape(shape) for value in joined) if site.granularity == "tensor" else tuple(joined)


def reference_value(x: torch.Tensor, text: str, activation: bool, gamma: torch.Tensor | None = None) -> torch.Tensor:
    """The quantizer in plain float64 operations, the rounding replaced by slope * u plus a constant: autograd of it
    is the gradient that the text promises. Steps and scales have the values that are stored."""
    site = parse_site(text, activation)
    grid = site_grid(x.detach().float(), site, activation, None if gamma is None else gamma.detach().float())
    codes = grid.codes_RC.double()
    step, scale = exact_basis(x, site, codes) if gamma is None else (gamma * 2 * site.threshold, gamma)
    if not site.attached:
        step, scale = step.detach(), scale.detach()
    step, scale = (
        value - value.detach() + grid.spread(stored).double()
        for value, stored in ((step, grid.step), (scale, grid.scale))
    )
    slope = surrogate_slope((x.float() / grid.spread(grid.step)).detach(), site).double()
    u = x / step
    return (slope * (u - u.detach()) + codes) * scale


GRADIENT_TEXTS = [
    (text + gradient + attached, activation)
    for texts, activation in ((WEIGHT_TEXTS, False), (ACTIVATION_TEXTS, True))
    for text in texts
    for gradient in ("-ste", "-clipped", "-dge5", "-fork")
    for attached in ("", "-attached")
    if not (gradient == "-fork" and text.startswith("binary"))
    and not (attached and text.split("-")[0] in ("tanh", "sigmoid", "unit"))
]


@pytest.mark.parametrize("text, activation", GRADIENT_TEXTS)
def test_gradients_are_those_of_autograd_through_the_surrogate(text, activation):
    x = weights(7, 5, 13).double()
    if text.startswith("unsigned"):
        x = x.abs()
    x.requires_grad_()
    g = weights(8, 5, 13).double()
    expected = torch.autograd.grad((reference_value(x, text, activation) * g).sum(), x)[0]
    y = x.detach().float().requires_grad_()
    (site_value(y, text, activation, None) * g.float()).sum().backward()
    torch.testing.assert_close(y.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_step_has_the_mean_of_all_its_matrices_and_a_gradient_to_each():
    site = parse_site("ternary-qkvo-fork-attached", False)
    first, second = weights(9, 4, 6).requires_grad_(), (3 * weights(10, 8, 6)).requires_grad_()
    gamma = shared_gamma((first, second))
    assert abs(gamma.item() - torch.cat((first, second)).abs().mean().item()) < 1e-4
    (quantize_weight(first, site, (first, second)) * weights(11, 4, 6)).sum().backward()
    assert second.grad.abs().min() > 0, "through the step alone"
    double = [part.detach().double().requires_grad_() for part in (first, second)]
    gamma = sum(part.abs().sum() for part in double) / 72
    (reference_value(double[0], site.text, False, gamma) * weights(11, 4, 6).double()).sum().backward()
    for part, reference in zip((first, second), double, strict=True):
        torch.testing.assert_close(part.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_tanh_multiplies_the_gradient():
    x = torch.tensor([[0.3, -1.2]], requires_grad=True)
    quantize_activation(x, parse_site("tanh-ternary-fork", True)).sum().backward()
    t = x.detach().tanh()
    expected = (0.2 * (t - t.floor() - 0.5).abs() ** -0.8).clamp_max(3) * (1 - t**2)
    torch.testing.assert_close(x.grad, expected)
