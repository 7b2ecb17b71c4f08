"""Shows how what adaptive scoring gains depends on the network's own score, and what that says of a better network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from golf.config.knobs import parse_json
from lab.compare.statistics import StatisticsError, student_t_quantile
from lab.rates.pictures import line_style, save_picture, tidy_axes

ALPHA = 0.05


@dataclass(frozen=True)
class GainLine:
    """Holds a straight line through gains over the network's own bits per byte, and where a new gain would lie."""

    slope: float
    intercept: float
    error: float
    """Standard deviation of the gains around the line."""
    mean: float
    spread: float
    """Mean, and sum of squared deviations, of the networks' scores."""
    count: int

    def at(self, bpb: float) -> tuple[float, float, float]:
        """Returns (gain, low, high) for a network of that score: the line, and its 95 % interval for a new network."""
        gain = self.intercept + self.slope * bpb
        far = math.sqrt(1 + 1 / self.count + (bpb - self.mean) ** 2 / self.spread)
        half = -student_t_quantile(ALPHA / 2, self.count - 2) * self.error * far
        return gain, gain - half, gain + half


def read_rows(path: Path) -> list[dict]:
    """Reads what tools/adaptation.py printed with --json. Raises StatisticsError, OSError."""
    try:
        return [
            {"run": str(row["run"]), "what": str(row["what"])}
            | {figure: float(row[figure]) for figure in ("val_bpb", "seconds")}
            for row in parse_json(path.read_bytes())
        ]
    except (ValueError, KeyError, TypeError):
        raise StatisticsError(f"{path}: not the rows that tools/adaptation.py prints with --json") from None


def fit_gains(network_N: Sequence[float], gains_N: Sequence[float]) -> GainLine:
    """Fits a line by least squares. Raises StatisticsError for fewer than three different networks."""
    x_N, y_N = np.asarray(network_N, dtype=np.float64), np.asarray(gains_N, dtype=np.float64)
    if len(set(network_N)) < 3:
        raise StatisticsError("a line with an interval needs artifacts of at least three different scores")
    slope, intercept = np.polyfit(x_N, y_N, 1)
    error = math.sqrt(((y_N - intercept - slope * x_N) ** 2).sum() / (len(x_N) - 2))
    spread = float(((x_N - x_N.mean()) ** 2).sum())
    return GainLine(float(slope), float(intercept), error, float(x_N.mean()), spread, len(x_N))


def draw_gains(rows: Sequence[dict], wanted_bpb: float, path: Path) -> dict[str, tuple[float, float, float]]:
    """Draws gains of each way to score over the network's own bits per byte, with lines to `wanted_bpb`; returns what
    the lines say there, by way. `rows` have run, what, val_bpb; the first row of a run is its network alone."""
    alone: dict[str, float] = {}
    ways: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["run"] not in alone:
            alone[row["run"]] = row["val_bpb"]
        else:
            ways.setdefault(row["what"].split(" (")[0], []).append((alone[row["run"]], row["val_bpb"]))
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes, said = figure.subplots(), {}
    for index, (way, points) in enumerate(ways.items()):
        network_N, gains_N = [own for own, _ in points], [own - adapted for own, adapted in points]
        line, style = fit_gains(network_N, gains_N), line_style(index)
        said[way] = line.at(wanted_bpb)
        axes.plot(network_N, gains_N, label=way, **(style | {"linestyle": "none"}))
        through_N = np.linspace(wanted_bpb, max(network_N), 60)
        drawn = np.array([line.at(bpb) for bpb in through_N])
        axes.plot(through_N, drawn[:, 0], color=style["color"], linewidth=1)
        axes.fill_between(through_N, drawn[:, 1], drawn[:, 2], color=style["color"], alpha=0.08, linewidth=0)
    axes.axvline(wanted_bpb, color="#4a5568", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="#4a5568", linewidth=0.8)
    axes.invert_xaxis()
    axes.set_xlabel("bits per byte of the network alone (better to the right)")
    axes.set_ylabel("bits per byte gained")
    axes.set_title("What adaptive scoring gains on networks of one training; lines with 95 % intervals", loc="left")
    axes.legend(frameon=False, fontsize=9)
    tidy_axes(axes)
    save_picture(figure, path)
    return said
