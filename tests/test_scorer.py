"""The scorer against brute force: sums, causality, eval mode, byte counts, ranks, bad streams."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golf.config.config import Config, with_knobs
from golf.config.model import ModelConfig
from golf.config.scoring import ScoreConfig
from golf.model.init import build_model
from golf.runtime import Log, Runtime
from golf.score.scorer import (
    ScoreError,
    ScoreSettings,
    batch_shapes,
    evaluation_mode,
    gather_windows,
    plain_settings,
    prepare_job,
    score_stream,
    score_windows,
    sliding_settings,
)
from golf.score.windows import rank_share

VOCABULARY = 32
BOS = 1
CPU = Runtime(torch.device("cpu"))
SMALL = with_knobs(
    Config(),
    dict(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=32, bigram_dim=8)
    | dict(train_seq_len=8, logit_softcap=5.0, tied_embed_init_std=0.5),
).model

torch.set_num_threads(1)


class CausalToy(torch.nn.Module):
    """Predicts from a decaying sum of all tokens of the window so far; float64 inside, so that batches agree."""

    def __init__(self, leak: int = 0):
        super().__init__()
        self.config = ModelConfig(vocab_size=VOCABULARY, bos_id=BOS, train_seq_len=8)
        self.leak = leak
        """Positions by which each prediction sees too far."""
        generator = torch.Generator().manual_seed(0)
        self.embed_VD = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)
        self.head_DV = torch.randn(6, VOCABULARY, generator=generator, dtype=torch.float64)
        self.dropout = torch.nn.Dropout(0.5)
        self.shapes: list[tuple[int, int, int]] = []

    def token_losses(self, ids_BT, targets_BS, rope_base=None):
        self.shapes.append((*ids_BT.shape, targets_BS.size(1)))
        x_BTD = self.dropout(self.embed_VD[ids_BT])
        state_BD, states = torch.zeros_like(x_BTD[:, 0]), []
        for t in range(x_BTD.size(1)):
            state_BD = 0.9 * state_BD + x_BTD[:, t]
            states.append(state_BD)
        h_BTD = torch.stack(states, 1)
        if self.leak:
            h_BTD = h_BTD + torch.roll(x_BTD, -self.leak, dims=1)
        logits_BSV = (h_BTD[:, -targets_BS.size(1) :] @ self.head_DV) * 0.2
        return F.cross_entropy(logits_BSV.transpose(1, 2), targets_BS, reduction="none").float()


class OneToThreeBytes:
    """A table whose counts depend on both tokens; a document start spells nothing."""

    def to(self, device):
        return self

    def count(self, previous_N, targets_N):
        return (1 + targets_N % 2 + (previous_N == BOS)) * (targets_N != BOS)


TABLE = OneToThreeBytes()


def stream(targets: int, vocabulary: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, vocabulary, targets + 1).astype(np.uint16)
    tokens[0] = BOS
    return tokens


def brute_force_nats(model, tokens: np.ndarray, length: int, stride: int) -> float:
    """Each target by itself: find its window by stepping, run that window alone, take one loss."""
    targets = len(tokens) - 1
    length = min(length, targets)
    ids = torch.from_numpy(tokens.astype(np.int64))
    total = 0.0
    for t in range(targets):
        end = length
        while end <= t:
            end = min(end + stride, targets)
        losses_BS = model.token_losses(ids[None, end - length : end], ids[None, end - length + 1 : end + 1])
        total += losses_BS[0, t - (end - length)].item()
    return total


def target_losses(model, tokens: np.ndarray, inputs: np.ndarray, settings: ScoreSettings) -> torch.Tensor:
    """The loss of every target of `tokens` as the scorer sees it, where the model reads `inputs` instead."""
    job = prepare_job(model, inputs, TABLE, settings, CPU.device)
    targets_N = torch.from_numpy(tokens.astype(np.int64))[1:]
    losses_N = torch.full(targets_N.shape, math.nan)
    with evaluation_mode(model):
        for shape in batch_shapes(job, 0, len(job.plan)):
            batch = gather_windows(job, *shape)
            losses_BS = model.token_losses(batch.ids_BT, targets_N[batch.index_BS], settings.rope_base)
            losses_N[batch.index_BS[batch.counted_BS]] = losses_BS[batch.counted_BS]
    return losses_N


@pytest.mark.parametrize(
    ("targets", "length", "stride", "batch"),
    [
        (50, 12, 4, 3),  # a tail
        (52, 12, 4, 4),  # no tail
        (50, 12, 5, 1),
        (50, 12, 1, 7),
        (50, 12, 12, 4),  # the plain evaluation, last row overlapping
        (48, 12, 12, 4),  # the plain evaluation, rows fit
        (7, 12, 4, 4),  # shorter than a window
        (3, 12, 4, 4),  # shorter than a stride
        (12, 12, 4, 4),  # one window
        (13, 12, 4, 4),  # one target more than a window
        (1, 1, 1, 1),
        (20, 1, 1, 8),
        (30, 12, 11, 50),  # a batch larger than the stream
    ],
)
def test_score_is_the_brute_force_score(targets, length, stride, batch):
    model, tokens = CausalToy().eval(), stream(targets)
    score = score_stream(model, tokens, TABLE, ScoreSettings(length, stride, batch), CPU)
    assert score.nats == pytest.approx(brute_force_nats(model, tokens, length, stride), rel=1e-9)
    assert score.tokens == targets
    assert score.bytes == TABLE.count(tokens[:-1].astype(int), tokens[1:].astype(int)).sum()
    assert score.documents == (tokens == BOS).sum()
    assert score.val_loss == score.nats / targets
    assert score.val_bpb == score.nats / math.log(2) / score.bytes


def test_real_model_agrees_with_brute_force():
    model, tokens = build_model(SMALL, seed=1).eval(), stream(70, SMALL.vocab_size)
    score = score_stream(model, tokens, TABLE, ScoreSettings(16, 6, 4), CPU)
    with torch.no_grad():
        assert score.nats == pytest.approx(brute_force_nats(model, tokens, 16, 6), rel=1e-6)


@pytest.mark.parametrize("stride", [1, 4, 12])
def test_batch_size_does_not_change_the_score(stride):
    tokens = stream(101)
    scores = [
        score_stream(CausalToy(), tokens, TABLE, ScoreSettings(12, stride, batch), CPU) for batch in (1, 2, 5, 64)
    ]
    for score in scores[1:]:
        assert score.nats == pytest.approx(scores[0].nats, rel=1e-9)
        assert (score.tokens, score.bytes) == (scores[0].tokens, scores[0].bytes)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shares_of_the_ranks_add_up(world_size):
    model, tokens, settings = CausalToy(), stream(101), ScoreSettings(12, 4, 3)
    whole = score_stream(model, tokens, TABLE, settings, CPU)
    job = prepare_job(model, tokens, TABLE, settings, CPU.device)
    with evaluation_mode(model):
        parts = [score_windows(job, *rank_share(len(job.plan), rank, world_size)) for rank in range(world_size)]
    assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-9)
    assert (sum(part.tokens for part in parts), sum(part.bytes for part in parts)) == (whole.tokens, whole.bytes)


def test_a_range_of_windows_sums_its_own_targets():
    model, tokens, settings = CausalToy(), stream(101), ScoreSettings(12, 5, 3)
    job = prepare_job(model, tokens, TABLE, settings, CPU.device)
    losses_N = target_losses(model, tokens, tokens, settings)
    bytes_N = TABLE.count(tokens[:-1].astype(int), tokens[1:].astype(int))
    for begin, end in [(0, 1), (0, 7), (1, 2), (5, 16), (len(job.plan) - 1, len(job.plan)), (4, 4)]:
        with evaluation_mode(model):
            sums = score_windows(job, begin, end)
        covered = np.concatenate([[0], job.plan.ends_W])[[begin, end]]
        assert sums.tokens == covered[1] - covered[0]
        assert sums.bytes == bytes_N[slice(*covered)].sum()
        assert sums.nats == pytest.approx(losses_N[slice(*covered)].double().sum().item(), rel=1e-12)


def first_leak(model, tokens: np.ndarray, settings: ScoreSettings) -> int | None:
    """The first target whose loss moves when the model reads noise from the target on; None where there is none.

    The loss stays that of the true target, so that a model which reads the target itself is caught too.
    """
    losses_N = target_losses(model, tokens, tokens, settings)
    assert not losses_N.isnan().any()
    noise = stream(len(tokens) - 1, model.config.vocab_size, seed=99)
    for target in range(len(losses_N)):
        inputs = np.concatenate([tokens[: target + 1], noise[target + 1 :]])
        if not torch.equal(target_losses(model, tokens, inputs, settings)[: target + 1], losses_N[: target + 1]):
            return target
    return None


@pytest.mark.parametrize("build", [CausalToy, lambda: build_model(SMALL, seed=1)])
@pytest.mark.parametrize(
    "settings", [ScoreSettings(12, 5, 2, 30_000.0), ScoreSettings(8, 8, 2), ScoreSettings(8, 1, 4)]
)
def test_later_tokens_leave_earlier_losses_bit_identical(build, settings):
    model = build()
    assert first_leak(model, stream(30, model.config.vocab_size), settings) is None


@pytest.mark.parametrize("leak", [1, 3])
def test_a_model_that_looks_ahead_is_caught(leak):
    assert first_leak(CausalToy(leak), stream(30), ScoreSettings(12, 5, 2)) is not None


@pytest.mark.parametrize("training", [True, False])
def test_scoring_is_in_eval_mode_and_restores_every_module(training):
    model, tokens = CausalToy().train(training), stream(40)
    model.dropout.eval()
    expected = score_stream(CausalToy().eval(), tokens, TABLE, ScoreSettings(12, 4, 3), CPU).nats
    model.dropout.train(not training)
    assert score_stream(model, tokens, TABLE, ScoreSettings(12, 4, 3), CPU).nats == expected
    assert model.training is training and model.dropout.training is not training


def test_mode_is_restored_after_an_error():
    model = CausalToy()

    def broken(ids_BT, targets_BS, rope_base):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        score_stream(model, stream(40), TABLE, ScoreSettings(12, 12, 3), CPU, forward=broken)
    assert model.training and model.dropout.training


def test_a_model_that_leaves_eval_mode_is_caught():
    model = CausalToy()

    def sly(ids_BT, targets_BS, rope_base):
        model.train()
        return model.token_losses(ids_BT, targets_BS, rope_base)

    with pytest.raises(AssertionError, match="eval mode"):
        score_stream(model, stream(40), TABLE, ScoreSettings(12, 12, 1), CPU, forward=sly)
    with pytest.raises(AssertionError, match="evaluation_mode"):
        score_windows(prepare_job(model, stream(40), TABLE, ScoreSettings(12, 4, 3), CPU.device), 0, 2)


def test_all_batches_but_the_first_window_have_one_shape():
    model = CausalToy()
    score_stream(model, stream(101), TABLE, ScoreSettings(12, 4, 5), CPU)
    assert model.shapes[0] == (1, 12, 12) and set(model.shapes[1:]) == {(5, 12, 4)}
    model.shapes.clear()
    score_stream(model, stream(101), TABLE, ScoreSettings(12, 12, 5), CPU)
    assert set(model.shapes) == {(5, 12, 12)}


def test_injected_forward_serves_the_batches_that_share_a_shape():
    model, seen = CausalToy(), []

    def forward(ids_BT, targets_BS, rope_base):
        seen.append((tuple(targets_BS.shape), rope_base))
        return CausalToy.token_losses(model, ids_BT, targets_BS)

    score_stream(model, stream(101), TABLE, ScoreSettings(12, 4, 5, 123.0), CPU, forward=forward)
    assert set(seen) == {((5, 4), 123.0)}


def test_gradients_and_inference_tensors_stay_out():
    model = build_model(SMALL, seed=1)
    score_stream(model, stream(40, SMALL.vocab_size), TABLE, plain_settings(SMALL, 4), CPU)
    ids = torch.from_numpy(stream(8, SMALL.vocab_size).astype(np.int64))[None]
    model(ids[:, :-1], ids[:, 1:]).backward()  # what scoring left behind must not hinder training
    assert model.tok_emb.weight.grad is not None


def test_settings_follow_the_configuration():
    model = ModelConfig()  # 2,048 tokens, head width 64
    assert sliding_settings(ScoreConfig(), model).rope_base == pytest.approx(20_452.23, abs=0.01)
    assert sliding_settings(ScoreConfig(eval_rope="none"), model).rope_base == 10_000.0
    assert sliding_settings(ScoreConfig(eval_seq_len=2048), model).rope_base == 10_000.0
    assert plain_settings(model, 7) == ScoreSettings(2048, 2048, 7)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "nothing to score"),
        ([BOS], "nothing to score"),
        ([BOS, 3, VOCABULARY], "another tokenizer"),
        ([5, 3, BOS], "document start"),
        ([BOS, BOS, BOS], "no byte of text"),
    ],
)
def test_streams_that_no_score_can_be_made_from(tokens, message):
    with pytest.raises(ScoreError, match=message):
        score_stream(CausalToy(), np.array(tokens, dtype=np.uint16), TABLE, ScoreSettings(12, 4, 3), CPU)


@pytest.mark.parametrize("settings", [ScoreSettings(12, 0, 3), ScoreSettings(12, 13, 3), ScoreSettings(12, 4, 0)])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ScoreError, match="positive"):
        score_stream(CausalToy(), stream(40), TABLE, settings, CPU)


def test_forecast_and_progress_are_printed():
    terminal = io.StringIO()
    runtime = dataclasses.replace(CPU, log=Log(terminal))
    score = score_stream(CausalToy(), stream(200), TABLE, ScoreSettings(12, 4, 3), runtime)
    lines = terminal.getvalue().splitlines()
    forecasts = [line for line in lines if line.startswith("score:forecast seconds:")]
    assert len(forecasts) == 1 and f"windows:{score.windows} tokens_per_second:" in forecasts[0]
    assert [line.split()[1] for line in lines if line.startswith("score:progress")][-1] == "100%"
    assert 8 <= sum(line.startswith("score:progress") for line in lines) <= 10
    assert score.window_tokens == score.windows * 12
