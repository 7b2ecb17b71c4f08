"""Compare two arms of runs: is the difference of their scores more than noise?

    python tools/compare.py RUN ... --vs RUN ... [--alpha 0.05] [--variants-tried K] [--json]

RUN is a run folder, a result.json, or a folder that holds several results (a record). An arm is one configuration with
several seeds. Exit status: 0 compared, whatever came out; 2 bad input, or runs that can't be compared.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lab.cli import ToolOptions, run_command
from lab.compare.comparison import (
    ARMS,
    NEEDS_RUNS,
    Comparison,
    ComparisonSettings,
    DifferenceFigures,
    Measure,
    compare_runs,
)

UNITS_SHOWN = {"val_loss": "val_loss, nats/token", "val_bpb": "val_bpb", "train_loss": "train_loss, nats/token"}


@dataclass(frozen=True)
class Options(ToolOptions):
    a: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Runs of arm A: run folders, result.json files, or folders that hold several."""
    vs: tuple[Path, ...] = ()
    """Runs of arm B."""
    settings: tyro.conf.OmitArgPrefixes[ComparisonSettings] = ComparisonSettings()


def run_table(comparison: Comparison) -> Table:
    title = "runs" if comparison.same_machines else "runs: NOT ON THE SAME MACHINES"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("arm")
    for heading in ("run", "machine"):
        table.add_column(heading, overflow="fold")
    for heading in ("seed", "steps", "train s", "val_loss", "val_bpb"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, runs in comparison.arms.items():
        for run in runs:
            name = run.run_id if run.valid else f"{run.run_id} INVALID"
            scores = (f"{run.val_loss:.5f}", f"{run.val_bpb:.5f}")
            numbers = (str(run.seed), f"{run.steps:,}", f"{run.train_seconds:,.1f}", *scores)
            table.add_row(arm, escape(name), escape(run.machine_id or "unknown"), *numbers)
        table.add_section()
    return table


def measure_heading(name: str, comparison: Comparison) -> str:
    """Says what a column holds; where step counts differ, under which condition."""
    kind = "equal time" if comparison.equal_steps and comparison.equal_time else "final score"
    return f"{'equal steps' if name == 'train_loss' else kind}\n{UNITS_SHOWN[name]}"


def measure_table(comparison: Comparison) -> Table:
    table = Table(title="A against B; lower is better", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    measures = comparison.measures
    for measure in measures:
        table.add_column(measure_heading(measure.name, comparison), justify="right")
    for arm in ARMS:
        table.add_row(f"{arm}: n", *(str(measure.arms[arm].n) for measure in measures))
        table.add_row("   mean", *(f"{measure.arms[arm].mean:.5f}" for measure in measures))
        table.add_row("   sd", *(shown(measure.arms[arm].sd, ".5f", "-") for measure in measures))
    table.add_section()
    table.add_row("A - B", *(f"{measure.difference:+.5f}" for measure in measures))
    table.add_row("margin of equivalence", *(f"{measure.margin:.5f}" for measure in measures), end_section=True)
    add_test_rows(table, "Welch", [measure.welch for measure in measures], comparison)
    if not comparison.not_paired:
        add_test_rows(table, "paired", [measure.paired for measure in measures], comparison)
    return table


def add_test_rows(table: Table, title: str, tests: list[DifferenceFigures | None], comparison: Comparison) -> None:
    figures = [test for test in tests if test]
    if not figures:
        table.add_row(title, *(NEEDS_RUNS for _ in tests), end_section=True)
        return
    confidence = f"{100 * (1 - comparison.corrected_alpha):.4g} %"
    rows: list[tuple[str, Callable[[DifferenceFigures], str]]] = [
        (f"{title}: t", lambda f: shown(f.test.t, "+.3f")),
        ("   degrees of freedom", lambda f: shown(f.test.df, ".2f")),
        ("   p, two-sided", lambda f: shown(f.test.p_two_sided, ".4g")),
        ("   p, A is lower", lambda f: shown(f.test.p_a_lower, ".4g")),
        ("   p, equal within margin", lambda f: shown(f.equivalence and f.equivalence.p, ".4g")),
        (f"   A - B from ({confidence})", lambda f: shown(f.interval and f.interval[0], "+.5f")),
        ("   A - B to", lambda f: shown(f.interval and f.interval[1], "+.5f")),
        ("   smallest effect", lambda f: shown(f.minimum_detectable_difference, ".5f")),
        ("   verdict", lambda f: f.verdict),
    ]
    for label, show in rows:
        table.add_row(label, *map(show, figures))
    table.add_section()


def shown(value: float | None, form: str, absent: str = "undefined") -> str:
    return absent if value is None else format(value, form)


def notes(comparison: Comparison) -> list[str]:
    """Lists what the tables leave unsaid: corrections, pairing, warnings."""
    settings, alpha = comparison.settings, comparison.corrected_alpha
    lines = [f"{arm} is the configuration {comparison.arms[arm][0].config_hash}" for arm in ARMS]
    if settings.variants_tried > 1:
        tried = f"{settings.variants_tried} variants were tried"
        lines.append(f"{tried}: alpha {settings.alpha:g} / {settings.variants_tried} = {alpha:.4g} (Bonferroni)")
    if comparison.measures[0].welch:
        lines.append(
            f"smallest effect: the true difference that such runs show with chance {settings.power:g} at alpha "
            f"{alpha:.4g} (noncentral t; their spread taken for the true one)"
        )
    if comparison.not_paired:
        lines.append(f"not paired by seed: {comparison.not_paired}")
    if comparison.equal_steps:
        lines.append(comparison.equal_steps)
    return lines + [f"warning: {warning}" for warning in comparison.warnings]


def conclusion(comparison: Comparison) -> str:
    score: Measure = comparison.measures[0]
    figures = score.welch
    line = f"{comparison.verdict} (Welch on val_loss, alpha {comparison.corrected_alpha:.4g})"
    if figures is None or figures.minimum_detectable_difference is None:
        return line
    if figures.verdict in ("A is lower", "B is lower"):
        return f"{line}, by {abs(score.difference):.5f} nats per token, p {figures.test.p_two_sided:.3g}"
    return f"{line}: these runs show effects from {figures.minimum_detectable_difference:.5f} nats per token on"


def print_comparison(comparison: Comparison) -> None:
    console = Console()
    console.print(run_table(comparison), measure_table(comparison))
    for line in notes(comparison):
        console.print(line, highlight=False, markup=False)
    console.print(conclusion(comparison), style="bold", highlight=False, markup=False)


def work(options: Options) -> int:
    comparison = compare_runs(options.a, options.vs, options.settings)
    if options.json:
        print(json.dumps(asdict(comparison), default=str, allow_nan=False))
    else:
        print_comparison(comparison)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
