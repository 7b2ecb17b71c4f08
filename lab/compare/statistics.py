"""Tests that compare two arms of runs: Welch, paired, equivalence, and the power that so few runs have.

Everything is float64: an arm has a handful of runs. The distributions are scipy's, which is imported at first use.
The bootstrap at the end is for the tokens of one run: K blocks, N targets.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from golf.config.knobs import UserError
from lab.cli import lab_library

ROUNDING = 10 * sys.float_info.epsilon
"""Spread below this share of the values is rounding, not noise."""
DRAWN_AT_ONCE = 1 << 22
"""Counts of blocks in memory together."""
NO_SPREAD = "no spread, so no test is defined"
NO_DIFFERENCE = "neither difference nor spread"


class StatisticsError(UserError):
    """Raised for a sample that is too small, or a probability that is none."""


def student_t_tail(t: float, df: float) -> float:
    """Returns P(T > t) for Student's t with `df` degrees of freedom, with all digits at both ends.

    P(|T| > t) is I_x(df/2, 1/2) with x = df / (df + t^2), and P(|T| < t) is I_(1-x)(1/2, df/2) (DLMF 8.17.4). scipy's
    own stdtr and betaincc lose up to half of the digits near t = 0, where the smaller probability keeps them.
    """
    special, square = lab_library("scipy.special"), t * t
    if square > df:
        tail = float(special.betainc(df / 2, 0.5, df / (df + square))) / 2
    elif square > 0.1:
        tail = float(special.betaincc(0.5, df / 2, square / (df + square))) / 2
    else:
        tail = 0.5 - float(special.betainc(0.5, df / 2, square / (df + square))) / 2
    return tail if t > 0 else 1 - tail


def student_t_quantile(p: float, df: float) -> float:
    """Returns the t with P(T <= t) = p. Raises StatisticsError for a p that is none, or below 1e-150 or so.

    A small p keeps all its digits; for a p near 1 take the quantile of 1 - p with the other sign.
    """
    if not 0 < p < 1:
        raise StatisticsError(f"a quantile needs a probability between 0 and 1, not {p}")
    special, outside = lab_library("scipy.special"), 2 * min(p, 1 - p)
    x = float(special.betaincinv(df / 2, 0.5, outside))  # as in student_t_tail; stdtrit has 11 digits before scipy 1.17
    if not x:
        raise StatisticsError(f"a quantile so far out can't be computed: probability {p}, {df} degrees of freedom")
    if x < 0.5:
        ratio = (1 - x) / x
    else:  # of the probabilities inside and outside of t, the smaller one has more digits
        inside = outside > 0.5
        inverse = special.betaincinv if inside else special.betainccinv
        y = float(inverse(0.5, df / 2, 1 - outside if inside else outside))
        ratio = y / (1 - y)
    return math.copysign(math.sqrt(df * ratio), p - 0.5)


def noncentral_t_tail(t: float, df: float, noncentrality: float) -> float:
    """Returns P(T > t) of T = (Z + noncentrality) / S, Z a standard normal and S^2 a chi-square over its df."""
    tail = float(lab_library("scipy.stats").nct.sf(t, df, noncentrality))
    if math.isnan(tail):
        raise StatisticsError(f"no tail of the noncentral t at {t}: df={df}, noncentrality={noncentrality}")
    return tail


def power_of_t_test(noncentrality: float, df: float, alpha: float) -> float:
    """Returns the chance that a two-sided t test at alpha rejects where the means differ by so many standard errors."""
    critical = -student_t_quantile(alpha / 2, df)
    return noncentral_t_tail(critical, df, noncentrality) + noncentral_t_tail(critical, df, -noncentrality)


@dataclass(frozen=True)
class SampleSummary:
    n: int
    mean: float
    sd: float | None
    """Standard deviation with n - 1; None for one value."""


@dataclass(frozen=True)
class MeanDifference:
    """Holds a t test of mean A - mean B. Where the runs have no spread, `t` and `df` are None and `note` says so."""

    method: str
    difference: float
    standard_error: float
    df: float | None
    t: float | None
    p_two_sided: float | None
    """1 where there is neither difference nor spread; None where means differ without any: no test is defined then."""
    p_a_lower: float | None
    """One-sided p of "A is lower": the chance of a difference as low as this where the means are equal."""
    note: str = ""


@dataclass(frozen=True)
class Equivalence:
    """Holds two one-sided tests (Schuirmann 1987): a small p says that the means differ by less than the margin."""

    margin: float
    t_above_minus_margin: float
    t_below_margin: float
    p: float


def summarize_sample(values: Sequence[float]) -> SampleSummary:
    """Returns n, mean and standard deviation; deviations count from the first value, so that equal values have none."""
    if not values:
        raise StatisticsError("a sample needs at least one value")
    n, origin = len(values), values[0]
    shift = math.fsum(value - origin for value in values) / n
    squares = math.fsum((value - origin - shift) ** 2 for value in values)
    return SampleSummary(n, origin + shift, math.sqrt(squares / (n - 1)) if n > 1 else None)


def difference_test(method: str, difference: float, error: float, df: float, scale: float) -> MeanDifference:
    """Returns the t test of a difference with its standard error; below ROUNDING of `scale` a spread is none."""
    if error <= ROUNDING * scale:
        equal = abs(difference) <= ROUNDING * scale
        p_two_sided, p_a_lower, note = (1.0, 0.5, NO_DIFFERENCE) if equal else (None, None, NO_SPREAD)
        return MeanDifference(method, difference, 0.0, None, None, p_two_sided, p_a_lower, note)
    t = difference / error
    p_two_sided = min(1.0, 2 * student_t_tail(abs(t), df))
    return MeanDifference(method, difference, error, df, t, p_two_sided, student_t_tail(-t, df))


def welch(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Runs Welch's t test of two independent samples of unequal variances (Welch 1947). Raises StatisticsError.

    1 / df = s^2 / (na - 1) + (1 - s)^2 / (nb - 1) with s = va / (va + vb) and v = sd^2 / n (Satterthwaite 1946).
    """
    if min(len(a), len(b)) < 2:
        raise StatisticsError("needs 2 runs an arm")
    first, second = summarize_sample(a), summarize_sample(b)
    error_a, error_b = first.sd / math.sqrt(first.n), second.sd / math.sqrt(second.n)
    error = math.hypot(error_a, error_b)
    share = (error_a / error) ** 2 if error else 0.0  # not the variances: fourth powers of small numbers underflow
    df = 1 / (share**2 / (first.n - 1) + (1 - share) ** 2 / (second.n - 1))
    scale = max(map(abs, [*a, *b]))
    return difference_test("Welch", first.mean - second.mean, error, df, scale)


