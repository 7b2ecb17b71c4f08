"""Shuffled documents: every document once in each epoch, in an order of (seed, epoch) alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golf.data.loader import (
    BatchPrefetcher,
    ShuffledDocuments,
    TokenStream,
    document_starts,
    global_batch,
    order_stream,
)
from golf.data.shards import DataError, write_shard

BOS = 1
LENGTHS = (5, 0, 17, 1, 80, 3, 3, 12, 40, 2, 9, 26)
"""Tokens of the documents, without their start; one is longer than the rows below, and some go over a shard's end."""


def write_shards(folder: Path, tokens_N: np.ndarray, count: int = 3) -> list[Path]:
    paths = [folder / f"a_train_{index:06d}.bin" for index in range(count)]
    for path, part in zip(paths, np.array_split(tokens_N, count), strict=True):
        write_shard(path, part)
    return paths


@pytest.fixture(scope="module")
def tokens_N() -> np.ndarray:
    chance = np.random.default_rng(0)
    return np.concatenate([[BOS, *chance.integers(4, 60_000, length)] for length in LENGTHS])


@pytest.fixture(scope="module")
def stream(tokens_N, tmp_path_factory) -> TokenStream:
    return TokenStream(write_shards(tmp_path_factory.mktemp("shards"), tokens_N))


def documents_of(tokens_N: np.ndarray) -> list[tuple[int, ...]]:
    starts = np.flatnonzero(tokens_N == BOS)
    return [tuple(part) for part in np.split(tokens_N, starts[1:])]


def epoch_tokens(shuffled: ShuffledDocuments, epoch: int) -> np.ndarray:
    return shuffled.tokens(epoch * len(shuffled), len(shuffled))


def test_every_epoch_has_every_document_once_in_an_order_of_its_own(stream, tokens_N):
    shuffled = ShuffledDocuments(stream, BOS, seed=3)
    epochs = [documents_of(epoch_tokens(shuffled, epoch)) for epoch in range(4)]
    assert len(shuffled) == len(stream) == len(tokens_N)
    for documents in epochs:
        assert Counter(documents) == Counter(documents_of(tokens_N))
    assert len({tuple(documents) for documents in epochs}) == 4


def test_the_order_is_that_of_the_seed(stream):
    orders = {seed: documents_of(epoch_tokens(ShuffledDocuments(stream, BOS, seed), 0)) for seed in (0, 1, 42)}
    assert orders[42] == documents_of(epoch_tokens(ShuffledDocuments(stream, BOS, 42), 0))
    assert len({tuple(order) for order in orders.values()}) == 3


def test_the_order_stays_the_same_for_ever(stream):
    """Runs of old are rebuilt only as long as this holds."""
    sources_D, begins_D = ShuffledDocuments(stream, BOS, seed=42).layout(1)
    assert np.searchsorted(document_starts(stream, BOS), sources_D).tolist() == PINNED_ORDER
    assert begins_D[-1] == len(stream)


PINNED_ORDER = [4, 10, 9, 5, 3, 0, 11, 2, 7, 1, 6, 8]


@given(start=st.integers(0, 700), count=st.integers(0, 500))
def test_tokens_are_the_epochs_one_after_the_other(stream, start, count):
    shuffled = ShuffledDocuments(stream, BOS, seed=5)
    whole = np.concatenate([epoch_tokens(shuffled, epoch) for epoch in range(6)])
    tokens = ShuffledDocuments(stream, BOS, seed=5).tokens(start, count)
    assert tokens.dtype == np.int64 and np.array_equal(tokens, whole[start : start + count])


def test_any_step_is_rebuilt_without_those_before(stream):
    for order in ("shuffled", "documents"):
        walked = order_stream(stream, order, BOS, 7)
        batches = [global_batch(walked, step, 64, 16, row_order=order) for step in range(30)]
        for step in (29, 3, 11):
            rebuilt = global_batch(order_stream(stream, order, BOS, 7), step, 64, 16, row_order=order)
            assert all(torch.equal(one, other) for one, other in zip(batches[step], rebuilt, strict=True))


