"""Judges a record folder, ours or one that other tools made: everything that a reviewer can know without running it."""

import hashlib
import re
from collections.abc import Callable, Sequence

from lab.cli import read_json_object
from lab.record import claim_check, code_check
from lab.record.finding import EvidenceError, Findings, SubmissionFinding, error, group_by, warning
from lab.record.log_reading import LogReading
from lab.record.record_folder import CLAIMS_NAME, HASHES_NAME, README_NAME, SCRIPT_NAME, RecordFolder
from lab.record.run_check import feature_audit, finished_run_findings, seeds_findings, track_findings

STRAY_ENDINGS = (".pyc", ".o", ".so", ".pt", ".pth", ".ckpt", ".safetensors", ".npy", ".swp", ".DS_Store")
MOST_FOLDER_BYTES = 20_000_000
MOST_TRAIN_SECONDS, MOST_EVAL_SECONDS = 600.5, 600.0
"""Published timers read 600.0 to 600.5 s where the clock stopped the last step."""
ANNOUNCEMENT = re.compile(
    r"(?<![a-z_])(?:late_|tight_)?(swa|ema|lawa|qat|ttt)(?:_enabled)?:\s*(?:True|1)\b", re.IGNORECASE
)
"""Features with a moment at which they act. Architecture acts in every step and has no line."""
SETTING_LINE = re.compile(r"^\s*\w+:\s*(?:[-+\d.\[({'\"/]\S*|True|False|None)\s*$")
LEAST_COMMON_LOSSES = 3


# ---- files ----


def file_findings(record: RecordFolder) -> Findings:
    """Finds files that every submission must have and this one has not, and those that none should have."""
    for name in (README_NAME, CLAIMS_NAME, SCRIPT_NAME):
        path = record.path / name
        if not path.is_file() or not path.stat().st_size:
            yield error("S01-missing-file", f"{name} is {'empty' if path.is_file() else 'missing'}")
    if not record.logs:
        yield error("S01-missing-file", "there is no log (train*.log)")
    stray = [path.relative_to(record.path).as_posix() for path in record.files if path.name.endswith(STRAY_ENDINGS)]
    if stray:
        more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
        yield warning("S07-stray-file", f"files that a submission does not need: {', '.join(stray[:5])}{more}")
    size = sum(path.stat().st_size for path in record.files)
    if size > MOST_FOLDER_BYTES:
        yield warning("S08-large-folder", f"the folder has {size:,} bytes: records hold evidence, not weights")


