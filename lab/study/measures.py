"""Measures every artifact of a study in one way: its score on the same tokens, its bytes, its codes, the machine.

N targets of a stream (N + 1 tokens), K blocks of targets, R rows and C columns of a matrix.
"""

import math
import platform
import resource
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.artifact.container import coded_bytes, read_artifact, restore_model
from golf.config.config import Config
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import WEIGHT_SITES, activation_sites
from golf.data.shards import find_shards
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.quant.export import quantize_state
from golf.quant.grid import QuantizedState, QuantizedTensor
from golf.quant.tensor_classes import FP16_BITS, SITE_PATHS, bits_of, tensor_class
from golf.runtime import Runtime
from golf.score.roundtrip import load_validation, stream_identity
from golf.score.scorer import sliding_settings
from lab.cost.energy import measured_zero_shares, zero_codes
from lab.machine.fingerprint import cpu_model
from lab.rates.targets import first_targets, target_nats
from lab.study.spec import RunSpec, StudyError

ByteCounter = ByteTable | StreamBytes
MATRIX_CLASSES = ("attn", "mlp", "bigram")
"""Values of tensor_class for matrices of the blocks and the bigram's; the rest of an artifact is tables and vectors."""
MOST_SHOWN_CODES = 16
"""Finer grids have no histogram, only their share of zeros."""


class DivergedError(UserError):
    """The model produces NaN or infinite losses."""


def open_validation(spec: RunSpec, tokenizer_sha256: str) -> tuple[np.ndarray, ByteCounter]:
    """Returns (tokens_N1, what counts their bytes) of the spec's validation data. Raises StudyError for other data."""
    data = spec.config.data
    tokens_N1, counter = load_validation(tokenizer_sha256, data.tokenizer_path, find_shards(data.data_path, "val"))
    found = stream_identity(tokens_N1)
    if found != spec.val_data_id:
        raise StudyError(
            f"{data.data_path}: the validation tokens are not the study's ({found}, not {spec.val_data_id}): "
            "give the data that the study was planned on"
        )
    return first_targets(tokens_N1, counter, spec.val_tokens)


def matrix_bytes(stored: QuantizedState, codec: str) -> int:
    """Returns the bytes of the matrices alone, packed as in an artifact: codes with their scales, or fp16."""
    shapes = {name: getattr(entry, "codes_RC", entry).shape for name, entry in stored.items()}
    matrices = {name: stored[name] for name, shape in shapes.items() if tensor_class(name, shape) in MATRIX_CLASSES}
    return coded_bytes(matrices, codec) if matrices else 0


def measure_artifact(
    data: bytes, stored: QuantizedState, spec: RunSpec, validation: tuple[np.ndarray, ByteCounter], runtime: Runtime
) -> tuple[dict[str, Any], list[float]]:
    """Returns (figures of an artifact, loaded back from its bytes; nats_K of its blocks of train_seq_len targets).

    Raises DivergedError.
    """
    config, artifact = spec.config, read_artifact(data)
    model, (tokens_N1, counter) = restore_model(artifact, runtime), validation
    nats_N, byte_count = target_nats(model, tokens_N1, counter, sliding_settings(config.score, config.model), runtime)
    if not np.isfinite(nats_N).all():
        raise DivergedError("the artifact's model gives a token NaN or infinite nats")
    figures = {
        "val_loss": float(nats_N.mean()),
        "val_bpb": float(nats_N.sum()) / math.log(2) / byte_count,
        "val_tokens": len(nats_N),
        "val_bytes": byte_count,
        "val_data_id": spec.val_data_id,
        "bytes_model": len(data),
        "bytes_matrices": matrix_bytes(stored, config.quant.codec),
        "artifact_sha256": artifact.sha256,
        "weight_bits": weight_site_bits(stored),
        "activation_bits": activation_site_bits(config.model),
        **coverage(stored),
    }
    return figures, np.add.reduceat(nats_N, np.arange(0, len(nats_N), config.model.train_seq_len)).tolist()


def grid_codes(state: Mapping[str, Tensor], quant: QuantConfig) -> dict[str, Tensor]:
    """Returns codes_RC (int8) of every matrix that is exported on a grid, as it would be exported now."""
    coded = {name: tensor for name, tensor in state.items() if bits_of(name, tensor.shape, quant) < FP16_BITS}
    attention = {name: tensor for name, tensor in state.items() if ".attn." in name and tensor.dim() == 2}
    stored = quantize_state(coded | attention, quant) if coded else {}  # those that share a step ask for all of them
    return {name: entry.codes_RC for name in coded if isinstance(entry := stored[name], QuantizedTensor)}


