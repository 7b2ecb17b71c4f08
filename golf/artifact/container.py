"""Packs and reads the artifact: all that a fresh process needs to rebuild the quantized model, and nothing that runs.

Fields of the frame (frame.py): the description, then those of each stream (layout.py). The description is deflated
JSON: the model's configuration, the tokenizer's SHA-256, the bits of each tensor, and "forms" where a tensor has other
parts than codes and a scale for each row: [form (description.py), numbers of the tensors that have it] for each such
form. Names and shapes follow from the configuration (expected_shapes), so they take no bytes.
"""

import hashlib
import json
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path

import torch

from golf.artifact.codecs import ArtifactError, decode_zlib, encode_zlib
from golf.artifact.description import (
    Form,
    Forms,
    all_entries,
    expected_shapes,
    form_to_json,
    forms_from_json,
    forms_of_entry,
    forms_of_state,
    is_factor,
    join_entry,
    model_from_json,
    model_to_json,
)
from golf.artifact.frame import frame_artifact, read_file_bounded, unframe_artifact
from golf.artifact.layout import Parts, decode_stream, encode_stream, plan_streams
from golf.artifact.sizes import SizeReport, StreamSize, measure_stream
from golf.config.config import FROZEN, preset_config, stores_plain_rows
from golf.config.model import ModelConfig
from golf.model.gpt import GPT
from golf.quant.grid import QuantizedState, QuantizedTensor, dequantize_state, same_stored
from golf.quant.qat import load_gpt
from golf.quant.tensor_classes import FP16_BITS
from golf.runtime import Runtime, write_file_atomically

