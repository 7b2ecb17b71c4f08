"""Compression with a model: any text and any bytes come back exactly, or one line says why not."""

import dataclasses
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_model import with_tokenizer

from golf.config.scoring import ScoreConfig
from golf.score.mixture import mixed_nats
from golf.score.scorer import ScoreSettings, evaluation_mode, prepare_job, score_windows
from lab.compress import container
from lab.compress.container import compress_bytes, cut_text, decompress_bytes, read_header
from lab.compress.predictor import StreamPredictor
from lab.compress.stream_code import CompressionError
from lab.generate.text_model import TextModel, open_text_model
from tests.sampled_run_fixtures import make_sampled_run
from tests.tokenizer_fixtures import SAMPLE, TRICKY, small_tokenizers

WINDOWS, SHA = ScoreSettings(16, 8, 1, None), "a" * 64


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_sampled_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(run) -> TextModel:
    return open_text_model(run)


def mixing(orders: int, successors: int = 0) -> ScoreConfig:
    return ScoreConfig(mixture=orders > 0, mixture_orders=orders or 1, mixture_successors=successors)


def there_and_back(model: TextModel, data: bytes, orders: int = 3, streams: int = 0, successors: int = 0) -> bytes:
    file = compress_bytes(model, SHA, data, WINDOWS, mixing(orders, successors), streams)
    assert decompress_bytes(model, SHA, file, "x.golfz") == data
    return file


@pytest.mark.parametrize(("orders", "successors"), [(0, 0), (3, 0), (3, 20)])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_text_comes_back(model, orders, successors, streams):
    there_and_back(model, "".join(SAMPLE[:12]).encode(), orders, streams, successors)


ODD = [b"", b"a", b"\xff\xfe\x00", b"\r\n\r\n", "naïve 🐍\u2581 ".encode(), bytes(range(256))]


@pytest.mark.parametrize("data", ODD)
def test_odd_bytes_come_back(model, data):
    there_and_back(model, data)


@pytest.mark.parametrize("kind", ["bytes", "chars", "competition", "prefix", "caseops"])
def test_any_text_comes_back_with_every_kind_of_tokenizer(model, kind):
    other = with_tokenizer(model, small_tokenizers()[kind])

    @given(TRICKY)
    @settings(deadline=None, max_examples=8)
    def check(text):
        there_and_back(other, text.encode(errors="replace"), streams=2)

    check()


@given(st.text(alphabet="ab\n", max_size=80), st.integers(1, 9))
def test_pieces_tile_the_text(text, streams):
    assert "".join(cut_text(text, streams)) == text and len(cut_text(text, streams)) == streams


def test_counts_of_all_streams_are_shared(model):
    """Text that comes again in another stream costs less than with counts of its own."""
    text = "".join(SAMPLE[:8])
    apart = len(there_and_back(model, text.encode(), streams=1)) + len(there_and_back(model, text.encode(), streams=1))
    assert len(there_and_back(model, 2 * text.encode(), streams=2)) < 0.9 * apart
    assert len(there_and_back(model, text.encode(), 3)) < len(there_and_back(model, text.encode(), 0))


def test_a_stream_s_distributions_are_those_of_the_scorer(model):
    """Of every token in a stream of several documents, by windows through a cache and by whole distributions."""
    bos = model.tokenizer.bos_id
    tokens_N1 = np.array([t for text in SAMPLE[:6] for t in (bos, *model.tokenizer.encode(text))], np.int32)
    network_N = np.zeros(len(tokens_N1) - 1)
    job = prepare_job(model.model, tokens_N1, model.byte_table, WINDOWS, model.runtime.device)
    with evaluation_mode(model.model):
        score_windows(job, 0, len(job.plan), recorder=lambda i, nats: network_N.__setitem__(i.numpy(), nats.numpy()))
    for mixture, parts in ((False, 1), (True, 1), (True, 3)):
        score = ScoreConfig(mixture=mixture, mixture_orders=3, mixture_parts=parts)
        expected_N = network_N
        if mixture:
            expected_N, _ = mixed_nats(tokens_N1, network_N, model.model.config, score, model.runtime)
        predictor = StreamPredictor(model.model, WINDOWS, score, [len(network_N)])
        for target, token in enumerate(tokens_N1[1:].tolist()):
            predictor.predict()
            distribution_V = predictor.distribution(0)
            assert distribution_V.sum() == pytest.approx(1, abs=1e-12)
            assert -np.log(distribution_V[token]) == pytest.approx(expected_N[target], abs=1e-4), (target, parts)
            predictor.learn(0, token)
            predictor.advance()


