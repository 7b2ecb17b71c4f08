"""Reads documents from every kind of source, one after the other, in bounded memory.

A source is `embedded`, a file or a folder of files (.txt, .jsonl, .jsonl.xz, .jsonl.zst, .parquet), the id of a
Hugging Face data set (owner/name, or owner/name:folder for a part of it), or a folder of GPT-2 token shards
(modded-nanogpt's), whose text is decoded. Packages that only some kinds need are loaded when such a source is read.

`embedded` is Python's standard library: sources, documentation texts and pydoc's topics. It differs between
Python versions, so a score on it is comparable only under the same data id.
"""

import ast
import codecs
import functools
import hashlib
import io
import itertools
import lzma
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import zstandard

from golf.config.knobs import parse_json
from golf.data.shards import SHARD_NAME, DataError
from lab.prepare.text_tokenizer import PlainTokenizer, gpt2_tokenizer_file, optional_package
from lab.probe.documents import shard_documents

EMBEDDED_CORPUS = "embedded"
EMBEDDED_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EMBEDDED_TEXT_SUFFIXES = {".txt", ".rst", ".md"}
SOURCE_SUFFIXES = (".txt", ".jsonl", ".jsonl.xz", ".jsonl.zst", ".parquet")
PASSAGE_CHARACTERS = 8192
"""Length of the documents that a single text is cut into."""
LONGEST_LINE = 2 * PASSAGE_CHARACTERS
"""Longer lines are cut too."""
READ_BYTES, FED_BYTES = 1 << 16, 1 << 10
"""Most bytes of a line that are read at once, and compressed ones that a decoder gets at once: they may become many."""
LARGEST_WINDOW = 1 << 31
"""Memory that a zstd frame may ask for: zstd's own largest, of --long=31."""
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(?::(?P<folder>[\w./-]+))?")
LINE_CUTS = (re.compile(r"\r"), re.compile(r"\s"))
GPT2_DOCUMENT_START = 50256
PARQUET_BATCH_ROWS = 256


def iter_documents(source: str | Path, merges: str | Path | None = None) -> Iterator[str]:
    """Yields the documents of `source` in order; those without anything but blanks are left out.

    A source of a single document is cut into passages. `merges` is the GPT-2 merges file, which GPT-2 shards need.
    Raises DataError, also when there is no text at all.
    """
    documents = (text for text in raw_documents(source, merges) if text.strip())
    head = list(itertools.islice(documents, 2))
    if not head:
        raise DataError(f"{source}: no text there; give a file, folder or data set that holds some")
    return cut_passages(io.StringIO(head[0], newline="\n")) if len(head) == 1 else itertools.chain(head, documents)


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
        return cut_passages(text_lines(files[0]))
    return itertools.chain.from_iterable(map(file_documents, files))


def source_identity(source: str | Path) -> str:
    """Names the text of `source` without reading it, by Python's version, a revision, or names, sizes and times."""
    if str(source) == EMBEDDED_CORPUS:
        return f"{EMBEDDED_CORPUS}-py{platform.python_version()}"
    if is_hub_source(source):
        revision, names = hub_listing(str(source))
        name, lines = re.sub(r"[/:]", "-", str(source)), [revision, *names]
    else:
        path = Path(source)
        listing = [(file.relative_to(path).as_posix(), file.stat()) for file in gpt2_shards(path) or source_files(path)]
        name, lines = path.resolve().stem, [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in listing]
    listed = chr(10).join(lines).encode(errors="surrogateescape")
    return f"{name}-{hashlib.sha256(listed).hexdigest()[:12]}"


def source_files(source: Path) -> list[Path]:
    """Lists the text files that `source` stands for, sorted by their path in it, without names that begin with a dot.

    Raises DataError.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; `embedded` is the text that comes with Python")
    paths = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).parts) if source.is_dir() else [source]
    paths = [path for path in paths if path.is_file() and path.name.endswith(SOURCE_SUFFIXES)]
    paths = [path for path in paths if not is_hidden(path.relative_to(source))]
    if not paths:
        raise DataError(f"{source}: text must be in {', '.join(SOURCE_SUFFIXES)} files")
    return paths


def is_hidden(path: PurePath) -> bool:
    """Says whether a name in a relative path begins with a dot: what systems and editors leave, not people's text."""
    return any(part.startswith(".") for part in path.parts)


# ---- files ----


