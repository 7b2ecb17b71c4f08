"""Encodes documents on all cores, to the same bytes whatever the number of workers.

Documents are put together to chunks of about CHUNK_CHARACTERS; a chunk is encoded by whichever worker is free, and
chunks are handed on in the order they came. Where a tokenizer's pieces never cross a blank (the competition's
models), words are looked up in a table of those encoded before (word_table.py). That is watched on the way: words
enter the table from texts of many words, whose bytes are checked against the decoded text, and the first document of
each chunk is encoded in one piece too.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf.data.shards import DataError
from lab.prepare.text_tokenizer import TextTokenizer, check_byte_counts, load_text_tokenizer
from lab.prepare.word_table import WordTable, id_bytes, words_are_independent, words_differ

CHUNK_CHARACTERS = 1 << 19
CHECKED_CHARACTERS = 1 << 14
"""Longest first document of a chunk that is encoded twice to compare."""


class WorkerLostError(DataError):
    """Says that a worker process was killed; what was prepared before is whole."""


@dataclass(frozen=True)
class DocumentChunk:
    """Holds documents of one split, in order."""

    split: str
    texts: list[str]


@dataclass(frozen=True)
class EncodedChunk:
    """Holds a chunk's tokens (BOS before each document) and, if asked for, the bytes of each: little-endian uint16."""

    split: str
    documents: int
    text_bytes: int
    counted_bytes: int
    tokens: bytes
    token_bytes: bytes


class ChunkEncoder:
    """Encodes chunks with one tokenizer, in one process."""

    def __init__(self, tokenizer: TextTokenizer, word_cache: bool = True):
        self.tokenizer = tokenizer
        self.words = WordTable(tokenizer) if word_cache and words_are_independent(tokenizer) else None

    def encode(self, chunk: DocumentChunk, with_bytes: bool = False) -> EncodedChunk:
        """Encodes a chunk. Raises DataError, also when bytes and decoded text, or words and whole text, don't agree."""
        texts = chunk.texts
        if self.words is None:
            tokens = b"".join(map(self.with_bos, self.tokenizer.encode_documents(texts)))
        else:
            tokens = self.words.encode(texts)
            self.check_first(texts[0], tokens)
        ids_N = np.frombuffer(tokens, dtype="<u2")
        bytes_N = self.tokenizer.target_bytes(ids_N)
        if self.words is None:
            check_byte_counts(self.tokenizer, bytes_N, ids_N)
        if with_bytes and not 0 <= bytes_N.min() <= bytes_N.max() < 2**16:
            raise DataError(f"{self.tokenizer.name}: a token stands for 0 to 65,535 bytes: its pieces are too long")
        text_bytes = sum(len(text.encode()) for text in texts)
        token_bytes = bytes_N.astype("<u2").tobytes() if with_bytes else b""
        return EncodedChunk(chunk.split, len(texts), text_bytes, int(bytes_N.sum()), tokens, token_bytes)

    def with_bos(self, ids: Sequence[int]) -> bytes:
        return id_bytes([self.tokenizer.bos_id, *ids])

    def check_first(self, text: str, tokens: bytes) -> None:
        """Raises DataError unless the tokens begin with those of `text` in one piece."""
        if len(text) <= CHECKED_CHARACTERS:
            whole = self.with_bos(self.tokenizer.encode(text))
            if not tokens.startswith(whole) or tokens[len(whole) : len(whole) + 2] not in (b"", self.with_bos([])):
                raise words_differ(self.tokenizer)


def chunk_documents(documents: Iterable[tuple[str, str]]) -> Iterator[DocumentChunk]:
    """Joins (split, text) pairs to chunks of each split; the same documents give the same chunks."""
    waiting: dict[str, list[str]] = {}
    characters: dict[str, int] = {}
    for split, text in documents:
        waiting.setdefault(split, []).append(text)
        characters[split] = characters.get(split, 0) + len(text)
        if characters[split] >= CHUNK_CHARACTERS:
            yield DocumentChunk(split, waiting.pop(split))
            characters[split] = 0
    for split, texts in waiting.items():
        yield DocumentChunk(split, texts)


WORKER: dict[str, ChunkEncoder] = {}
"""The encoder of a worker process."""


def start_worker(tokenizer_path: str, word_cache: bool, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops in order
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    WORKER["encoder"] = ChunkEncoder(load_text_tokenizer(tokenizer_path), word_cache)


def end_with_parent(parent: int) -> None:
    """Ends this process when its parent was killed, which else would leave it waiting for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def encode_in_worker(chunk: DocumentChunk, with_bytes: bool) -> EncodedChunk:
    return WORKER["encoder"].encode(chunk, with_bytes)


def encode_chunks(
    chunks: Iterator[DocumentChunk],
    tokenizer_path: Path,
    workers: int,
    word_cache: bool = True,
    sidecar_splits: tuple[str, ...] = (),
) -> Iterator[EncodedChunk]:
    """Encodes chunks in `workers` processes (1: in this one), in order, reading only a few chunks ahead.

    Raises DataError, also when a worker was killed.
    """
    tokenizer = load_text_tokenizer(tokenizer_path)
    if workers == 1:
        encoder = ChunkEncoder(tokenizer, word_cache)
        yield from (encoder.encode(chunk, chunk.split in sidecar_splits) for chunk in chunks)
        return
    context = multiprocessing.get_context("fork")
    arguments = (str(tokenizer_path), word_cache, os.getpid())
    with ProcessPoolExecutor(workers, context, start_worker, arguments) as pool:
        waiting = deque()
        try:
            for chunk in itertools.chain(chunks, [None] * 2 * workers):
                if chunk is not None:
                    waiting.append(pool.submit(encode_in_worker, chunk, chunk.split in sidecar_splits))
                if waiting and (chunk is None or len(waiting) >= 2 * workers):
                    yield waiting.popleft().result()
        except BrokenProcessPool:
            message = "a worker process was killed (too little memory?); the same command goes on"
            raise WorkerLostError(message) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
