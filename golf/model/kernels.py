"""Defines Triton kernels for parts of the network, operators that launch them, and their gradients.

The plain forms are in golf/model/block.py and golf/model/gpt.py, and are what any other device computes. A kernel
computes in fp32 and rounds what it stores, once.

N positions of a batch, V vocabulary, D model width, M hidden width of the MLP, H query heads, G key/value heads,
K head width.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from golf.config.features import Feature, Verdict, register_feature
from golf.model.layers import acts_always

tl, constexpr = None, "constexpr"
"""Triton's language and the annotation that it looks for; both are Triton's own from the first launch on."""
KERNEL_CALLS: Counter[str] = Counter()
"""Launches of this module's kernels in this process; a compiled graph launches them here too."""
PRODUCT_TILE = dict(BLOCK_N=128, BLOCK_M=256, BLOCK_D=64)
PRODUCT_OPTIONS = dict(num_warps=8, num_stages=3)
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


# ---- softcapped cross-entropy ----


def capped_loss_kernel(logits, targets, losses, slopes, cap, columns, BLOCK_V: constexpr, BACKWARD: constexpr):
    """Computes the loss of position `program_id`, -log softmax(cap tanh(logits / cap)) of its target, and its gradient
    by the logits: one read, and one write."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    inside = column < columns
    value = tl.load(logits + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    # tanh by one exponential: its error near 0, 1e-7, is of the size of fp32's rounding of the capped logits.
    bent = 2.0 / (1.0 + tl.exp(value * (-2.0 / cap))) - 1.0
    capped = tl.where(inside, cap * bent, float("-inf"))
    power = tl.exp(capped - tl.max(capped, axis=0))
    total = tl.sum(power, axis=0)
    hit = column == tl.load(targets + row)
    own = tl.sum(tl.where(hit, capped, 0.0), axis=0)
    tl.store(losses + row, tl.max(capped, axis=0) + tl.log(total) - own)
    if BACKWARD:
        slope = (power / total - tl.where(hit, 1.0, 0.0)) * (1.0 - bent * bent)
        tl.store(slopes + row * columns + column, slope.to(slopes.dtype.element_ty), mask=inside)


@torch.library.custom_op("golf::capped_loss", mutates_args=())
def capped_loss(logits_NV: Tensor, target_N: Tensor, cap: float, backward: bool) -> tuple[Tensor, Tensor]:
    """Returns fp32 losses_N in nats, and their gradients by the logits (empty without `backward`)."""
    rows, columns = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    slope_NV, block = torch.empty_like(logits_NV if backward else logits_NV[:0]), 1 << (columns - 1).bit_length()
    launch_kernel(
        capped_loss_kernel, rows, logits_NV, target_N, loss_N, slope_NV, cap, columns, BLOCK_V=block, BACKWARD=backward,
        num_warps=min(max(block // 1024, 1), 16),
    )  # fmt: skip
    return loss_N, slope_NV


@capped_loss.register_fake
def capped_loss_shape(logits_NV: Tensor, target_N: Tensor, cap: float, backward: bool) -> tuple[Tensor, Tensor]:
    return logits_NV.new_empty(len(logits_NV), dtype=torch.float32), logits_NV.new_empty(
        logits_NV.shape if backward else (0, logits_NV.size(1))
    )


class CappedLoss(torch.autograd.Function):
    """Computes the losses of a head's softcapped logits.

    The gradient by the logits is made in the forward pass; the gradient of the losses multiplies the narrow sides of
    the two products that use it.
    """

    @staticmethod
    def forward(context: Any, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, cap: float, backward: bool) -> Tensor:
        loss_N, slope_NV = capped_loss(x_ND @ head_VD.T, target_N, cap, backward)
        context.save_for_backward(x_ND, head_VD, slope_NV)
        return loss_N

    @staticmethod
    def backward(context: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, head_VD, slope_NV = context.saved_tensors
        g_N1 = g_N.unsqueeze(1).to(x_ND.dtype)
        return (slope_NV @ head_VD) * g_N1, slope_NV.T @ (x_ND * g_N1), None, None, None


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


# ---- in the network ----


def fused_losses(model: nn.Module, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
    """Returns what `GPT.token_losses` does."""
    x_BSD, head_VD = model.final_states(ids_BT, targets_BS.size(1), rope_base)
    given = x_BSD.flatten(0, 1), head_VD.to(x_BSD.dtype), targets_BS.flatten()
    return CappedLoss.apply(*given, model.config.logit_softcap, torch.is_grad_enabled()).view(targets_BS.shape)


def fused_mlp(mlp: nn.Module, x_BTD: Tensor, slope: float) -> Tensor:
    """Returns what `MLP.forward` does."""
    x_BTD = mlp.act_in(x_BTD)
    weights = (layer.effective_weight().to(x_BTD.dtype) for layer in (mlp.fc, mlp.proj))
    return SquaredMlp.apply(x_BTD.flatten(0, -2), *weights, slope).view(x_BTD.shape)


def fused_heads(attention: nn.Module, y_BHSK: Tensor, v_BGSK: Tensor, x_BSD: Tensor) -> Tensor:
    """Returns what `CausalSelfAttention.finish` does."""
    gate_HI = attention.gate
    gate_BSH = x_BSD[..., : gate_HI.size(1)] @ gate_HI.to(x_BSD.dtype).T
    y_NHK, v_NGK = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in (y_BHSK, v_BGSK))
    out_NHK = exclusive_heads(y_NHK, v_NGK, gate_BSH.flatten(0, 1))
    return out_NHK.unflatten(0, gate_BSH.shape[:2]).transpose(1, 2)


SLOPES = {"relu2": 0.0, "leaky_relu2": 0.5}
"""Of the activations that the kernel of the MLP computes, below zero."""


def kernel_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable]]:
    """Yields the parts of a GPT that have kernels, the method that they replace, and its replacement."""
    config = model.config
    yield model, "token_losses", partial(fused_losses, model)
    for block in model.blocks:
        if config.mlp_activation in SLOPES and not config.act_hidden:
            yield block.mlp, "forward", partial(fused_mlp, block.mlp, slope=SLOPES[config.mlp_activation])
        if config.exclusive_attention and config.attention_gate_dims:
            yield block.attn, "finish", partial(fused_heads, block.attn)


def install_kernels(model: nn.Module) -> None:
    """Makes a GPT compute by kernels where there are some. Modules inside of what they fuse are then not called, so
    hooks don't hear them: this is for training."""
    for part, name, function in kernel_places(model):
        setattr(part, name, function)


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Makes a GPT compute its plain forms within the context."""
    installed = [place for place in kernel_places(model) if place[1] in vars(place[0])]
    for part, name, _ in installed:
        delattr(part, name)
    yield
    for part, name, function in installed:
        setattr(part, name, function)


def verify_kernels(forward: Callable, model: nn.Module, batch: tuple) -> Verdict:
    """Verifies that the compiled step launches kernels, and that its loss is that of the plain forms."""
    if "token_losses" not in vars(model):
        return True, "plain forms, because this is no CUDA device"
    before = KERNEL_CALLS.total()
    loss = forward(*batch).item()
    calls = KERNEL_CALLS.total() - before
    with torch.no_grad(), without_kernels(model):
        plain = model(*batch).item()
    close = abs(loss - plain) < 0.005  # of bf16's own noise in a batch's loss: less than 0.0001
    return calls > 0 and close, f"{calls} launches in a compiled step, loss {loss:.6f}, of plain forms {plain:.6f}"


register_feature(
    Feature(
        "kernels", lambda config: config.run.kernels != "off", "set kernels=off", acts_always,
        verify_step=verify_kernels,
    )
)  # fmt: skip
