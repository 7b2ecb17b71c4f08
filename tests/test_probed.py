"""Legality probes on the real scorer: sound with NTK windows, caught with planted leaks."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import golf.model.gpt
from golf.config.config import Config, with_knobs
from golf.model.embedding import SmearGate
from golf.model.init import build_model
from golf.score.scorer import ScoreSettings, prepare_job, score_windows, sliding_settings
from golf.score.windows import plan_windows
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS, Probe, ScoreEvent, probe_scorer
from lab.probe.scorer_adapter import ArtifactScorer, contiguous_spans, probe_plan, probe_stream_tokens

BOS = 1
SMALL = with_knobs(
    Config(),
    dict(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=32, bigram_dim=8)
    | dict(train_seq_len=8, logit_softcap=5.0, tied_embed_init_std=0.5, eval_seq_len=16, eval_batch_seqs=5),
)


class OneByte:
    def to(self, device):
        return self

    def count(self, previous_N, targets_N):
        return torch.ones_like(targets_N)


def real_scorer(stride: int = 6, forward=None) -> ArtifactScorer:
    model = build_model(SMALL.model, seed=1)
    score = dataclasses.replace(SMALL.score, eval_stride=stride)
    return ArtifactScorer(model, OneByte(), sliding_settings(score, SMALL.model), forward)


def real_stream(scorer: ArtifactScorer) -> np.ndarray:
    tokens = np.random.default_rng(3).integers(2, 64, probe_stream_tokens(scorer.settings, scorer.device))
    tokens[::11] = BOS
    return tokens.astype(np.uint16)


def real_verdicts(scorer: ArtifactScorer, seed: int = 0) -> list[str]:
    tokens = real_stream(scorer)
    return [probe.verdict for probe in probe_scorer(scorer, tokens, scorer.points(len(tokens) - 1, seed), seed)]


SOUND = [PASS, PASS, NOT_EXERCISED, PASS, NOT_EXERCISED]


@pytest.mark.parametrize("stride", [1, 6, 16])
def test_the_real_scorer_with_ntk_windows(stride):
    scorer = real_scorer(stride)
    assert scorer.settings.rope_base > SMALL.model.rope_base
    assert real_verdicts(scorer) == SOUND


def test_a_trace_is_the_score():
    scorer = real_scorer()
    tokens = real_stream(scorer)
    trace = scorer.trace(tokens)
    job = prepare_job(scorer.model.eval(), tokens, OneByte(), scorer.settings, scorer.device)
    with torch.no_grad():
        sums = score_windows(job, 0, len(job.plan))
    assert trace.nats_N.sum() == pytest.approx(sums.nats, rel=1e-12)
    assert [(event.begin, event.end) for event in trace.events] == [(0, 16), (16, len(tokens) - 1)]


def test_the_distribution_is_that_of_the_window_that_scores():
    scorer = real_scorer()
    tokens = real_stream(scorer)
    plan = plan_windows(len(tokens) - 1, 16, 6)
    ids = torch.from_numpy(tokens.astype(np.int64))
    for target in (0, 15, 16, 21, 30, len(tokens) - 2):
        window = next(k for k in range(len(plan)) if target < plan.ends_W[k])
        start, end = plan.starts_W[window], plan.ends_W[window]
        with torch.no_grad():
            logits_V = scorer.model.logits(ids[None, start:end], rope_base=scorer.settings.rope_base)[0, target - start]
        expected = F.log_softmax(logits_V.double(), 0).numpy()
        assert scorer.log_probabilities(tokens, target, np.arange(64)) == pytest.approx(expected, abs=1e-5)


def sees_everything(q_BHSK, k_BGTK, v_BGTK):
    return F.scaled_dot_product_attention(q_BHSK, *(part.repeat_interleave(2, 1) for part in (k_BGTK, v_BGTK)))


@pytest.mark.parametrize("seed", range(3))
def test_a_model_without_a_causal_mask_fails_causality(seed, monkeypatch):
    monkeypatch.setattr(golf.model.gpt, "causal_attention", sees_everything)
    assert real_verdicts(real_scorer(), seed) == [FAIL, *SOUND[1:]]


@pytest.mark.parametrize("seed", range(3))
def test_a_smear_of_the_next_token_fails_causality(seed, monkeypatch):
    """It reads one token ahead, the very target: no score before the cut moves, only the prediction at it."""

    def smear(self, e_BTD, has_previous_BT):
        return e_BTD + 0.5 * torch.cat([e_BTD[:, 1:], e_BTD[:, -1:]], 1)

    monkeypatch.setattr(SmearGate, "forward", smear)
    assert real_verdicts(real_scorer(), seed) == [FAIL, *SOUND[1:]]


def test_a_forward_that_rewards_its_target_fails_normalisation():
    scorer = real_scorer()
    scorer.forward = lambda *arguments: scorer.model.token_losses(*arguments) * 0.9
    assert real_verdicts(scorer) == [PASS, FAIL, *SOUND[2:]]


def test_weights_that_move_while_they_score_are_an_update():
    scorer = real_scorer()
    plain = scorer.model.token_losses

    def adapting(*arguments):
        losses_BS = plain(*arguments)
        scorer.model.skip_weights.data.zero_()  # from the second pass on it changes nothing, so that scores repeat
        return losses_BS

    scorer.forward = adapting
    trace = scorer.trace(real_stream(scorer))
    assert trace.events[0] == ScoreEvent("update", 0, len(trace.nats_N))


def test_compiled_forwards_get_the_shape_that_scored():
    shapes = set()
    scorer = real_scorer()

    def forward(ids_BT, targets_BS, rope_base):
        shapes.add((*ids_BT.shape, targets_BS.size(1)))
        return scorer.model.token_losses(ids_BT, targets_BS, rope_base)

    scorer.forward = forward
    assert real_verdicts(scorer) == SOUND
    assert shapes == {(5, 16, 6)}


def test_points_are_inside_of_windows():
    scorer, plan = real_scorer(), plan_windows(200, 16, 6)
    for seed in range(20):
        points = scorer.points(200, seed, windows=2, samples=3)
        assert len(points.cuts) >= 4 and points.cuts[0] < 15 and len(points.targets) == 6
        assert not set(points.cuts) & set(plan.ends_W - 1) and min(points.targets) >= 16
    alone = scorer.points(3, 0)
    assert set(alone.cuts) <= {0, 1} and alone.targets == [0, 1, 2]


def test_spans_of_numbers():
    assert contiguous_spans(np.array([], dtype=int)) == []
    assert contiguous_spans(np.array([4])) == [(4, 5)]
    assert contiguous_spans(np.array([4, 5, 6, 6, 7, 9])) == [(4, 7), (6, 8), (9, 10)]


def test_the_plan_of_the_whole_stream(monkeypatch):
    settings, traced = ScoreSettings(16, 6, 4), Probe("C4 single pass", PASS, "61 targets")
    probe = probe_plan(1000, 1000, settings, traced)
    assert probe.verdict == PASS and probe.detail.startswith("61 targets; 165 windows tile")
    assert "999 of the stream's 1,000" in probe_plan(1000, 999, settings, traced).detail
    failed = dataclasses.replace(traced, verdict=FAIL)
    assert probe_plan(1000, 1000, settings, failed) == failed

    def gapped(targets, length, stride):
        plan = plan_windows(targets, length, stride)
        return dataclasses.replace(plan, first_scored_W=plan.first_scored_W + (np.arange(len(plan)) == 3))

    monkeypatch.setattr("lab.probe.scorer_adapter.plan_windows", gapped)
    assert probe_plan(1000, 1000, settings, traced).verdict == FAIL
