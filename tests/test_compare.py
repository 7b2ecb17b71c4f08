"""tools/compare.py and what is behind it, on runs made from the shape of result.json."""

import json
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lab.compare.comparable import ComparisonError, read_compared_run
from lab.compare.comparison import ComparisonSettings, compare_runs

TOKENS, BYTES = 100_000, 240_000
BPB = TOKENS / (math.log(2) * BYTES)
SCORES = {"a": [3.351, 3.350, 3.341], "b": [3.330, 3.332, 3.327], "same": [3.3502, 3.3497, 3.3431]}
WELCH_P, WELCH_INTERVAL, PAIRED_P = (
    0.01761857511155466,
    (0.006078071654221442, 0.02925526167911244),
    0.01291728170805788,
)
"""Of a against b, by scipy.stats.ttest_ind (equal_var=False) and ttest_rel."""
SAME_P = 0.9366678651443712
"""Of a against same, as above."""


def make_run(root: Path, arm: str, seed: int, loss: float, /, steps: int = 1000, **changes) -> Path:
    """A run folder of the arm; `changes` are keys of result.json to set, or to leave out where they are None."""
    folder = root / f"{arm}-{seed}"
    folder.mkdir(parents=True)
    result = {
        "run_id": folder.name, "seed": seed, "valid": True, "partial": False, "val_loss": loss, "val_bpb": loss * BPB,
        "val_tokens": TOKENS, "val_bytes": BYTES, "steps": steps, "train_seconds": 180.0, "train_tokens": 2048 * steps,
        "config_hash": f"configuration-{arm}", "code_sha256": "c0de", "artifact_sha256": f"{arm}{seed}",
        "data_id": "d", "val_data_id": "v", "tokenizer_sha256": "t", "eval_seq_len": 160, "eval_stride": 32,
        "fingerprint": {"machine_id": "m1"},
    }  # fmt: skip
    result = {key: value for key, value in (result | changes).items() if value is not None}
    (folder / "result.json").write_text(json.dumps(result))
    rows = [{"step": step, "train_loss": loss + 100 / (step + 10)} for step in range(1, steps + 1)]
    rows.append({"step": steps, "val_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_arm(root: Path, arm: str, **changes) -> list[Path]:
    return [make_run(root, arm, seed, loss, **changes) for seed, loss in zip((42, 43, 44), SCORES[arm], strict=True)]


def compare(a: list[Path], b: list[Path], **settings):
    return compare_runs(a, b, ComparisonSettings(**settings))


def test_figures_are_those_of_the_table_in_both_units(tmp_path):
    comparison = compare(make_arm(tmp_path, "a"), make_arm(tmp_path, "b"))
    loss, bpb = comparison.measures
    for measure, scale in ((loss, 1), (bpb, BPB)):
        assert measure.difference == pytest.approx(scale * 0.0176667, rel=1e-4)
        assert measure.welch.test.p_two_sided == pytest.approx(WELCH_P, abs=1e-10)
        assert measure.paired.test.p_two_sided == pytest.approx(PAIRED_P, abs=1e-10)
        assert measure.welch.interval == pytest.approx([scale * end for end in WELCH_INTERVAL], abs=1e-10)
        assert measure.margin == pytest.approx(0.005 * scale)
    assert bpb.welch.equivalence.p == pytest.approx(loss.welch.equivalence.p, abs=1e-10)
    assert bpb.welch.minimum_detectable_difference == pytest.approx(
        BPB * loss.welch.minimum_detectable_difference, rel=1e-6
    )
    assert comparison.verdict == "B is lower" and comparison.warnings == [] and comparison.equal_steps == ""
    assert comparison.not_paired == ""


def test_the_lower_arm_is_named_whichever_it_is(tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "b")
    assert compare(b, a).verdict == "A is lower" and compare(b, a).measures[0].welch.test.p_a_lower < 0.025


def test_noise_is_not_resolved_and_a_wide_margin_is_equivalent(tmp_path):
    comparison = compare(make_arm(tmp_path, "a"), make_arm(tmp_path, "same"), margin_nats=0.05)
    assert comparison.verdict == "not resolved" and comparison.measures[0].welch.equivalence.p < 0.05


def test_more_variants_need_a_smaller_p(tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "b")
    once, often = compare(a, b), compare(a, b, variants_tried=10)
    assert (once.corrected_alpha, often.corrected_alpha) == (0.05, 0.005)
    p = once.measures[0].welch.test.p_two_sided
    assert 0.005 < p < 0.05 and (once.verdict, often.verdict) == ("B is lower", "not resolved")
    narrow, wide = (c.measures[0].welch.interval for c in (once, often))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_pairs_follow_the_seeds_and_not_the_order(tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "b")
    in_order, shuffled = compare(a, b), compare(a, [b[2], b[0], b[1]])
    assert shuffled.measures[0].paired.test.t == pytest.approx(in_order.measures[0].paired.test.t, rel=1e-9)


@pytest.mark.parametrize(
    ("seed", "changes", "reason"),
    [
        (45, {}, "the seeds are 42, 43 in A and 42, 45 in B"),
        (43, {"fingerprint": {"machine_id": "m2"}}, "seed 43 ran on different machines"),
        (43, {"fingerprint": None}, "the machine of seed 43 is not known in both arms"),
        (42, {"artifact_sha256": "repeated"}, "arm B has a seed more than once"),
    ],
)
def test_why_runs_are_not_paired(tmp_path, seed, changes, reason):
    a = [make_run(tmp_path, "a", seed, 3.35 + seed / 1000) for seed in (42, 43)]
    b = [make_run(tmp_path, "b", 42, 3.33), make_run(tmp_path / "second", "b", seed, 3.331, **changes)]
    comparison = compare(a, b)
    assert comparison.not_paired == reason and comparison.measures[0].paired is None
    assert comparison.measures[0].welch is not None


def test_one_run_an_arm_has_a_difference_and_no_p_value(tmp_path):
    comparison = compare([make_run(tmp_path, "a", 42, 3.35)], make_arm(tmp_path, "b"))
    assert comparison.verdict == "not resolved: needs 2 runs an arm"
    for measure in comparison.measures:
        assert measure.welch is measure.paired is None and measure.difference > 0
    one = compare([tmp_path / "a-42"], [tmp_path / "b-42"])
    assert one.not_paired == "needs 2 runs an arm" and one.measures[0].paired is None


def test_runs_without_spread_are_said_to_have_none(tmp_path):
    a, b = ([make_run(tmp_path, arm, seed, 3.3) for seed in (1, 2)] for arm in "ab")
    assert compare(a, b).verdict == "not resolved: neither difference nor spread"
    c = [make_run(tmp_path, "c", seed, 3.4) for seed in (1, 2)]
    comparison = compare(a, c)
    assert comparison.verdict == "not resolved: no spread, so no test is defined"
    assert comparison.measures[0].welch.test.p_two_sided is None


def test_equal_steps_are_shown_where_step_counts_differ(tmp_path):
    a, b = make_arm(tmp_path, "a", steps=1000), make_arm(tmp_path, "b", steps=800)
    comparison = compare(a, b)
    assert [measure.name for measure in comparison.measures] == ["val_loss", "val_bpb", "train_loss"]
    window = [100 / (step + 10) for step in range(721, 801)]
    for arm, name in (("A", "a"), ("B", "b")):
        expected = sum(SCORES[name]) / 3 + sum(window) / len(window)
        assert comparison.measures[2].arms[arm].mean == pytest.approx(expected, rel=1e-12)
    assert "80 steps from 721 to 800" in comparison.equal_steps and "no final score" in comparison.equal_steps
    assert comparison.equal_time


def test_one_per_cent_of_steps_is_no_difference(tmp_path):
    a, b = make_arm(tmp_path, "a", steps=1010), make_arm(tmp_path, "b", steps=1000)
    assert len(compare(a, b).measures) == 2
    longer = make_arm(tmp_path / "longer", "same", steps=1012)
    assert len(compare(longer, b).measures) == 3


def test_a_step_that_was_trained_again_counts_once(tmp_path):
    a, b = [make_run(tmp_path, "a", 42, 3.35, steps=100)], [make_run(tmp_path, "b", 42, 3.33, steps=10)]
    with (a[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "train_loss": 7.5}) + "\n")
    assert compare(a, b).measures[2].arms["A"].mean == 7.5


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "metrics.jsonl is missing"), ('{"step": 1, "train_loss": 3.0}\n', "no step of 91 to 100 is in all runs")],
)
def test_why_there_are_no_equal_steps(tmp_path, text, reason):
    a, b = [make_run(tmp_path, "a", 42, 3.35, steps=200)], [make_run(tmp_path, "b", 42, 3.33, steps=100)]
    (b[0] / "metrics.jsonl").unlink()
    if text:
        (b[0] / "metrics.jsonl").write_text(text)
    comparison = compare(a, b)
    assert reason in comparison.equal_steps and len(comparison.measures) == 2


