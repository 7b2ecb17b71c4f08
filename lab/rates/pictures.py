"""Draws the pictures of rate curves and of quantized forms: loss against bytes, and what each costs against another."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from golf.runtime import replacing
from lab.rates.quant_comparison import QuantComparison
from lab.rates.rate_curve import ANCHORS, FINEST_EXCESS, CurvePair, CurveSet, MethodCurve, fit_curves

LINE_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#b7791f", "#0987a0", "#4a5568")
LINE_MARKERS = "osD^vPX*"
WIDTH_IN_LETTERS = 170
"""Of a legend in one row."""
GRID_COLOUR = "#e2e8f0"
FAMILY_COLOURS = {"gptq": "#2b6cb0", "rtn": "#dd6b20"}
OTHER_COLOUR, UNRESOLVED_COLOUR = "#4a5568", "#a0aec0"


def draw_rate_curves(curves: CurveSet, title: str, path: Path) -> None:
    """Writes the picture to `path`, a .png."""
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
    """Draws every point, and straight lines between them."""
    for index, curve in enumerate(curves.methods):
        sizes = [point.bytes for point in curve.points]
        axes.plot(sizes, curve.excess_bpb, label=curve_label(curve), **line_style(index))
    sizes = [point.bytes for curve in curves.methods for point in curve.points]
    if max(sizes) > 1.5 * min(sizes):
        scale_bytes(axes, min(sizes), max(sizes))
    scale_excess(axes, [excess for curve in curves.methods for excess in curve.excess_bpb])
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    axes.set_xlabel("bytes of the artifact")
    axes.set_ylabel("val_bpb above the unquantized weights")
    axes.set_title(f"loss against bytes (unquantized: {curves.unquantized.val_bpb:.4f} bpb)", loc="left", fontsize=10)
    tidy_axes(axes)


def scale_excess(axes: Axes, excesses: Sequence[float]) -> None:
    """Makes the axis logarithmic; linear around zero where a point is no worse than the unquantized weights."""
    if min(excesses) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=FINEST_EXCESS)
        axes.axhline(0, color="#718096", linewidth=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def curve_label(curve: MethodCurve) -> str:
    """Returns the name and rate differences."""
    told = [
        f"{difference.percent:+.1f} % against {name}"
        for name, difference in curve.against.items()
        if name != curve.name and difference.percent is not None
    ]
    return f"{curve.name} ({', '.join(told)})" if told else curve.name


def draw_relative_bytes(axes: Axes, curves: CurveSet) -> None:
    """Draws the percent of bytes above the anchor's at equal excess; the anchor is the last of ANCHORS measured."""
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
    """Draws a line over the excesses that both reach, with a marker at each point of the method's own."""
    if curve.log is None:
        return
    low, high = max(curve.log.span[0], anchor.log.span[0]), min(curve.log.span[1], anchor.log.span[1])
    if low >= high:
        return
    own = [x for x in curve.log.log_bytes.x if low <= x <= high]
    for places, line in ((np.linspace(low, high, 200), {"marker": ""}), (own, {"linestyle": ""})):
        excesses = [math.exp(place) for place in places]
        ratios = [curve.log.bytes_at(place) / anchor.log.bytes_at(place) for place in places]
        axes.plot(excesses, [100 * (ratio - 1) for ratio in ratios], **(style | line))


def round_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between low and high: the finest of three sets of factors that gives no more than eight."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 3)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if 0.95 * low <= tick <= 1.05 * high]
        if len(ticks) <= 8:
            break
    return ticks


def scale_bytes(axes: Axes, low: float, high: float) -> None:
    """Makes the axis of bytes logarithmic, with round ticks between low and high."""
    axes.set_xscale("log")
    axes.set_xticks(round_ticks(low, high), minor=False)
    axes.set_xticks([], minor=True)


def shown_bytes(value: float, _: object) -> str:
    """Writes 12.5 MB, 350 kB."""
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"


