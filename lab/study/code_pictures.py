"""Pictures of codes: shares and flips of each matrix over a training, and rounding by its bits; and all pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lab.rates.pictures import line_style, shown_power, tidy_axes
from lab.rates.quant_comparison import parse_variant
from lab.study.codes import site_of_weight
from lab.study.pictures import (
    BASE,
    BY_GROUP,
    StudyPicture,
    draw_pareto,
    draw_step_times,
    save_drawn,
    short_name,
    wide_figure,
)
from lab.study.table import Study, StudyRow, row_difference

MOST_CODE_PICTURES = 6
CODE_COLOURS = ("#2b6cb0", "#e2e8f0", "#dd6b20")


def draw_rounding_by_bits(study: Study) -> Figure | None:
    """Difference to the weights that were rounded, by bits, a line for each way to round."""
    lines: dict[str, list[tuple[int, float, float | None, float | None]]] = {}
    for row in study.rows:
        if not row.method or study.plan.baseline != row.source:
            continue
        variant, found = parse_variant(row.method, keeps_embedding=True), row_difference(row, study.baseline)
        if variant.spec is None or found.mean is None or " sequences" in row.names[0]:
            continue
        kind = row.method.replace(str(variant.spec.bits), "", 1)
        order = ", natural order" if row.names[0].endswith("natural order") else ""
        lines.setdefault(kind + order, []).append((variant.spec.bits, found.mean, found.low, found.high))
    lines = {name: sorted(set(points)) for name, points in lines.items() if len({bits for bits, *_ in points}) > 1}
    if not lines:
        return None
    figure, axes = wide_figure()
    for number, (name, points) in enumerate(sorted(lines.items())):
        bits, means = [point[0] for point in points], [point[1] for point in points]
        axes.plot(bits, means, label=name, **line_style(number))
        for place, _, low, high in points:
            if low is not None:
                axes.plot([place, place], [low, high], color=line_style(number)["color"], linewidth=1)
    axes.axhline(0, color=BASE, linewidth=1)
    means = [point[1] for points in lines.values() for point in points]
    linear = max(1e-4, max(map(abs, means)) / 300)
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_ylim(min(-linear, 2 * min(means)), max(linear, 2 * max(means)))
    axes.yaxis.set_major_formatter(FuncFormatter(shown_power))
    axes.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
    axes.set_xlabel("bits of a weight of the blocks (2: ternary)")
    axes.set_ylabel("nats per token above the unrounded weights")
    axes.set_title("rounded after training", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    tidy_axes(axes)
    return figure


def matrix_order(names: Sequence[str]) -> list[str]:
    """Matrices by layer, and within it in the order of the sites."""
    sites = ["q", "k", "v", "o", "up", "down", "embed", "head"]

    def place(name: str) -> tuple[int, int, str]:
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        site = site_of_weight(name)
        return layer, sites.index(site) if site in sites else len(sites), name

    return sorted(names, key=place)


def matrix_label(name: str) -> str:
    layer = next((part for part in name.split(".") if part.isdigit()), "")
    return f"{layer} {site_of_weight(name) or name}".strip()


def draw_codes(row: StudyRow) -> Figure | None:
    """Flips of each matrix between two looks, and shares of its codes at each look, for the first seed."""
    codes = next((curve.codes for curve in row.curves if curve.codes), ())
    names = matrix_order(list({entry["matrix"] for entry in codes}))
    steps = sorted({entry["step"] for entry in codes})
    if len(steps) < 2:
        return None
    flips_MS = np.full((len(names), len(steps)), np.nan)
    zeros_MS = np.full((len(names), len(steps)), np.nan)
    for entry in codes:
        place = names.index(entry["matrix"]), steps.index(entry["step"])
        flips_MS[place] = entry.get("flips", np.nan)
        zeros_MS[place] = entry["shares"].get("0", 0.0)
    figure = Figure(figsize=(12.5, 1.9 + 0.19 * len(names)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.8))
    every = [str(step) for step in steps]
    heat(figure, left, flips_MS[:, 1:], every[1:], "share of codes that changed since the look before")
    heat(figure, middle, zeros_MS, every, "share of zeros")
    draw_histograms(right, codes, names, steps[-1])
    left.set_yticks(range(len(names)), list(map(matrix_label, names)), fontsize=7)
    figure.suptitle(
        f"{short_name(row)}: codes of each matrix (layer, site), first seed", x=0.01, ha="left", fontsize=11
    )
    return figure


def heat(figure: Figure, axes: Axes, values_MS: np.ndarray, steps: Sequence[str], title: str) -> None:
    image = axes.imshow(values_MS, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, pad=0.01)
    shown = range(0, len(steps), max(1, -(-len(steps) // 8)))
    axes.set_xticks(list(shown), [steps[place] for place in shown], fontsize=8)
    axes.set_xlabel("step")
    axes.set_title(title, loc="left", fontsize=9)


def draw_histograms(axes: Axes, codes: Sequence, names: Sequence[str], step: int) -> None:
    """Codes below 0, 0 and above 0 at the last look; of fine grids only zeros are known."""
    shares = {entry["matrix"]: entry["shares"] for entry in codes if entry["step"] == step}
    for place, name in enumerate(names):
        own, left = shares[name], 0.0
        parts = [
            sum(v for c, v in own.items() if keep(int(c)))
            for keep in (lambda c: c < 0, lambda c: c == 0, lambda c: c > 0)
        ]
        for part, colour in zip(parts, CODE_COLOURS, strict=True):
            axes.barh(place, part, left=left, color=colour, height=0.8)
            left += part
    for colour, label in zip(CODE_COLOURS, ("below 0", "0", "above 0"), strict=True):
        axes.barh(0, 0, color=colour, label=label)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of codes")
    axes.set_title(f"codes at step {step}", loc="left", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=7)


def draw_study(study: Study, folder: Path) -> list[StudyPicture]:
    """All pictures that the study has data for, in `folder`, as .png."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for group, title in study.plan.groups.items():
        for name, (draw, what) in BY_GROUP.items():
            pictures += save_drawn(draw(study, group), folder / f"{name}_{group}.png", f"{group}, {title}: {what}")
    pictures += save_drawn(draw_pareto(study, ""), folder / "pareto.png", "loss against bytes, trained and rounded")
    pictures += save_drawn(draw_rounding_by_bits(study), folder / "rounding.png", "rounded after training, by bits")
    coded = [row for row in study.rows if any(curve.codes for curve in row.curves)][:MOST_CODE_PICTURES]
    for number, row in enumerate(coded):
        pictures += save_drawn(
            draw_codes(row), folder / f"codes_{number}.png", f"codes over training: {short_name(row)}"
        )
    return pictures + save_drawn(draw_step_times(study, ""), folder / "step_time.png", "time of a training step")