@pytest.mark.parametrize(
    "text", ["{", '{"train_loss": 3.0}\n', "3\n", '{"step": 95, "train_loss": NaN}\n', b"\xff\xfe\n"]
)
def test_damaged_metrics_are_refused(tmp_path, text):
    a, b = [make_run(tmp_path, "a", 42, 3.35, steps=200)], [make_run(tmp_path, "b", 42, 3.33, steps=100)]
    (b[0] / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ComparisonError, match=r"b-42/metrics\.jsonl"):
        compare(a, b)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"fingerprint": {"machine_id": "m2"}}, "the arms ran on different machines"),
        ({"fingerprint": None}, "3 of 6 runs don't say on which machine they ran"),
        ({"train_seconds": 150.0}, "180.0 seconds of training in A, 150.0 in B"),
        ({"train_tokens": 1_024_000}, "2,048.0 tokens in a step in A, 1,024.0 in B"),
        ({"config_hash": "configuration-a"}, "both arms have the configuration configuration-a"),
    ],
)
def test_what_is_warned_of(tmp_path, changes, warning):
    comparison = compare(make_arm(tmp_path, "a"), make_arm(tmp_path, "b", **changes))
    assert len(comparison.warnings) == 1 and warning in comparison.warnings[0]


def test_two_scripts_in_an_arm_are_warned_of(tmp_path):
    b = [*make_arm(tmp_path, "b"), make_run(tmp_path, "b", 45, 3.33, code_sha256="other")]
    assert compare(make_arm(tmp_path, "a"), b).warnings == ["the runs of arm B ran 2 different scripts (code_sha256)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_id": "other"}, "data_id other"),
        ({"val_data_id": "other"}, "val_data_id other"),
        ({"tokenizer_sha256": "other"}, "tokenizer_sha256 other"),
        ({"eval_seq_len": 320}, "eval_seq_len 320"),
        ({"eval_stride": 64}, "eval_stride 64"),
        ({"val_tokens": TOKENS // 2, "val_bytes": BYTES // 2}, "val_tokens 50000"),
        ({"partial": True}, "is a partial score"),
        ({"valid": False}, "is INVALID"),
        ({"config_hash": "other"}, "arm B mixes configurations"),
        ({"artifact_sha256": "b42"}, "it is the same run"),
        ({"artifact_sha256": "a45", "seed": 99}, "it is the same run"),
        ({"val_bpb": 1.2}, "val_bpb is 1.20000000"),
        ({"val_loss": math.nan}, "val_loss is nan"),
        ({"val_loss": "3.3"}, "val_loss is '3.3'"),
        ({"seed": True}, "seed is True"),
        ({"val_data_id": None}, "lacks val_data_id"),
        ({"val_bytes": 0}, "nothing was scored"),
    ],
)
def test_what_can_not_be_compared_is_refused(tmp_path, changes, message):
    """The planted run is the last of arm B; without it the same arms are compared."""
    a, b = [*make_arm(tmp_path, "a"), make_run(tmp_path, "a", 45, 3.345)], make_arm(tmp_path, "b")
    compare(a, b)
    planted = make_run(tmp_path, "b", 45, 3.33, **changes)
    with pytest.raises(ComparisonError, match=message) as caught:
        compare(a, [*b, planted])
    assert "\n" not in str(caught.value) and str(planted / "result.json") in str(caught.value)


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "b")
    for twice in ([*b, b[1]], [*b, b[1] / "result.json"], [*b, a[0]], [*b, tmp_path / "b-42" / ".." / "b-42"]):
        with pytest.raises(ComparisonError, match="is given twice"):
            compare(a, twice)


