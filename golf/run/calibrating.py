"""The rows that weights are calibrated on, and the calibration of a run: chosen by the seed, recorded, timed."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.config.config import Config
from golf.data.loader import TokenStream
from golf.quant.activations import quantized_gpt
from golf.quant.calibration import LayerStatistics, calibrate_within, generated_rows
from golf.quant.tensor_classes import QuantError
from golf.runtime import Runtime


@dataclass(frozen=True, eq=False)
class RunCalibration:
    """Statistics of all matrices, and how they came about."""

    statistics: dict[str, LayerStatistics]
    record: dict[str, Any]


SETTLING = 0.25
"""Seconds of the cap that are left for the sums of all ranks."""
NO_CALIBRATION: dict[str, Any] = {"calibration_seconds": 0.0, "calibration_tokens": 0}


def training_rows(stream: TokenStream, tokens: int, length: int, seed: int) -> Tensor:
    """int64 rows_NT of `length` tokens from all over the stream, distinct, in order; the same for a seed.

    Raises QuantError where there is no row.
    """
    rows, whole = tokens // length, len(stream) // length
    if rows < 1 or whole < 1:
        raise QuantError(
            f"no row to calibrate on: {tokens:,} tokens of the training shards' {len(stream):,}, in rows of {length:,}"
        )
    numbers = np.sort(np.random.default_rng(seed).choice(whole, min(rows, whole), replace=False))
    return torch.from_numpy(np.stack([stream.tokens(int(number) * length, length) for number in numbers]))


def calibrate_run(
    state: Mapping[str, Tensor],
    config: Config,
    stream: TokenStream,
    runtime: Runtime,
    seconds: float = math.inf,
    rows: int = 0,
) -> RunCalibration:
    """Calibrate trained weights as the configuration says, all ranks together, within `seconds`: what was trained and
    what is calibrated share one cap. On fewer `rows` for a rehearsal."""
    quant, length, started = config.quant, config.model.train_seq_len, time.perf_counter()
    model = quantized_gpt(config.model, runtime.compute_dtype)
    model.load_state_dict(state)
    model.to(runtime.device)
    tokens = rows * length or quant.calibration_tokens
    if quant.calibration_text == "train":
        rows_NT = training_rows(stream, tokens, length, config.run.seed)
    else:
        rows_NT = generated_rows(model, tokens // length, length, config.run.seed)
    batch_rows = max(1, config.train.micro_batch_tokens // length)
    left = seconds - (time.perf_counter() - started)
    statistics, tokens = calibrate_within(left, model, rows_NT, runtime, batch_rows, config.run.seed)
    record = {
        "calibration_seconds": time.perf_counter() - started,
        "calibration_tokens": tokens,
        "calibration_text": quant.calibration_text,
        "calibration_seed": config.run.seed,
    }
    return RunCalibration(statistics, record)


def seconds_left(config: Config, train_seconds: float) -> float:
    """For calibration, of the wall clock's cap."""
    cap = config.train.max_wallclock_seconds
    return cap - train_seconds - SETTLING if cap else math.inf
