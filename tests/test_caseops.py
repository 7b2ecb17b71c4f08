"""CaseOps is lossless on any text, and its tokens count the bytes of the original. pytest tests/test_caseops.py"""

import io
import json
import lzma

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.data.shards import DataError
from golf.data.tokenizer import BLANK, CASE_OPERATORS, ByteTable
from lab.prepare.text_tokenizer import (
    SentencePieceTokenizer,
    check_byte_counts,
    decode_caseops,
    encode_caseops,
    literal_operators,
)

T, A, N, E = CASE_OPERATORS
SAMPLE = [
    f"The Quick brown FOX {i} jumps over iPhones of McDonald's; I said: NASA's café costs 5 €.\n" for i in range(40)
]
CASED_TEXT = st.text(alphabet=st.sampled_from([*"aAbBzZ@[`{/: 1é", *CASE_OPERATORS, "İ", "ﬁ", "\u212a", "Ａ", BLANK]))
ANY_TEXT = st.text() | CASED_TEXT | st.text(alphabet=st.sampled_from([*"aB ", *CASE_OPERATORS]))


def slow_caseops(text: str) -> str:
    """The definition, run by run."""
    written, position = [], 0
    while position < len(text):
        end = position
        while end < len(text) and text[end].isascii() and text[end].isalpha():
            end += 1
        run = text[position:end]
        if not run:
            written.append(E * (text[position] in CASE_OPERATORS) + text[position])
            end = position + 1
        elif len(run) > 1 and run.isupper():
            written.append(A + run.lower())
        else:
            marks = [(T if place == 0 else N) if letter.isupper() else "" for place, letter in enumerate(run)]
            written += [mark + letter.lower() for mark, letter in zip(marks, run, strict=True)]
        position = end
    return "".join(written)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("", ""),
        ("all lower, 1 é", "all lower, 1 é"),
        ("Hello World", f"{T}hello {T}world"),
        ("NASA's I", f"{A}nasa's {T}i"),
        ("iPhone McDonald ABc aBC", f"i{N}phone {T}mc{N}donald {T}a{N}bc a{N}b{N}c"),
        ("ÉCOLE Äb", f"É{A}cole Äb"),
        ("A1B AB2CD", f"{T}a1{T}b {A}ab2{A}cd"),
        (f"{T}Ab{E}{E}", f"{E}{T}{T}ab{E}{E}{E}{E}"),
    ],
)
def test_what_is_written(text, written):
    assert encode_caseops(text) == written == slow_caseops(text)
    assert decode_caseops(written) == text


@settings(max_examples=600)
@given(text=ANY_TEXT)
def test_it_is_the_definition_and_lossless(text):
    written = encode_caseops(text)
    assert written == slow_caseops(text)
    assert decode_caseops(written) == text
    assert not any("A" <= character <= "Z" for character in written)


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_can_be_decoded(text):
    """A model may write operators where they mean nothing."""
    decoded = decode_caseops(text)
    literal = sum(character in CASE_OPERATORS for character in decoded)
    others = sum(character not in CASE_OPERATORS for character in text)
    assert len(decoded) == others + literal


# ---- tokens ----


def train_model(**chosen) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(encode_caseops, SAMPLE), model_writer=model, model_type="bpe", vocab_size=400,
        hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True, add_dummy_prefix=False,
        minloglevel=2, **dict(user_defined_symbols=[*CASE_OPERATORS]) | chosen,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "cased")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, SentencePieceTokenizer]:
    lossless = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    return {"lossless": train_model(**lossless), "competition": train_model(normalization_rule_name="nmt_nfkc")}


def stream_of(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[int]:
    return [token for ids in tokenizer.encode_documents(texts) for token in (tokenizer.bos_id, *ids)]


def test_the_kind_follows_from_the_pieces(tokenizers):
    assert {tokenizer.kind for tokenizer in tokenizers.values()} == {"caseops"}
    assert train_model(user_defined_symbols=[]).kind == "sentencepiece"
    assert train_model(user_defined_symbols=[T, A]).kind == "sentencepiece"
    learned = train_model(user_defined_symbols=[], character_coverage=1.0)
    assert not learned.processor.is_unknown(learned.processor.piece_to_id(T)) and learned.kind == "sentencepiece"


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_tokens_are_lossless(tokenizers, text):
    tokenizer = tokenizers["lossless"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_capitals_come_back_through_a_normalising_model(tokenizers):
    tokenizer = tokenizers["competition"]
    for text in SAMPLE:
        assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


@pytest.mark.parametrize("kind", ["lossless", "competition"])
@settings(max_examples=300)
@given(texts=st.lists(ANY_TEXT, max_size=4))
def test_bytes_are_those_of_the_original(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    stream = stream_of(tokenizer, texts)
    counts = tokenizer.target_bytes(stream)
    decoded = sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts)
    assert check_byte_counts(tokenizer, counts, stream) == decoded
    if kind == "lossless":
        assert decoded == sum(len(text.encode()) for text in texts)


def test_operators_are_nothing_and_literal_ones_three_bytes(tokenizers):
    tokenizer = tokenizers["lossless"]
    title, allcaps, capnext, escape = tokenizer.operators
    text = f"Ab {E}{E}{T}{E}a{N}"
    ids = tokenizer.encode(text)
    counts = dict(zip(range(len(ids)), tokenizer.target_bytes(ids).tolist(), strict=True))
    operators = [(ids[place], count) for place, count in counts.items() if ids[place] in tokenizer.operators]
    literal = [(escape, 0), (escape, 3), (escape, 0), (escape, 3), (escape, 0), (title, 3), (escape, 0), (escape, 3)]
    assert operators == [(title, 0), *literal, (escape, 0), (capnext, 3)]
    assert literal_operators(np.array([], dtype=np.int64), tokenizer.operators).tolist() == []
    assert literal_operators(np.array([title, escape, 9, escape, allcaps]), tokenizer.operators).nonzero()[0] == [4]


def test_the_table_alone_is_an_estimate(tokenizers):
    tokenizer = tokenizers["lossless"]
    table, stream = ByteTable(tokenizer), stream_of(tokenizer, SAMPLE)
    assert not table.exact and check_byte_counts(tokenizer, table, stream) == len("".join(SAMPLE).encode())
    with pytest.raises(DataError, match="counts 1 bytes, but the decoded text has 4"):
        check_byte_counts(tokenizer, table, stream_of(tokenizer, [f"a{T}"]))


def test_operators_counted_as_text_are_caught(tokenizers):
    """The competition's #2071: tokens of CaseOps, scored by the pieces' own bytes."""
    tokenizer = tokenizers["competition"]
    stream = np.array(stream_of(tokenizer, SAMPLE))
    counts = tokenizer.target_bytes(stream) + 3 * np.isin(stream, tokenizer.operators)
    with pytest.raises(DataError, match="document 1: its tokens' own counts say .* but the decoded text has"):
        check_byte_counts(tokenizer, counts, stream)


def test_shared_model_and_web_text(shared):
    path = shared / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    tokenizer = SentencePieceTokenizer(path.read_bytes(), "caseops")
    with lzma.open(shared / "corpus" / "val_web.jsonl.xz") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False)]
    assert tokenizer.kind == "caseops" and tokenizer.operators == [4, 5, 6, 7]
    assert all(decode_caseops(encode_caseops(text)) == text for text in texts)
    stream = stream_of(tokenizer, texts)
    assert check_byte_counts(tokenizer, tokenizer.target_bytes(stream), stream) > 1_000_000
