"""tools/check_run.py as a program, on a run folder made here."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from golf.artifact.container import read_artifact, write_artifact
from golf.config.config import Config, build_config, config_dict, config_hash, with_knobs
from golf.data.shards import write_shard
from golf.data.tokenizer import ByteTable
from golf.model.init import build_model
from golf.quant.export import quantize_state
from golf.runtime import Runtime
from golf.score.roundtrip import stream_identity
from golf.score.scorer import score_stream, sliding_settings
from lab.cli import run_command
from lab.prepare.text_tokenizer import load_text_tokenizer

CPU = Runtime(torch.device("cpu"))
SENTENCES = [f"The {n} small models said: “naïve café, {n * n} bytes” to the {n % 7} old ones." for n in range(120)]
KNOBS = dict(
    num_layers="2", model_dim="16", num_heads="2", num_kv_heads="1", bigram_vocab_size="32", bigram_dim="8",
    train_seq_len="16", eval_seq_len="32", eval_stride="4", eval_batch_seqs="6", train_batch_tokens="64", threads="1",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd", mixture="0", adapter_rank="0",
)  # fmt: skip
PROBES = (
    "C1 causality", "C2 normalisation", "C3 score before update", "C4 single pass", "document isolation",
    "disjoint splits", "bytes of text", "data guard", "network",
)  # fmt: skip
OPEN = ("C3 score before update", "document isolation", "data guard", "network")
"""Probes that a run of this model without access.json does not exercise."""


def run_config(folder: Path, vocab_size: int) -> Config:
    paths = dict(data_path=str(folder / "shards"), tokenizer_path=str(folder / "tokens.model"))
    return with_knobs(build_config("local", {}, KNOBS), paths | dict(vocab_size=vocab_size))


def write_shards(folder: Path, split: str, ids: list[list[int]], bos_id: int) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    stream = np.array([token for text in ids for token in (bos_id, *text)], dtype=np.uint16)
    for number, part in enumerate(np.array_split(stream, 2)):
        write_shard(folder / f"text_{split}_{number:06d}.bin", part)
    return stream


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Shards, tokenizer, and a run folder that has been scored, with a stride of twice the configured one."""
    folder = tmp_path_factory.mktemp("made")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokens"), vocab_size=400, model_type="bpe",
        byte_fallback=True, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = load_text_tokenizer(folder / "tokens.model")
    ids = tokenizer.encode_documents(SENTENCES)
    write_shards(folder / "shards", "train", ids[40:], tokenizer.bos_id)
    tokens = write_shards(folder / "shards", "val", ids[:40], tokenizer.bos_id)
    config = run_config(folder, tokenizer.vocab_size)
    (folder / "run").mkdir()
    write_json(folder / "run" / "config.json", {"config_hash": config_hash(config)} | config_dict(config))
    model = build_model(dataclasses.replace(config.model, tied_embed_init_std=0.3), seed=3)
    stored = quantize_state(model.state_dict(), config.quant)
    write_artifact(folder / "run" / "model.golf", stored, config.model, tokenizer.sha256, "lzma")
    artifact = read_artifact(folder / "run" / "model.golf")
    settings = sliding_settings(dataclasses.replace(config.score, eval_stride=8), config.model)
    score = score_stream(model, tokens, ByteTable(tokenizer), settings, CPU, announce=False)
    write_json(folder / "run" / "score.json", {
        "val_loss": score.val_loss, "val_bpb": score.val_bpb, "val_tokens": score.tokens, "val_bytes": score.bytes,
        "eval_stride": 8, "val_data_id": stream_identity(tokens), "artifact_sha256": artifact.sha256,
    })  # fmt: skip
    return folder


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run folder, to be spoilt."""
    return shutil.copytree(made / "run", tmp_path / "run")


def load_tool(repository: Path):
    sys.path.insert(0, str(repository / "tools"))
    try:
        import check_run
    finally:
        sys.path.pop(0)
    return check_run


@pytest.fixture
def check(repository, monkeypatch, capsys):
    """Runs the tool in this process: (exit status, stdout, stderr)."""
    tool = load_tool(repository)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_run.py", *map(str, arguments)])
        return run_command(tool.Options, tool.__doc__, tool.work), *capsys.readouterr()

    return call


@pytest.mark.slow
def test_the_program_probes_a_run_before_it_has_a_result(repository, run):
    command = [sys.executable, str(repository / "tools" / "check_run.py"), str(run), "--write"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "probes.json").read_text())
    assert tuple(found) == PROBES
    assert {name for name in found if found[name]["verdict"] == "NOT EXERCISED"} == set(OPEN)
    assert {found[name]["verdict"] for name in PROBES if name not in OPEN} == {"PASS"}
    assert all(name.split()[0] in done.stdout for name in PROBES) and "NOT EXERCISED" in done.stdout


def verdicts(check, *arguments: object) -> tuple[int, dict[str, str], dict[str, str]]:
    status, output, _ = check(*arguments, "--json")
    found = json.loads(output)
    return status, *({name: probe[part] for name, probe in found.items()} for part in ("verdict", "detail"))


def test_json_is_what_is_written_and_the_stride_is_that_of_the_score(check, run, made):
    status, found, details = verdicts(check, run, "--write")
    written = json.loads((run / "probes.json").read_text())
    assert status == 0 and {name: probe["verdict"] for name, probe in written.items()} == found
    targets = json.loads((run / "score.json").read_text())["val_tokens"]
    assert f"{1 + math.ceil((targets - 32) / 8)} windows tile" in details["C4 single pass"]
    change_json(run / "score.json", eval_stride=4)
    assert f"{1 + math.ceil((targets - 32) / 4)} windows tile" in verdicts(check, run)[2]["C4 single pass"]


def test_a_result_is_read_too(check, run):
    (run / "score.json").rename(run / "result.json")
    assert verdicts(check, run)[0] == 0


@pytest.mark.parametrize(
    ("changes", "probe", "message"),
    [
        (dict(val_bpb=1.0), "bytes of text", "val_bpb says"),
        (dict(val_bytes=5), "bytes of text", "divides by 5 bytes"),
        (dict(val_tokens=7), "C4 single pass", "7 of the stream's"),
    ],
)
def test_a_score_that_is_not_that_of_the_text_fails(check, run, changes, probe, message):
    score = json.loads((run / "score.json").read_text())
    if "val_tokens" in changes:
        changes = changes | {"val_loss": score["val_loss"] * score["val_tokens"] / 7}
    change_json(run / "score.json", **changes)
    status, found, details = verdicts(check, run)
    assert status == 1 and message in details[probe]
    assert [name for name, verdict in found.items() if verdict == "FAIL"] == [probe]


def test_a_planted_document_and_a_planted_access_fail(check, run, made, tmp_path):
    shards = shutil.copytree(made / "shards", tmp_path / "shards")
    tokenizer = load_text_tokenizer(made / "tokens.model")
    write_shards(shards, "train", tokenizer.encode_documents(SENTENCES[39:]), tokenizer.bos_id)
    config = json.loads((run / "config.json").read_text())
    change_json(run / "config.json", data=config["data"] | {"data_path": str(shards)})
    flags = dict.fromkeys(("validation_opened_before_score", "training_opened_after_calibration"), False)
    write_json(run / "access.json", flags | dict(watched=True, network_during_scoring=True, violations=[]))
    status, found, details = verdicts(check, run)
    assert status == 1 and details["disjoint splits"].startswith("1 of 40 validation and 81 training documents")
    assert [name for name, verdict in found.items() if verdict == "FAIL"] == ["disjoint splits", "network"]
    assert found["data guard"] == "PASS"


def test_full_samples_more(check, run):
    status, _, details = verdicts(check, run, "--full")
    assert status == 0 and details["C2 normalisation"].startswith("48 targets")  # 6 later windows of 8 each


def spoil(run: Path, made: Path, what: str) -> None:
    if what == "other tokenizer":
        (run / "other.model").write_bytes((made / "tokens.model").read_bytes() + b"\x12\x00")
        data = json.loads((run / "config.json").read_text())["data"]
        change_json(run / "config.json", data=data | {"tokenizer_path": str(run / "other.model")})
    elif what == "no shards":
        data = json.loads((run / "config.json").read_text())["data"]
        change_json(run / "config.json", data=data | {"data_path": str(run)})
    elif what in ("score.json", "config.json", "model.golf"):
        (run / what).unlink()
    else:
        name, text = what.split(":", 1)
        (run / name).write_text(text)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config.json", "config.json is missing"),
        ("config.json:{", "config.json"),
        ("config.json:{}", "config_hash"),
        ("score.json", "score the run first"),
        ("score.json:[1]", "score.json"),
        ("score.json:{}", "val_loss"),
        ('score.json:{"val_loss": null}', "val_loss"),
        ("model.golf", "model.golf"),
        ("model.golf:nonsense", "artifact"),
        ("other tokenizer", "not the artifact's tokenizer"),
        ("no shards", "no *_val_NNNNNN.bin shards"),
        ("access.json:{}", "access.json"),
    ],
)
def test_bad_input_is_one_line_and_status_two(check, run, made, what, message):
    spoil(run, made, what)
    status, output, complaint = check(run)
    assert status == 2 and output == ""
    assert complaint.startswith("check_run: ") and message in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize("key", ["artifact_sha256", "val_data_id"])
def test_another_artifact_or_text_than_was_scored_is_refused(check, run, key):
    change_json(run / "score.json", **{key: "0" * 16})
    status, _, complaint = check(run)
    assert status == 2 and "scored" in complaint
