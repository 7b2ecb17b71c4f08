"""The documents of a source on disk, so that they can be taken in another order than they came in.

Memory holds a hash and a position of each document (about 200 bytes), never the text.
"""

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf.data.shards import DataError
from golf.runtime import write_file_atomically
from lab.prepare.corpus import document_digest, split_digests

SPOOL_TEXT, SPOOL_INDEX = "spool.text", "spool.json"


@dataclass(frozen=True)
class DocumentSpool:
    """Distinct documents in a file, and the two orders to read them in."""

    folder: Path
    duplicates: int

    def documents(self, split: str) -> Iterator[str]:
        """Documents of "train" or "val" in that split's order."""
        spans_D2 = np.fromfile(self.folder / f"spool.{split}", dtype="<i8").reshape(-1, 2)
        with (self.folder / SPOOL_TEXT).open("rb") as file:  # not mapped: its pages would count as our memory
            for begin, end in spans_D2.tolist():
                yield os.pread(file.fileno(), end - begin, begin).decode()

    def remove(self) -> None:
        for path in self.folder.glob("spool.*"):
            path.unlink()


def build_spool(documents: Iterator[str], folder: Path, val_fraction: float, seed: int) -> DocumentSpool:
    """Write the documents to `folder` and split them as `split_documents` does. Raises DataError.

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
        np.array(spans, dtype="<i8").tofile(folder / f"spool.{split}")
    duplicates = len(digests) - len(train) - len(val)
    write_file_atomically(folder / SPOOL_INDEX, json.dumps({"duplicates": duplicates}))
    return DocumentSpool(folder, duplicates)


def open_spool(folder: Path) -> DocumentSpool:
    """The finished spool in `folder`. Raises DataError."""
    try:
        return DocumentSpool(folder, json.loads((folder / SPOOL_INDEX).read_text())["duplicates"])
    except (OSError, ValueError, KeyError):
        raise DataError(f"{folder}: the spooled documents are damaged; delete this folder and start again") from None
