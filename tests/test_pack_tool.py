"""tools/pack_artifact.py from end to end: what it writes, what it counts, and how it says no."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from golf.artifact.container import read_artifact, same_stored_state
from golf.artifact.description import expected_shapes
from golf.artifact.weights import load_weights, save_weights
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.init import build_model
from golf.quant.export import prune_state, quantize_state

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    bigram_vocab_size=64,
    bigram_dim=16,
    train_seq_len=64,
)
QUANT = QuantConfig(embed_bits=6, prune_frac=0.1)
TOKENIZER = "ab" * 32


@pytest.fixture
def run_pack(run_command_here) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run_command_here, "tools/pack_artifact.py")


@pytest.fixture
def weights(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(MODEL).items()}
    save_weights(tmp_path / "weights.safetensors", state, MODEL, QUANT, TOKENIZER)
    return tmp_path / "weights.safetensors"


def stored_by_library(weights: Path, quant: QuantConfig):

    return quantize_state(prune_state(load_weights(weights).state, quant)[0], quant)


def test_packs_counts_and_refuses_what_is_over(run_pack, weights, tmp_path):
    out, code = tmp_path / "model.golf", tmp_path / "code.py"
    code.write_text("x = 1\n")
    done = run_pack("--weights", weights, "--out", out, "--code", code, "--json", "--prune", "0.2", "--codec", "zstd")
    assert (done.returncode, done.stderr) == (0, "")
    result, data = json.loads(done.stdout), out.read_bytes()
    assert result["bytes_model"] == len(data) and result["bytes_code"] == 6
    assert result["bytes_total"] == len(data) + 6 and result["fits"]
    artifact = read_artifact(data)
    assert artifact.codec == "zstd" and artifact.model == MODEL and artifact.tokenizer_sha256 == TOKENIZER
    assert same_stored_state(artifact.state, stored_by_library(weights, replace(QUANT, prune_frac=0.2)))

    out.write_bytes(b"the old one")
    over = run_pack("--weights", weights, "--out", out, "--limit-bytes", "1000")
    assert over.returncode == 1 and over.stderr.count("\n") == 1 and "over the limit by" in over.stderr
    assert "bits/value" in over.stdout and "no --code" in over.stdout
    assert out.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.py", "model.golf", "weights.safetensors"]


def test_the_limit_itself_is_allowed(weights, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from pack_artifact import Options, pack

    options = Options(weights, tmp_path / "model.golf")
    size = pack(options).bytes_total
    assert pack(replace(options, limit_bytes=size)).fits
    assert not pack(replace(options, limit_bytes=size - 1)).fits
    with pytest.raises(UserError, match="prune_frac"):
        pack(replace(options, prune=1.0))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read weights from .*bad"):
        pack(replace(options, weights=tmp_path / "bad"))
    with pytest.raises(UserError, match="no folder"):
        pack(replace(options, out=tmp_path / "absent" / "model.golf"))


@pytest.fixture
def trained(tmp_path) -> Path:
    """Weights that give finite losses on any text."""
    model = build_model(MODEL, seed=2)
    save_weights(tmp_path / "trained.safetensors", model.state_dict(), MODEL, QUANT, TOKENIZER)
    return tmp_path / "trained.safetensors"


def test_fit_fills_the_limit_and_says_how(run_pack, trained, tmp_path):
    out = tmp_path / "model.golf"
    options = ["--fit", "--calibration-tokens", "4096", "--threads", "1", "--json"]
    done = run_pack("--weights", trained, "--out", out, "--limit-bytes", "9000", "--reserve-bytes", "500", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 8000 <= result["bytes_model"] == out.stat().st_size <= 8500
    assert (
        result["fit"]["calibration"] == "text of the model's own" and "water level" in result["fit"]["fit_actions"][0]
    )
    assert "calibrated on 4,096 tokens" in done.stderr and read_artifact(out).codec == "rans"


BAD_FITS = {
    ("--fit", "--limit-bytes", "100", "--reserve-bytes", "200"): "the limit leaves -100 bytes",
    ("--fit", "--prune", "0.1"): "--prune has no place in --fit",
    ("--fit", "--target-bpb", "1.2"): "--target-bpb is measured: give --val and --tokenizer too",
    ("--fit", "--calibration", "/nowhere/*_train_*.bin"): "/nowhere/",
    ("--fit", "--calibration-tokens", "3"): "calibration",
    ("--target-bpb", "1.2"): "go with --fit",
}


SEARCH = pytest.param(("--fit", "--limit-bytes", "700"), "can't fit in 700 bytes", marks=pytest.mark.slow)


@pytest.mark.parametrize(("arguments", "message"), [SEARCH, *BAD_FITS.items()])
def test_a_fit_that_can_not_be_is_one_line_and_touches_nothing(run_pack, trained, tmp_path, arguments, message):
    out = tmp_path / "model.golf"
    out.write_bytes(b"the old one")
    done = run_pack(
        "--weights",
        trained,
        "--out",
        out,
        "--threads",
        "1",
        "--calibration-tokens",
        "512",
        "--codec",
        "zlib",
        *arguments,
    )
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and out.read_bytes() == b"the old one"
