"""From a matrix to the runs that it takes: each distinct configuration and seed once, whatever rows ask for it.

N tokens of a stream.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from golf.config.config import Config
from golf.data.loader import validation_tokens
from golf.data.manifest import data_identity
from golf.data.shards import find_shards, write_shard
from golf.data.sidecar import without_sidecars
from golf.data.tokenizer import load_tokenizer
from golf.run.datasets import check_vocabulary, locate_data
from golf.runtime import Runtime, choose_compile, choose_device, write_file_atomically
from golf.score.roundtrip import stream_identity
from lab.prepare.text_tokenizer import PlainTokenizer, bytes_tokenizer_file
from lab.study.matrix import AblationMatrix, AblationProfile, AblationRow, base_config, row_config
from lab.study.spec import AblationError, AblationSpec, read_study_json

SYNTHETIC_STORIES = {"train": 400, "val": 40}
"""Documents of the made-up text."""


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
class SavedPlan:
    """The part of a plan that tables and pictures are made from."""

    study: str
    profile: str
    baseline: str
    groups: Mapping[str, str]
    seeds: tuple[int, ...]
    rows: Sequence[PlannedRow]


@dataclass(frozen=True)
class AblationPlan(SavedPlan):
    """What a study takes: rows, and their distinct runs by key, each after the run whose weights it needs."""

    runs: Mapping[str, AblationSpec]
    val_tokens: int
    """Targets of the validation stream."""


@dataclass(frozen=True)
class StudyData:
    """The data that was found, as knobs, and its identities."""

    knobs: Mapping[str, Any]
    data_id: str
    val_data_id: str
    val_tokens: int


def synthetic_story(rng: np.random.Generator) -> str:
    """A few sentences that a small model can learn something of."""
    animals, verbs = ("cat", "dog", "small mouse", "old horse", "bird"), ("sees", "hears", "likes", "follows")
    sentences = (f"The {rng.choice(animals)} {rng.choice(verbs)} the {rng.choice(animals)}." for _ in range(6))
    return " ".join(sentences) + f" {rng.integers(10_000)}"


def write_synthetic_data(folder: Path) -> None:
    """Shards and a tokenizer of bytes, the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, rng = PlainTokenizer(bytes_tokenizer_file()), np.random.default_rng(0)
    for split, count in SYNTHETIC_STORIES.items():
        stories = [synthetic_story(rng) for _ in range(count)]
        ids = [token for story in stories for token in (tokenizer.bos_id, *tokenizer.encode(story))]
        write_shard(folder / f"text_{split}_000000.bin", ids)
    write_file_atomically(folder / "tokenizer.json", bytes_tokenizer_file())


