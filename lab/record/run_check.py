"""Reads finished runs, and checks what must hold before anything is claimed from them: of each, and of the seeds."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf.config.config import KNOBS, config_from_dict, config_hash
from golf.config.knobs import ConfigError
from lab.cli import read_json_object
from lab.record.finding import EvidenceError, Findings, error, group_by
from lab.record.log_reading import LogReading, read_log

TEXT_KEYS = (
    "run_id", "preset", "config_hash", "data_id", "val_data_id", "tokenizer_sha256", "artifact_sha256", "code_sha256",
    "machine", "torch", "python",
)  # fmt: skip
WHOLE_KEYS = (
    "seed", "params", "steps", "train_tokens", "world_size", "val_tokens", "val_bytes", "val_docs", "eval_seq_len",
    "eval_stride", "bytes_code", "bytes_model", "bytes_total", "limit_bytes",
)  # fmt: skip
NUMBER_KEYS = ("train_seconds", "eval_seconds", "val_loss", "val_bpb", "max_wallclock_seconds", "max_eval_seconds")
RESULT_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXT_KEYS, ("text", lambda value: isinstance(value, str))),
    **dict.fromkeys(WHOLE_KEYS, ("a whole number", lambda value: is_number(value) and isinstance(value, int))),
    **dict.fromkeys(NUMBER_KEYS, ("a finite number", lambda value: is_number(value))),
    **dict.fromkeys(("valid", "partial"), ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(("features", "probes"), ("an object of objects", lambda value: is_table(value))),
    **dict.fromkeys(("parity", "ledger", "fingerprint"), ("an object", lambda value: isinstance(value, dict))),
    "findings": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
}
"""What a result.json must hold to be evidence: key -> (kind in words, whether a value is of it)."""
COMPETITION_BYTES, COMPETITION_SECONDS = 16_000_000, 600.0
LARGEST_WHOLE = 10**18
RESULT_PAIR = re.compile(r"(\w+):(\S+)")
RESULT_FIGURES = {
    "val_loss": ".8f", "val_bpb": ".8f", "bytes_total": "d", "steps": "d", "train_seconds": ".1f",
    "eval_seconds": ".1f", "config_hash": "s", "code_sha256": "s", "artifact_sha256": "s",
}  # fmt: skip
"""Keys of result.json that the last line of a log repeats, and how golf/run/log_lines.py writes each."""
PROOF = "proof.json"
SCRIPT, ARTIFACT = "train_gpt.py", "model.golf"
HASH_DIGITS = 20
MEASURED_FILES = {SCRIPT: ("code_sha256", "bytes_code"), ARTIFACT: ("artifact_sha256", "bytes_model")}
"""File of a run -> keys of result.json with its hash and its size."""
Reasons = Iterator[tuple[str, str]]
"""(code, text) of what makes a run no evidence."""


@dataclass(frozen=True)
class RunEvidence:
    """Holds what one run left behind, read from its folder or from a record."""

    label: str
    """How findings name it: its folder."""
    result: dict[str, Any]
    config: dict[str, Any]
    log: LogReading | None
    files: dict[str, bytes | None]
    """The measured files that must be there, None for one that is not: records hold the script alone."""
    changed: tuple[str, ...] = ()
    """Files that are no longer what a stage of the run recorded."""

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def code(self) -> bytes | None:
        """The packed script."""
        return self.files[SCRIPT]


def feature_audit(result: Mapping[str, Any]) -> Any:
    """Returns what the switched-on features of a run did: `features` of its result, `witness` in older ones."""
    return result["features"] if "features" in result else result.get("witness")


def read_result(path: Path) -> dict[str, Any]:
    """Reads a result.json with every key that evidence needs. Raises EvidenceError."""
    if not path.exists():
        raise EvidenceError(f"{path} is missing: the run is not finished (python train_gpt.py --resume RUN_ID)")
    result = read_json_object(path, EvidenceError)
    values = result | ({"features": feature_audit(result)} if "witness" in result else {})
    missing = [key for key in RESULT_KINDS if key not in values]
    if missing:
        raise EvidenceError(f"{path} lacks {', '.join(missing)}: an older version of the program made it, run it again")
    for key, (kind, holds) in RESULT_KINDS.items():
        if not holds(values[key]):
            raise EvidenceError(f"{path}: {key} must be {kind}, not {values[key]!r}")
    if result["val_tokens"] <= 0 or result["val_bytes"] <= 0:
        raise EvidenceError(f"{path}: nothing was scored: val_tokens and val_bytes must be positive")
    return with_proof(result, path.with_name(PROOF))


def with_proof(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adds the verdict of tools/prove.py to the probes of a result, where there is one. Raises EvidenceError."""
    if not path.exists():
        return result
    proof = read_json_object(path, EvidenceError)
    own = all(proof.get(key) == result.get(key) for key in ("artifact_sha256", "val_data_id"))
    detail = str(proof.get("detail", "")) if own else "of another artifact or text: run tools/prove.py again"
    row = {"verdict": str(proof.get("verdict")) if own else "FAIL", "detail": detail}
    return result | {"probes": result["probes"] | {"proof by decompression": row}}


