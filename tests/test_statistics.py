"""Student's t and its tests against integrals, closed forms, tables, and simulated runs without a difference."""

import math
import sys
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from golf.config.knobs import UserError
from lab.compare.statistics import (
    StatisticsError,
    bpb_per_nat,
    confidence_interval,
    detectable_noncentrality,
    minimum_detectable_difference,
    noncentral_t_tail,
    paired,
    power_of_t_test,
    student_t_quantile,
    student_t_tail,
    summarize_sample,
    tost,
    welch,
)

EXACT = 1e-10
NULLS = 10_000
ALPHA = 0.05
THREE_ERRORS = 3 * math.sqrt(ALPHA * (1 - ALPHA) / NULLS)
DEGREES = (1, 1.01, 1.7, 2, 3.3, 4, 8, 25.5, 100, 1_000, 10_000)
SHAPES = [(2, 2, 1.0), (3, 3, 1.0), (3, 3, 0.05), (2, 5, 7.0), (4, 12, 0.2), (10, 10, 1.0), (40, 25, 3.0)]
"""Runs in A, runs in B, and the spread of B against that of A."""
QUANTILES = [
    (0.025, 1, -12.706204736174698), (0.025, 2, -4.302652729749462), (0.025, 3, -3.182446305283709),
    (0.025, 4, -2.776445105197793), (0.025, 8, -2.306004135204166), (0.025, 100, -1.983971518523553),
    (0.005, 1, -63.656741162871526), (0.005, 2, -9.924843200918287), (0.005, 4, -4.604094871349994),
    (0.05, 5, -2.015048373333024), (0.1, 10, -1.372183641110336), (0.0005, 3, -12.923978636687485),
]  # fmt: skip
"""(probability below, degrees of freedom, t), as tables print them, with more digits."""


def arms(seed: int, shape: tuple[int, int, float], shift: float = 0.0) -> tuple[list[float], list[float]]:
    """Scores as they are: near 2.1 nats, with a spread of some thousandths."""
    random = np.random.default_rng(seed)
    n_a, n_b, ratio = shape
    return (random.normal(2.1, 2e-3, n_a).tolist(), random.normal(2.1 + shift, 2e-3 * ratio, n_b).tolist())


def mixture_tail(t: float, df: float, noncentrality: float = 0.0) -> float:
    """P(T > t) of T = (Z + noncentrality) / S, Z a standard normal, S^2 a chi-square over its df, without any library.

    Given S = s, it is Phi(noncentrality - t s). The mean of that over S is an integral over u = ln s of an analytic
    function that vanishes at both ends, where the trapezoidal rule converges exponentially.
    """
    share = 100 / df  # the density of u falls below e^-100 of its peak outside of these ends
    low, high = -(share + math.sqrt(share)), math.sqrt(share)
    log_peak = math.log(2) + df / 2 * math.log(df / 2) - df / 2 - math.lgamma(df / 2)

    def height(u: float) -> float:
        density = math.exp(log_peak + df * (u - math.expm1(2 * u) / 2))
        return density * math.erfc((t * math.exp(u) - noncentrality) / math.sqrt(2)) / 2

    total, intervals, previous = 0.0, 256, math.inf
    while True:
        points = (height(low + (high - low) * k / intervals) for k in range(intervals + 1))
        total = math.fsum(points) * (high - low) / intervals
        if abs(total - previous) <= 1e-9 * max(total, 1e-40):  # a halving squares the error
            return total
        previous, intervals = total, 2 * intervals


def welch_by_formula(a, b, shift: float = 0.0) -> tuple[float, float]:
    """(t, degrees of freedom) as Welch and Satterthwaite wrote them, for mean A - mean B + shift."""
    v_a, v_b = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    df = (v_a + v_b) ** 2 / (v_a**2 / (len(a) - 1) + v_b**2 / (len(b) - 1))
    return (np.mean(a) - np.mean(b) + shift) / math.sqrt(v_a + v_b), df


def pairs_by_formula(a, b, shift: float = 0.0) -> float:
    differences = np.subtract(a, b)
    return (np.mean(differences) + shift) / (np.std(differences, ddof=1) / math.sqrt(len(a)))


