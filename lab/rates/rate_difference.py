"""Measures how much fewer bytes one method needs than another at equal loss: Bjontegaard's rate difference.

Bjontegaard (VCEG-M33, 2001) fits log(rate) as a function of quality, and takes the mean difference of two fits over the
range of quality that both cover. Here quality is a loss in bits per byte, rate is real bytes, and the fit is the
monotone piecewise cubic of Fritsch and Butland (SIAM J. Sci. Stat. Comput. 5, 1984), which JVET's tables use since
JVET-H0030 in the place of the cubic through four points: it passes every point and never overshoots between two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.interpolate import PchipInterpolator

from golf.config.knobs import UserError


class RateError(UserError):
    """Points that make no curve, or curves that share no loss."""


@dataclass(frozen=True)
class LossCurve:
    """log(bytes) of one method as a function of its loss; points that another one beats in both are left out."""

    name: str
    log_bytes: PchipInterpolator
    left_out: int

    @property
    def span(self) -> tuple[float, float]:
        """Returns the lowest and highest loss of the points."""
        return float(self.log_bytes.x[0]), float(self.log_bytes.x[-1])

    def bytes_at(self, loss: float) -> float | None:
        """Returns the bytes that the method needs for a loss; None where its points don't reach it."""
        low, high = self.span
        return math.exp(self.log_bytes(loss)) if low <= loss <= high else None

    def mean_log_bytes(self, low: float, high: float) -> float:
        """Returns the mean over losses from low to high, by the exact integral."""
        return float(self.log_bytes.integrate(low, high)) / (high - low)


def unbeaten_points(points: Sequence[tuple[float, float]], margin: float = 0.0) -> list[tuple[float, float]]:
    """Returns the (bytes, loss) points better than all smaller ones by more than `margin`, in rising order of bytes."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not kept or loss < kept[-1][1] - margin:
            kept.append((size, loss))
    return kept


def loss_curve(name: str, points: Sequence[tuple[float, float]]) -> LossCurve:
    """Returns the curve through (bytes, loss) points. Raises RateError with fewer than two that count.

    Noise makes curves that turn: a point counts where every smaller one has a higher loss.
    """
    if not all(size > 0 and math.isfinite(loss) for size, loss in points):
        raise RateError(f"{name}: a point of its curve has no bytes, or a loss that is no finite number")
    kept = unbeaten_points(points)[::-1]
    if len(kept) < 2:
        raise RateError(f"{name}: a curve needs two points of which the larger has the lower loss: measure more rates")
    curve = PchipInterpolator([loss for _, loss in kept], [math.log(size) for size, _ in kept])
    return LossCurve(name, curve, len(points) - len(kept))


def shared_span(curve: LossCurve, anchor: LossCurve, most: float = math.inf) -> tuple[float, float]:
    """Returns the ends of the losses up to `most` that both curves reach. Raises RateError where there are none."""
    low, high = max(curve.span[0], anchor.span[0]), min(curve.span[1], anchor.span[1], most)
    if low >= high:
        spans = [f"{each.name} reaches {each.span[0]:.5f} to {each.span[1]:.5f}" for each in (curve, anchor)]
        limit = "" if most == math.inf else f" up to {most:.5f}"
        raise RateError(f"the curves share no loss{limit}: {', '.join(spans)}: measure rates that overlap")
    return low, high


def bjontegaard_percent(curve: LossCurve, anchor: LossCurve, most: float = math.inf) -> float:
    """Returns the percent of bytes that `curve` takes more (or less) than `anchor`, in the mean over equal losses.

    100 (exp(mean of the difference of log(bytes)) - 1), over the losses up to `most` that both reach. Raises RateError.
    """
    low, high = shared_span(curve, anchor, most)
    return 100 * math.expm1(curve.mean_log_bytes(low, high) - anchor.mean_log_bytes(low, high))
