"""Confidence interval of a mean per token by the bootstrap over blocks of tokens that may depend on each other.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 8.6: whole blocks are drawn with
replacement, and the statistic, here a ratio of sums, is taken of each draw; the interval is between its percentiles.

K blocks, N targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.compare.statistics import StatisticsError

DRAWN_AT_ONCE = 1 << 22
"""Counts of blocks in memory together."""


@dataclass(frozen=True)
class BootstrapInterval:
    """The mean per token of a difference, with what the draws say of it."""

    difference: float
    low: float
    high: float
    blocks: int
    draws: int

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def block_numbers(starts_N: np.ndarray, block_tokens: int) -> np.ndarray:
    """Number of each target's block: every `block_tokens` targets, or, for 0, from a True of `starts_N` to the next.

    The document that the first target is in has started before it.
    """
    if block_tokens:
        return np.arange(len(starts_N)) // block_tokens
    numbers_N = np.cumsum(starts_N)
    return numbers_N - numbers_N[0]


def bootstrap_ratio(
    sums_K: Sequence[float] | np.ndarray,
    counts_K: Sequence[float] | np.ndarray,
    alpha: float = 0.05,
    draws: int = 10_000,
    seed: int = 0,
) -> BootstrapInterval:
    """Interval of sum(sums_K) / sum(counts_K) that leaves alpha / 2 of the draws out at each end.

    Seeded: the same numbers give the same interval. Raises StatisticsError with fewer than two blocks.
    """
    sums_K, counts_K = np.asarray(sums_K, dtype=np.float64), np.asarray(counts_K, dtype=np.float64)
    assert len(sums_K) == len(counts_K) and (counts_K > 0).all(), "each block has a sum and a count above zero"
    if len(sums_K) < 2:
        raise StatisticsError(f"a bootstrap needs two blocks, not {len(sums_K)}: take smaller blocks or more tokens")
    if not 0 < alpha < 1 or draws < 100:
        raise StatisticsError(f"alpha={alpha} must lie between 0 and 1, and {draws} draws must be 100 or more")
    generator, blocks, ratios = np.random.default_rng(seed), len(sums_K), []
    shares_K = np.full(blocks, 1 / blocks)
    for left in range(draws, 0, -max(1, DRAWN_AT_ONCE // blocks)):
        times = generator.multinomial(blocks, shares_K, size=min(left, max(1, DRAWN_AT_ONCE // blocks)))
        ratios.append((times @ sums_K) / (times @ counts_K))
    low, high = np.quantile(np.concatenate(ratios), [alpha / 2, 1 - alpha / 2])
    return BootstrapInterval(float(sums_K.sum() / counts_K.sum()), float(low), float(high), blocks, draws)
