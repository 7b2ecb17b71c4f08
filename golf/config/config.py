"""Builds the whole configuration from sections of knobs, presets, the rules between them and the environment.

A knob has one lower-case name, unique over the whole tree, and its environment variable is that name in upper case
(``train_seq_len`` is ``TRAIN_SEQ_LEN``). Precedence: preset, then environment, then ``key=value`` on the command line.
No other module reads the environment's knobs.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from golf.config.knobs import ConfigError
from golf.config.model import ModelConfig, model_rules
from golf.config.presets import PRESETS, RENAMED_KNOBS, RENAMED_VALUES, RETIRED_KNOBS
from golf.config.quantization import GRID_KNOBS, QuantConfig, quant_rules
from golf.config.run import DataConfig, RunConfig, data_rules
from golf.config.scoring import ScoreConfig, score_rules
from golf.config.site_quantizers import weight_sites
from golf.config.training import AverageConfig, OptimConfig, TrainConfig, budget_rules, training_rules

FROZEN: dict[str, Any] = {}
"""Knobs of a script that was made for one configuration (tools/bundle.py); empty in the sources."""
FREE_KNOBS = {
    "run_id", "seed", "runs_root", "device", "compile", "threads", "limit_bytes", "reserve_bytes", "checkpoint_seconds",
    "rehearse", "data_path", "tokenizer_path", "corpus", "iterations", "max_wallclock_seconds", "micro_batch_tokens",
    "warmup_steps", "train_log_every", "eval_batch_tokens", "calibration_reserve", "eval_batch_seqs",
    "max_eval_seconds",
}  # fmt: skip
"""Knobs that such a script still accepts: places, budgets and machines, which no code of a technique depends on."""


OWN_KNOBS = (
    "run_id", "seed", "runs_root", "threads", "checkpoint_seconds", "rehearse", "track", "data_path", "tokenizer_path",
)  # fmt: skip
"""Knobs of one run of many, which do not shape its result or, as paths, do not say what it is made of."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


def iter_knobs(config: Config) -> Iterator[tuple[str, str, type, Any]]:
    """Yields (section, knob, type, value) for every scalar of the tree."""
    for section in fields(config):
        part = getattr(config, section.name)
        for knob in fields(part):
            yield section.name, knob.name, knob.type, getattr(part, knob.name)


KNOBS: dict[str, tuple[str, Any]] = {knob: (section, kind) for section, knob, kind, _ in iter_knobs(Config())}


def parse_value(knob: str, kind: Any, text: str) -> Any:
    """Returns the value of `knob` that `text` spells (booleans are 0, 1, true or false). Raises ConfigError."""
    try:
        if get_origin(kind) is Literal:
            return {choice: choice for choice in get_args(kind)}[text]
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        value = int(text.replace("_", "")) if kind is int else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        wanted = " or ".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__
        raise ConfigError(f"{knob}={text!r} is not a valid value: it must be {wanted}") from None


