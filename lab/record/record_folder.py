"""A record folder as it lies on the disk: ours, or one in the shape of the competition's published records."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.record.finding import EvidenceError, SubmissionFinding, fault
from lab.record.log_reading import LogReading, read_log
from lab.record.run_check import RunEvidence, bytes_if_there, read_json_object, read_result
from lab.record.script_reading import READABLE_NAME, Neighbours, ScriptReading, find_neighbours, read_script

SCRIPT_NAME, CLAIMS_NAME, README_NAME, HASHES_NAME = "train_gpt.py", "submission.json", "README.md", "HASHES.json"
DOCUMENTS = frozenset(
    {README_NAME, CLAIMS_NAME, HASHES_NAME, READABLE_NAME, SCRIPT_NAME, "requirements.txt", "LICENSE"}
)


@dataclass(frozen=True)
class RecordFolder:
    """What a reviewer finds; reading problems are findings already."""

    path: Path
    claims: dict[str, Any] | None
    """submission.json, None where it is missing or can't be read."""
    logs: tuple[LogReading, ...]
    script: ScriptReading | None
    runs: tuple[RunEvidence, ...]
    """Of runs/seed<N>/, which only our records have."""
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
        stated = (self.claims or {}).get("track")
        return f"{stated if isinstance(stated, str) else ''} {self.path.resolve().parent.name}".lower()

    def log_of_seed(self, seed: int) -> LogReading | None:
        return next((log for log in self.logs if log.seed == seed), None)


def read_record(path: Path) -> RecordFolder:
    """Read a record folder. Raises EvidenceError where there is no folder; all else that is wrong is a finding."""
    if not path.is_dir():
        raise EvidenceError(f"{path} is not a folder: name the folder of a submission")
    problems: list[SubmissionFinding] = []
    claims = None
    if (path / CLAIMS_NAME).exists():
        try:
            claims = read_json_object(path / CLAIMS_NAME)
        except EvidenceError as error:
            problems.append(fault("S02-json-invalid", str(error)))
    logs = tuple(read_log(file) for file in find_logs(path))
    script = read_script(path / SCRIPT_NAME, path) if (path / SCRIPT_NAME).is_file() else None
    runs = []
    for folder in sorted(path.glob("runs/seed*")):
        try:
            runs.append(read_recorded_run(folder, logs, script))
        except EvidenceError as error:
            problems.append(fault("S80-run-record", str(error)))
    return RecordFolder(path, claims, logs, script, tuple(runs), tuple(problems))


def find_logs(path: Path) -> list[Path]:
    """train*.log; where there is none any .log, then those in folders below, then texts that are called logs."""
    for pattern in ("train*.log", "*.log", "**/*.log", "*log*.txt"):
        if found := sorted(file for file in path.glob(pattern) if file.is_file()):
            return found
    return []


def read_recorded_run(folder: Path, logs: tuple[LogReading, ...], script: ScriptReading | None) -> RunEvidence:
    result = read_result(folder / "result.json")
    name = f"train_seed{result['seed']}.log"
    return RunEvidence(
        label=f"runs/{folder.name}",
        result=result,
        config=read_json_object(folder / "config.json"),
        log=next((log for log in logs if log.name == name), None),
        code=script.data if script else None,
        artifact=bytes_if_there(folder / "model.golf"),
        has_artifact=False,
    )
