"""Encodes and decodes text with every kind of tokenizer whose identity and bytes golf/data/tokenizer.py knows.

CaseOps is a lossless way to write text without capital letters (parameter-golf PR #1729). Every maximal run of ASCII
letters is written in lower case. Operators from the private use area say what it was: ALLCAPS in front of a run of two
or more capitals, TITLE in front of one that begins with a capital, CAPNEXT in front of any other capital. An operator
that is in the text itself has ESC in front. Nothing else changes.

Shape letters: N bytes or tokens, U capital letters, K operators.
"""

import importlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from golf.data.shards import DataError
from golf.data.tokenizer import (
    BLANK,
    CASE_OPERATORS,
    CONTROL_UNITS,
    MOST_CHARACTERS,
    ByteTable,
    SentencePieceModel,
    Tokenizer,
    UnitVocabulary,
    gpt2_units,
    read_tokenizer_file,
)

TITLE, ALLCAPS, CAPNEXT, ESC = range(4)
OPERATOR_BYTES = np.array([list(operator.encode()) for operator in CASE_OPERATORS], dtype=np.uint8)
LITERAL_OPERATOR = re.compile(f"[{CASE_OPERATORS}]")
MARKED_SPAN = re.compile("{3}[{0}-{3}]?|{1}[a-z]*|{0}[a-z]?|{2}[a-z]?".format(*CASE_OPERATORS))
"""What one operator acts on."""
PLAIN = " \t\n  a\r\n \ufb01\u00c5\uff21A\u0301\0 "
"""Text that no normalisation leaves as it is."""


def optional_package(name: str) -> ModuleType:
    """Imports the module `name`. Raises DataError where a package that it takes is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).split(".")[0]
        raise DataError(f"{missing} is not installed: pip install -r requirements-data.txt") from None


class TextTokenizer(Tokenizer):
    """Encodes and decodes text, whatever the kind of tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one document, without BOS."""
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encodes many documents as `encode` does each; `threads` are used where the library takes them."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of one document (normalised, where the tokenizer does that).

        Control ids decode to nothing, bytes that are no UTF-8 to U+FFFD.
        """
        raise NotImplementedError

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """Counts the bytes of text that each token of a stream stands for, int64: over a document, its decoded text's.

        The first token counts as the start of a document. Raises DataError.
        """
        raise NotImplementedError


