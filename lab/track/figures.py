"""Reads the figures of a run while it writes them: rows of metrics.jsonl as they appear, and the result at the end."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from golf.config.knobs import UserError, parse_json
from golf.run.folder import RunFolder

RESULT_FIGURES = (
    "val_bpb", "val_loss", "bytes_total", "bytes_model", "bytes_code", "train_seconds", "eval_seconds", "params",
)  # fmt: skip
"""Of result.json, shown as `result/NAME` at the last step."""


class TrackError(UserError):
    """Reports a run that has no figures to show, or files that are no run's."""


class Figures(NamedTuple):
    """Holds the figures of one step, by name."""

    step: int
    elapsed: float
    """Seconds of training."""
    values: Mapping[str, float]


class MetricsReader:
    """Reads the rows of metrics.jsonl that were not read before; a last line that is still being written waits."""

    def __init__(self, folder: RunFolder):
        self.folder, self.place, self.lines, self.file = folder, 0, 0, None

    def read(self) -> tuple[bool, list[Figures]]:
        """Returns (whether the file began anew, as that of a resumed run does, the new rows). Raises TrackError."""
        if not self.folder.metrics.exists():
            return False, []
        with self.folder.metrics.open("rb") as file:
            described = os.fstat(file.fileno())  # of the file that is read, also where a resumed run replaces it now
            anew = self.file is not None and (self.file != described.st_ino or described.st_size < self.place)
            if anew:
                self.place = self.lines = 0
            self.file = described.st_ino
            file.seek(self.place)
            whole, _, _ = file.read().rpartition(b"\n")
        self.place += len(whole) + bool(whole)
        rows = [self.parse(line) for line in whole.split(b"\n")] if whole else []
        return anew, rows

    def parse(self, line: bytes) -> Figures:
        self.lines += 1
        try:
            row = parse_json(line)
            values = {name: float(value) for name, value in row.items() if name not in ("step", "elapsed")}
            return Figures(int(row["step"]), float(row["elapsed"]), values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrackError(f"{self.folder.metrics}, line {self.lines}, is no row of metrics: {error!r}") from None


def result_figures(folder: RunFolder) -> dict[str, float]:
    """Returns the figures of result.json; none where the run has no result. Raises TrackError."""
    if not folder.result.exists():
        return {}
    try:
        result: dict[str, Any] = folder.load_json(folder.result)
        return {f"result/{name}": float(result[name]) for name in RESULT_FIGURES if result.get(name) is not None}
    except (json.JSONDecodeError, TypeError, AttributeError, ValueError) as error:
        raise TrackError(f"{folder.result} is no result of a run: {error!r}") from None
