"""Quantization-aware training: put the export grid between a matrix and its use, or take it away again."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, cast

from torch import Tensor, nn

from golf.config import QuantConfig
from golf.quant.grid import fake_quantize_rows
from golf.quant.policy import FP16_BITS, bits_of


class FakeQuantizable(Protocol):
    """A module that uses `weight` through `fake_quantize` when that is set."""

    weight: nn.Parameter
    fake_quantize: Callable[[Tensor], Tensor] | None


def fake_quantizable_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantizable]]:
    for path, module in model.named_modules():
        if hasattr(module, "fake_quantize"):
            yield path, cast(FakeQuantizable, module)


def install_fake_quantization(model: nn.Module, quant: QuantConfig) -> list[str]:
    """Train through the grid that export will use. Returns the names of the weights it acts on.

    Weights that are exported as fp16 are left alone.
    """
    names = []
    for path, module in fake_quantizable_modules(model):
        name = f"{path}.weight"
        bits = bits_of(name, module.weight.shape, quant)
        if bits < FP16_BITS:
            module.fake_quantize = partial(fake_quantize_rows, bits=bits)
            names.append(name)
    return names


def remove_fake_quantization(model: nn.Module) -> None:
    """Use the weights as they are."""
    for _, module in fake_quantizable_modules(model):
        module.fake_quantize = None
