"""Documents from every kind of source, one after the other, in bounded memory.

A source is `embedded`, a file or a folder of files (.txt, .jsonl, .jsonl.xz, .jsonl.zst, .parquet), the id of a
Hugging Face data set (owner/name, or owner/name:folder for a part of it), or a folder of GPT-2 token shards
(modded-nanogpt's), whose text is decoded. Packages that only some kinds need are loaded when such a source is read.
"""

import functools
import hashlib
import importlib
import itertools
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import zstandard

from golf.data.shards import SHARD_NAME, DataError, read_shard
from golf.data.tokenizers_plain import text_module
from lab.prepare.corpus import (
    CORPUS_SUFFIXES,
    EMBEDDED_CORPUS,
    PASSAGE_CHARACTERS,
    cut_passages,
    decode_text,
    embedded_documents,
    json_line_documents,
    json_line_text,
)

SOURCE_SUFFIXES = (*CORPUS_SUFFIXES, ".jsonl.zst", ".parquet")
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(?::(?P<folder>[\w./-]+))?")
GPT2_DOCUMENT_START = 50256
PARQUET_BATCH_ROWS = 256
DECODED_TOKENS = 1 << 22


def iter_documents(source: str | Path, merges: str | Path | None = None) -> Iterator[str]:
    """The documents of `source` in order; those without anything but blanks are left out.

    A source of a single document is cut into passages. `merges` is the GPT-2 merges file, which GPT-2 shards need.
    Raises DataError, also when there is no text at all.
    """
    documents = (text for text in raw_documents(source, merges) if text.strip())
    head = list(itertools.islice(documents, 2))
    if not head:
        raise DataError(f"{source}: no text there; give a file, folder or data set that holds some")
    return iter(cut_passages(head[0])) if len(head) == 1 else itertools.chain(head, documents)


def raw_documents(source: str | Path, merges: str | Path | None) -> Iterator[str]:
    if str(source) == EMBEDDED_CORPUS:
        return embedded_documents()
    if is_hub_source(source):
        return hub_documents(str(source))
    shards = gpt2_shards(Path(source))
    if shards:
        return gpt2_documents(shards, source, merges)
    files = source_files(Path(source))
    if len(files) == 1 and files[0].suffix == ".txt":
        return text_passages(files[0])
    return itertools.chain.from_iterable(map(file_documents, files))


def source_identity(source: str | Path) -> str:
    """What stands for the text of `source` without reading it: Python's version, a revision, or names, sizes, times."""
    if str(source) == EMBEDDED_CORPUS:
        return f"{EMBEDDED_CORPUS}-py{platform.python_version()}"
    if is_hub_source(source):
        revision, names = hub_listing(str(source))
        digest = hashlib.sha256("\n".join([revision, *names]).encode()).hexdigest()
        return f"{re.sub(r'[/:]', '-', str(source))}-{digest[:12]}"
    path = Path(source)
    files = gpt2_shards(path) or source_files(path)
    listing = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in listing]
    return f"{path.resolve().stem}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def source_files(source: Path) -> list[Path]:
    """The text files that `source` stands for, sorted by their path in it. Raises DataError."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; `embedded` is the text that comes with Python")
    paths = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).parts) if source.is_dir() else [source]
    paths = [path for path in paths if path.is_file() and path.name.endswith(SOURCE_SUFFIXES)]
    if not paths:
        raise DataError(f"{source}: text must be in {', '.join(SOURCE_SUFFIXES)} files")
    return paths


def file_documents(path: Path) -> Iterator[str]:
    """Documents of one file; a .txt file is one."""
    if path.suffix == ".txt":
        return iter([decode_text(path.read_bytes(), str(path))])
    if path.suffix == ".parquet":
        return parquet_documents(path)
    return zstd_documents(path) if path.suffix == ".zst" else json_line_documents(path)


def zstd_documents(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as data:
            rest, number = b"", 0
            while block := data.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    if line.strip():
                        yield json_line_text(line, f"{path}, line {number}")
            if rest.strip():
                yield json_line_text(rest, f"{path}, line {number + 1}")
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd data ({error}); make or fetch the file again") from None


def parquet_documents(path: Path) -> Iterator[str]:
    """The column `text`, a few rows at a time."""
    arrow, parquet = optional_package("pyarrow"), optional_package("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path}: no column "text"; it has {", ".join(file.schema_arrow.names)}')
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=["text"], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise DataError(f'{path}: the column "text" holds {type(text).__name__}, not strings')
                    yield text or ""
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a sound parquet file ({reason}); make or fetch it again") from None


def optional_package(name: str) -> ModuleType:
    """The module `name`. Raises DataError where the package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{name} is not installed: pip install -r requirements-data.txt") from None


