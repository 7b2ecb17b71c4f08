"""Reads the documents of token shards, and finds by their hashes those that are in both splits.

A document is what stands between two document starts, over the borders of shards; its hash is the SHA-256 of its
tokens as little-endian uint16. Memory holds a block of tokens or a longer document, and 32 bytes for each one of
validation.
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
    """Holds what two sets of shards have in common."""

    train_documents: int
    val_documents: int
    shared: int
    """Validation documents that are in the training shards too."""
    example: int | None
    """Number of the first of them in the validation stream."""


def shard_documents(
    paths: Sequence[str | Path], bos_id: int, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, uint16 (N,), in order; those without a token are left out.

    `advance` is told of tokens read. Raises ShardError.
    """
    waiting: list[np.ndarray] = []
    for path in paths:
        shard = read_shard(path)
        for begin in range(0, len(shard), BLOCK_TOKENS):
            block_N = np.array(shard[begin : begin + BLOCK_TOKENS])
            advance(len(block_N))
            first_N, *others = np.split(block_N, np.flatnonzero(block_N == bos_id))
            waiting.append(first_N)
            for part_N in others:  # each begins with a start token, which closes the document before
                if any(map(len, waiting)):
                    yield np.concatenate(waiting)
                waiting = [part_N[1:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def document_hashes(
    paths: Sequence[str | Path], bos_id: int, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[bytes]:
    """Yields the SHA-256 of each document, in order. Raises ShardError."""
    return (hashlib.sha256(tokens_N).digest() for tokens_N in shard_documents(paths, bos_id, advance))


def find_shared_documents(
    train_paths: Sequence[str | Path],
    val_paths: Sequence[str | Path],
    bos_id: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> SharedDocuments:
    """Finds the validation documents that are training documents too, token by token. Raises ShardError."""
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
