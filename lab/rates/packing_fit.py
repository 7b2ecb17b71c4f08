"""Calibrates weights and fills a limit with them, or finds the smallest artifact that keeps a score."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from golf.artifact.container import pack_artifact, read_artifact
from golf.artifact.fill_limit import (
    COARSEST,
    FINEST,
    FitError,
    FittedArtifact,
    LevelArtifact,
    LevelSearch,
    fill_limit,
)
from golf.artifact.weights import SavedWeights
from golf.config.knobs import ConfigError
from golf.config.quantization import CODECS, QuantConfig
from golf.data.loader import TokenStream
from golf.data.shards import expand_glob
from golf.quant.calibration import LayerStatistics, calibrate, generated_rows, training_rows
from golf.runtime import Runtime
from golf.score.roundtrip import score_artifact
from lab.rates.trained_run import check_calibration_shards, load_float_model, scoring_config

FIRST_TARGET_GUESS, STRIDE = -23.0, 2.0
FINE_ENOUGH = 0.03
"""Octaves of level between the artifact that is returned and one that misses the score: 0.015 bit a weight."""


@dataclass(frozen=True)
class FitRequest:
    """Holds what is asked of a fit."""

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
        """Raises ConfigError for what does not go together."""
        if self.target_bpb is not None and not (self.val and self.tokenizer):
            raise ConfigError("--target-bpb is measured: give --val and --tokenizer too")
        if self.goal_bytes <= 0:
            raise ConfigError(f"the limit leaves {self.goal_bytes:,} bytes for the artifact: raise it")


def measure_weights(saved: SavedWeights, request: FitRequest, runtime: Runtime) -> dict[str, LayerStatistics]:
    """Calibrates on training shards, or on text of the model's own. Raises UserError."""
    model, length = load_float_model(saved, runtime), saved.model.train_seq_len
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
    """Returns the artifact that was asked for, and how it came about. Raises UserError."""
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
            runtime,
        )  # fmt: skip
    else:
        fitted = fit_to_score(saved, statistics, quant, request, runtime, log)
    return fitted, record | {"fit_seconds": time.perf_counter() - started, "fit_actions": fitted.actions}


def fit_to_score(
    saved: SavedWeights, statistics: dict[str, LayerStatistics], quant: QuantConfig, request: FitRequest,
    runtime: Runtime, log: Callable[[str], None],
) -> FittedArtifact:  # fmt: skip
    """Returns the smallest artifact of at most `target_bpb` on the validation shards, in plain rows."""
    score = scoring_config(saved.model, 0, 0, runtime.device.type)
    paths = expand_glob(request.val)

    def score_of(data: bytes) -> float:
        return score_artifact(read_artifact(data), request.tokenizer, paths, score, runtime)[0].val_bpb

    search = LevelSearch(
        saved.state, statistics, quant, saved.model, saved.tokenizer_sha256, log, trellis=True, runtime=runtime
    )
    found = smallest_at_score(search, score_of, request.target_bpb, log)
    data, sizes = pack_artifact(found.stored, saved.model, saved.tokenizer_sha256, quant.codec)
    action = f"water level 2^{found.log_level:.4f} keeps {request.target_bpb:g} bits per byte"
    return FittedArtifact(data, sizes, found.stored, [], [action])


def smallest_at_score(
    search: LevelSearch, score_of: Callable[[bytes], float], target: float, log: Callable[[str], None]
) -> LevelArtifact:
    """Returns the smallest artifact met whose score is at most `target`, `score_of` being measured on its bytes.

    Raises FitError where even the finest level misses it.
    """
    keeps = misses = None
    guess = FIRST_TARGET_GUESS
    while keeps is None or misses is None or misses - keeps > FINE_ENOUGH:
        found = search.at(guess)
        score = score_of(found.data)
        log(f"fit: {len(found.data):,} bytes have {score:.5f} bits per byte, {target:.5f} are wanted")
        keeps, misses = (guess, misses) if score <= target else (keeps, guess)
        if keeps == COARSEST:
            break
        if misses == FINEST:
            raise FitError(
                f"no artifact of these weights has {target:g} bits per byte: the finest, of {len(found.data):,} bytes, "
                f"has {score:.5f}; ask for no less than that"
            )
        if keeps is None or misses is None:
            guess = min(COARSEST, guess + STRIDE) if misses is None else max(FINEST, guess - STRIDE)
        else:
            guess = (keeps + misses) / 2
    return search.at(keeps)
