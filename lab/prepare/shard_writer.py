"""Token files that are written bit by bit, and the note of how far they are: what lets a preparation go on.

The files grow in place in a folder that nobody reads before it is whole. The note is written after the tokens that
it counts have reached the disk; what a killed process wrote beyond the note is cut off.
"""

import json
import os
from pathlib import Path

import numpy as np

from golf.data.shards import SHARD_HEADER_BYTES, SHARD_HEADER_WORDS, SHARD_MAGIC, SHARD_VERSION, DataError
from golf.runtime import write_file_atomically

STATE_NAME = "state.json"


def shard_header(tokens: int) -> bytes:
    header = np.zeros(SHARD_HEADER_WORDS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


class GrowingShards:
    """A stream of tokens as the shards `<stem>_%06d.bin` of `shard_tokens` tokens, the last one shorter.

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
        """Write tokens given as little-endian uint16."""
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
        """Bring what was appended to the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Finish the open shard."""
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
    """What `write_state` noted in `folder`, if the same recipe is being prepared there."""
    try:
        state = json.loads((folder / STATE_NAME).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("recipe") == recipe else None
