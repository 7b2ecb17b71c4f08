"""Downloads a published token export from the Hugging Face hub and verifies every file.

python data/download.py --variant sp1024 [--train-shards 80] [--dry-run]

All validation shards, the first training shards and the tokenizer go to data/datasets/<name> and data/tokenizers.
Safe to interrupt and start again; works offline from the cache. Which commit, and every hash, is recorded in the
folder's downloads.json; later downloads stay with that commit unless --revision names another.
Exit status: 0 all is there and right; 1 some files could not be had; 2 bad input; 4 interrupted; 5 the machine refused.
"""

import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_BAD_INPUT, EXIT_FINDINGS, EXIT_INTERRUPTED, EXIT_MACHINE
from lab.cli import ToolOptions, run_command
from lab.prepare.published import DownloadPlan, WantedFile, find_dataset_folder, plan_download, repository_of

try:
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils.logging import set_verbosity_error

    from lab.prepare.hub import Hub
    from lab.prepare.transfer import Download, find_downloads
except ModuleNotFoundError as missing:
    print(
        f"download: {str(missing.name).split('.')[0]} is not installed: pip install -r requirements-data.txt",
        file=sys.stderr,
    )
    sys.exit(EXIT_BAD_INPUT)

STATES = ("in place", "in the cache", "to fetch")


@dataclass(frozen=True)
class Options(ToolOptions):
    variant: str = "sp1024"
    """sp1024, sp8192, caseops, byte260, gpt2, ... or the name of a folder of the repository."""
    train_shards: int | None = None
    """Training shards, the first ones; by default 80, or all where there are fewer."""
    repo_id: str = ""
    """Dataset repository of the hub; by default the one where the variant is published."""
    revision: str = ""
    """Commit, branch or tag; by default the commit of an earlier download, else main."""
    root: Path = Path(os.path.relpath(Path(__file__).resolve().parent))
    """Folder that gets datasets/ and tokenizers/."""
    cache_dir: Path | None = None
    """huggingface_hub's cache; by default where its own settings have it (HF_HOME)."""
    endpoint: str | None = None
    """URL of the hub or a mirror; by default huggingface_hub's own (HF_ENDPOINT)."""
    workers: int = 4
    """Files fetched at the same time."""
    offline: bool = False
    """Use what is cached or in place, and no network (HF_HUB_OFFLINE does the same)."""
    recheck: bool = False
    """Read files again that were verified before and not touched since."""
    dry_run: bool = False
    """Show what would be fetched, and stop."""


def make_plan(options: Options) -> tuple[Hub, DownloadPlan]:
    """Asks the hub what there is, and chooses. Raises DownloadError."""
    repo_id = options.repo_id or repository_of(options.variant)
    hub = Hub(repo_id, options.endpoint, options.cache_dir, options.offline or is_offline_mode())
    earlier = find_downloads(options.root, repo_id, options.variant)
    listing = hub.list_files(options.revision or earlier.get("revision", "main"), earlier)
    manifest = hub.read_manifest(listing, find_dataset_folder(listing, options.variant))
    return hub, plan_download(listing, options.variant, options.root, options.train_shards, manifest)


def print_plan(download: Download, console: Console) -> None:
    plan = download.plan
    table = Table(title=f"{plan.listing.repo_id} at {plan.listing.revision[:12]}: {plan.name}")
    for heading in ("files", "wanted", "of", "in place", "cached", "to fetch", "GB", "GB to fetch"):
        table.add_column(heading, justify="left" if heading == "files" else "right", no_wrap=True)
    for kind in ("val", "val bytes", "train", "tokenizer"):
        files = [wanted for wanted in plan.files if wanted.kind == kind]
        if not files:
            continue
        states = [download.state(wanted) for wanted in files]
        sizes = [wanted.facts.size or 0 for wanted in files]
        missing = sum(size for size, state in zip(sizes, states, strict=True) if state == "to fetch")
        counts = [str(Counter(states)[state]) for state in STATES]
        published = str(plan.published.get(kind, len(files)))
        table.add_row(kind, str(len(files)), published, *counts, f"{sum(sizes) / 1e9:.3f}", f"{missing / 1e9:.3f}")
    console.print(table)


