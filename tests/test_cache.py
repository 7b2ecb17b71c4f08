"""A model that reads over a cache says what it says without one, whatever the pieces and the configuration."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.model.cache import KeyValueCache, keep_window
from golf.quant.calibration import generated_rows
from tests.cache_fixtures import CACHED, cached_model, rows_with_documents

configurations = st.builds(
    replace,
    st.just(CACHED),
    num_layers=st.sampled_from([2, 3]),
    attention_window=st.sampled_from([0, 1, 2, 3, 5, 8, 100]),
    document_attention=st.booleans(),
    knowledge_tokens=st.sampled_from([0, 1, 3]),
    knowledge_at=st.sampled_from(["input", "layers"]),
    smear_gate=st.booleans(),
    bigram_vocab_size=st.sampled_from([0, 37]),
    tie_embeddings=st.booleans(),
    mlp_activation=st.sampled_from(["relu2", "tanh"]),
)
pieces = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@torch.no_grad()
def cached_logits(model, ids_BT: torch.Tensor, lengths: list[int], cache: KeyValueCache, **options) -> torch.Tensor:
    """logits_BTV of all positions, read in pieces of these lengths."""
    bounds = [0, *accumulate(lengths)]
    return torch.cat([model.logits(ids_BT[:, a:b], cache=cache, **options) for a, b in pairwise(bounds)], 1)


@settings(max_examples=60)
@given(configurations, pieces, st.integers(0, 99))
def test_pieces_over_a_cache_give_the_logits_of_the_whole(config, lengths, seed):
    model, ids_BT = cached_model(config, seed=seed % 3), rows_with_documents(seed, 2, sum(lengths))
    with torch.no_grad():
        whole_BTV = model.logits(ids_BT)
    cache = KeyValueCache(config)
    torch.testing.assert_close(cached_logits(model, ids_BT, lengths, cache), whole_BTV, rtol=1e-5, atol=1e-5)
    assert cache.length == sum(lengths)


SITES = ["", "int8", "int4", "ternary", "tanh-ternary", "int8-dge5"]


@settings(max_examples=30)
@given(
    configurations,
    st.tuples(*[st.sampled_from(SITES)] * 6),
    st.sampled_from(["", "unsigned8", "tanh-ternary"]),
    pieces,
    st.integers(0, 99),
)
def test_so_with_activation_quantizers(config, sites, hidden, lengths, seed):
    """In float64, so that no value is so near a rounding edge that the order of sums decides."""
    names = ("act_attn_in", "act_q", "act_k", "act_v", "act_attn_out", "act_mlp_in")
    config = replace(config, **dict(zip(names, sites, strict=True)), act_hidden=hidden, mlp_activation="relu2")
    model, ids_BT = cached_model(config, torch.float64), rows_with_documents(seed, 2, sum(lengths))
    with torch.no_grad():
        whole_BTV = model.logits(ids_BT)
    cached_BTV = cached_logits(model, ids_BT, lengths, KeyValueCache(config))
    torch.testing.assert_close(cached_BTV, whole_BTV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"knowledge_tokens": 2}, {"attention_window": 3, "document_attention": True}])
def test_the_last_positions_alone_and_another_base(changes, last):
    config = replace(CACHED, **changes)
    model, ids_BT = cached_model(config), rows_with_documents(3, 2, 12)
    with torch.no_grad():
        whole_BTV = model.logits(ids_BT, rope_base=500.0)
        for first in (4, 9):
            cache = KeyValueCache(config)
            model.logits(ids_BT[:, :first], last=1, rope_base=500.0, cache=cache)
            logits_BSV = model.logits(ids_BT[:, first:], last=last, rope_base=500.0, cache=cache)
            torch.testing.assert_close(logits_BSV, whole_BTV[:, -last:], rtol=0, atol=1e-5)


def test_a_window_forgets_and_knowledge_stays():
    config = replace(CACHED, attention_window=5, knowledge_tokens=2)
    model, ids_BT, sizes = cached_model(config), rows_with_documents(1, 1, 40), []
    cache = KeyValueCache(config)
    for position in range(40):
        cached_logits(model, ids_BT[:, position : position + 1], [1], cache)
        sizes.append(cache.layers[1].k_BGUK.size(2))
    assert sizes[:4] == [3, 4, 5, 6] and set(sizes[3:]) == {2 + 4}
    other = KeyValueCache(config)
    cached_logits(model, ids_BT, [40], other)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.k_BGUK, theirs.k_BGUK, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pinned", "window", "size", "kept"),
    [
        (0, 0, 4, [0, 1, 2, 3]),
        (0, 3, 4, [2, 3]),
        (1, 3, 5, [0, 3, 4]),
        (2, 1, 5, [0, 1]),
        (2, 9, 5, [0, 1, 2, 3, 4]),
        (1, 4, 4, [0, 1, 2, 3]),
    ],
)
def test_what_a_window_keeps(pinned, window, size, kept):
    assert keep_window(torch.arange(size), pinned, window, dim=0).tolist() == kept


def test_the_test_sees_a_cache_that_forgets(monkeypatch):
    """Planted faults: a window too short by one, a second id that is not remembered, positions that stand still."""
    config = replace(CACHED, attention_window=4)
    model, ids_BT = cached_model(config), rows_with_documents(2, 1, 12)
    ids_BT[:] = ids_BT.clamp_min(2)
    with torch.no_grad():
        whole_BTV = model.logits(ids_BT)

    def fault(damage) -> float:
        cache = KeyValueCache(config)
        parts = []
        for position in range(12):
            parts.append(cached_logits(model, ids_BT[:, position : position + 1], [1], cache))
            damage(cache)
        return float((torch.cat(parts, 1) - whole_BTV).abs().max())

    def forget_position(cache):
        for layer in cache.layers:
            layer.k_BGUK, layer.v_BGUK = layer.k_BGUK[:, :, -2:], layer.v_BGUK[:, :, -2:]
        cache.document_BU = cache.document_BU[:, -2:]

    def forget_id(cache):
        cache.recent_BR = cache.recent_BR[:, -1:]

    def stand_still(cache):
        cache.length = min(cache.length, 5)

    assert fault(lambda cache: None) < 1e-5
    for damage in (forget_position, forget_id, stand_still):
        assert fault(damage) > 1e-3, damage.__name__


@pytest.mark.parametrize("changes", [{}, {"attention_window": 4, "knowledge_tokens": 2}])
def test_rows_for_calibration_are_drawn_as_without_a_cache(changes):
    model, generator = cached_model(replace(CACHED, **changes)), torch.Generator().manual_seed(7)
    rows_NT = torch.full((5, 1), CACHED.bos_id)
    for _ in range(23):
        with torch.no_grad():
            chances_NV = torch.softmax(model.logits(rows_NT, last=1)[:, -1], -1)
        rows_NT = torch.cat((rows_NT, torch.multinomial(chances_NV, 1, generator=generator)), 1)
    assert torch.equal(generated_rows(model, 5, 24, 7), rows_NT)