@pytest.mark.parametrize("order", ["shuffled", "documents"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_global_batches_are_the_same_for_every_world_size(stream, order, world_size):
    shuffled = order_stream(stream, order, BOS, 1)
    whole = global_batch(shuffled, 5, 128, 16, row_order=order)
    parts = [global_batch(shuffled, 5, 128, 16, rank, world_size, row_order=order) for rank in range(world_size)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert torch.equal(whole[0][:, 1:], whole[1][:, :-1])


def test_shuffled_rows_are_cut_from_one_stream(stream):
    shuffled = ShuffledDocuments(stream, BOS, seed=0)
    inputs_BT, targets_BT = global_batch(shuffled, 2, 64, 16, row_order="shuffled")
    assert inputs_BT.flatten().tolist() == shuffled.tokens(128, 64).tolist()
    assert targets_BT.flatten().tolist() == shuffled.tokens(129, 64).tolist()


def test_rows_begin_where_a_document_does(stream):
    shuffled, seq_len = ShuffledDocuments(stream, BOS, seed=0), 16
    inside = 0
    for row in range(200):
        start = shuffled.row_start(row, seq_len)
        assert 0 <= start - row * seq_len < seq_len
        if start == row * seq_len and shuffled.tokens(start, 1)[0] != BOS:
            assert BOS not in shuffled.tokens(start, seq_len), "a document starts in this row, and not in front"
            inside += 1
        else:
            assert shuffled.tokens(start, 1)[0] == BOS
            assert BOS not in shuffled.tokens(row * seq_len, start - row * seq_len)
    assert 0 < inside < 100, "the long documents must have rows of their own for the test to mean something"


def test_rows_at_documents_reach_nearly_all_of_the_text_over_a_few_epochs(stream, tokens_N):
    shuffled, seen = ShuffledDocuments(stream, BOS, seed=0), set()
    for row in range(8 * len(tokens_N) // 16):
        seen.update(shuffled.tokens(shuffled.row_start(row, 16), 16).tolist())
    assert len(seen & set(tokens_N.tolist())) > 0.95 * len(set(tokens_N.tolist()))


def test_text_before_the_first_start_is_a_document(tmp_path):
    tokens_N = np.array([7, 8, BOS, 9, 10, BOS, 11])
    stream = TokenStream(write_shards(tmp_path, tokens_N, 2))
    assert document_starts(stream, BOS).tolist() == [0, 2, 5]
    assert sorted(epoch_tokens(ShuffledDocuments(stream, BOS, 0), 0)) == sorted(tokens_N)


def test_held_out_tokens_are_not_shuffled_in(tmp_path):
    tokens_N = np.arange(2, 302)
    tokens_N[::30] = BOS
    stream = TokenStream(write_shards(tmp_path, tokens_N), held_out=25)
    assert sorted(epoch_tokens(ShuffledDocuments(stream, BOS, 0), 0)) == sorted(tokens_N[:275])
    assert document_starts(stream, BOS)[-1] == 270


def test_a_stream_without_documents_is_refused(tmp_path):
    stream = TokenStream(write_shards(tmp_path, np.arange(2, 100)))
    with pytest.raises(DataError, match="no two documents"):
        order_stream(stream, "shuffled", BOS, 0)


@pytest.mark.parametrize("order", ["sequential", "spread"])
def test_other_orders_take_the_stream_as_it_is(stream, order):
    assert order_stream(stream, order, BOS, 0) is stream


def test_prefetched_batches_of_shuffled_documents(stream):
    shuffled = ShuffledDocuments(stream, BOS, seed=2)
    with BatchPrefetcher(ShuffledDocuments(stream, BOS, seed=2), 64, 16, 1, 2, row_order="documents") as batches:
        for step in (0, 1, 2, 3, 9, 10):
            expected = global_batch(shuffled, step, 64, 16, 1, 2, row_order="documents")
            for got, wanted in zip(batches.get(step), expected, strict=True):
                assert torch.equal(got, wanted)
