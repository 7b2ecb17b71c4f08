"""The file that says what a study compares: one base configuration, profiles of its size, and rows of changes.

    name = "lowbit"                         preset = "local"          baseline = "full precision"
    [base]                                  knobs of all rows
    [profiles.screen]                       steps, stop_step, look_every, look_tokens, val_tokens, text; and knobs
    [groups.A]                              title, and rows: tables of a name and of what the row changes:

A row may have `extends` (the changes of another row, first), `study` (a published flag file's), `lr_scale` (of all
three learning rates), `seed_offset` (the same configuration under other seeds: how much is noise), and knobs. A row
with `source` and `methods` quantizes the trained weights of that row instead, once for each method
(tools/compare_quant.py names them) and, of GPTQ, for each of `act_order` and of `calibration_sequences`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golf.config.config import KNOBS, Config, build_config
from lab.rates.quant_comparison import parse_variant
from lab.study.legacy_study import load_study
from lab.study.spec import AblationError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

LEARNING_RATES = ("matrix_lr", "embed_lr", "scalar_lr")
ROW_WORDS = ("name", "extends", "study", "lr_scale", "seed_offset")
ROUNDING_WORDS = ("name", "source", "methods", "act_order", "calibration_sequences", "quantize_embedding")
PROFILE_WORDS = ("steps", "stop_step", "look_every", "look_tokens", "val_tokens", "text")
DATA_KNOBS = ("vocab_size", "bos_id")
"""Beside those of DataConfig: a row may not change what all rows read."""
DEFAULT_SEQUENCES = 64


@dataclass(frozen=True)
class AblationProfile:
    """How large a study is run."""

    name: str
    steps: int
    """Of the schedule."""
    stop_step: int = 0
    """The step after which training ends, on the schedule's way; 0: its end."""
    look_every: int = 0
    look_tokens: int = 0
    val_tokens: int = 0
    text: str = ""
    """synthetic: a small made-up text instead of the base's data."""
    knobs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundingRow:
    """How a row quantizes the weights of another."""

    source: str
    method: str
    act_order: bool = True
    calibration_sequences: int = 0
    quantizes_embedding: bool = False


@dataclass(frozen=True)
class AblationRow:
    """One line of a group: a configuration under a name."""

    group: str
    name: str
    knobs: Mapping[str, str] = field(default_factory=dict)
    lr_scale: float = 1.0
    seed_offset: int = 0
    rounding: RoundingRow | None = None


@dataclass(frozen=True)
class AblationMatrix:
    """A study's file, read and found sound."""

    name: str
    preset: str
    baseline: str
    base: Mapping[str, str]
    profiles: Mapping[str, AblationProfile]
    groups: Mapping[str, str]
    """Letter -> title, in order."""
    rows: Sequence[AblationRow]

    def profile(self, name: str) -> AblationProfile:
        if name not in self.profiles:
            raise AblationError(f"no profile {name!r} in the matrix: it has {', '.join(self.profiles)}")
        return self.profiles[name]

    def row(self, name: str) -> AblationRow:
        return next(row for row in self.rows if row.name == name)

    def chosen_rows(self, groups: str) -> list[AblationRow]:
        """The rows of the groups that letters with commas name (empty: of all), after the baseline and whatever weights
        they quantize. Raises AblationError."""
        letters = [letter.strip() for letter in groups.split(",") if letter.strip()] or list(self.groups)
        for letter in letters:
            if letter not in self.groups:
                raise AblationError(f"no group {letter!r} in the matrix: it has {', '.join(self.groups)}")
        chosen = [row for row in self.rows if row.group in letters]
        needed = [self.baseline, *(row.rounding.source for row in chosen if row.rounding)]
        return [row for row in self.rows if row in chosen or row.name in needed]


