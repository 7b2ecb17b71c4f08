"""What a script is specialised for: a configuration, as the bundler wants to know it."""

from typing import Any, Literal, get_origin

from golf.config.config import (
    FREE_KNOBS,
    KNOBS,
    OWN_KNOBS,
    Config,
    config_from_dict,
    iter_knobs,
    preset_config,
    with_knobs,
)
from golf.config.features import features_on
from golf.config.site_quantizers import activation_sites, weight_sites
from lab.bundle.specialize import Frozen
from lab.cli import import_rooms


def freeze_config(config: Config) -> Frozen:
    """Returns what a script that is made for this configuration may take for granted."""
    import_rooms()
    config = with_knobs(config, {"track": "off"})  # where a run was followed, its script still ships alone
    all_knobs = {knob: value for _, knob, _, value in iter_knobs(config)}
    choices = {knob for knob, (_, kind) in KNOBS.items() if get_origin(kind) is Literal} - FREE_KNOBS
    values = {knob: value for knob, value in all_knobs.items() if knob in choices or not (value or knob in FREE_KNOBS)}
    sites = weight_sites(config.quant)
    calls: dict[str, Any] = {"stores_plain_rows": config.quant.quantizer == "rtn" and not sites}
    calls["takes_model_files_only"] = config.data.tokenizer_path.endswith(".model")
    if not activation_sites(config.model):
        calls["activation_sites"] = {}
    if not sites:
        calls |= {"weight_sites": {}, "weight_site": None}
    on = frozenset(features_on(config))
    return Frozen(shipped_knobs(config), values, frozenset(choices), on, calls, frozenset(FREE_KNOBS))


def shipped_knobs(config: Config) -> dict[str, Any]:
    """Returns the knobs that differ from their defaults; those of a single run and paths are the preset's."""
    defaults = {knob: value for _, knob, _, value in iter_knobs(Config())}
    presets = {knob: value for _, knob, _, value in iter_knobs(preset_config(config.run.preset))}
    chosen = {knob: value for _, knob, _, value in iter_knobs(config)}
    chosen |= {knob: presets[knob] for knob in OWN_KNOBS}
    shipped = {knob: value for knob, value in chosen.items() if value != defaults[knob]}
    if config.data.corpus:
        shipped |= {"data_path": "", "tokenizer_path": ""}
    if config.data.corpus not in ("", "embedded"):
        shipped["corpus"] = "embedded"
    return shipped


def run_config(values: dict[str, Any]) -> Config:
    """Returns the configuration in a run's config.json."""
    return config_from_dict({name: part for name, part in values.items() if isinstance(part, dict)})
