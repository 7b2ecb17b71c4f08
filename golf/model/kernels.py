"""Defines Triton kernels of the network, and the operators that launch them, with their gradients.

Of the MLP: a product whose epilogue is the activation, or its gradient. Of exclusive attention: all that happens to the
heads' results before the output matrix. The plain forms are in golf/model/block.py. A kernel computes in fp32 and
rounds what it stores, once.

N positions of a batch, D model width, M hidden width of the MLP, H query heads, G key/value heads, K head width.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

tl, constexpr = None, "constexpr"
"""Triton's language and the annotation that it looks for; both are Triton's own from the first launch on."""
KERNEL_CALLS: Counter[str] = Counter()
"""Launches of this module's kernels in this process; a compiled graph launches them here too."""
PRODUCT_TILE = dict(BLOCK_N=128, BLOCK_M=128, BLOCK_D=64)
PRODUCT_OPTIONS = dict(num_warps=8, num_stages=3)
"""Of a program: its 96 KB of shared memory and its registers let an SM of an H100 hold two, so that the epilogue of one
can run beside the product of the other. No GPU has compared them with others yet."""
HEAD_ROWS = 32
"""Positions of a program that computes exclusive attention."""


@cache
def compiled_kernel(function: Callable) -> Any:
    """Returns a kernel, made by Triton, which CUDA alone has and whose import reads files."""
    language = import_module("triton.language")
    function.__globals__.update(tl=language, constexpr=language.constexpr)
    return import_module("triton").jit(function)


def launch_kernel(function: Callable, programs: int, *given: Any, **options: Any) -> None:
    """Launches a kernel and counts it."""
    KERNEL_CALLS[function.__name__] += 1
    compiled_kernel(function)[(programs,)](*given, **options)


# ---- the MLP ----


