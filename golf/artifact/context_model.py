"""Predicts the size and sign of a weight's code before the coder sees it.

A matrix is coded tile by tile, from the top left. A code's expected magnitude is the product of a factor of its row,
from the tiles to the left, and one of its column, from the tiles above; its expected sign and a share of its magnitude
come from the column's mean. They select a context, and every context has adaptive counts of the codes seen in it. All
of it is integer arithmetic on what the reader has already read, so it is the same on every machine.

L matrices of one kind and shape side by side (the layers), R rows, C columns, K contexts, A symbols, P contexts in use,
N symbols of a tile.

Codes of the trellis grid (golf/quant/trellis.py) come from one of two halves, which follows from the earlier codes in
their row: such a tile is coded column by column, with the half as part of the context.
"""

from functools import cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from golf.artifact.rans import FREQUENCY_BITS
from golf.quant.trellis import PARITY_H0, PARITY_H1, TRELLIS_STATES

StackShape = tuple[int, int, int]
Strengths = tuple[int, int, int]

MEAN_LEVELS = 4
"""Levels of column means: 0, 1/4, 2/4 and 3/4 of the column's expected magnitude, either side of zero."""
PER_OCTAVE = 4
LOWEST_OCTAVE = -4
"""Contexts of magnitude: four to a doubling, from 1/16 of a step."""
GUESS_WORTH, COUNT_UNIT, COUNT_LIMIT = 128, 64, 2**21
"""Symbols that a context's first guess is worth; what a symbol adds; the sum at which a context's counts are halved."""
TILES_DOWN, TILES_ACROSS, LARGEST_SIDE, GROWTH = 12, 24, 64, 4
"""Limits of a tile: at most 1/12 of the rows high, 1/24 of the columns wide and 64 either way, and small at the edges:
eight of 1, then a quarter of the length before it."""


class StepCoder(Protocol):
    """Codes steps of symbols: a RansWriter or RansReader."""

    def step(
        self, starts_PA: np.ndarray, frequencies_PA: np.ndarray, context_N: np.ndarray, symbol_N: np.ndarray | None
    ) -> np.ndarray: ...


class AdaptiveTables:
    """Counts symbols in each of K contexts, and adapts to what is coded."""

    def __init__(self, counts_KA: np.ndarray) -> None:
        self.counts_KA = counts_KA.copy()

    def open(self, context_N: np.ndarray) -> None:
        """Turns the counts of these contexts into frequencies, for the steps until `close`."""
        contexts, symbols = self.counts_KA.shape
        self.present_P = np.flatnonzero(np.bincount(context_N, minlength=contexts))
        self.rank_K = np.zeros(contexts, np.int64)
        self.rank_K[self.present_P] = np.arange(len(self.present_P))
        sums_PA = self.counts_KA[self.present_P].cumsum(axis=1)
        self.full_P = sums_PA[:, -1] > COUNT_LIMIT
        room = 2**FREQUENCY_BITS - symbols  # every symbol keeps a frequency of at least 1
        ends_PA = sums_PA * room // sums_PA[:, -1:] + np.arange(1, symbols + 1)
        self.frequencies_PA = ends_PA.copy()
        self.frequencies_PA[:, 1:] -= ends_PA[:, :-1]
        self.starts_PA = ends_PA - self.frequencies_PA + (np.arange(len(ends_PA)) << FREQUENCY_BITS)[:, None]
        self.seen: list[np.ndarray] = []

    def code(self, coder: StepCoder, context_N: np.ndarray, symbol_N: np.ndarray | None) -> np.ndarray:
        """Returns the symbols: `symbol_N` itself for a writer, those read for a reader."""
        rank_N = self.rank_K[context_N]
        index_N = coder.step(self.starts_PA, self.frequencies_PA, rank_N, symbol_N)
        self.seen.append(index_N)
        return index_N - rank_N * self.counts_KA.shape[1]

    def close(self) -> None:
        """Counts what was coded since `open`."""
        index_N = self.seen[0] if len(self.seen) == 1 else np.concatenate(self.seen)
        shape = self.starts_PA.shape
        counts_PA = self.counts_KA[self.present_P]
        counts_PA += COUNT_UNIT * np.bincount(index_N, minlength=shape[0] * shape[1]).reshape(shape)
        counts_PA[self.full_P] >>= 1
        self.counts_KA[self.present_P] = np.maximum(counts_PA, 1)


def context_count(largest: int) -> int:
    return 2 * MEAN_LEVELS * PER_OCTAVE * (largest.bit_length() - LOWEST_OCTAVE)


