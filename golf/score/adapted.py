"""Scores a stream with a network that adapts to each document (golf/score/adapters.py).

Ranks claim documents from one queue as their lanes get free: of 50,000 web documents on eight ranks of four lanes, the
busiest then has 1.1 % more work than the mean, and 3.8 % where they take documents in turn (modelled). Documents know
nothing of each other, so the score does not depend on who claims which.

D documents, N targets of the stream.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf.config.features import Feature, register_feature
from golf.config.scoring import ScoreConfig
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import Runtime
from golf.score.adapters import LaneScorer, document_chunks, lane_steps
from golf.score.journal import ScoreJournal, ScoreSums
from golf.score.progress import ScoreProgress
from golf.score.scorer import Recorder, Score, ScoreSettings, evaluation_mode, prepare_job
from golf.score.windows import stream_documents

TIMED_STEPS = 4
QUEUE = "documents"
"""Key of the number of documents that ranks have claimed."""


class DocumentSums:
    """Keeps the nats of single targets until their documents are whole, and the sums of those that this rank scored."""

    def __init__(self, documents: Sequence[tuple[int, int]], bytes_N: Tensor, recorder: Recorder | None):
        self.documents, self.bytes_N, self.recorder = documents, bytes_N.cpu(), recorder
        self.nats_N = torch.zeros(len(bytes_N), dtype=torch.float64)
        self.counted_N = torch.zeros(len(bytes_N), dtype=torch.bool)
        self.table_D3 = torch.zeros(len(documents), 3, dtype=torch.float64)
        """Nats, targets and bytes."""
        self.seconds = 0.0
        """Of steps that no document in the journal has taken over yet."""

    def resume(self, journal: ScoreJournal | None, runtime: Runtime) -> list[int]:
        """Takes the documents that the journal holds; returns the numbers of those that no rank's does."""
        known = {(row["begin"], row["end"]): row for row in journal.chunks} if journal else {}
        for number, document in enumerate(self.documents):
            if row := known.get(document):
                self.table_D3[number] = torch.tensor([row["nats"], row["tokens"], row["bytes"]], dtype=torch.float64)
        if runtime.store and runtime.is_main:
            runtime.store.set(QUEUE, "0")  # before the others can leave the next line
        targets_D = runtime.sum_over_ranks(self.table_D3[:, 1].clone())
        left = torch.nonzero(targets_D == 0).flatten().tolist()
        if known and self.recorder:  # another rank may claim what this one had begun
            for begin, end in (self.documents[number] for number in left):
                self.recorder(torch.arange(begin, end), torch.zeros(end - begin, dtype=torch.float64))
        return left

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        index_M, nats_M = index_M.cpu(), nats_M.cpu()
        assert not self.counted_N[index_M].any(), "a target was scored twice"
        self.nats_N[index_M], self.counted_N[index_M] = nats_M, True
        if self.recorder:
            self.recorder(index_M, nats_M)

    def close(self, number: int, journal: ScoreJournal | None) -> None:
        """Adds up a document that has ended, and journals its sums."""
        begin, end = self.documents[number]
        assert self.counted_N[begin:end].all(), "a target of a document was left out"
        sums = ScoreSums(self.nats_N[begin:end].sum().item(), end - begin, int(self.bytes_N[begin:end].sum()))
        self.table_D3[number] = torch.tensor([sums.nats, sums.tokens, sums.bytes], dtype=torch.float64)
        if journal:
            journal.add(begin, end, sums, self.seconds)
            self.seconds = 0.0


def score_adapted(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    score: ScoreConfig,
    runtime: Runtime,
    *,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
    recorder: Recorder | None = None,
    distributions: Recorder | None = None,
) -> Score:
    """Scores every target of `tokens` once, over all ranks, as score_stream does, in chunks of `settings.stride`.

    Documents that a started `journal` holds are not scored again; `check` is called after others, and may raise; a
    `recorder` gets what this process scores, another whole `distributions`. Raises ScoreError.
    """
    started, earlier = time.perf_counter(), journal.seconds if journal else 0.0
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    documents = stream_documents(tokens, model.config.bos_id)
    sums, taken = DocumentSums(documents, job.bytes_N, recorder), []
    left = sums.resume(journal, runtime)
    claims = claim_documents(left, runtime, taken)
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score, distributions)
        share = count_steps([documents[number] for number in left], settings, score, runtime)
        progress = ScoreProgress(runtime, share, settings.seq_len * score.adapter_lanes, share)
        for step in lane_steps((documents[number] for number in claims), score.adapter_lanes, settings.stride):
            began = time.perf_counter()
            scorer.step(step, sums.record)
            sums.seconds += time.perf_counter() - began
            progress.advance(progress.done < share)  # a fast rank claims more than its share
            for number in (taken[chunk.document] for chunk in step if chunk and chunk.closes):
                sums.close(number, journal)
                check()
        effect = scorer.effect(documents)
    seconds = time.perf_counter() - started
    nats, targets, byte_count = runtime.sum_over_ranks(sums.table_D3).sum(0).tolist()
    assert targets == len(tokens) - 1, f"{targets:.0f} targets scored of {len(tokens) - 1}"
    most, effect = runtime.max_over_ranks(earlier + seconds, effect)
    chunks = sum(1 for document in documents for _ in document_chunks(0, *document, settings.stride))
    return Score(
        nats=nats, tokens=int(targets), bytes=int(byte_count), documents=job.documents, windows=chunks,
        window_tokens=chunks * settings.seq_len, stride=settings.stride, seconds=most,
        parts={"adapter_effect": effect},
    )  # fmt: skip


def claim_documents(left: Sequence[int], runtime: Runtime, taken: list[int]) -> Iterator[int]:
    """Yields, and adds to `taken`, one after another of the numbers in `left` that no other rank has claimed."""
    alone = itertools.count(1)
    while (claimed := runtime.store.add(QUEUE, 1) if runtime.store else next(alone)) <= len(left):
        taken.append(left[claimed - 1])
        yield taken[-1]


def count_steps(
    documents: Sequence[tuple[int, int]], settings: ScoreSettings, score: ScoreConfig, runtime: Runtime
) -> int:
    """Returns the steps that the busiest rank takes for documents that are claimed, if ranks are equally fast."""
    return sum(1 for _ in lane_steps(documents, score.adapter_lanes * runtime.world_size, settings.stride))


def forecast_adapted(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, _: object,
    score: ScoreConfig,
) -> float:  # fmt: skip
    """Forecasts the slowest rank's seconds of `score_adapted`, from a few steps, whose scores are forgotten."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    documents = stream_documents(tokens, model.config.bos_id)
    steps = count_steps(documents, settings, score, runtime)
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score)
        timed = list(islice(lane_steps(documents, score.adapter_lanes, settings.stride), 1 + TIMED_STEPS))
        for number, step in enumerate(timed):
            if number == 1:
                started = time.perf_counter()
            scorer.step(step, lambda index_M, nats_M: None)
        runtime.synchronize()
    seconds = (time.perf_counter() - started) / (len(timed) - 1) if len(timed) > 1 else 0.0
    return runtime.max_over_ranks(seconds * steps)[0]


def adapters_act(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (windows that learned, whether they change a target's nats, the change)."""
    score = files["score"]
    effect = score["adapter_effect"]
    return score["eval_windows"], effect > 0, f"a step changes a token's nats by up to {effect:.3g}"


register_feature(
    Feature("adapters", lambda config: config.score.adapter_rank > 0, "set adapter_rank=0", in_files=adapters_act)
)