def activated_product_kernel(
    x, weight, kept, out, rows, columns, weight_m, weight_d, WIDTH: constexpr, SLOPE: constexpr, BACKWARD: constexpr,
    BLOCK_N: constexpr, BLOCK_M: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Computes a tile of x_ND times weight_MD^T, and at once what the activation leaky(h)^2 makes of it.

    Forward: `kept` gets the product h, `out` its activation. Backward: x are the gradients of the MLP's result, `kept`
    holds h, and `out` gets the gradients by h.
    """
    tiles = tl.cdiv(columns, BLOCK_M)
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        x_mask, weight_mask = n < rows, m < columns
        if WIDTH % BLOCK_D:
            x_mask, weight_mask = x_mask & (start + d < WIDTH)[None, :], weight_mask & (start + d < WIDTH)[:, None]
        x_part = tl.load(x + n * WIDTH + (start + d)[None, :], mask=x_mask, other=0.0)
        place = m * weight_m + (start + d)[:, None] * weight_d
        total = tl.dot(x_part, tl.load(weight + place, mask=weight_mask, other=0.0), total)
    place, inside = n * columns + m, (n < rows) & (m < columns)
    if BACKWARD:
        hidden = tl.load(kept + place, mask=inside, other=0.0).to(tl.float32)
        result = total * tl.where(hidden > 0, 2.0 * hidden, (2.0 * SLOPE * SLOPE) * hidden)
    else:
        tl.store(kept + place, total.to(kept.dtype.element_ty), mask=inside)
        hidden = total.to(kept.dtype.element_ty).to(tl.float32)
        hidden = tl.where(hidden > 0, hidden, SLOPE * hidden)
        result = hidden * hidden
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def launch_product(x_ND: Tensor, weight_MD: Tensor, kept_NM: Tensor, slope: float, backward: bool) -> Tensor:
    """Returns what `activated_product_kernel` makes of the product."""
    (rows, width), columns = x_ND.shape, len(weight_MD)
    out_NM, tiles = torch.empty_like(kept_NM), -(-rows // PRODUCT_TILE["BLOCK_N"])
    launch_kernel(
        activated_product_kernel, tiles * -(-columns // PRODUCT_TILE["BLOCK_M"]), x_ND, weight_MD, kept_NM, out_NM,
        rows, columns, *weight_MD.stride(), WIDTH=width, SLOPE=slope, BACKWARD=backward,
        **PRODUCT_TILE, **PRODUCT_OPTIONS,
    )  # fmt: skip
    return out_NM


@torch.library.custom_op("golf::mlp_hidden", mutates_args=())
def mlp_hidden(x_ND: Tensor, up_MD: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Returns h_NM = x up^T and leaky(h)^2."""
    h_NM = x_ND.new_empty(len(x_ND), len(up_MD))
    return h_NM, launch_product(x_ND, up_MD, h_NM, slope, False)


@mlp_hidden.register_fake
def mlp_hidden_shape(x_ND: Tensor, up_MD: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(len(x_ND), len(up_MD)), x_ND.new_empty(len(x_ND), len(up_MD))


@torch.library.custom_op("golf::mlp_hidden_gradient", mutates_args=())
def mlp_hidden_gradient(g_ND: Tensor, down_DM: Tensor, h_NM: Tensor, slope: float) -> Tensor:
    """Returns the gradient by h of the MLP's result, whose gradient is g."""
    return launch_product(g_ND, down_DM.T, h_NM, slope, True)


@mlp_hidden_gradient.register_fake
def mlp_hidden_gradient_shape(g_ND: Tensor, down_DM: Tensor, h_NM: Tensor, slope: float) -> Tensor:
    return torch.empty_like(h_NM)


class SquaredMlp(torch.autograd.Function):
    """Computes leaky(x up^T)^2 down^T, with the activation and its gradient in the epilogues of two products."""

    @staticmethod
    def forward(context: Any, x_ND: Tensor, up_MD: Tensor, down_DM: Tensor, slope: float) -> Tensor:
        h_NM, squared_NM = mlp_hidden(x_ND, up_MD, slope)
        context.save_for_backward(x_ND, up_MD, down_DM, h_NM, squared_NM)
        context.slope = slope
        return squared_NM @ down_DM.T

    @staticmethod
    def backward(context: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, up_MD, down_DM, h_NM, squared_NM = context.saved_tensors
        by_h_NM = mlp_hidden_gradient(g_ND.contiguous(), down_DM, h_NM, context.slope)
        return by_h_NM @ up_MD, by_h_NM.T @ x_ND, g_ND.T @ squared_NM, None


# ---- exclusive attention with gates ----


def exclusive_heads_kernel(
    y, v, gates, g, out, by_v, by_gates, rows, GROUPS: constexpr, SHARE: constexpr, WIDTH: constexpr,
    BLOCK_K: constexpr, BLOCK_N: constexpr, BACKWARD: constexpr,
):  # fmt: skip
    """Takes from the heads of one group their part along the group's value, and multiplies each by its gate; BACKWARD:
    turns the gradients g of that into those by heads (`out`), value and gates."""
    n = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    group = tl.program_id(0) % GROUPS
    k = tl.arange(0, BLOCK_K)[None, :]
    inside, place_v = (n < rows) & (k < WIDTH), (n * GROUPS + group) * WIDTH + k
    value = tl.load(v + place_v, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True)), 1e-12)
    u = value / length
    by_u = tl.zeros_like(value)
    for head in tl.static_range(SHARE):
        row = n * (GROUPS * SHARE) + group * SHARE + head
        gate = tl.sigmoid(0.5 * tl.load(gates + row, mask=n < rows, other=0.0).to(tl.float32))
        head_y = tl.load(y + row * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(head_y * u, axis=1, keep_dims=True)
        if BACKWARD:
            gradient = tl.load(g + row * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
            by_gate = tl.sum(gradient * (head_y - along * u), axis=1, keep_dims=True)
            by_logit = 0.5 * by_gate * gate * (1.0 - gate)
            tl.store(by_gates + row, by_logit.to(by_gates.dtype.element_ty), mask=n < rows)
            gradient *= gate
            across = tl.sum(gradient * u, axis=1, keep_dims=True)
            by_u -= across * head_y + along * gradient
            result = gradient - across * u
        else:
            result = gate * (head_y - along * u)
        tl.store(out + row * WIDTH + k, result.to(out.dtype.element_ty), mask=inside)
    if BACKWARD:
        by_value = (by_u - tl.sum(by_u * u, axis=1, keep_dims=True) * u) / length
        tl.store(by_v + place_v, by_value.to(by_v.dtype.element_ty), mask=inside)


def launch_heads(y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor, g_NHK: Tensor, *out: Tensor, backward: bool) -> None:
    """Launches `exclusive_heads_kernel`, which fills `out`."""
    (rows, heads, width), groups = y_NHK.shape, v_NGK.size(1)
    launch_kernel(
        exclusive_heads_kernel, -(-rows // HEAD_ROWS) * groups, y_NHK, v_NGK, gate_NH, g_NHK, *out, rows,
        GROUPS=groups, SHARE=heads // groups, WIDTH=width, BLOCK_K=1 << (width - 1).bit_length(), BLOCK_N=HEAD_ROWS,
        BACKWARD=backward,
    )  # fmt: skip


@torch.library.custom_op("golf::exclusive_heads", mutates_args=())
def exclusive_heads(y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor) -> Tensor:
    """Returns sigmoid(gate / 2) (y - (y . u) u), with u the direction of the head's value."""
    out_NHK = torch.empty_like(y_NHK)
    launch_heads(y_NHK, v_NGK, gate_NH, y_NHK, out_NHK, v_NGK, gate_NH, backward=False)
    return out_NHK


@exclusive_heads.register_fake
def exclusive_heads_shape(y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor) -> Tensor:
    return torch.empty_like(y_NHK)


@torch.library.custom_op("golf::exclusive_heads_gradient", mutates_args=())
def exclusive_heads_gradient(
    g_NHK: Tensor, y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `exclusive_heads` by heads, values and gates."""
    made = torch.empty_like(y_NHK), torch.empty_like(v_NGK), torch.empty_like(gate_NH)
    launch_heads(y_NHK, v_NGK, gate_NH, g_NHK, *made, backward=True)
    return made


@exclusive_heads_gradient.register_fake
def exclusive_heads_gradient_shape(
    g_NHK: Tensor, y_NHK: Tensor, v_NGK: Tensor, gate_NH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y_NHK), torch.empty_like(v_NGK), torch.empty_like(gate_NH)


exclusive_heads.register_autograd(
    lambda context, g_NHK: exclusive_heads_gradient(g_NHK.contiguous(), *context.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
