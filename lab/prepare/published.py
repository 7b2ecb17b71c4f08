"""Chooses the files of a published export to download, by the hub's list of files and the export's manifest.

The field's exports hold `datasets/manifest.json`, `datasets/tokenizers/*` and `datasets/datasets/<name>/*.bin`;
the list of files decides where the folder is, so that other layouts work too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from golf.data.shards import SHARD_NAME, DataError
from lab.prepare.verification import TOKEN_FILE_NAME, FileFacts, facts_of_entry, split_of

DEFAULT_REPOSITORY = "willdepueoai/parameter-golf"
VARIANT_REPOSITORIES = {
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    "caseops": "romeerp/parameter-golf-caseops-v1",
    "gpt2": "kjj0/fineweb10B-gpt2",
}
"""Where the variants are that the default repository does not hold."""
DEFAULT_TRAIN_SHARDS = 80
SAFE_NAME = re.compile(r"\w[\w.+-]*")


class DownloadError(DataError):
    """Says that an export can't be had as it was asked for."""


@dataclass(frozen=True)
class HubListing:
    """Holds all files of a repository at one commit, by their path in it."""

    repo_id: str
    revision: str
    """The commit."""
    files: dict[str, FileFacts]
    offline: bool = False
    """Only what is on this machine."""


@dataclass(frozen=True)
class WantedFile:
    """Names a file of the export, and where it goes."""

    remote: str
    local: Path
    kind: str
    """ "val", "val bytes", "train" or "tokenizer"."""
    facts: FileFacts
    facts_from: str
    """Who vouches for its hash: "hub", "manifest", or "" for nobody."""


@dataclass(frozen=True)
class DownloadPlan:
    listing: HubListing
    variant: str
    name: str
    """Of the data set: its folder."""
    folder: Path
    files: list[WantedFile]
    published: dict[str, int]
    """Shards of each split that there are."""
    vocab_size: int | None


def repository_of(variant: str) -> str:
    return VARIANT_REPOSITORIES.get(variant, DEFAULT_REPOSITORY)


def dataset_folders(listing: HubListing) -> list[str]:
    """Lists the folders of the repository that hold shards; "." is its root."""
    return sorted(
        {str(PurePosixPath(path).parent) for path in listing.files if SHARD_NAME.fullmatch(path.split("/")[-1])}
    )


def find_dataset_folder(listing: HubListing, variant: str) -> str:
    """Finds the folder of `variant`: named so, or fineweb10B_<variant>, or the only one with it in its name.

    Raises DownloadError, which says what there is.
    """
    folders = dataset_folders(listing)
    named = [f for f in folders if f.split("/")[-1] in (variant, f"fineweb10B_{variant}")]
    found = named or [f for f in folders if variant == "caseops" and "caseops" in f.split("/")[-1]]
    if not found and folders == ["."]:
        found = folders
    if len(found) == 1:
        return found[0]
    there = ", ".join(f.split("/")[-1] for f in found or folders) or "no shards at all"
    if found:
        raise DownloadError(
            f"{listing.repo_id} has several folders for {variant} ({', '.join(found)}): name one of them"
        )
    where = "the cache has of it" if listing.offline else "it has"
    raise DownloadError(f"{listing.repo_id} does not have {variant}; {where} {there}; other exports: --repo-id")


def manifest_path_of(listing: HubListing, dataset_folder: str) -> str:
    """Returns the path of the export's manifest in the repository; empty where there is none."""
    for root in PurePosixPath(dataset_folder).parents:
        if (path := str(root / "manifest.json")) in listing.files:
            return path
    return ""


def named_entry(manifest: Mapping[str, Any], section: str, name: Any) -> Mapping[str, Any]:
    entries = manifest.get(section)
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return next((entry for entry in entries if name and entry.get("name") == name), {})


def manifest_files(entry: Mapping[str, Any]) -> dict[str, FileFacts]:
    """Returns facts by file name, where an export's manifest has them: a table by name, or a list of named entries."""
    files = entry.get("files", {})
    if isinstance(files, list):
        files = {item.get("name", item.get("path", "")): item for item in files if isinstance(item, dict)}
    if not isinstance(files, dict):
        return {}
    pairs = ((str(name).split("/")[-1], item) for name, item in files.items() if isinstance(item, dict))
    return {name: facts_of_entry(item) for name, item in pairs}


def agreeing_facts(name: str, hub: FileFacts, manifest: FileFacts) -> tuple[FileFacts, str]:
    """Returns what both say, and who vouches for the hash. Raises DownloadError where they contradict each other."""
    for key in ("size", "sha256"):
        told = {getattr(hub, key), getattr(manifest, key)} - {None}
        if len(told) > 1:
            raise DownloadError(f"{name}: the hub and the export's manifest disagree on its {key}; tell its publisher")
    facts_from = "manifest" if manifest.sha256 else "hub" if hub.hashed else ""
    sha256, size = manifest.sha256 or hub.sha256, hub.size if hub.size is not None else manifest.size
    return FileFacts(size, sha256, hub.git_sha1, manifest.tokens), facts_from


