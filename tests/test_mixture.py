"""The mixture with counts: against whole distributions, in any chunks and on any ranks, killed and resumed."""

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from mixture_fixtures import BOS, MODEL, SCORE, VOCABULARY, Killed, killed_after, network_rows, quiet, repetitive_stream

import golf.score.mixture
import golf.score.roundtrip
from golf.config.config import Config, build_config, with_knobs
from golf.config.features import FEATURES
from golf.config.knobs import ConfigError
from golf.model.init import build_model
from golf.runtime import Runtime
from golf.score import counts
from golf.score.counts import count_level, hit_class, new_weights, spread_of
from golf.score.journal import ScoreJournal, ScoreSums
from golf.score.mixture import CountMixture, NetworkNats, forecast_mixture, mixed_nats, stream_parts
from golf.score.roundtrip import score_artifact
from golf.score.scorer import ScoreError
from golf.score.windows import stream_documents

# ---- the estimator ----


class WholeDistributions:
    """The same mixture by dictionaries of whole contexts, with whole distributions over the vocabulary."""

    def __init__(self, orders: int):
        self.orders, self.discount, self.rate, self.hit = orders, counts.DISCOUNT, counts.RATE, 0
        self.weights, self.everything, self.document = new_weights(orders, VOCABULARY), defaultdict(Counter), None

    def found(self, scope, tokens):
        for order in range(min(self.orders, len(tokens)) + 1):
            counter = scope[tuple(tokens[len(tokens) - order :])]
            counts_V = np.array([counter[token] for token in range(VOCABULARY)], float)
            yield order, counts_V.sum(), (counts_V > 0).sum(), counts_V

    def interpolated(self, scope, tokens, p_V):
        for _, total, distinct, counts_V in self.found(scope, tokens):
            if total:
                p_V = (np.maximum(counts_V - self.discount, 0) + self.discount * distinct * p_V) / total
        return p_V

    def known(self, scope, tokens):
        return max([0, *(order + 1 for order, total, *_ in self.found(scope, tokens) if total)])

    def corrected(self, tokens, p_V, target):
        weights, last = self.weights, tokens[-1]
        by_token = weights.share_by_token[:, last].copy()
        both = zip(self.found(self.everything, tokens), self.found(self.document, tokens), strict=True)
        for pair in both:
            for scope, (order, total, distinct, counts_V) in enumerate(pair):
                if not order or not total:
                    continue
                entry = scope, order, count_level(int(total)), spread_of(total, distinct)
                counted_V = np.maximum(counts_V - self.discount, 0) / (total - self.discount * distinct)
                logit = weights.share[entry] + weights.share_by_hit[scope, order, self.hit]
                share = 1 / (1 + np.exp(-logit - by_token[scope]))
                mixed_V = (1 - share) * p_V + share * counted_V
                slope = (counted_V - p_V)[target] / mixed_V[target] * share * (1 - share)
                weights.seen[entry] += 1
                weights.share[entry] += max(self.rate, 0.2 / np.sqrt(weights.seen[entry] + 1)) * slope
                weights.share_by_hit[scope, order, self.hit] += self.rate * slope
                weights.share_by_token[scope, last] += self.rate * slope
                p_V = mixed_V
        return p_V

    def score(self, tokens, target, network_V):
        everything_V = self.interpolated(self.everything, tokens, np.full(VOCABULARY, 1 / VOCABULARY))
        document_V = self.interpolated(self.document, tokens, everything_V)
        rows_4V = np.array([network_V, everything_V, document_V, self.corrected(tokens, network_V, target)])
        known, weights = (self.known(self.everything, tokens), self.known(self.document, tokens)), self.weights
        logit_4 = weights.weight[known] + weights.weight_by_hit[self.hit] + weights.weight_by_token[tokens[-1]]
        share_4 = np.exp(logit_4) / np.exp(logit_4).sum()
        mixed_V = share_4 @ rows_4V
        slope_4 = self.rate * share_4 * (rows_4V[:, target] / mixed_V[target] - 1)
        for logits in (weights.weight[known], weights.weight_by_hit[self.hit], weights.weight_by_token[tokens[-1]]):
            logits += slope_4
        self.hit = hit_class(mixed_V[target])
        for scope in (self.everything, self.document):
            for order in range(min(self.orders, len(tokens)) + 1):
                scope[tuple(tokens[len(tokens) - order :])][target] += 1
        return mixed_V


@pytest.mark.parametrize("orders", [1, 3, 6])
def test_the_kernel_gives_what_whole_normalised_distributions_give(orders):
    tokens_N1 = repetitive_stream()
    rows_NV = network_rows(len(tokens_N1) - 1)
    score = dataclasses.replace(SCORE, mixture_orders=orders)
    whole = WholeDistributions(orders)
    expected_N = []
    for begin, end in stream_documents(tokens_N1, BOS):
        whole.document = defaultdict(Counter)
        for n in range(begin, end):
            mixed_V = whole.score(tokens_N1[begin : n + 1].tolist(), int(tokens_N1[n + 1]), rows_NV[n])
            assert mixed_V.sum() == pytest.approx(1, abs=1e-12) and (mixed_V > 0).all()
            expected_N.append(-np.log(mixed_V[tokens_N1[n + 1]]))
    network_N = -np.log(rows_NV[np.arange(len(rows_NV)), tokens_N1[1:]])
    mixed_N, _ = mixed_nats(tokens_N1, network_N, MODEL, score, quiet())
    assert mixed_N == pytest.approx(expected_N, rel=1e-9)
    assert mixed_N.sum() < 0.75 * network_N.sum(), "the counts have learned nothing"


