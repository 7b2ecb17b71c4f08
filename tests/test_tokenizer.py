"""Bytes of tokens equal the decoded text for any model; bad tables are caught. pytest tests/test_tokenizer.py"""

import io
import json
import lzma

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.data.shards import DataError
from golf.data.tokenizer import BLANK, CASE_OPERATORS, ByteTable
from lab.prepare.text_tokenizer import SentencePieceTokenizer, check_byte_counts, load_text_tokenizer
from lab.prepare.vocabulary import train_tokenizer

SAMPLE = [
    f"def step_{i}(self, value):\n    if value is None:\n        return {i}\n\n    The quick brown fox, "
    f"it jumps  over\tthe lazy dog {i} times; naïve café costs 5 € in the morning.\n"
    for i in range(40)
]
COMPETITION = dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, byte_fallback=True)
KINDS = {
    "lossless": None,
    "competition": COMPETITION,
    "dummy prefix": dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True),
    "prefix and trimming": dict(byte_fallback=True),
    "pieces over words": COMPETITION | dict(split_by_whitespace=False),
    "user symbols": COMPETITION | dict(user_defined_symbols=["a b", f"{BLANK}{BLANK}x", "\n"]),
}
SPACED_TEXT = st.text(alphabet=st.sampled_from([*"ab1€\n\t\0 ", BLANK, "\u3000", "\xa0", "\ufffd", "🐍"]))


def train_model(**settings_of_kind) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **settings_of_kind,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, tuple[SentencePieceTokenizer, ByteTable]]:
    models = {
        kind: train_tokenizer(SAMPLE, 360) if chosen is None else train_model(**chosen)
        for kind, chosen in KINDS.items()
    }
    made = {kind: SentencePieceTokenizer(model, kind) for kind, model in models.items()}
    return {kind: (tokenizer, ByteTable(tokenizer)) for kind, tokenizer in made.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text() | SPACED_TEXT, max_size=4))
def test_counts_add_up_to_the_decoded_text(tokenizers, kind, texts):
    tokenizer, table = tokenizers[kind]
    documents = [tokenizer.encode(text) for text in texts]
    stream = [token for ids in documents for token in (tokenizer.bos_id, *ids)]
    decoded = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    assert check_byte_counts(tokenizer, table, stream) == decoded
    assert check_byte_counts(tokenizer, tokenizer.target_bytes(stream), stream) == decoded


@settings(max_examples=300, deadline=None)
@given(text=st.text() | SPACED_TEXT)
def test_own_tokenizer_is_lossless(tokenizers, text):
    tokenizer, _ = tokenizers["lossless"]
    assert tokenizer.keeps_text and tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text() | SPACED_TEXT)
