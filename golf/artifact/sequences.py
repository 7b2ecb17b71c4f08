"""Codes sequences of 16-bit numbers (scales, zero points, small fp16 tensors) through the coder of matrices.

fp16 numbers of one sign are ordered like their bit patterns, 1,024 to an octave, so neighbouring rows of like scales
have near patterns. Each number is coded as its difference from a prediction, whose upper part is modelled and whose
lowest bits, which are noise, are packed uncompressed. Sequences of few distinct numbers are first replaced by their
ranks. N numbers, D distinct ones.
"""

import numpy as np

from golf.artifact.codecs import LZMA, ArtifactError, decode_exactly, encode_smallest
from golf.artifact.frame import decode_number, encode_number
from golf.artifact.stacks import LARGEST_CODE, StackSpec, decode_stacks, encode_stacks

LARGEST_VALUE = 2**16 - 1
CENTRED = 7
PREDICTORS = (CENTRED, 0, 1, 2, 3)
"""Shifts of a running mean: 0 predicts the previous number; CENTRED predicts the median for all."""
MOST_DISTINCT = 256
MODELLED_MAGNITUDE = 8
"""Median magnitude of the modelled part above which low bits are packed instead."""
LIST_STRENGTHS = (15, 4, 15)
RANKED = 8
PLANES = 2
"""First byte of fp16 numbers as two lzma'd byte planes; 0 and 1 are sequences without and with negative numbers."""


def predict(shift: int, centre: int, given_N: list[int], restore: bool) -> list[int]:
    """Returns differences of numbers from their predictions, or (restore) numbers from those differences."""
    if shift == CENTRED:
        return [value + centre if restore else value - centre for value in given_N]
    result, running = [], centre << 8
    for given in given_N:
        prediction = running >> 8
        result.append(given + prediction if restore else given - prediction)
        running += (((result[-1] if restore else given) << 8) - running) >> shift
    return result


def encode_list(value_N: np.ndarray) -> bytes:
    """Encodes small whole numbers of either sign, each by the counts of those before."""
    return encode_stacks([StackSpec((1, len(value_N), 1))], [value_N.reshape(1, -1, 1)], LIST_STRENGTHS)


def decode_list(data: bytes, count: int) -> np.ndarray:
    """Inverts encode_list; returns int64. Raises ArtifactError."""
    return decode_stacks(data, [StackSpec((1, count, 1))])[0].reshape(-1).astype(np.int64)


def encode_ranked(value_N: np.ndarray, ranked: bool) -> bytes:
    """Encodes flags, lowest bits a number, first prediction, distinct numbers where ranked, low bits, modelled rest."""
    header = b""
    if ranked:
        distinct_D, value_N = np.unique(value_N, return_inverse=True)
        steps = np.diff(distinct_D, prepend=0).tolist()
        header = encode_number(len(steps)) + b"".join(map(encode_number, steps))
    centre, values = int(np.median(value_N)), value_N.tolist()
    candidates = [(shift, np.array(predict(shift, centre, values, False))) for shift in PREDICTORS]
    shift, rest_N = min(candidates, key=lambda candidate: float(np.log2(1.0 + np.abs(candidate[1])).sum()))
    low = 0
    while np.abs(rest_N >> low).max() > LARGEST_CODE or np.median(np.abs(rest_N >> low)) > MODELLED_MAGNITUDE:
        low += 1
    low_NB = (rest_N[:, None] >> np.arange(low)) & 1
    start = bytes([shift | RANKED * ranked, low]) + encode_number(centre) + header
    modelled = encode_list(rest_N >> low)
    return start + np.packbits(low_NB.astype(np.uint8)).tobytes() + modelled


def encode_sequence(value_N: np.ndarray) -> bytes:
    """Encodes whole numbers in 0..LARGEST_VALUE, ranked or not, whichever is shorter."""
    if not len(value_N):
        return b""
    value_N = value_N.astype(np.int64)
    ways = [encode_ranked(value_N, ranked=False)]
    if len(np.unique(value_N)) <= MOST_DISTINCT:
        ways.append(encode_ranked(value_N, ranked=True))
    return min(ways, key=len)


def decode_sequence(data: bytes, count: int) -> np.ndarray:
    """Returns `count` numbers as int64. Raises ArtifactError."""
    if not count:
        return np.zeros(0, np.int64)
    flags, low = data[:2] if len(data) > 1 else (LARGEST_VALUE, 0)
    if flags > (CENTRED | RANKED) or low > 16:
        raise ArtifactError("a sequence of numbers is damaged: its header is impossible")
    centre, position = decode_number(data, 2)
    distinct = None
    if flags & RANKED:
        entries, position = decode_number(data, position)
        if entries > MOST_DISTINCT:
            raise ArtifactError("a sequence of numbers is damaged: too many distinct ones")
        distinct, value = [], 0
        for _ in range(entries):
            step, position = decode_number(data, position)
            value += step
            distinct.append(value)
    end = position + -(-low * count // 8)
    if end > len(data):
        raise ArtifactError("a sequence of numbers is damaged: it is too short")
    bits_NB = np.unpackbits(np.frombuffer(data[position:end], np.uint8))[: low * count].reshape(count, low)
    rest_N = decode_list(data[end:], count) << low
    rest_N += (bits_NB.astype(np.int64) << np.arange(low)).sum(axis=1)
    values = predict(flags & 7, centre, rest_N.tolist(), True)
    if distinct is not None:
        if not 0 <= min(values) <= max(values) < len(distinct):
            raise ArtifactError("a sequence of numbers is damaged: a rank is out of bounds")
        values = [distinct[rank] for rank in values]
    if not 0 <= min(values) <= max(values) <= LARGEST_VALUE:
        raise ArtifactError("a sequence of numbers is damaged: a number is out of bounds")
    return np.array(values, np.int64)


def encode_halves(pattern_N: np.ndarray) -> bytes:
    """Encodes fp16 bit patterns: magnitudes as a sequence, with the signs before them where any is negative; or by
    lzma."""
    negative_N = pattern_N > 0x7FFF
    signs = np.packbits(negative_N).tobytes() if negative_N.any() else b""
    high, low = (encode_smallest(LZMA, plane.astype(np.uint8).tobytes()) for plane in (pattern_N >> 8, pattern_N & 255))
    modelled = bytes([bool(signs)]) + signs + encode_sequence(pattern_N & 0x7FFF)
    return min(modelled, bytes([PLANES]) + encode_number(len(high)) + high + low, key=len)


def decode_halves(data: bytes, count: int) -> np.ndarray:
    """Returns uint16 bit patterns. Raises ArtifactError."""
    if data[:1] == bytes([PLANES]):
        size, start = decode_number(data, 1)
        planes = [decode_exactly(LZMA, part, count) for part in (data[start : start + size], data[start + size :])]
        high_N, low_N = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in planes)
        return high_N << 8 | low_N
    signed = data[:1] == b"\x01"
    start = 1 + (-(-count // 8) if signed else 0)
    if not data or data[0] > 1 or len(data) < start:
        raise ArtifactError("a sequence of fp16 numbers is damaged")
    magnitude_N = decode_sequence(data[start:], count)
    if magnitude_N.max(initial=0) > 0x7FFF:
        raise ArtifactError("a sequence of fp16 numbers is damaged: a number is out of bounds")
    negative_N = np.unpackbits(np.frombuffer(data, np.uint8, start - 1, 1))[:count] if signed else 0
    return (magnitude_N | (np.int64(negative_N) << 15)).astype(np.uint16)