def test_contexts_of_a_thousand_times_as_many_targets_do_not_meet():
    """A hash that let contexts meet would count together what followed different ones."""
    tokens = np.random.default_rng(0).integers(0, 8000, 20_000).astype(np.int32)
    tables, mix = counts.new_tables(20_000, 3, 8000), counts.compiled_kernels()
    contexts = {}
    for n in range(3, len(tokens)):
        key = np.uint64(1)
        for order in range(1, 4):
            key = np.uint64(mix["mix_hash"](key, tokens[n - order]))
        number = mix["find_context"](tables, np.uint64(mix["mix_hash"](key, 3)))
        assert contexts.setdefault(number, tuple(tokens[n - 3 : n])) == tuple(tokens[n - 3 : n])
    assert len(contexts) == tables.used[0] > 19_000


# ---- chunks, parts, ranks ----


def whole_document(tokens_N1: np.ndarray, cuts=()) -> np.ndarray:
    mixture, targets = CountMixture(len(tokens_N1) - 1, VOCABULARY, SCORE), len(tokens_N1) - 1
    mixture.open_document(targets)
    network_N, edges = np.linspace(1, 3, targets), [0, *cuts, targets]
    parts = [
        mixture.score_targets(tokens_N1.astype(np.int32), a, network_N[a:b])
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    assert mixture.counted == targets
    return np.concatenate(parts)


@pytest.mark.parametrize("cuts", [(1,), (5, 6, 50), range(1, 88)])
def test_chunks_of_a_document_score_as_the_whole_bit_for_bit(cuts):
    tokens_N1 = repetitive_stream()[:90]
    assert (whole_document(tokens_N1, cuts) == whole_document(tokens_N1)).all()


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_parts_tile_the_documents_and_any_number_of_ranks_gives_the_same_bits(parts):
    tokens_N1, score = repetitive_stream(), dataclasses.replace(SCORE, mixture_parts=parts)
    found = stream_parts(tokens_N1, BOS, parts)
    assert len(found) == parts and sum(found, []) == stream_documents(tokens_N1, BOS)
    network_N = np.linspace(1, 3, len(tokens_N1) - 1)

    def on(ranks: int) -> np.ndarray:
        runtimes = [quiet(rank, ranks) for rank in range(ranks)]
        for runtime in runtimes:
            object.__setattr__(runtime, "sum_over_ranks", lambda part: part)
        return sum(mixed_nats(tokens_N1, network_N, MODEL, score, runtime)[0] for runtime in runtimes)

    alone = on(1)
    assert (alone > 0).all()
    for ranks in (2, 3, 8):
        assert (on(ranks) == alone).all()
    if parts > 1:
        whole, _ = mixed_nats(tokens_N1, network_N, MODEL, SCORE, quiet())
        first = found[0][-1][1]
        assert (whole[:first] == alone[:first]).all() and not np.allclose(whole, alone)


# ---- a scoring with the mixture ----


@pytest.fixture
def artifact(monkeypatch):
    """Stands for a packed model and its data: what is read from files elsewhere comes from here."""

    class OneByte:
        def to(self, device):
            return self

        def count(self, previous_N, targets_N):
            return torch.ones_like(targets_N)

    class Packed:
        model, sha256, tokenizer_sha256 = MODEL, "c" * 64, "d" * 64

    monkeypatch.setattr(golf.score.roundtrip, "load_artifact_tokenizer", lambda tokenizer_sha256, path: OneByte())
    monkeypatch.setattr(golf.score.roundtrip, "restore_model", lambda artifact, runtime: build_model(MODEL, 0).eval())
    monkeypatch.setattr(golf.score.roundtrip, "validation_tokens", lambda paths: repetitive_stream())
    monkeypatch.setattr(golf.score.mixture, "SECONDS_BETWEEN_MARKS", 0.0)
    return Packed()


EVALUATION = with_knobs(
    Config(), dict(eval_seq_len=16, eval_stride=4, eval_batch_seqs=4, max_eval_seconds=600.0, mixture=True)
).score


def scored(artifact, score=EVALUATION, journal=None, check=lambda: None):
    return score_artifact(artifact, "", [], score, quiet(), journal=journal, check=check)[0]


def test_the_score_of_the_mixture_keeps_the_network_s_beside_it(artifact):
    alone, mixed = scored(artifact, dataclasses.replace(EVALUATION, mixture=False)), scored(artifact)
    assert mixed.parts == {"network_bpb": alone.val_bpb} and alone.parts == {}
    assert mixed.nats < 0.8 * alone.nats and mixed.tokens == alone.tokens and mixed.seconds > 0


def test_a_scoring_that_is_killed_anywhere_ends_in_the_same_score(artifact, tmp_path):
    expected, calls = scored(artifact), []
    scored(artifact, journal=ScoreJournal(tmp_path / "count.jsonl"), check=lambda: calls.append(1))
    documents = len(stream_documents(repetitive_stream(), BOS))
    for kill in (1, len(calls) - documents - 1, len(calls) - documents, len(calls) - 1):
        path = tmp_path / f"score{kill}.jsonl"
        with pytest.raises(Killed):
            scored(artifact, journal=ScoreJournal(path), check=killed_after(kill))
        resumed = scored(artifact, journal=ScoreJournal(path))
        assert (resumed.nats, resumed.parts) == (expected.nats, expected.parts)
        rows = [row for row in ScoreJournal(path).chunks if row["end"] == 0]
        assert len(rows) == documents + max(0, kill - (len(calls) - documents) + 1), "seconds of mixing are counted"


def test_a_scoring_without_counts_resumes_whatever_their_other_knobs_say(artifact, tmp_path):
    alone = dataclasses.replace(EVALUATION, mixture=False, mixture_successors=5)
    with pytest.raises(Killed):
        scored(artifact, alone, ScoreJournal(tmp_path / "score.jsonl"), killed_after(3))
    journal = ScoreJournal(tmp_path / "score.jsonl")
    before = list(journal.chunks)
    assert scored(artifact, alone, journal).nats == scored(artifact, alone).nats
    assert before and journal.chunks[: len(before)] == before, "what was scored was scored again"


def test_nats_of_another_scoring_are_refused(artifact, tmp_path):
    journal = ScoreJournal(tmp_path / "score.jsonl")
    scored(artifact, journal=journal)
    np.zeros(len(repetitive_stream()) - 1).tofile(tmp_path / "score.nats")
    with pytest.raises(ScoreError, match="score.nats: not the nats of this scoring: delete it and score.jsonl"):
        scored(artifact, journal=ScoreJournal(journal.path))
    journal.path.unlink()
    assert scored(artifact, journal=ScoreJournal(journal.path)).nats == scored(artifact).nats


def test_nats_are_kept_in_the_file_as_they_come(tmp_path):
    journal = ScoreJournal(tmp_path / "a.jsonl")
    nats = NetworkNats(5, journal)
    nats.record(torch.tensor([3, 1]), torch.tensor([0.5, 0.25], dtype=torch.float64))
    journal.start({})
    journal.add(0, 1, ScoreSums(0.75, 2, 2), 0.0)
    again = NetworkNats(5, journal)
    assert again.gather(0.75, quiet()).tolist() == [0, 0.25, 0, 0.5, 0]
    assert NetworkNats(5, ScoreJournal(tmp_path / "a.jsonl")).nats_N.any()
    journal.file.close()
    journal.start({"another": 1})
    assert not NetworkNats(5, journal).nats_N.any(), "nothing of another scoring is kept"
    journal.file.close()


def test_the_stride_leaves_time_for_the_mixture(artifact, monkeypatch):
    reserves = []
    monkeypatch.setattr(golf.score.roundtrip, "forecast_mixture", lambda *arguments: 123.0)
    choose = golf.score.roundtrip.choose_stride
    monkeypatch.setattr(
        golf.score.roundtrip, "choose_stride",
        lambda *arguments: reserves.append(arguments[-3]) or choose(*arguments),
    )  # fmt: skip
    assert scored(artifact).stride == 4
    assert scored(artifact, dataclasses.replace(EVALUATION, max_eval_seconds=123.0)).stride == 16
    assert reserves == [477.0, 1e-9]


def test_a_missing_compiler_stops_before_anything_is_scored(artifact, monkeypatch):
    def missing():
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(golf.score.mixture, "compiled_kernels", missing)
    with pytest.raises(ScoreError, match="mixture=1 needs numba .No module named 'numba'.: install requirements.txt"):
        scored(artifact)


def test_the_forecast_is_that_of_the_slowest_rank_and_grows_with_the_stream():
    tokens_N1 = np.tile(repetitive_stream(), 200)

    class Slowest(Runtime):
        def max_over_ranks(self, *values):
            return [1000.0 * value for value in values]

    assert forecast_mixture(tokens_N1, MODEL, SCORE, Slowest(torch.device("cpu"))) > 1.0


def test_the_feature_says_both_scores():
    feature = FEATURES["mixture"]
    files = {"score": {"network_bpb": 1.5, "val_bpb": 1.25, "val_tokens": 7}}
    assert feature.in_files(files) == (7, True, "1.5000 bits per byte by the network alone, 1.2500 with counts")
    files["score"]["val_bpb"] = 1.5
    assert feature.in_files(files)[1] is False


@pytest.mark.parametrize(
    ("knob", "words"),
    [("mixture_orders=0", "1 to 16"), ("mixture_parts=0", "at least 1")],
)
def test_knobs_without_a_mixture_are_refused(knob, words):
    with pytest.raises(ConfigError, match=words):
        build_config("local", {}, dict([knob.split("=")]))
