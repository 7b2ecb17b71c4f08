"""Predicts streams of tokens one token at a time, as the scorer scores them: its windows, its mixture, its learning.

Whoever encodes and whoever decodes run this same code, so that both see the same bits. B streams are read beside each
other, each with its own windows and document, over one set of counts of everything.

B streams, V tokens of the vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from golf.config.scoring import ScoreConfig
from golf.model.cache import KeyValueCache
from golf.model.gpt import GPT
from golf.score.adapters import Chunk, LaneScorer, chunk_size
from golf.score.counts import CountTables, MixtureWeights, compiled_kernels, new_tables, new_weights
from golf.score.mixture import distributions_from
from golf.score.scorer import ScoreSettings
from golf.score.successors import SuccessorWeights, compiled_corrections, new_successor_weights
from golf.score.windows import plan_windows
from lab.compress.distribution import compiled_distribution


class WindowReader:
    """Reads streams of `targets` targets through a cache of the window that scores the next target."""

    def __init__(self, model: GPT, settings: ScoreSettings, targets: int):
        self.model, self.settings = model.eval(), settings
        self.plan = plan_windows(targets, settings.seq_len, settings.stride)
        self.window, self.cache, self.device = -1, None, next(model.parameters()).device

    def rows(self, tokens_BN: np.ndarray, target: int) -> np.ndarray:
        """Returns the network's float64 distributions_BV of a target, given all tokens before it. Targets come in
        order."""
        first = target
        if self.window < 0 or target == self.plan.ends_W[self.window]:
            self.window += 1
            self.cache, first = KeyValueCache(self.model.config), int(self.plan.starts_W[self.window])
        ids_BT = torch.from_numpy(tokens_BN[:, first : target + 1].astype(np.int64)).to(self.device)
        with torch.no_grad():
            logits_B1V = self.model.logits(ids_BT, 1, self.settings.rope_base, self.cache)
        return logits_B1V[:, 0].double().log_softmax(-1).exp().cpu().numpy()


class AdaptedReader:
    """Reads one stream by a network that adapts to each of its documents, as golf/score/adapters.py scores it."""

    def __init__(self, model: GPT, settings: ScoreSettings, score: ScoreConfig, targets: int):
        self.model, self.settings = model.eval(), settings
        blank_N1 = torch.full((targets + 1,), model.config.bos_id, device=next(model.parameters()).device)
        self.scorer = LaneScorer(model, blank_N1, settings, replace(score, adapter_lanes=1))
        self.chunk, self.cache, self.begin = Chunk(0, 0, 0, 0, True, False), None, 0

    def rows(self, tokens_BN: np.ndarray, target: int) -> np.ndarray:
        """Returns the network's float64 distribution_1V of a target, given all tokens before it. Targets come in
        order."""
        opens, length = tokens_BN[0, target] == self.model.config.bos_id, self.settings.seq_len
        self.scorer.padded_N1[length + target] = int(tokens_BN[0, target])
        first = length + target
        if opens or target == self.chunk.window_end:
            self.turn_over(target, bool(opens))
            first = self.chunk.window_end  # that of the window's first token in the padded stream
        with self.scorer.adapters.attached(), torch.no_grad():
            ids_1T = self.scorer.padded_N1[None, first : length + target + 1].long()
            logits_11V = self.model.logits(ids_1T, 1, self.settings.rope_base, self.cache)
        return logits_11V[:, 0].double().log_softmax(-1).exp().cpu().numpy()

    def turn_over(self, target: int, opens: bool) -> None:
        """Learns from the chunk that ends at a target, and begins the next one."""
        if self.chunk.first < target:
            self.scorer.step([self.chunk._replace(last=target, opens=False)], lambda index_M, nats_M: None)
        if opens:
            self.scorer.adapters.forget(0)
            self.begin = target
        window_end = target + chunk_size(target - self.begin, self.settings.stride)
        self.chunk, self.cache = Chunk(0, target, 0, window_end, opens, False), KeyValueCache(self.model.config)


@dataclass
class StreamState:
    """Holds what the mixture knows of one stream."""

    weights: MixtureWeights
    """All streams', as `learned` is, but for the class of this one's last target's probability."""
    learned: SuccessorWeights
    document: CountTables
    begin: int
    """The document's first token."""