# ---- files that are not what they should be ----


@pytest.fixture(scope="module")
def file(model) -> bytes:
    return compress_bytes(model, SHA, "".join(SAMPLE).encode() + b"\n", WINDOWS, mixing(3, 5), 2)


def test_damage_is_one_clear_error(model, file):
    for data, words in (
        (b"", "no .golfz file"),
        (b"hello" * 20, "no .golfz file"),
        (file[:-7], "damaged or cut off"),
        (file[:40] + bytes([file[40] ^ 1]) + file[41:], "damaged or cut off"),
        (file[:5] + b"\x07" + file[6:], "version 7"),
    ):
        with pytest.raises(CompressionError, match=words):
            decompress_bytes(model, SHA, data, "x.golfz")


def test_a_file_of_the_first_version_is_read(model):
    text = "".join(SAMPLE[:4]).encode()
    file = compress_bytes(model, SHA, text, WINDOWS, mixing(3))
    magic, _, length = container.HEAD.unpack_from(file)
    end = container.HEAD.size + length
    header = json.loads(zlib.decompress(file[container.HEAD.size : end]))
    del header["successors"]
    packed = zlib.compress(json.dumps(header).encode())
    body = container.HEAD.pack(magic, 1, len(packed)) + packed + file[end:-4]
    first = body + zlib.crc32(body).to_bytes(4, "little")
    assert decompress_bytes(model, SHA, first, "x.golfz") == text


def test_another_artifact_or_tokenizer_is_named(model, file):
    with pytest.raises(CompressionError, match="x.golfz: made with the artifact aaaaaaaaaaaa..., not bbbbbbbbbbbb..."):
        decompress_bytes(model, "b" * 64, file, "x.golfz")
    other = with_tokenizer(model, small_tokenizers()["chars"])
    with pytest.raises(CompressionError, match="made with the tokenizer"):
        decompress_bytes(other, SHA, file, "x.golfz")


def test_arithmetic_that_gives_other_bits_is_found_at_its_block(model, file, monkeypatch):
    """The last bits of one weight: text that would have come out wrong is not written."""
    weight = model.model.blocks[0].mlp.proj.weight if hasattr(model.model.blocks[0].mlp, "proj") else None
    weight = next(model.model.blocks.parameters()) if weight is None else weight
    weight.data += 1e-3
    try:
        with pytest.raises(CompressionError, match=r"block \d+ of \d+ (comes out wrong|can't be read)|damaged: block"):
            decompress_bytes(model, SHA, file, "x.golfz")
    finally:
        weight.data -= 1e-3


def test_headers_are_bounded(model, file, monkeypatch):
    header, _ = read_header(file, "x.golfz")
    for change in (
        {"window": 10**12}, {"orders": 17}, {"successors": 1 << 20}, {"stride": 0}, {"raw_bytes": -1}, {"more": 1},
        {"artifact": 5}, {"rope_base": "x"}, {"pieces": [{"tokens": "x", "bytes": 1}]},
        {"pieces": [{"tokens": 1, "bytes": 1}] * 300},
    ):  # fmt: skip
        content = dataclasses.asdict(header) | change
        with pytest.raises((ValueError, TypeError, KeyError)):
            container.check_header(content)


# ---- the command ----


@pytest.mark.slow
def test_the_command_gives_the_file_back_and_replaces_none(run, tmp_path, repository):
    text = tmp_path / "text.txt"
    text.write_text("".join(SAMPLE))

    def compress(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, repository / "tools/compress.py", "--artifact", run, "--threads", "1", *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)

    done = compress(text, "--out", tmp_path / "a.golfz", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["golfz_bytes"] == (tmp_path / "a.golfz").stat().st_size < figures["text_bytes"] / 2
    assert compress(tmp_path / "a.golfz", "--decompress", "--out", tmp_path / "b.txt").returncode == 0
    assert (tmp_path / "b.txt").read_bytes() == text.read_bytes()
    refused = compress(text, "--out", tmp_path / "b.txt")
    assert refused.returncode == 2 and refused.stderr.strip() == f"compress: {tmp_path}/b.txt exists: name another file"
    (tmp_path / "cut.golfz").write_bytes((tmp_path / "a.golfz").read_bytes()[:-1])
    cut = compress(tmp_path / "cut.golfz", "--decompress", "--out", tmp_path / "c.txt")
    assert cut.returncode == 2 and "damaged or cut off" in cut.stderr and not (tmp_path / "c.txt").exists()
