"""The folder of a run: runs/<run_id>/, one file per thing that a run leaves behind."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golf.config import Config, ConfigError, config_dict, config_from_dict, config_hash
from golf.runtime import Runtime, write_file_atomically


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "weights.safetensors"
        self.training = path / "training.json"
        self.artifact = path / "model.golf"
        self.packing = path / "packing.json"
        self.code = path / "train_gpt.py"
        self.result = path / "result.json"

    def save_config(self, config: Config) -> None:
        self.save_json(self.config, {"config_hash": config_hash(config)} | config_dict(config))

    def load_config(self) -> Config:
        if not self.config.exists():
            raise ConfigError(f"{self.config} is missing: {self.path} is not the folder of a run")
        sections = json.loads(self.config.read_text())
        del sections["config_hash"]
        return config_from_dict(sections)

    def save_json(self, path: Path, content: dict[str, Any]) -> None:
        write_file_atomically(path, json.dumps(content, indent=2) + "\n")

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def create(self, config: Config) -> None:
        """Make the folder; a run never writes into another's. Raises ConfigError."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"{self.path} exists: choose another run_id, or remove the folder") from None
        self.save_config(config)


def choose_run_folder(config: Config, runtime: Runtime) -> RunFolder:
    """The folder of the run id that was asked for, or of preset, UTC time and seed; the same on every rank."""
    run = config.run
    run_id = run.run_id or f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{run.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise ConfigError(f"run_id={run_id!r} can't name a folder: use letters, digits, '.', '_' and '-'")
    return RunFolder(Path(run.runs_root) / runtime.text_of_main(run_id))
