"""Scores a stream with a network that adapts to each document (golf/score/adapters.py).

Ranks take documents in turn. N targets of the stream.
"""

import time
from collections.abc import Callable, Mapping
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
from golf.score.scorer import Recorder, Score, ScoreSettings, evaluation_mode, prepare_job, sum_sums
from golf.score.windows import stream_documents

TIMED_STEPS = 4


class DocumentSums:
    """Keeps the nats of single targets until their documents are whole."""

    def __init__(self, bytes_N: Tensor, recorder: Recorder | None):
        self.nats_N, self.bytes_N = torch.zeros(len(bytes_N), dtype=torch.float64), bytes_N.cpu()
        self.counted_N, self.recorder = torch.zeros(len(bytes_N), dtype=torch.bool), recorder
        self.seconds = 0.0
        """Of steps that no document in the journal has taken over yet."""

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        index_M, nats_M = index_M.cpu(), nats_M.cpu()
        assert not self.counted_N[index_M].any(), "a target was scored twice"
        self.nats_N[index_M], self.counted_N[index_M] = nats_M, True
        if self.recorder:
            self.recorder(index_M, nats_M)

    def close(self, document: tuple[int, int], journal: ScoreJournal | None) -> ScoreSums:
        """Returns the sums of a document that has ended, and journals them."""
        part = slice(*document)
        assert self.counted_N[part].all(), "a target of a document was left out"
        sums = ScoreSums(self.nats_N[part].sum().item(), part.stop - part.start, int(self.bytes_N[part].sum()))
        if journal:
            journal.add(*document, sums, self.seconds)
            self.seconds = 0.0
        return sums


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
) -> Score:
    """Scores every target of `tokens` once, over all ranks, as score_stream does, in chunks of `settings.stride`.

    Documents that a started `journal` holds are not scored again; `check` is called after others, and may raise; a
    `recorder` gets what this process scores. Raises ScoreError.
    """
    started, earlier = time.perf_counter(), journal.seconds if journal else 0.0
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    own = own_documents(tokens, model, runtime)
    known = {document: journal.sums_of(*document) for document in own} if journal else {}
    left = [document for document in own if not known.get(document)]
    steps = list(lane_steps(left, score.adapter_lanes, settings.stride))
    sums = DocumentSums(job.bytes_N, recorder)
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score)
        progress = ScoreProgress(runtime, len(steps), settings.seq_len * score.adapter_lanes, len(steps))
        for step in steps:
            began = time.perf_counter()
            scorer.step(step, sums.record)
            sums.seconds += time.perf_counter() - began
            progress.advance(1)
            for document in (left[chunk.document] for chunk in step if chunk and chunk.closes):
                known[document] = sums.close(document, journal)
                check()
        effect = scorer.effect(own)
    seconds, total = time.perf_counter() - started, sum_sums(sum(known.values(), ScoreSums()), runtime)
    assert total.tokens == len(tokens) - 1, f"{total.tokens} targets scored of {len(tokens) - 1}"
    most, effect = runtime.max_over_ranks(earlier + seconds, effect)
    every = enumerate(stream_documents(tokens, model.config.bos_id))
    chunks = sum(1 for number, document in every for _ in document_chunks(number, *document, settings.stride))
    return Score(
        nats=total.nats, tokens=total.tokens, bytes=total.bytes, documents=job.documents, windows=chunks,
        window_tokens=chunks * settings.seq_len, stride=settings.stride, seconds=most,
        parts={"adapter_effect": effect},
    )  # fmt: skip


def own_documents(tokens: np.ndarray, model: GPT, runtime: Runtime) -> list[tuple[int, int]]:
    """Returns this rank's documents."""
    return stream_documents(tokens, model.config.bos_id)[runtime.rank :: runtime.world_size]


def forecast_adapted(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, _: object,
    score: ScoreConfig,
) -> float:  # fmt: skip
    """Forecasts the slowest rank's seconds of `score_adapted`, from a few steps, whose scores are forgotten."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    own = own_documents(tokens, model, runtime)
    steps = sum(1 for _ in lane_steps(own, score.adapter_lanes, settings.stride))
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score)
        timed = list(islice(lane_steps(own, score.adapter_lanes, settings.stride), 1 + TIMED_STEPS))
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
