"""Implements interleaved range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) in numpy integers, many lanes.

A symbol of frequency f out of 2^16 takes 16 - log2(f) bits. Each lane's state stays in [2^24, 2^40); excess bits leave
it as 16-bit words. The writer processes the symbols backwards, so that the reader can go forwards and adapt its
frequencies to what it has read. Model code calls both through `step` and need not know which one it has. N symbols of a
step, K contexts, A symbols of the alphabet.
"""

import numpy as np

from golf.artifact.codecs import ArtifactError

FREQUENCY_BITS = 16
LOWEST_STATE = 2**24
STATE_BYTES = 5
FEWEST_LANES, MOST_LANES = 4, 256
SYMBOLS_PER_LANE = 2**14
"""Symbols for each lane, within the limits: a lane costs 5 bytes, few lanes cost time."""


def lane_count(symbols: int) -> int:
    """Returns the number of lanes, a power of 2, for a stream of this many symbols."""
    wanted = max(FEWEST_LANES, min(MOST_LANES, symbols // SYMBOLS_PER_LANE))
    return 1 << (wanted.bit_length() - 1)


class RansWriter:
    """Collects steps in the reader's order; `finish` returns the bytes."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def step(
        self, starts_KA: np.ndarray, frequencies_KA: np.ndarray, context_N: np.ndarray, symbol_N: np.ndarray
    ) -> np.ndarray:
        """Adds symbols. starts_KA: context * 2^16 + the sum of the frequencies before; context_N: row of the tables."""
        index_N = context_N * starts_KA.shape[1] + symbol_N
        starts_N = starts_KA.reshape(-1)[index_N] & (2**FREQUENCY_BITS - 1)
        self.steps.append((starts_N.astype(np.uint16), (frequencies_KA.reshape(-1)[index_N] - 1).astype(np.uint16)))
        return index_N

    def finish(self, symbols: int) -> bytes:
        lanes = lane_count(symbols)
        state_L, written = np.full(lanes, LOWEST_STATE, np.int64), []
        for starts_N, frequencies_N in reversed(self.steps):
            frequency_N, start_N = frequencies_N.astype(np.int64) + 1, starts_N.astype(np.int64)
            limit_N, gap_N = frequency_N << 24, 2**FREQUENCY_BITS - frequency_N
            for first in range((len(starts_N) - 1) // lanes * lanes, -1, -lanes):
                part = slice(first, first + lanes)
                active_L = state_L[: len(frequency_N[part])]
                full_L = (active_L >= limit_N[part]).nonzero()[0]
                over_L = active_L[full_L]
                written.append(over_L)
                active_L[full_L] = over_L >> 16
                active_L += active_L // frequency_N[part] * gap_N[part] + start_N[part]
        states = state_L.astype("<i8").view(np.uint8).reshape(lanes, 8)[:, :STATE_BYTES].tobytes()
        return states + np.concatenate([np.zeros(0, np.int64), *reversed(written)]).astype("<u2").tobytes()


class RansReader:
    """Reads back the symbols that a RansWriter wrote. Raises ArtifactError for bytes that no writer made."""

    def __init__(self, data: bytes, symbols: int) -> None:
        lanes = lane_count(symbols)
        words = data[lanes * STATE_BYTES :]
        if len(data) < lanes * STATE_BYTES or len(words) % 2:
            raise ArtifactError("a rans stream is damaged: its length is impossible")
        padded = np.zeros((lanes, 8), np.uint8)
        padded[:, :STATE_BYTES] = np.frombuffer(data, np.uint8, lanes * STATE_BYTES).reshape(lanes, STATE_BYTES)
        self.state_L, self.position = padded.view("<i8")[:, 0].astype(np.int64), 0
        self.words = np.frombuffer(words, "<u2").astype(np.int64)

    def step(
        self, starts_KA: np.ndarray, frequencies_KA: np.ndarray, context_N: np.ndarray, _: object = None
    ) -> np.ndarray:
        """Returns positions context * A + symbol in the flattened tables. Raises ArtifactError."""
        starts, frequencies = starts_KA.reshape(-1), frequencies_KA.reshape(-1)
        lanes, base_N, words, position = len(self.state_L), context_N << FREQUENCY_BITS, self.words, self.position
        index_N = np.empty(len(context_N), np.int64)
        for first in range(0, len(context_N), lanes):
            base_L = base_N[first : first + lanes]
            state_L = self.state_L[: len(base_L)]
            key_L = (state_L & (2**FREQUENCY_BITS - 1)) + base_L
            found_L = starts.searchsorted(key_L, "right") - 1
            state_L >>= FREQUENCY_BITS
            state_L *= frequencies[found_L]
            state_L += key_L - starts[found_L]
            low_L = (state_L < LOWEST_STATE).nonzero()[0]
            end = position + len(low_L)
            if end > len(words):
                raise ArtifactError("a rans stream is damaged: it ends too early")
            state_L[low_L] = state_L[low_L] << 16 | words[position:end]
            position = end
            index_N[first : first + lanes] = found_L
        self.position = position
        return index_N

    def finish(self) -> None:
        """Raises ArtifactError unless the whole stream was used and the lanes ended as they began in the writer."""
        if self.position != len(self.words) or (self.state_L != LOWEST_STATE).any():
            raise ArtifactError("a rans stream is damaged: it does not end where its symbols do")
