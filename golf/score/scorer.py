"""Scores a token stream in bits per byte. Every figure of the project comes from here.

bits per byte = sum of nats / ln 2 / bytes, over every target of the stream, each scored once (windows.py). Sums are
float64; targets and bytes are whole numbers, exact in float64 up to 2^53.

Letters: B windows of a batch, T tokens of a window, S scored positions (the last S of T), N targets of the stream, W
windows of the stream.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.scoring import ScoreConfig
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.model.layers import ntk_rope_base, rotary_dims
from golf.runtime import Runtime
from golf.score.journal import ScoreJournal, ScoreSums
from golf.score.progress import ScoreProgress
from golf.score.windows import WindowPlan, plan_windows, rank_share

Forward = Callable[[Tensor, Tensor, float | None], Tensor]
"""GPT.token_losses or its compiled form: (ids_BT, targets_BS, rope_base) -> fp32 nats of the last S positions, BS."""


Recorder = Callable[[Tensor, Tensor], None]
"""Callback for scored targets, batch by batch: (numbers of the targets in the stream, their float64 nats). One for
whole distributions gets fp32 nats of every token of the vocabulary in their place."""


CHUNKS = 100
"""Parts in which a rank's scoring is journaled."""


class ScoreError(UserError):
    """Reports a stream or settings that no honest score can be made from."""


@dataclass(frozen=True)
class ScoreSettings:
    """Sets how a stream is cut into windows, and the RoPE base in them."""

    seq_len: int
    stride: int
    batch_seqs: int
    """Windows of one forward pass on one rank."""
    rope_base: float | None = None
    """RoPE base; None: the model's own."""


@dataclass(frozen=True)
class Score:
    """Holds the score of a whole stream, over all ranks."""

    nats: float
    tokens: int
    """Targets scored: all of the stream's."""
    bytes: int
    documents: int
    windows: int
    window_tokens: int
    """Tokens that went through the forward pass: windows times their length."""
    stride: int
    seconds: float
    """Wall clock of the slowest rank, with the journaled seconds of killed processes."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What adaptive scoring says of its parts, by name: `network_bpb` is the score without the mixture with counts."""

    @property
    def val_loss(self) -> float:
        """Returns nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class ScoreJob:
    """Holds one stream on the device, with all that scoring a range of its windows needs."""

    model: nn.Module
    forward: Forward
    settings: ScoreSettings
    plan: WindowPlan
    documents: int
    """Document starts in the stream."""
    tokens_N1: Tensor
    """int32, shape (N + 1,)."""
    bytes_N: Tensor
    """int32 bytes of text that each target stands for."""
    ends_W: Tensor
    first_scored_W: Tensor
    distributions: Recorder | None = None


@dataclass(frozen=True)
class WindowBatch:
    """Holds the input of one forward pass, and marks which of its losses count."""

    ids_BT: Tensor
    targets_BS: Tensor
    index_BS: Tensor
    """Number of each target in the stream."""
    counted_BS: Tensor
    """False for targets that an earlier window scored, and for rows that only fill up the batch."""


def sliding_settings(score: ScoreConfig, model: ModelConfig) -> ScoreSettings:
    """Returns the final evaluation's settings: overlapping windows, NTK-aware RoPE beyond the training length."""
    scaled_base = ntk_rope_base(model.rope_base, score.eval_seq_len, model.train_seq_len, rotary_dims(model))
    rope_base = scaled_base if score.eval_rope == "ntk" else model.rope_base
    return ScoreSettings(score.eval_seq_len, score.eval_stride, score.eval_batch_seqs, rope_base)


def plain_settings(model: ModelConfig, batch_seqs: int) -> ScoreSettings:
    """Returns settings for evaluation in rows of the training length, without overlap."""
    return ScoreSettings(model.train_seq_len, model.train_seq_len, batch_seqs)


def compiled_losses(model: GPT) -> Forward:
    """Returns model.token_losses compiled as one graph of one shape."""
    return torch.compile(model.token_losses, dynamic=False, fullgraph=True)


