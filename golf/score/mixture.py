"""Scores a stream by the mixture of golf/score/counts.py: the network's nats of all targets, then their documents.

The stream is cut at document starts into `mixture_parts` parts of about equal length. Each part begins with empty
counts, and ranks take parts in turn: the score is the same for any number of ranks.

N targets of a stream or of a document.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.config.features import Feature, register_feature
from golf.config.model import ModelConfig
from golf.config.scoring import ScoreConfig
from golf.runtime import Runtime
from golf.score.counts import compiled_kernels, new_tables, new_weights
from golf.score.journal import ScoreJournal, ScoreSums
from golf.score.scorer import Score, ScoreError
from golf.score.windows import stream_documents

TIMED_TARGETS = 20_000
TABLE_GROWTH = 3.0
"""Factor on the seconds of the first targets: tables outgrow the processor's caches. Of 119,000 targets it was 1.4."""
SECONDS_BETWEEN_MARKS = 1.0
"""Least time between two looks at the journal and the interruption."""


class NetworkNats:
    """Collects the network's nats of all targets that this rank scores, in a file where there is a journal.

    The file is kept up to date by the system: what a killed process had scored is there.
    """

    def __init__(self, targets: int, journal: ScoreJournal | None):
        self.path = journal and journal.path.with_suffix(".nats")
        if self.path is None:
            self.nats_N = np.zeros(targets)
        else:
            with self.path.open("ab" if journal.chunks else "wb") as file:  # new: zeros, which take no room yet
                file.truncate(8 * targets)
            self.nats_N = np.memmap(self.path, np.float64, "r+")

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        """Keeps the nats of targets by their numbers in the stream: a Recorder."""
        self.nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()

    def gather(self, total: float, runtime: Runtime) -> np.ndarray:
        """Returns nats_N of all ranks. Raises ScoreError where they don't add up to the `total` that was scored."""
        nats_N = runtime.sum_over_ranks(torch.from_numpy(np.array(self.nats_N)).to(runtime.device)).cpu().numpy()
        if not np.isclose(nats_N.sum(), total, rtol=1e-9):
            raise ScoreError(f"{self.path}: not the nats of this scoring: delete it and {self.path.stem}.jsonl")
        return nats_N


def stream_parts(tokens_N1: np.ndarray, bos_id: int, parts: int) -> list[list[tuple[int, int]]]:
    """Returns the documents of each part: a document belongs where it begins."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for begin, end in stream_documents(tokens_N1, bos_id):
        found[parts * begin // len(tokens_N1)].append((begin, end))
    return found


class CountMixture:
    """Predicts the targets of a part of at most so many targets, document by document, and counts them."""

    def __init__(self, targets: int, vocabulary: int, score: ScoreConfig):
        self.kernels, self.orders = compiled_kernels(), score.mixture_orders
        self.everything, self.weights = new_tables(targets, self.orders), new_weights(self.orders, vocabulary)
        self.document = self.everything

    def open_document(self, targets: int) -> None:
        """Forgets the counts of the last document, and makes room for those of the next."""
        self.document = new_tables(targets, self.orders)

    @property
    def counted(self) -> int:
        """Returns the number of targets that were counted. Context 0 is the first that was met: that of order 0."""
        return int(self.everything.total[0])

    def score_targets(self, tokens: np.ndarray, begin: int, network_M: np.ndarray) -> np.ndarray:
        """Returns float64 nats_M of targets begin .. begin + M - 1 of the document, given the network's; counts them.

        `tokens` (int32) begin with the document's start.
        """
        mixed_M = np.zeros(len(network_M))
        self.kernels["score_targets"](
            self.everything, self.document, self.weights, tokens, begin, np.exp(-network_M), mixed_M
        )
        return -np.log(mixed_M)

    def score_document(self, tokens: np.ndarray, network_N: np.ndarray) -> np.ndarray:
        """Returns float64 nats_N of a whole document's targets, and counts them."""
        self.open_document(len(network_N))
        return self.score_targets(tokens, 0, network_N)


