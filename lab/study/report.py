"""Writes what a study leaves for people: results.csv, .md and .tex, pictures, and a page with all of it inside.

The CSV holds every figure in full; Markdown, LaTeX and HTML are made from it by the files of templates/.
"""

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2

from golf.runtime import write_file_atomically
from lab.study.pictures import Picture, draw_study
from lab.study.table import ALPHA, FEWEST_ERRORS, Study, load_study_results, table_rows

CSV_COLUMNS = (
    "rows", "seeds", "status", "val_nll", "val_nll_low", "val_nll_high", "perplexity", "bpb", "delta", "delta_low",
    "delta_high", "delta_error", "verdict", "delta_basis", "baseline_step_of_equal_loss", "steps_to_baseline_loss",
    "train_loss", "train_val_gap", "bits", "params", "covered_percent", "bytes_matrices", "bytes_whole",
    "kv_bytes_per_token", "zero_fraction", "energy_uj", "energy_uj_zero_skip", "train_ms_per_step", "train_ms_p10",
    "train_ms_p90", "train_tokens_per_s", "peak_mib", "device", "method",
)  # fmt: skip
CsvRow = Mapping[str, str]


@dataclass(frozen=True)
class TableColumn:
    """A heading, and the text of a cell from a row of the CSV; columns of text are aligned left."""

    heading: str
    cell: Callable[[CsvRow], str]
    is_text: bool = False


def number_cell(name: str, form: str) -> Callable[[CsvRow], str]:
    return lambda row: format(float(row[name]), form) if row[name] else ""


def nll_cell(row: CsvRow) -> str:
    if not row["val_nll"]:
        return ""
    half = (float(row["val_nll_high"]) - float(row["val_nll_low"])) / 2 if row["val_nll_low"] else None
    return f"{float(row['val_nll']):.4f}" + (f" ± {half:.4f}" if half is not None else "")


def delta_cell(row: CsvRow) -> str:
    """Returns the difference with its interval, and what may be said of it."""
    if not row["delta"]:
        return row["verdict"]
    interval = f" [{float(row['delta_low']):+.4f}, {float(row['delta_high']):+.4f}]" if row["delta_low"] else ""
    note = "" if row["verdict"] in ("worse", "better") else f" {row['verdict']}"
    basis = f" ({row['delta_basis']})" if row["delta_basis"].startswith("one seed") else ""
    return f"{float(row['delta']):+.4f}{interval}{note}{basis}"


def ms_cell(row: CsvRow) -> str:
    if not row["train_ms_per_step"]:
        return ""
    median, low, high = (f"{float(row[f'train_ms_{name}']):.1f}" for name in ("per_step", "p10", "p90"))
    return f"{median} ({low} to {high})"


TABLES = {
    "Loss": (
        TableColumn("configuration", itemgetter("rows"), is_text=True),
        TableColumn("seeds", itemgetter("seeds")),
        TableColumn("val NLL", nll_cell),
        TableColumn("PPL", number_cell("perplexity", ".2f")),
        TableColumn("bpb", number_cell("bpb", ".4f")),
        TableColumn("Δ NLL to baseline", delta_cell),
        TableColumn("baseline had this loss at step", itemgetter("baseline_step_of_equal_loss")),
        TableColumn("val - train", number_cell("train_val_gap", "+.4f")),
        TableColumn("status", itemgetter("status"), is_text=True),
    ),
    "Bytes, energy, time": (
        TableColumn("configuration", itemgetter("rows"), is_text=True),
        TableColumn("bits by site", itemgetter("bits"), is_text=True),
        TableColumn("covered %", number_cell("covered_percent", ".1f")),
        TableColumn("bytes of matrices", number_cell("bytes_matrices", ",.0f")),
        TableColumn("bytes in all", number_cell("bytes_whole", ",.0f")),
        TableColumn("KV bytes/token", number_cell("kv_bytes_per_token", ",.0f")),
        TableColumn("zeros", number_cell("zero_fraction", ".3f")),
        TableColumn("µJ/token (estimate)", number_cell("energy_uj", ".3g")),
        TableColumn("zeros skipped (estimate)", number_cell("energy_uj_zero_skip", ".3g")),
        TableColumn("ms/step, p10 to p90", ms_cell),
        TableColumn("train tokens/s", number_cell("train_tokens_per_s", ",.0f")),
        TableColumn("peak MiB", number_cell("peak_mib", ",.0f")),
    ),
}
LATEX_SPECIALS = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "µ": r"$\mu$",
    ">": r"$>$", "<": r"$<$", "|": r"$|$",
})  # fmt: skip
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), undefined=jinja2.StrictUndefined,
    autoescape=lambda name: ".html" in name, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
TEMPLATES.filters["latex"] = lambda text: text.translate(LATEX_SPECIALS)
TEMPLATES.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns all figures in full, as CSV."""
    target = io.StringIO()
    writer = csv.DictWriter(target, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: repr(value) if isinstance(value, float) else value for name, value in row.items()})
    return target.getvalue()


def read_csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def render_study(
    kind: str, title: str, rows: Sequence[CsvRow], notes: Sequence[str], pictures: Sequence[Picture] = ()
) -> str:
    """Returns the tables as `kind`: md, tex or html. A column in which no row has anything is left out."""
    tables = [
        (heading, [column for column in columns if any(map(column.cell, rows))]) for heading, columns in TABLES.items()
    ]
    template = TEMPLATES.get_template(f"study.{kind}.j2")
    return template.render(title=title, rows=rows, tables=tables, notes=notes, pictures=pictures)


def study_title(study: Study) -> str:
    groups = ", ".join(study.plan.groups)
    return f"{study.plan.study}, profile {study.plan.profile}, groups {groups}"


def study_notes(study: Study) -> list[str]:
    """Returns what a reader of tables and pictures has to know beside them, a sentence for each item."""
    results = [result for row in study.rows for result in row.results if "val_tokens" in result]
    text = TEMPLATES.get_template("notes.j2").render(
        plan=study.plan, machine=study.environment, alpha=ALPHA, fewest_errors=FEWEST_ERRORS, scored=results,
        trained=[result for result in results if "train_tokens" in result],
    )  # fmt: skip
    return text.strip("\n").split("\n")


def write_report(out: Path) -> list[dict[str, Any]]:
    """Writes tables, pictures and page of what the folder of a study holds; returns the rows. Raises StudyError."""
    study = load_study_results(out)
    title, notes = study_title(study), study_notes(study)
    text = csv_text(table_rows(study))
    rows = read_csv_rows(text)
    write_file_atomically(out / "results.csv", text)
    pictures = draw_study(study, out / "pictures")
    for name, kind in (("results.md", "md"), ("results.tex", "tex"), ("index.html", "html")):
        write_file_atomically(out / name, render_study(kind, title, rows, notes, pictures))
    return [dict(row) | {"delta_text": delta_cell(row)} for row in rows]
