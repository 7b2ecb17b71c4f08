"""The last correction of the mixture with counts: against whole distributions, on any ranks, resumed, under probe."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import torch
from mixture_fixtures import BOS, MODEL, SCORE, VOCABULARY, Killed, killed_after, network_rows, quiet, repetitive_stream
from test_mixture import EVALUATION, WholeDistributions, artifact, scored  # noqa: F401
from test_mixture_probes import POINTS, BigramNetwork

import golf.score.mixture
from golf.config.config import build_config
from golf.config.features import FEATURES
from golf.config.knobs import ConfigError
from golf.score import successors
from golf.score.counts import hit_class
from golf.score.journal import ScoreJournal
from golf.score.mixture import CountMixture, NetworkNats, distributions_from, forecast_mixture, mixed_nats
from golf.score.scorer import ScoreError
from golf.score.windows import stream_documents
from lab.compress.distribution import compiled_distribution
from lab.compress.predictor import StreamPredictor
from lab.probe.adaptive_scorer import MixtureScorer, score_candidates
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS, probe_scorer

CORRECTED = dataclasses.replace(SCORE, mixture_successors=5)


def kept_rows(targets: int) -> np.ndarray:
    """Returns the network's float16 nats_NV."""
    return (-np.log(network_rows(targets))).astype(np.float16)


# ---- against whole distributions ----


class CorrectedDistributions(WholeDistributions):
    """The same by whole distributions: the mixture of the parent, then the weighing of successors by dictionaries."""

    def __init__(self, orders: int, most: int):
        super().__init__(orders)
        self.most, self.recent = most, {}
        self.feature_weights, self.biases = defaultdict(lambda: np.zeros(5)), defaultdict(float)

    def successors(self, tokens):
        """Returns {token: [class in all text, class in the document]} of those that are taken, in order."""
        known, document = {}, id(self.document)
        for order in range(min(self.orders, len(tokens)), -1, -1):
            for scope in (1, 0):
                context = tuple(tokens[len(tokens) - order :])
                counter = (self.everything, self.document)[scope][context]
                for place, token in enumerate(self.recent.get((scope and document, context), [])):
                    classes = known.setdefault(token, [None, None])
                    if classes[scope] is None:
                        times = sum(counter[token] > bound for bound in (1, 2, 4, 8))
                        classes[scope] = order, times, min(place, 2)
        return dict(list(known.items())[: self.most])

    def distributions(self, tokens, network_V):
        everything_V = self.interpolated(self.everything, tokens, np.full(VOCABULARY, 1 / VOCABULARY))
        document_V = self.interpolated(self.document, tokens, everything_V)
        corrected_V, trained = network_V, self.weights
        for pair in zip(self.found(self.everything, tokens), self.found(self.document, tokens), strict=True):
            for scope, (order, total, distinct, counts_V) in enumerate(pair):
                if order and total:
                    entry = successors.count_level(int(total)), successors.spread_of(total, distinct)
                    logit = trained.share[(scope, order, *entry)] + trained.share_by_hit[scope, order, self.hit]
                    share = 1 / (1 + np.exp(-logit - trained.share_by_token[scope, tokens[-1]]))
                    counted_V = np.maximum(counts_V - self.discount, 0) / (total - self.discount * distinct)
                    corrected_V = (1 - share) * corrected_V + share * counted_V
        return np.array([network_V, everything_V, document_V, corrected_V])

    def score(self, tokens, target, network_V):
        rows_4V, taken, hit = self.distributions(tokens, network_V), self.successors(tokens), self.hit
        keys = ("known", self.known(self.everything, tokens), self.known(self.document, tokens)), ("hit", hit)
        weight_5 = sum(self.feature_weights[key] for key in (*keys, ("last", tokens[-1])))
        mixed_V = super().score(tokens, target, network_V)
        raised_V, features, biases = mixed_V.copy(), {}, {}
        for token, classes in taken.items():
            differences_4 = np.clip(np.log(rows_4V[:, token] / mixed_V[token]), -6, 6)
            features[token] = np.append(differences_4, np.log(mixed_V[token]))
            biases[token] = [("token", token), *((scope, classes[scope]) for scope in (0, 1))]
            raised_V[token] *= np.exp(weight_5 @ features[token] + sum(self.biases[key] for key in biases[token]))
        raised_V /= raised_V.sum()
        for token in taken:
            slope = (token == target) - raised_V[token]
            for key in (*keys, ("last", tokens[-1])):
                self.feature_weights[key] = self.feature_weights[key] + 0.001 * slope * features[token]
            for key in biases[token]:
                self.biases[key] += 0.02 * slope
        for scope in (0, id(self.document)):
            for order in range(min(self.orders, len(tokens)) + 1):
                recent = self.recent.setdefault((scope, tuple(tokens[len(tokens) - order :])), [])
                recent[:] = [target, *(token for token in recent if token != target)]
        self.hit = hit_class(mixed_V[target])
        return raised_V


