"""How many bits a tensor gets: decided by its class, and its class by its name."""

from collections.abc import Sequence
from math import prod

from golf.config import QuantConfig, UserError

TENSOR_CLASSES = ("embed", "bigram", "attn", "mlp", "small")
FP16_BITS = 16
SMALL_ELEMENTS = 256
"""Matrices with fewer elements are stored as fp16: scales and rounding would cost more than they save."""
CONTROL_NAMES = ("skip_weights", "resid_mix")
"""Stacks of per-dimension vectors: matrices by shape only."""


class QuantError(UserError):
    """A tensor that cannot be put on a grid."""


def tensor_class(name: str, shape: Sequence[int]) -> str:
    """One of TENSOR_CLASSES. Raises QuantError for a matrix of unknown name."""
    if len(shape) < 2 or name.rsplit(".", 1)[-1] in CONTROL_NAMES or prod(shape) < SMALL_ELEMENTS:
        return "small"
    parts = name.split(".")
    if parts[0] == "tok_emb":
        return "embed"
    for part in ("bigram", "attn", "mlp"):
        if part in parts and len(shape) == 2:
            return part
    raise QuantError(f"no quantization rule for tensor {name!r} of shape {tuple(shape)}")


def bits_of(name: str, shape: Sequence[int], quant: QuantConfig) -> int:
    """Bits per weight of a tensor's codes; 16 is fp16 as it is, without a grid."""
    return {
        "embed": quant.embed_bits,
        "bigram": quant.bigram_bits,
        "attn": quant.attn_bits,
        "mlp": quant.mlp_bits,
        "small": FP16_BITS,
    }[tensor_class(name, shape)]