LARGEST_DESCRIPTION = 2**16
FREE_ELEMENTS = 2**24
ELEMENTS_PER_BYTE = 256
"""Bounds on the weights that a file may declare: FREE_ELEMENTS, and this many more for each of its bytes. So a small
file can't claim huge memory."""
PLAIN_FORM = [1, 1, 0, 0, 0]
"""Form of a tensor that "forms" does not list: a row of scales for each row, one group, nothing else."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """Holds the content of an artifact."""

    model: ModelConfig
    tokenizer_sha256: str
    state: QuantizedState
    codec: str
    sha256: str
    """SHA-256 of the whole file."""
    byte_count: int


def pack_artifact(
    stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str, verify: bool = True
) -> tuple[bytes, SizeReport]:
    """Returns the artifact's bytes, and a report of what they are spent on. The same input gives the same bytes.

    `verify` reads the bytes back and compares; without it, the report has no seconds to decode. Raises ArtifactError
    when the tensors are not those of `model` or the codec's package is missing.
    """
    shapes = expected_shapes(model)
    check_shapes({name: stored_shape(entry) for name, entry in stored.items()}, shapes)
    ordered = {name: stored[name] for name in shapes}
    sizes, fields = encode_streams(ordered, codec)
    description = encode_zlib(describe_artifact(model, tokenizer_sha256, ordered))
    data = frame_artifact(codec, [description, *fields])
    if verify:
        sizes = read_back(data, stored, sizes)
    return data, SizeReport(codec, tuple(sizes), len(data))


def read_back(data: bytes, stored: QuantizedState, sizes: Iterable[StreamSize]) -> list[StreamSize]:
    """Returns the sizes with the seconds that reading takes. Raises ArtifactError unless `data` gives `stored` back."""
    artifact, seconds = unpack_artifact(data)
    if not same_stored_state(artifact.state, stored):
        raise ArtifactError(f"packing failed: what codec {artifact.codec} gave back is not what it was given")
    return [replace(size, decode_seconds=spent) for size, spent in zip(sizes, seconds, strict=True)]


def encode_streams(stored: QuantizedState, codec: str) -> tuple[list[StreamSize], list[bytes]]:
    """Returns the sizes of all streams, and their fields, for tensors that may be any part of a model."""
    forms, entries = forms_of_state(stored), all_entries(stored)
    sizes, fields = [], []
    for plan in plan_streams(forms):
        started = time.perf_counter()
        encoded = encode_stream(codec, plan, entries, forms)
        seconds = time.perf_counter() - started
        sizes.append(measure_stream(plan, entries, sum(map(len, encoded)), seconds))
        fields += encoded
    return sizes, fields


def coded_bytes(stored: QuantizedState, codec: str) -> int:
    """Returns the bytes of all streams of these tensors, which may be any part of a model, without a description."""
    return sum(map(len, encode_streams(stored, codec)[1]))


def write_artifact(
    path: Path, stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> SizeReport:
    """Packs an artifact and puts the file in place at once. Raises ArtifactError, OSError."""
    data, report = pack_artifact(stored, model, tokenizer_sha256, codec)
    write_file_atomically(path, data)
    return report


def read_artifact(source: Path | str | bytes) -> Artifact:
    """Reads an artifact from a file, or from bytes; runs nothing from it. Raises ArtifactError for any unsound
    bytes."""
    if isinstance(source, bytes):
        return parse_artifact(source)
    data = read_file_bounded(Path(source))
    try:
        return parse_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from None


def parse_artifact(data: bytes) -> Artifact:
    return unpack_artifact(data)[0]


def unpack_artifact(data: bytes) -> tuple[Artifact, list[float]]:
    """Returns the artifact in bytes, and the seconds that each of its streams took. Raises ArtifactError."""
    codec, fields = unframe_artifact(data)
    if FROZEN and codec != preset_config("").quant.codec:
        raise ArtifactError(f"the artifact has codec {codec}, for which this script has no code")
    model, tokenizer_sha256, forms = parse_description(fields[0] if fields else b"", len(data))
    state, seconds = decode_streams(fields[1:], forms, codec)
    artifact = Artifact(model, tokenizer_sha256, state, codec, hashlib.sha256(data).hexdigest(), len(data))
    return artifact, seconds


def decode_streams(fields: list[bytes], forms: Forms, codec: str) -> tuple[QuantizedState, list[float]]:
    """Returns the tensors of `forms` from the fields of all streams, and each stream's seconds. Raises
    ArtifactError."""
    plans = plan_streams(forms)
    if len(fields) != sum(plan.fields(codec) for plan in plans):
        raise ArtifactError("the artifact does not have the streams that its model needs")
    remaining = iter(fields)
    planned = [(plan, list(islice(remaining, plan.fields(codec)))) for plan in plans]
    parts: Parts = {role: {} for role in ("codes", "scales", "columns", "zeros", "fp16")}
    seconds = []
    for plan, own in reversed(planned):  # zero points and scales come last, and codes need them
        started = time.perf_counter()
        parts[plan.role] |= decode_stream(codec, plan, own, forms, parts)
        seconds.append(time.perf_counter() - started)
    names = [name for name in forms if not is_factor(name)]
    return {name: join_entry(name, forms, parts) for name in names}, seconds[::-1]


def describe_artifact(model: ModelConfig, tokenizer_sha256: str, stored: QuantizedState) -> bytes:
    check_sha256(tokenizer_sha256)
    bits = [stored_bits(entry) for entry in stored.values()]
    document = {"model": model_to_json(model), "tokenizer": tokenizer_sha256, "bits": bits}
    if not stores_plain_rows() and (exceptions := describe_forms(stored)):
        document["forms"] = exceptions
    return json.dumps(document, separators=(",", ":")).encode()


def describe_forms(stored: QuantizedState) -> list[tuple[list, list[int]]]:
    """Returns (form, numbers of the tensors that have it) for every form but the plain one."""
    exceptions: dict[str, tuple[list, list[int]]] = {}
    for number, (name, entry) in enumerate(stored.items()):
        plain = not isinstance(entry, QuantizedTensor)
        if not plain and (form := form_to_json(name, forms_of_entry(name, entry))) != PLAIN_FORM:
            exceptions.setdefault(json.dumps(form), (form, []))[1].append(number)
    return list(exceptions.values())


def parse_description(deflated: bytes, file_bytes: int) -> tuple[ModelConfig, str, Forms]:
    """Parses (model, tokenizer_sha256, forms by tensor name) from untrusted bytes. Raises ArtifactError."""
    document = load_description(deflated)
    optional = set() if stores_plain_rows() else {"forms"}
    if not isinstance(document, dict) or document.keys() - optional != {"model", "tokenizer", "bits"}:
        raise ArtifactError("the artifact's description does not have the entries of this version")
    model, bits = model_from_json(document["model"]), document["bits"]
    check_sha256(document["tokenizer"])
    shapes = expected_shapes(model)
    elements = sum(map(prod, shapes.values()))
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * file_bytes:
        raise ArtifactError(f"the artifact declares {elements:,} weights, more than {file_bytes:,} bytes can hold")
    if not isinstance(bits, list) or len(bits) != len(shapes):
        raise ArtifactError("the artifact's list of bits is not that of its model's tensors")
    exceptions = {} if stores_plain_rows() else form_exceptions(document.get("forms", []), len(shapes))
    forms: Forms = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if bits[number] == FP16_BITS and number not in exceptions:
            forms[name] = Form(shape, FP16_BITS)
        else:
            forms |= forms_from_json(name, shape, bits[number], exceptions.get(number, PLAIN_FORM))
    return model, document["tokenizer"], forms


def form_exceptions(exceptions: object, tensors: int) -> dict[int, object]:
    """Returns the forms, still as JSON, by a tensor's number. Raises ArtifactError."""
    if not isinstance(exceptions, list):
        raise ArtifactError("the artifact's list of forms is none")
    found: dict[int, object] = {}
    for pair in exceptions:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], list):
            raise ArtifactError("the artifact's list of forms is damaged")
        for number in pair[1]:
            if type(number) is not int or not 0 <= number < tensors or number in found:
                raise ArtifactError("the artifact's list of forms names no tensor, or one twice")
            found[number] = pair[0]
    return found


def load_description(deflated: bytes) -> object:
    """Parses the JSON document in a bounded deflate stream. Raises ArtifactError."""
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
    """Raises ArtifactError, naming the first tensor, unless the tensors are exactly those expected."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ArtifactError(f"tensor {name!r} is missing: the model's configuration calls for it")
        if tuple(shapes[name]) != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(shapes[name])}, its model calls for {shape}")
    for name in shapes:
        if name not in expected:
            raise ArtifactError(f"tensor {name!r} is not one of the model's")


def same_stored_state(one: QuantizedState, other: QuantizedState) -> bool:
    """Returns whether all codes, scales and fp16 values are equal."""
    return one.keys() == other.keys() and all(same_stored(one[name], other[name]) for name in one)


def restore_model(artifact: Artifact, runtime: Runtime) -> GPT:
    """Returns the quantized model on the runtime's device, in eval mode, without fake quantization."""
    return load_gpt(artifact.model, dequantize_state(artifact.state), runtime).eval()
