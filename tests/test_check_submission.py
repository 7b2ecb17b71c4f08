"""tools/check_submission.py on records: sound ones of two shapes, and each way in which evidence fails."""

import json
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from evidence_fixtures import (
    PUBLISHED_SCORES,
    PUBLISHED_SCRIPT,
    SP1024,
    claim,
    codes,
    digest,
    edit_log,
    errors,
    published_log,
    ship,
    texts,
    write_json,
    write_published,
    write_run,
)

from lab.bundle.packer import pack_source
from lab.record.evidence import SubmissionOrder, make_record
from lab.record.finding import EvidenceError
from lab.record.record_folder import read_record

REPOSITORY = Path(__file__).resolve().parents[1]
MEAN = sum(PUBLISHED_SCORES.values()) / len(PUBLISHED_SCORES)
SIZE = len(PUBLISHED_SCRIPT.encode())


def unclaim(folder: Path, *keys: str) -> None:
    claims = json.loads((folder / "submission.json").read_text())
    write_json(folder / "submission.json", {key: value for key, value in claims.items() if key not in keys})


@pytest.fixture
def published(tmp_path) -> Path:
    return write_published(tmp_path / "record")


@pytest.fixture(scope="session")
def own_record(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("own")
    runs = tuple(write_run(root / "runs" / f"seed{seed}", seed) for seed in (42, 43, 44))
    order = SubmissionOrder(
        runs, "A record", "Somebody", "some-body", "What it is.", "track_local", root / "records",
        REPOSITORY / "requirements.txt", "2026-04-01",
    )  # fmt: skip
    outcome = make_record(order)
    assert not outcome.reasons
    return outcome.folder


@pytest.fixture
def own(own_record, tmp_path) -> Path:
    """A copy of our record, to spoil."""
    target = tmp_path / "track_local" / "record"
    for path in own_record.rglob("*"):
        if path.is_file():
            (target / path.relative_to(own_record)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(own_record)).write_bytes(path.read_bytes())
    return target


def rehash(folder: Path) -> None:
    """What a careful forger would do."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    hashes = {name: digest(path.read_bytes()) for name, path in files.items() if name != "HASHES.json"}
    write_json(folder / "HASHES.json", json.loads((folder / "HASHES.json").read_text()) | {"files": hashes})


# ---- sound records ----


def test_a_sound_published_record_has_no_findings(published):
    assert codes(published) == {}


def test_our_record_has_no_findings(own):
    assert codes(own) == {}


def test_the_headline_may_be_one_seed_with_a_warning(published):
    score = PUBLISHED_SCORES[42]
    claim(published, val_bpb=score, val_loss=score * math.log(2) * SP1024)
    assert codes(published) == {"S15-one-of-many": "warning"}


# ---- planted faults in a record of the published shape ----


def stale_log(folder: Path) -> None:
    """The logs are of an older, worse model than the one that is claimed."""
    for seed, score in PUBLISHED_SCORES.items():
        (folder / f"train_seed{seed}.log").write_text(published_log(seed, score + 0.0164))


def other_config(folder: Path) -> None:
    edit_log(folder, "train_batch_tokens:524288", "train_batch_tokens:786432", seed=7)


def truncated(folder: Path) -> None:
    lines = (folder / "train_seed7.log").read_text().splitlines()
    (folder / "train_seed7.log").write_text("\n".join(line for line in lines if not line.startswith("final_")))


def only_traceback(folder: Path) -> None:
    truncated(folder)
    with (folder / "train_seed7.log").open("a") as file:
        file.write('\nTraceback (most recent call last):\n  File "train_gpt.py"\nRuntimeError: x\n')


def duplicated(folder: Path) -> None:
    (folder / "train_seed8.log").write_bytes((folder / "train_seed7.log").read_bytes())


def renamed_twin(folder: Path) -> None:
    """The log of one run under another seed, with another score."""
    text = (folder / "train_seed7.log").read_text()
    (folder / "train_seed8.log").write_text(text.replace("seed:7\n", "seed:8\n").replace("1.21598", "1.21599"))


def double_space(folder: Path) -> None:
    for seed, score in PUBLISHED_SCORES.items():
        loss = score * math.log(2) * 4.386
        edit_log(folder, f"val_loss:{score * math.log(2) * SP1024:.8f}", f"val_loss:{loss:.8f}", seed)
    claim(folder, val_loss=round(MEAN * math.log(2) * 4.386, 4))


def other_source(folder: Path) -> None:
    (folder / "train_gpt.py").write_text(PUBLISHED_SCRIPT.replace("model", "mo.el").replace("mo.el", "modem"))


PUBLISHED_FAULTS = {
    "no README": (lambda f: (f / "README.md").unlink(), "S01-missing-file"),
    "empty README": (lambda f: (f / "README.md").write_text(""), "S01-missing-file"),
    "no script": (lambda f: (f / "train_gpt.py").unlink(), "S01-missing-file"),
    "no logs": (lambda f: [path.unlink() for path in f.glob("*.log")], "S01-missing-file"),
    "broken JSON": (lambda f: (f / "submission.json").write_text("{'val_bpb': 1}"), "S02-json-invalid"),
    "JSON list": (lambda f: (f / "submission.json").write_text("[]"), "S02-json-invalid"),
    "JSON without author": (lambda f: unclaim(f, "github_id"), "S03-json-key"),
    "JSON null": (lambda f: claim(f, val_bpb=None), "S04-json-type"),
    "JSON PENDING": (lambda f: claim(f, val_bpb="PENDING"), "S04-json-type"),
    "JSON NaN": (lambda f: claim(f, val_bpb=math.nan), "S04-json-type"),
    "JSON true": (lambda f: claim(f, val_bpb=True), "S04-json-type"),
    "truncated log": (truncated, "S10-truncated"),
    "only a traceback": (only_traceback, "S11-trouble"),
    "edited number": (lambda f: claim(f, val_bpb=1.2154), "S12-headline"),
    "stale log": (stale_log, "S13-too-good"),
    "mean of some": (lambda f: claim(f, val_bpb=(1.21598 + 1.21632999) / 2), "S12-headline"),
    "score before quantization": (lambda f: claim(f, val_bpb=1.2081), "S12-headline"),
    "edited seed": (lambda f: claim(f, seed_results={"42": {"val_bpb": 1.2}}), "S16-seed-result"),
    "seed without a log": (lambda f: claim(f, seed_results={"43": {"val_bpb": 1.2163}}), "S16-seed-result"),
    "edited loss": (lambda f: claim(f, val_loss=2.0001), "S17-val-loss"),
    "edited deviation": (lambda f: claim(f, val_bpb_std=0.0001), "S18-spread"),
    "claimed size over": (lambda f: claim(f, bytes_total=16_000_001), "S20-over-limit"),
    "claimed size in no log": (lambda f: claim(f, bytes_total=15_000_000), "S21-bytes-total"),
    "claimed code size": (lambda f: claim(f, bytes_code=SIZE + 1), "S23-code-size"),
    "other code size in a log": (lambda f: edit_log(f, "Code size: ", "Code size: 1"), "S23-code-size"),
    "other source in the logs": (other_source, "S64-other-code"),
    "trained too long": (lambda f: edit_log(f, "train_time:599950ms", "train_time:600501ms"), "S30-train-time"),
    "evaluated too long": (lambda f: edit_log(f, "eval_time:67952ms", "eval_time:600001ms"), "S31-eval-time"),
    "duplicated log": (duplicated, "S41-log-twice"),
    "one run under two seeds": (renamed_twin, "S41-log-twice"),
    "two logs of a seed": (lambda f: edit_log(f, "seed:7\n", "seed:42\n", 7), "S40-seed-twice"),
    "seed of another configuration": (other_config, "S42-config-differs"),
    "other seeds claimed": (lambda f: claim(f, seeds=[42, 1337, 8]), "S44-seed-list"),
    "wrong bytes per token": (lambda f: claim(f, val_loss=round(MEAN * math.log(2) * 2.5, 4)), "S50-bytes-per-token"),
    "space counted twice": (double_space, "S51-double-space"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "code"), PUBLISHED_FAULTS.values(), ids=PUBLISHED_FAULTS)
def test_a_planted_fault_is_an_error(published, spoil, code):
    spoil(published)
    assert code in errors(published), texts(published)


DOUBTS = {
    "two logs": (lambda f: ((f / "train_seed7.log").unlink(), claim(f, seeds=[], seed_results={})), "S43-few-seeds"),
    "object files": (lambda f: (f / "a.o").write_bytes(b"x"), "S07-stray-file"),
    "no size in a log": (lambda f: edit_log(f, " bytes", ""), "S24-no-size"),
    "unread knob": (lambda f: ship(f, PUBLISHED_SCRIPT.replace("if args.holdout_every", "if args")), "S60-ghost-knob"),
    "swa announced": (lambda f: edit_log(f, "model_params", "swa_enabled: True\nmodel_params"), "S61-never-acted"),
    "opaque": (lambda f: ship(f, "import zlib\nexec(zlib.decompress(open('/tmp/x', 'rb').read()))\n"), "S63-opaque"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "code"), DOUBTS.values(), ids=DOUBTS)
def test_a_doubt_is_a_warning(published, spoil, code):
    spoil(published)
    assert codes(published).get(code) == "warning", texts(published)


def test_trouble_before_a_final_score_is_a_warning(published):
    edit_log(published, "model_params", "rank 3: CUDA out of memory, trying again\nmodel_params")
    assert codes(published) == {"S11-trouble": "warning"}


def test_unlimited_tracks_are_told_and_not_refused(published):
    claim(published, track="non-record-unlimited-compute-16mb")
    edit_log(published, "train_time:599950ms", "train_time:3600000ms")
    assert codes(published) == {"S30-train-time": "note"}


@pytest.mark.parametrize(("total", "found"), [(16_000_000, set()), (16_000_001, {"S20-over-limit"})])
def test_sixteen_million_bytes_pass_and_one_more_does_not(tmp_path, total, found):
    folder = write_published(tmp_path / "record", model_bytes=total - SIZE)
    assert errors(folder) == found


def test_a_log_that_counted_a_longer_script_is_only_asked(tmp_path):
    """The wrapped script is shipped, the readable one was counted: 16,000,100 in the log, less on the disk."""
    packed = pack_source(PUBLISHED_SCRIPT * 3)
    script = PUBLISHED_SCRIPT * 3
    folder = write_published(tmp_path / "record", script, shipped=packed, model_bytes=16_000_100 - len(script.encode()))
    found = codes(folder)
    assert found["S22-logged-over"] == "warning" and "S20-over-limit" not in found


# ---- our own records ----


def change_result(folder: Path, seed: int = 43, **changes: Any) -> None:
    path = folder / "runs" / f"seed{seed}" / "result.json"
    write_json(path, json.loads(path.read_text()) | changes)


def better_in_all_but_the_log(folder: Path) -> None:
    """One score made better, and everything that follows from it computed again."""
    change_result(folder, val_bpb=1.44)
    claims = json.loads((folder / "submission.json").read_text())
    claims["seed_results"]["43"]["val_bpb"] = 1.44
    write_json(folder / "submission.json", claims | {"val_bpb": round((1.449 + 1.44 + 1.451) / 3, 8)})


def second_42(folder: Path) -> None:
    write_json(folder / "runs/seed43/result.json", json.loads((folder / "runs/seed42/result.json").read_text()))


OWN_FAULTS = {
    "README edited": (lambda f: (f / "README.md").open("a").write("better\n"), False, "S70-hash"),
    "log removed": (lambda f: (f / "train_seed43.log").unlink(), False, "S70-hash"),
    "score forged": (better_in_all_but_the_log, True, "R05-log-result"),
    "headline forged": (lambda f: claim(f, val_bpb=1.4), True, "S12-headline"),
    "fifth digit forged": (lambda f: claim(f, val_bpb=1.45001), True, "S81-run-disagrees"),
    "step count forged": (lambda f: claim(f, step_stop=1), True, "S81-run-disagrees"),
    "bytes forged": (lambda f: claim(f, bytes_total=400), True, "S81-run-disagrees"),
    "artifact hash forged": (lambda f: change_result(f, artifact_sha256="0" * 64), True, "R05-log-result"),
    "script replaced": (lambda f: (f / "train_gpt.py").write_bytes(pack_source("print(3)\n")), True, "R06-code-in-log"),
    "readable replaced": (lambda f: (f / "train_gpt_readable.py").write_text("print(3)\n"), True, "S65-readable"),
    "run invalid": (lambda f: change_result(f, valid=False, findings=["x"]), True, "R01-invalid"),
    "run partial": (lambda f: change_result(f, partial=True), True, "R02-partial"),
    "run without a key": (lambda f: write_json(f / "runs/seed43/result.json", {}), True, "S80-run-record"),
    "run missing": (lambda f: [p.unlink() for p in (f / "runs/seed43").iterdir()], True, "S80-run-record"),
    "probe failed": (
        lambda f: change_result(f, probes={"C2": {"verdict": "FAIL", "detail": "1.3"}}),
        True,
        "R08-probe",
    ),
    "limit lowered": (lambda f: change_result(f, limit_bytes=400), True, "S20-over-limit"),
    "other text counted": (lambda f: claim(f, val_loss=3.3), True, "S50-bytes-per-token"),
    "seed twice": (second_42, True, "R14-seed-twice"),
}


@pytest.mark.parametrize(("spoil", "careful", "code"), OWN_FAULTS.values(), ids=OWN_FAULTS)
def test_a_forged_record_is_told(own, spoil, careful, code):
    spoil(own)
    if careful:
        rehash(own)
    assert code in errors(own), texts(own)


def test_a_file_that_is_not_in_the_list_is_a_warning(own):
    (own / "notes.txt").write_text("later\n")
    assert codes(own) == {"S71-unlisted": "warning"}


# ---- the command ----


@pytest.fixture
def run_tool(run_command_here) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run_command_here, "tools/check_submission.py")


def test_the_command_lists_and_counts(run_tool, own, published):
    assert run_tool(own).returncode == 0
    claim(published, val_bpb=None, val_loss=2.0001)
    finished = run_tool(published)
    lines = finished.stdout.splitlines()
    assert finished.returncode == 1 and finished.stderr == ""
    assert any(line.startswith("  1. error S04-json-type: ") for line in lines)
    assert lines[-1] == "not sound: 2 errors, 0 warnings, 0 notes"
    report = json.loads(run_tool(published, "--json").stdout)
    assert report["errors"] == 2 and [finding["number"] for finding in report["findings"]] == [1, 2]
    assert {log["seed"] for log in report["logs"]} == {7, 42, 1337}


def test_no_folder_is_bad_input(run_tool, tmp_path):
    finished = run_tool(tmp_path / "nowhere")
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("check_submission: ") and finished.stderr.count("\n") == 1
    with pytest.raises(EvidenceError, match="not a folder"):
        read_record(tmp_path / "nowhere")
