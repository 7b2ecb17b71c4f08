"""Scores zero-shot multiple choice on local files: HellaSwag (arXiv 1905.07830) and BoolQ (arXiv 1905.10044).

The answer is the choice of largest log-likelihood after the context, divided by the choice's characters; accuracy
without that division is told beside it. Texts are put together as the lm-eval harness does it, so that figures compare.
"""

import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from golf.config.knobs import UserError, parse_json
from lab.generate.sampling import SamplingError
from lab.prepare.text_tokenizer import TextTokenizer

RESOLVED = 2.0
"""Standard errors that a difference must exceed."""


class ZeroShotError(UserError):
    """A file that holds no such items, or a model that gives them no likelihood."""


class ChoiceModel(Protocol):
    """Describes what is asked of a model; lab/generate/text_model.py has it."""

    tokenizer: TextTokenizer

    @property
    def context(self) -> int:
        """Is the number of tokens that it sees at once."""

    def continuation_nats(self, context: str, continuation: str) -> tuple[float, int, int]:
        """Returns (nats, tokens, bytes) of a continuation, as much of the end of the context read as there is room for.

        Raises SamplingError for a continuation that has no room itself.
        """


@dataclass(frozen=True)
class ZeroShotItem:
    """One question."""

    context: str
    choices: tuple[str, ...]
    """Without the blank that joins them to the context."""
    answer: int


@dataclass(frozen=True)
class ZeroShotResult:
    """Shares are of the items that were scored."""

    task: str
    backend: str
    """own or lm-eval."""
    items: int
    left_out: int
    """Items with a choice that is longer than the model's context: they are not among `items`."""
    cut_items: int
    """Items of which the model saw the end of the context alone."""
    accuracy: float
    """By log-likelihood per character."""
    accuracy_unnormalised: float
    chance: float
    """Accuracy expected of blind guesses."""
    majority: float
    """Accuracy of always giving the answer that is right most often."""
    seconds: float

    @property
    def standard_error(self) -> float:
        return share_error(self.accuracy, self.items)

    @property
    def standard_error_unnormalised(self) -> float:
        return share_error(self.accuracy_unnormalised, self.items)

    @property
    def margin(self) -> float:
        """Is how far from chance counts: standard errors of the accuracy, or of as many guesses where that is more."""
        guessed = math.sqrt(self.chance * (1 - self.chance) / self.items)
        return RESOLVED * max(self.standard_error, guessed)

    @property
    def verdict(self) -> str:
        difference = self.accuracy - self.chance
        if abs(difference) <= self.margin:
            return "not distinguishable from chance"
        if difference < 0:
            return "below chance"
        above_majority = self.accuracy - self.majority > RESOLVED * self.standard_error
        return "above chance" + ("" if above_majority else ", but not above one answer for every item")


def share_error(share: float, items: int) -> float:
    """Returns the standard error of a share of `items`, 2 at least."""
    return math.sqrt(share * (1 - share) / (items - 1))


def field_of(record: Mapping[str, object], name: str, kind: type) -> object:
    if not isinstance(record.get(name), kind):
        raise ZeroShotError(f"{name} must be a {'text' if kind is str else 'list'}")
    return record[name]


def cleaned_text(text: str) -> str:
    """Returns the text without the marks that HellaSwag's WikiHow texts have kept: " [title]" ends a sentence, other
    brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag_item(record: Mapping[str, object]) -> ZeroShotItem:
    """Makes an item of a line of hellaswag_val.jsonl. Raises ZeroShotError."""
    label, first, second = (str(field_of(record, name, str)) for name in ("activity_label", "ctx_a", "ctx_b"))
    endings, answer = field_of(record, "endings", list), record.get("label")
    assert isinstance(endings, list)
    if not all(isinstance(ending, str) for ending in endings):
        raise ZeroShotError("endings must be texts")
    if isinstance(answer, str) and answer.isdecimal():  # as Hugging Face keeps it
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(endings):
        raise ZeroShotError(f"label {answer!r} is not the number of an ending: give the part that has answers (val)")
    return ZeroShotItem(
        cleaned_text(f"{label}: {first} {second.capitalize()}"), tuple(map(cleaned_text, endings)), answer
    )


def boolq_item(record: Mapping[str, object]) -> ZeroShotItem:
    """Makes an item of a line of BoolQ's dev.jsonl (`answer`) or SuperGLUE's (`label`). Raises ZeroShotError."""
    passage, question = field_of(record, "passage", str), field_of(record, "question", str)
    answer = record.get("answer", record.get("label"))
    if answer not in (False, True):
        raise ZeroShotError(f"answer {answer!r} is neither true nor false: give the part that has answers (dev)")
    return ZeroShotItem(f"{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"), int(answer))


ZERO_SHOT_TASKS: dict[str, Callable[[Mapping[str, object]], ZeroShotItem]] = {
    "hellaswag": hellaswag_item,
    "boolq": boolq_item,
}
"""By name: from a record to its item."""


def read_items(task: str, data: bytes, name: str, limit: int = 0) -> list[ZeroShotItem]:
    """Returns the items in a JSONL file's lines, the first `limit` (0: all). Raises ZeroShotError, with the line."""
    if limit < 0:
        raise ZeroShotError(f"--limit {limit}: a number of items, or 0 for all")
    items: list[ZeroShotItem] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        if limit and len(items) == limit:
            break
        try:
            items.append(checked_item(ZERO_SHOT_TASKS[task], line))
        except (ZeroShotError, ValueError) as error:
            raise ZeroShotError(f"{name}, line {number}: no item of {task}: {error}") from None
    if len(items) < 2:
        raise ZeroShotError(f"{name} has {len(items)} items: an accuracy with its error takes 2 at least")
    return items