def find_study_data(config: Config, profile: AblationProfile, runtime: Runtime, root: Path, out: Path) -> StudyData:
    """The data of all rows, prepared where it is missing; `root` is the repository, made-up text goes below `out`.

    Raises UserError.
    """
    if profile.text == "synthetic":
        folder = out / "synthetic"
        write_synthetic_data(folder)
        places = replace(config.data, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.json"), corpus="")
        config = replace(config, data=places)
    config = locate_data(config, runtime, root)
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    check_vocabulary(config, tokenizer)
    tokens_N = validation_tokens(without_sidecars(find_shards(config.data.data_path, "val")))
    knobs = {
        "data_path": str(Path(config.data.data_path).absolute()),
        "tokenizer_path": str(Path(config.data.tokenizer_path).absolute()),
        "vocab_size": config.model.vocab_size,
    }
    return StudyData(
        knobs, data_identity(config.data.data_path, tokenizer), stream_identity(tokens_N), len(tokens_N) - 1
    )


def machine_knobs(config: Config, threads: int) -> dict[str, Any]:
    """What `auto` comes to here, so that it is part of a run's key."""
    device = choose_device(config.run.device)
    compiles = choose_compile(config.run.compile, device)
    return {"device": device.type, "compile": "on" if compiles else "off", "threads": threads}


def plan_study(
    matrix: AblationMatrix, profile: AblationProfile, groups: str, seeds: int, knobs: Mapping[str, str], threads: int,
    root: Path, out: Path, code_sha256: str,
) -> AblationPlan:  # fmt: skip
    """All rows and runs of the chosen groups with seeds 1 .. `seeds` of the base configuration on. Raises UserError."""
    if seeds < 1:
        raise AblationError(f"--seeds {seeds}: a study takes at least one seed")
    base = base_config(matrix, profile, knobs)
    rows = matrix.chosen_rows(groups)
    for row in rows:  # a mistake in any row is told before there is any data
        row_config(matrix, profile, row, knobs, {"data_path": "unknown", "vocab_size": base.model.vocab_size or 512})
    runtime = Runtime(choose_device(base.run.device))
    data = find_study_data(base, profile, runtime, root, out)
    located = dict(data.knobs) | machine_knobs(base, threads)
    seed_numbers = tuple(range(base.run.seed, base.run.seed + seeds))
    planner = RunPlanner(matrix, profile, knobs, located, data, code_sha256, out)
    planned = [planner.plan_row(row, seed_numbers) for row in sorted(rows, key=lambda row: row.rounding is not None)]
    planned.sort(key=lambda row: [known.name for known in rows].index(row.name))
    titles = {letter: title for letter, title in matrix.groups.items() if any(row.group == letter for row in rows)}
    runs = planner.in_order()
    return AblationPlan(
        matrix.name, profile.name, matrix.baseline, titles, seed_numbers, planned, runs, data.val_tokens
    )


@dataclass
class RunPlanner:
    """Makes the runs of rows, each once."""

    matrix: AblationMatrix
    profile: AblationProfile
    knobs: Mapping[str, str]
    located: Mapping[str, Any]
    data: StudyData
    code_sha256: str
    out: Path

    def __post_init__(self) -> None:
        self.runs: dict[str, AblationSpec] = {}
        self.turns: dict[str, int] = {}
        """Number of the seed that a run was first asked for."""

    def plan_row(self, row: AblationRow, seeds: Sequence[int]) -> PlannedRow:
        keys = tuple(self.plan_run(row, seed) for seed in seeds)
        for turn, key in enumerate(keys):
            self.turns.setdefault(key, turn)
        rounding = row.rounding
        return PlannedRow(
            row.group, row.name, keys, rounding.source if rounding else "", rounding.method if rounding else ""
        )

    def plan_run(self, row: AblationRow, seed: int) -> str:
        """Key of the run of a row with a seed; the run it needs is planned before it."""
        located = dict(self.located) | {"seed": seed + row.seed_offset}
        config = row_config(self.matrix, self.profile, row, self.knobs, located)
        profile, rounding = self.profile, row.rounding
        spec = AblationSpec(
            row.name, config, self.data.data_id, self.data.val_data_id, self.code_sha256,
            stop_step=profile.stop_step, look_every=profile.look_every, look_tokens=profile.look_tokens,
            val_tokens=profile.val_tokens,
        )  # fmt: skip
        if rounding:
            source = self.plan_run(self.matrix.row(rounding.source), seed)
            self.runs[source] = replace(self.runs[source], keeps_weights=True)
            spec = replace(
                spec, method=rounding.method, act_order=rounding.act_order, source_key=source,
                source=str(run_folder(self.out, source)), calibration_sequences=rounding.calibration_sequences,
                quantizes_embedding=rounding.quantizes_embedding,
                stop_step=0, look_every=0, look_tokens=0,
            )  # fmt: skip
        return self.runs.setdefault(spec.key, spec).key

    def in_order(self) -> dict[str, AblationSpec]:
        """Trainings before what needs their weights, all rows of a seed before the next seed."""
        order = sorted(self.runs.values(), key=lambda spec: (bool(spec.method), self.turns.get(spec.key, 0)))
        return {spec.key: spec for spec in order}


def run_folder(out: Path, key: str) -> Path:
    return out / "runs" / key


def save_plan(plan: AblationPlan, out: Path) -> None:
    """plan.json: what tables and pictures are made from, beside the runs."""
    content = {
        "study": plan.study, "profile": plan.profile, "baseline": plan.baseline, "groups": dict(plan.groups),
        "seeds": list(plan.seeds), "rows": [asdict(row) for row in plan.rows],
        "runs": {key: {"name": spec.name, "seed": spec.config.run.seed} for key, spec in plan.runs.items()},
    }  # fmt: skip
    write_file_atomically(out / "plan.json", json.dumps(content, indent=1) + "\n")


def load_plan(out: Path) -> SavedPlan:
    """Raises AblationError."""
    path = out / "plan.json"
    if not path.is_file():
        raise AblationError(f"{path} is missing: no study was run into {out}")
    content = read_study_json(path)
    try:
        rows = [PlannedRow(**row | {"keys": tuple(row["keys"])}) for row in content["rows"]]
        names = ("study", "profile", "baseline", "groups")
        return SavedPlan(*(content[name] for name in names), tuple(content["seeds"]), rows)
    except (KeyError, TypeError):
        raise AblationError(f"{path}: damaged: run the study again with --resume") from None
