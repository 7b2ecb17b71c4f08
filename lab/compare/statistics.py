"""Student's t from first principles, and the tests that compare two arms of runs: Welch, paired, equivalence, power.

Everything is float64 in plain Python: an arm has a handful of runs. The incomplete beta function is evaluated from the
formulas of the Digital Library of Mathematical Functions (DLMF, dlmf.nist.gov), section 8.17. p values agree with scipy
to 1e-10 for 1 to 10,000 degrees of freedom (tests/test_statistics.py).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from golf.config.knobs import UserError

ROUNDING = 10 * sys.float_info.epsilon
"""Spread below this share of the values is rounding, not noise."""
NO_SPREAD = "no spread, so no test is defined"
NO_DIFFERENCE = "neither difference nor spread"


class StatisticsError(UserError):
    """A sample that is too small, or a probability that is none."""


def regularized_incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) for a, b > 0, with y = 1 - x given apart, so that no digits are lost at either end.

    DLMF 8.17.4, I_x(a, b) = 1 - I_y(b, a), takes x to the side where the continued fraction converges fast.
    """
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_by_fraction(b, a, y, x)
    return beta_by_fraction(a, b, x, y)


def beta_by_fraction(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) = x^a y^b / (a B(a, b)) / C with C = 1 + d1/(1 + d2/(1 + ...)); DLMF 8.17.22 and 8.17.23.

    The convergents P_n / Q_n of C come from P_n = P_(n-1) + d_n P_(n-2), and the same for Q (DLMF 1.12.5). Both are
    divided by Q_n at every step, so that nothing overflows and P is the convergent itself.
    """
    log_x = math.log(x) if x < 0.5 else math.log1p(-y)
    log_y = math.log(y) if y < 0.5 else math.log1p(-x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    before, convergent, denominator_before = 1.0, 1.0, 0.0
    for n in range(1, 100_000):
        m = n // 2
        if n % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1.0 + d * denominator_before
        following = (convergent + d * before) / denominator
        before, denominator_before = convergent / denominator, 1.0 / denominator
        converged = abs(following - convergent) <= 4 * sys.float_info.epsilon * abs(following)
        convergent = following
        if converged:
            return math.exp(a * log_x + b * log_y - math.log(a) - log_beta) / convergent
    raise StatisticsError(f"the incomplete beta function of a={a}, b={b} at {x} did not converge")


def student_t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's t with df degrees of freedom: I_x(df/2, 1/2) / 2 for t > 0, with x = df / (df + t^2)."""
    square = (t / math.sqrt(df)) * (t / math.sqrt(df))
    if square > 1:
        x, y = (1 / square) / (1 + 1 / square), 1 / (1 + 1 / square)
    else:
        x, y = 1 / (1 + square), square / (1 + square)
    tail = regularized_incomplete_beta(df / 2, 0.5, x, y) / 2
    return tail if t > 0 else 1 - tail


