"""Draws the pictures of a study from what its runs measured: a picture is drawn only where there is data for it.

M matrices, S steps at which codes were recorded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lab.rates.pictures import LINE_COLOURS, line_style, round_ticks, save_picture, shown_bytes, shown_power, tidy_axes
from lab.rates.quant_comparison import parse_variant
from lab.rates.rate_difference import unbeaten_points
from lab.study.measures import site_of_weight
from lab.study.table import RowDifference, Study, StudyRow, band, differences, mean_interval, row_difference

MOST_LINES, MOST_CODE_PICTURES = 16, 6
LINE_STYLES = ("-", "--")
QUIET, LOUD, BASE = "#a0aec0", "#2b6cb0", "#1a202c"
KIND_COLOURS = {"full precision": BASE, "trained on a grid": "#2b6cb0", "RTN": "#dd6b20", "GPTQ": "#2f855a"}
CODE_SIGNS = (("below 0", -1, "#2b6cb0"), ("0", 0, "#e2e8f0"), ("above 0", 1, "#dd6b20"))
SITE_ORDER = ("q", "k", "v", "o", "up", "down", "embed", "head", None)


@dataclass(frozen=True)
class Picture:
    """A picture in a file, and what it shows."""

    path: Path
    caption: str


# ---- rows and axes ----


def short_name(row: StudyRow, group: str = "") -> str:
    """Returns the name of a row in a group, or its first."""
    names = dict(zip(row.groups[::-1], row.names[::-1], strict=True))
    return names.get(group, row.names[0])


def rows_of_group(study: Study, group: str) -> list[StudyRow]:
    """Returns the group's rows that have a result, after the baseline."""
    rows = [row for row in study.rows if group in row.groups and row is not study.baseline and row.values("val_loss")]
    return [study.baseline, *rows] if study.baseline.values("val_loss") else rows


def finish_axes(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    axes.set_xlabel(x_label)
    if y_label:
        axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=10)
    tidy_axes(axes)


def wide_figure(height: float = 5.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.5, height), layout="constrained")
    return figure, figure.subplots()


