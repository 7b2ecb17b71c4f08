"""Trains SentencePiece tokenizers (a lossless one for a text of one's own, one like the field's) and measures them.

Unlike the competition's, the former keeps every character: no normalisation, no dummy prefix, runs of blanks kept,
anything rare spelled in byte pieces, and so is a literal U+2581, which is SentencePiece's blank.
Blanks close a piece instead of opening it, and a piece may run over words and from the end of a line into
the indent of the next (`):` newline and eight blanks are one piece): 2.71 bytes per token on held-out
sources at 1,024 pieces, against 2.45 for pieces within words and 2.50 with newline-and-indent symbols
(2.01 against 1.90 and 1.89 at 512; 3.33 against 2.86 and 2.95 at 2,048).
"""

import io
import itertools
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from golf.data.shards import DataError
from golf.data.tokenizer import CASE_OPERATORS
from lab.prepare.encoding import ChunkEncoder, DocumentChunk
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import SentencePieceTokenizer, encode_caseops
from lab.prepare.work_files import document_digest, is_held_out

TRAINING_TEXT_BYTES = 16 * 2**20
"""Most text that a tokenizer is trained on; documents beyond it change little and cost time."""
TRAINING_SENTENCE_LINES = 64
HELD_OUT_BYTES = 8 * 2**20
"""Most text that a tokenizer is measured on."""
MERGE_BOUNDARY = "\x1f"
"""Stands where pieces must not join, in training text only."""
CONTROL_PIECES = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
BYTE_PIECES = 256
COMPETITION_COVERAGE = 0.999
MERGE_SPAN = re.compile(r"[^\n]{0,1000}\n *|[^\n]{1,1000}")
"""A line with the indent of the next one; the bound keeps the trainer's positions within 16 bits."""


def training_sentences(documents: Iterable[str]) -> Iterator[str]:
    """Yields pieces of text for the trainer, from the first documents that fit TRAINING_TEXT_BYTES."""
    room = TRAINING_TEXT_BYTES
    for text in documents:
        spans = MERGE_SPAN.findall(text)
        for start in range(0, len(spans), TRAINING_SENTENCE_LINES):
            sentence = MERGE_BOUNDARY.join(spans[start : start + TRAINING_SENTENCE_LINES])
            room -= len(sentence.encode())
            if room < 0:
                return
            yield sentence.replace("\0", " ")


