"""Judges what a machine's fingerprint, data and step times say about a run that would start on it, and what to do."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from golf.artifact.description import expected_shapes
from golf.config.config import KNOBS, Config, changed_knobs, with_knobs
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.data.manifest import data_identity
from golf.data.shards import find_shards
from golf.data.tokenizer import load_tokenizer
from golf.run.datasets import (
    check_vocabulary,
    corpus_tokenizer,
    tokenizer_beside,
    with_tokenizer_path,
    with_vocabulary,
)
from lab.machine.plan import EXPECTED_STEP_SECONDS
from lab.prepare.prepare import Preparation, preparation_folder

CODEC_PACKAGES = {"lzma": "lzma", "zlib": "zlib", "zstd": "zstandard", "brotli": "brotli"}
"""Module that each codec of the configuration needs."""
NCCL_SWITCHES = ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE")
LOWEST_CLOCK = 0.85
"""Share of its highest clock under which a GPU counts as slowed; power limits alone cost some of the rest."""
OWN_GPU_MIB = 2048
"""Most GPU memory that this process's own context explains before a model is built."""
LARGEST_SPREAD = 0.2
"""Interquartile range of step times, as a share of the median, above which the machine is not quiet."""
MACHINE_DRIFT = 0.15
"""Share by which the speed of one machine was seen to drift (docs/LOG.md)."""
RUN_FILES_BYTES = 100_000_000
"""Room for log, pictures, code and artifact of a run."""
DATA_REMEDY = (
    "put the competition's export there, or name yours with data_path= and tokenizer_path= (data/README.md); "
    "or train on other text: python train_gpt.py --corpus embedded"
)
SPEED_SECTIONS = ("model", "optim", "quant")
SPEED_KNOBS = {knob for knob, (section, _) in KNOBS.items() if section in SPEED_SECTIONS} | {
    "train_batch_tokens", "micro_batch_tokens", "device", "compile", "threads",
}  # fmt: skip
"""Knobs that change how long a step takes: a band that was measured with others says nothing."""


@dataclass(frozen=True)
class MachineFinding:
    code: str
    """Stable, for programs."""
    severity: Literal["error", "warning", "note"]
    """error: the run would fail; warning: it would be slower or other than it could be; note: good to know."""
    text: str
    remedy: str


@dataclass(frozen=True)
class StepBand:
    """Seconds per step that a preset is expected to take on the machine that is named."""

    low: float
    high: float
    machine: str


def diagnose(
    fingerprint: Mapping[str, Any],
    config: Config,
    pinned_torch: str | None = None,
    states_under_load: Sequence[Mapping[str, Any]] | None = None,
) -> list[MachineFinding]:
    """Returns all findings, errors first. `states_under_load` is gpu_states() right after some training."""
    findings = [
        *device_findings(fingerprint, config),
        *software_findings(fingerprint, config, pinned_torch),
        *storage_findings(fingerprint, config),
        *setting_findings(fingerprint),
        *gpu_findings(fingerprint, states_under_load),
    ]
    return errors_first(findings)


def errors_first(findings: Sequence[MachineFinding]) -> list[MachineFinding]:
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def device_findings(fingerprint: Mapping[str, Any], config: Config) -> Iterator[MachineFinding]:
    run, compiler = config.run, fingerprint.get("compiler")
    if run.device != "cpu" and fingerprint.get("device") != "cuda":
        yield MachineFinding(
            "no-cuda", "error", f"the preset {run.preset} wants a GPU (device={run.device}); torch sees none",
            "run on a machine with GPUs, mend the driver (nvidia-smi must work) or install a torch with CUDA; "
            "or say device=cpu, or take the preset local",
        )  # fmt: skip
    if run.compile != "off" and not compiler:
        effect = "a run would stop" if run.compile == "on" else "a run goes without torch.compile and is slower"
        yield MachineFinding(
            "no-compiler", "error" if run.compile == "on" else "note",
            f"compile={run.compile}, but torch.compile fails here: {effect}",
            "install g++ and python3-dev (compile=on says in one line what fails), or say compile=off",
        )  # fmt: skip
    if run.compile != "off" and not fingerprint.get("temporary_executable"):
        yield MachineFinding(
            "temporary-not-executable", "error" if compiler else "note",
            "no program may run from the temporary folder (mounted noexec?): torch.compile would fail",
            "set TMPDIR and TORCHINDUCTOR_CACHE_DIR to a folder where programs may run, or say compile=off",
        )  # fmt: skip


