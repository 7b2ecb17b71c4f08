"""Computes the quantizers of golf/config/site_quantizers.py: codes, scales, and the gradients that replace rounding's.

    step from the values' size (by tensor, row, group), code = clamp(round(x / step), low, high), value = code * scale

The scale is the step, except for `leastsq` (the scale that fits the codes best) and thresholds other than 1/2. Scales
of weights are fp16, so that training uses what is exported, bit for bit; those of activations are fp32.

R rows, C columns, S rows of scales (R or 1), G groups of columns, P positions (with heads).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf.config.site_quantizers import SiteQuantizer, parse_site
from golf.quant.grid import FP16_MAX, FP16_TINY, group_width, spread_groups
from golf.quant.site_kernel import in_one_kernel, site_rows

SMALLEST_STEP = 1e-5
"""Floor of an activation's step, as in BitNet (arXiv 2310.11453)."""

OUTER_EDGE = 1 + 2.0**-10
"""Tolerance at the outer codes: an absmax grid's largest value is at its outer code but for the step's rounding to
fp16."""


@dataclass(frozen=True)
class SiteGrid:
    """Holds the grid of one tensor at one moment."""

    codes_RC: Tensor
    step: Tensor
    """Shape SG, or RC where each sign has its own step."""
    scale: Tensor
    """Shape SG, or RC where each sign has its own scale."""

    def spread(self, values: Tensor) -> Tensor:
        """Returns values shaped like steps at every element (or broadcastable to it)."""
        return values if values.shape == self.codes_RC.shape else spread_groups(values, self.codes_RC.size(1))


