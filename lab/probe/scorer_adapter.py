"""Puts the real scorer under probe: the artifact's model, in the windows, batches and forward that made the score.

Letters: N targets of a stream, W windows, K candidate tokens, B windows of a batch, S scored positions of a window,
M targets of an event.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.score.mixture import NetworkNats
from golf.score.scorer import (
    Forward,
    ScoreJob,
    ScoreSettings,
    WindowBatch,
    batch_shapes,
    evaluation_mode,
    gather_windows,
    prepare_job,
    score_batch,
    score_windows,
)
from golf.score.windows import WindowPlan, plan_windows
from lab.probe.probes import FAIL, PASS, Probe, ProbePoints, ScoreEvent, ScoreTrace

CPU_ROWS = 16
"""Most windows of a batch on a CPU, where nothing is compiled and any batch gives the same fp32 losses to 1e-6."""


def probe_stream_tokens(settings: ScoreSettings, device: torch.device) -> int:
    """Returns the length of a stream of the first window and a batch of others, a full one for a compiled forward."""
    windows = min(settings.batch_seqs, CPU_ROWS) if device.type == "cpu" else settings.batch_seqs
    return settings.seq_len + settings.stride * windows + 1


class ArtifactScorer:
    """Scores with `model` as score_windows does; `forward` is the compiled form, where the score was made with one.

    The same shapes as in the run's scoring reach the forward, so a compiled one is probed as it scored.
    """

    isolates_documents = False

    def __init__(self, model: GPT, byte_table: ByteTable, settings: ScoreSettings, forward: Forward | None = None):
        self.model, self.byte_table, self.settings, self.forward = model, byte_table, settings, forward
        self.vocab_size, self.bos_id = model.config.vocab_size, model.config.bos_id
        self.device = next(model.parameters()).device
        self.swept: tuple[tuple[bytes, int, bytes], np.ndarray] | None = None

    def job(self, tokens_N1: np.ndarray) -> ScoreJob:
        return prepare_job(self.model, tokens_N1, self.byte_table, self.settings, self.device, self.forward)

    def trace(self, tokens_N1: np.ndarray) -> ScoreTrace:
        """Scores the stream. Weights that changed meanwhile count as an update with all of its targets."""
        job = self.job(tokens_N1)
        nats_N = np.full(len(tokens_N1) - 1, np.nan)
        events: list[ScoreEvent] = []

        def record(index_M: Tensor, nats_M: Tensor) -> None:
            index = index_M.cpu().numpy()
            nats_N[index] = nats_M.cpu().numpy()
            events.extend(ScoreEvent("score", *span) for span in contiguous_spans(index))

        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with evaluation_mode(self.model):
            score_windows(job, 0, len(job.plan), recorder=record)
        if any(not torch.equal(tensor, before[name]) for name, tensor in self.model.state_dict().items()):
            events.insert(0, ScoreEvent("update", 0, len(nats_N)))
        return ScoreTrace(nats_N, events)

    def distributions(self, tokens_N1: np.ndarray) -> np.ndarray:
        """Returns float16 nats_NV of all tokens of the vocabulary for each target."""
        nats = NetworkNats(len(tokens_N1) - 1, None, self.vocab_size)
        job = replace(self.job(tokens_N1), distributions=nats.record_distributions)
        with evaluation_mode(self.model):
            score_windows(job, 0, len(job.plan), recorder=nats.record)
        return nats.nats_NV

    def log_probabilities(self, tokens_N1: np.ndarray, target: int, candidates_K: np.ndarray) -> np.ndarray:
        """Asks the forward itself: the window that scores the target, once with every candidate as its target."""
        job = self.job(tokens_N1)
        window = int(np.searchsorted(job.plan.ends_W, target, side="right"))
        key = tokens_N1.tobytes(), window, candidates_K.tobytes()
        if self.swept is None or self.swept[0] != key:  # a pass gives the distribution at all scored positions
            self.swept = key, self.sweep(job, window, torch.from_numpy(candidates_K).to(self.device))
        nats_KS = self.swept[1]
        return -nats_KS[:, target - int(job.plan.ends_W[window])]

    def sweep(self, job: ScoreJob, window: int, candidates_K: Tensor) -> np.ndarray:
        """Returns nats_KS of each candidate at each scored position of the window."""
        shapes = batch_shapes(job, 0, len(job.plan))
        rows, scored = next((rows, scored) for first, last, rows, scored in shapes if first <= window < last)
        rows = min(rows, CPU_ROWS, len(candidates_K)) if self.device.type == "cpu" else rows
        copies = gather_windows(job, window, window + 1, rows, scored)
        parts: list[Tensor] = []
        with evaluation_mode(self.model):
            for candidates_B in candidates_K.long().split(rows):
                filled_B = torch.cat([candidates_B, candidates_B[-1:].expand(rows - len(candidates_B))])
                targets_BS = filled_B[:, None].repeat(1, scored)
                batch = WindowBatch(copies.ids_BT, targets_BS, copies.index_BS, torch.ones_like(copies.counted_BS))
                score_batch(job, batch, lambda _, nats_M: parts.append(nats_M.view(rows, scored)))
        return torch.cat(parts)[: len(candidates_K)].cpu().numpy()

    def points(self, targets: int, seed: int, windows: int = 1, samples: int = 16) -> ProbePoints:
        """Chooses cuts inside windows, two of them in the first one; `samples` targets in each of `windows` windows."""
        rng = np.random.default_rng(seed)
        plan = plan_windows(targets, self.settings.seq_len, self.settings.stride)
        later = np.arange(min(1, len(plan) - 1), len(plan))
        cut_windows = [0, 0, *rng.choice(later, 4)]
        cuts = sorted({int(rng.integers(*inner_span(plan, int(window)))) for window in cut_windows})
        chosen: list[int] = []
        for window in np.sort(rng.choice(later, min(windows, len(later)), replace=False)).tolist():
            span = np.arange(plan.first_scored_W[window], plan.ends_W[window])
            chosen += np.sort(rng.choice(span, min(samples, len(span)), replace=False)).tolist()
        return ProbePoints(cuts, chosen)


def inner_span(plan: WindowPlan, window: int) -> tuple[int, int]:
    """Returns the window's scored targets but for the last, which has no later token in its window."""
    first, end = int(plan.first_scored_W[window]), int(plan.ends_W[window])
    return first, max(end - 1, first + 1)