def student_t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, by bisection down to neighbouring floats. Raises StatisticsError.

    A small p keeps all its digits; for a p near 1 take the quantile of 1 - p with the other sign.
    """
    if not 0 < p < 1:
        raise StatisticsError(f"a quantile needs a probability between 0 and 1, not {p}")
    if p > 0.5:
        return -student_t_quantile(1 - p, df)
    return -falling_root(lambda t: student_t_tail(t, df) - p)


def falling_root(function: Callable[[float], float], resolution: float = 0.0) -> float:
    """Where a falling function of t >= 0 reaches zero; 0 where it starts at zero or below."""
    low, high = 0.0, 1.0
    if function(low) <= 0:
        return low
    while function(high) > 0:
        low, high = high, 2 * high
    while high - low > resolution * high:
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return high


def noncentral_t_tail(t: float, df: float, noncentrality: float) -> float:
    """P(T > t) of T = (Z + noncentrality) / S, Z a standard normal, S^2 a chi-square over its df; for t >= 0.

    Given S = s, it is Phi(noncentrality - t s). The mean of that over S is an integral over u = ln s of an analytic
    function that vanishes at both ends, where the trapezoidal rule converges exponentially; halved until it stands.
    """
    share = 40 / df  # the density of u falls below e^-40 of its peak outside of these ends
    low, high = -(share + math.sqrt(share)), math.sqrt(share)
    log_peak = math.log(2) + df / 2 * math.log(df / 2) - df / 2 - math.lgamma(df / 2)

    def height(u: float) -> float:
        density = math.exp(log_peak + df * (u - math.expm1(2 * u) / 2))
        return density * math.erfc((t * math.exp(u) - noncentrality) / math.sqrt(2)) / 2

    intervals, total, estimate = 32, math.fsum(height(low + (high - low) * k / 32) for k in range(33)), math.inf
    while True:
        previous, estimate = estimate, total * (high - low) / intervals
        if abs(estimate - previous) <= 1e-9:  # every halving squares the error: this one is far below that
            return estimate
        width = (high - low) / intervals
        total += math.fsum(height(low + width * (k + 0.5)) for k in range(intervals))
        intervals *= 2


def power_of_t_test(noncentrality: float, df: float, alpha: float) -> float:
    """Chance that a two-sided t test at alpha rejects, where the true difference is noncentrality standard errors."""
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
    """A t test of mean A - mean B. Where the runs have no spread, `t` and `df` are None and `note` says so."""

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
    """Two one-sided tests (Schuirmann 1987): small p says that the means differ by less than the margin."""

    margin: float
    t_above_minus_margin: float
    t_below_margin: float
    p: float


def summarize_sample(values: Sequence[float]) -> SampleSummary:
    """n, mean, standard deviation. Deviations are taken from the first value, so that equal values have none at all."""
    if not values:
        raise StatisticsError("a sample needs at least one value")
    n, origin = len(values), values[0]
    shift = math.fsum(value - origin for value in values) / n
    squares = math.fsum((value - origin - shift) ** 2 for value in values)
    return SampleSummary(n, origin + shift, math.sqrt(squares / (n - 1)) if n > 1 else None)


def difference_test(method: str, difference: float, error: float, df: float, scale: float) -> MeanDifference:
    """The t test of a difference with its standard error; `scale` is the size of the values, to know rounding by."""
    if error <= ROUNDING * scale:
        equal = abs(difference) <= ROUNDING * scale
        p_two_sided, p_a_lower, note = (1.0, 0.5, NO_DIFFERENCE) if equal else (None, None, NO_SPREAD)
        return MeanDifference(method, difference, 0.0, None, None, p_two_sided, p_a_lower, note)
    t = difference / error
    p_two_sided = min(1.0, 2 * student_t_tail(abs(t), df))
    return MeanDifference(method, difference, error, df, t, p_two_sided, student_t_tail(-t, df))


def welch(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Welch's t test of two independent samples, variances not assumed equal (Welch 1947). Raises StatisticsError.

    df = (va + vb)^2 / (va^2 / (na - 1) + vb^2 / (nb - 1)) with v = sd^2 / n (Satterthwaite 1946).
    """
    if min(len(a), len(b)) < 2:
        raise StatisticsError("needs 2 runs an arm")
    first, second = summarize_sample(a), summarize_sample(b)
    error_a, error_b = first.sd / math.sqrt(first.n), second.sd / math.sqrt(second.n)
    error, largest = math.hypot(error_a, error_b), max(error_a, error_b)
    df = math.nan
    if largest > 0:  # the ratios, not the variances themselves: fourth powers of small numbers underflow
        ratio_a, ratio_b = (error_a / largest) ** 2, (error_b / largest) ** 2
        df = (ratio_a + ratio_b) ** 2 / (ratio_a**2 / (first.n - 1) + ratio_b**2 / (second.n - 1))
    scale = max(map(abs, [*a, *b]))
    return difference_test("Welch", first.mean - second.mean, error, df, scale)


def paired(a: Sequence[float], b: Sequence[float]) -> MeanDifference:
    """Student's t test of the differences a[i] - b[i]; df = n - 1. Raises StatisticsError."""
    if len(a) != len(b):
        raise StatisticsError(f"pairs need as many runs in A as in B, not {len(a)} and {len(b)}")
    if len(a) < 2:
        raise StatisticsError("needs 2 pairs")
    differences = summarize_sample([x - y for x, y in zip(a, b, strict=True)])
    error = differences.sd / math.sqrt(differences.n)
    return difference_test("paired", differences.mean, error, differences.n - 1, max(map(abs, [*a, *b])))


def confidence_interval(test: MeanDifference, alpha: float) -> tuple[float, float] | None:
    """The interval that covers the true difference with probability 1 - alpha; None without spread."""
    if test.df is None:
        return None
    half = -student_t_quantile(alpha / 2, test.df) * test.standard_error
    return test.difference - half, test.difference + half


def tost(test: MeanDifference, margin: float) -> Equivalence | None:
    """Are the means within `margin` of each other? None without spread. Raises StatisticsError."""
    if margin <= 0:
        raise StatisticsError(f"the margin of equivalence must be above 0, not {margin}")
    if test.df is None:
        return None
    above = (test.difference + margin) / test.standard_error
    below = (test.difference - margin) / test.standard_error
    p = max(student_t_tail(above, test.df), student_t_tail(-below, test.df))
    return Equivalence(margin, above, below, p)


def minimum_detectable_difference(test: MeanDifference, alpha: float, power: float = 0.8) -> float | None:
    """The smallest true difference that such runs show with probability `power` in a two-sided test at alpha.

    noncentrality * standard error, where P(|T(df, noncentrality)| > t(1 - alpha/2, df)) = power for the noncentral t;
    the measured spread is taken for the true one. None without spread.
    """
    if not alpha < power < 1:
        raise StatisticsError(f"the power must lie between alpha and 1, not {power}")
    return None if test.df is None else detectable_noncentrality(test.df, alpha, power) * test.standard_error


@lru_cache  # seconds at 1 degree of freedom and a small alpha, and asked for again for every measure
def detectable_noncentrality(df: float, alpha: float, power: float) -> float:
    """The true difference, in standard errors, at which a two-sided t test at alpha has this power."""
    return falling_root(lambda delta: power - power_of_t_test(delta, df, alpha), resolution=1e-9)


def bpb_per_nat(val_tokens: int, val_bytes: int) -> float:
    """Bits per byte that one nat per token is: a token has val_bytes / val_tokens bytes, a bit is ln 2 nats."""
    return val_tokens / (math.log(2) * val_bytes)
