"""The picture of rate curves: loss against bytes, and bytes against an anchor's at equal loss."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from golf.runtime import replacing
from lab.rates.rate_curve import ANCHORS, FINEST_EXCESS, CurvePair, CurveSet, MethodCurve, fit_curves

LINE_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#b7791f", "#0987a0", "#4a5568")
LINE_MARKERS = "osD^vPX*"
WIDTH_IN_LETTERS = 170
"""Of a legend in one row."""
GRID_COLOUR = "#e2e8f0"


def draw_rate_curves(curves: CurveSet, title: str, path: Path) -> None:
    """Write the picture to `path`, a .png."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    draw_losses(left, curves)
    draw_relative_bytes(right, curves)
    handles, labels = left.get_legend_handles_labels()
    columns = max(1, min(4, len(labels), WIDTH_IN_LETTERS // max(map(len, labels), default=1)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    save_picture(figure, path)


def save_picture(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def line_style(index: int) -> dict[str, object]:
    colour, marker = (options[index % len(options)] for options in (LINE_COLOURS, LINE_MARKERS))
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}


def tidy_axes(axes: Axes) -> None:
    axes.grid(True, which="major", color=GRID_COLOUR)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_losses(axes: Axes, curves: CurveSet) -> None:
    """Every point, and straight lines between them."""
    for index, curve in enumerate(curves.methods):
        sizes = [point.bytes for point in curve.points]
        axes.plot(sizes, curve.excess_bpb, label=curve_label(curve), **line_style(index))
    sizes = [point.bytes for curve in curves.methods for point in curve.points]
    if max(sizes) > 1.5 * min(sizes):
        axes.set_xscale("log")
        ticks = round_ticks(min(sizes), max(sizes))
        axes.set_xticks(ticks, minor=False)
        axes.set_xticks([], minor=True)
    scale_excess(axes, [excess for curve in curves.methods for excess in curve.excess_bpb])
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    axes.set_xlabel("bytes of the artifact")
    axes.set_ylabel("val_bpb above the unquantized weights")
    axes.set_title(f"loss against bytes (unquantized: {curves.unquantized.val_bpb:.4f} bpb)", loc="left", fontsize=10)
    tidy_axes(axes)


def scale_excess(axes: Axes, excesses: Sequence[float]) -> None:
    """Logarithmic; linear around zero where a point is no worse than the unquantized weights."""
    if min(excesses) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=FINEST_EXCESS)
        axes.axhline(0, color="#718096", linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def curve_label(curve: MethodCurve) -> str:
    """Name and rate differences."""
    told = [
        f"{difference.percent:+.1f} % against {name}"
        for name, difference in curve.against.items()
        if name != curve.name and difference.percent is not None
    ]
    return f"{curve.name} ({', '.join(told)})" if told else curve.name


def draw_relative_bytes(axes: Axes, curves: CurveSet) -> None:
    """Percent of bytes more than the anchor's at equal excess; the anchor is the last of ANCHORS that was measured."""
    base = curves.unquantized.val_bpb
    pairs = {curve.name: fit_curves(curve.name, curve.points, base) for curve in curves.methods}
    anchor_name = next((name for name in reversed(ANCHORS) if name in pairs and pairs[name].log), None)
    tidy_axes(axes)
    axes.set_xlabel("val_bpb above the unquantized weights")
    if anchor_name is None:
        axes.set_title("no anchor was measured", loc="left", fontsize=10)
        return
    for index, name in enumerate(pairs):
        draw_difference(axes, pairs[name], pairs[anchor_name], line_style(index))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0"))
    axes.set_title(f"bytes against those of {anchor_name}, at equal loss", loc="left", fontsize=10)


def draw_difference(axes: Axes, curve: CurvePair, anchor: CurvePair, style: dict[str, object]) -> None:
    """A line over the excesses that both reach, with a marker at each point of the method's own."""
    if curve.log is None:
        return
    low, high = max(curve.log.span[0], anchor.log.span[0]), min(curve.log.span[1], anchor.log.span[1])
    if low >= high:
        return
    own = [x for x in curve.log.log_bytes.x_K if low <= x <= high]
    for places, line in ((np.linspace(low, high, 200), {"marker": ""}), (own, {"linestyle": ""})):
        excesses = [math.exp(place) for place in places]
        ratios = [bytes_at_excess_inside(curve, place) / bytes_at_excess_inside(anchor, place) for place in places]
        axes.plot(excesses, [100 * (ratio - 1) for ratio in ratios], **(style | line))


def bytes_at_excess_inside(curve: CurvePair, log_excess: float) -> float:
    """bytes_at_excess, for an excess that is known to be on the curve but for rounding."""
    low, high = curve.log.span
    return curve.log.bytes_at(min(max(log_excess, low), high))


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high: the finest of three sets of factors that gives no more than eight."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 3)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if 0.95 * low <= tick <= 1.05 * high]
        if len(ticks) <= 8:
            break
    return ticks


def shown_bytes(value: float, _: object) -> str:
    """12.5 MB, 350 kB."""
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"
