"""Manages a run's folder: runs/<run_id>/, with one file for each output of a run."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from golf.config.config import Config, config_dict, config_from_dict, config_hash
from golf.config.knobs import ConfigError, naming, parse_json
from golf.run.guard import AccessGuard
from golf.runtime import Runtime, write_file_atomically


class RunFolder:
    """Names the paths of one run, and reads and writes its small files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.metrics_file: TextIO | None = None
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights.safetensors"
        self.training = path / "training.json"
        self.effects = path / "effects.json"
        self.pruning = path / "pruning.json"
        self.quantized = path / "quantized.safetensors"
        self.artifact = path / "model.golf"
        self.packing = path / "packing.json"
        self.parity = path / "parity.json"
        self.code = path / "train_gpt.py"
        self.readable_code = path / "train_gpt_readable.py"
        self.sources = path / "sources.json"
        self.stages = path / "stages.json"
        self.code_changes = path / "code_changes.json"
        self.machine = path / "machine.json"
        self.ledger = path / "ledger.jsonl"
        self.access = path / "access.json"
        self.reload = path / "reload.json"
        self.score = path / "score.json"
        self.probes = path / "probes.json"
        self.result = path / "result.json"

    def save_config(self, config: Config) -> None:
        self.save_json(self.config, {"config_hash": config_hash(config)} | config_dict(config))

    def load_config(self) -> Config:
        if not self.config.exists():
            raise ConfigError(f"{self.config} is missing: {self.path} is not the folder of a run")
        try:
            sections = parse_json(self.config.read_bytes())
        except ValueError:
            raise ConfigError(f"{self.config} is not JSON: it was changed; start a new run") from None
        del sections["config_hash"]
        return config_from_dict(sections)

    def code_changes_list(self) -> list[dict[str, Any]]:
        """Returns a record of each change of the code in the middle of the run."""
        return self.load_json(self.code_changes)["changes"] if self.code_changes.exists() else []

    def save_json(self, path: Path, content: dict[str, Any]) -> None:
        write_file_atomically(path, json.dumps(content, indent=2) + "\n")

    def load_json(self, path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    def save_access(self, guard: AccessGuard) -> None:
        """Adds what this process has opened to the record of earlier processes."""
        earlier = self.load_json(self.access)["opened"] if self.access.exists() else {}
        self.save_json(self.access, guard.record(earlier))

    def journal(self, rank: int) -> Path:
        """Returns the path of a rank's scoring journal."""
        return self.path / f"score-rank{rank}.jsonl"

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl, without a last line that a killed process left half-written."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def trim_metrics(self, step: int) -> float:
        """Removes rows after `step`, whose steps will be repeated; returns the last clock reading of all rows."""
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.metrics_file = None
        rows = self.metrics_rows()
        latest = max((row["elapsed"] for row in rows), default=0.0)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):  # a process killed before the next row must not lose the reading
            kept.append({"step": step, "elapsed": latest})
        write_file_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return latest

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        with naming(self.metrics):
            if self.metrics_file is None:  # kept open: on a network volume opening takes longer than a step may
                self.metrics_file = self.metrics.open("a", encoding="utf-8")
            self.metrics_file.write(json.dumps(values, allow_nan=False) + "\n")
            self.metrics_file.flush()

    def create(self, config: Config) -> None:
        """Makes the folder. Raises ConfigError where it exists: a run never writes into another's."""
        try:
            self.path.mkdir(parents=True)
            self.checkpoints.mkdir()
        except FileExistsError:
            raise ConfigError(f"{self.path} exists: choose another run_id, or remove the folder") from None
        self.save_config(config)


def choose_run_folder(config: Config, runtime: Runtime) -> RunFolder:
    """Returns the folder named by run_id, or by preset, UTC time and seed; the same on every rank. Raises
    ConfigError."""
    run = config.run
    run_id = run.run_id or f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{run.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise ConfigError(f"run_id={run_id!r} can't name a folder: use letters, digits, '.', '_' and '-'")
    return RunFolder(Path(run.runs_root) / runtime.text_of_main(run_id))
