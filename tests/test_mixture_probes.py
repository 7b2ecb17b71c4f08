"""The mixture with counts under the legality probes: sound, and caught where a violation was planted."""

import dataclasses
import inspect
from types import FunctionType

import numpy as np
import pytest
from mixture_fixtures import BOS, MODEL, SCORE, VOCABULARY, network_rows, quiet, repetitive_stream

from golf.score import counts
from golf.score.mixture import CountMixture, mixed_nats
from lab.probe.adaptive_scorer import MixtureScorer
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS, ProbePoints, ScoreEvent, ScoreTrace, probe_scorer


class BigramNetwork:
    """An honest network: a fixed table."""

    vocab_size, bos_id, isolates_documents = VOCABULARY, BOS, False

    def __init__(self):
        self.rows_VV = network_rows(VOCABULARY)

    def trace(self, tokens_N1):
        nats_N = -np.log(self.rows_VV[tokens_N1[:-1], tokens_N1[1:]])
        return ScoreTrace(nats_N, [ScoreEvent("score", 0, len(nats_N))])

    def log_probabilities(self, tokens_N1, target, candidates_K):
        return np.log(self.rows_VV[tokens_N1[target], candidates_K])


class Planted(CountMixture):
    """Replaces kernels by planted ones, in plain Python."""

    def __init__(self, targets, vocabulary, score):
        super().__init__(targets, vocabulary, score)
        plain = {function.__name__: function for function in counts.KERNELS}
        self.honest = plain["score_targets"]
        self.kernels = plain | {"score_targets": self.score_one}

    def score_one(self, everything, document, weights, tokens, begin, *rest):
        with np.errstate(over="ignore"):
            self.planted(everything, document, weights, tokens, begin, *rest)

    def planted(self, *arguments):
        self.honest(*arguments)


class LearnsBeforeItScores(Planted):
    def planted(self, *arguments):
        self.honest(*arguments)
        self.honest(*arguments)


class CountsTheTarget(Planted):
    """Its counts include the token that is being scored, and go again afterwards."""

    def planted(self, everything, document, weights, tokens, begin, *rest):
        context = counts.find_context(everything, counts.mix_hash(np.uint64(1), 0))
        counts.count_target(everything, context, tokens[begin + 1])
        self.honest(everything, document, weights, tokens, begin, *rest)
        everything.count[everything.first[context]] -= 1
        everything.total[context] -= 1


class Unnormalised(Planted):
    def planted(self, *arguments):
        self.honest(*arguments)
        arguments[-1][:] = np.minimum(arguments[-1] * 1.02, 0.999)


class GateReadsTheTarget(Planted):
    """Mixes by the class of the token that is being scored."""

    def planted(self, everything, document, weights, tokens, begin, *rest):
        weights.hit[0] = int(tokens[begin + 1]) % counts.HITS
        self.honest(everything, document, weights, tokens, begin, *rest)


class SharesKnowTheTarget(Planted):
    """Trains a share in the middle of a prediction that uses it again: a slip that this project has made."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        source = inspect.getsource(counts.correct_probability)
        names = dict(vars(counts))
        exec(source.replace("by_token[scope]", "weights.share_by_token[scope, last]"), names)
        for name in ("mixed_probability", "score_each", "score_targets"):
            function = getattr(counts, name)
            names[name] = FunctionType(function.__code__, names, name)
        self.honest = names["score_targets"]


class ReadsAhead(Planted):
    """Counts the token behind the target before it scores."""

    def planted(self, everything, document, weights, tokens, begin, *rest):
        if begin + 2 < len(tokens):
            context = counts.find_context(document, counts.mix_hash(np.uint64(1), 0))
            counts.count_target(document, context, tokens[begin + 2])
        self.honest(everything, document, weights, tokens, begin, *rest)


POINTS = ProbePoints([30, 87, 121, 160], [40, 88, 100, 130, 170, 199])


def probe(make_mixture, scorer=MixtureScorer, parts: int = 1):
    score = dataclasses.replace(SCORE, mixture_parts=parts)
    return probe_scorer(scorer(BigramNetwork(), score, make_mixture), repetitive_stream(), POINTS)


@pytest.mark.parametrize(("make_mixture", "parts"), [(CountMixture, 1), (CountMixture, 3), (Planted, 1)])
def test_the_honest_mixture_passes_and_its_learning_is_exercised(make_mixture, parts):
    probes = probe(make_mixture, parts=parts)
    assert [found.verdict for found in probes] == [PASS, PASS, PASS, PASS, NOT_EXERCISED]
    worst = float(probes[1].detail.split("sums within ")[1].split()[0])
    assert worst < 1e-6 and "235 updates" in probes[2].detail


@pytest.mark.parametrize(
    ("make_mixture", "caught"),
    [
        (LearnsBeforeItScores, {"C2 normalisation", "C3 score before update"}),
        (CountsTheTarget, {"C2 normalisation"}),
        (Unnormalised, {"C2 normalisation"}),
        (GateReadsTheTarget, {"C2 normalisation"}),
        (SharesKnowTheTarget, {"C2 normalisation"}),
        (ReadsAhead, {"C1 causality"}),
    ],
)
def test_a_planted_violation_is_caught_by_name(make_mixture, caught):
    assert caught <= {found.name for found in probe(make_mixture) if found.verdict == FAIL}


class ScoresTwice(MixtureScorer):
    """A second pass with the counts of the first."""

    def trace(self, tokens_N1):
        first = super().trace(tokens_N1)
        return ScoreTrace(0.5 * first.nats_N, first.events + first.events)


class ClaimsIsolation(MixtureScorer):
    isolates_documents = True


def test_a_second_pass_and_a_false_claim_of_isolation_are_caught():
    assert {found.name for found in probe(CountMixture, ScoresTwice) if found.verdict == FAIL} >= {"C4 single pass"}
    assert probe(CountMixture, ClaimsIsolation)[4].verdict == FAIL


def test_the_probe_drives_the_code_that_scores():
    tokens_N1 = repetitive_stream()
    network = BigramNetwork()
    trace = MixtureScorer(network, SCORE).trace(tokens_N1)
    assert (trace.nats_N == mixed_nats(tokens_N1, network.trace(tokens_N1).nats_N, MODEL, SCORE, quiet())[0]).all()
