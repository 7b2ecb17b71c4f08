# Made by tools/bundle.py from train_gpt.py and the modules it needs: edit those, not this file.
# sha256 of the parts: b4441c45b56a4c8329f30a7cd50402948834e16e7ca25ac361db43de26130516
#   13ca3c7fbde2b89a   377 lines  golf/config.py
#   adf21ddd36f138ac   114 lines  golf/artifact/codecs.py
#   d25c489ff1cd26e4    78 lines  golf/artifact/frame.py
#   76a985a4ac0da721    65 lines  golf/quant/grid.py
#   ee56f01422d8dbc6    41 lines  golf/quant/policy.py
#   411d5a4ce86b07cf    62 lines  golf/quant/export.py
#   d24465549eea7566   135 lines  golf/artifact/layout.py
#   1ea3bf060511cb83    73 lines  golf/artifact/settings.py
#   2a3b64e490d1b6bf    35 lines  golf/artifact/shapes.py
#   5c4ba28c7b62e293    64 lines  golf/artifact/sizes.py
#   41d9118d84902d0b   241 lines  golf/runtime.py
#   f0e5ade0f191faad   180 lines  golf/artifact/container.py
#   80a71053676197ec    66 lines  golf/quant/prune.py
#   fd20ce564dcc7fbb   122 lines  golf/artifact/fit.py
#   63a533fe8c539575    44 lines  golf/model/layers.py
#   3e97ba387375f701    33 lines  golf/model/rotary.py
#   1cb838f7d97596e6    88 lines  golf/model/block.py
#   816514c4fa90140d    61 lines  golf/model/embedding.py
#   56acabc520d41a21    85 lines  golf/model/gpt.py
#   9b9f1f4ad1587f05    13 lines  golf/artifact/restore.py
#   75c52e4c1a640e29    97 lines  golf/artifact/weights.py
#   4caad2626f2a95fd    99 lines  golf/data/shards.py
#   1c4f7ed6e8191000    47 lines  golf/model/init.py
#   0f9efc15576c304c   131 lines  golf/run/checkpoint.py
#   f3418fcd6f97b35f    76 lines  golf/run/witness.py
#   b52b57ac0541cdd7    32 lines  golf/run/averaging.py
#   96517e451fb43857    66 lines  golf/run/guard.py
#   7efbb407df6051fe   106 lines  golf/run/folder.py
#   faf11df00a1c74b8    52 lines  golf/run/code.py
#   1491039aebb62f9d    78 lines  golf/run/command.py
#   a4b75c2d0e8453b6   189 lines  golf/data/loader.py
#   0eb8a4dd9f80eecb   111 lines  golf/data/tokenizers_plain.py
#   88b09b1c6dbf452f   246 lines  golf/data/tokenizer.py
#   105e6e7805b7a3f8    78 lines  golf/data/manifest.py
#   82bcf53a5f65f021    88 lines  golf/run/datasets.py
#   0640477dc484d42b    47 lines  golf/run/interruption.py
#   a7e8495051c09b95    79 lines  golf/data/orders.py
#   bdea400babea624a    36 lines  golf/optim/average.py
#   c9b67a8849bf0f94    92 lines  golf/optim/muon.py
#   dc588ee79d2994ce    94 lines  golf/optim/groups.py
#   681fee0ca4328d78    40 lines  golf/optim/schedule.py
#   3dddf59358b60d3e    57 lines  golf/quant/qat.py
#   2777a65eee11bc4c   276 lines  golf/run/training.py
#   3e98312d1b832231    67 lines  golf/score/journal.py
#   d74ed4affc37139a   123 lines  golf/data/sidecar.py
#   afcb9e4ed79bc50e    84 lines  golf/score/progress.py
#   2e1f839dd868e6e4    59 lines  golf/score/windows.py
#   ee99f335b46a043e   364 lines  golf/score/scorer.py
#   fe19c83b56ae1fa4   137 lines  golf/run/report.py
#   8675f09efdc46e16   109 lines  golf/run/ledger.py
#   d9b51ac4fb271a32    46 lines  golf/run/stages.py
#   089d1ec7cad8b71f    87 lines  golf/run/session.py
#   f4e860d52842ff93    85 lines  golf/run/loop.py
#   90300c9679edba36   128 lines  golf/run/machine.py
#   c409dd564840db3f    72 lines  golf/run/parity.py
#   dbd527200dcc3fcd    49 lines  golf/run/rehearsal.py
#   09cdb0d35a50e8f3    27 lines  golf/run/findings.py
#   19da7691464c3361   125 lines  golf/run/result.py
#   cd6fe4dfa944ac09    59 lines  golf/score/deadline.py
#   e027d4ed8c457fae   116 lines  golf/score/roundtrip.py
#   8013a6f43cbcde15   247 lines  train_gpt.py

"""From text and a wall-clock budget to the best language model that fits a byte budget, and its proven score.

    config -> data -> train -> average -> quantize -> pack | a fresh process: reload -> score -> report

Run it with `python train_gpt.py` or `torchrun --standalone --nproc_per_node=N train_gpt.py` (--help lists the
knobs). Everything that a run leaves is in runs/<run_id>/, and `--resume <run_id>` goes on from wherever it was: every
stage reads what the one before it left on the disk. The words of this story are in golf/.
"""

import argparse
import contextlib
import fcntl
import glob
import hashlib
import importlib
import io
import json
import lzma
import math
import numpy as np
import os
import platform
import random
import re
import sentencepiece
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import torch
import torch.distributed as dist
import torch.nn.functional as F
import traceback
import zlib
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from math import gcd, prod
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from types import FrameType, ModuleType
from typing import Any, Literal, Protocol, TextIO, cast, get_args, get_origin


# ---- golf/config.py --------------------------------------------------------------------------------------------------

"""Every knob of the pipeline: frozen dataclasses, presets, and the one reader of the environment.

A knob has one lower-case name, unique over the whole tree, and answers to it in upper case as an
environment variable (``train_seq_len`` is ``TRAIN_SEQ_LEN``). Precedence: preset, then environment,
then ``key=value`` on the command line. Horizons are fractions of the binding budget (steps or seconds,
whichever is nearer its end), so that they act on a machine of any speed.
"""

CODECS = Literal["lzma", "zstd", "zlib", "none"]


EXIT_FINDINGS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE = 1, 2, 4, 5
"""Exit statuses of all programs; 3 is run.sh's, where the set-up failed."""


class UserError(ValueError):
    """What a person can mend: one clear line that says what is wrong and what to do. Every room has its own kind."""


class ConfigError(UserError):
    """A knob that does not exist, a value that does not parse, or values that do not fit together."""


@dataclass(frozen=True)
class RunConfig:
    preset: str = "leaderboard"
    run_id: str = ""
    """Name of the folder under `runs_root`; empty: preset, time and seed."""
    seed: int = 42
    runs_root: str = "runs"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    compile: Literal["auto", "on", "off"] = "on"
    """torch.compile the training step and the scorer; auto: where there is CUDA or a C++ compiler."""
    threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    limit_bytes: int = 16_000_000
    """Most bytes that packed code and artifact may have together."""
    reserve_bytes: int = 10_000
    """Bytes to stay below the limit when weights had to be coarsened to fit."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints; 0: only at the end and on SIGTERM or SIGINT."""
    rehearse: bool = True
    """Quantize, pack, reload and score the untrained model before the first step, so that what is missing shows."""


@dataclass(frozen=True)
class DataConfig:
    data_path: str = "data/datasets/fineweb10B_sp1024"
    """Folder of *_train_*.bin and *_val_*.bin shards; empty: prepared from `corpus` at first use."""
    tokenizer_path: str = "data/tokenizers/fineweb_1024_bpe.model"
    """SentencePiece model; empty: the one prepared with `corpus`."""
    corpus: str = ""
    """`embedded` (texts of Python's standard library) or a path: .txt, .jsonl, .jsonl.xz, a folder of them."""
    row_order: Literal["sequential", "spread", "shuffled", "documents"] = "sequential"
    """sequential: as in the shards (the competition's); spread: each batch from all over the text, each row once;
    shuffled: documents in an order drawn from the seed; documents: shuffled, and rows begin where a document does."""


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 1024
    num_layers: int = 10
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    """MLP hidden width as a multiple of `model_dim`."""
    bigram_vocab_size: int = 10_240
    """Rows of the hashed bigram table, the last one reserved for "no previous token"; 0: no table."""
    bigram_dim: int = 128
    smear_gate: bool = True
    resid_mix_init: Literal["phase", "stream"] = "phase"
    """phase: early blocks lean on the embedding, late ones on the stream; stream: all of the stream."""
    matrix_init: Literal["orthogonal", "uniform"] = "orthogonal"
    """orthogonal: output projections scaled by 1/sqrt(2 layers); uniform: torch's default, outputs zero."""
    qk_gain_init: float = 1.5
    rope_base: float = 10_000.0
    logit_softcap: float = 30.0
    tied_embed_init_std: float = 0.005
    train_seq_len: int = 2048
    """Tokens in a training row; the length at which RoPE is unscaled."""
    bos_id: int = 1
    """Token that starts a document."""
    document_attention: bool = False
    """Attention stays within a document; off: it sees all of the row before."""


@dataclass(frozen=True)
class TrainConfig:
    iterations: int = 20_000
    """Most optimizer steps; 0: no limit."""
    max_wallclock_seconds: float = 600.0
    """Most seconds of training; 0: no limit (then equal seeds give equal bytes)."""
    train_batch_tokens: int = 786_432
    """Tokens of a step over all ranks and micro-steps."""
    micro_batch_tokens: int = 98_304
    """Most tokens of one forward pass on one rank."""
    short_seq_len: int = 0
    """Rows are cut into rows of this length in the first part of the budget; 0: never."""
    short_seq_fraction: float = 0.0
    """Share of the budget that is trained on the short rows."""
    warmup_steps: int = 20
    """Untimed steps that compile and warm the caches; their effect is undone."""
    warmdown_fraction: float = 0.45
    """Share of the budget over which the learning rate falls to zero (272 of 600 s in the recipe's log)."""
    warmdown_shape: Literal["cosine", "linear"] = "cosine"
    val_loss_every: int = 500
    """Steps between looks at the weights in training, on training text that is held out for it; 0: no look."""
    train_log_every: int = 100
    val_batch_size: int = 524_288
    """Training tokens held out for `val_loss_every`; and tokens of a batch that is scored in plain rows."""


@dataclass(frozen=True)
class OptimConfig:
    matrix_lr: float = 0.02
    tied_embed_lr: float = 0.03
    scalar_lr: float = 0.02
    muon_momentum: float = 0.99
    muon_momentum_start: float = 0.92
    muon_momentum_warmup_fraction: float = 0.23
    """Share of the budget over which momentum rises (1,500 of 6,606 steps in the recipe's log)."""
    muon_ns_steps: int = 5
    muon_weight_decay: float = 0.04
    embed_weight_decay: float = 0.04
    scalar_weight_decay: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3
    """Largest norm of all gradients together; 0: no clipping."""


@dataclass(frozen=True)
class AverageConfig:
    swa_enabled: bool = True
    swa_start: float = 0.82
    """Share of the budget after which weights are averaged (step 5,425 of 6,606 in the recipe's log)."""
    swa_snapshots: int = 48
    """Snapshots in the average, evenly spaced (fewer when fewer steps are left)."""


@dataclass(frozen=True)
class QuantConfig:
    qat_enabled: bool = True
    qat_start: float = 0.0
    """Share of the budget after which weights pass through the export grid in the forward pass."""
    mlp_bits: int = 5
    attn_bits: int = 6
    bigram_bits: int = 6
    embed_bits: int = 16
    """Bits of the token embedding; 16: stored as fp16."""
    prune_frac: float = 0.05
    """Share of smallest weights set to zero per tensor, where that can change a code."""
    codec: CODECS = "lzma"


@dataclass(frozen=True)
class ScoreConfig:
    eval_seq_len: int = 4096
    """Tokens in a scoring window."""
    eval_stride: int = 64
    """Targets scored by a window (the first window scores all of its own)."""
    eval_batch_seqs: int = 32
    """Windows in one forward pass on one rank."""
    eval_rope: Literal["ntk", "none"] = "ntk"
    """RoPE beyond the training length: NTK-aware base, or the training base as it is."""
    max_eval_seconds: float = 600.0
    """Most seconds of scoring: a stride that would take longer is raised before anything is scored; 0: no limit."""


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


LOCAL: dict[str, Any] = dict(
    limit_bytes=500_000, data_path="", tokenizer_path="", corpus="embedded", row_order="spread", device="cpu",
    compile="auto", vocab_size=2048, num_layers=2, model_dim=160, num_heads=4, num_kv_heads=2, mlp_mult=2.5,
    bigram_vocab_size=768, bigram_dim=32, train_seq_len=128, max_wallclock_seconds=180.0,
    train_batch_tokens=2048, micro_batch_tokens=2048, warmup_steps=2, warmdown_fraction=0.8, muon_momentum=0.95,
    swa_start=0.94, swa_snapshots=16, val_loss_every=0, train_log_every=100, val_batch_size=16_384, embed_bits=5,
    codec="zstd", eval_seq_len=160, eval_stride=32, eval_batch_seqs=128,
)  # fmt: skip

BASELINE: dict[str, Any] = dict(
    num_layers=9, mlp_mult=2.0, bigram_vocab_size=0, bigram_dim=0, smear_gate=False, resid_mix_init="stream",
    matrix_init="uniform", train_seq_len=1024, train_batch_tokens=524_288, micro_batch_tokens=65_536,
    warmdown_fraction=0.09, warmdown_shape="linear", matrix_lr=0.04, tied_embed_lr=0.05, scalar_lr=0.04,
    muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup_fraction=0.036, muon_weight_decay=0.0,
    embed_weight_decay=0.0, scalar_weight_decay=0.0, grad_clip_norm=0.0, swa_enabled=False, qat_enabled=False,
    mlp_bits=8, attn_bits=8, bigram_bits=8, embed_bits=8, prune_frac=0.0, codec="zlib",
    eval_seq_len=1024, eval_stride=1024, eval_rope="none", val_loss_every=1000, train_log_every=200, seed=1337,
)  # fmt: skip

BASELINE_LOCAL: dict[str, Any] = LOCAL | BASELINE | dict(
    vocab_size=1024, num_layers=3, model_dim=128, train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048,
    val_loss_every=0, train_log_every=100, eval_seq_len=256, eval_stride=256,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "leaderboard": {},
    "local": LOCAL,
    "baseline": BASELINE,
    "baseline-local": BASELINE_LOCAL,
}
"""What each preset changes in the defaults above (which are the leaderboard recipe's)."""

RETIRED_KNOBS = {
    "WARMDOWN_ITERS": "warmdown_fraction (a share of the budget, not a step count)",
    "MUON_MOMENTUM_WARMUP_STEPS": "muon_momentum_warmup_fraction (a share of the budget)",
    "MUON_MOMENTUM_WARMUP_START": "muon_momentum_start",
    "MUON_BACKEND_STEPS": "muon_ns_steps",
    "WEIGHT_DECAY": "muon_weight_decay, embed_weight_decay and scalar_weight_decay",
    "SWA_START_FRAC": "swa_start (a share of the budget, not of the learning rate)",
    "SWA_EVERY": "swa_snapshots",
    "EMBED_LR": "tied_embed_lr (embeddings are tied here)",
    "HEAD_LR": "tied_embed_lr (embeddings are tied here)",
    "TIE_EMBEDDINGS": "nothing: embeddings are tied here",
    "SKIP_ROUNDTRIP_EVAL": "nothing: a run without a measured score is not a run",
    "CONTROL_TENSOR_NAME_PATTERNS": "nothing: vectors train in their own group by shape",
    "FP16_KEEP_NAME_PATTERNS": "embed_bits=16",
}
"""Knobs of the competition's scripts that have no honest counterpart, and what to set instead."""


def iter_knobs(config: Config) -> Iterator[tuple[str, str, type, Any]]:
    """Yield (section, knob, type, value) for every scalar of the tree."""
    for section in fields(config):
        part = getattr(config, section.name)
        for knob in fields(part):
            yield section.name, knob.name, knob.type, getattr(part, knob.name)


KNOBS: dict[str, tuple[str, Any]] = {knob: (section, kind) for section, knob, kind, _ in iter_knobs(Config())}


def parse_value(knob: str, kind: Any, text: str) -> Any:
    """The value of `knob` that `text` spells; booleans are 0, 1, true or false."""
    try:
        if get_origin(kind) is Literal:
            return {choice: choice for choice in get_args(kind)}[text]
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        value = int(text.replace("_", "")) if kind is int else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        wanted = " or ".join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__
        raise ConfigError(f"{knob}={text!r} is not a valid value: it must be {wanted}") from None


