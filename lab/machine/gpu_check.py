"""The first ten minutes on a real GPU: what of the CUDA path works, and what it costs, check by check.

A check is a function of (setting) that returns a line of what it saw, with figures, or raises CheckFailed. Every result
is on the disk at once, because the machine is paid by the minute; checks that would begin after the time is up are
left out and said so. On a CPU the same checks run at toy size, which is how they are tested.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel

from golf.config.config import Config, with_knobs
from golf.model.block import causal_attention, visible_keys
from golf.model.init import build_model
from golf.model.segments import flash_runs, segment_attention, segment_bounds
from golf.quant.grid import RowGrids, quantize_rows
from golf.quant.site_operator import site_value
from golf.runtime import CUDNN_FIRST, Runtime, write_file_atomically
from lab.machine.fingerprint import gpu_states, machine_fingerprint
from lab.machine.step_times import random_tokens, time_steps

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_SECONDS = 540.0
"""After which no check begins: nine minutes."""
RUN_KNOBS = ("max_wallclock_seconds=40", "holdout_every=0", "eval_stride=1024", "train_log_every=50")
TIMED_STEPS, ATTENTION_ROUNDS = 20, 20
POWERS_AND_SINES = re.compile(r"(?:\.|::)(pow|cos|sin)\(")
"""Calls of them in generated Triton or C++, not the names of kernels that squared something."""


class CheckFailed(Exception):
    """Reports what a check found wrong."""


@dataclass(frozen=True)
class Setting:
    """What all checks are about."""

    config: Config
    runtime: Runtime
    folder: Path
    run_knobs: tuple[str, ...] = RUN_KNOBS
    """Of the whole runs, beside the preset."""


@dataclass(frozen=True)
class Seen:
    """What a check saw: a line, and its figures."""

    text: str
    figures: dict[str, Any] = field(default_factory=dict)


def require(holds: bool, message: str) -> None:
    """Raises CheckFailed unless `holds`."""
    if not holds:
        raise CheckFailed(message)


# ---- the checks, in the order of what they cost ----


def check_device(setting: Setting) -> Seen:
    """Reads driver, clocks and what torch was built for."""
    found = machine_fingerprint(setting.runtime, {}, setting.folder, setting.config)
    require(setting.runtime.device.type == "cpu" or bool(found["gpus"]), "torch sees no CUDA device")
    names = ", ".join(gpu["name"] for gpu in found["gpus"]) or found["cpu"] or "CPU"
    return Seen(f"{names}; driver {found['driver']}, torch {found['torch']}, CUDA {found['cuda']}", found)


def check_fake_quantization(setting: Setting) -> Seen:
    """Compares training's grid on the device with the exported codes and scales, bit for bit."""
    generator, grids, expected = torch.Generator().manual_seed(0), RowGrids(), []
    for bits in range(2, 9):
        for rows, columns in ((512, 512), (1536, 512), (512, 1536), (7, 33)):
            weight_RC = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(
                rows, 1, generator=generator
            )
            weight_RC[0] = 0.0
            codes_RC, scale_R = quantize_rows(weight_RC, bits)
            expected.append(codes_RC.float() * scale_R.float()[:, None])
            for dtype in (torch.float32, torch.bfloat16):
                grids.add(weight_RC.to(setting.runtime.device), bits, dtype)
    grids.renew()
    for place, (values_RC, bits) in enumerate(zip(grids.values, grids.bits, strict=True)):
        wrong = int((values_RC.cpu() != expected[place // 2].to(values_RC.dtype)).sum())
        require(wrong == 0, f"{wrong} of {values_RC.numel()} weights at {bits} bits differ from the exported ones")
    return Seen(f"{len(grids.values)} matrices of 2 to 8 bits equal the export, bit for bit")


SITE_TEXTS = ("int8", "unsigned8", "ternary", "ternary-leastsq-clipped-attached", "twosided8-attached", "int4-attached")


def check_site_quantizers(setting: Setting) -> Seen:
    """Compares activations on their grids, and gradients through them, with those of the CPU, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for text in SITE_TEXTS:
        for columns in (64, 512, 1536):
            x_RC, g_RC = torch.randn(2, 1000, columns, generator=generator)
            found = []
            for device in (torch.device("cpu"), setting.runtime.device):
                leaf_RC = x_RC.to(device, copy=True).requires_grad_()
                values_RC = site_value(leaf_RC, text, True, None)
                values_RC.backward(g_RC.to(device))
                found.append((values_RC.detach().cpu(), leaf_RC.grad.cpu()))
            wrong = [int((one != other).sum()) for one, other in zip(*found, strict=True)]
            require(wrong == [0, 0], f"{text}, rows of {columns}: {wrong} values and gradients differ from the CPU's")
    return Seen(f"{len(SITE_TEXTS)} quantizers of activations equal the CPU's, bit for bit")


def check_rotary_kernels(setting: Setting) -> Seen:
    """Counts powers, sines and cosines in the code that is generated for a training step."""
    if not setting.runtime.compiles:
        return Seen("nothing is compiled here")
    model = build_model(setting.config.model, 0, setting.runtime.compute_dtype).to(setting.runtime.device)
    length = setting.config.model.train_seq_len
    model.keep_rotary(length)
    ids_BT = torch.from_numpy(random_tokens(length, setting.config).astype("int64")).to(setting.runtime.device)[None]
    step = torch.compile(model, dynamic=False, fullgraph=True)
    _, codes = run_and_get_code(lambda: step(ids_BT, ids_BT).backward())
    called = Counter(name for code in codes for name in POWERS_AND_SINES.findall(code))
    require(not called, f"the generated kernels call {dict(called)}")
    return Seen(f"no power, sine or cosine is called in {len(codes)} graphs")


def check_step_time(setting: Setting, **knobs: str) -> Seen:
    """Times steps of the preset on random tokens."""
    endless = {"max_wallclock_seconds": "0", "iterations": "1000000", "holdout_every": "0"}
    _, seconds, _ = time_steps(with_knobs(setting.config, endless | knobs), setting.runtime, TIMED_STEPS)
    times = sorted(1000 * second for second in seconds)
    median = times[len(times) // 2]
    rate = setting.config.train.train_batch_tokens / median * 1000
    return Seen(f"median {median:.1f} ms a step, {rate:,.0f} tokens/s", {"ms": times, "tokens_per_second": rate})


def check_cudnn_steps(setting: Setting) -> Seen:
    """Times steps with cuDNN's attention tried first (attention_kernels=cudnn), which may need another plan."""
    torch.compiler.reset()
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return check_step_time(setting)


def check_attention(setting: Setting) -> Seen:
    """Times attention, forward and backward, by each kernel that can run it."""
    model, device = setting.config.model, setting.runtime.device
    rows = max(1, setting.config.train.micro_batch_tokens // model.train_seq_len)
    sizes = [(rows, heads, model.train_seq_len, model.model_dim // model.num_heads)
             for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]  # fmt: skip
    tensors = [torch.randn(s, dtype=setting.runtime.compute_dtype, device=device, requires_grad=True) for s in sizes]
    figures: dict[str, float | str] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            figures[backend.name] = time_attention(setting, tensors, backend)
        except RuntimeError as error:
            figures[backend.name] = str(error).strip().splitlines()[0][:120]
    shown = "; ".join(f"{n} {v:.2f} ms" if isinstance(v, float) else f"{n} can't" for n, v in figures.items())
    return Seen(shown, figures)


def time_attention(setting: Setting, tensors: list[torch.Tensor], backend: SDPBackend) -> float:
    """Returns milliseconds of a layer's attention, forward and backward. Raises RuntimeError where it can't run."""
    with sdpa_kernel([backend]):
        for round_ in range(ATTENTION_ROUNDS + 2):
            if round_ == 2:
                setting.runtime.synchronize()
                started = time.perf_counter()
            F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True).sum().backward()
        setting.runtime.synchronize()
    return 1000 * (time.perf_counter() - started) / ATTENTION_ROUNDS


def check_segments(setting: Setting) -> Seen:
    """Compares FlashAttention by segments with the mask: rows of random documents, without and with a window."""
    runtime, length = setting.runtime, setting.config.model.train_seq_len
    if not flash_runs(runtime.device, runtime.compute_dtype):
        return Seen("FlashAttention does not run here")
    generator, model = torch.Generator().manual_seed(0), setting.config.model
    start_BT = (torch.rand(2, length, generator=generator) < 8 / length) | (torch.arange(length) == 0)
    heads = model.num_heads, model.num_kv_heads, model.num_kv_heads
    parts = [torch.randn(2, count, length, model.model_dim // model.num_heads, generator=generator) for count in heads]
    parts = [part.to(runtime.device, runtime.compute_dtype) for part in parts]
    figures: dict[str, float] = {}
    for window in (0, length // 4):
        figures |= compare_segments(start_BT.to(runtime.device), parts, window)
    return Seen(f"as near to 64 bits as the mask: at most {max(figures.values()):.1e} off", figures)


def compare_segments(start_BT: torch.Tensor, parts: list[torch.Tensor], window: int) -> dict[str, float]:
    """Returns how far segments are from attention in 64 bits. Raises CheckFailed where that is more than three times as
    far as the mask, or where another first document moves a bit of the others."""
    document_BT, length, figures = start_BT.cumsum(1), start_BT.size(1), {}
    visible = visible_keys(length, length, 0, window, start_BT.device, document_BT)
    by_mask = partial(causal_attention, visible=visible)
    by_segments = partial(segment_attention, bounds=segment_bounds(start_BT), window=window)
    truth = values_and_gradients(by_mask, [part.double() for part in parts])
    found, masked = values_and_gradients(by_segments, parts), values_and_gradients(by_mask, parts)
    for name, right, mine, theirs in zip(("y", "dq", "dk", "dv"), truth, found, masked, strict=True):
        error, allowed = (float((part.double() - right).abs().max()) for part in (mine, theirs))
        figures[f"{name}, window {window}"] = error
        require(error <= 3 * allowed, f"{name}, window {window}: off by {error:.2e}, the mask by {allowed:.2e}")
    first_B1T1 = (document_BT == 1)[:, None, :, None]
    others = [part.where(~first_B1T1, part.flip(2)) for part in parts]
    before, after = (by_segments(*some).masked_fill(first_B1T1, 0.0) for some in (parts, others))
    require(torch.equal(before, after), f"window {window}: a document's values depend on another document")
    return figures


def values_and_gradients(attend: Callable[..., torch.Tensor], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns what attention gives, and the gradients of half its sum of squares by queries, keys and values."""
    parts = [part.clone().requires_grad_() for part in parts]
    y_BHTK = attend(*parts)
    return [y_BHTK.detach(), *torch.autograd.grad(y_BHTK, parts, y_BHTK.detach())]


def check_whole_run(setting: Setting, *knobs: str) -> Seen:
    """Trains, packs, reloads, scores and probes in a process of its own; every feature must have acted."""
    name = f"run{len(list(setting.folder.glob('run*')))}"
    words = [f"runs_root={setting.folder}", f"run_id={name}", *setting.run_knobs, *knobs]
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--preset", setting.config.run.preset, *words]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    result_path = setting.folder / name / "result.json"
    if not result_path.exists():
        raise CheckFailed((finished.stderr or finished.stdout).strip().splitlines()[-1][:300])
    result = json.loads(result_path.read_text(encoding="utf-8"))
    figures = {key: result[key] for key in ("val_bpb", "steps", "train_seconds", "eval_seconds", "bytes_total")}
    require(not result["findings"], "; ".join(result["findings"])[:500])
    lines = [line for line in finished.stdout.splitlines() if line.startswith("score:forecast")]
    parity = result["parity"]["largest_difference"]
    text = f"valid, {result['steps']:,} steps, {result['val_bpb']:.4f} bpb, parity {parity:.1e}"
    return Seen(text, figures | {"forecast": lines})


def check_memory(setting: Setting) -> Seen:
    """Reads the peak memory of this process's own checks, and what else is on the card."""
    if setting.runtime.device.type != "cuda":
        return Seen("no GPU memory here")
    peak = torch.cuda.max_memory_allocated(setting.runtime.device) >> 20
    return Seen(f"peak {peak:,} MiB", {"peak_mib": peak, "states": gpu_states()})


def check_marked_tests(setting: Setting) -> Seen:
    """Runs the tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    last = (finished.stdout.strip() or finished.stderr.strip()).splitlines()[-1]
    require(finished.returncode == 0, last)
    return Seen(last)


CHECKS: dict[str, Callable[[Setting], Seen]] = {
    "device": check_device,
    "fake quantization equals the export": check_fake_quantization,
    "activation quantizers equal the CPU's": check_site_quantizers,
    "rotary tables are inputs": check_rotary_kernels,
    "attention kernels": check_attention,
    "segments equal the mask": check_segments,
    "steps": check_step_time,
    "steps without QAT": lambda setting: check_step_time(setting, qat_enabled="0"),
    "steps with document attention": lambda setting: check_step_time(setting, document_attention="1"),
    "steps with cuDNN's attention first": lambda setting: check_cudnn_steps(setting),
    "a whole run": check_whole_run,
    "a whole run, water-filling": lambda setting: check_whole_run(
        setting, "quantizer=waterfill", "qat_enabled=0", "prune_frac=0", "codec=rans"
    ),
    "memory": check_memory,
    "marked tests": check_marked_tests,
}
"""By name, in their order."""


# ---- running them ----


def run_checks(
    setting: Setting,
    out: Path,
    seconds: float = DEFAULT_SECONDS,
    only: tuple[str, ...] = (),
    now: Callable[[], float] = time.monotonic,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs the checks (those named in `only`, or all) until the time is up; writes `out` after each. Returns rows of
    name, verdict (PASS, FAIL, NOT RUN), text, figures and seconds."""
    rows: list[dict[str, Any]] = []
    started = now()
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        begun = now()
        if begun - started >= seconds:
            row = {"name": name, "verdict": "NOT RUN", "text": f"{seconds:.0f} s were over", "figures": {}}
        else:
            row = {"name": name} | outcome(check, setting)
        rows.append(row | {"seconds": round(now() - begun, 2)})
        write_file_atomically(out, json.dumps(rows, indent=1, default=str) + "\n")
        tell(f"{row['verdict']:8} {name}: {row['text']}")
    return rows


def outcome(check: Callable[[Setting], Seen], setting: Setting) -> dict[str, Any]:
    """Runs one check; whatever it raises is its result, because the others are paid for too."""
    try:
        seen = check(setting)
        return {"verdict": "PASS", "text": seen.text, "figures": seen.figures}
    except CheckFailed as failure:
        return {"verdict": "FAIL", "text": str(failure), "figures": {}}
    except Exception as error:  # a finding, whatever it was
        first = next(iter(str(error).strip().splitlines()), "")
        return {"verdict": "FAIL", "text": f"{type(error).__name__}: {first}"[:500], "figures": {}}
