"""Judges a record folder, ours or one that other tools made: everything that a reviewer can know without running it."""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lab.record.claim_check import (
    arithmetic_findings,
    headline_findings,
    key_findings,
    loss_findings,
    seed_findings,
)
from lab.record.code_check import (
    code_size_findings,
    lint_findings,
    neighbour_findings,
    ran_code_findings,
    readable_findings,
    total_findings,
)
from lab.record.finding import SubmissionFinding, doubt, fault
from lab.record.log_check import announcement_findings, clock_findings, ending_findings, experiment_findings
from lab.record.record_folder import CLAIMS_NAME, HASHES_NAME, README_NAME, SCRIPT_NAME, RecordFolder
from lab.record.run_check import finished_run_findings, seeds_findings, track_findings

STRAY_ENDINGS = (".pyc", ".o", ".so", ".pt", ".pth", ".ckpt", ".safetensors", ".npy", ".swp", ".DS_Store")
MOST_FOLDER_BYTES = 20_000_000


def file_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """The files that every submission must have, and those that none should."""
    for name in (README_NAME, CLAIMS_NAME, SCRIPT_NAME):
        path = record.path / name
        if not path.is_file() or not path.stat().st_size:
            yield fault("S01-missing-file", f"{name} is {'empty' if path.is_file() else 'missing'}")
    if not record.logs:
        yield fault("S01-missing-file", "there is no log (train*.log)")
    files = [path for path in sorted(record.path.rglob("*")) if path.is_file()]
    stray = [path.relative_to(record.path).as_posix() for path in files if path.name.endswith(STRAY_ENDINGS)]
    if stray:
        more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
        yield doubt("S07-stray-file", f"files that a submission does not need: {', '.join(stray[:5])}{more}")
    size = sum(path.stat().st_size for path in files)
    if size > MOST_FOLDER_BYTES:
        yield doubt("S08-large-folder", f"the folder has {size:,} bytes: records hold evidence, not weights")


def hash_list_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """HASHES.json, where there is one, must name every file, each with its hash."""
    path = record.path / HASHES_NAME
    if not path.exists():
        return
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        stated = {str(name): str(digest) for name, digest in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield fault("S70-hash", f"{HASHES_NAME} can't be read: {error!r}")
        return
    for name, digest in stated.items():
        file = record.path / name
        if not file.is_file():
            yield fault("S70-hash", f"{HASHES_NAME} names {name}, which is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            yield fault("S70-hash", f"{name} was changed: its sha256 is not the one in {HASHES_NAME}")
    present = {file.relative_to(record.path).as_posix() for file in record.path.rglob("*") if file.is_file()}
    if extra := sorted(present - set(stated) - {HASHES_NAME}):
        yield doubt("S71-unlisted", f"not in {HASHES_NAME}: {', '.join(extra[:8])}{', ...' if len(extra) > 8 else ''}")


def recorded_run_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """runs/seed<N>/result.json, where there are any: sound, of one experiment, and what submission.json claims."""
    for run in record.runs:
        yield from finished_run_findings(run)
    yield from seeds_findings(record.runs)
    yield from track_findings(record.runs, record.track)
    if record.runs:
        yield from agreement_findings(record, record.claims or {})


def agreement_findings(record: RecordFolder, claims: dict[str, Any]) -> Iterator[SubmissionFinding]:
    """Every number that submission.json shares with the results."""
    results = {str(run.seed): run.result for run in record.runs}
    stated = claims.get("seed_results")
    stated = stated if isinstance(stated, dict) else {}
    if set(stated) != set(results):
        yield fault("S81-run-disagrees", f"seed_results is of {sorted(stated)}, runs/ of {sorted(results)}")
    yield from differing_claims("submission.json", claims, expected_claims(list(results.values())))
    for seed in sorted(set(stated) & set(results)):
        if isinstance(stated[seed], dict):
            expected = {key: results[seed][name] for key, name in SEED_CLAIMS.items()}
            yield from differing_claims(f"submission.json, seed {seed}", stated[seed], expected)


SEED_CLAIMS = {
    "val_bpb": "val_bpb", "val_loss": "val_loss", "artifact_bytes": "bytes_total", "bytes_model": "bytes_model",
    "steps": "steps", "train_seconds": "train_seconds", "eval_time_seconds": "eval_seconds",
    "artifact_sha256": "artifact_sha256",
}  # fmt: skip
"""Key of an entry of seed_results -> key of result.json."""


def expected_claims(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What submission.json must say of these results, for the keys that can be computed again."""
    expected = {key: results[0][key] for key in SHARED_CLAIMS}
    for key, name in LARGEST_CLAIMS.items():
        expected[key] = max(result[name] for result in results)
    for key in ("val_bpb", "val_loss"):
        values = [result[key] for result in results]
        expected[key] = statistics.fmean(values)
        expected[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return expected


SHARED_CLAIMS = ("config_hash", "code_sha256", "data_id", "val_data_id", "tokenizer_sha256", "bytes_code")
LARGEST_CLAIMS = {
    "bytes_total": "bytes_total", "artifact_bytes_max": "bytes_total", "step_stop": "steps",
    "wallclock_seconds": "train_seconds", "eval_time_seconds": "eval_seconds",
}  # fmt: skip
"""Keys of submission.json that are the largest over the seeds."""


def differing_claims(place: str, stated: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[SubmissionFinding]:
    for key, value in expected.items():
        claim = stated.get(key, value)
        tolerance = 1e-3 if "seconds" in key else 1e-8  # what rounding leaves
        both = isinstance(claim, int | float) and isinstance(value, int | float)
        if claim != value and not (both and abs(claim - value) <= tolerance):
            yield fault("S81-run-disagrees", f"{place}: {key} is {claim}, but the results say {value}")


FOLDER_CHECKS: tuple[Callable[[RecordFolder], Iterator[SubmissionFinding]], ...] = (
    file_findings,
    key_findings,
    ending_findings,
    headline_findings,
    loss_findings,
    seed_findings,
    arithmetic_findings,
    total_findings,
    code_size_findings,
    neighbour_findings,
    ran_code_findings,
    readable_findings,
    clock_findings,
    experiment_findings,
    recorded_run_findings,
    hash_list_findings,
    lint_findings,
    announcement_findings,
)


def check_record(record: RecordFolder) -> list[SubmissionFinding]:
    """All findings about a folder, in the order of the checks, errors before warnings."""
    findings = [*record.problems, *(finding for check in FOLDER_CHECKS for finding in check(record))]
    unique = dict.fromkeys(findings)
    return sorted(unique, key=lambda finding: finding.severity != "error")
