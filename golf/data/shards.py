"""Reads and writes token files in the competition's format, and checks them whenever they are opened.

A shard is 256 little-endian int32 (word 0 the magic 20240520, word 1 the version 1, word 2 the token
count, the rest zero) followed by that many little-endian uint16 tokens, and nothing else.
Names end in `_train_%06d.bin` or `_val_%06d.bin`; the sorted names give the order of the stream.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from golf.config.knobs import UserError
from golf.runtime import write_file_atomically

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_WORDS = 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_WORDS
SHARD_NAME = re.compile(r"(?P<dataset>.+)_(?P<split>train|val)_(?P<index>\d{6})\.bin")


class DataError(UserError):
    """Says that text, tokenizer or token files can't be used as they are."""


class ShardError(DataError):
    """Says that a shard file is missing, damaged, or not a shard."""


def shard_token_count(path: Path) -> int:
    """Counts the tokens in a shard by its header, checked against the size of the file. Raises ShardError."""
    if not path.is_file():
        raise ShardError(f"{path}: no such shard; check the path, or prepare or download it")
    size = path.stat().st_size
    if size == 0:
        raise ShardError(f"{path}: the file is empty (0 bytes); delete it and prepare or download it again")
    if size < SHARD_HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes are less than a header ({SHARD_HEADER_BYTES}); fetch the shard again")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_WORDS)
    magic, version, count = (int(word) for word in header[:3])
    if magic != SHARD_MAGIC:
        raise ShardError(f"{path}: not a token shard (magic {magic}, must be {SHARD_MAGIC}); point to a shard file")
    if version != SHARD_VERSION:
        raise ShardError(f"{path}: shard version {version}, must be {SHARD_VERSION}; prepare the data again")
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        held = (size - SHARD_HEADER_BYTES) / 2
        raise ShardError(
            f"{path}: the header says {count} tokens but the file holds {held:g}; "
            "it is truncated or damaged: delete it and prepare or download it again"
        )
    return count


def read_shard(path: str | Path) -> np.memmap:
    """Returns the tokens of a shard as a read-only memory map, uint16 (N,). Raises ShardError."""
    path = Path(path)
    count = shard_token_count(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def shard_header(tokens: int) -> bytes:
    """Returns the header of a shard of so many tokens."""
    header = np.zeros(SHARD_HEADER_WORDS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def write_shard(path: str | Path, tokens: Sequence[int] | np.ndarray) -> None:
    """Writes tokens (N,), each 0 to 65535, as a shard; the name appears only when the file is whole."""
    path, tokens_N = Path(path), np.asarray(tokens)
    if not 1 <= tokens_N.size < 2**31:
        raise ShardError(f"{path}: a shard holds 1 to 2^31 - 1 tokens, not {tokens_N.size}")
    if tokens_N.min() < 0 or tokens_N.max() >= 2**16:
        raise ShardError(f"{path}: token ids must be 0 to 65535; use a tokenizer of at most 65,536 pieces")
    write_file_atomically(path, shard_header(tokens_N.size) + tokens_N.astype("<u2").tobytes())


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """Lists the shards of `split` ("train" or "val") in `folder`, sorted, without names that begin with a dot.

    Raises ShardError if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(
            f"{folder}: no such folder of shards; set data_path, or see data/README.md (bash run.sh download)"
        )
    names = [SHARD_NAME.fullmatch(path.name) for path in folder.iterdir() if path.name[0] != "."]
    matches = [match for match in names if match and match["split"] == split]
    datasets = sorted({match["dataset"] for match in matches})
    if not matches:
        raise ShardError(f"{folder}: no *_{split}_NNNNNN.bin shards there; data/README.md says how to get some")
    if len(datasets) > 1:
        raise ShardError(f"{folder}: shards of several data sets ({', '.join(datasets)}); keep one set in a folder")
    return sorted(folder / match.string for match in matches)


def expand_glob(pattern: str) -> list[Path]:
    """Lists the files that match a shell pattern, sorted; a path that exists is itself, whatever brackets it has.

    Raises ShardError if there are none.
    """
    whole = os.path.expanduser(pattern)
    paths = [Path(whole)] if os.path.exists(whole) else sorted(map(Path, glob.glob(whole)))
    if not paths:
        raise ShardError(f"no file matches {pattern!r}; check the path (and quote the pattern in the shell)")
    return paths
