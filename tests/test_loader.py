"""Batches: a function of data and step, the same for every world size. pytest tests/test_loader.py"""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golf.data.loader import BatchPrefetcher, TokenStream, global_batch, validation_tokens
from golf.data.shards import DataError, write_shard

SIZES = (700, 1, 299, 1000)
TOTAL = sum(SIZES)


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(0, 65536, TOTAL)
    made = []
    for index, (start, size) in enumerate(zip(np.cumsum((0, *SIZES)), SIZES, strict=False)):
        made.append(folder / f"a_train_{index:06d}.bin")
        write_shard(made[-1], tokens[start : start + size])
    return made


@pytest.fixture(scope="session")
def stream(paths) -> TokenStream:
    return TokenStream(paths)


@given(start=st.integers(0, 5 * TOTAL), count=st.integers(0, 3 * TOTAL))
def test_stream_is_the_shards_over_and_over(paths, stream, start, count):
    whole = validation_tokens(paths)
    assert whole.dtype == np.uint16 and len(stream) == TOTAL
    tokens = stream.tokens(start, count)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, whole[np.arange(start, start + count) % TOTAL])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 1000])
def test_global_batch_is_the_same_for_every_world_size(stream, step, world_size):
    ranks = [global_batch(stream, step, 512, 32, rank, world_size) for rank in range(world_size)]
    expected = torch.from_numpy(stream.tokens(step * 512, 513))
    assert torch.equal(torch.cat([inputs_BT for inputs_BT, _ in ranks]), expected[:-1].view(16, 32))
    assert torch.equal(torch.cat([targets_BT for _, targets_BT in ranks]), expected[1:].view(16, 32))
    assert all(part.dtype == torch.int64 and part.shape == (16 // world_size, 32) for pair in ranks for part in pair)


@pytest.mark.parametrize(
    ("batch_tokens", "seq_len", "world_size", "message"),
    [(100, 32, 1, "not a multiple of train_seq_len=32"), (96, 32, 2, "3 rows of 32 tokens can't be dealt out")],
)
def test_unequal_rows_are_an_error(stream, batch_tokens, seq_len, world_size, message):
    with pytest.raises(DataError, match=message):
        global_batch(stream, 0, batch_tokens, seq_len, 0, world_size)
    with pytest.raises(DataError, match=message):
        BatchPrefetcher(stream, batch_tokens, seq_len, 0, world_size)


def test_prefetched_batches_are_the_batches(stream):
    with BatchPrefetcher(stream, 256, 32, rank=1, world_size=2) as batches:
        for step in (0, 1, 2, 3, 10, 11, 5, 5, 6):
            for got, expected in zip(batches.get(step), global_batch(stream, step, 256, 32, 1, 2), strict=True):
                assert torch.equal(got, expected)


def test_prefetcher_leaves_no_thread(stream):
    before = threading.active_count()
    batches = BatchPrefetcher(stream, 256, 32)
    batches.get(0)
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_caller(stream, monkeypatch):
    with BatchPrefetcher(stream, 256, 32) as batches:

        def fail(*_):
            raise OSError("disk gone")

        monkeypatch.setattr(stream, "tokens", fail)
        with pytest.raises(OSError, match="disk gone"):
            batches.get(0)


@pytest.mark.gpu
def test_prefetched_batches_on_a_gpu(stream):
    with BatchPrefetcher(stream, 256, 32, device="cuda") as batches:
        for step in range(20):
            for got, expected in zip(batches.get(step), global_batch(stream, step, 256, 32), strict=True):
                assert got.device.type == "cuda" and torch.equal(got.cpu(), expected)


def test_no_shards():
    with pytest.raises(DataError, match="at least one shard"):
        TokenStream([])
    with pytest.raises(DataError, match="no validation shards"):
        validation_tokens([])
