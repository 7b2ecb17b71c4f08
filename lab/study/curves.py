"""The curves that runs left: losses and codes by step, and their means over seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.study.spec import AblationError


@dataclass(frozen=True)
class RunCurve:
    """curve.jsonl of one training."""

    train: Mapping[int, float] = field(default_factory=dict)
    """Step -> loss of its batch."""
    val: Mapping[int, float] = field(default_factory=dict)
    """Step -> loss of the same validation tokens at every look."""
    codes: Sequence[Mapping[str, Any]] = ()
    """Rows of step, matrix, shares of codes, and flips since the look before."""


@dataclass(frozen=True)
class CurveBand:
    """Several runs at the steps that all of them were looked at."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def load_run_curve(folder: Path) -> RunCurve:
    """Raises AblationError for a damaged file; a run without one has an empty curve."""
    path = folder / "curve.jsonl"
    if not path.is_file():
        return RunCurve()
    train, val, codes = {}, {}, []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "matrix" in row:
                codes.append(row)
            elif "val_loss" in row:
                val[row["step"]] = row["val_loss"]
            else:
                train[row["step"]] = row["train_loss"]
    except (ValueError, KeyError, TypeError):
        raise AblationError(f"{path}: damaged: remove its folder and run the study again with --resume") from None
    return RunCurve(train, val, codes)


def band(curves: Sequence[Mapping[int, float]]) -> CurveBand:
    """Mean, least and most of several curves at the steps that they share."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return CurveBand(steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def differences(curves: Sequence[Mapping[int, float]], others: Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
    """Each curve less the other of its pair, where both have a value."""
    pairs = zip(curves, others, strict=True)
    return [{step: one[step] - other[step] for step in one if step in other} for one, other in pairs]


def step_of_loss(curve: CurveBand, loss: float) -> float | None:
    """The first step at which the mean curve is down at `loss`, on straight lines between looks; None: never.

    Before the first look nothing is known: a loss that is reached by then has that look's step.
    """
    for number, (step, value) in enumerate(zip(curve.steps, curve.mean, strict=True)):
        if value <= loss:
            if number == 0:
                return float(step)
            before, above = curve.steps[number - 1], curve.mean[number - 1]
            return before + (step - before) * (above - loss) / (above - value)
    return None