def test_trimming_the_start_never_changes_the_decoded_text(tokenizers, text):
    for tokenizer, _ in tokenizers.values():
        whole = text if tokenizer.keeps_text else tokenizer.decode(tokenizer.processor.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == whole


def test_batch_encoding_is_encoding(tokenizers):
    texts = [*SAMPLE, "", f"{BLANK}{BLANK}a"]
    for tokenizer, _ in tokenizers.values():
        assert tokenizer.encode_documents(texts, threads=2) == [tokenizer.encode(text) for text in texts]


def check_competition_rule(tokenizer, table):
    """Bytes without a leading U+2581, and one more for it unless the token before is BOS; operators have none."""
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.processor.id_to_piece(token).strip(CASE_OPERATORS)
        if not (table.boundary_V[token] or table.unknown_V[token] or tokenizer.processor.is_byte(token)):
            assert table.start_V[token] == len(piece.removeprefix(BLANK).encode())
            assert table.inner_V[token] == table.start_V[token] + piece.startswith(BLANK)


def test_competition_rule(tokenizers):
    check_competition_rule(*tokenizers["competition"])


def test_control_byte_and_interior_blanks(tokenizers):
    tokenizer, table = tokenizers["pieces over words"]
    assert [table.inner_V[i] for i in (0, 1, 2, 4, 255, 259)] == [0, 0, 0, 1, 1, 1]
    inner = [i for i in range(260, tokenizer.vocab_size) if BLANK in tokenizer.processor.id_to_piece(i)[1:]]
    assert inner, "the model must have pieces with blanks inside for this test to mean anything"
    for token in inner:
        assert table.inner_V[token] == len(tokenizer.processor.id_to_piece(token).replace(BLANK, " ").encode())


def test_tensors_count_like_arrays(tokenizers):
    tokenizer, table = tokenizers["competition"]
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(SAMPLE[0])], dtype=np.uint16)
    expected = table.count(ids[:-1], ids[1:])
    for dtype in (torch.int64, torch.int32):
        ids_N = torch.from_numpy(ids.astype(np.int64)).to(dtype)
        counted_N = table.to("cpu").count(ids_N[:-1], ids_N[1:])
        assert counted_N.dtype == torch.int64 and counted_N.tolist() == expected.tolist()
    rows = table.to("cpu").count(ids_N[:-1].view(1, -1), ids_N[1:].view(1, -1))
    assert rows.shape == (1, len(expected))


def test_a_stream_counts_like_its_table(tokenizers):
    for tokenizer, table in tokenizers.values():
        ids = tokenizer.encode(SAMPLE[0])
        stream = [*ids, tokenizer.bos_id, *ids]  # the first token starts a document, said or not
        counts = tokenizer.target_bytes(stream)
        assert counts[len(ids)] == 0 and counts[: len(ids)].tolist() == counts[len(ids) + 1 :].tolist()
        assert counts[1:].tolist() == table.count(np.array(stream[:-1]), np.array(stream[1:])).tolist()
        assert table.exact and table.to("cpu").exact and tokenizer.kind == "sentencepiece"


def spoiled(table: ByteTable, spoil) -> ByteTable:
    bad = table.to("cpu")
    for part in ("unknown_V", "boundary_V", "inner_V", "start_V"):
        setattr(bad, part, getattr(table, part).copy())
    spoil(bad)
    return bad


def count_blanks_twice(table: ByteTable, tokenizer: SentencePieceTokenizer) -> None:
    blanks = [i for i in range(260, tokenizer.vocab_size) if tokenizer.processor.id_to_piece(i).startswith(BLANK)]
    table.inner_V[blanks] += 1


def count_bytes_as_replacement_characters(table: ByteTable, tokenizer: SentencePieceTokenizer) -> None:
    table.inner_V[4:260] = 3


def count_bare_blank_as_three(table: ByteTable, tokenizer: SentencePieceTokenizer) -> None:
    table.inner_V[tokenizer.blank_id] = 3


def count_blank_after_bos(table: ByteTable, tokenizer: SentencePieceTokenizer) -> None:
    table.start_V = table.inner_V.copy()


@pytest.mark.parametrize(
    ("spoil", "pieces"),
    [
        (count_blanks_twice, ["f", f"{BLANK}the"]),
        (count_bytes_as_replacement_characters, ["f", "<0xC3>", "<0xBF>"]),
        (count_bare_blank_as_three, ["f", BLANK, "f"]),
        (count_blank_after_bos, [f"{BLANK}the", "f"]),
    ],
)
def test_bad_tables_are_caught(tokenizers, spoil, pieces):
    tokenizer, table = tokenizers["competition"]
    ids = [tokenizer.processor.piece_to_id(piece) for piece in pieces]
    stream = [tokenizer.bos_id, *tokenizer.encode("a fox"), tokenizer.bos_id, *ids]
    check_byte_counts(tokenizer, table, stream)
    bad = spoiled(table, lambda bad: spoil(bad, tokenizer))
    with pytest.raises(DataError, match="document [12]: the byte table of competition counts"):
        check_byte_counts(tokenizer, bad, stream)
    counts = bad.count(np.array([tokenizer.bos_id, *stream[:-1]]), np.array(stream))
    with pytest.raises(DataError, match="document [12]: its tokens' own counts say"):
        check_byte_counts(tokenizer, counts, stream)


