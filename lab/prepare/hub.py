"""Lists what is published on the hub, and fetches its files into huggingface_hub's cache; nothing is verified yet.

huggingface_hub 2.4 fetches single files into its cache and resumes a broken transfer. It does not try again after a
server error, a file that came short or a list of files that failed: that is `Hub.patiently`. Its snapshot_download
fetches many at once, but stops at the first that fails, does not say which, and hands over none before all are there;
its verify_repo_checksums takes a hub that gives no hashes for one whose files are all wrong.
"""

import contextlib
import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.file_download import hf_hub_download, repo_folder_name, try_to_load_from_cache
from huggingface_hub.hf_api import HfApi
from huggingface_hub.utils import scan_cache_dir
from tqdm import tqdm

from golf.config.knobs import parse_json
from lab.prepare.published import DownloadError, HubListing, manifest_path_of
from lab.prepare.verification import FileFacts, facts_of_entry, scan_file, scan_problem

STALE_SECONDS = 3600.0
"""Age of an unfinished file in the cache after which nobody is writing it any more."""
HOPELESS_STATUS = (401, 403, 404, 410)
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
TRANSFER_ERRORS = (OSError, httpx2.HTTPError, RuntimeError, XetDownloadError)
URL_PART = re.compile(r" for url '?\S+")
Answer = TypeVar("Answer")
HEX_SHA256, HEX_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


class ByteMeter(tqdm):
    """Draws nothing, unlike huggingface_hub's bars, and tells `advance`, set in a subclass for each file, of bytes."""

    advance: Callable[[int], None] = staticmethod(lambda count: None)

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})

    def update(self, n: float | None = 1) -> None:
        self.advance(int(n or 0))

    def update_transfer(self, n: float | None = 1) -> None:
        """Leaves bytes on the network out: they are counted when they are written."""

    set_transfer_postfix_str = tqdm.set_postfix_str


