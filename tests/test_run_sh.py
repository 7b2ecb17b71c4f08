"""run.sh with stand-ins for torch and train_gpt.py: which Python, which launcher, which status."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = "import os, sys\nprint('train', os.getcwd(), *sys.argv[1:])\nsys.exit(int(os.environ.get('STATUS', '0')))\n"
TOOL = "import os, sys\nprint('{name}', os.getcwd(), *sys.argv[1:])\nsys.exit(int(os.environ.get('STATUS', '0')))\n"
TORCH = """__version__ = "2.13.0+cpu"
class cuda:
    is_available = lambda: {count} > 0
    device_count = lambda: {count}
"""


@pytest.fixture
def project(tmp_path, repository, write_tree):
    """A folder with run.sh and stand-ins; `python` on its path is the one that runs the tests."""
    root = tmp_path / "project"
    files = {"train_gpt.py": TRAIN}
    files |= {
        "requirements.txt": "pytest>=7,<99  # is here\n",
        "requirements-data.txt": "",
        "requirements-demo.txt": "",
        "requirements-lab.txt": "",
        "requirements-track.txt": "",
        "requirements-export.txt": "",
        "requirements-dev.txt": "ruff\n",
        "constraints.txt": "# comment\ntorch==2.13.0\n",
        "fake/__init__.py": "",
    }
    files |= {f"tools/{name}.py": TOOL.format(name=name) for name in ("compare", "demo", "inspect_data", "track")}
    files |= {"fake/torch/__init__.py": TORCH.format(count=0)}
    files |= {"fake/torch/distributed/__init__.py": ""}
    files |= {"fake/torch/distributed/run.py": "import sys\nprint('torchrun', *sys.argv[1:])\n"}
    write_tree(root, files)
    shutil.copy(repository / "run.sh", root)
    (root / "bin").mkdir()
    for name in ("python", "python3"):
        write_stub(root, name, f'exec "{sys.executable}" "$@"')
    return root


def write_stub(root: Path, name: str, command: str) -> None:
    path = root / "bin" / name
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def write_environment(project: Path, at_install: str) -> None:
    """A stand-in for .venv whose pip does `at_install` where it is asked to install."""
    (project / ".venv/bin").mkdir(parents=True)
    command = f'[ "$2" = pip ] && [ "$3" = install ] && {at_install}; exec "{sys.executable}" "$@"'
    write_stub(project, "venv-python", command)
    (project / "bin/venv-python").rename(project / ".venv/bin/python")


def run_sh(
    project: Path, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = f"{project / 'bin'}:/usr/bin:/bin"
    environment = (
        {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH_INDEX_URL")}
        | {"PATH": path, "PYTHONPATH": str(project / "fake"), "CUDA_VISIBLE_DEVICES": ""}
        | variables
    )
    command = ["bash", str(project / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or project, env=environment, timeout=600)


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_scripts_are_bash(repository, script):
    subprocess.run(["bash", "-n", repository / script], check=True)


def test_without_a_gpu_the_local_preset_runs(project):
    finished = run_sh(project, "seed=2", "qat_start=0.5")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"train {project} seed=2 qat_start=0.5 --preset local\n"
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(("count", "used"), [(1, 1), (2, 2), (3, 2), (8, 8), (11, 8)])
def test_with_gpus_the_leaderboard_preset_runs_under_torchrun(project, count, used):
    (project / "fake/torch/__init__.py").write_text(TORCH.format(count=count))
    finished = run_sh(project, "seed=2")
    launch = f"torchrun --standalone --nproc_per_node={used} train_gpt.py seed=2 --preset leaderboard"
    assert finished.stdout.splitlines()[0] == launch, finished.stderr


def test_a_named_preset_is_kept_and_a_local_one_needs_one_process(project):
    (project / "fake/torch/__init__.py").write_text(TORCH.format(count=8))
    assert "train_gpt.py --preset baseline\n" in run_sh(project, "--preset", "baseline").stdout
    assert f"train {project} --preset baseline-local\n" in run_sh(project, "--preset=baseline-local").stdout


def test_paths_are_meant_from_where_the_command_is_given(project, tmp_path):
    finished = run_sh(project, "--corpus", "a b.txt", "data_path=/x", "runs_root=out", cwd=tmp_path)
    expected = f"train {project} --corpus={tmp_path}/a b.txt data_path=/x runs_root={tmp_path}/out --preset local\n"
    assert finished.stdout.startswith(expected), finished.stderr
    assert "--corpus=embedded" in run_sh(project, "--corpus=embedded", cwd=tmp_path).stdout


def test_the_status_of_training_is_passed_on(project):
    finished = run_sh(project, STATUS="7")
    assert finished.returncode == 7


def test_what_only_an_older_python_needs_is_not_asked_for(project):
    (project / "requirements.txt").write_text('golf-no-such-package>=2,<3; python_version < "3.10"\n')
    assert run_sh(project).returncode == 0
    (project / "requirements.txt").write_text('golf-no-such-package>=2,<3; python_version < "3.99"\n')
    write_environment(project, "exit 9")
    assert "golf-no-such-package" in run_sh(project).stderr


def test_what_only_another_system_needs_is_not_asked_for(project):
    (project / "requirements.txt").write_text('golf-no-such-package==2; sys_platform == "elsewhere"\n')
    assert run_sh(project).returncode == 0
    (project / "requirements.txt").write_text(f'golf-no-such-package==2; sys_platform == "{sys.platform}"\n')
    write_environment(project, "exit 9")
    assert "golf-no-such-package" in run_sh(project).stderr


def test_an_option_without_its_value_is_a_usage_error(project):
    finished = run_sh(project, "--preset")
    assert finished.returncode == 2 and finished.stderr == "run.sh: --preset needs a value\n"


@pytest.mark.parametrize("version", ["3.9", "3.15"])
def test_only_pythons_of_the_wrong_age_are_one_clear_line(project, version):
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 15))):
        write_stub(project, name, f'[ "$1" = --version ] && echo Python {version} && exit 0; exit 1')
    finished = run_sh(project)
    assert finished.returncode == 3 and finished.stdout == ""
    assert finished.stderr.count("\n") == 1 and f"3.14 is needed, and Python {version} was found" in finished.stderr


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("pytest==0.1", "pytest==0.1 ("),
        ("pytest>=99", "pytest>=99 ("),
        ("golf-no-such-package==1.0", "golf-no-such-package==1.0 (none installed)"),
    ],
)
def test_what_is_missing_is_named_and_asked_of_pip(project, requirement, reason):
    """A stand-in for .venv whose pip always fails: one clear line with pip's status, and nothing runs."""
    (project / "requirements.txt").write_text(f"# comment\n\n{requirement}\n")
    write_environment(project, "exit 9")
    finished = run_sh(project)
    assert finished.returncode == 3 and finished.stdout == ""
    assert f"installing into {project}/.venv: {reason}" in finished.stderr
    assert "pip could not install the requirements (status 9)" in finished.stderr


