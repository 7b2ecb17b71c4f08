"""Checks that token files are what they must be: sizes, headers, hashes, numbering, no shard in another's place.

What must be true comes from the folder's own record: manifest.json (data/prepare.py) or downloads.json
(data/download.py). Without either, only what the files say of themselves can be checked. `quick` reads headers and
the ends of files, `full` reads everything.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from golf.config.knobs import parse_json
from golf.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, data_identity
from golf.data.shards import SHARD_HEADER_BYTES, SHARD_NAME, DataError, ShardError, shard_token_count
from golf.data.sidecar import sidecar_path

DOWNLOADS_NAME = "downloads.json"
TOKEN_FILE_NAME = re.compile(r"(?P<dataset>[^.].*)_(?P<split>train|val|val_bytes)_(?P<index>\d{6})\.bin")
"""A shard, or the sidecar of a validation shard: the bytes of text that each of its tokens stands for."""
SCAN_BLOCK_BYTES = 1 << 22
ENDS_BYTES = 4096
"""Bytes at either end of a file that stand for its content in a quick check."""


@dataclass(frozen=True)
class FileFacts:
    """Holds what is known of a file before it is looked at; None: not known."""

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """Hash that git gives the file; the hub knows it of small files, and SHA-256 of large ones."""
    tokens: int | None = None
    ends: str | None = None
    """`ends_fingerprint` of the file."""

    @property
    def hashed(self) -> bool:
        return bool(self.sha256 or self.git_sha1)


@dataclass(frozen=True)
class FileScan:
    """Holds what reading a whole file tells."""

    sha256: str
    git_sha1: str
    largest_token: int
    """-1 for what is not a shard of tokens."""


@dataclass(frozen=True)
class FileProblem:
    file: str
    problem: str


@dataclass(frozen=True)
class FolderFacts:
    """Holds the record of a folder."""

    source: str
    """Name of the file that holds it; empty where there is none."""
    files: dict[str, FileFacts]
    """By path in the folder; downloaded tokenizers lie outside of it."""
    split_tokens: dict[str, int] = field(default_factory=dict)
    tokenizer_sha256: str = ""
    vocab_size: int = 2**16


@dataclass
class FolderReport:
    """Holds what was found in a folder."""

    folder: Path
    facts_from: str
    full: bool
    files: int = 0
    size: int = 0
    unhashed: int = 0
    """Files that no recorded hash vouches for."""
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of "train", "val" and "val bytes": shards and tokens."""
    data_id: str = ""
    problems: list[FileProblem] = field(default_factory=list)


@dataclass(frozen=True)
class KnownTokenizer:
    """Holds what data_identity asks of a tokenizer, without loading it."""

    name: str
    sha256: str


def is_token_file(name: str) -> bool:
    return TOKEN_FILE_NAME.fullmatch(name) is not None


def split_of(name: str) -> str:
    """Returns "train", "val" or "val bytes"; empty for a file without tokens."""
    match = TOKEN_FILE_NAME.fullmatch(name)
    return match["split"].replace("_", " ") if match else ""


def ends_fingerprint(path: Path) -> str:
    """Returns 16 hex digits of a file's size and its first and last 4 KiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(b"%d\n" % size + file.read(ENDS_BYTES))
        file.seek(max(0, size - ENDS_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def scan_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> FileScan:
    """Reads a whole file in bounded memory; `advance` is told of bytes read. Lets other threads run meanwhile."""
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    wants_tokens = SHARD_NAME.fullmatch(path.name) is not None
    largest, skipped = -1, SHARD_HEADER_BYTES
    with path.open("rb") as file:
        while block := file.read(SCAN_BLOCK_BYTES):
            sha256.update(block)
            git_sha1.update(block)
            if wants_tokens and len(block) - skipped > 1:
                tokens_N = np.frombuffer(block, "<u2", (len(block) - skipped) // 2, skipped)
                largest = max(largest, int(tokens_N.max()))
            skipped = 0
            advance(len(block))
    return FileScan(sha256.hexdigest(), git_sha1.hexdigest(), largest)


def quick_problem(path: Path, facts: FileFacts) -> str:
    """Returns what is wrong with a file, by its size, its header and its ends; empty when nothing is."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size == 0:
        return "empty (0 bytes)"
    if facts.size is not None and size != facts.size:
        return f"{'truncated' if size < facts.size else 'too long'}: {size} bytes, must be {facts.size}"
    if is_token_file(path.name):
        try:
            count = shard_token_count(path)
        except ShardError as error:
            return str(error).removeprefix(f"{path}: ").split("; ")[0]
        if facts.tokens is not None and count != facts.tokens:
            return f"{count} tokens, must be {facts.tokens}"
    if facts.ends and ends_fingerprint(path) != facts.ends:
        return "not the file that was recorded (other first or last 4 KiB)"
    return ""


