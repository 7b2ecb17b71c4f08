"""The checks of a GPU, on a CPU at toy size; what they find is planted."""

import json

import pytest
import torch
from flash_stand_in import flash_on_cpu

from golf.config.config import build_config
from golf.model.segments import segment_attention, segment_bounds
from golf.runtime import Runtime
from lab.machine import gpu_check
from lab.machine.gpu_check import CHECKS, CheckFailed, Seen, Setting, run_checks

TOY = {
    "num_layers": "2", "model_dim": "32", "num_heads": "2", "num_kv_heads": "1", "train_seq_len": "32",
    "train_batch_tokens": "128", "micro_batch_tokens": "128", "bigram_vocab_size": "64", "bigram_dim": "8",
    "vocab_size": "400", "eval_seq_len": "64", "eval_stride": "64", "device": "cpu", "warmup_steps": "1",
}  # fmt: skip


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(build_config("leaderboard", {}, TOY), Runtime(torch.device("cpu")), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "device", "fake quantization equals the export", "activation quantizers equal the CPU's", "attention kernels",
        "memory",
    ],
)  # fmt: skip
def test_quick_checks_pass_on_a_cpu(setting, tmp_path, name):
    (row,) = run_checks(setting, tmp_path / "out.json", only=(name,), tell=lambda line: None)
    assert row["verdict"] == "PASS", row["text"]


@pytest.mark.parametrize("name", ["steps", "steps without QAT", "steps with document attention"])
def test_steps_are_timed(setting, tmp_path, name):
    (row,) = run_checks(setting, tmp_path / "out.json", only=(name,), tell=lambda line: None)
    assert row["verdict"] == "PASS" and len(row["figures"]["ms"]) == gpu_check.TIMED_STEPS, row["text"]


@pytest.mark.slow
def test_no_power_or_sine_is_in_the_compiled_step(setting, tmp_path, monkeypatch):
    compiled = Setting(setting.config, Runtime(torch.device("cpu"), compiles=True), tmp_path)
    (row,) = run_checks(compiled, tmp_path / "out.json", only=("rotary tables are inputs",), tell=lambda line: None)
    assert row["verdict"] == "PASS", row["text"]
    monkeypatch.setattr("golf.model.gpt.GPT.keep_rotary", lambda self, length: None)
    torch.compiler.reset()
    (row,) = run_checks(compiled, tmp_path / "out.json", only=("rotary tables are inputs",), tell=lambda line: None)
    assert row["verdict"] == "FAIL" and "cos" in row["text"]


def test_segments_are_held_against_the_mask(setting, monkeypatch):
    """With FlashAttention's operators in plain loops; planted: rows as the only segments, and a window too wide."""
    assert gpu_check.check_segments(setting).text == "FlashAttention does not run here"
    monkeypatch.setattr(gpu_check, "flash_runs", lambda device, dtype: True)
    with flash_on_cpu() as stand_in:
        assert "as near to 64 bits" in gpu_check.check_segments(setting).text and len(stand_in.calls) == 8
        with monkeypatch.context() as patch, pytest.raises(CheckFailed, match="off by"):
            rows_alone = torch.arange(32).expand(2, 32) == 0
            patch.setattr(gpu_check, "segment_bounds", lambda start_BT: segment_bounds(rows_alone))
            gpu_check.check_segments(setting)
        wider = lambda *parts, bounds, window: segment_attention(*parts, bounds, window and window + 1)  # noqa: E731
        with monkeypatch.context() as patch, pytest.raises(CheckFailed, match="window 8: off by"):
            patch.setattr(gpu_check, "segment_attention", wider)
            gpu_check.check_segments(setting)


def test_a_grid_that_differs_from_the_export_is_found(setting, monkeypatch):
    monkeypatch.setattr("golf.quant.grid.grid_values", lambda weight_RC, bits: weight_RC)
    with pytest.raises(CheckFailed, match="differ from the exported"):
        gpu_check.check_fake_quantization(setting)


def test_results_are_on_the_disk_at_once_and_time_ends_it(setting, tmp_path, monkeypatch):
    clock, seen = [0.0], []

    def slow(_: Setting) -> Seen:
        seen.append(json.loads(out.read_text()) if out.exists() else [])
        clock[0] += 300.0
        return Seen("fine", {"x": 1})

    def broken(_: Setting) -> Seen:
        raise RuntimeError("no kernel\nfor this")

    out = tmp_path / "out.json"
    monkeypatch.setattr(gpu_check, "CHECKS", {"one": slow, "two": broken, "three": slow, "four": slow})
    rows = run_checks(setting, out, 540.0, now=lambda: clock[0], tell=lambda line: None)
    assert [row["verdict"] for row in rows] == ["PASS", "FAIL", "PASS", "NOT RUN"]
    assert rows[1]["text"] == "RuntimeError: no kernel" and [len(part) for part in seen] == [0, 2]
    assert json.loads(out.read_text()) == rows


def test_a_run_that_is_not_valid_fails(setting, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", setting.folder)
    (setting.folder / "train_gpt.py").write_text("import sys\nsys.exit('no data')\n")
    with pytest.raises(CheckFailed, match="no data"):
        CHECKS["a whole run"](setting)
