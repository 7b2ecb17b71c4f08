"""Probes whether a scorer's numbers are an honest score, by its behaviour and not by its source.

The four conditions are those of the competition's issue #1017: C1 a prediction depends on nothing that comes
after it, C2 it is a probability distribution over the whole vocabulary, C3 what was scored may be learned from,
never before, C4 every target is scored once. Source text can't answer (dead code looks guilty, aliases look
innocent), so each probe changes the input and looks at what the scorer says.

Letters: N targets of a stream of N + 1 tokens (target t is token t + 1), V vocabulary, K candidate tokens.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

PASS, FAIL, NOT_EXERCISED = "PASS", "FAIL", "NOT EXERCISED"

PROBE_TOLERANCE = 1e-4
"""Of a sum of probabilities, and in nats between a target's probability and its score."""
CANDIDATES = 16
"""Tokens whose probability at the cut must not depend on what comes after it."""
DOCUMENT_PAIRS = 4
"""Neighbouring documents that a claim of isolation is tried on."""


@dataclass(frozen=True)
class Probe:
    """Holds what a probe found out; `detail` is one line with the evidence."""

    name: str
    verdict: Literal["PASS", "FAIL", "NOT EXERCISED"]
    detail: str


@dataclass(frozen=True)
class ScoreEvent:
    """Says that the scorer scored the targets begin .. end - 1, or updated itself with them."""

    kind: Literal["score", "update"]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class ScoreTrace:
    """Holds one scoring of a stream."""

    nats_N: np.ndarray
    """float64, in the order of the stream; NaN for a target that was not scored."""
    events: list[ScoreEvent]
    """In the order of time."""


class ProbedScorer(Protocol):
    """Answers what the probes ask of a scorer, the same question with the same bits."""

    vocab_size: int
    bos_id: int
    isolates_documents: bool
    """Whether it claims that no document's score depends on another document."""

    def trace(self, tokens_N1: np.ndarray) -> ScoreTrace:
        """Scores the stream from the scorer's first state."""

    def log_probabilities(self, tokens_N1: np.ndarray, target: int, candidates_K: np.ndarray) -> np.ndarray:
        """Returns float64_K: ln of what the candidates would have got as this target, with every mixture in use."""


@dataclass(frozen=True)
class ProbePoints:
    """Says where a stream is probed."""

    cuts: list[int]
    """Tokens after which all that follows is replaced, 0 to N - 1."""
    targets: list[int]
    """Targets whose whole distribution is looked at."""


def probe_scorer(scorer: ProbedScorer, tokens_N1: np.ndarray, points: ProbePoints, seed: int = 0) -> list[Probe]:
    """Runs C1 to C4 and the isolation of documents on one stream that starts with a document."""
    tokens_N1 = np.asarray(tokens_N1)
    trace = scorer.trace(tokens_N1)
    return [
        probe_causality(scorer, tokens_N1, trace, points.cuts, np.random.default_rng(seed)),
        probe_normalisation(scorer, tokens_N1, trace, points.targets),
        probe_score_before_update(trace),
        probe_single_pass(trace),
        probe_isolation(scorer, tokens_N1, trace, np.random.default_rng(seed)),
    ]


# ---- C1 ----


def probe_causality(
    scorer: ProbedScorer, tokens_N1: np.ndarray, trace: ScoreTrace, cuts: list[int], rng: np.random.Generator
) -> Probe:
    """Checks C1: other tokens after a cut leave the scores up to it, and the distribution at it, bit-identical.

    The distribution is that of the first replaced token: a scorer that reads the very token that it predicts, and
    nothing beyond, moves no earlier score.
    """
    name = "C1 causality"
    for cut in cuts:
        changed_N1 = replace_tokens(tokens_N1, cut + 1, len(tokens_N1), rng)
        if changed_N1 is None:
            return Probe(name, NOT_EXERCISED, "the stream has one distinct token: nothing to replace it with")
        moved_M = np.flatnonzero(bits(scorer.trace(changed_N1).nats_N[:cut]) != bits(trace.nats_N[:cut]))
        if len(moved_M):
            scores = f"{len(moved_M):,} scores before it, first that of target {moved_M[0]}"
            return Probe(name, FAIL, f"other tokens after token {cut} changed {scores}")
        both = tokens_N1[cut + 1], changed_N1[cut + 1]  # the likeliest to have been read
        candidates_K = np.array([*both, *rng.integers(0, scorer.vocab_size, CANDIDATES - 2)], dtype=np.int64)
        before_K, after_K = (scorer.log_probabilities(t_N1, cut, candidates_K) for t_N1 in (tokens_N1, changed_N1))
        if (bits(before_K) != bits(after_K)).any():
            return Probe(name, FAIL, f"other tokens after token {cut} changed the prediction of the next one")
    count = f"{sum(cuts):,} scores and {len(cuts) * CANDIDATES} predictions"
    return Probe(name, PASS, f"{len(cuts)} cuts with other tokens after them: {count} before them bit-identical")


def bits(numbers_N: np.ndarray) -> np.ndarray:
    """Returns the bit patterns of float64 numbers, which tell 0 from -0 and know NaN."""
    return np.ascontiguousarray(numbers_N, dtype=np.float64).view(np.int64)