def scan_problem(scan: FileScan, facts: FileFacts, vocab_size: int = 2**16) -> str:
    """Returns what reading the whole file shows to be wrong; empty when nothing is."""
    for name, found, expected in (("SHA-256", scan.sha256, facts.sha256), ("git SHA-1", scan.git_sha1, facts.git_sha1)):
        if expected and found != expected:
            return f"damaged, or another file: {name} {found[:12]}..., must be {expected[:12]}..."
    if scan.largest_token >= vocab_size:
        return f"holds token {scan.largest_token}, but its tokenizer has {vocab_size} pieces: shards of another one"
    return ""


def read_data_record(path: Path) -> dict[str, Any]:
    """Reads the JSON object in `path`; empty where there is no file. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        record = parse_json(path.read_bytes())
        if not isinstance(record["files"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        advice = "delete it and run data/download.py again" if path.name == DOWNLOADS_NAME else "prepare the data again"
        raise DataError(f"{path}: not a record of data files; {advice}") from None
    return record


def facts_of_entry(entry: Mapping[str, Any]) -> FileFacts:
    """Returns the facts in the entry of a file in a record or an export's manifest."""
    size = entry.get("bytes", entry.get("size"))
    return FileFacts(size, entry.get("sha256"), entry.get("git_sha1"), entry.get("tokens"), entry.get("ends"))


def read_folder_facts(folder: Path) -> FolderFacts:
    """Reads the record of `folder`, as far as there is one. Raises DataError."""
    for name in (MANIFEST_NAME, DOWNLOADS_NAME):
        if record := read_data_record(folder / name):
            break
    else:
        return FolderFacts("", {})
    try:
        files = {file: facts_of_entry(entry) for file, entry in record["files"].items()}
        tokens = {split: counts["tokens"] for split, counts in record.get("splits", {}).items()}
        tokenizer = record.get("tokenizer") or {}
        return FolderFacts(name, files, tokens, tokenizer.get("sha256", ""), tokenizer.get("vocab_size") or 2**16)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{folder / name}: not a record of data files; make it again (data/README.md)") from None


