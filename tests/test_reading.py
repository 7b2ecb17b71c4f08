"""docs/READING.md against what runs: the files on the way from text to shards, and from a shard to its loss.

python -m pytest tests/test_reading.py
"""

import inspect
import json
import re
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from golf.config.config import build_config
from golf.data.loader import TokenStream
from golf.data.shards import find_shards
from golf.run.trainer import new_trainer
from golf.runtime import Runtime

MOST_FILES_FROM_SHARD, MOST_FILES_FROM_TEXT = 12, 24
STORY = {"train_gpt.py", "golf/run/datasets.py", "golf/run/train_loop.py"}
"""Files that hand a batch on without being called for one: they call the others."""
TOY = dict(
    vocab_size=400, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, bigram_vocab_size=256, bigram_dim=16,
    train_seq_len=64, train_batch_tokens=512, micro_batch_tokens=512, iterations=8, holdout_every=0, eval_seq_len=128,
    eval_stride=128, compile="off", device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def reading(repository) -> str:
    return (repository / "docs" / "READING.md").read_text(encoding="utf-8")


class CallTrace:
    """Collects the repository's files whose functions run, in all threads that start meanwhile."""

    def __init__(self, root: Path):
        self.root, self.names = root, set()

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # bodies of modules and classes are not functions
            self.names.add(code.co_filename)

    def start(self) -> None:
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def run(self, function: Callable[[], object]) -> set[str]:
        """Returns the files of the package, lab/ and data/ whose functions ran within `function`, or until `stop`."""
        self.start()
        try:
            function()
        finally:
            self.stop()
        paths = {(self.root / name).resolve() for name in self.names}
        inside = {path.relative_to(self.root).as_posix() for path in paths if path.is_relative_to(self.root)}
        files = {file for file in inside if file.startswith(("data/", "lab/", "golf/"))}
        assert files, "nothing of the repository ran"
        return files


def run_prepare(arguments: list[str]) -> None:
    """Runs data/prepare.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data/prepare.py", *arguments])
        try:
            runpy.run_path("data/prepare.py", run_name="__main__")
        except SystemExit as end:
            assert not end.code


@pytest.fixture(scope="module")
def preparation(repository, tmp_path_factory) -> tuple[Path, set[str]]:
    """A folder of tiny shards, and the files that ran while they were made."""
    folder, corpus = tmp_path_factory.mktemp("reading") / "shards", tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [path.read_text(encoding="utf-8") for path in sorted((repository / "golf").rglob("*.py"))]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text), encoding="utf-8")
    arguments = ["--input", str(corpus), "--tokenizer", "train:400", "--out", str(folder), "--workers", "1", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        runpy.run_path("data/prepare.py")  # what imports do is not on the way
        return folder, CallTrace(repository).run(lambda: run_prepare([*arguments, "--val-fraction", "0.3"]))


@pytest.fixture(scope="module")
def shard_to_loss(repository, preparation) -> set[str]:
    """Files from the shards on the disk to the loss of a batch, with the leaderboard's features, grid included."""
    folder, trace = preparation[0], CallTrace(repository)
    places = dict(data_path=folder, tokenizer_path=folder / "tokenizer.model")
    config = build_config("leaderboard", {}, {knob: str(value) for knob, value in (TOY | places).items()})
    trainer = new_trainer(config, Runtime(torch.device("cpu")), TokenStream(find_shards(folder, "train")))
    trainer.set_fake_quantization(True)
    model, losses = trainer.forward, []

    def forward(*batch: torch.Tensor) -> torch.Tensor:
        losses.append(model(*batch))
        trace.stop()  # here it is
        return losses[0]

    def read_and_step() -> None:
        trainer.batches.stream = TokenStream(find_shards(folder, "train"))
        trainer.forward = forward
        trainer.accumulate_gradients(0)

    files = trace.run(read_and_step)
    trainer.batches.close()
    assert losses[0].isfinite()
    return files | STORY


def section(text: str, heading: str) -> str:
    """The text of a page below a heading, up to the next one."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_one_batch_is_followed_from_shard_to_loss_through_few_files(shard_to_loss, reading):
    assert len(shard_to_loss) <= MOST_FILES_FROM_SHARD, sorted(shard_to_loss)
    assert f"From a shard to its loss these are {len(shard_to_loss)}." in reading


def test_reading_names_every_file_from_shard_to_loss_and_no_other(shard_to_loss, reading):
    named = re.findall(r"^- `([\w/]+\.py)`", section(reading, "From shards to the loss"), re.MULTILINE)
    assert sorted(named) == sorted(shard_to_loss)


def test_from_text_to_loss_are_no_more_files_than_today(preparation, shard_to_loss):
    files = preparation[1] | shard_to_loss
    assert len(files) <= MOST_FILES_FROM_TEXT, sorted(files)


def test_reading_names_every_file_from_text_to_loss(preparation, reading):
    before_the_loss = reading.split("\n## From the loss to weights\n")[0]
    assert [file for file in sorted(preparation[1]) if f"- `{file}`" not in before_the_loss] == []


def test_what_reading_says_to_look_at_is_in_the_file(repository, reading):
    entries = re.findall(r"^- `([\w/]+\.py)`(.*?)(?=^- |^#|\Z)", reading, re.MULTILINE | re.DOTALL)
    assert len(entries) > 30
    for file, text in entries:
        source = (repository / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", text.partition("Look")[2]):
            assert re.search(rf"^\s*(def|class) {name}\b|^{name} = ", source, re.MULTILINE), f"{file}: no {name}"
