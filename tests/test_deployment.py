"""Dockerfile and sky.yaml: what can be checked of them without Docker and without a cloud."""

import re
import shlex
import subprocess

import pytest

from golf.config.config import build_config
from golf.run.command import parse_overrides

IMAGE = re.compile(r"pytorch/pytorch:(\d+)\.(\d+)\.\d+-cuda([\d.]+)-cudnn9-devel")


def test_both_name_one_official_image_whose_torch_is_in_the_range(repository):
    images = {IMAGE.search((repository / name).read_text()).group() for name in ("Dockerfile", "sky.yaml")}
    major, minor, cuda = IMAGE.fullmatch(images.pop()).groups()
    low, high = re.search(r"^torch>=(\d+\.\d+),<(\d+)$", (repository / "requirements.txt").read_text(), re.M).groups()
    assert not images and tuple(map(int, low.split("."))) <= (int(major), int(minor)) < (int(high),)
    assert float(cuda) < 13  # runs with drivers before 580 too


def test_the_image_copies_what_is_there_and_starts_run_sh(repository):
    lines = (repository / "Dockerfile").read_text().splitlines()
    for words in (line.split()[1:-1] for line in lines if line.startswith("COPY ")):
        assert all(list(repository.glob(word)) if word != "." else True for word in words), words
    assert lines[-1] == 'ENTRYPOINT ["bash", "run.sh"]'
    (command,) = (line.removeprefix("RUN ") for line in lines if line.startswith("RUN "))
    tools = re.findall(r"run\.sh tool (\w+)", command)
    assert tools and all((repository / f"tools/{name}.py").exists() for name in tools)


def test_skypilot_reads_the_task(repository, monkeypatch):
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: pip install skypilot")
    monkeypatch.chdir(repository)
    task = sky.Task.from_yaml("sky.yaml")
    (resources,) = task.resources
    assert resources.accelerators == {"H100": 8} and task.workdir == "." and task.num_nodes == 1
    for script in (task.setup, task.run):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = shlex.split(task.run.replace("$SEED", task.envs["SEED"]))
    assert words[:4] == ["bash", "run.sh", "--preset", "leaderboard"]
    assert build_config("leaderboard", {}, parse_overrides(words[4:])).run.seed == 42