def choose_shards(
    listing: HubListing, dataset_folder: str, train_shards: int | None, promised: Mapping[str, Any]
) -> tuple[list[str], dict[str, int]]:
    """Chooses all validation shards, their sidecars and the first training shards, and counts how many there are.

    `promised` is the manifest's count of files. Raises DownloadError when what is asked for is not all there.
    """
    by_split: dict[str, dict[int, str]] = {"val": {}, "val bytes": {}, "train": {}}
    for path in listing.files:
        pure = PurePosixPath(path)
        match = TOKEN_FILE_NAME.fullmatch(pure.name)
        if match and str(pure.parent) == dataset_folder:
            by_split[split_of(pure.name)][int(match["index"])] = path
    published = {split: len(paths) for split, paths in by_split.items()}
    promises = {split: promised.get(f"files_{split}") for split in ("train", "val")}
    promises = {split: count if isinstance(count, int) else 0 for split, count in promises.items()}
    wanted = min(DEFAULT_TRAIN_SHARDS, promises["train"] or published["train"])
    wanted = wanted if train_shards is None else train_shards
    where = "the cache holds" if listing.offline else "there are"
    if wanted > published["train"]:
        raise DownloadError(
            f"{wanted} training shards wanted, {where} {published['train']}: "
            f"ask for --train-shards {published['train']}"
        )
    if published["val"] < max(1, promises["val"]):
        raise DownloadError(f"{where} {published['val']} validation shards of {promises['val'] or 'one or more'}")
    chosen = []
    for split, paths in by_split.items():
        numbers = sorted(paths)[: wanted if split == "train" else None]
        if numbers and (numbers[0] > 1 or numbers[-1] - numbers[0] + 1 != len(numbers)):  # some count from 1
            raise DownloadError(f"{listing.repo_id}, {dataset_folder}: gaps in the numbers of the {split} shards")
        chosen += [paths[number] for number in numbers]
    return chosen, published


def choose_tokenizer(listing: HubListing, dataset_folder: str, entry: Mapping[str, Any], root: str) -> list[str]:
    """Returns the paths of the tokenizer's files, those of the manifest or else the one named like the data set.

    Empty where the export has no tokenizer. Raises DownloadError when it can't be told which one it is.
    """
    named = [entry[key] for key in ("model_path", "vocab_path", "path") if isinstance(entry.get(key), str)]
    if named:
        folder = PurePosixPath(root)
        paths = [str(folder / path) for path in named]
        if missing := [path for path in paths if path not in listing.files and not path.endswith(".vocab")]:
            raise DownloadError(f"{listing.repo_id}: {missing[0]} is in the manifest, but not in the repository")
        return [path for path in paths if path in listing.files]
    there = [
        p for p in listing.files if PurePosixPath(p).parent.name == "tokenizers" and p.endswith((".model", ".json"))
    ]
    stem = dataset_folder.split("/")[-1]
    match = re.fullmatch(r"(\w+?)10B_sp(\d+)(_\w+)?", stem)
    wanted = [f"{match[1]}_{match[2]}_bpe{match[3] or ''}.model"] if match else []
    wanted += ["fineweb_pure_byte_260.json"] if stem.endswith("byte260") else []
    found = [path for path in there if path.split("/")[-1] in wanted] or there
    if len(found) > 1:
        raise DownloadError(f"{listing.repo_id}: can't tell which of {', '.join(found)} is the tokenizer of {stem}")
    return found


def plan_download(
    listing: HubListing,
    variant: str,
    root: Path,
    train_shards: int | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> DownloadPlan:
    """Plans what to fetch into `root`/datasets/<name> and `root`/tokenizers. Raises DownloadError."""
    if train_shards is not None and train_shards < 0:
        raise DownloadError(f"--train-shards {train_shards}: must not be negative")
    dataset_folder = find_dataset_folder(listing, variant)
    name = dataset_folder.split("/")[-1] if dataset_folder != "." else f"fineweb10B_{variant}"
    entry = named_entry(manifest or {}, "datasets", name)
    stats = entry.get("stats") if isinstance(entry.get("stats"), dict) else {}
    shards, published = choose_shards(listing, dataset_folder, train_shards, stats)
    tokenizer = named_entry(manifest or {}, "tokenizers", entry.get("tokenizer_name"))
    export_root = str(PurePosixPath(manifest_path_of(listing, dataset_folder) or ".").parent)
    known = manifest_files(entry) | manifest_files(tokenizer)
    files = []
    for path in shards + choose_tokenizer(listing, dataset_folder, tokenizer, export_root):
        base = path.split("/")[-1]
        local = root / "datasets" / name / base if split_of(base) else root / "tokenizers" / base
        facts, facts_from = agreeing_facts(path, listing.files[path], known.get(base, FileFacts()))
        files.append(WantedFile(path, local, split_of(base) or "tokenizer", facts, facts_from))
    check_local_names([name, *(file.local.name for file in files)])
    vocab_size = entry.get("vocab_size", tokenizer.get("vocab_size"))
    vocab_size = vocab_size if isinstance(vocab_size, int) else None
    return DownloadPlan(listing, variant, name, root / "datasets" / name, files, published, vocab_size)


def check_local_names(names: Sequence[str]) -> None:
    """Raises DownloadError for a name that could leave its folder."""
    for name in names:
        if not SAFE_NAME.fullmatch(name):
            raise DownloadError(f"{name!r} is no name for a file or folder of a download")