class StreamPredictor:
    """Predicts the next token of each stream, then learns from it. Every stream begins with a document start."""

    def __init__(self, model: GPT, settings: ScoreSettings, score: ScoreConfig, lengths: list[int], whole: int = 0):
        """`lengths` are the streams' targets; `whole` are those of the stream that the first one is the beginning
        of."""
        self.bos_id, self.score, self.lengths, self.whole = model.config.bos_id, score, lengths, whole or max(lengths)
        self.tokens_BN = np.full((len(lengths), max(lengths) + 1), self.bos_id, np.int32)
        if score.adapter_rank:
            assert len(lengths) == 1, "documents adapt a network one after another"
            self.network = AdaptedReader(model, settings, score, self.whole)
        else:
            self.network = WindowReader(model, settings, self.whole)
        self.vocabulary, self.target = model.config.vocab_size, 0
        self.rows_BV, self.part = np.zeros(0), -1
        self.streams: list[StreamState] = []
        self.corrected = score.mixture_successors if score.mixture else 0
        if score.mixture:
            self.open_documents(0)

    def open_documents(self, begin: int) -> None:
        """Begins documents in all streams, with empty counts of everything, as a part of the whole stream does."""
        self.part = self.score.mixture_parts * begin // (self.whole + 1)
        self.everything = new_tables(sum(self.lengths), self.score.mixture_orders, self.vocabulary)
        weights = new_weights(self.score.mixture_orders, self.vocabulary)
        learned = new_successor_weights(self.score.mixture_orders, self.vocabulary)
        for _ in self.lengths:
            own = weights._replace(hit=np.zeros(1, np.int64))
            self.streams.append(StreamState(own, learned, self.everything, begin))
        for number in range(len(self.lengths)):
            self.open_document(number, begin)

    def open_document(self, number: int, begin: int) -> None:
        room = max(1, self.lengths[number] - begin)
        self.streams[number].begin = begin
        self.streams[number].document = new_tables(room, self.score.mixture_orders, self.vocabulary)

    def predict(self) -> None:
        """Makes the distributions of the next target ready."""
        self.rows_BV = self.network.rows(self.tokens_BN, self.target)
        if self.corrected:
            with np.errstate(divide="ignore"):
                self.rows_BV = distributions_from(-np.log(self.rows_BV).astype(np.float16))

    def distribution(self, number: int) -> np.ndarray:
        """Returns the distribution_V of the next token of a stream; streams are asked and taught in order."""
        row_V = self.rows_BV[number]
        if not self.score.mixture:
            return row_V
        stream = self.streams[number]
        known = self.tokens_BN[number, stream.begin : self.target + 1]
        return compiled_distribution()(
            self.everything, stream.document, stream.weights, stream.learned, self.corrected, known, row_V
        )

    def learn(self, number: int, token: int) -> None:
        """Takes the token that followed in a stream."""
        self.tokens_BN[number, self.target + 1] = token
        if not self.score.mixture:
            return
        stream, place = self.streams[number], self.target - self.streams[number].begin
        document, mixed_1 = self.tokens_BN[number, stream.begin : self.target + 2], np.zeros(1)
        state = self.everything, stream.document, stream.weights
        if self.corrected:
            compiled_corrections()["score_distributions"](
                *state, stream.learned, self.corrected, document, place, self.rows_BV[number : number + 1], mixed_1,
                np.zeros(1),
            )  # fmt: skip
        else:
            network_1 = self.rows_BV[number, token : token + 1]
            compiled_kernels()["score_targets"](*state, document, place, network_1, mixed_1)
        begin = self.target + 1
        if token == self.bos_id and begin < self.lengths[number]:
            if self.score.mixture_parts * begin // (self.whole + 1) == self.part:
                self.open_document(number, begin)
            else:
                self.streams = []
                self.open_documents(begin)

    def advance(self) -> None:
        """Goes on to the next target, once every stream has learned this one."""
        self.target += 1
