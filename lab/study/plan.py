"""Plans the runs that a matrix takes, each distinct configuration and seed once, and forecasts what they will cost.

N tokens of a stream.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from golf.artifact.description import expected_shapes
from golf.config.config import Config
from golf.config.model import ModelConfig
from golf.data.loader import validation_tokens
from golf.data.manifest import data_identity
from golf.data.shards import find_shards, write_shard
from golf.data.sidecar import without_sidecars
from golf.data.tokenizer import load_tokenizer
from golf.model.recurrence import layer_order, runs_of
from golf.run.datasets import check_vocabulary, locate_data
from golf.runtime import Runtime, choose_compile, choose_device, write_file_atomically
from golf.score.roundtrip import stream_identity
from lab.prepare.text_tokenizer import PlainTokenizer, bytes_tokenizer_file
from lab.study.matrix import Matrix, MatrixRow, Profile, base_config, row_config
from lab.study.spec import RunSpec, StudyError, read_object, require

SYNTHETIC_STORIES = {"train": 400, "val": 40}
"""Documents of the made-up text."""
ROUGH_FLOPS = {"cpu": 2e10, "cuda": 5e13}
"""Per second of a CPU thread or a GPU: an order of magnitude, for lack of anything measured."""
ROUGH_START_SECONDS = 1.0


@dataclass(frozen=True)
class PlannedRow:
    """A row of the study, and the keys of its runs by number of the seed."""

    group: str
    name: str
    keys: tuple[str, ...]
    source: str = ""
    """Name of the row whose weights it quantizes."""
    method: str = ""


@dataclass(frozen=True)
class StudyPlan:
    """All that a study takes: rows, and their distinct runs by key, each after the run whose weights it needs."""

    study: str
    profile: str
    baseline: str
    groups: Mapping[str, str]
    seeds: tuple[int, ...]
    rows: Sequence[PlannedRow]
    runs: Mapping[str, RunSpec] = field(default_factory=dict)
    """Empty where tables and pictures are made from a plan that was saved."""
    val_tokens: int = 0
    """Targets of the validation stream."""


def write_synthetic_data(folder: Path) -> None:
    """Writes shards of sentences that a small model can learn something of, and a byte tokenizer; same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, rng = PlainTokenizer(bytes_tokenizer_file()), np.random.default_rng(0)
    animals, verbs = ("cat", "dog", "small mouse", "old horse", "bird"), ("sees", "hears", "likes", "follows")
    for split, count in SYNTHETIC_STORIES.items():
        ids = []
        for _ in range(count):
            sentences = (f"The {rng.choice(animals)} {rng.choice(verbs)} the {rng.choice(animals)}." for _ in range(6))
            ids += [tokenizer.bos_id, *tokenizer.encode(" ".join(sentences) + f" {rng.integers(10_000)}")]
        write_shard(folder / f"text_{split}_000000.bin", ids)
    write_file_atomically(folder / "tokenizer.json", bytes_tokenizer_file())


