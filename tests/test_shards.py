"""Shard files: the competition's format, and every kind of damage named. pytest tests/test_shards.py"""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf.data.shards import ShardError, expand_glob, find_shards, read_shard, write_shard

HEADER_BYTES = 1024


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "a_train_000000.bin"
    write_shard(path, tokens)
    assert read_shard(path).tolist() == tokens


def test_bytes_are_the_competitions(tmp_path):
    path = tmp_path / "a_train_000000.bin"
    write_shard(path, [1, 258, 65535])
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    assert path.read_bytes() == header.tobytes() + b"\x01\x00\x02\x01\xff\xff"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def shard_bytes(magic=20240520, version=1, count=4, held=4) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.arange(held, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (shard_bytes()[:500], "less than a header"),
        (shard_bytes(magic=1), "not a token shard"),
        (shard_bytes(version=2), "version 2"),
        (shard_bytes(held=3), "says 4 tokens but the file holds 3"),
        (shard_bytes(held=5), "says 4 tokens but the file holds 5"),
        (shard_bytes() + b"x", "holds 4.5"),
        (shard_bytes(count=-1), "says -1 tokens"),
        (shard_bytes(count=0, held=0), "says 0 tokens"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "a_val_000007.bin"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_missing_shard(tmp_path):
    with pytest.raises(ShardError, match="no such shard"):
        read_shard(tmp_path / "a_val_000000.bin")


@pytest.mark.parametrize("tokens", [[], [-1], [65536]])
def test_what_does_not_fit_is_not_written(tmp_path, tokens):
    with pytest.raises(ShardError):
        write_shard(tmp_path / "a_train_000000.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "a_train_000000.bin"
    write_shard(path, [1, 2])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, [3, 4])
    assert read_shard(path).tolist() == [1, 2]


def test_find_shards_sorts_and_keeps_the_splits_apart(tmp_path):
    for name in ("a_train_000010.bin", "a_train_000002.bin", "a_val_000000.bin", "a_train_1.bin", "notes.txt"):
        (tmp_path / name).write_bytes(shard_bytes())
    assert [path.name for path in find_shards(tmp_path, "train")] == ["a_train_000002.bin", "a_train_000010.bin"]


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(ShardError, match="no such folder"):
        find_shards(tmp_path / "none", "train")
    with pytest.raises(ShardError, match=r"no \*_train_NNNNNN.bin"):
        find_shards(tmp_path, "train")
    with pytest.raises(ShardError, match="no file matches"):
        expand_glob(str(tmp_path / "*.bin"))


def test_two_data_sets_in_a_folder_are_an_error(tmp_path):
    for name in ("a_train_000000.bin", "b_train_000000.bin"):
        (tmp_path / name).write_bytes(shard_bytes())
    with pytest.raises(ShardError, match="several data sets"):
        find_shards(tmp_path, "train")