@pytest.mark.parametrize("df", DEGREES)
@given(t=strategies.floats(1e-4, 1e3), sign=strategies.sampled_from((-1, 1)))
@settings(max_examples=15)
def test_tail_is_the_integral_of_the_density(t, df, sign):
    expected = mixture_tail(sign * t, df)
    assert student_t_tail(sign * t, df) == pytest.approx(expected, abs=EXACT)
    if expected > 1e-30:
        assert student_t_tail(sign * t, df) == pytest.approx(expected, rel=1e-9)


@given(t=strategies.floats(1e-4, 1e4))
def test_a_far_tail_keeps_its_digits(t):
    """4 and 6 degrees of freedom: the polynomials of Abramowitz and Stegun 26.7.4 in s = t / sqrt(df + t^2)."""
    for df, polynomial in ((4, (1, 1 / 2)), (6, (1, 1 / 2, 3 / 8))):
        cosine2 = df / (df + t * t)
        sine = t / math.sqrt(df + t * t)
        inside = sine * sum(factor * cosine2**power for power, factor in enumerate(polynomial))
        assert student_t_tail(t, df) == pytest.approx((1 - inside) / 2, abs=1e-14)
    rest = 1 / (math.hypot(t, math.sqrt(2)) + t)  # 2 degrees: (1 - t / sqrt(2 + t^2)) / 2 without the difference
    assert student_t_tail(t, 2) == pytest.approx(rest / math.hypot(t, math.sqrt(2)), rel=1e-12)


@given(t=strategies.floats(-1e6, 1e6))
def test_tail_keeps_its_digits_where_closed_forms_exist(t):
    """Near zero scipy's own tail loses digits; 1 and 2 degrees of freedom have formulas."""
    assert student_t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
    assert student_t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.hypot(t, math.sqrt(2))), abs=1e-14)


def test_tail_at_its_ends():
    assert student_t_tail(0.0, 3) == 0.5
    assert student_t_tail(math.inf, 3) == 0 and student_t_tail(-math.inf, 3) == 1
    assert student_t_tail(1e300, 3) == 0


@pytest.mark.parametrize(("p", "df", "t"), QUANTILES)
def test_quantile_is_that_of_printed_tables(p, df, t):
    assert student_t_quantile(p, df) == pytest.approx(t, rel=EXACT)
    assert student_t_quantile(1 - p, df) == pytest.approx(-t, rel=EXACT)


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("p", [1e-9, 1e-4, 0.005, 0.025, 0.1, 0.25, 0.49, 0.6, 0.975, 0.9995])
def test_quantile_cuts_off_its_share_of_the_density(df, p):
    assert mixture_tail(-student_t_quantile(p, df), df) == pytest.approx(p, abs=EXACT)


@given(p=strategies.floats(1e-8, 0.5), df=strategies.floats(1, 1_000))
def test_quantile_inverts_the_tail(p, df):
    assert student_t_tail(-student_t_quantile(p, df), df) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, math.nan])
def test_quantile_refuses_what_is_no_probability(p):
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        student_t_quantile(p, 3)


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.025, 0.4])
def test_quantile_of_many_degrees_of_freedom_is_close_to_the_normal_one(p):
    """z + (z^3 + z) / (4 df) + (5 z^5 + 16 z^3 + 3 z) / (96 df^2): Abramowitz and Stegun 26.7.5."""
    z, df = NormalDist().inv_cdf(p), 1e6
    expected = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    assert student_t_quantile(p, df) == pytest.approx(expected, rel=EXACT)


def test_quantile_refuses_what_it_can_not_compute():
    assert student_t_quantile(1e-100, 1) == pytest.approx(-1e100 / math.pi, rel=EXACT)
    with pytest.raises(StatisticsError, match="so far out"):
        student_t_quantile(1e-300, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_welch_is_its_formula(shape, seed):
    a, b = arms(seed, shape, shift=seed * 1e-3)
    test, (t, df) = welch(a, b), welch_by_formula(a, b)
    assert test.difference == pytest.approx(np.mean(a) - np.mean(b), abs=1e-15)
    assert test.t == pytest.approx(t, rel=1e-9) and test.df == pytest.approx(df, rel=1e-9)
    assert test.p_two_sided == pytest.approx(2 * mixture_tail(abs(t), df), abs=EXACT)
    assert test.p_a_lower == pytest.approx(mixture_tail(-t, df), abs=EXACT)
    check_intervals(test)


def check_intervals(test):
    """The interval is centred on the difference, and its end is what a test at alpha just rejects."""
    for alpha in (0.05, 0.005):
        low, high = confidence_interval(test, alpha)
        assert (low + high) / 2 == pytest.approx(test.difference, abs=EXACT)
        half = (high - low) / 2
        assert 2 * mixture_tail(half / test.standard_error, test.df) == pytest.approx(alpha, abs=EXACT)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("seed", range(8))
def test_paired_is_its_formula(n, seed):
    a, b = arms(seed, (n, n, 1.0), shift=seed * 1e-3)
    test, t = paired(a, b), pairs_by_formula(a, b)
    assert test.t == pytest.approx(t, rel=1e-9) and test.df == n - 1
    assert test.p_two_sided == pytest.approx(2 * mixture_tail(abs(t), n - 1), abs=EXACT)
    assert test.p_a_lower == pytest.approx(mixture_tail(-t, n - 1), abs=EXACT)
    check_intervals(test)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [0.0005, 0.005, 0.02])
