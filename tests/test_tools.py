"""tools/bench.py and tools/report.py on small runs."""

import json
import subprocess
import sys

SMALL = ["vocab_size=64", "model_dim=32", "train_seq_len=16", "train_batch_tokens=64", "micro_batch_tokens=64"]
SMALL += ["eval_seq_len=32", "eval_stride=8", "eval_batch_seqs=8", "compile=off", "warmup_steps=1"]


def run_tool(repository, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=repository, capture_output=True, text=True, timeout=120)


def test_bench_measures_every_stage(repository):
    finished = run_tool(repository, "tools/bench.py", "--json", "--steps", "3", *SMALL)
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout)
    for name in (
        "train_tokens_per_s",
        "score_tokens_per_s",
        "score_to_train_speed",
        "pack_mb_per_s",
        "unpack_mb_per_s",
    ):
        assert figures[name] > 0
    assert 0 < figures["score_forward_share"] <= 1 and figures["preset"] == "local"


def test_bench_names_what_it_can_not_read(repository):
    finished = run_tool(repository, "tools/bench.py", "nonsense")
    assert finished.returncode == 2 and finished.stderr == "bench.py: 'nonsense' is not of the form key=value\n"


def test_report_of_a_folder_without_result(repository, tmp_path):
    finished = run_tool(repository, "tools/report.py", str(tmp_path))
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and "the run has not been scored" in finished.stderr


def test_report_shows_an_invalid_run_as_invalid(repository, tmp_path):
    stream = {"label": "mlp", "role": "codes", "elements": 10, "compressed_bytes": 8, "bits_per_element": 6.4}
    result = {
        "run_id": "r", "valid": False, "findings": ["501 bytes are 1 over the limit"], "val_bpb": 1.5, "val_loss": 3.0,
        "val_tokens": 10, "val_bytes": 20, "val_docs": 1, "params": 10, "steps": 2, "train_seconds": 1.0,
        "train_tokens": 64, "eval_seconds": 1.0, "eval_tokens_per_second": 9.0, "bytes_code": 5, "bytes_model": 9,
        "bytes_total": 14, "limit_bytes": 13, "sizes": {"streams": [stream], "overhead_bytes": 1},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    steps = [{"step": i, "elapsed": i, "train_loss": 4.0 - i, "lr_scale": 1.0, "progress": 0.5} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    finished = run_tool(repository, "tools/report.py", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "r  (INVALID)" in finished.stdout and "INVALID: 501 bytes are 1 over the limit" in finished.stdout
    assert (tmp_path / "loss.png").exists() and (tmp_path / "bytes.png").exists()
