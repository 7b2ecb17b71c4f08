"""Arranges stored tensors in streams, so that a coder sees like values together.

Part of the format: a change here is a new version. Measured on trained codes (docs/LOG.md). Byte codecs: one symbol per
byte; kinds of matrix together, layers one after the other; zigzag (0, -1, 1, -2, ...) symbols; the MLP's output matrix
column by column (its columns, the hidden units, differ more than its rows: 1.7 % of its bytes); fp16 split into high
and low bytes. Codec rans: the matrices of one kind and shape side by side, with their zero points subtracted. R rows, C
columns, L layers, S rows of scales, G groups, N numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from golf.artifact.codecs import ArtifactError, compress_stream, decompress_stream
from golf.artifact.description import Form, Forms, is_factor
from golf.artifact.sequences import decode_halves, decode_sequence, encode_halves, encode_sequence
from golf.artifact.stacks import StackSpec
from golf.artifact.streams import decode_codes, encode_codes
from golf.config.config import stores_plain_rows
from golf.quant.grid import FP16_TINY, QuantizedState, QuantizedTensor, spread_groups
from golf.quant.tensor_classes import FP16_BITS

COLUMN_MAJOR_ENDING = "mlp.proj.weight"
HALF_ROLES = ("fp16", "scales", "columns")

Parts = dict[str, dict[str, Tensor]]
"""Role -> tensor name -> codes (int8 or int16), fp16 scales, fp16 column scales, int8 zero points or fp16 tensor."""


@dataclass(frozen=True)
class StreamPlan:
    """Plans one stream: its role (codes, scales, columns, zeros or fp16) and its tensors."""

    role: str
    label: str
    bits: int
    names: tuple[str, ...]
    elements: int

    def fields(self, codec: str) -> int:
        """Returns the number of separately compressed fields: byte codecs split fp16 streams into high and low
        bytes."""
        return 2 if codec != "rans" and self.role in HALF_ROLES else 1

    @property
    def raw_bytes(self) -> int:
        """Returns the bytes before compression: one for a code, two for an fp16 value."""
        return self.elements * (2 if self.role in HALF_ROLES else 1)


def stream_label(name: str, bits: int) -> str:
    """Returns the label whose tensors share a stream: by name for matrices on a grid; fp16 ones are embed or small."""
    parts = name.split(".")
    if is_factor(name):
        return "low rank"
    if parts[0] in ("tok_emb", "head"):
        return "embed"
    if bits == FP16_BITS:
        return "small"
    return next((part for part in ("bigram", "attn", "mlp") if part in parts), "other")


def kind_and_layer(name: str) -> tuple[list[str], list[int]]:
    parts = name.split(".")
    return [part for part in parts if not part.isdigit()], [int(part) for part in parts if part.isdigit()]


def part_shape(role: str, form: Form) -> tuple[int, ...]:
    if role == "columns":
        return form.shape[1:]
    return form.scale_shape if role in ("scales", "zeros") else form.shape


def plan_streams(forms: Forms) -> list[StreamPlan]:
    """Returns the streams of an artifact, in stored order."""
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name in sorted(forms, key=kind_and_layer):
        bits = forms[name].bits
        groups.setdefault((stream_label(name, bits), bits, "fp16" if bits == FP16_BITS else "codes"), []).append(name)
    plans = [(role, label, bits, names) for (label, bits, role), names in sorted(groups.items())]
    coded = [name for role, _, _, names in plans if role == "codes" for name in names]
    plans.append(("scales", "scales", FP16_BITS, coded))
    if not stores_plain_rows():
        plans.append(("columns", "column scales", FP16_BITS, [name for name in coded if forms[name].column_scales]))
        plans.append(("zeros", "zero points", 8, [name for name in coded if forms[name].zeros]))
    return [
        StreamPlan(role, label, bits, tuple(names), sum(prod(part_shape(role, forms[name])) for name in names))
        for role, label, bits, names in plans
        if names
    ]


def part_of(role: str, entry: QuantizedTensor | Tensor) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    part = {"codes": entry.codes_RC, "scales": entry.scale_SG, "columns": entry.column_scale_C, "zeros": entry.zero_SG}
    found = part[role]
    assert found is not None
    return found


def encode_stream(codec: str, plan: StreamPlan, entries: QuantizedState, forms: Forms) -> list[bytes]:
    """Encodes the fields of a stream."""
    parts = {name: part_of(plan.role, entries[name]) for name in plan.names}
    if plan.role == "codes":
        if codec == "rans":
            stacks = stacks_of(plan, forms)
            steps = {name: part_of("scales", entries[name]) for name in plan.names}
            return [encode_codes(specs_of(stacks, forms, steps), [stack_of(names, entries) for names in stacks])]
        return [compress_stream(codec, b"".join(symbols_of(name, part) for name, part in parts.items()))]
    numbers_N = torch.cat([part.flatten() for part in parts.values()]).numpy()
    if not stores_plain_rows() and plan.role == "zeros":
        shifted_N = numbers_N.astype(np.int16) + 128
        return [
            encode_sequence(shifted_N)
            if codec == "rans"
            else compress_stream(codec, shifted_N.astype(np.uint8).tobytes())
        ]
    pattern_N = numbers_N.view(np.uint16)
    if codec == "rans":
        return [encode_halves(pattern_N)]
    return [compress_stream(codec, plane.astype(np.uint8).tobytes()) for plane in (pattern_N >> 8, pattern_N & 255)]


def decode_stream(
    codec: str, plan: StreamPlan, fields: Sequence[bytes], forms: Forms, parts: Parts
) -> dict[str, Tensor]:
    """Decodes a stream's parts by tensor name; codes need the zero points in `parts`. Raises ArtifactError."""
    if plan.role == "codes":
        return decode_code_stream(codec, plan, fields[0], forms, parts)
    if not stores_plain_rows() and plan.role == "zeros":
        plain = (
            np.zeros(0)
            if codec == "rans"
            else np.frombuffer(decompress_stream(codec, fields[0], plan.elements), np.uint8)
        )
        numbers_N = decode_sequence(fields[0], plan.elements) if codec == "rans" else plain.astype(np.int64)
        if numbers_N.max() > 255:
            raise ArtifactError("the zero points hold values that no sound model has")
        values_N = torch.from_numpy((numbers_N - 128).astype(np.int8))
    else:
        values_N = decode_half_stream(codec, plan, fields)
    return {name: part.clone() for name, part in split_parts(plan, values_N, forms).items()}


