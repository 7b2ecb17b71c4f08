"""The tables of tools/ablate.py: statistics against cases by hand, text made from the CSV, pictures, refusals."""

import math
from dataclasses import replace

import pytest

from lab.study.pictures import draw_study
from lab.study.report import CSV_COLUMNS, csv_text, delta_cell, read_csv_rows, render_study, study_notes
from lab.study.spec import StudyError
from lab.study.table import (
    RunCurve,
    band,
    check_one_device,
    check_same_tokens,
    differences,
    mean_interval,
    row_difference,
    row_status,
    sound_part,
    step_of_loss,
    table_rows,
)
from tests.ablation_fixtures import a_result, a_row, a_study

# ---- statistics ----


def test_a_paired_difference_by_hand():
    base = a_row("base", [3.0, 3.5, 2.5])
    found = row_difference(a_row("worse", [3.19, 3.70, 2.71]), base)
    assert found.mean == pytest.approx(0.2) and found.error == pytest.approx(0.01 / math.sqrt(3))
    half = 4.302653 * 0.01 / math.sqrt(3)  # t(0.975, 2)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert (found.verdict, found.basis) == ("worse", "3 seeds")
    assert row_difference(a_row("better", [2.81, 3.30, 2.29]), base).verdict == "better"
    assert row_difference(base, base).verdict == "reference"


def test_what_is_not_resolved():
    base = a_row("base", [3.0, 3.0, 3.0])
    wide = row_difference(a_row("wide", [3.1, 3.2, 3.3]), base)  # 3.46 standard errors, but the interval holds 0
    assert wide.mean / wide.error > 3 and wide.low < 0 < wide.high and wide.verdict == "not resolved"
    many = [0.0, 0.1] * 40
    small_effect = row_difference(a_row("b", [3 + d for d in many]), a_row("a", [3.05 - 0.0105] * 80))
    assert small_effect.mean / small_effect.error < 2 and small_effect.verdict == "not resolved"
    same = row_difference(a_row("same", [3.0, 3.0, 3.0]), base)
    assert (same.mean, same.verdict) == (0.0, "not resolved") and "neither difference nor spread" in same.basis
    alone = row_difference(a_row("alone", [4.0]), a_row("base", [3.0]))
    assert (alone.mean, alone.low, alone.verdict, alone.basis) == (1.0, None, "not resolved", "one seed")


def test_a_failed_seed_is_left_out_of_the_pairs_and_told():
    base, row = a_row("base", [3.0, 3.5, 2.5]), a_row("row", [3.19, None, 2.71])
    found = row_difference(row, base)
    assert found.mean == pytest.approx(0.2) and found.basis == "2 seeds"
    assert row_status(row) == "2 of 3 finished; failed: TrainingError: the loss is nan"
    nothing = row_difference(a_row("none", [None, None, None]), base)
    assert (nothing.mean, nothing.verdict) == (None, "")


def test_one_seed_of_a_rounding_has_an_interval_over_text():
    base = a_row("base", [3.0])
    base = replace(base, blocks=[{"block_tokens": 10, "nats": [30.0] * 10}])
    nats = [30.0 + 1 + 0.1 * (-1) ** i for i in range(10)]
    row = a_row("rounded", [3.1], method="rtn4", source_key=base.keys[0])
    row = replace(row, blocks=[{"block_tokens": 10, "nats": nats}])
    found = row_difference(row, base)
    assert found.mean == pytest.approx(0.1) and 0.09 < found.low < 0.1 < found.high < 0.11
    assert (found.verdict, found.basis) == ("worse", "one seed, 10 blocks of text")
    other = replace(row, results=[row.results[0] | {"source_key": "another"}])
    assert row_difference(other, base).basis == "one seed"


def test_interval_of_a_mean_by_hand():
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert mean_interval([1.0]) == (None, None)


def test_steps_of_equal_loss_by_hand():
    curve = band([{10: 4.0, 20: 3.0, 30: 2.0}, {10: 5.0, 20: 4.0, 30: 3.0, 40: 1.0}])
    assert (curve.steps, curve.mean) == ([10, 20, 30], [4.5, 3.5, 2.5]) and curve.low[2] == 2 and curve.high[2] == 3
    assert step_of_loss(curve, 3.0) == 25 and step_of_loss(curve, 5.0) == 10 and step_of_loss(curve, 2.4) is None
    assert differences([{1: 3.0, 2: 2.0}], [{2: 1.5, 3: 0.0}]) == [{2: 0.5}]
    assert band([]).steps == []


# ---- tables ----


def sample_rows() -> list[dict]:
    study = a_study(
        a_row("base & co", [3.0, 3.5, 2.5]),
        a_row("worse_100% {x}", [3.19, 3.70, 2.71]),
        a_row("gone | lost", [None, None, None]),
    )
    return table_rows(study)