def is_hub_source(source: str | Path) -> bool:
    """Whether `source` is owner/name or owner/name:folder, and nothing here has that name."""
    name = str(source)
    if name.startswith((".", "/")) or name.endswith((*SOURCE_SUFFIXES, ".bin")):
        return False
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def open_hub(source: str) -> Any:
    """The repository of a data set on the hub, from the cache where huggingface_hub is offline."""
    module = text_module("hub")
    return module.Hub(HUB_ID.fullmatch(source)["repository"], offline=module.is_offline(False))


def hub_listing(source: str) -> tuple[str, list[str]]:
    """Commit and text files of a data set on the hub, sorted by name. Raises DataError."""
    match = HUB_ID.fullmatch(source)
    try:
        listing = replace(open_hub(source), attempts=2).list_files("main", {})  # it may be a mistyped path
    except DataError as error:
        raise DataError(f"{source}: no such file or folder here; {error}") from None
    folder = f"{match['folder'].strip('/')}/" if match["folder"] else ""
    names = [name for name in sorted(listing.files) if name.startswith(folder) and name.endswith(SOURCE_SUFFIXES)]
    if not names:
        raise DataError(f"{source}: the data set holds no {', '.join(SOURCE_SUFFIXES)} files there")
    return listing.revision, names


def hub_documents(source: str) -> Iterator[str]:
    """Documents of a data set on the hub; one file after the other is fetched into the hub's cache."""
    module, hub = text_module("hub"), open_hub(source)
    revision, names = hub_listing(source)
    for name in names:
        with module.told_plainly(hub.repo_id, revision):
            path = hub.patiently(functools.partial(hub.fetch, name, revision))
        yield from file_documents(path)


def gpt2_shards(source: Path) -> list[Path]:
    """Token shards in the folder, the validation shards first, as modded-nanogpt cuts them off the beginning."""
    if not source.is_dir():
        return []
    shards = [path for path in source.iterdir() if SHARD_NAME.fullmatch(path.name)]
    return sorted(shards, key=lambda path: (SHARD_NAME.fullmatch(path.name)["split"] != "val", path.name))


def gpt2_documents(shards: list[Path], source: str | Path, merges: str | Path | None) -> Iterator[str]:
    """Text of GPT-2 token shards, a document from each start token to the next, across the shards."""
    if merges is None:
        raise DataError(f"{source}: GPT-2 token shards can only be decoded with the merges file: give --merges FILE")
    module = text_module("tokenizer_gpt2")
    tokenizer = module.Gpt2Tokenizer(module.gpt2_tokenizer_file(merges), str(merges))
    for ids_N in split_at_starts(shards):
        yield tokenizer.decode(ids_N.tolist())


def split_at_starts(shards: list[Path]) -> Iterator[np.ndarray]:
    """The tokens (N,) between document starts, over the borders of shards; empty documents are left out."""
    waiting: list[np.ndarray] = []
    for path in shards:
        shard = read_shard(path)
        for begin in range(0, len(shard), DECODED_TOKENS):
            block_N = np.array(shard[begin : begin + DECODED_TOKENS])
            parts = np.split(block_N, np.flatnonzero(block_N == GPT2_DOCUMENT_START))
            waiting.append(parts[0])
            for part_N in parts[1:]:  # each begins with a start token, which closes the document before
                if sum(map(len, waiting)):
                    yield np.concatenate(waiting)
                waiting = [part_N[1:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def text_passages(path: Path) -> Iterator[str]:
    """What cut_passages gives of a whole .txt file, a few lines at a time."""
    lines: list[str] = []
    length = position = 0
    with path.open("rb") as file:
        for line in file:
            lines.append(decode_text(line, f"{path}, line at byte {position}"))
            length += len(lines[-1])
            position += len(line)
            if length >= PASSAGE_CHARACTERS:
                yield "".join(lines)
                lines, length = [], 0
    if lines:
        yield "".join(lines)
