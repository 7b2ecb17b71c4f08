"""Student's t and its tests against scipy, against closed forms, and against simulated runs without a difference."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies
from scipy import special, stats

from lab.compare.statistics import (
    StatisticsError,
    bpb_per_nat,
    confidence_interval,
    minimum_detectable_difference,
    noncentral_t_tail,
    paired,
    power_of_t_test,
    regularized_incomplete_beta,
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


def arms(seed: int, shape: tuple[int, int, float], shift: float = 0.0) -> tuple[list[float], list[float]]:
    """Scores as they are: near 2.1 nats, with a spread of some thousandths."""
    random = np.random.default_rng(seed)
    n_a, n_b, ratio = shape
    return (random.normal(2.1, 2e-3, n_a).tolist(), random.normal(2.1 + shift, 2e-3 * ratio, n_b).tolist())


@given(
    a=strategies.floats(0.5, 500),
    b=strategies.floats(0.5, 500),
    x=strategies.floats(1e-6, 1 - 1e-6),
)
def test_incomplete_beta_is_that_of_scipy(a, b, x):
    assert regularized_incomplete_beta(a, b, x, 1 - x) == pytest.approx(special.betainc(a, b, x), abs=EXACT)


@given(t=strategies.floats(1e-4, 1e4), df=strategies.floats(1, 10_000), sign=strategies.sampled_from((-1, 1)))
def test_tail_is_that_of_scipy(t, df, sign):
    expected = stats.t.sf(sign * t, df)
    assert student_t_tail(sign * t, df) == pytest.approx(expected, abs=EXACT)
    if expected > 1e-250:
        assert student_t_tail(sign * t, df) == pytest.approx(expected, rel=1e-9)


@given(t=strategies.floats(-1e6, 1e6))
def test_tail_keeps_its_digits_where_closed_forms_exist(t):
    """Near zero scipy itself loses digits; 1 and 2 degrees of freedom have formulas."""
    assert student_t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
    assert student_t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.hypot(t, math.sqrt(2))), abs=1e-14)


def test_tail_at_its_ends():
    assert student_t_tail(0.0, 3) == 0.5
    assert student_t_tail(math.inf, 3) == 0 and student_t_tail(-math.inf, 3) == 1
    assert student_t_tail(1e300, 3) == 0


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("p", [1e-9, 1e-4, 0.005, 0.025, 0.1, 0.25, 0.49, 0.6, 0.975, 0.9995])
def test_quantile_is_that_of_scipy(df, p):
    assert student_t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=EXACT)


@given(p=strategies.floats(1e-8, 0.5), df=strategies.floats(1, 1_000))
def test_quantile_inverts_the_tail(p, df):
    assert student_t_tail(-student_t_quantile(p, df), df) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, math.nan])
def test_quantile_refuses_what_is_no_probability(p):
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        student_t_quantile(p, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_welch_is_that_of_scipy(shape, seed):
    a, b = arms(seed, shape, shift=seed * 1e-3)
    test, expected = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert test.difference == pytest.approx(np.mean(a) - np.mean(b), abs=1e-15)
    assert test.t == pytest.approx(expected.statistic, rel=1e-9) and test.df == pytest.approx(expected.df, rel=1e-9)
    assert test.p_two_sided == pytest.approx(expected.pvalue, abs=EXACT)
    lower = stats.ttest_ind(a, b, equal_var=False, alternative="less")
    assert test.p_a_lower == pytest.approx(lower.pvalue, abs=EXACT)
    for alpha in (0.05, 0.005):
        interval = expected.confidence_interval(1 - alpha)
        assert confidence_interval(test, alpha) == pytest.approx((interval.low, interval.high), abs=EXACT)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("seed", range(8))
def test_paired_is_that_of_scipy(n, seed):
    a, b = arms(seed, (n, n, 1.0), shift=seed * 1e-3)
    test, expected = paired(a, b), stats.ttest_rel(a, b)
    assert test.t == pytest.approx(expected.statistic, rel=1e-9) and test.df == n - 1
    assert test.p_two_sided == pytest.approx(expected.pvalue, abs=EXACT)
    assert test.p_a_lower == pytest.approx(stats.ttest_rel(a, b, alternative="less").pvalue, abs=EXACT)
    interval = expected.confidence_interval(0.95)
    assert confidence_interval(test, 0.05) == pytest.approx((interval.low, interval.high), abs=EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("margin", [0.0005, 0.005, 0.02])
def test_equivalence_is_two_one_sided_tests(shape, margin):
    a, b = arms(3, shape, shift=1e-3)
    above = stats.ttest_ind(np.add(a, margin), b, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(np.subtract(a, margin), b, equal_var=False, alternative="less").pvalue
    assert tost(welch(a, b), margin).p == pytest.approx(max(above, below), abs=EXACT)
    with pytest.raises(StatisticsError, match="margin"):
        tost(welch(a, b), 0.0)


def test_equivalence_of_pairs():
    a, b = arms(4, (5, 5, 1.0))
    differences = np.subtract(a, b)
    above = stats.ttest_1samp(differences, -0.005, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.005, alternative="less").pvalue
    assert tost(paired(a, b), 0.005).p == pytest.approx(max(above, below), abs=EXACT)


@pytest.mark.parametrize("df", DEGREES[:-1])
@pytest.mark.parametrize("t", [0.0, 0.5, 2.776, 12.7])
@pytest.mark.parametrize("noncentrality", [-3.0, 0.0, 0.7, 4.0, 16.0])
def test_noncentral_tail_is_that_of_scipy(t, df, noncentrality):
    assert noncentral_t_tail(t, df, noncentrality) == pytest.approx(stats.nct.sf(t, df, noncentrality), abs=1e-9)


def test_power_without_a_difference_is_alpha():
    assert power_of_t_test(0.0, 3.7, 0.05) == pytest.approx(0.05, abs=1e-10)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05), (3, 0.005), (10, 0.05)])
def test_detectable_difference_has_the_power_by_scipy(n, alpha):
    test = paired(*arms(5, (n, n, 1.0)))
    noncentrality = minimum_detectable_difference(test, alpha) / test.standard_error
    critical = stats.t.ppf(1 - alpha / 2, n - 1)  # the other tail, where scipy has NaN, is below 1e-6
    assert stats.nct.sf(critical, n - 1, noncentrality) == pytest.approx(0.8, abs=1e-6)


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
    assert welch(a, b).p_two_sided == pytest.approx(stats.ttest_1samp(b, 3.1).pvalue, abs=EXACT)


def test_a_tiny_spread_does_not_underflow():
    a, b = [1e-90, 2e-90, 4e-90], [2e-90, 3e-90, 5e-90]
    scaled = stats.ttest_ind([1, 2, 4], [2, 3, 5], equal_var=False)
    assert welch(a, b).p_two_sided == pytest.approx(scaled.pvalue, abs=EXACT)


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
