"""Tokenizers of several sizes trained on the same text, and how far each one compresses text that is held out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from golf.data.shards import DataError
from golf.data.tokenizer import CASE_OPERATORS
from lab.prepare.encoding import ChunkEncoder, DocumentChunk
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import SentencePieceTokenizer, encode_caseops
from lab.prepare.vocabulary import train_competition_tokenizer
from lab.prepare.work_files import document_digest, is_held_out

HELD_OUT_BYTES = 8 * 2**20
"""Most text that a tokenizer is measured on."""


@dataclass(frozen=True)
class TokenizerFigures:
    """A trained tokenizer and its figures on held-out text."""

    asked: int
    """Pieces that were asked for."""
    model: bytes
    sha256: str
    vocab_size: int
    train_seconds: float
    documents: int
    tokens: int
    """Without BOS."""
    text_bytes: int
    """Of the held-out text as it is."""
    counted_bytes: int
    """Of it as scored: normalised."""

    @property
    def bytes_per_token(self) -> float:
        return self.counted_bytes / self.tokens

    def row(self) -> dict[str, float | int | str]:
        """What is printed."""
        return {
            "vocab_size": self.vocab_size,
            "bytes_per_token": self.bytes_per_token,
            "tokens": self.tokens,
            "counted_bytes": self.counted_bytes,
            "text_bytes": self.text_bytes,
            "model_bytes": len(self.model),
            "train_seconds": self.train_seconds,
            "sha256": self.sha256,
        }


def sample_texts(
    source: str, train_bytes: int, val_fraction: float, held_out: str | None = None, merges: Path | None = None
) -> tuple[list[str], list[str]]:
    """Documents to train on (at most `train_bytes` of text) and to measure on, from `held_out` or by hash.

    Raises DataError when one of them is empty.
    """
    train: list[str] = []
    measured: list[str] = []
    for text in iter_documents(source, merges):
        if not held_out and is_held_out(document_digest(text), val_fraction):
            measured.append(text)
            continue
        train_bytes -= len(text.encode())
        if train_bytes < 0:
            break
        train.append(text)
    room = HELD_OUT_BYTES
    measured = list(iter_documents(held_out)) if held_out else measured
    for number, text in enumerate(measured):
        room -= len(text.encode())
        if room < 0 and number:
            measured = measured[:number]
            break
    if not train or not measured:
        side = "train" if not train else "measure"
        raise DataError(f"{source}: no text is left to {side} on; give more text, or another share to hold out")
    return train, measured


def train_and_measure(
    train: Sequence[str], measured: Sequence[str], vocab_size: int, transform: str, train_bytes: int
) -> TokenizerFigures:
    """A tokenizer with the competition's settings, trained and measured. Raises DataError."""
    started = time.perf_counter()
    texts = map(encode_caseops, train) if transform == "caseops" else train
    symbols = CASE_OPERATORS if transform == "caseops" else ""
    model = train_competition_tokenizer(texts, vocab_size, symbols, 2 * train_bytes)  # operators are bytes too
    seconds = time.perf_counter() - started
    tokenizer = SentencePieceTokenizer(model, f"tokenizer of {vocab_size} pieces")
    encoded = ChunkEncoder(tokenizer).encode(DocumentChunk("val", list(measured)))
    return TokenizerFigures(
        asked=vocab_size,
        model=model,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        train_seconds=seconds,
        documents=encoded.documents,
        tokens=len(encoded.tokens) // 2 - encoded.documents,
        text_bytes=encoded.text_bytes,
        counted_bytes=encoded.counted_bytes,
    )