def test_equivalence_is_two_one_sided_tests(shape, margin):
    a, b = arms(3, shape, shift=1e-3)
    (above, df), (below, _) = welch_by_formula(a, b, margin), welch_by_formula(a, b, -margin)
    expected = max(mixture_tail(above, df), mixture_tail(-below, df))
    assert tost(welch(a, b), margin).p == pytest.approx(expected, abs=EXACT)
    with pytest.raises(StatisticsError, match="margin"):
        tost(welch(a, b), 0.0)


def test_equivalence_of_pairs():
    a, b = arms(4, (5, 5, 1.0))
    above, below = pairs_by_formula(a, b, 0.005), pairs_by_formula(a, b, -0.005)
    assert tost(paired(a, b), 0.005).p == pytest.approx(max(mixture_tail(above, 4), mixture_tail(-below, 4)), abs=EXACT)


@pytest.mark.parametrize("df", DEGREES[:-1])
@pytest.mark.parametrize("t", [0.0, 0.5, 2.776, 12.7])
@pytest.mark.parametrize("noncentrality", [-50.0, -3.0, 0.0, 0.7, 4.0, 16.0, 200.0])
def test_noncentral_tail_is_the_integral_of_the_density(t, df, noncentrality):
    expected = mixture_tail(t, df, noncentrality)
    assert noncentral_t_tail(t, df, noncentrality) == pytest.approx(expected, abs=1e-9)


def test_power_without_a_difference_is_alpha():
    assert power_of_t_test(0.0, 3.7, 0.05) == pytest.approx(0.05, abs=1e-10)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05), (3, 0.005), (10, 0.05)])
def test_detectable_difference_has_the_power(n, alpha):
    test = paired(*arms(5, (n, n, 1.0)))
    noncentrality = minimum_detectable_difference(test, alpha) / test.standard_error
    critical = -student_t_quantile(alpha / 2, n - 1)
    power = mixture_tail(critical, n - 1, noncentrality) + mixture_tail(critical, n - 1, -noncentrality)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_detectable_difference_refuses_a_power_that_is_none():
    test = welch(*arms(5, (3, 3, 1.0)))
    for power in (0.05, 1.0):
        with pytest.raises(StatisticsError, match="power"):
            minimum_detectable_difference(test, 0.05, power)


def simulated(seed: int, n: int, spread: float, shift: float = 0.0) -> list[list[float]]:
    return np.random.default_rng(seed).normal(shift, spread, (NULLS, n)).tolist()


def share_rejected(tests) -> float:
    return sum(test.p_two_sided < ALPHA for test in tests) / NULLS


@pytest.mark.parametrize(("n_a", "n_b", "spread"), [(10, 10, 1.0), (10, 10, 3.0), (8, 20, 0.4)])
def test_nulls_reject_at_alpha_in_welch(n_a, n_b, spread):
    share = share_rejected(map(welch, simulated(1, n_a, 1.0), simulated(2, n_b, spread)))
    assert abs(share - ALPHA) < THREE_ERRORS


def test_nulls_of_three_runs_reject_at_most_at_alpha_in_welch():
    """With three runs an arm Welch's approximation is on the safe side."""
    assert 0.02 < share_rejected(map(welch, simulated(1, 3, 1.0), simulated(2, 3, 1.0))) < ALPHA + THREE_ERRORS


@pytest.mark.parametrize("n", [2, 3, 10])
def test_nulls_reject_at_alpha_in_pairs(n):
    seeds = simulated(3, n, 5.0)  # what a seed does to both arms
    a, b = (np.add(seeds, simulated(seed, n, 1.0)).tolist() for seed in (4, 5))
    assert abs(share_rejected(map(paired, a, b)) - ALPHA) < THREE_ERRORS