def with_knobs(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with some knobs set; values that are text are parsed."""
    changes: dict[str, dict[str, Any]] = {}
    for knob, value in values.items():
        if knob.upper() in RETIRED_KNOBS:
            raise ConfigError(f"{knob} is not a knob here: set {RETIRED_KNOBS[knob.upper()]}")
        if knob not in KNOBS:
            raise ConfigError(f"unknown knob {knob!r}: `python train_gpt.py --help` lists the {len(KNOBS)} that exist")
        section, kind = KNOBS[knob]
        changes.setdefault(section, {})[knob] = parse_value(knob, kind, value) if isinstance(value, str) else value
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


def knobs_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Knobs that environment variables set, retired ones included (so that they are refused by name)."""
    names = {knob.upper(): knob for knob in KNOBS} | {name: name for name in RETIRED_KNOBS}
    return {names[name]: text for name, text in environ.items() if name in names}


def build_config(preset: str, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Config:
    """The resolved configuration: preset, then environment, then overrides. Raises ConfigError."""
    chosen = knobs_of_environment(environ) | dict(overrides)
    preset = chosen.pop("preset", preset)
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if chosen.get("corpus") and chosen.get("data_path"):
        raise ConfigError("corpus and data_path are both set: give the text, or the shards that were made of it")
    if chosen.get("corpus"):  # text of the user's own replaces the preset's shards
        chosen = {"data_path": "", "tokenizer_path": ""} | chosen
    config = with_knobs(with_knobs(Config(), PRESETS[preset] | {"preset": preset}), chosen)
    check_config(config)
    return config


POSITIVE_KNOBS = (
    "num_heads", "num_kv_heads", "model_dim", "mlp_mult", "train_seq_len", "rope_base", "logit_softcap",
    "train_batch_tokens", "micro_batch_tokens", "train_log_every", "val_batch_size", "limit_bytes", "eval_batch_seqs",
)  # fmt: skip


def check_config(config: Config) -> None:
    """Raise ConfigError where values do not fit together, before anything has cost time."""
    for _, knob, _, value in iter_knobs(config):
        if isinstance(value, (int, float)) and (value < 0 or (knob in POSITIVE_KNOBS and value == 0)):
            raise ConfigError(f"{knob}={value} must be {'positive' if knob in POSITIVE_KNOBS else 'at least 0'}")
    model, train, quant, score, average = config.model, config.train, config.quant, config.score, config.average
    short = train.short_seq_len
    rules = [
        (model.model_dim % model.num_heads == 0, "model_dim must be a multiple of num_heads"),
        (model.num_heads % model.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads"),
        (model.model_dim // model.num_heads % 2 == 0, "the head width model_dim / num_heads must be even"),
        (model.num_layers >= 2, "num_layers must be at least 2 (U-Net skips need an encoder and a decoder)"),
        (model.vocab_size <= 65_536, "vocab_size must fit in 16 bits (65,536)"),
        (model.bigram_vocab_size != 1, "bigram_vocab_size must be 0 (off) or at least 2"),
        (model.bigram_vocab_size == 0 or model.bigram_dim > 0, "bigram_dim must be positive"),
        (train.iterations > 0 or train.max_wallclock_seconds > 0, "set iterations or max_wallclock_seconds"),
        (train.train_batch_tokens % model.train_seq_len == 0, "train_batch_tokens must be rows of train_seq_len"),
        (train.micro_batch_tokens >= model.train_seq_len, "micro_batch_tokens must hold one row of train_seq_len"),
        (
            0 < short < model.train_seq_len and model.train_seq_len % short == 0 < train.short_seq_fraction < 1
            if short
            else not train.short_seq_fraction,
            "short_seq_len must be a part of train_seq_len, with a short_seq_fraction between 0 and 1; or both be 0",
        ),
        (0 <= train.warmdown_fraction <= 1, "warmdown_fraction is a share, 0 to 1"),
        (0 <= quant.qat_start < 1, "qat_start is a share, 0 to below 1"),
        (0 <= quant.prune_frac < 1, "prune_frac is a share, 0 to below 1"),
        (all(2 <= bits <= 8 for bits in (quant.mlp_bits, quant.attn_bits, quant.bigram_bits)), "bits must be 2 to 8"),
        (2 <= quant.embed_bits <= 8 or quant.embed_bits == 16, "embed_bits must be 2 to 8, or 16"),
        (0 <= average.swa_start < 1, "swa_start is a share, 0 to below 1"),
        (average.swa_snapshots >= 2 or not average.swa_enabled, "swa_snapshots must be at least 2"),
        (1 <= score.eval_stride <= score.eval_seq_len, "eval_stride must be 1 to eval_seq_len (equal: plain rows)"),
        (
            score.eval_rope == "none" or score.eval_seq_len > model.train_seq_len,
            "eval_rope=ntk acts only where eval_seq_len is beyond train_seq_len: set eval_rope=none",
        ),
        (bool(config.data.data_path) or bool(config.data.corpus), "set data_path, or corpus to prepare data from"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def changed_knobs(config: Config) -> dict[str, Any]:
    """Knobs that differ from the preset's, but for where the data is."""
    preset = with_knobs(Config(), PRESETS[config.run.preset] | {"preset": config.run.preset})
    pairs = zip(iter_knobs(preset), iter_knobs(config), strict=True)
    changed = {knob: value for (_, _, _, before), (_, knob, _, value) in pairs if value != before}
    return {knob: value for knob, value in changed.items() if knob not in ("data_path", "tokenizer_path")}


def config_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionary, for JSON."""
    return asdict(config)


def config_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Inverse of config_dict."""
    return with_knobs(Config(), {knob: value for part in sections.values() for knob, value in part.items()})


def config_hash(config: Config) -> str:
    """SHA-256 (16 hex digits) of all knobs that shape the result: equal for the seeds of one experiment."""
    sections = config_dict(config)
    for knob in ("run_id", "seed", "runs_root", "threads", "checkpoint_seconds", "rehearse"):
        del sections["run"][knob]
    for knob in ("data_path", "tokenizer_path"):  # data has its own identity, whatever folder it is in
        del sections["data"][knob]
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


# ---- golf/artifact/codecs.py -----------------------------------------------------------------------------------------

"""Byte streams <-> fewer bytes: lzma, zstd, zlib, none. Decoding never makes more than the size that was declared.

Quantized weights are close to independent draws, so a codec gains from the symbols' frequencies and loses by
looking for repeats. Hence lzma's literal coder without context bits, and zstd with long minimal matches: the
smallest that were measured on trained codes, zstd 1.5 to 3 % below lzma.
"""

SAMPLE_BYTES = 2**20
"""Codec settings are chosen on this much of a stream: encoding all of it with each would take minutes."""
LZMA_SETTINGS = ((2**12, 0, 0), (2**16, 0, 0), (2**26, 0, 0), (2**16, 3, 2))
"""(dictionary bytes, literal context bits, position bits) that are tried. Repeats in codes are chance: a short
dictionary makes them cheap to name, and is quick; a table whose rows resemble each other wants a long one."""
ZSTD_SETTINGS = ((22, 7), (1, 7), (22, 3))
"""(level, length of the shortest match) that are tried."""
LARGEST_WINDOW = 2**27


class ArtifactError(UserError):
    """Bytes that are not a sound artifact, or weights that cannot become one."""


def encode_lzma(data: bytes, settings: tuple[int, int, int]) -> bytes:
    """LZMA2 without the xz container. It records the context bits itself."""
    dict_size, lc, pb = settings
    options = {"dict_size": min(dict_size, max(len(data), 4096)), "lc": lc, "lp": 0, "pb": pb, "nice_len": 273}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, **options}])


def decode_lzma(data: bytes, size: int) -> bytes:
    """Any dictionary reaches at most to the beginning of the stream, so its size need not be known."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": min(max(size, 4096), LARGEST_WINDOW)}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, max_length=size + 1)


def require_zstandard() -> ModuleType:
    """The zstandard package, or an error: another codec in its place would change the artifact's size unseen."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ArtifactError("codec zstd needs the package zstandard: pip install zstandard, or choose lzma") from None
    return zstandard


def encode_zstd(data: bytes, settings: tuple[int, int]) -> bytes:
    zstandard = require_zstandard()
    level, min_match = settings
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=len(data),
        min_match=min_match,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_checksum=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def decode_zstd(data: bytes, size: int) -> bytes:
    zstandard = require_zstandard()
    decoder = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        with decoder.stream_reader(io.BytesIO(data)) as reader:
            return reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"a zstd stream is damaged: {error}") from None


def encode_zlib(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return encoder.compress(data) + encoder.flush()


def decode_zlib(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


def smallest_encoding(encoders: list[Callable[[bytes], bytes]], data: bytes) -> bytes:
    """`data` by the encoder that is best on its beginning; of equals the first."""
    if len(encoders) > 1 and len(data) > SAMPLE_BYTES:
        encoders = [min(encoders, key=lambda encoder: len(encoder(data[:SAMPLE_BYTES])))]
    return min((encoder(data) for encoder in encoders), key=len)


def compress_stream(codec: str, data: bytes) -> bytes:
    """`data` compressed by `codec`. The same bytes for the same data and library version."""
    if codec == "none":
        return data
    encoders: dict[str, list[Callable[[bytes], bytes]]] = {
        "lzma": [partial(encode_lzma, settings=settings) for settings in LZMA_SETTINGS],
        "zstd": [partial(encode_zstd, settings=settings) for settings in ZSTD_SETTINGS],
        "zlib": [encode_zlib],
    }
    return smallest_encoding(encoders[codec], data)


def decompress_stream(codec: str, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or ArtifactError; memory stays within a few times `size` and the codec's window."""
    decoders = {"lzma": decode_lzma, "zstd": decode_zstd, "zlib": decode_zlib, "none": lambda data, size: data}
    try:
        decoded = decoders[codec](data, size)
    except (lzma.LZMAError, zlib.error, EOFError, MemoryError) as error:
        raise ArtifactError(f"a {codec} stream is damaged: {error}") from None
    if len(decoded) != size:
        raise ArtifactError(f"a {codec} stream does not hold the {size:,} bytes that were declared")
    return decoded


# ---- golf/artifact/frame.py ------------------------------------------------------------------------------------------

"""The outer form of an artifact: magic, version, checksum, codec, fields; and files that are put in place at once.

b"GOLF" | version, 1 byte | SHA-256 of all that follows, 32 bytes | codec, 1 byte | (LEB128 length, bytes) ...
"""

ARTIFACT_MAGIC = b"GOLF"
ARTIFACT_VERSION = 1
DIGEST_START = len(ARTIFACT_MAGIC) + 1
DIGEST_END = DIGEST_START + 32
LARGEST_FILE = 2**30
LONGEST_NUMBER = 5
"""Bytes of a LEB128 number; enough for 2**35."""
CODEC_IDS = {"none": 0, "zlib": 1, "lzma": 2, "zstd": 3}


def encode_number(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set while more follow."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def decode_number(data: bytes, start: int) -> tuple[int, int]:
    """(value, position after it). Raises ArtifactError."""
    value = 0
    for index, digit in enumerate(data[start : start + LONGEST_NUMBER]):
        value |= (digit & 127) << (7 * index)
        if digit < 128:
            return value, start + index + 1
    raise ArtifactError("the artifact is damaged: a length does not end")


def frame_artifact(codec: str, fields: Iterable[bytes]) -> bytes:
    body = bytes([CODEC_IDS[codec]]) + b"".join(encode_number(len(field)) + field for field in fields)
    return ARTIFACT_MAGIC + bytes([ARTIFACT_VERSION]) + hashlib.sha256(body).digest() + body


def unframe_artifact(data: bytes) -> tuple[str, list[bytes]]:
    """(codec, fields) of an artifact whose checksum holds. Raises ArtifactError."""
    if data[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise ArtifactError("not an artifact: it does not begin with GOLF")
    if len(data) <= DIGEST_END:
        raise ArtifactError("the artifact is truncated: it ends within its header")
    if data[DIGEST_START - 1] != ARTIFACT_VERSION:
        raise ArtifactError(f"artifact version {data[DIGEST_START - 1]} is unknown: this reads {ARTIFACT_VERSION}")
    if hashlib.sha256(data[DIGEST_END:]).digest() != data[DIGEST_START:DIGEST_END]:
        raise ArtifactError("the artifact is damaged or truncated: its checksum does not match")
    codecs = {number: name for name, number in CODEC_IDS.items()}
    if data[DIGEST_END] not in codecs:
        raise ArtifactError(f"the artifact has unknown codec {data[DIGEST_END]}")
    fields, position = [], DIGEST_END + 1
    while position < len(data):
        length, position = decode_number(data, position)
        if length > len(data) - position:
            raise ArtifactError("the artifact is truncated: a field is longer than what is left of the file")
        fields.append(data[position : position + length])
        position += length
    return codecs[data[DIGEST_END]], fields


def read_file_bounded(path: Path) -> bytes:
    """All of a file that is no larger than LARGEST_FILE. Raises ArtifactError."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path}: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise ArtifactError(f"{path} is larger than any artifact ({LARGEST_FILE:,} bytes)")
    return data


# ---- golf/quant/grid.py ----------------------------------------------------------------------------------------------

"""The symmetric per-row grid of training and export: one rule, so that the weights that trained are those that ship.

R rows, C columns.
"""

FP16_TINY = 2.0**-14
"""Smallest normal fp16 (6.104e-5): the floor of a row's scale, so that an all-zero row has one too."""
FP16_MAX = 65_504.0


def grid_clip(bits: int) -> int:
    """Largest code of a symmetric grid: 15 for 5 bits, 31 for 6, 127 for 8."""
    assert 2 <= bits <= 8
    return 2 ** (bits - 1) - 1


def grid_codes_and_scale(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers, as fp32) and the fp32 values of the fp16 scales, shape (R, 1).

    scale = fp16(max|row| / clip), within fp16's normal range; code = clamp(round_half_even(w / scale), -clip, clip).
    """
    clip = grid_clip(bits)
    weight_RC = weight_RC.float()
    largest_R1 = weight_RC.abs().amax(dim=1, keepdim=True)
    # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
    scale_R1 = (largest_R1 / torch.full_like(largest_R1, clip)).clamp(FP16_TINY, FP16_MAX).half().float()
    return (weight_RC / scale_R1).round_().clamp_(-clip, clip), scale_R1


def quantize_rows(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes_RC in -clip..clip and fp16 scale_R of a finite matrix."""
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.to(torch.int8), scale_R1.squeeze(1).half()


def dequantize_rows(codes_RC: Tensor, scale_R: Tensor) -> Tensor:
    """fp32 values code * scale."""
    return codes_RC.float() * scale_R.float().unsqueeze(1)


# An operator of its own, which torch.compile calls but does not rewrite: inductor keeps the fp16 rounding of the
# scale in fp32 and approximates the division, and then nearly every value differs from the exported one.
@torch.library.custom_op("golf::fake_quantize_rows", mutates_args=())
def fake_quantize_rows(weight_RC: Tensor, bits: int) -> Tensor:
    """What dequantize_rows(*quantize_rows(weight, bits)) gives, bit for bit, with the gradient of the identity.

    Straight-through estimator: Bengio et al. 2013, arXiv 1308.3432. Works eager and in torch.compile(fullgraph=True).
    """
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.add_(0.0).mul_(scale_R1)  # + 0.0 turns -0.0, which int8 cannot hold, into 0.0


@fake_quantize_rows.register_fake
def fake_quantize_rows_shape(weight_RC: Tensor, bits: int) -> Tensor:
    return torch.empty_like(weight_RC, dtype=torch.float32)


def straight_through(context: object, gradient_RC: Tensor) -> tuple[Tensor, None]:
    return gradient_RC, None


fake_quantize_rows.register_autograd(straight_through)


# ---- golf/quant/policy.py --------------------------------------------------------------------------------------------

"""How many bits a tensor gets: decided by its class, and its class by its name."""

TENSOR_CLASSES = ("embed", "bigram", "attn", "mlp", "small")
FP16_BITS = 16
SMALL_ELEMENTS = 256
"""Matrices with fewer elements are stored as fp16: scales and rounding would cost more than they save."""
CONTROL_NAMES = ("skip_weights", "resid_mix")
"""Stacks of per-dimension vectors: matrices by shape only."""


class QuantError(UserError):
    """A tensor that cannot be put on a grid."""


def tensor_class(name: str, shape: Sequence[int]) -> str:
    """One of TENSOR_CLASSES. Raises QuantError for a matrix of unknown name."""
    if len(shape) < 2 or name.rsplit(".", 1)[-1] in CONTROL_NAMES or prod(shape) < SMALL_ELEMENTS:
        return "small"
    parts = name.split(".")
    if parts[0] == "tok_emb":
        return "embed"
    for part in ("bigram", "attn", "mlp"):
        if part in parts and len(shape) == 2:
            return part
    raise QuantError(f"no quantization rule for tensor {name!r} of shape {tuple(shape)}")


def bits_of(name: str, shape: Sequence[int], quant: QuantConfig) -> int:
    """Bits per weight of a tensor's codes; 16 is fp16 as it is, without a grid."""
    return {
        "embed": quant.embed_bits,
        "bigram": quant.bigram_bits,
        "attn": quant.attn_bits,
        "mlp": quant.mlp_bits,
        "small": FP16_BITS,
    }[tensor_class(name, shape)]


# ---- golf/quant/export.py --------------------------------------------------------------------------------------------

"""A state dict as it is stored: codes and scales for the matrices, fp16 for the rest.

R rows, C columns.
"""

@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    codes_RC: Tensor
    """int8, within the grid of `bits`."""
    scale_R: Tensor
    """fp16."""
    bits: int


QuantizedState = dict[str, QuantizedTensor | Tensor]
"""Stored form of each tensor by name: codes and scales, or an fp16 tensor."""


def check_storable(name: str, tensor: Tensor, bits: int) -> None:
    """Raise QuantError where fp16 weights or scales could not hold what is in `tensor`."""
    if not torch.isfinite(tensor).all():
        raise QuantError(f"tensor {name!r} has NaN or infinite values: the weights are broken, nothing to export")
    limit = FP16_MAX if bits == FP16_BITS else FP16_MAX * grid_clip(bits)
    if tensor.numel() and tensor.abs().max() > limit:
        raise QuantError(f"tensor {name!r} has values beyond {limit:,.0f}, the most that {bits} bits can store")


def quantize_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> QuantizedState:
    """Each tensor in the form that its class gets under `quant`, on the CPU; those in `tensor_bits` with those bits.

    Raises QuantError.
    """
    for name in (tensor_bits or {}).keys() - state.keys():
        raise QuantError(f"tensor_bits names {name!r}, which is no tensor of the model")
    stored: QuantizedState = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().float()
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        check_storable(name, tensor, bits)
        stored[name] = tensor.half() if bits == FP16_BITS else QuantizedTensor(*quantize_rows(tensor, bits), bits)
    return stored


def dequantize_state(stored: QuantizedState) -> dict[str, Tensor]:
    """fp32 weights that `stored` stands for: those of the model that is scored."""
    return {
        name: dequantize_rows(entry.codes_RC, entry.scale_R) if isinstance(entry, QuantizedTensor) else entry.float()
        for name, entry in stored.items()
    }


# ---- golf/artifact/layout.py -----------------------------------------------------------------------------------------

"""Which bytes lie next to which: stored tensors <-> byte streams in which the compressor sees like with like.

Part of format version 1: a change here is a new version. Measured on trained codes (docs/LOG.md): one symbol per
byte; kinds of matrix together, layers one after the other; zigzag (0, -1, 1, -2, ...) symbols; the MLP's output
matrix column by column (its columns, the hidden units, differ more than its rows: 1.7 % of its bytes); fp16 split
into high and low bytes.
"""

COLUMN_MAJOR_ENDING = "mlp.proj.weight"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StreamPlan:
    """One byte stream: what it holds (codes, scales or fp16), of which tensors."""

    role: str
    label: str
    bits: int
    names: tuple[str, ...]
    elements: int

    @property
    def planes(self) -> int:
        """Byte planes, each compressed on its own: codes have one, fp16 has two."""
        return 1 if self.role == "codes" else 2


def stream_label(name: str, bits: int) -> str:
    """Tensors of one label share a stream: by name for matrices on a grid; fp16 ones are the embedding or small."""
    parts = name.split(".")
    if parts[0] == "tok_emb":
        return "embed"
    if bits == FP16_BITS:
        return "small"
    return next((part for part in ("bigram", "attn", "mlp") if part in parts), "other")


def kind_and_layer(name: str) -> tuple[list[str], list[int]]:
    parts = name.split(".")
    return [part for part in parts if not part.isdigit()], [int(part) for part in parts if part.isdigit()]


def plan_streams(shapes: Shapes, bits: Mapping[str, int]) -> list[StreamPlan]:
    """The streams of an artifact, in the order in which they are stored."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(shapes, key=kind_and_layer):
        groups.setdefault((stream_label(name, bits[name]), bits[name]), []).append(name)
    plans = []
    for (label, width), names in sorted(groups.items()):
        role = "fp16" if width == FP16_BITS else "codes"
        plans.append(StreamPlan(role, label, width, tuple(names), sum(prod(shapes[name]) for name in names)))
    scaled = tuple(name for plan in plans if plan.role == "codes" for name in plan.names)
    if scaled:
        plans.append(StreamPlan("scales", "scales", FP16_BITS, scaled, sum(shapes[name][0] for name in scaled)))
    return plans


def stream_planes(plan: StreamPlan, stored: QuantizedState) -> list[bytes]:
    """The bytes of a stream, plane by plane."""
    entries = [stored[name] for name in plan.names]
    if plan.role == "codes":
        return [b"".join(symbols_of(name, stored[name]) for name in plan.names)]
    halves = [entry.scale_R if plan.role == "scales" else entry for entry in entries]
    pairs_N2 = torch.cat([half.flatten() for half in halves]).numpy().astype("<f2").view(np.uint8).reshape(-1, 2)
    return [pairs_N2[:, 1].tobytes(), pairs_N2[:, 0].tobytes()]


def symbols_of(name: str, entry: QuantizedTensor) -> bytes:
    """Codes as unsigned bytes, small magnitudes first: 0, -1, 1, -2, ..."""
    codes_RC = entry.codes_RC.numpy()
    codes_N = (codes_RC.T if name.endswith(COLUMN_MAJOR_ENDING) else codes_RC).reshape(-1).astype(np.int16)
    return ((codes_N << 1) ^ (codes_N >> 15)).astype(np.uint8).tobytes()


def codes_from_symbols(name: str, symbols: bytes, shape: Sequence[int], bits: int) -> Tensor:
    """int8 codes_RC. Raises ArtifactError for a code outside the grid."""
    symbols_N = np.frombuffer(symbols, np.uint8)
    if symbols_N.max(initial=0) > 2 * grid_clip(bits):
        raise ArtifactError(f"tensor {name!r} has codes outside its {bits}-bit grid")
    codes_N = ((symbols_N >> 1) ^ -(symbols_N & 1)).astype(np.int8)
    rows, columns = shape
    codes_RC = (
        codes_N.reshape(columns, rows).T if name.endswith(COLUMN_MAJOR_ENDING) else codes_N.reshape(rows, columns)
    )
    return torch.from_numpy(np.ascontiguousarray(codes_RC))


def halves_from_planes(plan: StreamPlan, planes: Sequence[bytes]) -> Tensor:
    """fp16 values of a stream. Raises ArtifactError for values that are not finite and scales that are too small."""
    high_N, low_N = (np.frombuffer(plane, np.uint8) for plane in planes)
    halves_N = np.stack((low_N, high_N), axis=1).reshape(-1).view("<f2").astype(np.float16)
    sound = np.isfinite(halves_N) & (halves_N >= FP16_TINY if plan.role == "scales" else True)
    if not sound.all():
        raise ArtifactError(f"the {plan.role} of {plan.label} hold values that no sound model has")
    return torch.from_numpy(halves_N)


def split_stream(plan: StreamPlan, planes: Sequence[bytes], shapes: Shapes) -> dict[str, Tensor]:
    """The parts of one stream by tensor name: int8 codes, fp16 scales or fp16 tensors."""
    parts, start = {}, 0
    halves_N = None if plan.role == "codes" else halves_from_planes(plan, planes)
    for name in plan.names:
        shape = shapes[name][:1] if plan.role == "scales" else shapes[name]
        end = start + prod(shape)
        if halves_N is None:
            parts[name] = codes_from_symbols(name, planes[0][start:end], shape, plan.bits)
        else:
            parts[name] = halves_N[start:end].reshape(shape).clone()
        start = end
    return parts


def join_streams(parts: Mapping[str, Mapping[str, Tensor]], shapes: Shapes, bits: Mapping[str, int]) -> QuantizedState:
    """Stored tensors from the parts of all streams (role -> name -> tensor), in the order of `shapes`."""
    return {
        name: parts["fp16"][name]
        if bits[name] == FP16_BITS
        else QuantizedTensor(parts["codes"][name], parts["scales"][name], bits[name])
        for name in shapes
    }


# ---- golf/artifact/settings.py ---------------------------------------------------------------------------------------

"""Configurations out of a file that nobody vouches for: kinds, bounds and sense of every value checked."""

LARGEST_NUMBER = 2**24
MOST_LAYERS = 1024
MAY_BE_ZERO = ("bigram_vocab_size", "bigram_dim", "bos_id")
"""Whole numbers that may be 0; all others are at least 1."""
ADDED_FIELDS = {"document_attention"}
"""Of ModelConfig since version 1: written where they differ from their default, which older artifacts mean."""


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """What `model_from_json` reads."""
    return {k: v for k, v in asdict(model).items() if k not in ADDED_FIELDS or v != getattr(ModelConfig, k)}


def model_from_json(values: object) -> ModelConfig:
    """The model configuration that parsed JSON spells. Raises ArtifactError."""
    model = ModelConfig(**checked_values(ModelConfig, values))
    row = TrainConfig(train_batch_tokens=model.train_seq_len, micro_batch_tokens=model.train_seq_len)
    check_together(Config(model=model, train=row, score=ScoreConfig(eval_rope="none")))
    if model.num_layers > MOST_LAYERS:
        raise ArtifactError(f"num_layers is {model.num_layers}; at most {MOST_LAYERS} can be stored")
    if not 1 <= model.mlp_mult * model.model_dim <= LARGEST_NUMBER or model.rope_base <= 0:
        raise ArtifactError("mlp_mult or rope_base is out of bounds")
    return model


def quant_from_json(values: object) -> QuantConfig:
    """The quantization that parsed JSON spells. Raises ArtifactError."""
    quant = QuantConfig(**checked_values(QuantConfig, values))
    check_together(Config(quant=quant))
    return quant


def checked_values(settings: type, values: object) -> dict[str, Any]:
    """Values for the fields of a dataclass of knobs: all that version 1 has, no unknown ones, each of its kind."""
    names = {field.name for field in fields(settings)}
    if not isinstance(values, Mapping) or not names - ADDED_FIELDS <= set(values) <= names:
        raise ArtifactError(
            f"the entries of {settings.__name__} are not those of this version: {', '.join(sorted(names))}"
        )
    kinds = {field.name: field.type for field in fields(settings)}
    return {name: checked_value(name, kinds[name], value) for name, value in values.items()}


def checked_value(name: str, kind: Any, value: object) -> Any:
    """`value` if it is of the knob's kind and within bounds. Raises ArtifactError."""
    if get_origin(kind) is Literal:
        valid = isinstance(value, str) and value in get_args(kind)
    elif kind is int:
        valid = type(value) is int and (0 if name in MAY_BE_ZERO else 1) <= value <= LARGEST_NUMBER
    elif kind is float:
        valid = type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)
    else:
        valid = type(value) is kind
    if not valid:
        raise ArtifactError(f"{name} is missing or out of bounds in the stored configuration")
    return float(value) if kind is float else value


def check_together(config: Config) -> None:
    try:
        check_config(config)
    except ConfigError as error:
        raise ArtifactError(f"the stored configuration is impossible: {error}") from None


# ---- golf/artifact/shapes.py -----------------------------------------------------------------------------------------

"""Names and shapes of a model's tensors, from its configuration alone."""

def block_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = model.model_dim, int(model.mlp_mult * model.model_dim)
    kv_width = width // model.num_heads * model.num_kv_heads
    return {
        "attn_scale": (width,),
        "mlp_scale": (width,),
        "resid_mix": (2, width),
        "attn.q_gain": (model.num_heads,),
        "attn.c_q.weight": (width, width),
        "attn.c_k.weight": (kv_width, width),
        "attn.c_v.weight": (kv_width, width),
        "attn.proj.weight": (width, width),
        "mlp.fc.weight": (hidden, width),
        "mlp.proj.weight": (width, hidden),
    }


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the state dict of a GPT of this configuration, in the order in which they are stored."""
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (model.vocab_size, model.model_dim)}
    if model.bigram_vocab_size:
        shapes["bigram.embed.weight"] = (model.bigram_vocab_size, model.bigram_dim)
        shapes["bigram.proj.weight"] = (model.model_dim, model.bigram_dim)
        shapes["bigram.scale"] = ()
    if model.smear_gate:
        shapes["smear.gate"] = (model.model_dim,)
    shapes["skip_weights"] = (model.num_layers // 2, model.model_dim)
    for layer in range(model.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model).items()}
    return shapes


# ---- golf/artifact/sizes.py ------------------------------------------------------------------------------------------

"""What an artifact's bytes are spent on."""

@dataclass(frozen=True)
class StreamSize:
    """One stream: codes of a class, all scales, or fp16 tensors."""

    role: str
    label: str
    bits: int
    elements: int
    raw_bytes: int
    """Before compression: one byte a code, two an fp16 value."""
    compressed_bytes: int

    @property
    def bits_per_element(self) -> float:
        return 8 * self.compressed_bytes / self.elements


@dataclass(frozen=True)
class SizeReport:
    """All streams, and the rest (header, description, lengths)."""

    codec: str
    streams: tuple[StreamSize, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Parameters of the model: scales stand for none."""
        return sum(stream.elements for stream in self.streams if stream.role != "scales")

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(stream.compressed_bytes for stream in self.streams)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.weights


def measure_stream(plan: StreamPlan, planes: Sequence[bytes]) -> StreamSize:
    """Sizes of a stream whose compressed planes these are."""
    raw_bytes = plan.elements * plan.planes
    return StreamSize(plan.role, plan.label, plan.bits, plan.elements, raw_bytes, sum(map(len, planes)))


def size_report_dict(report: SizeReport) -> dict:
    """For JSON: the streams and the sums."""
    streams = [asdict(stream) | {"bits_per_element": stream.bits_per_element} for stream in report.streams]
    return {
        "codec": report.codec,
        "streams": streams,
        "weights": report.weights,
        "overhead_bytes": report.overhead_bytes,
        "bits_per_weight": report.bits_per_weight,
        "bytes_model": report.total_bytes,
    }


# ---- golf/runtime.py -------------------------------------------------------------------------------------------------

"""Ranks, device, seeds, clock and log: what a run stands on.

The only module that starts torch.distributed. Everything works the same with one process
(world size 1, no process group) and under torchrun (NCCL on CUDA, gloo on CPU).
"""

class Log:
    """Lines to the terminal and, once a file is attached, flushed one by one to it."""

    def __init__(self, terminal: TextIO | None = None):
        self.terminal = terminal or sys.stdout
        self.file: TextIO | None = None

    def attach(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def error(self, text: str) -> None:
        """A line for people, in the file too."""
        print(text, file=sys.stderr, flush=True)
        if self.file:
            with contextlib.suppress(OSError):  # a full disk may be what the line tells
                print(text, file=self.file, flush=True)

    def line(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)
        if self.file:
            print(text, file=self.file, flush=True)


@dataclass(frozen=True)
class Runtime:
    """Where this process computes, and how it talks to the others."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    log: Log = field(default_factory=Log)
    compiles: bool = False
    """Whether torch.compile is used."""

    @property
    def compiles_scoring(self) -> bool:
        """On a CPU a small stream is scored before its graph is compiled (14 s for a score of 7 s)."""
        return self.compiles and self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Activations are bf16 on CUDA and fp32 on CPU (where bf16 is slower: 0.5 to 0.65 times)."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max_over_ranks(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, in one message."""
        if self.world_size == 1:
            return list(values)
        values_N = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(values_N, op=dist.ReduceOp.MAX)
        return values_N.tolist()

    def barrier(self) -> None:
        self.max_over_ranks(0.0)

    def text_of_main(self, text: str) -> str:
        """The main rank's `text`, on every rank."""
        if self.world_size == 1:
            return text
        data_N = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = int(self.max_over_ranks(len(data_N) if self.is_main else 0)[0])
        data_N = data_N if self.is_main else torch.zeros(size, dtype=torch.uint8, device=self.device)
        dist.broadcast(data_N, src=0)
        return bytes(data_N.tolist()).decode()

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock reading means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def print(self, line: str) -> None:
        """One line to the log (main rank only)."""
        if self.is_main:
            self.log.line(line)


def choose_device(wanted: str) -> torch.device:
    """The device that was asked for; `auto` is CUDA where there is one. Never falls back silently."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("device=cuda was asked for, but torch sees no CUDA device: set device=cpu or mend the driver")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_compile(wanted: str, device: torch.device) -> bool:
    """Whether to use torch.compile, which needs a C++ compiler on the CPU (1.3 to 1.5 times as fast there)."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"  # what inductor builds for the CPU includes it
    possible = device.type == "cuda" or (headers.exists() and any(map(shutil.which, ("c++", "g++", "clang++"))))
    if wanted == "on" and not possible:
        raise ConfigError("compile=on needs a C++ compiler and Python.h: install g++ and python3-dev, or compile=off")
    return wanted != "off" and possible


@contextlib.contextmanager
def start_runtime(run: RunConfig, stage: str, log: Log | None = None) -> Iterator[Runtime]:
    """Set up device, threads, seeds and (under torchrun) the process group of one `stage`.

    Stages of one job share torchrun's key store; the stage's name keeps their keys apart, because a
    process that replaced itself for the next stage must not read addresses that the last one left.
    """
    device = choose_device(run.device)
    compiles = choose_compile(run.compile, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if run.threads:
        torch.set_num_threads(run.threads)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        store, rank, world_size = next(rendezvous("env://", rank, world_size))
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(stage, store)
        # Long enough for the main rank to prepare a corpus while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=2), world_size=world_size, rank=rank, store=store)
    yield Runtime(device, rank, world_size, log or Log(), compiles)
    if world_size > 1:  # not after an error: the others may be waiting for this rank, and torchrun ends them
        dist.destroy_process_group()


def flush_to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes its place once it is on the disk, so that a reader never sees a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)  # the new name
    finally:
        temporary.unlink(missing_ok=True)


def write_file_atomically(path: Path, data: bytes | str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def file_sha256(path: Path) -> str:
    """64 hex digits, in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ProgressLine:
    """One line that rewrites itself on a terminal, at most ten times a second; nothing where there is none."""

    def __init__(self, shown: bool, now=time.monotonic):
        self.shown = shown and sys.stderr.isatty()
        self.now, self.last = now, float("-inf")

    def update(self, text: str) -> None:
        if self.shown and self.now() - self.last > 0.1:
            self.last = self.now()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Stopwatch:
    """A monotonic clock that runs only between start and stop; `now` is injectable for tests."""

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.total = 0.0
        self.started: float | None = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        assert self.started is None
        self.started = self.now()

    def stop(self) -> None:
        assert self.started is not None
        self.total += self.now() - self.started
        self.started = None

    @property
    def seconds(self) -> float:
        return self.total + (self.now() - self.started if self.started is not None else 0.0)


# ---- golf/artifact/container.py --------------------------------------------------------------------------------------

"""The artifact: everything that a fresh process needs to rebuild the quantized model, and nothing that runs.

Fields of the frame (frame.py): the description, then each plane of each stream (layout.py), compressed. The
description is deflated JSON: the model's configuration, the tokenizer's SHA-256 and the bits of each tensor. Names
and shapes follow from the configuration (shapes.py), so they take no bytes.
"""

LARGEST_DESCRIPTION = 2**16
FREE_ELEMENTS = 2**24
ELEMENTS_PER_BYTE = 256
"""A file may declare FREE_ELEMENTS weights, and beyond those so many for each of its bytes: no bomb in a small file."""
STORABLE_BITS = (*range(2, 9), FP16_BITS)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What an artifact holds."""

    model: ModelConfig
    tokenizer_sha256: str
    state: QuantizedState
    codec: str
    sha256: str
    """Of the whole file."""
    byte_count: int


def pack_artifact(
    stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> tuple[bytes, SizeReport]:
    """The artifact's bytes, and what they are spent on. The same input gives the same bytes.

    Raises ArtifactError when the tensors are not those of `model` or the codec's package is missing.
    """
    shapes = expected_shapes(model)
    check_shapes({name: stored_shape(entry) for name, entry in stored.items()}, shapes)
    bits = {name: stored_bits(stored[name]) for name in shapes}
    plans = plan_streams(shapes, bits)
    packed = [[compress_stream(codec, plane) for plane in stream_planes(plan, stored)] for plan in plans]
    description = encode_zlib(describe_artifact(model, tokenizer_sha256, list(bits.values())))
    data = frame_artifact(codec, [description, *(plane for planes in packed for plane in planes)])
    if not same_stored_state(read_artifact(data).state, stored):
        raise ArtifactError(f"packing failed: what codec {codec} gave back is not what it was given")
    sizes = tuple(measure_stream(plan, planes) for plan, planes in zip(plans, packed, strict=True))
    return data, SizeReport(codec, sizes, len(data))


def write_artifact(
    path: Path, stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> SizeReport:
    """Pack, and put the file in place at once. Raises ArtifactError, OSError."""
    data, report = pack_artifact(stored, model, tokenizer_sha256, codec)
    write_file_atomically(path, data)
    return report


def read_artifact(source: Path | str | bytes) -> Artifact:
    """The artifact in a file, or in bytes. Raises ArtifactError, whatever the bytes are; runs nothing from them."""
    if isinstance(source, bytes):
        return parse_artifact(source)
    data = read_file_bounded(Path(source))
    try:
        return parse_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from None


def parse_artifact(data: bytes) -> Artifact:
    codec, fields = unframe_artifact(data)
    model, tokenizer_sha256, bits = parse_description(fields[0] if fields else b"", len(data))
    shapes = expected_shapes(model)
    plans = plan_streams(shapes, bits)
    if len(fields) - 1 != sum(plan.planes for plan in plans):
        raise ArtifactError("the artifact does not have the streams that its model needs")
    remaining = iter(fields[1:])
    parts: dict[str, dict[str, torch.Tensor]] = {"codes": {}, "scales": {}, "fp16": {}}
    for plan in plans:
        planes = [decompress_stream(codec, field, plan.elements) for field in islice(remaining, plan.planes)]
        parts[plan.role] |= split_stream(plan, planes, shapes)
    state = join_streams(parts, shapes, bits)
    return Artifact(model, tokenizer_sha256, state, codec, hashlib.sha256(data).hexdigest(), len(data))


def describe_artifact(model: ModelConfig, tokenizer_sha256: str, bits: list[int]) -> bytes:
    check_sha256(tokenizer_sha256)
    document = {"model": model_to_json(model), "tokenizer": tokenizer_sha256, "bits": bits}
    return json.dumps(document, separators=(",", ":")).encode()


def parse_description(deflated: bytes, file_bytes: int) -> tuple[ModelConfig, str, dict[str, int]]:
    """(model, tokenizer_sha256, bits by tensor name) from untrusted bytes. Raises ArtifactError."""
    document = load_description(deflated)
    if not isinstance(document, dict) or set(document) != {"model", "tokenizer", "bits"}:
        raise ArtifactError("the artifact's description does not have the entries of this version")
    model, bits = model_from_json(document["model"]), document["bits"]
    check_sha256(document["tokenizer"])
    shapes = expected_shapes(model)
    elements = sum(map(prod, shapes.values()))
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * file_bytes:
        raise ArtifactError(f"the artifact declares {elements:,} weights, more than {file_bytes:,} bytes can hold")
    if not isinstance(bits, list) or len(bits) != len(shapes):
        raise ArtifactError("the artifact's list of bits is not that of its model's tensors")
    by_name = dict(zip(shapes, bits, strict=True))
    for name, width in by_name.items():
        if type(width) is not int or width not in STORABLE_BITS or (width != FP16_BITS and len(shapes[name]) != 2):
            raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of bits")
    return model, document["tokenizer"], by_name


def load_description(deflated: bytes) -> object:
    """The JSON document in a bounded deflate stream."""
    try:
        text = decode_zlib(deflated, LARGEST_DESCRIPTION)
        if len(text) > LARGEST_DESCRIPTION:
            raise ArtifactError("the artifact's description is larger than any sound one")
        return json.loads(text)
    except ArtifactError:
        raise
    except (zlib.error, ValueError, RecursionError):
        raise ArtifactError("the artifact's description is damaged") from None


def check_sha256(text: object) -> None:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise ArtifactError("the tokenizer's SHA-256 must be 64 hexadecimal digits")


def stored_shape(entry: QuantizedTensor | torch.Tensor) -> tuple[int, ...]:
    return tuple(entry.codes_RC.shape if isinstance(entry, QuantizedTensor) else entry.shape)


def stored_bits(entry: QuantizedTensor | torch.Tensor) -> int:
    return entry.bits if isinstance(entry, QuantizedTensor) else FP16_BITS


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArtifactError, naming the first tensor, unless the tensors are exactly those expected."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ArtifactError(f"tensor {name!r} is missing: the model's configuration calls for it")
        if tuple(shapes[name]) != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(shapes[name])}, its model calls for {shape}")
    for name in shapes:
        if name not in expected:
            raise ArtifactError(f"tensor {name!r} is not one of the model's")


def same_stored_state(one: QuantizedState, other: QuantizedState) -> bool:
    """Whether all codes, scales and fp16 values are equal."""
    return one.keys() == other.keys() and all(same_entry(one[name], other[name]) for name in one)


def same_entry(one: QuantizedTensor | torch.Tensor, other: QuantizedTensor | torch.Tensor) -> bool:
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        codes_equal = torch.equal(one.codes_RC, other.codes_RC)
        return one.bits == other.bits and codes_equal and torch.equal(one.scale_R, other.scale_R)
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


# ---- golf/quant/prune.py ---------------------------------------------------------------------------------------------

"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626) where it can act: on weights that go to a coarse grid.

On a 5- or 6-bit row grid most of a matrix's smallest weights round to zero anyway; the report says how many
codes the pruning really changed, and a matrix in which it would change none is left as it is. So are tensors
that are stored as fp16: zeros there save next to nothing and cost accuracy.
"""

@dataclass(frozen=True)
class PruneReport:
    """What pruning did to one tensor."""

    name: str
    weights: int
    zeroed: int
    """Weights that were not zero and now are; 0 where pruning was left off because no code would change."""
    codes_changed: int
    """Integer codes of the exported tensor that differ from those without pruning."""


def zero_smallest(weight_RC: Tensor, share: float) -> Tensor:
    """A copy in which the floor(share * elements) weights of smallest magnitude are zero.

    Weights that are zero already count among them; of equal magnitudes the first in row order go first.
    """
    assert 0 <= share < 1
    pruned_N = weight_RC.flatten().clone()
    order_N = torch.argsort(pruned_N.abs(), stable=True)
    pruned_N[order_N[: int(share * pruned_N.numel())]] = 0.0
    return pruned_N.view_as(weight_RC)


def prune_tensor(name: str, weight_RC: Tensor, bits: int, share: float) -> tuple[Tensor, PruneReport]:
    """The pruned matrix, or the matrix as it is where pruning would change none of its codes."""
    pruned_RC = zero_smallest(weight_RC, share)
    codes_changed = int((quantize_rows(weight_RC, bits)[0] != quantize_rows(pruned_RC, bits)[0]).sum())
    if codes_changed == 0:
        pruned_RC = weight_RC
    zeroed = int(((weight_RC != 0) & (pruned_RC == 0)).sum())
    return pruned_RC, PruneReport(name, weight_RC.numel(), zeroed, codes_changed)


def prune_state(
    state: Mapping[str, Tensor], quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], list[PruneReport]]:
    """`state` with prune_frac of each quantized matrix set to zero where that changes codes, and a report of each.

    Tensors in `tensor_bits` get those bits instead of their class's.
    """
    pruned, reports = dict(state), []
    for name, tensor in state.items():
        bits = (tensor_bits or {}).get(name) or bits_of(name, tensor.shape, quant)
        if bits < FP16_BITS and quant.prune_frac > 0:
            pruned[name], report = prune_tensor(name, tensor, bits, quant.prune_frac)
            reports.append(report)
    return pruned, reports


# ---- golf/artifact/fit.py --------------------------------------------------------------------------------------------

"""Fit to the byte limit: coarser weights in a fixed order, and only where the artifact would be over.

First pruning is raised, then matrices lose a bit each, the least sensitive first. Order and bytes follow from the
weights alone. How many actions it takes is found by packing, and what is returned was packed.
"""

PRUNE_SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
PRUNE_SAVES = 0.02  # share of the bytes, about, by each of PRUNE_SHARES: only says where to look first
FEWEST_BITS = 3
GUIDED_PACKINGS = 5  # so many packings follow the expected savings, later ones halve what is left


class FitError(UserError):
    """Weights that no allowed coarsening brings under the limit."""


@dataclass(frozen=True)
class FitAction:
    """One step towards fewer bytes: `value` is the bits that `tensor` gets, or (no tensor) the share that is pruned."""

    tensor: str
    value: float
    text: str
    saves: float


@dataclass(frozen=True, eq=False)
class FittedArtifact:
    data: bytes
    sizes: SizeReport
    stored: QuantizedState
    pruned: dict[str, Tensor]
    """The weights that `stored` was rounded from."""
    prune_reports: list[PruneReport]
    actions: list[str]  # in order; empty where it fitted as configured


def fit_to_limit(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str,
    limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
) -> FittedArtifact:  # fmt: skip
    """The artifact of `state` as configured, where that is within the limit; else by the fewest actions of the order
    that leave `reserve_bytes` free. Raises FitError when all of them together do not."""
    packed = partial(pack_coarsened, state, quant, model, tokenizer_sha256)
    fitted = packed([])
    size, goal = len(fitted.data), limit_bytes_model - reserve_bytes
    if size <= limit_bytes_model:
        return fitted
    log(f"fit: over by {size - limit_bytes_model:,} bytes: {size:,} of {limit_bytes_model:,}; to fit in {goal:,}")
    shares = [quant.prune_frac, *(share for share in PRUNE_SHARES if share > quant.prune_frac)]
    actions = [FitAction("", b, f"prune_frac {a:g} -> {b:g}", PRUNE_SAVES * size) for a, b in pairwise(shares)]
    actions += coarsening_actions(state, quant)
    saved = [0.0, *accumulate(action.saves for action in actions)]
    best, smallest, packings, tried = None, size, 1, 0
    low, high = 0, len(saved)  # `low` actions are too few, `high` are enough (or more than there are)
    while high - low > 1:
        guess = bisect_left(saved, saved[tried] + size - goal) if packings <= GUIDED_PACKINGS else (low + high) // 2
        tried = min(max(guess, low + 1), high - 1)
        candidate = packed(actions[:tried])
        size, packings = len(candidate.data), packings + 1
        smallest = min(smallest, size)
        best, low, high = (candidate, low, tried) if size <= goal else (best, tried, high)
    if best is None:
        raise FitError(
            f"the artifact can't fit in {goal:,} bytes ({limit_bytes_model:,} beside the code, less a reserve of "
            f"{reserve_bytes:,}): {smallest:,} is the smallest that pruning and fewer bits reach; train a smaller model"
        )
    for action in best.actions:
        log(f"fit: {action}")
    log(f"fit: {len(best.data):,} bytes by {len(best.actions)} actions, found in {packings} packings")
    return best


def coarsening_actions(state: Mapping[str, Tensor], quant: QuantConfig) -> list[FitAction]:
    """Every bit that a matrix can lose, by the relative squared error added per code bit saved, smallest first."""
    ranked = []
    for name, tensor in state.items():
        if tensor_class(name, tensor.shape) == "small":
            continue
        widths = [bits_of(name, tensor.shape, quant)]
        widths += range(min(widths[0] - 1, 8), FEWEST_BITS - 1, -1)
        errors, cost = [rounding_error(name, tensor, bits, quant) for bits in widths], 0.0
        for (before, error), (after, larger_error) in pairwise(zip(widths, errors, strict=True)):
            saved_bits = (before - after) * tensor.numel()
            cost = max(cost, (larger_error - error) / saved_bits)  # a tensor loses one bit after the other
            action = FitAction(name, after, f"{name} {before} -> {after} bits", saved_bits / 8)
            ranked.append((cost, len(ranked), action))
    return [action for _, _, action in sorted(ranked)]


def rounding_error(name: str, tensor: Tensor, bits: int, quant: QuantConfig) -> float:
    """Squared difference between a tensor and what `bits` bits store of it, over the tensor's own square."""
    exact = tensor.detach().cpu().double()
    restored = dequantize_state(quantize_state({name: tensor}, quant, {name: bits}))[name]
    return ((restored - exact).square().sum() / exact.square().sum().clamp_min(1e-300)).item()


def pack_coarsened(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str, actions: list[FitAction]
) -> FittedArtifact:
    """`state` pruned, quantized and packed, as configured but for `actions`."""
    bits = {action.tensor: int(action.value) for action in actions if action.tensor}
    shares = [quant.prune_frac, *(action.value for action in actions if not action.tensor)]
    pruned, reports = prune_state(state, replace(quant, prune_frac=shares[-1]), bits)
    stored = quantize_state(pruned, quant, bits)
    packed = pack_artifact(stored, model, tokenizer_sha256, quant.codec)
    return FittedArtifact(*packed, stored, pruned, reports, [action.text for action in actions])


# ---- golf/model/layers.py --------------------------------------------------------------------------------------------

"""The two kinds of weight matrix, and the norm. Both let a quantizer stand between weight and use.

B batch, T time, I input width, O output width, V vocabulary, D model width.
"""

class Matrix(nn.Module):
    """A 2-D fp32 master weight. `fake_quantize`, when set, maps it to the values that export would keep."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    def effective_weight(self) -> Tensor:
        return self.weight if self.fake_quantize is None else self.fake_quantize(self.weight)


class Linear(Matrix):
    """y_BTO = x_BTI W_OI^T, computed in the dtype of x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(out_features, in_features)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return F.linear(x_BTI, self.effective_weight().to(x_BTI.dtype))


class Embedding(Matrix):
    """Rows of a table, fp32."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.effective_weight())


def rms_norm(x_BTD: Tensor) -> Tensor:
    """x / rms(x) over the last axis, with no gain and fp32's epsilon whatever the dtype (the recipe's)."""
    return F.rms_norm(x_BTD, (x_BTD.size(-1),), eps=torch.finfo(torch.float32).eps)


# ---- golf/model/rotary.py --------------------------------------------------------------------------------------------

"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its NTK-aware extension.

B batch, T time, H heads, K head width, F = K/2 frequencies. Tables are fp32 in every path: bf16 has
8 bits of mantissa, so it can't even tell position 256 from 257.
"""

def ntk_rope_base(base: float, length: int, train_length: int, head_dim: int) -> float:
    """The base at which the lowest frequency, at `length`, turns as far as it did at `train_length`.

    base * s^(d / (d - 2)) with s = length / train_length and d = head_dim ("NTK-aware" scaling, bloc97 2023;
    the highest frequency stays as it is). Up to the training length the base is unchanged.
    """
    if length <= train_length:
        return base
    return base * (length / train_length) ** (head_dim / (head_dim - 2))


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos_TF and sin_TF, fp32, of positions 0 .. length-1 at frequencies base^(-2i/d)."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle_TF = torch.outer(torch.arange(length, device=device, dtype=torch.float32), base**-exponent_F)
    return angle_TF.cos(), angle_TF.sin()


def rotate(x_BHTK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of every head by the angle of their position; fp32 inside."""
    first_BHTF, second_BHTF = x_BHTK.float().chunk(2, dim=-1)
    turned = (first_BHTF * cos_TF + second_BHTF * sin_TF, second_BHTF * cos_TF - first_BHTF * sin_TF)
    return torch.cat(turned, dim=-1).to(x_BHTK.dtype)


# ---- golf/model/block.py ---------------------------------------------------------------------------------------------

"""One transformer block: grouped-query attention and a squared-ReLU MLP.

B batch, T time, S last positions of T, D model width, H query heads, G key/value heads, K head width, P = K/2.
A block may be asked for its last S positions only: keys and values come from all of T, the rest is done for S.
"""

def causal_attention(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """y_BHSK: each query attends to the keys up to its own position, the queries being the last S of T.

    With the number of each position's document, to those of its own document only.
    """
    queries, time, heads = q_BHSK.size(2), k_BGTK.size(2), q_BHSK.size(1)
    if queries == time and document_BT is None:
        return F.scaled_dot_product_attention(q_BHSK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    # Kernels that take a mask want as many key heads as query heads.
    k_BHTK, v_BHTK = (part.repeat_interleave(heads // part.size(1), dim=1) for part in (k_BGTK, v_BGTK))
    visible = torch.ones(queries, time, dtype=torch.bool, device=q_BHSK.device).tril(time - queries)
    if document_BT is not None:
        visible = visible & (document_BT[:, None, -queries:, None] == document_BT[:, None, None])
    return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=visible)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.model_dim // config.num_heads
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, *document_BT: Tensor, last: int) -> Tensor:
        """y_BSD of the `last` positions."""
        q_BHSK = rms_norm(self.split_heads(self.c_q(x_BTD[:, -last:])))
        k_BGTK = rms_norm(self.split_heads(self.c_k(x_BTD)))
        v_BGTK = self.split_heads(self.c_v(x_BTD))
        q_BHSK = rotate(q_BHSK, cos_TP[-last:], sin_TP[-last:]) * self.q_gain.to(x_BTD.dtype)[:, None, None]
        y_BHSK = causal_attention(q_BHSK, rotate(k_BGTK, cos_TP, sin_TP), v_BGTK, *document_BT)
        return self.proj(y_BHSK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """proj(relu(fc(x))^2) (So et al. 2021, Primer, arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.mlp_mult * config.model_dim)
        self.fc = Linear(config.model_dim, hidden)
        self.proj = Linear(hidden, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x_BTD)).square())


class Block(nn.Module):
    """Mix the stream with the embedding, then add attention and MLP, each scaled per dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(config.model_dim), torch.zeros(config.model_dim))))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, *tables: Tensor, last: int) -> Tensor:
        """The stream x_BSD of the `last` positions after this block. `tables`: cos_TP, sin_TP, and document_BT where
        attention stays within documents."""
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        attended_BSD = self.attn(rms_norm(x_BTD), *tables, last=last)
        x_BSD = x_BTD[:, -last:] + self.attn_scale.to(x_BTD.dtype) * attended_BSD
        return x_BSD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(rms_norm(x_BSD))


# ---- golf/model/embedding.py -----------------------------------------------------------------------------------------

"""What a position knows of its neighbour before the first block: SmearGate and BigramHash.

B batch, T time, D model width, E bigram width. Neither looks across the start of a document: a BOS has no
predecessor, nor has the first position of a row.
"""

def has_predecessor(ids_BT: Tensor, bos_id: int) -> Tensor:
    """True where the token before belongs to the same document and is in the row."""
    mask_BT = ids_BT != bos_id
    mask_BT[:, 0] = False
    return mask_BT


class SmearGate(nn.Module):
    """Mix each embedding with the one before: e_t + g (e_{t-1} - e_t), g = sigmoid(gate) per dimension.

    Without a predecessor the embedding passes unchanged. Source: parameter-golf PR #65's family.
    """

    def __init__(self, model_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))

    def forward(self, e_BTD: Tensor, has_previous_BT: Tensor) -> Tensor:
        previous_BTD = torch.roll(e_BTD, 1, dims=1)
        gate_BTD = torch.sigmoid(self.gate).to(e_BTD.dtype) * has_previous_BT.unsqueeze(-1)
        return e_BTD + gate_BTD * (previous_BTD - e_BTD)


def bigram_buckets(ids_BT: Tensor, has_previous_BT: Tensor, buckets: int) -> Tensor:
    """Row of the bigram table for (previous token, token): (36313 t XOR 27191 p) mod (buckets - 1).

    The last row stands for "no previous token". int64, so that no vocabulary overflows.
    """
    previous_BT = torch.roll(ids_BT, 1, dims=1)
    hashed_BT = ((36_313 * ids_BT) ^ (27_191 * previous_BT)) % (buckets - 1)
    return torch.where(has_previous_BT, hashed_BT, buckets - 1)


class BigramHash(nn.Module):
    """A hashed table of token pairs, projected to the model width and scaled.

    Source: the 2026-03-20 records of the parameter-golf repository (10 layers, int5 MLP).
    """

    def __init__(self, buckets: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = Embedding(buckets, bigram_dim)
        self.proj = Linear(bigram_dim, model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids_BT: Tensor, has_previous_BT: Tensor, dtype: torch.dtype) -> Tensor:
        e_BTE = self.embed(bigram_buckets(ids_BT, has_previous_BT, self.buckets)).to(dtype)
        return self.proj(e_BTE) * self.scale.to(dtype)


# ---- golf/model/gpt.py -----------------------------------------------------------------------------------------------

"""The network: embeddings, U-Net of blocks, tied head. One forward pass serves every stage of a run.

B batch, T time, S scored positions (the last S of T), D model width, V vocabulary, P = head width / 2.
"""

class GPT(nn.Module):
    """Decoder with U-Net skips: block i of the first half feeds block L-1-i of the second.

    Weights are fp32; activations have `compute_dtype`; logits and losses are fp32.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.tok_emb = Embedding(config.vocab_size, config.model_dim)
        self.bigram = (
            BigramHash(config.bigram_vocab_size, config.bigram_dim, config.model_dim)
            if config.bigram_vocab_size
            else None
        )
        self.smear = SmearGate(config.model_dim) if config.smear_gate else None
        self.encoder_layers = config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, config.model_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def embed(self, ids_BT: Tensor, embedding_VD: Tensor) -> Tensor:
        """What the first block sees: token (+ hashed bigram), normalised, smeared with its predecessor."""
        has_previous_BT = has_predecessor(ids_BT, self.config.bos_id)
        e_BTD = F.embedding(ids_BT, embedding_VD).to(self.compute_dtype)
        if self.bigram is not None:
            e_BTD = e_BTD + self.bigram(ids_BT, has_previous_BT, self.compute_dtype)
        e_BTD = rms_norm(e_BTD)
        return e_BTD if self.smear is None else self.smear(e_BTD, has_previous_BT)

    def tables(self, ids_BT: Tensor, rope_base: float) -> tuple[Tensor, ...]:
        """What attention knows of positions: cos_TP, sin_TP, and document_BT where it stays within documents."""
        config = self.config
        rotary = rotary_tables(ids_BT.size(1), config.model_dim // config.num_heads, rope_base, ids_BT.device)
        return (*rotary, (ids_BT == config.bos_id).cumsum(1)) if config.document_attention else rotary

    def trunk(self, x0_BTD: Tensor, tables: tuple[Tensor, ...], last: int) -> Tensor:
        """x_BSD after all blocks; the stream of encoder block i is added before its decoder twin."""
        time = x0_BTD.size(1)
        x_BTD, skips = x0_BTD, []
        for block in self.blocks[: self.encoder_layers]:
            x_BTD = block(x_BTD, x0_BTD, *tables, last=time)
            skips.append(x_BTD)
        for j, block in enumerate(self.blocks[self.encoder_layers :]):
            if skips:
                x_BTD = x_BTD + self.skip_weights[j].to(x_BTD.dtype) * skips.pop()
            x_BTD = block(x_BTD, x0_BTD, *tables, last=last if block is self.blocks[-1] else time)
        return x_BTD

    def logits(self, ids_BT: Tensor, last: int | None = None, rope_base: float | None = None) -> Tensor:
        """fp32 logits_BSV of the `last` S positions (default: all), soft-capped to +-logit_softcap.

        `rope_base` replaces the model's own base (for rows longer than the training length).
        """
        embedding_VD = self.tok_emb.effective_weight()
        x0_BTD = self.embed(ids_BT, embedding_VD)
        tables = self.tables(ids_BT, rope_base or self.config.rope_base)
        x_BSD = self.trunk(x0_BTD, tables, last or ids_BT.size(1))
        logits_BSV = F.linear(rms_norm(x_BSD), embedding_VD.to(x_BSD.dtype)).float()
        return self.config.logit_softcap * torch.tanh(logits_BSV / self.config.logit_softcap)

    def token_losses(self, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
        """fp32 losses_BS in nats of the last S positions' targets."""
        logits_BSV = self.logits(ids_BT, targets_BS.size(1), rope_base)
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss in nats, the training objective."""
        return self.token_losses(ids_BT, targets_BT).mean()


# ---- golf/artifact/restore.py ----------------------------------------------------------------------------------------

"""From an artifact to the model that is scored."""

def restore_model(artifact: Artifact, runtime: Runtime) -> GPT:
    """The quantized model on the runtime's device, in eval mode, without fake quantization."""
    model = GPT(artifact.model, runtime.compute_dtype)
    model.load_state_dict(dequantize_state(artifact.state))
    return model.to(runtime.device).eval()


# ---- golf/artifact/weights.py ----------------------------------------------------------------------------------------

"""weights.safetensors: fp32 weights as training leaves them, with what packing needs to know as metadata."""

METADATA_ENTRIES = ("model", "quant", "tokenizer_sha256")


@dataclass(frozen=True, eq=False)
class SavedWeights:
    state: dict[str, Tensor]
    model: ModelConfig
    quant: QuantConfig
    tokenizer_sha256: str


def save_weights(
    path: Path, state: Mapping[str, Tensor], model: ModelConfig, quant: QuantConfig, tokenizer_sha256: str
) -> None:
    """Write weights with their metadata, the file put in place at once. Raises ArtifactError, OSError."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected_shapes(model))
    check_sha256(tokenizer_sha256)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    values = (json.dumps(asdict(model)), json.dumps(asdict(quant)), tokenizer_sha256)
    write_file_atomically(path, save(tensors, dict(zip(METADATA_ENTRIES, values, strict=True))))


def load_weights(path: Path) -> SavedWeights:
    """Weights and metadata, checked against the model that they name. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read weights from {path}: {error}") from None
    for entry in METADATA_ENTRIES:
        if entry not in metadata:
            raise ArtifactError(f"{path} has no metadata {entry!r}: it was not written by this project's training")
    model = model_from_json(load_metadata_json(metadata["model"]))
    quant = quant_from_json(load_metadata_json(metadata["quant"]))
    check_sha256(metadata["tokenizer_sha256"])
    shapes = expected_shapes(model)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"tensor {name!r} in {path} has NaN or infinite values")
    return SavedWeights({name: state[name].float() for name in shapes}, model, quant, metadata["tokenizer_sha256"])


def save_quantized(path: Path, stored: QuantizedState) -> None:
    """Write codes, scales and fp16 tensors as they are, the file put in place at once."""
    tensors, bits = {}, {}
    for name, entry in stored.items():
        if isinstance(entry, QuantizedTensor):
            tensors |= {f"{name}:codes": entry.codes_RC.contiguous(), f"{name}:scale": entry.scale_R.contiguous()}
            bits[name] = entry.bits
        else:
            tensors[name] = entry.contiguous()
    write_file_atomically(path, save(tensors, {"bits": json.dumps(bits), "names": json.dumps(list(stored))}))


def load_quantized(path: Path) -> QuantizedState:
    """Inverse of save_quantized. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            bits, names = (json.loads(file.metadata()[key]) for key in ("bits", "names"))
            take = file.get_tensor
            return {
                name: QuantizedTensor(take(f"{name}:codes"), take(f"{name}:scale"), bits[name])
                if name in bits
                else take(name)
                for name in names
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"cannot read quantized weights from {path}: {error}") from None


def load_metadata_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("the metadata of the weights is not JSON") from None


# ---- golf/data/shards.py ---------------------------------------------------------------------------------------------

"""Token files in the competition's format, checked whenever they are opened.

A shard is 256 little-endian int32 (word 0 the magic 20240520, word 1 the version 1, word 2 the token
count, the rest zero) followed by that many little-endian uint16 tokens, and nothing else.
Names end in `_train_%06d.bin` or `_val_%06d.bin`; the sorted names give the order of the stream.
"""

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_WORDS = 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_WORDS
SHARD_NAME = re.compile(r"(?P<dataset>.+)_(?P<split>train|val)_(?P<index>\d{6})\.bin")


class DataError(UserError):
    """Text, tokenizer or token files that can't be used as they are."""


class ShardError(DataError):
    """A shard file that is missing, damaged, or not a shard."""


def shard_token_count(path: Path) -> int:
    """Tokens in the shard, from its header, checked against the size of the file. Raises ShardError."""
    if not path.is_file():
        raise ShardError(f"{path}: no such shard; check the path, or prepare or download it")
    size = path.stat().st_size
    if size == 0:
        raise ShardError(f"{path}: the file is empty (0 bytes); delete it and prepare or download it again")
    if size < SHARD_HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes are less than a header ({SHARD_HEADER_BYTES}); fetch the shard again")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_WORDS)
    magic, version, count = (int(word) for word in header[:3])
    if magic != SHARD_MAGIC:
        raise ShardError(f"{path}: not a token shard (magic {magic}, must be {SHARD_MAGIC}); point to a shard file")
    if version != SHARD_VERSION:
        raise ShardError(f"{path}: shard version {version}, must be {SHARD_VERSION}; prepare the data again")
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        held = (size - SHARD_HEADER_BYTES) / 2
        raise ShardError(
            f"{path}: the header says {count} tokens but the file holds {held:g}; "
            "it is truncated or damaged: delete it and prepare or download it again"
        )
    return count


def read_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard as a read-only memory map, uint16 (N,). Raises ShardError."""
    path = Path(path)
    count = shard_token_count(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def write_shard(path: str | Path, tokens: Sequence[int] | np.ndarray) -> None:
    """Write tokens (N,), each 0 to 65535, as a shard; the name appears only when the file is whole."""
    path, tokens_N = Path(path), np.asarray(tokens)
    if not 1 <= tokens_N.size < 2**31:
        raise ShardError(f"{path}: a shard holds 1 to 2^31 - 1 tokens, not {tokens_N.size}")
    if tokens_N.min() < 0 or tokens_N.max() >= 2**16:
        raise ShardError(f"{path}: token ids must be 0 to 65535; use a tokenizer of at most 65,536 pieces")
    header = np.zeros(SHARD_HEADER_WORDS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens_N.size
    write_file_atomically(path, header.tobytes() + tokens_N.astype("<u2").tobytes())


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in `folder`, sorted. Raises ShardError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(
            f"{folder}: no such folder of shards; set data_path, or see data/README.md (bash run.sh download)"
        )
    names = [SHARD_NAME.fullmatch(path.name) for path in folder.iterdir()]
    matches = [match for match in names if match and match["split"] == split]
    datasets = sorted({match["dataset"] for match in matches})
    if not matches:
        raise ShardError(f"{folder}: no *_{split}_NNNNNN.bin shards there; data/README.md says how to get some")
    if len(datasets) > 1:
        raise ShardError(f"{folder}: shards of several data sets ({', '.join(datasets)}); keep one set in a folder")
    return sorted(folder / match.string for match in matches)


def expand_glob(pattern: str) -> list[Path]:
    """Files that match a shell pattern, sorted. Raises ShardError if there are none."""
    paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern)))
    if not paths:
        raise ShardError(f"no file matches {pattern!r}; check the path (and quote the pattern in the shell)")
    return paths


# ---- golf/model/init.py ----------------------------------------------------------------------------------------------

"""Initial weights: a function of the configuration and the seed alone, the same on every device."""

def build_model(config: ModelConfig, seed: int, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT on the CPU with its initial weights."""
    model = GPT(config, compute_dtype)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.tok_emb.weight, std=config.tied_embed_init_std, generator=generator)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            init_matrix(module.weight, name, config, generator)
    if config.resid_mix_init == "phase":
        init_phase_mix(model)
    return model


def init_matrix(weight_OI: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Orthogonal, the matrices that write into the stream scaled by 1/sqrt(2L) (the stream sums 2L of them);
    or torch's default for Linear with the blocks' output matrices at zero (the baseline's).

    The bigram's projection is never zero: its table is, and zero times zero would have no gradient for ever.
    """
    if config.matrix_init == "orthogonal":
        gain = 1 / math.sqrt(2 * config.num_layers) if name.endswith("proj") else 1.0
        nn.init.orthogonal_(weight_OI, gain=gain, generator=generator)
    elif not name.endswith(("attn.proj", "mlp.proj")):
        bound = 1 / math.sqrt(weight_OI.size(1))
        nn.init.uniform_(weight_OI, -bound, bound, generator=generator)


def init_phase_mix(model: GPT) -> None:
    """resid_mix of block i: sigmoid(3 (i/(L-1) - 1/2)) of the stream, the rest of the embedding."""
    last = model.config.num_layers - 1
    for i, block in enumerate(model.blocks):
        share = torch.sigmoid(torch.tensor(3.0 * (i / last - 0.5)))
        with torch.no_grad():
            block.resid_mix[0].fill_(share)
            block.resid_mix[1].fill_(1 - share)


# ---- golf/run/checkpoint.py ------------------------------------------------------------------------------------------

"""Checkpoints of a training: all that it takes to go on, in safetensors files that appear at once.

Every rank writes its own file, because Muon keeps the momentum of a matrix on one rank; a checkpoint is whole when
the files of all ranks are there. The training waits only while its tensors are copied; a thread writes the copy.
"""

CHECKPOINT_NAME = re.compile(r"step(\d{7})-rank(\d+)of(\d+)\.safetensors")


class CheckpointError(UserError):
    """A checkpoint that can't be read or does not fit."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Tensors by name, and plain numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def generator_tensors() -> dict[str, Tensor]:
    """The states of all random number generators that a run may draw from."""
    states = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states["rng.numpy"] = torch.from_numpy(keys.astype(np.int64))
    states["rng.numpy_rest"] = torch.tensor([position, has_gauss, gauss], dtype=torch.float64)
    states["rng.python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    return states


def restore_generators(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    position, has_gauss, gauss = tensors["rng.numpy_rest"].tolist()
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    random.setstate((3, tuple(tensors["rng.python"].tolist()), None))


def checkpoint_path(folder: Path, step: int, rank: int, world_size: int) -> Path:
    return folder / f"step{step:07d}-rank{rank}of{world_size}.safetensors"


class CheckpointWriter:
    """Writes this rank's part of checkpoints in a thread, and keeps the last two."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        for torn in folder.glob(f".step*-rank{rank}of*.tmp"):  # of a process that was killed
            torn.unlink()

    def write(self, state: TrainingState, step: int) -> Path:
        """Copy the state and leave the writing to the thread, after the write before is done. Raises its OSError."""
        self.wait()
        path = checkpoint_path(self.folder, step, self.rank, self.world_size)
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}
        self.pending = self.thread.submit(self.put, path, tensors, {"numbers": json.dumps(state.numbers)})
        return path

    def put(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)  # which, unlike save, lets the training have Python meanwhile
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None
        whole = newest_checkpoint(self.folder)  # another rank may be behind: what it needs to be whole stays
        for old in checkpoint_files(self.folder, self.rank)[:-2]:
            if whole and old.name < whole[0].name:
                old.unlink()

    def wait(self) -> None:
        """Until nothing is being written. Raises the OSError of a write that failed."""
        if self.pending:
            self.pending.result()
        self.pending = None

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()


def checkpoint_files(folder: Path, rank: int) -> list[Path]:
    """The files of one rank, oldest first."""
    matches = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.glob("step*.safetensors")]
    return [path for match, path in sorted(matches, key=lambda pair: pair[1].name) if match and int(match[2]) == rank]


def newest_checkpoint(folder: Path) -> list[Path]:
    """The files of the newest whole checkpoint, rank 0 first; empty where there is none."""
    for path in reversed(checkpoint_files(folder, rank=0)):
        step, _, world_size = map(int, CHECKPOINT_NAME.fullmatch(path.name).groups())
        files = [checkpoint_path(folder, step, rank, world_size) for rank in range(world_size)]
        if all(file.exists() for file in files):
            return files
    return []


def read_checkpoint(files: list[Path]) -> TrainingState:
    """The state in the files of all ranks; where two have a tensor, the first one's counts. Raises CheckpointError."""
    tensors, numbers = {}, {}
    for path in reversed(files):
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads((file.metadata() or {})["numbers"])
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read ({error}): remove it, and the one before is used") from None
    return TrainingState(tensors, numbers)


# ---- golf/run/witness.py ---------------------------------------------------------------------------------------------

"""Every switched-on feature counts its acts and proves an effect once; one that did not makes the run invalid."""

@dataclass
class Testimony:
    """What one armed feature did. Steps are those of training, None for features that act elsewhere."""

    first: int | None = None
    last: int | None = None
    count: int = 0
    effect: str = ""
    proven: bool = False


def armed_features(config: Config) -> dict[str, str]:
    """The features that are switched on, with what to do about one that never acts."""
    model, train, optim, quant, score = config.model, config.train, config.optim, config.quant, config.score
    longer = "train longer, or "
    armed = {
        "warmdown": (train.warmdown_fraction > 0, longer + "set warmdown_fraction=0"),
        "muon_momentum_warmup": (
            optim.muon_momentum_warmup_fraction > 0 and optim.muon_momentum_start != optim.muon_momentum,
            "set muon_momentum_warmup_fraction=0",
        ),
        "grad_clip": (optim.grad_clip_norm > 0, "lower grad_clip_norm, or set it to 0"),
        "qat": (quant.qat_enabled, longer + "lower qat_start"),
        "swa": (config.average.swa_enabled, longer + "lower swa_start"),
        "smear_gate": (model.smear_gate, "set smear_gate=0"),
        "bigram_hash": (model.bigram_vocab_size > 0, "set bigram_vocab_size=0"),
        "validation": (train.val_loss_every > 0, longer + "set val_loss_every=0"),
        "prune": (quant.prune_frac > 0, "set prune_frac=0, or raise it"),
        "ntk_rope": (score.eval_rope == "ntk", "set eval_rope=none"),
        "document_attention": (model.document_attention, "set document_attention=0"),
        "short_seq": (train.short_seq_len > 0, longer + "set short_seq_len=0 short_seq_fraction=0"),
    }
    return {feature: advice for feature, (is_armed, advice) in armed.items() if is_armed}


class Witness:
    """Testimonies of the armed features. Acts of features that are not armed are a mistake of ours."""

    def __init__(self, config: Config, values: Mapping[str, Mapping[str, Any]] | None = None):
        self.advice = armed_features(config)
        self.testimonies = {feature: Testimony(**(values or {}).get(feature, {})) for feature in self.advice}

    def act(self, feature: str, step: int | None = None, count: int = 1) -> None:
        """`feature` acted `count` times, at `step` of the training."""
        testimony = self.testimonies[feature]
        testimony.count += count
        if step is not None:
            testimony.first = step if testimony.first is None else testimony.first
            testimony.last = step

    def prove(self, feature: str, holds: bool, effect: str) -> None:
        """Whether the effect of `feature` was seen, and what it was."""
        self.testimonies[feature].proven, self.testimonies[feature].effect = bool(holds), effect

    def record(self) -> dict[str, dict[str, Any]]:
        return {feature: asdict(testimony) for feature, testimony in self.testimonies.items()}

    def findings(self) -> list[str]:
        """One line for each feature that was armed and did not act, or acted without effect."""
        findings = []
        for feature, testimony in self.testimonies.items():
            if testimony.count == 0:
                findings.append(f"{feature} was switched on and never acted: {self.advice[feature]}")
            elif not testimony.proven:
                effect = testimony.effect or "no measurement"
                findings.append(f"{feature} acted {testimony.count} times, but its effect was not seen ({effect})")
        return findings


# ---- golf/run/averaging.py -------------------------------------------------------------------------------------------

"""From the last state of a training to the weights that count, and what became of the learned features."""

def final_weights(state: TrainingState, witness: Witness) -> dict[str, Tensor]:
    """The mean of the snapshots where at least two were taken, else the last weights."""
    last, mean = (
        {name.removeprefix(kind): tensor for name, tensor in state.tensors.items() if name.startswith(kind)}
        for kind in ("model.", "average.")
    )
    snapshots = state.numbers["average"][0]
    if snapshots >= 2:
        moved = max((mean[name] - last[name]).abs().max().item() for name in last)
        witness.prove("swa", moved > 0, f"mean of {snapshots} snapshots, at most {moved:.3g} from the last weights")
    return mean if snapshots >= 2 else last


def prove_learned_features(weights: dict[str, Tensor], steps: int, witness: Witness) -> dict[str, Any]:
    """Features that act by what they learn: they act in every step, and their weights must have moved from zero."""
    for feature, name in (("smear_gate", "smear.gate"), ("bigram_hash", "bigram.embed.weight")):
        if name in weights:
            moved = int((weights[name] != 0).sum())
            witness.act(feature, 1)
            witness.act(feature, steps, steps - 1)
            witness.prove(feature, moved > 0, f"{moved} of {weights[name].numel()} weights moved from zero")
    return witness.record()


# ---- golf/run/guard.py -----------------------------------------------------------------------------------------------

"""What a process may touch in the stage that it is in, enforced where Python opens files and sockets (PEP 578)."""

CLOSED_SPLITS = {
    "setup": ("val",),
    "train": ("val",),
    "average": ("val",),
    "quantize": ("val",),
    "pack": ("val", "train"),
    "reload": ("val", "train"),
    "score": ("train",),
}
"""Shards that are closed in a stage: validation before it is scored, training text once calibration is over."""
NETWORK_EVENTS = tuple(f"socket.{call}" for call in ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg"))


class GuardError(UserError):
    """Data or network out of its stage."""


class AccessGuard:
    """Refuses shards and network out of their stage, and keeps what was opened in which stage."""

    def __init__(self) -> None:
        self.stage = "setup"
        self.opened: dict[str, list[str]] = {}

    def watch(self) -> None:
        """From now on, for the life of the process: an audit hook can't be taken away."""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            base = os.path.basename(name).replace("_val_bytes_", "_val_")  # a sidecar tells of the text too
            if match := SHARD_NAME.fullmatch(base):
                self.touch(match["split"], name)
        elif event in NETWORK_EVENTS:
            self.touch("network", f"{event} {arguments[1:]}")

    def touch(self, kind: str, what: str) -> None:
        if kind not in self.opened.setdefault(self.stage, []):
            self.opened[self.stage].append(kind)
        closed = ("network",) if self.stage == "score" else ()
        if kind in (*CLOSED_SPLITS.get(self.stage, ()), *closed):
            raise GuardError(f"{what} in the {self.stage} stage, where {kind} is closed: the run would be void")

    def record(self, earlier: dict[str, list[str]]) -> dict[str, Any]:
        """access.json, from this process and `earlier` ones."""
        stages = earlier | self.opened
        opened = {stage: sorted({*earlier.get(stage, []), *self.opened.get(stage, [])}) for stage in stages}
        before, after = ("setup", "train", "average", "quantize", "pack", "reload"), ("pack", "reload", "score")
        return {
            "watched": True,
            "validation_opened_before_score": any("val" in opened.get(stage, []) for stage in before),
            "training_opened_after_calibration": any("train" in opened.get(stage, []) for stage in after),
            "network_during_scoring": "network" in opened.get("score", []),
            "violations": [],
            "opened": opened,
        }


# ---- golf/run/folder.py ----------------------------------------------------------------------------------------------

"""The folder of a run: runs/<run_id>/, one file per thing that a run leaves behind."""

class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights.safetensors"
        self.training = path / "training.json"
        self.effects = path / "effects.json"
        self.pruning = path / "pruning.json"
        self.quantized = path / "quantized.safetensors"
        self.artifact = path / "model.golf"
        self.packing = path / "packing.json"
        self.parity = path / "parity.json"
        self.code = path / "train_gpt.py"
        self.readable_code = path / "train_gpt_readable.py"
        self.sources = path / "sources.json"
        self.machine = path / "machine.json"
        self.ledger = path / "ledger.jsonl"
        self.access = path / "access.json"
        self.reload = path / "reload.json"
        self.score = path / "score.json"
        self.probes = path / "probes.json"
        self.result = path / "result.json"

    def save_config(self, config: Config) -> None:
        self.save_json(self.config, {"config_hash": config_hash(config)} | config_dict(config))

    def load_config(self) -> Config:
        if not self.config.exists():
            raise ConfigError(f"{self.config} is missing: {self.path} is not the folder of a run")
        try:
            sections = self.load_json(self.config)
        except ValueError:
            raise ConfigError(f"{self.config} is not JSON: it was changed; start a new run") from None
        del sections["config_hash"]
        return config_from_dict(sections)

    def save_json(self, path: Path, content: dict[str, Any]) -> None:
        write_file_atomically(path, json.dumps(content, indent=2) + "\n")

    def load_json(self, path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    def save_access(self, guard: AccessGuard) -> None:
        """Add what this process has opened to what earlier ones did."""
        earlier = self.load_json(self.access)["opened"] if self.access.exists() else {}
        self.save_json(self.access, guard.record(earlier))

    def journal(self, rank: int) -> Path:
        """Where a rank's scoring is journaled."""
        return self.path / f"score-rank{rank}.jsonl"

    def metrics_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a killed process left half-written is none."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def trim_metrics(self, step: int) -> float:
        """Forget rows after `step`, which will be taken again; returns the last clock reading of all rows."""
        rows = self.metrics_rows()
        latest = max((row["elapsed"] for row in rows), default=0.0)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):  # who is killed again before the next row must find the reading
            kept.append({"step": step, "elapsed": latest})
        write_file_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return latest

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def create(self, config: Config) -> None:
        """Make the folder; a run never writes into another's. Raises ConfigError."""
        try:
            self.path.mkdir(parents=True)
            self.checkpoints.mkdir()
        except FileExistsError:
            raise ConfigError(f"{self.path} exists: choose another run_id, or remove the folder") from None
        self.save_config(config)


def choose_run_folder(config: Config, runtime: Runtime) -> RunFolder:
    """The folder of the run id that was asked for, or of preset, UTC time and seed; the same on every rank."""
    run = config.run
    run_id = run.run_id or f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{run.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise ConfigError(f"run_id={run_id!r} can't name a folder: use letters, digits, '.', '_' and '-'")
    return RunFolder(Path(run.runs_root) / runtime.text_of_main(run_id))


# ---- golf/run/code.py ------------------------------------------------------------------------------------------------

"""The code of a run: frozen when it begins, as it would be shipped, and the same whenever it goes on."""

@dataclass(frozen=True)
class Program:
    """The script that runs. A bundle is its own code; else tools/bundle.py, beside the script, makes one."""

    script: Path
    bundled: bool

    def freeze(self, folder: RunFolder) -> None:
        """Write the code that runs, packed, and the readable text that it was packed from. Raises ConfigError."""
        sources = self.sources()
        if self.bundled:
            shutil.copyfile(self.script, folder.code)
        else:
            bundler = self.script.parent / "tools" / "bundle.py"
            command = [sys.executable, bundler, "--pack", "--out", folder.code, "--readable-out", folder.readable_code]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise ConfigError("tools/bundle.py could not bundle the code that is to run; its message stands above")
        folder.save_json(folder.sources, sources)

    def check(self, folder: RunFolder) -> None:
        """Raise ConfigError unless the run in `folder` began with this code."""
        if not folder.sources.exists():
            raise ConfigError(f"{folder.path} was stopped before it began: remove it, and start anew")
        if folder.load_json(folder.sources) != self.sources():
            raise ConfigError(f"the code is not that of {folder.code}: go back to it, or start a new run")

    def sources(self) -> dict[str, str]:
        """SHA-256 of every file that the run's code is made from."""
        root = self.script.parent
        library = [] if self.bundled else [p for p in sorted(root.glob("golf/**/*.py")) if p.parent.name != "submit"]
        return {path.relative_to(root).as_posix(): file_sha256(path) for path in [self.script, *library]}

    def run_tool(self, name: str, *arguments: str | Path) -> int | None:
        """A tool's work is not part of the code that a submission ships; without the tools a run goes without it.

        Returns the tool's exit status; None where there is no tool.
        """
        tool = self.script.parent / "tools" / name
        return subprocess.run([sys.executable, tool, *arguments]).returncode if tool.exists() else None


# ---- golf/run/command.py ---------------------------------------------------------------------------------------------

"""The command line of train_gpt.py: a run to start, to go on with or to score; key=value for every knob."""

@dataclass(frozen=True)
class Command:
    """What to do; `config` is the run's, also of one that is taken up again."""

    config: Config
    resume: Path | None = None
    """Folder of the run to go on with."""
    score: Path | None = None
    """Folder of the run whose artifact is only reloaded and scored."""
    debug: bool = False


def list_knobs() -> str:
    """One line for every knob: name, type, the leaderboard preset's value."""
    lines = []
    for section, knob, kind, value in iter_knobs(Config()):
        name = getattr(kind, "__name__", str(kind).replace("typing.", ""))
        lines.append(f"  {knob:<30} {section:<8} {name:<44} {value!r}")
    return "\n".join(lines)


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """key=value words as a dictionary. Raises ConfigError."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    return dict(word.split("=", 1) for word in words)


def command_parser(default_preset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description="Train, average, quantize, pack, reload in a fresh process, score, report.",
        epilog="knobs (name, section, type, default), as key=value or as upper-case environment variables;\n"
        f"golf/config.py says what each means:\n{list_knobs()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)}; here {default_preset}")
    parser.add_argument("--corpus", help="text to train on: embedded, .txt, .jsonl, .jsonl.xz, or a folder of them")
    parser.add_argument("--resume", metavar="RUN_ID", help="go on with a run from wherever it was (or its folder)")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="only reload and score the artifact of this run")
    parser.add_argument("--plan", action="store_true", help="print what would happen when (tools/plan.py --help)")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def parse_command(arguments: list[str], environ: Mapping[str, str]) -> Command:
    """Read the command line. Raises ConfigError for a knob or a value that does not exist."""
    default_preset = "leaderboard" if torch.cuda.is_available() else "local"
    options = command_parser(default_preset).parse_intermixed_args(arguments)
    overrides = parse_overrides(options.overrides)
    if options.resume or options.score:
        if options.corpus or options.preset or set(overrides) - {"runs_root"}:
            raise ConfigError("a run goes on as it was configured: leave the other arguments out")
        runs_root = Path(overrides.get("runs_root") or knobs_of_environment(environ).get("runs_root", "runs"))
        folder = options.score or next(filter(Path.is_dir, (Path(options.resume), runs_root / options.resume)), None)
        if folder is None:
            raise ConfigError(f"there is no run {options.resume!r} under {runs_root}: name one that is there")
        config = RunFolder(folder).load_config()
        return Command(config, None if options.score else folder, options.score, debug=options.debug)
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides |= {knob: value for knob, value in named.items() if value}
    return Command(build_config(default_preset, environ, overrides), debug=options.debug)


# ---- golf/data/loader.py ---------------------------------------------------------------------------------------------

"""From shards to batches: the batch of a step is a function of the data, the seed and the step alone.

Shape letters: N tokens, B rows, T time.
"""

READ_AHEAD = 2
"""Batches that wait for their step: one is being copied while a slow disk still reads the other."""


class TokenStream:
    """The tokens of several shards, in order, as one endless stream that starts over at its end.

    The last `held_out` tokens are not part of it: they are there to look at a training without validation data.
    """

    def __init__(self, paths: Sequence[str | Path], held_out: int = 0):
        if not paths:
            raise DataError("a token stream needs at least one shard")
        self.shards = [np.asarray(read_shard(path)) for path in paths]  # plain views of the maps: quicker to slice
        self.starts = list(accumulate(map(len, self.shards), initial=0))
        self.held_out = held_out
        if 10 * held_out > self.starts[-1]:
            raise DataError(
                f"{self.starts[-1]} training tokens are too few to hold {held_out} out of them: "
                "set val_loss_every=0, or a smaller val_batch_size"
            )

    def __len__(self) -> int:
        return self.starts[-1] - self.held_out

    def held_out_tokens(self, bos_id: int) -> np.ndarray:
        """The held-out tokens from their first document start on, uint16 (N,). Raises DataError."""
        pairs = zip(self.starts, self.shards, strict=False)
        rest = np.concatenate([shard[max(0, len(self) - start) :] for start, shard in pairs])
        starts = np.flatnonzero(rest[:-1] == bos_id)  # one with a token to score
        if not len(starts):
            raise DataError(f"no document starts in the last {self.held_out} training tokens: set val_loss_every=0")
        return rest[starts[0] :]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
        tokens_N = np.empty(count, dtype=np.int64)
        self.read_into(tokens_N, start)
        return tokens_N

    def read_into(self, tokens_N: np.ndarray, start: int) -> None:
        """Fill `tokens_N` with the endless stream from `start` on."""
        filled = 0
        while filled < len(tokens_N):
            position = (start + filled) % len(self)
            index = bisect_right(self.starts, position) - 1
            offset = position - self.starts[index]
            part = self.shards[index][offset : offset + min(len(tokens_N) - filled, len(self) - position)]
            tokens_N[filled : filled + len(part)] = part
            filled += len(part)


def check_batch_shape(batch_tokens: int, seq_len: int, world_size: int) -> None:
    """Raise DataError unless the batch is whole rows, and the rows can be dealt out equally to the ranks."""
    if batch_tokens % seq_len:
        raise DataError(f"train_batch_tokens={batch_tokens} is not a multiple of train_seq_len={seq_len}")
    rows = batch_tokens // seq_len
    if rows % world_size:
        raise DataError(
            f"{rows} rows of {seq_len} tokens can't be dealt out equally to {world_size} ranks: "
            "change train_batch_tokens or the number of processes"
        )


def spread_start(row: int, stream_tokens: int, seq_len: int) -> int:
    """Where row number `row` (0, 1, 2, ...) of the spread order starts in the stream.

    Rows are visited in strides of about 0.618 of the stream, coprime to their number, so that every row comes once
    per epoch and the rows of a batch come from all over the text (the coprime-stride loader of parameter-golf
    PR #1306). Each epoch cuts the stream at other places.
    """
    rows = (stream_tokens - 1) // seq_len
    stride = next(stride for stride in range(round(0.618 * rows), 2 * rows + 2) if gcd(stride, rows) == 1)
    epoch, index = divmod(row, rows)
    return index * stride % rows * seq_len + epoch * (seq_len // 3 + 1)


def host_batch(
    stream: TokenStream, step: int, batch_tokens: int, seq_len: int, rank: int, world_size: int, order: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`global_batch` on the CPU."""
    check_batch_shape(batch_tokens, seq_len, world_size)
    rows = batch_tokens // seq_len
    own_rows = range(step * rows + rank * rows // world_size, step * rows + (rank + 1) * rows // world_size)
    if order in ("sequential", "shuffled"):
        spans = [stream.tokens(own_rows.start * seq_len, len(own_rows) * seq_len + 1)]
    elif order == "documents":
        spans = [stream.tokens(stream.row_start(row, seq_len), seq_len + 1) for row in own_rows]
    else:
        check_spread_order(stream, seq_len)
        spans = [stream.tokens(spread_start(row, len(stream), seq_len), seq_len + 1) for row in own_rows]
    inputs_N, targets_N = (np.concatenate([span[cut] for span in spans]) for cut in (slice(-1), slice(1, None)))
    return torch.from_numpy(inputs_N).view(-1, seq_len), torch.from_numpy(targets_N).view(-1, seq_len)


def check_spread_order(stream: TokenStream, seq_len: int) -> None:
    if len(stream) <= seq_len:
        raise DataError(f"{len(stream)} training tokens do not fill one row of {seq_len}: shorten train_seq_len")


def global_batch(
    stream: TokenStream,
    step: int,
    batch_tokens: int,
    seq_len: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    order: str = "sequential",
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the global batch of `step`: inputs_BT and targets_BT, int64, on `device`.

    In sequential order (the competition's) the global batch is tokens step * batch_tokens, ...,
    (step + 1) * batch_tokens of the stream, the last one only as a target; in spread order its rows come from all
    over the stream (`spread_start`); the other orders are for a stream of shuffled documents (golf/data/orders.py).
    Rows are dealt out contiguously, so that the ranks' rows, taken together, are
    the same for every world size. Raises DataError where they can't be dealt out equally.
    """
    inputs_BT, targets_BT = host_batch(stream, step, batch_tokens, seq_len, rank, world_size, order)
    return inputs_BT.to(device), targets_BT.to(device)


class BatchPrefetcher:
    """Reads the batches of the next steps in a thread while the current one is in use.

    `get(step)` is `global_batch(stream, step, ...)`, only sooner when steps are asked for in order. On CUDA
    the batch waits in pinned memory, and its copy does not hold up the host.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_tokens: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        order: str = "sequential",
    ):
        check_batch_shape(batch_tokens, seq_len, world_size)
        self.stream, self.shape = stream, (batch_tokens, seq_len, rank, world_size, order)
        self.device = torch.device(device)
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: dict[int, Future] = {}

    def read_ahead(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = host_batch(self.stream, step, *self.shape)
        return tuple(part_BT.pin_memory() for part_BT in batch) if self.device.type == "cuda" else batch

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs_BT and targets_BT of `step`, on the device; starts reading those of the steps after it."""
        steps = range(step, step + 1 + READ_AHEAD)
        self.ahead = {n: self.ahead.get(n) or self.reader.submit(self.read_ahead, n) for n in steps}
        inputs_BT, targets_BT = self.ahead[step].result()
        return inputs_BT.to(self.device, non_blocking=True), targets_BT.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop the thread, after the read in progress."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def validation_tokens(paths: Sequence[str | Path]) -> np.ndarray:
    """All tokens of the shards, in order, uint16 (N,), in memory."""
    if not paths:
        raise DataError("no validation shards were given")
    return np.concatenate([read_shard(path) for path in paths])


# ---- golf/data/tokenizers_plain.py -----------------------------------------------------------------------------------

"""Tokenizers without a model: raw bytes and characters, described by a JSON file.

Ids 0 to 3 are pad, BOS, EOS and unknown (which nothing becomes). Then come the characters, and 256 ids of single bytes
close the vocabulary: they spell what is no character of it, so nothing is lost. Without any character that is the
competition's byte260. A token stands for the same bytes wherever it is: counts are exact by construction.
"""

CONTROL_UNITS, UNKNOWN_ID = [b""] * 4, 3
MOST_CHARACTERS = 2**16 - 260


def text_module(name: str) -> ModuleType:
    """A module of this folder that takes text, not ids: training and scoring do without, and so does the bundle."""
    try:
        return importlib.import_module(f"golf.data.{name}")
    except ModuleNotFoundError as error:
        raise DataError(f"{error}: text takes the whole repository, and requirements-data.txt") from None


class PlainTokenizer:
    """A list of byte strings, one a token; `sha256` of the describing file is its identity."""

    def __init__(self, description: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(description).hexdigest()
        record = parse_tokenizer_file(description, name)
        self.kind = record["kind"]
        self.units, self.bos_id = self.read(record)
        self.vocab_size = len(self.units)

    def read(self, record: dict) -> tuple[list[bytes], int]:
        """(bytes of every token, id of BOS)."""
        characters = record["characters"] if self.kind == "chars" else ""
        try:
            known = [character.encode() for character in characters]
        except UnicodeEncodeError:
            raise DataError(f"{self.name}: half of a surrogate pair is no Unicode text: make the file again") from None
        if len(set(known)) != len(known) or len(known) > MOST_CHARACTERS:
            raise DataError(
                f"{self.name}: must list up to {MOST_CHARACTERS} characters, each once: make the file again"
            )
        self.ids = {character: (id,) for id, character in enumerate(characters, start=len(CONTROL_UNITS))}
        return [*CONTROL_UNITS, *known, *(bytes([value]) for value in range(256))], 1

    def spell(self, character: str) -> tuple[int, ...]:
        """The ids of a character that is not in the vocabulary."""
        return tuple(self.vocab_size - 256 + value for value in character.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""
        if not self.ids:
            return (np.frombuffer(text.encode(), np.uint8).astype(int) + len(CONTROL_UNITS)).tolist()
        return [id for character in text for id in self.ids.get(character) or self.spell(character)]

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents, one after the other whatever `threads` says."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one document; control ids decode to nothing, bytes that are no UTF-8 to U+FFFD."""
        return b"".join(self.units[int(token)] for token in ids).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """unknown_V, boundary_V, inner_V and start_V of ByteTable."""
        bytes_V = np.array([len(unit) for unit in self.units])
        unknown_V = (bytes_V == 0) & (np.arange(self.vocab_size) == UNKNOWN_ID)
        return unknown_V, (bytes_V == 0) & ~unknown_V, bytes_V, bytes_V

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes that each token of a stream stands for."""
        return self.token_bytes[2][np.asarray(ids_N, dtype=np.int64)]


def parse_tokenizer_file(description: bytes, name: str) -> dict:
    """The object in a tokenizer's JSON file. Raises DataError."""
    try:
        record = json.loads(description)
    except ValueError:
        record = None
    needed = {"bytes": (), "chars": ("characters",), "gpt2": ("merges",)}
    kind = str(record.get("kind")) if isinstance(record, dict) else ""
    if kind not in needed or not all(isinstance(record.get(key), str) for key in needed[kind]):
        raise DataError(f"{name}: no tokenizer of kind {', '.join(needed)}: give the file that made the shards")
    return record


def bytes_tokenizer_file() -> bytes:
    """The file of the tokenizer of raw bytes."""
    return json.dumps({"kind": "bytes"}).encode() + b"\n"


def chars_tokenizer_file(texts: Iterable[str]) -> bytes:
    """The file of a tokenizer with the characters of `texts`, by code point. Raises DataError for too many."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if len(characters) > MOST_CHARACTERS:
        raise DataError(f"the text has {len(characters)} characters, 16-bit tokens allow {MOST_CHARACTERS}: use bytes")
    return json.dumps({"kind": "chars", "characters": "".join(sorted(characters))}).encode() + b"\n"


# ---- golf/data/tokenizer.py ------------------------------------------------------------------------------------------

"""Tokenizers, and how many bytes of text each token stands for.

Bits per byte divides by bytes, so they must be exact: over a document, the counts add up to the UTF-8
length of its decoded text. They are not derived from the spelling of the pieces but asked of the processor
itself, once behind another piece and once at the start of a text (where a model that trims blanks drops a
leading one). On the competition's models that is its rule: U+2581 in front is one byte, except after BOS.
The bytes of the other tokenizers' tokens are known as they are.

Shape letters: N tokens, V vocabulary.
"""

BLANK = "\u2581"
"""How SentencePiece writes a blank inside its pieces."""
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"
"""CaseOps' TITLE, ALLCAPS, CAPNEXT and ESC. A model that has them as symbols of its own is made for such text."""


class TextTokenizer(Protocol):
    """What every kind of tokenizer is. A document starts where a token is `bos_id`."""

    kind: str
    """sentencepiece, caseops, bytes, chars or gpt2."""
    name: str
    sha256: str
    """Of its file: its identity."""
    vocab_size: int
    bos_id: int
    token_bytes: tuple[np.ndarray, ...]
    """unknown_V, boundary_V, inner_V and start_V of its ByteTable."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one document (normalised, where the tokenizer does that); control ids decode to nothing."""

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes of text that each token of a stream stands for: over a document, those of its decoded text.

        The first token counts as the start of a document. Raises DataError.
        """


class Tokenizer:
    """A SentencePiece model; one for text in CaseOps (caseops.py) is of that kind, and writes and reads it so."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{name}: not a SentencePiece model; give the .model file that made the shards") from None
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        if self.bos_id < 0:
            raise DataError(f"{name}: the model has no BOS piece, which starts a document; train it with bos_id=1")
        if self.vocab_size > 2**16:
            raise DataError(f"{name}: {self.vocab_size} pieces do not fit 16-bit tokens; use at most 65,536")
        blank_id = self.processor.piece_to_id(BLANK)
        self.blank_id: int | None = None if self.processor.is_unknown(blank_id) else blank_id
        self.swallows_blanks = self.blank_id is not None and self.processor.decode([self.blank_id] * 2) == ""
        self.operators = [self.processor.piece_to_id(operator) for operator in CASE_OPERATORS]
        # a user-defined symbol has the score 0, a learned piece of one character a negative one
        own = [not self.processor.is_unknown(i) and self.processor.get_score(i) == 0 for i in self.operators]
        self.kind = "caseops" if all(own) else "sentencepiece"

    def trim_start(self, ids: list[int]) -> list[int]:
        """Without bare blanks in front, where decoding swallows all of them.

        Only text that starts with a literal U+2581 has them there; without them the bytes of a token
        depend on nothing but the token before it.
        """
        first = 0
        while self.swallows_blanks and first < len(ids) and ids[first] == self.blank_id:
            first += 1
        return ids[first:]

    def transformed(self, text: str) -> str:
        """`text` as the model takes it."""
        return text_module("caseops").encode_caseops(text) if self.kind == "caseops" else text

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, without BOS."""
        return self.trim_start(self.processor.encode(self.transformed(text)))

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many documents."""
        encoded = self.processor.encode([self.transformed(text) for text in texts], num_threads=threads)
        return [self.trim_start(ids) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The (normalised) text of one document; control ids decode to nothing."""
        text = self.processor.decode([int(token) for token in ids])
        return text_module("caseops").decode_caseops(text) if self.kind == "caseops" else text

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """unknown_V, boundary_V, inner_V and start_V of ByteTable. Raises DataError."""
        check_blank_pieces(self)
        processor, ids = self.processor, range(self.vocab_size)
        unknown_V = np.array([processor.is_unknown(i) for i in ids])
        boundary_V = np.array([processor.is_control(i) or processor.is_unused(i) for i in ids])
        byte_V = np.array([processor.is_byte(i) for i in ids])
        plain = [i for i in ids if not (boundary_V[i] or unknown_V[i] or byte_V[i])]
        anchor = next(i for i in plain if BLANK not in processor.id_to_piece(i))
        inner_V, start_V = np.zeros((2, self.vocab_size), dtype=np.int64)
        inner_V[plain] = decoded_bytes(self, [[anchor, i] for i in plain])
        inner_V[plain] -= decoded_bytes(self, [[anchor]])
        start_V[plain] = decoded_bytes(self, [[i] for i in plain])
        # One byte alone is no valid UTF-8 (it decodes to U+FFFD, 3 bytes), but it is one byte of the text.
        inner_V[byte_V] = start_V[byte_V] = 1
        if self.kind == "caseops":
            inner_V[self.operators] = start_V[self.operators] = 0
        return unknown_V, boundary_V, inner_V, start_V

    def target_bytes(self, ids_N: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 bytes that each token of a stream stands for."""
        ids_N = np.asarray(ids_N, dtype=np.int64)
        bytes_N = ByteTable(self).count(np.concatenate([[self.bos_id], ids_N])[:-1], ids_N)
        if self.kind == "caseops":
            bytes_N += len(BLANK.encode()) * text_module("caseops").literal_operators(ids_N, self.operators)
        return bytes_N


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer in a SentencePiece .model file, or in the .json file of one without a model. Raises DataError."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; set tokenizer_path, or prepare the data (data/README.md)")
    data, name = path.read_bytes(), str(path)
    if path.suffix != ".json":
        return Tokenizer(data, name)
    if parse_tokenizer_file(data, name)["kind"] == "gpt2":
        return text_module("tokenizer_gpt2").Gpt2Tokenizer(data, name)
    return PlainTokenizer(data, name)


class ByteTable:
    """Bytes of text that each token stands for, given the token before it.

    inner_V: bytes behind a token of the same document; start_V: bytes at the start of a document;
    boundary_V: control and unused ids, which are no text and end a document; unknown_V: ids without bytes of
    their own. A table of torch tensors (after `to`) counts tensors; a new one counts NumPy arrays.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self.name = tokenizer.name
        self.exact = tokenizer.kind != "caseops"
        """False where the text may hold operators of its own, which the table counts as none: an estimate."""
        self.unknown_V, self.boundary_V, self.inner_V, self.start_V = tokenizer.token_bytes

    def to(self, device: torch.device | str) -> "ByteTable":
        """The same table as torch tensors on `device`."""
        table = object.__new__(ByteTable)
        table.name, table.exact = self.name, self.exact
        for part in ("unknown_V", "boundary_V", "inner_V", "start_V"):
            setattr(table, part, torch.as_tensor(getattr(self, part), device=device))
        return table

    def count(self, previous_N, targets_N):
        """Bytes of each target given the token before it, int64, in the shape of `targets_N`.

        Takes NumPy arrays, or (after `to`) tensors on the table's device; on CUDA the check waits for the
        device. Raises DataError for tokens whose bytes can't be known: see `check`.
        """
        is_tensor = isinstance(self.inner_V, torch.Tensor)
        if is_tensor:
            previous_N, targets_N = previous_N.long(), targets_N.long()
        self.check(targets_N)
        where = torch.where if is_tensor else np.where
        return where(self.boundary_V[previous_N], self.start_V[targets_N], self.inner_V[targets_N])

    def check(self, tokens_N) -> None:
        """Raise DataError if there are unknown pieces among the tokens, or ids outside of the vocabulary."""
        if bool((tokens_N >= len(self.unknown_V)).any()):
            raise DataError(
                f"token {int(tokens_N.max())} is outside of the {len(self.unknown_V)} pieces of {self.name}: "
                "the shards were made with another tokenizer"
            )
        if bool(self.unknown_V[tokens_N].any()):
            raise DataError(
                f"the text holds unknown pieces of {self.name}, so its bytes can't be counted: "
                "use a tokenizer with byte_fallback, and the one that made the shards"
            )


def decoded_bytes(tokenizer: Tokenizer, sequences: list[list[int]]) -> list[int]:
    """UTF-8 length of each decoded sequence."""
    return [len(text.encode()) for text in tokenizer.processor.decode(sequences)]


def check_blank_pieces(tokenizer: Tokenizer) -> None:
    """Raise DataError for a model that writes a blank as three byte pieces (those of U+2581).

    One blank would count as 3 bytes, and bits per byte come out too low (the competition's issue #897).
    """
    processor = tokenizer.processor
    ids = processor.encode("a 1  a")
    spelled = "".join(processor.id_to_piece(i) for i in ids)
    if "<0xE2><0x96><0x81>" in spelled:
        raise DataError(
            f"{tokenizer.name}: the model has no piece for a single blank and writes it as 3 byte pieces, so bytes "
            "can't be counted: train the tokenizer again with U+2581 among its pieces"
        )


def check_byte_counts(
    tokenizer: TextTokenizer, counter: "ByteTable | Sequence[int] | np.ndarray", ids: Sequence[int] | np.ndarray
) -> int:
    """Bytes of the stream `ids` by a table, or by the bytes of each of its tokens.

    Raises DataError unless every document decodes to as many. A document is what stands between control ids. The
    first token counts as the start of a document.
    """
    ids_N = np.concatenate([[tokenizer.bos_id], np.asarray(ids, dtype=np.int64)])
    is_table = isinstance(counter, ByteTable)
    counts_N = counter.count(ids_N[:-1], ids_N[1:]) if is_table else np.asarray(counter, dtype=np.int64)
    assert len(counts_N) == len(ids_N) - 1, f"bytes of {len(counts_N)} tokens, not {len(ids_N) - 1}"
    counts_N = np.concatenate([[0], counts_N])
    boundary_V = tokenizer.token_bytes[1]
    edges = [*np.flatnonzero(boundary_V[ids_N]), len(ids_N)]
    source = f"the byte table of {tokenizer.name} counts" if is_table else "its tokens' own counts say"
    for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        text_bytes = len(tokenizer.decode(ids_N[start + 1 : end]).encode())
        counted = int(counts_N[start:end].sum())
        if counted != text_bytes:
            raise DataError(f"document {number}: {source} {counted} bytes, but the decoded text has {text_bytes}")
    return int(counts_N.sum())


# ---- golf/data/manifest.py -------------------------------------------------------------------------------------------

"""What a folder of shards says about itself, and the id of its data that runs record."""

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
FINGERPRINT_BYTES = 4096
"""Bytes read from each end of a shard that no manifest vouches for."""


@dataclass(frozen=True)
class PreparedData:
    """A whole folder of shards with its tokenizer; `manifest` is the content of manifest.json."""

    folder: Path
    manifest: dict

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest["tokenizer"].get("file", TOKENIZER_NAME)

    @property
    def data_id(self) -> str:
        return self.manifest["data_id"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]


def load_prepared(folder: str | Path) -> PreparedData:
    """The prepared data in `folder`, its files' sizes checked against the manifest. Raises DataError."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder}: no prepared data there (no {MANIFEST_NAME}); prepare it (data/README.md)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a manifest of prepared data; delete the folder and prepare it again") from None
    for name, size in sizes.items():
        held = (folder / name).stat().st_size if (folder / name).is_file() else None
        if held != size:
            state = "is missing" if held is None else f"has {held} bytes, not {size}"
            raise DataError(f"{folder / name}: {state}; delete the folder and prepare it again")
    return PreparedData(folder, manifest)


def data_identity(folder: str | Path, tokenizer: Tokenizer) -> str:
    """The data id that runs record: 16 hex digits.

    A prepared folder has it in its manifest. For any other folder of shards it is a hash over the tokenizer
    and, of each training shard, name, size, and first and last 4 KiB (the header among them): quick on 10 billion
    tokens, and different for anything but deliberate changes; validation shards stay closed. Raises DataError,
    also when the tokenizer is not the one that made a prepared folder.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).is_file():
        prepared = load_prepared(folder)
        if prepared.manifest["tokenizer"]["sha256"] != tokenizer.sha256:
            raise DataError(f"{folder} was not made with {tokenizer.name}; use {prepared.tokenizer_path}")
        return prepared.data_id
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for path in find_shards(folder, "train"):
        size = SHARD_HEADER_BYTES + 2 * shard_token_count(path)
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


# ---- golf/run/datasets.py --------------------------------------------------------------------------------------------

"""The data of a run: training stream, validation tokens, tokenizer, and their identity."""

@dataclass(frozen=True)
class TrainingData:
    stream: TokenStream
    shards: int
    tokenizer: Tokenizer
    data_id: str


def locate_data(config: Config, runtime: Runtime, root: Path) -> Config:
    """`config` with data_path and tokenizer_path filled in; prepares shards from `corpus` where they are missing.

    Preparation is a program of its own (data/prepare.py beside the training script): it is not part of the
    code that a submission ships.
    """
    if config.data.data_path:
        return with_tokenizer_path(config)
    prepared = prepare_corpus_data(config, root) if runtime.is_main else ""
    folder = Path(runtime.text_of_main(prepared))
    if str(folder).startswith("!"):
        raise ConfigError(str(folder)[1:])
    return replace(
        config, data=replace(config.data, data_path=str(folder), tokenizer_path=str(tokenizer_beside(folder)))
    )


def with_tokenizer_path(config: Config) -> Config:
    """`config` with the tokenizer that lies beside the shards, where none is named. Raises ConfigError."""
    if config.data.tokenizer_path:
        return config
    return replace(config, data=replace(config.data, tokenizer_path=str(tokenizer_beside(Path(config.data.data_path)))))


def tokenizer_beside(folder: Path) -> Path:
    """The tokenizer that preparation left beside the shards. Raises ConfigError."""
    found = [path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).exists()]
    if not found:
        raise ConfigError(f"tokenizer_path is not set, and {folder} has no tokenizer.model: name the shards' tokenizer")
    return found[0]


def prepare_corpus_data(config: Config, root: Path) -> str:
    """Folder of the prepared corpus; "!" and a message when preparation failed (so that all ranks hear of it)."""
    program = root / "data" / "prepare.py"
    if not program.exists():
        return f"!{program} is missing: set data_path and tokenizer_path to prepared shards and their tokenizer"
    command = [sys.executable, str(program), "--input", config.data.corpus, "--json"]
    command += ["--tokenizer", config.data.tokenizer_path or f"train:{config.model.vocab_size}"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        return f"!data/prepare.py failed (exit status {finished.returncode}); its message stands above"
    return json.loads(finished.stdout)["folder"]


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != config.model.vocab_size or tokenizer.bos_id != config.model.bos_id:
        raise ConfigError(
            f"{config.data.tokenizer_path} has {tokenizer.vocab_size} pieces and BOS {tokenizer.bos_id}; the model has "
            f"vocab_size={config.model.vocab_size} and bos_id={config.model.bos_id}: "
            f"run with vocab_size={tokenizer.vocab_size} bos_id={tokenizer.bos_id}, or name the right tokenizer"
        )


def open_training_data(config: Config) -> TrainingData:
    """Map the training shards and load the tokenizer. Raises DataError or ConfigError."""
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    check_vocabulary(config, tokenizer)
    shards = find_shards(config.data.data_path, "train")
    held_out = config.train.val_batch_size if config.train.val_loss_every else 0
    stream = TokenStream(shards, held_out)
    if held_out:
        stream.held_out_tokens(config.model.bos_id)  # so that it fails now, and not after hours
    return TrainingData(stream, len(shards), tokenizer, data_identity(config.data.data_path, tokenizer))


# ---- golf/run/interruption.py ----------------------------------------------------------------------------------------

"""SIGTERM and SIGINT ask a run to stop; it stops at the next safe place, and can go on later."""

GRACE_SECONDS = 20.0
"""How long a process of several waits for the others before it leaves: a lost one would hold it in a collective."""


class Interrupted(UserError):
    """The run was asked to stop; nothing is lost."""


class Interruption:
    """Whether a stop was asked for. A second signal acts at once; of several processes, none leaves before its grace is
    over (the launcher passes on a signal that they got already, while their checkpoints are being written)."""

    def __init__(self) -> None:
        self.signal, self.world_size = 0, 1

    def watch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, number
        if self.world_size == 1:
            signal.signal(number, signal.SIG_DFL)
        elif first:
            leave = threading.Timer(GRACE_SECONDS, os._exit, [EXIT_INTERRUPTED])
            leave.daemon = True
            leave.start()

    @property
    def requested(self) -> bool:
        return self.signal > 0

    def check(self, where: str) -> None:
        """Raise Interrupted where a stop was asked for."""
        if self.requested:
            sys.stdout.flush()
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name} {where}")


# ---- golf/data/orders.py ---------------------------------------------------------------------------------------------

"""Documents in an order that every epoch draws anew from the seed.

Shape letters: N tokens, D documents.
"""

def order_stream(stream: TokenStream, row_order: str, bos_id: int, seed: int) -> "TokenStream | ShuffledDocuments":
    """The stream that rows in `row_order` are cut from."""
    return ShuffledDocuments(stream, bos_id, seed) if row_order in ("shuffled", "documents") else stream


def document_starts(stream: TokenStream, bos_id: int) -> np.ndarray:
    """Where documents start in the stream, int64 (D,); its first token counts as a start, whatever it is."""
    shards = zip(stream.starts, stream.shards, strict=False)
    starts_D = np.unique(np.concatenate([[0], *(begin + np.flatnonzero(shard == bos_id) for begin, shard in shards)]))
    return starts_D[starts_D < len(stream)]


class ShuffledDocuments:
    """The documents of a stream, over and over, in another order in each epoch: a TokenStream of them.

    The order is that of random numbers of (seed, epoch), as Philox gives them: NumPy keeps those the same for ever.
    """

    def __init__(self, stream: TokenStream, bos_id: int, seed: int):
        self.stream, self.seed = stream, seed
        self.starts_D = document_starts(stream, bos_id)
        if len(self.starts_D) < 2:
            raise DataError("there are no two documents to shuffle in the training shards: set row_order=spread")
        self.latest: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.stream)

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(where in the stream each document of the epoch comes from, where in the epoch it begins); int64 (D,), and
        (D + 1,) with the end of the epoch."""
        latest = self.latest
        if latest is None or latest[0] != epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            order_D = np.argsort(np.random.Philox(key=key).random_raw(len(self.starts_D)), kind="stable")
            lengths_D = np.diff(self.starts_D, append=len(self))[order_D]
            latest = self.latest = epoch, self.starts_D[order_D], np.concatenate([[0], np.cumsum(lengths_D)])
        return latest[1:]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
        tokens_N = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, position = divmod(start + filled, len(self))
            sources_D, begins_D = self.layout(epoch)
            first, last = np.searchsorted(begins_D, (position + 1, position + count - filled)) - (1, 0)
            bounds = pairwise(begins_D[first : last + 1].tolist())
            for source, (begin, end) in zip(sources_D[first:last].tolist(), bounds, strict=True):
                skipped = max(0, position - begin)
                part_N = tokens_N[filled : filled + end - begin - skipped]
                self.stream.read_into(part_N, source + skipped)
                filled += len(part_N)
        return tokens_N

    def row_start(self, row: int, seq_len: int) -> int:
        """Where row number `row` starts that is to begin as a document does: at the first one from row * seq_len on.

        Where that is a whole row away, in a document of several rows, the row stays. So ends of documents are left out
        of an epoch and beginnings are in two rows (14 % of the tokens each, with lengths as in FineWeb and rows of
        2,048); the next epoch cuts at other places.
        """
        epoch, position = divmod(row * seq_len, len(self))
        begins_D = self.layout(epoch)[1]
        ahead = int(begins_D[np.searchsorted(begins_D, position)]) - position
        return row * seq_len + (ahead if ahead < seq_len else 0)


# ---- golf/optim/average.py -------------------------------------------------------------------------------------------

"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407) over the last part of the budget."""

class WeightAverage:
    """The running mean of evenly spaced snapshots, accumulated in fp32 whatever the dtype of the weights.

    Snapshots fall due at progress start + (1 - start) k / n for k = 1 .. n, so that the last weights count too.
    """

    def __init__(self, config: AverageConfig):
        self.enabled, self.start, self.snapshots = config.swa_enabled, config.swa_start, config.swa_snapshots
        self.count = 0
        self.slots_used = 0
        self.mean: dict[str, Tensor] = {}

    def slots_due(self, progress: float) -> int:
        return int((progress - self.start) / (1 - self.start) * self.snapshots + 1e-9)

    @torch.no_grad()
    def observe(self, model: nn.Module, progress: float) -> bool:
        """Take a snapshot if one is due; True if it was taken (slots missed between two steps count as one)."""
        if not self.enabled or self.slots_due(progress) <= self.slots_used:
            return False
        self.slots_used = self.slots_due(progress)
        self.count += 1
        for name, weight in model.state_dict().items():
            if name not in self.mean:
                self.mean[name] = weight.detach().float().clone()
            else:
                self.mean[name].lerp_(weight.detach().float(), 1 / self.count)
        return True


# ---- golf/optim/muon.py ----------------------------------------------------------------------------------------------

"""Muon: momentum, then the nearest (semi-)orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

M matrices of a shape, R rows, C columns. Matrices of one shape are handled as one stack, so that the
Newton-Schulz iteration is a few large batched products; under torchrun each rank iterates on its share.
"""

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(update_MRC: Tensor, steps: int) -> Tensor:
    """Drive all singular values of every matrix towards 1 (into about 0.7 to 1.2) with a quintic iteration.

    Computed in the dtype of `update_MRC`: bf16 on CUDA, where it is fastest, fp32 on CPU, where bf16 is slower.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = update_MRC.size(-2) > update_MRC.size(-1)
    x_MRC = update_MRC.mT if tall else update_MRC
    x_MRC = x_MRC / (x_MRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = b * gram_MRR + c * (gram_MRR @ gram_MRR)
        x_MRC = a * x_MRC + polynomial_MRR @ x_MRC
    return x_MRC.mT if tall else x_MRC


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr sqrt(max(1, R/C)) NewtonSchulz(Nesterov momentum of the gradient).

    Gradients must be averaged over ranks already. `momentum` may be changed between steps.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        ns_steps: int,
        rank: int = 0,
        world_size: int = 1,
        orthogonalize: Callable[[Tensor, int], Tensor] = newton_schulz,
    ):
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        super().__init__([{"params": stack} for stack in by_shape.values()], defaults)
        self.rank, self.world_size, self.orthogonalize = rank, world_size, orthogonalize

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            updates = self.gather_updates(self.own_updates(group), len(group["params"]))
            rows, columns = group["params"][0].shape
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], updates, alpha=-group["lr"] * scale)

    def own_updates(self, group: dict) -> Tensor:
        """Orthogonalised updates_MRC of this rank's matrices: every world_size-th, from `rank` on."""
        own, first = group["params"][self.rank :: self.world_size], group["params"][0]
        dtype = torch.bfloat16 if first.is_cuda else torch.float32  # of every rank's message, empty ones too
        if not own:
            return first.new_empty(0, *first.shape, dtype=dtype)
        gradients = [matrix.grad for matrix in own]
        for matrix in own:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum"] for matrix in own]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        nesterov_MRC = torch.stack(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
        return self.orthogonalize(nesterov_MRC.to(dtype), group["ns_steps"])

    def gather_updates(self, own_MRC: Tensor, count: int) -> list[Tensor]:
        """The updates of all `count` matrices, in their order, as fp32."""
        if self.world_size == 1:
            return list(own_MRC.float())
        share = -(-count // self.world_size)
        padded_MRC = own_MRC.new_zeros(share, *own_MRC.shape[1:])
        padded_MRC[: own_MRC.size(0)] = own_MRC
        everyone_MRC = own_MRC.new_empty(self.world_size * share, *own_MRC.shape[1:])
        dist.all_gather_single(everyone_MRC, padded_MRC)
        return [everyone_MRC[i % self.world_size * share + i // self.world_size].float() for i in range(count)]


# ---- golf/optim/groups.py --------------------------------------------------------------------------------------------

"""Which parameter learns by which rule: matrices by Muon, tables and vectors by AdamW."""

def split_parameters(model: GPT) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices of Linear layers, embedding tables, everything smaller), each in the order of the model."""
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight"):
            tables.append(parameter)
        elif name.endswith(".weight"):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return matrices, tables, vectors


class Optimizers:
    """The optimizers of a model under one learning-rate scale and one gradient clip."""

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        matrices, tables, vectors = split_parameters(model)
        compile_muon = runtime.compiles and runtime.device.type == "cuda"  # five shapes take a minute on a CPU
        adam = dict(betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.muon = Muon(
            matrices,
            config.matrix_lr,
            config.muon_momentum_start,
            config.muon_weight_decay,
            config.muon_ns_steps,
            runtime.rank,
            runtime.world_size,
            torch.compile(newton_schulz, dynamic=False, fullgraph=True) if compile_muon else newton_schulz,
        )
        self.all = [
            torch.optim.AdamW(tables, lr=config.tied_embed_lr, weight_decay=config.embed_weight_decay, **adam),
            self.muon,
            torch.optim.AdamW(vectors, lr=config.scalar_lr, weight_decay=config.scalar_weight_decay, **adam),
        ]
        self.parameters = [*tables, *matrices, *vectors]
        self.base_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]
        self.clip_norm = config.grad_clip_norm

    def step(self, lr_scale: float, muon_momentum: float) -> Tensor | None:
        """Clip, update every parameter, forget the gradients; returns their norm where it is clipped."""
        for optimizer, base in zip(self.all, self.base_lr, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = muon_momentum
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm) if self.clip_norm > 0 else None
        for optimizer in self.all:
            optimizer.step()
        self.zero_grad()
        return norm

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """All state by optimizer.<parameter>.<entry>; of Muon, what this rank holds."""
        states = [state for optimizer in self.all for state in optimizer.state.items()]
        return {f"optimizer.{names[p]}.{entry}": value for p, values in states for entry, value in values.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor], names: dict[Tensor, str]) -> None:
        """Inverse of state_tensors; entries of every rank may be among them."""
        for optimizer in self.all:
            groups = [group["params"] for group in optimizer.param_groups]
            if optimizer is self.muon:  # momentum of another rank's matrix would grow old here, and be saved again
                groups = [matrices[self.muon.rank :: self.muon.world_size] for matrices in groups]
            for parameter in (p for group in groups for p in group):
                start = f"optimizer.{names[parameter]}."
                own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                optimizer.state[parameter].update({key: value.to(parameter.device) for key, value in own.items()})

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: list[Tensor], world_size: int) -> None:
    """Replace every gradient by its mean over ranks, in one fp32 message."""
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size)
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# ---- golf/optim/schedule.py ------------------------------------------------------------------------------------------

"""What changes during training, as functions of progress: the share of the binding budget that is used up."""

@dataclass(frozen=True)
class Budget:
    """At most `iterations` steps and `seconds` seconds; 0 means no limit of that kind."""

    iterations: int
    seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """Share used up after `step` steps and `elapsed` seconds, of whichever limit is nearer."""
        by_steps = step / self.iterations if self.iterations else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def exhausted(self, step: int, elapsed: float, step_seconds: float) -> bool:
        """True when one more step, at the measured time of a step, would go past a limit."""
        out_of_steps = self.iterations > 0 and step >= self.iterations
        return out_of_steps or (self.seconds > 0 and elapsed + step_seconds > self.seconds)


def learning_rate_scale(progress: float, config: TrainConfig) -> float:
    """1, then down to 0 over the last `warmdown_fraction` of the budget: 0.5 (1 + cos(pi t)) or 1 - t."""
    if progress < 1 - config.warmdown_fraction or config.warmdown_fraction == 0:
        return 1.0
    t = (progress - (1 - config.warmdown_fraction)) / config.warmdown_fraction
    return 0.5 * (1 + math.cos(math.pi * t)) if config.warmdown_shape == "cosine" else 1 - t


def muon_momentum(progress: float, config: OptimConfig) -> float:
    """Linear from `muon_momentum_start` to `muon_momentum` over `muon_momentum_warmup_fraction` of the budget."""
    warmup = config.muon_momentum_warmup_fraction
    share = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


# ---- golf/quant/qat.py -----------------------------------------------------------------------------------------------

"""Quantization-aware training: put the export grid between a matrix and its use, or take it away again."""

class FakeQuantizable(Protocol):
    """A module that uses `weight` through `fake_quantize` when that is set."""

    weight: nn.Parameter
    fake_quantize: Callable[[Tensor], Tensor] | None


def fake_quantizable_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantizable]]:
    for path, module in model.named_modules():
        if hasattr(module, "fake_quantize"):
            yield path, cast(FakeQuantizable, module)


def install_fake_quantization(
    model: nn.Module, quant: QuantConfig, tensor_bits: Mapping[str, int] | None = None
) -> list[str]:
    """Train through the grid that export will use. Returns the names of the weights it acts on.

    Weights that are exported as fp16 are left alone; those in `tensor_bits` get those bits.
    """
    names = []
    for path, module in fake_quantizable_modules(model):
        name = f"{path}.weight"
        bits = (tensor_bits or {}).get(name) or bits_of(name, module.weight.shape, quant)
        if bits < FP16_BITS:
            module.fake_quantize = partial(fake_quantize_rows, bits=bits)
            names.append(name)
    return names


@torch.no_grad()
def quantize_in_place(model: nn.Module, quant: QuantConfig) -> None:
    """Move every weight that goes to a grid onto it."""
    for path, module in fake_quantizable_modules(model):
        bits = bits_of(f"{path}.weight", module.weight.shape, quant)
        if bits < FP16_BITS:
            module.weight.copy_(fake_quantize_rows(module.weight, bits))


def remove_fake_quantization(model: nn.Module) -> None:
    """Use the weights as they are."""
    for _, module in fake_quantizable_modules(model):
        module.fake_quantize = None


# ---- golf/run/training.py --------------------------------------------------------------------------------------------

"""The training loop: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

STEP_MARGIN = 1.5
"""A step may take so many times the longest of the last hundred: the cap holds on a machine that stumbles."""


class TrainingError(UserError):
    """A training that can't go on."""


@dataclass(frozen=True)
class StepReport:
    """One finished step: what the log, the metrics file and the progress line are made from."""

    step: int
    train_loss: float
    elapsed: float
    """Seconds on the training clock."""
    progress: float
    """Share of the budget that is used up."""
    lr_scale: float


class Trainer:
    """A model with its optimizers, average and clock."""

    def __init__(
        self, model: GPT, config: Config, runtime: Runtime, stream: TokenStream, clock: Stopwatch | None = None
    ):
        self.model, self.config, self.runtime = model, config, runtime
        ordered = order_stream(stream, config.data.row_order, config.model.bos_id, config.run.seed)
        self.batches = BatchPrefetcher(
            ordered, config.train.train_batch_tokens, config.model.train_seq_len, runtime.rank, runtime.world_size,
            runtime.device, config.data.row_order,
        )  # fmt: skip
        self.forward = torch.compile(model, dynamic=False, fullgraph=True) if runtime.compiles else model
        self.optimizers = self.new_optimizers()
        self.average = WeightAverage(config.average)
        self.budget = Budget(config.train.iterations, config.train.max_wallclock_seconds)
        self.micro_steps = count_micro_steps(config, runtime.world_size)
        self.clock = clock or Stopwatch()
        self.recent_seconds: deque[float] = deque([0.0], maxlen=100)
        self.witness = Witness(config)
        self.fake_quantized, self.seq_len = False, config.model.train_seq_len
        self.step = self.averaged_step = 0
        self.lost_seconds = 0.0
        """Training time that kills made void: it is on the clock, its steps are not in the weights."""
        self.stop_agreed = False

    def new_optimizers(self) -> Optimizers:
        return Optimizers(self.model, self.config.optim, self.runtime)

    def warm_up(self) -> None:
        """Compile and touch everything that training will run, then put weights and optimizers back."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        changes = 0.0, self.config.quant.qat_start, self.config.train.short_seq_fraction
        for fake_quantized, self.seq_len in sorted({self.phase(share) for share in changes}, reverse=True):
            self.set_fake_quantization(fake_quantized)
            for step in range(self.config.train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(lr_scale=0.0, muon_momentum=self.config.optim.muon_momentum_start)
                self.runtime.print(f"warmup_step:{step + 1}/{self.config.train.warmup_steps}")
            self.model.load_state_dict(before)
            if fake_quantized:
                self.prove_fake_quantization()
            self.model.load_state_dict(before)
        self.optimizers = self.new_optimizers()

    def phase(self, progress: float) -> tuple[bool, int]:
        """(whether weights pass through the export grid, tokens in a row) at a share of the budget."""
        quant, train = self.config.quant, self.config.train
        short = progress < train.short_seq_fraction
        seq_len = train.short_seq_len if short else self.config.model.train_seq_len
        return quant.qat_enabled and progress >= quant.qat_start, seq_len

    def prove_fake_quantization(self) -> None:
        """The step as it is compiled must see the export grid: weights moved onto it give the loss that they gave.

        A graph without the grid sees the move; how much, is measured with the grid taken out.
        """
        inputs_BT, targets_BT = next(self.micro_batches(0))
        on = self.forward(inputs_BT, targets_BT).item()
        self.set_fake_quantization(False)
        with torch.no_grad():
            off = self.model(inputs_BT, targets_BT).item()
            quantize_in_place(self.model, self.config.quant)
            off_moved = self.model(inputs_BT, targets_BT).item()
        self.set_fake_quantization(True)
        on_moved = self.forward(inputs_BT, targets_BT).item()
        holds = abs(on - on_moved) < abs(off - off_moved) / 2
        if not holds:
            self.runtime.print("witness: the compiled step does not see the quantization grid: this run is INVALID")
        self.witness.prove("qat", holds, f"loss without the grid {off:.6f}, on it {off_moved:.6f}, compiled {on:.6f}")

    def prove_document_attention(self) -> None:
        """The step as it is compiled must keep documents apart: its loss is that of the model which does, and not
        that of the model which reads a row as one text."""
        model, config = self.model, self.config.model
        batches = (batch for step in range(100) for batch in self.micro_batches(step))
        batch = next((batch for batch in batches if (batch[0][:, 1:] == config.bos_id).any()), None)
        if batch is None:
            self.witness.prove("document_attention", False, "no row of 100 batches holds the start of a document")
            return
        compiled = self.forward(*batch).item()
        with torch.no_grad():
            apart = model(*batch).item()
            model.config = replace(config, document_attention=False)
            joined = model(*batch).item()
            model.config = config
        effect = f"loss of rows as one text {joined:.6f}, of documents apart {apart:.6f}, compiled {compiled:.6f}"
        self.witness.prove("document_attention", abs(compiled - apart) < abs(joined - apart) / 2, effect)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """inputs_BT and targets_BT of each forward pass of `step`; its tokens are the same for rows of every length."""
        parts = (part_BT.view(-1, self.seq_len).chunk(self.micro_steps) for part_BT in self.batches.get(step))
        return zip(*parts, strict=True)

    def set_fake_quantization(self, wanted: bool) -> None:
        if wanted and not self.fake_quantized:
            install_fake_quantization(self.model, self.config.quant)
        elif self.fake_quantized and not wanted:
            remove_fake_quantization(self.model)
        self.fake_quantized = wanted

    def accumulate_gradients(self, step: int) -> Tensor:
        """Leave in .grad the gradient of the global batch of `step`; returns its mean loss over all ranks."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for inputs_BT, targets_BT in self.micro_batches(step):
            loss = self.forward(inputs_BT, targets_BT)
            (loss / self.micro_steps).backward()
            loss_sum += loss.detach()
        average_gradients(self.optimizers.parameters, self.runtime.world_size)
        return self.runtime.sum_over_ranks(loss_sum / (self.micro_steps * self.runtime.world_size))

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
        """Train until the budget is used up; the clock stands still while the caller looks at a report.

        Once any rank's `stop_requested` says so, `stop_agreed` is set on all of them, after the same step.
        """
        elapsed = self.clock.seconds
        while not self.budget.exhausted(self.step, elapsed, STEP_MARGIN * max(self.recent_seconds)):
            self.clock.start()
            progress = self.budget.progress(self.step, elapsed)
            train_loss, gradient_norm, lr_scale = self.take_step(progress)
            self.runtime.synchronize()
            self.step += 1
            now, stop = self.runtime.max_over_ranks(self.clock.seconds, float(stop_requested()))
            self.observe(self.budget.progress(self.step, now))
            self.clock.stop()
            self.recent_seconds.append(now - elapsed)
            elapsed, self.stop_agreed = now, stop > 0
            loss = train_loss.item()
            if not math.isfinite(loss):  # the same on every rank, so all stop
                raise TrainingError(f"the loss is {loss} at step {self.step}: lower matrix_lr or tied_embed_lr")
            self.note_acts(progress, gradient_norm)
            yield StepReport(self.step, loss, elapsed, self.budget.progress(self.step, elapsed), lr_scale)

    def observe(self, progress: float) -> None:
        """Let the average take a snapshot if one is due."""
        if self.average.observe(self.model, progress):
            self.witness.act("swa", self.step)
            self.averaged_step = self.step

    def take_step(self, progress: float) -> tuple[Tensor, Tensor | None, float]:
        """(loss, norm of the gradients where they are clipped, learning-rate scale)"""
        fake_quantized, self.seq_len = self.phase(progress)
        self.set_fake_quantization(fake_quantized)
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        norm = self.optimizers.step(lr_scale, muon_momentum(progress, self.config.optim))
        return train_loss, norm, lr_scale

    def note_acts(self, progress: float, gradient_norm: Tensor | None) -> None:
        """Tell the witness what acted in the step that is over."""
        optim, step = self.config.optim, self.step
        if self.fake_quantized:
            self.witness.act("qat", step)
        if self.config.model.document_attention:
            self.witness.act("document_attention", step)
        if (short := self.config.train.short_seq_len) == self.seq_len:
            self.witness.act("short_seq", step)
        elif short:
            self.witness.prove("short_seq", True, f"rows of {short} tokens, then of {self.seq_len}")
        lr_scale = learning_rate_scale(progress, self.config.train)
        if lr_scale < 1:
            self.witness.act("warmdown", step)
            self.witness.prove("warmdown", True, f"learning rate down to {lr_scale:.4f} of its height")
        momentum = muon_momentum(progress, optim)
        if momentum != optim.muon_momentum and "muon_momentum_warmup" in self.witness.testimonies:
            self.witness.act("muon_momentum_warmup", step)
            effect = f"momentum from {optim.muon_momentum_start} to {momentum:.4f}"
            self.witness.prove("muon_momentum_warmup", True, effect)
        if gradient_norm is not None and (norm := gradient_norm.item()) > optim.grad_clip_norm:
            self.witness.act("grad_clip", step)
            self.witness.prove("grad_clip", True, f"norm {norm:.3f} cut to {optim.grad_clip_norm}")

    def finish(self) -> None:
        """The last weights count in the average, however early the cap struck."""
        if self.config.model.document_attention:
            self.prove_document_attention()
        self.batches.close()
        self.set_fake_quantization(False)
        if self.step != self.averaged_step:
            self.observe(progress=1.0)

    def state(self) -> TrainingState:
        """All that it takes to go on after the last step."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = self.optimizers.state_tensors(names) | generator_tensors()
        if self.runtime.is_main:  # the same on every rank
            tensors |= {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
            tensors |= {f"average.{name}": mean for name, mean in self.average.mean.items()}
        numbers = {
            "step": self.step,
            "elapsed": self.clock.seconds,
            "lost_seconds": self.lost_seconds,
            "recent_seconds": list(self.recent_seconds),
            "average": [self.average.count, self.average.slots_used, self.averaged_step],
            "witness": self.witness.record(),
        }
        return TrainingState(tensors, numbers)

    def load_state(self, state: TrainingState, latest: float) -> None:
        """Go on from `state`. The clock goes on from `latest`, the last reading of a process that was killed later."""
        device, numbers = self.runtime.device, state.numbers
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
        for name, tensor in state.tensors.items():
            kind, _, rest = name.partition(".")
            parts.get(kind, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.mean = {name: mean.to(device) for name, mean in parts["average"].items()}
        self.average.count, self.average.slots_used, self.averaged_step = numbers["average"]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizers.load_state_tensors(state.tensors, names)
        restore_generators(state.tensors)
        self.step, self.clock.total = numbers["step"], max(numbers["elapsed"], latest)
        self.lost_seconds = numbers["lost_seconds"] + self.clock.total - numbers["elapsed"]
        self.recent_seconds.extend(numbers["recent_seconds"])
        self.witness = Witness(self.config, numbers["witness"])


def count_micro_steps(config: Config, world_size: int) -> int:
    """Forward passes per step and rank: the fewest equal parts that fit in `micro_batch_tokens`."""
    seq_len = config.model.train_seq_len
    rows, rest = divmod(config.train.train_batch_tokens // seq_len, world_size)
    if rest or rows == 0:
        raise ConfigError(
            f"a step of {config.train.train_batch_tokens} tokens is {rows * world_size + rest} rows of {seq_len}: "
            f"they can't be dealt evenly to {world_size} processes"
        )
    return next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq_len <= config.train.micro_batch_tokens
    )


# ---- golf/score/journal.py -------------------------------------------------------------------------------------------

"""The journal of a scoring: sums of every finished chunk of windows, so that a killed scoring goes on from there."""

@dataclass(frozen=True)
class ScoreSums:
    """What a range of windows adds to the score. Ranges add up, in any order, on any rank."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


class ScoreJournal:
    """One rank's lines: what is scored how, then chunks in order with their sums and seconds.

    Sums are written with all digits, so that a scoring in parts adds up the same numbers in the same order.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self.identity: dict[str, Any] | None = json.loads(lines[0]) if lines else None
        rows = [json.loads(line) for line in lines[1:]]
        self.chunks = [row for row in rows if "nats" in row]
        self.preparing = [row["preparing"] for row in rows if "preparing" in row]
        """Seconds of every process before its first chunk."""
        self.file: TextIO | None = None

    def start(self, identity: Mapping[str, Any], preparing: float = 0.0) -> None:
        """Go on if the journal is about the same scoring; else begin it anew. `preparing` seconds went before."""
        if self.identity != identity:
            self.identity, self.chunks, self.preparing = dict(identity), [], []
        self.preparing += [preparing] if preparing else []
        rows = [self.identity, *({"preparing": seconds} for seconds in self.preparing), *self.chunks]
        write_file_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")

    def sums_of(self, begin: int, end: int) -> ScoreSums | None:
        """The sums of windows begin .. end - 1, if they are scored."""
        row = next((row for row in self.chunks if (row["begin"], row["end"]) == (begin, end)), None)
        return ScoreSums(row["nats"], row["tokens"], row["bytes"]) if row else None

    def add(self, begin: int, end: int, sums: ScoreSums, seconds: float) -> None:
        self.chunks.append({"begin": begin, "end": end, **asdict(sums), "seconds": seconds})
        self.file.write(json.dumps(self.chunks[-1]) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    @property
    def seconds(self) -> float:
        return sum(self.preparing) + sum(row["seconds"] for row in self.chunks)

    @property
    def sums(self) -> ScoreSums:
        return sum((ScoreSums(row["nats"], row["tokens"], row["bytes"]) for row in self.chunks), ScoreSums())


# ---- golf/data/sidecar.py --------------------------------------------------------------------------------------------

"""Bytes of each validation token in files of their own, beside the shards.

A lossless transform of the text changes its tokens, not its bytes. What a token stands for then does not follow from
its piece, so whoever prepares the shards writes it down: `<dataset>_val_bytes_%06d.bin` beside
`<dataset>_val_%06d.bin`, a shard whose numbers are bytes of the original text (0 for BOS).

Shape letters: N tokens of the stream.
"""

SIDECAR_ADVICE = "prepare or download the shards and their bytes again, together"
SIDECAR_TOLERANCE = 0.01
"""Of the bytes that a table estimates: blanks that a tokenizer drops may count or not, operators may not."""
COUNTED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class StreamBytes:
    """Bytes of the original text of each token of one stream, by position: it counts that stream, or its beginning."""

    bytes_N: np.ndarray | torch.Tensor

    def to(self, device: torch.device | str) -> "StreamBytes":
        """The same as an int32 tensor on `device`."""
        return StreamBytes(torch.from_numpy(self.bytes_N.astype(np.int32)).to(device))

    def of_targets(self, tokens: int) -> np.ndarray | torch.Tensor:
        """Bytes of the targets in the first `tokens` tokens of the stream: all of them but the first."""
        if tokens > len(self.bytes_N):
            raise DataError(f"{tokens} tokens to score, but bytes of {len(self.bytes_N)}: {SIDECAR_ADVICE}")
        return self.bytes_N[1:tokens]


def sidecar_path(val_path: str | Path) -> Path | None:
    """Where the bytes of a validation shard are, if there are any; None for a file of bytes and any other name."""
    name = Path(val_path).name
    found = re.sub(r"_val_(\d{6}\.bin)$", r"_val_bytes_\1", name)
    return None if found == name else Path(val_path).with_name(found)


def write_sidecar(folder: str | Path, dataset: str, index: int, bytes_N: Sequence[int] | np.ndarray) -> Path:
    """Write the bytes of each token of `<dataset>_val_<index>.bin`, BOS included. Raises DataError."""
    path = Path(folder) / f"{dataset}_val_bytes_{index:06d}.bin"
    if np.max(bytes_N, initial=0) >= 2**16 or np.min(bytes_N, initial=0) < 0:
        raise DataError(f"{path}: a token stands for 0 to 65,535 bytes: its tokenizer has pieces that are too long")
    write_shard(path, bytes_N)
    return path


def without_sidecars(paths: Sequence[str | Path]) -> list[str | Path]:
    """`paths` without files of bytes, which a pattern like `*_val_*.bin` matches too."""
    return [path for path in paths if not re.search(r"_val_bytes_\d{6}\.bin$", str(path))]


def read_sidecar(val_paths: Sequence[str | Path]) -> np.ndarray | None:
    """uint16 (N,) bytes of every token of the shards, in order; None where no shard has any. Raises DataError."""
    pairs = [(Path(path), sidecar_path(path)) for path in val_paths]
    if not any(beside and beside.is_file() for _, beside in pairs):
        return None
    parts = []
    for path, beside in pairs:
        if not beside or not beside.is_file():
            raise DataError(
                f"{path}: no bytes of its tokens beside it, though other shards have them: {SIDECAR_ADVICE}"
            )
        parts.append(read_shard(beside))
        tokens = len(read_shard(path))
        if len(parts[-1]) != tokens:
            raise DataError(f"{beside}: bytes of {len(parts[-1])} tokens, {path.name} has {tokens}: {SIDECAR_ADVICE}")
    return np.concatenate(parts)


def validation_bytes(
    table: ByteTable, val_paths: Sequence[str | Path], tokens_N: np.ndarray
) -> ByteTable | StreamBytes:
    """What counts the bytes of the validation stream: the sidecar of its shards, or `table` where there is none.

    Raises DataError for a sidecar that is not that of these tokens.
    """
    bytes_N = read_sidecar(val_paths)
    if bytes_N is None:
        return table
    total, estimate = int(bytes_N.sum(dtype=np.int64)), table_total(table, tokens_N)
    folder = Path(val_paths[0]).parent
    if bytes_N[table.boundary_V[tokens_N]].any():
        raise DataError(f"{folder}: bytes for document starts, which spell none: {SIDECAR_ADVICE}")
    if abs(total - estimate) > (0 if table.exact else SIDECAR_TOLERANCE * estimate):
        raise DataError(f"{folder}: the sidecar counts {total} bytes, the pieces have {estimate}: {SIDECAR_ADVICE}")
    expected = manifest_total(folder, val_paths)
    if expected not in (None, total):
        raise DataError(f"{folder}: the sidecar counts {total} bytes, the manifest {expected}: {SIDECAR_ADVICE}")
    return StreamBytes(bytes_N)


def table_total(table: ByteTable, tokens_N: np.ndarray) -> int:
    """Bytes of a stream by a table, in pieces that don't make gigabytes of int64."""
    starts = range(0, len(tokens_N) - 1, COUNTED_AT_ONCE)
    pieces = (tokens_N[start : start + COUNTED_AT_ONCE + 1] for start in starts)
    return sum(int(table.count(piece_P[:-1], piece_P[1:]).sum()) for piece_P in pieces)


def manifest_total(folder: Path, val_paths: Sequence[str | Path]) -> int | None:
    """Validation bytes by the manifest of a prepared folder; None where it has none, or these are not all shards."""
    path = folder / "manifest.json"
    if not path.is_file() or sorted(map(Path, val_paths)) != find_shards(folder, "val"):
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]["bytes"]
    except (KeyError, TypeError):  # someone else's manifest
        return None
    except ValueError:
        raise DataError(f"{path}: damaged, it holds no JSON: {SIDECAR_ADVICE}") from None


# ---- golf/score/progress.py ------------------------------------------------------------------------------------------

"""How long scoring takes: time in the forward, a forecast after the first batches, progress while it runs."""

FORECAST_BATCHES = 4
"""Batches that the forecast is measured on, after one that warms up."""


class ForwardTimer:
    """Sums what happens inside `with timer:`; on CUDA by events, so that measuring never makes the device wait."""

    def __init__(self, device: torch.device):
        self.uses_events = device.type == "cuda"
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = 0.0
        self.entered = 0.0

    def __enter__(self) -> None:
        if self.uses_events:
            self.pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.pairs[-1][0].record()
        self.entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.total += time.perf_counter() - self.entered
        if self.uses_events:
            self.pairs[-1][1].record()

    def seconds(self) -> float:
        """Seconds inside; on CUDA only after a synchronize."""
        if self.uses_events:
            return sum(start.elapsed_time(stop) for start, stop in self.pairs) / 1000
        return self.total


class ScoreProgress:
    """Forecast and progress of the main rank's windows: one line that updates on a terminal, ten in a file."""

    def __init__(self, runtime: Runtime, windows: int, window_length: int, share: int):
        self.runtime, self.windows, self.window_length, self.share = runtime, windows, window_length, share
        self.line = ProgressLine(shown=runtime.is_main)
        self.started = self.warm_at = time.perf_counter()
        self.batches = self.done = self.skipped = self.warm_windows = self.tenths = 0

    def skip(self, windows: int) -> None:
        """`windows` of this rank's share were scored by an earlier process."""
        self.done += windows
        self.skipped += windows

    def advance(self, windows: int) -> None:
        """`windows` more of this rank's share were asked of the device."""
        self.batches += 1
        self.done += windows
        if self.batches == 2:  # the first regular batch comes second, after the long first window
            self.runtime.synchronize()
            self.warm_at, self.warm_windows = time.perf_counter(), self.done
        elif self.batches == 2 + FORECAST_BATCHES:
            self.runtime.synchronize()
            self.line.clear()
            self.forecast()
        self.show()

    def forecast(self) -> None:
        """Print the time that all windows will take, at the speed of the batches since the warm one."""
        now = time.perf_counter()
        rate = (self.done - self.warm_windows) / (now - self.warm_at)
        seconds = now - self.started + (self.share - self.done) / rate
        speed = rate * self.window_length * self.runtime.world_size
        self.runtime.print(f"score:forecast seconds:{seconds:.0f} windows:{self.windows} tokens_per_second:{speed:.0f}")

    def show(self) -> None:
        elapsed, part = time.perf_counter() - self.started, self.done / self.share
        left = elapsed * (self.share - self.done) / (self.done - self.skipped)
        if self.line.shown:
            self.line.update(f"score {part:.1%}  {elapsed:.0f} s, {left:.0f} s left")
            if part == 1:
                self.line.clear()
        elif int(10 * part) > self.tenths:
            self.tenths = int(10 * part)
            self.runtime.print(f"score:progress {part:.0%} seconds:{elapsed:.0f} eta_seconds:{left:.0f}")


# ---- golf/score/windows.py -------------------------------------------------------------------------------------------

"""Which window scores which targets of a token stream.

A stream of N + 1 tokens has N targets; target t is token t + 1, predicted from the tokens up to t.
A window [start, end) reads tokens start .. end - 1 as input and may score the targets start .. end - 1.
Window 0 scores all of its own; window k ends S targets further on (the last one at N) and scores what no
window before it has: each target is scored exactly once, the tail included, and every target but those of
window 0 is predicted from at least L - S + 1 tokens. A stride of L is the plain evaluation in rows.

Letters: N targets of the stream, W windows, L window length, S stride.
"""

class WindowError(UserError):
    """A stream that no window fits, or a stride that would leave targets out."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one stream, in order; each scores the targets [first_scored, end)."""

    length: int
    """Tokens of every window; the whole stream where that is shorter than the length asked for."""
    stride: int
    """Most targets scored by a window other than the first."""
    starts_W: np.ndarray
    ends_W: np.ndarray
    first_scored_W: np.ndarray

    def __len__(self) -> int:
        return len(self.ends_W)


def plan_windows(targets: int, length: int, stride: int) -> WindowPlan:
    """Windows of at most `length` tokens over a stream of `targets` targets. Raises WindowError on sizes that can't be.

    Window k ends at min(L + k S, N) and has full length, so the last one overlaps more instead of being shorter:
    all windows have one shape, and one compiled graph serves them.
    """
    if targets < 1:
        raise WindowError(f"a stream of {targets} targets has nothing to score: it needs at least two tokens")
    if not 1 <= stride <= length:
        raise WindowError(f"window stride {stride} must be 1 to the window length, {length}")
    length = min(length, targets)
    count = 1 + -(-(targets - length) // stride)
    ends_W = np.minimum(length + stride * np.arange(count, dtype=np.int64), targets)
    first_scored_W = np.concatenate([np.zeros(1, dtype=np.int64), ends_W[:-1]])
    return WindowPlan(length, min(stride, length), ends_W - length, ends_W, first_scored_W)


def rank_share(windows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous [begin, end) of `windows` that `rank` scores; shares differ by one window at most."""
    assert 0 <= rank < world_size
    return windows * rank // world_size, windows * (rank + 1) // world_size


# ---- golf/score/scorer.py --------------------------------------------------------------------------------------------

"""Bits per byte of a token stream. Every figure of the project comes from here.

bits per byte = sum of nats / ln 2 / bytes, over every target of the stream, each scored once (windows.py).
Sums are float64; targets and bytes are whole numbers, exact in float64 up to 2^53.

Letters: B windows of a batch, T tokens of a window, S scored positions (the last S of T), N targets of the
stream, W windows of the stream.
"""

Forward = Callable[[Tensor, Tensor, float | None], Tensor]
"""GPT.token_losses or its compiled form: (ids_BT, targets_BS, rope_base) -> fp32 nats of the last S positions, BS."""


Recorder = Callable[[Tensor, Tensor], None]
"""Told of every scored target, batch by batch: (numbers of the targets in the stream, their float64 nats)."""


CHUNKS = 100
"""Parts that a rank's scoring is journaled in."""


class ScoreError(UserError):
    """A stream or settings that no honest score can be made from."""


@dataclass(frozen=True)
class ScoreSettings:
    """How a stream is cut into windows and what positions mean in them."""

    seq_len: int
    stride: int
    batch_seqs: int
    """Windows of one forward pass on one rank."""
    rope_base: float | None = None
    """None: the model's own."""


@dataclass(frozen=True)
class Score:
    """The score of a whole stream, over all ranks."""

    nats: float
    tokens: int
    """Targets scored: all of the stream's."""
    bytes: int
    documents: int
    windows: int
    window_tokens: int
    """Tokens that went through the forward pass: windows times their length."""
    stride: int
    seconds: float
    """Wall clock of the slowest rank, with what a journal holds of killed processes."""
    forward_share: float
    """Part of the main rank's seconds that its device spent in the batched forward."""

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class ScoreJob:
    """One stream, ready on the device, with all that scoring a range of its windows takes."""

    model: nn.Module
    forward: Forward
    settings: ScoreSettings
    plan: WindowPlan
    documents: int
    """Document starts in the stream."""
    tokens_N1: Tensor
    """int32, N + 1."""
    bytes_N: Tensor
    """int32 bytes of text that each target stands for."""
    ends_W: Tensor
    first_scored_W: Tensor


@dataclass(frozen=True)
class WindowBatch:
    """The input of one forward pass, and which of its losses count."""

    ids_BT: Tensor
    targets_BS: Tensor
    index_BS: Tensor
    """Number of each target in the stream."""
    counted_BS: Tensor
    """False for targets that an earlier window scored, and for rows that only fill the batch up."""


def sliding_settings(score: ScoreConfig, model: ModelConfig) -> ScoreSettings:
    """The final evaluation's settings: overlapping windows, NTK-aware RoPE beyond the training length."""
    head_dim = model.model_dim // model.num_heads
    scaled_base = ntk_rope_base(model.rope_base, score.eval_seq_len, model.train_seq_len, head_dim)
    rope_base = scaled_base if score.eval_rope == "ntk" else model.rope_base
    return ScoreSettings(score.eval_seq_len, score.eval_stride, score.eval_batch_seqs, rope_base)


def plain_settings(model: ModelConfig, batch_seqs: int) -> ScoreSettings:
    """The evaluation used during training: rows of the training length, no overlap."""
    return ScoreSettings(model.train_seq_len, model.train_seq_len, batch_seqs)


def compiled_losses(model: GPT) -> Forward:
    """model.token_losses as one compiled graph of one shape."""
    return torch.compile(model.token_losses, dynamic=False, fullgraph=True)


def score_stream(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    runtime: Runtime,
    *,
    forward: Forward | None = None,
    announce: bool = True,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
) -> Score:
    """Score every target of `tokens` (N + 1 integers, a document start first) once, over all ranks.

    `forward` replaces `model.token_losses` for the windows that share a shape (pass its compiled form);
    `announce` prints a forecast of the time and progress. Chunks that a started `journal` holds are not scored
    again; `check` is called between chunks, and may raise. Raises ScoreError.
    """
    started = time.perf_counter()
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    timer = ForwardTimer(runtime.device)
    progress = ScoreProgress(runtime, len(job.plan), job.plan.length, end - begin) if announce else None
    earlier_seconds = journal.seconds if journal else 0.0
    with evaluation_mode(model):
        local = score_chunks(job, begin, end, timer, progress, journal, check)
    seconds = time.perf_counter() - started
    total = sum_sums(local, runtime)
    assert total.tokens == len(tokens) - 1, f"{total.tokens} targets scored of {len(tokens) - 1}"
    return Score(
        nats=total.nats,
        tokens=total.tokens,
        bytes=total.bytes,
        documents=job.documents,
        windows=len(job.plan),
        window_tokens=len(job.plan) * job.plan.length,
        stride=job.plan.stride,
        seconds=runtime.max_over_ranks(earlier_seconds + seconds)[0],
        forward_share=timer.seconds() / seconds,
    )


def prepare_job(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    device: torch.device,
    forward: Forward | None = None,
) -> ScoreJob:
    """Put a stream on the device, with its windows and the bytes of its targets. Raises ScoreError."""
    check_settings(settings)
    tokens_N1 = torch.from_numpy(tokens.astype(np.int32)).to(device)
    check_stream(tokens_N1, model.config)
    bytes_N = count_target_bytes(tokens_N1, byte_table.to(device))
    if not bytes_N.any():
        raise ScoreError("the validation stream spells no byte of text: bits per byte are not defined")
    plan = plan_windows(len(bytes_N), settings.seq_len, settings.stride)
    return ScoreJob(
        model=model,
        forward=forward or model.token_losses,
        settings=settings,
        plan=plan,
        documents=int((tokens_N1 == model.config.bos_id).sum()),
        tokens_N1=tokens_N1,
        bytes_N=bytes_N,
        ends_W=torch.from_numpy(plan.ends_W).to(device),
        first_scored_W=torch.from_numpy(plan.first_scored_W).to(device),
    )


def check_settings(settings: ScoreSettings) -> None:
    if settings.batch_seqs < 1 or not 1 <= settings.stride <= settings.seq_len:
        raise ScoreError(
            f"window {settings.seq_len}, stride {settings.stride}, batch {settings.batch_seqs}:"
            " all must be positive, the stride at most the window"
        )


def check_stream(tokens_N1: Tensor, model: ModelConfig) -> None:
    """Raise ScoreError where a score would mean nothing."""
    if len(tokens_N1) < 2:
        raise ScoreError(f"the validation stream has {len(tokens_N1)} tokens: nothing to score, check the shards")
    smallest, largest = (int(bound) for bound in tokens_N1.aminmax())
    if smallest < 0 or largest >= model.vocab_size:
        raise ScoreError(
            f"the validation stream has tokens {smallest} to {largest}, the model a vocabulary of {model.vocab_size}:"
            " the shards were written with another tokenizer"
        )
    first = int(tokens_N1[0])
    if first != model.bos_id:
        raise ScoreError(
            f"the validation stream starts with token {first}, not with a document start ({model.bos_id}):"
            " check that the shards are complete and in order"
        )


def count_target_bytes(tokens_N1: Tensor, byte_table: ByteTable | StreamBytes, piece: int = 1 << 22) -> Tensor:
    """int32 bytes of each target: by position where the stream has a sidecar, else given the token before it.

    A table counts in pieces, so that 62 million tokens don't make gigabytes of int64.
    """
    if isinstance(byte_table, StreamBytes):
        return byte_table.of_targets(len(tokens_N1))
    bytes_N = torch.empty_like(tokens_N1[1:])
    for begin in range(0, len(bytes_N), piece):
        tokens_P1 = tokens_N1[begin : begin + piece + 1].long()
        bytes_N[begin : begin + piece] = byte_table.count(tokens_P1[:-1], tokens_P1[1:])
    return bytes_N


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode restored after.

    Not inference_mode: its tensors, once cached by a module, can't take part in a later training step.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def chunk_ranges(job: ScoreJob, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Windows begin .. end - 1 in about CHUNKS ranges that cut between batches."""
    rows = min(job.settings.batch_seqs, len(job.plan))
    size = rows * max(1, -(-(end - begin) // (rows * CHUNKS)))
    alone = 1 if begin == 0 and job.plan.length > job.plan.stride else 0  # the long first window is a batch of its own
    cuts = [begin, *range(begin + alone + size, end, size), end]
    return ((first, last) for first, last in pairwise(cuts) if first < last)


def score_chunks(
    job: ScoreJob,
    begin: int,
    end: int,
    timer: ForwardTimer,
    progress: ScoreProgress | None,
    journal: ScoreJournal | None,
    check: Callable[[], None],
) -> ScoreSums:
    """Sums of windows begin .. end - 1 on this rank, chunk by chunk, in evaluation_mode."""
    total = ScoreSums()
    for first, last in chunk_ranges(job, begin, end):
        sums, started = journal.sums_of(first, last) if journal else None, time.perf_counter()
        if sums and progress:
            progress.skip(last - first)
        if sums is None:
            sums = score_windows(job, first, last, timer, progress)
            if journal:
                journal.add(first, last, sums, time.perf_counter() - started)
            check()
        total += sums
    return total


def score_windows(
    job: ScoreJob,
    begin: int,
    end: int,
    timer: ForwardTimer | None = None,
    progress: ScoreProgress | None = None,
    recorder: Recorder | None = None,
) -> ScoreSums:
    """Sums of windows begin .. end - 1 on this rank alone, in evaluation_mode."""
    assert not any(module.training for module in job.model.modules()), "scoring needs eval mode: evaluation_mode"
    timer = timer or ForwardTimer(job.tokens_N1.device)
    sums_3 = torch.zeros(3, dtype=torch.float64, device=job.tokens_N1.device)
    for first, last, rows, scored in batch_shapes(job, begin, end):
        sums_3 += score_batch(job, gather_windows(job, first, last, rows, scored), timer, recorder)
        if progress:
            progress.advance(last - first)
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


def batch_shapes(job: ScoreJob, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(first window, last window + 1, rows, scored positions) of the forward passes over windows begin .. end - 1.

    Window 0 scores more than a stride, so it goes alone; all other passes have one shape.
    """
    if begin == 0 < end and job.plan.length > job.plan.stride:
        yield 0, 1, 1, job.plan.length
        begin = 1
    rows = min(job.settings.batch_seqs, len(job.plan))
    for first in range(begin, end, rows):
        yield first, min(first + rows, end), rows, job.plan.stride


def gather_windows(job: ScoreJob, first: int, last: int, rows: int, scored: int) -> WindowBatch:
    """Windows first .. last - 1, filled up to `rows` with the last one, whose copies don't count."""
    window_B = torch.arange(first, first + rows, device=job.tokens_N1.device)
    real_B = window_B < last
    window_B = window_B.clamp(max=last - 1)
    end_B = job.ends_W[window_B]
    index_BS = (end_B - scored)[:, None] + torch.arange(scored, device=end_B.device)
    return WindowBatch(
        # unfold is a view: the gather reads each window straight from the stream
        ids_BT=job.tokens_N1[:-1].unfold(0, job.plan.length, 1)[end_B - job.plan.length].long(),
        targets_BS=job.tokens_N1[index_BS + 1].long(),
        index_BS=index_BS,
        counted_BS=(index_BS >= job.first_scored_W[window_B][:, None]) & real_B[:, None],
    )


def score_batch(job: ScoreJob, batch: WindowBatch, timer: ForwardTimer, recorder: Recorder | None = None) -> Tensor:
    """float64 (nats, targets, bytes) of one forward pass."""
    assert not job.model.training, "the model left eval mode while it was being scored"
    # a compiled forward keeps its one shape: the long first window would make it compile again, for dynamic shapes
    forward = job.forward if batch.targets_BS.size(1) == job.plan.stride else job.model.token_losses
    with timer:
        losses_BS = forward(batch.ids_BT, batch.targets_BS, job.settings.rope_base)
    nats_BS = losses_BS.double()
    if recorder:
        recorder(batch.index_BS[batch.counted_BS], nats_BS[batch.counted_BS])
    nats = nats_BS.masked_fill(~batch.counted_BS, 0.0).sum()
    byte_count = (job.bytes_N[batch.index_BS] * batch.counted_BS).sum()
    return torch.stack((nats, batch.counted_BS.sum().double(), byte_count.double()))


def sum_sums(local: ScoreSums, runtime: Runtime) -> ScoreSums:
    """Sums of all ranks."""
    values = (local.nats, local.tokens, local.bytes)
    sums_3 = runtime.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=runtime.device))
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


# ---- golf/run/report.py ----------------------------------------------------------------------------------------------

"""Lines in the competition's formats, so that its readers understand our logs."""

def quantization_name(quant: QuantConfig) -> str:
    """int8 where MLP and attention share a width, int5int6 where they do not."""
    return f"int{quant.mlp_bits}" + (f"int{quant.attn_bits}" if quant.attn_bits != quant.mlp_bits else "")


def opening_lines(trainer: Trainer, data: TrainingData, folder: RunFolder) -> list[str]:
    config, runtime = trainer.config, trainer.runtime
    model, train, optim, average, quant = config.model, config.train, config.optim, config.average, config.quant
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return [
        f"{folder.log}",
        f"preset:{config.run.preset} config_hash:{config_hash(config)} data_id:{data.data_id} "
        f"tokenizer_sha256:{data.tokenizer.sha256} code_sha256:{file_sha256(folder.code)}",
        "knobs changed from the preset: "
        + (" ".join(f"{knob}={value}" for knob, value in changed_knobs(config).items()) or "none"),
        f"machine:{machine_description(runtime)} compute:{runtime.compute_dtype} compile:{runtime.compiles} "
        f"python:{platform.python_version()} torch:{torch.__version__}",
        f"val_bpb:enabled tokenizer_kind={data.tokenizer.kind} tokenizer_path={config.data.tokenizer_path}",
        f"train_loader:dataset:{config.data.data_path} train_shards:{data.shards}",
        f"val_loader:shards pattern={config.data.data_path}/*_val_*.bin, closed until the artifact is scored",
        f"model_params:{parameters}",
        f"world_size:{runtime.world_size} grad_accum_steps:{trainer.micro_steps}",
        f"attention_mode:gqa num_heads:{model.num_heads} num_kv_heads:{model.num_kv_heads}",
        f"tie_embeddings:True embed_lr:{optim.tied_embed_lr} head_lr:0.0 matrix_lr:{optim.matrix_lr} "
        f"scalar_lr:{optim.scalar_lr}",
        f"train_batch_tokens:{train.train_batch_tokens} train_seq_len:{model.train_seq_len} "
        f"iterations:{train.iterations} warmup_steps:{train.warmup_steps} "
        f"max_wallclock_seconds:{train.max_wallclock_seconds:.3f}",
        f"seed:{config.run.seed}",
        f"qat:{quant.qat_enabled}(start={quant.qat_start}) bigram:{model.bigram_vocab_size}x{model.bigram_dim} "
        f"swa:{average.swa_enabled}(start={average.swa_start},snapshots={average.swa_snapshots}) "
        f"prune:{quant.prune_frac} eval_seq_len:{config.score.eval_seq_len} warmdown:{train.warmdown_shape}",
    ]


def step_line(report: StepReport, config: Config) -> str:
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} train_loss:{report.train_loss:.4f} "
        f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / report.step:.2f}ms"
    )


def stop_line(report: StepReport, config: Config) -> str:
    """The clock, not the number of steps, ended the training."""
    milliseconds = 1000 * report.elapsed
    return f"stopping_early: wallclock_cap train_time:{milliseconds:.0f}ms step:{report.step}/{config.train.iterations}"


def holdout_line(score: Score, report: StepReport, config: Config) -> str:
    """A look at the last weights, before averaging and quantization, on training text: not the artifact's score."""
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} holdout_loss:{score.val_loss:.4f} "
        f"holdout_bpb:{score.val_bpb:.4f} train_time:{milliseconds:.0f}ms"
    )


def progress_text(report: StepReport, config: Config) -> str:
    """What stands on the terminal's progress line."""
    tokens_per_second = report.step * config.train.train_batch_tokens / report.elapsed
    left = report.elapsed / max(report.progress, 1e-9) - report.elapsed
    return (
        f"step {report.step}  loss {report.train_loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
        f"{report.progress:.0%}  {left:.0f} s left"
    )


def packing_lines(folder: RunFolder, config: Config) -> list[str]:
    name = f"{quantization_name(config.quant)}+{config.quant.codec}"
    files = (folder.weights, folder.artifact, folder.code)
    bytes_raw, bytes_model, bytes_code = (path.stat().st_size for path in files)
    pruning = folder.load_json(folder.pruning)
    return [
        f"prune:changed {pruning['pruned_codes']} of {pruning['codes']} codes",
        f"Serialized model: {bytes_raw} bytes",
        f"Code size: {bytes_code} bytes",
        f"Serialized model {name}: {bytes_model} bytes",
        f"Total submission size {name}: {bytes_model + bytes_code} bytes",
    ]


def scoring_lines(config: Config, model: ModelConfig) -> list[str]:
    """How the artifact is about to be scored."""
    score = config.score
    scaled = f" ({'NTK-scaled' if score.eval_rope == 'ntk' else 'unscaled'} RoPE, {score.eval_seq_len} tokens)"
    longer = [f"eval_seq_len:{score.eval_seq_len}{scaled}"] if score.eval_seq_len > model.train_seq_len else []
    return [*longer, f"final_eval_mode:sliding_window stride:{score.eval_stride} batch_seqs:{score.eval_batch_seqs}"]


def final_lines(score: Score, quant: QuantConfig) -> list[str]:
    name = f"final_{quantization_name(quant)}_{quant.codec}_roundtrip"
    return [
        f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms",
        f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}",
    ]


def partial_line(journal: ScoreJournal) -> str:
    """What a stopped scoring has so far: no score, and not to be taken for one."""
    done = journal.sums
    return f"score:partial tokens:{done.tokens} nats:{done.nats:.4f} of this process, no score: go on with --resume"


def result_line(result: Mapping[str, Any]) -> str:
    """The last line of a log, which says the same as result.json."""
    return (
        f"result: {'valid' if result['valid'] else 'INVALID'} val_loss:{result['val_loss']:.8f} "
        f"val_bpb:{result['val_bpb']:.8f} bytes_total:{result['bytes_total']} steps:{result['steps']} "
        f"train_seconds:{result['train_seconds']:.1f} eval_seconds:{result['eval_seconds']:.1f} "
        f"config_hash:{result['config_hash']} code_sha256:{result['code_sha256']} "
        f"artifact_sha256:{result['artifact_sha256']}"
    )


def machine_description(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return f"{runtime.world_size} x {torch.cuda.get_device_name(runtime.device)}"
    return f"{runtime.world_size} x {platform.machine()} CPU process, {torch.get_num_threads()} threads, {sys.platform}"


# ---- golf/run/ledger.py ----------------------------------------------------------------------------------------------

"""The time ledger: every second of every process of a run belongs to exactly one phase."""

PHASES = {
    "setup": ("", "train"),
    "compile": ("", "train"),
    "rehearse": ("", "train"),
    "train": ("train", "train"),
    "hold out": ("", "train"),
    "calibrate": ("train", "train"),
    "average": ("", "train"),
    "quantize": ("", "train"),
    "pack": ("", "train"),
    "load": ("", "eval"),
    "score": ("eval", "eval"),
    "compare": ("", ""),
    "report": ("", ""),
}
"""Which budget a phase counts against: by the script's timers (the competition's habit), by the process's clock."""
IMPORTED_AT = time.monotonic()


def process_identity() -> tuple[str, float]:
    """(a name that this process keeps when it replaces itself by exec, its age in seconds).

    Where there is no /proc the age counts from the import of this module.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(os.getpid()), time.monotonic() - IMPORTED_AT
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks since the boot
    return f"{os.getpid()}-{fields[19]}", time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Ledger:
    """Seconds by phase, appended to a file whenever the phase changes, so that a killed process is in it too."""

    def __init__(self, phase: str, now=time.monotonic, identity=process_identity):
        self.now, self.phase_name, self.path, self.identity = now, phase, None, identity
        self.session, age = identity()
        self.mark = now() - age
        self.rows: list[dict[str, Any]] = []

    def attach(self, path: Path) -> None:
        """Go on in a run's file; what this process did before it replaced itself is in there already."""
        earlier = read_ledger(path)
        self.mark += sum(row["seconds"] for row in earlier if row["session"] == self.session)
        write_file_atomically(path, "".join(json.dumps(row) + "\n" for row in earlier))  # without a torn last line
        self.path, self.rows, waiting = path, earlier, self.rows
        for row in waiting:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def settle(self) -> None:
        """Write down the phase in progress up to now."""
        now = self.now()
        self.write({"session": self.session, "phase": self.phase_name, "seconds": now - self.mark})
        self.mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`, and to nothing else."""
        assert name in PHASES, name
        self.settle()
        outer, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.settle()
            self.phase_name = outer

    def seconds(self, phase: str) -> float:
        return sum(row["seconds"] for row in self.rows if row["phase"] == phase)

    def summary(self) -> dict[str, Any]:
        """For result.json: phases, and sums under both conventions. Settles first."""
        self.settle()
        phases = [
            {"phase": name, "seconds": self.seconds(name), "script": script, "process": process}
            for name, (script, process) in PHASES.items()
            if self.seconds(name)
        ]
        sums = {
            kind: {budget: sum(row["seconds"] for row in phases if row[kind] == budget) for budget in ("train", "eval")}
            for kind in ("script", "process")
        }
        earlier = sum(row["seconds"] for row in self.rows if row["session"] != self.session)
        return {"phases": phases, **sums, "process_seconds": earlier + self.identity()[1]}


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger; a last line that a killed process left half-written is no row."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ---- golf/run/stages.py ----------------------------------------------------------------------------------------------

"""stages.json: which stages of a run are finished, and the SHA-256 of every file that they left."""

STAGES = ("train", "average", "quantize", "pack", "reload", "score", "report")


class StageError(UserError):
    """A stage's output that is not what the stage left."""


class StageBook:
    """The finished stages of the run in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "stages.json"
        self.stages: dict[str, dict[str, str]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def finish(self, stage: str, outputs: Sequence[Path]) -> None:
        """Record that `stage` left these files, all of them on the disk."""
        assert stage in STAGES
        hashes = {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in outputs}
        self.stages[stage] = hashes
        write_file_atomically(self.path, json.dumps(self.stages, indent=2) + "\n")

    def require_before(self, stage: str) -> None:
        """Raise StageError unless the stage before `stage` is finished."""
        for before in STAGES[: STAGES.index(stage)][-1:]:
            if before not in self.stages:
                raise StageError(f"{self.folder}: stage {before} is not finished: go on with --resume")

    def verify(self, stage: str) -> None:
        """Raise StageError unless the files of a finished stage are as it left them."""
        for name, sha256 in self.stages[stage].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                state = "is not what" if path.is_file() else "is missing, which"
                raise StageError(f"{path} {state} stage {stage} left: bring the file back, or start a new run")


# ---- golf/run/session.py ---------------------------------------------------------------------------------------------

"""What surrounds the work of a run's stages: which are done, on which clock, with what doors closed."""

LOST_PEER = re.compile("gloo|nccl|peer|socket|connection|TCPStore", re.IGNORECASE)


def explain_error(error: Exception, world_size: int) -> tuple[int, str]:
    """(exit status, one line) of an error that is not a mistake of ours; (0, "") for one that is."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, str(error)
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return EXIT_MACHINE, "out of memory on the device: lower micro_batch_tokens or eval_batch_seqs; then --resume"
    if isinstance(error, OSError):
        return EXIT_MACHINE, f"{error}: mend that, then go on with --resume; what was written before is whole"
    if isinstance(error, RuntimeError) and world_size > 1 and LOST_PEER.search(str(error)):
        first = str(error).strip().splitlines()[0][:200]
        return EXIT_MACHINE, f"another process of the run was lost ({first}); go on with --resume"
    return 0, ""


def take_lock(path: Path) -> TextIO:
    """A lock that this process has until it ends, however it ends. Raises StageError while another one has it."""
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not shared with forked workers
    except BlockingIOError:
        raise StageError(f"{path.parent} is at work in another process: wait for it, or end it") from None
    return lock


class Session:
    """One process of a run; `open` binds it to the run's folder once that is known."""

    def __init__(self) -> None:
        self.log, self.guard, self.ledger, self.interruption = Log(), AccessGuard(), Ledger("setup"), Interruption()
        self.packed: tuple[bytes, SizeReport] | None = None
        """The artifact as the quantize stage measured it, so that the pack stage need not pack again."""
        self.guard.watch()
        self.interruption.watch()

    def open(self, folder: RunFolder, runtime: Runtime) -> None:
        self.folder, self.runtime, self.interruption.world_size = folder, runtime, runtime.world_size
        if runtime.is_main:
            self.lock = take_lock(folder.path / ".lock")
            self.log.attach(folder.log)
            self.ledger.attach(folder.ledger)
        self.book = StageBook(folder.path)
        if runtime.is_main:
            for stage in self.book.stages:
                self.book.verify(stage)
        runtime.barrier()  # every rank has read the same book before a stage is added to it

    def do(self, stage: str, work: Callable[[], Sequence[Path]], together: bool = False) -> None:
        """Do a stage unless it is finished: `work`, on the main rank or on all together, returns the files it left."""
        if stage in self.book:
            return
        self.interruption.check(f"before the {stage} stage; go on with --resume {self.folder.path.name}")
        if self.runtime.is_main:
            self.book.require_before(stage)
        self.guard.stage = stage
        with self.ledger.phase({"reload": "load"}.get(stage, stage)):
            if together or self.runtime.is_main:
                outputs = work()
            if together:
                self.runtime.barrier()  # what the other ranks leave is there too
            if self.runtime.is_main:
                self.folder.save_access(self.guard)
                self.book.finish(stage, outputs)
            self.runtime.barrier()


# ---- golf/run/loop.py ------------------------------------------------------------------------------------------------

"""What a training tells and keeps while its steps go by, and how it takes up an earlier one."""

LAST_CHECKPOINT = 0.99
"""Share of the budget after which only the end writes one: the time of a copy would go past the cap."""


def take_up_checkpoint(trainer: Trainer, folder: RunFolder) -> None:
    """Go on from the newest checkpoint, if there is one; the clock in any case from where it last was."""
    files, runtime = newest_checkpoint(folder.checkpoints), trainer.runtime
    state = read_checkpoint(files) if files else None
    latest = folder.trim_metrics(state.numbers["step"] if state else 0) if runtime.is_main else 0.0
    (latest,) = runtime.max_over_ranks(latest)
    if state:
        trainer.load_state(state, latest)
    elif latest:
        trainer.clock.total = trainer.lost_seconds = latest
    else:
        return
    lost = f"{trainer.lost_seconds:.1f} s of training lost"
    runtime.print(f"resume: from step {trainer.step}, clock at {trainer.clock.seconds:.1f} s, {lost}")


def take_steps(trainer: Trainer, data: TrainingData, session: Session, writer: CheckpointWriter) -> None:
    """Train until the budget is used up, with a checkpoint now and then. Raises Interrupted, after one more of them."""
    config, runtime, folder = trainer.config, trainer.runtime, session.folder
    progress, saved_at, report = ProgressLine(shown=runtime.is_main), trainer.clock.seconds, None
    for report in trainer.steps(lambda: session.interruption.requested):
        tell(report, trainer, folder, progress)
        if config.train.val_loss_every and report.step % config.train.val_loss_every == 0:
            with session.ledger.phase("hold out"):
                look(trainer, data, report, folder)
        if trainer.stop_agreed:
            progress.clear()
            writer.write(trainer.state(), report.step)
            writer.close()
            runtime.barrier()  # a launcher ends all ranks when the first one leaves
            session.interruption.check(f"after step {report.step}; go on with --resume {folder.path.name}")
            raise Interrupted(f"another process was stopped after step {report.step}")
        due = 0 < config.run.checkpoint_seconds <= report.elapsed - saved_at
        if due and report.progress < LAST_CHECKPOINT:
            with trainer.clock:  # the copy holds up the training, so it counts
                writer.write(trainer.state(), report.step)
            saved_at = report.elapsed
            session.ledger.settle()
    progress.clear()
    if report and (report.step < config.train.iterations or not config.train.iterations):
        runtime.print(stop_line(report, config))


def tell(report: StepReport, trainer: Trainer, folder: RunFolder, progress: ProgressLine) -> None:
    """A row for the metrics, and now and then a line for the log."""
    config = trainer.config
    if trainer.runtime.is_main:
        folder.append_metrics(asdict(report))
        progress.update(progress_text(report, config))
    if report.step <= 10 or report.step % config.train.train_log_every == 0:
        progress.clear()
        trainer.runtime.print(step_line(report, config))


def look(trainer: Trainer, data: TrainingData, report: StepReport, folder: RunFolder) -> None:
    """Score the weights as they are on training text that was held out. It says nothing of the artifact's score."""
    config, runtime, model = trainer.config, trainer.runtime, trainer.config.model
    rows = max(1, config.train.val_batch_size // model.train_seq_len // runtime.world_size)
    tokens = data.stream.held_out_tokens(model.bos_id)
    table, settings = ByteTable(data.tokenizer), plain_settings(model, rows)
    score = score_stream(trainer.model, tokens, table, settings, runtime, announce=False)
    runtime.print(holdout_line(score, report, config))
    if runtime.is_main:
        folder.append_metrics({"step": report.step, "elapsed": report.elapsed, "holdout_loss": score.val_loss})
    trainer.witness.act("validation", report.step)
    trainer.witness.prove("validation", score.nats > 0, f"{score.val_loss:.4f} nats per held-out token")


# ---- golf/run/machine.py ---------------------------------------------------------------------------------------------

"""The machine's fingerprint: what of hardware, software and settings changes speed or numerics.

What is not there, or can't be asked, is None: a fingerprint never stops a run.
"""

SPEED_VARIABLE = re.compile(r"(NCCL|CUDA|TORCH|TORCHINDUCTOR|OMP|MKL|PYTORCH)_(?!.*(DIR|HOME|PATH)$)")
"""Environment variables that change speed or numerics; names of folders change neither."""
GPU_QUERY = {
    "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem", "power_limit_w": "power.limit", "memory_used_mib": "memory.used",
    "driver": "driver_version",
}  # fmt: skip
"""Our names, and those of nvidia-smi."""


def machine_fingerprint(runtime: Runtime, environ: Mapping[str, str], folder: Path, config: Config) -> dict[str, Any]:
    """Plain JSON values; `folder` is the run's (it need not exist yet). `machine_id` is equal for runs of one machine,
    and its name can't be read back from it."""
    model, cuda, states = config.model, torch.cuda.is_available(), gpu_states()
    places = {"run": folder, "temporary": Path(tempfile.gettempdir())}
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if cuda else 0)]
    identity = "\n".join([platform.node(), str(cpu_model()), *(card.name for card in cards)])
    nccl = cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "machine_id": hashlib.sha256(identity.encode()).hexdigest()[:12],
        "platform": platform.platform(), "python": platform.python_version(), "torch": str(torch.__version__),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "device": runtime.device.type, "world_size": runtime.world_size, "compile": runtime.compiles,
        "compiler": choose_compile("auto", runtime.device),
        "gpus": [{"name": c.name, "capability": f"{c.major}.{c.minor}", "mib": c.total_memory >> 20} for c in cards],
        "driver": states[0].get("driver") if states else None,
        "gpu_states": states,
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "environment": {name: environ[name] for name in sorted(environ) if SPEED_VARIABLE.match(name)},
        "attention": {
            "training": attention_backend(runtime, model, model.train_seq_len, model.train_seq_len),
            "scoring": attention_backend(runtime, model, config.score.eval_stride, config.score.eval_seq_len),
        },
        "codecs": {name: codec_version(name) for name in ("lzma", "zlib", "zstandard", "brotli")},
        "free_bytes": {name: shutil.disk_usage(nearest_folder(path)).free for name, path in places.items()},
        "temporary_executable": folder_executes(Path(environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())),
    }  # fmt: skip


def cpu_model() -> str | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or None


def gpu_states() -> list[dict[str, Any]] | None:
    """Clocks, power limits, used memory and drivers of all GPUs at this moment; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        return parse_gpu_query(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def parse_gpu_query(text: str) -> list[dict[str, Any]]:
    """One dictionary per line of comma-separated values; what a card does not tell ("[N/A]") is None."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    numbers = [[float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None for value in row] for row in rows]
    return [dict(zip(GPU_QUERY, [*told[:-1], row[-1]], strict=False)) for told, row in zip(numbers, rows, strict=True)]


def codec_version(module: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    return str(getattr(found, "ZLIB_RUNTIME_VERSION", getattr(found, "__version__", "present")))


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def folder_executes(folder: Path) -> bool:
    """Whether a program that is written to `folder` may run: torch.compile builds there and loads what it built."""
    try:
        with tempfile.TemporaryDirectory(dir=nearest_folder(folder)) as scratch:
            script = Path(scratch, "probe")
            script.write_text("#!/bin/sh\n")
            script.chmod(0o700)
            return subprocess.run([script], timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def attention_backend(runtime: Runtime, model: ModelConfig, queries: int, time: int) -> str | None:
    """The kernel that runs below scaled_dot_product_attention for the last `queries` of `time` positions, from
    autograd's own record: "math" where no fused kernel did, None where neither left a trace. Takes no random numbers.
    (torch.profiler tells the same, but takes 1 s and writes to the terminal.)"""
    options = {"dtype": runtime.compute_dtype, "device": runtime.device, "requires_grad": True}
    sizes = ((queries, model.num_heads), (time, model.num_kv_heads), (time, model.num_kv_heads))
    shapes = ((1, length, heads, model.model_dim // model.num_heads) for length, heads in sizes)
    y_BHSK = causal_attention(*(torch.zeros(shape, **options).transpose(1, 2) for shape in shapes))
    nodes, names = [y_BHSK.grad_fn], []
    for node in nodes:  # grows on the way
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following]
    fused = [name.partition("Backward")[0] for name in names if name.startswith("ScaledDotProduct")]
    return fused[0] if fused else "math" if any("Bmm" in name for name in names) else None


# ---- golf/run/parity.py ----------------------------------------------------------------------------------------------

"""Parity: the trained model on its grid, the reloaded artifact and the scorer say the same of one row of text."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of a token's nats, by compute dtype."""


class ParityError(UserError):
    """Two forms of one model that score the same text differently."""


@torch.no_grad()
def trained_record(
    weights: Mapping[str, Tensor], stored: QuantizedState, config: Config, ids: list[int], runtime: Runtime
) -> dict[str, Any]:
    """parity.json: a row of training text, and the nats of its tokens by the trained weights, through the forward
    and the grid of training (what is stored as fp16 is rounded to it)."""
    model = GPT(config.model, runtime.compute_dtype)
    bits = {name: entry.bits for name, entry in stored.items() if isinstance(entry, QuantizedTensor)}
    model.load_state_dict({name: part if name in bits else part.half().float() for name, part in weights.items()})
    install_fake_quantization(model, config.quant, bits)
    return {"ids": ids, "losses": row_losses(model.to(runtime.device), ids).tolist()}


@torch.no_grad()
def row_losses(model: GPT, ids: list[int]) -> Tensor:
    """fp32 nats of every token but the first."""
    ids_1T = torch.tensor([ids], device=model.skip_weights.device)
    return model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:])[0].cpu()


@torch.no_grad()
def ntk_effect(model: GPT, record: Mapping[str, Any], score: ScoreConfig) -> float:
    """Largest change of a token's nats in the row by the scaled RoPE base; 0 where none is used."""
    ids_1T = torch.tensor([record["ids"]], device=model.skip_weights.device)
    scaled_base = sliding_settings(score, model.config).rope_base
    plain_1T, scaled_1T = (model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:], base) for base in (None, scaled_base))
    return (plain_1T - scaled_1T).abs().max().item()


def check_parity(model: GPT, record: Mapping[str, Any], byte_table: ByteTable, runtime: Runtime) -> dict[str, float]:
    """Mean nats of the row by the trained model, the reloaded one and the scorer. Raises ParityError."""
    trained_N = torch.tensor(record["losses"])
    with evaluation_mode(model):
        reloaded_N = row_losses(model, record["ids"])
    alone = replace(runtime, rank=0, world_size=1)
    tokens, settings = np.array(record["ids"], dtype=np.uint16), plain_settings(model.config, batch_seqs=1)
    score = score_stream(model, tokens, byte_table, settings, alone, announce=False)
    difference = (trained_N - reloaded_N).abs().max().item()
    means = {"trained": trained_N.mean().item(), "reloaded": reloaded_N.mean().item(), "scorer": score.val_loss}
    tolerance = TOLERANCES[runtime.compute_dtype]
    if not (difference <= tolerance and abs(means["scorer"] - means["reloaded"]) <= tolerance):
        raise ParityError(
            f"one row of text has {means['trained']:.6f} nats by the trained model, {means['reloaded']:.6f} by the "
            f"reloaded artifact, {means['scorer']:.6f} by the scorer: the artifact is not the model that was trained"
        )
    return means | {"largest_difference": difference}


# ---- golf/run/rehearsal.py -------------------------------------------------------------------------------------------

"""The way after training, walked once before it with the untrained model, so that what is missing shows at once."""

STATE_COPIES = 12
"""Bytes on the disk for each fp32 byte of weights: three checkpoints of weights, optimizer state and average."""


class RehearsalError(UserError):
    """Something that the stages after training need is not there."""


def rehearse(trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder) -> str:
    """Quantize, pack, reload and score a sliver of training text at the real shapes; returns a line for the log.

    Raises what the stages after training would raise, and RehearsalError for a disk that is too full.
    """
    config, state, runtime = trainer.config, trainer.model.state_dict(), trainer.runtime
    needed, free = STATE_COPIES * sum(4 * part.numel() for part in state.values()), shutil.disk_usage(folder.path).free
    if free < needed:
        raise RehearsalError(f"{folder.path}: {free >> 20} MiB are free, and a run needs {needed >> 20}: free some")
    path = folder.path / "rehearsal.golf"
    try:
        pruned, _ = prune_state(state, config.quant)
        stored = quantize_state(pruned, config.quant)
        sizes = write_artifact(path, stored, config.model, tokenizer.sha256, config.quant.codec)
        model = restore_model(read_artifact(path), runtime)
    finally:
        path.unlink(missing_ok=True)
    settings = sliding_settings(config.score, config.model)
    count = settings.seq_len + settings.stride * settings.batch_seqs
    tokens = trainer.batches.stream.tokens(0, count + 1).astype(np.uint16)
    job = prepare_job(model, tokens, ByteTable(tokenizer), settings, runtime.device)
    with evaluation_mode(model):
        sums = score_windows(job, 0, len(job.plan))
    assert sums.tokens == count
    return f"rehearsal: untrained artifact {sizes.total_bytes} bytes, {sums.nats / sums.tokens:.4f} nats per token"


# ---- golf/run/findings.py --------------------------------------------------------------------------------------------

"""What must hold of a finished run's figures; what features did is the witness's matter (witness.py)."""

def run_findings(figures: Mapping[str, Any]) -> list[str]:
    """One line for each limit that was broken and each probe that failed."""
    findings, over = [], figures["bytes_total"] - figures["limit_bytes"]
    if not math.isfinite(figures["val_bpb"]):
        findings.append(f"val_bpb is {figures['val_bpb']}: the model is no model")
    if over > 0:
        findings.append(
            f"{figures['bytes_total']:,} bytes of code and artifact are {over:,} over the limit of "
            f"{figures['limit_bytes']:,}: use fewer parameters or fewer bits"
        )
    for what, spent, cap in (
        ("training", figures["train_seconds"], figures["max_wallclock_seconds"]),
        ("scoring", figures["eval_seconds"], figures["max_eval_seconds"]),
    ):
        if 0 < cap < spent:
            findings.append(f"{what} took {spent:.1f} s, over its cap of {cap:.0f} s")
    for name, probe in figures["probes"].items():
        if probe["verdict"] == "FAIL":
            findings.append(f"legality probe {name} failed: {probe['detail']}")
    return findings


# ---- golf/run/result.py ----------------------------------------------------------------------------------------------

"""result.json: what a run measured, from the bytes on the disk."""

def training_record(trainer: Trainer, data_id: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    """training.json: what the training measured."""
    return {
        "params": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.step,
        "train_seconds": trainer.clock.seconds,
        "train_seconds_lost": trainer.lost_seconds,
        "train_tokens": trainer.step * trainer.config.train.train_batch_tokens,
        "swa_snapshots": trainer.average.count,
        "data_id": data_id,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_kind": tokenizer.kind,
        "world_size": trainer.runtime.world_size,
        "compiled": trainer.runtime.compiles,
    }


def pruning_record(fitted: FittedArtifact) -> dict[str, Any]:
    """pruning.json: what was taken away from the weights."""
    return {
        "pruned_codes": sum(tensor.codes_changed for tensor in fitted.prune_reports),
        "codes": sum(tensor.weights for tensor in fitted.prune_reports),
        "fit_actions": fitted.actions,
    }


def score_record(score: Score, val_data_id: str, unquantized: Score) -> dict[str, Any]:
    """score.json: the artifact's score; and that of the weights before quantization."""
    return {
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "val_tokens": score.tokens,
        "of_tokens": score.tokens,
        "partial": False,
        "val_bytes": score.bytes,
        "val_docs": score.documents,
        "val_data_id": val_data_id,
        "eval_stride": score.stride,
        "eval_windows": score.windows,
        "eval_seconds": score.seconds,
        "eval_tokens_per_second": score.window_tokens / score.seconds,
        "unquantized": {
            "val_loss": unquantized.val_loss,
            "val_bpb": unquantized.val_bpb,
            "note": "averaged weights before pruning and quantization, rows of the training length without overlap",
        },
    }


def full_witness(config: Config, session: Session) -> Witness:
    """The witness of training and averaging, with what the later stages tell."""
    folder = session.folder
    witness = Witness(config, folder.load_json(folder.effects))
    pruned, reloaded = folder.load_json(folder.pruning), folder.load_json(folder.reload)
    if config.quant.prune_frac > 0:
        witness.act("prune", count=pruned["pruned_codes"])
        witness.prove(
            "prune", pruned["pruned_codes"] > 0, f"changed {pruned['pruned_codes']} of {pruned['codes']} codes"
        )
    if config.score.eval_rope == "ntk":
        witness.act("ntk_rope", count=folder.load_json(folder.score)["eval_windows"])
        effect = reloaded["ntk_effect"]
        witness.prove("ntk_rope", effect > 0, f"changes a token's nats by up to {effect:.3g}")
    return witness


def build_result(config: Config, session: Session, probed: bool) -> dict[str, Any]:
    """All figures of the run; `findings` is empty when it is valid. `probed`: the legality probes did not break."""
    folder, runtime = session.folder, session.runtime
    artifact, code = read_artifact(folder.artifact), folder.code.read_bytes()
    witness = full_witness(config, session)
    figures = {
        "run_id": folder.path.name,
        "preset": config.run.preset,
        "config_hash": config_hash(config),
        "seed": config.run.seed,
        **folder.load_json(folder.training),
        **folder.load_json(folder.score),
        **folder.load_json(folder.pruning),
        **folder.load_json(folder.packing),
        "eval_seq_len": config.score.eval_seq_len,
        "eval_stride_asked": config.score.eval_stride,
        "max_wallclock_seconds": config.train.max_wallclock_seconds,
        "max_eval_seconds": config.score.max_eval_seconds,
        "iterations": config.train.iterations,
        "bytes_code": len(code),
        "bytes_model": artifact.byte_count,
        "bytes_total": len(code) + artifact.byte_count,
        "limit_bytes": config.run.limit_bytes,
        "artifact_sha256": artifact.sha256,
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "machine": machine_description(runtime),
        "device": runtime.device.type,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "resumes": len({row["session"] for row in session.ledger.rows}) - 1,
        "fingerprint": folder.load_json(folder.machine),
        "witness": witness.record(),
        "parity": folder.load_json(folder.reload)["parity"],
        "probes": folder.load_json(folder.probes) if folder.probes.exists() else {},
        "ledger": session.ledger.summary(),
    }
    broken = [] if probed else ["tools/check_run.py could not probe the score; see its message"]
    findings = [*witness.findings(), *run_findings(figures), *broken]
    return figures | {"valid": not findings, "findings": findings}


# ---- golf/score/deadline.py ------------------------------------------------------------------------------------------

"""A stride that can be scored in time, chosen before anything is scored: by timing batches and throwing them away."""

TIMED_BATCHES = 3
MARGIN = 1.05
"""Kept back of the time that is left, because a few batches are timed and not all."""


def forecast_seconds(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, forward: Forward
) -> float:
    """Seconds that scoring `tokens` would take on the slowest rank, from batches of its own share; no score is kept."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    first = min(begin + 1, end)  # not the long first window
    last = min(first + settings.batch_seqs, end)
    with evaluation_mode(model):
        score_windows(job, first, last)  # compiles, and warms up
        started = time.perf_counter()
        for _ in range(TIMED_BATCHES):
            score_windows(job, first, last)
    seconds = (time.perf_counter() - started) * (end - begin) / max(TIMED_BATCHES * (last - first), 1)
    return runtime.max_over_ranks(seconds)[0]


def settle_stride(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable,
    settings: ScoreSettings,
    runtime: Runtime,
    forward: Forward,
    max_seconds: float,
    started: float | None = None,
) -> ScoreSettings:
    """`settings`, the stride doubled until the forecast is within what is left of `max_seconds`; 0 is no limit.

    `started` is the reading of time.perf_counter when the scoring began, if that was not now.
    """
    started = time.perf_counter() if started is None else started
    while max_seconds:
        seconds = MARGIN * forecast_seconds(model, tokens, byte_table, settings, runtime, forward)
        left = max_seconds - runtime.max_over_ranks(time.perf_counter() - started)[0]
        if seconds <= left or settings.stride == settings.seq_len:
            break
        wider = min(2 * settings.stride, settings.seq_len)
        runtime.print(f"score:stride {settings.stride} -> {wider}: {seconds:.0f} s forecast, {left:.0f} s left")
        settings = replace(settings, stride=wider)
    return settings


# ---- golf/score/roundtrip.py -----------------------------------------------------------------------------------------

"""The score that counts: from the artifact's bytes, the tokenizer and the validation shards, and nothing else."""

def load_artifact_tokenizer(artifact: Artifact, path: str | Path) -> ByteTable:
    """The byte table of the artifact's tokenizer. Raises ScoreError where the file is another one."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != artifact.tokenizer_sha256:
        raise ScoreError(
            f"{path}: SHA-256 {tokenizer.sha256[:12]}... is not that of the artifact's tokenizer,"
            f" {artifact.tokenizer_sha256[:12]}...: give the tokenizer that made the training shards"
        )
    return ByteTable(tokenizer)


def load_validation(
    artifact: Artifact, tokenizer_path: str | Path, val_paths: Sequence[str | Path]
) -> tuple[np.ndarray, ByteTable | StreamBytes]:
    """Tokens of the validation shards, and what counts their bytes. Raises ScoreError where nothing can."""
    table, shards = load_artifact_tokenizer(artifact, tokenizer_path), without_sidecars(val_paths)
    tokens = validation_tokens(shards)
    counter = validation_bytes(table, shards, tokens)
    if isinstance(counter, ByteTable) and not counter.exact:
        raise ScoreError(
            f"{tokenizer_path}: text in CaseOps is scored by the bytes of the original text, and beside the validation"
            " shards are no *_val_bytes_NNNNNN.bin that say them: prepare or download them with the shards"
        )
    return tokens, counter


def stream_identity(tokens: np.ndarray) -> str:
    """16 hex digits of SHA-256 over a stream of tokens: the identity of validation data."""
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()[:16]


def score_weights(
    state: Mapping[str, Tensor], artifact: Artifact, tokenizer_path: str | Path, val_paths: Sequence[str | Path],
    rows: int, runtime: Runtime,
) -> Score:  # fmt: skip
    """What the weights of the artifact's model scored before they were quantized, in plain rows."""
    model = GPT(artifact.model, runtime.compute_dtype)
    model.load_state_dict(state)
    settings = plain_settings(artifact.model, max(1, rows // runtime.world_size))
    tokens, counter = load_validation(artifact, tokenizer_path, val_paths)
    return score_stream(model.to(runtime.device), tokens, counter, settings, runtime, announce=False)


def score_artifact(
    artifact: Artifact,
    tokenizer_path: str | Path,
    val_paths: Sequence[str | Path],
    score: ScoreConfig,
    runtime: Runtime,
    *,
    compiled: bool = False,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Score, str]:
    """Score the model in `artifact` on the validation shards, over all ranks, with sliding windows.

    Returns the score and the identity of the validation data. A `journal` is taken up where a killed process left
    it; `check` is called between its chunks, and may raise. Raises ScoreError for a tokenizer that is not the
    artifact's, or a stream that can't be scored; DataError for files that can't be read.
    """
    started = time.perf_counter()
    tokens, byte_table = load_validation(artifact, tokenizer_path, val_paths)
    model = restore_model(artifact, runtime)
    forward = compiled_losses(model) if compiled else model.token_losses
    settings = sliding_settings(score, artifact.model)
    subject = {
        "artifact": artifact.sha256, "data": stream_identity(tokens), "asked": asdict(settings),
        "rank": runtime.rank, "world_size": runtime.world_size,
    }  # fmt: skip
    if isinstance(byte_table, StreamBytes):
        subject["bytes"] = stream_identity(byte_table.bytes_N)
    begun = (journal and journal.identity) or {}
    stride = begun["stride"] if subject.items() <= begun.items() else 0
    largest, smallest = runtime.max_over_ranks(stride, -stride)
    if 0 < largest == -smallest:  # all ranks can go on, and with the same windows
        settings = replace(settings, stride=stride)
    else:
        settings = settle_stride(model, tokens, byte_table, settings, runtime, forward, score.max_eval_seconds, started)
    preparing = time.perf_counter() - started
    if journal:
        journal.start(subject | {"stride": settings.stride}, preparing)
    measured = score_stream(
        model, tokens, byte_table, settings, runtime, forward=forward, journal=journal, check=check
    )  # fmt: skip
    return measured if journal else replace(measured, seconds=measured.seconds + preparing), subject["data"]


# ---- train_gpt.py ----------------------------------------------------------------------------------------------------

BUNDLED = True  # True in the single file that tools/bundle.py makes of this script and golf/
PROGRAM = Program(Path(__file__).resolve(), BUNDLED)


def main(command: Command, session: Session) -> int:
    if command.score:
        return reload_and_score(RunFolder(command.score), session)
    folder = train_and_pack(command, session)
    return start_fresh_process(folder, command.debug)


# ---- first process: train, average, quantize, pack ----


def train_and_pack(command: Command, session: Session) -> RunFolder:
    """Everything from the text to the artifact's bytes; stages that a run has behind it are not done again."""
    with start_runtime(command.config.run, "train", session.log) as runtime:
        folder = take_up(command.resume) if command.resume else open_run(command.config, runtime)
        session.open(folder, runtime)
        config = folder.load_config()
        session.do("train", lambda: train(config, session), together=True)
        session.do("average", lambda: average(config, session))
        session.do("quantize", lambda: quantize(config, session))
        session.do("pack", lambda: pack(config, session))
        session.ledger.settle()
        session.interruption.check(f"before scoring; go on with --resume {folder.path.name}")
    return folder


def open_run(config: Config, runtime: Runtime) -> RunFolder:
    """A new run's folder, with its configuration, its machine, and the code that runs as it would be shipped."""
    config = locate_data(config, runtime, PROGRAM.script.parent)
    open_training_data(config)  # what is wrong with it is said before there is a folder
    folder = choose_run_folder(config, runtime)
    if runtime.is_main:
        folder.create(config)
        folder.save_json(folder.machine, machine_fingerprint(runtime, os.environ, folder.path, config))
        PROGRAM.freeze(folder)
    runtime.barrier()
    return folder


def take_up(path: Path) -> RunFolder:
    folder = RunFolder(path)
    PROGRAM.check(folder)
    return folder


def train(config: Config, session: Session) -> list[Path]:
    """Take steps until the budget is used up; what is left behind is a checkpoint."""
    folder, runtime, ledger = session.folder, session.runtime, session.ledger
    with ledger.phase("setup"):
        data = open_training_data(config)
        model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
        trainer = Trainer(model, config, runtime, data.stream)
        for line in opening_lines(trainer, data, folder):
            runtime.print(line)
    if config.run.rehearse and runtime.is_main:
        with ledger.phase("rehearse"):
            runtime.print(rehearse(trainer, data.tokenizer, folder))
    with ledger.phase("compile"):
        runtime.barrier()
        trainer.warm_up()
        take_up_checkpoint(trainer, folder)
    writer = CheckpointWriter(folder.checkpoints, runtime.rank, runtime.world_size)
    take_steps(trainer, data, session, writer)
    trainer.finish()
    last = writer.write(trainer.state(), trainer.step)
    writer.close()
    if runtime.is_main:
        folder.save_json(folder.training, training_record(trainer, data.data_id, data.tokenizer))
    return [last, folder.training]


def average(config: Config, session: Session) -> list[Path]:
    """From the last checkpoint to the weights that count."""
    folder, training = session.folder, session.folder.load_json(session.folder.training)
    state = read_checkpoint([folder.path / next(iter(session.book.stages["train"]))])
    witness = Witness(config, state.numbers["witness"])
    weights = final_weights(state, witness)
    if training["swa_snapshots"] >= 2:
        session.runtime.print(f"swa:applying averaged {training['swa_snapshots']} checkpoints")
    folder.save_json(folder.effects, prove_learned_features(weights, training["steps"], witness))
    save_weights(folder.weights, weights, config.model, config.quant, training["tokenizer_sha256"])
    return [folder.weights, folder.effects]


def quantize(config: Config, session: Session) -> list[Path]:
    """From weights to integer codes; coarser ones where the artifact would be over the limit."""
    folder, runtime, saved = session.folder, session.runtime, load_weights(session.folder.weights)
    room = config.run.limit_bytes - folder.code.stat().st_size
    fitted = fit_to_limit(
        saved.state, config.quant, config.model, saved.tokenizer_sha256, room, config.run.reserve_bytes, runtime.print
    )
    session.packed = fitted.data, fitted.sizes
    save_quantized(folder.quantized, fitted.stored)
    folder.save_json(folder.pruning, pruning_record(fitted))
    row = open_training_data(config).stream.tokens(0, config.model.train_seq_len + 1).tolist()
    folder.save_json(folder.parity, trained_record(fitted.pruned, fitted.stored, config, row, runtime))
    return [folder.quantized, folder.pruning, folder.parity]


def pack(config: Config, session: Session) -> list[Path]:
    """From codes to the artifact's bytes."""
    folder, sha256 = session.folder, session.folder.load_json(session.folder.training)["tokenizer_sha256"]
    stored = load_quantized(folder.quantized)
    data, sizes = session.packed or pack_artifact(stored, config.model, sha256, config.quant.codec)
    write_file_atomically(folder.artifact, data)
    folder.save_json(folder.packing, {"sizes": size_report_dict(sizes)})
    for line in packing_lines(folder, config):
        session.runtime.print(line)
    return [folder.artifact, folder.packing]


# ---- second process: reload, score, report ----


def start_fresh_process(folder: RunFolder, debug: bool) -> int:
    """Become a new process that knows nothing but the run's folder: what it scores is what the bytes say."""
    sys.stdout.flush()
    options = ["--debug"] if debug else []
    os.execv(sys.executable, [sys.executable, str(PROGRAM.script), "--score", str(folder.path), *options])


def reload_and_score(folder: RunFolder, session: Session) -> int:
    """Score the artifact and write result.json; returns the exit status."""
    config, session.ledger.phase_name = folder.load_config(), "load"
    PROGRAM.check(folder)
    with start_runtime(config.run, "score", session.log) as runtime:
        session.open(folder, runtime)
        session.do("reload", lambda: reload(config, session))
        session.do("score", lambda: score(config, session), together=True)
        session.do("report", lambda: report(config, session))
        return EXIT_FINDINGS if runtime.is_main and folder.load_json(folder.result)["findings"] else 0


def reload(config: Config, session: Session) -> list[Path]:
    """The artifact's model must say what the trained one said, and the scorer must agree."""
    folder, artifact = session.folder, read_artifact(session.folder.artifact)
    table = load_artifact_tokenizer(artifact, config.data.tokenizer_path)
    record, model = folder.load_json(folder.parity), restore_model(artifact, session.runtime)
    parity = check_parity(model, record, table, session.runtime)
    folder.save_json(folder.reload, {"parity": parity, "ntk_effect": ntk_effect(model, record, config.score)})
    return [folder.reload]


def score(config: Config, session: Session) -> list[Path]:
    """Bits per byte of the artifact on the validation shards, then of the weights before they were quantized."""
    folder, runtime, artifact = session.folder, session.runtime, read_artifact(session.folder.artifact)
    journal = ScoreJournal(folder.journal(runtime.rank))
    val_shards, tokenizer_path = find_shards(config.data.data_path, "val"), config.data.tokenizer_path

    def check() -> None:
        if session.interruption.requested:
            runtime.print(partial_line(journal))
        session.interruption.check(f"while scoring; go on with --resume {folder.path.name}")
        session.ledger.settle()

    for line in scoring_lines(config, artifact.model):
        runtime.print(line)
    measured, val_data_id = score_artifact(
        artifact, tokenizer_path, val_shards, config.score, runtime,
        compiled=runtime.compiles_scoring, journal=journal, check=check,
    )  # fmt: skip
    for line in final_lines(measured, config.quant):
        runtime.print(line)
    with session.ledger.phase("compare"):
        state, rows = load_weights(folder.weights).state, config.train.val_batch_size // config.model.train_seq_len
        unquantized = score_weights(state, artifact, tokenizer_path, val_shards, rows, runtime)
        runtime.print(f"unquantized, plain rows: val_loss:{unquantized.val_loss:.4f} val_bpb:{unquantized.val_bpb:.4f}")
    if runtime.is_main:
        folder.save_json(folder.score, score_record(measured, val_data_id, unquantized))
    return [folder.score, journal.path]


def report(config: Config, session: Session) -> list[Path]:
    """All that was measured, in result.json, with what is wrong with it; then a table and pictures."""
    folder, runtime = session.folder, session.runtime
    folder.probes.unlink(missing_ok=True)
    status = PROGRAM.run_tool("check_run.py", folder.path, "--write")
    result = build_result(config, session, probed=status is None or folder.probes.exists())
    folder.save_json(folder.result, result)
    for finding in result["findings"]:
        runtime.print(f"INVALID: {finding}")
    runtime.print(result_line(result))
    PROGRAM.run_tool("report.py", folder.path)
    return [folder.result]


def run_program(arguments: list[str]) -> int:
    """The exit status of the whole. A user's mistake, a stop, a lost machine have one line each, ours a traceback."""
    session = Session()
    try:
        if "--plan" in arguments:
            return PROGRAM.run_tool("plan.py", *(word for word in arguments if word != "--plan")) or 0
        return main(parse_command(arguments, os.environ), session)
    except (UserError, OSError, RuntimeError) as error:
        status, message = explain_error(error, session.interruption.world_size)
        if not status or "--debug" in arguments:
            traceback.print_exc()
        session.log.error(f"train_gpt.py: {message or error}")
        return status or EXIT_FINDINGS


if __name__ == "__main__":
    sys.exit(run_program(sys.argv[1:]))