@pytest.mark.parametrize("text", ["{", "[]", "3", '"text"'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ComparisonError, match=r"result\.json"):
        read_compared_run(tmp_path / "result.json")


def test_invalid_runs_are_compared_on_demand_and_named(tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "b", valid=False)
    assert compare(a, b, include_invalid=True).warnings == ["arm B has INVALID runs: b-42, b-43, b-44"]


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"alpha": 1.0}, {"variants_tried": 0}, {"margin_nats": 0.0}, {"power": 0.01}]
)
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(ComparisonError, match=next(iter(settings))):
        ComparisonSettings(**settings).check()
    with pytest.raises(ComparisonError, match=next(iter(settings))):
        compare([], [], **settings)


@pytest.fixture
def run_tool(run_command_here) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run_command_here, "tools/compare.py")


def test_the_tool_prints_tables(run_tool, tmp_path):
    make_arm(tmp_path / "record" / "runs", "a", steps=1000)
    b = make_arm(tmp_path, "b", steps=800, valid=False, fingerprint={"machine_id": "m2"})
    finished = run_tool(tmp_path / "record", "--vs", *b, "--include-invalid", "--variants-tried", 2)
    assert finished.returncode == 0, finished.stderr
    text = " ".join(finished.stdout.split())
    for part in (
        "NOT ON THE SAME MACHINES",
        "b-42 INVALID",
        "equal time",
        "equal steps",
        "A - B +0.01767",
        "2 variants were tried: alpha 0.05 / 2 = 0.025 (Bonferroni)",
        "not paired by seed: seed 42 ran on different machines",
        "it is no final score",
        "B is lower (Welch on val_loss, alpha 0.025), by 0.01767 nats per token",
    ):
        assert part in text
    assert max(map(len, finished.stdout.splitlines())) <= 80


def test_the_tool_prints_json(run_tool, tmp_path):
    a, b = make_arm(tmp_path, "a"), make_arm(tmp_path, "same")
    finished = run_tool(*a, "--vs", *b, "--json")
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["measures"][0]["welch"]["test"]["p_two_sided"] == pytest.approx(SAME_P, abs=1e-10)
    assert figures["verdict"] == "not resolved" and figures["arms"]["A"][0]["path"] == str(a[0] / "result.json")


def test_the_tool_refuses_in_one_line(run_tool, tmp_path):
    a = make_arm(tmp_path, "a")
    missing = run_tool(*a, "--vs", tmp_path / "nothing")
    message = f"there is no {tmp_path / 'nothing'}: name a scored run, or a folder of them"
    assert (missing.returncode, missing.stderr) == (2, f"compare: {message}\n")
    debug = run_tool(*a, "--debug")
    assert debug.returncode != 0 and "Traceback" in debug.stderr and "arm B has no run" in debug.stderr
