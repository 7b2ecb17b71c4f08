"""Puts adaptive scoring under probe, by the code that makes the score: adapters of each document step by step, the
mixture with counts target by target.

Letters: N targets of a stream, K candidate tokens.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from golf.config.scoring import ScoreConfig
from golf.model.gpt import GPT
from golf.score.adapters import Chunk, LaneScorer, lane_steps
from golf.score.mixture import CountMixture, NetworkNats, stream_parts
from golf.score.scorer import ScoreSettings, evaluation_mode
from golf.score.windows import stream_documents
from lab.probe.probes import ProbedScorer, ScoreEvent, ScoreTrace
from lab.probe.scorer_adapter import contiguous_spans

MakeMixture = Callable[[int, int, ScoreConfig], CountMixture]


class MixtureScorer:
    """Scores with the network under probe and a mixture of its probabilities with counts."""

    isolates_documents = False

    def __init__(self, network: ProbedScorer, score: ScoreConfig, make_mixture: MakeMixture = CountMixture):
        self.network, self.score, self.make_mixture = network, score, make_mixture
        self.vocab_size, self.bos_id = network.vocab_size, network.bos_id
        self.traced: dict[bytes, np.ndarray] = {}
        """Nats of the network for the last three streams: a probe compares changed ones with one that stays."""

    def network_nats(self, tokens_N1: np.ndarray) -> np.ndarray:
        """Returns the network's nats_N, or nats_NV where the mixture is corrected at last."""
        stream = tokens_N1.tobytes()
        found_N = self.traced.pop(stream, None)
        if found_N is None:
            corrects, network = self.score.mixture_successors > 0, self.network
            found_N = network.distributions(tokens_N1) if corrects else network.trace(tokens_N1).nats_N
        self.traced = dict([*self.traced.items()][-2:]) | {stream: found_N}
        return found_N

    def targets(self, tokens_N1: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, CountMixture]]:
        """Yields each target, its place in its document, the document's tokens, and the mixture that is to score it."""
        for documents in stream_parts(tokens_N1, self.bos_id, self.score.mixture_parts):
            mixture = self.make_mixture(sum(end - begin for begin, end in documents), self.vocab_size, self.score)
            for begin, end in documents:
                mixture.open_document(end - begin)
                document = tokens_N1[begin : end + 1].astype(np.int32)
                yield from ((target, target - begin, document, mixture) for target in range(begin, end))

    def trace(self, tokens_N1: np.ndarray) -> ScoreTrace:
        """Scores the stream. What a target's turn counted is an update with as many targets from it on."""
        network_N, nats_N, events = self.network_nats(tokens_N1), np.full(len(tokens_N1) - 1, np.nan), []
        for target, place, document, mixture in self.targets(tokens_N1):
            counted = mixture.counted
            (nats_N[target],) = mixture.score_targets(document, place, network_N[target : target + 1])
            events += [ScoreEvent("score", target, target + 1)]
            events += [ScoreEvent("update", target, target + mixture.counted - counted)]
        return ScoreTrace(nats_N, events)

    def log_probabilities(self, tokens_N1: np.ndarray, target: int, candidates_K: np.ndarray) -> np.ndarray:
        """Asks the mixture itself: scores each candidate in the target's place, each time from a copy of its state."""
        network_N = self.network_nats(tokens_N1)
        if self.score.mixture_successors:
            network_K = np.broadcast_to(network_N[target], (len(candidates_K), self.vocab_size))
        else:
            network_K = -self.network.log_probabilities(tokens_N1, target, candidates_K)
        for number, place, document, mixture in self.targets(tokens_N1):
            if number == target:
                return score_candidates(mixture, document, place, candidates_K, network_K)
            mixture.score_targets(document, place, network_N[number : number + 1])
        raise AssertionError(f"target {target} is in no document")


