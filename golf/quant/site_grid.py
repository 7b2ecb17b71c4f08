"""Computes the quantizers of golf/config/site_quantizers.py: codes, scales, and the gradients that replace rounding's.

    step from the values' size (by tensor, row, group), code = clamp(round(x / step), low, high), value = code * scale

The scale is the step, except for `leastsq` (the scale that fits the codes best) and thresholds other than 1/2. Scales
of weights are fp16, so that training uses what is exported, bit for bit; those of activations are fp32.

The plain form comes first, then the one kernel that stands for it on CUDA: operations round as in the plain form, so
values and gradients are equal bit for bit, but for slopes that are powers (fork, dge), which are the device's
approximations there, good to about 1e-6.

R rows, C columns, S rows of scales (R or 1), G groups of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf.config.site_quantizers import SiteQuantizer
from golf.model.kernels import compiled_kernel, constexpr, tl
from golf.quant.grid import FP16_MAX, FP16_TINY, group_width, spread_groups

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


def weight_codes(weight_RC: Tensor, site: SiteQuantizer, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns int8 codes_RC and fp16 scale_SG of an fp32 matrix, for the artifact."""
    grid = site_grid(weight_RC.float(), site, False, gamma)
    return grid.codes_RC.to(torch.int8), grid.scale.half()


# ---- the kernel ----

TILE, LANES_OF_WARP = 1024, 32
"""Elements that one program holds, where a row is no longer."""