def score_documents(
    tokens_N1: np.ndarray, network_N: np.ndarray, documents: Sequence[tuple[int, int]], model: ModelConfig,
    score: ScoreConfig, mixed_N: np.ndarray, check: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Writes the mixture's nats of the documents of one part to `mixed_N`; calls `check` after each document."""
    mixture = CountMixture(sum(end - begin for begin, end in documents), model.vocab_size, score)
    for begin, end in documents:
        mixed_N[begin:end] = mixture.score_document(tokens_N1[begin : end + 1], network_N[begin:end])
        check()


def mixed_nats(
    tokens_N1: np.ndarray, network_N: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:  # fmt: skip
    """Returns float64 nats_N of all targets by the mixture, on every rank, given the network's."""
    tokens_N1, mixed_N = tokens_N1.astype(np.int32), np.zeros(len(network_N))
    for documents in stream_parts(tokens_N1, model.bos_id, score.mixture_parts)[runtime.rank :: runtime.world_size]:
        score_documents(tokens_N1, network_N, documents, model, score, mixed_N, check)
    return runtime.sum_over_ranks(torch.from_numpy(mixed_N).to(runtime.device)).cpu().numpy()


def forecast_mixture(tokens_N1: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime) -> float:
    """Forecasts the slowest rank's seconds of `mix_score`, from the first targets, which are forgotten; compiles.
    Raises ScoreError where numba is missing."""
    first_N1 = tokens_N1[: TIMED_TARGETS + 1].astype(np.int32)
    network_N, documents = np.ones(len(first_N1) - 1), stream_documents(first_N1, model.bos_id)
    try:
        for _ in range(2):
            started = time.perf_counter()
            score_documents(first_N1, network_N, documents, model, score, np.zeros_like(network_N))
    except ImportError as error:
        raise ScoreError(f"mixture=1 needs numba ({error}): install requirements.txt, or set mixture=0") from error
    parts = -(-score.mixture_parts // runtime.world_size)
    share = len(tokens_N1) / len(first_N1) * parts / score.mixture_parts
    return runtime.max_over_ranks(TABLE_GROWTH * share * (time.perf_counter() - started))[0]


def mix_score(
    network: Score, nats: NetworkNats, tokens_N1: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime,
    journal: ScoreJournal | None = None, check: Callable[[], None] = lambda: None,
) -> Score:  # fmt: skip
    """Returns the mixture's score of the stream, given that of the network and its nats of single targets.

    A `journal` gets the seconds as they pass; then `check` is called, and may raise. Raises ScoreError.
    """
    started = marked = time.perf_counter()

    def mark() -> None:
        nonlocal marked
        if (seconds := time.perf_counter() - marked) > SECONDS_BETWEEN_MARKS:
            marked += seconds
            if journal:
                journal.add(0, 0, ScoreSums(), seconds)  # no windows: time alone
            check()

    mixed_N = mixed_nats(tokens_N1, nats.gather(network.nats, runtime), model, score, runtime, mark)
    seconds = runtime.max_over_ranks(time.perf_counter() - started)[0]
    mixed = replace(
        network,
        nats=float(mixed_N.sum()),
        parts=network.parts | {"network_bpb": network.val_bpb},
        seconds=network.seconds + seconds,
    )
    words = mixture_words(network.val_bpb, mixed.val_bpb)
    runtime.print(f"mixture: {words}; {network.tokens} targets in {seconds:.1f} s")
    return mixed


def mixture_words(alone: float, mixed: float) -> str:
    return f"{alone:.4f} bits per byte by the network alone, {mixed:.4f} with counts"


def mixture_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (targets that were mixed, whether the score is another one, both scores)."""
    score = files["score"]
    alone, mixed = score["network_bpb"], score["val_bpb"]
    return score["val_tokens"], alone != mixed, mixture_words(alone, mixed)


register_feature(Feature("mixture", lambda config: config.score.mixture, "set mixture=0", in_files=mixture_acts))
