"""The machine's fingerprint: complete, plain, the same twice, never in a run's way. pytest tests/test_machine.py"""

import json
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from golf.config.config import Config, build_config
from golf.model.block import causal_attention
from golf.runtime import Runtime, compile_fault
from lab.machine.fingerprint import attention_backend, folder_executes, gpu_states, machine_fingerprint, parse_gpu_query

KEYS = {
    "machine_id", "platform", "python", "torch", "cuda", "cudnn", "nccl", "device", "world_size", "compile", "compiler",
    "gpus", "driver", "gpu_states", "cpu", "cpu_cores", "torch_threads", "memory_gib", "environment", "attention",
    "codecs", "free_bytes", "temporary_executable",
}  # fmt: skip
NVIDIA_SMI = """\
1980, 1980, 2619, 2619, 700.00, 4, 550.54.15
345, 1980, [N/A], [Not Supported], [N/A], 71234, 550.54.15
"""
SMALL = {"vocab_size": "64", "model_dim": "32", "train_seq_len": "16", "eval_seq_len": "32", "eval_stride": "8"}


@pytest.fixture
def config() -> Config:
    return build_config("local", {}, SMALL | {"train_batch_tokens": "64", "micro_batch_tokens": "64"})


@pytest.fixture
def take(config, tmp_path):
    """Takes a fingerprint with this environment."""

    def take_with(**environ: str) -> dict:
        return machine_fingerprint(Runtime(torch.device("cpu")), environ, tmp_path / "not" / "there", config)

    return take_with


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script called nvidia-smi at the front of PATH."""

    def install(text: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "nvidia-smi").chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def test_fingerprint_is_complete_and_plain(take):
    fingerprint = take()
    assert set(fingerprint) == KEYS
    assert json.loads(json.dumps(fingerprint, allow_nan=False)) == fingerprint
    assert fingerprint["torch"] == torch.__version__ and fingerprint["device"] == "cpu"
    assert fingerprint["torch_threads"] == torch.get_num_threads() == 1
    assert fingerprint["free_bytes"]["run"] > 0 and fingerprint["free_bytes"]["temporary"] > 0
    assert set(fingerprint["codecs"]) == {"lzma", "zlib", "zstandard", "brotli"} and fingerprint["codecs"]["lzma"]


def test_a_machine_has_one_id_that_says_nothing_about_it(take, monkeypatch):
    before = take()
    assert before["machine_id"] == take()["machine_id"]
    assert len(bytes.fromhex(before["machine_id"])) == 6
    monkeypatch.setattr(platform, "node", lambda: "a-host-of-another-name")
    after = take()
    assert after["machine_id"] != before["machine_id"] and "a-host-of-another-name" not in json.dumps(after)


def test_only_variables_of_speed_and_numerics_are_kept(take):
    environ = {
        "NCCL_IB_DISABLE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_ALLOC_CONF": "x",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    }
    others = {
        "API_TOKEN": "secret",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp",
        "CUDA_HOME": "/opt/cuda",
        "TORCHELASTIC_RUN_ID": "7",
    }
    assert take(**environ, **others)["environment"] == environ


def test_fingerprint_takes_no_random_numbers(take):
    before = torch.get_rng_state()
    take()
    assert torch.equal(torch.get_rng_state(), before)


def profiled_attention(config: Config, queries: int, time: int) -> str:
    """What the profiler says ran below scaled_dot_product_attention, in the spelling of autograd's nodes."""
    heads, kv_heads, width = config.model.num_heads, config.model.num_kv_heads, config.model.model_dim
    shapes = ((queries, heads), (time, kv_heads), (time, kv_heads))
    parts = [torch.zeros(1, length, count, width // heads).transpose(1, 2) for length, count in shapes]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        causal_attention(*parts)
    name = next(event.name for event in profile.events() if event.name.startswith("aten::_scaled_dot_product"))
    return "math" if name.endswith("_math") else name.removeprefix("aten::").title().replace("_", "")


def test_attention_is_what_the_profiler_sees(config, take):
    backends = take()["attention"]
    assert backends["training"] == profiled_attention(config, 16, 16)
    assert backends["scoring"] == profiled_attention(config, 8, 32)


@pytest.mark.parametrize(("queries", "time"), [(16, 16), (8, 32)])
def test_plain_attention_is_recognised(config, queries, time):
    runtime = Runtime(torch.device("cpu"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert attention_backend(runtime, config.model, queries, time) == "ScaledDotProductFlashAttentionForCpu"
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_backend(runtime, config.model, queries, time) == "math"
        assert profiled_attention(config, queries, time) == "math"


def test_what_nvidia_smi_says_is_read():
    first, second = parse_gpu_query(NVIDIA_SMI)
    assert first == {
        "sm_mhz": 1980.0, "sm_max_mhz": 1980.0, "memory_mhz": 2619.0, "memory_max_mhz": 2619.0, "power_limit_w": 700.0,
        "memory_used_mib": 4.0, "driver": "550.54.15",
    }  # fmt: skip
    assert second["sm_mhz"] == 345.0 and second["memory_used_mib"] == 71234.0 and second["driver"] == "550.54.15"
    assert second["memory_mhz"] is second["memory_max_mhz"] is second["power_limit_w"] is None
    assert parse_gpu_query("") == []


def test_nvidia_smi_is_asked_for_what_is_read(program, take, tmp_path):
    program(f"""echo "$@" > "$0.asked"; printf '%s' '{NVIDIA_SMI}'""")
    assert gpu_states() == parse_gpu_query(NVIDIA_SMI)
    assert take()["driver"] == "550.54.15"
    asked = (tmp_path / "nvidia-smi.asked").read_text().split()
    assert asked[0].removeprefix("--query-gpu=").split(",")[4:] == ["power.limit", "memory.used", "driver_version"]
    assert asked[1] == "--format=csv,noheader,nounits"


def test_a_driver_that_fails_is_no_driver(program):
    program("echo 'NVIDIA-SMI has failed'; exit 9")
    assert gpu_states() is None


def test_what_is_missing_is_none(take, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi, no compiler
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # no /proc/cpuinfo
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    compile_fault.cache_clear()
    fingerprint = take()
    compile_fault.cache_clear()
    assert fingerprint["gpu_states"] is fingerprint["driver"] is fingerprint["cpu"] is None
    assert fingerprint["codecs"]["zstandard"] is None and fingerprint["codecs"]["zlib"]
    assert fingerprint["compiler"] is False and fingerprint["cpu_cores"] == os.cpu_count()


def test_a_folder_where_programs_may_run(tmp_path, monkeypatch):
    assert folder_executes(tmp_path) and folder_executes(tmp_path / "to" / "be" / "made")
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)  # the kernel refuses, as it does on a noexec mount
    assert not folder_executes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files(take):
    assert not folder_executes(Path("/proc"))
    assert take()["temporary_executable"] and not take(TORCHINDUCTOR_CACHE_DIR="/proc")["temporary_executable"]
