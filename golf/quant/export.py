"""A state dict as it is stored: codes and scales for the matrices, fp16 for the rest."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from golf.config.config import QuantConfig
from golf.quant.grid import FP16_MAX, grid_clip, quantize_rows
from golf.quant.site_grid import shared_gamma, weight_codes
from golf.quant.stored import QuantizedState, QuantizedTensor
from golf.quant.tensor_classes import FP16_BITS, QuantError, bits_of, shared_weights, tensor_class, weight_site


def check_storable(name: str, tensor: Tensor, bits: int) -> None:
    """Raise QuantError where fp16 weights or scales could not hold what is in `tensor`."""
    if not torch.isfinite(tensor).all():
        raise QuantError(f"tensor {name!r} has NaN or infinite values: the weights are broken, nothing to export")
    limit = FP16_MAX if bits == FP16_BITS else FP16_MAX * grid_clip(bits)
    if tensor.numel() and tensor.abs().max() > limit:
        raise QuantError(f"tensor {name!r} has values beyond {limit:,.0f}, the most that {bits} bits can store")


def quantize_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> QuantizedState:
    """Each tensor in the form that its class gets under `quant`, on the CPU; those in `tensor_bits` with those bits;
    those that the configuration names a quantizer for on its grid.

    Raises QuantError.
    """
    for name in (tensor_bits or {}).keys() - state.keys():
        raise QuantError(f"tensor_bits names {name!r}, which is no tensor of the model")
    stored: QuantizedState = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().float()
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        check_storable(name, tensor, bits)
        if site := weight_site(name, quant):
            shared = tuple(shared_weights(name, site, state))
            codes_RC, scale_SG = weight_codes(tensor, site, shared_gamma(shared) if shared else None)
            stored[name] = QuantizedTensor(codes_RC, scale_SG, site.bits)
        elif bits == FP16_BITS:
            stored[name] = tensor.half()
        else:
            codes_RC, scale_R = quantize_rows(tensor, bits)
            stored[name] = QuantizedTensor(codes_RC, scale_R.unsqueeze(1), bits)
    return stored


def quantized_parameters(shapes: Mapping[str, Sequence[int]], quant: QuantConfig) -> int:
    """How many parameters `quant` puts on a grid; the rest is exported as fp16."""
    if quant.quantizer == "fit":
        return sum(prod(shape) for name, shape in shapes.items() if tensor_class(name, shape) != "small")
    return sum(prod(shape) for name, shape in shapes.items() if bits_of(name, shape, quant) < FP16_BITS)
