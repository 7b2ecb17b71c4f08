"""The range coder: every sequence comes back, in as many bits as its probabilities say; damage is found."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.compress.range_coder import FREQUENCY_BITS, CodeError, RangeDecoder, RangeEncoder, whole_frequencies


def rows_of(seed: int, count: int, size: int, spread: float) -> np.ndarray:
    logits_NV = np.random.default_rng(seed).normal(size=(count, size)) * spread
    rows_NV = np.exp(logits_NV - logits_NV.max(1, keepdims=True))
    return rows_NV / rows_NV.sum(1, keepdims=True)


@given(st.integers(0, 10**6), st.integers(0, 300), st.integers(1, 40), st.sampled_from([0.0, 1.0, 30.0, 300.0]))
@settings(deadline=None, max_examples=60)
def test_any_symbols_come_back_by_any_distributions(seed, count, size, spread):
    """Also those of the smallest frequency, and certain ones."""
    rows_NV, rng = rows_of(seed, count, size, spread), np.random.default_rng(seed)
    symbols = rng.integers(0, size, count).tolist()
    encoder = RangeEncoder()
    for row_V, symbol in zip(rows_NV, symbols, strict=True):
        assert encoder.code(whole_frequencies(row_V), symbol) == symbol
    data = encoder.finish()
    decoder = RangeDecoder(data)
    assert [decoder.code(whole_frequencies(row_V)) for row_V in rows_NV] == symbols
    bits = sum(
        FREQUENCY_BITS - np.log2(whole_frequencies(row_V)[symbol])
        for row_V, symbol in zip(rows_NV, symbols, strict=True)
    )
    assert bits - 1 <= 8 * len(data) <= bits + 25 + count * 2e-4


def test_a_carry_runs_through_bytes_that_are_full():
    encoder = RangeEncoder()
    encoder.data, encoder.low = bytearray([7, 255, 255]), (1 << 64) - 1
    encoder.code(np.array([1 << 29, 1 << 29]), 1)
    assert encoder.data[:3] == bytearray([8, 0, 0])


def test_frequencies_are_whole_and_fit():
    for row_V in rows_of(0, 50, 2048, 20.0):
        frequencies_V = whole_frequencies(row_V)
        assert frequencies_V.min() >= 1 and frequencies_V.sum() <= 1 << FREQUENCY_BITS


def test_a_code_that_ends_early_or_was_changed_is_found_or_reads_other_symbols():
    rows_NV, rng = rows_of(3, 400, 30, 1.0), np.random.default_rng(3)
    symbols, encoder = rng.integers(0, 30, 400).tolist(), RangeEncoder()
    for row_V, symbol in zip(rows_NV, symbols, strict=True):
        encoder.code(whole_frequencies(row_V), symbol)
    data = encoder.finish()
    with pytest.raises(CodeError, match="end too early"):
        short = RangeDecoder(data[: len(data) // 2])
        for row_V in rows_NV:
            short.code(whole_frequencies(row_V))
    spoilt = bytearray(data)
    spoilt[20] ^= 1
    decoder = RangeDecoder(bytes(spoilt))
    with contextlib.suppress(CodeError):
        assert [decoder.code(whole_frequencies(row_V)) for row_V in rows_NV] != symbols
