"""Folders of finished runs and of published records, sound ones, for tests to spoil."""

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from golf.config.config import build_config, config_dict, config_hash
from lab.bundle.packer import pack_source
from lab.record.evidence import SubmissionOrder, SubmissionOutcome, make_record
from lab.record.folder_check import check_record
from lab.record.record_folder import read_record

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = '"""A program."""\n\nimport math\n\n\ndef main():\n    print(math.pi)  # a comment\n\n\nmain()\n'
DATA_ID, VAL_DATA_ID, TOKENIZER = "d" * 16, "e" * 16, "ab" * 32
VAL_TOKENS, VAL_BYTES = 119_473, 398_277


@functools.cache
def packed_source(source: str = SOURCE) -> bytes:
    return pack_source(source)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_run(
    folder: Path,
    seed: int = 42,
    overrides: dict[str, str] | None = None,
    source: str = SOURCE,
    readable: bool = True,
    **changes: Any,
) -> Path:
    """A sound run folder; `changes` go into result.json and, as the run would have, into the log."""
    folder.mkdir(parents=True)
    config = build_config("local", {}, {"seed": str(seed), "run_id": folder.name} | (overrides or {}))
    code, artifact = packed_source(source), f"artifact of seed {seed}".encode()
    (folder / "train_gpt.py").write_bytes(code)
    if readable:
        (folder / "train_gpt_readable.py").write_text(source, encoding="utf-8")
    (folder / "model.golf").write_bytes(artifact)
    write_json(folder / "config.json", {"config_hash": config_hash(config)} | config_dict(config))
    result = run_result(folder.name, seed, config_hash(config), code, artifact) | changes
    write_json(folder / "result.json", result)
    (folder / "train.log").write_text("\n".join(log_lines(result)) + "\n", encoding="utf-8")
    return folder


def run_result(run_id: str, seed: int, hashed: str, code: bytes, artifact: bytes) -> dict[str, Any]:
    val_bpb = 1.45 + (seed - 43) / 1000
    phases = [
        {"phase": "setup", "seconds": 4.0, "script": "", "process": "train"},
        {"phase": "train", "seconds": 179.9, "script": "train", "process": "train"},
        {"phase": "score", "seconds": 8.8, "script": "eval", "process": "eval"},
    ]
    sums = {"script": {"train": 179.9, "eval": 8.8}, "process": {"train": 183.9, "eval": 8.8}}
    return {
        "run_id": run_id, "preset": "local", "config_hash": hashed, "seed": seed, "valid": True, "findings": [],
        "params": 776_777, "steps": 1300 + seed, "train_seconds": 179.9, "train_tokens": 2_668_544,
        "swa_snapshots": 16, "data_id": DATA_ID, "val_data_id": VAL_DATA_ID, "world_size": 1, "compiled": False,
        "resumes": 0, "train_seconds_lost": 0.0, "eval_seconds": 8.8,
        "val_loss": val_bpb * math.log(2) * VAL_BYTES / VAL_TOKENS, "val_bpb": val_bpb, "val_tokens": VAL_TOKENS,
        "val_bytes": VAL_BYTES, "val_docs": 33, "eval_seq_len": 160, "eval_stride": 32, "eval_stride_asked": 32,
        "eval_tokens_per_second": 6e4, "partial": False, "of_tokens": VAL_TOKENS, "bytes_code": len(code),
        "bytes_model": len(artifact), "bytes_total": len(code) + len(artifact), "limit_bytes": 500_000,
        "tokenizer_sha256": TOKENIZER, "artifact_sha256": digest(artifact), "code_sha256": digest(code),
        "machine": "1 x x86_64 CPU process, 2 threads, linux", "pruned_codes": 10, "sizes": {}, "fit_actions": [],
        "features": {
            "qat": {"first": 1, "last": 1340, "count": 1340, "effect": "logits moved by 0.1", "proven": True},
            "prune": {"first": None, "last": None, "count": 1, "effect": "10 codes", "proven": True},
        },
        "parity": {"trained": 3.3, "reloaded": 3.31, "scorer": 3.31, "largest_difference": 0.01},
        "ledger": {"phases": phases, **sums, "process_seconds": 192.7},
        "probes": {
            "C1 future": {"verdict": "PASS", "detail": "64 positions"},
            "documents isolated": {"verdict": "NOT EXERCISED", "detail": "nothing claims it"},
        },
        "unquantized": {"val_loss": 3.3, "val_bpb": 1.44, "note": "averaged weights"},
        "fingerprint": {"machine_id": "0123456789ab", "cpu": "a CPU", "torch": "2.13.0", "cuda": None, "driver": None},
        "max_wallclock_seconds": 180.0, "max_eval_seconds": 600.0, "iterations": 20_000, "torch": "2.13.0+cpu",
        "python": "3.11.7", "device": "cpu", "tokenizer_kind": "sentencepiece",
    }  # fmt: skip


