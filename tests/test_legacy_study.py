"""The published study's flag files: what each becomes, every combination of flags, and every mistake."""

import itertools
import json

import pytest

from golf.config.config import build_config
from golf.config.site_quantizers import activation_sites, weight_sites
from lab.study.legacy_study import (
    NEEDED_FLAGS,
    SHARED_SCALE,
    STUDY_FLAGS,
    FlagError,
    LegacyStudy,
    checked_flags,
    load_study,
    read_study,
)

TERNARY, SHARED, TANH = "ternary-tensor-fork-attached", "ternary-qkvo-fork-attached", "tanh-ternary-fork"
WEIGHTS = {f"weight_{site}": TERNARY for site in ("q", "k", "v", "up", "down")}
QUERIES_AND_KEYS = {"act_q": TANH, "act_k": TANH}
STUDIES = {
    "normal": {},
    "quant_weights": WEIGHTS,
    "quant_weights_attn_act": WEIGHTS | QUERIES_AND_KEYS,
    "quant_extreme": WEIGHTS | {"weight_o": TERNARY} | QUERIES_AND_KEYS
    | {"act_attn_in": TANH, "act_mlp_in": TANH, "act_hidden": TANH},
}  # fmt: skip
"""Quantizers of each published configuration, site by site."""
NAMES = {
    "normal": "normal_baseline", "quant_weights": "weights_quantized_only",
    "quant_weights_attn_act": "weights_and_attn_act_quantized", "quant_extreme": "extreme_full_quantization",
}  # fmt: skip
PRESET = "local"


@pytest.fixture
def study_file(tmp_path):
    """Writes a flag file: text as it is, anything else as JSON."""

    def write(content, name="own.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", STUDIES)
def test_published_studies_load_by_name(name, repository):
    knobs = load_study(name)
    quantizers = {knob: text for knob, text in knobs.items() if knob.startswith(("weight_", "act_"))}
    assert quantizers == STUDIES[name]
    assert read_study(name).name == NAMES[name]
    config = build_config(PRESET, {}, knobs)
    assert config.quant.qat_enabled == (name != "normal")
    assert (config.quant.quantizer, config.quant.prune_frac) == ("rtn", 0)
    quant = config.quant
    assert {quant.mlp_bits, quant.attn_bits, quant.bigram_bits, quant.embed_bits} == {16}
    assert config.model.mlp_activation == ("identity" if name == "quant_extreme" else "relu2")
    assert load_study(repository / "configs" / f"{name}.json") == knobs


def test_all_published_files_are_tested(repository):
    assert {path.stem for path in (repository / "configs").glob("*.json")} == STUDIES.keys()
    for path in (repository / "configs").glob("*.json"):
        assert json.loads(path.read_text()).keys() == {"experiment_name", *STUDY_FLAGS}


def test_eight_bit_activations_are_the_study_s_two_kinds(study_file):
    flags = [flag for flag in STUDY_FLAGS if "ACT_" in flag and "EXTREME" not in flag]
    knobs = load_study(study_file(dict.fromkeys(flags, True)))
    two_sided = dict.fromkeys(("act_attn_in", "act_q", "act_k", "act_mlp_in"), "twosided8-fork-attached")
    quantizers = {knob: text for knob, text in knobs.items() if knob.startswith("act_")}
    assert quantizers == two_sided | {"act_hidden": "unsigned8-fork-attached"}
    assert knobs["mlp_activation"] == "relu2" and knobs["qat_enabled"] == "0"


@pytest.mark.parametrize("with_output", [False, True])
def test_the_shared_scale_is_that_of_the_attention_alone(study_file, with_output):
    flags = {"ENABLE_ATTN_QUANTIZATION": True, "ENABLE_MLP_QUANTIZATION": True, SHARED_SCALE: True}
    knobs = load_study(study_file(flags | {"ENABLE_ATTN_PROJ_QUANTIZATION": with_output}))
    assert {knobs[f"weight_{site}"] for site in "qkv"} == {SHARED}
    assert knobs.get("weight_o") == (SHARED if with_output else None)
    assert knobs["weight_up"] == knobs["weight_down"] == TERNARY


