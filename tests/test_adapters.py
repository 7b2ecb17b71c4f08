"""Adapters of each document: score first, forgotten with their document, causal, exact, resumed and proven."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture_fixtures import BOS, MODEL, Killed, killed_after, quiet, repetitive_stream
from test_mixture import artifact, scored  # noqa: F401
from test_prove import IDENTITY, OneByte

import golf.score.roundtrip
from golf.config.config import Config, with_knobs
from golf.config.features import FEATURES
from golf.model.init import build_model
from golf.score.adapted import claim_documents, score_adapted
from golf.score.adapters import Adapters, LaneScorer, chunk_size, lane_steps
from golf.score.journal import ScoreJournal
from golf.score.scorer import sliding_settings
from golf.score.windows import stream_documents
from lab.compress.proof import decode_beginning, encode_beginning, judge, scorer_nats
from lab.probe.adaptive_scorer import AdaptedScorer, MixtureScorer
from lab.probe.probes import FAIL, NOT_EXERCISED, PASS, ProbePoints, probe_scorer

SCORE = with_knobs(
    Config(), dict(eval_seq_len=16, eval_stride=8, adapter_rank=2, adapter_lr=0.02, adapter_lanes=3, mixture_orders=3)
).score
SETTINGS, STREAM = sliding_settings(SCORE, MODEL), repetitive_stream()


@pytest.fixture
def model():
    return build_model(MODEL, seed=0).eval()


def nats_of(model, tokens_N1: np.ndarray = STREAM, score=SCORE, runtime=None) -> np.ndarray:
    nats_N = np.full(len(tokens_N1) - 1, np.nan)

    def record(index_M, nats_M):
        nats_N[index_M.numpy()] = nats_M.numpy()

    score_adapted(model, tokens_N1, OneByte(), SETTINGS, score, runtime or quiet(), recorder=record)
    return nats_N


# ---- lanes ----


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 20))
def test_lanes_score_every_target_once_in_the_order_of_its_document(lengths, lanes, size):
    edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    documents = list(zip(edges[:-1], edges[1:], strict=True))
    done, places = np.zeros(edges[-1], int), {}
    for step in lane_steps(documents, lanes, size):
        assert len(step) == lanes
        for lane, chunk in enumerate(step):
            if not chunk:
                continue
            begin, end = documents[chunk.document]
            assert places.setdefault(chunk.document, lane) == lane
            assert chunk.first == begin + done[begin:end].sum() and chunk.opens == (chunk.first == begin)
            assert chunk.window_end == chunk.first + chunk_size(chunk.first - begin, size) <= chunk.first + size
            assert chunk.last == min(chunk.window_end, end) and chunk.closes == (chunk.last == end)
            done[chunk.first : chunk.last] += 1
    assert (done == 1).all()


def test_short_documents_are_scored_in_shorter_chunks():
    assert [chunk_size(place, 32) for place in (0, 8, 16, 32, 64)] == [8, 8, 16, 32, 32]
    assert [chunk_size(place, 2) for place in (0, 1, 2)] == [1, 1, 2]


# ---- learning ----


def test_without_learning_the_scores_are_the_network_s_in_the_same_windows(model):
    nats_N = nats_of(model, score=dataclasses.replace(SCORE, adapter_lr=0.0))
    ids = torch.from_numpy(np.concatenate([np.full(16, BOS), STREAM, np.full(16, BOS)]).astype(np.int64))
    for step in lane_steps(stream_documents(STREAM, BOS), 1, 8):
        (chunk,) = step
        with torch.no_grad():
            row_1T = ids[None, chunk.window_end : chunk.window_end + 16]
            logits_TV = model.logits(row_1T, rope_base=SETTINGS.rope_base)[0].double()
        for target in range(chunk.first, chunk.last):
            place = 16 - (chunk.window_end - target)
            expected = -float(logits_TV[place].log_softmax(0)[int(STREAM[target + 1])])
            assert nats_N[target] == pytest.approx(expected, abs=1e-5)


def test_learning_helps_on_text_that_comes_again_and_first_chunks_know_nothing_of_it(model):
    plain_N, learned_N = nats_of(model, score=dataclasses.replace(SCORE, adapter_lr=0.0)), nats_of(model)
    assert learned_N.sum() < 0.97 * plain_N.sum()
    for begin, end in stream_documents(STREAM, BOS):
        opening = slice(begin, min(end, begin + chunk_size(0, 8)))
        assert (learned_N[opening] == plain_N[opening]).all(), "another document was learned from"


def test_an_optimizer_step_is_adam_s(model):
    """Against torch.optim.Adam on one lane, with gradients of a loss that both share."""
    adapters = Adapters(model, dataclasses.replace(SCORE, adapter_lanes=1))
    twins = [part.detach().clone().requires_grad_() for part in adapters.parameters]
    optimizer = torch.optim.Adam(twins, lr=SCORE.adapter_lr, betas=(0.9, 0.99))
    weights = [torch.randn_like(part) for part in twins]
    for _ in range(5):
        losses = [
            sum((weight * part.tanh()).sum() for weight, part in zip(weights, parts, strict=True))
            for parts in (adapters.parameters, twins)
        ]
        adapters.learn(losses[0][None])
        optimizer.zero_grad()
        losses[1].backward()
        optimizer.step()
    for ours, theirs in zip(adapters.parameters, twins, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_lane_is_the_network_with_changed_matrices_and_head(model):
    adapters = Adapters(model, SCORE)
    names = {module: name for name, module in model.named_modules()}
    assert "unembed" in {names[module] for module in adapters.modules}
    ids_BT = torch.randint(2, MODEL.vocab_size, (SCORE.adapter_lanes, 12))
    with torch.no_grad():
        for up_BOR in adapters.up:
            up_BOR.normal_(std=0.3)
        with adapters.attached():
            found_BTV = model.logits(ids_BT).detach()
        assert (found_BTV - model.logits(ids_BT)).abs().max() > 0.01
        for lane, row_T in enumerate(ids_BT):
            twin = copy.deepcopy(model)
            for module, down_BRI, up_BOR in zip(adapters.modules, adapters.down, adapters.up, strict=True):
                change_OI = up_BOR[lane] @ down_BRI[lane]
                if names[module] == "unembed":
                    head_change_VD = change_OI
                else:
                    twin.get_submodule(names[module]).weight += change_OI
            x_1TD, head_VD = twin.final_states(row_T[None])
            capped_1TV = (x_1TD @ (head_VD + head_change_VD).T / MODEL.logit_softcap).tanh() * MODEL.logit_softcap
            torch.testing.assert_close(found_BTV[lane], capped_1TV[0], atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nats_of(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@given(st.integers(0, 40), st.lists(st.integers(0, 2), max_size=80))
def test_every_document_is_claimed_by_one_rank(documents, order):
    store, taken = torch.distributed.HashStore(), ([], [], [])
    store.set("documents", "0")
    runtimes = [dataclasses.replace(quiet(rank, 3), store=store) for rank in range(3)]
    claims = [claim_documents(range(100, 100 + documents), runtimes[rank], taken[rank]) for rank in range(3)]
    yielded = [number for rank in [*order, 0] if (number := next(claims[rank], None)) is not None]
    yielded += [number for rank in range(3) for number in claims[rank]]
    assert yielded == list(range(100, 100 + documents)) == sorted(sum(taken, []))


@pytest.mark.slow
def test_ranks_share_the_documents_and_the_score_does_not_depend_on_their_number(tmp_path):
    by_ranks = {ranks: score_on(ranks, tmp_path / str(ranks)) for ranks in (1, 2, 3)}
    scores = [score for found in by_ranks.values() for rank in found for score in rank["scores"]]
    assert all(score == scores[0] for score in scores), scores
    for ranks, found in by_ranks.items():
        counts = [rank["documents"] for rank in found]
        assert sum(had for had, _ in counts) == len(stream_documents(STREAM, BOS)) and len(found) == ranks
        assert sum(again for _, again in counts) == sum(had - had // 2 for had, _ in counts)


def score_on(ranks: int, folder: Path) -> list[dict]:
    """Returns what each rank of tests/score_on_ranks.py found."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    finished = subprocess.run(
        [*command, "tests/score_on_ranks.py", str(folder)], cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("found*.json"))]


