"""tools/make_submission.py: what it builds from finished runs, and everything that it refuses."""

import json
import os
import re
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from evidence_fixtures import (
    SOURCE,
    build,
    digest,
    edit_result,
    log_lines,
    packed_source,
    run_result,
    three_seeds,
    write_json,
    write_run,
)

from golf.run.log_lines import result_line
from lab.bundle.packer import unpack_source
from lab.record.finding import EvidenceError
from lab.record.folder_check import check_record
from lab.record.record_folder import read_record
from lab.record.run_check import RESULT_FIGURES, RESULT_PAIR, result_line_differences

REPOSITORY = Path(__file__).resolve().parents[1]
READABLE = "train_gpt_readable.py"
NEWEST = 1_790_000_000  # 2026-09-21 UTC
OTHER_SOURCE = SOURCE.replace("math.pi", "math.tau")


def edit_text(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is built ----


def test_a_record_holds_the_evidence_and_nothing_else(tmp_path):
    outcome = build(tmp_path, *three_seeds(tmp_path))
    assert outcome.reasons == ()
    assert outcome.folder == tmp_path / "records" / "track_local" / "2026-04-01_A_record"
    runs = [f"runs/seed{seed}/{name}.json" for seed in (42, 43, 44) for name in ("config", "result")]
    logs = [f"train_seed{seed}.log" for seed in (42, 43, 44)]
    files = ["README.md", "submission.json", "HASHES.json", "requirements.txt", "train_gpt.py", "train_gpt_readable.py"]
    assert set(tree(outcome.folder)) == {*files, *runs, *logs}
    assert os.listdir(outcome.folder.parent) == [outcome.folder.name]  # nothing temporary is left
    assert (outcome.folder / "train_gpt_readable.py").read_text() == SOURCE
    assert (outcome.folder / "train_gpt.py").read_bytes() == packed_source()


def test_the_check_finds_nothing_in_what_was_built(tmp_path):
    outcome = build(tmp_path, *three_seeds(tmp_path))
    assert check_record(read_record(outcome.folder)) == []


def test_a_script_that_names_its_readable_form_does_not_count_it(tmp_path):
    """A run writes that file, so its own code has the name in it."""
    run = write_run(tmp_path / "r", source=SOURCE + f"print({READABLE!r})\n")
    assert build(tmp_path, run).reasons == ()


def test_times_of_many_digits_survive_their_rounding(tmp_path):
    run = write_run(tmp_path / "r", train_seconds=9.778896879011882, eval_seconds=12.090432900000451)
    assert build(tmp_path, run).reasons == ()


def test_the_last_line_is_read_as_the_run_writes_it():
    result = run_result("r", 42, "0" * 16, b"code", b"artifact")
    line = result_line(result)
    assert line == log_lines(result)[-1] and result_line_differences(line, result) == []
    assert [key for key, _ in RESULT_PAIR.findall(line)] == list(RESULT_FIGURES)
    for key, figure in RESULT_PAIR.findall(line):
        digits = {"val_loss": f"{result['val_loss']:.7f}"}.get(key, figure + "1")
        (difference,) = result_line_differences(line.replace(f"{key}:{figure}", f"{key}:{digits}"), result)
        assert difference == f"{key} {digits} in the log, {figure} in result.json"
    (difference,) = result_line_differences(line, result | {"valid": False})
    assert "status" in difference


def test_submission_json_is_measured(tmp_path):
    runs = three_seeds(tmp_path)
    claims = json.loads((build(tmp_path, *runs).folder / "submission.json").read_text())
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    scores = [result["val_bpb"] for result in results]
    assert claims["val_bpb"] == pytest.approx(statistics.fmean(scores), abs=5e-9)
    assert claims["val_bpb_std"] == pytest.approx(statistics.stdev(scores), abs=5e-9)
    assert claims["seeds"] == [42, 43, 44] and set(claims["seed_results"]) == {"42", "43", "44"}
    assert claims["bytes_total"] == max(result["bytes_total"] for result in results)
    assert claims["step_stop"] == max(result["steps"] for result in results)
    assert (claims["author"], claims["github_id"]) == ("Somebody", "some-body")
    assert claims["track"] == "local" and claims["date"] == "2026-04-01"
    for key in ("config_hash", "code_sha256", "data_id", "val_data_id", "tokenizer_sha256"):
        assert claims[key] == results[0][key]


def test_the_order_of_the_runs_does_not_matter(tmp_path):
    runs = three_seeds(tmp_path)
    first = tree(build(tmp_path / "one", *runs).folder)
    assert first == tree(build(tmp_path / "two", *reversed(runs)).folder)


def test_hashes_are_those_of_the_files(tmp_path):
    folder = build(tmp_path, *three_seeds(tmp_path)).folder
    hashes = json.loads((folder / "HASHES.json").read_text())
    expected = {name: digest(data) for name, data in tree(folder).items() if name != "HASHES.json"}
    assert hashes["files"] == expected
    assert hashes["artifact_sha256"]["43"] == digest(b"artifact of seed 43")


def test_a_run_of_a_packed_file_shows_what_is_packed(tmp_path):
    outcome = build(tmp_path, write_run(tmp_path / "r", readable=False))
    assert (outcome.folder / "train_gpt_readable.py").read_text() == unpack_source(packed_source())
    assert [finding.code for finding in check_record(read_record(outcome.folder))] == ["S43-few-seeds"]


def test_the_date_is_that_of_the_newest_result(tmp_path):
    runs = three_seeds(tmp_path)
    for age, run in enumerate(runs):
        os.utime(run / "result.json", (0, NEWEST - 100_000 * age))
    assert build(tmp_path, *runs, date="").folder.name == "2026-09-21_A_record"


def test_exactly_the_limit_passes(tmp_path):
    run = write_run(tmp_path / "r")
    edit_result(run, limit_bytes=json.loads((run / "result.json").read_text())["bytes_total"])
    assert build(tmp_path, run).reasons == ()


# ---- what is refused ----


def one_byte_over(run: Path) -> None:
    edit_result(run, limit_bytes=json.loads((run / "result.json").read_text())["bytes_total"] - 1)


def other_code(run: Path) -> None:
    code = packed_source(OTHER_SOURCE)
    (run / "train_gpt.py").write_bytes(code)
    (run / "train_gpt_readable.py").write_text(OTHER_SOURCE)
    size = len(code) + json.loads((run / "result.json").read_text())["bytes_model"]
    edit_result(run, code_sha256=digest(code), bytes_code=len(code), bytes_total=size)


def other_log_code(run: Path) -> None:
    lines = (run / "train.log").read_text().split("\n")
    lines[1] = re.sub(r"code_sha256:\w+", "code_sha256:" + "0" * 64, lines[1])
    (run / "train.log").write_text("\n".join(lines))


def cut_log(run: Path) -> None:
    lines = (run / "train.log").read_text().splitlines()
    (run / "train.log").write_text("\n".join(lines[:-1]) + "\n")


def second_run_of_a_seed(run: Path) -> None:
    edit_result(run, seed=42)


def twin_artifact(run: Path) -> None:
    artifact = b"artifact of seed 42"
    (run / "model.golf").write_bytes(artifact)
    edit_result(run, artifact_sha256=digest(artifact))


def changed_file(run: Path) -> None:
    write_json(run / "stages.json", {"train": {"metrics.jsonl": "0" * 64, "checkpoints/gone": "1" * 64}})
    (run / "metrics.jsonl").write_text("")


def failed_probe(run: Path) -> None:
    edit_result(run, probes={"C1 future": {"verdict": "FAIL", "detail": "position 7 moved"}})


REFUSED = {
    "another configuration": (lambda run: edit_result(run, config_hash="f" * 16), "R10-config-differs"),
    "other code": (other_code, "R11-code-differs"),
    "other training data": (lambda run: edit_result(run, data_id="0" * 16), "R12-data-differs"),
    "other validation data": (lambda run: edit_result(run, val_data_id="0" * 16), "R12-data-differs"),
    "another tokenizer": (lambda run: edit_result(run, tokenizer_sha256="cd" * 32), "R13-tokenizer-differs"),
    "the same seed": (second_run_of_a_seed, "R14-seed-twice"),
    "the same artifact": (twin_artifact, "R15-artifact-twice"),
    "invalid": (lambda run: edit_result(run, valid=False, findings=["swa never acted"]), "R01-invalid"),
    "findings only": (lambda run: edit_result(run, findings=["swa never acted"]), "R01-invalid"),
    "partial": (lambda run: edit_result(run, partial=True), "R02-partial"),
    "one byte over": (one_byte_over, "R03-over-size"),
    "trained too long": (lambda run: edit_result(run, train_seconds=180.01), "R04-over-time"),
    "scored too long": (lambda run: edit_result(run, eval_seconds=600.5), "R04-over-time"),
    "no log": (lambda run: (run / "train.log").unlink(), "R05-log-result"),
    "log cut off": (cut_log, "R05-log-result"),
    "log with another score": (lambda run: edit_result(run, log=False, val_bpb=1.4400), "R05-log-result"),
    "log with other steps": (lambda run: edit_result(run, log=False, steps=99), "R05-log-result"),
    "log of other code": (other_log_code, "R06-code-in-log"),
    "script edited": (lambda run: (run / "train_gpt.py").open("a").write("# "), "R07-file-hash"),
    "artifact edited": (lambda run: (run / "model.golf").write_bytes(b"another of this sz"), "R07-file-hash"),
    "artifact missing": (lambda run: (run / "model.golf").unlink(), "R07-file-hash"),
    "configuration edited": (lambda run: edit_text(run / "config.json", "layers\": 2", "layers\": 4"), "R07-file-hash"),
    "file of a stage edited": (changed_file, "R07-file-hash"),
    "probe failed": (failed_probe, "R08-probe"),
    "sum of bytes": (lambda run: edit_result(run, bytes_total=400), "R09-bytes-sum"),
    "readable script edited": (lambda run: edit_text(run / READABLE, "pi", "tau"), "R16-readable-differs"),
    "readable not text": (lambda run: (run / READABLE).write_bytes(b"\xff\0"), "R16-readable-differs"),
    "readable comment edited": (lambda run: edit_text(run / READABLE, "a comment", "b"), "R16-readable-differs"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "code"), REFUSED.values(), ids=REFUSED)
def test_refuses(tmp_path, spoil, code):
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in (42, 43)]
    spoil(runs[1])
    outcome = build(tmp_path, *runs)
    assert code in {reason.code for reason in outcome.reasons}, outcome.reasons
    assert not (tmp_path / "records").exists()
    assert all(reason.severity == "error" and "\n" not in reason.text for reason in outcome.reasons)