def replace_tokens(
    tokens_N1: np.ndarray, begin: int, end: int, rng: np.random.Generator, keep: int | None = None
) -> np.ndarray | None:
    """Returns the stream with every token of begin .. end - 1 made another one, drawn from those that it holds.

    Only `keep` stays where it stands, and is not drawn. None where there is no other token to draw.
    """
    vocabulary = np.unique(tokens_N1)
    vocabulary = vocabulary[vocabulary != keep] if keep is not None else vocabulary
    if len(vocabulary) < 2:
        return None
    part_M = tokens_N1[begin:end]
    place_M = np.searchsorted(vocabulary, part_M) + rng.integers(1, len(vocabulary), len(part_M))
    changed_N1 = tokens_N1.copy()
    changed_N1[begin:end] = np.where(part_M == keep, part_M, vocabulary[place_M % len(vocabulary)])
    return changed_N1


# ---- C2 ----


def probe_normalisation(scorer: ProbedScorer, tokens_N1: np.ndarray, trace: ScoreTrace, targets: list[int]) -> Probe:
    """Checks C2: what the whole vocabulary would have got sums to 1, and the score is what the real token got."""
    name, vocabulary_V = "C2 normalisation", np.arange(scorer.vocab_size)
    targets = [target for target in targets if np.isfinite(trace.nats_N[target])]  # what is missing is C4's
    if not targets:
        return Probe(name, NOT_EXERCISED, "none of the sampled targets was scored")
    worst_sum = worst_gap = 0.0
    for target in targets:
        log_V = scorer.log_probabilities(tokens_N1, target, vocabulary_V)
        total = float(np.exp(log_V).sum())
        gap = abs(-float(log_V[tokens_N1[target + 1]]) - float(trace.nats_N[target]))
        if not abs(total - 1) <= PROBE_TOLERANCE:
            return Probe(name, FAIL, f"the probabilities at target {target} sum to {total:.6f}, not to 1")
        if not gap <= PROBE_TOLERANCE:
            detail = f"target {target} was scored {gap:.6f} nats off its probability in the distribution"
            return Probe(name, FAIL, detail)
        worst_sum, worst_gap = max(worst_sum, abs(total - 1)), max(worst_gap, gap)
    detail = f"{len(targets)} targets, {scorer.vocab_size:,} tokens each: sums within {worst_sum:.1e} of 1"
    return Probe(name, PASS, f"{detail}, scores within {worst_gap:.1e} nats of them")


# ---- C3, C4 ----


def probe_score_before_update(trace: ScoreTrace) -> Probe:
    """Checks C3: no target is in an update before it is scored."""
    name, scored_N, updates = "C3 score before update", np.zeros(len(trace.nats_N), dtype=bool), 0
    for event in trace.events:
        if event.kind == "score":
            scored_N[event.begin : event.end] = True
            continue
        updates += 1
        early_M = np.flatnonzero(~scored_N[event.begin : event.end])
        if len(early_M):
            target = event.begin + int(early_M[0])
            return Probe(name, FAIL, f"update {updates} used target {target} before it was scored")
    if not updates:
        return Probe(name, NOT_EXERCISED, "the scorer never updated itself")
    return Probe(name, PASS, f"{updates} updates, each with targets that were scored before")


def probe_single_pass(trace: ScoreTrace) -> Probe:
    """Checks C4: every target is scored, and no target twice."""
    name, count_N = "C4 single pass", np.zeros(len(trace.nats_N), dtype=np.int64)
    for event in trace.events:
        if event.kind == "score":
            count_N[event.begin : event.end] += 1
    for wrong_N, state in (
        (count_N > 1, "scored more than once"),
        (count_N == 0, "never scored"),
        (~np.isfinite(trace.nats_N), "without a finite score"),
    ):
        if wrong_N.any():
            return Probe(name, FAIL, f"{wrong_N.sum():,} of {len(count_N):,} targets {state}, first {wrong_N.argmax()}")
    return Probe(name, PASS, f"{len(count_N):,} targets, each scored exactly once")


# ---- isolation of documents ----


def probe_isolation(scorer: ProbedScorer, tokens_N1: np.ndarray, trace: ScoreTrace, rng: np.random.Generator) -> Probe:
    """Checks, where it is claimed: another text of document k leaves the scores of document k + 1 bit-identical."""
    name = "document isolation"
    if not scorer.isolates_documents:
        return Probe(name, NOT_EXERCISED, "not claimed: a score may depend on the documents before")
    edges = [*np.flatnonzero(tokens_N1 == scorer.bos_id).tolist(), len(tokens_N1)]
    pairs = [k for k in range(len(edges) - 2) if edges[k + 1] - edges[k] > 1 and edges[k + 2] - edges[k + 1] > 1]
    if not pairs:
        return Probe(name, NOT_EXERCISED, "the stream has no two documents in a row")
    for k in rng.permutation(pairs)[:DOCUMENT_PAIRS].tolist():
        begin, end, stop = edges[k : k + 3]
        changed_N1 = replace_tokens(tokens_N1, begin + 1, end, rng, keep=scorer.bos_id)
        if changed_N1 is None:
            return Probe(name, NOT_EXERCISED, "the documents have one distinct token: nothing to replace it with")
        own = slice(end, stop - 1)  # the start token itself is predicted from the document before
        moved = bits(scorer.trace(changed_N1).nats_N[own]) != bits(trace.nats_N[own])
        if moved.any():
            return Probe(name, FAIL, f"another text of document {k} changed {moved.sum():,} scores of the next one")
    tried = min(len(pairs), DOCUMENT_PAIRS)
    return Probe(name, PASS, f"{tried} documents changed, the scores of the next one bit-identical each time")