def site_row_kernel(
    x, g, gamma, out, rows, columns, BLOCK_R: constexpr, BLOCK_C: constexpr, BACKWARD: constexpr, GIVEN: constexpr,
    HALF: constexpr, RULE: constexpr, BINARY: constexpr, LOW: constexpr, HIGH: constexpr, TWICE: constexpr,
    GRADIENT: constexpr, EXPONENT: constexpr, LARGEST: constexpr, ATTACHED: constexpr,
):  # fmt: skip
    """Puts BLOCK_R rows on their grids, or turns the gradients g of their values into those of x.

    GIVEN: the mean or largest magnitude is read from gamma; HALF: scales are fp16, as weights have them.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    inside, place = (row < rows) & (column < columns), row * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    zero, width = tl.zeros_like(value), (columns + tl.zeros([BLOCK_R, 1], tl.float32)).to(tl.float64)
    zero_R1 = tl.zeros([BLOCK_R, 1], tl.float32)
    high_R1, magnitude, least = zero_R1 + HIGH, tl.abs(value), 2.0**-14 if HALF else 1e-5
    largest = tl.max(magnitude, axis=1, keep_dims=True)
    up = tl.max(tl.where(inside, value, float("-inf")), axis=1, keep_dims=True)
    low_end = tl.min(tl.where(inside, value, float("inf")), axis=1, keep_dims=True)
    basis = tl.load(gamma) + zero_R1 if GIVEN else largest
    if not GIVEN and (RULE == "absmean" or RULE == "leastsq"):
        basis = (tl.sum(magnitude.to(tl.float64), axis=1, keep_dims=True) / width).to(tl.float32)
    if RULE == "absmax":
        basis = tl.div_rn(basis, high_R1)
    if RULE == "twosided":
        basis = tl.div_rn(tl.where(value > 0, up, -low_end), zero + HIGH)
    basis = tl.maximum(basis, least, propagate_nan=tl.PropagateNan.ALL)
    if HALF:
        basis = tl.minimum(basis, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16).to(tl.float32)
    if RULE == "unit":
        basis = zero_R1 + 1 / HIGH
    scale, step = basis, basis
    if RULE == "absmean" or RULE == "leastsq":
        step = basis * TWICE
    u = tl.div_rn(value, zero + step)
    # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves no -0.
    code = (tl.minimum(tl.maximum(u, LOW), HIGH) + 12582912.0) - 12582912.0
    if BINARY:
        code = tl.where(value < 0, zero - 1, zero + 1)
    code = tl.where(inside, code, 0.0)
    squares = tl.maximum(tl.sum(code * code, axis=1, keep_dims=True), 1.0)
    if RULE == "leastsq":
        product = tl.sum((value * code).to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
        scale = tl.maximum(tl.div_rn(product, squares), least, propagate_nan=tl.PropagateNan.ALL)
        if HALF:
            scale = tl.minimum(scale, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16).to(tl.float32)
    if not BACKWARD:
        # Only NaN differs from itself; tl.minimum and tl.maximum would make a number of it.
        result = tl.where(u == u, code * scale, u)
    else:
        gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        within = (u >= LOW * 1.0009765625) & (u <= HIGH * 1.0009765625)  # OUTER_EDGE
        by_code = gradient * scale
        if GRADIENT == "clipped":
            by_code = by_code * tl.where(within, zero + 1, 0.0)
        if GRADIENT == "fork":
            distance = tl.abs(u - tl.floor(u) - 0.5)
            by_code = by_code * tl.minimum(0.2 * tl.exp2(EXPONENT * tl.log2(distance)), LARGEST)
        if GRADIENT == "dge":
            between = (u - LOW) * 0.5 if BINARY else u - LOW
            distance = tl.abs(2 * (between - tl.floor(between)) - 1)
            slope = tl.minimum(tl.exp2(EXPONENT * tl.log2(distance)) * (1 + EXPONENT), LARGEST)
            by_code = by_code * tl.where(within, slope, 0.0)
        result = tl.div_rn(by_code, zero + step)
        if ATTACHED:
            by_scale, by_step = gradient * code, tl.div_rn(-by_code * u, zero + step)
            if RULE == "twosided":
                both = tl.div_rn(by_scale + by_step, zero + HIGH)
                rise = tl.where((value > 0) & (up > HIGH * 1e-5), both, 0.0)
                fall = tl.where((value <= 0) & (-low_end > HIGH * 1e-5), both, 0.0)
                rise_R1 = tl.sum(rise.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
                fall_R1 = tl.sum(fall.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
                at_up, at_low = (inside & (value == up)).to(tl.float32), (inside & (value == low_end)).to(tl.float32)
                count_up = tl.maximum(tl.sum(at_up, axis=1, keep_dims=True), 1.0)
                count_low = tl.maximum(tl.sum(at_low, axis=1, keep_dims=True), 1.0)
                result += tl.div_rn(rise_R1, count_up) * at_up - tl.div_rn(fall_R1, count_low) * at_low
            else:
                sign = tl.where(value > 0, zero + 1, tl.where(value < 0, zero - 1, 0.0))
                part, through = by_scale + by_step, zero
                if RULE == "absmean":
                    part = by_scale + TWICE * by_step
                if RULE == "leastsq":
                    part = TWICE * by_step
                    fitted = tl.sum(by_scale.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
                    through = tl.div_rn(fitted, squares) * code
                total = tl.sum(part.to(tl.float64), axis=1, keep_dims=True).to(tl.float32)
                if RULE == "absmax":
                    chosen = (inside & (magnitude == largest)).to(tl.float32)
                    count = tl.maximum(tl.sum(chosen, axis=1, keep_dims=True), 1.0)
                    share = tl.div_rn(tl.div_rn(total, high_R1), count) * chosen
                else:
                    share = tl.div_rn(total, width.to(tl.float32)) + zero
                result += through + share * sign
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def in_one_kernel(x_RC: Tensor, site: SiteQuantizer, backward: bool) -> bool:
    """Returns whether the kernel computes this quantizer where the tensor is: rows apart, or forward a given step."""
    apart = site.granularity == "row" or not backward and site.granularity in ("tensor", "qkvo")
    return x_RC.is_cuda and apart and (site.granularity == "row" or site.scale != "leastsq")


def site_rows(
    x_RC: Tensor, site: SiteQuantizer, activation: bool, basis: Tensor | None = None, g_RC: Tensor | None = None
) -> Tensor:
    """Returns the values of x on its grid, or from their gradients g those of x, in the dtype of x, by one kernel.

    `basis` is the mean or largest magnitude where several rows share a step.
    """
    x_RC, out_RC = x_RC.contiguous(), torch.empty_like(x_RC, memory_format=torch.contiguous_format)
    rows, columns = x_RC.shape
    tile, options = launch_shape(columns)
    compiled_kernel(site_row_kernel)[(-(-rows // tile["BLOCK_R"]),)](
        x_RC, x_RC if g_RC is None else g_RC.contiguous(), x_RC if basis is None else basis, out_RC, rows, columns,
        **kernel_options(site, activation, basis is not None, g_RC is not None), **tile, **options,
    )  # fmt: skip
    return out_RC


def launch_shape(columns: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the tile of a program, and how it is compiled: eight elements a thread, no product fused with a sum."""
    block = 1 << (columns - 1).bit_length()
    rows = max(1, TILE // block)
    warps = min(32, max(4, rows * block // 8 // LANES_OF_WARP))
    return {"BLOCK_R": rows, "BLOCK_C": block}, {"num_warps": warps, "enable_fp_fusion": False}


def kernel_options(site: SiteQuantizer, activation: bool, given: bool, backward: bool) -> dict[str, Any]:
    """Returns what of a quantizer the kernel is compiled for."""
    exponent = -0.8 if site.gradient == "fork" else 1 / site.power - 1 if site.power else 0.0
    return dict(
        BACKWARD=backward, GIVEN=given, HALF=not activation, RULE=site.scale, BINARY=site.is_binary,
        LOW=float(site.low), HIGH=float(site.high), TWICE=2 * site.threshold, GRADIENT=site.gradient,
        EXPONENT=exponent, LARGEST=site.largest_slope, ATTACHED=site.attached,
    )  # fmt: skip