@pytest.mark.parametrize(("orders", "most"), [(1, 5), (3, 2), (3, 5), (6, 100)])
def test_the_kernel_gives_what_whole_normalised_distributions_give(orders, most):
    tokens_N1 = np.concatenate([repetitive_stream(seed) for seed in range(3)])
    nats_NV = kept_rows(len(tokens_N1) - 1)
    rows_NV, score = (
        distributions_from(nats_NV),
        dataclasses.replace(SCORE, mixture_orders=orders, mixture_successors=most),
    )
    whole, expected_N = CorrectedDistributions(orders, most), []
    documents = []
    for begin, end in stream_documents(tokens_N1, BOS):
        whole.document = defaultdict(whole.everything.default_factory)
        documents.append(whole.document)  # alive, so that no other has its id
        for n in range(begin, end):
            corrected_V = whole.score(tokens_N1[begin : n + 1].tolist(), int(tokens_N1[n + 1]), rows_NV[n])
            assert corrected_V.sum() == pytest.approx(1, abs=1e-12) and (corrected_V > 0).all()
            expected_N.append(-np.log(corrected_V[tokens_N1[n + 1]]))
    mixed_N, uncorrected = mixed_nats(tokens_N1, nats_NV, MODEL, score, quiet())
    assert mixed_N == pytest.approx(expected_N, rel=1e-9)
    network_N = -np.log(rows_NV[np.arange(len(rows_NV)), tokens_N1[1:]])
    plain_N, _ = mixed_nats(tokens_N1, network_N, MODEL, dataclasses.replace(score, mixture_successors=0), quiet())
    assert uncorrected == pytest.approx(plain_N.sum(), rel=1e-12) and abs(uncorrected - mixed_N.sum()) > 1e-3


def test_more_text_of_a_kind_is_predicted_better_with_it():
    tokens_N1 = np.concatenate([repetitive_stream(seed) for seed in range(40)])
    mixed_N, uncorrected = mixed_nats(tokens_N1, kept_rows(len(tokens_N1) - 1), MODEL, CORRECTED, quiet())
    assert mixed_N.sum() < uncorrected


def test_rounded_nats_are_distributions_whatever_they_hold():
    nats_MV = np.array([[0, np.inf, np.inf], [11, 11, 11], [0.1, 60000, 2]], np.float16)
    rows_MV = distributions_from(nats_MV)
    assert rows_MV.sum(1) == pytest.approx(np.ones(3), abs=1e-15) and (rows_MV[0] == [1, 0, 0]).all()


# ---- chunks, ranks, files ----


@pytest.mark.parametrize("cuts", [(1,), (5, 6, 50), range(1, 88)])
def test_chunks_of_a_document_score_as_the_whole_bit_for_bit(cuts):
    tokens_N1 = repetitive_stream()[:90].astype(np.int32)
    nats_NV = kept_rows(89)

    def by_chunks(*cuts: int) -> np.ndarray:
        mixture, edges = CountMixture(89, VOCABULARY, CORRECTED), [0, *cuts, 89]
        mixture.open_document(89)
        spans = zip(edges, edges[1:], strict=False)
        return np.concatenate([mixture.score_targets(tokens_N1, a, nats_NV[a:b]) for a, b in spans])

    assert (by_chunks(*cuts) == by_chunks()).all()


