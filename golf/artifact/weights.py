"""Saves and loads weights.safetensors: fp32 weights as training leaves them, with metadata that packing needs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import check_sha256, check_shapes
from golf.artifact.description import FACTOR_NAMES, all_entries, expected_shapes, model_from_json, quant_from_json
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.quant.grid import PLAIN_PARTS, QuantizedState, QuantizedTensor
from golf.runtime import write_file_atomically

METADATA_ENTRIES = ("model", "quant", "tokenizer_sha256")


@dataclass(frozen=True, eq=False)
class SavedWeights:
    state: dict[str, Tensor]
    model: ModelConfig
    quant: QuantConfig
    tokenizer_sha256: str


def save_weights(
    path: Path, state: Mapping[str, Tensor], model: ModelConfig, quant: QuantConfig, tokenizer_sha256: str
) -> None:
    """Writes weights with their metadata; the file appears at once. Raises ArtifactError, OSError."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected_shapes(model))
    check_sha256(tokenizer_sha256)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    values = (json.dumps(asdict(model)), json.dumps(asdict(quant)), tokenizer_sha256)
    write_file_atomically(path, save(tensors, dict(zip(METADATA_ENTRIES, values, strict=True))))


def load_weights(path: Path) -> SavedWeights:
    """Loads weights and metadata, checked against the model that they name. Raises ArtifactError."""
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
    quant = quant_from_json(load_metadata_json(metadata["quant"]), model)
    check_sha256(metadata["tokenizer_sha256"])
    shapes = expected_shapes(model)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"tensor {name!r} in {path} has NaN or infinite values")
    return SavedWeights({name: state[name].float() for name in shapes}, model, quant, metadata["tokenizer_sha256"])


def save_quantized(path: Path, stored: QuantizedState) -> None:
    """Writes codes, scales and fp16 tensors in their stored form; the file appears at once."""
    tensors, grids = {}, {}
    for name, entry in all_entries(stored).items():
        if isinstance(entry, QuantizedTensor):
            parts = {part: getattr(entry, part) for part in PLAIN_PARTS}
            tensors |= {f"{name}:{part}": tensor.contiguous() for part, tensor in parts.items() if tensor is not None}
            grids[name] = [entry.bits, entry.trellis]
        else:
            tensors[name] = entry.contiguous()
    write_file_atomically(path, save(tensors, {"grids": json.dumps(grids), "names": json.dumps(list(stored))}))


def load_quantized(path: Path) -> QuantizedState:
    """Inverts save_quantized. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            grids, names = (json.loads(file.metadata()[key]) for key in ("grids", "names"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: load_entry(name, tensors, grids) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"cannot read quantized weights from {path}: {error}") from None


def load_entry(name: str, tensors: Mapping[str, Tensor], grids: Mapping[str, list]) -> QuantizedTensor | Tensor:
    """Returns a stored weight with the factors of its correction. Raises KeyError."""
    if name not in grids:
        return tensors[name]
    bits, trellis = grids[name]
    sides = [f"{name}:{side}" for side in FACTOR_NAMES]
    factors = tuple(load_entry(side, tensors, grids) for side in sides) if sides[0] in grids else None
    parts = {part: tensors.get(f"{name}:{part}") for part in PLAIN_PARTS}
    return QuantizedTensor(bits=bits, trellis=trellis, low_rank=factors, **parts)


def load_metadata_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("the metadata of the weights is not JSON") from None
