"""Codec rans: exact, near the entropy where codes are independent, below it where they are not, safe on any bytes."""

import hashlib
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.artifact.codecs import ArtifactError
from golf.artifact.context_model import MEAN_LEVELS, bell_counts, next_halves, tile_edges
from golf.artifact.rans import FREQUENCY_BITS, STATE_BYTES, RansReader, RansWriter, lane_count
from golf.artifact.sequences import decode_halves, decode_sequence, encode_halves, encode_sequence
from golf.artifact.sizes import code_entropy_bytes
from golf.artifact.stacks import StackSpec, decode_stacks, encode_stacks, refer_rows, restore_rows
from golf.artifact.streams import BINARY, MODELLED, RAW, TRITS, decode_codes, encode_codes
from golf.quant.trellis import trellis_halves


def entropy_bytes(codes: np.ndarray) -> float:
    return code_entropy_bytes([torch.from_numpy(codes.astype(np.int8))])


def bell(draw: np.random.Generator, shape: tuple[int, ...], deviation: object) -> np.ndarray:
    return np.rint(draw.standard_normal(shape) * deviation).clip(-127, 127).astype(np.int16)


def size_of(codes: np.ndarray, **spec: object) -> int:
    data = encode_stacks([StackSpec(codes.shape, **spec)], [codes])
    assert (decode_stacks(data, [StackSpec(codes.shape, **spec)])[0] == codes).all()
    return len(data)


