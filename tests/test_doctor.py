"""The doctor: every finding planted in a sound fingerprint, bands of step times, data, and the program.

pytest tests/test_doctor.py
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from golf.config.config import Config, build_config
from lab.cli import run_command
from lab.machine.diagnosis import (
    MACHINE_DRIFT,
    MachineFinding,
    StepBand,
    compare_fingerprints,
    diagnose,
    diagnose_speed,
    expected_band,
    inspect_data,
    machine_name,
    pinned_version,
    run_bytes,
    step_figures,
)
from lab.machine.plan import EXPECTED_STEP_SECONDS
from lab.prepare.prepare import Preparation, preparation_folder, prepare_data
from tools.doctor import Options, print_report, work

GPU = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "mib": 81559}
STATE = {
    "sm_mhz": 1980.0, "sm_max_mhz": 1980.0, "memory_mhz": 2619.0, "memory_max_mhz": 2619.0, "power_limit_w": 700.0,
    "memory_used_mib": 620.0, "driver": "550.54.15",
}  # fmt: skip
SOUND = {
    "machine_id": "0123456789ab", "platform": "Linux", "python": "3.12.3", "torch": "2.13.0+cu128", "cuda": "12.8",
    "cudnn": 91002, "nccl": "2.27.3", "device": "cuda", "world_size": 8, "compile": True, "compiler": True,
    "gpus": [GPU] * 8, "driver": "550.54.15", "gpu_states": [dict(STATE) for _ in range(8)], "cpu": "Intel Xeon",
    "cpu_cores": 208, "torch_threads": 1, "memory_gib": 2000.0, "environment": {"OMP_NUM_THREADS": "1"},
    "attention": {"training": "ScaledDotProductFlashAttention", "scoring": "ScaledDotProductEfficientAttention"},
    "codecs": {"lzma": "present", "zlib": "1.3", "zstandard": "0.25.0", "brotli": None},
    "free_bytes": {"run": 10**12, "temporary": 10**11}, "temporary_executable": True,
}  # fmt: skip
"""A machine of the competition on which nothing is wrong."""
TORCH = "2.13.0"


def knobs(**values: str) -> Config:
    return build_config("leaderboard", {}, values)


def planted(**changes: object) -> dict:
    """SOUND with some values changed; a__b is the key b within a."""
    fingerprint = copy.deepcopy(SOUND)
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = fingerprint
        for parent in parents:
            place = place[parent]
        place[name] = value
    return fingerprint


def states(**values: float | None) -> list[dict]:
    """Eight GPUs, the fourth with other values."""
    return [STATE | (values if index == 3 else {}) for index in range(8)]


def codes(findings: list[MachineFinding]) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in findings]


def test_a_sound_machine_has_no_findings():
    assert diagnose(SOUND, knobs(), TORCH) == []
    assert diagnose(SOUND, knobs(), TORCH, states()) == []


PLANTED = {
    "no GPU": (planted(device="cpu"), {}, "no-cuda", "error"),
    "no GPU, asked for": (planted(device="cpu"), {"device": "cuda"}, "no-cuda", "error"),
    "no compiler": (planted(compiler=False), {}, "no-compiler", "error"),
    "no compiler, none needed": (planted(compiler=False), {"compile": "auto"}, "no-compiler", "note"),
    "noexec": (planted(temporary_executable=False), {}, "temporary-not-executable", "error"),
    "torch": (planted(torch="2.12.1+cu126"), {}, "torch-version", "warning"),
    "no zstd": (planted(codecs__zstandard=None), {"codec": "zstd"}, "codec-missing", "error"),
    "no lzma": (planted(codecs__lzma=None), {}, "codec-missing", "error"),
    "math in training": (planted(attention__training="math"), {}, "attention-math", "warning"),
    "math in scoring": (planted(attention__scoring="math"), {}, "attention-math", "warning"),
    "disk": (planted(free_bytes__run=5 * 10**8), {}, "disk-full", "error"),
    "temporary disk": (planted(free_bytes__temporary=10**7), {}, "disk-full", "warning"),
    "no InfiniBand": (planted(environment__NCCL_IB_DISABLE="1"), {}, "nccl-switch", "warning"),
    "no peers": (planted(environment__NCCL_P2P_DISABLE="1"), {}, "nccl-switch", "warning"),
    "threads": (planted(torch_threads=104), {}, "too-many-threads", "warning"),
    "clocks at rest": (planted(gpu_states=states(sm_mhz=345.0)), {}, "clocks-low", "note"),
    "memory clocks": (planted(gpu_states=states(memory_mhz=1200.0)), {}, "clocks-low", "note"),
    "another process": (planted(gpu_states=states(memory_used_mib=30_000.0)), {}, "gpu-shared", "warning"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_finding_is_found_alone(case):
    fingerprint, values, code, severity = PLANTED[case]
    findings = diagnose(fingerprint, knobs(**values), TORCH)
    assert codes(findings) == [(code, severity)]
    assert findings[0].text and findings[0].remedy


HARMLESS = {
    "no GPU wanted": (planted(device="cpu"), {"device": "cpu"}),
    "compile off": (planted(compiler=False, temporary_executable=False), {"compile": "off"}),
    "codec not asked for": (planted(codecs__zstandard=None), {"codec": "lzma"}),
    "switch off": (planted(environment__NCCL_IB_DISABLE="0"), {}),
    "clocks not told": (planted(gpu_states=states(sm_mhz=None, memory_max_mhz=None, memory_used_mib=None)), {}),
    "no nvidia-smi": (planted(gpu_states=None, driver=None), {}),
    "math on a CPU": (planted(device="cpu", attention__training="math"), {"device": "cpu"}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_is_not_found(case):
    fingerprint, values = HARMLESS[case]
    assert diagnose(fingerprint, knobs(**values), TORCH) == []


def test_errors_come_first_and_clocks_under_load_are_a_warning():
    fingerprint = planted(device="cpu", torch="2.1", gpu_states=states(sm_mhz=1.0))
    found = codes(diagnose(fingerprint, knobs(codec="zlib"), TORCH, states(sm_mhz=1200.0)))
    assert found == [("no-cuda", "error"), ("torch-version", "warning"), ("clocks-low", "warning")]
    assert diagnose(planted(gpu_states=states(sm_mhz=345.0)), knobs(), TORCH, states()) == []


def test_a_fingerprint_of_nothing_is_diagnosed():
    nothing = dict.fromkeys(SOUND)
    found = codes(diagnose(nothing, knobs(), TORCH))
    assert ("no-cuda", "error") in found and ("no-compiler", "error") in found and ("codec-missing", "error") in found


def test_disk_grows_with_the_model():
    assert run_bytes(knobs().model) == 4 * 4 * 25_517_137 + 100_000_000
    needed = run_bytes(knobs().model)
    assert diagnose(planted(free_bytes__run=needed), knobs(), TORCH) == []
    assert codes(diagnose(planted(free_bytes__run=needed - 1), knobs(), TORCH)) == [("disk-full", "error")]


def test_pinned_version():
    requirements = "# torch==1.0\nnumpy>=2.0,<3\ntorch==2.13.0  # exact\ntorchvision==0.1\n"
    assert pinned_version(requirements, "torch") == "2.13.0"
    assert pinned_version(requirements, "numpy") is pinned_version(requirements, "rich") is None


BAND = StepBand(0.080, 0.100, "8xH100, a log")


def steady(milliseconds: float) -> dict[str, float]:
    return step_figures([milliseconds / 1000] * 20)


def test_a_machine_within_the_band_is_fine():
    assert diagnose_speed(steady(99.9), knobs(), "8xH100", BAND) == []
    assert diagnose_speed(steady(60.0), knobs(), "8xH100", BAND) == []


def test_a_slow_machine_is_told_what_it_costs():
    (finding,) = diagnose_speed(steady(120.0), knobs(), "8xH100", BAND)
    assert codes([finding]) == [("slow-machine", "warning")]
    assert finding.text == (
        "this machine is 33% slower than 8xH100: 120.0 ms per step, expected 80.0 to 100.0; "  # than the middle
        "steps in the budget would be about 5,000"
    )
    assert "give the pod back" in finding.remedy


@pytest.mark.parametrize(
    ("values", "machine", "band", "reason"),
    [
        ({}, "1xH100", BAND, "it is that of 8xH100, a log; this is 1xH100"),
        ({}, "8xH10", BAND, "this is 8xH10"),
        ({"num_layers": "4", "seed": "7"}, "8xH100", BAND, "is for other values of num_layers"),
        ({}, "8xH100", None, "the preset leaderboard has no expected time"),
    ],
)
def test_a_band_that_does_not_apply_says_so_with_the_plain_number(values, machine, band, reason):
    (finding,) = diagnose_speed(steady(250.0), knobs(**values), machine, band)
    assert codes([finding]) == [("no-band", "note")]
    assert finding.text.startswith("250.0 ms per step; steps in the budget would be about 2,400; ")
    assert reason in finding.text


def test_unsteady_steps_are_told():
    uneven = step_figures([0.085, 0.098, 0.085, 0.099, 0.060, 0.13] * 4)
    assert codes(diagnose_speed(uneven, knobs(), "8xH100", BAND)) == []
    uneven = step_figures([0.06, 0.1] * 10)
    assert codes(diagnose_speed(uneven, knobs(), "8xH100", BAND)) == [("unsteady", "warning")]
    assert uneven["fastest_ms"] == 60 and uneven["slowest_ms"] == 100 and uneven["median_ms"] == pytest.approx(80)


def test_steps_in_the_budget_are_the_nearer_limit():
    (finding,) = diagnose_speed(steady(250.0), knobs(iterations="100"), "1xH100", BAND)
    assert "about 100;" in finding.text
    (finding,) = diagnose_speed(steady(250.0), knobs(max_wallclock_seconds="0"), "1xH100", BAND)
    assert "about 20,000;" in finding.text


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "8xH100"),
        ({"world_size": 1, "gpus": [GPU | {"name": "NVIDIA H200"}]}, "1xH200"),
        ({"gpus": [GPU | {"name": "NVIDIA H100 PCIe"}]}, "8xH100 PCIe"),
        ({"gpus": [GPU | {"name": "NVIDIA A100-SXM4-80GB"}]}, "8xA100"),
        ({"gpus": [GPU | {"name": "NVIDIA GeForce RTX 4090"}], "world_size": 1}, "1xGeForce RTX 4090"),
        ({"device": "cpu", "cpu": "AMD EPYC", "cpu_cores": 2, "torch_threads": 2}, "2 cores of an AMD EPYC"),
        ({"device": "cpu", "cpu": "AMD EPYC", "cpu_cores": 2, "torch_threads": 1}, "1 of 2 cores of an AMD EPYC"),
    ],
)
def test_machines_have_the_names_that_bands_use(changes, name):
    assert machine_name(SOUND | changes) == name


@pytest.mark.parametrize("preset", EXPECTED_STEP_SECONDS)
def test_every_band_is_that_of_a_machine_that_can_be_recognised(preset):
    band, config = expected_band(preset), build_config(preset, {}, {})
    cpu = {"device": "cpu", "cpu": "AMD EPYC", "cpu_cores": 2, "torch_threads": 2}
    name = machine_name(SOUND | (cpu if config.run.device == "cpu" else {}))
    middle = 1000 * (band.low + band.high) / 2
    assert diagnose_speed(steady(middle), config, name, band) == []
    slow = diagnose_speed(steady(middle * (1.01 + MACHINE_DRIFT)), config, name, band)
    assert codes(slow) == [("slow-machine", "warning")]


def test_no_band_without_an_expectation():
    assert expected_band("of-my-own") is None


def test_like_machines_differ_in_nothing_that_matters():
    other = planted(free_bytes__run=1, gpu_states=states(sm_mhz=345.0, memory_used_mib=9.0))
    assert compare_fingerprints(SOUND, SOUND) == compare_fingerprints(SOUND, other) == []


def test_differences_between_machines_are_named():
    other = planted(
        torch="2.12.0", environment__NCCL_P2P_DISABLE="1", attention__scoring="math", machine_id="ba9876543210",
        gpu_states=states(power_limit_w=500.0),
    )  # fmt: skip
    differences = compare_fingerprints(SOUND, other)
    assert [line.partition(":")[0] for line in differences] == [
        "machine_id", "torch", "environment.NCCL_P2P_DISABLE", "attention.scoring", "power_limit_w",
    ]  # fmt: skip
    assert differences[1] == "torch: 2.13.0+cu128 / 2.12.0"
    assert compare_fingerprints(SOUND, {})[0] == "machine_id: 0123456789ab / None"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Config, object]:
    """A local configuration with a small corpus of its own, and the folder where prepared corpora are kept."""
    root = tmp_path_factory.mktemp("corpus")
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, 40)) + "\n" for _ in range(200)]
    (root / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"corpus": str(root / "own.jsonl"), "vocab_size": "300"}
    return build_config("local", {}, values), root / "cache"


def test_data_that_is_not_prepared_comes_with_the_command(corpus):
    config, cache = corpus
    data, (finding,) = inspect_data(config, cache / "elsewhere")
    assert data == {} and codes([finding]) == [("data-missing", "note")]
    assert finding.remedy == f"python data/prepare.py --input {config.data.corpus} --tokenizer train:300"


def test_data_that_is_there_is_identified(corpus):
    config, cache = corpus
    wanted = Preparation(config.data.corpus, "train:300")
    prepared = prepare_data(wanted, preparation_folder(wanted, cache))
    told, findings = inspect_data(config, cache)
    assert findings == [] and told["data_id"] == prepared.data_id and told["folder"] == str(prepared.folder)
    assert told["tokenizer_sha256"] == prepared.manifest["tokenizer"]["sha256"]
    shards = replace(config, data=replace(config.data, data_path=str(prepared.folder), corpus=""))
    assert inspect_data(shards, cache) == (told, [])
    other = replace(shards, model=replace(shards.model, vocab_size=301))
    assert codes(inspect_data(other, cache)[1]) == [("data-missing", "error")]


def test_shards_that_are_not_there_are_an_error(tmp_path):
    data, (finding,) = inspect_data(knobs(data_path=str(tmp_path / "none")), tmp_path)
    assert data == {} and codes([finding]) == [("data-missing", "error")]
    assert str(tmp_path / "none") in finding.text and "--corpus embedded" in finding.remedy


# ---- the program ----

TINY = ["vocab_size=64", "model_dim=32", "train_seq_len=16", "train_batch_tokens=64", "micro_batch_tokens=64"]
TINY += ["quantizer=rtn", "qat_enabled=1", "codec=zstd"]
TINY += ["eval_seq_len=32", "eval_stride=8", "compile=off", "warmup_steps=1", "threads=1"]


def run_program(repository: Path, *arguments: str) -> dict:
    """What the program says in JSON; it must find no error."""
    command = [sys.executable, "tools/doctor.py", "--preset", "local", "--json", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture
def doctor(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the tool in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments, "threads=1"])
        return run_command(Options, "", work), *capsys.readouterr()

    return run


def test_program_without_probe(repository):
    report = run_program(repository, "--skip-probe", "compile=off")
    assert report["probe"] == {} and report["preset"] == "local" and not report["probe_blocked"]
    assert report["fingerprint"]["torch"] == torch.__version__
    assert {finding["severity"] for finding in report["findings"]} <= {"warning", "note"}


def test_program_with_probe(repository):
    report = run_program(repository, *TINY)
    probe = report["probe"]
    assert probe["steps"] == 20 and 0 < probe["fastest_ms"] <= probe["median_ms"] <= probe["slowest_ms"]
    (band,) = [finding for finding in report["findings"] if finding["code"] == "no-band"]
    assert "the preset's expected time is for other values of " in band["text"] and "train_seq_len" in band["text"]


def test_errors_are_shown_and_nothing_is_trained(doctor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")  # where nothing can be written
    monkeypatch.setattr("tools.doctor.probe_training", None)
    status, output, complaint = doctor("--preset", "leaderboard", "data_path=none")
    assert status == 1 and complaint == ""
    assert "error no-cuda: the preset leaderboard wants a GPU" in output
    assert "error temporary-not-executable" in output and "error data-missing: none: no such folder" in output
    assert "not taken: mend the errors first" in output


def fail_for_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it")


def test_a_probe_that_fails_is_a_finding(doctor, monkeypatch):
    monkeypatch.setattr("tools.doctor.probe_training", fail_for_memory)
    status, output, complaint = doctor("--preset", "local", *TINY)
    assert status == 1 and complaint == ""
    assert "error out-of-memory: CUDA out of memory. Tried to allocate 2 GiB.\n    -> lower micro_batch" in output
    with pytest.raises(torch.OutOfMemoryError):
        doctor("--preset", "local", "--debug", *TINY)


def test_a_gpu_machine_is_shown(capsys):
    report = {
        "preset": "leaderboard",
        "fingerprint": SOUND,
        "data": {},
        "probe": {},
        "probe_blocked": False,
        "findings": [],
    }
    print_report(report, Console(width=120))
    output = capsys.readouterr().out
    assert "GPU 7" in output and "NVIDIA H100 80GB HBM3, capability 9.0, 81,559 MiB" in output
    assert "SM 1,980 of 1,980 MHz, memory 2,619 of 2,619 MHz, 700 W, 620 MiB used" in output
    assert output.rstrip().endswith("fine: nothing found")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "doctor: 'nonsense' is not of the form key=value\n"),
        (["--preset", "none"], "doctor: unknown preset 'none': choose one of "),
        (["--preset", "local", "train_batch_tokens=100"], "doctor: train_batch_tokens must be rows of "),
    ],
)
def test_bad_input_has_one_line(doctor, arguments, message):
    status, output, complaint = doctor(*arguments)
    assert status == 2 and output == ""
    assert complaint.startswith(message) and complaint.count("\n") == 1
