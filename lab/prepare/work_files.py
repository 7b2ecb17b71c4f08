"""Writes the files that let a preparation go on after a kill: spooled documents, growing shards, its notes.

The documents of a source are spooled to disk, so that they can be taken in another order than they came in; memory
holds a hash and a position of each (about 200 bytes), never the text. Shards grow in place in a folder that nobody
reads before it is whole. The note of how far they are is written after the tokens that it counts have reached the disk;
what a killed process wrote beyond the note is cut off.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf.config.knobs import parse_json
from golf.data.shards import SHARD_HEADER_BYTES, DataError, shard_header
from golf.runtime import write_file_atomically

LEAST_VAL_BYTES = 1000
MOST_DEVIATION = 5
"""How many times more or less text than was asked for may be held out."""
SPOOL_TEXT, SPOOL_INDEX = "spool.text", "spool.json"
STATE_NAME = "state.json"


# ---- which side a document is on ----


def document_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def check_val_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be between 0 and 1")


def check_val_bytes(source: str, val_bytes: int, train_bytes: int, val_fraction: float) -> None:
    """Raises DataError where the held-out text is too little to score on, or far from the share that was asked for.

    `val_fraction` is 0 where no share was.
    """
    total = val_bytes + train_bytes
    advice = "give more text, or prepare it with another --val-fraction"
    if val_bytes < LEAST_VAL_BYTES:
        raise DataError(
            f"{source}: the validation part has {val_bytes:,} of {total:,} bytes of text, a score takes "
            f"{LEAST_VAL_BYTES:,} at least: {advice}"
        )
    if val_fraction and not val_fraction / MOST_DEVIATION <= val_bytes / total <= val_fraction * MOST_DEVIATION:
        raise DataError(
            f"{source}: the validation part has {val_bytes:,} of {total:,} bytes of text ({val_bytes / total:.1%}), "
            f"{val_fraction:.1%} were asked for: its documents are too few or too unequal to split; {advice}"
        )


def is_held_out(digest: bytes, val_fraction: float) -> bool:
    """Says whether the document with this hash is on the validation side, which depends on its text alone."""
    return int.from_bytes(digest[:8], "big") < int(val_fraction * 2**64)


def split_digests(digests: Sequence[bytes], val_fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Returns the numbers of the training and the validation documents, in their orders; of equal ones the first.

    `seed` gives the order of the training documents. Raises DataError when there are too few to split.
    """
    check_val_fraction(val_fraction)
    first: dict[bytes, int] = {}
    for number, digest in enumerate(digests):
        first.setdefault(digest, number)
    if len(first) < 2:
        raise DataError("the corpus is one short document: it takes two, one to train on and one to validate on")
    val_digests = {digest for digest in first if is_held_out(digest, val_fraction)}
    if not val_digests:  # a small corpus: the document that a slightly larger fraction would have taken
        val_digests = {min(first)}
    if len(val_digests) == len(first):
        val_digests.remove(max(first))
    train_digests = [digest for digest in first if digest not in val_digests]
    train_digests.sort(key=lambda digest: hashlib.sha256(b"%d:" % seed + digest).digest())
    return [first[digest] for digest in train_digests], [n for digest, n in first.items() if digest in val_digests]


# ---- the spool ----


@dataclass(frozen=True)
class DocumentSpool:
    """Holds distinct documents in a file, and the two orders to read them in."""

    folder: Path
    duplicates: int

    def spans_D2(self, split: str) -> np.ndarray:
        return np.fromfile(self.folder / f"spool.{split}", dtype="<i8").reshape(-1, 2)

    def text_bytes(self, split: str) -> int:
        return int(np.diff(self.spans_D2(split)).sum())

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of "train" or "val" in that split's order."""
        spans_D2 = self.spans_D2(split)
        with (self.folder / SPOOL_TEXT).open("rb") as file:  # not mapped: its pages would count as our memory
            for begin, end in spans_D2.tolist():
                yield os.pread(file.fileno(), end - begin, begin).decode()