def over_blocks(function: Callable[[Tensor], Tensor], x_RC: Tensor, site: SiteQuantizer) -> Tensor:
    """Applies `function` (over the last axis) to each set of values that shares a step; returns SG."""
    if site.granularity in ("tensor", "qkvo"):
        return function(x_RC.reshape(1, -1)).view(1, 1)
    if site.granularity == "row":
        return function(x_RC).unsqueeze(1)
    width = group_width(x_RC.size(1), -(-x_RC.size(1) // site.group_size))
    return torch.stack([function(part) for part in x_RC.split(width, dim=1)], dim=1)


def block_sums(x_RC: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns SG; sums are float64 ones, so that their order changes nothing (but once in many millions of times)."""
    return over_blocks(lambda part: part.sum(-1, dtype=torch.float64).float(), x_RC, site)


def step_basis(x_RC: Tensor, site: SiteQuantizer, gamma: Tensor | None) -> Tensor:
    """Returns SG, the mean or largest magnitude that steps derive from; `gamma` is one that several matrices share."""
    if gamma is not None:
        return gamma.view(1, 1)
    if site.scale == "absmax":
        return over_blocks(lambda part: part.abs().amax(-1), x_RC, site)
    return over_blocks(lambda part: part.abs().mean(-1, dtype=torch.float64).float(), x_RC, site)


def storable_scale(scale: Tensor, activation: bool) -> Tensor:
    return scale.clamp_min(SMALLEST_STEP) if activation else scale.clamp(FP16_TINY, FP16_MAX).half().float()


def two_sided_step(x_RC: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns steps RC: positive values scaled by the largest, negative by the smallest (the published study's 8
    bits)."""
    up_R1, down_R1 = x_RC.amax(1, keepdim=True), -x_RC.amin(1, keepdim=True)
    return torch.where(x_RC > 0, up_R1, down_R1).div(site.high).clamp_min(SMALLEST_STEP)


def site_grid(x_RC: Tensor, site: SiteQuantizer, activation: bool, gamma: Tensor | None = None) -> SiteGrid:
    """Returns codes, steps and scales of fp32 values."""
    if site.scale == "unit":
        step = x_RC.new_full((1, 1), 1 / site.high)
    elif site.scale == "twosided":
        step = two_sided_step(x_RC, site)
    elif site.scale == "absmax":
        largest_SG = step_basis(x_RC, site, gamma)
        # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
        step = storable_scale(largest_SG / torch.full_like(largest_SG, site.high), activation)
    else:
        gamma_SG = storable_scale(step_basis(x_RC, site, gamma), activation)
        step = gamma_SG * (2 * site.threshold)
    grid = SiteGrid(round_to_levels(x_RC, site, step), step, step)
    if site.scale == "absmean":
        return SiteGrid(grid.codes_RC, step, gamma_SG)
    if site.scale != "leastsq":
        return grid
    fitted_SG = block_sums(x_RC * grid.codes_RC, site) / block_sums(grid.codes_RC.square(), site).clamp_min(1)
    return SiteGrid(grid.codes_RC, step, storable_scale(fitted_SG, activation))


def round_to_levels(x_RC: Tensor, site: SiteQuantizer, step: Tensor) -> Tensor:
    """Returns whole numbers low..high, as fp32, without -0."""
    if site.is_binary:
        return torch.where(x_RC < 0, -1.0, 1.0)
    step = step if step.shape == x_RC.shape else spread_groups(step, x_RC.size(1))
    return (x_RC / step).round_().clamp_(site.low, site.high).add_(0.0)


def surrogate_slope(u: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns the surrogate for the derivative of the code by u = x / step.

    ste: 1 (Bengio et al. 2013, arXiv 1308.3432); clipped: 1 between the outer codes, else 0 (Hubara et al. 2016, arXiv
    1602.02830); dge: |2 t / d - 1|^(1/k - 1) / k at distance t from the code below, d between codes, cut off at
    largest_slope and 0 beyond the outer codes (Wang et al. 2025, arXiv 2501.17116); fork: min(3, |t - 1/2|^-0.8 / 5)
    everywhere, as the published ternary study trained.
    """
    if site.gradient == "ste":
        return torch.ones_like(u)
    inside = (u >= site.low * OUTER_EDGE) & (u <= site.high * OUTER_EDGE)
    if site.gradient == "clipped":
        return inside.to(u.dtype)
    if site.gradient == "fork":
        return (0.2 * (u - u.floor() - 0.5).abs().pow(-0.8)).clamp_max(3.0)
    between = (u - site.low) / site.step_of_levels
    offset = (2 * (between - between.floor()) - 1).abs()
    slope = offset.pow(1 / site.power - 1).div(site.power).clamp_max(site.largest_slope)
    return torch.where(inside, slope, 0.0)


SITE_CALLS = {False: 0, True: 0}
"""Calls of the operator in this process, for weights (False) and activations (True)."""


def weight_calls() -> int:
    """Returns the calls for weights so far."""
    return SITE_CALLS[False]


def activation_calls() -> int:
    """Returns the calls for activations so far; a compiled graph calls the operator too, so they show what it really
    does."""
    return SITE_CALLS[True]


# Custom operators, which torch.compile calls but does not rewrite: inductor keeps the fp16 rounding of a scale in fp32
# and approximates the division, and then nearly every value differs from the exported one.
@torch.library.custom_op("golf::site_value", mutates_args=())
def site_value(x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None) -> Tensor:
    """Returns values on the grid in the dtype of x_RC, with the gradient that `text` names."""
    SITE_CALLS[activation] += 1
    site = parse_site(text, activation)
    if in_one_kernel(x_RC, site, backward=False):
        basis = None if site.granularity == "row" else step_basis(x_RC, site, gamma)
        return site_rows(x_RC, site, activation, basis)
    grid = site_grid(x_RC.float(), site, activation, gamma)
    return (grid.codes_RC * grid.spread(grid.scale)).to(x_RC.dtype)


@site_value.register_fake
def site_value_shape(x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None) -> Tensor:
    return torch.empty_like(x_RC, memory_format=torch.contiguous_format)


@torch.library.custom_op("golf::site_gradient", mutates_args=())
def site_gradient(
    g_RC: Tensor, x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `site_value` by x_RC and by gamma (0 where the operator has no gamma)."""
    site, dtype = parse_site(text, activation), x_RC.dtype
    dgamma = x_RC.new_zeros((), dtype=torch.float32)
    if in_one_kernel(x_RC, site, backward=True):
        return site_rows(x_RC, site, activation, None, g_RC), dgamma
    x_RC, g_RC = x_RC.float(), g_RC.float()
    grid = site_grid(x_RC, site, activation, gamma)
    step, scale = grid.spread(grid.step), grid.spread(grid.scale)
    u = x_RC / step
    by_codes_RC = g_RC * scale * surrogate_slope(u, site)
    dx_RC = by_codes_RC / step
    if site.attached:
        through, dgamma = gradient_through_step(g_RC * grid.codes_RC, -by_codes_RC * u / step, x_RC, grid, site, gamma)
        dx_RC = dx_RC + through
    return dx_RC.to(dtype), dgamma


@site_gradient.register_fake
def site_gradient_shape(
    g_RC: Tensor, x_RC: Tensor, text: str, activation: bool, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RC, memory_format=torch.contiguous_format), x_RC.new_empty((), dtype=torch.float32)


def gradient_through_step(
    by_scale_RC: Tensor, by_step_RC: Tensor, x_RC: Tensor, grid: SiteGrid, site: SiteQuantizer, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x_RC and a shared gamma through step and scale, from those of each element's scale and
    step."""
    none = by_scale_RC.new_zeros(())
    if site.scale == "twosided":
        by_both_RC, largest = (by_scale_RC + by_step_RC) / site.high, x_RC.amax(1, keepdim=True)
        smallest, up = x_RC.amin(1, keepdim=True), x_RC > 0
        rise_R1 = (by_both_RC * up * (largest > site.high * SMALLEST_STEP)).sum(1, keepdim=True)
        fall_R1 = (by_both_RC * ~up * (-smallest > site.high * SMALLEST_STEP)).sum(1, keepdim=True)
        return share_out(rise_R1, x_RC == largest, site) - share_out(fall_R1, x_RC == smallest, site), none
    if site.scale == "absmax":
        magnitude_RC, largest_SG = x_RC.abs(), step_basis(x_RC, site, None)
        at_largest = magnitude_RC == grid.spread(largest_SG)
        gradient_SG = block_sums(by_scale_RC + by_step_RC, site) / site.high
        return share_out(gradient_SG, at_largest, site) * x_RC.sign(), none
    if site.scale == "leastsq":
        squares_SG = block_sums(grid.codes_RC.square(), site).clamp_min(1)
        through_RC = grid.spread(block_sums(by_scale_RC, site) / squares_SG) * grid.codes_RC
        by_scale_RC = torch.zeros_like(by_scale_RC)
    else:
        through_RC = torch.zeros_like(x_RC)
    gradient_SG = block_sums(by_scale_RC + 2 * site.threshold * by_step_RC, site)
    if gamma is not None:
        return through_RC, gradient_SG.sum()
    share_SG = gradient_SG / block_sums(torch.ones_like(x_RC), site)
    return through_RC + grid.spread(share_SG) * x_RC.sign(), none


def share_out(gradient_SG: Tensor, chosen_RC: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns RC, the gradient of a maximum divided equally among the elements that reach it."""
    count_SG = block_sums(chosen_RC.float(), site).clamp_min(1)
    return spread_groups(gradient_SG / count_SG, chosen_RC.size(1)) * chosen_RC


def keep_site_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_RC, ctx.text, ctx.activation, gamma = inputs
    ctx.save_for_backward(x_RC, gamma)


def site_backward(ctx: Any, g_RC: Tensor) -> tuple[Tensor | None, ...]:
    x_RC, gamma = ctx.saved_tensors
    if is_plain(parse_site(ctx.text, ctx.activation)):
        return g_RC.to(x_RC.dtype), None, None, None
    dx_RC, dgamma = site_gradient(g_RC.contiguous(), x_RC, ctx.text, ctx.activation, gamma)
    return dx_RC, None, None, None if gamma is None else dgamma.view_as(gamma)


def is_plain(site: SiteQuantizer) -> bool:
    """Returns whether the gradient is the identity: straight through, with step and scale equal, and detached."""
    return site.gradient == "ste" and not site.attached and site.scale != "leastsq" and site.threshold == 0.5


site_value.register_autograd(site_backward, setup_context=keep_site_inputs)


def quantize_activation(x: Tensor, site: SiteQuantizer) -> Tensor:
    """Returns `x` on the grid of each token (or a token's head: the last axis), in its own dtype."""
    squashed = torch.tanh(x) if site.squash == "tanh" else torch.sigmoid(x) if site.squash == "sigmoid" else x
    return site_value(squashed.reshape(-1, x.size(-1)), site.text, True, None).view(x.shape)


def quantize_weight(weight_RC: Tensor, site: SiteQuantizer, shared: tuple[Tensor, ...] = ()) -> Tensor:
    """Returns fp32 weights on the grid that export keeps; `shared` holds all the matrices that share a step."""
    return site_value(weight_RC, site.text, False, shared_gamma(shared) if shared else None)


def shared_gamma(weights: tuple[Tensor, ...]) -> Tensor:
    """Returns the mean magnitude over several matrices, in fp16, as unquantized matrices are exported."""
    return sum(weight.half().float().abs().sum() for weight in weights) / sum(weight.numel() for weight in weights)


def weight_codes(weight_RC: Tensor, site: SiteQuantizer, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns int8 codes_RC and fp16 scale_SG of an fp32 matrix, for the artifact."""
    grid = site_grid(weight_RC.float(), site, False, gamma)
    return grid.codes_RC.to(torch.int8), grid.scale.half()
