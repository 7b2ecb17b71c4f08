"""Tokenizers with the competition's settings, and how they compress. pytest tests/test_train_tokenizer.py"""

import json

import numpy as np
import pytest

from golf.data.shards import DataError
from golf.data.tokenizer import CASE_OPERATORS, load_tokenizer
from lab.prepare.text_tokenizer import SentencePieceTokenizer
from lab.prepare.vocabulary import limit_characters, sample_texts, train_and_measure, train_competition_tokenizer

GENERATOR = np.random.default_rng(0)
WORDS = ["".join(GENERATOR.choice(list("etaoinshrdlu"), GENERATOR.integers(2, 9))) for _ in range(300)]
TEXTS = [" ".join(GENERATOR.choice(WORDS, 60)) + f" {n * 37}.\n\tÉnd № {n}" for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_competition_tokenizer(TEXTS, 400))


def test_the_layout_is_the_competitions(tokenizer):
    processor = tokenizer.processor
    assert tokenizer.vocab_size == 400 and tokenizer.kind == "sentencepiece"
    assert (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2, 3)
    assert [processor.id_to_piece(4 + value) for value in (0, 255)] == ["<0x00>", "<0xFF>"]
    pieces = [processor.id_to_piece(i) for i in range(260, 400)]
    assert not any(piece[1:].count("\u2581") for piece in pieces)
    assert not any(len(piece.strip("\u2581")) > 1 and any(map(str.isdigit, piece)) for piece in pieces)


def test_text_is_normalised_and_nothing_else_is_lost(tokenizer):
    assert tokenizer.decode(tokenizer.encode("  the\n\tend  ﬁn 12 \u4e00 ")) == "the end fin 12 \u4e00"
    assert not tokenizer.processor.id_to_piece(tokenizer.encode("et")[0]).startswith("\u2581")


def test_the_same_text_gives_the_same_bytes(tokenizer):
    model = train_competition_tokenizer(iter(TEXTS), 400)
    assert SentencePieceTokenizer(model).sha256 == tokenizer.sha256
    assert SentencePieceTokenizer(train_competition_tokenizer(TEXTS[:100], 400)).sha256 != tokenizer.sha256
    first_bytes = sum(len(text.encode()) for text in TEXTS[:100])
    shorter = train_competition_tokenizer(TEXTS, 400, text_bytes=first_bytes)
    assert shorter == train_competition_tokenizer(TEXTS[:100], 400)


@pytest.mark.parametrize("vocab_size", [264, 270, 300])
def test_small_vocabularies_leave_rare_characters_to_bytes(vocab_size):
    tokenizer = SentencePieceTokenizer(train_competition_tokenizer(TEXTS, vocab_size))
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == " ".join(TEXTS[0].replace("№", "No").split())


@pytest.mark.parametrize("vocab_size", [255, 256, 260, 65537])
def test_sizes_that_can_not_be(vocab_size):
    with pytest.raises(DataError, match=f"vocab_size={vocab_size} must be above 260"):
        train_competition_tokenizer(TEXTS, vocab_size)


def test_text_that_can_not_be_trained_on():
    with pytest.raises(DataError, match="no tokenizer of 400 pieces could be trained"):
        train_competition_tokenizer(["\0", "  "], 400)


def test_a_vocabulary_without_room_for_characters_is_refused_in_our_words():
    with pytest.raises(DataError, match="256 byte pieces leave no room for its most frequent characters; ask for more"):
        train_competition_tokenizer(TEXTS, 261)


def test_limit_characters():
    assert limit_characters(["aab", "ac c"], 9) == (["aab", "ac c"], 0.999)
    assert limit_characters(["aab", "ac\t c"], 2) == (["aa ", "ac c"], 1.0)
    assert limit_characters(["a" * 2000 + "b"], 1) == (["a" * 2000 + "b"], 0.999)


def test_case_operators_are_pieces():
    tokenizer = SentencePieceTokenizer(train_competition_tokenizer(TEXTS, 400, CASE_OPERATORS))
    assert tokenizer.kind == "caseops"
    assert tokenizer.decode(tokenizer.encode("The END iPod")) == "The END iPod"


def test_larger_vocabularies_compress_further(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train, measured = sample_texts(str(path), 10**6, 0.1)
    assert train and measured and sorted(train + measured) == sorted(TEXTS)
    small, large = (train_and_measure(train, measured, size, "none", 10**6) for size in (300, 500))
    assert small.text_bytes == large.text_bytes == sum(len(text.encode()) for text in measured)
    assert small.counted_bytes == large.counted_bytes and small.documents == large.documents == len(measured)
    assert 1 < small.bytes_per_token < large.bytes_per_token
    tokens = sum(len(SentencePieceTokenizer(small.model).encode(text)) for text in measured)
    assert small.tokens == tokens and small.row()["bytes_per_token"] == small.counted_bytes / tokens
    other = tmp_path / "other.txt"
    other.write_text("etaoin " * 3000)
    assert sample_texts(str(path), 5000, 0.1, str(other))[1][0].startswith("etaoin ")
    with pytest.raises(DataError, match="no text is left to train on"):
        sample_texts(str(path), 5, 0.1)


def test_command(tmp_path, run_command_here):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["data/train_tokenizer.py", "--input", str(path), "--val-fraction", "0.1"]
    sweep = [*command, "--sweep", "--sizes", "300", "400", "--out", str(tmp_path / "models"), "--json"]
    answer = json.loads(run_command_here(*sweep).stdout)
    assert [row["asked"] for row in answer["tokenizers"]] == [300, 400]
    for row in answer["tokenizers"]:
        assert load_tokenizer(row["path"]).sha256 == row["sha256"]
    bad = run_command_here(*command, "--vocab", "256")
    assert bad.returncode == 2 and bad.stderr.startswith("train_tokenizer: vocab_size=256 must be above 260")
    assert bad.stderr.count("\n") == 1
