"""Scores the nats of every single target of a stream, for what compares models target by target.

N targets of a stream (N + 1 tokens), M targets of a batch.
"""

import math

import numpy as np
from torch import Tensor

from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import Runtime
from golf.score.scorer import ScoreSettings, evaluation_mode, prepare_job, score_windows


def first_targets(
    tokens_N1: np.ndarray, counter: ByteTable | StreamBytes, targets: int
) -> tuple[np.ndarray, ByteTable | StreamBytes]:
    """Returns the stream's beginning, and what counts its bytes; 0: all of it."""
    if targets and targets + 1 < len(tokens_N1):
        tokens_N1 = tokens_N1[: targets + 1]
        if isinstance(counter, StreamBytes):  # by position
            counter = StreamBytes(counter.bytes_N[: targets + 1])
    return tokens_N1, counter


def target_nats(
    model: GPT, tokens_N1: np.ndarray, counter: ByteTable | StreamBytes, settings: ScoreSettings, runtime: Runtime
) -> tuple[np.ndarray, int]:
    """Returns (float64 nats_N of every target, bytes of all), by the scorer on this rank."""
    job = prepare_job(model, tokens_N1, counter, settings, runtime.device)
    nats_N = np.full(len(tokens_N1) - 1, np.nan)

    def record(index_M: Tensor, nats_M: Tensor) -> None:
        nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()

    with evaluation_mode(model):
        sums = score_windows(job, 0, len(job.plan), recorder=record)
    assert not np.isnan(nats_N).any() or math.isnan(sums.nats), "the scorer left a target out"
    return nats_N, sums.bytes