@dataclass(frozen=True)
class Hub:
    """Reaches one dataset repository through huggingface_hub and its cache."""

    repo_id: str
    endpoint: str | None = None
    """URL of the hub; None: huggingface_hub's own (HF_ENDPOINT)."""
    cache_dir: Path | None = None
    """None: huggingface_hub's own (HF_HOME, HF_HUB_CACHE)."""
    offline: bool = field(default_factory=is_offline_mode)
    """Stay off the network; by default where huggingface_hub does (HF_HUB_OFFLINE)."""
    attempts: int = 6
    """At each file and each question."""
    longest_wait: float = 30.0
    """Seconds between two attempts, at most; the first wait is a thirtieth of it, and each next one twice as long."""

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or Path(HF_HUB_CACHE)

    def patiently(
        self,
        ask: Callable[[], Answer],
        noted: Callable[[str], None] = lambda line: None,
        wait: Callable[[float], None] = lambda seconds: time.sleep(seconds),
    ) -> Answer:
        """Returns `ask()`, tried again after errors that may pass; `noted` is told of them. Raises the last one."""
        pause = self.longest_wait / 30
        for attempt in range(2, self.attempts + 1):
            try:
                return ask()
            except TRANSFER_ERRORS as error:
                if self.offline or is_hopeless(error):
                    raise
                noted(f"{first_line(error)}; attempt {attempt} of {self.attempts} in {pause:.0f} s")
            wait(pause)
            pause = min(2 * pause, self.longest_wait)
        return ask()

    def ask(self, question: Callable[[], Answer], revision: str) -> Answer:
        """Returns `question()`, asked patiently. Raises DownloadError of one line for errors of the hub."""
        repo_id = self.repo_id
        try:
            return self.patiently(question)
        except RevisionNotFoundError:
            raise DownloadError(f"{repo_id} has no revision {revision}: give another one with --revision") from None
        except GatedRepoError:
            raise DownloadError(f"{repo_id} is gated: ask for access on its page, then set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise DownloadError(f"the hub has no dataset {repo_id} for you: check --repo-id, or set HF_TOKEN") from None
        except HFValidationError as error:
            raise DownloadError(f"{repo_id!r} is no repository of the hub: {first_line(error)}") from None
        except TRANSFER_ERRORS as error:
            raise DownloadError(
                f"can't reach the hub for {repo_id} ({first_line(error)}): try again, or --offline for what is cached"
            ) from None

    def list_files(self, revision: str, known: dict[str, Any]) -> HubListing:
        """Lists the repository at `revision` (a commit, branch or tag), in one question to the hub.

        Offline, what the cache and the record `known` hold. Raises DownloadError.
        """
        if self.offline:
            return self.list_cached(known)
        api = HfApi(endpoint=self.endpoint)

        def question() -> HubListing:
            commit = api.repo_info(self.repo_id, revision=revision, repo_type="dataset").sha
            entries = api.list_repo_tree(self.repo_id, revision=commit, recursive=True, repo_type="dataset")
            files = {entry.path: listed_facts(entry) for entry in entries if hasattr(entry, "size")}
            return HubListing(self.repo_id, commit, files)

        return self.ask(question, revision)

    def list_cached(self, known: dict[str, Any]) -> HubListing:
        """Lists the recorded commit, or else the last one that was fetched, as far as it is on this machine."""
        snapshots = []
        with contextlib.suppress(CacheNotFound):
            for repo in scan_cache_dir(self.cache_dir).repos:
                if repo.repo_id == self.repo_id and repo.repo_type == "dataset":
                    snapshots = sorted(repo.revisions, key=lambda snapshot: snapshot.last_modified)
        commit = known.get("revision") or (snapshots[-1].commit_hash if snapshots else "")
        files = {entry["remote"]: facts_of_entry(entry) for entry in known.get("files", {}).values()}
        for snapshot in snapshots:
            if snapshot.commit_hash == commit:
                for file in snapshot.files:
                    facts = blob_facts(file.blob_path.name, file.size_on_disk)
                    files.setdefault(file.file_path.relative_to(snapshot.snapshot_path).as_posix(), facts)
        if not files:
            raise DownloadError(f"offline, and nothing of {self.repo_id} is in the cache: go online once")
        return HubListing(self.repo_id, commit, files, offline=True)

    def fetch(self, remote: str, revision: str, advance: Callable[[int], None] = lambda count: None) -> Path:
        """Returns the file in the cache, from the hub where it is not there yet; not verified."""
        path = hf_hub_download(
            self.repo_id,
            remote,
            repo_type="dataset",
            revision=revision,
            endpoint=self.endpoint,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            tqdm_class=type("FileMeter", (ByteMeter,), {"advance": staticmethod(advance)}),
        )
        return Path(path)

    def cached(self, remote: str, revision: str) -> Path | None:
        arguments = {"repo_type": "dataset", "revision": revision, "cache_dir": self.cache_dir}
        path = try_to_load_from_cache(self.repo_id, remote, **arguments)
        return Path(path) if isinstance(path, str) else None

    def read_manifest(self, listing: HubListing, dataset_folder: str) -> dict[str, Any] | None:
        """Returns the export's manifest; None where it has none. Raises DownloadError."""
        path = manifest_path_of(listing, dataset_folder)
        if not path or (self.offline and self.cached(path, listing.revision) is None):
            return None

        def question() -> Path:
            source = self.fetch(path, listing.revision)
            if problem := scan_problem(scan_file(source), listing.files[path]):
                forget(source)
                raise OSError(f"{path}: {problem}")
            return source

        source = self.ask(question, listing.revision)
        try:
            manifest = parse_json(source.read_bytes())
        except ValueError:
            raise DownloadError(f"{self.repo_id}: {path} is not JSON; tell its publisher") from None
        return manifest if isinstance(manifest, dict) else None

    def remove_stale_parts(self) -> None:
        """Deletes what killed downloads of this repository left in the cache."""
        folder = self.cache_folder / repo_folder_name(repo_id=self.repo_id, repo_type="dataset")
        for part in (folder / "blobs").glob("*.incomplete"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()


def listed_facts(entry: Any) -> FileFacts:
    """Returns what the hub's list says of a file."""
    if entry.lfs is not None:
        return FileFacts(entry.lfs.size, sha256=entry.lfs.sha256)
    return blob_facts(entry.blob_id or "", entry.size)


def blob_facts(name: str, size: int) -> FileFacts:
    """Returns what is known of a blob whose name is a SHA-256, or git's SHA-1, or neither."""
    sha256 = name if HEX_SHA256.fullmatch(name) else None
    return FileFacts(size, sha256, name if HEX_SHA1.fullmatch(name) else None)


def first_line(error: BaseException) -> str:
    """Returns what an error says, without the address, which is long and told already."""
    return URL_PART.sub("", (str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def forget(path: Path) -> None:
    """Deletes a file of the cache, and what it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def is_hopeless(error: BaseException) -> bool:
    """Says whether another attempt would fail like this one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    machine = getattr(error, "errno", None) in MACHINE_ERRORS
    return machine or status in HOPELESS_STATUS or isinstance(error, OfflineModeIsEnabled)