def test_a_run_without_caps_may_take_any_time(tmp_path):
    run = write_run(tmp_path / "r", train_seconds=9_999.0, max_wallclock_seconds=0.0, max_eval_seconds=0.0)
    assert build(tmp_path, run).reasons == ()


def test_the_ten_minute_track_has_limits_of_its_own(tmp_path):
    free = {"max_wallclock_seconds": 0.0, "train_seconds": 600.1}
    run = write_run(tmp_path / "r", **free)
    codes = [reason.code for reason in build(tmp_path, run, track="track_10min_16mb").reasons]
    assert codes == ["R17-track"]


def test_all_reasons_are_given_at_once(tmp_path):
    run = write_run(tmp_path / "r")
    edit_result(run, partial=True, valid=False, findings=["x"], train_seconds=200.0)
    assert [reason.code[:3] for reason in build(tmp_path, run).reasons] == ["R01", "R02", "R04"]


def test_the_same_run_twice_is_not_two_seeds(tmp_path):
    run = write_run(tmp_path / "r")
    assert {"R14-seed-twice", "R15-artifact-twice"} == {reason.code for reason in build(tmp_path, run, run).reasons}


def test_an_existing_record_is_never_touched(tmp_path):
    run = write_run(tmp_path / "r")
    before = tree(build(tmp_path, run).folder)
    with pytest.raises(EvidenceError, match="exists: records are frozen"):
        build(tmp_path, run, blurb="Another text.")
    assert tree(tmp_path / "records" / "track_local" / "2026-04-01_A_record") == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": "../up"}, "can't name a folder"),
    ({"name": ".hidden"}, "can't name a folder"),
    ({"date": "yesterday"}, "not of the form YYYY-MM-DD"),
])  # fmt: skip
def test_names_that_are_no_folder(tmp_path, changes, message):
    with pytest.raises(EvidenceError, match=message):
        build(tmp_path, write_run(tmp_path / "r"), **changes)


