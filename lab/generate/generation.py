"""Text that a model goes on with, for one prompt or several, over a cache of keys and values.

Prompts of equal length share a cache and are read together, others have their own, so nothing is padded: a row is
what it is alone with its seed, up to the rounding of a device's kernels for another batch.

A model whose attention window is shorter than its training rows reads on for ever: positions grow, the cache forgets.
Any other one has never seen more than a training row: when that is full, the last half of the text is read again.

B rows of a batch, T tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from golf.config.model import ModelConfig
from golf.model.cache import KeyValueCache
from golf.model.gpt import GPT
from golf.runtime import Runtime
from lab.generate.packed_cache import packed_cache
from lab.generate.sampling import SampledRow, SamplingError, SamplingOptions, drawable_ids
from lab.prepare.text_tokenizer import TextTokenizer


@dataclass
class SamplingStatistics:
    """What a generation has cost so far. Seconds are those of the model and of drawing, not of who reads the text."""

    prompts: int = 0
    prompt_tokens: int = 0
    """Read before the first draw, with the document's start, after cutting to the context."""
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0
    cache_bytes: int = 0
    """Of the keys and values that are kept, of all rows."""

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated, of all rows together."""
        return self.generated_tokens / self.generated_seconds if self.generated_seconds else 0.0


def slides(config: ModelConfig) -> bool:
    """Whether a cache goes on beyond the training length: where training rows were longer than the window."""
    return 0 < config.attention_window < config.train_seq_len


class RowGroup:
    """Rows of one length that are read together.

    One that has ended stays in the batch, which reads its last token again and again, until all have ended.
    """

    def __init__(self, model: GPT, rows: list[SampledRow], packed: bool):
        self.model, self.rows = model, rows
        self.make_cache = packed_cache if packed else KeyValueCache
        self.cache = self.make_cache(model.config)
        self.logits_BV = np.empty((0, 0))

    @property
    def ended(self) -> bool:
        return all(row.ended for row in self.rows)

    def read(self, tokens: int) -> None:
        """Read the last `tokens` of every row, in pieces of a training row, into an empty cache."""
        self.cache = self.make_cache(self.model.config)
        ids_BT = torch.tensor([row.ids[-tokens:] for row in self.rows])
        for piece_BT in ids_BT.split(self.model.config.train_seq_len, dim=1):
            self.forward(piece_BT)

    def forward(self, ids_BT: torch.Tensor) -> None:
        with torch.no_grad():
            ids_BT = ids_BT.to(self.model.tok_emb.weight.device)
            self.logits_BV = self.model.logits(ids_BT, last=1, cache=self.cache)[:, -1].cpu().numpy()

    def advance(self) -> bool:
        """Read the tokens that were drawn last. True where the context was full, and was cut to its last half."""
        context = self.model.config.train_seq_len
        if slides(self.model.config) or self.cache.length < context:
            self.forward(torch.tensor([row.ids[-1:] for row in self.rows]))
            return False
        self.rows = [
            row for row in self.rows if not row.ended
        ]  # their texts are shorter, and nothing is drawn for them
        self.read(max(1, context // 2))
        return True

    def draw(self, drawable_V: np.ndarray) -> dict[SampledRow, str]:
        """The new text of the rows that had not ended. Raises SamplingError."""
        return {
            row: row.draw(logits_V, drawable_V)
            for row, logits_V in zip(self.rows, self.logits_BV, strict=True)
            if not row.ended
        }


class TextGeneration(Iterator[list[str]]):
    """Iterate over it for the new text of each prompt, token by token; it ends when all prompts have.

    `statistics` and `notes` (what was cut, in words) can be read at any time, `ended` (length, document or stop; empty
    while it goes on) of each prompt. Raises SamplingError, QuantError for a packed cache of a model without codes.
    """

    def __init__(
        self, model: GPT, tokenizer: TextTokenizer, prompts: Sequence[str], options: SamplingOptions, runtime: Runtime
    ):
        if isinstance(prompts, str) or not prompts:
            raise SamplingError("give a list of prompts, one at least; an empty text is one")
        config = model.config
        self.runtime, self.context = runtime, config.train_seq_len
        self.drawable_V = drawable_ids(tokenizer, config.vocab_size)
        self.rows = [SampledRow(tokenizer, prompt, options, number) for number, prompt in enumerate(prompts)]
        self.notes: list[str] = []
        self.was_cut = False
        self.statistics = SamplingStatistics(len(prompts))
        lengths = {row: self.prompt_length(row, number, config) for number, row in enumerate(self.rows)}
        self.groups = {
            length: RowGroup(model, [row for row in self.rows if lengths[row] == length], options.packed_cache)
            for length in sorted(set(lengths.values()))
        }
        self.statistics.prompt_tokens = sum(lengths.values())

    def prompt_length(self, row: SampledRow, number: int, config: ModelConfig) -> int:
        """Tokens of the prompt that are read, counted from its end."""
        if slides(config) or row.prompt_tokens <= self.context:
            return row.prompt_tokens
        which = f"prompt {number + 1}" if len(self.rows) > 1 else "the prompt"
        self.notes.append(
            f"{which} has {row.prompt_tokens:,} tokens with the document's start, the context is {self.context:,}: "
            f"its last {self.context:,} are read"
        )
        return self.context

    @property
    def ended(self) -> list[str]:
        return [row.ended for row in self.rows]

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds."""
        started = time.perf_counter()
        work()
        self.runtime.synchronize()
        return time.perf_counter() - started

    def read_prompts(self) -> None:
        for length, group in self.groups.items():
            group.read(length)

    def advance(self) -> None:
        if any([group.advance() for group in self.groups.values() if not group.ended]) and not self.was_cut:
            self.notes.append(
                f"the context of {self.context:,} tokens was full: the text was cut to its last "
                f"{max(1, self.context // 2):,} tokens, which were read again; so each time it is full"
            )
            self.was_cut = True

    def draw(self) -> None:
        new = {}
        for group in self.groups.values():
            new |= group.draw(self.drawable_V)
        self.new = [new.get(row, "") for row in self.rows]
        self.statistics.generated_tokens += len(new)

    def __next__(self) -> list[str]:
        if all(self.ended):
            raise StopIteration
        statistics = self.statistics
        if not statistics.generated_tokens:
            statistics.prompt_seconds += self.timed(self.read_prompts)
        else:
            statistics.generated_seconds += self.timed(self.advance)
        statistics.generated_seconds += self.timed(self.draw)
        statistics.cache_bytes = sum(layer.nbytes for group in self.groups.values() for layer in group.cache.layers)
        return self.new
