"""Scores a stream by the mixture of golf/score/counts.py: the network's nats of all targets, then their documents.

The stream is cut at document starts into `mixture_parts` parts of about equal length. Each part begins with empty
counts, and ranks take parts in turn: the score is the same for any number of ranks.

N targets of a stream, P parts, M candidates.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from golf.config.features import Feature, register_feature
from golf.config.scoring import ScoreConfig
from golf.runtime import Runtime
from golf.score.counts import MixtureWeights, CountTables, compiled, new_tables, new_weights

TIMED_TARGETS = 20_000
TABLE_GROWTH = 3.0
"""Factor on the seconds of the first targets: tables outgrow the processor's caches. Of 119,000 targets it was 1.4."""


def stream_documents(tokens_N1: np.ndarray, bos_id: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of each document's targets; the next document's start is the last of them."""
    starts = np.flatnonzero(tokens_N1[:-1] == bos_id)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens_N1) - 1], strict=True))


def stream_parts(tokens_N1: np.ndarray, bos_id: int, parts: int) -> list[list[tuple[int, int]]]:
    """Returns the documents of each part: a document belongs where its middle lies."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for begin, end in stream_documents(tokens_N1, bos_id):
        found[parts * (begin + end) // (2 * len(tokens_N1))].append((begin, end))
    return found


class CountMixture:
    """Predicts the targets of one part, document by document, and counts them."""

    def __init__(self, targets: int, vocabulary: int, score: ScoreConfig):
        self.kernels, self.vocabulary, self.score = compiled(), vocabulary, score
        self.everything = new_tables(targets, score.mixture_orders)
        self.weights = new_weights(score.mixture_orders)
        self.document, self.hit = self.everything, 0

    def score_document(self, tokens: np.ndarray, network_N: np.ndarray) -> np.ndarray:
        """Returns float64 nats_N of a document's targets, given the network's; `tokens` (N + 1) begin with its start."""
        self.document, mixed_N = new_tables(len(network_N), self.score.mixture_orders), np.zeros(len(network_N))
        self.hit = self.kernels["score_document"](
            self.everything, self.document, self.weights, tokens, np.exp(-network_N), self.vocabulary,
            self.score.mixture_discount, self.score.mixture_rate, self.hit, mixed_N,
        )  # fmt: skip
        return -np.log(mixed_N)


def mixed_nats(
    tokens_N1: np.ndarray, network_N: np.ndarray, vocabulary: int, bos_id: int, score: ScoreConfig, runtime: Runtime
) -> np.ndarray:
    """Returns float64 nats_N of all targets by the mixture, on every rank, given the network's."""
    tokens_N1, nats_N = tokens_N1.astype(np.int32), np.zeros(len(network_N))
    for documents in stream_parts(tokens_N1, bos_id, score.mixture_parts)[runtime.rank :: runtime.world_size]:
        mixture = CountMixture(sum(end - begin for begin, end in documents), vocabulary, score)
        for begin, end in documents:
            nats_N[begin:end] = mixture.score_document(tokens_N1[begin : end + 1], network_N[begin:end])
    return runtime.sum_over_ranks(torch.from_numpy(nats_N).to(runtime.device)).cpu().numpy()


def forecast_mixture(
    tokens_N1: np.ndarray, vocabulary: int, bos_id: int, score: ScoreConfig, runtime: Runtime
) -> float:
    """Forecasts the slowest rank's seconds of `mixed_nats`, from the first targets, which are forgotten; compiles."""
    tokens_N1 = tokens_N1.astype(np.int32)
    begin, end = stream_documents(tokens_N1[: TIMED_TARGETS + 1], bos_id)[0]
    for _ in range(2):
        started = time.perf_counter()
        CountMixture(end, vocabulary, score).score_document(tokens_N1[: end + 1], np.ones(end))
    parts = -(-score.mixture_parts // runtime.world_size)
    seconds = (time.perf_counter() - started) / end * len(tokens_N1) * parts / score.mixture_parts
    return runtime.max_over_ranks(TABLE_GROWTH * seconds)[0]
