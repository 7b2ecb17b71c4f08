"""Keys and values as codes: bits there and back, the same outputs as the plain cache, and bytes that are counted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.config.model import ModelConfig
from golf.config.site_quantizers import parse_site
from golf.model.cache import KeyValueCache
from golf.quant.tensor_classes import QuantError
from lab.cost.kv_bytes import KV_SETTINGS, KvBytesError, kv_bytes_per_token, kv_table
from lab.generate.packed_cache import pack_codes, packed_cache, packed_width, scale_count, unpack_codes
from tests.cache_fixtures import CACHED, cached_model, rows_with_documents

INTEGERS = [f"int{bits}" for bits in range(2, 9)]
SITES = [
    *INTEGERS, "ternary", "binary", "ternary-leastsq", "ternary-t0.7", "binary-leastsq", "twosided8", "tanh-ternary",
    "tanh-int4", "unsigned4", "tanh-binary", "sigmoid-binary", "unit-ternary", "unit-int3",
]  # fmt: skip


@given(st.sampled_from(SITES), st.integers(1, 19), st.integers(0, 2**32 - 1))
def test_codes_are_packed_tightly_and_come_back(text, values, seed):
    site = parse_site(text, activation=True)
    levels = torch.arange(site.low, site.high + 1, site.step_of_levels).float()
    drawn = torch.randint(len(levels), (2, 3, 4, values), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(levels[drawn], site)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 4, -(-values * site.bits // 8))
    assert torch.equal(unpack_codes(packed, values, site), levels[drawn])


def test_bits_by_hand():
    int3, ternary = (parse_site(text, activation=True) for text in ("int3", "ternary"))
    assert pack_codes(torch.tensor([[-3.0, 3.0, 0.0]]), int3).tolist() == [[0b11110000, 0b0]]  # 0, 6, 3 from bit 0 on
    assert pack_codes(torch.tensor([[-1.0, 0.0, 1.0, 1.0, 0.0]]), ternary).tolist() == [[0b10100100, 0b01]]


@torch.no_grad()
def stepwise_logits(model, ids_BT: torch.Tensor, cache: KeyValueCache, first: int = 5) -> torch.Tensor:
    parts = [model.logits(ids_BT[:, :first], cache=cache)]
    parts += [model.logits(ids_BT[:, at : at + 1], cache=cache) for at in range(first, ids_BT.size(1))]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", SITES)
def test_the_packed_cache_gives_the_plain_ones_outputs_exactly(text, dtype):
    config = replace(CACHED, act_k=text, act_v=text if text != "binary" else "int8")
    model, ids_BT = cached_model(config, dtype), rows_with_documents(1, 2, 14)
    plain_BTV = stepwise_logits(model, ids_BT, KeyValueCache(config))
    assert torch.equal(stepwise_logits(model, ids_BT, packed_cache(config)), plain_BTV)


@settings(max_examples=40)
@given(
    st.sampled_from(["", *SITES]), st.sampled_from(SITES), st.booleans(), st.sampled_from([0, 1, 4]),
    st.sampled_from([0, 2]), st.sampled_from(["input", "layers"]), st.integers(1, 9),
)  # fmt: skip
@pytest.mark.slow
def test_so_with_windows_documents_and_knowledge(act_k, act_v, documents, window, knowledge, place, first):
    config = replace(
        CACHED, act_k=act_k, act_v=act_v, document_attention=documents, attention_window=window,
        knowledge_tokens=knowledge, knowledge_at=place,
    )  # fmt: skip
    model, ids_BT = cached_model(config), rows_with_documents(first, 2, 10)
    plain_BTV = stepwise_logits(model, ids_BT, KeyValueCache(config), first)
    assert torch.equal(stepwise_logits(model, ids_BT, packed_cache(config), first), plain_BTV)


def test_values_that_are_all_nothing_keep_their_place():
    config = replace(CACHED, act_k="int8", act_v="twosided8")
    model, ids_BT = cached_model(config), rows_with_documents(2, 1, 8)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_v.weight.zero_()
    plain_BTV = stepwise_logits(model, ids_BT, KeyValueCache(config))
    assert torch.equal(stepwise_logits(model, ids_BT, packed_cache(config)), plain_BTV)


@pytest.mark.parametrize("text", [text for text in SITES if scale_count(parse_site(text, activation=True))])
def test_half_scales_are_off_by_no_more_than_they_say(text):
    config = replace(CACHED, act_k=text, act_v=text)
    model, ids_BT = cached_model(config), rows_with_documents(4, 2, 12)
    exact, half = packed_cache(config), packed_cache(config, torch.float16)
    stepwise_logits(model, ids_BT, exact), stepwise_logits(model, ids_BT, half)
    for name in ("k", "v"):
        part, rough = getattr(exact.layers[0], name), getattr(half.layers[0], name)
        values, near = part.decode(*part.kept, 8), rough.decode(*rough.kept, 8)
        assert rough.kept[1].dtype == torch.float16 and torch.equal(part.kept[0], rough.kept[0])
        assert ((values - near).abs() <= 2**-11 * values.abs()).all() and not torch.equal(values, near)


def test_a_model_without_codes_is_refused():
    with pytest.raises(QuantError, match="act_k or act_v"):
        packed_cache(ModelConfig())


# ---- bytes ----


@settings(max_examples=40)
@given(
    st.sampled_from(["", *SITES]), st.sampled_from(["", *SITES]), st.sampled_from([2, 6, 8, 10]),
    st.sampled_from([1, 2]), st.sampled_from([torch.float32, torch.float16]), st.sampled_from([0, 3]),
    st.sampled_from([0, 6]),
)  # fmt: skip
@pytest.mark.slow
def test_bytes_by_the_formula_are_those_of_the_tensors(act_k, act_v, head_dim, heads, scale_dtype, knowledge, window):
    config = replace(
        CACHED, model_dim=4 * head_dim, num_heads=4, num_kv_heads=heads, act_k=act_k, act_v=act_v,
        knowledge_tokens=knowledge, attention_window=window,
    )  # fmt: skip
    model, ids_BT = cached_model(config, torch.bfloat16), rows_with_documents(0, 1, 11)
    cache = packed_cache(config, scale_dtype) if act_k or act_v else KeyValueCache(config)
    found = kv_bytes_per_token(config, value_bytes=2, scale_bytes=scale_dtype.itemsize)
    for position in range(11):
        with torch.no_grad():
            model.logits(ids_BT[:, position : position + 1], cache=cache)
        assert sum(layer.nbytes for layer in cache.layers) == found.of_text(position + 1)
    if act_k or act_v:
        kept = (window - 1 if window else 11) + knowledge
        assert [layer.k.nbytes for layer in cache.layers] == [kept * size for size in found.k_by_layer]
        assert [layer.v.nbytes for layer in cache.layers] == [kept * size for size in found.v_by_layer]


def test_sizes_of_known_heads():
    config = ModelConfig(num_layers=2, model_dim=768, num_heads=6, num_kv_heads=6)
    sizes = {
        ("", ""): 6 * (256 + 256), ("int8", "int8"): 6 * 2 * (128 + 4), ("int4", ""): 6 * (64 + 4 + 256),
        ("ternary", "binary"): 6 * (32 + 4 + 16 + 4), ("tanh-ternary", ""): 6 * (32 + 256),
        ("twosided8", "int3"): 6 * (128 + 8 + 48 + 4),
    }  # fmt: skip
    for (act_k, act_v), size in sizes.items():
        found = kv_bytes_per_token(replace(config, act_k=act_k, act_v=act_v))
        assert found.k_by_layer[0] + found.v_by_layer[0] == size and found.per_token == 2 * size
    assert packed_width(3, 3) == 2 and packed_width(8, 8) == 8


def test_two_bit_keys_alone_gain_at_most_a_factor_of_1_78():
    """The published study kept values in 16 bits (facts of it: 1.78)."""
    config = ModelConfig(num_layers=10, model_dim=768, num_heads=6, num_kv_heads=6)
    gains = {(row.act_k, row.act_v): row.gain for row in kv_table(config)}
    assert gains["tanh-ternary", ""] == pytest.approx(16 / 9) and round(16 / 9, 2) == 1.78
    assert gains["", ""] == 1 and 1.7 < gains["ternary", ""] < gains["tanh-ternary", ""]
    assert all(gain <= 16 / 9 for (_, act_v), gain in gains.items() if not act_v)
    assert gains["tanh-ternary", "tanh-ternary"] == pytest.approx(8)


def test_the_longest_text_that_a_memory_holds():
    config = replace(CACHED, knowledge_tokens=4, act_k="int4", act_v="int8")
    found = kv_bytes_per_token(config)
    assert found.per_token == 3 * 2 * (4 + 4 + 8 + 4) and found.knowledge == 4 * found.per_token
    for memory in (5 * found.per_token, 1000, 12_345):
        tokens = found.longest_text(memory)
        assert found.of_text(tokens) <= memory < found.of_text(tokens + 1)
    with pytest.raises(KvBytesError, match="hold no token: each takes 120 bytes, beside 480"):
        found.longest_text(5 * found.per_token - 1)
    sliding = kv_bytes_per_token(replace(config, attention_window=9))
    assert sliding.longest_text(12 * 120) is None and sliding.of_text(10**9) == 12 * 120
    assert sliding.longest_text(12 * 120 - 1) == 7


def test_the_table_has_the_model_itself_first():
    config = replace(CACHED, act_k="int5", act_v="int6")
    rows = kv_table(config, memory_bytes=10**6)
    assert [(row.act_k, row.act_v) for row in rows] == [("int5", "int6"), *KV_SETTINGS]
    for row in rows:
        assert row.bytes.of_text(row.longest_text) <= 10**6 < row.bytes.of_text(row.longest_text + 1)
    assert kv_table(replace(config, act_k="", act_v=""))[0].longest_text is None