def is_number(value: object) -> bool:
    """Says whether a value is a number that a figure can have: finite, and no whole number beyond any float."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < LARGEST_WHOLE
    return isinstance(value, float) and math.isfinite(value)


def is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())


def bytes_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def read_run(folder: Path) -> RunEvidence:
    """Reads the evidence in the folder of a run. Raises EvidenceError where it is no folder of a finished run."""
    if not folder.is_dir():
        raise EvidenceError(f"{folder} is not a folder: name the folder of a finished run")
    log = folder / "train.log"
    return RunEvidence(
        label=str(folder),
        result=read_result(folder / "result.json"),
        config=read_json_object(folder / "config.json", EvidenceError),
        log=read_log(log) if log.is_file() else None,
        files={name: bytes_if_there(folder / name) for name in MEASURED_FILES},
        changed=tuple(changed_files(folder)),
    )


def changed_files(folder: Path) -> Iterator[str]:
    """Names files whose hash is not the one in stages.json; checkpoints may be gone, and are not asked for."""
    path = folder / "stages.json"
    stages = read_json_object(path, EvidenceError) if path.exists() else {}
    for name, digest in {name: digest for outputs in stages.values() for name, digest in outputs.items()}.items():
        data = bytes_if_there(folder / name)
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            yield name


# ---- one run ----


def finished_run_findings(run: RunEvidence) -> Findings:
    """Finds everything that makes a run no evidence, in a fixed order."""
    for check in (figure_reasons, log_reasons, file_reasons, config_reasons, probe_reasons):
        for code, text in check(run):
            yield error(code, f"{run.label}: {text}")


def figure_reasons(run: RunEvidence) -> Reasons:
    """Checks the run's own verdict, and its bytes and seconds against its own limits."""
    result = run.result
    total, limit, parts = result["bytes_total"], result["limit_bytes"], result["bytes_code"] + result["bytes_model"]
    if not result["valid"] or result["findings"]:
        yield "R01-invalid", f"the run is INVALID: {'; '.join(result['findings']) or 'no reason given'}"
    if result["partial"]:
        scored, of_all = result["val_tokens"], result.get("of_tokens") or "all"
        yield "R02-partial", f"only {scored:,} of {of_all} validation tokens were scored"
    if total > limit:
        yield "R03-over-size", f"{total:,} bytes are {total - limit:,} over the limit of {limit:,}"
    if parts != total:
        yield "R09-bytes-sum", f"bytes_total is {total:,}, but code and model are {parts:,}"
    for measured, cap in (("train_seconds", "max_wallclock_seconds"), ("eval_seconds", "max_eval_seconds")):
        seconds, most = result[measured], result[cap]
        if most and seconds > most:
            yield "R04-over-time", f"{measured} {seconds:.2f} is over {cap} {most:g}"


def log_reasons(run: RunEvidence) -> Reasons:
    """Holds the log's last line against result.json, and its opening lines against the configuration and the code."""
    log, result = run.log, run.result
    if log is None:
        yield "R05-log-result", "there is no log"
        return
    if not log.last_line.startswith("result:"):
        yield "R05-log-result", f"the last line of {log.name} is not `result: ...`, so the log is cut off"
    elif differences := result_line_differences(log.last_line, result):
        yield "R05-log-result", f"{log.name} and result.json differ: {'; '.join(differences)}"
    final = log.last_final
    if final is None:
        yield "R05-log-result", f"{log.name} has no final_*_roundtrip_exact line"
    elif abs(final.val_bpb - result["val_bpb"]) > (1e-8 if final.exact else 5e-5):
        line = f"line {final.line} of {log.name} says val_bpb {final.val_bpb:.8f}"
        yield "R05-log-result", f"{line}, result.json {result['val_bpb']:.8f}"
    for key in ("config_hash", "data_id", "tokenizer_sha256"):
        stated = log.config.get(key, result[key])
        if stated != result[key]:
            yield "R05-log-result", f"{log.name} opens with {key} {stated}, result.json: {result[key]}"
    yield from log_code_reasons(run, log)


