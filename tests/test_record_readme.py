"""README.md of a record: its figures, its words, and what makes it impossible to write."""

import json
import os
import sys
from pathlib import Path

import jinja2
import pytest
from evidence_fixtures import build, digest, edit_result, write_json, write_run

from golf.config.knobs import UserError
from lab.record.finding import EvidenceError
from lab.record.record_readme import RecordFacts, render_readme
from lab.record.run_check import feature_audit, read_run


def test_the_readme_has_the_figures_and_the_commands(tmp_path):
    changed = {"num_layers": "3", "matrix_lr": "0.05"}
    runs = [write_run(tmp_path / "runs" / str(seed), seed, changed) for seed in (42, 43, 44)]
    text = (build(tmp_path, *runs).folder / "README.md").read_text()
    assert "| 43 | 1.45000000 | 3.35049459 | 1,343 | 179.9 | 8.8 |" in text
    assert "sample sd | 0.00100000" in text
    assert "\npython train_gpt.py --preset local num_layers=3 matrix_lr=0.05 seed=44\n" in text
    assert "| C1 future | PASS | PASS | PASS |" in text and "| qat | 1,340 | 1 to 1,340 | yes |" in text
    assert digest(b"artifact of seed 44") in text and "test of significance" not in text


def test_several_processes_are_started_by_torchrun(tmp_path):
    run = write_run(tmp_path / "r", world_size=8)
    text = (build(tmp_path, run).folder / "README.md").read_text()
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py --preset local seed=42" in text


@pytest.mark.parametrize(("seeds", "said"), [((42,), "One seed"), ((42, 43), "Two seeds")])
def test_few_seeds_are_said_to_be_few(tmp_path, seeds, said):
    outcome = build(tmp_path, *(write_run(tmp_path / str(seed), seed) for seed in seeds))
    text = (outcome.folder / "README.md").read_text()
    assert said in text and "no test of significance was made" in text
    assert (outcome.claims["val_bpb_std"] is None) == (len(seeds) == 1)


def test_words_come_out_of_the_readme_as_they_went_in(tmp_path):
    """Text that Markdown or the template could take for its own comes out as it went in."""
    run = write_run(tmp_path / "r", features={}, probes={}, parity={}, resumes=2, fit_actions=["a|b", "{{ c }} <d>"])
    text = (build(tmp_path, run, blurb="{% if x %} & 'y' | <z>").folder / "README.md").read_text()
    assert "\n{% if x %} & 'y' | <z>\n" in text and r"| size was fitted by | a\|b; {{ c }} <d> |" in text
    assert (
        "## Legality probes\nNone was run.\n\n## Time\n" in text
        and "resumed (times): seed 42: 2.\n\n## Machine" in text
    )
    assert "makes a run invalid.\n\n| parity" in text and "| scorer | - |" in text and "\n\n\n" not in text


def test_the_readme_has_no_gap_where_a_figure_is_missing(tmp_path):
    run = read_run(write_run(tmp_path / "r"))
    with pytest.raises(jinja2.UndefinedError, match="blurb"):
        render_readme(RecordFacts({"name": "A record"}, [run.result], run.config, {}))


def test_without_jinja2_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"^jinja2 can't be imported .*pip install -r requirements-lab.txt$"):
        build(tmp_path, write_run(tmp_path / "r"))
    assert os.listdir(tmp_path / "records" / "track_local") == []


def with_witness(run: Path) -> Path:
    """The run as a program wrote it that called the feature audit a witness."""
    result = json.loads((run / "result.json").read_text())
    write_json(run / "result.json", {"witness" if key == "features" else key: result[key] for key in result})
    return run


def test_the_feature_audit_is_read_under_both_of_its_names(tmp_path):
    new, old = (write_run(tmp_path / name / "r") for name in ("new", "old"))
    records = [build(tmp_path / "new", new).folder, build(tmp_path / "old", with_witness(old)).folder]
    assert (records[0] / "README.md").read_text() == (records[1] / "README.md").read_text()
    assert "| prune | 1 | outside of training | yes | 10 codes |" in (records[1] / "README.md").read_text()
    assert feature_audit({"features": {"a": {}}, "witness": {"b": {}}}) == feature_audit({"witness": {"a": {}}})
    assert feature_audit({"features": {}}) == {} and feature_audit({}) is None


@pytest.mark.parametrize("name", ["features", "witness"])
def test_a_feature_audit_that_is_none_is_refused(tmp_path, name):
    run = write_run(tmp_path / "r") if name == "features" else with_witness(write_run(tmp_path / "r"))
    edit_result(run, log=False, **{name: {"qat": 3}})
    with pytest.raises(EvidenceError, match="features must be an object of objects"):
        build(tmp_path, run)
    result = json.loads((run / "result.json").read_text())
    write_json(run / "result.json", {key: value for key, value in result.items() if key != name})
    with pytest.raises(EvidenceError, match="lacks features: an older version"):
        build(tmp_path, run)
