"""Pictures of a study, all from what its runs measured: a picture is drawn only where there is data for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lab.rates.pictures import LINE_COLOURS, round_ticks, save_picture, shown_bytes, tidy_axes
from lab.study.curves import band, differences
from lab.study.table import RowDifference, Study, StudyRow, mean_interval, row_difference

MOST_LINES = 16
LINE_STYLES = ("-", "--")
QUIET, LOUD, BASE = "#a0aec0", "#2b6cb0", "#1a202c"
KIND_COLOURS = {"full precision": BASE, "trained on a grid": "#2b6cb0", "RTN": "#dd6b20", "GPTQ": "#2f855a"}


@dataclass(frozen=True)
class StudyPicture:
    """A picture in a file, and what it shows."""

    path: Path
    caption: str


def short_name(row: StudyRow, group: str = "") -> str:
    """The name of a row in a group, or its first."""
    names = dict(zip(row.groups[::-1], row.names[::-1], strict=True))
    return names.get(group, row.names[0])


def rows_of_group(study: Study, group: str) -> list[StudyRow]:
    """The group's rows that have a result, and the baseline first."""
    rows = [row for row in study.rows if group in row.groups and row is not study.baseline and row.values("val_loss")]
    return [study.baseline, *rows] if study.baseline.values("val_loss") else rows


