"""Compares val_bpb with real bytes for several methods, and how many bytes each saves at equal loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lab.rates.rate_difference import (
    LossCurve,
    RateError,
    bjontegaard_percent,
    loss_curve,
    shared_span,
    unbeaten_points,
)
from lab.rates.rate_points import RateMethod, RatePoint

ANCHORS = ("recipe", "frontier")
"""Methods that all others are compared with."""
MOST_EXCESS = 0.1
"""Bits per byte up to which losses count in a rate difference: a mean up to several would be one of useless models."""
STATED_EXCESSES = (0.005, 0.01, 0.02, 0.05)
"""Bits per byte above the unquantized weights, at which bytes are told."""
FINEST_EXCESS = 1e-3
"""Bits per byte above the unquantized weights from which on log(excess) is told from noise."""
FEWEST_RATES = 6
"""Points from which on a curve is said to be well measured."""


@dataclass(frozen=True)
class RateDifference:
    """One method against an anchor; None where the curves don't allow it, with the reason."""

    percent: float | None = None
    """Bjontegaard's, over equal losses; negative: fewer bytes."""
    span: tuple[float, float] | None = None
    """Excesses, in bits per byte, that both curves reach."""
    log_percent: float | None = None
    """The same with equal weight for equal ratios of excess, as decibels have it: the fine end counts as much."""
    log_span: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class StatedBytes:
    """Bytes of one method at a stated excess, and what they are less than the anchors'."""

    excess_bpb: float
    bytes: int | None
    """None: the curve does not reach the excess."""
    saved: Mapping[str, int | None]
    saved_percent: Mapping[str, float | None]


@dataclass(frozen=True)
class MethodCurve:
    """One method's points in rising order of bytes, and its comparisons."""

    name: str
    text: str
    codec: str
    points: list[RatePoint]
    excess_bpb: list[float]
    """val_bpb of each point less that of the unquantized weights."""
    left_out: int
    """Points that a smaller one beats: noise, or a dial that goes the wrong way."""
    against: Mapping[str, RateDifference]
    stated: list[StatedBytes]


@dataclass(frozen=True)
class CurveSet:
    """Holds all that a comparison found."""

    unquantized: RatePoint
    methods: list[MethodCurve]
    notes: list[str]


def parse_rates(text: str) -> tuple[float, ...]:
    """Returns the distinct rates in rising order from words with commas. Raises RateError."""
    try:
        rates = {float(word) for word in text.split(",")}
        if not all(map(math.isfinite, rates)):
            raise ValueError
    except ValueError:
        raise RateError(f"--rates {text!r}: give numbers with commas between them, such as 0.5,1,2") from None
    return tuple(sorted(rates))


def parse_methods(text: str, methods: Mapping[str, RateMethod]) -> list[RateMethod]:
    """Returns the methods that words with commas name; all of them for no words. Raises RateError."""
    names = list(dict.fromkeys(text.split(","))) if text else list(methods)
    for name in names:
        if name not in methods:
            raise RateError(f"unknown method {name!r}: choose among {', '.join(methods)}")
    return [methods[name] for name in names]


@dataclass(frozen=True)
class CurvePair:
    """A method's curve over the loss, and over log(excess): None where too few points have FINEST_EXCESS."""

    plain: LossCurve | None
    log: LossCurve | None
    reason: str = ""


def fit_curves(name: str, points: Sequence[RatePoint], base: float) -> CurvePair:
    """Returns both curves of a method; `base` is the unquantized val_bpb."""
    excesses = [(point.bytes, point.val_bpb - base) for point in points]
    try:
        plain = loss_curve(name, excesses)
    except RateError as error:
        return CurvePair(None, None, str(error))
    fine = [(size, math.log(excess)) for size, excess in unbeaten_points(excesses) if excess >= FINEST_EXCESS]
    return CurvePair(plain, loss_curve(name, fine) if len(fine) > 1 else None)