class SentencePieceTokenizer(SentencePieceModel, TextTokenizer):
    """Runs a SentencePiece model; one of the kind caseops writes and reads text in CaseOps."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        super().__init__(model, name)
        blank_id = self.processor.piece_to_id(BLANK)
        self.blank_id: int | None = None if self.processor.is_unknown(blank_id) else blank_id
        self.swallows_blanks = self.blank_id is not None and self.processor.decode([self.blank_id] * 2) == ""
        self.blank_bytes = [self.processor.piece_to_id(f"<0x{value:02X}>") for value in BLANK.encode()]
        twice = self.processor.decode(2 * self.processor.encode(PLAIN))
        self.keeps_text = all(map(self.processor.is_byte, self.blank_bytes)) and twice == 2 * PLAIN
        """Whether any text comes back as it was; others normalise it, and read U+2581 as a blank."""

    def trim_start(self, ids: list[int]) -> list[int]:
        """Leaves out bare blanks in front, where decoding swallows all of them.

        Only text that starts with a literal U+2581 has them there; without them the bytes of a token
        depend on nothing but the token before it.
        """
        first = 0
        while self.swallows_blanks and first < len(ids) and ids[first] == self.blank_id:
            first += 1
        return ids[first:]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        written = [encode_caseops(text) for text in texts] if self.kind == "caseops" else list(texts)
        marked = [number for number, text in enumerate(written) if self.keeps_text and BLANK in text]
        encoded = self.processor.encode(written, num_threads=threads)
        for number in marked:
            encoded[number] = self.encode_marked(written[number])
        return [self.trim_start(ids) for ids in encoded]

    def encode_marked(self, text: str) -> list[int]:
        """Encodes text with U+2581 in it, which is a blank to SentencePiece and is spelled in bytes here."""
        first, *others = self.processor.encode(text.split(BLANK))
        return first + [token for ids in others for token in (*self.blank_bytes, *ids)]

    def decode(self, ids: Sequence[int]) -> str:
        text = self.processor.decode([int(token) for token in ids])
        return decode_caseops(text) if self.kind == "caseops" else text

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        ids_N = np.asarray(ids_N, dtype=np.int64)
        bytes_N = ByteTable(self).count(np.concatenate([[self.bos_id], ids_N])[:-1], ids_N)
        if self.kind == "caseops":
            bytes_N += len(BLANK.encode()) * literal_operators(ids_N, self.operators)
        return bytes_N


class PlainTokenizer(UnitVocabulary, TextTokenizer):
    """Encodes as bytes, characters, or by GPT-2's byte pairs, which tiktoken joins."""

    @cached_property
    def character_ids(self) -> dict[str, tuple[int, ...]]:
        first, last = len(CONTROL_UNITS), self.vocab_size - 256
        return {self.units[token].decode(): (token,) for token in range(first, last)}

    @cached_property
    def gpt2_encoding(self) -> Any:
        ranks = {unit: rank for rank, unit in enumerate(self.units[:-1])}
        pattern = optional_package("tiktoken_ext.openai_public").r50k_pat_str
        settings = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": {}}
        return optional_package("tiktoken").Encoding("golf-gpt2", **settings)

    def spell(self, character: str) -> tuple[int, ...]:
        """Returns the ids of the bytes of a character that is not in the vocabulary."""
        return tuple(self.vocab_size - 256 + value for value in character.encode())

    def encode(self, text: str) -> list[int]:
        if self.kind == "gpt2":
            return self.gpt2_encoding.encode_ordinary(text)
        if not self.character_ids:
            return (np.frombuffer(text.encode(), np.uint8).astype(int) + len(CONTROL_UNITS)).tolist()
        return [token for character in text for token in self.character_ids.get(character) or self.spell(character)]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        if self.kind == "gpt2":
            return self.gpt2_encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.units[int(token)] for token in ids).decode(errors="replace")

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.token_bytes[2][np.asarray(ids_N, dtype=np.int64)]


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Loads the tokenizer in a SentencePiece .model file, or in the .json file of one without. Raises DataError."""
    kind = PlainTokenizer if Path(path).suffix == ".json" else SentencePieceTokenizer
    return kind(read_tokenizer_file(path), str(path))


def check_byte_counts(
    tokenizer: TextTokenizer, counter: ByteTable | Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray
) -> int:
    """Counts the bytes of the stream `ids` by a table, or by the bytes of each of its tokens.

    Raises DataError unless every document decodes to as many. A document is what stands between control ids. The
    first token counts as the start of a document.
    """
    ids_N = np.concatenate([[tokenizer.bos_id], np.asarray(ids, dtype=np.int64)])
    is_table = isinstance(counter, ByteTable)
    counts_N = counter.count(ids_N[:-1], ids_N[1:]) if is_table else np.asarray(counter, dtype=np.int64)
    assert len(counts_N) == len(ids_N) - 1, f"bytes of {len(counts_N)} tokens, not {len(ids_N) - 1}"
    counts_N = np.concatenate([[0], counts_N])
    boundary_V = tokenizer.token_bytes[1]
    edges = [*np.flatnonzero(boundary_V[ids_N]), len(ids_N)]
    source = f"the byte table of {tokenizer.name} counts" if is_table else "its tokens' own counts say"
    for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        text_bytes = len(tokenizer.decode(ids_N[start + 1 : end]).encode())
        counted = int(counts_N[start:end].sum())
        if counted != text_bytes:
            raise DataError(f"document {number}: {source} {counted} bytes, but the decoded text has {text_bytes}")
    return int(counts_N.sum())


# ---- files of tokenizers without a model ----


def bytes_tokenizer_file() -> bytes:
    """Returns the file of the tokenizer of raw bytes."""
    return json.dumps({"kind": "bytes"}).encode() + b"\n"


def chars_tokenizer_file(texts: Iterable[str]) -> bytes:
    """Returns the file of a tokenizer with the characters of `texts`, by code point. Raises DataError for too many."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if len(characters) > MOST_CHARACTERS:
        raise DataError(f"the text has {len(characters)} characters, 16-bit tokens allow {MOST_CHARACTERS}: use bytes")
    return json.dumps({"kind": "chars", "characters": "".join(sorted(characters))}).encode() + b"\n"


