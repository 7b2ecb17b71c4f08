"""What all tests share: one thread, no knobs from the outside, the repository and the shared data."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from golf.config.config import KNOBS
from golf.config.presets import RETIRED_KNOBS
from golf.data.loader import TokenStream
from golf.data.shards import write_shard

for variable in [*map(str.upper, KNOBS), *RETIRED_KNOBS]:  # a SEED of the caller's shell must not reach a test
    os.environ.pop(variable, None)
torch.set_num_threads(1)
hypothesis.settings.register_profile("golf", deadline=None, derandomize=True)
hypothesis.settings.load_profile("golf")


LONG_FILES = (
    "test_resume", "test_end_to_end", "test_ablate_runs", "test_shipped_script", "test_gpu_forecast",
    "test_determinism", "test_demo_page",
)  # fmt: skip
"""Begun first, the longest before all: a file is one process's, and none of these should end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real text and tokenizers, named by GOLF_SHARED; the test is skipped without it."""
    folder = os.environ.get("GOLF_SHARED", "")
    if not folder:
        pytest.skip("GOLF_SHARED names no folder of shared data")
    return Path(folder)


@pytest.fixture(scope="session")
def write_tree() -> Callable[[Path, Mapping[str, str]], None]:
    """Writes files, by relative path, with the folders that they need."""

    def write(root: Path, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def run_command_here(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of the repository in this process, as `python SCRIPT ARGUMENTS` would, without its start."""

    def run(script: str, *arguments: object, cwd: Path = repository) -> subprocess.CompletedProcess:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setattr(sys, "path", [*sys.path])
            patch.chdir(cwd)
            try:
                runpy.run_path(str(repository / script), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
        return subprocess.CompletedProcess(sys.argv, status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """5,000 training tokens of 2 to 63, each near the one before it."""
    path = tmp_path_factory.mktemp("shards") / "tiny_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(-2, 3, 5000).cumsum() % 62 + 2)
    return TokenStream([path])


@pytest.fixture(scope="session")
def prepared(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Knobs that name a small prepared corpus: this project's own sources."""
    folder = tmp_path_factory.mktemp("prepared") / "sources"
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [path.read_text() for path in sorted((repository / "golf").rglob("*.py")) if path.stat().st_size]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "data/prepare.py", "--input", corpus, "--tokenizer", "train:400", "--out", folder]
    subprocess.run([*command, "--val-fraction", "0.3"], check=True, cwd=repository, capture_output=True)
    return [f"data_path={folder}", f"tokenizer_path={folder / 'tokenizer.model'}"]
