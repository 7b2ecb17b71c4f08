"""Scores a stream by the mixture of golf/score/counts.py: the network's nats of all targets, then their documents.

With `mixture_successors` it is corrected at last (golf/score/successors.py), for which the network's nats of all tokens
of the vocabulary are kept for each target, rounded to half precision, in 2 V bytes: a float16 array nats_NV stands
where else nats_N do, and the network's distribution is what it says.

The stream is cut at document starts into `mixture_parts` parts of about equal length. Each part begins with empty
counts, and ranks take parts in turn: the score is the same for any number of ranks.

N targets of a stream or of a document, M of them, V tokens of the vocabulary.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
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
from golf.score.successors import compiled_corrections, new_successor_weights
from golf.score.windows import stream_documents

TIMED_TARGETS, TIMED_DISTRIBUTIONS = 20_000, 4_000
TABLE_GROWTH = 3.0
"""Factor on the seconds of the first targets: tables outgrow the processor's caches. Of 119,000 targets it was 1.4."""
MOST_KEPT_BYTES = 8 * 2**30
"""Of distributions for `mixture_successors`."""
CHUNK = 1024
"""Targets whose distributions are in memory in full precision, or travel between ranks, at once."""
DISTRIBUTIONS = ".distributions"
"""Kind of the file that holds them, beside the journal."""
SECONDS_BETWEEN_MARKS = 1.0
"""Least time between two looks at the journal and the interruption."""


class NetworkNats:
    """Collects the network's nats of all targets that this rank scores, and with a `vocabulary` its distributions, in
    files where there is a journal.

    The files are kept up to date by the system: what a killed process had scored is there.
    """

    def __init__(self, targets: int, journal: ScoreJournal | None, vocabulary: int = 0):
        self.path, self.all_path = (journal and journal.path.with_suffix(kind) for kind in (".nats", DISTRIBUTIONS))
        self.nats_N = kept_array(self.path, (targets,), np.float64, journal)
        if vocabulary:
            self.nats_NV = kept_array(self.all_path, (targets, vocabulary), np.float16, journal)

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        """Keeps the nats of targets by their numbers in the stream: a Recorder."""
        self.nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()

    def record_distributions(self, index_M: Tensor, nats_MV: Tensor) -> None:
        """Keeps the nats of all tokens: a Recorder."""
        self.nats_NV[index_M.cpu().numpy()] = nats_MV.half().cpu().numpy()

    def gather_distributions(self, runtime: Runtime) -> np.ndarray:
        """Returns float16 nats_NV of all ranks."""
        if runtime.world_size > 1:
            own_N = np.array(self.nats_N) != 0
            for first in range(0, len(own_N), CHUNK):
                part_MV = self.nats_NV[first : first + CHUNK]
                own_MV = torch.from_numpy(np.where(own_N[first : first + CHUNK, None], part_MV, 0).astype(np.float32))
                part_MV[:] = runtime.sum_over_ranks(own_MV.to(runtime.device)).cpu().numpy()
        return self.nats_NV

    def forget_distributions(self) -> None:
        """Deletes their file."""
        del self.nats_NV
        if self.all_path:
            self.all_path.unlink()

    def gather(self, total: float, runtime: Runtime) -> np.ndarray:
        """Returns nats_N of all ranks. Raises ScoreError where they don't add up to the `total` that was scored."""
        nats_N = runtime.sum_over_ranks(torch.from_numpy(np.array(self.nats_N)).to(runtime.device)).cpu().numpy()
        if not np.isclose(nats_N.sum(), total, rtol=1e-9):
            raise ScoreError(f"{self.path}: not the nats of this scoring: delete it and {self.path.stem}.jsonl")
        return nats_N


