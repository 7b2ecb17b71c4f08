"""Measures what each codec makes of the same codes: bytes, their ratio to the order-0 entropy, and seconds in and out.

R rows, C columns.
"""

import time
from collections.abc import Iterable

import torch

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import decode_streams, encode_streams
from golf.artifact.description import forms_of_state
from golf.quant.grid import QuantizedState, QuantizedTensor, same_stored

STEPS_PER_DEVIATION = 2.41
"""31 / 12.85, the published scripts' clip at 6 bits: codes of 3.3 bits."""
ROW_SPREAD, COLUMN_SPREAD = 0.1, 0.2
"""Deviations of the base-2 logarithm of the rows' and columns' sizes; trained matrices have more."""


def gptq_like_codes(share: float, seed: int = 0) -> QuantizedState:
    """Returns Gaussian codes in the shapes of an 11-layer, 512-wide model with a 4 times wider MLP and 8,192 tokens:
    35.9 million at a share of 1. Smaller shares have fewer layers and tokens."""
    draw, layers = torch.Generator().manual_seed(seed), max(1, round(11 * share))
    shapes = {"tok_emb.weight": (max(16, round(8192 * share)), 512)}
    for layer in range(layers):
        for kind, shape in {
            "attn.c_q": (512, 512), "attn.c_k": (256, 512), "attn.c_v": (256, 512), "attn.proj": (512, 512),
            "mlp.fc": (2048, 512), "mlp.proj": (512, 2048),
        }.items():  # fmt: skip
            shapes[f"blocks.{layer}.{kind}.weight"] = shape
    stored: QuantizedState = {}
    for name, (rows, columns) in shapes.items():
        row_R1 = 2 ** (ROW_SPREAD * torch.randn(rows, 1, generator=draw))
        column_C = 2 ** (COLUMN_SPREAD * torch.randn(columns, generator=draw))
        codes_RC = STEPS_PER_DEVIATION * row_R1 * column_C * torch.randn(rows, columns, generator=draw)
        scale_R1 = (0.01 * 2 ** (torch.randn(rows, 1, generator=draw) / 8)).half()
        stored[name] = QuantizedTensor(codes_RC.round().clamp(-31, 31).to(torch.int8), scale_R1, 6)
    return stored


def bench_coders(stored: QuantizedState, codecs: Iterable[str]) -> dict[str, dict[str, float]]:
    """Returns the figures of each codec on the same tensors. Raises ArtifactError where one does not give them back."""
    forms, figures = forms_of_state(stored), {}
    for codec in codecs:
        started = time.perf_counter()
        sizes, fields = encode_streams(stored, codec)
        encoded = time.perf_counter()
        decoded, _ = decode_streams(fields, forms, codec)
        ended = time.perf_counter()
        if not all(same_stored(decoded[name], stored[name]) for name in stored):
            raise ArtifactError(f"codec {codec} does not give back what it was given")
        codes = [size for size in sizes if size.role == "codes"]
        entropy, coded = sum(s.entropy_bytes for s in codes), sum(s.compressed_bytes for s in codes)
        figures[codec] = {
            "bytes": sum(map(len, fields)),
            "code_bytes": coded,
            "to_entropy": coded / entropy,
            "bits_per_code": 8 * coded / sum(s.elements for s in codes),
            "encode_seconds": encoded - started,
            "decode_seconds": ended - encoded,
        }
    return figures
