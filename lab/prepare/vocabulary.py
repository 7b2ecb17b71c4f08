"""Trains SentencePiece tokenizers: the small, lossless one that goes with a text of one's own, or one like the field's.

Unlike the competition's, the former keeps every character: no normalisation, no dummy prefix, runs of blanks kept,
anything rare spelled in byte pieces. (One exception: a literal U+2581 is SentencePiece's blank.)
Blanks close a piece instead of opening it, and a piece may run over words and from the end of a line into
the indent of the next (`):` newline and eight blanks are one piece): 2.71 bytes per token on held-out
sources at 1,024 pieces, against 2.45 for pieces within words and 2.50 with newline-and-indent symbols
(2.01 against 1.90 and 1.89 at 512; 3.33 against 2.86 and 2.95 at 2,048).
"""

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from golf.data.shards import DataError

TRAINING_TEXT_BYTES = 16 * 2**20
"""Most text that a tokenizer is trained on; documents beyond it change little and cost time."""
TRAINING_SENTENCE_LINES = 64
MERGE_BOUNDARY = "\x1f"
"""Stands where pieces must not join, in training text only."""
MERGE_SPAN = re.compile(r"[^\n]{0,1000}\n *|[^\n]{1,1000}")
"""A line with the indent of the next one; the bound keeps the trainer's positions within 16 bits."""


def training_sentences(documents: Iterable[str]) -> Iterator[str]:
    """Pieces of text for the trainer, from the first documents that fit TRAINING_TEXT_BYTES."""
    room = TRAINING_TEXT_BYTES
    for text in documents:
        spans = MERGE_SPAN.findall(text)
        for start in range(0, len(spans), TRAINING_SENTENCE_LINES):
            sentence = MERGE_BOUNDARY.join(spans[start : start + TRAINING_SENTENCE_LINES])
            room -= len(sentence.encode())
            if room < 0:
                return
            yield sentence.replace("\0", " ")


CONTROL_PIECES = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
BYTE_PIECES = 256
COMPETITION_COVERAGE = 0.999


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A BPE model of `vocab_size` pieces in SentencePiece's file format; ids 0 to 3 are pad, BOS, EOS, unknown.

    The same documents give the same bytes. Small texts may give fewer pieces. Raises DataError.
    """
    return train_pieces(
        training_sentences(documents),
        vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        treat_whitespace_as_suffix=True,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        pretokenization_delimiter=MERGE_BOUNDARY,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9995,
    )


def train_competition_tokenizer(
    documents: Iterable[str], vocab_size: int, symbols: Sequence[str] = (), text_bytes: int = TRAINING_TEXT_BYTES
) -> bytes:
    """A BPE model with the competition's settings, trained on the first `text_bytes` of the documents.

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
    """The sentences and the share of their characters that are to be pieces: 0.999.

    Where these are more than `most` characters, the rarer ones become blanks, and the share is that of all others.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    needed, wanted = 0, COMPETITION_COVERAGE * sum(counts.values())
    for _, count in counts.most_common():
        if wanted <= 0:
            break
        needed, wanted = needed + 1, wanted - count
    if needed <= most:
        return sentences, COMPETITION_COVERAGE
    normal = [" ".join(unicodedata.normalize("NFKC", sentence).split()) for sentence in sentences]
    counts = Counter()
    for sentence in normal:
        counts.update(sentence)
    rare = {ord(character): " " for character, _ in counts.most_common()[most:]}
    return [sentence.translate(rare) for sentence in normal], 1.0


def train_pieces(sentences: Iterator[str], vocab_size: int, **settings: object) -> bytes:
    """A BPE model in SentencePiece's file format. Raises DataError."""
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
        reason = str(error).splitlines()[0].rpartition("] ")[2] or "too little text, or too few pieces for it"
        raise DataError(f"no tokenizer of {vocab_size} pieces could be trained on this text: {reason}") from None
    return model.getvalue()
