"""The whole story: `bash run.sh` on a short cap, the bundle against the modules, and torchrun."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt
from golf.config.config import build_config
from golf.run.guard import AccessGuard
from golf.run.session import Interruption
from lab.bundle.bundler import bundle_source
from lab.bundle.frozen import freeze_config
from lab.bundle.packer import pack_source

TINY_RUN = [
    "vocab_size=400", "model_dim=32", "bigram_vocab_size=64", "bigram_dim=8", "train_seq_len=32", "iterations=8",
    "max_wallclock_seconds=0", "train_batch_tokens=256", "micro_batch_tokens=256", "warmup_steps=1", "threads=1",
    "swa_start=0.4", "compile=off", "swa_snapshots=2", "eval_seq_len=64", "eval_stride=32",
    "quantizer=rtn", "qat_enabled=1", "prune_frac=0.05", "codec=zstd",
]  # fmt: skip


def run_script(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def read_run(folder: Path) -> tuple[dict, list[float], bytes, str]:
    """(result, training losses, artifact, log)"""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    result, log = json.loads((folder / "result.json").read_text()), (folder / "train.log").read_text()
    return result, losses, (folder / "model.golf").read_bytes(), log


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="module")
def module_run(repository, prepared, module_folder) -> tuple[dict, list[float], bytes, str]:
    """One run of train_gpt.py with its modules."""
    root = module_folder
    script = [sys.executable, "train_gpt.py", "--preset", "local", f"runs_root={root}", "run_id=m"]
    finished = run_script([*script, *prepared, *TINY_RUN], repository)
    assert finished.returncode == 0, finished.stderr
    return read_run(root / "m")


@pytest.mark.slow
def test_result_has_what_readers_look_for(module_run):
    result = module_run[0]
    for key in (
        "run_id", "preset", "config_hash", "seed", "params", "steps", "train_seconds", "eval_seconds", "val_loss",
        "val_bpb", "val_tokens", "val_bytes", "val_docs", "bytes_code", "bytes_model", "bytes_total", "limit_bytes",
        "artifact_sha256", "data_id", "tokenizer_sha256", "valid", "findings", "val_data_id", "resumes", "features",
        "parity", "ledger", "probes", "fingerprint", "fit_actions", "unquantized",
    ):  # fmt: skip
        assert key in result
    bytes_per_token = result["val_bytes"] / result["val_tokens"]
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2) / bytes_per_token)


LOG_LINES = r"""
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S+
train_loader:dataset:\S+ train_shards:\d+
val_loader:shards pattern=\S+, closed until the artifact is scored
model_params:\d+
world_size:\d+ grad_accum_steps:\d+
attention_mode:gqa num_heads:\d+ num_kv_heads:\d+
tie_embeddings:\w+ embed_lr:\S+ head_lr:\S+ matrix_lr:\S+ scalar_lr:\S+
train_batch_tokens:\d+ train_seq_len:\d+ iterations:\d+ warmup_steps:\d+ max_wallclock_seconds:\d+\.\d{3}
seed:\d+
warmup_step:\d+/\d+
step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms
swa:applying averaged \d+ checkpoints
Serialized model: \d+ bytes
Code size: \d+ bytes
Serialized model int5int6\+zstd: \d+ bytes
Total submission size int5int6\+zstd: \d+ bytes
eval_seq_len:64 \(NTK-scaled RoPE, 64 tokens\)
final_eval_mode:sliding_window stride:\d+ batch_seqs:\d+
final_int5int6_zstd_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms
final_int5int6_zstd_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}
unquantized, plain rows: val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4}
result: valid val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} bytes_total:\d+ steps:8 train_seconds:\S+ .* artifact_sha256:\w+
"""


@pytest.mark.slow
def test_log_has_the_competitions_lines_in_their_order(module_run):
    lines = iter(module_run[3].splitlines())
    for pattern in LOG_LINES.strip().splitlines():
        assert any(re.fullmatch(pattern, line) for line in lines), f"missing, or out of order: {pattern}"


@pytest.mark.slow
def test_packed_bundle_in_an_empty_folder_equals_the_modules(module_run, module_folder, repository, prepared, tmp_path):
    """Same losses, same artifact, same score; and bytes_code is the size of the file that ran."""
    script = tmp_path / "train_gpt.py"
    made_for = ["--run-config", module_folder / "m" / "config.json"]
    subprocess.run(
        [sys.executable, "tools/bundle.py", "--pack", "--out", script, *made_for], check=True, cwd=repository
    )
    command = [sys.executable, script, "--preset", "local", "run_id=b", *prepared, *TINY_RUN]
    finished = run_script(command, tmp_path, PYTHONPATH="")
    assert finished.returncode == 0, finished.stderr
    result, losses, artifact, _ = read_run(tmp_path / "runs" / "b")
    expected_result, expected_losses, expected_artifact, _ = module_run
    assert losses == expected_losses and len(losses) == 8
    assert artifact == expected_artifact
    for key in ("val_loss", "val_bpb", "artifact_sha256", "config_hash", "data_id", "code_sha256"):
        assert result[key] == expected_result[key], key
    assert result["bytes_code"] == script.stat().st_size


@pytest.mark.slow
def test_torchrun_gives_the_same_run(module_run, repository, prepared, tmp_path):
    """Two processes train, become fresh processes, and score: same curve, one folder, same score."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "train_gpt.py", "--preset", "local", f"runs_root={tmp_path}", "run_id=t"]
    finished = run_script([*command, *prepared, *TINY_RUN], repository)
    assert finished.returncode == 0, finished.stderr
    result, losses, _, _ = read_run(tmp_path / "t")
    assert result["val_tokens"] == module_run[0]["val_tokens"] and result["val_bytes"] == module_run[0]["val_bytes"]
    assert result["machine"].startswith("2 x")
    assert max(abs(a - b) for a, b in zip(losses, module_run[1], strict=True)) < 2e-2
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_run_sh_end_to_end_with_a_short_cap(repository, tmp_path):
    """The command of the README on the embedded text, a smaller model and 14 seconds of training."""
    command = [
        "bash",
        "run.sh",
        f"runs_root={tmp_path}",
        "run_id=short",
        "max_wallclock_seconds=14",
        "model_dim=64",
        "bigram_vocab_size=256",
        "eval_stride=160",
        "swa_start=0.5",
        "calibration_tokens=4096",
        "compile=off",
    ]
    finished = run_script(command, repository, PYTHON=sys.executable)
    assert finished.returncode == 0, finished.stderr
    result, losses, artifact, log = read_run(tmp_path / "short")
    rows = [json.loads(line) for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()]
    clock = [row["elapsed"] for row in rows if "train_loss" in row]
    # The loop stops by the time of recent steps; on a busy machine the last step may take longer than those.
    longest = max(after - before for before, after in zip(clock, clock[1:], strict=False))
    assert clock[-2] <= 14 and 0 < clock[-1] <= result["train_seconds"] <= 14 + 2 * longest
    assert result["steps"] == len(losses)
    assert result["valid"] and result["preset"] == "local" and result["val_bpb"] < 8
    assert result["bytes_model"] == len(artifact)
    assert result["bytes_total"] == result["bytes_model"] + result["bytes_code"] <= result["limit_bytes"] == 500_000
    assert f"final_waterfill_rans_roundtrip_exact val_loss:{result['val_loss']:.8f}" in log
    assert (tmp_path / "short" / "loss.png").stat().st_size > 5000
    assert (tmp_path / "short" / "bytes.png").stat().st_size > 5000