# ---- the artifact's score ----


EVALUATION = dataclasses.replace(SCORE, mixture=True, max_eval_seconds=600.0, eval_batch_seqs=4)


def test_a_scoring_that_is_killed_ends_in_the_same_score(artifact, tmp_path):  # noqa: F811
    expected, calls = scored(artifact, EVALUATION), []
    scored(artifact, EVALUATION, ScoreJournal(tmp_path / "count.jsonl"), lambda: calls.append(1))
    assert expected.parts["adapter_effect"] > 0 and expected.val_bpb < expected.parts["network_bpb"]
    for kill in (1, 3, len(calls) - 1):
        path = tmp_path / f"score{kill}.jsonl"
        with pytest.raises(Killed):
            scored(artifact, EVALUATION, ScoreJournal(path), killed_after(kill))
        resumed = scored(artifact, EVALUATION, ScoreJournal(path))
        assert resumed.nats == pytest.approx(expected.nats, rel=1e-6)
        assert resumed.parts["network_bpb"] == pytest.approx(expected.parts["network_bpb"], rel=1e-6)


def test_time_that_is_short_makes_larger_chunks(artifact, monkeypatch):  # noqa: F811
    monkeypatch.setattr(golf.score.roundtrip, "forecast_adapted", lambda *arguments, score: 1000.0)
    assert scored(artifact, dataclasses.replace(EVALUATION, mixture=False)).stride == 16