def tables(draw: np.random.Generator, contexts: int, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """starts_KA and frequencies_KA that sum to 2^16 in each context."""
    cuts_KA = np.sort(
        np.stack([draw.choice(2**16 - 1, symbols - 1, replace=False) for _ in range(contexts)]) + 1, axis=1
    )
    starts_KA = np.concatenate([np.zeros((contexts, 1), np.int64), cuts_KA], axis=1)
    return starts_KA + (np.arange(contexts) << FREQUENCY_BITS)[:, None], np.diff(starts_KA, append=2**16)


@pytest.mark.parametrize(("symbols", "count"), [(2, 1), (3, 5), (40, 1000), (7, 40_000), (255, 70_000)])
def test_rans_gives_back_what_it_was_given_at_the_entropy(symbols, count):
    draw = np.random.default_rng(count)
    starts_KA, frequencies_KA = tables(draw, 5, symbols)
    context_N, writer = draw.integers(0, 5, count), RansWriter()
    symbol_N = np.array([draw.choice(symbols, p=frequencies_KA[context] / 2**16) for context in context_N])
    cuts = sorted(draw.integers(0, count + 1, 3).tolist())
    steps = [part for part in np.split(np.arange(count), cuts) if len(part)]
    for part in steps:
        writer.step(starts_KA, frequencies_KA, context_N[part], symbol_N[part])
    data = writer.finish(count)
    bits = -np.log2(frequencies_KA[context_N, symbol_N] / 2**16).sum()
    lanes = lane_count(count)
    assert bits / 8 + 2 * lanes - 1 <= len(data) <= bits / 8 * 1.0005 + (STATE_BYTES + 2) * lanes
    reader = RansReader(data, count)
    read = [reader.step(starts_KA, frequencies_KA, context_N[part]) - context_N[part] * symbols for part in steps]
    reader.finish()
    assert (np.concatenate(read) == symbol_N).all()


def test_rans_against_the_textbook():
    """One lane's words, from whole-number arithmetic a symbol at a time."""
    draw = np.random.default_rng(0)
    starts_KA, frequencies_KA = tables(draw, 1, 9)
    symbol_N, writer = draw.integers(0, 9, 400), RansWriter()
    writer.step(starts_KA, frequencies_KA, np.zeros(400, np.int64), symbol_N)
    lanes, states, words = 4, [2**24] * 4, []
    for number in reversed(range(400)):
        frequency, start = int(frequencies_KA[0, symbol_N[number]]), int(starts_KA[0, symbol_N[number]])
        state = states[number % lanes]
        if state >= frequency << 24:
            words.append((number // lanes, number % lanes, state & 0xFFFF))
            state >>= 16
        states[number % lanes] = (state // frequency << 16) + state % frequency + start
    expected = b"".join(state.to_bytes(5, "little") for state in states)
    assert writer.finish(400) == expected + b"".join(word.to_bytes(2, "little") for _, _, word in sorted(words))


def test_rans_against_constriction():
    stream = pytest.importorskip("constriction").stream
    draw = np.random.default_rng(1)
    starts_KA, frequencies_KA = tables(draw, 1, 30)
    share_A = frequencies_KA[0] / 2**16
    symbol_N, writer = draw.choice(30, 50_000, p=share_A), RansWriter()
    writer.step(starts_KA, frequencies_KA, np.zeros(50_000, np.int64), symbol_N)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbol_N.astype(np.int32), stream.model.Categorical(share_A, perfect=False))
    assert len(writer.finish(50_000)) <= 4 * len(coder.get_compressed()) * 1.001 + 20


@given(
    st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 1.0, 9.0, 80.0]), st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_stacks_of_any_shape_come_back(seed, layers, rows, columns, deviation, trellis):
    draw = np.random.default_rng(seed)
    spread = deviation * np.exp2(draw.standard_normal((layers, rows, 1)) + draw.standard_normal((layers, 1, columns)))
    size_of(bell(draw, (layers, rows, columns), spread), trellis=trellis)


def test_several_stacks_share_counts_and_guides():
    draw = np.random.default_rng(0)
    unit_LR = np.exp2(1.5 * draw.standard_normal((2, 300)))
    first, second = bell(draw, (2, 300, 40), 3 * unit_LR[:, :, None]), bell(draw, (2, 40, 300), 3 * unit_LR[:, None, :])
    step_LR = np.full((2, 300), 0.01, np.float16).view(np.uint16)
    specs = [StackSpec(first.shape), StackSpec(second.shape, guide=(0, step_LR))]
    plain = [StackSpec(first.shape), StackSpec(second.shape)]
    guided = encode_stacks(specs, [first, second])
    for one, other in zip(decode_stacks(guided, specs), (first, second), strict=True):
        assert (one == other).all()
    unguided = len(encode_stacks(plain, [first, second]))
    assert len(guided) < unguided - 2 * 300 * 2 / 8 < size_of(first) + size_of(second)


def test_independent_codes_take_their_entropy():
    draw = np.random.default_rng(2)
    for deviation, limit in ((0.5, 1.003), (2.4, 1.003), (30.0, 1.004)):
        codes = bell(draw, (1, 400, 400), deviation)
        assert size_of(codes) < limit * entropy_bytes(codes)


@pytest.mark.slow
def test_what_is_known_makes_codes_shorter():
    """Each source of information, planted: bits saved by knowing it, less a little for finding out."""
    draw = np.random.default_rng(3)
    rows, columns = draw.standard_normal((1, 400, 1)), draw.standard_normal((1, 1, 300))
    ideal = entropy_bytes(bell(draw, (1, 400, 300), 2.4)) / 120_000
    for spread in (np.exp2(0.8 * rows), np.exp2(0.8 * columns), np.exp2(0.6 * rows + 0.6 * columns)):
        deviation = 6.0 * spread
        codes = bell(draw, (1, 400, 300), deviation)
        known = 120_000 * ideal + np.broadcast_to(np.log2(deviation / 2.4), codes.shape).sum() / 8
        assert size_of(codes) < 1.02 * known < 0.97 * entropy_bytes(codes)
    shifted = bell(draw, (1, 400, 300), 2.4) + np.rint(2.4 * columns).astype(np.int16)
    assert size_of(shifted) < 0.95 * entropy_bytes(shifted)


def test_the_half_of_a_trellis_grid_is_a_context():
    draw = np.random.default_rng(4)
    codes, halves = np.zeros((2, 120, 90), np.int16), np.zeros((2, 120, 90), np.int16)
    for column in range(90):
        halves[:, :, column, None] = next_halves(codes, halves, column)
        codes[:, :, column] = np.rint((draw.standard_normal((2, 120)) * 2 - halves[:, :, column]) / 2)
    for layer in range(2):
        assert (trellis_halves(torch.from_numpy(codes[layer])).numpy() == halves[layer]).all()
    by_half = sum(entropy_bytes(codes[halves == half]) for half in (0, 1))
    assert size_of(codes, trellis=True) < 1.01 * by_half < 0.985 * size_of(codes)


def test_rows_that_resemble_earlier_ones_take_fewer_bytes():
    draw = np.random.default_rng(5)
    codes = bell(draw, (1, 600, 64), 4.0)
    codes[0, 300:] = codes[0, draw.integers(0, 300, 300)] + bell(draw, (300, 64), 0.3)
    spec = [StackSpec(codes.shape)]
    data = encode_codes(spec, [codes])
    assert (decode_codes(data, spec)[0] == codes).all()
    assert len(data) < 0.75 * size_of(codes)
    residual_RC, share_R, reference_R = refer_rows(codes[0])
    assert (share_R[300:] != 0).mean() > 0.95 and (share_R[:300] != 0).mean() < 0.05
    assert (restore_rows(residual_RC, share_R, reference_R) == codes[0]).all()
    with pytest.raises(ArtifactError, match="not yet known"):
        restore_rows(residual_RC, share_R, np.arange(600))


@pytest.mark.parametrize(
    ("codes", "way", "size"),
    [
        (np.tile([0, 1, -1, 1, 0, 0, -1], 100).reshape(1, 70, 10), TRITS, 141),
        (np.where(np.random.default_rng(0).random((1, 80, 20)) < 0.5, -1, 1), BINARY, 201),
        (np.random.default_rng(0).integers(-127, 128, (1, 30, 30)), RAW, 901),
    ],
)
def test_plain_ways_are_taken_where_they_are_shorter(codes, way, size):
    codes = codes.astype(np.int16)
    data, spec = encode_codes([StackSpec(codes.shape)], [codes]), [StackSpec(codes.shape)]
    assert (data[0], len(data)) == (way, size)
    assert (decode_codes(data, spec)[0] == codes).all()
    for damaged in (data[:-1], data + b"x", bytes([9]) + data[1:], b""):
        with pytest.raises(ArtifactError):
            decode_codes(damaged, spec)


def test_sparse_ternary_codes_are_modelled():
    codes = (np.random.default_rng(0).random((1, 200, 200)) < 0.1).astype(np.int16)
    assert encode_codes([StackSpec(codes.shape)], [codes])[0] == MODELLED


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.slow
def test_damaged_streams_give_the_artifact_error_or_other_codes(trellis):
    """No crash, no hang, no array of another shape, whatever the bytes."""
    draw, chance, refused = np.random.default_rng(6), random.Random(6), 0
    codes, spec = bell(draw, (1, 300, 12), 3.0), [StackSpec((1, 300, 12), trellis)]
    codes[0, 200:] = codes[0, :100]
    data = encode_codes(spec, [codes])
    started = time.process_time()
    decode_codes(data, spec)
    sound_seconds = time.process_time() - started
    for _ in range(60):
        damaged = bytearray(data)
        kind, place = chance.randrange(4), chance.randrange(min(len(data), 400 if chance.random() < 0.5 else 10**9))
        if kind == 0:
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[place : place + 9] = chance.randbytes(9)
        elif kind == 2:
            del damaged[place:]
        else:
            damaged[place:] = bytes([chance.randrange(256)]) * (len(data) - place)
        started = time.process_time()
        try:
            (read,) = decode_codes(bytes(damaged), spec)
            assert read.shape == codes.shape and np.abs(read).max() <= 511
        except ArtifactError as error:
            refused += 1
            assert "\n" not in str(error)
        assert time.process_time() - started < 20 * sound_seconds + 1
    assert refused > 45


@given(st.lists(st.integers(0, 65_535), max_size=200), st.integers(0, 7))
@settings(max_examples=80, deadline=None)
def test_sequences_come_back(values, coarse):
    value_N = np.array(values, np.int64) >> coarse << coarse
    data = encode_sequence(value_N)
    assert (decode_sequence(data, len(values)) == value_N).all()
    pattern_N = value_N.astype(np.uint16)
    assert (decode_halves(encode_halves(pattern_N), len(values)) == pattern_N).all()


def test_scales_on_a_log_grid_take_few_bytes():
    draw = np.random.default_rng(7)
    sixteenths_N = np.rint(-100 + 6 * np.cumsum(draw.standard_normal(3000)) / 8).clip(-200, -20)
    scale_N = np.exp2(sixteenths_N / 16).astype(np.float16)
    data = encode_halves(scale_N.view(np.uint16))
    assert len(data) < 0.5 * 3000 + 200
    assert (decode_halves(data, 3000).view(np.float16) == scale_N).all()
    any_N = np.exp2(-7 + 0.2 * draw.standard_normal(3000)).astype(np.float16)
    assert len(encode_halves(any_N.view(np.uint16))) < 3000 * 10.2 / 8 + 60


def test_damaged_sequences_give_the_artifact_error_or_other_numbers():
    chance, refused = random.Random(8), 0
    draw = np.random.default_rng(8)
    for value_N in (draw.integers(0, 30_000, 80), draw.choice([5, 70, 900], 80), draw.choice(65_536, 80)):
        data = encode_halves(value_N.astype(np.uint16))
        for _ in range(120):
            damaged = bytearray(data)
            damaged[chance.randrange(min(len(data), 12 if chance.random() < 0.5 else 999))] ^= 1 << chance.randrange(8)
            try:
                assert decode_halves(bytes(damaged), 80).dtype == np.uint16
            except ArtifactError:
                refused += 1
    assert refused > 100


@given(st.integers(1, 5000), st.integers(1, 60))
def test_tiles_cover_all(length, parts):
    edges = tile_edges(length, parts)
    assert edges[0] == 0 and edges[-1] == length and (np.diff(edges) > 0).all()
    assert np.diff(edges).max() <= max(1, min(64, -(-length // parts)))


def test_first_guesses_are_bells_of_growing_width():
    counts_KA = bell_counts(31)
    code_A = np.arange(-31, 32)
    even_K = counts_KA[:: 2 * MEAN_LEVELS]
    magnitude_K = (even_K * np.abs(code_A)).sum(1) / even_K.sum(1)
    wanted_K = np.array([1 / 16 * 2 ** (k // 4) * (1 + (k % 4 + 0.5) / 4) for k in range(len(even_K))])
    middle = (wanted_K > 0.5) & (wanted_K < 8)
    assert (counts_KA > 0).all() and (np.diff(magnitude_K) >= 0).all()
    assert np.abs(magnitude_K / wanted_K - 1)[middle].max() < 0.3
    mean_K = (counts_KA * code_A).sum(1) / counts_KA.sum(1)
    assert mean_K[8 * 20 + 2] > 0.4 and mean_K[8 * 20 + 1] == pytest.approx(-0.5, abs=0.05)


def test_the_bytes_are_the_same_everywhere():
    """The strengths are told, so nothing depends on floating point."""
    codes = (np.arange(2 * 50 * 30) * 2654435761 % 65_521 % 23 - 11).reshape(2, 50, 30).astype(np.int16)
    codes //= (1 + np.arange(30) % 4).astype(np.int16)
    for trellis, digest in ((False, GOLDEN_PLAIN), (True, GOLDEN_TRELLIS)):
        data = encode_stacks([StackSpec(codes.shape, trellis)], [codes], (20, 3, 5))
        assert hashlib.sha256(data).hexdigest() == digest


GOLDEN_PLAIN = "80a8831bdabf2a5cff1ada921a50ca9600d76f62d2d291e1c41a6c9ed712cf5f"
GOLDEN_TRELLIS = "40f839d2815137d4a79bcdd29604ddd62f33df543b717d9ec00cb50aa602df4b"
