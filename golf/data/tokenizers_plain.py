"""Tokenizers without a model: raw bytes and characters, described by a JSON file.

Ids 0 to 3 are pad, BOS, EOS and unknown (which nothing becomes). Then come the characters, and 256 ids of single bytes
close the vocabulary: they spell what is no character of it, so nothing is lost. Without any character that is the
competition's byte260. A token stands for the same bytes wherever it is: counts are exact by construction.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from types import ModuleType

import numpy as np

from golf.data.shards import DataError

CONTROL_UNITS, UNKNOWN_ID = [b""] * 4, 3
MOST_CHARACTERS = 2**16 - 260


def text_module(name: str) -> ModuleType:
    """A module of this folder that takes text, not ids: training and scoring do without, and so does the bundle."""
    try:
        return importlib.import_module(f"lab.prepare.{name}")
    except ModuleNotFoundError as error:
        raise DataError(f"{error}: text takes the whole repository, and requirements-data.txt") from None


class PlainTokenizer:
    """A list of byte strings, one a token; `sha256` of the describing file is its identity."""

    def __init__(self, description: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(description).hexdigest()
        record = parse_tokenizer_file(description, name)
        self.kind = record["kind"]
        self.units, self.bos_id = self.read(record)
        self.vocab_size = len(self.units)

    def read(self, record: dict) -> tuple[list[bytes], int]:
        """(bytes of every token, id of BOS)."""
        characters = record["characters"] if self.kind == "chars" else ""
        try:
            known = [character.encode() for character in characters]
        except UnicodeEncodeError:
            raise DataError(f"{self.name}: half of a surrogate pair is no Unicode text: make the file again") from None
        if len(set(known)) != len(known) or len(known) > MOST_CHARACTERS:
            raise DataError(
                f"{self.name}: must list up to {MOST_CHARACTERS} characters, each once: make the file again"
            )
        self.ids = {character: (id,) for id, character in enumerate(characters, start=len(CONTROL_UNITS))}
        return [*CONTROL_UNITS, *known, *(bytes([value]) for value in range(256))], 1

    def spell(self, character: str) -> tuple[int, ...]:
        """The ids of a character that is not in the vocabulary."""
        return tuple(self.vocab_size - 256 + value for value in character.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""
        if not self.ids:
            return (np.frombuffer(text.encode(), np.uint8).astype(int) + len(CONTROL_UNITS)).tolist()
        return [id for character in text for id in self.ids.get(character) or self.spell(character)]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents, one after the other whatever `threads` says."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one document; control ids decode to nothing, bytes that are no UTF-8 to U+FFFD."""
        return b"".join(self.units[int(token)] for token in ids).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """unknown_V, boundary_V, inner_V and start_V of ByteTable."""
        bytes_V = np.array([len(unit) for unit in self.units])
        unknown_V = (bytes_V == 0) & (np.arange(self.vocab_size) == UNKNOWN_ID)
        return unknown_V, (bytes_V == 0) & ~unknown_V, bytes_V, bytes_V

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes that each token of a stream stands for."""
        return self.token_bytes[2][np.asarray(ids_N, dtype=np.int64)]


def parse_tokenizer_file(description: bytes, name: str) -> dict:
    """The object in a tokenizer's JSON file. Raises DataError."""
    try:
        record = json.loads(description)
    except ValueError:
        record = None
    needed = {"bytes": (), "chars": ("characters",), "gpt2": ("merges",)}
    kind = str(record.get("kind")) if isinstance(record, dict) else ""
    if kind not in needed or not all(isinstance(record.get(key), str) for key in needed[kind]):
        raise DataError(f"{name}: no tokenizer of kind {', '.join(needed)}: give the file that made the shards")
    return record


def bytes_tokenizer_file() -> bytes:
    """The file of the tokenizer of raw bytes."""
    return json.dumps({"kind": "bytes"}).encode() + b"\n"


def chars_tokenizer_file(texts: Iterable[str]) -> bytes:
    """The file of a tokenizer with the characters of `texts`, by code point. Raises DataError for too many."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if len(characters) > MOST_CHARACTERS:
        raise DataError(f"the text has {len(characters)} characters, 16-bit tokens allow {MOST_CHARACTERS}: use bytes")
    return json.dumps({"kind": "chars", "characters": "".join(sorted(characters))}).encode() + b"\n"
