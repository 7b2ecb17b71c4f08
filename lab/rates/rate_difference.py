"""How much fewer bytes one method needs than another at equal loss: Bjontegaard's rate difference.

Bjontegaard (VCEG-M33, 2001) fits log(rate) as a function of quality, and takes the mean difference of two fits over the
range of quality that both cover. Here quality is a loss in bits per byte, rate is real bytes, and the fit is the
monotone piecewise cubic of Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5, 1984), which JVET's tables use since
JVET-H0030 in the place of the cubic through four points: it passes every point and never overshoots between two.

K points of a curve, in rising order of loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from golf.config.knobs import UserError


class RateError(UserError):
    """Points that make no curve, or curves that share no loss."""


def end_slope(near_width: float, far_width: float, near_rise: float, far_rise: float) -> float:
    """Slope at an end of the points: that of the parabola through three of them, kept monotone."""
    slope = ((2 * near_width + far_width) * near_rise - near_width * far_rise) / (near_width + far_width)
    if slope * near_rise <= 0:
        return 0.0
    if near_rise * far_rise <= 0 and abs(slope) > 3 * abs(near_rise):
        return 3 * near_rise
    return slope


def monotone_slopes(x_K: np.ndarray, y_K: np.ndarray) -> np.ndarray:
    """float64 slopes at the points: weighted harmonic means of the neighbouring secants, 0 where those turn."""
    width, rise = np.diff(x_K), np.diff(y_K) / np.diff(x_K)
    if len(rise) == 1:
        return np.repeat(rise, 2)
    slopes_K = np.zeros(len(x_K))
    before, after = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    same = rise[:-1] * rise[1:] > 0
    weights = before[same] / rise[:-1][same] + after[same] / rise[1:][same]
    slopes_K[1:-1][same] = (before + after)[same] / weights
    slopes_K[0] = end_slope(width[0], width[1], rise[0], rise[1])
    slopes_K[-1] = end_slope(width[-1], width[-2], rise[-1], rise[-2])
    return slopes_K


class MonotoneCubic:
    """The piecewise cubic through points with rising x that is monotone wherever they are."""

    def __init__(self, x_K: Sequence[float], y_K: Sequence[float]):
        self.x_K, self.y_K = np.asarray(x_K, dtype=np.float64), np.asarray(y_K, dtype=np.float64)
        assert len(self.x_K) >= 2 and (np.diff(self.x_K) > 0).all(), "a curve needs two points with rising x"
        width, rise = np.diff(self.x_K), np.diff(self.y_K) / np.diff(self.x_K)
        slopes_K = monotone_slopes(self.x_K, self.y_K)
        square = (3 * rise - 2 * slopes_K[:-1] - slopes_K[1:]) / width
        cube = (slopes_K[:-1] + slopes_K[1:] - 2 * rise) / width**2
        self.powers = np.stack([self.y_K[:-1], slopes_K[:-1], square, cube])
        """Coefficients of each piece in powers of the distance from its left end."""
        pieces = sum(power * width**n / n for n, power in enumerate(self.powers, 1))
        self.area_K = np.concatenate([[0.0], np.cumsum(pieces)])

    def piece(self, x: float) -> tuple[int, float]:
        """(number of the piece that x is on, distance from its left end)."""
        assert self.x_K[0] <= x <= self.x_K[-1], f"{x} is outside of the curve"
        index = min(int(np.searchsorted(self.x_K, x, side="right")) - 1, len(self.x_K) - 2)
        return index, x - self.x_K[index]

    def __call__(self, x: float) -> float:
        index, distance = self.piece(x)
        return float(sum(power * distance**n for n, power in enumerate(self.powers[:, index])))

    def mean(self, low: float, high: float) -> float:
        """Mean over low .. high, by the exact integral."""
        areas = []
        for x in (low, high):
            index, distance = self.piece(x)
            part = sum(power * distance**n / n for n, power in enumerate(self.powers[:, index], 1))
            areas.append(self.area_K[index] + part)
        return float((areas[1] - areas[0]) / (high - low))


@dataclass(frozen=True)
class LossCurve:
    """log(bytes) of one method as a function of its loss; points that another one beats in both are left out."""

    name: str
    log_bytes: MonotoneCubic
    left_out: int

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest loss of the points."""
        return float(self.log_bytes.x_K[0]), float(self.log_bytes.x_K[-1])

    def bytes_at(self, loss: float) -> float | None:
        """Bytes that the method needs for a loss; None where its points don't reach it."""
        low, high = self.span
        return math.exp(self.log_bytes(loss)) if low <= loss <= high else None


def unbeaten_points(points: Sequence[tuple[float, float]], margin: float = 0.0) -> list[tuple[float, float]]:
    """Returns the (bytes, loss) points better than all smaller ones by more than `margin`, in rising order of bytes."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not kept or loss < kept[-1][1] - margin:
            kept.append((size, loss))
    return kept


def loss_curve(name: str, points: Sequence[tuple[float, float]]) -> LossCurve:
    """The curve through (bytes, loss) points. Raises RateError with fewer than two that count.

    Noise makes curves that turn: a point counts where every smaller one has a higher loss.
    """
    if not all(size > 0 and math.isfinite(loss) for size, loss in points):
        raise RateError(f"{name}: a point of its curve has no bytes, or a loss that is no finite number")
    kept = unbeaten_points(points)[::-1]
    if len(kept) < 2:
        raise RateError(f"{name}: a curve needs two points of which the larger has the lower loss: measure more rates")
    cubic = MonotoneCubic([loss for _, loss in kept], [math.log(size) for size, _ in kept])
    return LossCurve(name, cubic, len(points) - len(kept))


def shared_span(curve: LossCurve, anchor: LossCurve, most: float = math.inf) -> tuple[float, float]:
    """Losses up to `most` that both curves reach. Raises RateError where there are none."""
    low, high = max(curve.span[0], anchor.span[0]), min(curve.span[1], anchor.span[1], most)
    if low >= high:
        spans = [f"{each.name} reaches {each.span[0]:.5f} to {each.span[1]:.5f}" for each in (curve, anchor)]
        limit = "" if most == math.inf else f" up to {most:.5f}"
        raise RateError(f"the curves share no loss{limit}: {', '.join(spans)}: measure rates that overlap")
    return low, high


def bjontegaard_percent(curve: LossCurve, anchor: LossCurve, most: float = math.inf) -> float:
    """Percent of bytes that `curve` takes more (less, where negative) than `anchor`, in the mean over equal losses.

    100 (exp(mean of the difference of log(bytes)) - 1), over the losses up to `most` that both reach. Raises RateError.
    """
    low, high = shared_span(curve, anchor, most)
    return 100 * math.expm1(curve.log_bytes.mean(low, high) - anchor.log_bytes.mean(low, high))
