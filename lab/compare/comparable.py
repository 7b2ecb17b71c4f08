"""What may be compared: results of runs, read from disk, and the reasons to refuse a comparison of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf.config.knobs import UserError
from lab.compare.statistics import bpb_per_nat

MUST_BE_EQUAL = ("data_id", "val_data_id", "tokenizer_sha256", "val_tokens", "val_bytes", "eval_seq_len", "eval_stride")
"""Keys of result.json; runs that differ in one were not asked the same question."""


class ComparisonError(UserError):
    """Runs that can't be compared, or a file that is no result of a run."""


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
    """result.json files of an argument: the file itself, that of a run folder, or all below. Raises ComparisonError."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise ComparisonError(f"there is no {path}: name a scored run, or a folder of them")
    found = [path / "result.json"] if (path / "result.json").is_file() else sorted(path.rglob("result.json"))
    if not found:
        raise ComparisonError(f"{path} holds no result.json: name a scored run, or a folder of them")
    return found


def read_compared_run(path: Path) -> ComparedRun:
    """Raises ComparisonError where the file is damaged, lacks a key, or contradicts itself."""
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise ComparisonError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ComparisonError(f"{path} holds no JSON object: it is no result of a run")

    def take(key: str, *kinds: type) -> Any:
        if key not in result:
            raise ComparisonError(f"{path} lacks {key}: a run of this version has it, so run again")
        value = result[key]
        if type(value) not in kinds or (float in kinds and not math.isfinite(value)):
            raise ComparisonError(f"{path}: {key} is {value!r}, not a value of kind {kinds[-1].__name__}")
        return value

    fingerprint = result.get("fingerprint")
    run = ComparedRun(
        path=path,
        run_id=take("run_id", str),
        seed=take("seed", int),
        valid=take("valid", bool),
        partial=take("partial", bool),
        val_loss=take("val_loss", int, float),
        val_bpb=take("val_bpb", int, float),
        steps=take("steps", int),
        train_seconds=take("train_seconds", int, float),
        train_tokens=take("train_tokens", int),
        config_hash=take("config_hash", str),
        code_sha256=take("code_sha256", str),
        artifact_sha256=take("artifact_sha256", str),
        machine_id=str(fingerprint.get("machine_id") or "") if isinstance(fingerprint, dict) else "",
        question={key: take(key, str if key.endswith(("_id", "sha256")) else int) for key in MUST_BE_EQUAL},
    )
    check_arithmetic(run)
    return run


def check_arithmetic(run: ComparedRun) -> None:
    """val_loss and val_bpb are one figure in two units; where they disagree, one was not measured."""
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
    everything = [run for runs in arms.values() for run in runs]
    for reason in (*given_twice(everything), *not_finished(everything), *other_question(everything)):
        raise ComparisonError(reason)
    for reason in () if include_invalid else not_valid(everything):
        raise ComparisonError(reason)
    for reason in other_configuration(arms):
        raise ComparisonError(reason)


def given_twice(runs: list[ComparedRun]) -> Iterator[str]:
    """A copy of a run looks like a second sample without any noise of its own."""
    first: dict[Any, ComparedRun] = {}
    for run in runs:
        other = first.setdefault(run.path.resolve(), run)
        if other is not run:
            yield f"{run.path} is given twice: name every run once"
        other = first.setdefault(run.artifact_sha256, run)
        if other is not run:
            seeds = f"seed {run.seed}" if run.seed == other.seed else f"seeds {other.seed} and {run.seed}"
            yield f"{run.path} has the artifact of {other.path} ({seeds}): it is the same run, name it once"


def not_finished(runs: list[ComparedRun]) -> Iterator[str]:
    for run in runs:
        if run.partial:
            yield f"{run.path} is a partial score: finish it (python train_gpt.py --resume {run.run_id}), then compare"


def not_valid(runs: list[ComparedRun]) -> Iterator[str]:
    for run in runs:
        if not run.valid:
            yield f"{run.path} is INVALID (see its findings): leave it out, or compare it with --include-invalid"


def other_question(runs: list[ComparedRun]) -> Iterator[str]:
    first = runs[0]
    for key in MUST_BE_EQUAL:
        for run in runs:
            mine, other = run.question[key], first.question[key]
            if mine != other:
                yield f"{run.path} has {key} {mine}, but {first.path} {other}: their scores are not comparable"


def other_configuration(arms: dict[str, list[ComparedRun]]) -> Iterator[str]:
    for arm, runs in arms.items():
        for run in runs:
            if run.config_hash != runs[0].config_hash:
                yield (
                    f"arm {arm} mixes configurations: {run.path} has config_hash {run.config_hash}, but {runs[0].path} "
                    f"{runs[0].config_hash}: an arm is one configuration"
                )
