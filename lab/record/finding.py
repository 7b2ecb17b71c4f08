"""Findings about evidence: one line each, with a stable code and how bad it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import UserError

SEVERITIES = ("error", "warning", "note")
"""Worst first. An error says that the evidence is unsound, a warning what a reviewer would ask, a note what is unusual
and harmless: a note changes no verdict."""


class EvidenceError(UserError):
    """Raised for input that can't be judged at all: a folder or a file that is missing or unreadable."""


@dataclass(frozen=True)
class SubmissionFinding:
    code: str
    """Stable, for programs: a letter and two digits, then words (S.. of a record folder, R.. of a run)."""
    severity: Literal["error", "warning", "note"]
    text: str


Findings = Iterator[SubmissionFinding]


def error(code: str, text: str) -> SubmissionFinding:
    """Makes a finding that the evidence is unsound."""
    return SubmissionFinding(code, "error", text)


def warning(code: str, text: str) -> SubmissionFinding:
    """Makes a finding that a reviewer would ask about."""
    return SubmissionFinding(code, "warning", text)


def note(code: str, text: str) -> SubmissionFinding:
    """Makes a finding that a reader may want to know and that speaks against nothing."""
    return SubmissionFinding(code, "note", text)


def group_by(items: Iterable[Any], key: Callable[[Any], Any], name: str) -> dict[Any, list[str]]:
    """Groups items by a value of theirs: value -> what the attribute `name` of each is, in their order."""
    groups: dict[Any, list[str]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(getattr(item, name))
    return groups


def listed(names: Iterable[Any], most: int = 6) -> str:
    """Lists names for a text, the first `most` of them."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
