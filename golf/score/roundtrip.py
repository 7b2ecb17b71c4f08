"""Computes the score that counts, from the artifact's bytes, the tokenizer and the validation shards alone."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from golf.artifact.container import Artifact, restore_model
from golf.config.scoring import ScoreConfig
from golf.data.loader import validation_tokens
from golf.data.sidecar import StreamBytes, validation_bytes, without_sidecars
from golf.data.tokenizer import ByteTable, load_tokenizer
from golf.model.gpt import GPT
from golf.quant.qat import load_gpt
from golf.runtime import Runtime
from golf.score.adapted import forecast_adapted, score_adapted
from golf.score.deadline import choose_stride
from golf.score.journal import ScoreJournal
from golf.score.mixture import DISTRIBUTIONS, NetworkNats, forecast_mixture, mix_score
from golf.score.scorer import (
    Forward,
    Score,
    ScoreError,
    ScoreSettings,
    check_settings,
    compiled_losses,
    plain_settings,
    score_stream,
    sliding_settings,
)


def load_artifact_tokenizer(tokenizer_sha256: str, path: str | Path) -> ByteTable:
    """Returns the byte table of the tokenizer with that hash. Raises ScoreError where the file is another one."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != tokenizer_sha256:
        raise ScoreError(
            f"{path}: SHA-256 {tokenizer.sha256[:12]}... is not that of the artifact's tokenizer,"
            f" {tokenizer_sha256[:12]}...: give the tokenizer that made the training shards"
        )
    return ByteTable(tokenizer)


def load_validation(
    tokenizer_sha256: str, tokenizer_path: str | Path, val_paths: Sequence[str | Path]
) -> tuple[np.ndarray, ByteTable | StreamBytes]:
    """Returns the validation shards' tokens, and what counts their bytes. Raises ScoreError where nothing can."""
    table, shards = load_artifact_tokenizer(tokenizer_sha256, tokenizer_path), without_sidecars(val_paths)
    tokens = validation_tokens(shards)
    counter = validation_bytes(table, shards, tokens)
    if isinstance(counter, ByteTable) and not counter.exact:
        raise ScoreError(
            f"{tokenizer_path}: text in CaseOps is scored by the bytes of the original text, and beside the validation"
            " shards are no *_val_bytes_NNNNNN.bin that say them: prepare or download them with the shards"
        )
    return tokens, counter


def stream_identity(tokens: np.ndarray) -> str:
    """Returns 16 hex digits of SHA-256 over a stream of tokens: the identity of validation data."""
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()[:16]


def score_weights(
    state: Mapping[str, Tensor], artifact: Artifact, tokenizer_path: str | Path, val_paths: Sequence[str | Path],
    rows: int, runtime: Runtime,
) -> Score:  # fmt: skip
    """Scores the weights of the artifact's model before quantization, in plain rows."""
    model = load_gpt(artifact.model, state, runtime)
    settings = plain_settings(artifact.model, max(1, rows // runtime.world_size))
    tokens, counter = load_validation(artifact.tokenizer_sha256, tokenizer_path, val_paths)
    return score_stream(model, tokens, counter, settings, runtime, announce=False)


def score_artifact(
    artifact: Artifact,
    tokenizer_path: str | Path,
    val_paths: Sequence[str | Path],
    score: ScoreConfig,
    runtime: Runtime,
    *,
    compiled: bool = False,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Score, str]:
    """Scores the model in `artifact` on the validation shards, over all ranks, with sliding windows.

    With `mixture` the network's probabilities are then mixed with counts. Returns the score and the identity of the
    validation data. A `journal` resumes where a killed process left it; `check` is called between its chunks, and may
    raise. Raises ScoreError for a tokenizer that is not the artifact's, or a stream that can't be scored; DataError for
    files that can't be read.
    """
    started = time.perf_counter()
    tokens, byte_table = load_validation(artifact.tokenizer_sha256, tokenizer_path, val_paths)
    model, settings = restore_model(artifact, runtime), sliding_settings(score, artifact.model)
    check_settings(settings)
    model.keep_rotary(settings.seq_len, settings.rope_base)
    forward = compiled_losses(model) if compiled else model.token_losses
    subject = {
        "artifact": artifact.sha256, "data": stream_identity(tokens), "asked": asdict(settings),
        "rank": runtime.rank, "world_size": runtime.world_size,
    }  # fmt: skip
    if score.adapter_rank:
        subject["adapters"] = [score.adapter_rank, score.adapter_lr, score.adapter_lanes]
    if isinstance(byte_table, StreamBytes):
        subject["bytes"] = stream_identity(byte_table.bytes_N)
    if score.mixture and score.mixture_successors and journal and not journal.path.with_suffix(DISTRIBUTIONS).exists():
        journal.identity = None  # what it says was scored can't be mixed any more
    begun = (journal and journal.identity) or {}
    stride = begun["stride"] if subject.items() <= begun.items() else 0
    largest, smallest = runtime.max_over_ranks(stride, -stride)
    if 0 < largest == -smallest:  # all ranks can resume, with the same windows
        settings = replace(settings, stride=stride)
    else:
        seconds = score.max_eval_seconds
        if score.mixture and seconds:
            seconds = max(1e-9, seconds - forecast_mixture(tokens, artifact.model, score, runtime))
        forecast = partial(forecast_adapted, score=score) if score.adapter_rank else None
        settings = choose_stride(model, tokens, byte_table, settings, runtime, forward, seconds, started, forecast)
    preparing = time.perf_counter() - started
    if journal:
        journal.start(subject | {"stride": settings.stride}, preparing)
    measured = measure(model, tokens, byte_table, settings, score, runtime, forward, journal, check)
    return measured if journal else replace(measured, seconds=measured.seconds + preparing), subject["data"]


def measure(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable | StreamBytes, settings: ScoreSettings, score: ScoreConfig,
    runtime: Runtime, forward: Forward, journal: ScoreJournal | None, check: Callable[[], None],
) -> Score:  # fmt: skip
    """Scores the stream by the network, adapted to each document where that is on; then mixes counts in."""
    recorder = distributions = None
    if score.mixture:
        nats = NetworkNats(len(tokens) - 1, journal, score.mixture_successors and model.config.vocab_size)
        recorder = nats.record
        if score.mixture_successors:
            distributions = nats.record_distributions
    if score.adapter_rank:
        measured = score_adapted(
            model, tokens, byte_table, settings, score, runtime, journal=journal, check=check, recorder=recorder,
            distributions=distributions,
        )  # fmt: skip
    else:
        measured = score_stream(
            model, tokens, byte_table, settings, runtime, forward=forward, journal=journal, check=check,
            recorder=recorder, distributions=distributions,
        )  # fmt: skip
    if score.mixture:
        measured = mix_score(measured, nats, tokens, model.config, score, runtime, journal, check)
    return measured