def test_the_simulation_would_find_a_wrong_test():
    """Standard errors counted against a normal distribution ("so many sigma") reject three times too often."""
    tests = [welch(a, b) for a, b in zip(simulated(1, 3, 1.0), simulated(2, 3, 1.0), strict=True)]
    share = sum(abs(test.t) > 1.96 for test in tests) / NULLS
    assert share > ALPHA + 3 * THREE_ERRORS


def test_simulated_runs_have_the_power_that_is_told():
    """Pairs that truly differ by the smallest detectable difference of their true spread."""
    n, noncentrality = 4, 3.7610595538
    assert power_of_t_test(noncentrality, 4, ALPHA) == pytest.approx(0.8, abs=1e-6)
    differences = simulated(6, n + 1, 1.0, shift=noncentrality / math.sqrt(n + 1))
    share = share_rejected(paired(each, [0.0] * (n + 1)) for each in differences)
    assert abs(share - 0.8) < 3 * math.sqrt(0.8 * 0.2 / NULLS)


@pytest.mark.parametrize("test", [welch, paired])
def test_equal_runs_are_no_difference(test):
    figures = test([3.1, 3.1, 3.1], [3.1, 3.1, 3.1])
    assert (figures.difference, figures.p_two_sided, figures.p_a_lower, figures.t) == (0.0, 1.0, 0.5, None)
    assert figures.note == "neither difference nor spread"
    assert confidence_interval(figures, 0.05) is tost(figures, 0.005) is minimum_detectable_difference(figures, 0.05)


@pytest.mark.parametrize("test", [welch, paired])
def test_a_difference_without_spread_has_no_p_value(test):
    figures = test([3.1, 3.1], [3.2, 3.2])
    assert figures.p_two_sided is figures.p_a_lower is figures.t is None
    assert figures.difference == pytest.approx(-0.1) and "no test is defined" in figures.note


def test_pairs_that_differ_by_rounding_alone_have_no_spread():
    assert paired([1.1, 1.2, 1.3], [1.0, 1.1, 1.2]).p_two_sided is None


def test_spread_in_one_arm_is_enough():
    a, b = [3.1, 3.1, 3.1], [3.2, 3.21, 3.22]
    t = 0.11 / (0.01 / math.sqrt(3))  # a test of B against the constant 3.1; 2 degrees of freedom have a closed form
    assert welch(a, b).p_two_sided == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=EXACT)


def test_a_tiny_spread_does_not_underflow():
    a, b = [1e-90, 2e-90, 4e-90], [2e-90, 3e-90, 5e-90]
    t = 1 / math.sqrt(14 / 9)  # both variances are 7/3, so that there are 4 degrees of freedom, with a closed form
    sine = t / math.sqrt(4 + t * t)
    assert welch(a, b).p_two_sided == pytest.approx(1 - sine * (1 + 2 / (4 + t * t)), abs=EXACT)


def test_one_run_has_no_spread_and_no_test():
    assert summarize_sample([2.5]).sd is None and summarize_sample([2.5]).mean == 2.5
    for wrong in (lambda: welch([1.0], [1.0, 2.0]), lambda: paired([1.0], [2.0]), lambda: paired([1.0, 2.0], [3.0])):
        with pytest.raises(StatisticsError):
            wrong()
    with pytest.raises(StatisticsError, match="at least one value"):
        summarize_sample([])


@pytest.mark.parametrize(("bytes_per_token", "bpb"), [(2.436, 0.00296), (3.727, 0.00194), (3.157, 0.00228)])
def test_the_margin_in_bits_per_byte(bytes_per_token, bpb):
    """The competition's 0.005 nats in its three tokenizers."""
    assert 0.005 * bpb_per_nat(1_000_000, round(1_000_000 * bytes_per_token)) == pytest.approx(bpb, abs=6e-6)


@pytest.mark.parametrize("module", ["scipy.special", "scipy.stats", "scipy.optimize"])
def test_without_scipy_one_line_says_what_to_install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    detectable_noncentrality.cache_clear()
    with pytest.raises(UserError, match=r"^scipy can't be imported .*pip install -r requirements-lab.txt$"):
        minimum_detectable_difference(welch(*arms(5, (3, 3, 1.0))), 0.05)
