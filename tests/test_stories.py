"""The small-GPT study's preset: characters, and a vocabulary that the data decides."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from golf.config.config import Config, build_config
from golf.config.knobs import ConfigError
from golf.data.shards import read_shard
from golf.model.gpt import GPT
from golf.run.datasets import check_vocabulary, corpus_tokenizer, locate_data, open_training_data, with_vocabulary
from golf.runtime import Runtime
from lab.machine.diagnosis import inspect_data
from lab.machine.step_times import random_tokens
from lab.prepare.text_tokenizer import load_text_tokenizer

CPU = Runtime(torch.device("cpu"))
STORIES = [
    f"Once upon a time, {name} had {n} red balls. “Play!”, said {name}." for n in range(60) for name in ("Tim", "Zoë")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def located(corpus, repository, tmp_path_factory) -> Config:
    """The preset's configuration on a file of stories, prepared in a folder of this test."""
    root = tmp_path_factory.mktemp("root")
    (root / "data").mkdir()
    program = root / "data" / "prepare.py"  # the repository's, with its cache here
    program.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(repository)!r})\n"
        f"sys.argv += ['--out', {str(root / 'prepared')!r}, '--val-fraction', '0.3']\n"
        f"runpy.run_path({str(repository / 'data' / 'prepare.py')!r}, run_name='__main__')\n"
    )
    return locate_data(build_config("stories", {}, {"corpus": str(corpus)}), CPU, root)


def test_a_file_of_stories_becomes_characters_and_their_number_the_vocabulary(located):
    tokenizer = load_text_tokenizer(located.data.tokenizer_path)
    assert tokenizer.kind == "chars" and located.data.tokenizer_path.endswith("tokenizer.json")
    train = [text for text in STORIES if text in decoded_documents(located, "train")]
    characters = set("".join(train))
    assert 60 < len(train) < 120 and located.model.vocab_size == tokenizer.vocab_size == 260 + len(characters)
    assert len(open_training_data(located).stream) == sum(map(len, train)) + len(train)


def decoded_documents(config: Config, split: str) -> list[str]:
    tokenizer = load_text_tokenizer(config.data.tokenizer_path)
    ids = np.asarray(read_shard(Path(config.data.data_path) / f"text_{split}_000000.bin"))
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos_id)) if len(part)]


def test_a_character_that_training_never_saw_is_spelled(located):
    tokenizer = load_text_tokenizer(located.data.tokenizer_path)
    ids = tokenizer.encode("a 猫!")
    assert tokenizer.decode(ids) == "a 猫!" and max(ids) < located.model.vocab_size
    assert len(ids) == 2 + 3 + (1 if "!" in "".join(STORIES) else 0)


def test_the_model_is_the_studys(located):
    model = located.model
    assert (model.num_layers, model.model_dim, model.num_heads, model.train_seq_len) == (6, 192, 6, 256)
    matrices = sum(p.numel() for name, p in GPT(model).named_parameters() if p.dim() == 2 and ".weight" in name)
    assert matrices - model.vocab_size * 192 == 2_654_208  # the int8 codes of its artifact
    assert not located.quant.qat_enabled and not model.bigram_vocab_size and not model.smear_gate


def test_a_vocabulary_that_is_named_stays(located):
    named = with_vocabulary(build_config("stories", {}, {"vocab_size": "300"}))
    assert named.model.vocab_size == 300
    with pytest.raises(ConfigError, match="vocab_size=300"):
        paths = {"data_path": located.data.data_path, "tokenizer_path": located.data.tokenizer_path}
        config = build_config("stories", {}, {"vocab_size": "300"} | paths)
        check_vocabulary(config, load_text_tokenizer(config.data.tokenizer_path))


def test_shards_that_are_there_give_their_tokenizers_vocabulary(located):
    config = build_config("stories", {}, {"data_path": located.data.data_path})
    assert locate_data(config, CPU, Path("nowhere")).model == located.model


def test_what_the_corpus_is_prepared_with():
    assert corpus_tokenizer(build_config("stories", {}, {})) == "chars"
    assert corpus_tokenizer(build_config("local", {}, {})) == "train:2048"
    assert corpus_tokenizer(build_config("stories", {}, {"tokenizer_path": "x.model"})) == "x.model"


def test_the_doctor_finds_the_characters(located, tmp_path):
    config = build_config("stories", {}, {"data_path": located.data.data_path})
    found, findings = inspect_data(config, tmp_path)
    assert found["folder"] == located.data.data_path and findings == []
    _, (finding,) = inspect_data(build_config("stories", {}, {}), tmp_path)
    assert finding.remedy == "python data/prepare.py --input embedded --tokenizer chars"


def test_a_measurement_without_text_needs_a_vocabulary():
    with pytest.raises(ConfigError, match="set vocab_size=512"):
        random_tokens(10, build_config("stories", {}, {}))


@pytest.mark.slow
def test_a_run_of_the_preset_is_valid(located, repository, tmp_path):
    """A short run, shrunk: from the shards to the score."""
    small = ["num_layers=2", "model_dim=48", "train_seq_len=32", "eval_seq_len=32", "eval_stride=32", "iterations=12"]
    small += ["max_wallclock_seconds=0", "train_batch_tokens=128", "micro_batch_tokens=128", "compile=off", "threads=1"]
    small += [f"data_path={located.data.data_path}", f"runs_root={tmp_path}", "run_id=s", "swa_start=0.4"]
    command = [sys.executable, "train_gpt.py", "--preset", "stories", *small, "swa_snapshots=2", "eval_batch_seqs=8"]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert result["valid"] and result["tokenizer_kind"] == "chars"
    assert json.loads((tmp_path / "s" / "config.json").read_text())["model"]["vocab_size"] == located.model.vocab_size
