"""tools/ablate.py and tools/ablation_run.py at work: results, resumption, kills, failures, the smoke profile."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from golf.artifact.container import read_artifact, restore_model
from golf.config.config import config_dict, iter_knobs
from golf.data.loader import validation_tokens
from golf.data.tokenizer import ByteTable, load_tokenizer
from golf.runtime import Runtime
from golf.score.scorer import plain_settings, score_stream
from lab.cli import run_command
from lab.study.measures import CodeWatch, bits_text, code_shares, site_of_weight
from lab.study.report import read_csv_rows, render_study, study_notes, study_title
from lab.study.running import run_ablation
from lab.study.spec import StudyError, read_spec, save_spec, study_code_sha256
from lab.study.table import load_study_results
from tests.ablation_fixtures import MATRIX, results_in, write_matrix
from tools import ablate

CPU = Runtime(torch.device("cpu"))
TRAIN_AND_PACK = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from golf.run.command import parse_command
from golf.run.session import Session
from train_gpt import train_and_pack
train_and_pack(parse_command(sys.argv[1:], {}), Session())
"""
"""The first process of train_gpt.py, without the one that scores."""


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=3600)


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs tools/ablate.py in this process: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
        return run_command(ablate.Options, ablate.__doc__, ablate.work), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def study(repository, tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """(matrix, folder, the finished tool) of the small study with two seeds."""
    folder = tmp_path_factory.mktemp("study")
    matrix, out = write_matrix(folder), folder / "out"
    command = [repository / "tools" / "ablate.py", "--matrix", matrix, "--profile", "tiny", "--seeds", "2"]
    return matrix, out, run_tool(*command, "--jobs", "2", "--out", out)


# ---- a whole study ----


@pytest.mark.slow
def test_a_study_leaves_tables_pictures_and_a_page(study):
    _, out, finished = study
    assert finished.returncode == 1, finished.stderr  # a row failed
    assert "12 of 12 runs to do, about" in finished.stderr and "[12/12," in finished.stderr
    rows = read_csv_rows((out / "results.csv").read_text())
    names = [row["rows"] for row in rows]
    assert names == ["A plain = B plain again", "A ternary", "B broken", "G by rtn4", "G by gptq2", "G broken by rtn8"]
    by_name = dict(zip(names, rows, strict=True))
    for name in ("A plain = B plain again", "A ternary", "G by rtn4", "G by gptq2"):
        assert by_name[name]["status"] == "finished" and by_name[name]["seeds"] == "2"
    assert by_name["B broken"]["status"].startswith("0 of 2 finished; failed: TrainingError: the loss is nan at step")
    assert by_name["G broken by rtn8"]["status"].startswith("0 of 2 finished; failed: the training of its weights:")
    page = (out / "index.html").read_text()
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert {"loss_A.png", "gap_A.png", "final_A.png", "final_G.png", "pareto.png", "codes_0.png"} <= pictures
    assert page.count("data:image/png;base64,") == len(pictures)
    assert r"\begin{tabular}" in (out / "results.tex").read_text()


@pytest.mark.slow
def test_figures_of_a_row(study):
    _, out, _ = study
    rows = {row["rows"]: row for row in read_csv_rows((out / "results.csv").read_text())}
    plain, ternary = rows["A plain = B plain again"], rows["A ternary"]
    assert (plain["covered_percent"], plain["verdict"], plain["zero_fraction"]) == ("0.0", "reference", "")
    assert ternary["bits"] == "W q,up:1.58 k,v,o,down,embed:16 A hidden:8"
    weights = 2 * (32 * 32 + 32 * 80)  # q and up of both layers
    assert float(ternary["covered_percent"]) == pytest.approx(100 * weights / float(ternary["params"]))
    assert 0.2 < float(ternary["zero_fraction"]) < 0.45
    assert float(ternary["bytes_matrices"]) < float(plain["bytes_matrices"]) < float(plain["bytes_whole"])
    assert float(ternary["energy_uj_zero_skip"]) < float(ternary["energy_uj"]) < float(plain["energy_uj"])
    assert plain["kv_bytes_per_token"] == str(2 * 2 * 32 * 2)  # layers, K and V, width, bytes
    assert float(plain["train_ms_p10"]) <= float(plain["train_ms_per_step"]) <= float(plain["train_ms_p90"])
    assert float(plain["train_val_gap"]) == pytest.approx(float(plain["val_nll"]) - float(plain["train_loss"]))


@pytest.mark.slow
def test_markdown_is_what_the_csv_gives(study):
    _, out, _ = study
    found = load_study_results(out)
    rows = read_csv_rows((out / "results.csv").read_text())
    assert render_study("md", study_title(found), rows, study_notes(found)) == (out / "results.md").read_text()


@pytest.mark.slow
def test_curves_are_on_the_grid_of_steps_with_codes_and_flips(study):
    _, out, _ = study
    spec = next(path for path in out.glob("runs/*/spec.json") if json.loads(path.read_text())["name"] == "ternary")
    rows = [json.loads(line) for line in (spec.parent / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]  # stop_step of 8
    looks = [(row["step"], row["tokens"]) for row in rows if "val_loss" in row]
    assert looks == [(2, 256), (4, 512), (6, 768)]
    codes = [row for row in rows if row.get("matrix") == "blocks.1.mlp.fc.weight"]
    assert [row["step"] for row in codes] == [0, 2, 4, 6] and "flips" not in codes[0]
    assert all(0 < row["flips"] < 0.5 for row in codes[1:])
    assert all(sum(row["shares"].values()) == pytest.approx(1) for row in codes)
    assert not any("c_k" in row.get("matrix", "") for row in rows)


@pytest.mark.slow
def test_the_loss_is_that_of_the_bytes_on_all_tokens(study):
    _, out, _ = study
    for folder in out.glob("runs/*"):
        result = json.loads((folder / "result.json").read_text())
        if result["status"] != "finished" or result["seed"] != 42:
            continue
        spec, artifact = read_spec(folder / "spec.json"), read_artifact(folder / "model.golf")
        table = ByteTable(load_tokenizer(spec.config.data.tokenizer_path))
        tokens = validation_tokens(Path(spec.config.data.data_path).glob("*_val_*.bin"))[:601]
        settings = plain_settings(spec.config.model, 4)
        score = score_stream(restore_model(artifact, CPU), tokens, table, settings, CPU, announce=False)
        assert result["val_loss"] == pytest.approx(score.val_loss, rel=1e-6)
        assert result["val_bpb"] == pytest.approx(score.val_bpb, rel=1e-6)
        assert (result["val_tokens"], result["bytes_model"]) == (600, artifact.byte_count)
        blocks = json.loads((folder / "blocks.json").read_text())
        assert sum(blocks["nats"]) == pytest.approx(score.nats, rel=1e-6) and len(blocks["nats"]) == -(-600 // 32)


@pytest.mark.slow
def test_a_run_alone_gives_the_same_bytes(study, repository, tmp_path):
    _, out, _ = study
    specs = {json.loads(path.read_text())["name"]: path for path in sorted(out.glob("runs/*/spec.json"))}
    command = ["--spec", specs["ternary"], "--out", tmp_path / "ternary"]
    finished = run_tool(repository / "tools/ablation_run.py", *command)
    assert finished.returncode == 0, finished.stderr
    assert run_ablation(specs["by gptq2"], tmp_path / "by gptq2", study_code_sha256(repository)) == 0
    for name in ("ternary", "by gptq2"):
        own, other = (json.loads((f / "result.json").read_text()) for f in (tmp_path / name, specs[name].parent))
        assert own["artifact_sha256"] == other["artifact_sha256"] and own["val_loss"] == other["val_loss"]
        assert not list((tmp_path / name).glob(".*tmp"))


# ---- going on ----


@pytest.mark.slow
def test_finished_runs_are_skipped_and_others_done(study, run_here):
    matrix, out, _ = study
    command = ["--matrix", matrix, "--profile", "tiny", "--seeds", "2", "--out", out]
    status, _, complaint = run_here(*command)
    assert status == 2 and "holds runs: go on with them by --resume" in complaint
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    gone = next(path for path in before if json.loads(path.read_text())["name"] == "by rtn4")
    gone.unlink()
    status, output, _ = run_here(*command, "--dry-run", "--json")
    runs = json.loads(output)["runs"]
    assert status == 0 and [run["key"] for run in runs if run["status"] == "to do"] == [gone.parent.name]
    status, _, progress = run_here(*command, "--resume")
    assert status == 1 and "1 of 12 runs to do" in progress
    after = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert after.keys() == before.keys() and {path for path in before if after[path] != before[path]} == {gone}


@pytest.mark.slow
def test_tables_are_made_anew_without_a_run(study, run_here):
    matrix, out, _ = study
    before = (out / "results.csv").read_text()
    (out / "results.csv").unlink()
    assert run_here("--matrix", matrix, "--profile", "tiny", "--out", out, "--tables")[0] == 1
    assert (out / "results.csv").read_text() == before


def test_a_dry_run_leaves_nothing_but_the_text(run_here, tmp_path):
    matrix, out = write_matrix(tmp_path), tmp_path / "out"
    command = ["--matrix", matrix, "--profile", "tiny", "--out", out, "--dry-run"]
    status, output, _ = run_here(*command, "--groups", "G", "--seeds", "3")
    assert status == 0 and "15 runs asked for, 15 distinct, 0 finished, 15 to do" in output
    assert "by a rough model" in output and "seed 44" in output
    assert [path.name for path in out.iterdir()] == ["synthetic"]


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(repository, tmp_path):
    """Killed with no chance to clean up: the run under way ends too, what is finished stays, the rest is done later."""
    text = MATRIX.replace("steps = 8", "steps = 4000").replace("stop_step = 6", "stop_step = 3000")
    matrix, out = write_matrix(tmp_path, text), tmp_path / "out"
    tool = [sys.executable, repository / "tools/ablate.py", "--matrix", matrix, "--profile", "tiny", "--out", out]
    process = subprocess.Popen([*map(str, tool), "--groups", "A"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(out.glob("runs/*/run.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 300
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(out) == [] and not list(out.glob("runs/*/result.json"))
    write_matrix(tmp_path)
    finished = run_tool(*tool[1:], "--groups", "A", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert {name: result["status"] for name, result in results_in(out).items()} == {
        "plain 42": "finished", "ternary 42": "finished",
    }  # fmt: skip


def processes_of(folder: Path) -> list[int]:
    """Processes that have a file below `folder` open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            places = [os.readlink(handle) for handle in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(place.startswith(str(folder)) for place in places):
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_run_of_other_code_or_data_leaves_no_result(study, repository, tmp_path):
    _, out, _ = study
    spec = next(path for path in out.glob("runs/*/spec.json") if json.loads(path.read_text())["name"] == "plain")
    assert json.loads(spec.read_text())["code_sha256"] == study_code_sha256(repository)
    with pytest.raises(StudyError, match="the code is not the study's any more"):
        run_ablation(spec, tmp_path / "run", "0" * 64)
    for field, message in (("data_id", "the training data is not"), ("val_data_id", "the validation tokens are not")):
        save_spec(replace(read_spec(spec), **{field: "0" * 16}), tmp_path / "spec.json")
        with pytest.raises(StudyError, match=f"{message} the study's"):
            run_ablation(tmp_path / "spec.json", tmp_path / "run", study_code_sha256(repository))
    (tmp_path / "spec.json").write_text(spec.read_text().replace('"stop_step": 6', '"stop_step": 5'))
    finished = run_tool(
        repository / "tools/ablation_run.py", "--spec", tmp_path / "spec.json", "--out", tmp_path / "run"
    )
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and "its key is not" in finished.stderr
    assert not (tmp_path / "run" / "result.json").exists()


# ---- codes ----


@pytest.mark.slow
def test_shares_and_flips_by_brute_force(study):
    codes = torch.tensor([[-1, 0, 0], [1, 1, 0]], dtype=torch.int8)
    assert code_shares(codes) == {"-1": 1 / 6, "0": 3 / 6, "1": 2 / 6}
    assert code_shares(torch.arange(-100, 101, dtype=torch.int8)[None]) == {"0": 1 / 201}
    _, out, _ = study
    path = next(path for path in out.glob("runs/*/spec.json") if json.loads(path.read_text())["name"] == "ternary")
    quant = read_spec(path).config.quant
    weights = {f"blocks.0.attn.{part}.weight": torch.randn(32, 32) for part in ("c_q", "c_k", "c_v", "proj")}
    watch, name = CodeWatch(quant), "blocks.0.attn.c_q.weight"
    (first,) = watch.look(weights, 0)
    assert first["matrix"] == name and "flips" not in first
    step = weights[name].abs().mean()
    before = (weights[name] / step).round().clamp(-1, 1)
    weights[name] = weights[name] + 0.3 * torch.randn(32, 32)
    (second,) = watch.look(weights, 4)
    after = (weights[name] / weights[name].abs().mean()).round().clamp(-1, 1)
    assert second["flips"] == pytest.approx((before != after).float().mean().item(), abs=2e-3)  # steps are fp16 there
    assert second["shares"]["0"] == pytest.approx((after == 0).float().mean().item(), abs=2e-3)


def test_sites_and_their_bits_in_words():
    assert bits_text({"q": 1.58, "k": 1.58, "o": 16.0}, {"hidden": 8.0}) == "W q,k:1.58 o:16 A hidden:8"
    assert [site_of_weight(n) for n in ("tok_emb.weight", "blocks.3.mlp.proj.weight", "blocks.0.attn.proj.weight")] == [
        "embed", "down", "o",
    ]  # fmt: skip
    assert site_of_weight("blocks.0.attn.q_gain") is None


# ---- the same as a run of train_gpt.py, and the smoke profile ----


@pytest.mark.slow
def test_the_artifact_is_that_of_train_gpt(study, repository, tmp_path):
    """A study's run is the pipeline's: the same configuration gives train_gpt.py the same bytes."""
    text = MATRIX.replace("stop_step = 6\n", "")
    matrix, out = write_matrix(tmp_path, text), tmp_path / "out"
    finished = run_tool(
        repository / "tools/ablate.py", "--matrix", matrix, "--profile", "tiny", "--groups", "A", "--out", out
    )
    assert finished.returncode == 0, finished.stderr
    folder = next(path.parent for path in out.glob("runs/*/spec.json") if '"name": "ternary"' in path.read_text())
    config = read_spec(folder / "spec.json").config
    assert config_dict(config)["quant"]["weight_q"] == "ternary"
    told = {knob: value for _, knob, _, value in iter_knobs(config) if knob not in ("run_id", "preset", "corpus")}
    told |= {"runs_root": str(tmp_path / "runs"), "run_id": "r", "rehearse": False, "limit_bytes": 10_000_000}
    words = [f"{knob}={int(value) if isinstance(value, bool) else value}" for knob, value in told.items()]
    finished = run_tool("-c", TRAIN_AND_PACK, repository, "--preset", "local", *words)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "runs" / "r" / "model.golf").read_bytes() == (folder / "model.golf").read_bytes()


@pytest.mark.slow
def test_the_smoke_profile_of_the_low_bit_study(repository, tmp_path):
    """Every row of groups A, B, C, D and G is trained or rounded, scored, and in the table."""
    out = tmp_path / "out"
    command = [repository / "tools/ablate.py", "--matrix", repository / "configs/studies/lowbit.toml"]
    options = ["--profile", "cpu-smoke", "--groups", "A,B,C,D,G", "--jobs", "2", "--out", out]
    finished = run_tool(*command, *options)
    assert finished.returncode == 0, finished.stderr
    rows = read_csv_rows((out / "results.csv").read_text())
    assert len(rows) == 80 and {row["status"] for row in rows} == {"finished"}
    assert len({row["bits"] for row in rows}) > 25
    runs = results_in(out)
    assert {run["status"] for run in runs.values()} == {"finished"}
    assert len(runs) == len(list(out.glob("runs/*/model.golf"))) == len(list(out.glob("runs/*")))
