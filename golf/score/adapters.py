"""Adapts the network to each document while it is scored, score first: low-rank changes of its matrices.

The changes are LoRA's (Hu et al. 2021, arXiv 2106.09685); parameter-golf pull requests 1530 and 1953 score so.
Documents go through lanes in the order of the stream; a lane takes the next one when its own has ended, and forgets
what it learned. In a step every lane scores the next chunk of its document, from a window of the stream that ends
there, and then learns from this chunk. Batches have one shape, whatever documents there are.

B lanes, T tokens of a window, S targets of a chunk (the last S of T), I input width, O output width, R rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from golf.config.scoring import ScoreConfig
from golf.model.gpt import GPT
from golf.model.layers import Linear
from golf.score.scorer import Recorder, ScoreSettings, target_nats

ADAPTED = ("attn.c_k", "attn.proj", "mlp.fc", "mlp.proj", "unembed")
"""Matrices that are changed, by the ends of their names. Queries and values are not (pull request 1953)."""
BETAS = 0.9, 0.99
SHORTEST = 4
"""The first chunk of a document is a fourth of the others, so that short documents are learned from too."""


class Chunk(NamedTuple):
    """Describes what a lane scores in a step: targets first .. last - 1 of the stream."""

    document: int
    first: int
    last: int
    window_end: int
    """One behind the last token of its window. It does not say where the document ends, which nobody knows before."""
    opens: bool
    """Whether it is the first of its document."""
    closes: bool


def chunk_size(place: int, size: int) -> int:
    """Returns the size of the chunk that begins at a place in its document."""
    return min(size, max(size // SHORTEST, 1, place))


def document_chunks(number: int, begin: int, end: int, size: int) -> Iterator[Chunk]:
    """Yields a document's chunks: of size/4, size/4, size/2, and then `size` targets. They do not depend on its
    length."""
    first = begin
    while first < end:
        window_end = first + chunk_size(first - begin, size)
        last = min(end, window_end)
        yield Chunk(number, first, last, window_end, first == begin, last == end)
        first = last


def lane_steps(documents: Iterable[tuple[int, int]], lanes: int, size: int) -> Iterator[list[Chunk | None]]:
    """Yields each step's chunks, by lane; None for a lane that has no document left. Documents are numbered as they
    are taken: one when a lane is free for it."""
    every = iter(enumerate(documents))
    work: list[Iterator[Chunk]] = [iter(())] * lanes
    while True:
        step: list[Chunk | None] = []
        for lane in range(lanes):
            chunk = next(work[lane], None)
            if chunk is None and (document := next(every, None)):
                work[lane] = document_chunks(document[0], *document[1], size)
                chunk = next(work[lane])
            step.append(chunk)
        if not any(step):
            return
        yield step


class Adapters:
    """Holds a low-rank change of every adapted matrix for each lane, and their optimizer: Adam, with a clock a lane."""

    def __init__(self, model: GPT, score: ScoreConfig):
        self.model, self.score, lanes = model, score, score.adapter_lanes
        device = model.skip_weights.device
        self.modules = [module for name, module in model.named_modules() if name.endswith(ADAPTED)]
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = [], []
        for module in self.modules:
            width_out, width_in = module.weight.shape if isinstance(module, Linear) else model.tok_emb.weight.shape
            start_RI = (2 * torch.rand(score.adapter_rank, width_in, generator=generator) - 1) / width_in**0.5
            self.down.append(start_RI.repeat(lanes, 1, 1).to(device).requires_grad_())
            self.up.append(torch.zeros(lanes, width_out, score.adapter_rank, device=device, requires_grad=True))
        self.starts = [part[0].detach().clone() for part in self.down]
        self.parameters = [*self.down, *self.up]
        self.moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in self.parameters]
        self.clock_B11 = torch.zeros(lanes, 1, 1, device=device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Adds each lane's change to the matrices' outputs within the context; gradients are on."""

        def change(down_BRI: Tensor, up_BOR: Tensor) -> Callable:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], y_BTO: Tensor) -> Tensor:
                x_BTI = inputs[0]
                return y_BTO + (x_BTI @ down_BRI.mT.to(x_BTI.dtype)) @ up_BOR.mT.to(x_BTI.dtype)

            return hook

        handles = [
            module.register_forward_hook(change(down_BRI, up_BOR))
            for module, down_BRI, up_BOR in zip(self.modules, self.down, self.up, strict=True)
        ]
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def forget(self, lane: int) -> None:
        """Begins anew in a lane."""
        for down_BRI, start_RI in zip(self.down, self.starts, strict=True):
            down_BRI[lane] = start_RI
        for part in (*self.up, *(moment for pair in self.moments for moment in pair), self.clock_B11):
            part[lane] = 0

    def learn(self, loss_B: Tensor) -> None:
        """Takes an optimizer step on each lane's loss; one that is 0 teaches nothing."""
        gradients = torch.autograd.grad(loss_B, self.parameters, torch.ones_like(loss_B))
        with torch.no_grad():
            self.clock_B11 += 1
            shrink_B11, shrink_squares_B11 = (1 - beta**self.clock_B11 for beta in BETAS)
            for part, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square(), 1 - BETAS[1])
                step = mean / shrink_B11 / ((square / shrink_squares_B11).sqrt() + 1e-8)
                part -= self.score.adapter_lr * step


