"""A record folder from finished runs alone: what it claims, the files that prove it, and the reasons to refuse."""

import hashlib
import json
import os
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lab.bundle.packer import pack_source, unpack_source
from lab.bundle.parts import BundleError
from lab.record.finding import EvidenceError, SubmissionFinding, fault
from lab.record.folder_check import check_record
from lab.record.record_folder import CLAIMS_NAME, HASHES_NAME, README_NAME, SCRIPT_NAME, read_record
from lab.record.record_readme import RecordFacts, render_readme
from lab.record.run_check import RunEvidence, finished_run_findings, read_run, seeds_findings, track_findings
from lab.record.script_reading import READABLE_NAME

FIGURE_DIGITS = 8
"""Decimals of scores: as many as a log's exact line has."""


@dataclass(frozen=True)
class SubmissionOrder:
    """What a person gives: the runs, and the only three texts that no program measures."""

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
    """Build the record folder, or say why not. Raises EvidenceError, BundleError, OSError for input that is no run."""
    if not order.runs:
        raise EvidenceError("name the folder of at least one finished run")
    runs = sorted((read_run(path) for path in order.runs), key=lambda run: (run.seed, run.label))
    date = order.date or newest_day(order.runs)
    target = order.records / order.track / folder_name(order.name, date)
    if target.exists():
        raise EvidenceError(f"{target} exists: records are frozen, choose another --name or --date")
    reasons = [*refusals(runs), *track_findings(runs, order.track)]
    readable, readable_reasons = readable_script(order.runs, runs)
    reasons += readable_reasons
    if reasons:
        return SubmissionOutcome(target, tuple(reasons), {})
    claims = submission_claims(order, runs, date)
    reasons = build_folder(target, order, runs, claims, readable)
    return SubmissionOutcome(target, tuple(reasons), claims)


def refusals(runs: Sequence[RunEvidence]) -> list[SubmissionFinding]:
    """Everything that speaks against these runs, each alone and together."""
    alone = [finding for run in runs for finding in finished_run_findings(run)]
    return alone + list(seeds_findings(runs))


def newest_day(paths: Sequence[Path]) -> str:
    newest = max((path / "result.json").stat().st_mtime for path in paths)
    return datetime.fromtimestamp(newest, timezone.utc).strftime("%Y-%m-%d")


def folder_name(name: str, date: str) -> str:
    """<date>_<name> with the blanks of the name as underscores. Raises EvidenceError."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise EvidenceError(f"--date {date!r} is not of the form YYYY-MM-DD")
    text = re.sub(r"\s+", "_", name.strip())
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", text):
        raise EvidenceError(f"--name {name!r} can't name a folder: use letters, digits, blanks, '.', '_', '+' and '-'")
    return f"{date}_{text}"


# ---- the script that people read ----


def readable_script(paths: Sequence[Path], runs: Sequence[RunEvidence]) -> tuple[str, list[SubmissionFinding]]:
    """The readable script of the runs, and where it is not the one that was packed.

    A run that was started from one packed file has no readable source: what is packed in it stands in for that.
    """
    reasons: list[SubmissionFinding] = []
    packed = (runs[0].code or b"").decode("utf-8", errors="replace")
    sources = {path: file.read_text("utf-8", "replace") for path in paths if (file := path / READABLE_NAME).is_file()}
    for source in dict.fromkeys(sources.values()):
        if not packs_to(source, packed):
            places = ", ".join(str(path) for path, text in sources.items() if text == source)
            reasons.append(fault("R16-readable-differs", f"{places}: {READABLE_NAME} does not pack to {SCRIPT_NAME}"))
    if sources:
        return next(iter(sources.values())), reasons
    try:
        return unpack_source(packed), reasons
    except BundleError:
        return packed, reasons  # started from a readable bundle: it is its own source


def packs_to(source: str, packed: str) -> bool:
    """Whether packing `source` gives `packed`, byte for byte (some seconds for a whole program)."""
    try:
        return pack_source(source) == packed
    except BundleError:
        return source == packed


# ---- what is claimed ----


def submission_claims(order: SubmissionOrder, runs: Sequence[RunEvidence], date: str) -> dict[str, Any]:
    """submission.json in the field's keys. Largest over the seeds: bytes, step_stop, both times; else means."""
    results = [run.result for run in runs]
    first = results[0]
    totals = [result["bytes_total"] for result in results]
    return {
        "author": order.author,
        "github_id": order.github_id,
        "name": order.name,
        "blurb": order.blurb,
        "date": date,
        "track": order.track.removeprefix("track_"),
        "val_loss": mean_of(results, "val_loss"),
        "val_bpb": mean_of(results, "val_bpb"),
        "val_loss_std": spread_of(results, "val_loss"),
        "val_bpb_std": spread_of(results, "val_bpb"),
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): seed_claims(run.result) for run in runs},
        "bytes_total": max(totals),
        "bytes_code": first["bytes_code"],
        "artifact_bytes_max": max(totals),
        "artifact_bytes_mean": round(statistics.fmean(totals), 1),
        "limit_bytes": min(result["limit_bytes"] for result in results),
        "step_stop": max(result["steps"] for result in results),
        "train_steps_mean": round(statistics.fmean(result["steps"] for result in results), 1),
        "wallclock_seconds": round(max(result["train_seconds"] for result in results), 3),
        "eval_time_seconds": round(max(result["eval_seconds"] for result in results), 3),
        "model_params": first["params"],
        "eval_seq_len": first["eval_seq_len"],
        "eval_stride": sorted({result["eval_stride"] for result in results})[-1],
        "hardware": "; ".join(sorted({result["machine"] for result in results})),
        "pytorch_version": ", ".join(sorted({result["torch"] for result in results})),
        "python_version": ", ".join(sorted({result["python"] for result in results})),
        "preset": first["preset"],
        "data_id": first["data_id"],
        "val_data_id": first["val_data_id"],
        "tokenizer_sha256": first["tokenizer_sha256"],
        "config_hash": first["config_hash"],
        "code_sha256": first["code_sha256"],
    }


