"""What a model writes over its cache: against the uncached forward, and what can come in its way."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from golf.config.model import ModelConfig
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import Runtime
from lab.generate.generation import TextGeneration
from lab.generate.sampling import SamplingError, SamplingOptions, choose_token, drawable_ids
from lab.generate.text_model import TextModel
from lab.prepare.text_tokenizer import TextTokenizer
from tests.cache_fixtures import CACHED, cached_model
from tests.tokenizer_fixtures import BYTES, small_tokenizers

CPU = Runtime(torch.device("cpu"))
CONFIG = replace(CACHED, vocab_size=300)
"""40 ids more than the tokenizer of bytes has."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TextTokenizer]:
    return small_tokenizers()


def text_model(config: ModelConfig = CONFIG, tokenizer: TextTokenizer = BYTES, model: GPT | None = None) -> TextModel:
    model = model or cached_model(config)
    return TextModel(model, tokenizer, ByteTable(tokenizer), "tiny", 1000, 8.0, None, CPU)


def with_logits(model: GPT, change: Callable[[torch.Tensor, int], None]) -> GPT:
    """The model, `change` acting on its last logits_BV at each position of the text (that of the last id read)."""
    plain = model.logits

    def logits(ids_BT, last=None, rope_base=None, cache=None):
        logits_BSV = plain(ids_BT, last, rope_base, cache)
        change(logits_BSV[:, -1], cache.length)
        return logits_BSV

    model.logits = logits
    return model


def ids_of(generation: TextGeneration, number: int = 0) -> list[int]:
    return generation.rows[number].ids


def written(model: TextModel, prompts: list[str], options: SamplingOptions) -> tuple[list[str], TextGeneration]:
    generation, texts = model.generate(prompts, options), [""] * len(prompts)
    for new in generation:
        texts = [text + more for text, more in zip(texts, new, strict=True)]
    return texts, generation


