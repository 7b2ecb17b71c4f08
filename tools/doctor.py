"""Says whether this machine is fit for a run: its fingerprint, the preset's data, a throughput probe, and what to do.

    python tools/doctor.py [--preset P] [--json] [--skip-probe] [key=value ...]
    torchrun --standalone --nproc_per_node=8 tools/doctor.py        (the probe on all GPUs)

The probe takes 20 timed steps of the preset's training on random tokens, after its warm-up.
Exit status: 0 no errors, 1 errors, 2 bad input.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.config import Config, build_config
from golf.config.knobs import EXIT_FINDINGS
from golf.run.command import parse_overrides
from golf.runtime import Log, Runtime, leave, start_runtime
from lab.cli import ToolOptions, run_command
from lab.machine.diagnosis import (
    MachineFinding,
    band_reason,
    band_text,
    device_findings,
    diagnose,
    diagnose_speed,
    errors_first,
    expected_band,
    inspect_data,
    machine_name,
    pinned_version,
    step_figures,
)
from lab.machine.fingerprint import machine_fingerprint
from lab.machine.step_times import time_steps

ROOT = Path(__file__).resolve().parents[1]
PROBE_STEPS = 20
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Options(ToolOptions):
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Knobs as key=value."""
    preset: str = ""
    """The preset that is to run here; by default leaderboard where there is a GPU, else local."""
    skip_probe: bool = False
    """Take no training steps."""


def forgiving(config: Config) -> Config:
    """Returns `config` for a runtime that starts on any machine: what is missing becomes a finding, not an end."""
    run = config.run
    device = "cpu" if run.device == "cpu" else "auto"
    return replace(config, run=replace(run, device=device, compile="off" if run.compile == "off" else "auto"))


def probe_training(config: Config, runtime: Runtime) -> tuple[list[float], list[dict[str, Any]] | None]:
    """Returns the seconds of each timed step of the preset's training, and the GPUs' clocks right after the last one.

    The budget is put out of reach: every step is one from the beginning of a run.
    """
    endless = replace(config, train=replace(config.train, max_wallclock_seconds=0.0, iterations=1_000_000))
    _, step_seconds, states = time_steps(endless, runtime, PROBE_STEPS)
    return step_seconds, states


def examine(options: Options, config: Config, status: Console) -> dict[str, Any] | None:
    """Returns all that is found, as plain values; None on ranks that have nothing to say."""
    pinned = pinned_version((ROOT / "requirements.txt").read_text(encoding="utf-8"), "torch")
    with open(os.devnull, "w") as silence, start_runtime(forgiving(config).run, "doctor", Log(silence)) as runtime:
        fingerprint = machine_fingerprint(runtime, os.environ, Path(config.run.runs_root), config)
        findings = diagnose(fingerprint, config, pinned)
        probe: dict[str, Any] = {}
        blocked = any(finding.severity == "error" for finding in device_findings(fingerprint, config))
        if not options.skip_probe and not blocked:
            with status.status(f"{PROBE_STEPS} steps of {config.run.preset}, after its warm-up"):
                probe, findings = probe_and_diagnose(options, config, runtime, fingerprint, pinned)
        if not runtime.is_main:
            return None
    data, data_findings = inspect_data(config, ROOT / "data" / "cache")
    return {
        "preset": config.run.preset,
        "fingerprint": fingerprint,
        "data": data,
        "probe": probe,
        "probe_blocked": blocked and not options.skip_probe,
        "findings": [asdict(finding) for finding in errors_first(findings + data_findings)],
    }


def probe_and_diagnose(
    options: Options, config: Config, runtime: Runtime, fingerprint: dict[str, Any], pinned: str | None
) -> tuple[dict[str, Any], list[MachineFinding]]:
    """Returns the probe's figures, and the findings with what the probe added to them."""
    try:
        step_seconds, states = probe_training(config, runtime)
    except RuntimeError as error:  # out of memory, or a compiler that fails: torch has no nearer class for all of them
        if options.debug:
            raise
        return {}, [*diagnose(fingerprint, config, pinned), probe_failure(error)]
    machine, figures, band = machine_name(fingerprint), step_figures(step_seconds), expected_band(config.run.preset)
    expected = f"{band_text(band)} on {band.machine}" if band and not band_reason(config, machine, band) else None
    findings = diagnose(fingerprint, config, pinned, states) + diagnose_speed(figures, config, machine, band)
    return {"steps": len(step_seconds), "machine": machine, "expected_ms": expected} | figures, findings


