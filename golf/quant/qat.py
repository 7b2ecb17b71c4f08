"""Quantization-aware training: put the export grid between a matrix and its use, or take it away again."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol, cast

from torch import Tensor, nn

from golf.config.config import QuantConfig
from golf.quant.grid import fake_quantize_rows
from golf.quant.site_grid import quantize_weight
from golf.quant.tensor_classes import FP16_BITS, bits_of, shared_weights, weight_site


class FakeQuantizable(Protocol):
    """A module that uses `weight` through `fake_quantize` when that is set."""

    weight: nn.Parameter
    fake_quantize: Callable[[Tensor], Tensor] | None


def fake_quantizable_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantizable]]:
    for path, module in model.named_modules():
        if hasattr(module, "fake_quantize"):
            yield path, cast(FakeQuantizable, module)


def install_fake_quantization(
    model: nn.Module, quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> list[str]:
    """Train through the grid that export will use. Returns the names of the weights it acts on.

    Weights that are exported as fp16 are left alone; those in `tensor_bits` get those bits, but for weights that the
    configuration names a quantizer for.
    """
    names, modules = [], dict(fake_quantizable_modules(model))
    for path, module in modules.items():
        name = f"{path}.weight"
        bits = (tensor_bits or {}).get(name) or bits_of(name, module.weight.shape, quant)
        if site := weight_site(name, quant):
            weights = {f"{other}.weight": part.weight for other, part in modules.items()}
            shared = tuple(shared_weights(name, site, weights))
            module.fake_quantize = partial(quantize_weight, site=site, shared=shared)
        elif bits < FP16_BITS:
            module.fake_quantize = partial(fake_quantize_rows, bits=bits)
        if module.fake_quantize:
            names.append(name)
    return names


def remove_fake_quantization(model: nn.Module) -> None:
    """Use the weights as they are."""
    for _, module in fake_quantizable_modules(model):
        module.fake_quantize = None