def test_a_failing_venv_module_is_one_clear_line(project):
    (project / "requirements.txt").write_text("golf-no-such-package\n")
    for name in ("python", "python3"):
        write_stub(project, name, f'[ "$2" = venv ] && exit 1; exec "{sys.executable}" "$@"')
    finished = run_sh(project)
    assert finished.returncode == 3
    assert "venv failed: install its venv module" in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["seed=2"], ["requirements"]),
        (["download"], ["requirements", "requirements-data"]),
        (["tool", "compare"], ["requirements", "requirements-lab"]),
        (["tool", "inspect_data"], ["requirements", "requirements-lab", "requirements-data"]),
        (["tool", "demo"], ["requirements", "requirements-lab", "requirements-demo"]),
        (["tool", "track"], ["requirements", "requirements-lab", "requirements-track"]),
        (
            ["test"],
            ["requirements", *(f"requirements-{name}" for name in ("data", "lab", "demo", "track", "export", "dev"))],
        ),
        (["lint"], ["requirements-dev"]),
    ],
)
def test_each_command_installs_what_it_needs_and_no_more(project, command, files):
    for path in project.glob("requirements*.txt"):
        path.write_text("golf-no-such-package\n")
    write_environment(project, f'echo "$@" >"{project}/asked" && exit 9')
    assert run_sh(project, *command).returncode == 3
    words = (project / "asked").read_text().split()
    assert [word for word in words if word.endswith(".txt")] == [f"{name}.txt" for name in files]


