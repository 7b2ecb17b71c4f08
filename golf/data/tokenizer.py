"""Gives training and scoring what they need of a tokenizer: its identity, and how many bytes each token stands for.

Bits per byte divides by bytes, so they must be exact: over a document, the counts add up to the UTF-8
length of its decoded text. For a SentencePiece model they are not derived from the spelling of the pieces but asked of
the processor itself, once behind another piece and once at the start of a text (where a model that trims blanks drops
a leading one). On the competition's models that is its rule: U+2581 in front is one byte, except after BOS.
The other tokenizers are lists of byte strings in a JSON file. Encoding and decoding text is lab/prepare's work.

Shape letters: N tokens, V vocabulary.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from golf.config.knobs import parse_json, takes_model_files_only
from golf.data.shards import DataError

BLANK = "\u2581"
"""How SentencePiece writes a blank inside its pieces."""
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"
"""CaseOps' TITLE, ALLCAPS, CAPNEXT and ESC. A model that has them as symbols of its own is made for such text."""
CONTROL_UNITS, UNKNOWN_ID = [b""] * 4, 3
MOST_CHARACTERS = 2**16 - 260


class Tokenizer:
    """Holds what every kind of tokenizer has. A document starts where a token is `bos_id`."""

    kind: str
    """sentencepiece, caseops, bytes, chars or gpt2."""
    vocab_size: int
    bos_id: int
    token_bytes: tuple[np.ndarray, ...]
    """unknown_V, boundary_V, inner_V and start_V of its ByteTable; reading it raises DataError where it has none."""

    def __init__(self, data: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(data).hexdigest()
        """Of its file: its identity."""


class SentencePieceModel(Tokenizer):
    """Loads a SentencePiece model; one with the operators of CaseOps as pieces is of that kind. Raises DataError."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        super().__init__(model, name)
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{name}: not a SentencePiece model; give the .model file that made the shards") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        if self.bos_id < 0:
            raise DataError(f"{name}: the model has no BOS piece, which starts a document; train it with bos_id=1")
        if self.vocab_size > 2**16:
            raise DataError(f"{name}: {self.vocab_size} pieces do not fit 16-bit tokens; use at most 65,536")
        self.operators = [self.processor.piece_to_id(operator) for operator in CASE_OPERATORS]
        # a user-defined symbol has the score 0, a learned piece of one character a negative one
        own = [not self.processor.is_unknown(i) and self.processor.get_score(i) == 0 for i in self.operators]
        self.kind = "caseops" if all(own) else "sentencepiece"

    @property
    def pieces(self) -> list[str]:
        """Returns the text of each token with its blank marks; empty for what is no text."""
        model = self.processor
        special = model.is_control, model.is_unused, model.is_unknown, model.is_byte
        return ["" if any(is_(i) for is_ in special) else model.id_to_piece(i) for i in range(self.vocab_size)]

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """Returns unknown_V, boundary_V, inner_V and start_V of ByteTable. Raises DataError."""
        self.check_blank_pieces()
        processor, ids = self.processor, range(self.vocab_size)
        unknown_V = np.array([processor.is_unknown(i) for i in ids])
        boundary_V = np.array([processor.is_control(i) or processor.is_unused(i) for i in ids])
        byte_V = np.array([processor.is_byte(i) for i in ids])
        plain = [i for i in ids if not (boundary_V[i] or unknown_V[i] or byte_V[i])]
        anchor = next(i for i in plain if BLANK not in processor.id_to_piece(i))
        inner_V, start_V = np.zeros((2, self.vocab_size), dtype=np.int64)
        inner_V[plain] = self.decoded_bytes([[anchor, i] for i in plain])
        inner_V[plain] -= self.decoded_bytes([[anchor]])
        start_V[plain] = self.decoded_bytes([[i] for i in plain])
        # One byte alone is no valid UTF-8 (it decodes to U+FFFD, 3 bytes), but it is one byte of the text.
        inner_V[byte_V] = start_V[byte_V] = 1
        if self.kind == "caseops":
            inner_V[self.operators] = start_V[self.operators] = 0
        return unknown_V, boundary_V, inner_V, start_V

    def decoded_bytes(self, sequences: list[list[int]]) -> list[int]:
        return [len(text.encode()) for text in self.processor.decode(sequences)]

    def check_blank_pieces(self) -> None:
        """Raises DataError for a model that writes a blank as three byte pieces (those of U+2581).

        One blank would count as 3 bytes, and bits per byte come out too low (the competition's issue #897).
        """
        spelled = "".join(self.processor.id_to_piece(i) for i in self.processor.encode("a 1  a"))
        if "<0xE2><0x96><0x81>" in spelled:
            raise DataError(
                f"{self.name}: the model has no piece for a single blank and writes it as 3 byte pieces, so bytes "
                "can't be counted: train the tokenizer again with U+2581 among its pieces"
            )


class UnitVocabulary(Tokenizer):
    """Loads a tokenizer without a model: a byte string for each token (`units`), described by a JSON file.

    Of the kinds bytes and chars, ids 0 to 3 are pad, BOS, EOS and unknown (which nothing becomes). Then come the
    characters, and 256 ids of single bytes close the vocabulary: they spell what is no character of it, so nothing is
    lost. Without any character that is the competition's byte260. The kind gpt2 follows from its merges. A token
    stands for the same bytes wherever it is: counts are exact by construction. Raises DataError.
    """

    def __init__(self, description: bytes, name: str = "tokenizer"):
        super().__init__(description, name)
        record = parse_tokenizer_file(description, name)
        self.kind = record["kind"]
        if self.kind == "gpt2":
            self.units = gpt2_units(record["merges"], name)
        else:
            characters = character_units(record["characters"], name) if self.kind == "chars" else []
            self.units = [*CONTROL_UNITS, *characters, *(bytes([value]) for value in range(256))]
        self.vocab_size = len(self.units)
        self.bos_id = self.vocab_size - 1 if self.kind == "gpt2" else 1

    @property
    def pieces(self) -> list[bytes]:
        """Returns the bytes of each token; none for what is no text."""
        return self.units

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """Returns unknown_V, boundary_V, inner_V and start_V of ByteTable."""
        bytes_V = np.array([len(unit) for unit in self.units])
        unknown_V = (bytes_V == 0) & (np.arange(self.vocab_size) == UNKNOWN_ID)
        return unknown_V, (bytes_V == 0) & ~unknown_V, bytes_V, bytes_V


def parse_tokenizer_file(description: bytes, name: str) -> dict:
    """Returns the object in a tokenizer's JSON file. Raises DataError."""
    try:
        record = parse_json(description)
    except ValueError:
        record = None
    needed = {"bytes": (), "chars": ("characters",), "gpt2": ("merges",)}
    kind = str(record.get("kind")) if isinstance(record, dict) else ""
    if kind not in needed or not all(isinstance(record.get(key), str) for key in needed[kind]):
        raise DataError(f"{name}: no tokenizer of kind {', '.join(needed)}: give the file that made the shards")
    return record


def character_units(characters: str, name: str) -> list[bytes]:
    """Returns each character in UTF-8. Raises DataError for a list that repeats or is too long."""
    units = [character.encode() for character in characters]
    if len(set(units)) != len(units) or len(units) > MOST_CHARACTERS:
        raise DataError(f"{name}: must list up to {MOST_CHARACTERS} characters, each once: make the file again")
    return units


def gpt2_units(merges: str, name: str) -> list[bytes]:
    """Returns the bytes of each id by GPT-2's merges, its end of text (which starts a document) last.

    A merges file spells bytes as printable characters: a byte that prints in Latin-1 is itself, the others are U+0100,
    U+0101, ... in their order. Ids 0 to 255 are those bytes in that order (printing ones first), then comes one id for
    each merge. Raises DataError for a file that holds no merges.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printing]
    alphabet = {chr(value): value for value in printing} | {chr(256 + n): value for n, value in enumerate(others)}
    units = [bytes([value]) for value in alphabet.values()]
    lines = [line for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    for number, line in enumerate(lines, start=1):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts) or not set(line) - {" "} <= set(alphabet):
            raise DataError(f"{name}: merge {number} is {line[:40]!r}: give GPT-2's vocab.bpe (or merges.txt)")
        units.append(bytes(alphabet[character] for part in parts for character in part))
    if len(set(units)) != len(units) or len(units) >= 2**16:
        raise DataError(f"{name}: merges that make one piece twice, or over 65,535 ids: give GPT-2's vocab.bpe")
    return [*units, b""]


def read_tokenizer_file(path: str | Path) -> bytes:
    """Returns the content of a tokenizer's file. Raises DataError where there is none."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such tokenizer; set tokenizer_path, or prepare the data (data/README.md)")
    return Path(path).read_bytes()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer in a SentencePiece .model file, or in the .json file of one without. Raises DataError."""
    description = read_tokenizer_file(path)
    if takes_model_files_only() or Path(path).suffix != ".json":
        return SentencePieceModel(description, str(path))
    return UnitVocabulary(description, str(path))


class ByteTable:
    """Says how many bytes of text each token stands for, given the token before it.

    inner_V: bytes behind a token of the same document; start_V: bytes at the start of a document;
    boundary_V: control and unused ids, which are no text and end a document; unknown_V: ids without bytes of
    their own. A table of torch tensors (after `to`) counts tensors; a new one counts NumPy arrays.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.name = tokenizer.name
        self.exact = tokenizer.kind != "caseops"
        """False where the text may hold operators of its own, which the table counts as none: an estimate."""
        self.unknown_V, self.boundary_V, self.inner_V, self.start_V = tokenizer.token_bytes

    def to(self, device: torch.device | str) -> "ByteTable":
        """Returns the same table as torch tensors on `device`."""
        table = object.__new__(ByteTable)
        table.name, table.exact = self.name, self.exact
        for part in ("unknown_V", "boundary_V", "inner_V", "start_V"):
            setattr(table, part, torch.as_tensor(getattr(self, part), device=device))
        return table

    def count(self, previous_N, targets_N):
        """Counts the bytes of each target given the token before it, int64, in the shape of `targets_N`.

        Takes NumPy arrays, or (after `to`) tensors on the table's device; on CUDA the check waits for the
        device. Raises DataError for tokens whose bytes can't be known: see `check`.
        """
        is_tensor = isinstance(self.inner_V, torch.Tensor)
        if is_tensor:
            previous_N, targets_N = previous_N.long(), targets_N.long()
        self.check(targets_N)
        where = torch.where if is_tensor else np.where
        return where(self.boundary_V[previous_N], self.start_V[targets_N], self.inner_V[targets_N])

    def check(self, tokens_N) -> None:
        """Raises DataError if there are unknown pieces among the tokens, or ids outside of the vocabulary."""
        if bool((tokens_N >= len(self.unknown_V)).any()):
            raise DataError(
                f"token {int(tokens_N.max())} is outside of the {len(self.unknown_V)} pieces of {self.name}: "
                "the shards were made with another tokenizer"
            )
        if bool(self.unknown_V[tokens_N].any()):
            raise DataError(
                f"the text holds unknown pieces of {self.name}, so its bytes can't be counted: "
                "use a tokenizer with byte_fallback, and the one that made the shards"
            )
