"""The two kinds of weight matrix, the norm, and the place of a quantizer: between a weight or activation and its use.

B batch, T time, I input width, O output width, V vocabulary, D model width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matrix(nn.Module):
    """A 2-D fp32 master weight. `fake_quantize`, when set, maps it to the values that export would keep."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    def effective_weight(self) -> Tensor:
        return self.weight if self.fake_quantize is None else self.fake_quantize(self.weight)


class Linear(Matrix):
    """y_BTO = x_BTI W_OI^T, computed in the dtype of x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(out_features, in_features)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return F.linear(x_BTI, self.effective_weight().to(x_BTI.dtype))


class Embedding(Matrix):
    """Rows of a table, fp32; of `weight_VD` where the caller has the effective weight at hand."""

    def forward(self, ids_BT: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        return F.embedding(ids_BT, self.effective_weight() if weight_VD is None else weight_VD)


class ActivationSite(nn.Module):
    """A place where the model's configuration may name a quantizer; golf/quant/activations.py puts it in."""

    def __init__(self, quantizer: str):
        super().__init__()
        self.quantizer = quantizer
        self.quantize: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.quantize or not self.quantizer, f"{self.quantizer} was not put in: build models by quantized_gpt"
        return x if self.quantize is None else self.quantize(x)


def rms_norm(x_BTD: Tensor) -> Tensor:
    """x / rms(x) over the last axis, with no gain and fp32's epsilon whatever the dtype (the recipe's)."""
    return F.rms_norm(x_BTD, (x_BTD.size(-1),), eps=torch.finfo(torch.float32).eps)
