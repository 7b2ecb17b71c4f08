"""Legality probes on toy scorers: planted violations and clean scorers told apart."""

import math

import numpy as np
import pytest

from lab.probe import probes
from lab.probe.probes import (
    FAIL,
    NOT_EXERCISED,
    PASS,
    ProbePoints,
    ScoreEvent,
    ScoreTrace,
    probe_scorer,
    probe_single_pass,
    replace_tokens,
)

VOCABULARY, BOS, CHUNK = 16, 1, 4
C1, C2, C3, C4, ISOLATION = range(5)


def documents(lengths: tuple[int, ...] = (13, 9, 1, 22, 6, 17), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([[BOS, *rng.integers(2, VOCABULARY, length)] for length in lengths])


class AdaptingToy:
    """A clean scorer that learns as it scores: a fixed bigram table mixed with counts of its document's chunks so far.

    Each chunk of a document is scored, then counted. Subclasses break one rule each.
    """

    vocab_size, bos_id, isolates_documents = VOCABULARY, BOS, True
    adapts = forgets = True

    def __init__(self):
        table_VV = np.random.default_rng(7).random((VOCABULARY, VOCABULARY)) + 0.1
        self.table_VV = table_VV / table_VV.sum(1, keepdims=True)

    def trace(self, tokens_N1: np.ndarray) -> ScoreTrace:
        rows_NV, events = self.score(tokens_N1)
        scored = [np.arange(event.begin, event.end) for event in events if event.kind == "score"]
        nats_N = np.full(len(rows_NV), np.nan)
        for index in scored:
            nats_N[index] = -np.log(rows_NV[index, tokens_N1[index + 1]])
        return ScoreTrace(nats_N, events)

    def log_probabilities(self, tokens_N1: np.ndarray, target: int, candidates_K: np.ndarray) -> np.ndarray:
        return np.log(self.score(tokens_N1)[0][target, candidates_K])

    def score(self, tokens_N1: np.ndarray) -> tuple[np.ndarray, list[ScoreEvent]]:
        """Probabilities of every token at every target, and the events."""
        targets = len(tokens_N1) - 1
        rows_NV, events, counts_V = np.empty((targets, VOCABULARY)), [], np.zeros(VOCABULARY)
        edges = [*np.flatnonzero(tokens_N1[:-1] == BOS).tolist(), targets]
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            counts_V = np.zeros(VOCABULARY) if self.forgets else counts_V
            for begin in range(first, last, CHUNK):
                end = min(begin + CHUNK, last)
                self.chunk(tokens_N1, begin, end, counts_V, rows_NV, events)
        return rows_NV, events

    def chunk(self, tokens_N1, begin, end, counts_V, rows_NV, events) -> None:
        self.predict(tokens_N1, begin, end, counts_V, rows_NV, events)
        if self.adapts:
            self.learn(tokens_N1, begin, end, counts_V, events)

    def predict(self, tokens_N1, begin, end, counts_V, rows_NV, events) -> None:
        for target in range(begin, end):
            rows_NV[target] = self.mixture(tokens_N1, target, counts_V)
        events.append(ScoreEvent("score", begin, end))

    def mixture(self, tokens_N1, target, counts_V) -> np.ndarray:
        seen_V = (counts_V + 0.5) / (counts_V.sum() + 0.5 * VOCABULARY)
        return 0.5 * self.table_VV[tokens_N1[target]] + 0.5 * seen_V

    def learn(self, tokens_N1, begin, end, counts_V, events) -> None:
        counts_V += np.bincount(tokens_N1[begin + 1 : end + 1], minlength=VOCABULARY)
        events.append(ScoreEvent("update", begin, end))


class ReadsItsTarget(AdaptingToy):
    """A cache keyed on the token that is to be predicted: normalised, and moves nothing before the cut."""

    def mixture(self, tokens_N1, target, counts_V):
        return 0.9 * super().mixture(tokens_N1, target, counts_V) + 0.1 * np.eye(VOCABULARY)[tokens_N1[target + 1]]


class ReadsTwoAhead(AdaptingToy):
    def mixture(self, tokens_N1, target, counts_V):
        ahead = tokens_N1[min(target + 2, len(tokens_N1) - 1)]
        return 0.9 * super().mixture(tokens_N1, target, counts_V) + 0.1 * self.table_VV[ahead]


class ReadsAheadAtTimes(ReadsTwoAhead):
    """Only every third prediction reads ahead, so that cuts at the others show it in the scores before them alone."""

    def mixture(self, tokens_N1, target, counts_V):
        return (AdaptingToy if target % 3 else ReadsTwoAhead).mixture(self, tokens_N1, target, counts_V)


class UnnormalisedMixture(AdaptingToy):
    def mixture(self, tokens_N1, target, counts_V):
        return super().mixture(tokens_N1, target, counts_V) + 0.3 * (counts_V > 0)


class ScoresAnotherDistribution(AdaptingToy):
    """Shows a distribution that sums to 1, and scores with a better one."""

    def trace(self, tokens_N1):
        trace = super().trace(tokens_N1)
        return ScoreTrace(0.99 * trace.nats_N, trace.events)


class UpdatesFirst(AdaptingToy):
    """The update with a chunk comes before its score, which a copy of the older state hides from all other probes."""

    def chunk(self, tokens_N1, begin, end, counts_V, rows_NV, events):
        older_V = counts_V.copy()
        self.learn(tokens_N1, begin, end, counts_V, events)
        self.predict(tokens_N1, begin, end, older_V, rows_NV, events)


class TrainsOnItsTargets(AdaptingToy):
    """The real thing: scored with the state that has seen the chunk."""

    def chunk(self, tokens_N1, begin, end, counts_V, rows_NV, events):
        self.learn(tokens_N1, begin, end, counts_V, events)
        self.predict(tokens_N1, begin, end, counts_V, rows_NV, events)


class ScoresAChunkTwice(AdaptingToy):
    def score(self, tokens_N1):
        rows_NV, events = super().score(tokens_N1)
        return rows_NV, [*events, next(event for event in events if event.kind == "score" and event.begin > 20)]


class BestOfTwoPasses(AdaptingToy):
    """Every target keeps the better of an adapting and a fixed prediction."""

    def score(self, tokens_N1):
        rows_NV, events = super().score(tokens_N1)
        fixed_NV, index = self.table_VV[tokens_N1[:-1]], np.arange(len(rows_NV))
        better_N = fixed_NV[index, tokens_N1[1:]] > rows_NV[index, tokens_N1[1:]]
        rows_NV[better_N] = fixed_NV[better_N]
        return rows_NV, [*events, ScoreEvent("score", 0, len(rows_NV))]


class DropsTheTail(AdaptingToy):
    def score(self, tokens_N1):
        rows_NV, events = super().score(tokens_N1)
        return rows_NV, [event for event in events if event.end < len(rows_NV)]


class RemembersDocuments(AdaptingToy):
    forgets = False


class NeverLearns(AdaptingToy):
    """`learn` is dead code: it looks guilty and does nothing."""

    adapts = False


def points(targets: int) -> ProbePoints:
    rng = np.random.default_rng(1)
    cuts, chosen = (np.sort(rng.choice(targets, min(count, targets), replace=False)).tolist() for count in (8, 16))
    return ProbePoints(cuts, chosen)


def verdicts(scorer, tokens: np.ndarray) -> list[str]:
    found = probe_scorer(scorer, tokens, points(len(tokens) - 1), seed=1)
    assert all("\n" not in probe.detail and probe.detail for probe in found)
    return [probe.verdict for probe in found]


def only(probe: int, verdict: str) -> list[str]:
    return [verdict if number == probe else PASS for number in range(5)]


def test_a_clean_adapting_scorer_passes_everything():
    assert verdicts(AdaptingToy(), documents()) == [PASS] * 5


@pytest.mark.parametrize(
    ("scorer", "probe"),
    [
        (ReadsItsTarget, C1),
        (ReadsTwoAhead, C1),
        (UnnormalisedMixture, C2),
        (ScoresAnotherDistribution, C2),
        (UpdatesFirst, C3),
        (ScoresAChunkTwice, C4),
        (DropsTheTail, C4),
        (RemembersDocuments, ISOLATION),
    ],
)
def test_a_planted_violation_fails_its_own_probe_alone(scorer, probe):
    assert verdicts(scorer(), documents()) == only(probe, FAIL)


@pytest.mark.parametrize(("scorer", "probe"), [(TrainsOnItsTargets, C3), (BestOfTwoPasses, C4)])
def test_violations_that_see_their_target_fail_causality_too(scorer, probe):
    assert verdicts(scorer(), documents()) == [FAIL if number in (C1, probe) else PASS for number in range(5)]


def test_the_predicted_token_itself_is_among_the_candidates(monkeypatch):
    monkeypatch.setattr(probes, "CANDIDATES", 2)
    assert verdicts(ReadsItsTarget(), documents()) == only(C1, FAIL)


def test_a_leak_into_earlier_scores_is_named():
    probe = probe_scorer(ReadsAheadAtTimes(), documents(), ProbePoints([10], [3]))[C1]
    assert probe.verdict == FAIL and probe.detail.endswith("changed 1 scores before it, first that of target 9")


@pytest.mark.parametrize(
    ("nats", "events", "message"),
    [
        ([1.0, 1.0, 1.0], [(0, 2)], "1 of 3 targets never scored, first 2"),
        ([1.0, 1.0, 1.0], [(0, 3), (1, 3)], "2 of 3 targets scored more than once, first 1"),
        ([1.0, math.inf, 1.0], [(0, 3)], "1 of 3 targets without a finite score, first 1"),
    ],
)
def test_what_single_pass_says(nats, events, message):
    probe = probe_single_pass(ScoreTrace(np.array(nats), [ScoreEvent("score", *span) for span in events]))
    assert (probe.verdict, probe.detail) == (FAIL, message)


def test_dead_code_is_not_exercised():
    assert verdicts(NeverLearns(), documents()) == only(C3, NOT_EXERCISED)


def test_isolation_that_is_not_claimed_or_can_not_be_tried_is_not_exercised():
    modest = RemembersDocuments()
    modest.isolates_documents = False
    assert verdicts(modest, documents()) == only(ISOLATION, NOT_EXERCISED)
    assert verdicts(AdaptingToy(), documents((40,))) == only(ISOLATION, NOT_EXERCISED)


def test_a_stream_of_one_token_can_not_be_changed():
    tokens = np.full(9, BOS)
    assert verdicts(AdaptingToy(), tokens)[C1] == NOT_EXERCISED


@pytest.mark.parametrize("keep", [None, BOS])
def test_replaced_tokens_all_differ_and_the_rest_stands(keep):
    tokens = documents()
    changed = replace_tokens(tokens, 5, 40, np.random.default_rng(0), keep)
    kept = np.arange(5, 40)[tokens[5:40] == BOS] if keep else np.array([], dtype=int)
    different = np.setdiff1d(np.arange(5, 40), kept)
    assert (changed != tokens).nonzero()[0].tolist() == different.tolist()
    assert set(changed) <= set(tokens) and (keep is None or (changed[different] != BOS).all())
