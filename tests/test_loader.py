"""Batches: a function of data and step, the same for every world size. pytest tests/test_loader.py"""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golf.data.loader import BatchPrefetcher, TokenStream, global_batch, spread_start, validation_tokens
from golf.data.shards import DataError, write_shard
from lab.bench.data_bench import LoaderBenchError, bench_loader

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


@pytest.mark.parametrize("seq_len", [7, 16, 32])
def test_spread_order_visits_every_row_once_per_epoch(seq_len):
    tokens = 1000
    rows = (tokens - 1) // seq_len
    starts = [spread_start(row, tokens, seq_len) for row in range(2 * rows)]
    assert sorted(starts[:rows]) == [seq_len * i for i in range(rows)]
    assert sorted(starts[rows:]) == [seq_len * i + seq_len // 3 + 1 for i in range(rows)]


def test_spread_batches_come_from_all_over_the_text():
    starts = np.array([spread_start(row, 3_758_062, 256) for row in range(8 * 100)]).reshape(100, 8)
    gaps = np.diff(np.sort(starts, axis=1), axis=1)
    assert gaps.min() > 3_758_062 // 40  # no two rows of a batch are neighbours


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_spread_batches_are_equal_for_every_world_size(stream, world_size):
    whole = global_batch(stream, 3, 128, 16, row_order="spread")
    parts = [global_batch(stream, 3, 128, 16, rank, world_size, row_order="spread") for rank in range(world_size)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert torch.equal(whole[0][:, 1:], whole[1][:, :-1])


def test_spread_order_needs_one_row(tmp_path):
    write_shard(tmp_path / "a_train_000000.bin", range(16))
    with pytest.raises(DataError, match="do not fill one row"):
        global_batch(TokenStream([tmp_path / "a_train_000000.bin"]), 0, 16, 16, row_order="spread")


def test_a_step_that_was_read_is_not_read_again(stream, monkeypatch):
    reads = []
    with BatchPrefetcher(stream, 256, 32) as batches:
        read_ahead = batches.read_ahead
        monkeypatch.setattr(batches, "read_ahead", lambda step: (reads.append(step), read_ahead(step))[1])
        for step in (0, 0, 1, 2, 2):
            batches.get(step)
        for ahead in batches.ahead.values():
            ahead.result()
    assert reads == [0, 1, 2, 3, 4]


def test_the_bench_finds_a_loader_that_is_too_slow(paths, monkeypatch):
    options = dict(batch_tokens=256, seq_len=32, steps=4, tokens_per_second=256 / 0.1)
    quick = bench_loader(paths, **options)
    assert quick["step_ms"] == pytest.approx(100)
    slow = TokenStream.read_into
    clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)  # a busy machine sleeps longer
    monkeypatch.setattr("lab.bench.data_bench.time", clock)
    monkeypatch.setattr(TokenStream, "read_into", lambda *arguments: (time.sleep(0.3), slow(*arguments))[1])
    planted = bench_loader(paths, **options)
    assert planted["wait_share"] > 0.5 and planted["longest_wait_ms"] > 120 and planted["read_ms"] > 300
    assert 0 <= quick["wait_share"] < planted["wait_share"]


@pytest.mark.parametrize("order", ["sequential", "spread", "shuffled", "documents"])
def test_the_bench_knows_every_order(paths, order):
    bos_id = int(TokenStream(paths).tokens(5, 1)[0])
    figures = bench_loader(paths, 256, 32, order, steps=2, tokens_per_second=1e6, world_size=2, bos_id=bos_id)
    assert 0 <= figures["wait_share"] <= 1 and figures["read_tokens_per_s"] > 0


def test_the_bench_refuses_what_it_can_not_time(paths):
    with pytest.raises(LoaderBenchError, match="1 steps"):
        bench_loader(paths, 256, 32, steps=1)