class AdaptedScorer:
    """Scores with a network that adapts to each document."""

    isolates_documents = False

    def __init__(self, model: GPT, settings: ScoreSettings, score: ScoreConfig):
        self.model, self.settings, self.score = model, settings, score
        self.vocab_size, self.bos_id = model.config.vocab_size, model.config.bos_id

    def steps(self, tokens_N1: np.ndarray) -> Iterator[tuple[LaneScorer, list[Chunk | None]]]:
        """Yields a scorer with each step that it is to take; whoever asks takes it."""
        stream_N1 = torch.from_numpy(tokens_N1.astype(np.int32)).to(next(self.model.parameters()).device)
        scorer = LaneScorer(self.model, stream_N1, self.settings, self.score)
        documents = stream_documents(tokens_N1, self.bos_id)
        for step in lane_steps(documents, self.score.adapter_lanes, self.settings.stride):
            yield scorer, step

    def trace(self, tokens_N1: np.ndarray) -> ScoreTrace:
        nats_N, events = np.full(len(tokens_N1) - 1, np.nan), []

        def record(index_M: Tensor, nats_M: Tensor) -> None:
            nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()
            events.extend(ScoreEvent("score", *span) for span in contiguous_spans(index_M.cpu().numpy()))

        def learned(index_M: Tensor, nats_M: Tensor) -> None:
            events.extend(ScoreEvent("update", *span) for span in contiguous_spans(index_M.cpu().numpy()))

        with evaluation_mode(self.model):
            for scorer, step in self.steps(tokens_N1):
                scorer.step(step, record, learned)
        return ScoreTrace(nats_N, events)

    def distributions(self, tokens_N1: np.ndarray) -> np.ndarray:
        """Returns float16 nats_NV of all tokens of the vocabulary for each target."""
        nats = NetworkNats(len(tokens_N1) - 1, None, self.vocab_size)
        with evaluation_mode(self.model):
            for scorer, step in self.steps(tokens_N1):
                scorer.distributions = nats.record_distributions
                scorer.step(step, nats.record)
        return nats.nats_NV

    def log_probabilities(self, tokens_N1: np.ndarray, target: int, candidates_K: np.ndarray) -> np.ndarray:
        """Asks the network as it has adapted when the target's turn comes, in the batch that scores it."""
        with evaluation_mode(self.model):
            for scorer, step in self.steps(tokens_N1):
                lane = next((k for k, c in enumerate(step) if c and c.first <= target < c.last), None)
                if lane is None:
                    scorer.step(step, lambda index_M, nats_M: None)
                    continue
                for opened in (k for k, chunk in enumerate(step) if chunk and chunk.opens):
                    scorer.adapters.forget(opened)
                ids_BT, _, index_BS, _ = scorer.batch(step)
                with scorer.adapters.attached():
                    logits_BSV = self.model.logits(ids_BT, self.settings.stride, self.settings.rope_base).detach()
                row_V = logits_BSV[lane, int((index_BS[lane] == target).nonzero())].double().log_softmax(0)
                return row_V.cpu().numpy()[candidates_K]
        raise AssertionError(f"target {target} is in no document")


def score_candidates(
    mixture: CountMixture, document: np.ndarray, place: int, candidates_K: np.ndarray, network_K: np.ndarray
) -> np.ndarray:
    """Returns ln of what the mixture gives to each candidate in a target's place, and leaves no trace in it."""
    states = {name: part for name, part in vars(mixture).items() if isinstance(part, tuple)}  # of arrays
    copies = {name: type(part)(*map(np.empty_like, part)) for name, part in states.items()}
    changed, found_K = document.copy(), np.zeros(len(candidates_K))
    for k, candidate in enumerate(candidates_K):
        alone = copy.copy(mixture)
        for name, part in states.items():
            for mine, array in zip(copies[name], part, strict=True):
                np.copyto(mine, array)
            setattr(alone, name, copies[name])
        changed[place + 1] = candidate
        found_K[k] = -alone.score_targets(changed, place, network_K[k : k + 1])[0]
    return found_K
