"""Journals a scoring: sums of every finished chunk of windows, so that a killed scoring resumes there."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from golf.config.knobs import naming
from golf.runtime import write_file_atomically


@dataclass(frozen=True)
class ScoreSums:
    """Holds what a range of windows adds to the score. Ranges add up, in any order, on any rank."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


class ScoreJournal:
    """Keeps one rank's lines: the identity of the scoring, then chunks in order with their sums and seconds.

    Sums are written with all digits, so that a scoring in parts adds up the same numbers in the same order.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self.identity: dict[str, Any] | None = json.loads(lines[0]) if lines else None
        rows = [json.loads(line) for line in lines[1:]]
        self.chunks = [row for row in rows if "nats" in row]
        self.preparing = [row["preparing"] for row in rows if "preparing" in row]
        """Seconds that each process took before its first chunk."""
        self.file: TextIO | None = None

    def start(self, identity: Mapping[str, Any], preparing: float = 0.0) -> None:
        """Continues the journal if its identity is the same, else begins it anew. `preparing` seconds preceded."""
        if self.identity != identity:
            self.identity, self.chunks, self.preparing = dict(identity), [], []
        self.preparing += [preparing] if preparing else []
        rows = [self.identity, *({"preparing": seconds} for seconds in self.preparing), *self.chunks]
        write_file_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")

    def sums_of(self, begin: int, end: int) -> ScoreSums | None:
        """Returns the sums of windows begin .. end - 1, or None where they are not scored yet."""
        row = next((row for row in self.chunks if (row["begin"], row["end"]) == (begin, end)), None)
        return ScoreSums(row["nats"], row["tokens"], row["bytes"]) if row else None

    def add(self, begin: int, end: int, sums: ScoreSums, seconds: float) -> None:
        self.chunks.append({"begin": begin, "end": end, **asdict(sums), "seconds": seconds})
        with naming(self.path):
            self.file.write(json.dumps(self.chunks[-1]) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    @property
    def seconds(self) -> float:
        return sum(self.preparing) + sum(row["seconds"] for row in self.chunks)

    @property
    def sums(self) -> ScoreSums:
        return sum((ScoreSums(row["nats"], row["tokens"], row["bytes"]) for row in self.chunks), ScoreSums())
