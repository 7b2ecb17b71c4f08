"""Defines weight matrices, the norm, rotary positions, and the sites of quantizers for weights and activations.

B batch, T time, I input width, O output width, V vocabulary, D model width, H heads, K head width, F = K/2 frequencies.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import StepFacts
from golf.config.model import ModelConfig


class Matrix(nn.Module):
    """Holds a 2-D fp32 master weight; `fake_quantize`, when set, maps it to the values that export would keep."""

    trains_as = "matrix"
    """Name of its parameter group (golf/optim/optimizers.py)."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    def effective_weight(self) -> Tensor:
        return self.weight if self.fake_quantize is None else self.fake_quantize(self.weight)


class Linear(Matrix):
    """Computes y_BTO = x_BTI W_OI^T in the dtype of x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(out_features, in_features)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return F.linear(x_BTI, self.effective_weight().to(x_BTI.dtype))


class Embedding(Matrix):
    """Looks up rows of a table, fp32, or of `weight_VD` where the caller already has the effective weight."""

    trains_as = "table"

    def forward(self, ids_BT: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        return F.embedding(ids_BT, self.effective_weight() if weight_VD is None else weight_VD)


class Unembedding(nn.Module):
    """Computes logits y_BSV = x_BSD W_VD^T of a table that is not its own: a module, so that hooks reach them."""

    def forward(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BSD, weight_VD.to(x_BSD.dtype))


class ActivationSite(nn.Module):
    """Applies the activation quantizer that the model's configuration names here; golf/quant/qat.py installs it."""

    def __init__(self, quantizer: str):
        super().__init__()
        self.quantizer = quantizer
        self.quantize: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.quantize or not self.quantizer, f"{self.quantizer} was not put in: build models by quantized_gpt"
        return x if self.quantize is None else self.quantize(x)


def rms_norm(x_BTD: Tensor) -> Tensor:
    """Returns x / rms(x) over the last axis, with no gain and fp32's epsilon whatever the dtype (the recipe's)."""
    return F.rms_norm(x_BTD, (x_BTD.size(-1),), eps=torch.finfo(torch.float32).eps)


class RmsNorm(nn.Module):
    """Computes `rms_norm` as a module, so that hooks can hear it (golf/quant/calibration.py)."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD)


class DepthNorm(nn.Module):
    """Computes `rms_norm` / sqrt(depth)."""

    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD) / self.depth**0.5


def ntk_rope_base(base: float, length: int, train_length: int, head_dim: int) -> float:
    """Returns the base at which the lowest frequency turns as far at `length` as it did at `train_length`.

    base * s^(d / (d - 2)) with s = length / train_length and d = head_dim ("NTK-aware" scaling, bloc97 2023; the
    highest frequency stays as it is). Up to the training length the base is unchanged.
    """
    if length <= train_length:
        return base
    return base * (length / train_length) ** (head_dim / (head_dim - 2))


def rotary_dims(model: ModelConfig) -> int:
    """Returns how many dimensions of a head rotate."""
    return model.rope_dims or model.model_dim // model.num_heads


def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns cos_TF and sin_TF, fp32, of positions start .. length-1 at frequencies base^(-2i/d)."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle_TF = torch.outer(torch.arange(start, length, device=device, dtype=torch.float32), base**-exponent_F)
    return angle_TF.cos(), angle_TF.sin()


def rotate(x_BHTK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K/2) of every head by the angle of their position; computes in fp32."""
    first_BHTF, second_BHTF = x_BHTK.float().chunk(2, dim=-1)
    turned = (first_BHTF * cos_TF + second_BHTF * sin_TF, second_BHTF * cos_TF - first_BHTF * sin_TF)
    return torch.cat(turned, dim=-1).to(x_BHTK.dtype)


def rotate_first(x_BHTK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the first 2F dimensions of every head, and leaves the others (partial RoPE)."""
    first_BHTK, rest_BHTK = x_BHTK.tensor_split([2 * cos_TF.size(-1)], dim=-1)
    return torch.cat((rotate(first_BHTK, cos_TF, sin_TF), rest_BHTK), -1)


@contextmanager
def changed_model(model: nn.Module, **knobs: Any) -> Iterator[None]:
    """Sets other knobs in the `config` of a GPT and its parts within the context."""
    parts = [module for module in model.modules() if hasattr(module, "config")]
    config = model.config
    for part in parts:
        part.config = replace(config, **knobs)
    yield
    for part in parts:
        part.config = config


def acts_always(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Says that a feature of the network acts in every step."""
    return True, ""
