"""How a token is drawn, and how tokens become text as they come: against slow references."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.generate.sampling import (
    GrowingText,
    SamplingError,
    SamplingOptions,
    StopTexts,
    choose_token,
    drawable_ids,
    most_likely,
    token_probabilities,
)
from lab.prepare.text_tokenizer import TextTokenizer
from tests.tokenizer_fixtures import BYTES, TRICKY, small_tokenizers

# ---- one draw ----

LOGITS = st.lists(
    st.sampled_from([-3.0, 0.0, 0.0, 0.5, 1.0, 4.0]) | st.floats(-30, 30, width=32), min_size=1, max_size=12
)


def drawn(logits: Sequence[float], uniform: float = 0.5, drawable: Sequence[bool] | None = None, **options) -> int:
    allowed_V = np.ones(len(logits), dtype=bool) if drawable is None else np.array(drawable)
    return choose_token(np.array(logits, dtype=np.float32), allowed_V, SamplingOptions(**options), uniform)


@given(LOGITS, st.floats(0.05, 3), st.integers(0, 14), st.floats(0.01, 1))
def test_probabilities_are_those_of_the_definition(logits, temperature, top_k, top_p):
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    found = token_probabilities(np.array(logits), np.ones(len(logits), dtype=bool), options)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept, total = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if kept and total >= top_p - 1e-12:
            break
        kept.append(i)
        total += weight / sum(weights)
    expected = np.zeros(len(logits))
    expected[kept] = [weights[order.index(i)] for i in kept]
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    draws = [drawn(logits, (i + 0.5) / 1000, temperature=1.0) for i in range(1000)]
    assert draws == sorted(draws) and np.bincount(draws).tolist() == [100, 400, 200, 300]
    assert drawn([0.0, 1.0], 0.0) == 0 and drawn([0.0, 1.0, -90.0], math.nextafter(1, 0)) == 1
    assert drawn([0.0, 0.0], math.nextafter(1, 0), [True, False]) == 0


@given(LOGITS, st.floats(0, 1, exclude_max=True), st.data())
def test_what_may_not_be_drawn_never_is(logits, uniform, data):
    drawable = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any))
    for options in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.3}, {"temperature": 1e-300}):
        assert drawable[drawn(logits, uniform, drawable, **options)]


def test_ties_go_to_the_lowest_id():
    assert drawn([1.0, 7.0, 7.0, 7.0], 0.99, temperature=0.0) == 1
    assert drawn([1.0, 7.0, 7.0, 7.0], 0.99, temperature=0.0, drawable=[True, False, True, True]) == 2
    assert drawn([1.0, 7.0, 7.0], 0.99, top_k=1) == 1
    assert most_likely(np.array([3.0, 1.0, 3.0, 3.0, 2.0]), 2).tolist() == [True, False, True, False, False]


def test_edges_of_the_filters():
    logits = [0.3, 2.0, -1.0, 1.9]
    for uniform in (0.0, 0.3, 0.7, 0.999):
        plain = drawn(logits, uniform)
        assert plain == drawn(logits, uniform, top_k=4) == drawn(logits, uniform, top_k=10**9)
        assert drawn(logits, uniform, top_p=1e-12) == 1 == drawn(logits, uniform, top_k=1)
        assert drawn(logits, uniform, temperature=1e-30) == 1
    assert drawn([0.0, 0.0], 0.9, top_p=0.5) == 0, "one half is enough"
    assert [drawn([9.0, -9.0], uniform, temperature=1e12) for uniform in (0.49, 0.51)] == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_predictions_that_are_none(value):
    for temperature in (0.0, 1.0):
        with pytest.raises(SamplingError, match="NaN or infinite"):
            drawn([0.0, value, 1.0], temperature=temperature)
    assert drawn([0.0, value, 1.0], drawable=[True, False, True], temperature=0.0) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ("a", "")}, "stop: texts"),
        ({"stop": "ab"}, "stop: texts"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(SamplingError, match=message):
        SamplingOptions(**options)


# ---- tokens into text ----


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TextTokenizer]:
    return small_tokenizers()


KINDS = ("bytes", "chars", "competition", "prefix", "caseops")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=70)
@given(prompt=TRICKY, text=TRICKY, data=st.data())
def test_pieces_of_text_add_up_and_break_no_character(tokenizers, kind, prompt, text, data):
    tokenizer = tokenizers[kind]
    drawable = np.flatnonzero(drawable_ids(tokenizer, tokenizer.vocab_size)).tolist()
    drawable.remove(tokenizer.bos_id)
    ids = (
        tokenizer.encode(text)
        if data.draw(st.booleans())
        else data.draw(st.lists(st.sampled_from(drawable), max_size=30))
    )
    growing, pieces = GrowingText(tokenizer, tokenizer.encode(prompt)), []
    for token in ids:
        pieces.append(growing.add(token))
        if data.draw(st.booleans()) and growing.given == len(tokenizer.decode(growing.ids)):
            growing.shorten()
    whole = tokenizer.decode([*tokenizer.encode(prompt), *ids])
    before = len(tokenizer.decode(tokenizer.encode(prompt)))
    assert "".join([*pieces, growing.finish()]) == whole[before:]


def test_a_character_comes_when_it_is_whole():
    growing = GrowingText(BYTES, BYTES.encode("so "))
    assert [growing.add(token) for token in BYTES.encode("é🐍!")] == ["", "é", "", "", "", "🐍", "!"]
    assert growing.add(BYTES.encode("€")[0]) == "" and growing.finish() == "\ufffd"
    broken = GrowingText(BYTES, [])
    parts = [broken.add(token) for token in BYTES.encode("🐍")[1:2] * 9]
    assert "".join(parts) == "\ufffd" * 6 and broken.finish() == "\ufffd" * 3, "bytes that are no text don't pile up"


def test_long_texts_are_not_decoded_from_their_start(tokenizers):
    for kind in ("bytes", "competition"):
        growing, seen = GrowingText(tokenizers[kind], []), 0
        for token in tokenizers[kind].encode("The naïve fox jumps over 🐍. " * 90):
            growing.add(token)
            seen = max(seen, len(growing.ids))
        assert seen < 270


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_texts_cut_where_the_first_is_complete(text, stops, data):
    ends = [(end, -len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    expected = text[: sum(min(ends))] if ends else text
    found, out, rest = StopTexts(stops), "", text
    while rest and not found.found:
        size = data.draw(st.integers(1, 5))
        out += found.add(rest[:size])
        assert expected.startswith(out), "nothing is given out that a stop text takes back"
        rest = rest[size:]
    assert out + found.release() == expected and found.found == bool(ends)


def test_only_what_may_become_a_stop_text_is_held_back():
    found = StopTexts(["END", "\n\n"])
    assert [found.add(part) for part in ("a E", "N", "x\n", "b", "\n", "\nc")] == ["a ", "", "ENx", "\nb", "", ""]
    assert found.found and found.release() == ""