def file_documents(path: Path) -> Iterator[str]:
    """Yields the documents of one file; a .txt file is one."""
    if path.suffix == ".txt":
        return iter([decode_text(path.read_bytes(), str(path))])
    return parquet_documents(path) if path.suffix == ".parquet" else json_line_documents(path)


def json_line_documents(path: Path) -> Iterator[str]:
    """Yields the `text` of each line of a JSON-lines file, bare or in xz or zstd; empty lines are left out."""
    try:
        with open_lines(path) as lines:
            parts = itertools.chain.from_iterable(map(bytes.splitlines, lines))  # some end lines in CR alone
            for number, line in enumerate(parts, start=1):
                if line.strip():
                    yield json_line_text(line, f"{path}, line {number}")
    except (lzma.LZMAError, EOFError, MemoryError, zstandard.ZstdError) as error:
        kind = "zstd" if path.suffix == ".zst" else "xz"
        if isinstance(error, MemoryError) or "memory" in str(error):
            found = f"its {kind} window is larger than this machine can hold, or than 2 GiB"
            raise DataError(f"{path}: {found}; compress it again with a smaller one (zstd --long=27)") from None
        raise DataError(f"{path}: damaged {kind} data ({error}); make or fetch the file again") from None


def open_lines(path: Path) -> Any:
    if path.suffix == ".zst":
        new_decoder = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj
        return io.BufferedReader(ChunkStream(decompressed(path, new_decoder)), 1 << 20)
    if path.suffix == ".xz":
        return io.BufferedReader(ChunkStream(decompressed(path, lzma.LZMADecompressor, padding=b"\0")), 1 << 20)
    return path.open("rb")


