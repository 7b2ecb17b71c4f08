"""Reads the text of a log of any length in bounded memory: its lines, apart from the sources of scripts in it.

The competition's scripts begin their log with their own source and a bar of 100 signs; a log that several runs were
appended to has more of them. What looks like a source is known to be one only where its bar comes, so that the lines
since the last bar wait, as many as a source can have.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

CHUNK_CHARACTERS = 1 << 18
MOST_LINE = 1 << 18
"""Characters of a line that are read: a packed script has a long one, and no figure stands behind that."""
MOST_SOURCE = 1 << 21
BAR = "=" * 100
SOURCE_LINE = re.compile(r"(?:import \w|from [\w.]+ import|def \w|class \w)")
SOURCE_START = re.compile(r"(?:import \w|from [\w.]+ import|#|[rbuRBU]{0,2}[\"']|\ufeff)")


@dataclass(frozen=True)
class LogPart:
    """Holds neighbouring lines of a log, all of them of a source or all of them printed."""

    first: int
    """Number of the first line in the file."""
    lines: list[str]
    is_source: bool


def read_parts(path: Path) -> Iterator[LogPart]:
    """Reads a log from its start to its end; bytes that are not text are replaced. Raises OSError."""
    with path.open("rb") as raw:
        encoding = "utf-16" if raw.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8"  # what PowerShell's tee writes
    waiting: list[str] = []
    first, size = 1, 0
    with path.open(encoding=encoding, errors="replace", newline="\n") as file:
        for lines in bounded_lines(file):
            while BAR in lines:
                end = lines.index(BAR)
                yield from divide(first, waiting + lines[:end])
                first += len(waiting) + end + 1
                lines, waiting, size = lines[end + 1 :], [], 0
            waiting += lines
            size += sum(map(len, lines))
            if size > MOST_SOURCE:  # the older half is no source that a bar could still close
                half = len(waiting) // 2
                yield LogPart(first, waiting[:half], False)
                first, waiting = first + half, waiting[half:]
                size = sum(map(len, waiting))
    yield LogPart(first, waiting, False)


def bounded_lines(file: TextIO) -> Iterator[list[str]]:
    """Yields all lines in order, some at a time; of a line that is too long, the rest is dropped."""
    rest = ""
    while chunk := file.read(CHUNK_CHARACTERS):
        if chunk.endswith("\r"):
            chunk += file.read(1)
        head, *others = chunk.replace("\r\n", "\n").split("\n")
        rest += head[: max(0, MOST_LINE - len(rest))]
        if others:
            yield [rest, *others[:-1]]
            rest = others[-1]
    yield [rest]


def divide(first: int, lines: list[str]) -> Iterator[LogPart]:
    """Divides the lines before a bar: an earlier run may have printed some of them before the source begins."""
    starts = [number for number, line in enumerate(lines) if SOURCE_START.match(line)]
    start = starts[0] if starts and any(map(SOURCE_LINE.match, lines)) else len(lines)
    if start:
        yield LogPart(first, lines[:start], False)
    if start < len(lines):
        yield LogPart(first + start, lines[start:], True)