def test_markdown_and_latex_are_made_from_the_csv_alone():
    text = csv_text(sample_rows())
    rows = read_csv_rows(text)
    assert list(rows[0]) == list(CSV_COLUMNS) and csv_text(rows) == text
    report = render_study("md", "title", rows, ["a note"])
    assert render_study("md", "title", read_csv_rows(csv_text(rows)), ["a note"]) == report
    assert "| A base & co | 3 | 3.0000 ± 1.2421 |" in report and "reference" in report
    assert "| +0.2000 [+0.1752, +0.2248] |" in report and "gone \\| lost" in report
    assert "0 of 3 finished; failed: TrainingError: the loss is nan" in report
    assert float(rows[1]["delta"]) == pytest.approx(0.2) and float(rows[0]["val_nll"]) == 3.0
    latex = render_study("tex", "title", rows, ["a note"])
    assert r"A base \& co" in latex and r"worse\_100\% \{x\}" in latex and latex.count(r"\begin{tabular}") == 2
    for line in latex.splitlines():
        if line.endswith(r"\\"):
            assert line.replace(r"\&", "").count("&") in (latex_width(latex, 0), latex_width(latex, 1))


def latex_width(latex: str, number: int) -> int:
    head = latex.split(r"\begin{tabular}{")[number + 1]
    return len(head.split("}")[0]) - 1


def test_columns_without_anything_are_not_shown():
    rows = read_csv_rows(csv_text(sample_rows()))
    for row in rows:
        row["train_val_gap"] = ""
    assert "val - train" not in render_study("md", "title", rows, [])
    rows[0]["train_val_gap"] = "0.1"
    assert "val - train" in render_study("md", "title", rows, [])


def test_a_run_that_is_not_sound_gives_no_figure(tmp_path):
    """A feature that was on and never acted: its losses are those of another configuration."""
    good = {"status": "finished", "val_loss": 3.0, "seed": 1}
    assert sound_part(good) == good
    bad = {"status": "invalid", "error": "qat never acted", "val_loss": 2.0, "seed": 1, "zero_shares": {}}
    assert sound_part(bad) == {"status": "invalid", "error": "qat never acted", "seed": 1}


def test_a_difference_that_is_not_resolved_says_so():
    study = a_study(a_row("base", [3.0, 3.0, 3.0]), a_row("wide", [3.1, 3.2, 3.3]))
    (_, row) = read_csv_rows(csv_text(table_rows(study)))
    assert delta_cell(row) == "+0.2000 [-0.0484, +0.4484] not resolved"


def test_the_page_holds_its_pictures_and_no_link(tmp_path):
    rows = [a_row("base", [3.0, 3.5]), a_row("grid", [3.2, 3.8], bytes_model=2000), a_row("gone", [None, None])]
    shares = {"-1": 0.3, "0": 0.4, "1": 0.3}
    names = [f"blocks.{layer}.attn.c_q.weight" for layer in (0, 1)]
    codes = [{"step": s, "matrix": name, "shares": shares, "flips": 0.1} for s in (0, 2, 4) for name in names]
    rows[1] = replace(rows[1], curves=[RunCurve(val={2: 4.0, 4: 3.2, 6: 3.2}, codes=codes)] * 2)
    study = a_study(*rows)
    pictures = draw_study(study, tmp_path)
    names = [picture.path.name for picture in pictures]
    assert names == ["loss_A.png", "gap_A.png", "final_A.png", "pareto.png", "codes_0.png", "step_time.png"]
    table = read_csv_rows(csv_text(table_rows(study)))
    page = render_study("html", "a <title>", table, study_notes(study), pictures)
    assert page.count("data:image/png;base64,") == len(pictures) and "a &lt;title&gt;" in page
    assert "http" not in page and "<script" not in page and 'class="broken"' in page


def test_no_picture_without_data(tmp_path):
    (tmp_path / "pareto.png").write_bytes(b"of an earlier report")
    assert draw_study(a_study(a_row("base", [None])), tmp_path) == [] and not list(tmp_path.iterdir())


# ---- refusals ----


@pytest.mark.parametrize(("name", "value"), [("device", "another CPU"), ("torch", "3"), ("threads", 2)])
def test_two_devices_or_versions_are_not_one_table(name, value):
    results = [a_result(1.0), a_result(1.0)]
    check_one_device(results)
    results[1]["environment"] = results[1]["environment"] | {name: value}
    with pytest.raises(StudyError, match=f"{value}.*{name}.*a table is of one device"):
        check_one_device(results)


def test_different_tokens_are_not_one_table():
    check_same_tokens([a_result(1.0), a_result(2.0)])
    for change in ({"val_tokens": 99}, {"val_data_id": "w"}):
        with pytest.raises(StudyError, match="scored on different tokens"):
            check_same_tokens([a_result(1.0), a_result(1.0) | change])
