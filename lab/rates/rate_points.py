"""Measures the points of rate curves: one method at one rate, packed into real bytes, read back from them, scored.

Every finished point is a file of its own, named by the hash of all that decides about it: method, rate, weights,
calibration rows, validation tokens, windows, device and code. A point that is there is never measured again.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from golf.artifact.container import pack_artifact, read_artifact
from golf.config.config import Config
from golf.config.knobs import parse_json
from golf.config.model import ModelConfig
from golf.config.quantization import CODECS
from golf.config.scoring import ScoreConfig
from golf.quant.grid import QuantizedState, dequantize_state
from golf.runtime import Runtime, write_file_atomically
from golf.score.roundtrip import score_artifact, stream_identity
from golf.score.scorer import score_stream, sliding_settings
from lab.bundle.parts import code_sha256
from lab.machine.fingerprint import machine_fingerprint
from lab.rates.rate_difference import RateError
from lab.rates.trained_run import TrainedRun, load_float_model

UNQUANTIZED = "unquantized"
MACHINE_KEYS = ("machine_id", "cpu", "cpu_cores", "gpus", "torch", "torch_threads", "python", "platform", "codecs")


@dataclass(frozen=True)
class RateMethod:
    """A way from weights to stored weights at a rate: a number that it understands, more of it being more bytes."""

    name: str
    text: str
    codec: CODECS
    rates: tuple[float, ...]
    encode: Callable[[Any, float], QuantizedState]


@dataclass(frozen=True)
class RatePoint:
    method: str
    rate: float
    """The dial; 0 for the unquantized weights."""
    codec: str
    bytes: int
    """Of the artifact; of the weights' file for the unquantized."""
    bits_per_weight: float
    val_bpb: float
    val_loss: float
    """Nats per token."""
    quantize_seconds: float
    encode_seconds: float
    """Packing, which reads its bytes back to compare."""
    decode_seconds: float
    score_seconds: float
    """Of the point that has the same weights and was scored first, where there is one."""
    artifact_sha256: str
    state_sha256: str
    """Of the fp32 weights that the artifact gave back."""
    machine_id: str


