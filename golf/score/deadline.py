"""Chooses a stride that can be scored in time, before scoring starts, by timing batches and discarding them."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import Runtime
from golf.score.scorer import Forward, ScoreSettings, evaluation_mode, prepare_job, score_windows
from golf.score.windows import rank_share

TIMED_BATCHES = 3
MARGIN = 1.05
"""Factor on the forecast, because a few batches are timed and not all."""


def forecast_seconds(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, forward: Forward
) -> float:
    """Forecasts the slowest rank's seconds for scoring `tokens`, from batches of its own share; keeps no score."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    first = min(begin + 1, end)  # skips the long first window
    last = min(first + settings.batch_seqs, end)
    with evaluation_mode(model):
        score_windows(job, first, last)  # compiles and warms up
        started = time.perf_counter()
        for _ in range(TIMED_BATCHES):
            score_windows(job, first, last)
    seconds = (time.perf_counter() - started) * (end - begin) / max(TIMED_BATCHES * (last - first), 1)
    return runtime.max_over_ranks(seconds)[0]


def choose_stride(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable,
    settings: ScoreSettings,
    runtime: Runtime,
    forward: Forward,
    max_seconds: float,
    started: float | None = None,
    forecast: Callable[..., float] | None = None,
) -> ScoreSettings:
    """Returns `settings` with the stride doubled until the forecast fits in what is left of `max_seconds`; 0: no limit.

    `started` is the reading of time.perf_counter when the scoring began, if that was not now. `forecast` replaces
    `forecast_seconds`.
    """
    started = time.perf_counter() if started is None else started
    while max_seconds:
        seconds = MARGIN * (forecast or forecast_seconds)(model, tokens, byte_table, settings, runtime, forward)
        left = max_seconds - runtime.max_over_ranks(time.perf_counter() - started)[0]
        if seconds <= left or settings.stride == settings.seq_len:
            break
        wider = min(2 * settings.stride, settings.seq_len)
        runtime.print(f"score:stride {settings.stride} -> {wider}: {seconds:.0f} s forecast, {left:.0f} s left")
        settings = replace(settings, stride=wider)
    return settings