class LaneScorer:
    """Scores chunks by lanes: predicts, reports, learns."""

    def __init__(
        self, model: GPT, tokens_N1: Tensor, settings: ScoreSettings, score: ScoreConfig,
        distributions: Recorder | None = None,
    ):  # fmt: skip
        self.model, self.settings, self.adapters = model.requires_grad_(False), settings, Adapters(model, score)
        self.distributions = distributions
        filler_T = torch.full((settings.seq_len,), model.config.bos_id, dtype=tokens_N1.dtype, device=tokens_N1.device)
        self.padded_N1 = torch.cat((filler_T, tokens_N1, filler_T))  # token t of the stream is at T + t

    def batch(self, step: Sequence[Chunk | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (ids_BT, targets_BS, index_BS of the targets in the stream, counted_BS)."""
        length, device = self.settings.seq_len, self.padded_N1.device
        spans = [(chunk.first, chunk.last, chunk.window_end) if chunk else (0, 0, 0) for chunk in step]
        first_B1, last_B1, end_B1 = torch.tensor(spans, device=device).T[..., None]
        index_BS = end_B1 + torch.arange(-self.settings.stride, 0, device=device)
        ids_BT = self.padded_N1[end_B1 + torch.arange(length, device=device)].long()
        targets_BS = self.padded_N1[index_BS + length + 1].long()
        return ids_BT, targets_BS, index_BS, (index_BS >= first_B1) & (index_BS < last_B1)

    def step(self, step: Sequence[Chunk | None], recorder: Recorder, learned: Recorder | None = None) -> None:
        """Scores a chunk in each lane, then learns from it; `learned` hears of it afterwards."""
        for lane, chunk in enumerate(step):
            if chunk and chunk.opens:
                self.adapters.forget(lane)
        ids_BT, targets_BS, index_BS, counted_BS = self.batch(step)
        with self.adapters.attached():
            if self.distributions:
                nats_BSV = self.model.token_nats(ids_BT, self.settings.stride, self.settings.rope_base)
                self.distributions(index_BS[counted_BS], nats_BSV.detach()[counted_BS])
                losses_BS = target_nats(nats_BSV, targets_BS)
            else:
                losses_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base)
            loss_B = (losses_BS * counted_BS).sum(1) / counted_BS.sum(1).clamp(min=1)
        nats_BS = losses_BS.detach().double()
        recorder(index_BS[counted_BS], nats_BS[counted_BS])
        self.adapters.learn(loss_B)
        if learned:
            learned(index_BS[counted_BS], nats_BS[counted_BS])

    def effect(self, documents: Sequence[tuple[int, int]]) -> float:
        """Returns by how many nats, at most, a step on a document's first chunk changes a target of the second: of the
        first document that has two."""
        for number, document in enumerate(documents):
            first, *more = islice(document_chunks(number, *document, self.settings.stride), 2)
            if more:
                idle = [None] * (len(self.adapters.clock_B11) - 1)
                self.distributions = None
                self.step([first, *idle], lambda index_M, nats_M: None)
                ids_BT, targets_BS, _, counted_BS = self.batch([*more, *idle])
                plain_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base)
                with self.adapters.attached():
                    adapted_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base).detach()
                return float(((adapted_BS - plain_BS) * counted_BS).abs().max())
        return 0.0
