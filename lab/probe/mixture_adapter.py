"""Puts the mixture with counts under probe: driven target by target, by the code that makes the score.

Letters: N targets of a stream, K candidate tokens.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np

from golf.config.scoring import ScoreConfig
from golf.score.mixture import CountMixture, stream_parts
from lab.probe.probes import ProbedScorer, ScoreEvent, ScoreTrace

MakeMixture = Callable[[int, int, ScoreConfig], CountMixture]


class MixtureScorer:
    """Scores with the network under probe and a mixture of its probabilities with counts."""

    isolates_documents = False

    def __init__(self, network: ProbedScorer, score: ScoreConfig, make_mixture: MakeMixture = CountMixture):
        self.network, self.score, self.make_mixture = network, score, make_mixture
        self.vocab_size, self.bos_id = network.vocab_size, network.bos_id
        self.traced: tuple[bytes, np.ndarray] | None = None

    def network_nats(self, tokens_N1: np.ndarray) -> np.ndarray:
        """Returns the network's nats_N, from memory where the stream is the last one."""
        if self.traced is None or self.traced[0] != tokens_N1.tobytes():
            self.traced = tokens_N1.tobytes(), self.network.trace(tokens_N1).nats_N
        return self.traced[1]

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
        network_K = -self.network.log_probabilities(tokens_N1, target, candidates_K)
        for number, place, document, mixture in self.targets(tokens_N1):
            if number == target:
                return np.array(
                    [
                        score_candidate(mixture, document, place, candidate, nats)
                        for candidate, nats in zip(candidates_K, network_K, strict=True)
                    ]
                )
            mixture.score_targets(document, place, network_N[number : number + 1])
        raise AssertionError(f"target {target} is in no document")


def score_candidate(mixture: CountMixture, document: np.ndarray, place: int, candidate: int, nats: float) -> float:
    """Returns ln of what the mixture gives to a candidate in a target's place, and leaves no trace in it."""
    alone, changed = copy.copy(mixture), document.copy()
    alone.everything, alone.document, alone.weights = (
        type(part)(*(array.copy() for array in part))
        for part in (mixture.everything, mixture.document, mixture.weights)
    )
    changed[place + 1] = candidate
    return -float(alone.score_targets(changed, place, np.array([nats]))[0])