def draw_variants(found: QuantComparison, run: str, path: Path) -> None:
    """Writes the picture to `path`, a .png: differences with intervals, and loss against bytes."""
    figure = Figure(figsize=(12.5, max(3.8, 1.8 + 0.34 * len(found.results))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    figure.suptitle(f"{run}: {found.tokens:,} tokens, the same for every form", x=0.01, ha="left", fontsize=12)
    draw_differences(left, found)
    draw_sizes(right, found)
    save_picture(figure, path)


def family_colour(name: str) -> str:
    return next((colour for family, colour in FAMILY_COLOURS.items() if name.startswith(family)), OTHER_COLOUR)


def draw_differences(axes: Axes, found: QuantComparison) -> None:
    """Draws one row a form: the difference to fp32 and its interval, grey where it is not resolved."""
    compared = [result for result in found.results if result.difference]
    for row, result in enumerate(compared):
        interval = result.difference
        colour = family_colour(result.name) if interval.resolved else UNRESOLVED_COLOUR
        axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([interval.difference], [row], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(compared)), [result.name for result in compared])
    axes.invert_yaxis()
    axes.axvline(0, color="#718096", linewidth=1)
    linear = linear_range(result.difference.difference for result in compared if result.difference.resolved)
    axes.set_xscale("symlog", linthresh=linear)
    ends = [end for result in compared for end in (result.difference.low, result.difference.high)]
    axes.set_xlim(*roomy_limits(ends, linear))
    axes.xaxis.set_major_formatter(FuncFormatter(shown_power))
    axes.set_xlabel(f"nats per {found.token_unit} above fp32")
    confidence = f"{100 * (1 - found.alpha):g} %"
    axes.set_title(f"difference to fp32, {confidence} interval; grey: not resolved", loc="left", fontsize=10)
    tidy_axes(axes)


def linear_range(differences: Iterable[float]) -> float:
    """Returns where an axis turns logarithmic: the power of ten at or below the smallest of these."""
    return 10.0 ** math.floor(math.log10(max(1e-6, min(map(abs, differences), default=1e-3))))


def roomy_limits(values: list[float], linear: float) -> tuple[float, float]:
    """Returns the ends of an axis that is linear up to `linear` on both sides of 0, with room around all values."""
    return min(-linear, 2 * min(values, default=0.0)), max(linear, 2 * max(values, default=0.0))


def shown_power(value: float, _: object) -> str:
    """Writes 0, 0.1, 1e-3."""
    return f"{value:g}" if value == 0 or abs(value) >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def draw_sizes(axes: Axes, found: QuantComparison) -> None:
    """Draws bits per byte of text above fp32's against bytes of the artifact."""
    resolved = [result.bpb_difference for result in found.results if result.difference and result.difference.resolved]
    for result in found.results:
        colour = family_colour(result.name)
        axes.plot([result.bytes], [result.bpb_difference], "o", color=colour, markersize=6)
        above = not result.name.startswith("gptq")  # rtn and gptq of equal bits lie close together
        place = {"xytext": (5, 5), "ha": "left"} if above else {"xytext": (-5, -11), "ha": "right"}
        axes.annotate(
            result.name, (result.bytes, result.bpb_difference), textcoords="offset points", color=colour, fontsize=8,
            **place,
        )  # fmt: skip
    sizes = [result.bytes for result in found.results]
    scale_bytes(axes, min(sizes), max(sizes))
    axes.set_xlim(0.75 * min(sizes), 1.5 * max(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    axes.set_xlabel("bytes, without optimizer state")
    axes.set_yscale("symlog", linthresh=linear_range(resolved))
    axes.set_ylim(*roomy_limits([result.bpb_difference for result in found.results], linear_range(resolved)))
    axes.yaxis.set_major_formatter(FuncFormatter(shown_power))
    axes.set_ylabel("bits per byte above fp32")
    axes.set_title(f"loss against bytes (fp32: {found.results[0].bpb:.4f} bits per byte)", loc="left", fontsize=10)
    tidy_axes(axes)