def test_the_feature_says_its_effect():
    files = {"score": {"adapter_effect": 0.25, "eval_windows": 9}}
    assert FEATURES["adapters"].in_files(files) == (9, True, "a step changes a token's nats by up to 0.25")
    assert FEATURES["adapters"].in_files({"score": {"adapter_effect": 0.0, "eval_windows": 9}})[1] is False


# ---- probes ----

POINTS = ProbePoints([30, 87, 121, 160], [40, 88, 100, 130, 170, 199])


@pytest.mark.parametrize("mixed", [False, True])
def test_honest_adapters_pass_and_their_learning_is_exercised(model, mixed):
    scorer = AdaptedScorer(model, SETTINGS, SCORE)
    scorer = MixtureScorer(scorer, SCORE) if mixed else scorer
    verdicts = [probe.verdict for probe in probe_scorer(scorer, STREAM, POINTS)]
    assert verdicts == [PASS, PASS, PASS, PASS, NOT_EXERCISED]


class LearnsFirst(LaneScorer):
    """Learns from a chunk, then scores it."""

    def step(self, step, recorder, learned=None):
        super().step(step, lambda *_: None)
        super().step([chunk._replace(opens=False) if chunk else None for chunk in step], recorder, learned)


class LearnsUnscored(LaneScorer):
    """A phase that sees the document's next chunk before it is scored."""

    def step(self, step, recorder, learned=None):
        ahead = [c._replace(first=c.last, last=c.last + 4, window_end=c.last + 4) if c else None for c in step]
        ahead = [c if c and c.last < len(self.padded_N1) - 33 else None for c in ahead]
        if any(ahead):
            super().step([c._replace(opens=False) if c else None for c in ahead], lambda *_: None, learned)
        super().step([c._replace(opens=False) if c else None for c in step], recorder, learned)


@pytest.mark.parametrize(
    ("planted", "caught"),
    [(LearnsFirst, "C2 normalisation"), (LearnsUnscored, "C3 score before update"), (LearnsUnscored, "C1 causality")],
)
def test_a_planted_violation_is_caught_by_name(model, monkeypatch, planted, caught):
    monkeypatch.setattr("lab.probe.adaptive_scorer.LaneScorer", planted)
    found = probe_scorer(AdaptedScorer(model, SETTINGS, SCORE), STREAM, POINTS)
    assert caught in {probe.name for probe in found if probe.verdict == FAIL}


# ---- the proof ----


@pytest.mark.parametrize("mixed", [False, True])
def test_an_adapted_score_is_proven(model, mixed, monkeypatch):
    score = dataclasses.replace(SCORE, mixture=mixed)
    coded = encode_beginning(model, STREAM, SETTINGS, score, 150)
    nats_T = scorer_nats(model, STREAM, OneByte(), SETTINGS, score, 150)
    text = STREAM[:151].astype(np.int64).tobytes()

    def decode():
        return decode_beginning(build_model(MODEL, seed=0), coded, SETTINGS, score).tobytes()

    proof = judge(coded, nats_T, text, decode, IDENTITY)
    assert proof.verdict == "PASS" and abs(proof.file_bits - proof.scorer_bits) < 26, proof.detail
    monkeypatch.setattr("lab.compress.proof.LaneScorer", LearnsFirst)
    cheated_T = scorer_nats(model, STREAM, OneByte(), SETTINGS, score, 150)
    monkeypatch.setattr("lab.compress.proof.BIT_GAP", 26)
    assert mixed or judge(coded, cheated_T, text, decode, IDENTITY).verdict == "FAIL"
