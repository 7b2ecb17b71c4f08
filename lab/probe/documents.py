"""Documents of token shards by their hash: whether a text is in both splits.

A document is what stands between two document starts, over the borders of shards; its hash is the SHA-256 of its
tokens as little-endian uint16. Memory is bounded: a block of tokens, and 32 bytes for each validation document.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf.data.shards import read_shard

BLOCK_TOKENS = 1 << 22
"""Tokens that are read at once."""


@dataclass(frozen=True)
class SharedDocuments:
    """What two sets of shards have in common."""

    train_documents: int
    val_documents: int
    shared: int
    """Validation documents that are in the training shards too."""
    example: int | None
    """Number of the first of them in the validation stream."""


def document_hashes(
    paths: Sequence[str | Path], bos_id: int, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[bytes]:
    """SHA-256 of each document, in order; those without a token are left out. `advance` is told of tokens read."""
    digest, length = hashlib.sha256(), 0
    for path in paths:
        shard = read_shard(path)
        for begin in range(0, len(shard), BLOCK_TOKENS):
            block = np.asarray(shard[begin : begin + BLOCK_TOKENS], dtype="<u2")
            advance(len(block))
            starts = np.flatnonzero(block == bos_id)
            for part_begin, part_end in zip([0, *(starts + 1)], [*starts, len(block)], strict=True):
                digest.update(block[part_begin:part_end].tobytes())
                length += part_end - part_begin
                if part_end < len(block):  # a document start closes the one before
                    if length:
                        yield digest.digest()
                    digest, length = hashlib.sha256(), 0
    if length:
        yield digest.digest()


def find_shared_documents(
    train_paths: Sequence[str | Path],
    val_paths: Sequence[str | Path],
    bos_id: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> SharedDocuments:
    """Which validation documents are training documents too, word by word. Raises ShardError."""
    numbers: dict[bytes, list[int]] = {}
    val_documents = train_documents = 0
    for digest in document_hashes(val_paths, bos_id):
        numbers.setdefault(digest, []).append(val_documents)
        val_documents += 1
    shared: list[int] = []
    for digest in document_hashes(train_paths, bos_id, advance):
        train_documents += 1
        shared += numbers.pop(digest, [])
    return SharedDocuments(train_documents, val_documents, len(shared), min(shared, default=None))