def paired(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Runs Student's t test of the differences a[i] - b[i]; df = n - 1. Raises StatisticsError."""
    if len(a) != len(b):
        raise StatisticsError(f"pairs need as many runs in A as in B, not {len(a)} and {len(b)}")
    if len(a) < 2:
        raise StatisticsError("needs 2 pairs")
    differences = summarize_sample([x - y for x, y in zip(a, b, strict=True)])
    error = differences.sd / math.sqrt(differences.n)
    return difference_test("paired", differences.mean, error, differences.n - 1, max(map(abs, [*a, *b])))


def confidence_interval(test: MeanDifference, alpha: float) -> tuple[float, float] | None:
    """Returns the interval that covers the true difference with probability 1 - alpha; None without spread."""
    if test.df is None:
        return None
    half = -student_t_quantile(alpha / 2, test.df) * test.standard_error
    return test.difference - half, test.difference + half


def tost(test: MeanDifference, margin: float) -> Equivalence | None:
    """Tests whether the means are within `margin` of each other; None without spread. Raises StatisticsError."""
    if margin <= 0:
        raise StatisticsError(f"the margin of equivalence must be above 0, not {margin}")
    if test.df is None:
        return None
    above = (test.difference + margin) / test.standard_error
    below = (test.difference - margin) / test.standard_error
    p = max(student_t_tail(above, test.df), student_t_tail(-below, test.df))
    return Equivalence(margin, above, below, p)


def minimum_detectable_difference(test: MeanDifference, alpha: float, power: float = 0.8) -> float | None:
    """Returns the smallest true difference that such runs show with probability `power` in a two-sided test at alpha.

    It is noncentrality * standard error, where P(|T(df, noncentrality)| > t(1 - alpha/2, df)) = power for the
    noncentral t; the measured spread is taken for the true one. None without spread.
    """
    if not alpha < power < 1:
        raise StatisticsError(f"the power must lie between alpha and 1, not {power}")
    return None if test.df is None else detectable_noncentrality(test.df, alpha, power) * test.standard_error


@lru_cache  # asked for again for every measure
def detectable_noncentrality(df: float, alpha: float, power: float) -> float:
    """Returns the true difference, in standard errors, at which a two-sided t test at alpha has this power."""
    high = 1.0
    while power_of_t_test(high, df, alpha) < power:
        high *= 2
    brentq = lab_library("scipy.optimize").brentq
    return brentq(lambda delta: power_of_t_test(delta, df, alpha) - power, 0.0, high, xtol=1e-12, rtol=1e-12)


def bpb_per_nat(val_tokens: int, val_bytes: int) -> float:
    """Converts nats per token to bits per byte: a token has val_bytes / val_tokens bytes, a bit is ln 2 nats."""
    return val_tokens / (math.log(2) * val_bytes)


# ---- the bootstrap ----


@dataclass(frozen=True)
class BootstrapInterval:
    """Holds the mean per token of a difference, with what the draws say of it."""

    difference: float
    low: float
    high: float
    blocks: int
    draws: int

    @property
    def resolved(self) -> bool:
        """Says whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def block_numbers(starts_N: np.ndarray, block_tokens: int) -> np.ndarray:
    """Numbers each target's block: every `block_tokens` targets, or, for 0, from a True of `starts_N` to the next.

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
    """Returns the interval of sum(sums_K) / sum(counts_K) that leaves alpha / 2 of the draws out at each end.

    Whole blocks are drawn with replacement, for tokens may depend on each other, and the ratio is taken of each draw
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 8.6). Seeded: the same numbers give
    the same interval. Raises StatisticsError with fewer than two blocks.
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
