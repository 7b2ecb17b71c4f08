"""Weights of the competition's other scripts: read by names and shapes, packed, scored, or refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trained_run_fixtures import KNOBS, make_trained_run

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import read_artifact
from golf.artifact.weights import load_weights
from golf.config.config import Config, with_knobs
from golf.config.knobs import ConfigError, UserError
from golf.model.init import build_model
from lab.rates.foreign_weights import open_weights

BASELINE = KNOBS | dict(
    bigram_vocab_size=0, bigram_dim=0, smear_gate=False, resid_mix_init="stream", matrix_init="uniform",
    tie_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def tokenizer(run) -> Path:
    return run.parent / "data/tokenizer.json"


def as_other_script(state: dict, path: Path) -> Path:
    """Writes a state as those scripts leave theirs: wrapped names, their name of the head, tables in bf16."""
    renamed = {("lm_head.weight" if name == "head.weight" else name): part.clone() for name, part in state.items()}
    tensors = {
        f"module._orig_mod.{name}": part.bfloat16() if "embed" in name else part for name, part in renamed.items()
    }
    save_file(tensors, path)
    return path


def test_a_recipe_is_read_by_its_shapes(run, tokenizer, tmp_path):
    ours = load_weights(run / "weights.safetensors")
    saved, text = open_weights(as_other_script(ours.state, tmp_path / "w.safetensors"), tokenizer, "train_seq_len=32")
    assert saved.model == with_knobs(Config(), {**KNOBS, "tied_embed_init_std": 0.005}).model
    assert saved.tokenizer_sha256 == ours.tokenizer_sha256
    assert "recipe's script: 2 layers of 32, 2 heads, 1 for keys" in text and "train_seq_len=32" in text
    for key, part in ours.state.items():
        assert torch.equal(saved.state[key], part.bfloat16().float() if "embed" in key else part), key


def test_a_baseline_with_a_head_of_its_own(tokenizer, tmp_path):
    model = with_knobs(Config(), BASELINE).model
    path = as_other_script(build_model(model, seed=1).state_dict(), tmp_path / "w.safetensors")
    saved, text = open_weights(path, tokenizer)
    assert (saved.model.train_seq_len, saved.model.tie_embeddings, saved.model.smear_gate) == (1024, False, False)
    assert list(saved.state) and "head.weight" in saved.state and "baseline's script" in text


def test_the_tool_packs_them_and_says_the_loss(run, tokenizer, tmp_path, run_command_here):
    ours = load_weights(run / "weights.safetensors")
    path, out = as_other_script(ours.state, tmp_path / "w.safetensors"), tmp_path / "model.golf"
    done = run_command_here(
        "tools/pack_artifact.py", "--weights", path, "--out", out, "--tokenizer", tokenizer, "--fit", "--json",
        "--threads", "1", "--knobs", "train_seq_len=32", "--limit-bytes", "20000", "--calibration-tokens", "4096",
        "--val", run.parent / "data/text_val_*.bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)["val_bpb"]
    assert abs(after - before) < 0.05 and before < 1
    assert "read as weights of the recipe's script" in done.stderr
    assert read_artifact(out).tokenizer_sha256 == ours.tokenizer_sha256


REFUSED = {
    "no tokenizer": (lambda s: s, None, "", "give its --tokenizer"),
    "another script": (lambda s: {"wte.weight": torch.ones(4, 4)}, "", "", "no tensor 'tok_emb.weight'"),
    "a tensor too many": (lambda s: s | {"blocks.0.extra": torch.ones(3)}, "", "train_seq_len=32", "blocks.0.extra"),
    "a tensor too few": (
        lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.proj.weight"}, "", "train_seq_len=32",
        "blocks.1.mlp.proj.weight",
    ),
    "not finite": (lambda s: s | {"skip_weights": s["skip_weights"] * torch.nan}, "", "train_seq_len=32", "NaN"),
    "no knob": (lambda s: s, "", "width=3", "'width' is no knob=value of the model"),
    "no value": (lambda s: s, "", "train_seq_len", "'train_seq_len' is no knob=value"),
    "no rule": (lambda s: s, "", "rope_dims=3", "rope_dims must be even"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_read_is_refused(run, tokenizer, tmp_path, case):
    change, given, knobs, message = REFUSED[case]
    state = change(dict(load_weights(run / "weights.safetensors").state))
    path = as_other_script(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message):
        open_weights(path, tokenizer if given is not None else None, knobs)


def test_files_that_are_none(run, tokenizer, tmp_path):
    (tmp_path / "text").write_text("hello")
    for name in ("text", "absent"):
        with pytest.raises(ArtifactError, match="cannot read weights from"):
            open_weights(tmp_path / name, tokenizer)
    with pytest.raises(ConfigError, match="--knobs is for weights of another script"):
        open_weights(run / "weights.safetensors", tokenizer, "train_seq_len=32")