@cache
def bell_counts(largest: int) -> np.ndarray:
    """Returns the first guess of counts_KA for codes in -largest..largest: bells with each context's mean magnitude.

    A bell is (1 + x^2 / 16 sigma^2)^-8, near a Gaussian but with longer tails. It is tried at many widths, and a
    context takes the first whose mean magnitude reaches its own. Magnitudes are in 1/128 of a step, weights in 2^-20.
    """
    code_A = np.arange(-largest, largest + 1) * 128
    grid = np.arange(16 * 12)
    width_W1 = ((16 + grid % 16) << (grid // 16))[:, None]
    magnitude_W = weighted_mean(bell(width_W1, code_A), np.abs(code_A))
    step = np.arange(context_count(largest) // MEAN_LEVELS // 2)
    wanted_M = (2 * (PER_OCTAVE + step % PER_OCTAVE) + 1) << (step // PER_OCTAVE)
    width_M = width_W1[np.minimum(magnitude_W.searchsorted(wanted_M), len(grid) - 1), 0]
    mean_MI = wanted_M[:, None] * np.arange(MEAN_LEVELS) // MEAN_LEVELS
    shift_K1 = (mean_MI.reshape(-1, 1) - np.array([0, 64])).reshape(-1, 1)  # codes of the odd half centre on -1/2
    counts_KA = bell(np.repeat(width_M, 2 * MEAN_LEVELS)[:, None], code_A - shift_K1) + 1
    return np.maximum(counts_KA * (GUESS_WORTH * COUNT_UNIT) // counts_KA.sum(axis=1, keepdims=True), 1)


def bell(width_W1: np.ndarray, distance_A: np.ndarray) -> np.ndarray:
    square_W1 = 25 * width_W1**2
    weight_WA = (square_W1 << 20) // (square_W1 + distance_A**2)
    for _ in range(3):
        weight_WA = weight_WA**2 >> 20
    return weight_WA


def weighted_mean(weight_WA: np.ndarray, value_A: np.ndarray) -> np.ndarray:
    return (weight_WA * value_A).sum(axis=1) // weight_WA.sum(axis=1)


def tile_edges(length: int, parts: int) -> list[int]:
    """Returns 0, 1, 2, ... `length`: edges whose steps grow with the length before them, up to 1/parts of the whole."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + max(1, min(edges[-1] // GROWTH, -(-length // parts), LARGEST_SIDE))))
    return edges


def bounded(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.minimum(np.maximum(values, low), high)  # numpy's own clip takes four times as long on a tile


class FactorModel:
    """Keeps running sums of a stack of matrices, and derives each tile's contexts from them.

    Sums are of doubled codes, plus 1 for the odd half of a trellis grid. Fixed point: a row's factor has 8 fractional
    bits, a column's (a magnitude) 12, their product 20. `strengths` are the numbers of symbols that the first guesses
    of a row's factor, a column's and a column's mean are worth, as powers of 2.
    """

    def __init__(self, shape: StackShape, largest: int, strengths: Strengths, guess_LC: np.ndarray | None) -> None:
        layers, rows, columns = shape
        self.row_sum_LR, self.row_expected_LR = np.zeros((2, layers, rows), np.int64)
        self.column_sum_LC, self.column_expected_LC, self.column_signed_LC = np.zeros((3, layers, columns), np.int64)
        self.row_prior, self.column_prior, self.mean_prior = (1 << (strength & 15) for strength in strengths)
        self.local, self.near_L1 = strengths[0] >> 4, np.full((layers, 1), 256)
        self.guess_LC = np.full((layers, columns), 256) if guess_LC is None else guess_LC
        self.total, self.expected = 16, 4 << 8
        self.levels, self.largest = context_count(largest) // MEAN_LEVELS // 2, largest

    def factors(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns row_LR, column_LC and signed mean_LC of a tile."""
        typical = (self.total << 20) // self.expected
        prior = self.row_prior * max(typical, 1)
        near_L1 = prior * self.near_L1
        row_LR = ((self.row_sum_LR[:, rows] << 20) + near_L1) // (self.row_expected_LR[:, rows] + prior)
        prior = self.column_prior << 8
        seen_LC = self.column_expected_LC[:, columns]
        guess_LC = prior * (typical * self.guess_LC[:, columns] >> 8)
        column_LC = ((self.column_sum_LC[:, columns] << 20) + guess_LC) // (seen_LC + prior)
        mean_LC = (self.column_signed_LC[:, columns] << 20) // (seen_LC + (self.mean_prior << 8))
        return bounded(row_LR, 1, 2**16), bounded(column_LC, 1, 2**20), mean_LC

    def leave_rows(self, rows: slice) -> None:
        """Predicts the next rows from those that are done, where rows resemble their neighbours."""
        if self.local:
            row_LR, _, _ = self.factors(rows, slice(0, 0))
            self.near_L1 = bounded((self.near_L1 + row_LR.sum(axis=1, keepdims=True) // row_LR.shape[1]) >> 1, 1, 2**16)

    def contexts(self, row_LR: np.ndarray, column_LC: np.ndarray, mean_LC: np.ndarray) -> np.ndarray:
        """Returns context_LRC, even numbers of contexts: those of the even half, or of a grid without halves."""
        # The bits of a float64 that holds a whole number are its logarithm, in quarters of an octave after the shift.
        octaves_LRC = (row_LR[:, :, None] * column_LC[:, None, :]).astype(np.float64).view(np.int64) >> 50
        level_LRC = bounded(octaves_LRC - PER_OCTAVE * (1023 + 21 + LOWEST_OCTAVE), 0, self.levels - 1)
        share_LC = np.minimum((MEAN_LEVELS * np.abs(mean_LC) + column_LC // 2) // column_LC, MEAN_LEVELS - 1)
        return 2 * (level_LRC * MEAN_LEVELS + share_LC[:, None, :])

    def observe(
        self, rows: slice, columns: slice, doubled_LRC: np.ndarray, row_LR: np.ndarray, column_LC: np.ndarray
    ) -> None:
        magnitude_LRC, row_L1 = np.abs(doubled_LRC), row_LR.sum(axis=1, keepdims=True)
        self.row_sum_LR[:, rows] += magnitude_LRC.sum(axis=2)
        self.row_expected_LR[:, rows] += column_LC.sum(axis=1, keepdims=True)
        column_sum_LC = magnitude_LRC.sum(axis=1)
        self.column_sum_LC[:, columns] += column_sum_LC
        self.column_signed_LC[:, columns] += doubled_LRC.sum(axis=1)
        self.column_expected_LC[:, columns] += row_L1
        self.total += int(column_sum_LC.sum())
        self.expected += int(row_L1.sum()) * column_LC.shape[1]


def code_stack(
    coder: StepCoder, tables: AdaptiveTables, shape: StackShape, trellis: bool, strengths: Strengths,
    guess_LC: np.ndarray | None, given_LRC: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """Codes a stack of matrices through `coder` and returns int16 codes: those given to a writer, those read by a
    reader.

    `guess_LC` holds the columns' first relative magnitudes, 256 for 1; None: all alike.
    """
    _, rows, columns = shape
    model = FactorModel(shape, tables.counts_KA.shape[1] // 2, strengths, guess_LC)
    code_LRC, half_LRC = np.zeros(shape, np.int16), np.zeros(shape, np.int16) if trellis else None
    across = tile_edges(columns, TILES_ACROSS)
    for top, bottom in pairwise(tile_edges(rows, TILES_DOWN)):
        down = slice(top, bottom)
        part = None if given_LRC is None else given_LRC[:, down]
        half_LTC = None if half_LRC is None else half_LRC[:, down]
        for left, right in pairwise(across):
            along = slice(left, right)
            factors = model.factors(down, along)
            code_tile(coder, tables, model.contexts(*factors), factors[2] < 0, along, code_LRC[:, down], half_LTC, part)
            doubled_LRC = 2 * code_LRC[:, down, along].astype(np.int64)
            if half_LTC is not None:
                doubled_LRC += half_LTC[:, :, along]
            model.observe(down, along, doubled_LRC, *factors[:2])
        model.leave_rows(down)
    return code_LRC


def code_tile(
    coder: StepCoder, tables: AdaptiveTables, context_LTC: np.ndarray, mirrored_LC: np.ndarray, along: slice,
    code_LTC: np.ndarray, half_LTC: np.ndarray | None, given_LTC: np.ndarray | None,
) -> None:  # fmt: skip
    """Fills columns `along` of a band of T rows, code_LTC: in one step, or with halves column by column."""
    largest, side_LC = tables.counts_KA.shape[1] // 2, np.where(mirrored_LC, -1, 1)
    tables.open(context_LTC.reshape(-1) if half_LTC is None else np.append(context_LTC, context_LTC + 1))
    for step in [along] if half_LTC is None else [slice(c, c + 1) for c in range(along.start, along.stop)]:
        own = slice(step.start - along.start, step.stop - along.start)
        context_LTS, side_L1S, shift_LTS = context_LTC[:, :, own], side_LC[:, None, own], np.int64(largest)
        if half_LTC is not None:
            half_LTC[:, :, step] = half_LTS = next_halves(code_LTC, half_LTC, step.start)
            context_LTS = context_LTS + half_LTS
            shift_LTS = largest - (half_LTS & mirrored_LC[:, None, own])  # -1 - code mirrors a code of the odd half
        symbol_N = None if given_LTC is None else (given_LTC[:, :, step] * side_L1S + shift_LTS).reshape(-1)
        read_N = tables.code(coder, context_LTS.reshape(-1), symbol_N)
        code_LTC[:, :, step] = (read_N.reshape(context_LTS.shape) - shift_LTS) * side_L1S
    tables.close()


def next_halves(code_LRC: np.ndarray, half_LRC: np.ndarray, column: int) -> np.ndarray:
    """Returns half_LR1 of a column, from the codes and halves to its left: h0(D) half = h1(D) parity."""
    half_LR1 = np.zeros((*code_LRC.shape[:2], 1), np.int16)
    for delay in range(1, min(column, TRELLIS_STATES.bit_length() - 1) + 1):
        if PARITY_H0 >> delay & 1:
            half_LR1 ^= half_LRC[:, :, column - delay, None]
        if PARITY_H1 >> delay & 1:
            half_LR1 ^= code_LRC[:, :, column - delay, None] & 1
    return half_LR1
