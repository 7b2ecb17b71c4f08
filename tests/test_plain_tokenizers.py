"""Bytes, characters and GPT-2: nothing is lost, bytes are exact. pytest tests/test_plain_tokenizers.py"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.data.shards import DataError
from golf.data.tokenizer import ByteTable, load_tokenizer
from lab.prepare.text_tokenizer import (
    PlainTokenizer,
    TextTokenizer,
    bytes_tokenizer_file,
    chars_tokenizer_file,
    check_byte_counts,
    gpt2_tokenizer_file,
    load_text_tokenizer,
)

STORIES = ["Once upon a time, there was a café.\n", "The end 🐍"]
MERGES = "#version: 0.2\nĠ t\nh e\nĠt he\ni n\nÃ ©\nc a\nca f\nĠ Ġ\nð Ł\n"
TEXTS = st.text() | st.text(alphabet=st.sampled_from([*"the caféin\t\n\0 ", "\ufffd", "🐍", "\ue001", "\u2581"]))
KINDS = ("bytes", "chars", "gpt2")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, TextTokenizer]:
    pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "vocab.bpe").write_text(MERGES, encoding="utf-8")
    merges_file = gpt2_tokenizer_file(folder / "vocab.bpe")
    files = dict(zip(KINDS, [bytes_tokenizer_file(), chars_tokenizer_file(STORIES), merges_file], strict=True))
    for kind, data in files.items():
        (folder / f"{kind}.json").write_bytes(data)
    return {kind: load_text_tokenizer(folder / f"{kind}.json") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(texts=st.lists(TEXTS, max_size=4))
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    documents = tokenizer.encode_documents(texts, threads=2)
    assert documents == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in documents] == texts
    stream = [token for ids in documents for token in (tokenizer.bos_id, *ids)]
    text_bytes = sum(len(text.encode()) for text in texts)
    counts = tokenizer.target_bytes(stream)
    assert check_byte_counts(tokenizer, ByteTable(tokenizer), stream) == counts.sum() == text_bytes
    assert counts.dtype == np.int64 and all(0 <= token < tokenizer.vocab_size for token in stream)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_replacement_characters_is_caught(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stream = [tokenizer.bos_id, *tokenizer.encode("a 蛇 b")]
    table = ByteTable(tokenizer)
    check_byte_counts(tokenizer, table, stream)
    table.inner_V = table.inner_V.copy()
    table.inner_V[[token for token in stream if tokenizer.decode([token]) == "\ufffd"]] = 3
    with pytest.raises(DataError, match="counts 13 bytes, but the decoded text has 7"):
        check_byte_counts(tokenizer, table, stream)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_control_ids(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.kind == kind and len(tokenizer.sha256) == 64
    bos, ids = tokenizer.bos_id, tokenizer.encode("the é")
    assert tokenizer.decode([bos, *ids, bos]) == "the é"
    ids_N = torch.tensor([bos, *ids, bos])
    counted_N = ByteTable(tokenizer).to("cpu").count(ids_N[:-1], ids_N[1:])
    assert counted_N.tolist() == tokenizer.target_bytes([*ids, bos]).tolist() and counted_N[-1] == 0
    with pytest.raises(DataError, match="outside of the"):
        ByteTable(tokenizer).check(np.array([tokenizer.vocab_size]))


def test_bytes_are_the_competitions_byte260(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (260, 1)
    assert tokenizer.encode("\0a€") == [4, 101, 0xE2 + 4, 0x82 + 4, 0xAC + 4]
    with pytest.raises(DataError, match="unknown pieces"):
        ByteTable(tokenizer).check(np.array([3]))


def test_characters_are_sorted_and_others_spelled_in_bytes(tokenizers):
    tokenizer = tokenizers["chars"]
    characters = sorted(set("".join(STORIES)))
    assert tokenizer.vocab_size == 4 + len(characters) + 256
    assert tokenizer.encode("".join(characters)) == list(range(4, 4 + len(characters)))
    first_byte = tokenizer.vocab_size - 256
    assert tokenizer.encode("aß") == [4 + characters.index("a"), first_byte + 0xC3, first_byte + 0x9F]
    assert chars_tokenizer_file(reversed(STORIES)) == chars_tokenizer_file(STORIES)
    with pytest.raises(DataError, match="65300 characters"):
        chars_tokenizer_file(["".join(map(chr, range(0x10000, 0x10000 + 65_300)))])


def test_gpt2_joins_what_the_merges_say(tokenizers):
    tokenizer = tokenizers["gpt2"]
    assert tokenizer.vocab_size == 256 + 9 + 1 and tokenizer.bos_id == 256 + 9
    spelled = [tokenizer.units[token] for token in tokenizer.encode("the the cafés in")]
    assert spelled == [b"t", b"he", b" the", b" ", b"caf", "é".encode(), b"s", b" ", b"in"]
    assert tokenizer.units[0] == b"!" and tokenizer.units[93:95] == [b"~", b"\xa1"] and tokenizer.units[188] == b"\0"
    assert sorted(tokenizer.units[:256]) == [bytes([value]) for value in range(256)]
    assert tokenizer.encode("<|endoftext|>")[-1] != tokenizer.bos_id  # text can't start a document


@pytest.mark.parametrize(
    ("merges", "message"),
    [("a b c\n", "merge 1 is 'a b c'"), ("a b\na  b\n", "merge 2"), ("a b\na b\n", "twice"), ("€ a\n", "merge 1")],
)
def test_other_files_are_no_merges(tmp_path, merges, message):
    pytest.importorskip("tiktoken")
    (tmp_path / "vocab.bpe").write_text(merges, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        gpt2_tokenizer_file(tmp_path / "vocab.bpe")
    with pytest.raises(DataError, match="can't be read"):
        gpt2_tokenizer_file(tmp_path / "none.bpe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "no tokenizer of kind"),
        (b"\xff", "no tokenizer of kind"),
        (b"[]", "no tokenizer of kind"),
        (b'{"kind": "words"}', "no tokenizer of kind"),
        (b'{"kind": []}', "no tokenizer of kind"),
        (b'{"kind": "chars"}', "no tokenizer of kind"),
        (b'{"kind": "chars", "characters": "aa"}', "each once"),
        (b'{"kind": "chars", "characters": "\\ud800"}', "no tokenizer of kind"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text_tokenizer(path)


def test_identity_is_that_of_the_file(tokenizers):
    record = json.dumps({"kind": "chars", "characters": "ab"}).encode()
    assert PlainTokenizer(record).sha256 != PlainTokenizer(record + b" ").sha256
    assert len({tokenizer.sha256 for tokenizer in tokenizers.values()}) == 3


def test_gpt2s_bytes_are_known_without_tiktoken_and_its_absence_is_one_clear_error(tokenizers, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(json.dumps({"kind": "gpt2", "merges": MERGES}).encode())
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    known, text = load_tokenizer(path), tokenizers["gpt2"]
    assert (known.kind, known.vocab_size, known.bos_id) == (text.kind, text.vocab_size, text.bos_id)
    assert all(map(np.array_equal, known.token_bytes, text.token_bytes))
    with pytest.raises(DataError, match="tiktoken is not installed: pip install -r requirements-data.txt"):
        load_text_tokenizer(path).encode("the")
