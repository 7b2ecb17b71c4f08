"""Every tool on bad input; tools/bench.py, plan.py and report.py on small runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from golf.config.knobs import UserError
from lab.cli import ToolOptions, run_command
from tools import bench, plan, report

SMALL = ["vocab_size=64", "model_dim=32", "train_seq_len=16", "train_batch_tokens=64", "micro_batch_tokens=64"]
SMALL += ["eval_seq_len=32", "eval_stride=8", "eval_batch_seqs=8", "compile=off", "warmup_steps=1"]


NOWHERE = "no/such/place"
BAD_INPUT = {
    "data/download.py": ["--train-shards", "-1", "--offline"],
    "data/prepare.py": ["--input", NOWHERE],
    "data/train_tokenizer.py": ["--input", NOWHERE],
    "data/verify.py": [NOWHERE],
    "tools/ablate.py": ["--matrix", NOWHERE],
    "tools/ablation_run.py": ["--spec", NOWHERE, "--out", NOWHERE],
    "tools/adaptation.py": [NOWHERE],
    "tools/bench.py": ["--steps", "0"],
    "tools/bundle.py": ["--entry", NOWHERE],
    "tools/check_run.py": [NOWHERE],
    "tools/check_submission.py": [NOWHERE],
    "tools/compare.py": [NOWHERE, "--vs", NOWHERE],
    "tools/compare_quant.py": ["--run", NOWHERE],
    "tools/compress.py": [NOWHERE, "--artifact", NOWHERE, "--out", "x.golfz"],
    "tools/demo.py": [NOWHERE],
    "tools/doctor.py": ["nonsense"],
    "tools/export.py": [NOWHERE, "--out", NOWHERE],
    "tools/evals.py": ["--task", "boolq", "--data", NOWHERE, "--run", NOWHERE],
    "tools/fingerprint.py": [NOWHERE],
    "tools/footprint.py": [NOWHERE],
    "tools/gpu_check.py": ["--only", "nonsense"],
    "tools/gpu_forecast.py": ["--preset", "nonsense"],
    "tools/inspect_data.py": [NOWHERE],
    "tools/make_submission.py": [NOWHERE, "--name", "n", "--author", "a", "--github-id", "g", "--blurb", "b"],
    "tools/pack_artifact.py": ["--weights", NOWHERE, "--out", "model.golf"],
    "tools/plan.py": ["--world-size", "0"],
    "tools/prove.py": [NOWHERE],
    "tools/rate_curve.py": ["--run", NOWHERE],
    "tools/report.py": [NOWHERE],
    "tools/roundtrip_eval.py": ["--artifact", NOWHERE, "--val", "*", "--tokenizer", NOWHERE],
    "tools/sample.py": ["--run", NOWHERE],
    "tools/study.py": ["nonsense"],
    "tools/track.py": [NOWHERE],
}
TORCH_FREE = ("tools/check_submission.py", "tools/make_submission.py")
"""What judges evidence, for which a reviewer needs no torch."""


def run_tool(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=repository, capture_output=True, text=True, timeout=600)


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a tool's module in this process: (exit status, stdout, stderr)."""

    def run(tool: ModuleType, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [tool.__file__, *arguments])
        return run_command(tool.Options, tool.__doc__, tool.work), *capsys.readouterr()

    return run


def test_every_tool_is_told_bad_input_here(repository):
    programs = [path for folder in ("data", "tools") for path in (repository / folder).glob("*.py")]
    assert {path.relative_to(repository).as_posix() for path in programs} == BAD_INPUT.keys()


@pytest.mark.parametrize("in_a_process", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tool", BAD_INPUT)
def test_bad_input_is_one_line_with_the_name_of_the_tool(repository, run_command_here, tool, in_a_process):
    arguments = tool, *BAD_INPUT[tool]
    finished = run_tool(repository, *arguments) if in_a_process else run_command_here(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"{Path(tool).stem}: ")
    assert finished.stderr.count("\n") == 1 and finished.stderr.endswith("\n")


def test_debug_shows_the_traceback_before_the_line(repository):
    tool = "tools/check_submission.py"
    finished = run_tool(repository, tool, *BAD_INPUT[tool], "--debug")
    assert (finished.returncode, finished.stdout) == (2, "")
    lines = finished.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and any("in read_record" in line for line in lines)
    assert lines[-1].startswith("check_submission: no/such/place is not a folder")


@pytest.mark.parametrize("tool", TORCH_FREE)
def test_tools_for_reviewers_do_not_import_torch(repository, tool):
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(sorted({'torch', 'tyro'} & sys.modules.keys()))"
    finished = run_tool(repository, "-c", code, tool)
    assert finished.stdout == "['tyro']\n", finished.stderr


@pytest.mark.parametrize(
    ("outcome", "status", "complaint"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (UserError("a line\nand another"), 2, "a_tool: a line and another\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "a_tool: [Errno 2] No such file: 'x'\n"),
    ],
)
def test_status_and_line_of_what_the_work_comes_to(monkeypatch, capsys, outcome, status, complaint):
    def work(options: ToolOptions) -> int:
        assert options == ToolOptions(json=True)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "argv", ["some/a_tool.py", "--json"])
    assert run_command(ToolOptions, "What it is for.", work) == status
    assert tuple(capsys.readouterr()) == ("", complaint)


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_input(monkeypatch):
    def work(options: ToolOptions) -> int:
        raise ValueError("ours")

    monkeypatch.setattr(sys, "argv", ["a_tool.py"])
    with pytest.raises(ValueError, match="ours"):
        run_command(ToolOptions, None, work)


# ---- bench ----


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [[], ["act_hidden=int8", "act_attn_in=int8"]])
def test_bench_measures_every_stage(run_here, knobs):
    """Also of a model with quantized activations."""
    status, output, complaint = run_here(bench, "--json", "--steps", "3", *SMALL, *knobs)
    assert status == 0, complaint
    figures = json.loads(output)
    for name in (
        "train_tokens_per_s",
        "score_tokens_per_s",
        "score_to_train_speed",
        "pack_mb_per_s",
        "unpack_mb_per_s",
    ):
        assert figures[name] > 0
    assert 0 < figures["score_forward_share"] <= 1 and figures["preset"] == "local"


