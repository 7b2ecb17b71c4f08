"""Checks a folder of token shards against its record: headers, sizes, numbering, doubles; with --full all hashes.

python data/verify.py data/datasets/fineweb10B_sp1024 [--full]

DIR may also hold several such folders (data/, data/datasets).
Exit status: 0 sound; 1 findings, one line each; 2 bad input.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_FINDINGS
from golf.data.manifest import MANIFEST_NAME
from golf.data.shards import DataError
from golf.runtime import ProgressLine
from lab.cli import ToolOptions, run_command
from lab.prepare.verification import DOWNLOADS_NAME, FolderReport, is_token_file, verify_folder


@dataclass(frozen=True)
class Options(ToolOptions):
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of shards, or one that holds such folders."""
    quick: bool = False
    """Headers, sizes and ends of files, under 10 s; this is the default."""
    full: bool = False
    """Read everything: hashes, and every token within the vocabulary."""
    workers: int = 4
    """Files read at the same time."""


def shard_folders(folder: Path) -> list[Path]:
    """Lists `folder`, or those in it (or in its datasets/) that hold shards or a record of them. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one of token shards (data/README.md)")
    for place in (folder, folder / "datasets"):
        inside = [place, *sorted(place.iterdir())] if place.is_dir() else []
        found = [path for path in inside if path.is_dir() and not path.name.startswith(".") and holds_shards(path)]
        if found:
            return found
    raise DataError(f"{folder}: no token shards there or in its folders; prepare or download them (data/README.md)")


def holds_shards(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    recorded = DOWNLOADS_NAME in names or (MANIFEST_NAME in names and "datasets" not in names)
    return recorded or any(map(is_token_file, names))


class ReadProgress:
    """Tells on a terminal how much has been read."""

    def __init__(self) -> None:
        self.line, self.read, self.started = ProgressLine(shown=True), 0, time.perf_counter()

    def advance(self, count: int) -> None:
        self.read += count
        rate = self.read / max(1e-9, time.perf_counter() - self.started)
        self.line.update(f"read {self.read / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s")


def print_report(report: FolderReport) -> None:
    state = f"{len(report.problems)} problems" if report.problems else "sound"
    print(f"{report.folder}: {state}" + (f", data_id {report.data_id}" if report.data_id else ""))
    table = Table()
    for heading in ("split", "shards", "tokens"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, counts in sorted(report.splits.items()):
        table.add_row(split, *(f"{counts[key]:,}" for key in ("shards", "tokens")))
    Console(markup=False).print(table)
    for problem in report.problems:
        print(f"{os.path.normpath(report.folder / problem.file)}: {problem.problem}")
    if report.unhashed and not report.problems:
        print(f"no recorded hash vouches for {report.unhashed} of {report.files} files")


def report_figures(report: FolderReport) -> dict:
    return asdict(report) | {"folder": str(report.folder), "sound": not report.problems}


def work(options: Options) -> int:
    if options.quick and options.full:
        raise DataError("give --quick or --full, not both")
    started, progress = time.perf_counter(), ReadProgress()
    folders = shard_folders(options.folder)
    reports = [verify_folder(folder, options.full, options.workers, progress.advance) for folder in folders]
    found = any(report.problems for report in reports)
    progress.line.clear()
    if options.json:
        print(json.dumps({"sound": not found, "folders": [report_figures(report) for report in reports]}))
        return EXIT_FINDINGS if found else 0
    for report in reports:
        print_report(report)
    print(f"{'full' if options.full else 'quick'} check, {time.perf_counter() - started:.1f} s")
    return EXIT_FINDINGS if found else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