def hash_list_findings(record: RecordFolder) -> Findings:
    """Checks that HASHES.json, where there is one, names every file, each with its hash."""
    path = record.path / HASHES_NAME
    if not path.exists():
        return
    try:
        listed = read_json_object(path, EvidenceError)["files"]
        stated = {str(name): str(digest) for name, digest in listed.items()}
    except (EvidenceError, KeyError, AttributeError) as problem:
        yield error("S70-hash", f"{HASHES_NAME} can't be read: {problem!r}")
        return
    for name, digest in stated.items():
        file = record.path / name
        if not file.is_file():
            yield error("S70-hash", f"{HASHES_NAME} names {name}, which is missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            yield error("S70-hash", f"{name} was changed: its sha256 is not the one in {HASHES_NAME}")
    present = {file.relative_to(record.path).as_posix() for file in record.files}
    if extra := sorted(present - set(stated) - {HASHES_NAME}):
        more = ", ..." if len(extra) > 8 else ""
        yield warning("S71-unlisted", f"not in {HASHES_NAME}: {', '.join(extra[:8])}{more}")


def recorded_run_findings(record: RecordFolder) -> Findings:
    """Checks the results in runs/seed<N>/, where there are any: sound, of one experiment, and what is claimed."""
    for run in record.runs:
        yield from finished_run_findings(run)
    yield from seeds_findings(record.runs)
    yield from track_findings(record.runs, record.track)
    yield from claim_check.agreement_findings(record)


# ---- logs ----


def ending_findings(record: RecordFolder) -> Findings:
    """Finds logs that do not reach a final score, and what went wrong on the way."""
    for log in record.logs:
        final = log.last_final
        if final is None:
            last = log.last_line.strip()[:80]
            yield error("S10-truncated", f"{log.name} has no final score: it ends with {last!r}")
        # the first and the last alone: the ranks of one job repeat each other
        for number, text in dict.fromkeys(log.troubles[:1] + log.troubles[-1:]):
            make = error if final is None or number > final.line else warning
            after = ", after the final score" if final and number > final.line else ""
            yield make("S11-trouble", f"{log.name} line {number}{after}: {text[:120]}")


def clock_findings(record: RecordFolder) -> Findings:
    """Holds training and evaluation against the time of the track; runs are held against their own caps elsewhere."""
    make = warning if "non" in record.track else error
    for log in record.logs if not record.runs else ():
        trained, longest = log.train_seconds or 0.0, max((*log.eval_seconds, log.total_eval_seconds or 0.0))
        if trained > MOST_TRAIN_SECONDS:
            yield make("S30-train-time", f"{log.name}: trained {trained:.1f} s, over {MOST_TRAIN_SECONDS:g} s")
        together = sum(log.eval_seconds)
        if longest > MOST_EVAL_SECONDS:
            yield make("S31-eval-time", f"{log.name}: evaluated {longest:.1f} s, over {MOST_EVAL_SECONDS:g} s")
        elif together > MOST_EVAL_SECONDS:
            text = f"{log.name}: its {len(log.eval_seconds)} evaluations took {together:.1f} s together"
            yield warning("S32-eval-sum", f"{text}: say which of them the score needs")


def experiment_findings(record: RecordFolder) -> Findings:
    """Checks that several logs are several runs of one configuration."""
    yield from duplicate_findings(record.logs)
    yield from difference_findings(record.logs)
    count = len(record.logs)
    if 0 < count < 3:
        yield warning("S43-few-seeds", f"{count} log{'s' * (count > 1)}: records are asked for three seeds")
    stated = record.claim("seeds")
    numbers = sorted(int(seed) for seed in stated if str(seed).isdecimal()) if isinstance(stated, list | dict) else []
    found = sorted({log.seed for log in record.logs if log.seed is not None})
    if found and (absent := [str(seed) for seed in numbers if seed not in found]):
        yield error("S44-seed-list", f"submission.json names seed {', '.join(absent)}, but the logs are of {found}")


def duplicate_findings(logs: Sequence[LogReading]) -> Findings:
    for code, what, key in (
        ("S41-log-twice", "are the same file", lambda log: log.sha256),
        ("S41-log-twice", "have the same training losses, so they are one run", training_losses),
        ("S40-seed-twice", "are of the same seed", lambda log: log.seed),
    ):
        groups = group_by(logs, key, "name").items()
        if doubles := [names for value, names in groups if value not in (None, ()) and len(names) > 1]:
            yield from (error(code, f"{' and '.join(names)} {what}") for names in doubles)
            return


def training_losses(log: LogReading) -> tuple[str, ...]:
    """Returns the losses and times of the step lines; none where there are too few to tell two runs apart."""
    lines = tuple(line.strip() for line in log.lines if "train_loss:" in line and "train_time:" in line)
    return lines if len(lines) >= LEAST_COMMON_LOSSES else ()


def difference_findings(logs: Sequence[LogReading]) -> Findings:
    """Finds settings that not all logs share (a setting that a log does not print is no difference)."""
    for key in sorted({key for log in logs for key in log.config}):
        values = group_by((log for log in logs if key in log.config), lambda log, key=key: log.config[key], "name")
        if len(values) > 1:
            texts = "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
            yield error("S42-config-differs", f"the logs are of different configurations: {key} is {texts}")


def announcement_findings(record: RecordFolder) -> Findings:
    """Finds features that a log announces and that act in no line of it, and in no feature audit either."""
    audits = {run.seed: feature_audit(run.result) for run in record.runs}
    silent: dict[str, list[str]] = {}
    for log in record.logs:
        acting = [line for line in log.lines if not ANNOUNCEMENT.search(line) and not SETTING_LINE.match(line)]
        for feature in dict.fromkeys(match[1].lower() for line in log.lines for match in ANNOUNCEMENT.finditer(line)):
            word = re.compile(rf"(?<![a-z]){feature}", re.IGNORECASE)
            counted = audits.get(log.seed, {}).get(feature, {}).get("count", 0)
            if not counted and not any(map(word.search, acting)):
                silent.setdefault(feature, []).append(log.name)
    for feature, names in silent.items():
        text = f"{feature} is announced as on in {', '.join(names)}, and no line says that it acted"
        yield warning("S61-never-acted", text)


# ---- all of it ----


FOLDER_CHECKS: tuple[Callable[[RecordFolder], Findings], ...] = (
    file_findings, claim_check.key_findings, ending_findings, claim_check.headline_findings,
    claim_check.loss_findings, claim_check.seed_findings, claim_check.arithmetic_findings, code_check.total_findings,
    code_check.code_size_findings, code_check.neighbour_findings, code_check.ran_code_findings,
    code_check.readable_findings, clock_findings, experiment_findings, recorded_run_findings,
    hash_list_findings, code_check.lint_findings, announcement_findings,
)  # fmt: skip


def check_record(record: RecordFolder) -> list[SubmissionFinding]:
    """Lists all findings about a folder, each once, in the order of the checks, errors before warnings."""
    findings = [*record.problems, *(finding for check in FOLDER_CHECKS for finding in check(record))]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity != "error")