def name_rows(axes: Axes, rows: Sequence[StudyRow], group: str = "") -> None:
    """Labels the places 0, 1, ... of the vertical axis, the first on top, by the rows' names."""
    axes.set_yticks(range(len(rows)), [short_name(row, group) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)


# ---- lines over steps ----

StepCurves = list[Mapping[int, float]]


def draw_bands(
    study: Study, group: str, curves: Sequence[tuple[StudyRow, StepCurves]], title: str, y_label: str
) -> tuple[Figure, Axes]:
    """Draws the mean over seeds of each row's curves, and the band from the least to the most."""
    figure, axes = wide_figure()
    others = 0
    for row, own in curves:
        style: dict[str, Any] = {"color": BASE, "linewidth": 2.2}
        if row is not study.baseline:
            turn, place = divmod(others, len(LINE_COLOURS))
            style = {"color": LINE_COLOURS[place], "linestyle": LINE_STYLES[turn % len(LINE_STYLES)]}
            others += 1
        curve = band(own)
        axes.plot(curve.steps, curve.mean, label=short_name(row, group), **style)
        if len(own) > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    finish_axes(axes, f"group {group}: {title}; band: all seeds", "step", y_label)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure, axes


def draw_losses_by_step(study: Study, group: str) -> Figure | None:
    """Draws the validation loss at every look."""
    curves = [(row, row.val_curves) for row in rows_of_group(study, group) if row.val_curves]
    if not 2 <= len(curves) <= MOST_LINES:
        return None
    title, y_label = "loss on the same validation tokens", "validation loss, nats per token"
    figure, axes = draw_bands(study, group, curves, title, y_label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    tidy_axes(axes)
    return figure


def draw_gaps_by_step(study: Study, group: str) -> Figure | None:
    """Draws the loss less the baseline's at the same step of the same seed."""
    curves = []
    for row in rows_of_group(study, group):
        pairs = [(own.val, other.val) for own, other in zip(row.curves, study.baseline.curves, strict=True)]
        pairs = [pair for pair in pairs if all(pair)]
        if pairs and row is not study.baseline:
            curves.append((row, differences(*zip(*pairs, strict=True))))
    if not 1 <= len(curves) <= MOST_LINES:
        return None
    title, y_label = "gap to the baseline, paired by seed", "loss less the baseline's, nats per token"
    figure, axes = draw_bands(study, group, curves, title, y_label)
    axes.axhline(0, color=BASE, linewidth=1)
    return figure


# ---- final figures ----


def draw_final_losses(study: Study, group: str) -> Figure | None:
    """Draws the final loss of every row with its interval, and its difference to the baseline."""
    rows = rows_of_group(study, group)
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(11, 1.5 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    found = [row_difference(row, study.baseline) for row in rows]
    losses, intervals = [row.mean("val_loss") for row in rows], [mean_interval(row.values("val_loss")) for row in rows]
    for place, (loss, (low, high), difference) in enumerate(zip(losses, intervals, found, strict=True)):
        colour = {"reference": BASE, "worse": LOUD, "better": LOUD}.get(difference.verdict, QUIET)
        left.plot(loss, place, "o", color=colour, markersize=5)
        if low is not None:
            left.plot([low, high], [place, place], color=colour, linewidth=1.6)
        if difference.mean is not None:
            right.barh(place, difference.mean, color=colour, height=0.6)
        if difference.low is not None:
            right.plot([difference.low, difference.high], [place, place], color=BASE, linewidth=1.3)
    name_rows(left, rows, group)
    right.axvline(0, color=BASE, linewidth=1)
    keep_readable(left, losses, intervals)
    keep_readable(right, [one.mean or 0.0 for one in found], [(one.low, one.high) for one in found])
    finish_axes(left, f"group {group}: final loss, 95 % interval over seeds", "nats per token")
    finish_axes(right, "less the baseline's, paired; grey: not resolved", "nats per token")
    return figure


def keep_readable(axes: Axes, values: Sequence[float], intervals: Iterable[tuple[float | None, float | None]]) -> None:
    """Cuts intervals that reach far beyond all values off at the edge: those of a few seeds may be very wide."""
    ends = [end for interval in intervals for end in interval if end is not None]
    low, high = min(values), max(values)
    room = (high - low) or 0.05
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
    axes.set_xlim(low - 0.05 * room, high + 0.05 * room)


def kind_of(row: StudyRow) -> str:
    if row.method:
        return "GPTQ" if row.method.startswith("gptq") else "RTN"
    return "trained on a grid" if (row.mean("covered") or 0) > 0 else "full precision"


def draw_pareto(study: Study) -> Figure | None:
    """Draws the final loss against the bytes of the whole artifact, trained and rounded rows together."""
    rows = [row for row in study.rows if row.values("val_loss")]
    points = sorted([(row.mean("bytes_model"), row.mean("val_loss"), row) for row in rows], key=lambda one: one[:2])
    if len({size for size, _, _ in points}) < 2:
        return None
    figure, axes = wide_figure(5.8)
    for kind, colour in KIND_COLOURS.items():
        own = [(size, loss) for size, loss, row in points if kind_of(row) == kind]
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=colour, markersize=5, label=kind)
    losses, named = [loss for _, loss, _ in points], {(size, loss): row for size, loss, row in reversed(points)}
    front = unbeaten_points(list(named), margin=0.01 * (max(losses) - min(losses)))
    axes.step(*zip(*front, strict=True), where="post", color=QUIET, linewidth=1)
    for number, point in enumerate(front, start=1):
        axes.annotate(str(number), point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    low, high = 0.9 * points[0][0], 1.5 * points[-1][0]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(round_ticks(low, high), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    x_label, y_label = "bytes of the whole artifact, without optimizer state", "validation loss, nats per token"
    finish_axes(axes, "loss against bytes; line: nothing smaller is better", x_label, y_label)
    axes.legend(frameon=False, fontsize=8)
    labels = [f"{number} {short_name(named[point])}" for number, point in enumerate(front, start=1)]
    handles = [Line2D([], [], linestyle="", label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8, handlelength=0)
    return figure


def draw_step_times(study: Study) -> Figure | None:
    """Draws the median time of a training step, and the range from the 10th to the 90th percentile."""
    rows = [row for row in study.rows if row.values("step_ms")]
    if len(rows) < 2:
        return None
    figure, axes = wide_figure(1.5 + 0.27 * len(rows))
    for place, row in enumerate(rows):
        colour = BASE if row is study.baseline else LOUD
        axes.barh(place, row.mean("step_ms"), color=colour, height=0.6)
        axes.plot([row.mean("step_ms_p10"), row.mean("step_ms_p90")], [place, place], color=QUIET, linewidth=1.6)
    name_rows(axes, rows)
    device = f"{study.environment['device']}, {study.environment['threads']} thread(s)"
    title = f"step time, median and p10 to p90, mean over seeds: {device}"
    finish_axes(axes, title, "ms per training step, fake quantization included")
    return figure


# ---- codes ----


def rounding_lines(study: Study) -> dict[str, list[tuple[int, RowDifference]]]:
    """Returns (bits, difference to the weights that were rounded) by way to round, where it has several bits."""
    lines: dict[str, set[tuple[int, RowDifference]]] = {}
    for row in study.rows:
        if not row.method or study.plan.baseline != row.source:
            continue
        variant, found = parse_variant(row.method, keeps_embedding=True), row_difference(row, study.baseline)
        if variant.spec is None or found.mean is None or " sequences" in row.names[0]:
            continue
        kind = row.method.replace(str(variant.spec.bits), "", 1)
        order = ", natural order" if row.names[0].endswith("natural order") else ""
        lines.setdefault(kind + order, set()).add((variant.spec.bits, found))
    several = {name: points for name, points in sorted(lines.items()) if len({bits for bits, _ in points}) > 1}
    return {name: sorted(points, key=lambda point: (point[0], point[1].mean)) for name, points in several.items()}


def draw_rounding_by_bits(study: Study) -> Figure | None:
    """Draws the difference to the weights that were rounded, by bits, a line for each way to round."""
    lines = rounding_lines(study)
    if not lines:
        return None
    figure, axes = wide_figure()
    for number, (name, points) in enumerate(lines.items()):
        style = line_style(number)
        axes.plot([bits for bits, _ in points], [found.mean for _, found in points], label=name, **style)
        for bits, found in points:
            if found.low is not None:
                axes.plot([bits, bits], [found.low, found.high], color=style["color"], linewidth=1)
    axes.axhline(0, color=BASE, linewidth=1)
    means = [found.mean for points in lines.values() for _, found in points]
    linear = max(1e-4, max(map(abs, means)) / 300)
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_ylim(min(-linear, 2 * min(means)), max(linear, 2 * max(means)))
    axes.yaxis.set_major_formatter(FuncFormatter(shown_power))
    axes.set_xticks(sorted({bits for points in lines.values() for bits, _ in points}))
    y_label = "nats per token above the unrounded weights"
    finish_axes(axes, "rounded after training", "bits of a weight of the blocks (2: ternary)", y_label)
    axes.legend(frameon=False, fontsize=8)
    return figure


def matrix_place(name: str) -> tuple[int, int, str]:
    """Returns (layer, number of the site, label) of a matrix; those outside of the layers are of layer -1."""
    layer, site = next((int(part) for part in name.split(".") if part.isdigit()), -1), site_of_weight(name)
    return layer, SITE_ORDER.index(site), f"{layer if layer >= 0 else ''} {site or name}".strip()


def draw_codes(row: StudyRow) -> Figure | None:
    """Draws flips of each matrix between two looks, and shares of its codes at each look, for the first seed."""
    codes = next((curve.codes for curve in row.curves if curve.codes), ())
    names = sorted({entry["matrix"] for entry in codes}, key=matrix_place)
    steps = sorted({entry["step"] for entry in codes})
    if len(steps) < 2:
        return None
    flips_MS, zeros_MS = np.full((2, len(names), len(steps)), np.nan)
    for entry in codes:
        place = names.index(entry["matrix"]), steps.index(entry["step"])
        flips_MS[place] = entry.get("flips", np.nan)
        zeros_MS[place] = entry["shares"].get("0", 0.0)
    figure = Figure(figsize=(12.5, 1.9 + 0.19 * len(names)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.8))
    draw_heat(figure, left, flips_MS[:, 1:], steps[1:], "share of codes that changed since the look before")
    draw_heat(figure, middle, zeros_MS, steps, "share of zeros")
    draw_histograms(right, codes, names, steps[-1])
    left.set_yticks(range(len(names)), [matrix_place(name)[2] for name in names], fontsize=7)
    title = f"{short_name(row)}: codes of each matrix (layer, site), first seed"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def draw_heat(figure: Figure, axes: Axes, values_MS: np.ndarray, steps: Sequence[int], title: str) -> None:
    image = axes.imshow(values_MS, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, pad=0.01)
    shown = range(0, len(steps), max(1, -(-len(steps) // 8)))
    axes.set_xticks(list(shown), [str(steps[place]) for place in shown], fontsize=8)
    axes.set_xlabel("step")
    axes.set_title(title, loc="left", fontsize=9)


def draw_histograms(axes: Axes, codes: Sequence, names: Sequence[str], step: int) -> None:
    """Draws codes below 0, 0 and above 0 at the last look; of fine grids only zeros are known."""
    shares = {entry["matrix"]: entry["shares"] for entry in codes if entry["step"] == step}
    left_M = np.zeros(len(names))
    for label, sign, colour in CODE_SIGNS:
        parts = [sum(v for c, v in shares[name].items() if np.sign(int(c)) == sign) for name in names]
        axes.barh(range(len(names)), parts, left=left_M, color=colour, height=0.8, label=label)
        left_M += parts
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of codes")
    axes.set_title(f"codes at step {step}", loc="left", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=7)


# ---- all of them ----

BY_GROUP: dict[str, tuple[Callable[[Study, str], Figure | None], str]] = {
    "loss": (draw_losses_by_step, "validation loss by step"),
    "gap": (draw_gaps_by_step, "gap to the baseline by step"),
    "final": (draw_final_losses, "final losses and differences"),
}
"""File name -> how it is drawn for a group, and what it shows."""


def draw_study(study: Study, folder: Path) -> list[Picture]:
    """Draws all pictures that the study has data for as .png in `folder`, and removes those of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    coded = [row for row in study.rows if any(curve.codes for curve in row.curves)][:MOST_CODE_PICTURES]
    figures = [
        *((f"{name}_{group}", draw(study, group), f"{group}, {title}: {what}")
          for group, title in study.plan.groups.items() for name, (draw, what) in BY_GROUP.items()),
        ("pareto", draw_pareto(study), "loss against bytes, trained and rounded"),
        ("rounding", draw_rounding_by_bits(study), "rounded after training, by bits"),
        *((f"codes_{number}", draw_codes(row), f"codes over training: {short_name(row)}")
          for number, row in enumerate(coded)),
        ("step_time", draw_step_times(study), "time of a training step"),
    ]  # fmt: skip
    pictures = []
    for name, figure, caption in figures:
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            save_picture(figure, path)
            pictures.append(Picture(path, caption))
    return pictures