def test_every_combination_is_a_sound_configuration_or_is_refused_for_what_does_nothing():
    built, refused = set(), 0
    for values in itertools.product((False, True), repeat=len(STUDY_FLAGS) + 1):
        flags = dict(zip((*STUDY_FLAGS, SHARED_SCALE), values, strict=True))
        idle = {flag: needed for flag, needed in NEEDED_FLAGS.items() if flags[flag] and not flags[needed]}
        if idle:
            with pytest.raises(FlagError) as caught:
                checked_flags(flags)
            assert any(f"{flag} does nothing without {needed}" in str(caught.value) for flag, needed in idle.items())
            refused += 1
            continue
        knobs = LegacyStudy("any", checked_flags(flags)).knobs
        signature = tuple(sorted(knobs.items()))
        assert signature not in built, "two sets of flags mean the same"
        built.add(signature)
        check_resolved(build_config(PRESET, {}, knobs), flags)
    # of each of 4 pairs, and of the shared scale and its parent, 3 of 4 states are sound; 2 more flags are free
    assert len(built) == 3**5 * 2**2 and refused == 2**12 - len(built)


def check_resolved(config, flags):
    """As many sites are quantized as the flags say."""
    weights = ["q", "k", "v"] * flags["ENABLE_ATTN_QUANTIZATION"] + ["o"] * flags["ENABLE_ATTN_PROJ_QUANTIZATION"]
    assert list(weight_sites(config.quant)) == weights + ["up", "down"] * flags["ENABLE_MLP_QUANTIZATION"]
    activations = ["attn_in"] * flags["ENABLE_ATTN_PRE_ACT_QUANTIZATION"]
    activations += ["q", "k"] * flags["ENABLE_ATTN_ACT_QUANTIZATION"]
    activations += ["mlp_in"] * flags["ENABLE_MLP_PRE_ACT_QUANTIZATION"]
    sites = activation_sites(config.model)
    assert list(sites) == activations + ["hidden"] * flags["ENABLE_MLP_ACT_QUANTIZATION"]
    assert {site.gradient for site in sites.values()} <= {"fork"}
    assert all(site.attached != bool(site.squash) for site in sites.values())


@pytest.mark.parametrize("flag", STUDY_FLAGS)
def test_flags_left_out_are_false(study_file, flag):
    assert load_study(study_file({})) == load_study("normal")
    assert load_study(study_file({flag: False})) == load_study("normal")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ENABLE_MLP": True}, "unknown flag 'ENABLE_MLP': there are experiment_name, ENABLE_ATTN_QUANTIZATION, "),
        ({"enable_mlp_quantization": True}, "unknown flag"),
        ({"ENABLE_MLP_QUANTIZATION": 1}, "ENABLE_MLP_QUANTIZATION must be true or false, not 1"),
        ({"ENABLE_MLP_QUANTIZATION": "true"}, 'must be true or false, not "true"'),
        ({"ENABLE_MLP_QUANTIZATION": None}, "must be true or false, not null"),
        ({"experiment_name": 7}, "experiment_name must be a text"),
        ({"experiment_name": " "}, "experiment_name must be a text"),
        ({SHARED_SCALE: True}, f"{SHARED_SCALE} does nothing without ENABLE_ATTN_QUANTIZATION: set both, or neither"),
        ('{"experiment_name": "a", "experiment_name": "b"}', "experiment_name is there twice"),
        ([], "must be one JSON object of flags"),
        ("{", "no JSON"),
    ],
)
def test_mistakes_are_one_line_with_the_file(study_file, content, message):
    path = study_file(content)
    with pytest.raises(FlagError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_that_is_not_there():
    with pytest.raises(FlagError, match="no study 'quant_weight' in configs/: there are normal, quant_extreme, "):
        load_study("quant_weight")
    with pytest.raises(FileNotFoundError):
        load_study("no/such/file.json")


def test_the_name_is_the_file_s_where_none_is_given(study_file):
    assert read_study(study_file({}, "mine.json")).name == "mine"
    assert read_study(study_file({"experiment_name": "a name"})).name == "a name"


def test_the_tool_prints_what_a_command_line_takes(run_command_here):
    printed = run_command_here("tools/study.py", "quant_weights").stdout.split()
    assert dict(word.split("=") for word in printed) == load_study("quant_weights")
    assert "weight_up=ternary-tensor-fork-attached" in printed and not any("weight_o" in word for word in printed)
