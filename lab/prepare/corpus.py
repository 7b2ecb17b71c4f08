"""Documents: the text on every machine that has Python, or the user's own; and their split.

`embedded` is Python's standard library: sources, documentation texts and pydoc's topics. It differs between
Python versions, so a score on it is comparable only under the same data id.
"""

import ast
import hashlib
import json
import lzma
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from golf.data.shards import DataError

EMBEDDED_CORPUS = "embedded"
EMBEDDED_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EMBEDDED_TEXT_SUFFIXES = {".txt", ".rst", ".md"}
CORPUS_SUFFIXES = (".txt", ".jsonl", ".jsonl.xz")
PASSAGE_CHARACTERS = 8192
"""Length of the documents that a single text is cut into."""


@dataclass(frozen=True)
class CorpusSplit:
    """Distinct documents in two lists that share none."""

    train: list[str]
    val: list[str]
    duplicates: int
    """Documents left out because an equal one came before."""


def read_documents(source: str | Path) -> list[str]:
    """Documents of `embedded`, or of a .txt, .jsonl or .jsonl.xz file, or of a folder of them.

    Documents without anything but blanks are left out. Raises DataError.
    """
    documents = embedded_documents() if str(source) == EMBEDDED_CORPUS else path_documents(Path(source))
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"{source}: no text there; give a .txt, .jsonl or .jsonl.xz file, or a folder of them")
    return documents


def corpus_files(source: Path) -> list[Path]:
    """The text files that `source` stands for, sorted by their path in it."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; `embedded` is the text that comes with Python")
    paths = sorted(source.rglob("*"), key=lambda path: path.relative_to(source).parts) if source.is_dir() else [source]
    paths = [path for path in paths if path.is_file() and path.name.endswith(CORPUS_SUFFIXES)]
    if not paths:
        raise DataError(f"{source}: text must be in {', '.join(CORPUS_SUFFIXES)} files")
    return paths


def path_documents(source: Path) -> Iterator[str]:
    for path in corpus_files(source):
        if path.suffix == ".txt":
            yield decode_text(path.read_bytes(), str(path))
        else:
            yield from json_line_documents(path)


def json_line_documents(path: Path) -> Iterator[str]:
    """The `text` of each line of a JSON-lines file; empty lines are left out."""
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield json_line_text(line, f"{path}, line {number}")
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: damaged xz data ({error}); make or fetch the file again") from None


def json_line_text(line: bytes, place: str) -> str:
    try:
        record = json.loads(decode_text(line, place))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{place}: no string field "text"; each line must look like {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: the text holds half of a surrogate pair, which is no Unicode text") from None
    return text


def decode_text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start}); convert the text to UTF-8") from None


def embedded_documents() -> Iterator[str]:
    """Sources and texts of the running Python's standard library, sorted by path, each once.

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
    """Texts of the dictionary `topics` in pydoc's module of topics."""
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    values = [node.value for node in assignments if ast.unparse(node.targets[0]) == "topics"]
    return list(ast.literal_eval(values[0]).values()) if values else []


def document_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def cut_passages(text: str) -> list[str]:
    """The text in passages of at least PASSAGE_CHARACTERS (the last may be shorter) that end with a line."""
    passages, start = [], 0
    while start < len(text):
        line_end = text.find("\n", start + PASSAGE_CHARACTERS - 1)
        end = len(text) if line_end < 0 else line_end + 1
        passages.append(text[start:end])
        start = end
    return passages


def split_documents(documents: Sequence[str], val_fraction: float, seed: int = 0) -> CorpusSplit:
    """Split distinct documents by the hash of their text; `seed` gives the order of the training documents.

    A document's side depends on its text alone (and `val_fraction`). A corpus of one document is cut into
    passages first. Raises DataError when there are too few to split.
    """
    if len(documents) == 1:
        documents = cut_passages(documents[0])
    train, val = split_digests([document_digest(text) for text in documents], val_fraction, seed)
    duplicates = len(documents) - len(train) - len(val)
    return CorpusSplit([documents[number] for number in train], [documents[number] for number in val], duplicates)


def split_digests(digests: Sequence[bytes], val_fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of the training and the validation documents, in their orders; of equal ones only the first.

    About 200 bytes of memory a document. Raises DataError.
    """
    check_val_fraction(val_fraction)
    first: dict[bytes, int] = {}
    for number, digest in enumerate(digests):
        first.setdefault(digest, number)
    if len(first) < 2:
        raise DataError("the corpus is one short document: it takes two, one to train on and one to validate on")
    val_digests = {digest for digest in first if is_held_out(digest, val_fraction)}
    if not val_digests:  # a small corpus: the document that a slightly larger fraction would have taken
        val_digests = {min(first)}
    if len(val_digests) == len(first):
        val_digests.remove(max(first))
    train_digests = [digest for digest in first if digest not in val_digests]
    train_digests.sort(key=lambda digest: hashlib.sha256(b"%d:" % seed + digest).digest())
    return [first[digest] for digest in train_digests], [n for digest, n in first.items() if digest in val_digests]


def check_val_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must be between 0 and 1")


def is_held_out(digest: bytes, val_fraction: float) -> bool:
    """Whether the document with this hash is on the validation side."""
    return int.from_bytes(digest[:8], "big") < int(val_fraction * 2**64)