def line_of(number: int, row: StudyRow, study: Study) -> dict[str, object]:
    if row is study.baseline:
        return {"color": BASE, "linewidth": 2.2}
    colour = LINE_COLOURS[(number - 1) % len(LINE_COLOURS)]
    return {"color": colour, "linestyle": LINE_STYLES[(number - 1) // len(LINE_COLOURS) % len(LINE_STYLES)]}


def wide_figure(height: float = 5.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.5, height), layout="constrained")
    return figure, figure.subplots()


def finish_lines(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.set_xlabel("step")
    axes.set_title(title, loc="left", fontsize=10)
    tidy_axes(axes)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def draw_losses_by_step(study: Study, group: str) -> Figure | None:
    """Validation loss at every look: mean over seeds, and the band from the least to the most."""
    rows = [row for row in rows_of_group(study, group) if row.val_curves]
    if len(rows) < 2 or len(rows) > MOST_LINES:
        return None
    figure, axes = wide_figure()
    for number, row in enumerate(rows):
        curve, style = band(row.val_curves), line_of(number, row, study)
        axes.plot(curve.steps, curve.mean, label=short_name(row, group), **style)
        if len(row.val_curves) > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylabel("validation loss, nats per token")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return finish_lines(figure, axes, f"group {group}: loss on the same validation tokens; band: all seeds")


def paired_curves(row: StudyRow, study: Study) -> list[dict[int, float]]:
    """Row less baseline, seed by seed, of the seeds that have both curves."""
    pairs = [(a.val, b.val) for a, b in zip(row.curves, study.baseline.curves, strict=True) if a.val and b.val]
    return differences([own for own, _ in pairs], [other for _, other in pairs])


def draw_gaps_by_step(study: Study, group: str) -> Figure | None:
    """Loss less the baseline's at the same step of the same seed."""
    rows = [row for row in rows_of_group(study, group) if row is not study.baseline and paired_curves(row, study)]
    if not rows or len(rows) > MOST_LINES:
        return None
    figure, axes = wide_figure()
    for number, row in enumerate(rows, start=1):
        gaps, style = paired_curves(row, study), line_of(number, row, study)
        curve = band(gaps)
        axes.plot(curve.steps, curve.mean, label=short_name(row, group), **style)
        if len(gaps) > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(0, color=BASE, linewidth=1)
    axes.set_ylabel("loss less the baseline's, nats per token")
    return finish_lines(figure, axes, f"group {group}: gap to the baseline, paired by seed; band: all seeds")


def horizontal_figure(rows: Sequence[StudyRow]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(11, 1.5 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    return figure, [left, right]


def draw_final_losses(study: Study, group: str) -> Figure | None:
    """The final loss of every row with its interval, and its difference to the baseline."""
    rows = rows_of_group(study, group)
    if len(rows) < 2:
        return None
    figure, (left, right) = horizontal_figure(rows)
    found = [row_difference(row, study.baseline) for row in rows]
    losses = [row.mean("val_loss") for row in rows]
    for place, (row, loss, difference) in enumerate(zip(rows, losses, found, strict=True)):
        low, high = mean_interval(row.values("val_loss"))
        colour = BASE if row is study.baseline else colour_of(difference)
        left.plot(loss, place, "o", color=colour, markersize=5)
        if low is not None:
            left.plot([low, high], [place, place], color=colour, linewidth=1.6)
        if difference.mean is not None:
            right.barh(place, difference.mean, color=colour, height=0.6)
        if difference.low is not None:
            right.plot([difference.low, difference.high], [place, place], color=BASE, linewidth=1.3)
    left.set_yticks(range(len(rows)), [short_name(row, group) for row in rows], fontsize=8)
    left.set_ylim(len(rows) - 0.4, -0.6)
    right.axvline(0, color=BASE, linewidth=1)
    ends = [end for row in rows for end in mean_interval(row.values("val_loss")) if end is not None]
    keep_readable(left, losses, ends)
    ends = [end for one in found for end in (one.low, one.high) if end is not None]
    keep_readable(right, [part for one in found if one.mean is not None for part in (one.mean, 0.0)], ends)
    left.set_title(f"group {group}: final loss, 95 % interval over seeds", loc="left", fontsize=10)
    right.set_title("less the baseline's, paired; grey: not resolved", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("nats per token")
        tidy_axes(axes)
    return figure


def keep_readable(axes: Axes, values: Sequence[float], ends: Sequence[float]) -> None:
    """Intervals of a few seeds may be very wide: those that reach far beyond all values are cut off at the edge."""
    low, high = min(values), max(values)
    room = (high - low) or 0.05
    low, high = max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))
    axes.set_xlim(low - 0.05 * room, high + 0.05 * room)


def colour_of(difference: RowDifference) -> str:
    return LOUD if difference.verdict in ("worse", "better") else QUIET


def kind_of(row: StudyRow) -> str:
    if row.method:
        return "GPTQ" if row.method.startswith("gptq") else "RTN"
    return "trained on a grid" if (row.mean("covered") or 0) > 0 else "full precision"


def draw_pareto(study: Study, _: str) -> Figure | None:
    """Final loss against the bytes of the whole artifact, trained and rounded rows together."""
    rows = [row for row in study.rows if row.values("val_loss")]
    if len({row.mean("bytes_model") for row in rows}) < 2:
        return None
    figure, axes = wide_figure(5.8)
    points = [(row.mean("bytes_model"), row.mean("val_loss"), row) for row in rows]
    points.sort(key=lambda point: point[:2])
    for kind, colour in KIND_COLOURS.items():
        own = [(size, loss) for size, loss, row in points if kind_of(row) == kind]
        if own:
            axes.plot(*zip(*own, strict=True), "o", color=colour, markersize=5, label=kind)
    front = pareto_front(points)
    axes.step([size for size, _, _ in front], [loss for _, loss, _ in front], where="post", color=QUIET, linewidth=1)
    for number, (size, loss, _) in enumerate(front, start=1):
        axes.annotate(str(number), (size, loss), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.9 * points[0][0], 1.5 * points[-1][0])
    axes.set_xticks(round_ticks(0.9 * points[0][0], 1.5 * points[-1][0]), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(shown_bytes))
    axes.set_xlabel("bytes of the whole artifact, without optimizer state")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("loss against bytes; line: nothing smaller is better", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    tidy_axes(axes)
    named = [
        Line2D([], [], linestyle="", label=f"{i} {short_name(row)}") for i, (_, _, row) in enumerate(front, start=1)
    ]
    figure.legend(handles=named, loc="outside lower left", ncols=3, frameon=False, fontsize=8, handlelength=0)
    return figure


def pareto_front(points: Sequence[tuple[float, float, StudyRow]]) -> list[tuple[float, float, StudyRow]]:
    """Of points by size, those that are better than all smaller ones, by a visible part of the range of losses."""
    losses = [loss for _, loss, _ in points]
    visible, best, front = 0.01 * (max(losses) - min(losses)), float("inf"), []
    for size, loss, row in points:
        if loss < best - visible:
            best = loss
            front.append((size, loss, row))
    return front


def draw_step_times(study: Study, _: str) -> Figure | None:
    """Median time of a training step, and the range from the 10th to the 90th percentile."""
    rows = [row for row in study.rows if row.values("step_ms")]
    if len(rows) < 2:
        return None
    figure, axes = wide_figure(1.5 + 0.27 * len(rows))
    for place, row in enumerate(rows):
        colour = BASE if row is study.baseline else LOUD
        axes.barh(place, row.mean("step_ms"), color=colour, height=0.6)
        axes.plot([row.mean("step_ms_p10"), row.mean("step_ms_p90")], [place, place], color=QUIET, linewidth=1.6)
    axes.set_yticks(range(len(rows)), [short_name(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("ms per training step, fake quantization included")
    device = f"{study.environment['device']}, {study.environment['threads']} thread(s)"
    axes.set_title(f"step time, median and p10 to p90, mean over seeds: {device}", loc="left", fontsize=10)
    tidy_axes(axes)
    return figure


def save_drawn(figure: Figure | None, path: Path, caption: str) -> list[StudyPicture]:
    if figure is None:
        path.unlink(missing_ok=True)  # of an earlier report
        return []
    save_picture(figure, path)
    return [StudyPicture(path, caption)]


BY_GROUP: dict[str, tuple[Callable[[Study, str], Figure | None], str]] = {
    "loss": (draw_losses_by_step, "validation loss by step"),
    "gap": (draw_gaps_by_step, "gap to the baseline by step"),
    "final": (draw_final_losses, "final losses and differences"),
}
"""File name -> how it is drawn for a group, and what it shows."""
