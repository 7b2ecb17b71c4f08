"""Preparation: deterministic, safe to kill and to race, and its identity holds. pytest tests/test_prepare.py"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from golf.data.manifest import PreparedData, data_identity, load_prepared
from golf.data.shards import DataError, find_shards, read_shard
from golf.data.sidecar import read_sidecar
from lab.prepare.prepare import Preparation, PreparationWork, preparation_folder, prepare_data
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import load_text_tokenizer
from lab.prepare.work_files import GrowingShards, build_spool

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


def prepare_corpus(source, out, vocab_size: int, val_fraction: float) -> PreparedData:
    return prepare_data(Preparation(str(source), f"train:{vocab_size}", val_fraction), out)


def folder_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_the_documents(corpus, prepared):
    tokenizer = load_text_tokenizer(prepared.tokenizer_path)
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
    monkeypatch.setattr("lab.prepare.encoding.CHUNK_CHARACTERS", 1000)
    cut = prepare_data(Preparation(str(corpus), "train:300", 0.1, shard_tokens=1000), tmp_path / "cut")
    shards = [read_shard(path) for path in find_shards(cut.folder, "train")]
    assert len(shards) > 3 and {len(shard) for shard in shards[:-1]} == {1000}
    assert np.array_equal(np.concatenate(shards), read_shard(find_shards(prepared.folder, "train")[0]))


def test_an_existing_model_only_encodes(corpus, prepared, tmp_path):
    other = prepare_data(Preparation(str(corpus), str(prepared.tokenizer_path), 0.1), tmp_path / "other")
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


KILLED_STEPS = ["make_tokenizer", "write_file_atomically"]


class KilledError(BaseException):
    """Ends a preparation as a kill would: nothing of it can tidy up."""


@pytest.mark.parametrize("order", ["shuffled", "source"])
@pytest.mark.parametrize("place", [*(f"lab.prepare.prepare.{step}" for step in KILLED_STEPS), 1, 5, 9])
def test_a_killed_preparation_goes_on_where_it_was(corpus, tmp_path, monkeypatch, order, place):
    """Killed while it makes the tokenizer, behind some chunk, or before the manifest is there."""
    monkeypatch.setattr("lab.prepare.encoding.CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr("lab.prepare.prepare.NOTED_CHUNKS", 4)
    wanted = Preparation(str(corpus), "train:300", 0.1, order=order, shard_tokens=2000)
    whole = prepare_data(wanted, tmp_path / "whole")
    out, added, add = tmp_path / "own", [], PreparationWork.add

    def kill(*arguments, **settings):
        raise KilledError

    def add_and_kill(work, chunk):
        add(work, chunk)
        added.append(chunk)
        if len(added) == place:
            raise KilledError

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        if isinstance(place, str):
            patched.setattr(place, kill)
        else:
            patched.setattr(PreparationWork, "add", add_and_kill)
        prepare_data(wanted, out)
    assert not out.exists() and (tmp_path / ".own.partial").is_dir()
    monkeypatch.setattr(PreparationWork, "add", lambda work, chunk: (add(work, chunk), added.append(chunk)))
    again = prepare_data(wanted, out)
    assert folder_bytes(again.folder) == folder_bytes(whole.folder)
    assert not (tmp_path / ".own.partial").exists()
    if not isinstance(place, str):  # notes stand behind every fourth chunk: only what came after one is done twice
        documents = sum(counts["documents"] for counts in whole.manifest["splits"].values())
        twice = added[place // 4 * 4 : place]
        assert sum(chunk.documents for chunk in added) == documents + sum(chunk.documents for chunk in twice)


def test_a_partial_preparation_of_something_else_is_thrown_away(corpus, prepared, tmp_path, monkeypatch):
    def kill(work):
        raise KilledError

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(PreparationWork, "finish", kill)
        prepare_corpus(corpus, tmp_path / "own", 301, 0.1)
    assert folder_bytes(prepare_corpus(corpus, tmp_path / "own", 300, 0.1).folder) == folder_bytes(prepared.folder)


KILLED = """
import os, sys
from lab.prepare.prepare import Preparation, PreparationWork, prepare_data
add = PreparationWork.add
def add_and_die(work, chunk):
    add(work, chunk)
    os._exit(9)