@torch.no_grad()
def slow_ids(model: TextModel, prompt: str, options: SamplingOptions, seed: int) -> list[int]:
    """All ids by the uncached forward over everything that the rules say is seen."""
    config, uniform = model.model.config, random.Random(seed).random
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]
    sliding = 0 < config.attention_window < config.train_seq_len
    seen = ids if sliding else ids[-config.train_seq_len :]
    for _ in range(options.tokens):
        logits_V = model.model.logits(torch.tensor([seen]), last=1)[0, -1].numpy()
        token = choose_token(logits_V, drawable_ids(model.tokenizer, config.vocab_size), options, uniform())
        ids, seen = [*ids, token], [*seen, token]
        if token == model.tokenizer.bos_id:
            break
        if not sliding and len(seen) > config.train_seq_len:
            seen = seen[-(config.train_seq_len // 2) :]
    return ids


@pytest.mark.parametrize("changes", [
    {},
    {"attention_window": 5},
    {"attention_window": 40},
    {"knowledge_tokens": 3, "knowledge_at": "layers"},
    {"attention_window": 4, "knowledge_tokens": 2, "document_attention": True},
    {"act_k": "int8", "act_v": "int8"},
])  # fmt: skip
@pytest.mark.parametrize("prompt", ["", "Hello", "a prompt that is longer than the context of 24 bytes"])
def test_text_is_that_of_the_uncached_model(changes, prompt):
    """Through the context's end and beyond it: 60 tokens where 24 are seen."""
    dtype = torch.float64 if "act_k" in changes else torch.float32  # no code hangs on the order of sums
    config = replace(CONFIG, **changes)
    model = text_model(config, model=cached_model(config, dtype))
    for options in (SamplingOptions(tokens=60, seed=5, temperature=1.0), SamplingOptions(tokens=20, temperature=0.0)):
        _, generation = written(model, [prompt], options)
        assert ids_of(generation) == slow_ids(model, prompt, options, options.seed)


def test_what_is_cut_is_said_once():
    model = text_model()
    _, short = written(model, ["ab"], SamplingOptions(tokens=21))
    assert short.notes == [] and short.statistics.prompt_tokens == 3
    _, long = written(model, ["x" * 24], SamplingOptions(tokens=60))
    asked, full = long.notes
    assert asked.startswith("the prompt has 25 tokens") and "its last 24 are read" in asked
    assert "cut to its last 12 tokens" in full and long.statistics.prompt_tokens == 24
    _, several = written(model, ["x" * 24, "y", "z" * 30], SamplingOptions(tokens=3))
    assert [note.split(" has")[0] for note in several.notes[:2]] == ["prompt 1", "prompt 3"]
    sliding = text_model(replace(CONFIG, attention_window=6))
    _, endless = written(sliding, ["x" * 50], SamplingOptions(tokens=60))
    assert endless.notes == [] and endless.statistics.prompt_tokens == 51
    assert endless.statistics.cache_bytes == 3 * 2 * 5 * 2 * 8 * 4


def test_a_row_is_what_it_is_alone_with_its_seed():
    model, prompts = text_model(), ["", "one", "two", "three is longer", "x" * 40]
    options = SamplingOptions(tokens=40, seed=11, temperature=1.2)
    texts, generation = written(model, prompts, options)
    for number, prompt in enumerate(prompts):
        alone, single = written(model, [prompt], replace(options, seed=11 + number))
        assert alone == [texts[number]] and ids_of(single) == ids_of(generation, number)
    assert written(model, prompts[::-1], options)[0] != texts[::-1], "the seed goes with the place"
    assert written(model, ["one"] * 3, options)[0][0] == written(model, ["one"], options)[0][0]
    same = written(model, ["one"] * 3, options)[0]
    assert len(set(same)) == 3


def test_the_same_seed_gives_the_same_text_and_another_does_not():
    model = text_model()
    texts = [written(model, ["say"], SamplingOptions(tokens=30, seed=seed))[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [written(model, ["say"], SamplingOptions(tokens=30, seed=seed, temperature=0))[0] for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def prefer(*ids: int) -> Callable[[torch.Tensor, int], None]:
    def change(logits_BV: torch.Tensor, position: int) -> None:
        logits_BV[:, list(ids)] += 50

    return change


def test_ids_that_are_no_text_are_never_drawn(tokenizers):
    model = with_logits(cached_model(CONFIG), prefer(0, 2, 3, *range(260, 300)))
    for temperature in (0.0, 1.0):
        _, generation = written(text_model(model=model), ["a"], SamplingOptions(tokens=30, temperature=temperature))
        assert set(ids_of(generation)[2:]) <= {*range(4, 260), 1}
    for tokenizer in tokenizers.values():
        drawable_V = drawable_ids(tokenizer, 1000)
        assert drawable_V[tokenizer.bos_id] and not drawable_V[tokenizer.vocab_size :].any()
        assert not drawable_V[[0, 2, 3]].any() and drawable_V[: tokenizer.vocab_size].sum() == tokenizer.vocab_size - 3
    with pytest.raises(SamplingError, match="has 260 tokens, the model 40"):
        drawable_ids(BYTES, 40)


def test_a_documents_end_ends_a_row_and_the_others_go_on():
    def end_at_six(logits_BV: torch.Tensor, position: int) -> None:
        logits_BV[0, 1] += 90.0 if position == 6 and len(logits_BV) == 2 else -90.0
        logits_BV[1:, 1] -= 90.0

    model = text_model(model=with_logits(cached_model(CONFIG), end_at_six))
    texts, generation = written(model, ["ab", "cd", "efghi"], SamplingOptions(tokens=20))
    assert generation.ended == ["document", "length", "length"]
    assert ids_of(generation)[-1] == 1 and len(ids_of(generation)) == 7 and len(ids_of(generation, 1)) == 23
    assert texts[0] == BYTES.decode(ids_of(generation)[3:])
    assert generation.statistics.generated_tokens == 4 + 20 + 20


def say(text: str) -> Callable[[torch.Tensor, int], None]:
    """From the start of the document on, whatever the model thinks."""
    ids = BYTES.encode(text)

    def change(logits_BV: torch.Tensor, position: int) -> None:
        logits_BV[:, ids[position - 1] if position <= len(ids) else BYTES.bos_id] += 90

    return change


@pytest.mark.parametrize(
    ("stop", "text", "ended"),
    [
        ((), "Tim saw a dög.", "document"),
        (("dö",), "Tim saw a ", "stop"),
        (("ög", "dög."), "Tim saw a d", "stop"),
        ((" a cat", "nothing"), "Tim saw a dög.", "document"),
        (("T",), "", "stop"),
        (("g.", "\n"), "Tim saw a dö", "stop"),
    ],
)
def test_stop_texts_are_cut_exactly(stop, text, ended):
    model = text_model(model=with_logits(cached_model(CONFIG), say("Tim saw a dög.")))
    generation = model.generate([""], SamplingOptions(tokens=20, stop=stop))
    pieces = [new[0] for new in generation]
    assert "".join(pieces) == text and generation.ended == [ended]
    assert all("\ufffd" not in piece for piece in pieces)
    short = written(model, [""], SamplingOptions(tokens=12, stop=("dög.",)))
    assert short[0] == ["Tim saw a d\ufffd"] and short[1].ended == ["length"], "what was held back comes at the end"


def test_statistics_and_an_early_end():
    model = text_model()
    generation = model.generate(["ab", "c"], SamplingOptions(tokens=50))
    first, second = next(generation), next(generation)
    assert len(first) == len(second) == 2 and generation.ended == ["", ""]
    found = generation.statistics
    assert (found.prompts, found.prompt_tokens, found.generated_tokens) == (2, 5, 4)
    assert found.tokens_per_second == 4 / found.generated_seconds > 0
    assert found.prompt_tokens_per_second == 5 / found.prompt_seconds > 0
    assert found.cache_bytes == 3 * 2 * (4 + 3) * 2 * 8 * 4
    for _ in generation:
        pass
    assert found.generated_tokens == 100 and next(generation, None) is None
    for prompts in ([], "text"):
        with pytest.raises(SamplingError, match="list of prompts"):
            model.generate(prompts, SamplingOptions())


def test_characters_outside_of_the_vocabulary(tokenizers):
    tokenizer = tokenizers["chars"]
    model = text_model(replace(CONFIG, vocab_size=tokenizer.vocab_size + 3), tokenizer)
    texts, generation = written(model, ["67 🐍 łódź"], SamplingOptions(tokens=10))
    assert tokenizer.decode(ids_of(generation)) == "67 🐍 łódź" + texts[0]


def test_codes_in_the_cache_change_no_text():
    config = replace(CONFIG, act_k="int4", act_v="int8")
    model, options = text_model(config), SamplingOptions(tokens=50, seed=2)
    plain, packed = (written(model, ["ab", "c"], replace(options, packed_cache=packed)) for packed in (False, True))
    assert plain[0] == packed[0]
    assert packed[1].statistics.cache_bytes * 2 < plain[1].statistics.cache_bytes
    with pytest.raises(ValueError, match="act_k or act_v"):
        text_model().generate(["a"], replace(options, packed_cache=True))


def test_a_row_that_ended_early_does_not_hold_up_one_that_fills_the_context():
    """The longer one is read again at the full context; the other's text is shorter than what is read by then."""
    model, early = text_model(), 0
    for seed in range(40):
        options = SamplingOptions(tokens=model.context + 8, temperature=50.0, stop=("e", "~"), seed=seed)
        texts, generation = written(model, ["", ""], options)
        shortest = min(len(row.ids) for row in generation.rows)
        early += bool(generation.notes) and shortest < model.context // 2
        if seed < 3:
            assert texts[0] == written(model, [""], options)[0][0]
    assert early > 1
