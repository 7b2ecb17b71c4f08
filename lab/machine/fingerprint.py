"""The machine's fingerprint: what of hardware, software and settings changes speed or numerics.

What is not there, or can't be asked, is None: a fingerprint never stops a run.
"""

import hashlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from golf.config.config import Config
from golf.config.model import ModelConfig
from golf.model.block import causal_attention
from golf.model.segments import flash_runs
from golf.runtime import Runtime, choose_compile

SPEED_VARIABLE = re.compile(r"(NCCL|CUDA|TORCH|TORCHINDUCTOR|OMP|MKL|PYTORCH)_(?!.*(DIR|HOME|PATH)$)")
"""Environment variables that change speed or numerics; names of folders change neither."""
GPU_QUERY = {
    "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem", "power_limit_w": "power.limit", "memory_used_mib": "memory.used",
    "driver": "driver_version",
}  # fmt: skip
"""Our names, and those of nvidia-smi."""


def machine_fingerprint(runtime: Runtime, environ: Mapping[str, str], folder: Path, config: Config) -> dict[str, Any]:
    """Plain JSON values; `folder` is the run's (it need not exist yet). `machine_id` is equal for runs of one machine,
    and its name can't be read back from it."""
    model, cuda, states = config.model, torch.cuda.is_available(), gpu_states()
    places = {"run": folder, "temporary": Path(tempfile.gettempdir())}
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if cuda else 0)]
    identity = "\n".join([platform.node(), str(cpu_model()), *(card.name for card in cards)])
    nccl = cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "machine_id": hashlib.sha256(identity.encode()).hexdigest()[:12],
        "platform": platform.platform(), "python": platform.python_version(), "torch": str(torch.__version__),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "device": runtime.device.type, "world_size": runtime.world_size, "compile": runtime.compiles,
        "compiler": choose_compile("auto", runtime.device),
        "gpus": [{"name": c.name, "capability": f"{c.major}.{c.minor}", "mib": c.total_memory >> 20} for c in cards],
        "driver": states[0].get("driver") if states else None,
        "gpu_states": states,
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "environment": {name: environ[name] for name in sorted(environ) if SPEED_VARIABLE.match(name)},
        "attention": {
            "training": attention_backend(runtime, model, model.train_seq_len, model.train_seq_len),
            "scoring": attention_backend(runtime, model, config.score.eval_stride, config.score.eval_seq_len),
        },
        "codecs": {name: codec_version(name) for name in ("lzma", "zlib", "zstandard", "brotli")},
        "free_bytes": {name: shutil.disk_usage(nearest_folder(path)).free for name, path in places.items()},
        "temporary_executable": folder_executes(Path(environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())),
    }  # fmt: skip


def cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or None


def gpu_states() -> list[dict[str, Any]] | None:
    """Clocks, power limits, used memory and drivers of all GPUs at this moment; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        return parse_gpu_query(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def parse_gpu_query(text: str) -> list[dict[str, Any]]:
    """One dictionary per line of comma-separated values; what a card does not tell ("[N/A]") is None."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    numbers = [[float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None for value in row] for row in rows]
    return [dict(zip(GPU_QUERY, [*told[:-1], row[-1]], strict=False)) for told, row in zip(numbers, rows, strict=True)]


def codec_version(module: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return str(getattr(found, "ZLIB_RUNTIME_VERSION", getattr(found, "__version__", "present")))


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def folder_executes(folder: Path) -> bool:
    """Whether a program that is written to `folder` may run: torch.compile builds there and loads what it built."""
    try:
        with tempfile.TemporaryDirectory(dir=nearest_folder(folder)) as scratch:
            script = Path(scratch, "probe")
            script.write_text("#!/bin/sh\n")
            script.chmod(0o700)
            return subprocess.run([script], timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def attention_backend(runtime: Runtime, model: ModelConfig, queries: int, time: int) -> str | None:
    """The kernel that runs below scaled_dot_product_attention for the last `queries` of `time` positions, from
    autograd's own record: "math" where no fused kernel did, None where neither left a trace. Takes no random numbers.
    (torch.profiler tells the same, but takes 1 s and writes to the terminal.)"""
    segments = (model.document_attention or model.attention_window) and not model.knowledge_tokens
    if segments and flash_runs(runtime.device, runtime.compute_dtype):
        return "FlashAttention by segments"
    options = {"dtype": runtime.compute_dtype, "device": runtime.device, "requires_grad": True}
    sizes = ((queries, model.num_heads), (time, model.num_kv_heads), (time, model.num_kv_heads))
    shapes = ((1, length, heads, model.model_dim // model.num_heads) for length, heads in sizes)
    y_BHSK = causal_attention(*(torch.zeros(shape, **options).transpose(1, 2) for shape in shapes))
    nodes, names = [y_BHSK.grad_fn], []
    for node in nodes:  # grows on the way
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following]
    fused = [name.partition("Backward")[0] for name in names if name.startswith("ScaledDotProduct")]
    return fused[0] if fused else "math" if any("Bmm" in name for name in names) else None
