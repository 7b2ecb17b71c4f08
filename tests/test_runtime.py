"""What a run stands on: its folder, files that appear at once, devices and compilers that are there or not."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from golf.config.config import build_config
from golf.config.knobs import ConfigError
from golf.config.run import RunConfig
from golf.run.folder import RunFolder, choose_run_folder
from golf.runtime import Runtime, choose_compile, choose_device, compile_fault, start_runtime, write_file_atomically


def test_two_runs_never_share_a_folder(tmp_path):
    config = build_config("local", {}, {"runs_root": str(tmp_path), "run_id": "same"})
    folder = choose_run_folder(config, Runtime(torch.device("cpu")))
    folder.create(config)
    assert folder.load_config() == config
    with pytest.raises(ConfigError, match="exists: choose another run_id"):
        folder.create(config)
    with pytest.raises(ConfigError, match="can't name a folder"):
        choose_run_folder(replace(config, run=replace(config.run, run_id="../x")), Runtime(torch.device("cpu")))
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RunFolder(tmp_path).load_config()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.json"
    write_file_atomically(path, "old")
    with pytest.raises(TypeError):
        write_file_atomically(path, 5)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_was_asked_for_and_is_missing_stops_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")


@pytest.fixture
def trials(monkeypatch, tmp_path) -> list[int]:
    """Replaces torch.compile by one that works and counts; marks of earlier trials are not seen."""
    made = []
    compile_fault.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(1) or function)
    yield made
    compile_fault.cache_clear()


CPU = torch.device("cpu")
COMPILE_ERROR = """CppCompileError: C++ compile error

Output:
main.cpp:3:10: fatal error: omp.h: No such file or directory
compilation terminated.
"""


def test_one_trial_serves_all_processes_that_have_the_same_compilers(monkeypatch, tmp_path, write_tree, trials):
    write_tree(tmp_path / "bin", {"g++": "#!/bin/sh\nexit 1\n"})
    (tmp_path / "bin/g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for count, path in [(1, ""), (1, ""), (2, str(tmp_path / "bin/g++"))]:
        compile_fault.cache_clear()  # as in a new process
        if path:
            os.utime(path, (1, 1))
        assert choose_compile("on", CPU) and choose_compile("auto", CPU) and not choose_compile("off", CPU)
        assert len(trials) == count


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(COMPILE_ERROR), "main.cpp:3:10: fatal error: omp.h: No such file or directory"),
        (
            RuntimeError("torch.compile is not supported on Python 3.14+"),
            "torch.compile is not supported on Python 3.14",
        ),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (ImportError(), "ImportError"),
    ],
)
def test_a_compiler_that_fails_is_one_line_and_is_tried_again(monkeypatch, trials, error, reason):
    def fail(function, **options):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(torch, "compile", fail)
        assert not choose_compile("auto", CPU)
        with pytest.raises(ConfigError, match="install .* or set compile=off") as refused:
            choose_compile("on", CPU)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    compile_fault.cache_clear()
    assert choose_compile("auto", CPU)


def test_without_a_compiler_nothing_is_tried(monkeypatch, trials):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not choose_compile("auto", CPU) and not trials
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler was found.*install .*g\\+\\+"):
        choose_compile("on", CPU)


def test_a_run_says_why_it_goes_on_uncompiled(monkeypatch, trials):
    monkeypatch.setattr("shutil.which", lambda name: None)
    for wanted, reason in (("auto", "no C++ compiler was found"), ("off", "")):
        with start_runtime(RunConfig(device="cpu", compile=wanted), "train") as runtime:
            assert (runtime.compiles, runtime.compile_fault) == (False, reason)


@pytest.mark.slow
def test_a_real_compiler_without_a_header_stops_a_run_that_asks_for_it(repository, tmp_path, write_tree):
    """A stand-in that knows its version and fails at all else, as g++ does where omp.h is missing."""
    real = shutil.which("g++") or pytest.skip("there is no g++ to stand in for")
    stub = f"""case "$*" in *--version*|*-dumpversion*) exec {real} "$@";; esac
echo "x.cpp:3:10: fatal error: omp.h: No such file" >&2; exit 1"""
    write_tree(tmp_path / "bin", {name: f"#!/bin/sh\n{stub}\n" for name in ("g++", "c++")})
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    finished = subprocess.run(
        [sys.executable, "train_gpt.py", "--preset", "local", "compile=on", "iterations=1", f"runs_root={tmp_path}"],
        cwd=repository, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert "(x.cpp:3:10: fatal error: omp.h: No such file)" in finished.stderr and "compile=off" in finished.stderr