def verify_folder(
    folder: Path, full: bool = False, workers: int = 4, advance: Callable[[int], None] = lambda count: None
) -> FolderReport:
    """Checks all that lies in a folder of shards and all that its record says of it. Raises DataError.

    `advance` is told of bytes read, from `workers` threads.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one of token shards (data/README.md)")
    facts = read_folder_facts(folder)
    on_disk = {path.name for path in folder.iterdir() if is_token_file(path.name)}
    if not facts.files and not on_disk:
        raise DataError(f"{folder}: no token shards there; prepare or download them (data/README.md)")
    names = sorted(on_disk | facts.files.keys())
    report = FolderReport(folder, facts.source, full, len(names))

    def check(name: str) -> tuple[str, str]:
        """Returns problem and content identity of a file."""
        path, known = folder / name, facts.files.get(name, FileFacts())
        if problem := quick_problem(path, known):
            return problem, ""
        if not full and is_token_file(name):
            return "", ends_fingerprint(path)
        scan = scan_file(path, advance)  # what is not a shard is small
        return scan_problem(scan, known, facts.vocab_size), scan.sha256

    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(names, pool.map(check, names), strict=True))
    report.problems = [FileProblem(name, problem) for name, (problem, _) in results.items() if problem]
    report.unhashed = sum(not facts.files.get(name, FileFacts()).hashed for name in names)
    if facts.source:
        report.problems += [
            FileProblem(name, f"not in {facts.source}") for name in sorted(on_disk - facts.files.keys())
        ]
    sound = {name: identity for name, (problem, identity) in results.items() if not problem}
    count_splits(report, [name for name in sound if is_token_file(name)])
    report.problems += folder_problems(report, facts, names)
    report.problems += repeated_problems((name, sound[name]) for name in sound if is_token_file(name))
    report.problems += tokenizer_problems(folder, facts)
    if not report.problems and facts.tokenizer_sha256:
        report.data_id = data_identity(folder, KnownTokenizer(str(folder / TOKENIZER_NAME), facts.tokenizer_sha256))
    return report


def count_splits(report: FolderReport, token_files: Iterable[str]) -> None:
    for name in token_files:
        counts = report.splits.setdefault(split_of(name), {"shards": 0, "tokens": 0})
        counts["shards"] += 1
        counts["tokens"] += shard_token_count(report.folder / name)
        report.size += (report.folder / name).stat().st_size


def folder_problems(report: FolderReport, facts: FolderFacts, names: Iterable[str]) -> list[FileProblem]:
    """Returns what is wrong with the set of files, rather than with one of them."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := TOKEN_FILE_NAME.fullmatch(name):
            numbers.setdefault((match["dataset"], split_of(name)), set()).add(int(match["index"]))
    sizes: Counter[str] = Counter()
    for (dataset, _), found in numbers.items():
        sizes[dataset] += len(found)
    others = [dataset for dataset, _ in sizes.most_common()[1:]]  # the one with most shards is the folder's
    problems = [FileProblem(f"{dataset}_*", "shards of another data set") for dataset in others]
    for (dataset, split), found in numbers.items():
        first = min(1, min(found))  # some exports count from 1
        if gaps := sorted(set(range(first, max(found))) - found):
            label = f"{dataset}_{split.replace(' ', '_')}_{gaps[0]:06d}.bin"
            problems.append(FileProblem(label, f"missing: {len(gaps)} gap(s) in the numbering up to {max(found)}"))
    splits = {split for _, split in numbers}
    problems += [FileProblem(f"*_{s}_*", "no shards of this split") for s in ("train", "val") if s not in splits]
    for split, expected in facts.split_tokens.items():
        found_tokens = report.splits.get(split, {"tokens": 0})["tokens"]
        if found_tokens != expected and not report.problems:
            problems.append(FileProblem(f"*_{split}_*", f"{found_tokens} tokens, must be {expected}"))
    if "val bytes" in splits:
        problems += sidecar_problems(report.folder, names)
    if "train" in report.splits and leaks(**report.splits["train"]):
        problems.append(FileProblem("*_train_*", LEAK))
    return problems


LEAK = (
    "these are as many shards and tokens as two exports that hold 40,000 of the validation documents (made with"
    " --val-docs 10000): download the published ones (data/README.md)"
)


def leaks(shards: int, tokens: int) -> bool:
    """Returns whether training shards have the fingerprint of a known leak: 1,499 of them, or 800 million tokens in 80
    (parameter-golf issue 2127)."""
    return shards == 1499 or (shards == 80 and round(tokens / 1e6) == 800)


def sidecar_problems(folder: Path, names: Iterable[str]) -> list[FileProblem]:
    """Finds byte counts that do not belong to the validation shard beside them."""
    problems, whole = [], [name for name in names if not quick_problem(folder / name, FileFacts())]
    for name in (name for name in whole if split_of(name) == "val"):
        sidecar, tokens = sidecar_path(name).name, shard_token_count(folder / name)
        if not (folder / sidecar).is_file():
            problems.append(FileProblem(sidecar, f"missing: the byte counts of {name}"))
        elif sidecar in whole and (counts := shard_token_count(folder / sidecar)) != tokens:
            problems.append(FileProblem(sidecar, f"{counts} byte counts for the {tokens} tokens of {name}"))
    return problems


def repeated_problems(identities: Iterable[tuple[str, str]]) -> list[FileProblem]:
    """Finds files with the content of an earlier one: a shard in another's place."""
    first: dict[str, str] = {}
    return [
        FileProblem(name, f"has the content of {first[identity]}")
        for name, identity in identities
        if first.setdefault(identity, name) != name
    ]


def tokenizer_problems(folder: Path, facts: FolderFacts) -> list[FileProblem]:
    """Finds a record whose tokenizer file is not the one that it names."""
    files = {name: known for name, known in facts.files.items() if not is_token_file(name)}
    hashes = {known.sha256 for name, known in files.items() if name.endswith((".model", ".json"))}
    if facts.tokenizer_sha256 and hashes and facts.tokenizer_sha256 not in hashes:
        return [FileProblem(facts.source, "names a tokenizer that is not among its files")]
    return []
