"""The picture of a comparison of quantized forms: what each loses against fp32, and the bytes that it takes."""

import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lab.rates.quant_comparison import QuantComparison
from lab.rates.rate_picture import round_ticks, save_picture, shown_bytes, tidy_axes

FAMILY_COLOURS = {"gptq": "#2b6cb0", "rtn": "#dd6b20"}
OTHER_COLOUR, UNRESOLVED_COLOUR = "#4a5568", "#a0aec0"


def draw_variants(found: QuantComparison, run: str, path: Path) -> None:
    """Write the picture to `path`, a .png: differences with intervals, and loss against bytes."""
    figure = Figure(figsize=(12.5, max(3.8, 1.8 + 0.34 * len(found.results))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    figure.suptitle(f"{run}: {found.tokens:,} tokens, the same for every form", x=0.01, ha="left", fontsize=12)
    draw_differences(left, found)
    draw_sizes(right, found)
    save_picture(figure, path)


def family_colour(name: str) -> str:
    return next((colour for family, colour in FAMILY_COLOURS.items() if name.startswith(family)), OTHER_COLOUR)


def draw_differences(axes: Axes, found: QuantComparison) -> None:
    """One row a form: the difference to fp32 and its interval, grey where it is not resolved."""
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
    """Where an axis turns logarithmic: the power of ten at or below the smallest of these."""
    return 10.0 ** math.floor(math.log10(max(1e-6, min(map(abs, differences), default=1e-3))))


def roomy_limits(values: list[float], linear: float) -> tuple[float, float]:
    """Ends of an axis that is linear up to `linear` on both sides of 0, with room around all values."""
    return min(-linear, 2 * min(values, default=0.0)), max(linear, 2 * max(values, default=0.0))


def shown_power(value: float, _: object) -> str:
    """0, 0.1, 1e-3."""
    return f"{value:g}" if value == 0 or abs(value) >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def draw_sizes(axes: Axes, found: QuantComparison) -> None:
    """Bits per byte of text above fp32's against bytes of the artifact."""
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
    axes.set_xscale("log")
    axes.set_xlim(0.75 * min(sizes), 1.5 * max(sizes))
    axes.set_xticks(round_ticks(min(sizes), max(sizes)), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    axes.set_xlabel("bytes, without optimizer state")
    axes.set_yscale("symlog", linthresh=linear_range(resolved))
    axes.set_ylim(*roomy_limits([result.bpb_difference for result in found.results], linear_range(resolved)))
    axes.yaxis.set_major_formatter(FuncFormatter(shown_power))
    axes.set_ylabel("bits per byte above fp32")
    axes.set_title(f"loss against bytes (fp32: {found.results[0].bpb:.4f} bits per byte)", loc="left", fontsize=10)
    tidy_axes(axes)