def test_any_number_of_ranks_gives_the_same_bits_and_gathers_what_each_has_scored():
    tokens_N1, score = repetitive_stream(), dataclasses.replace(CORRECTED, mixture_parts=3)
    targets = len(tokens_N1) - 1
    nats_NV = kept_rows(targets)
    for ranks in (2, 3):
        kept, runtimes = [], [quiet(rank, ranks) for rank in range(ranks)]
        for rank in range(ranks):
            index_M = torch.arange(rank, targets, ranks)
            nats = NetworkNats(targets, None, VOCABULARY)
            nats.record(index_M, torch.ones(len(index_M)))
            nats.record_distributions(index_M, torch.from_numpy(nats_NV[index_M.numpy()]).float())
            kept.append(nats)
        alone = [np.array(nats.nats_NV) for nats in kept]
        seen = iter(range(0, targets, golf.score.mixture.CHUNK))

        def add_others(part_MV, seen=seen, alone=alone, kept=kept):
            first = next(seen)
            return part_MV + sum(torch.from_numpy(rows[first : first + len(part_MV)]) for rows in alone[1:])

        object.__setattr__(runtimes[0], "sum_over_ranks", add_others)
        assert (kept[0].gather_distributions(runtimes[0]) == nats_NV).all()
        for runtime in runtimes:
            object.__setattr__(runtime, "sum_over_ranks", lambda part: part)
        together = sum(mixed_nats(tokens_N1, nats_NV, MODEL, score, runtime)[0] for runtime in runtimes)
        assert (together == mixed_nats(tokens_N1, nats_NV, MODEL, score, quiet())[0]).all()


LAST = dataclasses.replace(EVALUATION, mixture_successors=5)


@pytest.mark.parametrize("adapters", [0, 2])
def test_the_score_keeps_what_it_was_without_the_correction(artifact, adapters, tmp_path):  # noqa: F811
    knobs = dict(adapter_rank=adapters, adapter_lanes=2)
    plain, last = (dataclasses.replace(score, **knobs) for score in (EVALUATION, LAST))
    journal = ScoreJournal(tmp_path / "score.jsonl")
    before, after = scored(artifact, plain), scored(artifact, last, journal)
    assert after.parts["network_bpb"] == before.parts["network_bpb"]
    assert after.parts["counts_bpb"] == pytest.approx(before.val_bpb, abs=2e-3)  # the network's nats are rounded
    assert after.val_bpb != after.parts["counts_bpb"] and after.parts.keys() - before.parts.keys() == {"counts_bpb"}
    assert scored(artifact, last).nats == after.nats, "a file is what memory is"
    assert not list(tmp_path.glob("*.distributions")), "they take much room"


