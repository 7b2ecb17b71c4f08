"""weights.safetensors: fp32 weights as training leaves them, with what packing needs to know as metadata."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import check_sha256, check_shapes
from golf.artifact.settings import model_from_json, quant_from_json
from golf.artifact.shapes import expected_shapes
from golf.config import ModelConfig, QuantConfig
from golf.quant.stored import PLAIN_PARTS, QuantizedState, QuantizedTensor
from golf.runtime import write_file_atomically

METADATA_ENTRIES = ("model", "quant", "tokenizer_sha256")
FACTORS = ("left", "right")


@dataclass(frozen=True, eq=False)
class SavedWeights:
    state: dict[str, Tensor]
    model: ModelConfig
    quant: QuantConfig
    tokenizer_sha256: str


def save_weights(
    path: Path, state: Mapping[str, Tensor], model: ModelConfig, quant: QuantConfig, tokenizer_sha256: str
) -> None:
    """Write weights with their metadata, the file put in place at once. Raises ArtifactError, OSError."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected_shapes(model))
    check_sha256(tokenizer_sha256)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    values = (json.dumps(asdict(model)), json.dumps(asdict(quant)), tokenizer_sha256)
    write_file_atomically(path, save(tensors, dict(zip(METADATA_ENTRIES, values, strict=True))))


def load_weights(path: Path) -> SavedWeights:
    """Weights and metadata, checked against the model that they name. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read weights from {path}: {error}") from None
    for entry in METADATA_ENTRIES:
        if entry not in metadata:
            raise ArtifactError(f"{path} has no metadata {entry!r}: it was not written by this project's training")
    model = model_from_json(load_metadata_json(metadata["model"]))
    quant = quant_from_json(load_metadata_json(metadata["quant"]))
    check_sha256(metadata["tokenizer_sha256"])
    shapes = expected_shapes(model)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"tensor {name!r} in {path} has NaN or infinite values")
    return SavedWeights({name: state[name].float() for name in shapes}, model, quant, metadata["tokenizer_sha256"])


def stored_parts(name: str, entry: QuantizedTensor | Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a stored weight consists of, by a name of its own."""
    if isinstance(entry, Tensor):
        yield name, entry.contiguous()
        return
    for part in PLAIN_PARTS:
        if (tensor := getattr(entry, part)) is not None:
            yield f"{name}:{part}", tensor.contiguous()
    for side, factor in zip(FACTORS, entry.low_rank or (), strict=False):
        yield from stored_parts(f"{name}:{side}", factor)


def stored_widths(name: str, entry: QuantizedTensor) -> Iterator[tuple[str, int]]:
    """Bits of a stored weight and of the factors of its correction."""
    yield name, entry.bits
    for side, factor in zip(FACTORS, entry.low_rank or (), strict=False):
        yield from stored_widths(f"{name}:{side}", factor)


def stored_from_parts(name: str, parts: Mapping[str, Tensor], bits: Mapping[str, int]) -> QuantizedTensor | Tensor:
    """Inverse of `stored_parts`. Raises KeyError."""
    if name not in bits:
        return parts[name]
    left, right = (f"{name}:{side}" for side in FACTORS)
    factors = (stored_from_parts(left, parts, bits), stored_from_parts(right, parts, bits)) if left in bits else None
    plain = {part: parts.get(f"{name}:{part}") for part in PLAIN_PARTS[2:]}
    return QuantizedTensor(
        parts[f"{name}:codes_RC"], parts[f"{name}:scale_SG"], bits[name], **plain, low_rank=factors
    )  # fmt: skip


def save_quantized(path: Path, stored: QuantizedState) -> None:
    """Write codes, scales and fp16 tensors as they are, the file put in place at once."""
    tensors = {key: part for name, entry in stored.items() for key, part in stored_parts(name, entry)}
    grids = [stored_widths(name, entry) for name, entry in stored.items() if isinstance(entry, QuantizedTensor)]
    bits = dict(pair for grid in grids for pair in grid)
    write_file_atomically(path, save(tensors, {"bits": json.dumps(bits), "names": json.dumps(list(stored))}))


def load_quantized(path: Path) -> QuantizedState:
    """Inverse of save_quantized. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            bits, names = (json.loads(file.metadata()[key]) for key in ("bits", "names"))
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: stored_from_parts(name, parts, bits) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"cannot read quantized weights from {path}: {error}") from None


def load_metadata_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("the metadata of the weights is not JSON") from None