def contiguous_spans(index_M: np.ndarray) -> list[tuple[int, int]]:
    """Returns [begin, end) of each run of consecutive numbers."""
    if not len(index_M):
        return []
    breaks = np.flatnonzero(np.diff(index_M) != 1) + 1
    begins, ends = index_M[[0, *breaks]], index_M[[*(breaks - 1), -1]] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def probe_plan(targets: int, scored: int, settings: ScoreSettings, traced: Probe) -> Probe:
    """Checks C4 for the whole stream, where `traced` found it kept in a part: all windows tile the targets.

    `scored` is the number of targets that the run says were scored.
    """
    plan = plan_windows(targets, settings.seq_len, settings.stride)
    edges_W1 = np.concatenate([[0], plan.ends_W])
    begins_W, ends_W = plan.first_scored_W, edges_W1[1:]
    tiles = np.array_equal(begins_W, edges_W1[:-1]) and edges_W1[-1] == targets and (begins_W < ends_W).all()
    whole = f"{len(plan):,} windows tile the whole stream's {targets:,} targets"
    if traced.verdict == FAIL:
        return traced
    if not (tiles and (plan.starts_W >= 0).all() and (plan.starts_W <= begins_W).all()):
        return Probe(traced.name, FAIL, whole.replace("tile", "do not tile"))
    if scored != targets:
        return Probe(traced.name, FAIL, f"the run says that {scored:,} of the stream's {targets:,} targets were scored")
    return Probe(traced.name, PASS, f"{traced.detail}; {whole}")
