"""How many bytes a trained model will take, from its shapes alone.

R rows, C columns.
"""

from functools import cache
from math import prod

import torch

from golf.artifact.container import encode_streams
from golf.artifact.description import expected_shapes
from golf.artifact.fill_limit import NEAR_ENOUGH
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.quant.export import quantize_state
from golf.quant.tensor_classes import FP16_BITS, bits_of

TRAINED_SHARE = (0.90, 1.01)
"""Bytes of trained weights over those of Gaussian ones (which no training of ours has passed: trained rows have longer
tails, and the grid spans a row's largest weight). 15 trainings of `local` and `baseline-local`, 61 to 2,467 steps,
pruned by 5 % or not, each in lzma, zstd and zlib: 0.936 to 0.989, falling as training goes on. Widened at both ends for
other shapes and longer trainings; over untrained weights the same bytes are 1.00 to 1.40, by how they were initialised.
"""
FINEST_BITS = 8
FORECAST_SAMPLE = 2**16  # weights; their bytes per weight are within 0.4 % of those of whole models


def forecast_bytes(model: ModelConfig, quant: QuantConfig) -> tuple[int, int]:
    """Least and most bytes that the artifact of a trained model is expected to have, from its shapes alone."""
    bits = 0.0
    for name, shape in expected_shapes(model).items():
        width = bits_of(name, shape, quant)
        columns = shape[-1] if width < FP16_BITS else 1
        bits += prod(shape) * gaussian_bits(columns, width, quant.codec)
        if width < FP16_BITS:
            bits += shape[0] * gaussian_bits(1, FP16_BITS, quant.codec)
    return tuple(int(share * bits / 8) for share in TRAINED_SHARE)


def forecast_filled_bytes(model: ModelConfig, room: int) -> tuple[int, int]:
    """Least and most bytes of an artifact that quantizer=waterfill makes to fill `room`: it does, unless the codes of
    all weights at their finest take less."""
    most = sum(prod(shape) for shape in expected_shapes(model).values()) * FINEST_BITS // 8
    return (room - NEAR_ENOUGH, room) if room <= most else (int(most * 0.7), most)


@cache
def gaussian_bits(columns: int, bits: int, codec: str) -> float:
    """Bits that `codec` takes for a Gaussian weight in a row of `columns`, measured on a sample."""
    sample_RC = torch.randn(max(1, FORECAST_SAMPLE // columns), columns, generator=torch.Generator().manual_seed(0))
    name = "blocks.0.mlp.fc.weight"
    (size, *_), _ = encode_streams(quantize_state({name: sample_RC}, QuantConfig(), {name: bits}), codec)
    return size.bits_per_element
