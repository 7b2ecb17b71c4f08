"""Requirements by purpose: a run needs the core alone, and what needs more says in one line which file has it."""

import subprocess
import sys

import pytest

from golf.config.knobs import UserError
from lab.cli import OPTIONAL_PACKAGES, ToolOptions, missing_package_hint, run_command

BLOCKED = "import sys\nfor name in {names}:\n    sys.modules[name] = None\n"
RUN_PATH = ("train_gpt", "tools.bundle", "tools.plan", "tools.check_run", "tools.report", "lab.prepare.prepare")
"""What a run imports or starts: of these none may take a package that only other purposes install."""


def without(packages: tuple[str, ...], lines: str) -> str:
    """A program that runs where `packages` are not installed."""
    return BLOCKED.format(names=packages) + lines


def test_each_optional_package_is_named_by_the_file_that_installs_it(repository):
    for name, packages in OPTIONAL_PACKAGES.items():
        requirements = (repository / name).read_text()
        assert all(package in requirements for package in packages if package != "tiktoken_ext"), name


def test_the_extras_of_the_package_are_the_files_by_purpose(repository):
    project = (repository / "pyproject.toml").read_text()
    files = sorted(path.name for path in repository.glob("requirements-*.txt"))
    assert files == [f"requirements-{purpose}.txt" for purpose in ("data", "demo", "dev", "export", "lab", "track")]
    for name in files:
        purpose = name.removeprefix("requirements-").removesuffix(".txt")
        assert f'dynamic.optional-dependencies.{purpose}.file = ["{name}"]' in project


def test_a_run_and_the_tools_that_it_starts_need_the_core_alone(repository):
    packages = tuple(package for names in OPTIONAL_PACKAGES.values() for package in names)
    program = without(packages, f"import {', '.join(RUN_PATH)}")
    finished = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("package", ["scipy", "huggingface_hub"])
def test_a_tool_that_misses_a_package_when_it_is_imported_is_one_line_and_status_2(repository, tmp_path, package):
    tool = tmp_path / "compare.py"
    tool.write_text(without((package,), f"import lab.cli\nimport {package}.stats\n"))
    command = [sys.executable, tool]
    finished = subprocess.run(command, env={"PYTHONPATH": str(repository)}, capture_output=True, text=True)
    (file,) = (name for name, packages in OPTIONAL_PACKAGES.items() if package in packages)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"compare: {package} is not installed: pip install -r {file} (")
    assert finished.stderr.count("\n") == 1


def failing_tool(monkeypatch, capsys, error: Exception) -> tuple[int, str]:
    """The exit status and standard error of a tool whose work fails with `error`."""

    def work(options: ToolOptions) -> int:
        raise error

    monkeypatch.setattr(sys, "argv", ["tools/compare.py"])
    return run_command(ToolOptions, "", work), capsys.readouterr().err


def test_a_package_that_is_missed_in_the_midst_of_the_work_is_one_line(monkeypatch, capsys):
    missing = ModuleNotFoundError("No module named 'jinja2.loaders'", name="jinja2.loaders")
    status, complaint = failing_tool(monkeypatch, capsys, missing)
    assert status == 2 and complaint.startswith("compare: jinja2 is not installed: pip install -r requirements-lab.txt")
    assert failing_tool(monkeypatch, capsys, UserError("two\nlines")) == (2, "compare: two lines\n")


def test_a_missing_module_that_no_file_installs_is_not_hidden(monkeypatch, capsys):
    with pytest.raises(ModuleNotFoundError):
        failing_tool(monkeypatch, capsys, ModuleNotFoundError("No module named 'golf.x'", name="golf.x"))
    assert missing_package_hint(ImportError("x", name="scipy")) == ""
    assert missing_package_hint(ModuleNotFoundError("x")) == ""