def read_matrix(path: Path) -> AblationMatrix:
    """Raises AblationError for a file that is no matrix, OSError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AblationError(f"{path}: no TOML: {error}") from None
    try:
        return parse_matrix(content)
    except AblationError as error:
        raise AblationError(f"{path}: {error}") from None


def parse_matrix(content: Mapping[str, Any]) -> AblationMatrix:
    check_words("the matrix", content, ("name", "preset", "baseline", "base", "profiles", "groups"))
    for word in ("name", "preset", "baseline", "profiles", "groups"):
        if word not in content:
            raise AblationError(f"{word} is missing")
    base = knob_texts("base", content.get("base", {}))
    profiles = {name: parse_profile(name, values) for name, values in tables("profiles", content["profiles"]).items()}
    groups = tables("groups", content["groups"])
    raw = [(letter, row) for letter, group in groups.items() for row in group_rows(letter, group)]
    rows = [row for letter, values in raw for row in parse_row(letter, values, raw)]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise AblationError(f"two rows are called {name!r}: rename one")
    check_sources(rows, str(content["baseline"]))
    titles = {letter: str(group.get("title", letter)) for letter, group in groups.items()}
    return AblationMatrix(
        str(content["name"]), str(content["preset"]), str(content["baseline"]), base, profiles, titles, rows
    )


def check_words(what: str, values: Mapping[str, Any], words: Sequence[str]) -> None:
    for word in values:
        if word not in words:
            raise AblationError(f"{what}: unknown word {word!r}: it may have {', '.join(words)}")


def tables(what: str, value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not value or not all(isinstance(part, dict) for part in value.values()):
        raise AblationError(f"{what} must be tables, at least one")
    return value


def group_rows(letter: str, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    check_words(f"group {letter}", group, ("title", "rows"))
    rows = group.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise AblationError(f"group {letter}: rows must be a list of tables")
    for row in rows:
        if not isinstance(row.get("name"), str) or not row["name"].strip():
            raise AblationError(f"group {letter}: every row needs a name")
    return rows


def knob_texts(what: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Knobs as text, as the command line would give them. Raises AblationError."""
    for knob, value in values.items():
        if knob not in KNOBS:
            raise AblationError(f"{what}: unknown knob or word {knob!r}")
        if not isinstance(value, (str, int, float)):
            raise AblationError(f"{what}: {knob} must be a text, a number, true or false")
    return {knob: str(value) for knob, value in values.items()}


