"""Scoring in parts: chunks, their journal, and the stride that fits the time; the score is the same bit for bit."""

import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golf.score.roundtrip
from golf.config.config import Config, with_knobs
from golf.data.loader import TokenStream
from golf.data.shards import DataError, write_shard
from golf.model.init import build_model
from golf.runtime import Log, Runtime
from golf.score.deadline import choose_stride, forecast_seconds
from golf.score.journal import ScoreJournal, ScoreSums
from golf.score.roundtrip import score_artifact
from golf.score.scorer import (
    CHUNKS,
    ScoreJob,
    ScoreSettings,
    batch_shapes,
    chunk_ranges,
    score_stream,
)
from golf.score.windows import plan_windows, rank_share

BOS = 1
SMALL = with_knobs(
    Config(),
    dict(vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=32, bigram_dim=8)
    | dict(train_seq_len=8, tied_embed_init_std=0.5),
).model
SETTINGS = ScoreSettings(seq_len=12, stride=4, batch_seqs=3)
IDENTITY = {"artifact": "a" * 64, "stride": 4, "asked": {"rope_base": None, "seq_len": 12}}


class TwoBytes:
    """Every token but a document start spells two bytes."""

    def to(self, device):
        return self

    def count(self, previous_N, targets_N):
        return 2 * (targets_N != BOS)


TABLE = TwoBytes()


def quiet() -> tuple[Runtime, io.StringIO]:
    lines = io.StringIO()
    return Runtime(torch.device("cpu"), log=Log(lines)), lines


def stream(targets: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(2, 64, targets + 1).astype(np.uint16)
    tokens[0] = BOS
    return tokens


def score(tokens: np.ndarray, settings: ScoreSettings, journal: ScoreJournal | None = None, check=lambda: None):
    model = build_model(SMALL, 0)
    return score_stream(model, tokens, TABLE, settings, quiet()[0], announce=False, journal=journal, check=check)


# ---- chunks ----


def bare_job(windows: int, length: int, stride: int, rows: int) -> ScoreJob:
    plan = plan_windows(length + stride * (windows - 1), length, stride)
    settings = ScoreSettings(length, stride, rows)
    return ScoreJob(None, None, settings, plan, 0, torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1))


@given(
    st.integers(1, 2000), st.integers(1, 40), st.sampled_from([(8, 8), (8, 3), (8, 1)]), st.integers(1, 5), st.data()
)
def test_chunks_tile_the_share_of_every_rank_and_cut_only_between_batches(windows, rows, shape, world_size, data):
    job = bare_job(windows, *shape, rows)
    rank = data.draw(st.integers(0, world_size - 1))
    begin, end = rank_share(windows, rank, world_size)
    chunks = list(chunk_ranges(job, begin, end))
    assert [number for chunk in chunks for number in range(*chunk)] == list(range(begin, end))
    assert all(first < last for first, last in chunks) and len(chunks) <= CHUNKS + 1
    whole = list(batch_shapes(job, begin, end))
    assert [batch for chunk in chunks for batch in batch_shapes(job, *chunk)] == whole
    batches = len(whole)
    assert len(chunks) >= min(batches - 1, CHUNKS // 2), "a kill costs a hundredth of the scoring or so"


def test_sums_of_ranges_add_up():
    parts = [ScoreSums(1.5, 2, 3), ScoreSums(0.25, 4, 5)]
    assert sum(parts, ScoreSums()) == ScoreSums(1.75, 6, 8)


# ---- the journal ----


def test_a_score_with_a_journal_is_the_score_without_bit_for_bit(tmp_path):
    tokens = stream(499)
    journal = ScoreJournal(tmp_path / "score.jsonl")
    journal.start(IDENTITY)
    with_journal, without = score(tokens, SETTINGS, journal), score(tokens, SETTINGS)
    assert with_journal.nats == without.nats and with_journal.nats > 0
    assert replace(with_journal, seconds=0) == replace(without, seconds=0)
    assert journal.sums == ScoreSums(without.nats, 499, without.bytes)
    assert len(journal.chunks) == len(list(chunk_ranges(bare_job(123, 12, 4, 3), 0, 123))) > 20


def test_a_scoring_goes_on_from_every_chunk_that_it_was_killed_after(tmp_path):
    """Also in the midst of a line; chunks that are in the journal are not scored again."""
    tokens, path = stream(120), tmp_path / "score.jsonl"
    journal = ScoreJournal(path)
    journal.start(IDENTITY)
    whole = score(tokens, SETTINGS, journal)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) > 8
    for kept, torn in itertools.product(range(1, len(lines) + 1), ("", '{"begin": 9, "en')):
        path.write_text("".join(lines[:kept]) + torn)
        journal, checks = ScoreJournal(path), []
        journal.start(IDENTITY)
        earlier = journal.seconds
        again = score(tokens, SETTINGS, journal, check=lambda checks=checks: checks.append(1))
        assert again.nats == whole.nats and again.bytes == whole.bytes and again.seconds > earlier
        assert len(checks) == len(lines) - kept
        after = [json.loads(line) for line in path.read_text().splitlines()]
        assert [{**row, "seconds": 0} for row in after[1:]] == [
            {**json.loads(line), "seconds": 0} for line in lines[1:]
        ]


