"""Computes a site's quantizer in one pass over memory on CUDA: the values of rows, or the gradients through them.

The plain form is in golf/quant/site_grid.py; operations round as there, so values and gradients are equal bit for bit,
but for slopes that are powers (fork, dge): those are the device's approximations, good to about 1e-6.
R rows, C columns.
"""

from typing import Any

import torch
from torch import Tensor

from golf.config.site_quantizers import SiteQuantizer
from golf.quant.grid import compiled_kernel, constexpr, tl

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