class TooManyCharactersError(DataError):
    """Says that the characters that are to be pieces leave no room in the vocabulary."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Trains a BPE model of `vocab_size` pieces in SentencePiece's format; ids 0 to 3 are pad, BOS, EOS, unknown.

    The same documents give the same bytes. Small texts may give fewer pieces. Characters for which there is no room
    (most of Chinese, in a small vocabulary) are left to the byte pieces. Raises DataError.
    """
    settings = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "treat_whitespace_as_suffix": True,
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "pretokenization_delimiter": MERGE_BOUNDARY,
        "split_digits": True,
        "byte_fallback": True,
    }
    sentences = list(training_sentences(documents))
    try:
        return train_pieces(iter(sentences), vocab_size, character_coverage=0.9995, **settings)
    except TooManyCharactersError:
        room = vocab_size - len(CONTROL_PIECES) - BYTE_PIECES
        return train_pieces(leave_to_bytes(sentences, room // 2), vocab_size, character_coverage=1.0, **settings)


def leave_to_bytes(sentences: list[str], most: int) -> Iterator[str]:
    """Yields the sentences with boundaries in the place of all characters but the `most` frequent, and the blank."""
    counts = Counter(itertools.chain.from_iterable(sentences))
    del counts[MERGE_BOUNDARY], counts[" "]
    rare = {ord(character): MERGE_BOUNDARY for character, _ in counts.most_common()[max(1, most - 1) :]}
    return (sentence.translate(rare) for sentence in sentences)


def train_competition_tokenizer(
    documents: Iterable[str], vocab_size: int, symbols: Sequence[str] = (), text_bytes: int = TRAINING_TEXT_BYTES
) -> bytes:
    """Trains a BPE model with the competition's settings on the first `text_bytes` of the documents.

    `symbols` are pieces of their own (the operators of CaseOps). In a small vocabulary, rarer characters are left to
    the byte pieces than the coverage of 0.999 asks for, so that half of the room is for merges. Raises DataError.
    """
    sentences = list(competition_sentences(documents, text_bytes))
    room = vocab_size - len(CONTROL_PIECES) - BYTE_PIECES - len(symbols)
    sentences, coverage = limit_characters(sentences, max(2, room // 2))
    return train_pieces(
        iter(sentences),
        vocab_size,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=coverage,
        user_defined_symbols=list(symbols),
    )


def competition_sentences(documents: Iterable[str], text_bytes: int) -> Iterator[str]:
    for text in documents:
        text_bytes -= len(text.encode())
        if text_bytes < 0:
            return
        sentence = text.replace("\0", " ").strip()
        if sentence:
            yield sentence


def limit_characters(sentences: list[str], most: int) -> tuple[list[str], float]:
    """Returns the sentences and the share of their characters that are to be pieces: 0.999.

    Where these are more than `most` characters, the rarer ones become blanks, and the share is that of all others.
    """
    counts = Counter(itertools.chain.from_iterable(sentences))
    needed, wanted = 0, COMPETITION_COVERAGE * sum(counts.values())
    for _, count in counts.most_common():
        if wanted <= 0:
            break
        needed, wanted = needed + 1, wanted - count
    if needed <= most:
        return sentences, COMPETITION_COVERAGE
    normal = [" ".join(unicodedata.normalize("NFKC", sentence).split()) for sentence in sentences]
    counts = Counter(itertools.chain.from_iterable(normal))
    rare = {ord(character): " " for character, _ in counts.most_common()[most:]}
    return [sentence.translate(rare) for sentence in normal], 1.0


def train_pieces(sentences: Iterator[str], vocab_size: int, **settings: object) -> bytes:
    """Trains a BPE model in SentencePiece's file format. Raises DataError."""
    if not len(CONTROL_PIECES) + BYTE_PIECES < vocab_size <= 2**16:
        raise DataError(f"vocab_size={vocab_size} must be above 260 (4 control and 256 byte pieces) and at most 65,536")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            max_sentence_length=2**24,
            num_threads=1,
            minloglevel=2,
            **CONTROL_PIECES,
            **settings,
        )
    except RuntimeError as error:
        if "required_chars" in str(error):
            raise TooManyCharactersError(
                f"no tokenizer of {vocab_size} pieces could be trained on this text: 4 control and 256 byte pieces "
                "leave no room for its most frequent characters; ask for more pieces"
            ) from None
        reason = str(error).splitlines()[0].rpartition("] ")[2] or "too little text, or too few pieces for it"
        raise DataError(f"no tokenizer of {vocab_size} pieces could be trained on this text: {reason}") from None
    return model.getvalue()


# ---- how far they compress held-out text ----


@dataclass(frozen=True)
class TokenizerFigures:
    """Holds a trained tokenizer and its figures on held-out text."""

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
        """Returns what is printed."""
        names = ("vocab_size", "bytes_per_token", "tokens", "counted_bytes", "text_bytes", "train_seconds", "sha256")
        return {name: getattr(self, name) for name in names} | {"model_bytes": len(self.model)}


def sample_texts(
    source: str, train_bytes: int, val_fraction: float, held_out: str | None = None, merges: Path | None = None
) -> tuple[list[str], list[str]]:
    """Reads documents to train on (at most `train_bytes` of text) and to measure on, from `held_out` or by hash.

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
    """Trains a tokenizer with the competition's settings and measures it. Raises DataError."""
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
