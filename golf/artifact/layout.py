"""Which bytes lie next to which: stored tensors <-> byte streams in which the compressor sees like with like.

Part of format version 1: a change here is a new version. Measured on trained codes (docs/LOG.md): one symbol per
byte; kinds of matrix together, layers one after the other; zigzag (0, -1, 1, -2, ...) symbols; the MLP's output
matrix column by column (its columns, the hidden units, differ more than its rows: 1.7 % of its bytes); fp16 split
into high and low bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.quant.grid import FP16_TINY, grid_clip
from golf.quant.policy import FP16_BITS
from golf.quant.stored import QuantizedState, QuantizedTensor

COLUMN_MAJOR_ENDING = "mlp.proj.weight"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StreamPlan:
    """One byte stream: what it holds (codes, scales or fp16), of which tensors."""

    role: str
    label: str
    bits: int
    names: tuple[str, ...]
    elements: int

    @property
    def planes(self) -> int:
        """Byte planes, each compressed on its own: codes have one, fp16 has two."""
        return 1 if self.role == "codes" else 2


def stream_label(name: str, bits: int) -> str:
    """Tensors of one label share a stream: by name for matrices on a grid; fp16 ones are the embedding or small."""
    parts = name.split(".")
    if parts[0] == "tok_emb":
        return "embed"
    if bits == FP16_BITS:
        return "small"
    return next((part for part in ("bigram", "attn", "mlp") if part in parts), "other")


def kind_and_layer(name: str) -> tuple[list[str], list[int]]:
    parts = name.split(".")
    return [part for part in parts if not part.isdigit()], [int(part) for part in parts if part.isdigit()]


def plan_streams(shapes: Shapes, bits: Mapping[str, int]) -> list[StreamPlan]:
    """The streams of an artifact, in the order in which they are stored."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(shapes, key=kind_and_layer):
        groups.setdefault((stream_label(name, bits[name]), bits[name]), []).append(name)
    plans = []
    for (label, width), names in sorted(groups.items()):
        role = "fp16" if width == FP16_BITS else "codes"
        plans.append(StreamPlan(role, label, width, tuple(names), sum(prod(shapes[name]) for name in names)))
    scaled = tuple(name for plan in plans if plan.role == "codes" for name in plan.names)
    if scaled:
        plans.append(StreamPlan("scales", "scales", FP16_BITS, scaled, sum(shapes[name][0] for name in scaled)))
    return plans


def stream_planes(plan: StreamPlan, stored: QuantizedState) -> list[bytes]:
    """The bytes of a stream, plane by plane."""
    entries = [stored[name] for name in plan.names]
    if plan.role == "codes":
        return [b"".join(symbols_of(name, stored[name]) for name in plan.names)]
    halves = [entry.scale_SG if plan.role == "scales" else entry for entry in entries]
    pairs_N2 = torch.cat([half.flatten() for half in halves]).numpy().astype("<f2").view(np.uint8).reshape(-1, 2)
    return [pairs_N2[:, 1].tobytes(), pairs_N2[:, 0].tobytes()]


def symbols_of(name: str, entry: QuantizedTensor) -> bytes:
    """Codes as unsigned bytes, small magnitudes first: 0, -1, 1, -2, ..."""
    codes_RC = entry.codes_RC.numpy()
    codes_N = (codes_RC.T if name.endswith(COLUMN_MAJOR_ENDING) else codes_RC).reshape(-1).astype(np.int16)
    return ((codes_N << 1) ^ (codes_N >> 15)).astype(np.uint8).tobytes()


def codes_from_symbols(name: str, symbols: bytes, shape: Sequence[int], bits: int) -> Tensor:
    """int8 codes_RC. Raises ArtifactError for a code outside the grid."""
    symbols_N = np.frombuffer(symbols, np.uint8)
    if symbols_N.max(initial=0) > 2 * grid_clip(bits):
        raise ArtifactError(f"tensor {name!r} has codes outside its {bits}-bit grid")
    codes_N = ((symbols_N >> 1) ^ -(symbols_N & 1)).astype(np.int8)
    rows, columns = shape
    codes_RC = (
        codes_N.reshape(columns, rows).T if name.endswith(COLUMN_MAJOR_ENDING) else codes_N.reshape(rows, columns)
    )
    return torch.from_numpy(np.ascontiguousarray(codes_RC))


def halves_from_planes(plan: StreamPlan, planes: Sequence[bytes]) -> Tensor:
    """fp16 values of a stream. Raises ArtifactError for values that are not finite and scales that are too small."""
    high_N, low_N = (np.frombuffer(plane, np.uint8) for plane in planes)
    halves_N = np.stack((low_N, high_N), axis=1).reshape(-1).view("<f2").astype(np.float16)
    sound = np.isfinite(halves_N) & (halves_N >= FP16_TINY if plan.role == "scales" else True)
    if not sound.all():
        raise ArtifactError(f"the {plan.role} of {plan.label} hold values that no sound model has")
    return torch.from_numpy(halves_N)


def split_stream(plan: StreamPlan, planes: Sequence[bytes], shapes: Shapes) -> dict[str, Tensor]:
    """The parts of one stream by tensor name: int8 codes, fp16 scales or fp16 tensors."""
    parts, start = {}, 0
    halves_N = None if plan.role == "codes" else halves_from_planes(plan, planes)
    for name in plan.names:
        shape = shapes[name][:1] if plan.role == "scales" else shapes[name]
        end = start + prod(shape)
        if halves_N is None:
            parts[name] = codes_from_symbols(name, planes[0][start:end], shape, plan.bits)
        else:
            parts[name] = halves_N[start:end].reshape(shape).clone()
        start = end
    return parts


def join_streams(parts: Mapping[str, Mapping[str, Tensor]], shapes: Shapes, bits: Mapping[str, int]) -> QuantizedState:
    """Stored tensors from the parts of all streams (role -> name -> tensor), in the order of `shapes`."""
    return {
        name: parts["fp16"][name]
        if bits[name] == FP16_BITS
        else QuantizedTensor(parts["codes"][name], parts["scales"][name].unsqueeze(1), bits[name])
        for name in shapes
    }
