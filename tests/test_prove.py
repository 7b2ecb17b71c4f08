"""The proof by decompression: honest scores pass, scorers that cheat fail, and records take the verdict along."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mixture_fixtures import repetitive_stream
from test_mixture_probes import (
    CountsTheTarget,
    GateReadsTheTarget,
    LearnsBeforeItScores,
    Unnormalised,
)

import golf.score.mixture
from golf.config.config import Config, with_knobs
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.score.scorer import sliding_settings
from lab.compress.proof import CodedBeginning, count_targets, decode_beginning, encode_beginning, judge, scorer_nats
from lab.record.finding import EvidenceError
from lab.record.run_check import read_result
from tests.evidence_fixtures import run_result, write_json

CONFIG = with_knobs(
    Config(),
    dict(vocab_size=12, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=0, bigram_dim=0)
    | dict(train_seq_len=8, tied_embed_init_std=0.5, eval_seq_len=16, eval_stride=4, mixture=True, mixture_orders=3),
)
STREAM, IDENTITY = repetitive_stream(), {"artifact_sha256": "a" * 64, "val_data_id": "b" * 16}
SETTINGS = sliding_settings(CONFIG.score, CONFIG.model)


class OneByte:
    def to(self, device):
        return self

    def count(self, previous_N, targets_N):
        return (targets_N > 0).int()


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG.model, seed=0).eval()


def proof_of(model, targets: int = 150, score=CONFIG.score, spoil=lambda data: data, allowed: bool = True):
    """Proves the beginning of the stream in one process; its text is its tokens."""
    coded = encode_beginning(model, STREAM, SETTINGS, score, targets)
    coded = dataclasses.replace(coded, data=spoil(coded.data))
    nats_T = scorer_nats(model, STREAM, OneByte(), SETTINGS, score, targets)
    text = STREAM[: targets + 1].astype(np.int64).tobytes()
    return judge(coded, nats_T, text, lambda: decode_beginning(model, coded, SETTINGS, score).tobytes(), IDENTITY)


@pytest.mark.parametrize("knobs", [{"mixture": True}, {"mixture": False}, {"mixture_parts": 3}])
@pytest.mark.parametrize("targets", [3, 90, 91, 150, len(STREAM) - 1])
def test_an_honest_score_is_proven(model, knobs, targets):
    proof = proof_of(model, targets, dataclasses.replace(CONFIG.score, **knobs))
    assert proof.verdict == "PASS" and abs(proof.file_bits - proof.scorer_bits) < 26, proof.detail


LONG = np.concatenate([repetitive_stream(seed) for seed in range(6)])


@pytest.mark.parametrize("planted", [CountsTheTarget, GateReadsTheTarget, LearnsBeforeItScores, Unnormalised])
def test_a_scorer_that_cheats_is_not(model, planted, monkeypatch):
    """Its nats are not the bits of a file that a decoder can read. On this short text 26 bits are allowed, not 64."""

    class Whole(planted):
        def score_document(self, tokens, network_N):
            self.open_document(len(network_N))
            parts = [self.score_targets(tokens, n, network_N[n : n + 1]) for n in range(len(network_N))]
            return np.concatenate(parts)

    monkeypatch.setattr("lab.compress.proof.BIT_GAP", 26)
    monkeypatch.setattr("test_prove.STREAM", LONG)
    assert proof_of(model, len(LONG) - 1).verdict == "PASS"
    monkeypatch.setattr(golf.score.mixture, "CountMixture", Whole)
    proof = proof_of(model, len(LONG) - 1)
    assert proof.verdict == "FAIL", proof.detail


def test_a_rescoring_pass_is_not_proven(model, monkeypatch):
    scored = scorer_nats(model, STREAM, OneByte(), SETTINGS, CONFIG.score, 150)
    monkeypatch.setattr("test_prove.scorer_nats", lambda *arguments: 0.8 * scored)
    proof = proof_of(model)
    assert proof.verdict == "FAIL" and "the score is not that of its probabilities" in proof.detail


def test_a_network_that_rewards_its_target_is_not_proven(model, monkeypatch):
    network = dataclasses.replace(CONFIG.score, mixture=False)
    assert proof_of(model, score=network).verdict == "PASS"
    honest = GPT.token_losses
    monkeypatch.setattr(GPT, "token_losses", lambda self, *arguments: 0.9 * honest(self, *arguments))
    proof = proof_of(model, score=network)
    assert proof.verdict == "FAIL" and proof.file_bits > proof.scorer_bits


def test_a_changed_file_is_not_proven(model):
    proof = proof_of(model, spoil=lambda data: data[:20] + bytes([data[20] ^ 255]) + data[21:])
    assert proof.verdict == "FAIL" and "block" in proof.detail


def test_the_coded_beginning_is_a_file(model, tmp_path):
    coded = encode_beginning(model, STREAM, SETTINGS, CONFIG.score, 20)
    coded.write(tmp_path / "coded.json")
    assert CodedBeginning.read(tmp_path / "coded.json") == coded


def test_targets_are_counted_by_their_bytes():
    bytes_N = np.array([0, 2, 3, 0, 4])
    assert [count_targets(bytes_N, wanted) for wanted in (1, 2, 3, 5, 6, 9, 99, 0)] == [2, 2, 3, 3, 5, 5, 5, 5]


# ---- records ----


def test_a_result_takes_the_verdict_beside_it_along(tmp_path):
    write_json(tmp_path / "result.json", run_result("x", 1, "h", b"code", b"artifact"))
    result = read_result(tmp_path / "result.json")
    own = {key: result[key] for key in ("artifact_sha256", "val_data_id")}
    assert "proof by decompression" not in result["probes"]
    write_json(tmp_path / "proof.json", own | {"verdict": "PASS", "detail": "9 bits"})
    probes = read_result(tmp_path / "result.json")["probes"]
    assert probes["proof by decompression"] == {"verdict": "PASS", "detail": "9 bits"}
    write_json(tmp_path / "proof.json", own | {"verdict": "PASS", "artifact_sha256": "c" * 64})
    probe = read_result(tmp_path / "result.json")["probes"]["proof by decompression"]
    assert probe["verdict"] == "FAIL" and "another artifact" in probe["detail"]
    (tmp_path / "proof.json").write_text("[")
    with pytest.raises(EvidenceError, match="proof.json can't be read as JSON"):
        read_result(tmp_path / "result.json")


# ---- the command ----


@pytest.mark.slow
def test_the_command_proves_a_run_whose_text_is_closed_to_the_decoder(tmp_path, repository):
    knobs = [
        "--preset",
        "local",
        "vocab_size=400",
        "num_layers=2",
        "model_dim=32",
        "num_heads=2",
        "num_kv_heads=2",
        "bigram_vocab_size=0",
        "bigram_dim=0",
        "train_seq_len=32",
        "eval_seq_len=48",
        "eval_stride=16",
        "iterations=6",
        "max_wallclock_seconds=0",
        "run_id=x",
        "train_batch_tokens=256",
        "micro_batch_tokens=256",
        "threads=1",
        "compile=off",
        "quantizer=rtn",
        "codec=zstd",
    ]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted(Path(repository / "lab").rglob("*.py"))[:40]))
    run, tool = tmp_path / "runs" / "x", repository / "tools" / "prove.py"
    train = [sys.executable, repository / "train_gpt.py", *knobs, "--corpus", text, f"runs_root={tmp_path / 'runs'}"]
    subprocess.run(list(map(str, train)), capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert (run / "score.json").exists()

    def prove(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, tool, run, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=900)

    done = prove("--bytes", 3000)
    assert done.returncode == 0 and done.stdout.startswith("PASS: proof by decompression: "), done.stderr + done.stdout
    proof = json.loads((run / "proof.json").read_text())
    assert proof["verdict"] == "PASS" and 3000 <= proof["bytes"] < 3200
    assert prove("--decode", tmp_path / "nowhere").returncode == 2