def code_shares(codes_RC: Tensor) -> dict[str, float]:
    """Returns the share of each code by its number; of a fine grid the zeros' alone."""
    values, counts = np.unique(codes_RC.numpy(), return_counts=True)
    if int(values.max()) - int(values.min()) >= MOST_SHOWN_CODES:
        return {"0": float(counts[values == 0].sum() / counts.sum())}
    return {str(int(value)): float(count / counts.sum()) for value, count in zip(values, counts, strict=True)}


class CodeWatch:
    """Records histograms of codes at every look, and the share of codes that changed since the look before."""

    def __init__(self, quant: QuantConfig):
        self.quant = quant
        self.before: dict[str, Tensor] = {}

    def look(self, state: Mapping[str, Tensor], step: int) -> list[dict[str, Any]]:
        """Returns a row for each matrix on a grid."""
        before, self.before = self.before, grid_codes(state, self.quant)
        rows = []
        for name, codes_RC in self.before.items():
            flips = {"flips": float((codes_RC != before[name]).double().mean())} if name in before else {}
            rows.append({"step": step, "matrix": name, "shares": code_shares(codes_RC)} | flips)
        return rows


def current_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def site_of_weight(name: str) -> str | None:
    """Returns q, k, v, o, up, down, embed or head; None for a tensor that is at none of these sites."""
    path = name.removesuffix(".weight").split(".")
    return SITE_PATHS.get(path[0] if len(path) == 1 else ".".join(path[-2:]))


def grid_bits(entry: QuantizedTensor | Tensor) -> float:
    """Returns the information of a code in bits: log2 3 for 2 bits around 0, else the grid's bits; fp16 has 16."""
    if not isinstance(entry, QuantizedTensor):
        return float(FP16_BITS)
    return round(math.log2(3), 2) if entry.bits == 2 and entry.zero_SG is None else float(entry.bits)


def weight_site_bits(stored: QuantizedState) -> dict[str, float]:
    """Returns the bits of each site's weights, the mean over its matrices."""
    found: dict[str | None, list[float]] = {}
    for name, entry in stored.items():
        found.setdefault(site_of_weight(name), []).append(grid_bits(entry))
    return {site: sum(found[site]) / len(found[site]) for site in WEIGHT_SITES if site in found}


def activation_site_bits(model: ModelConfig) -> dict[str, float]:
    """Returns the bits of each activation site that has a quantizer."""
    return {
        site: round(math.log2(quantizer.high - quantizer.low + 1), 2) if quantizer.bits == 2 else float(quantizer.bits)
        for site, quantizer in activation_sites(model).items()
    }


def bits_text(weights: Mapping[str, float], activations: Mapping[str, float]) -> str:
    """Returns such as `W q,k:1.58 o:16 A hidden:8`: sites of equal bits together."""

    def side(letter: str, sites: Mapping[str, float]) -> str:
        by_bits: dict[float, list[str]] = {}
        for site, bits in sites.items():
            by_bits.setdefault(bits, []).append(site)
        return " ".join([letter, *(f"{','.join(names)}:{bits:g}" for bits, names in sorted(by_bits.items()))])

    return side("W", weights) + (f" {side('A', activations)}" if activations else "")


def coverage(stored: QuantizedState) -> dict[str, Any]:
    """Returns parameters, the share of them that is on a grid, and the share of zeros among those, by site too."""
    coded = [entry for entry in stored.values() if isinstance(entry, QuantizedTensor)]
    parameters = sum(getattr(entry, "codes_RC", entry).numel() for entry in stored.values())
    quantized = sum(entry.codes_RC.numel() for entry in coded)
    return {
        "params": parameters,
        "covered": quantized / parameters,
        "zero_fraction": sum(map(zero_codes, coded)) / quantized if quantized else None,
        "zero_shares": measured_zero_shares(stored),
    }


def study_environment(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Returns device and library versions: equal for all runs that may be compared in one table."""
    cuda = runtime.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(runtime.device) if cuda else cpu_model() or "CPU",
        "threads": config.run.threads or torch.get_num_threads(),
        "compile": runtime.compiles,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def peak_mib(runtime: Runtime) -> float:
    """Returns the most memory so far: of the device's allocator on CUDA, else of this process with its libraries."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median_and_tails(seconds: list[float]) -> Mapping[str, float | None]:
    """Returns median, 10th and 90th percentile in ms."""
    names = ("step_ms_p10", "step_ms", "step_ms_p90")
    if not seconds:
        return dict.fromkeys(names)
    return dict(zip(names, (1000 * np.quantile(seconds, [0.1, 0.5, 0.9])).tolist(), strict=True))
