""".ci/run with stand-ins for run.sh and apt-get: a browser is a matter of luck, style and tests are not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN_SH = 'echo "$@"; [ "$1" != "${FAILS:-}" ]\n'
PARTS = ["lint", "test --all"]


@pytest.fixture
def project(tmp_path, repository, write_tree) -> Path:
    """A folder with .ci/run, on whose path are no browser and no apt-get but those of the test."""
    write_tree(tmp_path, {"run.sh": RUN_SH, "bin/id": "#!/bin/sh\necho 0\n"})
    (tmp_path / ".ci").mkdir()
    shutil.copy(repository / ".ci/run", tmp_path / ".ci/run")
    for name in ("bash", "sh", "dirname", "timeout", "tail", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin/id").chmod(0o755)
    return tmp_path


def run_check(project: Path, apt_get: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    if apt_get:
        path = project / "bin/apt-get"
        path.write_text(f'#!/bin/sh\necho "$@" >>"{project}/asked"\n{apt_get}\n')
        path.chmod(0o755)
    environment = os.environ | {"PATH": str(project / "bin")} | variables
    command = ["bash", str(project / ".ci/run")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_a_browser_is_installed_where_there_is_none(project):
    finished = run_check(project, "exit 0")
    assert (finished.returncode, finished.stdout) == (0, "lint\ntest --all\n"), finished.stderr
    asked = (project / "asked").read_text().splitlines()
    assert asked[0].startswith("update") and asked[1].endswith(" chromium-headless-shell") and len(asked) == 2


def test_nothing_is_installed_where_there_is_one(project):
    (project / "bin/chromium").symlink_to(shutil.which("cat"))
    assert run_check(project, "exit 0").returncode == 0 and not (project / "asked").exists()


@pytest.mark.parametrize(
    ("apt_get", "line"),
    [
        ("", "browser: none found, and installing one takes root and apt-get: the demo's page is not tested"),
        ("echo first; echo E: no such package; exit 100", "could not install one (E: no such package): the demo's"),
    ],
)
def test_without_a_browser_the_check_goes_on_and_says_so(project, apt_get, line):
    finished = run_check(project, apt_get)
    assert finished.returncode == 0 and line in finished.stdout
    assert [said for said in finished.stdout.splitlines() if said in PARTS] == PARTS


@pytest.mark.parametrize("part", ["lint", "test"])
def test_what_fails_fails_the_check(project, part):
    finished = run_check(project, "exit 0", FAILS=part)
    assert finished.returncode == 1 and finished.stdout.splitlines()[-1] == "test --all"
    assert ("style: FAILED" in finished.stdout) == (part == "lint")