def test_model_without_a_bare_blank_is_refused():
    model = train_model(**COMPETITION)
    bare_blank = b"\x0a\x03" + BLANK.encode()  # field 1 (the piece) of three bytes
    assert model.count(bare_blank) == 1
    blankless = SentencePieceTokenizer(model.replace(bare_blank, b"\x0a\x03" + "あ".encode()), "blankless")
    with pytest.raises(DataError, match="no piece for a single blank"):
        ByteTable(blankless)


def test_unknown_pieces_and_foreign_ids_are_errors(tokenizers):
    byteless = SentencePieceTokenizer(train_model(**COMPETITION | dict(byte_fallback=False)), "byteless")
    ids = np.array([byteless.bos_id, *byteless.encode("snake 🐍")])
    table = ByteTable(byteless)
    with pytest.raises(DataError, match="unknown pieces"):
        table.count(ids[:-1], ids[1:])
    with pytest.raises(DataError, match="unknown pieces"):
        table.to("cpu").count(torch.tensor(ids[:-1]), torch.tensor(ids[1:]))
    with pytest.raises(DataError, match="outside of the"):
        table.count(ids[:1], np.array([byteless.vocab_size]))


def test_identity_and_errors_of_files(tmp_path, tokenizers):
    model = train_tokenizer(SAMPLE, 360)
    path = tmp_path / "own.model"
    path.write_bytes(model)
    assert load_text_tokenizer(path).sha256 == tokenizers["lossless"][0].sha256  # training is deterministic, too
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_text_tokenizer(path)
    with pytest.raises(DataError, match="no such tokenizer"):
        load_text_tokenizer(tmp_path / "none.model")


def test_training_errors():
    with pytest.raises(DataError, match="vocab_size=260"):
        train_tokenizer(SAMPLE, 260)
    with pytest.raises(DataError, match="3000 pieces could be trained on this text: too little text"):
        train_tokenizer([], 3000)


@pytest.mark.parametrize("vocab_size", [261, 300, 512])
def test_characters_without_room_are_left_to_the_bytes(vocab_size):
    """Chinese: today's text has thousands of characters, and a small vocabulary holds hundreds."""
    generator = np.random.default_rng(0)
    characters = [chr(0x4E00 + int(20 * value)) for value in generator.exponential(20, 4000)]
    texts = ["".join(characters[start : start + 100]) + "\u3002\n" for start in range(0, 4000, 100)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(texts, vocab_size), "chinese")
    assert 260 < tokenizer.vocab_size <= vocab_size
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    assert sum(len(tokenizer.encode(text)) for text in texts) <= sum(len(text.encode()) for text in texts)


def test_training_copes_with_long_lines_and_reserved_characters():
    text = "word " * 40_000 + "\0\x1f\x7f" + "\u2585\u2581" * 10
    tokenizer = SentencePieceTokenizer(train_tokenizer([text, *SAMPLE], 360), "odd")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "name", ["fineweb_1024_bpe", "fineweb_8192_bpe", "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved"]
)
def test_shared_tokenizers_on_web_text(shared, name):
    tokenizer = load_text_tokenizer(shared / "tokenizers" / f"{name}.model")
    table = ByteTable(tokenizer)
    check_competition_rule(tokenizer, table)
    with lzma.open(shared / "corpus" / "val_web.jsonl.xz") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False)]
    documents = tokenizer.encode_documents(texts)
    stream = [token for ids in documents for token in (tokenizer.bos_id, *ids)]
    counted = check_byte_counts(tokenizer, table, stream)
    assert counted == sum(len(tokenizer.decode(ids).encode()) for ids in documents) > 1_000_000
