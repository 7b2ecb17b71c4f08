"""Reads the results of runs that are to be compared, and refuses a comparison that would say nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from golf.config.knobs import UserError
from lab.cli import read_json_object
from lab.compare.statistics import bpb_per_nat

MUST_BE_EQUAL = ("data_id", "val_data_id", "tokenizer_sha256", "val_tokens", "val_bytes", "eval_seq_len", "eval_stride")
"""Keys of result.json; runs that differ in one were not asked the same question."""
FIGURE_KINDS = (str, int, float, bool)
"""Types of the fields of ComparedRun that are keys of result.json."""


class ComparisonError(UserError):
    """Raised for runs that can't be compared, and for a file that is no result of a run."""


@dataclass(frozen=True)
class ComparedRun:
    path: Path
    """Its result.json."""
    run_id: str
    seed: int
    valid: bool
    partial: bool
    val_loss: float
    val_bpb: float
    steps: int
    train_seconds: float
    train_tokens: int
    config_hash: str
    code_sha256: str
    artifact_sha256: str
    machine_id: str
    """Empty where the run has no fingerprint of its machine."""
    question: dict[str, Any]
    """The values of MUST_BE_EQUAL."""

    @property
    def tokens_per_step(self) -> float:
        return self.train_tokens / max(1, self.steps)


def result_files(path: Path) -> list[Path]:
    """Finds result.json: the path itself, that of a run folder, or all below it. Raises ComparisonError."""
    if not path.exists():
        raise ComparisonError(f"there is no {path}: name a scored run, or a folder of them")
    own = path if path.is_file() else path / "result.json"
    found = [own] if own.is_file() else sorted(path.rglob("result.json"))
    if not found:
        raise ComparisonError(f"{path} holds no result.json: name a scored run, or a folder of them")
    return found


def read_compared_run(path: Path) -> ComparedRun:
    """Reads a result.json. Raises ComparisonError where it is damaged, lacks a key, or contradicts itself."""
    result = read_json_object(path, ComparisonError)

    def take(key: str, kind: type) -> Any:
        if key not in result:
            raise ComparisonError(f"{path} lacks {key}: a run of this version has it, so run again")
        value, kinds = result[key], (int, float) if kind is float else (kind,)
        if type(value) not in kinds or (kind is float and not math.isfinite(value)):
            raise ComparisonError(f"{path}: {key} is {value!r}, not a value of kind {kind.__name__}")
        return value

    fingerprint = result.get("fingerprint")
    result["machine_id"] = str(fingerprint.get("machine_id") or "") if isinstance(fingerprint, dict) else ""
    run = ComparedRun(
        path=path,
        question={key: take(key, str if key.endswith(("_id", "sha256")) else int) for key in MUST_BE_EQUAL},
        **{field.name: take(field.name, field.type) for field in fields(ComparedRun) if field.type in FIGURE_KINDS},
    )
    check_arithmetic(run)
    return run


def check_arithmetic(run: ComparedRun) -> None:
    """Raises ComparisonError where val_loss and val_bpb, one figure in two units, disagree: one was not measured."""
    tokens, byte_count = run.question["val_tokens"], run.question["val_bytes"]
    if min(tokens, byte_count) < 1:
        raise ComparisonError(f"{run.path}: val_tokens is {tokens} and val_bytes {byte_count}: nothing was scored")
    expected = run.val_loss * bpb_per_nat(tokens, byte_count)
    if not math.isclose(run.val_bpb, expected, rel_tol=1e-6):
        raise ComparisonError(
            f"{run.path}: val_bpb is {run.val_bpb:.8f}, but val_loss, val_tokens and val_bytes make it {expected:.8f}"
        )


def check_comparable(arms: dict[str, list[ComparedRun]], include_invalid: bool) -> None:
    """Raises ComparisonError with the first reason not to compare these runs."""
    for arm, runs in arms.items():
        if not runs:
            raise ComparisonError(f"arm {arm} has no run: compare.py RUN ... --vs RUN ...")
    for reason in refusals(arms, include_invalid):
        raise ComparisonError(reason)


def refusals(arms: dict[str, list[ComparedRun]], include_invalid: bool) -> Iterator[str]:
    """Finds runs that are no samples of their own, not finished, asked another question, or no single configuration."""
    runs = [run for arm in arms.values() for run in arm]
    yield from given_twice(runs)
    for run in runs:
        if run.partial:
            yield f"{run.path} is a partial score: finish it (python train_gpt.py --resume {run.run_id}), then compare"
    for key in MUST_BE_EQUAL:
        for run in runs:
            mine, other = run.question[key], runs[0].question[key]
            if mine != other:
                yield f"{run.path} has {key} {mine}, but {runs[0].path} {other}: their scores are not comparable"
    for run in runs:
        if not run.valid and not include_invalid:
            yield f"{run.path} is INVALID (see its findings): leave it out, or compare it with --include-invalid"
    for arm, (first, *others) in arms.items():
        for run in others:
            if run.config_hash != first.config_hash:
                hashes = f"{run.path} has config_hash {run.config_hash}, but {first.path} {first.config_hash}"
                yield f"arm {arm} mixes configurations: {hashes}: an arm is one configuration"


def given_twice(runs: list[ComparedRun]) -> Iterator[str]:
    """Finds copies of a run, which look like second samples without any noise of their own."""
    first: dict[Any, ComparedRun] = {}
    for run in runs:
        if first.setdefault(run.path.resolve(), run) is not run:
            yield f"{run.path} is given twice: name every run once"
        other = first.setdefault(run.artifact_sha256, run)
        if other is not run:
            seeds = f"seed {run.seed}" if run.seed == other.seed else f"seeds {other.seed} and {run.seed}"
            yield f"{run.path} has the artifact of {other.path} ({seeds}): it is the same run, name it once"
