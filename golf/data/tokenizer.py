"""Tokenizers, and how many bytes of text each token stands for.

Bits per byte divides by bytes, so they must be exact: over a document, the counts add up to the UTF-8
length of its decoded text. They are not derived from the spelling of the pieces but asked of the processor
itself, once behind another piece and once at the start of a text (where a model that trims blanks drops a
leading one). On the competition's models that is its rule: U+2581 in front is one byte, except after BOS.
The bytes of the other tokenizers' tokens are known as they are.

Shape letters: N tokens, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import torch

from golf.data.shards import DataError
from golf.data.tokenizers_plain import PlainTokenizer, parse_tokenizer_file, text_module

BLANK = "\u2581"
"""How SentencePiece writes a blank inside its pieces."""
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"
"""CaseOps' TITLE, ALLCAPS, CAPNEXT and ESC. A model that has them as symbols of its own is made for such text."""


class TextTokenizer(Protocol):
    """What every kind of tokenizer is. A document starts where a token is `bos_id`."""

    kind: str
    """sentencepiece, caseops, bytes, chars or gpt2."""
    name: str
    sha256: str
    """Of its file: its identity."""
    vocab_size: int
    bos_id: int
    token_bytes: tuple[np.ndarray, ...]
    """unknown_V, boundary_V, inner_V and start_V of its ByteTable."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one document (normalised, where the tokenizer does that); control ids decode to nothing."""

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes of text that each token of a stream stands for: over a document, those of its decoded text.

        The first token counts as the start of a document. Raises DataError.
        """


class Tokenizer:
    """A SentencePiece model; one for text in CaseOps (caseops.py) is of that kind, and writes and reads it so."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{name}: not a SentencePiece model; give the .model file that made the shards") from None
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        if self.bos_id < 0:
            raise DataError(f"{name}: the model has no BOS piece, which starts a document; train it with bos_id=1")
        if self.vocab_size > 2**16:
            raise DataError(f"{name}: {self.vocab_size} pieces do not fit 16-bit tokens; use at most 65,536")
        blank_id = self.processor.piece_to_id(BLANK)
        self.blank_id: int | None = None if self.processor.is_unknown(blank_id) else blank_id
        self.swallows_blanks = self.blank_id is not None and self.processor.decode([self.blank_id] * 2) == ""
        self.operators = [self.processor.piece_to_id(operator) for operator in CASE_OPERATORS]
        # a user-defined symbol has the score 0, a learned piece of one character a negative one
        own = [not self.processor.is_unknown(i) and self.processor.get_score(i) == 0 for i in self.operators]
        self.kind = "caseops" if all(own) else "sentencepiece"

    def trim_start(self, ids: list[int]) -> list[int]:
        """Without bare blanks in front, where decoding swallows all of them.

        Only text that starts with a literal U+2581 has them there; without them the bytes of a token
        depend on nothing but the token before it.
        """
        first = 0
        while self.swallows_blanks and first < len(ids) and ids[first] == self.blank_id:
            first += 1
        return ids[first:]

    def transformed(self, text: str) -> str:
        """`text` as the model takes it."""
        return text_module("caseops").encode_caseops(text) if self.kind == "caseops" else text

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""
        return self.trim_start(self.processor.encode(self.transformed(text)))

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents."""
        encoded = self.processor.encode([self.transformed(text) for text in texts], num_threads=threads)
        return [self.trim_start(ids) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The (normalised) text of one document; control ids decode to nothing."""
        text = self.processor.decode([int(token) for token in ids])
        return text_module("caseops").decode_caseops(text) if self.kind == "caseops" else text

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """unknown_V, boundary_V, inner_V and start_V of ByteTable. Raises DataError."""
        check_blank_pieces(self)
        processor, ids = self.processor, range(self.vocab_size)
        unknown_V = np.array([processor.is_unknown(i) for i in ids])
        boundary_V = np.array([processor.is_control(i) or processor.is_unused(i) for i in ids])
        byte_V = np.array([processor.is_byte(i) for i in ids])
        plain = [i for i in ids if not (boundary_V[i] or unknown_V[i] or byte_V[i])]
        anchor = next(i for i in plain if BLANK not in processor.id_to_piece(i))
        inner_V, start_V = np.zeros((2, self.vocab_size), dtype=np.int64)
        inner_V[plain] = decoded_bytes(self, [[anchor, i] for i in plain])
        inner_V[plain] -= decoded_bytes(self, [[anchor]])
        start_V[plain] = decoded_bytes(self, [[i] for i in plain])
        # One byte alone is no valid UTF-8 (it decodes to U+FFFD, 3 bytes), but it is one byte of the text.
        inner_V[byte_V] = start_V[byte_V] = 1
        if self.kind == "caseops":
            inner_V[self.operators] = start_V[self.operators] = 0
        return unknown_V, boundary_V, inner_V, start_V

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes that each token of a stream stands for."""
        ids_N = np.asarray(ids_N, dtype=np.int64)
        bytes_N = ByteTable(self).count(np.concatenate([[self.bos_id], ids_N])[:-1], ids_N)
        if self.kind == "caseops":
            bytes_N += len(BLANK.encode()) * text_module("caseops").literal_operators(ids_N, self.operators)
        return bytes_N


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer in a SentencePiece .model file, or in the .json file of one without a model. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; set tokenizer_path, or prepare the data (data/README.md)")
    data, name = path.read_bytes(), str(path)
    if path.suffix != ".json":
        return Tokenizer(data, name)
    if parse_tokenizer_file(data, name)["kind"] == "gpt2":
        return text_module("tokenizer_gpt2").Gpt2Tokenizer(data, name)
    return PlainTokenizer(data, name)


class ByteTable:
    """Bytes of text that each token stands for, given the token before it.

    inner_V: bytes behind a token of the same document; start_V: bytes at the start of a document;
    boundary_V: control and unused ids, which are no text and end a document; unknown_V: ids without bytes of
    their own. A table of torch tensors (after `to`) counts tensors; a new one counts NumPy arrays.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self.name = tokenizer.name
        self.exact = tokenizer.kind != "caseops"
        """False where the text may hold operators of its own, which the table counts as none: an estimate."""
        self.unknown_V, self.boundary_V, self.inner_V, self.start_V = tokenizer.token_bytes

    def to(self, device: torch.device | str) -> "ByteTable":
        """The same table as torch tensors on `device`."""
        table = object.__new__(ByteTable)
        table.name, table.exact = self.name, self.exact
        for part in ("unknown_V", "boundary_V", "inner_V", "start_V"):
            setattr(table, part, torch.as_tensor(getattr(self, part), device=device))
        return table

    def count(self, previous_N, targets_N):
        """Bytes of each target given the token before it, int64, in the shape of `targets_N`.

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
        """Raise DataError if there are unknown pieces among the tokens, or ids outside of the vocabulary."""
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


def decoded_bytes(tokenizer: Tokenizer, sequences: list[list[int]]) -> list[int]:
    """UTF-8 length of each decoded sequence."""
    return [len(text.encode()) for text in tokenizer.processor.decode(sequences)]


def check_blank_pieces(tokenizer: Tokenizer) -> None:
    """Raise DataError for a model that writes a blank as three byte pieces (those of U+2581).

    One blank would count as 3 bytes, and bits per byte come out too low (the competition's issue #897).
    """
    processor = tokenizer.processor
    ids = processor.encode("a 1  a")
    spelled = "".join(processor.id_to_piece(i) for i in ids)
    if "<0xE2><0x96><0x81>" in spelled:
        raise DataError(
            f"{tokenizer.name}: the model has no piece for a single blank and writes it as 3 byte pieces, so bytes "
            "can't be counted: train the tokenizer again with U+2581 among its pieces"
        )


def check_byte_counts(
    tokenizer: TextTokenizer, counter: "ByteTable | Sequence[int] | np.ndarray", ids: Sequence[int] | np.ndarray
) -> int:
    """Bytes of the stream `ids` by a table, or by the bytes of each of its tokens.

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
