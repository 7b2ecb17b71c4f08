"""One row of sampled text: how the next token is drawn, and how tokens become text as they come.

A draw is a function of the logits, the options and one uniform number, in float64 on the CPU, so that equal logits
give equal text on every device. V vocabulary.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from golf.config.knobs import UserError
from lab.prepare.text_tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""
DECODED_AT_ONCE = 256
"""Tokens that are decoded again for each new one, after which a new start is looked for."""


class SamplingError(UserError):
    """Options that nothing can be sampled with, or a model that gives no probabilities."""


@dataclass(frozen=True)
class SamplingOptions:
    """How text is sampled. Raises SamplingError for values that mean nothing."""

    tokens: int = 200
    """Most new tokens of each prompt."""
    temperature: float = 0.8
    """Logits are divided by it; 0: always the most likely token, of equal ones that of the lowest id."""
    top_k: int = 0
    """Draw from so many of the most likely tokens only (of equal ones, those of the lowest ids); 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that have this probability together, after top_k; 1: from all."""
    seed: int = 0
    """Of the first prompt; the next ones have the next numbers."""
    stop: tuple[str, ...] = ()
    """Texts that end a row and are not part of it; where several are complete, that which was so first."""
    packed_cache: bool = False
    """Keep keys and values as the codes of act_k and act_v (lab/generate/packed_cache.py)."""

    def __post_init__(self) -> None:
        rules = [
            (self.tokens >= 1, f"tokens={self.tokens}: ask for 1 token at least"),
            (math.isfinite(self.temperature) and self.temperature >= 0, f"temperature={self.temperature}: 0 or more"),
            (self.top_k >= 0, f"top_k={self.top_k}: a number of tokens, or 0 for all"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: a share above 0, at most 1"),
            (self.seed >= 0, f"seed={self.seed}: 0 or more"),
            (not isinstance(self.stop, str) and all(self.stop), "stop: texts of one character at least, in a tuple"),
        ]
        for holds, message in rules:
            if not holds:
                raise SamplingError(message)


def text_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Ids of a text. Raises SamplingError for what is none: a command line makes it of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SamplingError("the text has half of a surrogate pair: give Unicode text, in UTF-8") from None
    return tokenizer.encode(text)


def drawable_ids(tokenizer: TextTokenizer, vocab_size: int) -> np.ndarray:
    """bool_V of the model's ids that may be drawn: those of text, and BOS, which ends a document.

    Never: ids that the tokenizer does not have, controls, unused and unknown pieces. Raises SamplingError for a
    tokenizer that is larger than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise SamplingError(
            f"{tokenizer.name} has {tokenizer.vocab_size} tokens, the model {vocab_size}: it is not the model's own"
        )
    unknown_V, boundary_V = tokenizer.token_bytes[:2]
    drawable_V = np.zeros(vocab_size, dtype=bool)
    drawable_V[: tokenizer.vocab_size] = ~(unknown_V | boundary_V)
    drawable_V[tokenizer.bos_id] = True
    return drawable_V


def most_likely(logits_V: np.ndarray, count: int) -> np.ndarray:
    """bool_V of the `count` largest, of equal ones those of the lowest ids."""
    if count >= len(logits_V):
        return np.ones(len(logits_V), dtype=bool)
    smallest = np.partition(logits_V, -count)[-count]
    kept_V = logits_V > smallest
    kept_V[np.flatnonzero(logits_V == smallest)[: count - int(kept_V.sum())]] = True
    return kept_V


