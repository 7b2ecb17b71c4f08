"""Curves through (bytes, loss) points are their closed form, and their differences are what they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator

from lab.rates.rate_difference import RateError, bjontegaard_percent, loss_curve
from tests.trained_run_fixtures import power_law

tenths = st.integers(-50, 50).map(lambda number: number / 10)
points_of_a_function = st.lists(st.tuples(st.floats(0.01, 10), tenths), min_size=2, max_size=9)
"""Widths of the pieces, and heights."""


def curve_of(x_K: list[float], y_K: list[float]):
    """The curve through bytes exp(y) at losses x."""
    return loss_curve("a", [(math.exp(y), x) for x, y in zip(x_K, y_K, strict=True)])


def test_the_curve_is_its_closed_form():
    """Fritsch and Butland's slopes, written out for three points, and the Hermite cubic on each piece."""
    curve = curve_of([0, 1, 3], [2, 1, 0])
    slopes = [-(4 * 1 - 0.5) / 3, -(5 + 4) / (5 / 1 + 4 / 0.5), -(5 * 0.5 - 2 * 1) / 3]
    assert math.log(curve.bytes_at(0.5)) == pytest.approx(1.5 + (slopes[0] - slopes[1]) / 8, abs=1e-14)
    assert math.log(curve.bytes_at(2)) == pytest.approx(0.5 + 2 * (slopes[1] - slopes[2]) / 8, abs=1e-14)
    areas = [1.5 + (slopes[0] - slopes[1]) / 12, 1 + 4 * (slopes[1] - slopes[2]) / 12]
    assert curve.mean_log_bytes(0, 1) == pytest.approx(areas[0], abs=1e-14)
    assert curve.mean_log_bytes(0, 3) == pytest.approx(sum(areas) / 3, abs=1e-14)
    assert curve.span == (0, 3) and curve.bytes_at(-0.1) is None and curve.bytes_at(3.1) is None
    line = curve_of([0, 2], [1, 0])
    assert math.log(line.bytes_at(0.5)) == pytest.approx(0.75) and line.mean_log_bytes(0, 1) == pytest.approx(0.75)


@given(points_of_a_function)
def test_the_curve_is_monotone_between_its_points(pairs):
    x_K, y_K = np.cumsum([width for width, _ in pairs]), -np.cumsum([abs(height) + 0.1 for _, height in pairs])
    curve = curve_of(x_K, y_K)
    values = [curve.bytes_at(x) for x in np.linspace(*curve.span, 100).clip(*curve.span)]
    assert curve.left_out == 0 and (np.diff(np.log(values)) <= 1e-9).all()


@given(st.floats(0.2, 5), st.floats(0.05, 1))
def test_a_share_of_the_bytes_at_every_loss_is_that_share(factor, exponent):
    anchor = loss_curve("a", power_law(1e6, exponent))
    curve = loss_curve("b", [(factor * size, loss) for size, loss in power_law(1e6, exponent)])
    assert bjontegaard_percent(curve, anchor) == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert bjontegaard_percent(anchor, anchor) == 0
    there, back = bjontegaard_percent(curve, anchor), bjontegaard_percent(anchor, curve)
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)


def test_the_difference_is_the_integral_of_scipys_curves():
    own = [(1e5, 0.3), (1.4e5, 0.12), (2.1e5, 0.05), (3e5, 0.02)]
    other = [(0.9e5, 0.25), (1.5e5, 0.09), (1.9e5, 0.06), (3.3e5, 0.01)]
    curves = [
        PchipInterpolator(*zip(*[(loss, math.log(size)) for size, loss in p[::-1]], strict=True)) for p in (own, other)
    ]
    for most, high in ((math.inf, 0.25), (0.1, 0.1)):
        mean = quad(lambda x: curves[0](x) - curves[1](x), 0.02, high, points=[0.05, 0.06], epsabs=1e-10)[0]
        expected = 100 * (math.exp(mean / (high - 0.02)) - 1)
        assert bjontegaard_percent(loss_curve("a", own), loss_curve("b", other), most) == pytest.approx(expected, 1e-7)


def test_points_that_a_smaller_one_beats_are_no_part_of_the_curve():
    straight = power_law(1e6, 0.3)
    noisy = [*straight, (straight[2][0] * 1.01, straight[2][1] * 1.3), (straight[-1][0] * 2, straight[-1][1])]
    curve = loss_curve("a", noisy[::-1])
    assert curve.left_out == 2 and curve.span == loss_curve("b", straight).span
    assert bjontegaard_percent(curve, loss_curve("b", straight)) == 0


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(1e5, 0.1)], "a: a curve needs two points"),
        ([(1e5, 0.1), (2e5, 0.1)], "a: a curve needs two points"),
        ([(1e5, 0.1), (2e5, math.nan)], "no finite number"),
        ([(0, 0.1), (2e5, 0.05)], "no bytes"),
        ([(1e5, 9.0), (2e5, 8.0)], "share no loss: a reaches 8.00000 to 9.00000, b reaches 0.00400 to 0.20000"),
    ],
)
def test_what_makes_no_curve_or_no_difference(points, message):
    with pytest.raises(RateError, match=message):
        bjontegaard_percent(loss_curve("a", points), loss_curve("b", power_law(1e6, 0.3)))