def test_a_scoring_that_is_killed_ends_in_the_same_score(artifact, tmp_path):  # noqa: F811
    calls, counted = [], ScoreJournal(tmp_path / "count.jsonl")
    expected = scored(artifact, LAST, counted, lambda: calls.append(1))
    for kill in (1, len(calls) // 2, len(calls) - 1):
        path = tmp_path / f"score{kill}.jsonl"
        with pytest.raises(Killed):
            scored(artifact, LAST, ScoreJournal(path), killed_after(kill))
        assert path.with_suffix(".distributions").stat().st_size == 2 * VOCABULARY * (len(repetitive_stream()) - 1)
        assert scored(artifact, LAST, ScoreJournal(path)).nats == expected.nats
        again = ScoreJournal(path)  # the distributions are gone: all is scored anew, nothing is mixed from zeros
        assert scored(artifact, LAST, again).nats == expected.nats


def test_what_would_take_too_much_room_is_refused_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr(golf.score.mixture, "MOST_KEPT_BYTES", 1000)
    with pytest.raises(ScoreError, match="would keep 0 GiB of distributions: set mixture_successors=0, or score less"):
        forecast_mixture(repetitive_stream(), MODEL, CORRECTED, quiet())


def test_the_feature_says_both_scores_and_the_knob_is_checked():
    files = {"score": {"network_bpb": 1.5, "counts_bpb": 1.25, "val_bpb": 1.125, "val_tokens": 7}}
    assert FEATURES["successors"].in_files(files) == (7, True, "1.2500 bits per byte without it, 1.1250 with it")
    assert FEATURES["mixture"].in_files(files)[2] == "1.5000 bits per byte by the network alone, 1.2500 with counts"
    files["score"]["val_bpb"] = 1.25
    assert FEATURES["successors"].in_files(files)[1] is False
    with pytest.raises(ConfigError, match="mixture_successors=-1 must be at least 0"):
        build_config("local", {}, {"mixture_successors": "-1"})


# ---- under probe ----


class WholeBigramNetwork(BigramNetwork):
    def distributions(self, tokens_N1):
        return (-np.log(self.rows_VV[tokens_N1[:-1]])).astype(np.float16)


def probe(make_mixture=CountMixture):
    scorer = MixtureScorer(WholeBigramNetwork(), CORRECTED, make_mixture)
    return probe_scorer(scorer, repetitive_stream(), POINTS)


def test_the_honest_correction_passes():
    probes = probe()
    assert [found.verdict for found in probes] == [PASS, PASS, PASS, PASS, NOT_EXERCISED]
    assert float(probes[1].detail.split("sums within ")[1].split()[0]) < 1e-6


class Planted(CountMixture):
    """Replaces a compiled kernel by a planted one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.honest = self.kernels["score_distributions"]
        self.kernels = self.kernels | {"score_distributions": self.planted}


class BiasKnowsTheTarget(Planted):
    def planted(self, everything, document, weights, learned, most, tokens, begin, *rest):
        learned.bias_by_token[tokens[begin + 1]] += 0.5
        self.honest(everything, document, weights, learned, most, tokens, begin, *rest)


class NotDivided(Planted):
    def planted(self, *arguments):
        self.honest(*arguments)
        arguments[-2][:] = np.minimum(1.01 * arguments[-2], 0.999)


class WeighsWhatComes(Planted):
    def planted(self, everything, document, weights, learned, most, tokens, begin, *rest):
        learned.bias_by_token[tokens[min(begin + 2, len(tokens) - 1)]] += 0.5
        self.honest(everything, document, weights, learned, most, tokens, begin, *rest)


@pytest.mark.parametrize(
    ("planted", "caught"),
    [
        (BiasKnowsTheTarget, "C2 normalisation"),
        (NotDivided, "C2 normalisation"),
        (WeighsWhatComes, "C1 causality"),
    ],
)
def test_a_planted_violation_is_caught_by_name(planted, caught):
    assert caught in {found.name for found in probe(planted) if found.verdict == FAIL}


# ---- as a coder sees it ----


def test_a_coder_s_distributions_are_those_of_the_scorer():
    tokens_N1 = repetitive_stream().astype(np.int32)
    nats_NV = kept_rows(len(tokens_N1) - 1)
    expected_N, _ = mixed_nats(tokens_N1, nats_NV, MODEL, CORRECTED, quiet())

    class Table:
        def rows(self, tokens_BN, target):
            return distributions_from(nats_NV[target : target + 1])

    from golf.model.init import build_model
    from golf.score.scorer import ScoreSettings

    predictor = StreamPredictor(build_model(MODEL, 0), ScoreSettings(16, 4, 4), CORRECTED, [len(nats_NV)])
    predictor.network = Table()
    for target, token in enumerate(tokens_N1[1:].tolist()):
        predictor.predict()
        distribution_V = predictor.distribution(0)
        assert distribution_V.sum() == pytest.approx(1, abs=1e-12)
        assert -np.log(distribution_V[token]) == pytest.approx(expected_N[target], abs=1e-2), target
        predictor.learn(0, token)
        predictor.advance()


@pytest.mark.parametrize("most", [0, 5, VOCABULARY])
def test_a_coder_s_kernel_gives_every_token_what_the_scorer_would_give_it(most):
    tokens, candidates_V = repetitive_stream()[:91].astype(np.int32), np.arange(VOCABULARY)
    nats_NV, score = kept_rows(90), dataclasses.replace(SCORE, mixture_successors=most)
    mixture = CountMixture(90, VOCABULARY, score)
    mixture.open_document(90)
    learned = mixture.learned if most else successors.new_successor_weights(score.mixture_orders, VOCABULARY)
    for n, token in enumerate(tokens[1:]):
        network_V = distributions_from(nats_NV[n])
        nats_VX = np.broadcast_to(nats_NV[n], (VOCABULARY, VOCABULARY)) if most else -np.log(network_V)
        expected_V = np.exp(score_candidates(mixture, tokens, n, candidates_V, nats_VX))
        state = mixture.everything, mixture.document, mixture.weights, learned
        found_V = compiled_distribution()(*state, most, tokens[: n + 1], network_V)
        assert found_V == pytest.approx(expected_V, rel=1e-12) and found_V.sum() == pytest.approx(1, abs=1e-12)
        mixture.score_targets(tokens, n, nats_NV[n : n + 1] if most else -np.log(network_V[token : token + 1]))