def find_study_data(
    config: Config, profile: Profile, threads: int, root: Path, out: Path
) -> tuple[dict[str, Any], dict[str, str], int]:
    """Returns (knobs, the identities of a RunSpec, validation targets) of the data of all rows.

    Data that is missing is prepared, made-up text is written below `out`; `root` is the repository. The knobs hold what
    `auto` comes to here too, so that it is part of a run's key. Raises UserError.
    """
    if profile.text == "synthetic":
        folder = out / "synthetic"
        write_synthetic_data(folder)
        places = replace(config.data, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.json"), corpus="")
        config = replace(config, data=places)
    device = choose_device(config.run.device)
    config = locate_data(config, Runtime(device), root)
    data, tokenizer = config.data, load_tokenizer(config.data.tokenizer_path)
    check_vocabulary(config, tokenizer)
    tokens_N = validation_tokens(without_sidecars(find_shards(data.data_path, "val")))
    knobs = {
        "data_path": str(Path(data.data_path).absolute()),
        "tokenizer_path": str(Path(data.tokenizer_path).absolute()),
        "vocab_size": config.model.vocab_size,
        "device": device.type,
        "compile": "on" if choose_compile(config.run.compile, device) else "off",
        "threads": threads,
    }
    identities = {"data_id": data_identity(data.data_path, tokenizer), "val_data_id": stream_identity(tokens_N)}
    return knobs, identities, len(tokens_N) - 1


def plan_study(
    matrix: Matrix, profile: Profile, groups: str, seeds: int, knobs: Mapping[str, str], threads: int,
    root: Path, out: Path, code_sha256: str,
) -> StudyPlan:  # fmt: skip
    """Plans the chosen groups with `seeds` seeds from the base configuration's on. Raises UserError."""
    require(seeds >= 1, f"--seeds {seeds}: a study takes at least one seed")
    base, rows = base_config(matrix, profile, knobs), matrix.chosen_rows(groups)
    for row in rows:  # a mistake in any row is told before there is any data
        row_config(matrix, profile, row, knobs, {"data_path": "unknown", "vocab_size": base.model.vocab_size or 512})
    located, identities, val_tokens = find_study_data(base, profile, threads, root, out)
    planner = RunPlanner(matrix, profile, knobs, located, identities | {"code_sha256": code_sha256}, out)
    numbers = tuple(range(base.run.seed, base.run.seed + seeds))
    keys: dict[str, list[str]] = {row.name: [] for row in rows}
    for seed in numbers:
        for row in sorted(rows, key=lambda row: row.rounding is not None):
            keys[row.name].append(planner.plan_run(row, seed))
    planned = [
        PlannedRow(row.group, row.name, tuple(keys[row.name]), *((r.source, r.method) if (r := row.rounding) else ()))
        for row in rows
    ]
    titles = {letter: title for letter, title in matrix.groups.items() if any(row.group == letter for row in rows)}
    runs = dict(sorted(planner.runs.items(), key=lambda run: bool(run[1].method)))
    return StudyPlan(matrix.name, profile.name, matrix.baseline, titles, numbers, planned, runs, val_tokens)


@dataclass
class RunPlanner:
    """Makes the runs of rows, each once."""

    matrix: Matrix
    profile: Profile
    knobs: Mapping[str, str]
    located: Mapping[str, Any]
    identities: Mapping[str, str]
    out: Path
    runs: dict[str, RunSpec] = field(default_factory=dict)

    def plan_run(self, row: MatrixRow, seed: int) -> str:
        """Returns the key of the run of a row with a seed; the run whose weights it needs is planned before it."""
        located = {**self.located, "seed": seed + row.seed_offset}
        config = row_config(self.matrix, self.profile, row, self.knobs, located)
        profile, rounding = self.profile, row.rounding
        if rounding:
            source = self.plan_run(self.matrix.row(rounding.source), seed)
            self.runs[source] = replace(self.runs[source], keeps_weights=True)
            own = vars(rounding) | {"source_key": source, "source": str(run_folder(self.out, source))}
        else:
            own = {name: getattr(profile, name) for name in ("stop_step", "look_every", "look_tokens")}
        spec = RunSpec(row.name, config, **self.identities, val_tokens=profile.val_tokens, **own)
        return self.runs.setdefault(spec.key, spec).key


def run_folder(out: Path, key: str) -> Path:
    return out / "runs" / key


def save_plan(plan: StudyPlan, out: Path) -> None:
    """Writes plan.json, what tables and pictures are made from, beside the runs."""
    content = {name: value for name, value in asdict(replace(plan, runs={})).items() if name != "val_tokens"}
    content["runs"] = {key: {"name": spec.name, "seed": spec.config.run.seed} for key, spec in plan.runs.items()}
    write_file_atomically(out / "plan.json", json.dumps(content, indent=1) + "\n")


def load_plan(out: Path) -> StudyPlan:
    """Reads what save_plan wrote. Raises StudyError."""
    path = out / "plan.json"
    require(path.is_file(), f"{path} is missing: no study was run into {out}")
    content = read_object(path)
    try:
        rows = [PlannedRow(**row | {"keys": tuple(row["keys"])}) for row in content["rows"]]
        names = ("study", "profile", "baseline", "groups")
        return StudyPlan(*(content[name] for name in names), tuple(content["seeds"]), rows)
    except (KeyError, TypeError):
        raise StudyError(f"{path}: damaged: run the study again with --resume") from None


@dataclass(frozen=True)
class CostForecast:
    """Seconds of the runs that are left."""

    runs: int
    seconds: float
    """The sum, as of one process after the other."""
    wall_seconds: float
    basis: str
    """Says in words what was measured and what is a rough model."""


def forward_flops(model: ModelConfig, tokens: int, context: int) -> float:
    """Counts two for each weight of a matrix product, and attention's scores and values at half of the context."""
    shapes = expected_shapes(model)
    weights = sum(
        runs_of(name, model) * prod(shape)
        for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")
    )  # fmt: skip
    return tokens * (2 * weights + 2 * len(layer_order(model)) * model.model_dim * context)


def run_flops(spec: RunSpec, val_tokens: int) -> float:
    """Counts training (three forwards), looks, and scoring; of a rounding, calibration and scoring."""
    config, model = spec.config, spec.config.model
    scored = (spec.val_tokens or val_tokens) * config.score.eval_seq_len // config.score.eval_stride
    looks = spec.train_steps // spec.look_every if spec.look_every else 0
    tokens = 3 * spec.train_steps * config.train.train_batch_tokens + looks * spec.look_tokens
    if spec.method:
        tokens = spec.calibration_sequences * model.train_seq_len
    flops = forward_flops(model, scored, config.score.eval_seq_len)
    return flops + forward_flops(model, tokens, model.train_seq_len)


def forecast(plan: StudyPlan, finished: Mapping[str, Mapping[str, Any]], jobs: int) -> CostForecast:
    """Forecasts the runs that are not in `finished`, whose measured seconds say how fast this machine is."""
    left = [spec for key, spec in plan.runs.items() if key not in finished]
    measured = {key: result["total_seconds"] for key, result in finished.items() if "total_seconds" in result}
    seconds, known, rough = 0.0, "", ""
    for rounds in (False, True):
        flops_left = [run_flops(spec, plan.val_tokens) for spec in left if bool(spec.method) == rounds]
        timed = [key for key, spec in plan.runs.items() if bool(spec.method) == rounds and key in measured]
        if flops_left and timed:
            speed = sum(run_flops(plan.runs[key], plan.val_tokens) for key in timed) / sum(map(measured.get, timed))
            seconds += sum(flops_left) / speed
            known = f"the measured seconds of {len(measured)} finished runs"
        elif flops_left:
            run = left[0].config.run
            rate = ROUGH_FLOPS["cuda" if run.device == "cuda" else "cpu"] * max(1, run.threads)
            seconds += sum(flops_left) / rate + ROUGH_START_SECONDS * len(flops_left)
            rough = "a rough model of what no run has measured"
    basis = " and ".join(filter(None, (known, rough))) or "nothing that is left to do"
    return CostForecast(len(left), seconds, seconds / max(1, min(jobs, len(left))), basis)
