"""What is measured of every artifact of an ablation: its score on the same tokens, its bytes, the machine.

N targets of a stream (N + 1 tokens), K blocks of targets, M targets of a batch.
"""

import math
import platform
import resource
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.artifact.container import coded_bytes, pack_artifact, read_artifact, restore_model
from golf.config.config import Config, UserError
from golf.data.shards import find_shards
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.quant.grid import QuantizedState
from golf.quant.tensor_classes import tensor_class
from golf.run.machine import cpu_model
from golf.runtime import Runtime
from golf.score.roundtrip import load_validation, stream_identity
from golf.score.scorer import sliding_settings
from lab.rates.targets import first_targets, target_nats
from lab.study.codes import activation_site_bits, coverage, weight_site_bits
from lab.study.spec import AblationError, AblationSpec

ByteCounter = ByteTable | StreamBytes
MATRIX_CLASSES = ("attn", "mlp", "bigram")
"""Of tensor_class: the matrices of the blocks, and the bigram's; tables and vectors are the rest of an artifact."""


class DivergedError(UserError):
    """A model that is none."""


def open_validation(spec: AblationSpec, tokenizer_sha256: str) -> tuple[np.ndarray, ByteCounter]:
    """(tokens_N1, what counts their bytes) of the spec's validation data. Raises AblationError where it is another."""
    tokens_N1, counter = load_validation(
        tokenizer_sha256, spec.config.data.tokenizer_path, find_shards(spec.config.data.data_path, "val")
    )
    found = stream_identity(tokens_N1)
    if found != spec.val_data_id:
        raise AblationError(
            f"{spec.config.data.data_path}: the validation tokens are not the study's ({found}, not "
            f"{spec.val_data_id}): give the data that the study was planned on"
        )
    return first_targets(tokens_N1, counter, spec.val_tokens)


def block_sums_of(nats_N: np.ndarray, block_tokens: int) -> list[float]:
    """Nats of every `block_tokens` targets, the last block maybe of fewer."""
    return np.add.reduceat(nats_N, np.arange(0, len(nats_N), block_tokens)).tolist()


def matrix_bytes(stored: QuantizedState, codec: str) -> int:
    """Bytes of the matrices alone, packed as in an artifact: codes with their scales, or fp16."""
    shapes = {
        name: entry.shape if isinstance(entry, Tensor) else entry.codes_RC.shape for name, entry in stored.items()
    }
    matrices = {name: stored[name] for name, shape in shapes.items() if tensor_class(name, shape) in MATRIX_CLASSES}
    return coded_bytes(matrices, codec) if matrices else 0


def measure_artifact(
    data: bytes,
    stored: QuantizedState,
    spec: AblationSpec,
    validation: tuple[np.ndarray, ByteCounter],
    runtime: Runtime,
) -> tuple[dict[str, Any], list[float]]:
    """(figures of an artifact, loaded back from its bytes; nats of its blocks of targets). Raises DivergedError."""
    config, artifact = spec.config, read_artifact(data)
    model, (tokens_N1, counter) = restore_model(artifact, runtime), validation
    nats_N, byte_count = target_nats(model, tokens_N1, counter, sliding_settings(config.score, config.model), runtime)
    if not np.isfinite(nats_N).all():
        raise DivergedError("the artifact's model gives a token NaN or infinite nats")
    loss = float(nats_N.mean())
    figures = {
        "val_loss": loss,
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
    return figures, block_sums_of(nats_N, config.model.train_seq_len)


def pack_for(spec: AblationSpec, stored: QuantizedState, tokenizer_sha256: str) -> bytes:
    return pack_artifact(stored, spec.config.model, tokenizer_sha256, spec.config.quant.codec)[0]


def study_environment(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Device and library versions: equal for all runs that may stand in one table."""
    cuda = runtime.device.type == "cuda"
    name = torch.cuda.get_device_name(runtime.device) if cuda else cpu_model() or "CPU"
    return {
        "device": name,
        "threads": config.run.threads or torch.get_num_threads(),
        "compile": runtime.compiles,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if cuda else None,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def peak_mib(runtime: Runtime) -> float:
    """Most memory so far: of the device's allocator on CUDA, else of this process, Python and torch included."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median_and_tails(seconds: list[float]) -> Mapping[str, float | None]:
    """Median, 10th and 90th percentile in ms."""
    names = ("step_ms_p10", "step_ms", "step_ms_p90")
    if not seconds:
        return dict.fromkeys(names)
    return dict(zip(names, (1000 * np.quantile(seconds, [0.1, 0.5, 0.9])).tolist(), strict=True))