def log_code_reasons(run: RunEvidence, log: LogReading) -> Reasons:
    """Holds the code that every start of the run (it may have been resumed) names against the code that is shipped."""
    if run.code is None:
        return
    stated = log.code_hashes
    shipped = hashlib.sha256(run.code).hexdigest()
    if others := sorted(stated - {shipped}):
        text = f"{log.name} was written by code with sha256 {others[0][:16]}..., but train_gpt.py has {shipped[:16]}..."
        yield "R06-code-in-log", text
    elif not stated:
        yield "R06-code-in-log", f"{log.name} does not name the code_sha256 of the code that ran"


def result_line_differences(line: str, result: Mapping[str, Any]) -> list[str]:
    """Lists where the last line of a log does not say what result.json says, digit for digit."""
    wanted = {key: format(result[key], form) for key, form in RESULT_FIGURES.items()}
    stated = {**dict(RESULT_PAIR.findall(line)), "status": line.removeprefix("result:").split()[:1]}
    wanted["status"] = ["valid" if result["valid"] else "INVALID"]
    return [
        f"{key} {stated.get(key, '(none)')} in the log, {value} in result.json"
        for key, value in wanted.items()
        if stated.get(key) != value
    ]


def file_reasons(run: RunEvidence) -> Reasons:
    """Holds the bytes on the disk against those that were measured."""
    for name, data in run.files.items():
        if data is None:
            yield "R07-file-hash", f"{name} is missing, so nothing proves its hash and size"
            continue
        digest, (stated, size) = hashlib.sha256(data).hexdigest(), (run.result[key] for key in MEASURED_FILES[name])
        if digest != stated:
            yield "R07-file-hash", f"{name} has sha256 {digest[:16]}..., result.json says {stated[:16]}..."
        if len(data) != size:
            yield "R07-file-hash", f"{name} has {len(data):,} bytes, result.json says {size:,}"
    for name in run.changed:
        yield "R07-file-hash", f"{name} is not what stages.json recorded: it was changed afterwards"


def config_reasons(run: RunEvidence) -> Reasons:
    """Compares the hash of config.json with those stated. Older hashes, of 16 digits, were of all knobs of a version
    and can't be made here."""
    stated = {"config.json": str(run.config.get("config_hash")), "result.json": run.result["config_hash"]}
    sections = {name: part for name, part in run.config.items() if isinstance(part, dict)}
    knobs = {knob for part in sections.values() for knob in part}
    if len(stated["config.json"]) == HASH_DIGITS and knobs <= set(KNOBS):
        try:
            stated["the knobs of config.json"] = config_hash(config_from_dict(sections))
        except ConfigError as problem:
            yield "R07-file-hash", f"config.json: {problem}"
    if len(set(stated.values())) > 1:
        texts = ", ".join(f"{digest} ({place})" for place, digest in stated.items())
        yield "R07-file-hash", f"config_hash differs: {texts}"


def probe_reasons(run: RunEvidence) -> Reasons:
    for name, probe in run.result["probes"].items():
        if probe.get("verdict") not in ("PASS", "NOT EXERCISED"):
            yield "R08-probe", f"probe {name}: {probe.get('verdict')}: {probe.get('detail', '')}"


# ---- several runs ----


def seeds_findings(runs: Sequence[RunEvidence]) -> Findings:
    """Finds runs that differ in more than the seed, and runs that are one run."""
    shared = (
        ("R10-config-differs", "config_hash", "configurations"),
        ("R11-code-differs", "code_sha256", "code"),
        ("R12-data-differs", "data_id", "training data"),
        ("R12-data-differs", "val_data_id", "validation data"),
        ("R13-tokenizer-differs", "tokenizer_sha256", "tokenizers"),
    )
    for code, key, what in shared:
        groups = group_by(runs, lambda run, key=key: run.result[key], "label")
        if len(groups) > 1:
            texts = "; ".join(f"{str(value)[:16]} in {', '.join(labels)}" for value, labels in groups.items())
            yield error(code, f"the runs have different {what} ({key}): {texts}")
    for code, key in (("R14-seed-twice", "seed"), ("R15-artifact-twice", "artifact_sha256")):
        for value, labels in group_by(runs, lambda run, key=key: run.result[key], "label").items():
            if len(labels) > 1:
                yield error(code, f"{key} {str(value)[:16]} is that of {len(labels)} runs: {', '.join(labels)}")


def track_findings(runs: Sequence[RunEvidence], track: str) -> Findings:
    """Applies the competition's own limits, whatever limits a run had set for itself."""
    for run in runs:
        result = run.result
        if "16mb" in track and result["bytes_total"] > COMPETITION_BYTES:
            yield error("R17-track", f"{run.label}: {result['bytes_total']:,} bytes are too many for {track}")
        for key in ("train_seconds", "eval_seconds"):
            if "10min" in track and result[key] > COMPETITION_SECONDS:
                yield error("R17-track", f"{run.label}: {key} {result[key]:.2f} is too long for {track}")
