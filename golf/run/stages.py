"""Implements the stages that runs and studies share: from trained weights to codes and bytes."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from golf.artifact.fill_limit import FittedArtifact, fill_limit, fit_to_limit
from golf.artifact.weights import SavedWeights
from golf.config.config import Config
from golf.data.loader import TokenStream
from golf.quant.calibration import NO_CALIBRATION, calibrate_run
from golf.runtime import Runtime

SETTLING = 0.25
"""Seconds of the cap that calibration leaves for the sums of all ranks."""


def seconds_left(config: Config, train_seconds: float) -> float:
    """Returns the seconds of the wall clock's cap that calibration may take; math.inf without a cap."""
    cap = config.train.max_wallclock_seconds
    return cap - train_seconds - SETTLING if cap else math.inf


def quantize_weights(
    saved: SavedWeights, config: Config, stream: TokenStream, runtime: Runtime, train_seconds: float, room: float,
    calibrating: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[FittedArtifact | None, dict[str, Any]]:  # fmt: skip
    """Returns the artifact of trained weights within `room` bytes (math.inf: no limit), and its calibration's record.

    quantizer=rtn: codes of training's grid, coarser where the artifact would be too large; waterfill: codes that fill
    the limit with the least loss, after calibration on all ranks (within `calibrating`) in what `train_seconds` leaves
    of the cap. The artifact is None on all ranks but the main one. Raises FitError, QuantError.
    """
    given = saved.state, config.quant, config.model, saved.tokenizer_sha256, room, config.run.reserve_bytes
    if config.quant.quantizer == "waterfill":
        with calibrating():
            calibration = calibrate_run(saved.state, config, stream, runtime, seconds_left(config, train_seconds))
        fitted = fill_limit(calibration.statistics, *given, runtime.print, runtime)
        return fitted if runtime.is_main else None, calibration.record
    return fit_to_limit(*given, runtime.print) if runtime.is_main else None, NO_CALIBRATION
