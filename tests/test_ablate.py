"""tools/ablate.py without a run: matrices, keys, statistics, tables, refusals."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from golf.config.config import build_config, iter_knobs, with_knobs
from golf.config.knobs import ConfigError
from lab.study.matrix import base_config, parse_matrix, read_matrix, row_config
from lab.study.plan import forecast, plan_study
from lab.study.spec import (
    UNDECIDING_FIELDS,
    UNDECIDING_KNOBS,
    StudyError,
    read_spec,
    save_spec,
    study_code_sha256,
)
from tests.ablation_fixtures import MATRIX, a_result, a_spec, write_matrix

# ---- the matrix ----


def small(tmp_path: Path, text: str = MATRIX):
    return read_matrix(write_matrix(tmp_path, text))


def test_rows_inherit_and_roundings_multiply(tmp_path):
    several = 'methods = ["rtn3", "gptq3"], act_order = [true, false], calibration_sequences = [4, 8]'
    inherits = 'extends = "ternary", lr_scale = 0.5, act_q = "int8"'
    text = MATRIX.replace(
        '{ name = "broken by"', f'{{ name = "all", source = "plain", {several} }},\n{{ name = "broken by"'
    )
    text = text.replace('{ name = "plain again"', f'{{ name = "more", {inherits} }},\n{{ name = "plain again"')
    matrix = small(tmp_path, text)
    names = [row.name for row in matrix.rows if row.name.startswith("all")]
    assert names[:2] == ["all rtn3", "all gptq3, 4 sequences"] and len(set(names)) == len(names) == 1 + 4
    rounded = {(r.rounding.act_order, r.rounding.calibration_sequences) for r in matrix.rows if r.name in names[1:]}
    assert rounded == {(True, 4), (False, 4), (True, 8), (False, 8)}
    more = matrix.row("more")
    assert (more.lr_scale, more.knobs["weight_q"], more.knobs["act_q"]) == (0.5, "ternary", "int8")
    profile, located = matrix.profile("tiny"), {"data_path": "d", "tokenizer_path": "t"}
    config, plain = (row_config(matrix, profile, row, {}, located) for row in (more, matrix.row("plain")))
    assert config.optim.matrix_lr == plain.optim.matrix_lr / 2 and config.optim.scalar_lr == plain.optim.scalar_lr / 2
    assert (config.model.act_q, config.model.act_hidden, plain.model.act_q) == ("int8", "unsigned8", "")
    assert (config.train.iterations, config.train.max_wallclock_seconds) == (8, 0)


def test_chosen_groups_bring_the_baseline_and_the_weights_that_they_round(tmp_path):
    matrix = small(tmp_path)
    assert [row.name for row in matrix.chosen_rows("G")] == ["plain", "broken", "by rtn4", "by gptq2", "broken by rtn8"]
    assert len(matrix.chosen_rows("")) == len(matrix.rows) == 7
    with pytest.raises(StudyError, match="no group 'X' in the matrix: it has A, B, G"):
        matrix.chosen_rows("A,X")
    with pytest.raises(StudyError, match="no profile 'full'"):
        matrix.profile("full")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "small"', "name = ", "no TOML"),
        ('baseline = "plain"', 'baseline = "other"', "baseline 'other' is no row that is trained"),
        ('baseline = "plain"', "", "baseline is missing"),
        ('baseline = "plain"', 'baseline = "plain"\nbasis = 1', "unknown word 'basis'"),
        ("model_dim = 32", "modeldim = 32", "base: unknown knob or word 'modeldim'"),
        ("model_dim = 32", "model_dim = [32]", "base: model_dim must be a text"),
        ("steps = 8", "", "profile tiny: steps is missing"),
        ("stop_step = 6", "stop_step = 9", "beyond the schedule's 8 steps"),
        ("look_every = 2", "look_every = -2", "look_every must be a whole number, 0 or more"),
        ("look_every = 2", "iterations = 2", "iterations is set by steps"),
        ('text = "synthetic"', 'text = "novel"', "text is synthetic, or left out"),
        ('{ name = "plain again", extends = "plain" }', '{ name = "plain" }', "two rows are called 'plain'"),
        ('extends = "plain" }', 'extends = "nobody" }', "extends 'nobody', which is no row to train"),
        ('extends = "plain" }', 'extends = "plain again" }', "or extends this one"),
        ('extends = "plain" }', 'extends = "plain", row_order = "spread" }', "row_order is not for one row"),
        ('extends = "plain" }', 'extends = "plain", vocab_size = 9 }', "vocab_size is not for one row"),
        ('extends = "plain" }', 'extends = "plain", threads = 2 }', "threads is not for one row: set it in a profile"),
        ('extends = "plain" }', 'extends = "plain", lr_scale = 0 }', "lr_scale must be above 0"),
        ('extends = "plain" }', 'extends = "plain", study = "unknown" }', "no study 'unknown'"),
        ('methods = ["rtn8"]', 'methods = ["magic8"]', "unknown method 'magic8'"),
        ('methods = ["rtn8"]', "methods = []", "methods must be a list"),
        ('methods = ["rtn8"]', 'methods = ["rtn8"], lr_scale = 2', "unknown word 'lr_scale'"),
        ('source = "broken"', 'source = "by rtn4"', "source 'by rtn4' is no row that is trained"),
        ("calibration_sequences = 4", "calibration_sequences = 0", "must be a whole number, 1 or more"),
        ("calibration_sequences = 4", "act_order = 1", "act_order is true, false, or a list of both"),
    ],
)  # fmt: skip
def test_a_matrix_that_is_none_is_told_where(tmp_path, old, new, message):
    assert old in MATRIX
    with pytest.raises(ValueError, match=message):
        small(tmp_path, MATRIX.replace(old, new))


def test_empty_tables_are_no_matrix():
    for word in ("profiles", "groups"):
        content = {
            "name": "n",
            "preset": "local",
            "baseline": "b",
            "profiles": {"p": {"steps": 1}},
            "groups": {"A": {}},
        }
        with pytest.raises(StudyError):
            parse_matrix(content | {word: {}})


@pytest.mark.parametrize("name", ["lowbit", "small_gpt"])
def test_every_row_of_the_committed_studies_is_a_configuration(repository, name):
    matrix = read_matrix(repository / "configs" / "studies" / f"{name}.toml")
    for profile in matrix.profiles.values():
        keys = set()
        for row in matrix.rows:
            config = row_config(matrix, profile, row, {}, {"data_path": "d", "tokenizer_path": "t", "vocab_size": 300})
            assert config.train.max_wallclock_seconds == 0 and config.train.iterations == profile.steps
            keys.add((a_spec(config).key, row.rounding, row.seed_offset))
        assert len(keys) > len(matrix.rows) / 2
    assert {"cpu-smoke", "screen", "full"} <= matrix.profiles.keys()
    assert matrix.profiles["screen"].steps == matrix.profiles["full"].steps > matrix.profiles["screen"].stop_step == 400


def test_the_low_bit_study_has_the_groups_of_its_specification(repository):
    matrix = read_matrix(repository / "configs" / "studies" / "lowbit.toml")
    assert list(matrix.groups) == list("ABCDEFGH")
    methods = {(r.rounding.method, r.rounding.act_order) for r in matrix.rows if r.group == "G"}
    for bits in (8, 6, 4, 3, 2):
        for end in ("", "-g64"):
            assert {(f"rtn{bits}{end}", True), (f"gptq{bits}{end}", True), (f"gptq{bits}{end}", False)} <= methods
    assert {r.rounding.calibration_sequences for r in matrix.rows if r.group == "G"} == {0, 8, 64, 512}
    profile = matrix.profile("screen")
    tokens = {r.knobs.get("knowledge_tokens", "0") for r in matrix.rows}
    assert tokens == {"0", "4", "16", "64"}
    sizes = {}
    for name in ("baseline + 16 knowledge tokens", "baseline + width for 16 tokens", "full precision"):
        config = row_config(matrix, profile, matrix.row(name), {}, {"data_path": "d", "tokenizer_path": "t"})
        model = config.model
        hidden = int(model.mlp_mult * model.model_dim)
        sizes[name] = model.num_layers * 2 * model.model_dim * hidden + model.knowledge_tokens * model.model_dim
    gained = [sizes[name] - sizes["full precision"] for name in sizes]
    assert gained[0] == gained[1] == 16 * 128  # the width is matched to the tokens


def test_the_full_precision_baseline_is_that_of_the_studies(repository):
    matrix = read_matrix(repository / "configs" / "studies" / "lowbit.toml")
    config = row_config(
        matrix, matrix.profile("full"), matrix.row(matrix.baseline), {}, {"data_path": "d", "tokenizer_path": "t"}
    )
    quant = config.quant
    assert (quant.mlp_bits, quant.attn_bits, quant.bigram_bits, quant.embed_bits) == (16, 16, 16, 16)
    assert (quant.qat_enabled, quant.quantizer, quant.prune_frac) == (False, "rtn", 0.0)
    assert base_config(matrix, matrix.profile("full"), {}) != build_config("local", {}, {})


# ---- keys ----


def other_value(kind: object, value: object) -> object:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value}x"


def test_every_knob_and_every_field_that_decides_is_in_the_key():
    spec = a_spec()
    undecided = {knob for knobs in UNDECIDING_KNOBS.values() for knob in knobs} - {"seed"}
    for _, knob, kind, value in iter_knobs(spec.config):
        changed = replace(spec, config=with_knobs(spec.config, {}))
        section = next(s for s in fields(spec.config) if knob in {f.name for f in fields(getattr(spec.config, s.name))})
        part = replace(getattr(spec.config, section.name), **{knob: other_value(kind, value)})
        changed = replace(spec, config=replace(spec.config, **{section.name: part}))
        assert (changed.key == spec.key) == (knob in undecided), knob
    for field in fields(spec):
        if field.name != "config":
            changed = replace(spec, **{field.name: other_value(None, getattr(spec, field.name))})
            assert (changed.key == spec.key) == (field.name in UNDECIDING_FIELDS), field.name


def test_a_spec_is_read_back_and_a_changed_one_refused(tmp_path):
    spec = a_spec(stop_step=4, method="rtn8")
    save_spec(spec, tmp_path / "spec.json")
    assert read_spec(tmp_path / "spec.json") == spec
    text = (tmp_path / "spec.json").read_text()
    for old, new, message in (
        ('"stop_step": 4', '"stop_step": 5', "its key is not that of its content"),
        ('"format": 1', '"format": 2', "not a run's description of format 1"),
        ('"stop_step": 4', '"stop_stop": 4', "damaged"),
        ('"num_layers": 2', '"num_layers": 1', "num_layers must be at least 2"),
        ("{", "[", "it is no JSON object"),
    ):
        (tmp_path / "spec.json").write_text(text.replace(old, new, 1))
        with pytest.raises(StudyError, match=message):
            read_spec(tmp_path / "spec.json")


def test_the_code_is_in_the_key(repository, tmp_path):
    def copy(source: Path) -> None:
        target = tmp_path / source.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())

    for path in [*(repository / "golf").rglob("*.py"), *(repository / "lab").rglob("*.py")]:
        copy(path)
    before = study_code_sha256(tmp_path)
    assert before == study_code_sha256(repository)
    other = tmp_path / "lab" / "study" / "pictures.py"
    other.write_text(other.read_text() + "\n")
    assert study_code_sha256(tmp_path) == before  # what draws tables changes no run
    for name in ("golf/quant/grid.py", "lab/study/training.py", "golf/model/gpt.py"):
        path = tmp_path / name
        path.write_text(path.read_text() + "\n")
        assert study_code_sha256(tmp_path) != before
        path.write_text(path.read_text()[:-1])


# ---- the plan ----


def planned(tmp_path: Path, repository: Path, groups: str = "", seeds: int = 2, text: str = MATRIX, **knobs: str):
    matrix = small(tmp_path, text)
    return plan_study(matrix, matrix.profile("tiny"), groups, seeds, knobs, 1, repository, tmp_path / "out", "code")


def test_equal_configurations_under_two_names_are_one_run(tmp_path, repository):
    plan = planned(tmp_path, repository)
    rows = {row.name: row for row in plan.rows}
    assert rows["plain"].keys == rows["plain again"].keys and len(set(rows["plain"].keys)) == 2
    asked = sum(len(row.keys) for row in plan.rows)
    assert (asked, len(plan.runs)) == (14, 12)
    kinds = [bool(spec.method) for spec in plan.runs.values()]
    assert kinds == sorted(kinds)  # trainings before what needs their weights
    seeds = [spec.config.run.seed for spec in plan.runs.values()]
    assert seeds == [42, 42, 42, 43, 43, 43] * 2  # all rows of a seed before the next one
    for spec in plan.runs.values():
        if spec.method:
            assert plan.runs[spec.source_key].keeps_weights and spec.source.endswith(spec.source_key)
    unrounded = planned(tmp_path, repository, groups="A,B")
    assert not any(spec.keeps_weights for spec in unrounded.runs.values())
    assert unrounded.runs.keys() < plan.runs.keys()  # that weights are kept changes no key


def test_a_seed_offset_is_the_same_configuration_under_other_seeds(tmp_path, repository):
    text = MATRIX.replace('{ name = "plain again", extends = "plain" }',
                          '{ name = "plain again", extends = "plain", seed_offset = 500 }')  # fmt: skip
    plan = planned(tmp_path, repository, groups="A,B", text=text)
    again = next(row for row in plan.rows if row.name == "plain again")
    assert [plan.runs[key].config.run.seed for key in again.keys] == [542, 543]


def test_knobs_of_the_command_line_are_of_all_rows(tmp_path, repository):
    plan = planned(tmp_path, repository, num_layers="3")
    assert {spec.config.model.num_layers for spec in plan.runs.values()} == {3}
    with pytest.raises(StudyError, match="--seeds 0"):
        planned(tmp_path, repository, seeds=0)
    with pytest.raises(ConfigError, match="num_layers must be at least 2"):
        planned(tmp_path, repository, num_layers="1")


def test_the_forecast_says_what_it_rests_on(tmp_path, repository):
    plan = planned(tmp_path, repository)
    rough = forecast(plan, {}, jobs=2)
    assert rough.runs == 12 and rough.wall_seconds == rough.seconds / 2 and rough.basis.startswith("a rough model")
    trained = {key: a_result(1.0) | {"total_seconds": 7.0} for key, spec in plan.runs.items() if not spec.method}
    one = dict([next(iter(trained.items()))])
    half = forecast(plan, one, jobs=1)
    assert half.runs == 11 and "1 finished runs and a rough model" in half.basis
    assert half.seconds == pytest.approx(5 * 7.0 + forecast(plan, trained, jobs=1).seconds, rel=0.05)
    whole = forecast(plan, {key: a_result(1.0) for key in plan.runs}, jobs=1)
    assert (whole.runs, whole.seconds, whole.basis) == (0, 0.0, "nothing that is left to do")
