"""Reads a record folder as it lies on the disk: ours, or one in the shape of the competition's published records."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.cli import read_json_object
from lab.record.finding import EvidenceError, Findings, SubmissionFinding, error, listed, note, warning
from lab.record.headline import Headline, match_headline
from lab.record.log_reading import LogReading, file_sha256, read_log
from lab.record.run_check import RunEvidence, is_number, read_result
from lab.record.script_reading import (
    READABLE_NAME,
    Neighbours,
    ScriptReading,
    find_neighbours,
    read_script,
    script_text,
)

SCRIPT_NAME, CLAIMS_NAME, README_NAME, HASHES_NAME = "train_gpt.py", "submission.json", "README.md", "HASHES.json"
DOCUMENTS = frozenset(
    {README_NAME, CLAIMS_NAME, HASHES_NAME, READABLE_NAME, SCRIPT_NAME, "requirements.txt", "LICENSE"}
)
ALIASES = {
    "val_bpb": ("mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb", "sliding_val_bpb", "score"),
    "val_loss": ("mean_val_loss", "val_loss_mean", "mean_val_loss_nats", "val_loss_nats"),
    "val_bpb_std": ("std_bpb", "bpb_std", "std_val_bpb"),
    "bytes_total": ("artifact_bytes", "artifact_size_bytes", "total_bytes", "submission_bytes"),
    "bytes_code": ("code_bytes",),
    "github_id": ("github", "github_username", "github_user"),
    "author": ("authors", "author_name"),
    "name": ("run_name", "title"),
    "seeds": ("seed", "n_seeds", "seed_scores"),
}
"""Key of submission.json -> other names that are in use for it."""
MOST_LOGS, MOST_SCRIPT = 200, 4_000_000
LOG_ENDINGS = (".log", ".txt", ".out")
LOG_FIGURE = re.compile(rb"(?:val_bpb|val_loss|train_loss)[:=] ?\d")
SNIFFED_BYTES = 1 << 21


@dataclass(frozen=True)
class RecordFolder:
    """Holds what a reviewer finds; reading problems are findings already."""

    path: Path
    claims: dict[str, Any] | None
    """submission.json, None where it is missing or can't be read."""
    logs: tuple[LogReading, ...]
    """Each run's once: copies are findings."""
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
    def script_name(self) -> str:
        return self.script.path.name if self.script else SCRIPT_NAME

    @property
    def track(self) -> str:
        stated = self.claim("track")
        return f"{stated if isinstance(stated, str) else ''} {self.path.resolve().parent.name}".lower()

    @property
    def is_non_record(self) -> bool:
        return re.search(r"\bnon[-_ ]?record|unlimited", self.track.replace("_", "-")) is not None

    def claim(self, key: str) -> Any:
        """Returns a value of submission.json, None where there is none."""
        return (self.claims or {}).get(key)

    def claimed(self, key: str) -> float | None:
        """Returns a number of submission.json, under its own name or one that is in use for it."""
        return next(filter(is_number, map(self.claim, (key, *ALIASES.get(key, ())))), None)

    @cached_property
    def seed_results(self) -> dict[str, Any]:
        """What submission.json says of each seed; some say it under `seeds`."""
        stated = next((claim for key in ("seed_results", "seeds") if isinstance(claim := self.claim(key), dict)), {})
        return {str(seed): result for seed, result in stated.items()}

    @cached_property
    def seed_scores(self) -> dict[str, float]:
        """The val_bpb of each seed, as far as submission.json has numbers."""
        scores = {
            seed: result.get("val_bpb") if isinstance(result, dict) else result
            for seed, result in self.seed_results.items()
        }
        return {seed: float(score) for seed, score in scores.items() if is_number(score)}

    @cached_property
    def claimed_seeds(self) -> set[int]:
        stated = self.claim("seeds")
        names = [*self.seed_results, *(stated if isinstance(stated, list) else ())]
        numbers = (re.search(r"\d{1,18}", str(name)) for name in names)
        return {int(number[0]) for number in numbers if number}

    @cached_property
    def headline(self) -> Headline:
        return match_headline(self.claimed("val_bpb"), self.logs, self.claimed_seeds, [*self.seed_scores.values()])

    @cached_property
    def counted(self) -> tuple[LogReading, ...]:
        """The logs that the claims are about: those of the headline, or else all at the top, or else all."""
        return self.headline.logs or tuple(log for log in self.logs if "/" not in log.name) or self.logs

    def needs(self, log: LogReading) -> bool:
        """Says whether the claims rest on a log, as far as can be told: it is not one of other experiments."""
        experiments = self.is_non_record and self.claims is None
        return log in self.counted and not experiments or bool(log.seeds & self.claimed_seeds)

    @cached_property
    def scripts(self) -> dict[str, str]:
        """Name -> text of the Python files beside each other, the script among them."""
        files = (
            file for file in sorted(self.path.glob("*.py")) if file.is_file() and file.stat().st_size < MOST_SCRIPT
        )
        return {file.name: script_text(file.read_bytes()) for file in files}

    @property
    def files(self) -> list[Path]:
        return [path for path in sorted(self.path.rglob("*")) if path.is_file()]