def log_lines(result: dict[str, Any]) -> list[str]:
    """The lines of a log that a checker reads, as golf/run/log_lines.py words them."""
    seed, steps = result["seed"], result["steps"]
    milliseconds = 1000 * result["train_seconds"]
    status = "valid" if result["valid"] else "INVALID"
    return [
        f"runs/{result['run_id']}/train.log",
        f"preset:local config_hash:{result['config_hash']} data_id:{result['data_id']} "
        f"tokenizer_sha256:{result['tokenizer_sha256']} code_sha256:{result['code_sha256']}",
        f"knobs changed from the preset: run_id={result['run_id']} seed={seed}",
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=data/cache/embedded-sp2048/tokenizer.model",
        "model_params:776777",
        "world_size:1 grad_accum_steps:1",
        "train_batch_tokens:2048 train_seq_len:128 iterations:20000 warmup_steps:2 max_wallclock_seconds:180.000",
        f"seed:{seed}",
        "qat:True(start=0.0) bigram:1024x32 swa:False prune:0.05 eval_seq_len:160 warmdown:cosine",
        *(f"step:{i}/20000 train_loss:{7 - i / 10 - seed / 1000:.4f} train_time:{200 * i}ms" for i in range(1, 6)),
        f"stopping_early: wallclock_cap train_time:{milliseconds:.0f}ms step:{steps}/20000",
        f"step:{steps}/20000 val_loss:3.5001 val_bpb:1.5147 train_time:{milliseconds:.0f}ms weights:last",
        "Serialized model: 3110060 bytes",
        f"Code size: {result['bytes_code']} bytes",
        f"Serialized model int5int6+lzma: {result['bytes_model']} bytes",
        f"Total submission size int5int6+lzma: {result['bytes_total']} bytes",
        "final_eval_mode:sliding_window stride:32 batch_seqs:128",
        f"final_int5int6_lzma_roundtrip val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f} "
        f"eval_time:{1000 * result['eval_seconds']:.0f}ms",
        f"final_int5int6_lzma_roundtrip_exact val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}",
        f"result: {status} val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f} "
        f"bytes_total:{result['bytes_total']} steps:{steps} train_seconds:{result['train_seconds']:.1f} "
        f"eval_seconds:{result['eval_seconds']:.1f} config_hash:{result['config_hash']} "
        f"code_sha256:{result['code_sha256']} artifact_sha256:{result['artifact_sha256']}",
    ]  # fmt: skip


# ---- records made from runs ----


def order_of(tmp_path: Path, *runs: Path, **changes: Any) -> SubmissionOrder:
    texts = {"name": "A record", "author": "Somebody", "github_id": "some-body", "blurb": "What it is."}
    values = texts | {"track": "track_local", "date": "2026-04-01"} | changes
    return SubmissionOrder(runs, **values, records=tmp_path / "records", requirements=REPOSITORY / "requirements.txt")


def build(tmp_path: Path, *runs: Path, **changes: Any) -> SubmissionOutcome:
    return make_record(order_of(tmp_path, *runs, **changes))


def three_seeds(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "runs" / f"seed{seed}", seed) for seed in (42, 43, 44)]


def edit_result(run: Path, log: bool = True, **changes: Any) -> None:
    """Change result.json and, as an honest run would have, the log with it."""
    result = json.loads((run / "result.json").read_text()) | changes
    write_json(run / "result.json", result)
    if log:
        (run / "train.log").write_text("\n".join(log_lines(result)) + "\n")


# ---- the shape of published records ----