def gpt2_tokenizer_file(merges_path: str | Path) -> bytes:
    """Returns the file of GPT-2's tokenizer with the merges in `merges_path`. Raises DataError."""
    path = Path(merges_path)
    try:
        merges = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}): give GPT-2's vocab.bpe (or merges.txt)") from None
    gpt2_units(merges, str(path))
    return json.dumps({"kind": "gpt2", "merges": merges}).encode() + b"\n"


# ---- CaseOps ----


def encode_caseops(text: str) -> str:
    """Writes `text` with operators in place of its capital letters; `decode_caseops` gives it back."""
    if not text.isascii():
        text = LITERAL_OPERATOR.sub(rf"{CASE_OPERATORS[ESC]}\g<0>", text)
    data = text.encode()
    bytes_N = np.frombuffer(data, dtype=np.uint8)
    upper_U = np.flatnonzero(bytes_N - ord("A") < 26)  # below "A" wraps around
    if not len(upper_U):
        return text
    places_K, operators_K = case_operators(bytes_N, upper_U)
    marked_N = np.ones(len(bytes_N) + 3 * len(places_K), dtype=bool)
    firsts_K = places_K + 3 * np.arange(len(places_K))
    written_N = np.empty(len(marked_N), dtype=np.uint8)
    for part in range(3):
        marked_N[firsts_K + part] = False
        written_N[firsts_K + part] = OPERATOR_BYTES[operators_K, part]
    written_N[marked_N] = np.frombuffer(data.lower(), dtype=np.uint8)
    return written_N.tobytes().decode()


def case_operators(bytes_N: np.ndarray, upper_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (where, which) of the operators for the capitals at `upper_U` of a text."""
    others = np.flatnonzero((bytes_N | 0x20) - ord("a") >= 26)  # no ASCII letters
    ends = np.concatenate([others, [len(bytes_N)]])
    run_U = np.searchsorted(others, upper_U)  # letters between the same two others are one run
    first_U = np.concatenate([[True], run_U[1:] != run_U[:-1]])
    begin_U = np.where(run_U > 0, others[run_U - 1] + 1, 0) if len(others) else np.zeros_like(upper_U)
    capitals_U = np.diff(np.concatenate([np.flatnonzero(first_U), [len(upper_U)]]))[np.cumsum(first_U) - 1]
    whole_U = (capitals_U == ends[run_U] - begin_U) & (capitals_U > 1)
    operators_U = np.where(whole_U, ALLCAPS, np.where(begin_U == upper_U, TITLE, CAPNEXT))
    kept_U = first_U | ~whole_U
    return upper_U[kept_U], operators_U[kept_U]


def decode_caseops(text: str) -> str:
    """Returns the text that `encode_caseops` wrote; operators with nothing to act on (a model may say so) vanish."""
    return MARKED_SPAN.sub(lambda match: match[0][1:].upper(), text)


def literal_operators(ids_N: np.ndarray, operators: list[int]) -> np.ndarray:
    """Finds the tokens that are operators of the text itself: those behind an ESC that is not itself behind one.

    `operators` are the ids of TITLE, ALLCAPS, CAPNEXT and ESC. In a run of ESC every second one is literal.
    """
    escape_N = ids_N == operators[ESC]
    number_N = np.arange(len(ids_N))
    run_start_N = np.maximum.accumulate(np.where(escape_N, 0, number_N + 1))  # one behind the last that is no ESC
    behind_N = np.concatenate([[0], (number_N - run_start_N + 1)[:-1]])  # ESC in the unbroken run in front
    return np.isin(ids_N, operators) & (behind_N % 2 == 1)
