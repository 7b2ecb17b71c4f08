"""What each part of adaptive scoring brings: rows that agree with the scorer, and the published tilt by hand."""

from dataclasses import replace

import numpy as np
import pytest
from mixture_fixtures import BOS, MODEL, quiet, repetitive_stream
from test_adapters import SCORE, SETTINGS
from test_prove import OneByte

from golf.model.init import build_model
from golf.score.mixture import NetworkNats
from golf.score.scorer import score_stream
from lab.compare.adaptation import BOOST, CONTEXT, OpenedArtifact, measure_parts, score_network, tilt_row, token_hints


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(OpenedArtifact, "model", lambda self: build_model(MODEL, seed=0).eval())

    class Packed:
        model = MODEL

    stream = np.concatenate([[BOS], np.tile(repetitive_stream()[1:60], 3)]).astype(np.uint16)
    return OpenedArtifact(Packed(), stream, OneByte(), SETTINGS, SCORE, quiet())


def test_hints_are_of_what_followed_before():
    stream = np.array([BOS, *range(2, 30), *range(2, 30), 3])
    hints_N = token_hints(stream)
    assert (hints_N[: 28 + CONTEXT] == -1).all(), "no context of 16 tokens has come again yet"
    assert hints_N[28 + CONTEXT :].tolist() == [*stream[29 + CONTEXT : 57].tolist(), 2]


def test_a_tilted_distribution_sums_to_one():
    p_V = np.random.default_rng(0).dirichlet(np.ones(9))
    tilted_V = p_V * np.exp(BOOST * (np.arange(9) == 4)) / (1 + p_V[4] * np.expm1(BOOST))
    assert tilted_V.sum() == pytest.approx(1)


def test_rows_are_those_of_the_scorer(opened):
    rows = {row.what: row.val_bpb for row in measure_parts(opened)}
    alone = score_stream(opened.model(), opened.tokens_N1, OneByte(), SETTINGS, quiet(), announce=False)
    assert rows["network alone"] == alone.val_bpb and len(rows) == 5
    assert rows["network alone + counts"] < 0.8 * alone.val_bpb
    assert rows["adapters of each document"] < alone.val_bpb
    assert rows["adapters of each document + counts"] < 0.8 * alone.val_bpb


def test_the_last_correction_has_rows_of_its_own(opened):
    corrected = replace(opened, score=replace(opened.score, mixture_successors=5))
    plain, rows = ({row.what: row.val_bpb for row in measure_parts(what)} for what in (opened, corrected))
    assert len(rows) == 7
    assert rows["network alone"] == plain["network alone"]
    assert rows["network alone + corrected counts"] != rows["network alone + counts"] == plain["network alone + counts"]


def test_the_tilt_by_hand(opened):
    nats = NetworkNats(len(opened.tokens_N1) - 1, None)
    network = score_network(opened, False, nats)
    row, hints_N = tilt_row(opened, network, nats), token_hints(opened.tokens_N1)
    assert (hints_N >= 0).sum() > 50
    assert row.val_bpb < network.val_bpb
    right = (hints_N == opened.tokens_N1[1:])[hints_N >= 0]
    p_N = np.exp(-nats.nats_N)[hints_N >= 0][right]
    gain = (BOOST - np.log1p(p_N * np.expm1(BOOST))).sum()
    wrong = (hints_N >= 0).sum() - right.sum()
    lost = (network.nats - row.val_bpb * np.log(2) * network.bytes) - gain
    assert -wrong * np.log1p(np.expm1(BOOST)) - 1e-6 <= lost <= 1e-6
