"""What must hold of finished runs before anything is claimed from them: each run alone, and the seeds together."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf.config.config import KNOBS, config_from_dict, config_hash
from golf.config.knobs import ConfigError
from lab.record.finding import EvidenceError, SubmissionFinding, fault
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
FLAG_KEYS, TABLE_KEYS, OBJECT_KEYS = ("valid", "partial"), ("witness", "probes"), ("parity", "ledger", "fingerprint")
RESULT_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXT_KEYS, ("text", lambda value: isinstance(value, str))),
    **dict.fromkeys(WHOLE_KEYS, ("a whole number", lambda value: is_number(value) and isinstance(value, int))),
    **dict.fromkeys(NUMBER_KEYS, ("a finite number", lambda value: is_number(value))),
    **dict.fromkeys(FLAG_KEYS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(TABLE_KEYS, ("an object of objects", lambda value: is_table(value))),
    **dict.fromkeys(OBJECT_KEYS, ("an object", lambda value: isinstance(value, dict))),
    "findings": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
}
"""What a result.json must hold to be evidence: key -> (kind in words, whether a value is of it)."""
COMPETITION_BYTES, COMPETITION_SECONDS = 16_000_000, 600.0
RESULT_PAIR = re.compile(r"(\w+):(\S+)")


@dataclass(frozen=True)
class RunEvidence:
    """What one run left behind, read from its folder or from a record."""

    label: str
    """How findings name it: its folder."""
    result: dict[str, Any]
    config: dict[str, Any] | None
    log: LogReading | None
    code: bytes | None
    """The packed script."""
    artifact: bytes | None
    """The artifact; records do not hold it."""
    has_artifact: bool
    """Whether the artifact should be there."""
    changed: tuple[str, ...] = ()
    """Files that are no longer what a stage of the run recorded."""

    @property
    def seed(self) -> int:
        return self.result["seed"]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises EvidenceError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvidenceError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise EvidenceError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_result(path: Path) -> dict[str, Any]:
    """result.json with every key that evidence needs. Raises EvidenceError."""
    if not path.exists():
        raise EvidenceError(f"{path} is missing: the run is not finished (python train_gpt.py --resume RUN_ID)")
    result = read_json_object(path)
    missing = [key for key in RESULT_KINDS if key not in result]
    if missing:
        raise EvidenceError(f"{path} lacks {', '.join(missing)}: an older version of the program made it, run it again")
    for key, (kind, holds) in RESULT_KINDS.items():
        if not holds(result[key]):
            raise EvidenceError(f"{path}: {key} must be {kind}, not {result[key]!r}")
    if result["val_tokens"] <= 0 or result["val_bytes"] <= 0:
        raise EvidenceError(f"{path}: nothing was scored: val_tokens and val_bytes must be positive")
    return result


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())


def bytes_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def read_run(folder: Path) -> RunEvidence:
    """The evidence in the folder of a run. Raises EvidenceError where it is no folder of a finished run."""
    if not folder.is_dir():
        raise EvidenceError(f"{folder} is not a folder: name the folder of a finished run")
    log = folder / "train.log"
    return RunEvidence(
        label=str(folder),
        result=read_result(folder / "result.json"),
        config=read_json_object(folder / "config.json"),
        log=read_log(log) if log.is_file() else None,
        code=bytes_if_there(folder / "train_gpt.py"),
        artifact=bytes_if_there(folder / "model.golf"),
        has_artifact=True,
        changed=tuple(changed_files(folder)),
    )


def changed_files(folder: Path) -> Iterator[str]:
    """Files whose hash is not the one that stages.json has; checkpoints may be gone, and are not asked for."""
    stages = read_json_object(folder / "stages.json") if (folder / "stages.json").exists() else {}
    recorded = {name: digest for outputs in stages.values() for name, digest in outputs.items()}
    for name, digest in recorded.items():
        data = bytes_if_there(folder / name)
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            yield name


# ---- one run ----


def finished_run_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    """Everything that makes a run no evidence, in a fixed order."""
    for check in (status_findings, size_findings, time_findings, log_findings, hash_findings, probe_findings):
        yield from check(run)


def status_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    result = run.result
    if not result["valid"] or result["findings"]:
        reasons = "; ".join(result["findings"]) or "no reason given"
        yield fault("R01-invalid", f"{run.label}: the run is INVALID: {reasons}")
    if result["partial"]:
        scored, of_all = result["val_tokens"], result.get("of_tokens") or "all"
        yield fault("R02-partial", f"{run.label}: only {scored:,} of {of_all} validation tokens were scored")


def size_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    result = run.result
    total, limit = result["bytes_total"], result["limit_bytes"]
    if total > limit:
        yield fault("R03-over-size", f"{run.label}: {total:,} bytes are {total - limit:,} over the limit of {limit:,}")
    parts = result["bytes_code"] + result["bytes_model"]
    if parts != total:
        yield fault("R09-bytes-sum", f"{run.label}: bytes_total is {total:,}, but code and model are {parts:,}")


def time_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    caps = (("train_seconds", "max_wallclock_seconds"), ("eval_seconds", "max_eval_seconds"))
    for measured, cap in caps:
        seconds, most = run.result[measured], run.result[cap]
        if most and seconds > most:
            yield fault("R04-over-time", f"{run.label}: {measured} {seconds:.2f} is over {cap} {most:g}")


def log_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    """The log's last line must say what result.json says, and its opening lines the configuration and the code."""
    log, result = run.log, run.result
    if log is None:
        yield fault("R05-log-result", f"{run.label}: there is no log")
        return
    if not log.last_line.startswith("result:"):
        yield fault(
            "R05-log-result", f"{run.label}: the last line of {log.name} is not `result: ...`, so the log is cut off"
        )
    elif differences := result_line_differences(log.last_line, result):
        yield fault("R05-log-result", f"{run.label}: {log.name} and result.json differ: {'; '.join(differences)}")
    final = log.last_final
    if final is None:
        yield fault("R05-log-result", f"{run.label}: {log.name} has no final_*_roundtrip_exact line")
    elif abs(final.val_bpb - result["val_bpb"]) > (1e-8 if final.exact else 5e-5):
        yield fault(
            "R05-log-result",
            f"{run.label}: line {final.line} of {log.name} says val_bpb {final.val_bpb:.8f}, "
            f"result.json {result['val_bpb']:.8f}",
        )
    for key in ("config_hash", "data_id", "tokenizer_sha256"):
        stated = log.config.get(key, result[key])
        if stated != result[key]:
            yield fault(
                "R05-log-result", f"{run.label}: {log.name} opens with {key} {stated}, result.json: {result[key]}"
            )
    yield from log_code_findings(run, log)


