"""The table of words and the workers change nothing but the time. pytest tests/test_encoding.py"""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.data.shards import DataError
from golf.data.tokenizer import CASE_OPERATORS
from lab.prepare.encoding import (
    ChunkEncoder,
    DocumentChunk,
    chunk_documents,
    encode_chunks,
)
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import SentencePieceTokenizer, load_text_tokenizer
from lab.prepare.vocabulary import train_competition_tokenizer, train_pieces, train_tokenizer
from lab.prepare.word_table import WordIndex, WordTable, words_are_independent

TEXTS = [
    f"Sentence {number} of the text: don't Stop\tat 3.14,\r\n\n  NEVER {'abc' * (number % 5)} café “quoted” \u00a0 end"
    for number in range(200)
]
ODD = [
    "\u200b x",
    "\u0301a \u0301b",
    "a\u00a0 b",
    "\u2581\u2581 a",
    "",
    " \n",
    "x \u0344",
    "\x1c a\x0bb",
    "½ ﬁ ㍿",
    "a\0b c",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_competition_tokenizer(TEXTS, 420)


@pytest.fixture(scope="module")
def caseops_model() -> bytes:
    return train_competition_tokenizer([text.lower() for text in TEXTS], 420, CASE_OPERATORS)


@pytest.fixture(scope="module", params=["model", "caseops_model"])
def encoders(request) -> tuple[ChunkEncoder, ChunkEncoder]:
    tokenizer = SentencePieceTokenizer(request.getfixturevalue(request.param), request.param)
    return ChunkEncoder(tokenizer), ChunkEncoder(tokenizer, word_cache=False)


def test_which_models_have_independent_words(model, caseops_model):
    assert words_are_independent(SentencePieceTokenizer(model))
    assert words_are_independent(SentencePieceTokenizer(caseops_model))
    assert not words_are_independent(SentencePieceTokenizer(train_tokenizer(TEXTS, 420)))


@settings(max_examples=300)
@given(
    texts=st.lists(st.text() | st.sampled_from(ODD + TEXTS) | st.text(" \n\ta\u0301A\u2581\u3000ﬁ\ue001"), min_size=1)
)
def test_a_table_of_words_gives_the_ids_and_bytes_of_whole_texts(encoders, texts):
    with_table, plain = encoders
    assert with_table.words is not None and plain.words is None
    chunk = DocumentChunk("val", texts)
    assert with_table.encode(chunk, True) == plain.encode(chunk, True)
    assert with_table.encode(chunk, True) == plain.encode(chunk, True)  # from the table now


def test_real_text_with_a_full_table(encoders, monkeypatch):
    monkeypatch.setattr("lab.prepare.word_table.TABLE_ENTRIES", 30)
    monkeypatch.setattr("lab.prepare.word_table.LONGEST_CACHED_WORD", 6)
    with_table, plain = ChunkEncoder(encoders[0].tokenizer), encoders[1]
    for start in range(0, 200, 50):
        chunk = DocumentChunk("train", TEXTS[start : start + 50])
        assert with_table.encode(chunk) == plain.encode(chunk)
    assert 20 < with_table.words.index.size <= 30


def test_an_index_finds_what_was_put_in():
    hashes = np.unique(np.random.default_rng(0).integers(0, 2**64 - 1, 60, dtype=np.uint64))
    index, parts = WordIndex(), np.array_split(np.random.default_rng(1).permutation(hashes[5:]), 4)
    for part in parts:
        index.insert(np.sort(part))
    assert index.find(hashes[:5]).tolist() == [-1] * 5
    assert index.find(np.concatenate([np.sort(part) for part in parts])).tolist() == list(range(len(hashes) - 5))


def test_words_and_their_hashes(model):
    table = WordTable(SentencePieceTokenizer(model))
    text = " a\tb\n\nc\r\n d\u00a0e b  aa".encode()
    begin, end, hashes = table.hash_words(np.frombuffer(text, dtype=np.uint8))
    words = [text[i:j].decode() for i, j in zip(begin, end, strict=True)]
    assert words == ["a", "b", "c", "d\u00a0e", "b", "aa"]
    assert len(set(hashes.tolist())) == 5 and hashes[1] == hashes[4]
    assert [len(part) for part in table.hash_words(np.empty(0, dtype=np.uint8))] == [0, 0, 0]


def test_models_with_dependent_words_are_caught(monkeypatch):
    """Were the model taken for one with independent words, its first chunk would say so."""
    monkeypatch.setattr("lab.prepare.encoding.words_are_independent", lambda tokenizer: True)
    encoder = ChunkEncoder(SentencePieceTokenizer(train_tokenizer(TEXTS, 420)))
    with pytest.raises(DataError, match="prepare with --no-word-cache"):
        encoder.encode(DocumentChunk("train", TEXTS))


def test_wrong_bytes_are_caught(model):
    tokenizer = SentencePieceTokenizer(model)
    tokenizer.token_bytes[2][tokenizer.encode("the a")[-1]] += 1
    for word_cache in (True, False):
        with pytest.raises(DataError, match="but the decoded text has"):
            ChunkEncoder(tokenizer, word_cache).encode(DocumentChunk("train", ["of a text"]))


def test_chunks_keep_every_document_in_order(monkeypatch):
    monkeypatch.setattr("lab.prepare.encoding.CHUNK_CHARACTERS", 10)
    pairs = [("val" if number % 3 == 0 else "train", "x" * number) for number in range(1, 12)]
    chunks = list(chunk_documents(iter(pairs)))
    assert all(sum(map(len, chunk.texts[:-1])) < 10 for chunk in chunks) and len(chunks) > 4
    for split in ("train", "val"):
        texts = [text for chunk in chunks if chunk.split == split for text in chunk.texts]
        assert texts == [text for side, text in pairs if side == split]


def test_any_number_of_workers_gives_the_same(model, tmp_path):
    path = tmp_path / "some.model"
    path.write_bytes(model)
    chunks = [DocumentChunk("val" if n % 4 == 0 else "train", TEXTS[n::13]) for n in range(13)]
    alone = list(encode_chunks(iter(chunks), path, 1, sidecar_splits=("val",)))
    assert [chunk.split for chunk in alone] == [chunk.split for chunk in chunks]
    assert [bool(chunk.token_bytes) for chunk in alone] == [chunk.split == "val" for chunk in chunks]
    assert sum(chunk.documents for chunk in alone) == len(TEXTS)
    for workers in (2, 3):
        assert list(encode_chunks(iter(chunks), path, workers, sidecar_splits=("val",))) == alone
    few = [DocumentChunk("train", TEXTS[:3])]
    assert list(encode_chunks(iter(few), path, 3)) == list(encode_chunks(iter(few), path, 1))


def test_only_a_few_chunks_are_read_ahead(model, tmp_path):
    path = tmp_path / "some.model"
    path.write_bytes(model)
    taken = 0

    def chunks():
        nonlocal taken
        while True:
            taken += 1
            yield DocumentChunk("train", TEXTS[:2])

    encoded = encode_chunks(chunks(), path, 2)
    for _ in range(5):
        next(encoded)
    assert 5 <= taken <= 9
    encoded.close()


def test_errors_are_the_callers(model, tmp_path):
    path = tmp_path / "some.model"
    path.write_bytes(train_pieces(iter(TEXTS), 300, byte_fallback=False))
    with pytest.raises(DataError, match="unknown pieces|no piece for a single blank"):
        list(encode_chunks(iter([DocumentChunk("train", ["unheard: Ж"])] * 5), path, 2))
    with pytest.raises(DataError, match="no such tokenizer"):
        list(encode_chunks(iter([DocumentChunk("train", TEXTS)]), tmp_path / "other.model", 2))


KILLED = """
import os, signal, sys
from lab.prepare.encoding import DocumentChunk, encode_chunks
def chunks():
    while True:
        yield DocumentChunk("train", ["some text"])
for number, chunk in enumerate(encode_chunks(chunks(), sys.argv[1], 2)):
    if number == 3:
        children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
        print(*children, flush=True)
        if sys.argv[2] == "parent":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(int(children[0]), signal.SIGKILL)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children in /proc")
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_processes(model, tmp_path, repository, victim):
    path = tmp_path / "some.model"
    path.write_bytes(model)
    command = [sys.executable, "-c", KILLED, str(path), victim]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    if victim == "worker":
        assert finished.returncode == 1 and "a worker process was killed" in finished.stderr
    else:
        assert finished.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in finished.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_competitions_models_on_real_text(shared):
    """Some of the shared text, word by word and whole, with each of the shared models."""
    texts = list(itertools.islice(iter_documents(shared / "corpus" / "val_indomain.jsonl.xz"), 300))
    for path in sorted((shared / "tokenizers").glob("*.model")):
        tokenizer = load_text_tokenizer(path)
        assert words_are_independent(tokenizer)
        chunk = DocumentChunk("val", texts)
        encoded = ChunkEncoder(tokenizer).encode(chunk, True)
        assert encoded == ChunkEncoder(tokenizer, word_cache=False).encode(chunk, True)
        assert np.frombuffer(encoded.token_bytes, "<u2").sum() == encoded.counted_bytes