def score_stream(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    runtime: Runtime,
    *,
    forward: Forward | None = None,
    announce: bool = True,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
    recorder: Recorder | None = None,
    distributions: Recorder | None = None,
) -> Score:
    """Scores every target of `tokens` (N + 1 integers, a document start first) once, over all ranks.

    `forward` replaces `model.token_losses` for the windows that share a shape (pass its compiled form); `announce`
    prints a forecast of the time and progress. Chunks that a started `journal` holds are not scored again; `check` is
    called between chunks, and may raise; a `recorder` gets what this process scores, another whole `distributions`.
    Raises ScoreError.
    """
    started = time.perf_counter()
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    job = replace(job, distributions=distributions)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    progress = ScoreProgress(runtime, len(job.plan), job.plan.length, end - begin) if announce else None
    earlier_seconds = journal.seconds if journal else 0.0
    with evaluation_mode(model):
        local = score_chunks(job, begin, end, progress, journal, check, recorder)
    seconds = time.perf_counter() - started
    total = sum_sums(local, runtime)
    assert total.tokens == len(tokens) - 1, f"{total.tokens} targets scored of {len(tokens) - 1}"
    return Score(
        nats=total.nats,
        tokens=total.tokens,
        bytes=total.bytes,
        documents=job.documents,
        windows=len(job.plan),
        window_tokens=len(job.plan) * job.plan.length,
        stride=job.plan.stride,
        seconds=runtime.max_over_ranks(earlier_seconds + seconds)[0],
    )


def prepare_job(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    device: torch.device,
    forward: Forward | None = None,
) -> ScoreJob:
    """Moves a stream to the device, with its windows and the bytes of its targets. Raises ScoreError."""
    check_settings(settings)
    tokens_N1 = torch.from_numpy(tokens.astype(np.int32)).to(device)
    check_stream(tokens_N1, model.config)
    bytes_N = count_target_bytes(tokens_N1, byte_table.to(device))
    if not bytes_N.any():
        raise ScoreError("the validation stream spells no byte of text: bits per byte are not defined")
    plan = plan_windows(len(bytes_N), settings.seq_len, settings.stride)
    return ScoreJob(
        model=model,
        forward=forward or model.token_losses,
        settings=settings,
        plan=plan,
        documents=int((tokens_N1 == model.config.bos_id).sum()),
        tokens_N1=tokens_N1,
        bytes_N=bytes_N,
        ends_W=torch.from_numpy(plan.ends_W).to(device),
        first_scored_W=torch.from_numpy(plan.first_scored_W).to(device),
    )


def check_settings(settings: ScoreSettings) -> None:
    if settings.batch_seqs < 1 or not 1 <= settings.stride <= settings.seq_len:
        raise ScoreError(
            f"window {settings.seq_len}, stride {settings.stride}, batch {settings.batch_seqs}:"
            " all must be positive, the stride at most the window"
        )


def check_stream(tokens_N1: Tensor, model: ModelConfig) -> None:
    """Raises ScoreError where a score would be meaningless."""
    if len(tokens_N1) < 2:
        raise ScoreError(f"the validation stream has {len(tokens_N1)} tokens: nothing to score, check the shards")
    smallest, largest = (int(bound) for bound in tokens_N1.aminmax())
    if smallest < 0 or largest >= model.vocab_size:
        raise ScoreError(
            f"the validation stream has tokens {smallest} to {largest}, the model a vocabulary of {model.vocab_size}:"
            " the shards were written with another tokenizer"
        )
    first = int(tokens_N1[0])
    if first != model.bos_id:
        raise ScoreError(
            f"the validation stream starts with token {first}, not with a document start ({model.bos_id}):"
            " check that the shards are complete and in order"
        )