def build_spool(documents: Iterator[str], folder: Path, val_fraction: float, seed: int) -> DocumentSpool:
    """Writes the documents to `folder` and splits them as `split_digests` does. Raises DataError.

    A finished spool in `folder` is to be opened with `open_spool`.
    """
    digests: list[bytes] = []
    ends = array("q", [0])
    with (folder / SPOOL_TEXT).open("wb", buffering=1 << 20) as file:
        for text in documents:
            digests.append(document_digest(text))
            ends.append(ends[-1] + file.write(text.encode()))
    train, val = split_digests(digests, val_fraction, seed)
    for split, numbers in (("train", train), ("val", val)):
        spans = array("q", (position for number in numbers for position in (ends[number], ends[number + 1])))
        (folder / f"spool.{split}").write_bytes(np.array(spans, dtype="<i8").tobytes())
    duplicates = len(digests) - len(train) - len(val)
    write_file_atomically(folder / SPOOL_INDEX, json.dumps({"duplicates": duplicates}))
    return DocumentSpool(folder, duplicates)


def open_spool(folder: Path) -> DocumentSpool:
    """Opens the finished spool in `folder`. Raises DataError."""
    try:
        return DocumentSpool(folder, parse_json((folder / SPOOL_INDEX).read_bytes())["duplicates"])
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder}: the spooled documents are damaged; delete this folder and start again") from None


# ---- shards and notes ----


class GrowingShards:
    """Writes a stream of tokens as the shards `<stem>_%06d.bin` of `shard_tokens` tokens, the last one shorter.

    With `tokens` it goes on behind that many tokens and removes what lies beyond them. Raises DataError where fewer
    are there. Nothing is in order before `close`.
    """

    def __init__(self, folder: Path, stem: str, shard_tokens: int, tokens: int = 0):
        self.folder, self.stem, self.shard_tokens, self.tokens = folder, stem, shard_tokens, tokens
        self.file = None
        index, held = divmod(tokens, shard_tokens)
        for path in sorted(folder.glob(f"{stem}_[0-9][0-9][0-9][0-9][0-9][0-9].bin")):
            if path.name > self.path(index).name or (path == self.path(index) and not held):
                path.unlink()
        whole = [self.path(number) for number in range(index)]
        sizes = [*((path, shard_tokens) for path in whole), *([(self.path(index), held)] if held else [])]
        for path, count in sizes:
            size = path.stat().st_size if path.is_file() else 0
            if size < SHARD_HEADER_BYTES + 2 * count:
                raise DataError(f"{path}: shorter than its preparation noted; delete {folder} and start again")
        if held:
            os.truncate(self.path(index), SHARD_HEADER_BYTES + 2 * held)
            self.file = self.path(index).open("r+b")
            self.file.seek(0, os.SEEK_END)

    def path(self, index: int) -> Path:
        return self.folder / f"{self.stem}_{index:06d}.bin"

    def append(self, tokens: bytes) -> None:
        """Writes tokens given as little-endian uint16."""
        rest = memoryview(tokens)
        while len(rest):
            index, held = divmod(self.tokens, self.shard_tokens)
            if self.file is None:
                self.file = self.path(index).open("wb")
                self.file.write(shard_header(0))
            part = rest[: 2 * (self.shard_tokens - held)]
            self.file.write(part)
            self.tokens += len(part) // 2
            rest = rest[len(part) :]
            if self.tokens % self.shard_tokens == 0:
                self.close()

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Finishes the open shard."""
        if self.file:
            count = (self.tokens - 1) % self.shard_tokens + 1
            self.file.seek(0)
            self.file.write(shard_header(count))
            self.sync()
            self.file.close()
            self.file = None

    @property
    def shards(self) -> int:
        return -(-self.tokens // self.shard_tokens)


def write_state(folder: Path, state: dict) -> None:
    write_file_atomically(folder / STATE_NAME, json.dumps(state))


def read_state(folder: Path, recipe: dict) -> dict | None:
    """Returns what `write_state` noted in `folder`; None unless the same recipe is being prepared there."""
    try:
        state = parse_json((folder / STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("recipe") == recipe else None