def test_what_stands_in_the_journal_counts_as_it_stands(tmp_path):
    """No chunk is scored twice: a changed sum would be seen in the score."""
    tokens, path = stream(120), tmp_path / "score.jsonl"
    journal = ScoreJournal(path)
    journal.start(IDENTITY)
    whole = score(tokens, SETTINGS, journal)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["nats"] += 1000.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = ScoreJournal(path)
    journal.start(IDENTITY)
    assert score(tokens, SETTINGS, journal).nats == pytest.approx(whole.nats + 1000)


@pytest.mark.parametrize("change", [{"artifact": "b" * 64}, {"stride": 8}, {"asked": {"rope_base": 5.0}}])
def test_a_journal_about_something_else_is_begun_anew(tmp_path, change):
    path = tmp_path / "score.jsonl"
    for identity in (IDENTITY, IDENTITY | change):
        journal = ScoreJournal(path)
        journal.start(identity)
        assert journal.chunks == [] and journal.sums == ScoreSums()
        journal.add(0, 4, ScoreSums(1.5, 8, 16), 0.25)
    journal = ScoreJournal(path)
    assert journal.identity == IDENTITY | change and journal.seconds == 0.25
    assert journal.sums_of(0, 4) == ScoreSums(1.5, 8, 16) and journal.sums_of(0, 5) is None
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["", '{"artifact": "aa'])
def test_a_journal_that_was_hardly_begun_is_empty(tmp_path, text):
    path = tmp_path / "score.jsonl"
    path.write_text(text)
    journal = ScoreJournal(path)
    assert journal.identity is None and journal.chunks == []
    journal.start(IDENTITY)
    assert ScoreJournal(path).identity == IDENTITY


def test_a_stop_comes_after_a_chunk_is_in_the_journal(tmp_path):
    def stop() -> None:
        raise InterruptedError

    journal = ScoreJournal(tmp_path / "score.jsonl")
    journal.start(IDENTITY)
    with pytest.raises(InterruptedError):
        score(stream(120), SETTINGS, journal, stop)
    assert len(ScoreJournal(tmp_path / "score.jsonl").chunks) == 1


# ---- the stride that fits ----


class SlowModel:
    """Seconds pass only in the forward: so many for a window."""

    def __init__(self, monkeypatch, seconds: float):
        self.model, self.seconds, self.now, self.scored = build_model(SMALL, 0), seconds, 0.0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def forward(self, ids_BT, targets_BS, rope_base):
        self.now += self.seconds * len(ids_BT)
        return self.model.token_losses(ids_BT, targets_BS, rope_base)

    def choose(self, tokens: np.ndarray, settings: ScoreSettings, max_seconds: float) -> tuple[ScoreSettings, str]:
        runtime, lines = quiet()
        return choose_stride(self.model, tokens, TABLE, settings, runtime, self.forward, max_seconds), lines.getvalue()


def windows(targets: int, stride: int) -> int:
    return len(plan_windows(targets, 16, stride))