def probe_failure(error: RuntimeError) -> MachineFinding:
    what = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return MachineFinding("out-of-memory", "error", what, "lower micro_batch_tokens, or use a larger GPU")
    return MachineFinding("probe-failed", "error", what, "tools/doctor.py --debug shows where; compile=off may help")


# ---- what a person sees ----


def fingerprint_rows(fingerprint: dict[str, Any]) -> Iterator[tuple[str, str]]:
    told = {name: "-" if value is None else value for name, value in fingerprint.items()}
    free = fingerprint["free_bytes"]
    compiles = f"compile {'on' if told['compile'] else 'off'}, compiler {'here' if told['compiler'] else 'missing'}"
    cpu = f"{told['cpu']}, {told['cpu_cores']} cores, {told['torch_threads']} torch threads, {told['memory_gib']} GiB"
    yield "machine", f"{told['machine_id']}  {told['platform']}"
    yield (
        "software",
        ", ".join(f"{name} {told[name]}" for name in ("python", "torch", "cuda", "cudnn", "nccl", "driver")),
    )
    yield "computes on", f"{told['device']}, world size {told['world_size']}, {compiles}"
    for index, gpu in enumerate(fingerprint["gpus"]):
        yield f"GPU {index}", f"{gpu['name']}, capability {gpu['capability']}, {gpu['mib']:,} MiB"
    for index, state in enumerate(fingerprint["gpu_states"] or []):
        yield f"GPU {index} now", state_text(state)
    yield "CPU", cpu
    yield "attention", "\n".join(f"{name}: {backend}" for name, backend in fingerprint["attention"].items())
    yield "codecs", ", ".join(f"{name} {version or '-'}" for name, version in fingerprint["codecs"].items())
    yield "free disk", f"run {free['run'] / 1e9:,.1f} GB, temporary {free['temporary'] / 1e9:,.1f} GB"
    yield "temporary folder", "programs may run" if fingerprint["temporary_executable"] else "no program may run"
    yield "environment", "\n".join(f"{name}={value}" for name, value in fingerprint["environment"].items()) or "-"


def state_text(state: dict[str, Any]) -> str:
    """Returns the clocks, power and memory of a GPU, as far as it tells them."""
    parts = [
        f"{part} {state[now]:,.0f} of {state[most]:,.0f} MHz"
        for part, now, most in (("SM", "sm_mhz", "sm_max_mhz"), ("memory", "memory_mhz", "memory_max_mhz"))
        if state.get(now) and state.get(most)
    ]
    parts += [f"{state['power_limit_w']:,.0f} W"] if state.get("power_limit_w") else []
    parts += [f"{state['memory_used_mib']:,.0f} MiB used"] if state.get("memory_used_mib") is not None else []
    return ", ".join(parts) or "-"


def data_and_probe_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    data, probe = report["data"], report["probe"]
    if data:
        yield "data", f"{data['folder']}\ndata_id {data['data_id']}\ntokenizer {data['tokenizer_sha256']}"
    if probe:
        middle = f"middle half {probe['quartile_1_ms']:,.1f} to {probe['quartile_3_ms']:,.1f}"
        ends = f"all {probe['fastest_ms']:,.1f} to {probe['slowest_ms']:,.1f}"
        expected = f"\nexpected {probe['expected_ms']}" if probe["expected_ms"] else ""
        yield f"{probe['steps']} steps", f"median {probe['median_ms']:,.1f} ms, {middle}, {ends}{expected}"
    if report["probe_blocked"]:
        yield "steps", "not taken: mend the errors first"


def print_report(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['preset']} on this machine", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*fingerprint_rows(report["fingerprint"]), *data_and_probe_rows(report)):
        table.add_row(name, escape(value))
    console.print(table)
    for finding in report["findings"]:
        colour, text = COLOURS[finding["severity"]], escape(finding["text"])
        console.print(f"[{colour}]{finding['severity']}[/] {finding['code']}: {text}", soft_wrap=True)
        console.print(f"    -> {escape(finding['remedy'])}", soft_wrap=True, highlight=False)
    if not report["findings"]:
        console.print("[green]fine: nothing found[/]")


def work(options: Options) -> int:
    preset = options.preset or ("leaderboard" if torch.cuda.is_available() else "local")
    named = {"preset": options.preset} if options.preset else {}
    config = build_config(preset, os.environ, parse_overrides(options.overrides) | named)
    report = examine(options, config, Console(stderr=True))
    if report is None:
        return 0
    if options.json:
        print(json.dumps(report, allow_nan=False))
    else:
        print_report(report, Console())
    return EXIT_FINDINGS if any(finding["severity"] == "error" for finding in report["findings"]) else 0


if __name__ == "__main__":
    leave(run_command(Options, __doc__, work))