def with_knobs(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns `config` with some knobs set; parses values that are text. Raises ConfigError for an unknown knob."""
    changes: dict[str, dict[str, Any]] = {}
    for knob, value in values.items():
        if not FROZEN and knob.upper() in RETIRED_KNOBS:
            raise ConfigError(f"{knob} is not a knob here: set {RETIRED_KNOBS[knob.upper()]}")
        if knob not in KNOBS:
            raise ConfigError(f"unknown knob {knob!r}: `python train_gpt.py --help` lists the {len(KNOBS)} that exist")
        section, kind = KNOBS[knob]
        changes.setdefault(section, {})[knob] = parse_value(knob, kind, value) if isinstance(value, str) else value
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


def knobs_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the knobs that environment variables set, retired ones included (so that they are refused by name)."""
    names = {knob.upper(): knob for knob in KNOBS}
    if not FROZEN:
        names |= {name: name for name in RETIRED_KNOBS}
    return {names[name]: text for name, text in environ.items() if name in names}


def preset_config(preset: str) -> Config:
    """Returns the configuration of a preset, or the one that this script was made for. Raises ConfigError."""
    if FROZEN:
        return with_knobs(Config(), FROZEN)
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return with_knobs(Config(), PRESETS[preset] | {"preset": preset})


def stores_plain_rows() -> bool:
    """Returns whether this script's artifacts hold only fp16 tensors and rows of codes with one scale each.

    Such a script has no code for other forms.
    """
    quant = preset_config("").quant if FROZEN else None
    return quant is not None and quant.quantizer == "rtn" and not weight_sites(quant)


def build_config(preset: str, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Config:
    """Returns the resolved configuration: preset, then environment, then overrides. Raises ConfigError."""
    chosen = knobs_of_environment(environ) | dict(overrides)
    base = preset_config(chosen.get("preset", preset))
    if chosen.get("corpus") and chosen.get("data_path"):
        raise ConfigError("corpus and data_path are both set: give the text, or the shards that were made of it")
    if chosen.get("corpus"):  # the user's own text replaces the preset's shards
        chosen = {"data_path": "", "tokenizer_path": ""} | chosen
    config = with_knobs(base, chosen)
    if FROZEN:
        check_frozen(config)
    elif config.quant.quantizer == "waterfill" and (unheard := sorted(chosen.keys() & GRID_KNOBS)):
        raise ConfigError(f"{unheard[0]} does nothing with quantizer=waterfill: set quantizer=rtn")
    check_config(config)
    return config


def check_frozen(config: Config) -> None:
    """Raises ConfigError for a knob whose other values this script, made for one configuration, has no code for."""
    frozen = preset_config("")
    for (_, knob, _, value), (*_, made_for) in zip(iter_knobs(config), iter_knobs(frozen), strict=True):
        if knob not in FREE_KNOBS and value != made_for:
            raise ConfigError(f"this script is made for {knob}={made_for}: take the project's sources to change it")


POSITIVE_KNOBS = (
    "num_heads", "num_kv_heads", "model_dim", "mlp_mult", "train_seq_len", "rope_base", "logit_softcap",
    "train_batch_tokens", "micro_batch_tokens", "train_log_every", "holdout_tokens", "eval_batch_tokens",
    "limit_bytes", "eval_batch_seqs",
)  # fmt: skip


def check_config(config: Config) -> None:
    """Raises ConfigError where values do not fit together, before the run has spent any time."""
    for _, knob, _, value in iter_knobs(config):
        if isinstance(value, (int, float)) and (value < 0 or (knob in POSITIVE_KNOBS and value == 0)):
            raise ConfigError(f"{knob}={value} must be {'positive' if knob in POSITIVE_KNOBS else 'at least 0'}")
    rules = [*budget_rules(config), *data_rules(config)]
    if not FROZEN:
        rules += [*quant_rules(config), *model_rules(config), *training_rules(config), *score_rules(config)]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def changed_knobs(config: Config) -> dict[str, Any]:
    """Returns the knobs that differ from the preset's, except the data's paths."""
    pairs = zip(iter_knobs(preset_config(config.run.preset)), iter_knobs(config), strict=True)
    changed = {knob: value for (_, _, _, before), (_, knob, _, value) in pairs if value != before}
    return {knob: value for knob, value in changed.items() if knob not in ("data_path", "tokenizer_path")}


def config_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the configuration as a plain nested dictionary, for JSON."""
    return asdict(config)


def current_knobs(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of an older run under their present names and values."""
    if FROZEN:
        return dict(knobs)
    renamed = {new: value for knob, value in knobs.items() for new in RENAMED_KNOBS.get(knob, (knob,))}
    return {
        knob: RENAMED_VALUES.get((knob, value), value) if isinstance(value, str) else value
        for knob, value in renamed.items()
    }


def config_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Builds a configuration from config_dict's output, and from that of older runs."""
    return with_knobs(
        Config(), current_knobs({knob: value for part in sections.values() for knob, value in part.items()})
    )


def config_hash(config: Config) -> str:
    """Returns SHA-256 (20 hex digits) of all knobs that shape the result: equal for the seeds of one experiment.

    Knobs at their defaults do not count, so that a knob that comes later changes no hash. Data has its own identity.
    """
    pairs = zip(iter_knobs(Config()), iter_knobs(config), strict=True)
    knobs = {knob: value for (*_, default), (_, knob, _, value) in pairs if value != default and knob not in OWN_KNOBS}
    return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:20]
