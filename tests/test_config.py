"""Knobs: presets, environment, command line, and what is refused."""

import json
from dataclasses import fields

import pytest

from golf.config.config import (
    KNOBS,
    Config,
    build_config,
    changed_knobs,
    config_dict,
    config_from_dict,
    config_hash,
    iter_knobs,
)
from golf.config.knobs import ConfigError, knob_docs
from golf.config.presets import PRESETS, RENAMED_KNOBS, RENAMED_VALUES, RETIRED_KNOBS
from golf.config.quantization import GRID_KNOBS
from golf.run.command import list_knobs


def test_every_knob_has_one_name():
    names = [knob for _, knob, _, _ in iter_knobs(Config())]
    assert len(names) == len(set(names)) == len(KNOBS)
    assert not {name.upper() for name in names} & set(RETIRED_KNOBS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
    config = build_config(preset, {}, {})
    assert config_from_dict(json.loads(json.dumps(config_dict(config)))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_shards_or_a_text_and_never_both(preset):
    data = build_config(preset, {}, {}).data
    assert bool(data.data_path) != bool(data.corpus)
    assert bool(data.tokenizer_path) == bool(data.data_path)


def test_precedence_is_preset_environment_command_line():
    environ = {"NUM_LAYERS": "5", "SEED": "7", "UNRELATED": "x"}
    config = build_config("local", environ, {"num_layers": "4"})
    assert (config.model.num_layers, config.run.seed, config.model.model_dim) == (4, 7, 160)


@pytest.mark.parametrize("spelling", ["1", "true", "True"])
def test_booleans_are_spelled_as_in_the_competition(spelling):
    assert build_config("baseline", {"QAT_ENABLED": spelling}, {}).quant.qat_enabled is True
    with pytest.raises(ConfigError, match="must be bool"):
        build_config("local", {"QAT_ENABLED": "yes"}, {})


@pytest.mark.parametrize("name", RETIRED_KNOBS)
def test_retired_knobs_are_refused_by_name(name):
    with pytest.raises(ConfigError, match="is not a knob here: set"):
        build_config("local", {name: "1"}, {})


def test_the_competitions_environment_is_understood():
    environ = {
        "RUN_ID": "x", "SEED": "1", "DATA_PATH": "d", "TOKENIZER_PATH": "t", "ITERATIONS": "5", "HOLDOUT_EVERY": "2",
        "MAX_WALLCLOCK_SECONDS": "30.5", "TRAIN_BATCH_TOKENS": "4096", "TRAIN_SEQ_LEN": "512", "EVAL_STRIDE": "32",
        "EVAL_SEQ_LEN": "1024", "NUM_LAYERS": "4", "MLP_MULT": "2", "BIGRAM_VOCAB_SIZE": "0", "MATRIX_LR": "0.01",
        "EMBED_LR": "0.02", "GRAD_CLIP_NORM": "1", "PRUNE_FRAC": "0.1", "QK_GAIN_INIT": "2", "WARMUP_STEPS": "0",
    }  # fmt: skip
    knobs = {knob: value for _, knob, _, value in iter_knobs(build_config("local", environ, {"quantizer": "rtn"}))}
    for name, text in environ.items():
        assert str(knobs[name.lower()]) in (text, f"{text}.0"), name


def test_hash_is_equal_for_seeds_and_differs_for_knobs():
    base = build_config("local", {}, {})
    assert config_hash(base) == config_hash(build_config("local", {}, {"seed": "9", "run_id": "other"}))
    assert config_hash(base) != config_hash(build_config("local", {}, {"matrix_lr": "0.5"}))
    sections = config_dict(base)
    del sections["model"]["lanes_from"]  # as in a script that is older, or that has no use for the knob
    assert config_hash(config_from_dict(sections)) == config_hash(base) and len(config_hash(base)) == 20


def test_a_corpus_of_ones_own_replaces_the_presets_shards():
    config = build_config("leaderboard", {}, {"corpus": "my.txt"})
    assert config.data.corpus == "my.txt" and config.data.data_path == config.data.tokenizer_path == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_dim": "162"}, {"num_kv_heads": "3"}, {"num_heads": "0"}, {"bigram_vocab_size": "1"}, {"mlp_bits": "9"},
        {"iterations": "0", "max_wallclock_seconds": "0"}, {"train_batch_tokens": "1000"}, {"embed_bits": "12"},
        {"swa_start": "1"}, {"prune_frac": "1"}, {"eval_stride": "0"},
        {"eval_stride": "4096"}, {"seed": "x"}, {"vocab_size": "70000"}, {"corpus": "", "data_path": ""},
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError):
        build_config("local", {}, wrong)


def test_preset_is_chosen_by_the_nearest_word():
    assert build_config("local", {"PRESET": "baseline"}, {}).model.num_layers == 9
    config = build_config("local", {"PRESET": "baseline"}, {"preset": "leaderboard"})
    assert (config.run.preset, config.model.num_layers) == ("leaderboard", 10)


def test_changed_knobs_are_those_that_differ_from_the_preset():
    assert changed_knobs(build_config("local", {}, {})) == {}
    assert changed_knobs(build_config("local", {"SEED": "5"}, {"num_layers": "3"})) == {"seed": 5, "num_layers": 3}


def test_corpus_and_shards_together_are_refused():
    with pytest.raises(ConfigError, match="both set"):
        build_config("local", {"CORPUS": "a.txt"}, {"data_path": "shards"})


@pytest.mark.parametrize("knob", sorted(GRID_KNOBS))
def test_knobs_of_the_grid_are_refused_where_a_fit_chooses_all_steps(knob):
    with pytest.raises(ConfigError, match=f"{knob} does nothing with quantizer=waterfill"):
        build_config("local", {}, {knob: "0" if knob == "qat_start" else "4"})
    with pytest.raises(ConfigError, match=f"{knob} does nothing"):
        build_config("local", {knob.upper(): "0" if knob == "qat_start" else "4"}, {})
    grid = {"quantizer": "rtn", knob: "0" if knob == "qat_start" else "4"}
    assert build_config("local", {}, grid).quant.quantizer == "rtn"


def test_every_knob_has_one_line_of_docs_and_help_shows_it(capsys):
    docs = {knob: line for section in fields(Config()) for knob, line in knob_docs(section.type).items()}
    assert docs.keys() == KNOBS.keys()
    assert all(line and "\n" not in line for line in docs.values()), [knob for knob in docs if not docs[knob]]
    shown = list_knobs()
    assert all(f"  {knob}=" in shown and line in shown for knob, line in docs.items())


@pytest.mark.parametrize("old", RENAMED_KNOBS)
def test_a_knob_that_was_renamed_is_read_in_old_runs_and_refused_on_the_command_line(old):
    (new, *_) = RENAMED_KNOBS[old]
    section, value = KNOBS[new][0], getattr(getattr(Config(), KNOBS[new][0]), new) * 2
    renamed = config_from_dict({section: {old: value}})
    assert all(getattr(getattr(renamed, section), name) == value for name in RENAMED_KNOBS[old])
    with pytest.raises(ConfigError, match=new):
        build_config("local", {}, {old: "3"})
    with pytest.raises(ConfigError, match=new):
        build_config("local", {old.upper(): "3"}, {})


def test_quantizers_of_old_runs_are_read_by_their_names_of_today():
    for (knob, old), new in RENAMED_VALUES.items():
        assert getattr(config_from_dict({"quant": {knob: old}}).quant, knob) == new
        with pytest.raises(ConfigError, match=new):
            build_config("local", {}, {knob: old})