PreparationWork.add = add_and_die
prepare_data(Preparation(sys.argv[1], "train:300", 0.1), sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_in_place(corpus, prepared, tmp_path, repository):
    out = tmp_path / "own"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(corpus), str(out)], cwd=repository)
    assert killed.returncode == 9
    assert not out.exists() and (tmp_path / ".own.partial").is_dir()
    assert folder_bytes(prepare_corpus(corpus, out, 300, 0.1).folder) == folder_bytes(prepared.folder)
    assert not (tmp_path / ".own.partial").exists()


@pytest.mark.parametrize("settings", [{"val_docs": 20}, {"order": "source"}, {}], ids=str)
def test_any_number_of_workers_gives_the_same_folder(corpus, tmp_path, monkeypatch, settings):
    monkeypatch.setattr("lab.prepare.encoding.CHUNK_CHARACTERS", 2000)
    wanted = Preparation(str(corpus), "train:300", 0.1, drop_shared=True, **settings)
    done = []
    folders = [prepare_data(wanted, tmp_path / f"{n}", workers=n, advance=done.append).folder for n in (1, 2, 3)]
    assert folder_bytes(folders[0]) == folder_bytes(folders[1]) == folder_bytes(folders[2])
    assert sum(done) == 3 * sum(
        counts["text_bytes"] for counts in load_prepared(folders[0]).manifest["splits"].values()
    )


def decoded_documents(prepared, split) -> list[str]:
    tokenizer = load_text_tokenizer(prepared.tokenizer_path)
    tokens = np.concatenate([read_shard(path) for path in find_shards(prepared.folder, split)])
    return [tokenizer.decode(ids[1:]) for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))[1:]]


def test_the_first_documents_are_held_out_in_the_order_of_the_source(corpus, tmp_path):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    wanted = Preparation(str(corpus), "bytes", val_docs=20)
    with pytest.raises(DataError, match=r"document 300 \('.*'\) is also among the first 20.*--drop-shared"):
        prepare_data(wanted, tmp_path / "own")
    prepared = prepare_data(replace(wanted, drop_shared=True), tmp_path / "own")
    assert decoded_documents(prepared, "val") == texts[:20]
    assert decoded_documents(prepared, "train") == texts[20:300]
    assert prepared.manifest["duplicates"] == 1 and prepared.tokenizer_path.name == "tokenizer.json"
    with pytest.raises(DataError, match="no document is left for train"):
        prepare_data(Preparation(str(corpus), "bytes", val_docs=301), tmp_path / "all")


def test_a_share_by_hash_in_the_order_of_the_source(corpus, tmp_path):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    prepared = prepare_data(Preparation(str(corpus), "bytes", 0.1, order="source"), tmp_path / "own")
    held_out = set(build_spool(iter_documents(corpus), tmp_path, 0.1, seed=0).documents("val"))
    assert decoded_documents(prepared, "val") == [text for text in texts if text in held_out]
    assert decoded_documents(prepared, "train") == [text for text in texts if text not in held_out]


def test_settings_that_contradict_each_other(corpus):
    with pytest.raises(DataError, match="shuffled order"):
        Preparation(str(corpus), val_docs=3, order="shuffled")
    with pytest.raises(DataError, match="val_fraction"):
        Preparation(str(corpus), val_fraction=2)
    with pytest.raises(DataError, match="give --merges FILE"):
        Preparation(str(corpus), "gpt2").recipe()


def test_characters_and_bytes(corpus, tmp_path):
    for kind, vocab_size in (("bytes", 260), ("chars", None)):
        prepared = prepare_data(Preparation(str(corpus), kind, 0.1), tmp_path / kind)
        tokenizer = load_text_tokenizer(prepared.tokenizer_path)
        assert prepared.manifest["tokenizer"]["kind"] == tokenizer.kind == kind
        assert vocab_size in (None, tokenizer.vocab_size)
        assert data_identity(prepared.folder, tokenizer) == prepared.data_id
        splits = prepared.manifest["splits"].values()
        assert all(counts["bytes"] == counts["text_bytes"] for counts in splits)