PUBLISHED_SCRIPT = """\
import os
import zlib


class Hyperparameters:
    seed = int(os.environ.get("SEED", 1337))
    holdout_every = int(os.environ.get("HOLDOUT_EVERY", 1000))


def main():
    args = Hyperparameters()
    print(f"seed:{args.seed}")
    model = zlib.compress(b"model", args.seed % 10)
    if args.holdout_every:
        print(len(model))


main()
"""
SP1024 = 2.43593


def published_log(seed: int, val_bpb: float, script: str = PUBLISHED_SCRIPT, model_bytes: int = 15_800_000) -> str:
    """A log in the competition's form: the source first, then what was printed."""
    val_loss = val_bpb * math.log(2) * SP1024
    losses = "\n".join(
        f"step:{i}/20000 train_loss:{7 - i / 10 - seed / 1e5:.4f} train_time:{44 * i}ms step_avg:44.00ms"
        for i in range(1, 6)
    )
    code = len(script.encode())
    return f"""{script}
{"=" * 100}
Running Python 3.12.3 and PyTorch 2.9.1+cu128
{"=" * 100}
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:{seed}
{losses}
step:13000/20000 val_loss:2.0400 val_bpb:1.2081 train_time:599950ms step_avg:46.15ms
stopping_early: wallclock_cap train_time:599950ms step:13000/20000
Serialized model: 67224983 bytes
Code size: {code} bytes
Total submission size: {67224983 + code} bytes
Serialized model int8+zlib: {model_bytes} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: {model_bytes + code} bytes
final_int8_zlib_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:67952ms
final_int8_zlib_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}
"""


PUBLISHED_SCORES = {42: 1.21632999, 1337: 1.21701, 7: 1.21598}


def write_published(
    folder: Path, script: str | bytes = PUBLISHED_SCRIPT, shipped: bytes | None = None, **log: Any
) -> Path:
    """A sound record of another's making: three seeds, no result.json, no list of hashes."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# A record\n", encoding="utf-8")
    code = script_bytes(shipped or script)
    (folder / "train_gpt.py").write_bytes(code)
    for seed, score in PUBLISHED_SCORES.items():
        text = published_log(seed, score, script if isinstance(script, str) else "", **log)
        (folder / f"train_seed{seed}.log").write_text(text, encoding="utf-8")
    mean = sum(PUBLISHED_SCORES.values()) / len(PUBLISHED_SCORES)
    total = log.get("model_bytes", 15_800_000) + len(code)
    claims = {
        "author": "someone", "github_id": "someone", "name": "A record", "blurb": "What it is.", "date": "2026-04-01",
        "track": "10min_16mb", "val_bpb": round(mean, 4), "val_loss": round(mean * math.log(2) * SP1024, 4),
        "bytes_total": total, "bytes_code": len(code), "seeds": [42, 1337, 7],
        "seed_results": {str(seed): {"val_bpb": score} for seed, score in PUBLISHED_SCORES.items()},
    }  # fmt: skip
    write_json(folder / "submission.json", claims)
    return folder


# ---- what is found, and how to spoil a record ----


def codes(folder: Path) -> dict[str, str]:
    """Code -> severity of everything that is found."""
    return {finding.code: finding.severity for finding in check_record(read_record(folder))}


def errors(folder: Path) -> set[str]:
    return {code for code, severity in codes(folder).items() if severity == "error"}


def texts(folder: Path) -> str:
    return "\n".join(finding.text for finding in check_record(read_record(folder)))


def claim(folder: Path, **changes: Any) -> None:
    path = folder / "submission.json"
    write_json(path, json.loads(path.read_text()) | changes)


def edit_log(folder: Path, before: str, after: str, seed: int = 42) -> None:
    path = folder / f"train_seed{seed}.log"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def script_bytes(script: str | bytes) -> bytes:
    return script if isinstance(script, bytes) else script.encode()


def ship(folder: Path, source: str | bytes) -> None:
    """Another script, with logs that ran it; a packed one is not in them."""
    (folder / "train_gpt.py").write_bytes(script_bytes(source))
    for seed, score in PUBLISHED_SCORES.items():
        text = published_log(seed, score, source if isinstance(source, str) else "")
        (folder / f"train_seed{seed}.log").write_text(text, encoding="utf-8")
    size = len(script_bytes(source))
    claim(folder, bytes_code=size, bytes_total=15_800_000 + size)