def test_a_tool_runs_where_the_command_is_given_with_its_arguments_and_status(project, tmp_path):
    finished = run_sh(project, "tool", "compare", "runs/a b", "--vs", "runs/c", cwd=tmp_path, STATUS="7")
    assert (finished.returncode, finished.stdout) == (7, f"compare {tmp_path} runs/a b --vs runs/c\n"), finished.stderr
    assert run_sh(project, "tool", "compare.py").stdout == f"compare {project}\n"


@pytest.mark.parametrize("name", [[], ["nothing"], ["../train_gpt"], ["--help"]])
def test_a_tool_that_is_none_is_one_line_with_all_names(project, name):
    finished = run_sh(project, "tool", *name)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "run.sh: tool takes one of these names: compare demo inspect_data track\n"


OLD_DRIVER, NEW_DRIVER = "550.54.15", "580.65.06"


def run_on_pod(project: Path, driver: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs run.sh where there is an NVIDIA device, by a stand-in for nvidia-smi, that torch does not see."""
    write_stub(project, "nvidia-smi", f"echo {driver}; echo {driver}")
    return run_sh(project, *arguments, **({"CUDA_VISIBLE_DEVICES": "0,1"} | variables))


@pytest.mark.parametrize(
    ("driver", "advice"),
    [
        (OLD_DRIVER, "update the driver to 580 or newer, or take the CUDA 12.6 build"),
        (NEW_DRIVER, "-m pip install --force-reinstall torch==2.13.0; --preset local asks for the CPU"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--preset", "leaderboard"], ["device=cuda"]])
def test_a_device_that_torch_does_not_see_is_one_line_and_nothing_runs(project, driver, advice, arguments):
    finished = run_on_pod(project, driver, *arguments)
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (3, "", 1), finished.stderr
    assert f"NVIDIA device (driver {driver}), and torch 2.13.0+cpu of" in finished.stderr and advice in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--preset", "local"], {}),
        (["--preset=stories"], {}),
        (["device=cpu"], {}),
        ([], {"DEVICE": "cpu"}),
        ([], {"PRESET": "local"}),
        ([], {"CUDA_VISIBLE_DEVICES": ""}),
        ([], {"CUDA_VISIBLE_DEVICES": "-1"}),
        (["--preset", "leaderboard", "--plan"], {}),
    ],
)
def test_who_asks_for_the_cpu_of_a_pod_gets_it(project, arguments, variables):
    finished = run_on_pod(project, OLD_DRIVER, *arguments, **variables)
    assert finished.returncode == 0 and finished.stdout.startswith("train "), finished.stderr


def install_torch(project: Path, version: str) -> None:
    """Gives the Python of the tests a torch of this version, as far as its metadata says."""
    folder = project / f"fake/torch-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (project / "requirements.txt").write_text("torch>=2.9,<3\n")


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cu128", "2.10.0", "2.11.0", "2.13.0+cpu", "2.14.1"])
def test_a_torch_in_the_range_is_used_as_it_is(project, version):
    install_torch(project, version)
    finished = run_sh(project)
    assert finished.returncode == 0 and not (project / ".venv").exists(), finished.stderr


@pytest.mark.parametrize("version", ["2.8.0", "1.13.1", "3.0.0"])
def test_for_a_torch_out_of_the_range_the_constrained_one_is_asked_of_pip(project, version):
    install_torch(project, version)
    write_environment(project, f'echo "$@" >"{project}/asked" && exit 9')
    finished = run_sh(project)
    assert finished.returncode == 3 and f"torch>=2.9,<3 ({version} installed)" in finished.stderr
    asked = (project / "asked").read_text()
    assert "--constraint constraints.txt --requirement requirements.txt" in asked and "index" not in asked


def test_the_index_that_the_environment_names_is_asked_for_torch_alone(project):
    install_torch(project, "2.8.0")
    write_environment(project, f'echo "$@" >>"{project}/asked" && exit 0')
    run_on_pod(project, OLD_DRIVER, TORCH_INDEX_URL="file:///wheels")
    torch, others = (project / "asked").read_text().splitlines()
    assert "--index-url file:///wheels --constraint constraints.txt torch" in torch and "index" not in others


def test_a_torch_that_the_driver_cannot_run_is_not_installed_but_for_the_cpu(project):
    install_torch(project, "2.8.0")
    write_environment(project, f'echo "$@" >"{project}/asked" && exit 9')
    finished = run_on_pod(project, OLD_DRIVER)
    assert (finished.returncode, finished.stdout) == (3, "") and not (project / "asked").exists()
    assert f"the NVIDIA driver is {OLD_DRIVER}" in finished.stderr and "TORCH_INDEX_URL" in finished.stderr
    assert "status 9" in run_on_pod(project, OLD_DRIVER, "--preset", "local").stderr
    assert "status 9" in run_on_pod(project, NEW_DRIVER).stderr


@pytest.mark.parametrize(("version", "used"), [("2.9.1", True), ("2.8.0", False)])
def test_a_new_environment_stands_on_the_torch_that_fits(project, version, used):
    """A stand-in for Python makes a stand-in for .venv, whose packages lie in the project."""
    install_torch(project, version)
    (project / "requirements.txt").write_text("torch>=2.9,<3\ngolf-no-such-package\n")
    (project / "packages").mkdir()
    inner = f'case "$*" in *purelib*) echo "{project}/packages"; exit;; *"pip install"*) exit 9;; esac'
    write_stub(project, "inner", f'{inner}; exec "{sys.executable}" "$@"')
    make = f'mkdir -p "$3/bin" && mv "{project}/bin/inner" "$3/bin/python"; exit'
    for name in ("python", "python3"):
        write_stub(project, name, f'[ "$2" = venv ] && {{ {make}; }}; exec "{sys.executable}" "$@"')
    finished = run_sh(project)
    assert finished.returncode == 3 and "golf-no-such-package (none installed)" in finished.stderr
    paths = project / "packages/base_packages.pth"
    assert paths.exists() == used == ("torch among them" in finished.stderr)
    assert not used or all(Path(line).is_dir() for line in paths.read_text().splitlines())


XDIST = "--numprocesses auto --dist loadfile --no-loadscope-reorder"


@pytest.mark.parametrize(
    ("arguments", "passed_on", "which"),
    [
        ([], f"{XDIST} -m not slow", "the quick tests (--all runs every one)"),
        (["-x", "tests/a.py"], f"{XDIST} -m not slow -x tests/a.py", "the quick tests (--all runs every one)"),
        (["--all"], XDIST, "every test"),
        (["--all", "-x"], f"{XDIST} -x", "every test"),
    ],
)
def test_the_slow_tests_run_only_when_asked_for(project, arguments, passed_on, which):
    (project / "requirements-dev.txt").write_text("")
    show = 'shift 2; echo "$OMP_NUM_THREADS: $*"; exit 5'
    write_stub(project, "python", f'if [ "$2" = pytest ]; then {show}; fi; exec "{sys.executable}" "$@"')
    finished = run_sh(project, "test", *arguments, OMP_NUM_THREADS="")
    assert (finished.returncode, finished.stdout) == (5, f"1: {passed_on}\n"), finished.stderr
    assert f"run.sh: {which} with Python 3" in finished.stderr


TESTS = """
import os
import pytest

def test_threads():
    assert os.environ["OMP_NUM_THREADS"] == "1"

@pytest.mark.slow
def test_a_whole_run():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "passed"), [([], "1 passed"), (["--all"], "2 passed"), (["-m", "slow"], "1 passed")]
)
def test_tests_run_with_the_arguments_given(project, arguments, passed):
    (project / "requirements-dev.txt").write_text("")
    (project / "test_one.py").write_text(TESTS)
    (project / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    finished = run_sh(project, "test", *arguments, "-q", "test_one.py", OMP_NUM_THREADS="")
    assert finished.returncode == 0 and passed in finished.stdout.splitlines()[-1], finished.stdout + finished.stderr


def test_path_variables_are_meant_from_where_the_command_is_given(project, tmp_path):
    (project / "train_gpt.py").write_text("import os\nprint(os.environ['DATA_PATH'], os.environ['CORPUS'])\n")
    finished = run_sh(project, cwd=tmp_path, DATA_PATH="shards", CORPUS="embedded")
    assert finished.stdout == f"{tmp_path}/shards embedded\n", finished.stderr