def log_code_findings(run: RunEvidence, log: LogReading) -> Iterator[SubmissionFinding]:
    """Every start of the run (it may have been resumed) names the code that ran: it must be what is shipped."""
    stated = {match for line in log.lines for match in re.findall(r"\bcode_sha256:([0-9a-f]+)", line)}
    if run.code is None:
        return
    shipped = hashlib.sha256(run.code).hexdigest()
    others = sorted(stated - {shipped})
    if others:
        yield fault(
            "R06-code-in-log",
            f"{run.label}: {log.name} was written by code with sha256 {others[0][:16]}..., "
            f"but train_gpt.py has {shipped[:16]}...",
        )
    elif not stated:
        yield fault("R06-code-in-log", f"{run.label}: {log.name} does not name the code_sha256 of the code that ran")


def expected_result_line(result: dict[str, Any]) -> str:
    """The last line of a log, by the figures of result.json."""
    status = "valid" if result["valid"] else "INVALID"
    return (
        f"result: {status} val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f} "
        f"bytes_total:{result['bytes_total']} steps:{result['steps']} train_seconds:{result['train_seconds']:.1f} "
        f"eval_seconds:{result['eval_seconds']:.1f} config_hash:{result['config_hash']} "
        f"code_sha256:{result['code_sha256']} artifact_sha256:{result['artifact_sha256']}"
    )


def result_line_differences(line: str, result: dict[str, Any]) -> list[str]:
    expected = expected_result_line(result)
    stated, wanted = dict(RESULT_PAIR.findall(line)), dict(RESULT_PAIR.findall(expected))
    stated["status"], wanted["status"] = (text.removeprefix("result:").split()[:1] for text in (line, expected))
    return [
        f"{key} {stated.get(key, '(none)')} in the log, {wanted[key]} in result.json"
        for key in wanted
        if stated.get(key) != wanted[key]
    ]