def test_an_interrupted_build_leaves_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.record.evidence.check_record", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path, write_run(tmp_path / "r"))
    assert os.listdir(tmp_path / "records" / "track_local") == []


# ---- the command ----


@pytest.fixture
def run_tool(run_command_here) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run_command_here, "tools/make_submission.py")


TEXTS = ("--name", "A record", "--author", "Somebody", "--github-id", "some-body", "--blurb", "What it is.")


def test_the_command_builds_and_says_so_in_json(run_tool, tmp_path):
    runs = three_seeds(tmp_path)
    finished = run_tool(*runs, *TEXTS, "--records", "records", "--date", "2026-04-01", "--json", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["built"] and report["submission"]["seeds"] == [42, 43, 44]
    assert json.loads((tmp_path / report["folder"] / "submission.json").read_text()) == report["submission"]


def test_the_command_numbers_its_reasons(run_tool, tmp_path):
    run = write_run(tmp_path / "r")
    edit_result(run, partial=True, train_seconds=200.0)
    finished = run_tool(run, *TEXTS, "--records", tmp_path / "records", cwd=tmp_path)
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("refused: ")
    assert lines[1].startswith("  1. R02-partial: ") and lines[2].startswith("  2. R04-over-time: ")


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda run: (run / "result.json").unlink(), "the run is not finished"),
    (lambda run: (run / "result.json").write_text("{"), "can't be read as JSON"),
    (lambda run: edit_result(run, log=False, val_bpb=None), "val_bpb must be a finite number, not None"),
    (lambda run: write_json(run / "result.json", {"run_id": "r"}), "an older version of the program made it"),
    (lambda run: (run / "config.json").unlink(), "config.json is missing"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(run_tool, tmp_path, spoil, message):
    run = write_run(tmp_path / "r")
    spoil(run)
    finished = run_tool(run, *TEXTS, "--records", tmp_path / "records", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("make_submission: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr and str(run) in finished.stderr


def test_no_run_is_bad_input(run_tool, tmp_path):
    finished = run_tool(*TEXTS, cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "make_submission: name the folder of at least one finished run\n"


def test_a_traceback_only_when_asked_for(run_tool, tmp_path):
    quiet, loud = (run_tool("nowhere", *TEXTS, *flags, cwd=tmp_path) for flags in ((), ("--debug",)))
    assert "Traceback" not in quiet.stderr and "nowhere is not a folder" in quiet.stderr
    assert "Traceback" in loud.stderr
