"""Reads the file that says what a study compares: a base configuration, profiles of its size, and rows of changes.

    name = "lowbit"                         preset = "local"          baseline = "full precision"
    [base]                                  knobs of all rows
    [profiles.screen]                       steps, stop_step, look_every, look_tokens, val_tokens, text; and knobs
    [groups.A]                              title, and rows: tables of a name and of what the row changes:

A row may have `extends` (the changes of another row, first), `study` (a published flag file's), `lr_scale` (of all
three learning rates), `seed_offset` (the same configuration under other seeds: how much is noise), and knobs. A row
with `source` and `methods` quantizes the trained weights of that row instead, once for each method
(tools/compare_quant.py names them) and, of GPTQ, for each of `act_order` and of `calibration_sequences`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golf.config.config import KNOBS, Config, build_config
from lab.rates.quant_comparison import parse_variant
from lab.study.legacy_study import load_study
from lab.study.spec import StudyError, require

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

LEARNING_RATES = ("matrix_lr", "embed_lr", "scalar_lr")
ROW_WORDS = ("name", "extends", "study", "lr_scale", "seed_offset")
ROUNDING_WORDS = ("name", "source", "methods", "act_order", "calibration_sequences", "quantize_embedding")
PROFILE_NUMBERS = ("steps", "stop_step", "look_every", "look_tokens", "val_tokens")
DATA_KNOBS = ("vocab_size", "bos_id")
"""Knobs beside those of DataConfig that no row may change: all rows read the same."""
CAPPED_KNOBS = ("iterations", "max_wallclock_seconds")
"""Set by a profile's steps: runs are capped by steps, so that seeds repeat."""
DEFAULT_SEQUENCES = 64


@dataclass(frozen=True)
class Profile:
    """Says how large a study is run."""

    name: str
    steps: int
    """Length of the schedule."""
    stop_step: int = 0
    """The step after which training ends, on the schedule's way; 0: its end."""
    look_every: int = 0
    look_tokens: int = 0
    val_tokens: int = 0
    text: str = ""
    """synthetic: a small made-up text instead of the base's data."""
    knobs: Mapping[str, str] = field(default_factory=dict)

    @property
    def caps(self) -> dict[str, str]:
        return dict(zip(CAPPED_KNOBS, (str(self.steps), "0"), strict=True))


@dataclass(frozen=True)
class Rounding:
    """Says how a row quantizes the weights of another."""

    source: str
    method: str
    act_order: bool = True
    calibration_sequences: int = 0
    quantizes_embedding: bool = False


@dataclass(frozen=True)
class MatrixRow:
    """One line of a group: a configuration under a name."""

    group: str
    name: str
    knobs: Mapping[str, str] = field(default_factory=dict)
    lr_scale: float = 1.0
    seed_offset: int = 0
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Matrix:
    """A study's file, read and found sound."""

    name: str
    preset: str
    baseline: str
    base: Mapping[str, str]
    profiles: Mapping[str, Profile]
    groups: Mapping[str, str]
    """Letter -> title, in order."""
    rows: Sequence[MatrixRow]

    def profile(self, name: str) -> Profile:
        require(name in self.profiles, f"no profile {name!r} in the matrix: it has {', '.join(self.profiles)}")
        return self.profiles[name]

    def row(self, name: str) -> MatrixRow:
        return next(row for row in self.rows if row.name == name)

    def chosen_rows(self, groups: str) -> list[MatrixRow]:
        """Returns the rows of the groups that letters with commas name (empty: of all), with the baseline and the rows
        whose weights they quantize. Raises StudyError."""
        letters = [letter.strip() for letter in groups.split(",") if letter.strip()] or list(self.groups)
        for letter in letters:
            require(letter in self.groups, f"no group {letter!r} in the matrix: it has {', '.join(self.groups)}")
        chosen = [row for row in self.rows if row.group in letters]
        needed = [self.baseline, *(row.rounding.source for row in chosen if row.rounding)]
        return [row for row in self.rows if row in chosen or row.name in needed]


