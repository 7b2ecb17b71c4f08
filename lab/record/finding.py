"""What is wrong with evidence: one line with a stable code, and how bad it is."""

from dataclasses import dataclass
from typing import Literal

from golf.config.knobs import UserError


class EvidenceError(UserError):
    """Input that can't be judged at all: a folder or a file that is missing or unreadable."""


@dataclass(frozen=True)
class SubmissionFinding:
    code: str
    """Stable, for programs: a letter and two digits, then words (S.. of a record folder, R.. of a run)."""
    severity: Literal["error", "warning"]
    text: str


def fault(code: str, text: str) -> SubmissionFinding:
    """A finding that makes the evidence unsound."""
    return SubmissionFinding(code, "error", text)


def doubt(code: str, text: str) -> SubmissionFinding:
    """A finding that a reviewer would ask about."""
    return SubmissionFinding(code, "warning", text)