@dataclass(frozen=True)
class RateSubject:
    """Holds what all points of one comparison have in common; they are the same where its identity is."""

    weights_sha256: str
    tokenizer_sha256: str
    val_data_id: str
    calibration_id: str
    """Of the rows' tokens."""
    windows: Mapping[str, Any]
    device: str
    code_sha256: str

    def key(self, method: str, rate: float) -> str:
        """Returns 32 hex digits; the unquantized weights don't depend on the calibration."""
        subject = asdict(self) | ({"calibration_id": ""} if method == UNQUANTIZED else {})
        text = json.dumps([subject, method, repr(float(rate))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def scoring_code_sha256(root: Path) -> str:
    """Returns a hash over the files that quantize, pack and score; `root` is the repository."""
    return code_sha256(root, "lab/rates/rate_points.py", "lab/rates/methods.py")


def rate_subject(run: TrainedRun, rows_NT: Any, score: ScoreConfig, runtime: Runtime, root: Path) -> RateSubject:
    """Returns the subject of a run's comparison; `rows_NT` are the calibration rows."""
    windows = {"seq_len": score.eval_seq_len, "stride": score.eval_stride, "rope": score.eval_rope}
    return RateSubject(
        weights_sha256=run.weights_sha256,
        tokenizer_sha256=run.saved.tokenizer_sha256,
        val_data_id=run.val_data_id,
        calibration_id=stream_identity(rows_NT.numpy()),
        windows=windows,
        device=runtime.device.type,
        code_sha256=scoring_code_sha256(root),
    )


class PointStore:
    """Finished points in a folder, a file each."""

    def __init__(self, folder: Path, subject: RateSubject):
        self.folder, self.subject = folder, subject
        self.by_state: dict[str, RatePoint] = {}
        """The points of this process by the weights that were scored."""

    def path(self, method: str, rate: float) -> Path:
        return self.folder / f"{self.subject.key(method, rate)}.json"

    def load(self, method: str, rate: float) -> RatePoint | None:
        """Returns the point, if it has been measured. Raises RateError for a damaged file."""
        path = self.path(method, rate)
        point = read_rate_point(path) if path.is_file() else None
        if point:
            self.by_state.setdefault(point.state_sha256, point)
        return point

    def save(self, point: RatePoint) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file_atomically(self.path(point.method, point.rate), json.dumps(asdict(point), indent=1) + "\n")
        self.by_state.setdefault(point.state_sha256, point)


def read_rate_point(path: Path) -> RatePoint:
    """Raises RateError."""
    try:
        values = parse_json(path.read_bytes(), parse_constant=float)
        if not isinstance(values, dict) or values.keys() != {field.name for field in fields(RatePoint)}:
            raise ValueError
        point = RatePoint(**values)
        if not (point.bytes > 0 and math.isfinite(point.val_bpb)):
            raise ValueError
    except (ValueError, TypeError):
        raise RateError(f"{path}: damaged, it is no point of a curve: remove it, and it is measured again") from None
    return point


def measure_unquantized(run: TrainedRun, score: ScoreConfig, runtime: Runtime, machine_id: str) -> RatePoint:
    """Measures the score of the weights as training left them, by the scorer and in the windows of all points."""
    saved = run.saved
    model = load_float_model(saved, runtime)
    settings = sliding_settings(score, saved.model)
    found = score_stream(model, run.tokens_N, run.counter, settings, runtime, announce=False)
    size = run.weights_path.stat().st_size
    bits = 8 * size / sum(tensor.numel() for tensor in saved.state.values())
    return RatePoint(
        UNQUANTIZED, 0.0, "none", size, bits, found.val_bpb, found.val_loss, 0.0, 0.0, 0.0, found.seconds,
        run.weights_sha256, hash_state(saved.state), machine_id,
    )  # fmt: skip


def measure_rate_point(
    method: RateMethod,
    rate: float,
    given: Any,
    run: TrainedRun,
    score: ScoreConfig,
    runtime: Runtime,
    machine_id: str,
    scored: Mapping[str, RatePoint],
) -> RatePoint:
    """Quantizes `given` by a method at a rate, packs it, reads the bytes back and scores what they hold.

    Weights that a point of `scored` (by their hash) has been scored with, to the bit, have its score. Raises UserError.
    """
    saved, clock = run.saved, [time.perf_counter()]
    stored = method.encode(given, rate)
    clock.append(time.perf_counter())
    data, sizes = pack_artifact(stored, saved.model, saved.tokenizer_sha256, method.codec)
    clock.append(time.perf_counter())
    artifact = read_artifact(data)
    state_sha256 = hash_state(dequantize_state(artifact.state))
    clock.append(time.perf_counter())
    twin = scored.get(state_sha256)
    if twin:
        val_bpb, val_loss, seconds = twin.val_bpb, twin.val_loss, twin.score_seconds
    else:
        found, val_data_id = score_artifact(artifact, run.tokenizer_path, run.val_paths, score, runtime)
        assert val_data_id == run.val_data_id, "the validation shards changed while they were scored"
        val_bpb, val_loss, seconds = found.val_bpb, found.val_loss, found.seconds
    if not math.isfinite(val_bpb):
        raise RateError(f"{method.name} at rate {rate:g}: the model gives a token NaN or infinite nats")
    own = [after - before for before, after in zip(clock[:-1], clock[1:], strict=True)]
    return RatePoint(
        method.name, float(rate), method.codec, len(data), sizes.bits_per_weight, val_bpb, val_loss, *own, seconds,
        artifact.sha256, state_sha256, machine_id,
    )  # fmt: skip


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Returns SHA-256 over names and fp32 values."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_machine(runtime: Runtime, folder: Path, model: ModelConfig, score: ScoreConfig) -> dict[str, Any]:
    """Returns what of the machine a reader of times and bytes asks for."""
    found = machine_fingerprint(runtime, os.environ, folder, Config(model=model, score=score))
    return {key: found[key] for key in MACHINE_KEYS}
