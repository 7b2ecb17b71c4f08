"""Check a record folder: ours, or one in the shape of the competition's published records.

python tools/check_submission.py DIR [--json]

Nothing in the folder is run. Exit status: 0 no errors; 1 errors; 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_FINDINGS
from lab.cli import ToolOptions, run_command
from lab.record.finding import SEVERITIES, SubmissionFinding
from lab.record.folder_check import check_record
from lab.record.log_reading import LogReading
from lab.record.record_folder import RecordFolder, read_record


@dataclass(frozen=True)
class Options(ToolOptions):
    folder: Annotated[Path, tyro.conf.Positional]
    """The record folder."""


def log_figures(log: LogReading) -> dict[str, Any]:
    final = log.last_final
    return {
        "log": log.name,
        "seed": log.seed,
        "line": final.name if final else None,
        "val_bpb": final.val_bpb if final else None,
        "val_loss": final.val_loss if final else None,
        "steps": log.steps,
        "train_seconds": log.train_seconds,
        "eval_seconds": log.total_eval_seconds or (max(log.eval_seconds) if log.eval_seconds else None),
        "bytes_total": log.total_bytes,
    }


def report_dict(record: RecordFolder, findings: list[SubmissionFinding]) -> dict[str, Any]:
    return {
        "folder": str(record.path),
        **{f"{name}s": sum(finding.severity == name for finding in findings) for name in SEVERITIES},
        "findings": [{"number": number, **asdict(finding)} for number, finding in enumerate(findings, 1)],
        "logs": [log_figures(log) for log in record.logs],
        "bytes_code": record.bytes_code,
        "local_modules": record.neighbours.modules,
        "layers": len(record.script.layers) if record.script else 0,
    }


def log_table(record: RecordFolder) -> Table:
    table = Table("log", "seed", "val_bpb", "steps", "train s", "eval s", "bytes", box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    formats = {"val_bpb": "{:.6f}", "steps": "{:,}", "train_seconds": "{:.1f}", "eval_seconds": "{:.1f}"}
    formats["bytes_total"] = "{:,}"
    for log in record.logs:
        figures = log_figures(log)
        cells = ["-" if figures[key] is None else text.format(figures[key]) for key, text in formats.items()]
        table.add_row(log.name, "-" if figures["seed"] is None else str(figures["seed"]), *cells)
    return table


def print_report(record: RecordFolder, report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if record.logs:
        console.print(log_table(record))
        lines = dict.fromkeys(log.last_final.name for log in record.logs if log.last_final)
        console.print(
            f"scores: the last line {' or '.join(lines) or 'of a final score, which is in none'}", markup=False
        )
    if record.script:
        packed = f", {len(record.script.layers) - 1} packed inside" if len(record.script.layers) > 1 else ""
        count = len(record.neighbours.modules)
        modules = f", with {count} local module{'s' * (count > 1)}" if count else ""
        console.print(f"{record.script_name}: {record.bytes_code:,} bytes of code{modules}{packed}")
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in report["findings"]:
        colour = colours[finding["severity"]]
        console.print(f"{finding['number']:>3}. [{colour}]{finding['severity']}[/] {finding['code']}:", end=" ")
        console.print(finding["text"], markup=False)
    counts = (f"{report[name + 's']} {name}{'s' * (report[name + 's'] != 1)}" for name in SEVERITIES)
    console.print(f"{'[bold red]not sound' if report['errors'] else '[bold green]sound'}[/]: {', '.join(counts)}")


def work(options: Options) -> int:
    record = read_record(options.folder)
    report = report_dict(record, check_record(record))
    if options.json:
        print(json.dumps(report))
    else:
        print_report(record, report)
    return EXIT_FINDINGS if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