# ---- plan ----


def test_plan_in_figures(run_here):
    status, output, complaint = run_here(plan, "--preset", "local", "--no-code", "--json", "--step-ms", "500")
    assert (status, complaint) == (0, "")
    figures = json.loads(output)
    steps, seconds = figures["steps"], figures["train_seconds"]
    assert (figures["preset"], figures["step_ms"]) == ("local", 500.0) and steps == 2 * seconds and 172 < seconds <= 174
    assert figures["timeline"][0] == {"step": 1, "seconds": 0.0, "progress": 0.0, "what": "training begins"}
    assert figures["timeline"][-1]["what"].startswith("training ends") and figures["timeline"][-1]["step"] == steps
    least, most = figures["bytes_model"]
    assert 0 < least < most < figures["limit_bytes"] and figures["bytes_total"] == [least, most]
    assert 0 < figures["eval_seconds"][0] < figures["eval_seconds"][1] and figures["problems"] == []


@pytest.mark.slow
def test_a_plan_counts_the_packed_code_of_its_own_preset(run_here):
    sizes = {}
    for preset in ("local", "baseline-local"):
        status, output, _ = run_here(plan, "--preset", preset, "--json")
        sizes[preset], figures = json.loads(output)["bytes_code"], json.loads(output)
        assert status == 0 and figures["bytes_total"] == [part + sizes[preset] for part in figures["bytes_model"]]
    assert 30_000 < sizes["baseline-local"] < sizes["local"] < 80_000


def test_a_plan_with_problems_is_a_finding(run_here):
    status, output, _ = run_here(plan, "--preset", "local", "--no-code", "--json", "iterations=2")
    assert status == 1 and json.loads(output)["problems"]
    status, output, _ = run_here(plan, "--preset", "local", "--no-code", "iterations=2")
    assert status == 1 and output.startswith("plan of local: 2 steps") and "\nproblem: " in output


# ---- report ----


@pytest.fixture
def scored(tmp_path) -> Path:
    """The folder of an invalid run, with what a report is made from."""
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    stream = {"label": "mlp", "role": "codes", "elements": 10, "compressed_bytes": 8, "bits_per_element": 6.4}
    result = {
        "run_id": "r", "valid": False, "findings": ["501 bytes are 1 over the limit"], "val_bpb": 1.5, "val_loss": 3.0,
        "val_tokens": 10, "val_bytes": 20, "val_docs": 1, "params": 10, "steps": 2, "train_seconds": 1.0,
        "train_tokens": 64, "eval_seconds": 1.0, "eval_tokens_per_second": 9.0, "bytes_code": 5, "bytes_model": 9,
        "bytes_total": 14, "limit_bytes": 13, "sizes": {"streams": [stream], "overhead_bytes": 1},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    steps = [{"step": i, "elapsed": i, "train_loss": 4.0 - i, "lr_scale": 1.0, "progress": 0.5} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder


def test_report_shows_an_invalid_run_as_invalid(run_here, scored):
    status, output, complaint = run_here(report, str(scored))
    assert (status, complaint) == (0, "")
    assert "r  (INVALID)" in output and "INVALID: 501 bytes are 1 over the limit" in output
    assert (scored / "loss.png").exists() and (scored / "bytes.png").exists()


def test_report_in_figures_of_the_newest_run(run_here, scored):
    status, output, complaint = run_here(report, "--last", "--root", str(scored.parent), "--json")
    assert (status, complaint) == (0, "")
    figures, result = json.loads(output), json.loads((scored / "result.json").read_text())
    assert figures.pop("pictures") == [str(scored / "loss.png"), str(scored / "bytes.png")]
    assert figures == {key: result[key] for key in result if key != "sizes"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", None, "result.json is missing: the run has not been scored"),
        ("result.json", "{", "result.json: damaged"),
        ("result.json", '{"val_bpb": 1}', "result.json: not a run's record, run_id, valid, "),
        ("metrics.jsonl", "{}\n{\n", "metrics.jsonl: damaged"),
        ("metrics.jsonl", '{"step": 1, "elapsed": 1.0}\n', "metrics.jsonl has no step"),
    ],
)
def test_report_names_the_file_that_is_wrong(run_here, scored, name, text, message):
    if text is None:
        (scored / name).unlink()
    else:
        (scored / name).write_text(text)
    status, output, complaint = run_here(report, str(scored))
    assert (status, output) == (2, "")
    assert complaint.startswith(f"report: {scored}/{message}") and complaint.count("\n") == 1
