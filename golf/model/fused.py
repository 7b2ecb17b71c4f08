"""Installs fused forms of parts of the network for training on CUDA: loss, MLP, and exclusive attention with its gates.

The plain forms, in golf/model/block.py and golf/model/gpt.py, say what they compute. What torch.compile makes of those
reads and writes two to four times as much as it has to. Of the loss in closed form it makes one kernel; the others are
kernels of ours (golf/model/kernels.py).

B batch, T time, S last positions of T, N positions of a batch, V vocabulary, D model width, H query heads, G key/value
heads, K head width, I dimensions of a gate.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from golf.config.features import Feature, Verdict, register_feature
from golf.model.kernels import KERNEL_CALLS, SquaredMlp, exclusive_heads
from golf.model.layers import acts_always

MOST_SOFTCAP = 40.0
"""Up to it e^(-2 softcap) is a normal fp32, so that a row's sum of powers needs no largest logit first."""
SLOPES = {"relu2": 0.0, "leaky_relu2": 0.5}
"""Of the activations that the kernel of the MLP computes, below zero."""


class CappedLoss(torch.autograd.Function):
    """Computes the losses_N of a head's logits, softcapped to cap tanh(logits / cap).

    The gradient by the logits is made in the forward pass, while they are at hand; the gradient of the losses then
    multiplies the narrow sides of the two products that use it.
    """

    @staticmethod
    def forward(context: Any, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, cap: float) -> Tensor:
        logits_NV = (x_ND @ head_VD.T).float()
        bent_NV = 2 * torch.sigmoid(logits_NV * (2 / cap)) - 1  # tanh by one exponential
        capped_NV = cap * bent_NV
        log_sum_N1 = cap + (capped_NV - cap).exp().sum(1, keepdim=True).log()
        hit_NV = torch.arange(len(head_VD), device=x_ND.device) == target_N[:, None]
        if any(context.needs_input_grad):
            slope_NV = ((capped_NV - log_sum_N1).exp() - hit_NV.float()) * (1 - bent_NV.square())
            context.save_for_backward(x_ND, head_VD, slope_NV.to(x_ND.dtype))
        return log_sum_N1[:, 0] - torch.where(hit_NV, capped_NV, 0.0).sum(1)

    @staticmethod
    def backward(context: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, head_VD, slope_NV = context.saved_tensors
        g_N1 = g_N[:, None].to(x_ND.dtype)
        return (slope_NV @ head_VD) * g_N1, slope_NV.T @ (x_ND * g_N1), None, None


def fused_losses(model: nn.Module, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
    """Returns what `GPT.token_losses` does."""
    x_BSD, head_VD = model.final_states(ids_BT, targets_BS.size(1), rope_base)
    given = x_BSD.flatten(0, 1), head_VD.to(x_BSD.dtype), targets_BS.flatten()
    return CappedLoss.apply(*given, model.config.logit_softcap).view(targets_BS.shape)


def fused_mlp(mlp: nn.Module, x_BTD: Tensor, slope: float) -> Tensor:
    """Returns what `MLP.forward` does."""
    x_BTD = mlp.act_in(x_BTD)
    weights = (layer.effective_weight().to(x_BTD.dtype) for layer in (mlp.fc, mlp.proj))
    return SquaredMlp.apply(x_BTD.flatten(0, -2), *weights, slope).view(x_BTD.shape)


def fused_heads(attention: nn.Module, y_BHSK: Tensor, v_BGSK: Tensor, x_BSD: Tensor) -> Tensor:
    """Returns what `CausalSelfAttention.finish` does."""
    if not attention.config.exclusive_attention:  # for a moment, in a proof
        return type(attention).finish(attention, y_BHSK, v_BGSK, x_BSD)
    gate_HI = attention.gate
    gate_BSH = x_BSD[..., : gate_HI.size(1)] @ gate_HI.to(x_BSD.dtype).T
    y_NHK, v_NGK = (part.transpose(1, 2).flatten(0, 1).contiguous() for part in (y_BHSK, v_BGSK))
    out_NHK = exclusive_heads(y_NHK, v_NGK, gate_BSH.flatten(0, 1))
    return out_NHK.unflatten(0, gate_BSH.shape[:2]).transpose(1, 2)


def fused_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable]]:
    """Yields the parts of a GPT that have a fused form, the method that it replaces, and the form."""
    config = model.config
    if config.logit_softcap <= MOST_SOFTCAP:
        yield model, "token_losses", partial(fused_losses, model)
    for block in model.blocks:
        if config.mlp_activation in SLOPES and not config.act_hidden:
            yield block.mlp, "forward", partial(fused_mlp, block.mlp, slope=SLOPES[config.mlp_activation])
        if config.exclusive_attention and config.attention_gate_dims:
            yield block.attn, "finish", partial(fused_heads, block.attn)


def install_fused(model: nn.Module) -> None:
    """Makes a GPT compute fused forms where there are some. Modules inside of them are then not called, so that hooks
    don't hear them: this is for training."""
    for part, name, function in fused_places(model):
        setattr(part, name, function)


@contextmanager
def without_fused(model: nn.Module) -> Iterator[None]:
    """Makes a GPT compute its plain forms within the context; the same objects come back, so that what is compiled
    with them stays valid."""
    installed = [(part, name, vars(part)[name]) for part, name, _ in fused_places(model) if name in vars(part)]
    for part, name, _ in installed:
        delattr(part, name)
    yield
    for part, name, function in installed:
        setattr(part, name, function)


def verify_fused(forward: Callable, model: nn.Module, batch: tuple) -> Verdict:
    """Verifies that the compiled step launches kernels, and that its loss is that of the plain forms."""
    installed = {name for part, name, _ in fused_places(model) if name in vars(part)}
    if not installed:
        return True, "plain forms: this is no CUDA device"
    before = KERNEL_CALLS.total()
    loss = forward(*batch).item()
    calls = KERNEL_CALLS.total() - before
    with torch.no_grad(), without_fused(model):
        plain = model(*batch).item()
    close = abs(loss - plain) < 0.005  # bf16's own noise in a batch's loss is below 0.0001
    effect = f"{calls} launches in a compiled step, loss {loss:.6f}, of plain forms {plain:.6f}"
    return close and (calls > 0) == bool(installed - {"token_losses"}), effect


register_feature(
    Feature(
        "kernels", lambda config: config.run.kernels != "off", "set kernels=off", acts_always,
        verify_step=verify_fused,
    )
)  # fmt: skip
