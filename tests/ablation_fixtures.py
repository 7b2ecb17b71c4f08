"""A study so small that tests can run it: two trained rows, one that fails, and roundings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from golf.config.config import Config, build_config
from lab.study.plan import StudyPlan
from lab.study.spec import RunSpec
from lab.study.table import RunCurve, Study, StudyRow

MATRIX = """
name = "small"
preset = "local"
baseline = "plain"
[base]
vocab_size = 260
num_layers = 2
model_dim = 32
num_heads = 2
num_kv_heads = 2
bigram_vocab_size = 0
bigram_dim = 0
train_seq_len = 32
train_batch_tokens = 128
micro_batch_tokens = 128
warmup_steps = 1
swa_enabled = false
quantizer = "rtn"
mlp_bits = 16
attn_bits = 16
bigram_bits = 16
embed_bits = 16
codec = "lzma"
compile = "off"
device = "cpu"
holdout_every = 0
eval_seq_len = 32
eval_stride = 32
eval_rope = "none"
eval_batch_seqs = 16
max_eval_seconds = 0.0
[profiles.tiny]
text = "synthetic"
steps = 8
stop_step = 6
look_every = 2
look_tokens = 256
val_tokens = 600
[groups.A]
title = "trained"
rows = [
    { name = "plain" },
    { name = "ternary", qat_enabled = true, weight_q = "ternary", weight_up = "ternary", act_hidden = "unsigned8" },
]
[groups.B]
title = "the same again, and what breaks"
rows = [
    { name = "plain again", extends = "plain" },
    { name = "broken", extends = "plain", matrix_lr = 1e30, embed_lr = 1e30 },
]
[groups.G]
title = "rounded"
rows = [
    { name = "by", source = "plain", methods = ["rtn4", "gptq2"], calibration_sequences = 4 },
    { name = "broken by", source = "broken", methods = ["rtn8"] },
]
"""
ENVIRONMENT = {
    "device": "a CPU",
    "threads": 1,
    "compile": False,
    "torch": "2",
    "cuda": None,
    "numpy": "2",
    "python": "3",
}


def write_matrix(folder: Path, text: str = MATRIX) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def a_spec(config: Config | None = None, **changes: Any) -> RunSpec:
    config = config or build_config("local", {}, {"data_path": "x", "tokenizer_path": "y", "corpus": ""})
    return replace(RunSpec("a row", config, "data", "val", "code"), **changes)


def a_result(loss: float, **figures: Any) -> dict[str, Any]:
    """A finished run with made-up figures."""
    common = {
        "status": "finished", "error": "", "val_loss": loss, "val_bpb": loss / 2, "val_tokens": 100, "val_bytes": 200,
        "val_data_id": "v", "bytes_model": 5000, "bytes_matrices": 3000, "covered": 0.5, "params": 1000,
        "zero_fraction": 0.25, "zero_shares": {}, "weight_bits": {"q": 1.58, "o": 16.0}, "activation_bits": {},
        "train_loss": loss - 0.25, "step_ms": 10.0, "step_ms_p10": 9.0, "step_ms_p90": 12.0, "steps": 6,
        "train_tokens": 768, "train_tokens_per_s": 12800.0, "peak_mib": 300.0, "environment": ENVIRONMENT,
        "total_seconds": 1.0,
    }  # fmt: skip
    return common | figures


def a_row(name: str, losses: list[float | None], group: str = "A", method: str = "", **figures: Any) -> StudyRow:
    """A row of runs with these losses, failed where there is none."""
    failed = {"status": "failed", "error": "TrainingError: the loss is nan"}
    results = [failed if loss is None else a_result(loss, **figures) for loss in losses]
    curves = [RunCurve() if loss is None else RunCurve(val={2: loss + 2, 4: loss + 1, 6: loss}) for loss in losses]
    keys = tuple(f"{name}-{seed}" for seed in range(len(losses)))
    return StudyRow((name,), (group,), keys, results, curves, [{} for _ in losses], None, method, "")


def a_study(*rows: StudyRow) -> Study:
    """A study of these rows, the first of which is the baseline."""
    plan = StudyPlan("small", "tiny", rows[0].names[0], {"A": "trained"}, tuple(range(len(rows[0].results))), [])
    return Study(plan, rows, ENVIRONMENT)


def results_in(out: Path) -> dict[str, dict[str, Any]]:
    """Result by name of the run and seed."""
    found = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    return {f"{result['name']} {result['seed']}": result for result in found}