def rate_difference(curve: CurvePair, anchor: CurvePair, most: float) -> RateDifference:
    """Returns what `curve` takes more than `anchor`, over excesses up to `most`."""
    if curve.plain is None or anchor.plain is None:
        return RateDifference(reason=curve.reason or anchor.reason)
    try:
        plain = bjontegaard_percent(curve.plain, anchor.plain, most), shared_span(curve.plain, anchor.plain, most)
    except RateError as error:
        return RateDifference(reason=str(error))
    if curve.log is None or anchor.log is None:
        return RateDifference(*plain, reason=f"fewer than two points have an excess of {FINEST_EXCESS:g} or more")
    try:
        low, high = shared_span(curve.log, anchor.log, math.log(most))
    except RateError:  # they meet below the finest excess only
        return RateDifference(*plain, reason=f"the curves share no excess above {FINEST_EXCESS:g}")
    log_percent = bjontegaard_percent(curve.log, anchor.log, math.log(most))
    return RateDifference(*plain, log_percent, (math.exp(low), math.exp(high)))


def stated_bytes(curve: CurvePair, anchors: Mapping[str, CurvePair], excess: float) -> StatedBytes:
    """Returns the bytes at an excess, interpolated over log(excess), where the curve is nearly straight."""
    sizes = {name: pair.log and pair.log.bytes_at(math.log(excess)) for name, pair in anchors.items()}
    own = curve.log and curve.log.bytes_at(math.log(excess))
    saved = {name: round(size - own) if size and own else None for name, size in sizes.items()}
    percent = {name: 100 * (1 - own / size) if size and own else None for name, size in sizes.items()}
    return StatedBytes(excess, own and round(own), saved, percent)


def build_curves(
    methods: Sequence[RateMethod], points: Sequence[RatePoint], unquantized: RatePoint, most: float = MOST_EXCESS
) -> CurveSet:
    """Returns curves and comparisons of the methods; `most` is the largest excess that counts in a difference."""
    base = unquantized.val_bpb
    ordered = sorted(points, key=lambda point: (point.bytes, point.rate))
    own = {method.name: [point for point in ordered if point.method == method.name] for method in methods}
    curves = {name: fit_curves(name, found, base) for name, found in own.items()}
    anchors = {name: curves[name] for name in ANCHORS if name in curves}
    found = []
    for method in methods:
        curve, excesses = curves[method.name], [point.val_bpb - base for point in own[method.name]]
        against = {name: rate_difference(curve, anchor, most) for name, anchor in anchors.items()}
        stated = [stated_bytes(curve, anchors, excess) for excess in STATED_EXCESSES]
        left_out = curve.plain.left_out if curve.plain else 0
        described = method.name, method.text, method.codec
        found.append(MethodCurve(*described, own[method.name], excesses, left_out, against, stated))
    return CurveSet(unquantized, found, list(curve_notes(found, curves, most)))


def curve_notes(found: Sequence[MethodCurve], curves: Mapping[str, CurvePair], most: float) -> Iterator[str]:
    """Yields what the tables leave unsaid."""
    yield "the excess is val_bpb less that of the unquantized weights, on the same tokens in the same windows"
    yield f"rate differences are over excesses up to {most:g} bits per byte, where both curves reach them"
    for name in ANCHORS:
        if name not in curves:
            yield f"{name} was not measured, so nothing is compared with it"
    for curve in found:
        if len(curve.points) < FEWEST_RATES:
            yield f"{curve.name} has {len(curve.points)} points: a curve wants {FEWEST_RATES}"
        if curve.left_out:
            yield f"{curve.name}: {curve.left_out} points are beaten by a smaller one, and not part of its curve"
        below = sum(excess <= 0 for excess in curve.excess_bpb)
        if below:
            yield f"{curve.name}: {below} points are no worse than the unquantized weights"
        for reason in sorted({d.reason for name, d in curve.against.items() if d.reason and name != curve.name}):
            yield f"{curve.name}: {reason}"