def run_here(arguments: list[str]) -> int:
    """The exit status of train_gpt.py's program in this process."""
    return train_gpt.run_program(arguments)


def run_process(arguments: list[str]) -> int:
    """The exit status of train_gpt.py in a process of its own, which says what it says where this one does."""
    return subprocess.run([sys.executable, train_gpt.__file__, *arguments]).returncode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_layer=3"], "unknown knob 'num_layer'"),
        (["num_layers=three"], "num_layers='three' is not a valid value: it must be int"),
        (["num_layers=1"], "num_layers must be at least 2"),
        (["codec=lz4"], "it must be rans or brotli or lzma or zstd or zlib or none"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["warmdown_iters=3000"], "set warmdown_fraction"),
        (["data_path=/nowhere", "tokenizer_path=/nowhere/t.model"], "/nowhere"),
    ],
)
@pytest.mark.parametrize("run", [run_here, pytest.param(run_process, marks=pytest.mark.slow)])
def test_bad_input_is_one_clear_line_before_anything_runs(run, arguments, message, monkeypatch, capfd, tmp_path):
    for watcher in (AccessGuard, Interruption):  # the audit hook and the signal handlers would outlive the test
        monkeypatch.setattr(watcher, "watch", lambda self: None)
    status = run([f"runs_root={tmp_path}", *arguments])
    output, complaint = capfd.readouterr()
    assert status == 2 and output == ""
    assert message in complaint and complaint.count("\n") == 1


