"""What is published on the hub, and its files in huggingface_hub's cache. Nothing here is verified yet."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
)
from huggingface_hub.file_download import hf_hub_download, repo_folder_name, try_to_load_from_cache
from huggingface_hub.hf_api import HfApi
from huggingface_hub.utils import scan_cache_dir
from huggingface_hub.utils.logging import set_verbosity_error

from lab.prepare.published import DownloadError, HubListing, manifest_path_of
from lab.prepare.verification import FileFacts, facts_of_entry, scan_file, scan_problem

STALE_SECONDS = 3600.0
"""Age of an unfinished file in the cache after which nobody is writing it any more."""
HOPELESS_STATUS = (401, 403, 404, 410)
URL_PART = re.compile(r" for url '?\S+")
Answer = TypeVar("Answer")
HEX_SHA256, HEX_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


class ByteMeter:
    """Stands where huggingface_hub draws a bar of tqdm; `advance` is set in a subclass for each file."""

    advance: Callable[[int], None] = staticmethod(lambda count: None)

    def __init__(self, *arguments: Any, total: int | None = None, **options: Any):
        self.total, self.n = total, 0

    def __enter__(self) -> "ByteMeter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def update(self, count: float | None = 1) -> None:
        self.n += int(count or 0)
        self.advance(int(count or 0))

    def update_transfer(self, count: float | None = 1) -> None:
        """Bytes on the network, which are counted when they are written."""

    def set_postfix_str(self, *arguments: Any, **options: Any) -> None:
        """What a bar would show."""

    set_transfer_postfix_str = set_description = refresh = set_postfix_str

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Hub:
    """One dataset repository, through huggingface_hub and its cache."""

    repo_id: str
    endpoint: str | None = None
    """URL of the hub; None: huggingface_hub's own (HF_ENDPOINT)."""
    cache_dir: Path | None = None
    """None: huggingface_hub's own (HF_HOME, HF_HUB_CACHE)."""
    offline: bool = False
    attempts: int = 6
    """At each file and each question."""
    longest_wait: float = 30.0
    """Seconds between two attempts, at most; the first wait is a thirtieth of it, and each next one twice as long."""

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or Path(HF_HUB_CACHE)

    def list_files(self, revision: str, known: dict[str, Any]) -> HubListing:
        """The repository at `revision` (a commit, branch or tag); offline, what the cache and the record `known` hold.

        Raises DownloadError.
        """
        if self.offline:
            return self.list_cached(known)
        api = HfApi(endpoint=self.endpoint)

        def ask() -> HubListing:
            commit = api.repo_info(self.repo_id, revision=revision, repo_type="dataset").sha
            entries = api.list_repo_tree(self.repo_id, revision=commit, recursive=True, repo_type="dataset")
            files = {entry.path: listed_facts(entry) for entry in entries if hasattr(entry, "size")}
            return HubListing(self.repo_id, commit, files)

        with told_plainly(self.repo_id, revision):
            return self.patiently(ask)

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """`ask()`, again after errors that may pass."""
        pause = self.longest_wait / 30
        for _ in range(self.attempts - 1):
            try:
                return ask()
            except (OSError, httpx2.HTTPError) as error:
                if is_hopeless(error):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, self.longest_wait)
        return ask()

    def list_cached(self, known: dict[str, Any]) -> HubListing:
        """The recorded commit, or else the last one that was fetched, as far as it is on this machine."""
        snapshots = []
        with contextlib.suppress(CacheNotFound):
            for repo in scan_cache_dir(self.cache_dir).repos:
                if repo.repo_id == self.repo_id and repo.repo_type == "dataset":
                    snapshots = sorted(repo.revisions, key=lambda snapshot: snapshot.last_modified)
        newest = snapshots[-1].commit_hash if snapshots else ""
        commit = known.get("revision") or newest
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
        """The file in the cache, from the hub where it is not there yet; not verified."""
        meter = type("FileMeter", (ByteMeter,), {"advance": staticmethod(advance)})
        path = hf_hub_download(
            self.repo_id,
            remote,
            repo_type="dataset",
            revision=revision,
            endpoint=self.endpoint,
            cache_dir=self.cache_dir,
            local_files_only=self.offline,
            tqdm_class=meter,
        )
        return Path(path)

    def cached(self, remote: str, revision: str) -> Path | None:
        arguments = {"repo_type": "dataset", "revision": revision, "cache_dir": self.cache_dir}
        path = try_to_load_from_cache(self.repo_id, remote, **arguments)
        return Path(path) if isinstance(path, str) else None

    def read_manifest(self, listing: HubListing, dataset_folder: str) -> dict[str, Any] | None:
        """The export's manifest; None where it has none. Raises DownloadError."""
        path = manifest_path_of(listing, dataset_folder)
        if not path or (self.offline and self.cached(path, listing.revision) is None):
            return None

        def load() -> Path:
            source = self.fetch(path, listing.revision)
            if problem := scan_problem(scan_file(source), listing.files[path]):
                forget(source)
                raise OSError(f"{path}: {problem}")
            return source

        with told_plainly(self.repo_id, listing.revision):
            source = self.patiently(load)
        try:
            manifest = json.loads(source.read_text(encoding="utf-8"))
        except ValueError:
            raise DownloadError(f"{self.repo_id}: {path} is not JSON; tell its publisher") from None
        return manifest if isinstance(manifest, dict) else None

    def remove_stale_parts(self) -> None:
        """Delete what killed downloads of this repository left in the cache."""
        folder = self.cache_folder / repo_folder_name(repo_id=self.repo_id, repo_type="dataset")
        for part in (folder / "blobs").glob("*.incomplete"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()


def listed_facts(entry: Any) -> FileFacts:
    """Of a file in the hub's list."""
    if entry.lfs is not None:
        return FileFacts(entry.lfs.size, sha256=entry.lfs.sha256)
    return blob_facts(entry.blob_id or "", entry.size)


def blob_facts(name: str, size: int) -> FileFacts:
    """Of a blob whose name is a SHA-256, or git's SHA-1, or neither."""
    sha256 = name if HEX_SHA256.fullmatch(name) else None
    return FileFacts(size, sha256, name if HEX_SHA1.fullmatch(name) else None)


@contextlib.contextmanager
def told_plainly(repo_id: str, revision: str) -> Iterator[None]:
    """Errors of the hub as a DownloadError of one line."""
    try:
        yield
    except RevisionNotFoundError:
        raise DownloadError(f"{repo_id} has no revision {revision}: give another one with --revision") from None
    except GatedRepoError:
        raise DownloadError(f"{repo_id} is gated: ask for access on its page, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise DownloadError(f"the hub has no dataset {repo_id} for you: check --repo-id, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise DownloadError(f"{repo_id!r} is no repository of the hub: {first_line(error)}") from None
    except (OSError, httpx2.HTTPError) as error:
        raise DownloadError(
            f"can't reach the hub for {repo_id} ({first_line(error)}): try again, or --offline for what is cached"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, without the address, which is long and told already."""
    return URL_PART.sub("", (str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def forget(path: Path) -> None:
    """Delete a file of the cache, and what it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def is_hopeless(error: BaseException) -> bool:
    """Whether another attempt would fail like this one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in HOPELESS_STATUS or isinstance(error, OfflineModeIsEnabled)


def is_offline(asked: bool) -> bool:
    """Whether to stay off the network: asked for, or by huggingface_hub's own switch (HF_HUB_OFFLINE)."""
    return asked or is_offline_mode()


def hush_hub() -> None:
    """Let huggingface_hub log errors only: what it retries is told by the download itself."""
    set_verbosity_error()
