"""Downloads files in parallel, verifies, places and records them: all are right in the end, or it says which are not.

huggingface_hub checks sizes only and starts a file over after a kill, so every file is verified here before it gets
its name; what fails is deleted from the cache and fetched again. Files are linked from the cache where it lies on
the same volume (no second copy), else copied.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from golf.data.manifest import data_identity
from golf.data.shards import shard_token_count
from golf.runtime import write_file_atomically
from lab.machine.fingerprint import nearest_folder
from lab.prepare.hub import MACHINE_ERRORS, TRANSFER_ERRORS, Hub, first_line, forget
from lab.prepare.published import DownloadError, DownloadPlan, WantedFile
from lab.prepare.verification import (
    DOWNLOADS_NAME,
    FileFacts,
    FileScan,
    KnownTokenizer,
    ends_fingerprint,
    facts_of_entry,
    is_token_file,
    quick_problem,
    read_data_record,
    scan_file,
    scan_problem,
)

MOST_FAILURES = 3
"""Files that may fail for good before no further ones are begun."""


class DownloadStopped(DownloadError):
    """Says that the download was interrupted; what is complete stays."""


def find_downloads(root: Path, repo_id: str, variant: str) -> dict[str, Any]:
    """Finds the record of an earlier download of the same thing below `root`; empty where there is none."""
    for path in sorted(root.glob(f"datasets/*/{DOWNLOADS_NAME}")):
        record = read_data_record(path)
        if (record.get("repo_id"), record.get("variant")) == (repo_id, variant):
            return record
    return {}


@contextlib.contextmanager
def sole_downloader(folder: Path) -> Iterator[None]:
    """Refuses a second download into the same folder. Raises DownloadError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".downloads.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{folder}: another download is at work there; wait for it, or stop it") from None
        yield


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another volume, or one without links
        shutil.copyfile(source, target)


