"""What `tools/pack_artifact.py --fit` does: calibrate weights, and fill a limit with them or keep a score."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from golf.artifact.container import pack_artifact, read_artifact
from golf.artifact.fill_limit import FittedArtifact, LevelSearch, fill_limit
from golf.artifact.weights import SavedWeights
from golf.config.knobs import ConfigError
from golf.config.quantization import CODECS, QuantConfig
from golf.data.loader import TokenStream
from golf.data.shards import expand_glob
from golf.quant.calibration import LayerStatistics, calibrate, generated_rows, training_rows
from golf.quant.qat import quantized_gpt
from golf.runtime import Runtime
from golf.score.roundtrip import score_artifact
from lab.rates.target_fit import smallest_at_score
from lab.rates.trained_run import check_calibration_shards, scoring_config


@dataclass(frozen=True)
class FitRequest:
    """What is asked of a fit."""

    goal_bytes: int
    """Most bytes of the artifact, reserve taken off."""
    calibration: str
    """Pattern of training shards; empty: text that the model makes up itself."""
    calibration_tokens: int
    seed: int
    codec: CODECS
    target_bpb: float | None = None
    val: str = ""
    tokenizer: Path | None = None

    def check(self) -> None:
        """Raise ConfigError for what does not go together."""
        if self.target_bpb is not None and not (self.val and self.tokenizer):
            raise ConfigError("--target-bpb is measured: give --val and --tokenizer too")
        if self.goal_bytes <= 0:
            raise ConfigError(f"the limit leaves {self.goal_bytes:,} bytes for the artifact: raise it")


def measure_weights(saved: SavedWeights, request: FitRequest, runtime: Runtime) -> dict[str, LayerStatistics]:
    """Calibration on training shards, or on text of the model's own. Raises UserError."""
    model = quantized_gpt(saved.model, runtime.compute_dtype)
    model.load_state_dict(saved.state)
    model.to(runtime.device)
    length = saved.model.train_seq_len
    if request.calibration:
        paths = [Path(path) for path in expand_glob(request.calibration)]
        check_calibration_shards(paths, [Path(path) for path in expand_glob(request.val)] if request.val else [])
        rows_NT = training_rows(TokenStream(paths), request.calibration_tokens, length, request.seed)
    else:
        rows_NT = generated_rows(model, request.calibration_tokens // length, length, request.seed)
    return calibrate(model, rows_NT, runtime, seed=request.seed)


def fit_weights(
    saved: SavedWeights, request: FitRequest, runtime: Runtime, log: Callable[[str], None]
) -> tuple[FittedArtifact, dict[str, Any]]:
    """The artifact that was asked for, and how it came about. Raises UserError."""
    request.check()
    started = time.perf_counter()
    statistics = measure_weights(saved, request, runtime)
    text = request.calibration or "text of the model's own"
    record = {
        "calibration": text, "calibration_tokens": request.calibration_tokens, "calibration_seed": request.seed,
        "calibration_seconds": time.perf_counter() - started,
    }  # fmt: skip
    log(f"fit: calibrated on {request.calibration_tokens:,} tokens of {text}: {record['calibration_seconds']:.1f} s")
    quant = replace(saved.quant, quantizer="waterfill", codec=request.codec, qat_enabled=False, prune_frac=0.0)
    if request.target_bpb is None:
        fitted = fill_limit(
            statistics, saved.state, quant, saved.model, saved.tokenizer_sha256, request.goal_bytes, 0, log,
            runtime.device,
        )  # fmt: skip
    else:
        fitted = fit_to_score(saved, statistics, quant, request, runtime, log)
    return fitted, record | {"fit_seconds": time.perf_counter() - started, "fit_actions": fitted.actions}


def fit_to_score(
    saved: SavedWeights, statistics: dict[str, LayerStatistics], quant: QuantConfig, request: FitRequest,
    runtime: Runtime, log: Callable[[str], None],
) -> FittedArtifact:  # fmt: skip
    """The smallest artifact of at most `target_bpb` on the validation shards, in plain rows."""
    score = scoring_config(saved.model, 0, 0, runtime.device.type)
    paths = expand_glob(request.val)

    def score_of(data: bytes) -> float:
        return score_artifact(read_artifact(data), request.tokenizer, paths, score, runtime)[0].val_bpb

    search = LevelSearch(
        saved.state, statistics, quant, saved.model, saved.tokenizer_sha256, log, trellis=True, device=runtime.device
    )
    found = smallest_at_score(search, score_of, request.target_bpb, log)
    data, sizes = pack_artifact(found.stored, saved.model, saved.tokenizer_sha256, quant.codec)
    action = f"water level 2^{found.log_level:.4f} keeps {request.target_bpb:g} bits per byte"
    return FittedArtifact(data, sizes, found.stored, [], [action])
