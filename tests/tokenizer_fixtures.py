"""A tokenizer of every kind, small; and text that is hard for all of them."""

import io
from collections.abc import Sequence

import sentencepiece
from hypothesis import strategies as st

from golf.data.tokenizer import CASE_OPERATORS
from lab.prepare.text_tokenizer import (
    PlainTokenizer,
    SentencePieceTokenizer,
    TextTokenizer,
    bytes_tokenizer_file,
    chars_tokenizer_file,
    encode_caseops,
)

BYTES = PlainTokenizer(bytes_tokenizer_file(), "bytes")
SAMPLE = [f"The Quick brown FOX {i} jumps over iPhones; café costs 5 €, naïve  blanks.\n" for i in range(40)]
TRICKY = st.text() | st.text(alphabet=st.sampled_from([*"aB €é\n", "🐍", "\ufffd", "\u2581", *CASE_OPERATORS]))


def trained(texts: Sequence[str], **chosen) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=400, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **dict(byte_fallback=True) | chosen,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "trained")


def small_tokenizers() -> dict[str, TextTokenizer]:
    lossless = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    return {
        "bytes": BYTES,
        "chars": PlainTokenizer(chars_tokenizer_file(["The cafés."]), "chars"),
        "competition": trained(SAMPLE, add_dummy_prefix=False),
        "prefix": trained(SAMPLE, **lossless),
        "caseops": trained(
            map(encode_caseops, SAMPLE), add_dummy_prefix=False, user_defined_symbols=[*CASE_OPERATORS], **lossless
        ),
    }