@pytest.fixture(scope="module")
def capitals(tmp_path_factory):
    path = tmp_path_factory.mktemp("capitals") / "own.jsonl"
    texts = [f"Number {n} SAYS: iPhone, \ue001 and École {WORDS[n % 9].title()}" for n in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_caseops_has_the_bytes_of_its_validation_tokens(capitals, tmp_path):
    wanted = Preparation(str(capitals), "train:400", 0.1, transform="caseops", shard_tokens=300)
    prepared = prepare_data(wanted, tmp_path / "own")
    assert prepared.manifest["transform"] == prepared.manifest["tokenizer"]["kind"] == "caseops"
    texts = {json.loads(line)["text"] for line in capitals.read_text().splitlines()}
    assert set(decoded_documents(prepared, "val")) | set(decoded_documents(prepared, "train")) == texts
    val_paths = find_shards(prepared.folder, "val")
    tokens = np.concatenate([read_shard(path) for path in val_paths])
    token_bytes = read_sidecar(val_paths)
    assert len(val_paths) > 1 and len(token_bytes) == len(tokens)
    assert np.array_equal(token_bytes, load_text_tokenizer(prepared.tokenizer_path).target_bytes(tokens))
    assert token_bytes.sum() == prepared.manifest["splits"]["val"]["text_bytes"]
    names = [name for name in prepared.manifest["files"] if "_val_bytes_" in name]
    assert len(names) == len(val_paths)
    with pytest.raises(DataError, match="is a tokenizer for --transform caseops"):
        Preparation(str(capitals), str(prepared.tokenizer_path), transform="none").recipe()
    again = prepare_data(
        Preparation(str(capitals), str(prepared.tokenizer_path), 0.1, shard_tokens=300), tmp_path / "b"
    )
    assert again.data_id == prepared.data_id


def test_growing_shards_are_the_shards_of_their_tokens(tmp_path):
    tokens = np.arange(25, dtype="<u2")
    shards = GrowingShards(tmp_path, "x_train", 10)
    for part in np.split(tokens, [3, 4, 10, 24]):
        shards.append(part.tobytes())
    shards.close()
    assert shards.shards == 3
    paths = find_shards(tmp_path, "train")
    assert [len(read_shard(path)) for path in paths] == [10, 10, 5]
    assert np.array_equal(np.concatenate([read_shard(path) for path in paths]), tokens)
    for begin in (0, 7, 10, 20, 25):  # going on behind `begin` tokens gives the same
        shards = GrowingShards(tmp_path, "x_train", 10, begin)
        shards.append(tokens[begin:].tobytes())
        shards.close()
        assert np.array_equal(np.concatenate([read_shard(path) for path in find_shards(tmp_path, "train")]), tokens)
    with pytest.raises(DataError, match="shorter than its preparation noted"):
        GrowingShards(tmp_path, "x_train", 10, 26)


@pytest.mark.slow
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

    def folder(vocab_size: int, val_fraction: float = 0.05):
        return preparation_folder(Preparation(str(copy), f"train:{vocab_size}", val_fraction), tmp_path)

    name = folder(1024)
    assert name.parent == tmp_path and name.name.startswith("own-") and "-sp1024-" in name.name
    assert folder(1024) == name
    others = {folder(512), folder(1024, val_fraction=0.2)}
    copy.write_text('{"text": "changed"}\n')
    others.add(folder(1024))
    assert len(others) == 3 and name not in others
    assert preparation_folder(Preparation("embedded")).as_posix().startswith("data/cache/embedded-py3.")


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
    tokenizer = load_text_tokenizer(prepared.tokenizer_path)
    assert data_identity(prepared.folder, tokenizer) == prepared.data_id
    other_model = tmp_path / "other.model"
    other_model.write_bytes(load_prepared_model(corpus, tmp_path))
    other = load_text_tokenizer(other_model)
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
