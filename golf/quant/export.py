"""A state dict as it is stored: codes and scales for the matrices, fp16 for the rest."""

from collections.abc import Mapping

import torch
from torch import Tensor

from golf.config import QuantConfig
from golf.quant.grid import FP16_MAX, grid_clip, quantize_rows
from golf.quant.policy import FP16_BITS, QuantError, bits_of
from golf.quant.stored import QuantizedState, QuantizedTensor


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
    """Each tensor in the form that its class gets under `quant`, on the CPU; those in `tensor_bits` with those bits.

    Raises QuantError.
    """
    for name in (tensor_bits or {}).keys() - state.keys():
        raise QuantError(f"tensor_bits names {name!r}, which is no tensor of the model")
    stored: QuantizedState = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().float()
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        check_storable(name, tensor, bits)
        if bits == FP16_BITS:
            stored[name] = tensor.half()
        else:
            codes_RC, scale_R = quantize_rows(tensor, bits)
            stored[name] = QuantizedTensor(codes_RC, scale_R.unsqueeze(1), bits)
    return stored