def checked_item(make: Callable[[Mapping[str, object]], ZeroShotItem], line: bytes) -> ZeroShotItem:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ZeroShotError("it is no JSON object")
    item = make(record)
    if len(item.choices) < 2 or not all(choice.strip() for choice in item.choices):
        raise ZeroShotError("it needs two choices at least, none of them empty")
    return item


def choice_nats(model: ChoiceModel, item: ZeroShotItem) -> list[float]:
    """Returns the nats of each choice. Raises SamplingError where one is too long, ZeroShotError for a broken model."""
    nats = [model.continuation_nats(item.context, f" {choice}")[0] for choice in item.choices]
    if not all(map(math.isfinite, nats)):
        raise ZeroShotError("the model gives a choice NaN or infinite nats: its weights are broken")
    return nats


def is_cut(model: ChoiceModel, item: ZeroShotItem) -> bool:
    """Says whether the model has no room for all of the context before each choice; its document's start takes one
    token, and the last token of a choice is never read."""
    return any(len(model.tokenizer.encode(f"{item.context} {choice}")) > model.context for choice in item.choices)


def chosen(nats: Sequence[float], item: ZeroShotItem) -> tuple[int, int]:
    """Returns (choice by nats per character, choice by nats); of equal ones the first."""
    per_character = [spent / len(choice) for spent, choice in zip(nats, item.choices, strict=True)]
    return per_character.index(min(per_character)), list(nats).index(min(nats))


def score_items(
    model: ChoiceModel, task: str, items: Sequence[ZeroShotItem], advance: Callable[[int], None] = lambda done: None
) -> ZeroShotResult:
    """Asks all items by our own scorer. Raises ZeroShotError."""
    started = time.perf_counter()
    scored: list[tuple[ZeroShotItem, tuple[int, int]]] = []
    cut = 0
    for done, item in enumerate(items, start=1):
        try:
            scored.append((item, chosen(choice_nats(model, item), item)))
            cut += is_cut(model, item)
        except SamplingError:  # a choice has no room: counted as left out
            pass
        advance(done)
    if len(scored) < 2:
        raise ZeroShotError(f"{len(items) - len(scored)} of {len(items)} items have choices longer than the context")
    hits = [[answer == item.answer for answer in answers] for item, answers in scored]
    accuracies = [sum(column) / len(hits) for column in zip(*hits, strict=True)]
    asked = [item for item, _ in scored]
    return ZeroShotResult(
        task, "own", len(asked), len(items) - len(asked), cut, *accuracies, *blind_shares(asked),
        time.perf_counter() - started,
    )  # fmt: skip


def blind_shares(items: Sequence[ZeroShotItem]) -> tuple[float, float]:
    """Returns the accuracies without looking: of guesses, and of the most frequent answer."""
    guessed = sum(1 / len(item.choices) for item in items) / len(items)
    return guessed, Counter(item.answer for item in items).most_common(1)[0][1] / len(items)


def zero_shot_remarks(result: ZeroShotResult, model_context: int) -> list[str]:
    """Returns what the figures leave unsaid."""
    lines = [
        f"{result.items:,} items, zero-shot; the answer is the choice of most log-likelihood per character",
        f"chance: {result.chance:.1%}; one answer for every item, the commonest: {result.majority:.1%}",
        "models of a few million parameters, and of a hundred on little text, are expected near chance here",
    ]
    if result.cut_items:
        lines.append(
            f"{result.cut_items:,} items are longer than the context of {model_context:,} tokens: "
            "the model saw their end, their beginning was cut off"
        )
    if result.left_out:
        lines.append(f"{result.left_out:,} items left out: a choice alone is longer than the context")
    return lines


def load_items(task: str, path: Path, limit: int = 0) -> tuple[list[ZeroShotItem], str]:
    """Returns the items in a file, and its SHA-256. Raises ZeroShotError, OSError."""
    data = path.read_bytes()
    return read_items(task, data, str(path), limit), hashlib.sha256(data).hexdigest()