def token_probabilities(logits_V: np.ndarray, drawable_V: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """float64 probabilities of a draw at a positive temperature, 0 for what can't be drawn. Raises SamplingError."""
    logits_V = np.where(drawable_V, logits_V.astype(np.float64), -np.inf)
    if not np.isfinite(logits_V[drawable_V]).all():
        raise SamplingError("the model's predictions are NaN or infinite: its weights are broken")
    with np.errstate(over="ignore"):  # the smallest temperatures make -inf of what is not the largest
        weight_V = np.exp((logits_V - logits_V.max()) / options.temperature)
    if options.top_k:
        weight_V *= most_likely(logits_V, options.top_k)
    weight_V /= weight_V.sum()
    if options.top_p < 1:
        order_V = np.argsort(-logits_V, kind="stable")
        needed = 1 + int(np.searchsorted(np.cumsum(weight_V[order_V]), options.top_p))
        weight_V[order_V[needed:]] = 0.0
    return weight_V / weight_V.sum()


def choose_token(logits_V: np.ndarray, drawable_V: np.ndarray, options: SamplingOptions, uniform: float) -> int:
    """The id at `uniform`, from [0, 1), of the cumulative probabilities in the order of ids. Raises SamplingError."""
    if options.temperature == 0:
        if not np.isfinite(logits_V[drawable_V]).all():
            raise SamplingError("the model's predictions are NaN or infinite: its weights are broken")
        return int(np.where(drawable_V, logits_V, -np.inf).argmax())
    probability_V = token_probabilities(logits_V, drawable_V, options)
    sums_V = np.cumsum(probability_V)
    chosen = int(np.searchsorted(sums_V, uniform * sums_V[-1], side="right"))
    return min(chosen, int(np.flatnonzero(probability_V)[-1]))  # rounding may make the product the sum itself


class GrowingText:
    """The text of tokens as they come: of a character that is split over tokens, nothing until it is whole."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.given = len(tokenizer.decode(self.ids))
        """Characters of the decoded ids that are the prompt's, or were given."""

    def add(self, token: int) -> str:
        """What the token makes certain."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        tail = text[1 - LONGEST_CHARACTER :]
        new = self.take(text, len(text) - (len(tail) - len(tail.rstrip(REPLACEMENT))))
        if len(self.ids) > DECODED_AT_ONCE and self.given == len(text):
            self.shorten()
        return new

    def finish(self) -> str:
        """The rest, a character that was never completed as U+FFFD."""
        text = self.tokenizer.decode(self.ids)
        return self.take(text, len(text))

    def take(self, text: str, end: int) -> str:
        new = text[self.given : end]
        self.given = max(self.given, end)
        return new

    def shorten(self) -> None:
        """Go on from the last token alone, where what follows decodes the same behind it.

        It must not begin within a character, nor be a blank, which some tokenizers swallow at the start of a text. An
        operator of CaseOps acts on any number of tokens, so its text is decoded from the start.
        """
        last = self.tokenizer.decode(self.ids[-1:])
        if self.tokenizer.kind != "caseops" and last.strip() and REPLACEMENT not in last:
            self.ids, self.given = self.ids[-1:], len(last)


class StopTexts:
    """Text up to the first stop text; what may be the beginning of one is held back until it is known."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = stops, "", False

    def add(self, text: str) -> str:
        """What comes out for sure. The stop text that is complete first counts, of those the longest."""
        assert not self.found, "nothing follows a stop text"
        self.held += text
        begins = [(self.held.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in self.held]
        if begins:
            end, minus_length = min(begins)
            text, self.held, self.found = self.held[: end + minus_length], "", True
            return text
        return self.release(max((self.overlap(stop) for stop in self.stops), default=0))

    def overlap(self, stop: str) -> int:
        """Characters at the end of what is held that a stop text begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)

    def release(self, kept: int = 0) -> str:
        cut = len(self.held) - kept
        text, self.held = self.held[:cut], self.held[cut:]
        return text


class SampledRow:
    """A prompt and what has been drawn after it."""

    def __init__(self, tokenizer: TextTokenizer, prompt: str, options: SamplingOptions, number: int):
        prompt_ids = text_ids(tokenizer, prompt)
        self.ids = [tokenizer.bos_id, *prompt_ids]
        self.prompt_tokens = len(self.ids)
        self.bos_id, self.options = tokenizer.bos_id, options
        self.uniform = random.Random(options.seed + number).random
        self.text, self.stops = GrowingText(tokenizer, prompt_ids), StopTexts(options.stop)
        self.ended = ""
        """Why nothing more is drawn: length, document or stop."""

    @property
    def drawn(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def draw(self, logits_V: np.ndarray, drawable_V: np.ndarray) -> str:
        """Draw a token; the new text that it makes certain. Raises SamplingError."""
        assert not self.ended
        token = choose_token(logits_V, drawable_V, self.options, self.uniform())
        self.ids.append(token)
        if token == self.bos_id:
            self.ended = "document"
            return self.last_text()
        new = self.stops.add(self.text.add(token))
        if self.stops.found:
            self.ended = "stop"
        elif self.drawn == self.options.tokens:
            self.ended = "length"
            new += self.last_text()
        return new

    def last_text(self) -> str:
        """What was held back."""
        new = self.stops.add(self.text.finish())
        if self.stops.found:
            self.ended = "stop"
        return new + self.stops.release()
