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
"""Tokens that are looked at together; more where a document is longer."""


@dataclass(frozen=True)
class SharedDocuments:
    """Holds what two sets of shards have in common."""

    train_documents: int
    val_documents: int
    shared: int
    """Validation documents that are in the training shards too."""
    example: int | None
    """Number of the first of them in the validation stream."""


def document_blocks(
    paths: Sequence[str | Path], bos_id: int, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[np.ndarray]:
    """Yields the tokens of the shards in blocks of whole documents, uint16 (N,); `advance` is told of tokens read.

    Raises ShardError.
    """
    rest_N = np.empty(0, dtype="<u2")
    for path in paths:
        shard = read_shard(path)
        for begin in range(0, len(shard), BLOCK_TOKENS):
            part_N = shard[begin : begin + BLOCK_TOKENS]
            advance(len(part_N))
            rest_N = np.concatenate([rest_N, part_N])
            starts = np.flatnonzero(rest_N == bos_id)
            if len(starts) and starts[-1] > 0:
                yield rest_N[: starts[-1]]
                rest_N = rest_N[starts[-1] :]
    if len(rest_N):
        yield rest_N


def shard_documents(
    paths: Sequence[str | Path], bos_id: int, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[np.ndarray]:
    """Yields the tokens of each document without its start, in order; those without a token are left out."""
    for block_N in document_blocks(paths, bos_id, advance):
        for part_N in np.split(block_N, np.flatnonzero(block_N == bos_id)):
            tokens_N = part_N[1:] if len(part_N) and part_N[0] == bos_id else part_N
            if len(tokens_N):
                yield tokens_N


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