def read_record(path: Path) -> RecordFolder:
    """Reads a record folder. Raises EvidenceError where there is no folder; all else that is wrong is a finding."""
    if not path.is_dir():
        raise EvidenceError(f"{path} is not a folder: name the folder of a submission")
    problems = list(link_findings(path))
    claims = read_claims(path, problems)
    logs = read_logs(path, problems)
    script = choose_script(path, logs, problems)
    runs = read_runs(path, logs, script, problems)
    return RecordFolder(path, claims, logs, script, tuple(runs), tuple(problems))


def link_findings(path: Path) -> Findings:
    for link in sorted(path.rglob("*")):
        if link.is_symlink() and not os.path.exists(link):
            yield warning("S09-dangling-link", f"{link.relative_to(path).as_posix()} is a link to nothing")


def read_claims(path: Path, problems: list[SubmissionFinding]) -> dict[str, Any] | None:
    """Reads submission.json, or the only file of a similar name."""
    others = sorted(file for file in path.glob("submission*.json") if file.is_file())
    file = path / CLAIMS_NAME
    if not os.path.exists(file) and len(others) == 1:
        file = others[0]
        problems.append(note("S06-other-name", f"{CLAIMS_NAME} is named {file.name}"))
    if not os.path.exists(file):
        return None
    try:
        return read_json_object(file, EvidenceError)
    except EvidenceError as problem:
        problems.append(error("S02-json-invalid", str(problem)))
        return None


def choose_script(path: Path, logs: tuple[LogReading, ...], problems: list[SubmissionFinding]) -> ScriptReading | None:
    """Reads train_gpt.py, or the script under another name whose bytes the logs count."""
    if (path / SCRIPT_NAME).is_file():
        return read_script(path / SCRIPT_NAME, path)
    sizes = {size for log in logs for size in log.code_bytes}
    others = sorted(file for file in path.glob("train*.py") if file.is_file() and file.name != READABLE_NAME)
    others.sort(key=lambda file: file.stat().st_size not in sizes)
    if not others or os.path.lexists(path / SCRIPT_NAME):
        return None
    problems.append(note("S06-other-name", f"{SCRIPT_NAME} is named {listed(file.name for file in others)}"))
    return read_script(others[0], path)


def read_runs(
    path: Path, logs: tuple[LogReading, ...], script: ScriptReading | None, problems: list[SubmissionFinding]
) -> Iterator[RunEvidence]:
    for folder in sorted(path.glob("runs/seed*")):
        try:
            result = read_result(folder / "result.json")
            config = read_json_object(folder / "config.json", EvidenceError)
        except EvidenceError as problem:
            problems.append(error("S80-run-record", str(problem)))
            continue
        log = next((log for log in logs if log.name == f"train_seed{result['seed']}.log"), None)
        files = {SCRIPT_NAME: script.data if script else None}
        yield RunEvidence(f"runs/{folder.name}", result, config, log, files)


# ---- logs ----


def read_logs(path: Path, problems: list[SubmissionFinding]) -> tuple[LogReading, ...]:
    """Reads the logs of a folder, each run once: a file that is there twice is no second run."""
    logs: dict[str, LogReading] = {}
    for file in find_logs(path):
        name, digest = file.relative_to(path).as_posix(), file_sha256(file)
        if digest not in logs:
            logs[digest] = read_log(file, name)
            continue
        first = logs[digest]
        seeds = {seed for seed in (first.name_seed, LogReading(name).name_seed) if seed is not None}
        make = error if len(seeds) > 1 else note
        problems.append(make("S41-log-twice", f"{first.name} and {name} are the same file"))
        if first.name_seed is None and seeds:  # the name that says the seed is the better one
            first.name = name
    return tuple(sorted(logs.values(), key=lambda log: log.name))


def find_logs(path: Path) -> list[Path]:
    """Finds the logs of training, whatever their name and folder: train*.log, and texts that print a loss."""
    texts = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in LOG_ENDINGS and file.is_file()]
    named = [file for file in texts if file.parent == path and file.match("train*.log")]
    others = [file for file in texts if file not in named and file.name not in DOCUMENTS and prints_losses(file)]
    return sorted([*named, *others])[:MOST_LOGS]


def prints_losses(file: Path) -> bool:
    """Says whether a text has the figures of a training, near its start or its end."""
    with file.open("rb") as data:
        head = data.read(SNIFFED_BYTES)
        data.seek(max(0, file.stat().st_size - SNIFFED_BYTES))
        text = head + data.read(SNIFFED_BYTES)
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = text.replace(b"\0", b"")
    return LOG_FIGURE.search(text) is not None