def kept_array(path: Path | None, shape: tuple[int, ...], kind: type, journal: ScoreJournal | None) -> np.ndarray:
    """Returns an array that is a file where there is a path: what it holds where the `journal` goes on, else zeros."""
    if path is None:
        return np.zeros(shape, kind)
    with path.open("ab" if journal and journal.chunks else "wb") as file:  # new: zeros, which take no room yet
        file.truncate(math.prod(shape) * np.dtype(kind).itemsize)
    return np.memmap(path, kind, "r+", shape=shape)


def distributions_from(nats_MV: np.ndarray) -> np.ndarray:
    """Returns float64 distributions_MV of which these are the nats, rounded and not quite normalised."""
    distributions_MV = np.exp(-nats_MV.astype(np.float32))
    return distributions_MV / distributions_MV.sum(-1, keepdims=True, dtype=np.float64)


def stream_parts(tokens_N1: np.ndarray, bos_id: int, parts: int) -> list[list[tuple[int, int]]]:
    """Returns the documents of each part: a document belongs where it begins."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for begin, end in stream_documents(tokens_N1, bos_id):
        found[parts * begin // len(tokens_N1)].append((begin, end))
    return found


class CountMixture:
    """Predicts the targets of a part of at most so many targets, document by document, and counts them."""

    def __init__(self, targets: int, vocabulary: int, score: ScoreConfig):
        self.score, self.orders, self.kernels = score, score.mixture_orders, compiled_kernels()
        self.vocabulary, self.weights = vocabulary, new_weights(self.orders, vocabulary)
        self.everything = new_tables(targets, self.orders, vocabulary)
        self.document, self.uncorrected = self.everything, 0.0
        """Nats of all targets so far without the last correction."""
        if score.mixture_successors:
            self.kernels = compiled_corrections()
            self.learned = new_successor_weights(self.orders, vocabulary)

    def open_document(self, targets: int) -> None:
        """Forgets the counts of the last document, and makes room for those of the next."""
        self.document = new_tables(targets, self.orders, self.vocabulary)

    @property
    def counted(self) -> int:
        """Returns the number of targets that were counted. Context 0 is the first that was met: that of order 0."""
        return int(self.everything.total[0])

    def score_targets(self, tokens: np.ndarray, begin: int, network_M: np.ndarray) -> np.ndarray:
        """Returns float64 nats_M of targets begin .. begin + M - 1 of the document, given the network's (or nats_MV);
        counts them.

        `tokens` (int32) begin with the document's start.
        """
        mixed_M, state = np.zeros(len(network_M)), (self.everything, self.document, self.weights)
        if self.score.mixture_successors:
            plain_M, most = np.zeros(len(network_M)), self.score.mixture_successors
            for first in range(0, len(network_M), CHUNK):
                part = slice(first, first + CHUNK)
                self.kernels["score_distributions"](
                    *state, self.learned, most, tokens, begin + first, distributions_from(network_M[part]),
                    mixed_M[part], plain_M[part],
                )  # fmt: skip
            self.uncorrected -= np.log(plain_M).sum()
        else:
            self.kernels["score_targets"](*state, tokens, begin, np.exp(-network_M), mixed_M)
        return -np.log(mixed_M)

    def score_document(self, tokens: np.ndarray, network_N: np.ndarray) -> np.ndarray:
        """Returns float64 nats_N of a whole document's targets, and counts them."""
        self.open_document(len(network_N))
        return self.score_targets(tokens, 0, network_N)