def count_target_bytes(tokens_N1: Tensor, byte_table: ByteTable | StreamBytes, piece: int = 1 << 22) -> Tensor:
    """Returns int32 bytes of each target: by position where the stream has a sidecar, else given the token before it.

    A table counts in pieces, so that 62 million tokens don't make gigabytes of int64.
    """
    if isinstance(byte_table, StreamBytes):
        return byte_table.of_targets(len(tokens_N1))
    bytes_N = torch.empty_like(tokens_N1[1:])
    for begin in range(0, len(bytes_N), piece):
        tokens_P1 = tokens_N1[begin : begin + piece + 1].long()
        bytes_N[begin : begin + piece] = byte_table.count(tokens_P1[:-1], tokens_P1[1:])
    return bytes_N


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode and disables gradients within the context, then restores every module's own mode.

    Not inference_mode: its tensors, once cached by a module, can't take part in a later training step.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def chunk_ranges(job: ScoreJob, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Divides windows begin .. end - 1 into about CHUNKS ranges that cut between batches."""
    rows = min(job.settings.batch_seqs, len(job.plan))
    size = rows * max(1, -(-(end - begin) // (rows * CHUNKS)))
    alone = 1 if begin == 0 and job.plan.length > job.plan.stride else 0  # the long first window is a batch of its own
    cuts = [begin, *range(begin + alone + size, end, size), end]
    return ((first, last) for first, last in pairwise(cuts) if first < last)


def score_chunks(
    job: ScoreJob,
    begin: int,
    end: int,
    progress: ScoreProgress | None,
    journal: ScoreJournal | None,
    check: Callable[[], None],
    recorder: Recorder | None,
) -> ScoreSums:
    """Returns the sums of windows begin .. end - 1 on this rank, chunk by chunk, in evaluation_mode."""
    total = ScoreSums()
    for first, last in chunk_ranges(job, begin, end):
        sums, started = journal.sums_of(first, last) if journal else None, time.perf_counter()
        if sums and progress:
            progress.skip(last - first)
        if sums is None:
            sums = score_windows(job, first, last, progress, recorder)
            if journal:
                journal.add(first, last, sums, time.perf_counter() - started)
            check()
        total += sums
    return total


def score_windows(
    job: ScoreJob,
    begin: int,
    end: int,
    progress: ScoreProgress | None = None,
    recorder: Recorder | None = None,
) -> ScoreSums:
    """Returns the sums of windows begin .. end - 1 on this rank alone, in evaluation_mode."""
    assert not any(module.training for module in job.model.modules()), "scoring needs eval mode: evaluation_mode"
    sums_3 = torch.zeros(3, dtype=torch.float64, device=job.tokens_N1.device)
    for first, last, rows, scored in batch_shapes(job, begin, end):
        sums_3 += score_batch(job, gather_windows(job, first, last, rows, scored), recorder)
        if progress:
            progress.advance(last - first)
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


def batch_shapes(job: ScoreJob, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (first window, last window + 1, rows, scored positions) of the passes over windows begin .. end - 1.

    Window 0 scores more than a stride, so it goes alone; all other passes have one shape.
    """
    if begin == 0 < end and job.plan.length > job.plan.stride:
        yield 0, 1, 1, job.plan.length
        begin = 1
    rows = min(job.settings.batch_seqs, len(job.plan))
    for first in range(begin, end, rows):
        yield first, min(first + rows, end), rows, job.plan.stride


def gather_windows(job: ScoreJob, first: int, last: int, rows: int, scored: int) -> WindowBatch:
    """Returns windows first .. last - 1, filled up to `rows` with copies of the last one, which don't count."""
    window_B = torch.arange(first, first + rows, device=job.tokens_N1.device)
    real_B = window_B < last
    window_B = window_B.clamp(max=last - 1)
    end_B = job.ends_W[window_B]
    index_BS = (end_B - scored)[:, None] + torch.arange(scored, device=end_B.device)
    return WindowBatch(
        # unfold is a view: the gather reads each window straight from the stream
        ids_BT=job.tokens_N1[:-1].unfold(0, job.plan.length, 1)[end_B - job.plan.length].long(),
        targets_BS=job.tokens_N1[index_BS + 1].long(),
        index_BS=index_BS,
        counted_BS=(index_BS >= job.first_scored_W[window_B][:, None]) & real_B[:, None],
    )


def score_batch(job: ScoreJob, batch: WindowBatch, recorder: Recorder | None = None) -> Tensor:
    """Returns float64 (nats, targets, bytes) of one forward pass."""
    assert not job.model.training, "the model left eval mode while it was being scored"
    if job.distributions:
        nats_BSV = job.model.token_nats(batch.ids_BT, batch.targets_BS.size(1), job.settings.rope_base)
        job.distributions(batch.index_BS[batch.counted_BS], nats_BSV[batch.counted_BS])
        nats_BS = target_nats(nats_BSV, batch.targets_BS).double()
    else:
        # a compiled forward keeps its one shape: the long first window would make it compile again, for dynamic shapes
        forward = job.forward if batch.targets_BS.size(1) == job.plan.stride else job.model.token_losses
        nats_BS = forward(batch.ids_BT, batch.targets_BS, job.settings.rope_base).double()
    if recorder:
        recorder(batch.index_BS[batch.counted_BS], nats_BS[batch.counted_BS])
    nats = nats_BS.masked_fill(~batch.counted_BS, 0.0).sum()
    byte_count = (job.bytes_N[batch.index_BS] * batch.counted_BS).sum()
    return torch.stack((nats, batch.counted_BS.sum().double(), byte_count.double()))


def target_nats(nats_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Returns nats_BS of the targets."""
    return nats_BSV.gather(-1, targets_BS[..., None]).squeeze(-1)


def sum_sums(local: ScoreSums, runtime: Runtime) -> ScoreSums:
    """Returns the sums over all ranks."""
    values = (local.nats, local.tokens, local.bytes)
    sums_3 = runtime.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=runtime.device))
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


def ntk_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (windows scored with the scaled base, whether it changes a row's nats, the change)."""
    effect = files["reload"]["ntk_effect"]
    return files["score"]["eval_windows"], effect > 0, f"changes a token's nats by up to {effect:.3g}"


register_feature(
    Feature("ntk_rope", lambda config: config.score.eval_rope == "ntk", "set eval_rope=none", in_files=ntk_acts)
)