def hash_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    """The bytes on the disk must be those that were measured."""
    files: list[tuple[str, bytes | None, str, str]] = [("train_gpt.py", run.code, "code_sha256", "bytes_code")]
    if run.has_artifact:
        files.append(("model.golf", run.artifact, "artifact_sha256", "bytes_model"))
    for name, data, digest_key, size_key in files:
        if data is None:
            yield fault("R07-file-hash", f"{run.label}: {name} is missing, so nothing proves its hash and size")
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest != run.result[digest_key]:
            yield fault(
                "R07-file-hash",
                f"{run.label}: {name} has sha256 {digest[:16]}..., result.json says {run.result[digest_key][:16]}...",
            )
        if len(data) != run.result[size_key]:
            yield fault(
                "R07-file-hash",
                f"{run.label}: {name} has {len(data):,} bytes, result.json says {run.result[size_key]:,}",
            )
    for name in run.changed:
        yield fault("R07-file-hash", f"{run.label}: {name} is not what stages.json recorded: it was changed afterwards")
    if run.config is not None:
        yield from config_findings(run, run.config)


def config_findings(run: RunEvidence, config: dict[str, Any]) -> Iterator[SubmissionFinding]:
    """config.json must have the hash that it and result.json state; knobs of another version can't be hashed here."""
    stated = {"config.json": str(config.get("config_hash")), "result.json": run.result["config_hash"]}
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    if {knob for part in sections.values() for knob in part} == set(KNOBS):
        try:
            stated["the knobs of config.json"] = config_hash(config_from_dict(sections))
        except ConfigError as error:
            yield fault("R07-file-hash", f"{run.label}: config.json: {error}")
    if len(set(stated.values())) > 1:
        texts = ", ".join(f"{digest} ({place})" for place, digest in stated.items())
        yield fault("R07-file-hash", f"{run.label}: config_hash differs: {texts}")


def probe_findings(run: RunEvidence) -> Iterator[SubmissionFinding]:
    for name, probe in run.result["probes"].items():
        if probe.get("verdict") not in ("PASS", "NOT EXERCISED"):
            verdict, detail = probe.get("verdict"), probe.get("detail", "")
            yield fault("R08-probe", f"{run.label}: probe {name}: {verdict}: {detail}")


# ---- several runs ----


def seeds_findings(runs: Sequence[RunEvidence]) -> Iterator[SubmissionFinding]:
    """Seeds of one experiment share everything but the seed, and no two are the same run."""
    shared = (
        ("R10-config-differs", "config_hash", "configurations"),
        ("R11-code-differs", "code_sha256", "code"),
        ("R12-data-differs", "data_id", "training data"),
        ("R12-data-differs", "val_data_id", "validation data"),
        ("R13-tokenizer-differs", "tokenizer_sha256", "tokenizers"),
    )
    for code, key, what in shared:
        groups = group_runs(runs, lambda run, key=key: run.result[key])
        if len(groups) > 1:
            texts = "; ".join(f"{str(value)[:16]} in {', '.join(labels)}" for value, labels in groups.items())
            yield fault(code, f"the runs have different {what} ({key}): {texts}")
    for code, key in (("R14-seed-twice", "seed"), ("R15-artifact-twice", "artifact_sha256")):
        for value, labels in group_runs(runs, lambda run, key=key: run.result[key]).items():
            if len(labels) > 1:
                yield fault(code, f"{key} {str(value)[:16]} is that of {len(labels)} runs: {', '.join(labels)}")


def group_runs(runs: Sequence[RunEvidence], key: Callable[[RunEvidence], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run.label)
    return groups


def track_findings(runs: Sequence[RunEvidence], track: str) -> Iterator[SubmissionFinding]:
    """The competition's own limits, whatever limits a run had set for itself."""
    for run in runs:
        result = run.result
        if "16mb" in track and result["bytes_total"] > COMPETITION_BYTES:
            yield fault("R17-track", f"{run.label}: {result['bytes_total']:,} bytes are too many for {track}")
        for key in ("train_seconds", "eval_seconds"):
            if "10min" in track and result[key] > COMPETITION_SECONDS:
                yield fault("R17-track", f"{run.label}: {key} {result[key]:.2f} is too long for {track}")
