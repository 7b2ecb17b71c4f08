"""tools/roundtrip_eval.py: from artifact, tokenizer and shards alone to the score of the model in memory."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sentencepiece
import torch

from golf.artifact.container import read_artifact, restore_model, write_artifact
from golf.config.config import Config, with_knobs
from golf.config.scoring import ScoreConfig
from golf.data.shards import write_shard
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.export import quantize_state
from golf.quant.grid import dequantize_state
from golf.runtime import Runtime
from golf.score.scorer import score_stream, sliding_settings
from lab.cli import run_command
from lab.prepare.text_tokenizer import load_text_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "roundtrip_eval.py"
CPU = Runtime(torch.device("cpu"))
SENTENCES = [f"The {n} small models said: “naïve café, {n * n} bytes” to the {n % 7} old ones." for n in range(120)]
MODEL = with_knobs(
    Config(),
    dict(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, bigram_vocab_size=64, bigram_dim=8, train_seq_len=32)
    | dict(tied_embed_init_std=0.3),
).model
QUANT = Config().quant

torch.set_num_threads(1)


def train_tokenizer(prefix: Path, sentences: list[str], pieces: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(prefix), vocab_size=pieces, model_type="bpe",
        byte_fallback=True, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A folder with nothing but an artifact, its tokenizer and two validation shards."""
    folder = tmp_path_factory.mktemp("bundle")
    train_tokenizer(folder / "tokens", SENTENCES, 400)
    (folder / "tokens.vocab").unlink()
    tokenizer = load_text_tokenizer(folder / "tokens.model")
    ids = [token for text in SENTENCES[:40] for token in (tokenizer.bos_id, *tokenizer.encode(text))]
    for number, part in enumerate(np.array_split(np.array(ids), 2)):
        write_shard(folder / f"text_val_{number:06d}.bin", part)
    model_config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    stored = quantize_state(build_model(model_config, seed=3).state_dict(), QUANT)
    write_artifact(folder / "model.bin", stored, model_config, tokenizer.sha256, "lzma")
    return folder


def arguments(**changes: str) -> list[str]:
    options = dict(artifact="model.bin", val="*_val_*.bin", tokenizer="tokens.model", device="cpu", threads="1")
    return [word for name, value in (options | changes).items() for word in (f"--{name.replace('_', '-')}", value)]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roundtrip_eval", TOOL)
    module = sys.modules["roundtrip_eval"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_score(folder: Path, score: ScoreConfig):
    artifact = read_artifact(folder / "model.bin")
    stored = quantize_state(build_model(artifact.model, seed=3).state_dict(), QUANT)
    model = GPT(artifact.model)
    model.load_state_dict(dequantize_state(stored))
    tokens = np.concatenate([np.fromfile(path, "<u2")[512:] for path in sorted(folder.glob("*_val_*.bin"))])
    table = ByteTable(load_text_tokenizer(folder / "tokens.model"))
    return score_stream(model, tokens, table, sliding_settings(score, artifact.model), CPU, announce=False)


@pytest.mark.slow
def test_fresh_process_gives_the_score_of_the_model_in_memory(bundle):
    command = [sys.executable, str(TOOL), *arguments(), "--json"]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert (values["eval_seq_len"], values["eval_stride"], values["eval_rope"]) == (64, 64, "ntk")
    expected = expected_score(bundle, ScoreConfig(64, 64, values["eval_batch_seqs"], "ntk"))
    assert (values["val_loss"], values["val_bpb"]) == (expected.val_loss, expected.val_bpb)
    assert values["bytes"] == sum(len(text.encode()) for text in SENTENCES[:40])
    assert values["documents"] == 40 and values["tokens"] == expected.tokens
    assert values["artifact_bytes"] == (bundle / "model.bin").stat().st_size
    assert "score:forecast" in done.stderr or expected.windows < 6 * values["eval_batch_seqs"]


@pytest.mark.slow
def test_two_processes_under_torchrun_print_one_score(bundle):
    options = [*arguments(stride="8", batch="4"), "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TOOL)]
    done = subprocess.run([*launcher, *options], cwd=bundle, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    expected = expected_score(bundle, ScoreConfig(64, 8, 4, "ntk"))
    assert values["val_loss"] == pytest.approx(expected.val_loss, rel=1e-9)
    assert (values["tokens"], values["bytes"], values["processes"]) == (expected.tokens, expected.bytes, 2)


def run_tool(folder: Path, monkeypatch, *options: str) -> int:
    """Exit status of the tool, run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["roundtrip_eval.py", *options])
    tool = load_tool()
    return run_command(tool.Options, tool.__doc__, tool.work)


def test_options_reach_the_scorer(bundle, monkeypatch, capsys):
    options = arguments(window="48", stride="5", rope="none", batch="3")
    assert run_tool(bundle, monkeypatch, *options, "--json") == 0
    expected = expected_score(bundle, ScoreConfig(48, 5, 3, "none"))
    values = json.loads(capsys.readouterr().out)
    assert (values["val_loss"], values["windows"]) == (expected.val_loss, expected.windows)
    assert run_tool(bundle, monkeypatch, *options) == 0
    assert f"{expected.val_bpb:.8f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokenizer="other.model"), "is not that of the artifact's tokenizer"),
        (dict(tokenizer="missing.model"), "missing.model"),
        (dict(artifact="tokens.model"), "artifact"),
        (dict(artifact="missing.bin"), "missing.bin"),
        (dict(val="*_train_*.bin"), "no file matches"),
        (dict(val="model.bin"), "not a token shard"),
        (dict(stride="65", window="64"), "stride"),
        (dict(window="-4"), "positive"),
        (dict(batch="-1"), "positive"),
        (dict(threads="-1"), "threads=-1"),
        (dict(max_seconds="-1"), "max_eval_seconds=-1.0"),
    ],
)
def test_bad_input_is_one_line_and_status_two(bundle, monkeypatch, capsys, tmp_path, changes, message):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    if changes.get("tokenizer") == "other.model":
        train_tokenizer(folder / "other", SENTENCES[:60], 350)
    assert run_tool(folder, monkeypatch, *arguments(**changes)) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith("roundtrip_eval: ") and message in complaint and "\n" not in complaint


def test_restored_model_gives_the_logits_of_the_quantized_model(bundle):
    artifact = read_artifact(bundle / "model.bin")
    model = GPT(artifact.model)
    model.load_state_dict(dequantize_state(quantize_state(build_model(artifact.model, seed=3).state_dict(), QUANT)))
    restored = restore_model(artifact, CPU)
    ids_BT = torch.arange(60).view(2, 30)
    assert torch.equal(restored.logits(ids_BT), model.logits(ids_BT))
    assert not restored.training