def decompressed(path: Path, new_decoder: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    """Yields what the compressed streams of a file hold, one after the other (parallel writers make several).

    Raises EOFError where the last one does not reach its end, and the decoder's error for anything else between them
    than `padding`.
    """
    decoder, data = new_decoder(), b""
    with path.open("rb") as file:
        while data := data or file.read(FED_BYTES):
            if decoder is None:
                data = data.lstrip(padding) if padding else data
                if not data:
                    continue
                decoder = new_decoder()
            yield decoder.decompress(data)
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("it ends before its end-of-stream mark: a part is missing")


class ChunkStream(io.RawIOBase):
    """Lets chunks of bytes be read as a file is."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.left = memoryview(chunk)
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count


def json_line_text(line: bytes, place: str) -> str:
    """Returns the field "text" of a line, empty for null. Raises DataError."""
    content = decode_text(line, place)
    try:
        record = parse_json(content)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from None
    text = record.get("text", 0) if isinstance(record, dict) else 0
    if not isinstance(text, str | None):
        raise DataError(f'{place}: no string field "text"; each line must look like {{"text": "..."}}')
    return text or ""


def decode_text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start}); convert the text to UTF-8") from None


def text_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a .txt file, long ones in parts. Raises DataError, which says where it is not UTF-8."""
    position, decoder = 0, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        for part in itertools.chain(iter(functools.partial(file.readline, READ_BYTES), b""), [b""]):
            try:
                yield decoder.decode(part, final=part[-1:] in (b"\n", b""))
            except UnicodeDecodeError as error:
                place = f"{path}, line at byte {position}"
                raise DataError(f"{place}: not UTF-8 (byte {error.start}); convert the text to UTF-8") from None
            position += len(part)


def cut_passages(lines: Iterable[str]) -> Iterator[str]:
    """Joins a text's lines to passages of PASSAGE_CHARACTERS or a little more; the last may be shorter.

    Lines that are too long are cut. `lines` may come in parts; only the last of a line ends in a line feed.
    """
    waiting: list[str] = []
    length = 0
    for line in cut_lines(lines):
        waiting.append(line)
        length += len(line)
        if length >= PASSAGE_CHARACTERS:
            yield "".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield "".join(waiting)


def cut_lines(parts: Iterable[str]) -> Iterator[str]:
    """Yields lines of at most LONGEST_LINE characters; longer ones are cut at CRs, else at blanks, else anywhere."""
    rest = ""
    for part in parts:
        rest += part
        begin = 0
        while len(rest) - begin > LONGEST_LINE:
            least = begin + PASSAGE_CHARACTERS
            ends = (pattern.search(rest, least, begin + LONGEST_LINE) for pattern in LINE_CUTS)
            end = next((match.end() for match in ends if match), least)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
        if rest.endswith("\n"):
            yield rest
            rest = ""
    if rest:
        yield rest


def parquet_documents(path: Path) -> Iterator[str]:
    """Yields the column `text`, a few rows at a time. Raises DataError."""
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


# ---- the standard library ----


def embedded_documents() -> Iterator[str]:
    """Yields sources and texts of the running Python's standard library, sorted by path, each once.

    Left out: tests, installed packages, tables that a program wrote (codecs, build settings), and files that
    are not in the encoding they declare. Works with what is there (distributions leave parts out).
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(library.rglob("*"), key=lambda path: path.relative_to(library).parts):
        if EMBEDDED_SKIPPED_FOLDERS.intersection(path.relative_to(library).parts) or not path.is_file():
            continue
        for text in embedded_file_documents(path):
            if text not in seen:
                seen.add(text)
                yield text


def embedded_file_documents(path: Path) -> list[str]:
    try:
        if path.suffix in EMBEDDED_TEXT_SUFFIXES:
            return [path.read_text(encoding="utf-8")]
        if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):
            return []
        with tokenize.open(path) as file:
            source = file.read()
    except (UnicodeDecodeError, SyntaxError):
        return []
    if path.parent.name == "encodings" and "generated from '" in source[:500]:
        return []
    return pydoc_topics(source) if path.parts[-2:] == ("pydoc_data", "topics.py") else [source]


def pydoc_topics(source: str) -> list[str]:
    """Returns the texts of the dictionary `topics` in pydoc's module of topics."""
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    values = [node.value for node in assignments if ast.unparse(node.targets[0]) == "topics"]
    return list(ast.literal_eval(values[0]).values()) if values else []


# ---- the hub ----


def is_hub_source(source: str | Path) -> bool:
    """Says whether `source` is owner/name or owner/name:folder, and nothing here has that name."""
    name = str(source)
    if name.startswith((".", "/")) or name.endswith((*SOURCE_SUFFIXES, ".bin")):
        return False
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def open_hub(source: str) -> Any:
    """Opens the repository of a data set on the hub, from the cache where huggingface_hub is offline."""
    return optional_package("lab.prepare.hub").Hub(HUB_ID.fullmatch(source)["repository"])


def hub_listing(source: str) -> tuple[str, list[str]]:
    """Asks for the commit and the text files of a data set on the hub, sorted by name. Raises DataError."""
    match = HUB_ID.fullmatch(source)
    try:
        listing = replace(open_hub(source), attempts=2).list_files("main", {})  # it may be a mistyped path
    except DataError as error:
        raise DataError(f"{source}: no such file or folder here; {error}") from None
    folder = f"{match['folder'].strip('/')}/" if match["folder"] else ""
    names = [name for name in sorted(listing.files) if name.startswith(folder) and name.endswith(SOURCE_SUFFIXES)]
    names = [name for name in names if not is_hidden(PurePath(name.removeprefix(folder)))]
    if not names:
        raise DataError(f"{source}: the data set holds no {', '.join(SOURCE_SUFFIXES)} files there")
    return listing.revision, names


def hub_documents(source: str) -> Iterator[str]:
    """Yields the documents of a data set on the hub; one file after the other is fetched into the hub's cache."""
    hub, (revision, names) = open_hub(source), hub_listing(source)
    for name in names:
        yield from file_documents(hub.ask(functools.partial(hub.fetch, name, revision), revision))


# ---- GPT-2 token shards ----


def gpt2_shards(source: Path) -> list[Path]:
    """Lists token shards, those of validation first, as modded-nanogpt cuts them off the beginning."""
    if not source.is_dir():
        return []
    shards = [path for path in source.iterdir() if SHARD_NAME.fullmatch(path.name) and path.name[0] != "."]
    return sorted(shards, key=lambda path: (SHARD_NAME.fullmatch(path.name)["split"] != "val", path.name))


def gpt2_documents(shards: list[Path], source: str | Path, merges: str | Path | None) -> Iterator[str]:
    """Yields the text of GPT-2 token shards, a document from each start token to the next, across the shards."""
    if merges is None:
        raise DataError(f"{source}: GPT-2 token shards can only be decoded with the merges file: give --merges FILE")
    tokenizer = PlainTokenizer(gpt2_tokenizer_file(merges), str(merges))
    return (tokenizer.decode(ids_N.tolist()) for ids_N in shard_documents(shards, GPT2_DOCUMENT_START))
