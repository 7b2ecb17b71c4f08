"""Builds a record folder from finished runs alone: its claims, the files that prove them, or the reasons to refuse."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lab.bundle.bundler import collect_parts, parts_sha256
from lab.bundle.packer import pack_source, unpack_source
from lab.bundle.parts import BundleError
from lab.record.claim_check import measured_claims
from lab.record.finding import EvidenceError, SubmissionFinding, error
from lab.record.folder_check import check_record
from lab.record.record_folder import CLAIMS_NAME, HASHES_NAME, README_NAME, SCRIPT_NAME, read_record
from lab.record.record_readme import RecordFacts, render_readme
from lab.record.run_check import PROOF, RunEvidence, finished_run_findings, read_run, seeds_findings, track_findings
from lab.record.script_reading import READABLE_NAME

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SubmissionOrder:
    """Holds what a person gives: the runs, and the only texts that no program measures."""

    runs: tuple[Path, ...]
    name: str
    author: str
    github_id: str
    blurb: str
    track: str
    records: Path
    requirements: Path
    date: str = ""
    """YYYY-MM-DD; empty: the day (UTC) on which the newest result was written."""


@dataclass(frozen=True)
class SubmissionOutcome:
    folder: Path
    reasons: tuple[SubmissionFinding, ...]
    """Why nothing was built; empty where it was."""
    claims: dict[str, Any]


def make_record(order: SubmissionOrder) -> SubmissionOutcome:
    """Builds the record folder, or says why not. Raises EvidenceError, BundleError, OSError for what is no run."""
    if not order.runs:
        raise EvidenceError("name the folder of at least one finished run")
    runs = sorted((read_run(path) for path in order.runs), key=lambda run: (run.seed, run.label))
    newest = max((path / "result.json").stat().st_mtime for path in order.runs)
    date = order.date or datetime.fromtimestamp(newest, timezone.utc).strftime("%Y-%m-%d")
    target = order.records / order.track / folder_name(order.name, date)
    if target.exists():
        raise EvidenceError(f"{target} exists: records are frozen, choose another --name or --date")
    reasons = [finding for run in runs for finding in finished_run_findings(run)]
    reasons += [*seeds_findings(runs), *track_findings(runs, order.track)]
    readable, readable_reasons = readable_script(order.runs, runs)
    reasons += readable_reasons
    if reasons:
        return SubmissionOutcome(target, tuple(reasons), {})
    claims = submission_claims(order, runs, date) | checkout_of(readable, runs[0].seed)
    reasons = build_folder(target, order, runs, claims, readable)
    return SubmissionOutcome(target, tuple(reasons), claims)


def folder_name(name: str, date: str) -> str:
    """Returns <date>_<name> with the blanks of the name as underscores. Raises EvidenceError."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise EvidenceError(f"--date {date!r} is not of the form YYYY-MM-DD")
    text = re.sub(r"\s+", "_", name.strip())
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", text):
        raise EvidenceError(f"--name {name!r} can't name a folder: use letters, digits, blanks, '.', '_', '+' and '-'")
    return f"{date}_{text}"


# ---- the script that people read ----


def readable_script(paths: Sequence[Path], runs: Sequence[RunEvidence]) -> tuple[str, list[SubmissionFinding]]:
    """Returns the readable script of the runs, and where it is not the one that was packed.

    A run that was started from one packed file has no readable source: what is packed in it stands in for that.
    """
    reasons: list[SubmissionFinding] = []
    packed = runs[0].code or b""
    sources = {path: file.read_text("utf-8", "replace") for path in paths if (file := path / READABLE_NAME).is_file()}
    for source in dict.fromkeys(sources.values()):
        try:
            sound = pack_source(source) == packed  # takes some seconds for a whole program
        except BundleError:
            sound = source.encode() == packed
        if not sound:
            places = ", ".join(str(path) for path, text in sources.items() if text == source)
            reasons.append(error("R16-readable-differs", f"{places}: {READABLE_NAME} does not pack to {SCRIPT_NAME}"))
    if sources:
        return next(iter(sources.values())), reasons
    try:
        return unpack_source(packed), reasons
    except BundleError:
        return packed.decode("utf-8", errors="replace"), reasons  # started from a readable bundle: it is its own source


def checkout_of(readable: str, seed: int) -> dict[str, str]:
    """Returns the commit and the command that give a run's readable script again; {} where this checkout does not."""
    found = re.search(r"^# sha256 of the parts: (\w{64})$", readable, re.MULTILINE)
    if not found or found[1] != parts_sha256(collect_parts(REPOSITORY / SCRIPT_NAME, REPOSITORY)):
        return {}
    clean = ask_git("status", "--porcelain", "--", SCRIPT_NAME, "golf", "lab/bundle", "tools/bundle.py") == ""
    commit = ask_git("rev-parse", "HEAD")
    if not clean or not commit:
        return {}
    command = f"python tools/bundle.py --run-config runs/seed{seed}/config.json --out {READABLE_NAME}"
    return {"code_commit": commit, "code_command": command}


def ask_git(*words: str) -> str | None:
    """Returns what git says of the project's checkout; None where there is no git or no checkout."""
    try:
        asked = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


# ---- what is claimed ----


def submission_claims(order: SubmissionOrder, runs: Sequence[RunEvidence], date: str) -> dict[str, Any]:
    """Makes submission.json: the texts of the order, and what was measured."""
    typed = {name: getattr(order, name) for name in ("author", "github_id", "name", "blurb")}
    measured = measured_claims([run.result for run in runs])
    return typed | {"date": date, "track": order.track.removeprefix("track_")} | measured


# ---- the folder ----


def build_folder(
    target: Path, order: SubmissionOrder, runs: Sequence[RunEvidence], claims: dict[str, Any], readable: str
) -> list[SubmissionFinding]:
    """Writes everything beside the target, checks it as a reviewer would, renames it. Returns errors of that check."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        files = dict(record_files(order, runs, claims, readable))
        files[HASHES_NAME] = as_json(hash_list(files, runs)).encode()
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
        errors = [finding for finding in check_record(read_record(temporary)) if finding.severity == "error"]
        if not errors:
            os.rename(temporary, target)
        return errors
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record_files(
    order: SubmissionOrder, runs: Sequence[RunEvidence], claims: dict[str, Any], readable: str
) -> Iterator[tuple[str, bytes]]:
    """Makes (path in the folder, content) of every file but the list of hashes. No weights and no artifact go in."""
    facts = RecordFacts(claims, [run.result for run in runs], runs[0].config, hash_list({}, runs))
    yield README_NAME, render_readme(facts).encode()
    yield CLAIMS_NAME, as_json(claims).encode()
    yield SCRIPT_NAME, runs[0].code or b""
    if "code_commit" not in claims:
        yield READABLE_NAME, readable.encode()
    yield "requirements.txt", order.requirements.read_bytes()
    for run in runs:
        folder = Path(run.label)
        yield f"train_seed{run.seed}.log", (folder / "train.log").read_bytes()
        for name in ("result.json", "config.json", *([PROOF] if (folder / PROOF).exists() else [])):
            yield f"runs/seed{run.seed}/{name}", (folder / name).read_bytes()


def hash_list(files: Mapping[str, bytes], runs: Sequence[RunEvidence]) -> dict[str, Any]:
    """Lists the SHA-256 of everything that a score depends on, and of every file of the folder."""
    shared = ("code_sha256", "config_hash", "data_id", "val_data_id", "tokenizer_sha256")
    return {
        **{key: runs[0].result[key] for key in shared},
        "artifact_sha256": {str(run.seed): run.result["artifact_sha256"] for run in runs},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