FITTED = [
    "qat_enabled=0",
    "prune_frac=0",
    "quantizer=waterfill",
    "codec=rans",
    "calibration_tokens=512",
    "reserve_bytes=100",
]


@pytest.fixture(scope="module")
def fitted_run(repository, prepared, tmp_path_factory) -> tuple[dict, list[float], bytes, str]:
    """A run whose artifact fills its limit: that of the plain run's model, less a fifth of its codes' bytes."""
    root = tmp_path_factory.mktemp("fitted")
    knobs = dict(word.split("=", 1) for word in [*TINY_RUN, *FITTED, "limit_bytes=66000"])
    frozen = freeze_config(build_config("local", {}, knobs))
    code = pack_source(bundle_source(repository / "train_gpt.py", repository, frozen))
    limit = f"limit_bytes={len(code) + 13_000}"
    script = [sys.executable, "train_gpt.py", "--preset", "local", f"runs_root={root}", "run_id=f"]
    finished = run_script([*script, *prepared, *TINY_RUN, *FITTED, limit], repository)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return read_run(root / "f")


@pytest.mark.slow
def test_a_fitted_run_fills_its_limit_and_is_valid(fitted_run):
    result, _, artifact, log = fitted_run
    assert result["valid"] and result["limit_bytes"] - 2000 <= result["bytes_total"] <= result["limit_bytes"] - 100
    assert "final_waterfill_rans_roundtrip" in log and result["fit_actions"][0].startswith("water level")
    assert result["calibration_tokens"] == 512 and result["calibration_seconds"] > 0
    assert result["features"]["calibration"]["proven"] and result["parity"]["largest_difference"] < 1e-5
    assert "calibrate" in {row["phase"] for row in result["ledger"]["phases"]}
    assert len(artifact) == result["bytes_model"]


@pytest.mark.slow
def test_a_fitted_run_scores_near_the_weights_it_was_made_of(fitted_run):
    """The network alone, adapted to each document; with counts it is far better."""
    result = fitted_run[0]
    assert -0.3 < result["network_bpb"] - result["unquantized"]["val_bpb"] < 0.15
    assert result["val_bpb"] < result["network_bpb"] - 0.3


@pytest.mark.slow
def test_torchrun_fits_on_the_sums_of_all_ranks(fitted_run, repository, prepared, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "train_gpt.py", "--preset", "local", f"runs_root={tmp_path}", "run_id=t"]
    limit = f"limit_bytes={fitted_run[0]['limit_bytes']}"
    finished = run_script([*command, *prepared, *TINY_RUN, *FITTED, limit], repository)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result, losses, _, _ = read_run(tmp_path / "t")
    assert result["valid"] and losses == pytest.approx(fitted_run[1], abs=1e-4)
    assert result["val_loss"] == pytest.approx(fitted_run[0]["val_loss"], abs=0.02)
