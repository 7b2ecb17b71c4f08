"""Judges a record folder, ours or one that other tools made: everything that a reviewer can know without running it."""

import re
from collections.abc import Callable

from lab.cli import read_json_object
from lab.record import claim_check, code_check, log_check, size_check, text_check
from lab.record.finding import SEVERITIES, EvidenceError, Findings, SubmissionFinding, error, listed, note, warning
from lab.record.log_reading import file_sha256
from lab.record.record_folder import CLAIMS_NAME, HASHES_NAME, README_NAME, SCRIPT_NAME, RecordFolder
from lab.record.run_check import finished_run_findings, seeds_findings, track_findings

STRAY_ENDINGS = (".pyc", ".o", ".so", ".pt", ".pth", ".ckpt", ".safetensors", ".npy", ".swp", ".DS_Store")
MOST_FOLDER_BYTES, MOST_NAME = 20_000_000, 200


def file_findings(record: RecordFolder) -> Findings:
    """Finds files that every submission must have and this one has not, and those that none should have."""
    renamed = {match[0] for problem in record.problems if (match := re.match(r"\S+(?= is named)", problem.text))}
    readmes = [path.name for path in record.path.glob("*") if path.name.lower().startswith("readme") and path.is_file()]
    for name in (README_NAME, CLAIMS_NAME, SCRIPT_NAME):
        path = record.path / name
        if name == README_NAME and readmes and name not in readmes:
            yield note("S06-other-name", f"{README_NAME} is named {listed(readmes)}")
        elif name in renamed or (name == CLAIMS_NAME and path.is_dir()):
            continue  # (said already)
        elif not path.is_file() or not path.stat().st_size:
            yield error("S01-missing-file", f"{name} is {'empty' if path.is_file() else 'missing'}")
    if not record.logs:
        yield error("S01-missing-file", "there is no log: no file prints losses of a training")
    stray = [path.relative_to(record.path).as_posix() for path in record.files if path.name.endswith(STRAY_ENDINGS)]
    if stray:
        yield warning("S07-stray-file", f"files that a submission does not need: {listed(stray, 5)}")
    size = sum(path.stat().st_size for path in record.files)
    if size > MOST_FOLDER_BYTES:
        yield warning("S08-large-folder", f"the folder has {size:,} bytes: records hold evidence, not weights")


def hash_list_findings(record: RecordFolder) -> Findings:
    """Checks that HASHES.json, where there is one, names every file, each with its hash."""
    path = record.path / HASHES_NAME
    if not path.exists():
        return
    try:
        files = read_json_object(path, EvidenceError)["files"]
        stated = {str(name): str(digest) for name, digest in files.items()}
    except (EvidenceError, KeyError, AttributeError) as problem:
        reason = (
            problem if isinstance(problem, EvidenceError) else f"it has no object of names as 'files' ({problem!r})"
        )
        yield error("S70-hash", f"{HASHES_NAME} can't be read: {reason}")
        return
    present = {file.relative_to(record.path).as_posix(): file for file in record.files}
    for name, digest in stated.items():
        if name not in present:
            yield error("S70-hash", f"{HASHES_NAME} names {name[:MOST_NAME]!r}, which is missing")
        elif file_sha256(present[name]) != digest:
            yield error("S70-hash", f"{name} was changed: its sha256 is not the one in {HASHES_NAME}")
    if extra := sorted(set(present) - set(stated) - {HASHES_NAME}):
        yield warning("S71-unlisted", f"not in {HASHES_NAME}: {listed(extra, 8)}")


def recorded_run_findings(record: RecordFolder) -> Findings:
    """Checks the results in runs/seed<N>/, where there are any: sound, of one experiment, and what is claimed."""
    for run in record.runs:
        yield from finished_run_findings(run)
    yield from seeds_findings(record.runs)
    yield from track_findings(record.runs, record.track)
    yield from claim_check.agreement_findings(record)


FOLDER_CHECKS: tuple[Callable[[RecordFolder], Findings], ...] = (
    file_findings, claim_check.key_findings, log_check.ending_findings, claim_check.headline_findings,
    claim_check.loss_findings, claim_check.seed_findings, text_check.arithmetic_findings, size_check.total_findings,
    size_check.code_size_findings, code_check.neighbour_findings, code_check.ran_code_findings,
    code_check.readable_findings, log_check.clock_findings, log_check.experiment_findings, recorded_run_findings,
    hash_list_findings, code_check.lint_findings, log_check.announcement_findings,
)  # fmt: skip


def check_record(record: RecordFolder) -> list[SubmissionFinding]:
    """Lists all findings about a folder, each once, in the order of the checks, the worst first."""
    findings = [*record.problems, *(finding for check in FOLDER_CHECKS for finding in check(record))]
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