def decode_half_stream(codec: str, plan: StreamPlan, fields: Sequence[bytes]) -> Tensor:
    """Decodes fp16 values. Raises ArtifactError for values that are not finite and scales that are too small."""
    if codec == "rans":
        pattern_N = decode_halves(fields[0], plan.elements)
    else:
        planes = [decompress_stream(codec, field, plan.elements) for field in fields]
        high_N, low_N = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in planes)
        pattern_N = high_N << 8 | low_N
    halves_N = pattern_N.view(np.float16)
    if not (np.isfinite(halves_N) & (halves_N >= FP16_TINY if plan.role != "fp16" else True)).all():
        raise ArtifactError(f"the {plan.role} of {plan.label} hold values that no sound model has")
    return torch.from_numpy(halves_N)


def split_parts(plan: StreamPlan, values_N: Tensor, forms: Forms) -> dict[str, Tensor]:
    shapes = [part_shape(plan.role, forms[name]) for name in plan.names]
    pieces = values_N.split([prod(shape) for shape in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(plan.names, pieces, shapes, strict=True)}


def decode_code_stream(codec: str, plan: StreamPlan, field: bytes, forms: Forms, parts: Parts) -> dict[str, Tensor]:
    """Decodes int16 codes_RC by tensor name, not checked against their grids."""
    if codec != "rans":
        symbols_N = np.frombuffer(decompress_stream(codec, field, plan.elements), np.uint8).astype(np.int16)
        flat = split_parts(plan, torch.from_numpy((symbols_N >> 1) ^ -(symbols_N & 1)), forms)
        return {name: by_rows(name, part) for name, part in flat.items()}
    stacks = stacks_of(plan, forms)
    codes = {}
    for names, stack_LRC in zip(stacks, decode_codes(field, specs_of(stacks, forms, parts["scales"])), strict=True):
        for name, code_RC in zip(names, torch.from_numpy(stack_LRC), strict=True):
            zero_SG = parts["zeros"].get(name)
            codes[name] = code_RC if zero_SG is None else code_RC + spread_groups(zero_SG.short(), code_RC.size(1))
    return codes


def specs_of(stacks: list[list[str]], forms: Forms, steps: Mapping[str, Tensor]) -> list[StackSpec]:
    """Returns what the coder knows of each stack in advance.

    The MLP's input matrix, where it is in the same stream, guides its output matrix: a hidden unit that is large in one
    is large in the other.
    """
    specs: list[StackSpec] = []
    for names in stacks:
        form, guide = forms[names[0]], None
        inputs = [name.replace(COLUMN_MAJOR_ENDING, "mlp.fc.weight") for name in names]
        if inputs != names and inputs in stacks[: len(specs)] and forms[inputs[0]].shape[0] == form.shape[1]:
            guide = stacks.index(inputs), np.stack([steps[name].numpy().view(np.uint16)[:, 0] for name in inputs])
        specs.append(StackSpec((len(names), *form.shape), form.trellis, guide))
    return specs


def symbols_of(name: str, codes_RC: Tensor) -> bytes:
    """Returns codes as unsigned bytes, small magnitudes first: 0, -1, 1, -2, ..."""
    codes_N = (codes_RC.T if name.endswith(COLUMN_MAJOR_ENDING) else codes_RC).numpy().reshape(-1).astype(np.int16)
    return ((codes_N << 1) ^ (codes_N >> 15)).astype(np.uint8).tobytes()


def by_rows(name: str, part_RC: Tensor) -> Tensor:
    """Restores a matrix from its symbols, which may lie column by column."""
    return part_RC.view(part_RC.shape[::-1]).T.contiguous() if name.endswith(COLUMN_MAJOR_ENDING) else part_RC


def stacks_of(plan: StreamPlan, forms: Forms) -> list[list[str]]:
    """Groups a codes stream's names by kind, shape and grid."""
    stacks: dict[tuple, list[str]] = {}
    for name in plan.names:
        stacks.setdefault((*kind_and_layer(name)[0], forms[name].shape, forms[name].trellis), []).append(name)
    return list(stacks.values())


def stack_of(names: list[str], entries: QuantizedState) -> np.ndarray:
    """Returns int16 codes_LRC of matrices of one shape, less their zero points."""
    matrices = []
    for name in names:
        entry = entries[name]
        assert isinstance(entry, QuantizedTensor)
        code_RC = entry.codes_RC.short()
        if entry.zero_SG is not None:
            code_RC = code_RC - spread_groups(entry.zero_SG.short(), code_RC.size(1))
        matrices.append(code_RC)
    return torch.stack(matrices).numpy()