def read_matrix(path: Path) -> Matrix:
    """Reads a study's file. Raises StudyError for a file that is no matrix, OSError."""
    try:
        return parse_matrix(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: no TOML: {error}") from None
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def parse_matrix(content: Mapping[str, Any]) -> Matrix:
    required = ("name", "preset", "baseline", "profiles", "groups")
    check_words("the matrix", content, (*required, "base"))
    for word in required:
        require(word in content, f"{word} is missing")
    base = knob_texts("base", content.get("base", {}))
    profiles = {name: parse_profile(name, values) for name, values in tables("profiles", content["profiles"]).items()}
    groups = tables("groups", content["groups"])
    raw = [(letter, row) for letter, group in groups.items() for row in group_rows(letter, group)]
    rows = [row for letter, values in raw for row in parse_row(letter, values, [row for _, row in raw])]
    titles = {letter: str(group.get("title", letter)) for letter, group in groups.items()}
    name, preset, baseline = (str(content[word]) for word in required[:3])
    check_names(rows, baseline)
    return Matrix(name, preset, baseline, base, profiles, titles, rows)


def check_words(what: str, values: Mapping[str, Any], words: Sequence[str]) -> None:
    for word in values:
        require(word in words, f"{what}: unknown word {word!r}: it may have {', '.join(words)}")


def tables(what: str, value: object) -> dict[str, dict[str, Any]]:
    sound = isinstance(value, dict) and value and all(isinstance(part, dict) for part in value.values())
    require(sound, f"{what} must be tables, at least one")
    return value


def group_rows(letter: str, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    check_words(f"group {letter}", group, ("title", "rows"))
    rows = group.get("rows")
    sound = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    require(sound, f"group {letter}: rows must be a list of tables")
    named = all(isinstance(row.get("name"), str) and row["name"].strip() for row in rows)
    require(named, f"group {letter}: every row needs a name")
    return rows


def knob_texts(what: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns knobs as text, as the command line would give them. Raises StudyError."""
    for knob, value in values.items():
        require(knob in KNOBS, f"{what}: unknown knob or word {knob!r}")
        require(isinstance(value, (str, int, float)), f"{what}: {knob} must be a text, a number, true or false")
    return {knob: str(value) for knob, value in values.items()}


def whole_number(what: str, value: object, least: int) -> int:
    require(type(value) is int and value >= least, f"{what} must be a whole number, {least} or more")
    return value


def parse_profile(name: str, values: Mapping[str, Any]) -> Profile:
    what = f"profile {name}"
    require(values.get("text", "") in ("", "synthetic"), f"{what}: text is synthetic, or left out")
    require("steps" in values, f"{what}: steps is missing")
    numbers = {
        word: whole_number(f"{what}: {word}", values[word], int(word == "steps"))
        for word in PROFILE_NUMBERS
        if word in values
    }
    steps = numbers["steps"]
    require(numbers.get("stop_step", 0) <= steps, f"{what}: stop_step is beyond the schedule's {steps} steps")
    knobs = knob_texts(what, {k: value for k, value in values.items() if k not in (*PROFILE_NUMBERS, "text")})
    for knob in CAPPED_KNOBS:
        capped = "is set by steps: runs are capped by steps, so that seeds repeat"
        require(knob not in knobs, f"{what}: {knob} {capped}")
    return Profile(name, text=values.get("text", ""), knobs=knobs, **numbers)


def parse_row(letter: str, values: Mapping[str, Any], raw: Sequence[dict[str, Any]]) -> list[MatrixRow]:
    """Returns the rows that one table stands for; `raw` are the tables of all. Raises StudyError."""
    what = f"row {values['name']!r} of group {letter}"
    if "source" in values:
        return parse_rounding(letter, what, values)
    knobs, lr_scale = resolve_changes(what, values, raw, ())
    for knob in knobs:
        section, refused = KNOBS[knob][0], f"{what}: {knob} is not for one row"
        shared = section == "data" or knob in DATA_KNOBS
        require(not shared, f"{refused}: all rows read the same tokens in the same order")
        require(section != "run" and knob not in CAPPED_KNOBS, f"{refused}: set it in a profile")
    return [MatrixRow(letter, values["name"], knobs, lr_scale, whole_number(what, values.get("seed_offset", 0), 0))]


def resolve_changes(
    what: str, values: Mapping[str, Any], raw: Sequence[dict[str, Any]], seen: tuple[str, ...]
) -> tuple[dict[str, str], float]:
    """Returns (knobs, learning-rate scale) of a row: those of the row that it extends, its study's, then its own."""
    knobs, lr_scale = {}, 1.0
    if "extends" in values:
        before = next((row for row in raw if row["name"] == values["extends"] and "source" not in row), None)
        sound = before and before["name"] not in seen
        require(sound, f"{what}: extends {values['extends']!r}, which is no row to train, or extends this one")
        knobs, lr_scale = resolve_changes(what, before, raw, (*seen, values["name"], before["name"]))
    if "study" in values:
        knobs = knobs | load_study(values["study"])
    lr_scale = values.get("lr_scale", lr_scale)
    require(isinstance(lr_scale, (int, float)) and lr_scale > 0, f"{what}: lr_scale must be above 0")
    return knobs | knob_texts(what, {k: v for k, v in values.items() if k not in ROW_WORDS}), float(lr_scale)


def parse_rounding(letter: str, what: str, values: Mapping[str, Any]) -> list[MatrixRow]:
    """Returns a row for each method and, of GPTQ, each order of columns and number of sequences."""
    check_words(what, values, ROUNDING_WORDS)
    methods, orders, sequences = (
        value if isinstance(value, list) else [value]
        for word, default in (("methods", []), ("act_order", True), ("calibration_sequences", DEFAULT_SEQUENCES))
        for value in [values.get(word, default)]
    )
    named = methods and all(isinstance(method, str) for method in methods)
    require(named, f'{what}: methods must be a list of quantizers, such as ["rtn4", "gptq4-g64"]')
    require(all(type(order) is bool for order in orders), f"{what}: act_order is true, false, or a list of both")
    embedding, rows = bool(values.get("quantize_embedding", False)), []
    for method in methods:
        is_gptq = parse_variant(method, keeps_embedding=not embedding).method == "gptq"
        for count, order in itertools.product(sequences, orders) if is_gptq else [(0, True)]:
            whole_number(f"{what}: calibration_sequences", count, int(is_gptq))
            several = [f"{count} sequences"] if is_gptq and len(sequences) > 1 else []
            name = ", ".join([f"{values['name']} {method}", *([] if order else ["natural order"]), *several])
            rows.append(MatrixRow(letter, name, rounding=Rounding(values["source"], method, order, count, embedding)))
    return rows


def check_names(rows: Sequence[MatrixRow], baseline: str) -> None:
    """Raises StudyError where two rows have one name, or where weights or a baseline are named that no row trains."""
    names, trained = [row.name for row in rows], {row.name for row in rows if row.rounding is None}
    for name in names:
        require(names.count(name) == 1, f"two rows are called {name!r}: rename one")
    require(baseline in trained, f"baseline {baseline!r} is no row that is trained")
    for row in rows:
        source = row.rounding.source if row.rounding else baseline
        require(source in trained, f"row {row.name!r}: source {source!r} is no row that is trained")


NETWORK_ALONE = {"mixture": "0", "adapter_rank": "0"}
"""Studies compare networks: their scores do not adapt, whatever the preset does."""


def base_config(matrix: Matrix, profile: Profile, knobs: Mapping[str, str]) -> Config:
    """Returns the configuration that rows change; `knobs` come from the command line. Raises ConfigError."""
    changes = {**NETWORK_ALONE, **matrix.base, **profile.knobs, **knobs, **profile.caps}
    return build_config(matrix.preset, {}, changes)


def row_config(
    matrix: Matrix, profile: Profile, row: MatrixRow, knobs: Mapping[str, str], located: Mapping[str, Any]
) -> Config:
    """Returns the configuration of a row; `located` are the knobs that name the data that was found. Raises UserError.

    A rounding has the configuration of the row whose weights it rounds.
    """
    source = matrix.row(row.rounding.source) if row.rounding else row
    rates = base_config(matrix, profile, knobs).optim
    scaled = {rate: repr(getattr(rates, rate) * source.lr_scale) for rate in LEARNING_RATES if source.lr_scale != 1}
    changes = {**NETWORK_ALONE, **matrix.base, **profile.knobs, **knobs, **scaled, **source.knobs}
    return build_config(matrix.preset, {}, {**changes, **profile.caps, "corpus": "", **located})