def software_findings(
    fingerprint: Mapping[str, Any], config: Config, pinned_torch: str | None
) -> Iterator[MachineFinding]:
    torch_version, codec = str(fingerprint.get("torch")), config.quant.codec
    if pinned_torch and torch_version.partition("+")[0] != pinned_torch:
        yield MachineFinding(
            "torch-version", "warning", f"torch is {torch_version}; everything was measured with {pinned_torch}",
            f"pip install torch=={pinned_torch} (bash run.sh does it)",
        )  # fmt: skip
    package = CODEC_PACKAGES.get(codec)
    if package and not (fingerprint.get("codecs") or {}).get(package):
        yield MachineFinding(
            "codec-missing", "error", f"codec={codec} needs the Python package {package}, which is not here",
            "pip install zstandard, or say codec=lzma" if codec == "zstd" else f"use a Python that has {package}",
        )  # fmt: skip
    slow = [name for name, backend in (fingerprint.get("attention") or {}).items() if backend == "math"]
    if slow and fingerprint.get("device") == "cuda":
        yield MachineFinding(
            "attention-math", "warning", f"attention of {' and '.join(slow)} runs in plain matrix products: "
            "no fused kernel takes these shapes, which costs 15 % of the steps or more",
            "use the torch of requirements.txt, and a head width (model_dim / num_heads) of 64 or 128",
        )  # fmt: skip


def run_bytes(model: ModelConfig) -> int:
    """Returns the disk that a run needs: weights, average and optimizer of a checkpoint in fp32, and its files."""
    elements = sum(math.prod(shape) for shape in expected_shapes(model).values())
    return 4 * 4 * elements + RUN_FILES_BYTES


def storage_findings(fingerprint: Mapping[str, Any], config: Config) -> Iterator[MachineFinding]:
    places = {
        "run": ("the run folder's", run_bytes(config.model), "put runs elsewhere with runs_root=FOLDER"),
        "temporary": ("the temporary folder's", RUN_FILES_BYTES, "set TMPDIR to another folder"),
    }
    for place, free in (fingerprint.get("free_bytes") or {}).items():
        whose, needed, way_out = places[place]
        if free is not None and free < needed:
            yield MachineFinding(
                "disk-full", "error" if place == "run" else "warning",
                f"{whose} disk has {free / 1e6:,.0f} MB free; a run of this model needs about {needed / 1e6:,.0f} MB",
                f"free some, or {way_out}",
            )  # fmt: skip


def setting_findings(fingerprint: Mapping[str, Any]) -> Iterator[MachineFinding]:
    environment, world_size = fingerprint.get("environment") or {}, fingerprint.get("world_size") or 1
    for name in NCCL_SWITCHES:
        if environment.get(name, "0") != "0":
            yield MachineFinding(
                "nccl-switch", "warning", f"{name}={environment[name]} makes GPUs talk the slow way",
                f"unset {name}, unless the machine hangs without it",
            )  # fmt: skip
    threads, cores = (fingerprint.get("torch_threads") or 0) * world_size, fingerprint.get("cpu_cores")
    if cores and threads > cores:
        yield MachineFinding(
            "too-many-threads", "warning", f"{threads} CPU threads share {cores} cores: they wait for each other",
            f"say threads={max(1, cores // world_size)}, or set OMP_NUM_THREADS to it",
        )  # fmt: skip


def gpu_findings(
    fingerprint: Mapping[str, Any], states_under_load: Sequence[Mapping[str, Any]] | None
) -> Iterator[MachineFinding]:
    at_rest = fingerprint.get("gpu_states") or []
    slow = [
        f"GPU {index} {part} {state[now]:,.0f} of {state[most]:,.0f} MHz"
        for index, state in enumerate(at_rest if states_under_load is None else states_under_load)
        for part, now, most in (("SM", "sm_mhz", "sm_max_mhz"), ("memory", "memory_mhz", "memory_max_mhz"))
        if state.get(now) and state.get(most) and state[now] < LOWEST_CLOCK * state[most]
    ]
    if slow:
        when = "at rest, which can be normal" if states_under_load is None else "under load"
        yield MachineFinding(
            "clocks-low", "note" if states_under_load is None else "warning", f"clocks {when}: {', '.join(slow)}",
            "look at nvidia-smi -q -d CLOCK,PERFORMANCE,POWER (heat, power limit); give a slow pod back",
        )  # fmt: skip
    shared = [
        f"GPU {index} {state['memory_used_mib']:,.0f} MiB"
        for index, state in enumerate(at_rest)
        if (state.get("memory_used_mib") or 0) > OWN_GPU_MIB
    ]
    if shared:
        yield MachineFinding(
            "gpu-shared", "warning", f"GPU memory is in use before a model was built: {', '.join(shared)}",
            "find the process that holds it with nvidia-smi, or choose other GPUs (CUDA_VISIBLE_DEVICES)",
        )  # fmt: skip


def pinned_version(requirements: str, package: str) -> str | None:
    """Returns the version that a requirements file asks for exactly; None where it does not."""
    found = re.search(rf"(?m)^{re.escape(package)}==([^\s;#]+)", requirements)
    return found[1] if found else None


def inspect_data(config: Config, cache: Path) -> tuple[dict[str, str], list[MachineFinding]]:
    """Finds where the run's data is and what it is ({folder, data_id, tokenizer_sha256}), and what is wrong with it.

    `cache` is the folder of prepared corpora. Data that is not there is told by a finding and an empty dictionary.
    """
    try:
        if config.data.data_path:
            config = with_tokenizer_path(config)
        else:
            prepared = preparation_folder(Preparation(config.data.corpus, corpus_tokenizer(config)), cache)
            if not prepared.exists():
                return {}, [unprepared(config)]
            paths = {"data_path": str(prepared), "tokenizer_path": str(tokenizer_beside(prepared))}
            config = with_knobs(config, paths)
        folder = config.data.data_path
        for split in ("train", "val"):
            find_shards(folder, split)
        tokenizer = load_tokenizer(config.data.tokenizer_path)
        check_vocabulary(with_vocabulary(config), tokenizer)
        identity = data_identity(folder, tokenizer)
    except (UserError, OSError) as error:
        return {}, [MachineFinding("data-missing", "error", str(error), DATA_REMEDY)]
    return {"folder": folder, "data_id": identity, "tokenizer_sha256": tokenizer.sha256}, []


