"""The table of a study as text: CSV holds every figure in full, Markdown, LaTeX and HTML are made from the CSV."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """A heading, and a cell from a row of the CSV; text stands left."""

    heading: str
    cell: Callable[[CsvRow], str]
    is_text: bool = False


def number_cell(name: str, form: str) -> Callable[[CsvRow], str]:
    return lambda row: format(float(row[name]), form) if row[name] else ""


def text_cell(name: str) -> Callable[[CsvRow], str]:
    return lambda row: row[name]


def nll_cell(row: CsvRow) -> str:
    if not row["val_nll"]:
        return ""
    half = (float(row["val_nll_high"]) - float(row["val_nll_low"])) / 2 if row["val_nll_low"] else None
    return f"{float(row['val_nll']):.4f}" + (f" ± {half:.4f}" if half is not None else "")


def delta_cell(row: CsvRow) -> str:
    """The difference with its interval, and what may be said of it."""
    if not row["delta"]:
        return row["verdict"]
    interval = f" [{float(row['delta_low']):+.4f}, {float(row['delta_high']):+.4f}]" if row["delta_low"] else ""
    note = "" if row["verdict"] in ("worse", "better") else f" {row['verdict']}"
    basis = f" ({row['delta_basis']})" if row["delta_basis"].startswith("one seed") else ""
    return f"{float(row['delta']):+.4f}{interval}{note}{basis}"


def ms_cell(row: CsvRow) -> str:
    if not row["train_ms_per_step"]:
        return ""
    return (
        f"{float(row['train_ms_per_step']):.1f} ({float(row['train_ms_p10']):.1f} to {float(row['train_ms_p90']):.1f})"
    )


LOSS_COLUMNS = (
    TableColumn("configuration", text_cell("rows"), is_text=True),
    TableColumn("seeds", text_cell("seeds")),
    TableColumn("val NLL", nll_cell),
    TableColumn("PPL", number_cell("perplexity", ".2f")),
    TableColumn("bpb", number_cell("bpb", ".4f")),
    TableColumn("Δ NLL to baseline", delta_cell),
    TableColumn("baseline had this loss at step", text_cell("baseline_step_of_equal_loss")),
    TableColumn("val - train", number_cell("train_val_gap", "+.4f")),
    TableColumn("status", text_cell("status"), is_text=True),
)
COST_COLUMNS = (
    TableColumn("configuration", text_cell("rows"), is_text=True),
    TableColumn("bits by site", text_cell("bits"), is_text=True),
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
)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """All figures, in full."""
    target = io.StringIO()
    writer = csv.DictWriter(target, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {name: row.get(name) for name in CSV_COLUMNS}
        assert row.keys() <= values.keys(), row.keys() - values.keys()
        writer.writerow({name: repr(v) if isinstance(v, float) else v for name, v in values.items()})
    return target.getvalue()


def read_csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def shown_columns(rows: Sequence[CsvRow], columns: Sequence[TableColumn]) -> list[TableColumn]:
    """Those that some row has something in."""
    return [column for column in columns if any(column.cell(row) for row in rows)]


def study_markdown(rows: Sequence[CsvRow], columns: Sequence[TableColumn]) -> str:
    shown = shown_columns(rows, columns)
    lines = [[column.heading for column in shown], ["---" if column.is_text else "--:" for column in shown]]
    lines += [[column.cell(row).replace("|", "\\|") for column in shown] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown_report(title: str, rows: Sequence[CsvRow], notes: Sequence[str]) -> str:
    """Both tables and what they leave unsaid."""
    told = "".join(f"- {note}\n" for note in notes)
    return f"# {title}\n\n{study_markdown(rows, LOSS_COLUMNS)}\n{study_markdown(rows, COST_COLUMNS)}\n{told}"


LATEX_SPECIALS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "µ": r"$\mu$",
    ">": r"$>$", "<": r"$<$", "|": r"$|$",
}  # fmt: skip


def latex_text(text: str) -> str:
    return "".join(LATEX_SPECIALS.get(character, character) for character in text)


def latex_table(rows: Sequence[CsvRow], columns: Sequence[TableColumn]) -> str:
    """A tabular, without packages."""
    shown = shown_columns(rows, columns)
    lines = [[column.heading for column in shown], *([column.cell(row) for column in shown] for row in rows)]
    body = [" & ".join(map(latex_text, cells)) + r" \\" for cells in lines]
    layout = "".join("l" if column.is_text else "r" for column in shown)
    return "\n".join(
        [rf"\begin{{tabular}}{{{layout}}}", r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}", ""]
    )


def latex_report(rows: Sequence[CsvRow], notes: Sequence[str]) -> str:
    told = "".join(f"% {note}\n" for note in notes)
    return f"{told}{latex_table(rows, LOSS_COLUMNS)}\n{latex_table(rows, COST_COLUMNS)}"