def seed_claims(result: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of seed_results; artifact_bytes is code and weights together, as the field has it."""
    return {
        "val_bpb": round(result["val_bpb"], FIGURE_DIGITS),
        "val_loss": round(result["val_loss"], FIGURE_DIGITS),
        "artifact_bytes": result["bytes_total"],
        "bytes_model": result["bytes_model"],
        "steps": result["steps"],
        "train_seconds": round(result["train_seconds"], 3),
        "eval_time_seconds": round(result["eval_seconds"], 3),
        "artifact_sha256": result["artifact_sha256"],
    }


def mean_of(results: Sequence[Mapping[str, Any]], key: str) -> float:
    return round(statistics.fmean(result[key] for result in results), FIGURE_DIGITS)


def spread_of(results: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Sample standard deviation; None where one seed has none."""
    return round(statistics.stdev(result[key] for result in results), FIGURE_DIGITS) if len(results) > 1 else None


# ---- the folder ----


def build_folder(
    target: Path, order: SubmissionOrder, runs: Sequence[RunEvidence], claims: dict[str, Any], readable: str
) -> list[SubmissionFinding]:
    """Write everything beside the target, check it as a reviewer would, rename it. Returns errors of that check."""
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
    """(path in the folder, content) of every file but the list of hashes. No weights and no artifact go in."""
    folders = {str(path): path for path in order.runs}
    facts = RecordFacts(claims, [run.result for run in runs], runs[0].config or {}, hash_list({}, runs))
    yield README_NAME, render_readme(facts).encode()
    yield CLAIMS_NAME, as_json(claims).encode()
    yield SCRIPT_NAME, runs[0].code or b""
    yield READABLE_NAME, readable.encode()
    yield "requirements.txt", order.requirements.read_bytes()
    for run in runs:
        folder = folders[run.label]
        yield f"train_seed{run.seed}.log", (folder / "train.log").read_bytes()
        for name in ("result.json", "config.json"):
            yield f"runs/seed{run.seed}/{name}", (folder / name).read_bytes()


def hash_list(files: Mapping[str, bytes], runs: Sequence[RunEvidence]) -> dict[str, Any]:
    """SHA-256 of everything that a score depends on, and of every file of the folder."""
    first = runs[0].result
    return {
        "code_sha256": first["code_sha256"],
        "config_hash": first["config_hash"],
        "data_id": first["data_id"],
        "val_data_id": first["val_data_id"],
        "tokenizer_sha256": first["tokenizer_sha256"],
        "artifact_sha256": {str(run.seed): run.result["artifact_sha256"] for run in runs},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