SLIDING = ScoreSettings(seq_len=16, stride=2, batch_seqs=4)
TARGETS = 416
TIMING = 16
"""Windows that are scored for one forecast: a warm-up batch and three timed ones of four windows."""


def test_a_forecast_is_the_time_that_scoring_takes(monkeypatch):
    slow = SlowModel(monkeypatch, 1.0)
    seconds = forecast_seconds(slow.model, stream(TARGETS), TABLE, SLIDING, quiet()[0], slow.forward)
    assert seconds == windows(TARGETS, 2) and slow.now == TIMING


def test_a_stride_that_fits_is_left_alone(monkeypatch):
    fits = 1.05 * windows(TARGETS, 2) + TIMING
    settings, lines = SlowModel(monkeypatch, 1.0).choose(stream(TARGETS), SLIDING, fits + 0.01)
    assert settings == SLIDING and lines == ""
    settings, lines = SlowModel(monkeypatch, 1.0).choose(stream(TARGETS), SLIDING, fits - 0.01)
    assert settings == replace(SLIDING, stride=4)
    assert lines == "score:stride 2 -> 4: 211 s forecast, 211 s left\n"


@pytest.mark.parametrize(
    ("budget", "stride"), [(227.0, 4), (138.06, 4), (138.04, 8), (101.56, 8), (101.54, 16), (16.5, 16), (0.1, 16)]
)
def test_the_stride_is_doubled_until_it_fits_and_never_beyond_the_window(monkeypatch, budget, stride):
    """At stride 4, 101 windows and two forecasts take 1.05 x 101 + 2 x 16 s; at stride 8, 1.05 x 51 + 3 x 16 s."""
    settings, lines = SlowModel(monkeypatch, 1.0).choose(stream(TARGETS), SLIDING, budget)
    assert settings == replace(SLIDING, stride=stride)
    assert lines.count("score:stride") == {4: 1, 8: 2, 16: 3}[stride]


def test_a_stride_that_does_not_double_to_the_window_ends_at_it(monkeypatch):
    settings, _ = SlowModel(monkeypatch, 1.0).choose(stream(TARGETS), replace(SLIDING, stride=5), 1.0)
    assert settings.stride == 16


def test_no_limit_takes_no_time_to_find_out(monkeypatch):
    slow = SlowModel(monkeypatch, 1e9)
    assert slow.choose(stream(TARGETS), SLIDING, 0.0) == (SLIDING, "") and slow.now == 0


def test_all_ranks_choose_the_stride_of_the_slowest(monkeypatch):
    """What is measured is agreed on before it is compared."""
    slow, agreed = SlowModel(monkeypatch, 1.0), []

    class Slowest(Runtime):
        def max_over_ranks(self, *values):
            agreed.append(values)
            return [10 * value for value in values]

    runtime = Slowest(torch.device("cpu"), rank=1, world_size=2, log=Log(io.StringIO()))
    settings = choose_stride(slow.model, stream(TARGETS), TABLE, SLIDING, runtime, slow.forward, 1000.0)
    assert settings.stride == 4 and len(agreed) == 4


# ---- the artifact's score: stride and journal together ----


@pytest.fixture
def artifact(monkeypatch):
    """Stands for a packed model and its data: what is read from files elsewhere comes from here."""

    class Packed:
        model, sha256, tokenizer_sha256 = SMALL, "c" * 64, "d" * 64

    monkeypatch.setattr(golf.score.roundtrip, "load_artifact_tokenizer", lambda tokenizer_sha256, path: TABLE)
    monkeypatch.setattr(golf.score.roundtrip, "restore_model", lambda artifact, runtime: build_model(SMALL, 0).eval())
    monkeypatch.setattr(golf.score.roundtrip, "validation_tokens", lambda paths: stream(TARGETS))
    return Packed()


EVALUATION = with_knobs(Config(), dict(eval_seq_len=16, eval_stride=2, eval_batch_seqs=4, max_eval_seconds=600.0)).score