def whole_number(what: str, value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise AblationError(f"{what} must be a whole number, {least} or more")
    return value


def parse_profile(name: str, values: Mapping[str, Any]) -> AblationProfile:
    words = {word: values[word] for word in PROFILE_WORDS if word in values}
    text = words.pop("text", "")
    if text not in ("", "synthetic"):
        raise AblationError(f"profile {name}: text is synthetic, or left out")
    numbers = {
        word: whole_number(f"profile {name}: {word}", value, int(word == "steps")) for word, value in words.items()
    }
    if "steps" not in numbers:
        raise AblationError(f"profile {name}: steps is missing")
    if numbers.get("stop_step", 0) > numbers["steps"]:
        raise AblationError(f"profile {name}: stop_step is beyond the schedule's {numbers['steps']} steps")
    knobs = knob_texts(f"profile {name}", {knob: v for knob, v in values.items() if knob not in PROFILE_WORDS})
    for knob in ("iterations", "max_wallclock_seconds"):
        if knob in knobs:
            raise AblationError(
                f"profile {name}: {knob} is set by steps: runs are capped by steps, so that seeds repeat"
            )
    return AblationProfile(name, text=text, knobs=knobs, **numbers)


def parse_row(letter: str, values: Mapping[str, Any], raw: Sequence[tuple[str, dict[str, Any]]]) -> list[AblationRow]:
    """The rows that one table stands for. Raises AblationError."""
    what = f"row {values['name']!r} of group {letter}"
    if "source" in values:
        return parse_rounding(letter, what, values)
    knobs, lr_scale = resolve_changes(what, values, raw, ())
    for knob in knobs:
        if KNOBS[knob][0] == "data" or knob in DATA_KNOBS:
            raise AblationError(f"{what}: {knob} is not for one row: all rows read the same tokens in the same order")
        if KNOBS[knob][0] == "run" or knob in ("iterations", "max_wallclock_seconds"):
            raise AblationError(f"{what}: {knob} is not for one row: set it in a profile")
    return [AblationRow(letter, values["name"], knobs, lr_scale, whole_number(what, values.get("seed_offset", 0), 0))]


def resolve_changes(
    what: str, values: Mapping[str, Any], raw: Sequence[tuple[str, dict[str, Any]]], seen: tuple[str, ...]
) -> tuple[dict[str, str], float]:
    """(knobs, learning-rate scale) of a row: those of the row that it extends, its study's, then its own."""
    knobs, lr_scale = {}, 1.0
    if "extends" in values:
        before = next((row for _, row in raw if row["name"] == values["extends"] and "source" not in row), None)
        if before is None or before["name"] in seen:
            raise AblationError(f"{what}: extends {values['extends']!r}, which is no row to train, or extends this one")
        knobs, lr_scale = resolve_changes(what, before, raw, (*seen, values["name"], before["name"]))
    if "study" in values:
        knobs = knobs | load_study(values["study"])
    if "lr_scale" in values:
        lr_scale = values["lr_scale"]
        if not isinstance(lr_scale, (int, float)) or lr_scale <= 0:
            raise AblationError(f"{what}: lr_scale must be above 0")
    return knobs | knob_texts(what, {k: v for k, v in values.items() if k not in ROW_WORDS}), float(lr_scale)


def parse_rounding(letter: str, what: str, values: Mapping[str, Any]) -> list[AblationRow]:
    """A row for each method and, of GPTQ, each order of columns and number of sequences."""
    check_words(what, values, ROUNDING_WORDS)
    methods, orders = as_list(values.get("methods", [])), as_list(values.get("act_order", True))
    sequences = as_list(values.get("calibration_sequences", DEFAULT_SEQUENCES))
    if not methods or not all(isinstance(method, str) for method in methods):
        raise AblationError(f'{what}: methods must be a list of quantizers, such as ["rtn4", "gptq4-g64"]')
    if not all(type(order) is bool for order in orders):
        raise AblationError(f"{what}: act_order is true, false, or a list of both")
    embedding = values.get("quantize_embedding", False)
    rows = []
    for method in methods:
        is_gptq = parse_variant(method, keeps_embedding=not embedding).method == "gptq"
        for count in sequences if is_gptq else [0]:
            whole_number(f"{what}: calibration_sequences", count, int(is_gptq))
            for order in orders if is_gptq else [True]:
                told = ["natural order"] * (is_gptq and not order) + [f"{count} sequences"] * (len(sequences) > 1)
                name = ", ".join([f"{values['name']} {method}", *told[: 2 if is_gptq else 0]])
                rounding = RoundingRow(values["source"], method, order, count, bool(embedding))
                rows.append(AblationRow(letter, name, rounding=rounding))
    return rows


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def check_sources(rows: Sequence[AblationRow], baseline: str) -> None:
    """Raise AblationError where a row names weights, or the matrix a baseline, that no row trains."""
    trained = {row.name for row in rows if row.rounding is None}
    if baseline not in trained:
        raise AblationError(f"baseline {baseline!r} is no row that is trained")
    for row in rows:
        if row.rounding and row.rounding.source not in trained:
            raise AblationError(f"row {row.name!r}: source {row.rounding.source!r} is no row that is trained")


def base_config(matrix: AblationMatrix, profile: AblationProfile, knobs: Mapping[str, str]) -> Config:
    """The configuration that rows change; `knobs` come from the command line. Raises ConfigError."""
    capped = {"iterations": str(profile.steps), "max_wallclock_seconds": "0"}
    return build_config(matrix.preset, {}, {**matrix.base, **profile.knobs, **knobs, **capped})


def row_config(
    matrix: AblationMatrix,
    profile: AblationProfile,
    row: AblationRow,
    knobs: Mapping[str, str],
    located: Mapping[str, Any],
) -> Config:
    """The configuration of a row; `located` are the knobs that name the data that was found. Raises UserError."""
    source = matrix.row(row.rounding.source) if row.rounding else row
    base = base_config(matrix, profile, knobs)
    scaled = {
        knob: repr(getattr(base.optim, knob) * source.lr_scale) for knob in LEARNING_RATES if source.lr_scale != 1
    }
    capped = {"iterations": str(profile.steps), "max_wallclock_seconds": "0"}
    told = {**matrix.base, **profile.knobs, **knobs, **scaled, **source.knobs, **capped, "corpus": "", **located}
    return build_config(matrix.preset, {}, told)