def score_documents(
    tokens_N1: np.ndarray, network_N: np.ndarray, documents: Sequence[tuple[int, int]], model: ModelConfig,
    score: ScoreConfig, mixed_N: np.ndarray, check: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Writes the mixture's nats of the documents of one part to `mixed_N`; calls `check` after each document. Returns
    their sum without the last correction, where there is one."""
    mixture = CountMixture(sum(end - begin for begin, end in documents), model.vocab_size, score)
    for begin, end in documents:
        mixed_N[begin:end] = mixture.score_document(tokens_N1[begin : end + 1], network_N[begin:end])
        check()
    return mixture.uncorrected


def mixed_nats(
    tokens_N1: np.ndarray, network_N: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime,
    check: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Returns float64 nats_N of all targets by the mixture, on every rank, given the network's, and their sum without
    the last correction, where there is one."""
    tokens_N1, mixed_N1 = tokens_N1.astype(np.int32), np.zeros(len(network_N) + 1)
    for documents in stream_parts(tokens_N1, model.bos_id, score.mixture_parts)[runtime.rank :: runtime.world_size]:
        mixed_N1[-1] += score_documents(tokens_N1, network_N, documents, model, score, mixed_N1, check)
    mixed_N1 = runtime.sum_over_ranks(torch.from_numpy(mixed_N1).to(runtime.device)).cpu().numpy()
    return mixed_N1[:-1], float(mixed_N1[-1])


def forecast_mixture(tokens_N1: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime) -> float:
    """Forecasts the slowest rank's seconds of `mix_score`, from the first targets, which are forgotten; compiles.
    Raises ScoreError where numba is missing, or where distributions would take too much room."""
    first_N1, timed, network_N = tokens_N1.astype(np.int32), TIMED_TARGETS, np.ones(TIMED_TARGETS)
    if score.mixture_successors:
        if (kept := 2 * len(tokens_N1) * model.vocab_size) > MOST_KEPT_BYTES:
            advice = "set mixture_successors=0, or score less text"
            raise ScoreError(f"mixture_successors would keep {kept / 2**30:.0f} GiB of distributions: {advice}")
        timed = TIMED_DISTRIBUTIONS
        network_N = np.ones((timed, model.vocab_size), np.float16)
    first_N1 = first_N1[: timed + 1]
    network_N, documents = network_N[: len(first_N1) - 1], stream_documents(first_N1, model.bos_id)
    try:
        for _ in range(2):
            started = time.perf_counter()
            score_documents(first_N1, network_N, documents, model, score, np.zeros(len(network_N)))
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

    network_N, parts = nats.gather(network.nats, runtime), network.parts | {"network_bpb": network.val_bpb}
    if score.mixture_successors:
        network_N = nats.gather_distributions(runtime)
    mixed_N, uncorrected = mixed_nats(tokens_N1, network_N, model, score, runtime, mark)
    words, with_counts = "", replace(network, nats=float(mixed_N.sum()))
    if score.mixture_successors:
        words = f", {with_counts.val_bpb:.4f} corrected at last"
        with_counts = replace(network, nats=uncorrected)
        parts |= {"counts_bpb": with_counts.val_bpb}
        nats.forget_distributions()
    words = mixture_words(network.val_bpb, with_counts.val_bpb) + words
    seconds = runtime.max_over_ranks(time.perf_counter() - started)[0]
    runtime.print(f"mixture: {words}; {network.tokens} targets in {seconds:.1f} s")
    return replace(network, nats=float(mixed_N.sum()), parts=parts, seconds=network.seconds + seconds)


def mixture_words(alone: float, mixed: float) -> str:
    return f"{alone:.4f} bits per byte by the network alone, {mixed:.4f} with counts"


def mixture_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (targets that were mixed, whether the score is another one, both scores)."""
    score = files["score"]
    alone, mixed = score["network_bpb"], score.get("counts_bpb", score["val_bpb"])
    return score["val_tokens"], alone != mixed, mixture_words(alone, mixed)


def successors_act(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (targets that were predicted, whether the correction changes the score, both scores)."""
    score = files["score"]
    before, after = score["counts_bpb"], score["val_bpb"]
    return score["val_tokens"], before != after, f"{before:.4f} bits per byte without it, {after:.4f} with it"


register_feature(Feature("mixture", lambda config: config.score.mixture, "set mixture=0", in_files=mixture_acts))
register_feature(
    Feature(
        "successors", lambda config: config.score.mixture and config.score.mixture_successors > 0,
        "set mixture_successors=0", in_files=successors_act,
    )
)  # fmt: skip