def journal_with(path: Path, artifact, score=EVALUATION) -> float:
    """Nats of a whole scoring, journaled or taken up."""
    measured, _ = score_artifact(artifact, "", [], score, quiet()[0], journal=ScoreJournal(path))
    return measured.nats


def test_the_stride_is_chosen_before_any_score_is_kept(monkeypatch, artifact, tmp_path):
    order = []
    choose, add = golf.score.roundtrip.choose_stride, ScoreJournal.add
    monkeypatch.setattr(
        golf.score.roundtrip, "choose_stride",
        lambda *arguments: order.append("chosen") or replace(choose(*arguments), stride=8),
    )  # fmt: skip
    monkeypatch.setattr(ScoreJournal, "add", lambda *arguments: order.append("kept") or add(*arguments))
    measured, _ = score_artifact(
        artifact, "", [], EVALUATION, quiet()[0], journal=ScoreJournal(tmp_path / "score.jsonl")
    )
    assert measured.stride == 8 and order[0] == "chosen" and order.count("chosen") == 1 and order.count("kept") > 5


def test_a_resumed_scoring_keeps_its_stride_and_is_not_timed_again(monkeypatch, artifact, tmp_path):
    path = tmp_path / "score.jsonl"
    monkeypatch.setattr(golf.score.roundtrip, "choose_stride", lambda *arguments: replace(arguments[3], stride=8))
    nats = journal_with(path, artifact)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    monkeypatch.setattr(golf.score.roundtrip, "choose_stride", lambda *arguments: pytest.fail("timed again"))
    assert journal_with(path, artifact) == nats


@pytest.mark.parametrize("other", [2, 16])
def test_ranks_whose_journals_have_different_strides_begin_anew(monkeypatch, artifact, tmp_path, other):
    """A kill between the first lines of two ranks' journals; in windows of two kinds no target count would be right."""
    path = tmp_path / "score.jsonl"
    chosen = []
    monkeypatch.setattr(
        golf.score.roundtrip, "choose_stride", lambda *arguments: chosen.append(1) or replace(arguments[3], stride=8)
    )
    journal_with(path, artifact)

    class Pair(Runtime):
        def max_over_ranks(self, *values):
            theirs = (other, -other) if values == (8, -8) else values
            return [max(pair) for pair in zip(values, theirs, strict=True)]

    pair = Pair(torch.device("cpu"), log=Log(io.StringIO()))
    score_artifact(artifact, "", [], EVALUATION, pair, journal=ScoreJournal(path))
    assert len(chosen) == 2


# ---- training text that is held out, to look at a training ----


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 200), st.integers(1, 90)
)
def test_held_out_tokens_are_the_end_of_the_stream_and_no_part_of_it(tmp_path_factory, lengths, held_out, start, count):
    folder, total = tmp_path_factory.mktemp("stream"), sum(lengths)
    edges = np.cumsum([0, *lengths])
    every = np.arange(100, 100 + total)
    every[-2:] = [BOS, 7][-total:]
    for index, (first, last) in enumerate(itertools.pairwise(edges)):
        write_shard(folder / f"a_train_{index:06d}.bin", every[first:last])
    paths = sorted(folder.iterdir())
    if 10 * held_out > total:
        with pytest.raises(DataError, match="too few to hold"):
            TokenStream(paths, held_out)
        return
    tokens = TokenStream(paths, held_out)
    kept = every[: total - held_out]
    assert len(tokens) == len(kept)
    assert np.array_equal(tokens.tokens(start, count), np.resize(np.roll(kept, -start % -len(kept)), count))
    if held_out >= 2:
        assert tokens.held_out_tokens(BOS).tolist() == [BOS, 7]


@pytest.mark.parametrize("tail", [[5, 5, 5, 5], [5, 5, 5, BOS]])
def test_held_out_tokens_without_a_document_to_score_are_refused(tmp_path, tail):
    write_shard(tmp_path / "a_train_000000.bin", [BOS] + [5] * 60 + tail)
    with pytest.raises(DataError, match="no document starts in the last 4 training tokens: set holdout_every=0"):
        TokenStream([tmp_path / "a_train_000000.bin"], 4).held_out_tokens(BOS)
