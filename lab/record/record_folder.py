"""Reads a record folder as it lies on the disk: ours, or one in the shape of the competition's published records."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.cli import read_json_object
from lab.record.finding import EvidenceError, SubmissionFinding, error
from lab.record.log_reading import LogReading, read_log
from lab.record.run_check import RunEvidence, read_result
from lab.record.script_reading import READABLE_NAME, Neighbours, ScriptReading, find_neighbours, read_script

SCRIPT_NAME, CLAIMS_NAME, README_NAME, HASHES_NAME = "train_gpt.py", "submission.json", "README.md", "HASHES.json"
DOCUMENTS = frozenset(
    {README_NAME, CLAIMS_NAME, HASHES_NAME, READABLE_NAME, SCRIPT_NAME, "requirements.txt", "LICENSE"}
)


@dataclass(frozen=True)
class RecordFolder:
    """Holds what a reviewer finds; reading problems are findings already."""

    path: Path
    claims: dict[str, Any] | None
    """submission.json, None where it is missing or can't be read."""
    logs: tuple[LogReading, ...]
    script: ScriptReading | None
    runs: tuple[RunEvidence, ...]
    """Those of runs/seed<N>/, which only our records have."""
    problems: tuple[SubmissionFinding, ...]

    @cached_property
    def neighbours(self) -> Neighbours:
        return find_neighbours(self.script, self.path) if self.script else Neighbours({}, {}, ())

    @property
    def bytes_code(self) -> int | None:
        """Bytes of the script and of every local module that it runs."""
        return len(self.script.data) + sum(self.neighbours.modules.values()) if self.script else None

    @property
    def track(self) -> str:
        stated = self.claim("track")
        return f"{stated if isinstance(stated, str) else ''} {self.path.resolve().parent.name}".lower()

    def claim(self, key: str) -> Any:
        """Returns a value of submission.json, None where there is none."""
        return (self.claims or {}).get(key)

    @property
    def files(self) -> list[Path]:
        return [path for path in sorted(self.path.rglob("*")) if path.is_file()]


def read_record(path: Path) -> RecordFolder:
    """Reads a record folder. Raises EvidenceError where there is no folder; all else that is wrong is a finding."""
    if not path.is_dir():
        raise EvidenceError(f"{path} is not a folder: name the folder of a submission")
    problems: list[SubmissionFinding] = []
    claims = None
    if (path / CLAIMS_NAME).exists():
        try:
            claims = read_json_object(path / CLAIMS_NAME, EvidenceError)
        except EvidenceError as problem:
            problems.append(error("S02-json-invalid", str(problem)))
    logs = tuple(read_log(file) for file in find_logs(path))
    script = read_script(path / SCRIPT_NAME, path) if (path / SCRIPT_NAME).is_file() else None
    runs = []
    for folder in sorted(path.glob("runs/seed*")):
        try:
            result = read_result(folder / "result.json")
            config = read_json_object(folder / "config.json", EvidenceError)
        except EvidenceError as problem:
            problems.append(error("S80-run-record", str(problem)))
            continue
        log = next((log for log in logs if log.name == f"train_seed{result['seed']}.log"), None)
        files = {SCRIPT_NAME: script.data if script else None}
        runs.append(RunEvidence(f"runs/{folder.name}", result, config, log, files))
    return RecordFolder(path, claims, logs, script, tuple(runs), tuple(problems))


def find_logs(path: Path) -> list[Path]:
    """Finds train*.log; without any, other .log files, then those in folders below, then texts that are called logs."""
    for pattern in ("train*.log", "*.log", "**/*.log", "*log*.txt"):
        if found := sorted(file for file in path.glob(pattern) if file.is_file()):
            return found
    return []
