"""Describes one run of a study as flat files: all that decides its result, the key hashed from that, and what it left.

Anything may start a run, a person, tools/ablate.py, or another optimizer on another machine: spec.json goes in, and
result.json comes out in the folder that the run was given, last of all its files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from golf.config.config import Config, check_config, config_dict, config_from_dict
from golf.config.knobs import ConfigError, UserError, parse_json
from golf.runtime import write_file_atomically
from lab.bundle.parts import code_sha256

SPEC_FORMAT = 1
UNDECIDING_KNOBS = {
    "run": ("run_id", "runs_root", "preset", "seed", "checkpoint_seconds", "rehearse", "limit_bytes", "reserve_bytes"),
    "data": ("data_path", "tokenizer_path", "corpus"),
}
"""By section: names, places and limits, which no study run reads; the seed counts apart, the data by its identity."""
UNDECIDING_FIELDS = ("name", "source", "keeps_weights")
"""Fields of a spec that change nothing of a run's result."""
RUN_ENTRIES = ("lab/study/training.py", "lab/study/rounding.py", "lab/study/running.py")
"""A run is made from these files, with all that they import."""
FINISHED, FAILED, INVALID, KILLED = "finished", "failed", "invalid", "killed"
"""States of a run. invalid: a feature that was switched on did not act; killed: from outside, so it may be tried
again."""


class StudyError(UserError):
    """The study can't be run or read as it is; the message says what to do."""


def require(holds: object, message: str) -> None:
    """Raises StudyError with the message unless `holds`."""
    if not holds:
        raise StudyError(message)


@dataclass(frozen=True)
class RunSpec:
    """Holds all that decides about one run, and its name."""

    name: str
    """The first row of the study that asked for it."""
    config: Config
    data_id: str
    val_data_id: str
    code_sha256: str
    stop_step: int = 0
    """Steps after which training ends, whatever the schedule's length; 0: that length."""
    look_every: int = 0
    """Steps between two evaluations of validation loss and codes; 0: none."""
    look_tokens: int = 0
    """Targets of the validation stream's beginning that a look scores."""
    val_tokens: int = 0
    """Targets of the validation stream's beginning that the artifact is scored on; 0: all."""
    method: str = ""
    """Quantizer of the trained weights of `source`, as tools/compare_quant.py names it; empty: a training."""
    act_order: bool = True
    """GPTQ rounds columns in the order of their inputs' power."""
    calibration_sequences: int = 0
    """Rows of the training length that GPTQ calibrates on."""
    quantizes_embedding: bool = False
    source_key: str = ""
    source: str = ""
    """Folder of the run whose weights are quantized."""
    keeps_weights: bool = False
    """Leave weights.safetensors for runs that quantize them."""

    @property
    def key(self) -> str:
        """32 hex digits: SHA-256 over everything that decides about the result."""
        decides = [field.name for field in fields(self) if field.name not in (*UNDECIDING_FIELDS, "config")]
        knobs = {
            section: {knob: value for knob, value in knobs.items() if knob not in UNDECIDING_KNOBS.get(section, ())}
            for section, knobs in config_dict(self.config).items()
        }
        content = {"format": SPEC_FORMAT, "knobs": knobs, "seed": self.config.run.seed}
        content |= {name: getattr(self, name) for name in decides}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def train_steps(self) -> int:
        steps = self.config.train.iterations
        return min(self.stop_step, steps) if self.stop_step else steps


def study_code_sha256(root: Path) -> str:
    """Hashes the files that a run is made from; `root` is the repository."""
    return code_sha256(root, *RUN_ENTRIES)


def save_spec(spec: RunSpec, path: Path) -> None:
    content = {"format": SPEC_FORMAT, "key": spec.key} | asdict(spec)
    write_file_atomically(path, json.dumps(content, indent=1) + "\n")


def read_spec(path: Path) -> RunSpec:
    """Reads the run that a file describes. Raises StudyError, OSError."""
    content = read_object(path)
    key = content.pop("key", None)
    known = content.pop("format", None) == SPEC_FORMAT
    require(known, f"{path}: not a run's description of format {SPEC_FORMAT}: let tools/ablate.py write it")
    try:
        config = config_from_dict(content.pop("config"))
        check_config(config)
        spec = RunSpec(config=config, **content)
    except ConfigError as error:
        raise StudyError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise StudyError(f"{path}: damaged, not all of a run's description is there") from None
    changed = "its key is not that of its content: it was changed; let tools/ablate.py write it"
    require(spec.key == key, f"{path}: {changed}")
    return spec


def spec_config(path: Path) -> Config:
    """Reads the configuration of a run that is over, which may be of an earlier version. Raises StudyError."""
    try:
        return config_from_dict(read_object(path)["config"])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path}: its configuration can't be read ({error}): run the study again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises StudyError for a file that holds none, OSError."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        content = None
    require(isinstance(content, dict), f"{path}: damaged, it is no JSON object: remove it")
    return content


def failed_result(spec: RunSpec, status: str, error: str) -> dict[str, Any]:
    """Returns what result.json says of a run that did not come to its end."""
    return {"format": SPEC_FORMAT, "key": spec.key, "name": spec.name, "seed": spec.config.run.seed,
            "status": status, "error": " ".join(error.split())[:500]}  # fmt: skip


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    write_file_atomically(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def save_failure(folder: Path, spec: RunSpec, status: str, error: str) -> dict[str, Any]:
    """Writes and returns the result of a run that did not come to its end."""
    result = failed_result(spec, status, error)
    save_result(folder, result)
    return result


def load_result(folder: Path, key: str) -> dict[str, Any] | None:
    """Reads the result in a run's folder; None where there is none. Raises StudyError."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = read_object(path)
    own = (result.get("format"), result.get("key")) == (SPEC_FORMAT, key) and isinstance(result.get("status"), str)
    require(own, f"{path}: damaged, it is not the result of run {key}: remove its folder")
    return result
