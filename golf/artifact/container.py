"""The artifact: everything that a fresh process needs to rebuild the quantized model, and nothing that runs.

Fields of the frame (frame.py): the description, then each plane of each stream (layout.py), compressed. The
description is deflated JSON: the model's configuration, the tokenizer's SHA-256 and the bits of each tensor. Names
and shapes follow from the configuration (shapes.py), so they take no bytes.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import torch

from golf.artifact.codecs import ArtifactError, compress_stream, decode_zlib, decompress_stream, encode_zlib
from golf.artifact.frame import frame_artifact, read_file_bounded, unframe_artifact
from golf.artifact.layout import join_streams, plan_streams, split_stream, stream_planes
from golf.artifact.settings import model_from_json, model_to_json
from golf.artifact.shapes import expected_shapes
from golf.artifact.sizes import SizeReport, measure_stream
from golf.config import ModelConfig
from golf.quant.policy import FP16_BITS
from golf.quant.stored import QuantizedState, QuantizedTensor, same_stored
from golf.runtime import write_file_atomically

LARGEST_DESCRIPTION = 2**16
FREE_ELEMENTS = 2**24
ELEMENTS_PER_BYTE = 256
"""A file may declare FREE_ELEMENTS weights, and beyond those so many for each of its bytes: no bomb in a small file."""
STORABLE_BITS = (*range(2, 9), FP16_BITS)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What an artifact holds."""

    model: ModelConfig
    tokenizer_sha256: str
    state: QuantizedState
    codec: str
    sha256: str
    """Of the whole file."""
    byte_count: int


def pack_artifact(
    stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> tuple[bytes, SizeReport]:
    """The artifact's bytes, and what they are spent on. The same input gives the same bytes.

    Raises ArtifactError when the tensors are not those of `model` or the codec's package is missing.
    """
    shapes = expected_shapes(model)
    check_shapes({name: stored_shape(entry) for name, entry in stored.items()}, shapes)
    bits = {name: stored_bits(stored[name]) for name in shapes}
    plans = plan_streams(shapes, bits)
    packed = [[compress_stream(codec, plane) for plane in stream_planes(plan, stored)] for plan in plans]
    description = encode_zlib(describe_artifact(model, tokenizer_sha256, list(bits.values())))
    data = frame_artifact(codec, [description, *(plane for planes in packed for plane in planes)])
    if not same_stored_state(read_artifact(data).state, stored):
        raise ArtifactError(f"packing failed: what codec {codec} gave back is not what it was given")
    sizes = tuple(measure_stream(plan, planes) for plan, planes in zip(plans, packed, strict=True))
    return data, SizeReport(codec, sizes, len(data))


def write_artifact(
    path: Path, stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> SizeReport:
    """Pack, and put the file in place at once. Raises ArtifactError, OSError."""
    data, report = pack_artifact(stored, model, tokenizer_sha256, codec)
    write_file_atomically(path, data)
    return report


def read_artifact(source: Path | str | bytes) -> Artifact:
    """The artifact in a file, or in bytes. Raises ArtifactError, whatever the bytes are; runs nothing from them."""
    if isinstance(source, bytes):
        return parse_artifact(source)
    data = read_file_bounded(Path(source))
    try:
        return parse_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from None


def parse_artifact(data: bytes) -> Artifact:
    codec, fields = unframe_artifact(data)
    model, tokenizer_sha256, bits = parse_description(fields[0] if fields else b"", len(data))
    shapes = expected_shapes(model)
    plans = plan_streams(shapes, bits)
    if len(fields) - 1 != sum(plan.planes for plan in plans):
        raise ArtifactError("the artifact does not have the streams that its model needs")
    remaining = iter(fields[1:])
    parts: dict[str, dict[str, torch.Tensor]] = {"codes": {}, "scales": {}, "fp16": {}}
    for plan in plans:
        planes = [decompress_stream(codec, field, plan.elements) for field in islice(remaining, plan.planes)]
        parts[plan.role] |= split_stream(plan, planes, shapes)
    state = join_streams(parts, shapes, bits)
    return Artifact(model, tokenizer_sha256, state, codec, hashlib.sha256(data).hexdigest(), len(data))


def describe_artifact(model: ModelConfig, tokenizer_sha256: str, bits: list[int]) -> bytes:
    check_sha256(tokenizer_sha256)
    document = {"model": model_to_json(model), "tokenizer": tokenizer_sha256, "bits": bits}
    return json.dumps(document, separators=(",", ":")).encode()


def parse_description(deflated: bytes, file_bytes: int) -> tuple[ModelConfig, str, dict[str, int]]:
    """(model, tokenizer_sha256, bits by tensor name) from untrusted bytes. Raises ArtifactError."""
    document = load_description(deflated)
    if not isinstance(document, dict) or set(document) != {"model", "tokenizer", "bits"}:
        raise ArtifactError("the artifact's description does not have the entries of this version")
    model, bits = model_from_json(document["model"]), document["bits"]
    check_sha256(document["tokenizer"])
    shapes = expected_shapes(model)
    elements = sum(map(prod, shapes.values()))
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * file_bytes:
        raise ArtifactError(f"the artifact declares {elements:,} weights, more than {file_bytes:,} bytes can hold")
    if not isinstance(bits, list) or len(bits) != len(shapes):
        raise ArtifactError("the artifact's list of bits is not that of its model's tensors")
    by_name = dict(zip(shapes, bits, strict=True))
    for name, width in by_name.items():
        if type(width) is not int or width not in STORABLE_BITS or (width != FP16_BITS and len(shapes[name]) != 2):
            raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of bits")
    return model, document["tokenizer"], by_name


def load_description(deflated: bytes) -> object:
    """The JSON document in a bounded deflate stream."""
    try:
        text = decode_zlib(deflated, LARGEST_DESCRIPTION)
        if len(text) > LARGEST_DESCRIPTION:
            raise ArtifactError("the artifact's description is larger than any sound one")
        return json.loads(text)
    except ArtifactError:
        raise
    except (zlib.error, ValueError, RecursionError):
        raise ArtifactError("the artifact's description is damaged") from None


def check_sha256(text: object) -> None:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise ArtifactError("the tokenizer's SHA-256 must be 64 hexadecimal digits")


def stored_shape(entry: QuantizedTensor | torch.Tensor) -> tuple[int, ...]:
    return tuple(entry.codes_RC.shape if isinstance(entry, QuantizedTensor) else entry.shape)


def stored_bits(entry: QuantizedTensor | torch.Tensor) -> int:
    return entry.bits if isinstance(entry, QuantizedTensor) else FP16_BITS


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArtifactError, naming the first tensor, unless the tensors are exactly those expected."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ArtifactError(f"tensor {name!r} is missing: the model's configuration calls for it")
        if tuple(shapes[name]) != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(shapes[name])}, its model calls for {shape}")
    for name in shapes:
        if name not in expected:
            raise ArtifactError(f"tensor {name!r} is not one of the model's")


def same_stored_state(one: QuantizedState, other: QuantizedState) -> bool:
    """Whether all codes, scales and fp16 values are equal."""
    return one.keys() == other.keys() and all(same_stored(one[name], other[name]) for name in one)