def plan_figures(download: Download) -> dict:
    plan = download.plan
    files = [
        {"file": download.name_in_record(wanted), "bytes": wanted.facts.size, "state": download.state(wanted)}
        for wanted in plan.files
    ]
    commit = plan.listing.revision
    return {"folder": str(plan.folder), "repo_id": plan.listing.repo_id, "revision": commit, "files": files}


class DownloadDisplay:
    """Shows a bar with rate and time left on a terminal; elsewhere a line for each file."""

    def __init__(self, download: Download):
        self.started, self.received, self.files = time.perf_counter(), 0, 0
        missing = [wanted for wanted in download.plan.files if download.state(wanted) == "to fetch"]
        self.missing, self.of_files = {wanted.remote for wanted in missing}, len(download.plan.files)
        self.total = sum(wanted.facts.size or 0 for wanted in missing)
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task(f"0/{self.of_files} files", total=self.total)
        download.on_received, download.on_finished, download.on_note = self.receive, self.finish, self.note

    def __enter__(self) -> "DownloadDisplay":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def receive(self, count: int) -> None:
        self.received += count
        self.progress.advance(self.task, count)

    def finish(self, wanted: WantedFile) -> None:
        self.files += 1
        self.progress.update(self.task, description=f"{self.files}/{self.of_files} files")
        if not self.console.is_terminal and wanted.remote in self.missing:
            rate = self.received / max(1e-9, time.perf_counter() - self.started)
            left = max(0, self.total - self.received) / max(rate, 1.0)
            amount = f"{self.received / 1e9:.2f} of {self.total / 1e9:.2f} GB"
            self.note(f"{self.files}/{self.of_files} files, {amount}, {rate / 1e6:.1f} MB/s, {left:.0f} s left")

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def fetch(download: Download) -> None:
    """Runs the download with its display. Raises DownloadError or OSError."""
    download.check_room()
    with DownloadDisplay(download):
        download.run()


def report(download: Download, seconds: float, options: Options) -> int:
    plan, failures = download.plan, download.failures
    data_id = "" if failures else download.data_id()
    if options.json:
        figures = plan_figures(download) | {"data_id": data_id, "failures": failures, "seconds": round(seconds, 1)}
        print(json.dumps(figures | {"fetched_files": download.fetched_files, "fetched_bytes": download.fetched_bytes}))
    elif not failures:
        amount = f"{download.fetched_files} fetched, {download.fetched_bytes / 1e9:.2f} GB in {seconds:.1f} s"
        print(f"{plan.folder}: {len(plan.files)} files verified, {amount}")
        tokenizer = (download.record.get("tokenizer") or {}).get("file")
        if tokenizer:
            print(f"data_path={plan.folder} tokenizer_path={(plan.folder / tokenizer).resolve()}")
        print(f"data_id {data_id}" if data_id else "data_id: none without tokenizer and training shards")
    for name, problem in failures.items():
        print(f"download: {name}: {problem}", file=sys.stderr)
    if failures:
        rest = f"; {download.left_out} files were not begun" if download.left_out else ""
        print(f"download: {len(failures)} files could not be had{rest}: run the same command again", file=sys.stderr)
    return EXIT_FINDINGS if failures else 0


def work(options: Options) -> int:
    set_verbosity_error()  # what huggingface_hub tries again is told by the download itself
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.perf_counter()
    hub, plan = make_plan(options)
    download = Download(hub, plan, workers=options.workers, recheck=options.recheck)
    if options.dry_run:
        print(json.dumps(plan_figures(download))) if options.json else print_plan(download, Console(markup=False))
        return 0
    try:
        fetch(download)
    except KeyboardInterrupt:
        print("download: interrupted; what is complete stays: run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            place = error.filename or options.root
            print(f"download: {place}: {error.strerror}; what is complete stays", file=sys.stderr)
            return EXIT_MACHINE
        raise
    return report(download, time.perf_counter() - started, options)


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
