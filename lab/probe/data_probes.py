"""Probes the legality of what surrounds the scorer: documents of both splits, bytes of text, files and network."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golf.config.knobs import UserError, parse_json
from golf.data.shards import DataError, shard_token_count
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.score.scorer import count_target_bytes
from lab.prepare.text_tokenizer import TextTokenizer, check_byte_counts
from lab.probe.documents import find_shared_documents
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS, Probe

QUICK_TRAINING_TOKENS = 200_000_000
"""Most training tokens whose documents are hashed without being asked to: some seconds."""
QUICK_TEXT_TOKENS = 1 << 18
"""Validation tokens that are decoded without being asked to, up to the end of a document."""
ACCESS_KEYS = ("watched", "validation_opened_before_score", "training_opened_after_calibration")
ACCESS_KEYS += ("network_during_scoring", "violations")


class ProbeError(UserError):
    """Says that the probes can't read a record of a run."""


def probe_disjoint(
    train_paths: Sequence[Path],
    val_paths: Sequence[Path],
    bos_id: int,
    full: bool,
    command: str,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Checks that no validation document is a training one. `command` asks for it in full. Raises ShardError."""
    name, total, done = "disjoint splits", sum(map(shard_token_count, train_paths)), 0
    if total > QUICK_TRAINING_TOKENS and not full:
        return Probe(name, NOT_EXERCISED, f"{total:,} training tokens take minutes to hash: run {command}")

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        advance(done, total)

    found = find_shared_documents(train_paths, val_paths, bos_id, count)
    sets = f"{found.val_documents:,} validation and {found.train_documents:,} training documents"
    if found.shared:
        verb = "is" if found.shared == 1 else "are"
        return Probe(name, FAIL, f"{found.shared:,} of {sets} {verb} in both, first number {found.example}")
    return Probe(name, PASS, f"{sets}, none in both (SHA-256 of their tokens)")


def probe_bytes(
    tokenizer: TextTokenizer,
    tokens_N1: np.ndarray,
    figures: Mapping[str, Any],
    full: bool,
    counter: ByteTable | StreamBytes | None = None,
) -> Probe:
    """Checks that bytes are those of the decoded text, the score's byte count is theirs, and its two losses agree.

    `figures` are val_loss, val_bpb, val_tokens and val_bytes of the run; `counter` is what counts the bytes, by
    default the tokenizer's table.
    """
    name, counter = "bytes of text", counter or ByteTable(tokenizer)
    starts = np.flatnonzero(tokens_N1[QUICK_TEXT_TOKENS:] == tokenizer.bos_id)
    decoded = len(tokens_N1) if full or not len(starts) else QUICK_TEXT_TOKENS + int(starts[0])
    try:
        own = counter.bytes_N[:decoded] if isinstance(counter, StreamBytes) else counter
        text_bytes = check_byte_counts(tokenizer, own, tokens_N1[:decoded])
    except DataError as error:
        return Probe(name, FAIL, str(error))
    counted = int(count_target_bytes(torch.from_numpy(tokens_N1.astype(np.int32)), counter.to("cpu")).sum())
    claimed, val_tokens = figures["val_bytes"], figures["val_tokens"]
    if val_tokens == len(tokens_N1) - 1 and claimed != counted:  # else the score is partial, and C4 says so
        return Probe(name, FAIL, f"the score divides by {claimed:,} bytes, the validation text has {counted:,}")
    by_byte, by_token = figures["val_bpb"] * math.log(2) * claimed, figures["val_loss"] * val_tokens
    if not math.isclose(by_byte, by_token, rel_tol=1e-9):
        return Probe(name, FAIL, f"val_bpb says {by_byte:.3f} nats in all, val_loss {by_token:.3f}")
    detail = f"{text_bytes:,} bytes decoded and counted alike, the score's {claimed:,} are the text's"
    return Probe(name, PASS, f"{detail}, val_bpb and val_loss agree")


def probe_access(path: Path) -> list[Probe]:
    """Judges the data guard and the network by the access.json that the run's processes left. Raises ProbeError."""
    names = ("data guard", "network")
    if not path.is_file():
        return [Probe(name, NOT_EXERCISED, f"the run left no {path.name}") for name in names]
    access = read_run_record(path, ACCESS_KEYS)
    if not access["watched"]:
        return [Probe(name, NOT_EXERCISED, "the run's processes were not watched") for name in names]
    wrongs = [
        ("validation shards were opened before the score stage", access["validation_opened_before_score"]),
        ("training shards were opened after calibration", access["training_opened_after_calibration"]),
        *((str(violation), True) for violation in access["violations"]),
    ]
    found = "; ".join(text for text, happened in wrongs if happened)
    used = access["network_during_scoring"]
    sound = "validation shards opened from the score stage on, training shards until calibration"
    return [
        Probe(names[0], FAIL if found else PASS, found or sound),
        Probe(names[1], FAIL if used else PASS, "used during scoring" if used else "not used during scoring"),
    ]


def read_run_record(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises ProbeError where it is none, or one of `keys` is not in it."""
    try:
        content = parse_json(path.read_bytes(), parse_constant=float)
    except ValueError:
        raise ProbeError(f"{path}: damaged, it holds no JSON: run the stage that wrote it again") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise ProbeError(f"{path}: not a run's record, {', '.join(missing) or 'a JSON object'} is missing")
    return content