@dataclass
class Download:
    """Downloads what a plan wants; `run` it once."""

    hub: Hub
    plan: DownloadPlan
    workers: int = 4
    recheck: bool = False
    """Read files again that were verified before and have not been touched since."""
    on_received: Callable[[int], None] = lambda count: None
    """Hears, as the others in threads, of bytes that came over the network; negative when they turned out to be bad."""
    on_finished: Callable[[WantedFile], None] = lambda wanted: None
    on_note: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.record = read_data_record(self.plan.folder / DOWNLOADS_NAME) or {"files": {}}
        self.failures: dict[str, str] = {}
        self.left_out = self.fetched_files = self.fetched_bytes = 0

    def state(self, wanted: WantedFile) -> str:
        """Says "in place", "in the cache" or "to fetch", at a quick look."""
        if not quick_problem(wanted.local, wanted.facts):
            return "in place"
        cached = self.hub.cached(wanted.remote, self.plan.listing.revision)
        return "in the cache" if cached and not quick_problem(cached, wanted.facts) else "to fetch"

    def check_room(self) -> None:
        """Raises OSError where the volumes can't hold what is missing."""
        sizes = {"in place": 0, "in the cache": 0, "to fetch": 0}
        for wanted in self.plan.files:
            sizes[self.state(wanted)] += wanted.facts.size or 0
        cache, folder = nearest_folder(self.hub.cache_folder), nearest_folder(self.plan.folder)
        needs = [(cache, sizes["to fetch"])]
        if cache.stat().st_dev != folder.stat().st_dev:
            needs.append((folder, sizes["to fetch"] + sizes["in the cache"]))
        for place, need in needs:
            free = shutil.disk_usage(place).free
            if need > free:
                text = f"{place}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free: choose other volumes with "
                raise OSError(errno.ENOSPC, text + "--root and --cache-dir, or fewer --train-shards")

    def run(self) -> dict[str, str]:
        """Makes every file right. Returns what could not be had, problem by file.

        Raises DownloadError, and OSError where the machine refuses (no room, no rights).
        """
        with sole_downloader(self.plan.folder):
            if not self.hub.offline:
                self.hub.remove_stale_parts()
            with ThreadPoolExecutor(self.workers) as pool:
                futures = [pool.submit(self.bring, wanted) for wanted in self.plan.files]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                finally:
                    self.stop.set()
                    pool.shutdown(cancel_futures=True)
                    self.sweep()
        return self.failures

    def sweep(self) -> None:
        """Removes unfinished files, and from the record what was neither asked for nor is there."""
        for folder in {self.parts_folder(wanted) for wanted in self.plan.files}:
            shutil.rmtree(folder, ignore_errors=True)
        asked = {self.name_in_record(wanted) for wanted in self.plan.files}
        kept = {n: e for n, e in self.record["files"].items() if n in asked or (self.plan.folder / n).is_file()}
        if kept:
            self.write_record(kept)

    def bring(self, wanted: WantedFile) -> None:
        """Has one file in its place, or its failure noted."""
        if self.stop.is_set() or len(self.failures) >= MOST_FAILURES:
            with self.lock:
                self.left_out += 1
            return
        try:
            if not self.is_in_place(wanted):
                self.hub.patiently(partial(self.attempt, wanted), partial(self.note, wanted), self.pause)
            self.on_finished(wanted)
        except TRANSFER_ERRORS as error:
            if getattr(error, "errno", None) in MACHINE_ERRORS:
                raise
            with self.lock:
                self.failures[self.name_in_record(wanted)] = first_line(error)

    def note(self, wanted: WantedFile, line: str) -> None:
        self.on_note(f"{wanted.local.name}: {line}")

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise DownloadStopped("stopped")

    def is_in_place(self, wanted: WantedFile) -> bool:
        """Says whether the right file is there; deletes a wrong one."""
        if not wanted.local.is_file():
            return False
        entry = self.record["files"].get(self.name_in_record(wanted), {})
        problem = quick_problem(wanted.local, FileFacts(wanted.facts.size, tokens=wanted.facts.tokens))
        if not problem and not self.is_unchanged(wanted, entry):
            problem = self.scanned_problem(wanted.local, wanted)
        if problem:
            self.note(wanted, f"{problem}; fetched again")
            wanted.local.unlink()
        return not problem

    def is_unchanged(self, wanted: WantedFile, entry: dict[str, Any]) -> bool:
        """Says whether a file is as it was when it was found to be what is wanted now."""
        if self.recheck or not entry:
            return False
        stat, known = wanted.local.stat(), facts_of_entry(entry)
        same = (stat.st_size, stat.st_mtime_ns) == (known.size, entry.get("mtime_ns"))
        if not wanted.facts.hashed:
            return same and entry.get("revision") == self.plan.listing.revision
        name = "sha256" if wanted.facts.sha256 else "git_sha1"
        return same and getattr(wanted.facts, name) == getattr(known, name) and not quick_problem(wanted.local, known)

    def attempt(self, wanted: WantedFile) -> None:
        """Fetches, verifies and places a file once. Raises one of TRANSFER_ERRORS where that fails."""
        received = 0

        def advance(count: int) -> None:
            nonlocal received
            if self.stop.is_set():
                raise DownloadStopped("stopped")
            received += count
            self.on_received(count)

        try:
            self.place(self.hub.fetch(wanted.remote, self.plan.listing.revision, advance), wanted)
        except TRANSFER_ERRORS:
            self.on_received(-received)
            raise
        finally:
            with self.lock:
                self.fetched_bytes += received
        with self.lock:
            self.fetched_files += bool(received)

    def place(self, source: Path, wanted: WantedFile) -> None:
        """Verifies a file of the cache and puts it in its place. Raises OSError for a bad one, and forgets it."""
        part = self.parts_folder(wanted) / wanted.local.name  # a folder: a training run must not see the part
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        link_or_copy(source, part)
        if problem := self.scanned_problem(part, wanted):
            forget(source)
            raise OSError(problem)
        os.replace(part, wanted.local)

    def scanned_problem(self, path: Path, wanted: WantedFile) -> str:
        """Reads all of a file and returns what is wrong with it; records it when nothing is."""
        name, facts = self.name_in_record(wanted), wanted.facts
        entry = self.record["files"].get(name, {})
        hash_from = wanted.facts_from
        if not facts.hashed:
            hash_from = entry.get("hash_from") or "first download"
            if entry.get("revision") == self.plan.listing.revision:
                facts = replace(facts, sha256=entry.get("sha256"))
        if problem := quick_problem(path, facts):
            return problem
        scan = scan_file(path)
        problem = scan_problem(scan, facts, self.plan.vocab_size or 2**16)
        return problem or self.remember(name, path, scan, wanted.remote, hash_from)

    def remember(self, name: str, path: Path, scan: FileScan, remote: str, hash_from: str) -> str:
        """Records a sound file; returns a problem for one that no hash vouches for and that is another's double."""
        stat = path.stat()
        entry = {"bytes": stat.st_size, "sha256": scan.sha256, "git_sha1": scan.git_sha1, "hash_from": hash_from}
        entry |= {"ends": ends_fingerprint(path), "mtime_ns": stat.st_mtime_ns}
        entry |= {"remote": remote, "revision": self.plan.listing.revision}
        if is_token_file(path.name):
            entry["tokens"] = shard_token_count(path)
        with self.lock:
            others = {known["sha256"]: other for other, known in self.record["files"].items() if other != name}
            if hash_from == "first download" and scan.sha256 in others:
                return f"has the content of {others[scan.sha256]}"
            self.write_record(self.record["files"] | {name: entry})
        return ""

    def write_record(self, files: dict[str, Any]) -> None:
        asked = {self.name_in_record(wanted) for wanted in self.plan.files}
        tokenizers = [name for name in files if name.endswith((".model", ".json")) and name in asked]
        described = [{"file": name, "sha256": files[name]["sha256"]} for name in tokenizers[:1]]
        self.record = {
            "repo_id": self.plan.listing.repo_id,
            "revision": self.plan.listing.revision,
            "variant": self.plan.variant,
            "tokenizer": described[0] | {"vocab_size": self.plan.vocab_size} if described else None,
            "files": dict(sorted(files.items())),
        }
        write_file_atomically(self.plan.folder / DOWNLOADS_NAME, json.dumps(self.record, indent=1) + "\n")

    def parts_folder(self, wanted: WantedFile) -> Path:
        return wanted.local.parent / f".parts-{self.plan.name}"

    def name_in_record(self, wanted: WantedFile) -> str:
        return Path(os.path.relpath(wanted.local, self.plan.folder)).as_posix()

    def data_id(self) -> str:
        """Returns the data id that runs on the folder record; empty without training shards or tokenizer."""
        tokenizer = self.record.get("tokenizer")
        if not tokenizer or not any(wanted.kind == "train" for wanted in self.plan.files):
            return ""
        path = self.plan.folder / tokenizer["file"]
        return data_identity(self.plan.folder, KnownTokenizer(str(path), tokenizer["sha256"]))
