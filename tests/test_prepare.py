"""Preparation: deterministic, safe to kill and to race, and its identity holds. pytest tests/test_prepare.py"""

import json
import subprocess
import sys

import numpy as np
import pytest

from golf.data.manifest import data_identity, load_prepared
from golf.data.prepare import prepare_corpus, prepared_folder
from golf.data.shards import DataError, find_shards, read_shard
from golf.data.tokenizer import load_tokenizer

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "café"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "own.jsonl"
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 40)) + "\n    end\n" for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    return prepare_corpus(corpus, tmp_path_factory.mktemp("out") / "own", 300, 0.1)


def folder_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_the_documents(corpus, prepared):
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    texts = set()
    for split in ("train", "val"):
        tokens = np.concatenate([read_shard(path) for path in find_shards(prepared.folder, split)])
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))
        assert documents[0].size == 0  # every document starts with BOS
        decoded = [tokenizer.decode(ids) for ids in documents[1:]]
        counts = prepared.manifest["splits"][split]
        assert counts["documents"] == len(decoded) and counts["tokens"] == len(tokens)
        assert counts["bytes"] == counts["text_bytes"] == sum(len(text.encode()) for text in decoded)
        assert not texts & set(decoded)
        texts |= set(decoded)
    assert texts == {json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    assert prepared.manifest["duplicates"] == 1
    assert prepared.vocab_size == tokenizer.vocab_size


def test_two_preparations_give_the_same_bytes(corpus, prepared, tmp_path):
    again = prepare_corpus(corpus, tmp_path / "again", 300, 0.1)
    assert folder_bytes(again.folder) == folder_bytes(prepared.folder)


def test_shards_are_cut_at_their_size(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("golf.data.prepare.SHARD_TOKENS", 1000)
    monkeypatch.setattr("golf.data.prepare.ENCODING_BATCH", 7)
    cut = prepare_corpus(corpus, tmp_path / "cut", 300, 0.1)
    shards = [read_shard(path) for path in find_shards(cut.folder, "train")]
    assert len(shards) > 3 and {len(shard) for shard in shards[:-1]} == {1000}
    assert np.array_equal(np.concatenate(shards), read_shard(find_shards(prepared.folder, "train")[0]))


def test_an_existing_model_only_encodes(corpus, prepared, tmp_path):
    other = prepare_corpus(corpus, tmp_path / "other", val_fraction=0.1, model=prepared.tokenizer_path)
    assert other.data_id == prepared.data_id
    assert other.manifest["recipe"]["tokenizer"] == prepared.manifest["tokenizer"]["sha256"]


def test_prepared_data_is_reused_or_refused(corpus, prepared, tmp_path):
    before = (prepared.folder / "manifest.json").stat().st_mtime_ns
    assert prepare_corpus(corpus, prepared.folder, 300, 0.1) == prepared
    assert (prepared.folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="prepared otherwise"):
        prepare_corpus(corpus, prepared.folder, 301, 0.1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="no prepared data; give another"):
        prepare_corpus(corpus, tmp_path, 300, 0.1)


KILLED = """
import os, sys
from golf.data.prepare import prepare_corpus, write_shard
def write_and_die(path, tokens):
    write_shard(path, tokens)
    os._exit(9)
sys.modules["golf.data.prepare"].write_shard = write_and_die
prepare_corpus(sys.argv[1], sys.argv[2], 300, 0.1)
"""


def test_a_killed_preparation_leaves_nothing_in_place(corpus, prepared, tmp_path, repository):
    out = tmp_path / "own"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(corpus), str(out)], cwd=repository)
    assert killed.returncode == 9
    assert not out.exists() and (tmp_path / ".own.partial").is_dir()
    assert folder_bytes(prepare_corpus(corpus, out, 300, 0.1).folder) == folder_bytes(prepared.folder)
    assert not (tmp_path / ".own.partial").exists()


def test_two_processes_do_not_race(corpus, prepared, tmp_path, repository):
    command = [sys.executable, "data/prepare.py", "--input", str(corpus), "--tokenizer", "train:300"]
    command += ["--val-fraction", "0.1", "--out", str(tmp_path / "own"), "--json"]
    running = [subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE) for _ in range(2)]
    answers = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert {answer["data_id"] for answer in answers} == {prepared.data_id}
    assert {answer["folder"] for answer in answers} == {str(tmp_path / "own")}


def test_folder_names_follow_text_and_settings(corpus, tmp_path):
    copy = tmp_path / "own.jsonl"
    copy.write_bytes(corpus.read_bytes())
    name = prepared_folder(copy, 1024, tmp_path)
    assert name.parent == tmp_path and name.name.startswith("own-") and "-sp1024-" in name.name
    assert prepared_folder(copy, 1024, tmp_path) == name
    others = {prepared_folder(copy, 512, tmp_path), prepared_folder(copy, 1024, tmp_path, val_fraction=0.2)}
    copy.write_text('{"text": "changed"}\n')
    others.add(prepared_folder(copy, 1024, tmp_path))
    assert len(others) == 3 and name not in others
    assert prepared_folder("embedded", 1024).as_posix().startswith("data/cache/embedded-py3.")


def test_damage_is_found(corpus, tmp_path):
    folder = prepare_corpus(corpus, tmp_path / "own", 300, 0.1).folder
    shard = find_shards(folder, "val")[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"val_000000.bin: has \d+ bytes, not \d+"):
        load_prepared(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"val_000000.bin: is missing"):
        load_prepared(folder)
    (folder / "manifest.json").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match="not a manifest"):
        load_prepared(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        load_prepared(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no prepared data there"):
        load_prepared(folder)


def test_data_identity(corpus, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    assert data_identity(prepared.folder, tokenizer) == prepared.data_id
    other_model = tmp_path / "other.model"
    other_model.write_bytes(load_prepared_model(corpus, tmp_path))
    other = load_tokenizer(other_model)
    with pytest.raises(DataError, match="was not made with"):
        data_identity(prepared.folder, other)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in find_shards(prepared.folder, "train") + find_shards(prepared.folder, "val"):
        (bare / path.name).write_bytes(path.read_bytes())
    identity = data_identity(bare, tokenizer)
    assert identity == data_identity(bare, tokenizer) != data_identity(bare, other)
    shard = find_shards(bare, "train")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert data_identity(bare, tokenizer) != identity


def load_prepared_model(corpus, folder) -> bytes:
    return prepare_corpus(corpus, folder / "more", 310, 0.1).tokenizer_path.read_bytes()