def unprepared(config: Config) -> MachineFinding:
    return MachineFinding(
        "data-missing", "note", f"the corpus {config.data.corpus} is not prepared yet; a run does that when it starts",
        f"python data/prepare.py --input {config.data.corpus} --tokenizer {corpus_tokenizer(config)}",
    )  # fmt: skip


def step_figures(step_seconds: Sequence[float]) -> dict[str, float]:
    """Returns milliseconds per step: median, quartiles, extremes. At least two steps."""
    quartiles = statistics.quantiles(step_seconds, n=4, method="inclusive")
    names = ("quartile_1_ms", "median_ms", "quartile_3_ms", "fastest_ms", "slowest_ms")
    values = (*quartiles, min(step_seconds), max(step_seconds))
    return {name: 1000 * value for name, value in zip(names, values, strict=True)}


def expected_band(preset: str) -> StepBand | None:
    """Returns the time of a step that is expected of a preset as it is, give or take what one machine drifts."""
    if preset not in EXPECTED_STEP_SECONDS:
        return None
    seconds, machine = EXPECTED_STEP_SECONDS[preset]
    return StepBand((1 - MACHINE_DRIFT) * seconds, (1 + MACHINE_DRIFT) * seconds, machine)


def machine_name(fingerprint: Mapping[str, Any]) -> str:
    """Names this machine as EXPECTED_STEP_SECONDS begins to name one: "8xH100", "2 cores of an AMD EPYC"."""
    if fingerprint.get("device") == "cuda":
        name = ((fingerprint.get("gpus") or [{}])[0].get("name") or "GPU").removeprefix("NVIDIA ")
        model = re.match(r"[A-Z]+\d+", name)  # H100 80GB HBM3 is the one that is called H100
        variant = re.search(r" PCIe| NVL", name)
        return f"{fingerprint.get('world_size')}x{model[0] if model else name}{variant[0] if variant else ''}"
    cores, threads = fingerprint.get("cpu_cores"), fingerprint.get("torch_threads")
    return f"{f'{threads} of ' if threads != cores else ''}{cores} cores of an {fingerprint.get('cpu')}"


def diagnose_speed(
    figures: Mapping[str, float], config: Config, machine: str, band: StepBand | None
) -> list[MachineFinding]:
    """Compares step_figures with the band of the preset; `machine` is machine_name of this one."""
    low, median, high = (figures[name] for name in ("quartile_1_ms", "median_ms", "quartile_3_ms"))
    budget = f"steps in the budget would be about {steps_in_budget(config, median / 1000):,.0f}"
    findings, reason = [], band_reason(config, machine, band)
    if high - low > LARGEST_SPREAD * median:
        findings.append(
            MachineFinding(
                "unsteady", "warning", f"the middle half of the steps spreads over {low:,.1f} to {high:,.1f} ms",
                "look for other processes (top, nvidia-smi) and for heat, and measure again",
            )
        )  # fmt: skip
    if band is None or reason:
        plain = f"{median:,.1f} ms per step; {budget}; {reason}"
        findings.append(MachineFinding("no-band", "note", plain, "compare with other runs of this machine"))
    elif median > 1000 * band.high:
        slower, place = 2 * median / 1000 / (band.low + band.high) - 1, band.machine.partition(",")[0]
        expected = f"{median:,.1f} ms per step, expected {band_text(band)}"
        findings.append(
            MachineFinding(
                "slow-machine", "warning",
                f"this machine is {slower:.0%} slower than {place}: {expected}; {budget}",
                "look at clocks, other processes and threads; give the pod back",
            )
        )  # fmt: skip
    return errors_first(findings)


def band_reason(config: Config, machine: str, band: StepBand | None) -> str:
    """Says why no band applies; empty where it does."""
    changed = sorted(SPEED_KNOBS & set(changed_knobs(config)))
    if band is None:
        return f"the preset {config.run.preset} has no expected time of a step"
    if changed:
        return f"the preset's expected time is for other values of {', '.join(changed)}"
    if not f"{band.machine},".startswith((f"{machine},", f"{machine} virtual machine,")):
        return f"the preset's expected time does not apply: it is that of {band.machine}; this is {machine}"
    return ""


def band_text(band: StepBand) -> str:
    return f"{1000 * band.low:,.1f} to {1000 * band.high:,.1f}"


def steps_in_budget(config: Config, step_seconds: float) -> float:
    train = config.train
    by_clock = train.max_wallclock_seconds / step_seconds if train.max_wallclock_seconds else math.inf
    return min(by_clock, train.iterations or math.inf)
