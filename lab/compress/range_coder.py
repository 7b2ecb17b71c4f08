"""Codes symbols by range coding (Martin 1979) with any whole frequencies: a symbol of probability p takes -log2 p bits.

The two coders share one method, so that a loop that predicts and codes is written once: `code(frequencies, symbol)`
writes the symbol and returns it, or ignores it and returns the one that is read.
"""

import numpy as np

FREQUENCY_BITS = 30
"""Frequencies of a symbol's alphabet add up to at most 2^30."""
STATE_BITS = 64
SMALLEST_RANGE = 1 << (STATE_BITS - 16)
STATE_MASK = (1 << STATE_BITS) - 1


class CodeError(ValueError):
    """Reports coded bytes that end too early."""


def whole_frequencies(probability_V: np.ndarray) -> np.ndarray:
    """Returns int64 frequencies_V, each at least 1, of float64 probabilities that add up to 1."""
    room = (1 << FREQUENCY_BITS) - 2 * len(probability_V)  # rounding may add up to V
    return np.maximum(probability_V * room, 0).astype(np.int64) + 1


class RangeEncoder:
    """Writes symbols; `finish` returns the bytes."""

    def __init__(self) -> None:
        self.low, self.range, self.data = 0, 1 << STATE_BITS, bytearray()

    def code(self, frequencies_V: np.ndarray, symbol: int) -> int:
        """Writes `symbol` by its frequency among all."""
        step = self.range >> FREQUENCY_BITS
        self.low += int(frequencies_V[:symbol].sum()) * step
        self.range = int(frequencies_V[symbol]) * step
        if self.low > STATE_MASK:
            self.low &= STATE_MASK
            self.carry()
        while self.range < SMALLEST_RANGE:
            self.data.append(self.low >> (STATE_BITS - 8))
            self.low, self.range = (self.low << 8) & STATE_MASK, self.range << 8
        return symbol

    def carry(self) -> None:
        """Adds one to the bytes that were written."""
        place = len(self.data) - 1
        while self.data[place] == 255:
            self.data[place] = 0
            place -= 1
        self.data[place] += 1

    def finish(self) -> bytes:
        """Returns all bytes: of the state, as many as tell it from its neighbours."""
        top = (self.low + self.range - 1) >> (STATE_BITS - 24) << (STATE_BITS - 24)
        self.low, self.range = top, 1
        if self.low > STATE_MASK:
            self.low &= STATE_MASK
            self.carry()
        return bytes(self.data) + (self.low >> (STATE_BITS - 24)).to_bytes(3, "big")


class RangeDecoder:
    """Reads the symbols that a RangeEncoder wrote, given the same frequencies. Raises CodeError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, STATE_BITS // 8
        self.range, self.offset = 1 << STATE_BITS, int.from_bytes(data[: self.place].ljust(self.place, b"\0"), "big")

    def code(self, frequencies_V: np.ndarray, symbol: int | None = None) -> int:
        """Returns the next symbol; the one that is given is not looked at."""
        step, ends_V = self.range >> FREQUENCY_BITS, np.cumsum(frequencies_V)
        symbol = int(np.searchsorted(ends_V, self.offset // step, side="right"))
        if symbol == len(ends_V):
            raise CodeError("the coded bytes are damaged")
        self.offset -= int(ends_V[symbol] - frequencies_V[symbol]) * step
        self.range = int(frequencies_V[symbol]) * step
        while self.range < SMALLEST_RANGE:
            if self.place >= len(self.data) + STATE_BITS // 8:
                raise CodeError("the coded bytes end too early")
            byte = self.data[self.place] if self.place < len(self.data) else 0
            self.offset, self.range, self.place = self.offset << 8 | byte, self.range << 8, self.place + 1
        return symbol
