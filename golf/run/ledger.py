"""Keeps the time ledger: every second of every process of a run belongs to exactly one phase."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from golf.config.knobs import naming
from golf.runtime import write_file_atomically

PHASES = {
    "setup": ("", "train"),
    "compile": ("", "train"),
    "rehearse": ("", "train"),
    "train": ("train", "train"),
    "hold out": ("", "train"),
    "calibrate": ("train", "train"),
    "average": ("", "train"),
    "quantize": ("", "train"),
    "pack": ("", "train"),
    "load": ("", "eval"),
    "score": ("eval", "eval"),
    "compare": ("", ""),
    "report": ("", ""),
}
"""Budgets that a phase counts against: by the script's timers (the competition's habit), by the process's clock."""
IMPORTED_AT = time.monotonic()


def process_identity() -> tuple[str, float]:
    """Returns (a name that this process keeps when it replaces itself by exec, its age in seconds).

    Where there is no /proc the age counts from the import of this module.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(os.getpid()), time.monotonic() - IMPORTED_AT
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks since the boot
    return f"{os.getpid()}-{fields[19]}", time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Ledger:
    """Appends seconds by phase to a file whenever the phase changes, so that it includes killed processes."""

    def __init__(self, phase: str, now=time.monotonic, identity=process_identity):
        self.now, self.phase_name, self.path, self.identity = now, phase, None, identity
        self.session, age = identity()
        self.mark = now() - age
        self.rows: list[dict[str, Any]] = []

    def attach(self, path: Path) -> None:
        """Continues a run's file, which already holds what this process did before it replaced itself."""
        earlier = read_ledger(path)
        self.mark += sum(row["seconds"] for row in earlier if row["session"] == self.session)
        write_file_atomically(path, "".join(json.dumps(row) + "\n" for row in earlier))  # removes a torn last line
        self.path, self.rows, waiting = path, earlier, self.rows
        for row in waiting:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Writes down the phase in progress up to now."""
        now = self.now()
        self.write({"session": self.session, "phase": self.phase_name, "seconds": now - self.mark})
        self.mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Assigns the time inside the context to `name` alone."""
        assert name in PHASES, name
        self.flush()
        outer, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.flush()
            self.phase_name = outer

    def seconds(self, phase: str) -> float:
        return sum(row["seconds"] for row in self.rows if row["phase"] == phase)

    def summary(self) -> dict[str, Any]:
        """Returns the phases for result.json, and their sums under both conventions; flushes first."""
        self.flush()
        phases = [
            {"phase": name, "seconds": self.seconds(name), "script": script, "process": process}
            for name, (script, process) in PHASES.items()
            if self.seconds(name)
        ]
        sums = {
            kind: {budget: sum(row["seconds"] for row in phases if row[kind] == budget) for budget in ("train", "eval")}
            for kind in ("script", "process")
        }
        earlier = sum(row["seconds"] for row in self.rows if row["session"] != self.session)
        return {"phases": phases, **sums, "process_seconds": earlier + self.identity()[1]}


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ledger, without a last line that a killed process left half-written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
