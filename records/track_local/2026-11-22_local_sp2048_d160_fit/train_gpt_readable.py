# Made by tools/bundle.py from train_gpt.py and the modules it needs: edit those, not this file.
# sha256 of the parts: 822add1c6ddae56d68a67f97161eda15d006ebb75d7ea0e20377ccebda259fc7
#   a739f5562cc569b6    62 lines  golf/presets.py
#   38af2e295e614be3   359 lines  golf/config.py
#   474778d36c4cbe98   152 lines  golf/artifact/codecs.py
#   855f19d5bdb2f126    60 lines  golf/quant/grid.py
#   ee56f01422d8dbc6    41 lines  golf/quant/policy.py
#   3aa4d2f62afe57bd    46 lines  golf/quant/trellis.py
#   5ecc394557b8a878    93 lines  golf/quant/stored.py
#   14d79f2dab3d212f   152 lines  golf/artifact/forms.py
#   696d7c047cbdd16a    86 lines  golf/artifact/frame.py
#   5ea2c0b83db8d563   101 lines  golf/artifact/rans.py
#   0141b28d6bd8cb4c   248 lines  golf/artifact/magnitudes.py
#   41fa0454bda882cb   119 lines  golf/artifact/stacks.py
#   cbdfe903a40718d8   140 lines  golf/artifact/sequences.py
#   1869e700710e48db    66 lines  golf/artifact/references.py
#   971ad0e10940cbdb   107 lines  golf/artifact/streams.py
#   8703f782440b7bbf   227 lines  golf/artifact/layout.py
#   ac6ae07fc4c922cd    75 lines  golf/artifact/settings.py
#   2a3b64e490d1b6bf    35 lines  golf/artifact/shapes.py
#   a110033bd8951824    98 lines  golf/artifact/sizes.py
#   41d9118d84902d0b   241 lines  golf/runtime.py
#   b090505db1791876   247 lines  golf/artifact/container.py
#   1ecfe3371d4b9d72    42 lines  golf/quant/export.py
#   80a71053676197ec    66 lines  golf/quant/prune.py
#   f59d10a83396c944   125 lines  golf/artifact/fit.py
#   2d127dccecc7c3d4    44 lines  golf/model/layers.py
#   3e97ba387375f701    33 lines  golf/model/rotary.py
#   1cb838f7d97596e6    88 lines  golf/model/block.py
#   816514c4fa90140d    61 lines  golf/model/embedding.py
#   043ab85eccaf6b97    85 lines  golf/model/gpt.py
#   2c9897cd9d9142aa   239 lines  golf/quant/calibration.py
#   60ecd1741ec890eb    61 lines  golf/quant/permute.py
#   024c35ee97a700c0    87 lines  golf/quant/rate.py
#   9d6cb7dc45713838   105 lines  golf/quant/spec.py
#   d5be61f184dc2556   213 lines  golf/quant/rounding.py
#   4bc1eb0a56ad2400   304 lines  golf/quant/gptq.py
#   bf04346e2c304916    75 lines  golf/quant/trellis_search.py
#   d4183fccd86547b6   121 lines  golf/quant/steps.py
#   99638965810f70cb   144 lines  golf/artifact/level_fit.py
#   4f6e88fe2162103e    13 lines  golf/artifact/restore.py
#   ad675f0d02d54025   105 lines  golf/artifact/weights.py
#   4caad2626f2a95fd    99 lines  golf/data/shards.py
#   1c4f7ed6e8191000    47 lines  golf/model/init.py
#   0f9efc15576c304c   131 lines  golf/run/checkpoint.py
#   18f8fe4e7b226e24    77 lines  golf/run/witness.py
#   b52b57ac0541cdd7    32 lines  golf/run/averaging.py
#   2bb44ab26e5afb1d   180 lines  golf/data/loader.py
#   6fabbd4d059e2b65    82 lines  golf/run/calibrating.py
#   96517e451fb43857    66 lines  golf/run/guard.py
#   7efbb407df6051fe   106 lines  golf/run/folder.py
#   faf11df00a1c74b8    52 lines  golf/run/code.py
#   97e848a72ea8beed    79 lines  golf/run/command.py
#   0eb8a4dd9f80eecb   111 lines  golf/data/tokenizers_plain.py
#   88b09b1c6dbf452f   246 lines  golf/data/tokenizer.py
#   105e6e7805b7a3f8    78 lines  golf/data/manifest.py
#   0fbf058926f50d3c   101 lines  golf/run/datasets.py
#   0640477dc484d42b    47 lines  golf/run/interruption.py
#   a7e8495051c09b95    79 lines  golf/data/orders.py
#   bdea400babea624a    36 lines  golf/optim/average.py
#   c9b67a8849bf0f94    92 lines  golf/optim/muon.py
#   dc588ee79d2994ce    94 lines  golf/optim/groups.py
#   ff79065e522a6cf6    49 lines  golf/optim/schedule.py
#   3dddf59358b60d3e    57 lines  golf/quant/qat.py
#   5937b00757160a9a   276 lines  golf/run/training.py
#   3e98312d1b832231    67 lines  golf/score/journal.py
#   d74ed4affc37139a   123 lines  golf/data/sidecar.py
#   afcb9e4ed79bc50e    84 lines  golf/score/progress.py
#   2e1f839dd868e6e4    59 lines  golf/score/windows.py
#   ee99f335b46a043e   364 lines  golf/score/scorer.py
#   76c8ef9f73890f4a   140 lines  golf/run/report.py
#   8675f09efdc46e16   109 lines  golf/run/ledger.py
#   d9b51ac4fb271a32    46 lines  golf/run/stages.py
#   089d1ec7cad8b71f    87 lines  golf/run/session.py
#   f4e860d52842ff93    85 lines  golf/run/loop.py
#   90300c9679edba36   128 lines  golf/run/machine.py
#   3054951c1ba54a1f    75 lines  golf/run/parity.py
#   cada54ba719efff0    63 lines  golf/run/rehearsal.py
#   3104378eb8e49c94    27 lines  golf/run/findings.py
#   aeffb8e52cc72c84   130 lines  golf/run/result.py
#   cd6fe4dfa944ac09    59 lines  golf/score/deadline.py
#   e027d4ed8c457fae   116 lines  golf/score/roundtrip.py
#   4b18f4278f809c59   259 lines  train_gpt.py

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
from functools import cache, cached_property, partial
from itertools import accumulate, islice, pairwise
from math import gcd, prod
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from types import FrameType, ModuleType
from typing import Any, Literal, Protocol, TextIO, cast, get_args, get_origin


# ---- golf/presets.py -------------------------------------------------------------------------------------------------

"""The named presets: what each changes in the defaults of golf/config.py, which are the leaderboard recipe's."""

LOCAL: dict[str, Any] = dict(
    limit_bytes=500_000, data_path="", tokenizer_path="", corpus="embedded", row_order="spread", device="cpu",
    compile="auto", vocab_size=2048, num_layers=2, model_dim=160, num_heads=4, num_kv_heads=2, mlp_mult=2.5,
    bigram_vocab_size=1024, bigram_dim=32, train_seq_len=128, max_wallclock_seconds=180.0,
    train_batch_tokens=2048, micro_batch_tokens=2048, warmup_steps=2, warmdown_fraction=0.8, muon_momentum=0.95,
    swa_start=0.94, swa_snapshots=16, val_loss_every=0, train_log_every=100, val_batch_size=16_384, embed_bits=5,
    qat_enabled=False, prune_frac=0.0, quantizer="fit", codec="rans", calibration_tokens=32_768,
    calibration_reserve=6.0, reserve_bytes=1_000, eval_seq_len=160, eval_stride=32, eval_batch_seqs=128,
)  # fmt: skip

BASELINE: dict[str, Any] = dict(
    num_layers=9, mlp_mult=2.0, bigram_vocab_size=0, bigram_dim=0, smear_gate=False, resid_mix_init="stream",
    matrix_init="uniform", train_seq_len=1024, train_batch_tokens=524_288, micro_batch_tokens=65_536,
    warmdown_fraction=0.09, warmdown_shape="linear", matrix_lr=0.04, tied_embed_lr=0.05, scalar_lr=0.04,
    muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup_fraction=0.036, muon_weight_decay=0.0,
    embed_weight_decay=0.0, scalar_weight_decay=0.0, grad_clip_norm=0.0, swa_enabled=False, qat_enabled=False,
    mlp_bits=8, attn_bits=8, bigram_bits=8, embed_bits=8, prune_frac=0.0, quantizer="grid", codec="zlib",
    eval_seq_len=1024, eval_stride=1024, eval_rope="none", val_loss_every=1000, train_log_every=200, seed=1337,
)  # fmt: skip

BASELINE_LOCAL: dict[str, Any] = LOCAL | BASELINE | dict(
    vocab_size=1024, num_layers=3, model_dim=128, train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048,
    val_loss_every=0, train_log_every=100, reserve_bytes=10_000, eval_seq_len=256, eval_stride=256,
)  # fmt: skip

STORIES: dict[str, Any] = LOCAL | dict(
    vocab_size=0, num_layers=6, model_dim=192, num_heads=6, num_kv_heads=6, mlp_mult=4.0, bigram_vocab_size=0,
    bigram_dim=0, smear_gate=False, train_seq_len=256, train_batch_tokens=1024, micro_batch_tokens=1024,
    max_wallclock_seconds=300.0, qat_enabled=False, mlp_bits=8, attn_bits=8, embed_bits=16, prune_frac=0.0,
    quantizer="grid", codec="lzma", reserve_bytes=10_000, limit_bytes=4_000_000, eval_seq_len=256, eval_stride=256,
    eval_rope="none", eval_batch_seqs=8,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "leaderboard": {},
    "local": LOCAL,
    "baseline": BASELINE,
    "baseline-local": BASELINE_LOCAL,
    "stories": STORIES,
}
"""By name."""

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


# ---- golf/config.py --------------------------------------------------------------------------------------------------

"""Every knob of the pipeline: frozen dataclasses, presets, and the one reader of the environment.

A knob has one lower-case name, unique over the whole tree, and answers to it in upper case as an
environment variable (``train_seq_len`` is ``TRAIN_SEQ_LEN``). Precedence: preset, then environment,
then ``key=value`` on the command line. Horizons are fractions of the binding budget (steps or seconds,
whichever is nearer its end), so that they act on a machine of any speed.
"""

CODECS = Literal["rans", "brotli", "lzma", "zstd", "zlib", "none"]


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
    """0: the tokenizer's; text is then prepared in characters."""
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
    quantizer: Literal["grid", "fit"] = "grid"
    """grid: rounded to nearest on the bits above; fit: GPTQ after calibration, steps chosen to fill the byte limit."""
    calibration_tokens: int = 131_072
    """Tokens that quantizer=fit measures the weights on."""
    calibration_text: Literal["train", "generated"] = "train"
    """Training text, or text that the model makes up itself."""
    calibration_reserve: float = 8.0
    """Seconds of max_wallclock_seconds that training leaves to the calibration of quantizer=fit."""
    rate_weight: float = 0.15
    """What a code's bits count beside its error in quantizer=fit; 1: their full price; 0: the error decides alone."""


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
    unheard = sorted(chosen.keys() & GRID_KNOBS)
    if unheard and config.quant.quantizer == "fit":
        raise ConfigError(f"{unheard[0]} does nothing with quantizer=fit, which chooses all steps: set quantizer=grid")
    check_config(config)
    return config


GRID_KNOBS = {"mlp_bits", "attn_bits", "bigram_bits", "embed_bits", "qat_start"}
"""Of the grid that weights train through and are rounded to; a fit has no use for them."""
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
        (
            quant.quantizer == "grid" or not (quant.qat_enabled or quant.prune_frac),
            "quantizer=fit chooses its own grid: set qat_enabled=0 and prune_frac=0, or quantizer=grid",
        ),
        (
            quant.quantizer == "grid" or quant.calibration_tokens >= model.train_seq_len,
            "calibration_tokens must be at least a row of train_seq_len",
        ),
        (
            quant.quantizer == "grid"
            or quant.calibration_reserve < train.max_wallclock_seconds
            or not train.max_wallclock_seconds,
            "calibration_reserve leaves no time to train: raise max_wallclock_seconds",
        ),
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

"""Byte streams <-> fewer bytes: lzma, zstd, brotli, zlib, none. Decoding never makes more than was declared.

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


def require_brotli() -> ModuleType:
    """The brotli package, of a version whose output can be bounded, or an error."""
    try:
        import brotli
    except ModuleNotFoundError:
        raise ArtifactError(
            "codec brotli needs the package brotli: pip install 'brotli>=1.2', or choose rans"
        ) from None
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise ArtifactError(f"codec brotli needs brotli 1.2 or later, this is {brotli.__version__}")
    return brotli


def encode_brotli(data: bytes) -> bytes:
    return require_brotli().compress(data, quality=11, lgwin=24)


def decode_brotli(data: bytes, size: int) -> bytes:
    brotli = require_brotli()
    decoder = brotli.Decompressor()
    try:
        decoded = decoder.process(data, output_buffer_limit=size + 1)
        while len(decoded) <= size and not decoder.can_accept_more_data():
            more = decoder.process(b"", output_buffer_limit=size + 1 - len(decoded))
            if not more:
                break
            decoded += more
    except brotli.error as error:
        raise ArtifactError(f"a brotli stream is damaged: {error}") from None
    if not decoder.is_finished():
        raise ArtifactError("a brotli stream is damaged: it does not end where it should")
    return decoded


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
        "brotli": [encode_brotli],
        "zlib": [encode_zlib],
    }
    return smallest_encoding(encoders[codec], data)


def decompress_stream(codec: str, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or ArtifactError; memory stays within a few times `size` and the codec's window."""
    decoders: dict[str, Callable[[bytes, int], bytes]] = {
        "lzma": decode_lzma, "zstd": decode_zstd, "brotli": decode_brotli, "zlib": decode_zlib,
        "none": lambda data, size: data,
    }  # fmt: skip
    try:
        decoded = decoders[codec](data, size)
    except (lzma.LZMAError, zlib.error, EOFError, MemoryError) as error:
        raise ArtifactError(f"a {codec} stream is damaged: {error}") from None
    if len(decoded) != size:
        raise ArtifactError(f"a {codec} stream does not hold the {size:,} bytes that were declared")
    return decoded


# ---- golf/quant/grid.py ----------------------------------------------------------------------------------------------

"""The symmetric per-row grid of training and export: one rule, so that the weights that trained are those that ship.

R rows, C columns.
"""

FP16_TINY = 2.0**-14
"""Smallest normal fp16 (6.104e-5): the floor of a row's scale, so that an all-zero row has one too."""
FP16_MAX = 65_504.0


def grid_clip(bits: int) -> int:
    """Largest code of a symmetric grid: 1 for 1 bit (codes -1 and 1), 15 for 5 bits, 31 for 6, 127 for 8."""
    assert 1 <= bits <= 8
    return max(2 ** (bits - 1) - 1, 1)


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


# An operator of its own, which torch.compile calls but does not rewrite: inductor keeps the fp16 rounding of the
# scale in fp32 and approximates the division, and then nearly every value differs from the exported one.
@torch.library.custom_op("golf::fake_quantize_rows", mutates_args=())
def fake_quantize_rows(weight_RC: Tensor, bits: int) -> Tensor:
    """What the exported codes and scales gives, bit for bit, with the gradient of the identity.

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


# ---- golf/quant/trellis.py -------------------------------------------------------------------------------------------

"""The grid of trellis-coded quantization: codes of a coarse grid that stand for points of one twice as fine.

The fine grid is split into its even and its odd points. Each row walks through a trellis: its state says which half
the next weight comes from, and the parity of the code moves the state on. A code costs as much as on the coarse grid,
while a search over the walks (trellis_search.py) finds points nearly as close as on the fine one. Union quantizers
with codes for the index given the half: Marcellin and Fischer 1990, Joshi, Crump and Fischer 1995 (ECTCQ); "dependent
quantization" in VVC. The trellis is the systematic feedback code of 8 states of Ungerboeck 1982, table I.

R rows, C columns.
"""

TRELLIS_STATES, PARITY_H0, PARITY_H1 = 8, 0b1011, 0b100
"""The parity-check polynomials: bit i is the coefficient of D^i, D a column's delay."""


def shifted_columns(bits_RC: Tensor, by: int) -> Tensor:
    """Each row moved `by` columns to the right, zeros coming in."""
    moved_RC = torch.zeros_like(bits_RC)
    if by < bits_RC.size(1):
        moved_RC[:, by:] = bits_RC[:, : bits_RC.size(1) - by]
    return moved_RC


def times_polynomial(bits_RC: Tensor, polynomial: int, stretch: int = 1) -> Tensor:
    """Rows as power series over GF(2), times polynomial(D^stretch)."""
    product_RC = torch.zeros_like(bits_RC)
    for i in range(polynomial.bit_length()):
        if polynomial >> i & 1:
            product_RC ^= shifted_columns(bits_RC, i * stretch)
    return product_RC


def trellis_halves(codes_RC: Tensor) -> Tensor:
    """int8 0 or 1 per code: which half of the fine grid it is of, rows starting in state 0. No loop over columns.

    halves = parities h1 / h0, and 1 / h0 = h0(D) h0(D^2) h0(D^4) ..., because h0(D)^(2^k) = h0(D^(2^k)) is 1 up to D^C.
    """
    halves_RC = times_polynomial(codes_RC & 1, PARITY_H1)
    stretch = 1
    while stretch < codes_RC.size(1):
        halves_RC = times_polynomial(halves_RC, PARITY_H0, stretch)
        stretch *= 2
    return halves_RC


# ---- golf/quant/stored.py --------------------------------------------------------------------------------------------

"""The stored form of a weight: integer codes, their steps, and the exact way back to fp32.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, K rank of the correction.
"""

PLAIN_PARTS = ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
"""Tensors of a QuantizedTensor, the optional ones last."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """weight_rc = (code_rc - zero_rg) * scale_rg * column_scale_c + (left @ right)_rc, g the group of column c.

    Groups are equally wide but for the last, which may be narrower. Everything is small whole numbers or fp16, so
    dequantization is the same on every machine.
    """

    codes_RC: Tensor
    """int8, within the grid of `bits`: -clip..clip, without 0 for 1 bit; 0..2^bits - 1 (less 128 for 8) with zeros."""
    scale_SG: Tensor
    """fp16, positive; one row of scales serves all rows, or each row has its own."""
    bits: int
    column_scale_C: Tensor | None = None
    """fp16, positive; None: 1 for every column."""
    zero_SG: Tensor | None = None
    """int8, the code that stands for 0; None: symmetric."""
    low_rank: tuple["QuantizedTensor", "QuantizedTensor"] | None = None
    """left_RK and right_KC, quantized themselves: a correction of the rounding error (LQER, arXiv 2402.02446)."""
    trellis: bool = False
    """Codes stand for points 2 code + half of the trellis grid (golf/quant/trellis.py)."""


QuantizedState = dict[str, QuantizedTensor | Tensor]
"""Stored form of each tensor by name: codes and scales, or an fp16 tensor."""


def group_width(columns: int, groups: int) -> int:
    """Columns of every group but the last."""
    return -(-columns // groups)


def spread_groups(values_SG: Tensor, columns: int) -> Tensor:
    """values_SC: each group's value at each of its columns; as it is where there is one group."""
    groups = values_SG.size(1)
    if groups == 1:
        return values_SG
    return values_SG.repeat_interleave(group_width(columns, groups), dim=1)[:, :columns]


def dequantize_tensor(entry: QuantizedTensor) -> Tensor:
    """The fp32 weights that `entry` stands for."""
    columns = entry.codes_RC.size(1)
    weight_RC = entry.codes_RC.float()
    if entry.trellis:
        weight_RC = 2 * weight_RC + trellis_halves(entry.codes_RC).float()
    if entry.zero_SG is not None:
        weight_RC = weight_RC - spread_groups(entry.zero_SG.float(), columns)
    weight_RC = weight_RC * spread_groups(entry.scale_SG.float(), columns)
    if entry.column_scale_C is not None:
        weight_RC = weight_RC * entry.column_scale_C.float()
    if entry.low_rank is not None:
        left_RK, right_KC = map(dequantize_tensor, entry.low_rank)
        for k in range(left_RK.size(1)):  # one after the other: the order of a matrix product is the machine's
            weight_RC = weight_RC + left_RK[:, k : k + 1] * right_KC[k]
    return weight_RC


def dequantize_state(stored: QuantizedState) -> dict[str, Tensor]:
    """fp32 weights that `stored` stands for: those of the model that is scored."""
    return {
        name: dequantize_tensor(entry) if isinstance(entry, QuantizedTensor) else entry.float()
        for name, entry in stored.items()
    }


def same_stored(one: QuantizedTensor | Tensor | None, other: QuantizedTensor | Tensor | None) -> bool:
    """Whether two stored tensors hold the same numbers in the same form."""
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        pairs = [
            (getattr(one, part), getattr(other, part)) for part in ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
        ]
        pairs += zip(one.low_rank or (None, None), other.low_rank or (None, None), strict=True)
        return (one.bits, one.trellis) == (other.bits, other.trellis) and all(same_stored(*pair) for pair in pairs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is None and other is None


# ---- golf/artifact/forms.py ------------------------------------------------------------------------------------------

"""Which parts a stored tensor has: what an artifact must say of it beside its shape, and what takes its parts together.

R rows, C columns, S rows of scales, G groups of columns, K rank of the correction.
"""

STORABLE_BITS = (*range(1, 9), FP16_BITS)
FACTOR_NAMES = ("left", "right")


@dataclass(frozen=True)
class Form:
    """One tensor, or one factor of a correction (by the name `tensor:left` or `tensor:right`)."""

    shape: tuple[int, ...]
    bits: int
    row_scales: bool = True
    """A row of scales for each row; else one for all."""
    groups: int = 1
    column_scales: bool = False
    zeros: bool = False
    trellis: bool = False
    rank: int = 0

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (self.shape[0] if self.row_scales else 1), self.groups

    @property
    def code_range(self) -> tuple[int, int]:
        if not self.zeros:
            return -grid_clip(self.bits), grid_clip(self.bits)
        return (-128, 127) if self.bits == 8 else (0, 2**self.bits - 1)


Forms = dict[str, Form]


def forms_of_entry(name: str, entry: QuantizedTensor | Tensor) -> Forms:
    """The form of a stored tensor, and of its factors. Raises ArtifactError where its parts don't fit together."""
    if isinstance(entry, Tensor):
        return {name: Form(tuple(entry.shape), FP16_BITS)}
    shape, (scale_rows, groups) = tuple(entry.codes_RC.shape), entry.scale_SG.shape
    rank = entry.low_rank[0].codes_RC.size(1) if entry.low_rank else 0
    form = Form(
        shape, entry.bits, scale_rows == shape[0], groups, entry.column_scale_C is not None, entry.zero_SG is not None,
        entry.trellis, rank,
    )  # fmt: skip
    sound = entry.bits in STORABLE_BITS[:-1] and 0 < groups <= shape[1] and scale_rows == form.scale_shape[0]
    if entry.column_scale_C is not None:
        sound &= tuple(entry.column_scale_C.shape) == shape[1:]
    if entry.zero_SG is not None:
        sound &= entry.zero_SG.shape == entry.scale_SG.shape
    forms = {name: form}
    for side, factor in zip(FACTOR_NAMES, entry.low_rank or (), strict=False):
        expected = (shape[0], rank) if side == "left" else (rank, shape[1])
        sound &= rank > 0 and factor.low_rank is None and tuple(factor.codes_RC.shape) == expected
        forms |= forms_of_entry(f"{name}:{side}", factor)
    if not sound:
        raise ArtifactError(f"the parts of tensor {name!r} do not fit together")
    return forms


def forms_of_state(stored: QuantizedState) -> Forms:
    forms: Forms = {}
    for name, entry in stored.items():
        forms |= forms_of_entry(name, entry)
    return forms


def is_factor(name: str) -> bool:
    return ":" in name


def all_entries(stored: QuantizedState) -> QuantizedState:
    """Tensors and the factors of their corrections, by the names of `Forms`."""
    entries: QuantizedState = {}
    for name, entry in stored.items():
        entries[name] = entry
        if isinstance(entry, QuantizedTensor):
            entries |= {f"{name}:{side}": f for side, f in zip(FACTOR_NAMES, entry.low_rank or (), strict=False)}
    return entries


def form_to_json(name: str, forms: Forms) -> list:
    """[row_scales, groups, column_scales, zeros, trellis]; with a correction also its rank, and both factors' bits and
    forms."""
    form = forms[name]
    values: list = [int(form.row_scales), form.groups, int(form.column_scales), int(form.zeros), int(form.trellis)]
    if form.rank:
        values.append(form.rank)
        for side in FACTOR_NAMES:
            factor = f"{name}:{side}"
            values += [forms[factor].bits, form_to_json(factor, forms)]
    return values


def forms_from_json(name: str, shape: tuple[int, ...], bits: object, values: object, factor: bool = False) -> Forms:
    """Inverse of `form_to_json`, from untrusted values. Raises ArtifactError."""
    if type(bits) is not int or bits not in STORABLE_BITS or (bits != FP16_BITS and len(shape) != 2):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of bits")
    fits = isinstance(values, list) and len(values) in ((5,) if factor else (5, 10)) and len(shape) == 2
    if (
        not fits
        or bits == FP16_BITS
        or any(type(values[i]) is not int or values[i] not in (0, 1) for i in (0, 2, 3, 4))
    ):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible form")
    rows, columns = shape
    rank = values[5] if len(values) == 10 else 0
    if type(values[1]) is not int or not 1 <= values[1] <= columns:
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible number of groups")
    if type(rank) is not int or not (len(values) == 10) <= rank <= min(rows, columns):
        raise ArtifactError(f"the artifact gives tensor {name!r} an impossible rank")
    forms = {
        name: Form(shape, bits, bool(values[0]), values[1], bool(values[2]), bool(values[3]), bool(values[4]), rank)
    }
    if rank:
        forms |= forms_from_json(f"{name}:left", (rows, rank), values[6], values[7], factor=True)
        forms |= forms_from_json(f"{name}:right", (rank, columns), values[8], values[9], factor=True)
    return forms


def check_codes(name: str, codes_RC: Tensor, form: Form) -> None:
    """Raise ArtifactError for codes outside their grid."""
    low, high = form.code_range
    binary_zero = form.bits == 1 and not form.zeros and bool((codes_RC == 0).any())
    if codes_RC.numel() and (codes_RC.min() < low or codes_RC.max() > high or binary_zero):
        raise ArtifactError(f"tensor {name!r} has codes outside its {form.bits}-bit grid")


def join_entry(name: str, forms: Forms, parts: Mapping[str, Mapping[str, Tensor]]) -> QuantizedTensor | Tensor:
    """A stored tensor from the parts of all streams (role -> name -> tensor)."""
    form = forms[name]
    if form.bits == FP16_BITS:
        return parts["fp16"][name]
    check_codes(name, parts["codes"][name], form)
    factors = tuple(join_entry(f"{name}:{side}", forms, parts) for side in FACTOR_NAMES) if form.rank else None
    return QuantizedTensor(
        parts["codes"][name].to(torch.int8), parts["scales"][name], form.bits, parts["columns"].get(name),
        parts["zeros"].get(name), factors, form.trellis,
    )  # fmt: skip


# ---- golf/artifact/frame.py ------------------------------------------------------------------------------------------

"""The outer form of an artifact: magic, version, checksum, codec, fields; and files that are put in place at once.

b"GOLF" | version, 1 byte | SHA-256, 32 bytes | codec, 1 byte | (LEB128 length, bytes) ...
The SHA-256 is of the version byte and all that follows the SHA-256; in version 1 of the latter alone.
"""

ARTIFACT_MAGIC = b"GOLF"
ARTIFACT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 knows neither brotli nor rans, and only tensors with a scale for each row."""
DIGEST_START = len(ARTIFACT_MAGIC) + 1
DIGEST_END = DIGEST_START + 32
LARGEST_FILE = 2**30
LONGEST_NUMBER = 5
"""Bytes of a LEB128 number; enough for 2**35."""
CODEC_IDS = {"none": 0, "zlib": 1, "lzma": 2, "zstd": 3, "brotli": 4, "rans": 5}


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


def frame_digest(version: int, body: bytes) -> bytes:
    return hashlib.sha256((b"" if version == 1 else bytes([version])) + body).digest()


def frame_artifact(codec: str, fields: Iterable[bytes]) -> bytes:
    body = bytes([CODEC_IDS[codec]]) + b"".join(encode_number(len(field)) + field for field in fields)
    return ARTIFACT_MAGIC + bytes([ARTIFACT_VERSION]) + frame_digest(ARTIFACT_VERSION, body) + body


def unframe_artifact(data: bytes) -> tuple[str, list[bytes]]:
    """(codec, fields) of an artifact whose checksum holds. Raises ArtifactError."""
    if data[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise ArtifactError("not an artifact: it does not begin with GOLF")
    if len(data) <= DIGEST_END:
        raise ArtifactError("the artifact is truncated: it ends within its header")
    version = data[DIGEST_START - 1]
    if version not in READABLE_VERSIONS:
        raise ArtifactError(f"artifact version {version} is unknown: this reads up to {ARTIFACT_VERSION}")
    if frame_digest(version, data[DIGEST_END:]) != data[DIGEST_START:DIGEST_END]:
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


# ---- golf/artifact/rans.py -------------------------------------------------------------------------------------------

"""Interleaved range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) in numpy: integers only, many lanes.

A symbol of frequency f out of 2^16 takes 16 - log2(f) bits. Each lane's state stays in [2^24, 2^40); what does not fit
leaves it as 16-bit words. The writer goes through the symbols backwards, so that the reader can go forwards and adapt
its frequencies to what it has read. Model code talks to both through `step` and need not know which one it has.
N symbols of a step, K contexts, A symbols of the alphabet.
"""

FREQUENCY_BITS = 16
LOWEST_STATE = 2**24
STATE_BYTES = 5
FEWEST_LANES, MOST_LANES = 4, 256
SYMBOLS_PER_LANE = 2**14
"""A lane costs 5 bytes, few lanes cost time: so many symbols each, within the limits."""


def lane_count(symbols: int) -> int:
    """Lanes of a stream of so many symbols: a power of 2."""
    wanted = max(FEWEST_LANES, min(MOST_LANES, symbols // SYMBOLS_PER_LANE))
    return 1 << (wanted.bit_length() - 1)


class RansWriter:
    """Takes steps in the reader's order; `finish` gives the bytes."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def step(
        self, starts_KA: np.ndarray, frequencies_KA: np.ndarray, context_N: np.ndarray, symbol_N: np.ndarray
    ) -> np.ndarray:
        """Add symbols. starts_KA: context * 2^16 + the sum of the frequencies before; context_N: row of the tables."""
        index_N = context_N * starts_KA.shape[1] + symbol_N
        starts_N = starts_KA.reshape(-1)[index_N] & (2**FREQUENCY_BITS - 1)
        self.steps.append((starts_N.astype(np.uint16), (frequencies_KA.reshape(-1)[index_N] - 1).astype(np.uint16)))
        return index_N

    def finish(self, symbols: int) -> bytes:
        lanes = lane_count(symbols)
        state_L, written = np.full(lanes, LOWEST_STATE, np.int64), []
        for starts_N, frequencies_N in reversed(self.steps):
            frequency_N, start_N = frequencies_N.astype(np.int64) + 1, starts_N.astype(np.int64)
            limit_N, gap_N = frequency_N << 24, 2**FREQUENCY_BITS - frequency_N
            for first in range((len(starts_N) - 1) // lanes * lanes, -1, -lanes):
                part = slice(first, first + lanes)
                active_L = state_L[: len(frequency_N[part])]
                full_L = (active_L >= limit_N[part]).nonzero()[0]
                over_L = active_L[full_L]
                written.append(over_L)
                active_L[full_L] = over_L >> 16
                active_L += active_L // frequency_N[part] * gap_N[part] + start_N[part]
        states = state_L.astype("<i8").view(np.uint8).reshape(lanes, 8)[:, :STATE_BYTES].tobytes()
        return states + np.concatenate([np.zeros(0, np.int64), *reversed(written)]).astype("<u2").tobytes()


class RansReader:
    """Gives back what a RansWriter was given. Raises ArtifactError for bytes that no writer made."""

    def __init__(self, data: bytes, symbols: int) -> None:
        lanes = lane_count(symbols)
        words = data[lanes * STATE_BYTES :]
        if len(data) < lanes * STATE_BYTES or len(words) % 2:
            raise ArtifactError("a rans stream is damaged: its length is impossible")
        padded = np.zeros((lanes, 8), np.uint8)
        padded[:, :STATE_BYTES] = np.frombuffer(data, np.uint8, lanes * STATE_BYTES).reshape(lanes, STATE_BYTES)
        self.state_L, self.position = padded.view("<i8")[:, 0].astype(np.int64), 0
        self.words = np.frombuffer(words, "<u2").astype(np.int64)

    def step(
        self, starts_KA: np.ndarray, frequencies_KA: np.ndarray, context_N: np.ndarray, _: object = None
    ) -> np.ndarray:
        """Positions context * A + symbol in the flattened tables."""
        starts, frequencies = starts_KA.reshape(-1), frequencies_KA.reshape(-1)
        lanes, base_N, words, position = len(self.state_L), context_N << FREQUENCY_BITS, self.words, self.position
        index_N = np.empty(len(context_N), np.int64)
        for first in range(0, len(context_N), lanes):
            base_L = base_N[first : first + lanes]
            state_L = self.state_L[: len(base_L)]
            key_L = (state_L & (2**FREQUENCY_BITS - 1)) + base_L
            found_L = starts.searchsorted(key_L, "right") - 1
            state_L >>= FREQUENCY_BITS
            state_L *= frequencies[found_L]
            state_L += key_L - starts[found_L]
            low_L = (state_L < LOWEST_STATE).nonzero()[0]
            end = position + len(low_L)
            if end > len(words):
                raise ArtifactError("a rans stream is damaged: it ends too early")
            state_L[low_L] = state_L[low_L] << 16 | words[position:end]
            position = end
            index_N[first : first + lanes] = found_L
        self.position = position
        return index_N

    def finish(self) -> None:
        """Raise ArtifactError unless all of the stream was used, and the lanes ended as they began in the writer."""
        if self.position != len(self.words) or (self.state_L != LOWEST_STATE).any():
            raise ArtifactError("a rans stream is damaged: it does not end where its symbols do")


# ---- golf/artifact/magnitudes.py -------------------------------------------------------------------------------------

"""What the coder expects of a weight's code before it sees it: how large, and on which side of zero.

A matrix is coded tile by tile, from the top left. A code's expected magnitude is the product of a factor of its row,
from the tiles to the left, and one of its column, from the tiles above; its expected sign and a share of its magnitude
come from the column's mean. That picks a context, and every context has adaptive counts of the codes seen in it. All of
it is integer arithmetic on what the reader has read already, so it is the same on every machine.

L matrices of one kind and shape side by side (the layers), R rows, C columns, K contexts, A symbols, P contexts in use,
N symbols of a tile.

Codes of the trellis grid (golf/quant/trellis.py) come from one of two halves, which follows from the codes before in
their row: such a tile is coded column by column, with the half as part of the context.
"""

StackShape = tuple[int, int, int]
Strengths = tuple[int, int, int]

MEAN_LEVELS = 4
"""Column means of 0, 1/4, 2/4 and 3/4 of the column's expected magnitude, either side of zero."""
PER_OCTAVE = 4
LOWEST_OCTAVE = -4
"""Contexts of magnitude: four to a doubling, from 1/16 of a step."""
GUESS_WORTH, COUNT_UNIT, COUNT_LIMIT = 128, 64, 2**21
"""Symbols that a context's first guess is worth; what a symbol adds; the sum at which a context's counts are halved."""
TILES_DOWN, TILES_ACROSS, LARGEST_SIDE, GROWTH = 12, 24, 64, 4
"""Tiles are at most 1/12 of the rows high, 1/24 of the columns wide and 64 either way, and small at the edges: eight of
1, then a quarter of what lies behind."""


class StepCoder(Protocol):
    """A RansWriter or RansReader."""

    def step(
        self, starts_PA: np.ndarray, frequencies_PA: np.ndarray, context_N: np.ndarray, symbol_N: np.ndarray | None
    ) -> np.ndarray: ...


class AdaptiveTables:
    """Counts of symbols in each of K contexts, which follow what is coded."""

    def __init__(self, counts_KA: np.ndarray) -> None:
        self.counts_KA = counts_KA.copy()

    def open(self, context_N: np.ndarray) -> None:
        """Turn the counts of these contexts into frequencies, for the steps until `close`."""
        contexts, symbols = self.counts_KA.shape
        self.present_P = np.flatnonzero(np.bincount(context_N, minlength=contexts))
        self.rank_K = np.zeros(contexts, np.int64)
        self.rank_K[self.present_P] = np.arange(len(self.present_P))
        sums_PA = self.counts_KA[self.present_P].cumsum(axis=1)
        self.full_P = sums_PA[:, -1] > COUNT_LIMIT
        room = 2**FREQUENCY_BITS - symbols  # every symbol keeps a frequency of 1 at least
        ends_PA = sums_PA * room // sums_PA[:, -1:] + np.arange(1, symbols + 1)
        self.frequencies_PA = ends_PA.copy()
        self.frequencies_PA[:, 1:] -= ends_PA[:, :-1]
        self.starts_PA = ends_PA - self.frequencies_PA + (np.arange(len(ends_PA)) << FREQUENCY_BITS)[:, None]
        self.seen: list[np.ndarray] = []

    def code(self, coder: StepCoder, context_N: np.ndarray, symbol_N: np.ndarray | None) -> np.ndarray:
        """The symbols: `symbol_N` itself to a writer, what was read from a reader."""
        rank_N = self.rank_K[context_N]
        index_N = coder.step(self.starts_PA, self.frequencies_PA, rank_N, symbol_N)
        self.seen.append(index_N)
        return index_N - rank_N * self.counts_KA.shape[1]

    def close(self) -> None:
        """Count what was coded since `open`."""
        index_N = self.seen[0] if len(self.seen) == 1 else np.concatenate(self.seen)
        shape = self.starts_PA.shape
        counts_PA = self.counts_KA[self.present_P]
        counts_PA += COUNT_UNIT * np.bincount(index_N, minlength=shape[0] * shape[1]).reshape(shape)
        counts_PA[self.full_P] >>= 1
        self.counts_KA[self.present_P] = np.maximum(counts_PA, 1)


def context_count(largest: int) -> int:
    return 2 * MEAN_LEVELS * PER_OCTAVE * (largest.bit_length() - LOWEST_OCTAVE)


@cache
def bell_counts(largest: int) -> np.ndarray:
    """First guess of counts_KA for codes in -largest..largest: bells with the mean magnitude of each context.

    A bell is (1 + x^2 / 16 sigma^2)^-8, near a Gaussian but with longer tails. It is tried at many widths, and a
    context takes the first whose mean magnitude reaches its own. Magnitudes are in 1/128 of a step, weights in 2^-20.
    """
    code_A = np.arange(-largest, largest + 1) * 128
    grid = np.arange(16 * 12)
    width_W1 = ((16 + grid % 16) << (grid // 16))[:, None]
    magnitude_W = weighted_mean(bell(width_W1, code_A), np.abs(code_A))
    step = np.arange(context_count(largest) // MEAN_LEVELS // 2)
    wanted_M = (2 * (PER_OCTAVE + step % PER_OCTAVE) + 1) << (step // PER_OCTAVE)
    width_M = width_W1[np.minimum(magnitude_W.searchsorted(wanted_M), len(grid) - 1), 0]
    mean_MI = wanted_M[:, None] * np.arange(MEAN_LEVELS) // MEAN_LEVELS
    shift_K1 = (mean_MI.reshape(-1, 1) - np.array([0, 64])).reshape(-1, 1)  # codes of the odd half centre on -1/2
    counts_KA = bell(np.repeat(width_M, 2 * MEAN_LEVELS)[:, None], code_A - shift_K1) + 1
    return np.maximum(counts_KA * (GUESS_WORTH * COUNT_UNIT) // counts_KA.sum(axis=1, keepdims=True), 1)


def bell(width_W1: np.ndarray, distance_A: np.ndarray) -> np.ndarray:
    square_W1 = 25 * width_W1**2
    weight_WA = (square_W1 << 20) // (square_W1 + distance_A**2)
    for _ in range(3):
        weight_WA = weight_WA**2 >> 20
    return weight_WA


def weighted_mean(weight_WA: np.ndarray, value_A: np.ndarray) -> np.ndarray:
    return (weight_WA * value_A).sum(axis=1) // weight_WA.sum(axis=1)


def tile_edges(length: int, parts: int) -> list[int]:
    """0, 1, 2, ... `length`: steps that grow with what lies behind, up to 1/parts of the whole."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + max(1, min(edges[-1] // GROWTH, -(-length // parts), LARGEST_SIDE))))
    return edges


def bounded(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.minimum(np.maximum(values, low), high)  # numpy's own clip takes four times as long on a tile


class FactorModel:
    """Running sums of a stack of matrices, and from them each tile's contexts.

    Sums are of doubled codes, plus 1 for the odd half of a trellis grid. Fixed point: a row's factor has 8 fractional
    bits, a column's (a magnitude) 12, their product 20. `strengths`: how many symbols' worth the first guess of a row's
    factor, a column's and a column's mean has, as powers of 2.
    """

    def __init__(self, shape: StackShape, largest: int, strengths: Strengths, guess_LC: np.ndarray | None) -> None:
        layers, rows, columns = shape
        self.row_sum_LR, self.row_expected_LR = np.zeros((2, layers, rows), np.int64)
        self.column_sum_LC, self.column_expected_LC, self.column_signed_LC = np.zeros((3, layers, columns), np.int64)
        self.row_prior, self.column_prior, self.mean_prior = (1 << (strength & 15) for strength in strengths)
        self.local, self.near_L1 = strengths[0] >> 4, np.full((layers, 1), 256)
        self.guess_LC = np.full((layers, columns), 256) if guess_LC is None else guess_LC
        self.total, self.expected = 16, 4 << 8
        self.levels, self.largest = context_count(largest) // MEAN_LEVELS // 2, largest

    def factors(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """row_LR, column_LC and signed mean_LC of a tile."""
        typical = (self.total << 20) // self.expected
        prior = self.row_prior * max(typical, 1)
        near_L1 = prior * self.near_L1
        row_LR = ((self.row_sum_LR[:, rows] << 20) + near_L1) // (self.row_expected_LR[:, rows] + prior)
        prior = self.column_prior << 8
        seen_LC = self.column_expected_LC[:, columns]
        guess_LC = prior * (typical * self.guess_LC[:, columns] >> 8)
        column_LC = ((self.column_sum_LC[:, columns] << 20) + guess_LC) // (seen_LC + prior)
        mean_LC = (self.column_signed_LC[:, columns] << 20) // (seen_LC + (self.mean_prior << 8))
        return bounded(row_LR, 1, 2**16), bounded(column_LC, 1, 2**20), mean_LC

    def leave_rows(self, rows: slice) -> None:
        """Where rows resemble their neighbours, take the next ones to be like those that are done."""
        if self.local:
            row_LR, _, _ = self.factors(rows, slice(0, 0))
            self.near_L1 = bounded((self.near_L1 + row_LR.sum(axis=1, keepdims=True) // row_LR.shape[1]) >> 1, 1, 2**16)

    def contexts(self, row_LR: np.ndarray, column_LC: np.ndarray, mean_LC: np.ndarray) -> np.ndarray:
        """Even numbers of contexts, context_LRC: those of the even half, or of a grid without halves."""
        # The bits of a float64 that holds a whole number are its logarithm, in quarters of an octave after the shift.
        octaves_LRC = (row_LR[:, :, None] * column_LC[:, None, :]).astype(np.float64).view(np.int64) >> 50
        level_LRC = bounded(octaves_LRC - PER_OCTAVE * (1023 + 21 + LOWEST_OCTAVE), 0, self.levels - 1)
        share_LC = np.minimum((MEAN_LEVELS * np.abs(mean_LC) + column_LC // 2) // column_LC, MEAN_LEVELS - 1)
        return 2 * (level_LRC * MEAN_LEVELS + share_LC[:, None, :])

    def observe(
        self, rows: slice, columns: slice, doubled_LRC: np.ndarray, row_LR: np.ndarray, column_LC: np.ndarray
    ) -> None:
        magnitude_LRC, row_L1 = np.abs(doubled_LRC), row_LR.sum(axis=1, keepdims=True)
        self.row_sum_LR[:, rows] += magnitude_LRC.sum(axis=2)
        self.row_expected_LR[:, rows] += column_LC.sum(axis=1, keepdims=True)
        column_sum_LC = magnitude_LRC.sum(axis=1)
        self.column_sum_LC[:, columns] += column_sum_LC
        self.column_signed_LC[:, columns] += doubled_LRC.sum(axis=1)
        self.column_expected_LC[:, columns] += row_L1
        self.total += int(column_sum_LC.sum())
        self.expected += int(row_L1.sum()) * column_LC.shape[1]


def code_stack(
    coder: StepCoder, tables: AdaptiveTables, shape: StackShape, trellis: bool, strengths: Strengths,
    guess_LC: np.ndarray | None, given_LRC: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """int16 codes of a stack of matrices through `coder`: those given to a writer, those read from a reader.

    `guess_LC`: relative magnitudes that the columns are first taken to have, 256 for 1; None: all alike.
    """
    _, rows, columns = shape
    model = FactorModel(shape, tables.counts_KA.shape[1] // 2, strengths, guess_LC)
    code_LRC, half_LRC = np.zeros(shape, np.int16), np.zeros(shape, np.int16) if trellis else None
    across = tile_edges(columns, TILES_ACROSS)
    for top, bottom in pairwise(tile_edges(rows, TILES_DOWN)):
        down = slice(top, bottom)
        part = None if given_LRC is None else given_LRC[:, down]
        half_LTC = None if half_LRC is None else half_LRC[:, down]
        for left, right in pairwise(across):
            along = slice(left, right)
            factors = model.factors(down, along)
            code_tile(coder, tables, model.contexts(*factors), factors[2] < 0, along, code_LRC[:, down], half_LTC, part)
            doubled_LRC = 2 * code_LRC[:, down, along].astype(np.int64)
            if half_LTC is not None:
                doubled_LRC += half_LTC[:, :, along]
            model.observe(down, along, doubled_LRC, *factors[:2])
        model.leave_rows(down)
    return code_LRC


def code_tile(
    coder: StepCoder, tables: AdaptiveTables, context_LTC: np.ndarray, mirrored_LC: np.ndarray, along: slice,
    code_LTC: np.ndarray, half_LTC: np.ndarray | None, given_LTC: np.ndarray | None,
) -> None:  # fmt: skip
    """Fill columns `along` of a band of T rows, code_LTC: in one step, or with halves column by column."""
    largest, side_LC = tables.counts_KA.shape[1] // 2, np.where(mirrored_LC, -1, 1)
    tables.open(context_LTC.reshape(-1) if half_LTC is None else np.append(context_LTC, context_LTC + 1))
    for step in [along] if half_LTC is None else [slice(c, c + 1) for c in range(along.start, along.stop)]:
        own = slice(step.start - along.start, step.stop - along.start)
        context_LTS, side_L1S, shift_LTS = context_LTC[:, :, own], side_LC[:, None, own], np.int64(largest)
        if half_LTC is not None:
            half_LTC[:, :, step] = half_LTS = next_halves(code_LTC, half_LTC, step.start)
            context_LTS = context_LTS + half_LTS
            shift_LTS = largest - (half_LTS & mirrored_LC[:, None, own])  # -1 - code mirrors a code of the odd half
        symbol_N = None if given_LTC is None else (given_LTC[:, :, step] * side_L1S + shift_LTS).reshape(-1)
        read_N = tables.code(coder, context_LTS.reshape(-1), symbol_N)
        code_LTC[:, :, step] = (read_N.reshape(context_LTS.shape) - shift_LTS) * side_L1S
    tables.close()


def next_halves(code_LRC: np.ndarray, half_LRC: np.ndarray, column: int) -> np.ndarray:
    """half_LR1 of a column, from the codes and halves to its left: h0(D) half = h1(D) parity."""
    half_LR1 = np.zeros((*code_LRC.shape[:2], 1), np.int16)
    for delay in range(1, min(column, TRELLIS_STATES.bit_length() - 1) + 1):
        if PARITY_H0 >> delay & 1:
            half_LR1 ^= half_LRC[:, :, column - delay, None]
        if PARITY_H1 >> delay & 1:
            half_LR1 ^= code_LRC[:, :, column - delay, None] & 1
    return half_LR1


# ---- golf/artifact/stacks.py -----------------------------------------------------------------------------------------

"""Stacks of code matrices <-> one modelled byte stream.

L layers, R rows, C columns.
"""

LOCAL_ROWS = 16
"""Added to the first strength: rows are taken to be like those above them, not like all."""
LARGEST_CODE = 511
"""Codes less their zero point reach 255, residuals this."""

Guide = tuple[int, np.ndarray]
"""Number of an earlier stack whose rows are this one's columns, and the step sizes of its rows as fp16's bits."""


@dataclass(frozen=True, eq=False)
class StackSpec:
    """What is known of a stack before its codes are."""

    shape: StackShape
    trellis: bool = False
    guide: Guide | None = None

    @property
    def size(self) -> int:
        layers, rows, columns = self.shape
        return layers * rows * columns


def guess_columns(code_LRC: np.ndarray, pattern_LR: np.ndarray) -> np.ndarray:
    """Expected relative magnitudes of columns, 256 for the typical one, from rows of codes and their fp16 steps."""
    step_LR = ((pattern_LR & 0x3FF | 0x400).astype(np.int64)) << (pattern_LR >> 10 & 31).astype(np.int64)
    size_LR = (16 * np.abs(code_LRC.astype(np.int64)).sum(axis=2) // code_LRC.shape[2] + 1) * step_LR
    size_LR >>= max(0, int(size_LR.max()).bit_length() - 30)
    return (size_LR * 256 * size_LR.shape[1] // size_LR.sum(axis=1, keepdims=True).clip(1)).clip(1, 2**14)


def stack_strengths(code_LRC: np.ndarray, guess_LC: np.ndarray | None = None) -> Strengths:
    """Priors of a stack's row factors, column factors and column means, by how much those differ beyond chance.

    Only a choice of the writer's: the reader is told, so it may use floating point.
    """
    magnitude_LRC = np.abs(code_LRC).astype(np.float32)
    size_LRC = magnitude_LRC / np.maximum(magnitude_LRC.mean(axis=(1, 2), keepdims=True), 1e-9)
    noise, (_, rows, columns) = float(size_LRC.var()), code_LRC.shape
    row_LR, column_LC = size_LRC.mean(axis=2), size_LRC.mean(axis=1)
    if guess_LC is not None:
        column_LC = column_LC / (guess_LC / 256)
    mean_square = float(np.square(code_LRC.mean(axis=1)).mean())
    apart = float(np.log(row_LR + 0.01).var()), float(np.log((row_LR + 0.01) / near_rows(row_LR)).var())
    return (
        prior_strength(noise, min(apart) - noise / columns) | LOCAL_ROWS * (apart[1] < apart[0]),
        prior_strength(noise, float(column_LC.var()) - noise / rows),
        prior_strength(float(code_LRC.var()), mean_square - float(code_LRC.var()) / rows),
    )


def near_rows(row_LR: np.ndarray) -> np.ndarray:
    """What FactorModel.leave_rows would take rows to be, about."""
    near_LR, near_L = np.ones_like(row_LR), np.ones(len(row_LR), np.float32)
    for top, bottom in pairwise(tile_edges(row_LR.shape[1], TILES_DOWN)):
        near_LR[:, top:bottom] = near_L[:, None]
        near_L = (near_L + row_LR[:, top:bottom].mean(axis=1)) / 2
    return near_LR + 0.01


def prior_strength(noise: float, spread: float) -> int:
    """log2 of how many observations of variance `noise` tell as much as knowing the variance of what they observe."""
    return int(np.clip(np.rint(np.log2(max(noise, 1e-9) / max(spread, 1e-9))), 0, 15))


def encode_stacks(
    specs: Sequence[StackSpec], stacks: Sequence[np.ndarray], strengths: Strengths | None = None
) -> bytes:
    """Largest magnitude, each stack's strengths (given, or chosen for it), and the symbols of all."""
    largest = max(int(np.abs(stack).max()) + spec.trellis for spec, stack in zip(specs, stacks, strict=True))
    header, writer, tables = encode_number(largest), RansWriter(), AdaptiveTables(bell_counts(largest))
    for spec, code_LRC in zip(specs, stacks, strict=True):
        guess_LC = guess_columns(stacks[spec.guide[0]], spec.guide[1]) if spec.guide else None
        chosen = strengths or stack_strengths(code_LRC, guess_LC)
        header += encode_number(chosen[0] << 8 | chosen[1] << 4 | chosen[2])
        code_stack(writer, tables, spec.shape, spec.trellis, chosen, guess_LC, code_LRC)
    return header + writer.finish(sum(spec.size for spec in specs))


def decode_stacks(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """int16 stacks. Raises ArtifactError."""
    largest, position = decode_number(data, 0)
    if largest > LARGEST_CODE:
        raise ArtifactError("a rans stream is damaged: its codes are too large")
    strengths, stacks = [], []
    for _ in specs:
        packed, position = decode_number(data, position)
        strengths.append((packed >> 8 & 31, packed >> 4 & 15, packed & 15))
    reader = RansReader(data[position:], sum(spec.size for spec in specs))
    tables = AdaptiveTables(bell_counts(largest))
    for spec, chosen in zip(specs, strengths, strict=True):
        guess_LC = guess_columns(stacks[spec.guide[0]], spec.guide[1]) if spec.guide else None
        stacks.append(code_stack(reader, tables, spec.shape, spec.trellis, chosen, guess_LC, None))
    reader.finish()
    return stacks


# ---- golf/artifact/sequences.py --------------------------------------------------------------------------------------

"""Sequences of 16-bit numbers (scales, zero points, small fp16 tensors) through the coder of matrices.

fp16 of one sign are ordered like their bit patterns, 1,024 to an octave, so neighbouring rows of like scales have near
patterns. Each number is told as its difference from a prediction, whose upper part is modelled and whose lowest bits,
which are noise, are packed as they are. Numbers of which few distinct ones occur are first replaced by their rank.
N numbers, D distinct ones.
"""

LARGEST_VALUE = 2**16 - 1
CENTRED = 7
PREDICTORS = (CENTRED, 0, 1, 2, 3)
"""Shifts of a running mean: 0 predicts the number before; CENTRED predicts the median for all."""
MOST_DISTINCT = 256
MODELLED_MAGNITUDE = 8
"""Low bits are packed while the median magnitude of what is left to model is above this."""
LIST_STRENGTHS = (15, 4, 15)
RANKED = 8
PLANES = 2
"""First byte of fp16 numbers as two lzma'd byte planes; 0 and 1 are sequences without and with negative numbers."""


def predict(shift: int, centre: int, given_N: list[int], restore: bool) -> list[int]:
    """Differences of numbers from their predictions, or (restore) numbers from those differences."""
    if shift == CENTRED:
        return [value + centre if restore else value - centre for value in given_N]
    result, running = [], centre << 8
    for given in given_N:
        prediction = running >> 8
        result.append(given + prediction if restore else given - prediction)
        running += (((result[-1] if restore else given) << 8) - running) >> shift
    return result


def encode_list(value_N: np.ndarray) -> bytes:
    """Small whole numbers of either sign, each by the counts of those before."""
    return encode_stacks([StackSpec((1, len(value_N), 1))], [value_N.reshape(1, -1, 1)], LIST_STRENGTHS)


def decode_list(data: bytes, count: int) -> np.ndarray:
    """int64. Raises ArtifactError."""
    return decode_stacks(data, [StackSpec((1, count, 1))])[0].reshape(-1).astype(np.int64)


def encode_ranked(value_N: np.ndarray, ranked: bool) -> bytes:
    """flags, lowest bits a number, first prediction, distinct numbers where ranked, low bits, modelled rest."""
    header = b""
    if ranked:
        distinct_D, value_N = np.unique(value_N, return_inverse=True)
        steps = np.diff(distinct_D, prepend=0).tolist()
        header = encode_number(len(steps)) + b"".join(map(encode_number, steps))
    centre, values = int(np.median(value_N)), value_N.tolist()
    candidates = [(shift, np.array(predict(shift, centre, values, False))) for shift in PREDICTORS]
    shift, rest_N = min(candidates, key=lambda candidate: float(np.log2(1.0 + np.abs(candidate[1])).sum()))
    low = 0
    while np.abs(rest_N >> low).max() > LARGEST_CODE or np.median(np.abs(rest_N >> low)) > MODELLED_MAGNITUDE:
        low += 1
    low_NB = (rest_N[:, None] >> np.arange(low)) & 1
    start = bytes([shift | RANKED * ranked, low]) + encode_number(centre) + header
    modelled = encode_list(rest_N >> low)
    return start + np.packbits(low_NB.astype(np.uint8)).tobytes() + modelled


def encode_sequence(value_N: np.ndarray) -> bytes:
    """Whole numbers in 0..LARGEST_VALUE as the shorter of two ways."""
    if not len(value_N):
        return b""
    value_N = value_N.astype(np.int64)
    ways = [encode_ranked(value_N, ranked=False)]
    if len(np.unique(value_N)) <= MOST_DISTINCT:
        ways.append(encode_ranked(value_N, ranked=True))
    return min(ways, key=len)


def decode_sequence(data: bytes, count: int) -> np.ndarray:
    """`count` numbers as int64. Raises ArtifactError."""
    if not count:
        return np.zeros(0, np.int64)
    flags, low = data[:2] if len(data) > 1 else (LARGEST_VALUE, 0)
    if flags > (CENTRED | RANKED) or low > 16:
        raise ArtifactError("a sequence of numbers is damaged: its header is impossible")
    centre, position = decode_number(data, 2)
    distinct = None
    if flags & RANKED:
        entries, position = decode_number(data, position)
        if entries > MOST_DISTINCT:
            raise ArtifactError("a sequence of numbers is damaged: too many distinct ones")
        distinct, value = [], 0
        for _ in range(entries):
            step, position = decode_number(data, position)
            value += step
            distinct.append(value)
    end = position + -(-low * count // 8)
    if end > len(data):
        raise ArtifactError("a sequence of numbers is damaged: it is too short")
    bits_NB = np.unpackbits(np.frombuffer(data[position:end], np.uint8))[: low * count].reshape(count, low)
    rest_N = decode_list(data[end:], count) << low
    rest_N += (bits_NB.astype(np.int64) << np.arange(low)).sum(axis=1)
    values = predict(flags & 7, centre, rest_N.tolist(), True)
    if distinct is not None:
        if not 0 <= min(values) <= max(values) < len(distinct):
            raise ArtifactError("a sequence of numbers is damaged: a rank is out of bounds")
        values = [distinct[rank] for rank in values]
    if not 0 <= min(values) <= max(values) <= LARGEST_VALUE:
        raise ArtifactError("a sequence of numbers is damaged: a number is out of bounds")
    return np.array(values, np.int64)


def encode_halves(pattern_N: np.ndarray) -> bytes:
    """fp16 bit patterns: magnitudes as a sequence, with the signs before them where any is negative; or lzma."""
    negative_N = pattern_N > 0x7FFF
    signs = np.packbits(negative_N).tobytes() if negative_N.any() else b""
    high, low = (
        compress_stream("lzma", plane.astype(np.uint8).tobytes()) for plane in (pattern_N >> 8, pattern_N & 255)
    )
    modelled = bytes([bool(signs)]) + signs + encode_sequence(pattern_N & 0x7FFF)
    return min(modelled, bytes([PLANES]) + encode_number(len(high)) + high + low, key=len)


def decode_halves(data: bytes, count: int) -> np.ndarray:
    """uint16 bit patterns. Raises ArtifactError."""
    if data[:1] == bytes([PLANES]):
        size, start = decode_number(data, 1)
        planes = [decompress_stream("lzma", part, count) for part in (data[start : start + size], data[start + size :])]
        high_N, low_N = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in planes)
        return high_N << 8 | low_N
    signed = data[:1] == b"\x01"
    start = 1 + (-(-count // 8) if signed else 0)
    if not data or data[0] > 1 or len(data) < start:
        raise ArtifactError("a sequence of fp16 numbers is damaged")
    magnitude_N = decode_sequence(data[start:], count)
    if magnitude_N.max(initial=0) > 0x7FFF:
        raise ArtifactError("a sequence of fp16 numbers is damaged: a number is out of bounds")
    negative_N = np.unpackbits(np.frombuffer(data, np.uint8, start - 1, 1))[:count] if signed else 0
    return (magnitude_N | (np.int64(negative_N) << 15)).astype(np.uint16)


# ---- golf/artifact/references.py -------------------------------------------------------------------------------------

"""Rows told as a share of an earlier row and what is left: token embeddings resemble each other.

Rows that training never touched are nearly equal, and those of related tokens correlate. R rows, C columns, B rows of a
block.
"""

SHARE_BITS = 3
"""Shares are in eighths, at most twice the earlier row."""
LARGEST_SHARE = 2 << SHARE_BITS
FEWEST_ROWS, MOST_ROWS = 256, 2**16
SHARE_COST, LEARNING_COST = 5, 256
"""Bits, about, that a row's share takes beside its reference's number; and LEARNING_COST / columns more that it takes
until the row is known for smaller."""
SEARCH_BLOCK = 512


def shared_part(code_RC: np.ndarray, share_R: np.ndarray) -> np.ndarray:
    return (code_RC.astype(np.int64) * share_R[..., None] + (1 << SHARE_BITS - 1)) >> SHARE_BITS


def refer_rows(code_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual codes, shares and reference rows: for each row the earlier row that explains most, where that pays.

    Only a choice of the writer's, so it may use floating point.
    """
    rows, columns = code_RC.shape
    exact_RC, residual_RC = code_RC.astype(np.float32), code_RC.astype(np.int16)
    square_R = np.maximum(np.square(exact_RC).sum(axis=1), 1e-6)
    share_R, reference_R = np.zeros((2, rows), np.int64)
    for top in range(0, rows, SEARCH_BLOCK):
        bottom = min(rows, top + SEARCH_BLOCK)
        product_BR = exact_RC[top:bottom] @ exact_RC[:bottom].T
        explained_BR = np.tril(product_BR * product_BR / square_R[:bottom], top - 1)
        best_B = explained_BR.argmax(axis=1)
        share_B = np.rint(product_BR[np.arange(bottom - top), best_B] / square_R[best_B] * (1 << SHARE_BITS))
        share_B = share_B.clip(-LARGEST_SHARE, LARGEST_SHARE).astype(np.int64)
        left_BC = code_RC[top:bottom] - shared_part(code_RC[best_B], share_B)
        saved_B = columns / 2 * np.log2(spread(code_RC[top:bottom]) / spread(left_BC))
        good_B = (saved_B > np.log2(rows) + SHARE_COST + LEARNING_COST / columns) & (best_B < np.arange(top, bottom))
        good_B &= (share_B != 0) & (np.abs(left_BC).max(axis=1) <= LARGEST_CODE)
        residual_RC[top:bottom][good_B] = left_BC[good_B]
        share_R[top:bottom], reference_R[top:bottom] = share_B * good_B, best_B * good_B
    return residual_RC, share_R, reference_R


def spread(code_BC: np.ndarray) -> np.ndarray:
    """Mean square of each row, with what rounding adds."""
    return np.square(code_BC.astype(np.float32)).mean(axis=1) + 1 / 6


def restore_rows(residual_RC: np.ndarray, share_R: np.ndarray, reference_R: np.ndarray) -> np.ndarray:
    """Inverse of `refer_rows`. Raises ArtifactError where a row refers to itself, a later one, or past all codes."""
    code_RC = residual_RC.copy()
    for row in np.flatnonzero(share_R):
        if reference_R[row] >= row:
            raise ArtifactError("a rans stream is damaged: a row refers to one that is not yet known")
        whole_C = code_RC[row] + shared_part(code_RC[reference_R[row]], share_R[row])
        if np.abs(whole_C).max() > LARGEST_CODE:
            raise ArtifactError("a rans stream is damaged: its codes are too large")
        code_RC[row] = whole_C
    return code_RC


# ---- golf/artifact/streams.py ----------------------------------------------------------------------------------------

"""A stream of codes as the shortest of several ways, for codec rans.

The first byte says which way was taken. R rows, N codes, B bytes.
"""

RAW, MODELLED, TRITS, BINARY = range(4)
"""Ways to store codes: a byte each, modelled, five ternary codes a byte, eight binary codes a byte."""


def may_refer(spec: StackSpec) -> bool:
    """Whether rows of such a stack are told by earlier ones: those of tables of many rows."""
    return spec.shape[0] == 1 and FEWEST_ROWS <= spec.shape[1] <= MOST_ROWS and not spec.trellis


def encode_modelled(specs: Sequence[StackSpec], stacks: Sequence[np.ndarray]) -> bytes:
    """Of each stack that may have any: bytes of its rows' shares (0: no row has a reference), shares, references; then
    all codes."""
    sides, residuals = [], []
    for spec, stack in zip(specs, stacks, strict=True):
        residuals.append(stack)
        if not may_refer(spec):
            continue
        residual_RC, share_R, reference_R = refer_rows(stack[0])
        referring = np.flatnonzero(share_R)
        if not len(referring):
            sides.append(encode_number(0))
            continue
        shares = encode_list(share_R)
        references = encode_sequence(reference_R[referring])
        sides.append(encode_number(len(shares)) + shares + encode_number(len(references)) + references)
        residuals[-1] = residual_RC[None]
    return b"".join(sides) + encode_stacks(specs, residuals)


def decode_modelled(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """Inverse of `encode_modelled`. Raises ArtifactError."""
    position, links = 0, {}
    for number, spec in enumerate(specs):
        size, position = decode_number(data, position) if may_refer(spec) else (0, position)
        if size:
            share_R = decode_list(data[position : position + size], spec.shape[1])
            size, position = decode_number(data, position + size)
            reference_R = np.zeros(spec.shape[1], np.int64)
            reference_R[share_R != 0] = decode_sequence(data[position : position + size], np.count_nonzero(share_R))
            links[number], position = (share_R, reference_R), position + size
    stacks = decode_stacks(data[position:], specs)
    for number, link in links.items():
        stacks[number] = restore_rows(stacks[number][0], *link)[None]
    return stacks


def encode_codes(specs: Sequence[StackSpec], stacks: Sequence[np.ndarray]) -> bytes:
    """The shortest of the ways to store these stacks of codes (int16)."""
    code_N = np.concatenate([stack.reshape(-1) for stack in stacks])
    ways = [bytes([MODELLED]) + encode_modelled(specs, stacks)]
    largest = int(np.abs(code_N).max(initial=0))
    if largest <= 1:
        ways.append(bytes([TRITS]) + pack_trits(code_N))
    if (np.abs(code_N) == 1).all():
        ways.append(bytes([BINARY]) + np.packbits(code_N > 0).tobytes())
    if largest < 128:
        ways.append(bytes([RAW]) + code_N.astype(np.int8).tobytes())
    return min(ways, key=len)


def decode_codes(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """int16 stacks of these shapes. Raises ArtifactError."""
    if data[:1] == bytes([MODELLED]):
        return decode_modelled(data[1:], specs)
    sizes = [spec.size for spec in specs]
    ways = {RAW: (1, unpack_raw), TRITS: (5, unpack_trits), BINARY: (8, unpack_bits)}
    per_byte, unpack = ways.get(data[0] if data else -1, (0, unpack_raw))
    if not per_byte or len(data) - 1 != -(-sum(sizes) // per_byte):
        raise ArtifactError("a stream of codes is damaged: it does not hold what was declared")
    code_N = unpack(np.frombuffer(data, np.uint8, offset=1))[: sum(sizes)].astype(np.int16)
    parts = np.split(code_N, np.cumsum(sizes)[:-1])
    return [part.reshape(spec.shape) for part, spec in zip(parts, specs, strict=True)]


def pack_trits(code_N: np.ndarray) -> bytes:
    """Five codes of -1..1 a byte, in base 3: 1.6 bits each."""
    digits_B5 = np.resize(np.append(code_N + 1, np.zeros(-len(code_N) % 5)), (-(-len(code_N) // 5), 5))
    return (digits_B5.astype(np.int64) @ 3 ** np.arange(5)).astype(np.uint8).tobytes()


def unpack_trits(byte_B: np.ndarray) -> np.ndarray:
    if byte_B.max(initial=0) >= 3**5:
        raise ArtifactError("a stream of ternary codes is damaged")
    return (byte_B[:, None] // 3 ** np.arange(5) % 3 - 1).reshape(-1)


def unpack_bits(byte_B: np.ndarray) -> np.ndarray:
    return np.unpackbits(byte_B).astype(np.int16) * 2 - 1


def unpack_raw(byte_B: np.ndarray) -> np.ndarray:
    return byte_B.view(np.int8)


# ---- golf/artifact/layout.py -----------------------------------------------------------------------------------------

"""Which numbers lie next to which: stored tensors <-> streams in which a coder sees like with like.

Part of the format: a change here is a new version. Measured on trained codes (docs/LOG.md). Byte codecs: one symbol per
byte; kinds of matrix together, layers one after the other; zigzag (0, -1, 1, -2, ...) symbols; the MLP's output
matrix column by column (its columns, the hidden units, differ more than its rows: 1.7 % of its bytes); fp16 split
into high and low bytes. Codec rans: the matrices of one kind and shape side by side, with their zero points taken off.
R rows, C columns, L layers, S rows of scales, G groups, N numbers.
"""

COLUMN_MAJOR_ENDING = "mlp.proj.weight"
HALF_ROLES = ("fp16", "scales", "columns")

Parts = dict[str, dict[str, Tensor]]
"""Role -> tensor name -> codes (int8 or int16), fp16 scales, fp16 column scales, int8 zero points or fp16 tensor."""


@dataclass(frozen=True)
class StreamPlan:
    """One stream: what it holds (codes, scales, columns, zeros or fp16), of which tensors."""

    role: str
    label: str
    bits: int
    names: tuple[str, ...]
    elements: int

    def fields(self, codec: str) -> int:
        """Pieces, each compressed on its own: byte codecs have two of an fp16 stream, its high and low bytes."""
        return 2 if codec != "rans" and self.role in HALF_ROLES else 1

    @property
    def raw_bytes(self) -> int:
        """One byte a code, two an fp16 value."""
        return self.elements * (2 if self.role in HALF_ROLES else 1)


def stream_label(name: str, bits: int) -> str:
    """Tensors of one label share a stream: by name for matrices on a grid; fp16 ones are the embedding or small."""
    parts = name.split(".")
    if is_factor(name):
        return "low rank"
    if parts[0] == "tok_emb":
        return "embed"
    if bits == FP16_BITS:
        return "small"
    return next((part for part in ("bigram", "attn", "mlp") if part in parts), "other")


def kind_and_layer(name: str) -> tuple[list[str], list[int]]:
    parts = name.split(".")
    return [part for part in parts if not part.isdigit()], [int(part) for part in parts if part.isdigit()]


def part_shape(role: str, form: Form) -> tuple[int, ...]:
    if role == "columns":
        return form.shape[1:]
    return form.scale_shape if role in ("scales", "zeros") else form.shape


def plan_streams(forms: Forms) -> list[StreamPlan]:
    """The streams of an artifact, in the order in which they are stored."""
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name in sorted(forms, key=kind_and_layer):
        bits = forms[name].bits
        groups.setdefault((stream_label(name, bits), bits, "fp16" if bits == FP16_BITS else "codes"), []).append(name)
    plans = [(role, label, bits, names) for (label, bits, role), names in sorted(groups.items())]
    coded = [name for role, _, _, names in plans if role == "codes" for name in names]
    plans += [
        ("scales", "scales", FP16_BITS, coded),
        ("columns", "column scales", FP16_BITS, [name for name in coded if forms[name].column_scales]),
        ("zeros", "zero points", 8, [name for name in coded if forms[name].zeros]),
    ]
    return [
        StreamPlan(role, label, bits, tuple(names), sum(prod(part_shape(role, forms[name])) for name in names))
        for role, label, bits, names in plans
        if names
    ]


def part_of(role: str, entry: QuantizedTensor | Tensor) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    part = {"codes": entry.codes_RC, "scales": entry.scale_SG, "columns": entry.column_scale_C, "zeros": entry.zero_SG}
    found = part[role]
    assert found is not None
    return found


def encode_stream(codec: str, plan: StreamPlan, entries: QuantizedState, forms: Forms) -> list[bytes]:
    """The fields of a stream."""
    parts = {name: part_of(plan.role, entries[name]) for name in plan.names}
    if plan.role == "codes":
        if codec == "rans":
            stacks = stacks_of(plan, forms)
            steps = {name: part_of("scales", entries[name]) for name in plan.names}
            return [encode_codes(specs_of(stacks, forms, steps), [stack_of(names, entries) for names in stacks])]
        return [compress_stream(codec, b"".join(symbols_of(name, part) for name, part in parts.items()))]
    numbers_N = torch.cat([part.flatten() for part in parts.values()]).numpy()
    if plan.role == "zeros":
        shifted_N = numbers_N.astype(np.int16) + 128
        return [
            encode_sequence(shifted_N)
            if codec == "rans"
            else compress_stream(codec, shifted_N.astype(np.uint8).tobytes())
        ]
    pattern_N = numbers_N.view(np.uint16)
    if codec == "rans":
        return [encode_halves(pattern_N)]
    return [compress_stream(codec, plane.astype(np.uint8).tobytes()) for plane in (pattern_N >> 8, pattern_N & 255)]


def decode_stream(
    codec: str, plan: StreamPlan, fields: Sequence[bytes], forms: Forms, parts: Parts
) -> dict[str, Tensor]:
    """The parts in a stream by tensor name; codes need the zero points, found in `parts`. Raises ArtifactError."""
    if plan.role == "codes":
        return decode_code_stream(codec, plan, fields[0], forms, parts)
    if plan.role == "zeros":
        plain = (
            np.zeros(0)
            if codec == "rans"
            else np.frombuffer(decompress_stream(codec, fields[0], plan.elements), np.uint8)
        )
        numbers_N = decode_sequence(fields[0], plan.elements) if codec == "rans" else plain.astype(np.int64)
        if numbers_N.max() > 255:
            raise ArtifactError("the zero points hold values that no sound model has")
        values_N = torch.from_numpy((numbers_N - 128).astype(np.int8))
    else:
        values_N = decode_half_stream(codec, plan, fields)
    return {name: part.clone() for name, part in split_parts(plan, values_N, forms).items()}


def decode_half_stream(codec: str, plan: StreamPlan, fields: Sequence[bytes]) -> Tensor:
    """fp16 values. Raises ArtifactError for values that are not finite and scales that are too small."""
    if codec == "rans":
        pattern_N = decode_halves(fields[0], plan.elements)
    else:
        planes = [decompress_stream(codec, field, plan.elements) for field in fields]
        high_N, low_N = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in planes)
        pattern_N = high_N << 8 | low_N
    halves_N = pattern_N.view(np.float16)
    if not (np.isfinite(halves_N) & (halves_N >= FP16_TINY if plan.role != "fp16" else True)).all():
        raise ArtifactError(f"the {plan.role} of {plan.label} hold values that no sound model has")
    return torch.from_numpy(halves_N)


def split_parts(plan: StreamPlan, values_N: Tensor, forms: Forms) -> dict[str, Tensor]:
    shapes = [part_shape(plan.role, forms[name]) for name in plan.names]
    pieces = values_N.split([prod(shape) for shape in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(plan.names, pieces, shapes, strict=True)}


def decode_code_stream(codec: str, plan: StreamPlan, field: bytes, forms: Forms, parts: Parts) -> dict[str, Tensor]:
    """int16 codes_RC by tensor name, not checked against their grids."""
    if codec != "rans":
        symbols_N = np.frombuffer(decompress_stream(codec, field, plan.elements), np.uint8).astype(np.int16)
        flat = split_parts(plan, torch.from_numpy((symbols_N >> 1) ^ -(symbols_N & 1)), forms)
        return {name: by_rows(name, part) for name, part in flat.items()}
    stacks = stacks_of(plan, forms)
    codes = {}
    for names, stack_LRC in zip(stacks, decode_codes(field, specs_of(stacks, forms, parts["scales"])), strict=True):
        for name, code_RC in zip(names, torch.from_numpy(stack_LRC), strict=True):
            zero_SG = parts["zeros"].get(name)
            codes[name] = code_RC if zero_SG is None else code_RC + spread_groups(zero_SG.short(), code_RC.size(1))
    return codes


def specs_of(stacks: list[list[str]], forms: Forms, steps: Mapping[str, Tensor]) -> list[StackSpec]:
    """What the coder is told of each stack. The MLP's input matrix, where it is in the same stream, guides its output
    matrix: a hidden unit that is large in one is large in the other."""
    specs: list[StackSpec] = []
    for names in stacks:
        form, guide = forms[names[0]], None
        inputs = [name.replace(COLUMN_MAJOR_ENDING, "mlp.fc.weight") for name in names]
        if inputs != names and inputs in stacks[: len(specs)] and forms[inputs[0]].shape[0] == form.shape[1]:
            guide = stacks.index(inputs), np.stack([steps[name].numpy().view(np.uint16)[:, 0] for name in inputs])
        specs.append(StackSpec((len(names), *form.shape), form.trellis, guide))
    return specs


def symbols_of(name: str, codes_RC: Tensor) -> bytes:
    """Codes as unsigned bytes, small magnitudes first: 0, -1, 1, -2, ..."""
    codes_N = (codes_RC.T if name.endswith(COLUMN_MAJOR_ENDING) else codes_RC).numpy().reshape(-1).astype(np.int16)
    return ((codes_N << 1) ^ (codes_N >> 15)).astype(np.uint8).tobytes()


def by_rows(name: str, part_RC: Tensor) -> Tensor:
    """A matrix from its symbols, which may lie column by column."""
    return part_RC.view(part_RC.shape[::-1]).T.contiguous() if name.endswith(COLUMN_MAJOR_ENDING) else part_RC


def stacks_of(plan: StreamPlan, forms: Forms) -> list[list[str]]:
    """Names of a stream of codes, those of one kind, shape and grid together."""
    stacks: dict[tuple, list[str]] = {}
    for name in plan.names:
        stacks.setdefault((*kind_and_layer(name)[0], forms[name].shape, forms[name].trellis), []).append(name)
    return list(stacks.values())


def stack_of(names: list[str], entries: QuantizedState) -> np.ndarray:
    """int16 codes_LRC of matrices of one shape, less their zero points."""
    matrices = []
    for name in names:
        entry = entries[name]
        assert isinstance(entry, QuantizedTensor)
        code_RC = entry.codes_RC.short()
        if entry.zero_SG is not None:
            code_RC = code_RC - spread_groups(entry.zero_SG.short(), code_RC.size(1))
        matrices.append(code_RC)
    return torch.stack(matrices).numpy()


# ---- golf/artifact/settings.py ---------------------------------------------------------------------------------------

"""Configurations out of a file that nobody vouches for: kinds, bounds and sense of every value checked."""

LARGEST_NUMBER = 2**24
MOST_LAYERS = 1024
MAY_BE_ZERO = ("bigram_vocab_size", "bigram_dim", "bos_id")
"""Whole numbers that may be 0; all others are at least 1."""
ADDED_FIELDS = {
    "document_attention", "quantizer", "calibration_tokens", "calibration_text", "calibration_reserve", "rate_weight",
}  # fmt: skip
"""Since version 1: those of ModelConfig are written where they differ from their default, which older files mean."""


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
    check_together(Config(quant=replace(quant, quantizer="grid")))  # what a fit wants of the rest, its run has checked
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

"""What an artifact's bytes are spent on, and how near they come to the codes' order-0 entropy."""

@dataclass(frozen=True)
class StreamSize:
    """One stream: codes of a class, all scales, all column scales, all zero points, or fp16 tensors."""

    role: str
    label: str
    bits: int
    elements: int
    raw_bytes: int
    """Before compression: one byte a code, two an fp16 value."""
    compressed_bytes: int
    entropy_bytes: float
    """Of codes: the order-0 entropy of the whole stream, the least that a coder without context can reach; else 0."""
    encode_seconds: float
    decode_seconds: float = 0.0

    @property
    def bits_per_element(self) -> float:
        return 8 * self.compressed_bytes / self.elements

    @property
    def entropy_ratio(self) -> float | None:
        """Compressed bytes over the order-0 entropy; None where that is 0."""
        return self.compressed_bytes / self.entropy_bytes if self.entropy_bytes else None


@dataclass(frozen=True)
class SizeReport:
    """All streams, and the rest (header, description, lengths)."""

    codec: str
    streams: tuple[StreamSize, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Parameters of the model: scales and corrections stand for none."""
        return sum(s.elements for s in self.streams if s.role in ("codes", "fp16") and s.label != "low rank")

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(stream.compressed_bytes for stream in self.streams)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.weights

    @property
    def codes(self) -> StreamSize:
        """All streams of codes together; their entropies are added, each with its own frequencies."""
        parts = [stream for stream in self.streams if stream.role == "codes"]
        names = ("elements", "raw_bytes", "compressed_bytes", "entropy_bytes", "encode_seconds", "decode_seconds")
        return StreamSize("codes", "all", 0, **{name: sum(getattr(part, name) for part in parts) for name in names})


def measure_stream(plan: StreamPlan, entries: QuantizedState, compressed_bytes: int, seconds: float) -> StreamSize:
    """Sizes of a stream that became so many bytes in so many seconds."""
    codes = [entry.codes_RC for name in plan.names if isinstance(entry := entries[name], QuantizedTensor)]
    entropy = code_entropy_bytes(codes) if plan.role == "codes" else 0.0
    return StreamSize(
        plan.role, plan.label, plan.bits, plan.elements, plan.raw_bytes, compressed_bytes, entropy, seconds
    )  # fmt: skip


def code_entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Order-0 entropy of int8 codes of any shapes, all together."""
    counts = sum(np.bincount(part.numpy().reshape(-1).view(np.uint8), minlength=256) for part in codes)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * counts.sum() / 8)


def size_report_dict(report: SizeReport) -> dict:
    """For JSON: the streams and the sums."""
    streams = [stream_dict(stream) for stream in report.streams]
    return {
        "codec": report.codec,
        "streams": streams,
        "codes": stream_dict(report.codes) if report.codes.elements else None,
        "weights": report.weights,
        "overhead_bytes": report.overhead_bytes,
        "bits_per_weight": report.bits_per_weight,
        "bytes_model": report.total_bytes,
    }


def stream_dict(stream: StreamSize) -> dict:
    return asdict(stream) | {"bits_per_element": stream.bits_per_element, "entropy_ratio": stream.entropy_ratio}


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

Fields of the frame (frame.py): the description, then those of each stream (layout.py). The description is deflated
JSON: the model's configuration, the tokenizer's SHA-256, the bits of each tensor, and "forms" where a tensor has other
parts than codes and a scale for each row: [form (forms.py), numbers of the tensors that have it] for each such form.
Names and shapes follow from the configuration (shapes.py), so they take no bytes.
"""

LARGEST_DESCRIPTION = 2**16
FREE_ELEMENTS = 2**24
ELEMENTS_PER_BYTE = 256
"""A file may declare FREE_ELEMENTS weights, and beyond those so many for each of its bytes: no bomb in a small file."""
PLAIN_FORM = [1, 1, 0, 0, 0]
"""What a tensor has that no form is told of: a row of scales for each row, one group, nothing else."""


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
    stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str, verify: bool = True
) -> tuple[bytes, SizeReport]:
    """The artifact's bytes, and what they are spent on. The same input gives the same bytes.

    `verify`: read the bytes back and compare; without, the report has no seconds to decode. Raises ArtifactError when
    the tensors are not those of `model` or the codec's package is missing.
    """
    shapes = expected_shapes(model)
    check_shapes({name: stored_shape(entry) for name, entry in stored.items()}, shapes)
    ordered = {name: stored[name] for name in shapes}
    sizes, fields = encode_streams(ordered, codec)
    description = encode_zlib(describe_artifact(model, tokenizer_sha256, ordered))
    data = frame_artifact(codec, [description, *fields])
    if verify:
        artifact, seconds = unpack_artifact(data)
        if not same_stored_state(artifact.state, stored):
            raise ArtifactError(f"packing failed: what codec {codec} gave back is not what it was given")
        sizes = [replace(size, decode_seconds=spent) for size, spent in zip(sizes, seconds, strict=True)]
    return data, SizeReport(codec, tuple(sizes), len(data))


def encode_streams(stored: QuantizedState, codec: str) -> tuple[list[StreamSize], list[bytes]]:
    """What every stream takes, and the fields of all of them, of tensors that may be any part of a model."""
    forms, entries = forms_of_state(stored), all_entries(stored)
    sizes, fields = [], []
    for plan in plan_streams(forms):
        started = time.perf_counter()
        encoded = encode_stream(codec, plan, entries, forms)
        seconds = time.perf_counter() - started
        sizes.append(measure_stream(plan, entries, sum(map(len, encoded)), seconds))
        fields += encoded
    return sizes, fields


def coded_bytes(stored: QuantizedState, codec: str) -> int:
    """Bytes of all streams of these tensors, which may be any part of a model: an artifact less its description."""
    return sum(map(len, encode_streams(stored, codec)[1]))


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
    return unpack_artifact(data)[0]


def unpack_artifact(data: bytes) -> tuple[Artifact, list[float]]:
    """The artifact in bytes, and the seconds that each of its streams took. Raises ArtifactError."""
    codec, fields = unframe_artifact(data)
    model, tokenizer_sha256, forms = parse_description(fields[0] if fields else b"", len(data))
    state, seconds = decode_streams(fields[1:], forms, codec)
    artifact = Artifact(model, tokenizer_sha256, state, codec, hashlib.sha256(data).hexdigest(), len(data))
    return artifact, seconds


def decode_streams(fields: list[bytes], forms: Forms, codec: str) -> tuple[QuantizedState, list[float]]:
    """The tensors of `forms` from the fields of all their streams, and each stream's seconds. Raises ArtifactError."""
    plans = plan_streams(forms)
    if len(fields) != sum(plan.fields(codec) for plan in plans):
        raise ArtifactError("the artifact does not have the streams that its model needs")
    remaining = iter(fields)
    planned = [(plan, list(islice(remaining, plan.fields(codec)))) for plan in plans]
    parts: Parts = {role: {} for role in ("codes", "scales", "columns", "zeros", "fp16")}
    seconds = []
    for plan, own in reversed(planned):  # zero points and scales come last, codes need them
        started = time.perf_counter()
        parts[plan.role] |= decode_stream(codec, plan, own, forms, parts)
        seconds.append(time.perf_counter() - started)
    names = [name for name in forms if not is_factor(name)]
    return {name: join_entry(name, forms, parts) for name in names}, seconds[::-1]


def describe_artifact(model: ModelConfig, tokenizer_sha256: str, stored: QuantizedState) -> bytes:
    check_sha256(tokenizer_sha256)
    bits, exceptions = [], {}
    for number, (name, entry) in enumerate(stored.items()):
        bits.append(stored_bits(entry))
        plain = not isinstance(entry, QuantizedTensor)
        if not plain and (form := form_to_json(name, forms_of_entry(name, entry))) != PLAIN_FORM:
            exceptions.setdefault(json.dumps(form), (form, []))[1].append(number)
    document = {"model": model_to_json(model), "tokenizer": tokenizer_sha256, "bits": bits}
    if exceptions:
        document["forms"] = list(exceptions.values())
    return json.dumps(document, separators=(",", ":")).encode()


def parse_description(deflated: bytes, file_bytes: int) -> tuple[ModelConfig, str, Forms]:
    """(model, tokenizer_sha256, forms by tensor name) from untrusted bytes. Raises ArtifactError."""
    document = load_description(deflated)
    if not isinstance(document, dict) or document.keys() - {"forms"} != {"model", "tokenizer", "bits"}:
        raise ArtifactError("the artifact's description does not have the entries of this version")
    model, bits = model_from_json(document["model"]), document["bits"]
    check_sha256(document["tokenizer"])
    shapes = expected_shapes(model)
    elements = sum(map(prod, shapes.values()))
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * file_bytes:
        raise ArtifactError(f"the artifact declares {elements:,} weights, more than {file_bytes:,} bytes can hold")
    if not isinstance(bits, list) or len(bits) != len(shapes):
        raise ArtifactError("the artifact's list of bits is not that of its model's tensors")
    exceptions = form_exceptions(document.get("forms", []), len(shapes))
    forms: Forms = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if bits[number] == FP16_BITS and number not in exceptions:
            forms[name] = Form(shape, FP16_BITS)
        else:
            forms |= forms_from_json(name, shape, bits[number], exceptions.get(number, PLAIN_FORM))
    return model, document["tokenizer"], forms


def form_exceptions(exceptions: object, tensors: int) -> dict[int, object]:
    """Number of a tensor -> its form as JSON. Raises ArtifactError."""
    if not isinstance(exceptions, list):
        raise ArtifactError("the artifact's list of forms is none")
    found: dict[int, object] = {}
    for pair in exceptions:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], list):
            raise ArtifactError("the artifact's list of forms is damaged")
        for number in pair[1]:
            if type(number) is not int or not 0 <= number < tensors or number in found:
                raise ArtifactError("the artifact's list of forms names no tensor, or one twice")
            found[number] = pair[0]
    return found


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
    return one.keys() == other.keys() and all(same_stored(one[name], other[name]) for name in one)


# ---- golf/quant/export.py --------------------------------------------------------------------------------------------

"""A state dict as it is stored: codes and scales for the matrices, fp16 for the rest."""

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
        if bits == FP16_BITS:
            stored[name] = tensor.half()
        else:
            codes_RC, scale_R = quantize_rows(tensor, bits)
            stored[name] = QuantizedTensor(codes_RC, scale_R.unsqueeze(1), bits)
    return stored


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
    prune_reports: list[PruneReport]
    actions: list[str]  # in order; empty where it fitted as configured
    pruned: dict[str, Tensor] | None = None
    """The weights that `stored` was rounded to nearest from; None where codes were chosen otherwise."""
    codes_not_nearest: int = 0
    """Codes that error feedback or their price has moved from the nearest."""


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
    return FittedArtifact(*packed, stored, reports, [action.text for action in actions], pruned)


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
    """Rows of a table, fp32; of `weight_VD` where the caller has the effective weight at hand."""

    def forward(self, ids_BT: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        return F.embedding(ids_BT, self.effective_weight() if weight_VD is None else weight_VD)


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
        e_BTD = self.tok_emb(ids_BT, embedding_VD).to(self.compute_dtype)
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


# ---- golf/quant/calibration.py ---------------------------------------------------------------------------------------

"""What a quantizer wants to know of each weight: the second moments of its inputs, and how much its rows count.

Both come from one forward and backward pass over calibration rows with labels drawn from the model itself, so that
the gradients' second moments are the Fisher information and not the data's (Kunstner et al. 2019, arXiv 1905.12558).
With x the inputs of a matrix and g the loss's gradient by its outputs, rounding by E costs about

    1/2 sum_r row_weight_r  e_r^T hessian_CC e_r   nats per token,   hessian = E[x x^T], row_weight_r = E[g_r^2]:

the Kronecker form of Martens and Grosse 2015 (arXiv 1503.05671) less what couples two rows, whose rounding errors
have nothing to do with each other. A position's x counts by the size of its g.

N rows of tokens, T time, B rows at once, P positions, R rows (outputs) and C columns (inputs) of a weight,
D model width, V vocabulary, L number of lookups.
"""

UNSEEN = 0.5
"""Added to the count of every row of a table: one that was never looked up will be."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Of one weight: loss added = 1/2 sum_r row_weight_r e_r^T hessian e_r, nats per token; float64, on the CPU."""

    hessian_CC: Tensor
    row_weight_R: Tensor


@dataclass(eq=False)
class Sums:
    """Sums over positions for one weight, float64."""

    hessian_CC: Tensor
    rows_R: Tensor
    weight: Tensor
    """What the sum of `hessian_CC` is to be divided by."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hessian_CC, self.rows_R, self.weight


@dataclass(eq=False)
class MomentRecorder:
    """Sums of all matrices over the passes that are made while its hooks are on."""

    model: GPT
    sums: dict[str, Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules: dict[str, Linear | Embedding] = {
            f"{path}.weight": module
            for path, module in self.model.named_modules()
            if isinstance(module, Linear | Embedding)
        }
        device = self.model.tok_emb.weight.device
        shapes = {name: module.weight.shape for name, module in self.modules.items()}
        shapes["head"] = self.model.tok_emb.weight.shape
        for name, (rows, columns) in shapes.items():
            zeros = [
                torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((columns, columns), (rows,), ())
            ]
            self.sums[name] = Sums(*zeros)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it every use of a matrix is added up, in the forward pass or, where gradients flow, the backward."""
        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: self.record(name, inputs[0], output))
            for name, module in self.modules.items()
        ]
        handles.append(self.model.blocks[-1].register_forward_hook(lambda _, inputs, output: self.keep(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, stream_BTD: Tensor) -> None:
        self.stream_BTD = stream_BTD.detach()

    def record(self, name: str, x: Tensor, output: Tensor) -> None:
        add = self.add_lookups if isinstance(self.modules[name], Embedding) else self.add_product
        if output.requires_grad:
            output.register_hook(lambda gradient: add(name, x.detach(), gradient))
        elif add == self.add_product:
            add(name, x, None)

    def add_product(self, name: str, x_BTC: Tensor, g_BTR: Tensor | None) -> None:
        x_PC, sums = x_BTC.flatten(0, -2).float(), self.sums[name]
        weight_P = torch.ones(len(x_PC), device=x_PC.device)
        if g_BTR is not None:
            g_PR = g_BTR.flatten(0, -2).float()
            weight_P = g_PR.square().sum(1)
            sums.rows_R += g_PR.square().double().sum(0)
        add_outer(sums, x_PC, weight_P)

    def add_lookups(self, name: str, ids_BT: Tensor, g_BTC: Tensor) -> None:
        """A row of a table has the gradients of the positions that looked it up; its share of them is its weight."""
        g_PC, sums = g_BTC.flatten(0, -2).float(), self.sums[name]
        sums.hessian_CC += (g_PC.T @ g_PC).double()
        sums.weight += len(g_PC)
        sums.rows_R += torch.bincount(ids_BT.flatten(), minlength=len(sums.rows_R)).double()

    def add_head(self, logits_BTV: Tensor) -> None:
        """The tied head: its inputs are the final norm's output, its gradients those of the softmax in closed form."""
        cap, sums = self.model.config.logit_softcap, self.sums["head"]
        p_PV = torch.softmax(logits_BTV.flatten(0, 1), -1)
        slope_PV = 1 - (logits_BTV.flatten(0, 1) / cap).square()
        fisher_PV = p_PV * (1 - p_PV) * slope_PV.square()
        sums.rows_R += fisher_PV.double().sum(0)
        add_outer(sums, rms_norm(self.stream_BTD).flatten(0, 1).float(), fisher_PV.sum(1))


def add_outer(sums: Sums, x_PC: Tensor, weight_P: Tensor) -> None:
    weighted_PC = x_PC * weight_P.sqrt().unsqueeze(1)
    sums.hessian_CC += (weighted_PC.T @ weighted_PC).double()
    sums.weight += weight_P.double().sum()


def add_pass(recorder: MomentRecorder, ids_BT: Tensor, generator: torch.Generator) -> None:
    """One forward and backward pass, with labels drawn from the model's own predictions."""
    with recorder.hooks(), torch.enable_grad():
        logits_BTV = recorder.model.logits(ids_BT)
        if not logits_BTV.isfinite().all():
            raise QuantError("the model's predictions are NaN or infinite: the weights are broken")
        with torch.no_grad():
            recorder.add_head(logits_BTV.detach())
            drawn_P = torch.multinomial(torch.softmax(logits_BTV.flatten(0, 1), -1).cpu(), 1, generator=generator)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), drawn_P.flatten().to(ids_BT.device), reduction="sum")
        loss.backward()
    recorder.model.zero_grad(set_to_none=True)


def calibrate(
    model: GPT, rows_NT: Tensor, runtime: Runtime, batch_rows: int = 8, seed: int = 0
) -> dict[str, LayerStatistics]:
    """Statistics of every matrix over all ranks' rows; each rank gives its share of `rows_NT`.

    Raises QuantError for no rows, or a model whose gradients are not finite.
    """
    return calibrate_within(math.inf, model, rows_NT, runtime, batch_rows, seed)[0]


def calibrate_within(
    seconds: float, model: GPT, rows_NT: Tensor, runtime: Runtime, batch_rows: int, seed: int
) -> tuple[dict[str, LayerStatistics], int]:
    """`calibrate` on as many of the rows as there is time for on each rank, one batch at least; and their tokens."""
    check_rows(rows_NT, model)
    recorder, generator = MomentRecorder(model), torch.Generator().manual_seed(seed + runtime.rank)
    mine_NT = rows_NT[runtime.rank :: runtime.world_size].to(runtime.device)
    started, tokens = time.perf_counter(), torch.zeros((), dtype=torch.float64, device=runtime.device)
    for done, batch_NT in enumerate(mine_NT.split(batch_rows)):
        spent = time.perf_counter() - started
        if done and spent * (done + 1) / done > seconds:
            break
        add_pass(recorder, batch_NT, generator)
        tokens += batch_NT.numel()
    for part in (tokens, *(part for sums in recorder.sums.values() for part in sums.parts())):
        runtime.sum_over_ranks(part)
    return settle_statistics(recorder, int(tokens)), int(tokens)


def collect_hessians(model: GPT, rows_NT: Tensor, batch_rows: int = 8) -> dict[str, Tensor]:
    """Mean of x x^T at every matrix product, by forward passes alone; the tied table's is the head's.

    Raises QuantError for no rows.
    """
    check_rows(rows_NT, model)
    recorder = MomentRecorder(model)
    with torch.no_grad(), recorder.hooks():
        for start in range(0, len(rows_NT), batch_rows):
            model.logits(rows_NT[start : start + batch_rows])
            x_PC = rms_norm(recorder.stream_BTD).flatten(0, 1).float()
            add_outer(recorder.sums["head"], x_PC, torch.ones(len(x_PC), device=x_PC.device))
    sums = recorder.sums | {"tok_emb.weight": recorder.sums.pop("head")}
    return {name: (part.hessian_CC / part.weight).cpu() for name, part in sums.items() if part.weight > 0}


def settle_statistics(recorder: MomentRecorder, tokens: int) -> dict[str, LayerStatistics]:
    """From sums to what they say of each weight. Raises QuantError."""
    statistics = {}
    for name, module in recorder.modules.items():
        sums = recorder.sums[name]
        if isinstance(module, Embedding):
            count_R = sums.rows_R + UNSEEN
            statistics[name] = LayerStatistics(sums.hessian_CC / tokens, count_R / count_R.sum())
        else:
            statistics[name] = LayerStatistics(sums.hessian_CC / sums.weight.clamp_min(1e-300), sums.rows_R / tokens)
    head = recorder.sums["head"]
    statistics["tok_emb.weight"] = tied_statistics(
        LayerStatistics(head.hessian_CC / head.weight, head.rows_R / tokens), statistics["tok_emb.weight"]
    )
    for name, one in statistics.items():
        if not (one.hessian_CC.isfinite().all() and one.row_weight_R.isfinite().all()):
            raise QuantError(f"calibration gave NaN or infinite values for {name!r}: the weights are broken")
    return {name: LayerStatistics(one.hessian_CC.cpu(), one.row_weight_R.cpu()) for name, one in statistics.items()}


def tied_statistics(head: LayerStatistics, table: LayerStatistics) -> LayerStatistics:
    """One Kronecker form for a table that is also the head: rows by the sum of both costs, columns by their mean."""
    head_size, table_size = head.hessian_CC.trace(), table.hessian_CC.trace()
    hessian_CC = head.row_weight_R.sum() * head.hessian_CC + table.row_weight_R.sum() * table.hessian_CC
    row_weight_R = head.row_weight_R * head_size + table.row_weight_R * table_size
    return LayerStatistics(hessian_CC / hessian_CC.trace(), row_weight_R)


def check_rows(rows_NT: Tensor, model: GPT) -> None:
    if rows_NT.dim() != 2 or rows_NT.numel() == 0:
        raise QuantError("the calibration set is empty: give rows of training tokens")
    if int(rows_NT.max()) >= model.config.vocab_size:
        raise QuantError(
            f"calibration token {int(rows_NT.max())} is beyond the vocabulary of {model.config.vocab_size}"
        )


@torch.no_grad()
def generated_rows(model: nn.Module, count: int, length: int, seed: int) -> Tensor:
    """Rows_NT of text that the model makes up itself, each from a document's start: calibration without any data."""
    generator = torch.Generator().manual_seed(seed)
    rows_NT = torch.full((count, 1), model.config.bos_id)
    for _ in range(length - 1):
        logits_BV = model.logits(rows_NT.to(model.tok_emb.weight.device), last=1)[:, -1]
        drawn_B1 = torch.multinomial(torch.softmax(logits_BV.float().cpu(), -1), 1, generator=generator)
        rows_NT = torch.cat((rows_NT, drawn_B1), dim=1)
    return rows_NT


# ---- golf/quant/permute.py -------------------------------------------------------------------------------------------

"""Hidden units of an MLP in an order that suits the coder: the function stays, for units have no order of their own.

Rows of blocks.N.mlp.fc.weight and columns of blocks.N.mlp.proj.weight move together. What was measured of the inputs
and outputs of the two before is in the old order. H hidden units, D model width.
"""

UP_SUFFIX, DOWN_SUFFIX = ".mlp.fc.weight", ".mlp.proj.weight"


def hidden_order(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """order_H: units by falling product of the L2 norms of their two vectors; ties by their old place."""
    strength_H = up_HD.double().norm(dim=1) * down_DH.double().norm(dim=0)
    return strength_H.argsort(descending=True, stable=True)


def mlp_blocks(state: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the MLPs in `state`. Raises QuantError where one lacks a matrix, or theirs do not fit."""
    prefixes = [name.removesuffix(UP_SUFFIX) for name in state if name.endswith(UP_SUFFIX)]
    for prefix in prefixes:
        up, down = state[prefix + UP_SUFFIX], state.get(prefix + DOWN_SUFFIX)
        if down is None or up.dim() != 2 or down.shape != (up.size(1), up.size(0)):
            raise QuantError(f"{prefix}{UP_SUFFIX} has no {DOWN_SUFFIX} that fits it")
    return prefixes


def hidden_orders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """hidden_order of every MLP by its prefix. Raises QuantError."""
    return {block: hidden_order(state[block + UP_SUFFIX], state[block + DOWN_SUFFIX]) for block in mlp_blocks(state)}


def permute_statistics(
    statistics: Mapping[str, LayerStatistics], orders: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """What calibration says of the weights once their hidden units are in `orders` (by prefix)."""
    permuted = dict(statistics)
    for prefix, order_H in orders.items():
        up, down = statistics[prefix + UP_SUFFIX], statistics[prefix + DOWN_SUFFIX]
        permuted[prefix + UP_SUFFIX] = LayerStatistics(up.hessian_CC, up.row_weight_R[order_H])
        permuted[prefix + DOWN_SUFFIX] = LayerStatistics(down.hessian_CC[order_H][:, order_H], down.row_weight_R)
    return permuted


def permute_hidden_units(state: Mapping[str, Tensor], orders: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state of the same function with each MLP's units in `orders` (by prefix, "blocks.0"), or by hidden_order."""
    permuted = dict(state)
    orders = hidden_orders(state) if orders is None else orders
    for prefix in mlp_blocks(state):
        up_HD, down_DH, order_H = state[prefix + UP_SUFFIX], state[prefix + DOWN_SUFFIX], orders[prefix]
        if not torch.equal(order_H.sort().values.cpu(), torch.arange(len(up_HD))):
            raise QuantError(f"the order of {prefix}'s units is no permutation of {len(up_HD)}")
        permuted[prefix + UP_SUFFIX] = up_HD[order_H].contiguous()
        permuted[prefix + DOWN_SUFFIX] = down_DH[:, order_H].contiguous()
    return permuted


# ---- golf/quant/rate.py ----------------------------------------------------------------------------------------------

"""What a code costs to send, for rounding that minds it.

An adaptive coder predicts the size of a code from what it has seen of the code's row and column. Here each code is
put into one of a few classes by the size that its row and its column let one expect, and costs -log2 of the share
of its magnitude in that class, and a bit for the sign.

R rows, C columns, N a few candidates.
"""

RATE_CLASSES = 16
"""Classes of expected magnitude, equally full."""
PRIOR_COUNT = 16.0
"""Weight of the distribution over all classes in that of each, in codes."""
HIGH_RATE_SLOPE = 2 * math.log(2) / 12
"""-dD/dR in squared steps per bit of a uniform quantizer with D = step^2 / 12 and R = const - log2(step)."""


@dataclass(frozen=True, eq=False)
class CodeCosts:
    """Bits of each magnitude in each class, and each weight's class."""

    bits_F: Tensor
    """float32, RATE_CLASSES tables of `width` magnitudes one after the other."""
    width: int
    offset_CR: Tensor
    """int64: where the table of the weight's class begins."""

    def of(self, column: int, magnitude_NR: Tensor) -> Tensor:
        """bits_NR of candidate magnitudes of a column's weights."""
        return self.bits_F[self.offset_CR[column] + magnitude_NR.long()]


def expected_classes(level_RC: Tensor) -> Tensor:
    """int64 classes_RC by the product of mean magnitudes of row and column, equally full up to equal products."""
    magnitude_RC = level_RC.abs().double()
    expected_RC = magnitude_RC.mean(1, keepdim=True) * magnitude_RC.mean(0, keepdim=True)
    sorted_N = expected_RC.flatten().sort().values
    edges = [sorted_N[len(sorted_N) * k // RATE_CLASSES] for k in range(1, RATE_CLASSES)]
    return torch.bucketize(expected_RC, torch.stack(edges), right=True)


def learn_costs(level_RC: Tensor, most: int) -> CodeCosts:
    """Costs under the distribution of these levels, for levels of magnitude 0..most."""
    width = most + 1
    class_RC = expected_classes(level_RC)
    cells_N = (class_RC * width + level_RC.abs().long()).flatten()
    counts_KM = torch.bincount(cells_N, minlength=RATE_CLASSES * width).view(RATE_CLASSES, width).double()
    overall_M = counts_KM.sum(0) + 0.5  # half a code: what has not been seen is dear, not impossible
    counts_KM = counts_KM + PRIOR_COUNT * overall_M / overall_M.sum()
    bits_KM = -torch.log2(counts_KM / counts_KM.sum(1, keepdim=True))
    bits_KM[:, 1:] += 1.0
    return CodeCosts(bits_KM.flatten().float(), width, (class_RC * width).T.contiguous())


def cheapest_level(
    ratio_1R: Tensor, low: Tensor | float, high: Tensor | float, costs: CodeCosts, column: int, price_1R: Tensor
) -> Tensor:
    """level_1R of a column that minimises (ratio - level)^2 + price * bits among 0 and the three next to the ratio.

    Magnitudes floor|ratio| - 1, + 0 and + 1, within low..high; of equal costs the smallest magnitude wins.
    """
    size_1R, positive_1R = ratio_1R.abs(), ratio_1R >= 0
    most_1R = torch.where(positive_1R, high, -low)
    floor_1R = size_1R.floor()
    magnitude_NR = torch.cat([torch.zeros_like(floor_1R), floor_1R - 1, floor_1R, floor_1R + 1])
    magnitude_NR = torch.minimum(magnitude_NR.clamp_(min=0), most_1R)
    cost_NR = (size_1R - magnitude_NR).square_().add_(price_1R * costs.of(column, magnitude_NR))
    best_1R = magnitude_NR.gather(0, cost_NR.argmin(0, keepdim=True))
    return torch.where(positive_1R, best_1R, -best_1R)


def class_entropy(level_RC: Tensor) -> float:
    """Bits per code that an ideal adaptive coder with these classes would send."""
    counts_KM = torch.stack([torch.bincount(part_N, minlength=256) for part_N in split_by_class(level_RC)]).double()
    share_KM = counts_KM / counts_KM.sum(1, keepdim=True).clamp(min=1)
    return float(-(counts_KM * share_KM.clamp(min=1e-300).log2()).sum() / max(level_RC.numel(), 1))


def split_by_class(level_RC: Tensor) -> list[Tensor]:
    class_RC = expected_classes(level_RC)
    return [level_RC[class_RC == k].long() + 128 for k in range(RATE_CLASSES)]


# ---- golf/quant/spec.py ----------------------------------------------------------------------------------------------

"""What a grid is: bits, granularity, symmetry and the rule that chooses its steps, as a value and as a short text."""

SCALE_RULES = {"absmax": 1.0, "percentile": 99.9, "mse": 1.0, "std": 3.0, "absmean": 1.0}
"""Rules for the step, and the parameter that each has when none is given."""
RULE_TEXTS = {"absmax": "absmax", "percentile": "pct", "mse": "mse", "std": "sd", "absmean": "absmean"}
QUANTIZER_METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """A grid of 2^bits - 1 codes around 0, or with a zero point of 2^bits codes from 0 on (1 bit: -1 and 1).

    Raises QuantError for what is no grid.
    """

    bits: int
    """1 to 8. Symmetric: 1 is binary {-1, 1}, 2 is ternary {-1, 0, 1}, b is -(2^(b-1) - 1) .. 2^(b-1) - 1."""
    granularity: str = "row"
    """What shares a step: tensor, row, or group (of neighbouring columns of a row)."""
    group_size: int = 0
    """Most columns of a group; groups of a row are as equal as stored.group_width makes them."""
    symmetric: bool = True
    """False: each step comes with the code that stands for 0, itself a code of the grid."""
    scale_rule: str = "absmax"
    """absmax: the largest magnitude gets the largest code; percentile: that of all magnitudes; mse: the shrunk absmax
    range of least squared error; std: k standard deviations get the largest code (the field's SDClip); absmean: a
    multiple of the mean magnitude (ternary: BitNet b1.58, arXiv 2402.17764; binary: XNOR-Net, arXiv 1603.05279)."""
    parameter: float | None = None
    """percentile: 50 < p <= 100; std: k; absmean: the multiple; absmax and mse have none. None: SCALE_RULES."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise QuantError(f"bits are 1 to 8, not {self.bits}")
        if self.granularity not in ("tensor", "row", "group"):
            raise QuantError(f"granularity is tensor, row or group, not {self.granularity!r}")
        if (self.group_size > 0) != (self.granularity == "group"):
            raise QuantError(f"granularity {self.granularity!r} and group_size {self.group_size} do not fit together")
        if self.scale_rule not in SCALE_RULES:
            raise QuantError(f"scale rule is one of {', '.join(SCALE_RULES)}, not {self.scale_rule!r}")
        self.check_parameter()

    def check_parameter(self) -> None:
        rule, value = self.scale_rule, self.rule_parameter
        if rule in ("absmax", "mse") and self.parameter is not None:
            raise QuantError(f"scale rule {rule!r} has no parameter, {self.parameter:g} was given")
        if not (50 < value <= 100 if rule == "percentile" else 0 < value < 1e4):
            raise QuantError(f"{value:g} is no parameter of scale rule {rule!r}")
        if rule == "absmean" and (self.bits > 2 or not self.symmetric):
            raise QuantError("scale rule 'absmean' is for symmetric grids of 1 and 2 bits")

    @property
    def rule_parameter(self) -> float:
        return SCALE_RULES[self.scale_rule] if self.parameter is None else self.parameter


NAIVE_INT8 = QuantSpec(8)
"""The small-GPT study's naive quantizer: int8, per row, symmetric, max/127 (its zero rows are 0/0, ours are zero)."""

METHOD_PATTERN = re.compile(
    r"(?P<method>[a-z]+)(?P<bits>\d+)(?:-(?P<tensor>tensor)|-g(?P<group>\d+))?(?P<zero>-zp)?"
    rf"(?:-(?P<rule>{'|'.join(RULE_TEXTS.values())})(?P<parameter>\d+(?:\.\d+)?)?)?"
)


def parse_quantizer(text: str) -> tuple[str, QuantSpec]:
    """Method and grid of METHOD BITS [-tensor | -gN] [-zp] [-RULE[PARAMETER]], such as rtn8, gptq4-g64, rtn3-zp-mse.

    Rules: absmax (the default), pctP, mse, sdK (gptq6-sd12.85), absmeanM. Raises QuantError.
    """
    match = METHOD_PATTERN.fullmatch(text)
    if match is None or match["method"] not in QUANTIZER_METHODS:
        raise QuantError(
            f"no quantizer {text!r}: rtn or gptq, bits, then -tensor or -gN, -zp, and one of -absmax -pct99.9 -mse "
            "-sd3 -absmean, such as gptq4-g64 or rtn3-zp-mse"
        )
    rules = {short: rule for rule, short in RULE_TEXTS.items()}
    spec = QuantSpec(
        bits=int(match["bits"]),
        granularity="tensor" if match["tensor"] else "group" if match["group"] else "row",
        group_size=int(match["group"] or 0),
        symmetric=not match["zero"],
        scale_rule=rules[match["rule"] or "absmax"],
        parameter=None if match["parameter"] is None else float(match["parameter"]),
    )
    return match["method"], spec


def quantizer_text(method: str, spec: QuantSpec) -> str:
    """The shortest text that parse_quantizer reads as `method` and `spec`."""
    parts = [f"{method}{spec.bits}"]
    if spec.granularity != "row":
        parts.append("tensor" if spec.granularity == "tensor" else f"g{spec.group_size}")
    if not spec.symmetric:
        parts.append("zp")
    if spec.scale_rule != "absmax":
        parts.append(
            RULE_TEXTS[spec.scale_rule]
            + ("" if spec.parameter is None else f"{spec.parameter:f}".rstrip("0").rstrip("."))
        )
    return "-".join(parts)


# ---- golf/quant/rounding.py ------------------------------------------------------------------------------------------

"""Steps by every rule of a QuantSpec, and rounding to nearest.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, N weights that share a step.
A level is a code less its zero point, so that weight = level * step for every grid.
"""

MSE_COARSE = tuple(0.92**k for k in range(30))
"""Shares of the full range that the search for the least squared error tries first, down to 0.09."""
MSE_FINE = tuple(0.92 ** (k / 5) for k in (-4, -3, -2, -1, 1, 2, 3, 4))
"""And then, around the best of them."""


@dataclass(frozen=True, eq=False)
class StepSizes:
    """Steps that somebody else chose: that of weight (r, c) is scale_rg * column_scale_c, g the group of column c."""

    scale_SG: Tensor
    """fp16, within FP16_TINY..FP16_MAX; S is R or 1."""
    column_scale_C: Tensor | None = None
    """fp16, positive."""


def check_finite(weight: Tensor, what: str) -> None:
    if not torch.isfinite(weight).all():
        raise QuantError(f"{what} has NaN or infinite values: nothing to quantize")


def check_step_sizes(scales: StepSizes, rows: int, columns: int) -> None:
    """Raise QuantError unless the steps fit a matrix of that shape."""
    scale_SG, column_scale_C = scales.scale_SG, scales.column_scale_C
    fits = scale_SG.dim() == 2 and scale_SG.size(0) in (1, rows) and 1 <= scale_SG.size(1) <= max(columns, 1)
    if column_scale_C is not None:
        fits = fits and column_scale_C.shape == (columns,)
    if not fits:
        raise QuantError(f"steps of shape {tuple(scale_SG.shape)} do not fit {rows} x {columns} weights")
    for name, part in (("scale_SG", scale_SG), ("column_scale_C", column_scale_C)):
        if part is not None and (part.dtype != torch.float16 or not (part.isfinite() & (part > 0)).all()):
            raise QuantError(f"{name} must be fp16, finite and above zero")


def level_range(spec: QuantSpec, zero: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """Smallest and largest level, `zero` being the code in 0..2^bits - 1 that stands for 0."""
    if zero is None:
        return -grid_clip(spec.bits), grid_clip(spec.bits)
    return -zero, 2**spec.bits - 1 - zero


def nearest_level(ratio: Tensor, low: Tensor | float, high: Tensor | float, spec: QuantSpec) -> Tensor:
    """Level nearest to ratio = weight / step, halves to even; without 0 for a symmetric grid of 1 bit."""
    if spec.bits == 1 and spec.symmetric:
        return torch.where(ratio >= 0, 1.0, -1.0)
    return ratio.round().clamp(low, high)


def fp16_step(step: Tensor) -> Tensor:
    """The fp32 value of the fp16 step, within fp16's normal range."""
    return step.clamp(FP16_TINY, FP16_MAX).half().float()


def smallest_of(values_SN: Tensor, share: float) -> Tensor:
    """(S, 1): the value that `share` of each row does not exceed."""
    rank = min(max(round(share * values_SN.size(1)), 1), values_SN.size(1))
    return values_SN.kthvalue(rank, dim=1, keepdim=True).values


def weight_range(weight_SN: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(S, 1) each: the least and greatest weight that the grid must hold by the rule, 0 included."""
    magnitude_SN, parameter = weight_SN.abs(), spec.rule_parameter
    if spec.symmetric:
        if spec.scale_rule == "percentile":
            high_S1 = smallest_of(magnitude_SN, parameter / 100)
        elif spec.scale_rule == "std":
            high_S1 = parameter * weight_SN.std(dim=1, correction=0, keepdim=True)
        elif spec.scale_rule == "absmean":
            high_S1 = parameter * magnitude_SN.mean(dim=1, keepdim=True)
        else:
            high_S1 = magnitude_SN.amax(dim=1, keepdim=True)
        return -high_S1, high_S1
    if spec.scale_rule == "percentile":
        low_S1, high_S1 = -smallest_of(-weight_SN, parameter / 100), smallest_of(weight_SN, parameter / 100)
    elif spec.scale_rule == "std":
        mean_S1, spread_S1 = weight_SN.mean(1, keepdim=True), weight_SN.std(1, correction=0, keepdim=True)
        low_S1, high_S1 = mean_S1 - parameter * spread_S1, mean_S1 + parameter * spread_S1
    else:
        low_S1, high_S1 = weight_SN.amin(dim=1, keepdim=True), weight_SN.amax(dim=1, keepdim=True)
    return low_S1.clamp(max=0), high_S1.clamp(min=0)


def step_and_zero(low_S1: Tensor, high_S1: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """fp32 values of the fp16 step, and the code of 0, of grids that reach from low to high."""
    if spec.symmetric:
        # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
        return fp16_step(high_S1 / torch.full_like(high_S1, grid_clip(spec.bits))), None
    most = 2**spec.bits - 1
    step_S1 = fp16_step((high_S1 - low_S1) / torch.full_like(high_S1, most))
    return step_S1, (-low_S1 / step_S1).round().clamp(0, most)


def squared_error(
    weight_SN: Tensor, step_S1: Tensor, zero_S1: Tensor | None, spec: QuantSpec, importance_SN: Tensor | None
) -> Tensor:
    """(S, 1) in float64: what rounding to nearest leaves of each row, each weight's square times its importance."""
    level_SN = nearest_level(weight_SN / step_S1, *level_range(spec, zero_S1), spec)
    error_SN = (weight_SN - level_SN * step_S1).square()
    if importance_SN is not None:
        error_SN = error_SN * importance_SN
    return error_SN.sum(dim=1, keepdim=True, dtype=torch.float64)


def least_error_share(error_of: Callable[[Tensor], Tensor], ones_S1: Tensor) -> Tensor:
    """The share of its range, for each row, at which `error_of` is least; of equal ones the first tried."""
    best_S1, least_S1 = ones_S1, error_of(ones_S1)
    for shares in (MSE_COARSE[1:], MSE_FINE):
        center_S1 = best_S1 if shares is MSE_FINE else ones_S1
        for share in shares:
            tried_S1 = (center_S1 * share).clamp(max=1.0)
            error_S1 = error_of(tried_S1)
            better_S1 = error_S1 < least_S1
            best_S1 = torch.where(better_S1, tried_S1, best_S1)
            least_S1 = torch.where(better_S1, error_S1, least_S1)
    return best_S1


def choose_steps(
    weight_SN: Tensor, spec: QuantSpec, importance_SN: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """fp32 values of the fp16 step and the code of 0, (S, 1) each, for rows of fp32 weights that share them.

    `importance_SN` (or one that broadcasts) weighs squared errors in the search of rule "mse".
    """
    low_S1, high_S1 = weight_range(weight_SN, spec)
    if spec.scale_rule != "mse":
        return step_and_zero(low_S1, high_S1, spec)
    if spec.bits == 1 and spec.symmetric:  # the step of least squared error is the mean magnitude
        total = weight_SN.abs().mean(1, keepdim=True)
        if importance_SN is not None:
            shares_SN = importance_SN.expand_as(weight_SN)
            total = (weight_SN.abs() * shares_SN).sum(1, keepdim=True) / shares_SN.sum(1, keepdim=True).clamp(min=1e-30)
        return fp16_step(total), None

    def error_of(share_S1: Tensor) -> Tensor:
        return squared_error(
            weight_SN, *step_and_zero(low_S1 * share_S1, high_S1 * share_S1, spec), spec, importance_SN
        )

    share_S1 = least_error_share(error_of, torch.ones_like(high_S1))
    return step_and_zero(low_S1 * share_S1, high_S1 * share_S1, spec)


def grid_of(weight_RC: Tensor, spec: QuantSpec, importance_C: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """scale_SG (fp32 values of fp16 steps) and zero_SG (codes of 0, or None) of fp32 weights by the spec's rule."""
    rows, columns = weight_RC.shape
    if spec.granularity == "tensor":
        importance = None if importance_C is None else importance_C.expand(rows, columns).reshape(1, -1)
        return choose_steps(weight_RC.reshape(1, -1), spec, importance)
    width = columns
    if spec.granularity == "group":
        width = group_width(columns, -(-columns // spec.group_size))
    parts = [
        choose_steps(
            weight_RC[:, c : c + width], spec, None if importance_C is None else importance_C[None, c : c + width]
        )
        for c in range(0, columns, width)
    ]
    zeros = [zero_S1 for _, zero_S1 in parts if zero_S1 is not None]
    return torch.cat([step_S1 for step_S1, _ in parts], dim=1), torch.cat(zeros, dim=1) if zeros else None


def stored_form(
    level_RC: Tensor, scale_SG: Tensor, zero_SG: Tensor | None, spec: QuantSpec, column_scale_C: Tensor | None
) -> QuantizedTensor:
    """Levels, steps and codes of 0 as they are stored, on the CPU: 8-bit codes with a zero point less 128."""
    if zero_SG is not None:
        shift = 128 if spec.bits == 8 else 0
        level_RC = level_RC + spread_groups(zero_SG, level_RC.size(1)) - shift
        zero_SG = (zero_SG - shift).to(torch.int8).cpu()
    codes_RC, scale_SG = level_RC.to(torch.int8).cpu(), scale_SG.half().cpu()
    if column_scale_C is not None:
        column_scale_C = column_scale_C.half().cpu()
    return QuantizedTensor(codes_RC, scale_SG, spec.bits, column_scale_C, zero_SG)


def step_matrix(scale_SG: Tensor, column_scale_C: Tensor | None, columns: int) -> Tensor:
    """step_SC (or one that broadcasts), fp32: products of two fp16 numbers are exact."""
    step_SC = spread_groups(scale_SG.float(), columns)
    return step_SC if column_scale_C is None else step_SC * column_scale_C.float()


def round_to_nearest(weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None = None) -> QuantizedTensor:
    """Codes of least error for each weight by itself. Rule "absmax" per row is grid.quantize_rows, bit for bit."""
    weight_RC = weight_RC.float()
    if scales is None:
        (scale_SG, zero_SG), column_scale_C = grid_of(weight_RC, spec), None
    else:
        scale_SG, zero_SG, column_scale_C = scales.scale_SG.to(weight_RC.device), None, scales.column_scale_C
        if column_scale_C is not None:
            column_scale_C = column_scale_C.to(weight_RC.device)
    columns = weight_RC.size(1)
    ratio_RC = weight_RC / step_matrix(scale_SG, column_scale_C, columns)
    zero_SC = None if zero_SG is None else spread_groups(zero_SG, columns)
    level_RC = nearest_level(ratio_RC, *level_range(spec, zero_SC), spec)
    return stored_form(level_RC, scale_SG, zero_SG, spec, column_scale_C)


# ---- golf/quant/gptq.py ----------------------------------------------------------------------------------------------

"""GPTQ: round column after column and let the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the second moments of the inputs, H = sum x x^T, the error of a
rounded row e is e H e^T. Columns come in the order of their inputs' power; the rest of the way U is the upper factor
of H^-1 = U^T U, and rounding column j moves the columns k > j by -(w_j - q_j) / U_jj * U_jk, the move of least error.

R rows, C columns, B columns of a block, G groups of columns. Factors and weights are transposed, CR: a column's
weights lie side by side.
"""

DAMPING_TRIALS = 7
DESCENT_PASSES = 3


@dataclass(frozen=True, eq=False)
class GptqOptions:
    """How the weights are rounded."""

    damping: float = 0.01
    """Share of the mean of H's diagonal that is added to the diagonal; ten times as much until H has a factor."""
    block: int = 128
    """Columns between two updates of all columns that are left. No effect on the result."""
    act_order: bool = True
    """Columns in descending order of H's diagonal; off: from left to right."""
    rate_weight: float = 0.0
    """How much a code's bits count in its choice; 1: as much as they cost in error where the step is made finer."""
    rate_slope: float | None = None
    """Error per bit in the unit of H (and row_weight_R), instead of that of rate_weight = 1, for one price in many
    tensors; times rate_weight."""
    descent_passes: int = 0
    """Passes of coordinate descent after GPTQ. Three lower the error by 1 % with steps for rows, by 4 to 6 % with steps
    for columns, at equal entropy."""
    rate_passes: int = 2
    """Times that the rounding is done again with the costs of the codes of the time before."""
    row_weight_R: Tensor | None = None
    """Weight of each row's error beside the bits; None: 1."""


GPTQ_DEFAULTS = GptqOptions()


def factor_and_damped(hessian_CC: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U_CC in float64, upper, and the matrix whose inverse is U^T U: H + damping * mean(diag H) * 1, with more damping
    where that has no factor; the identity where all inputs are zero.

    Without an explicit inverse: where F turns both orders round, F H F = L L^T makes U = F L^-1 F. Raises QuantError.
    """
    mean = hessian_CC.diagonal().mean()
    identity_CC = torch.eye(hessian_CC.size(0), dtype=torch.float64, device=hessian_CC.device)
    if mean == 0:
        return identity_CC, identity_CC
    for trial in range(DAMPING_TRIALS):
        damped_CC = hessian_CC + identity_CC * (mean * damping * 10**trial)
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC.flip(0, 1))
        if not failed and torch.isfinite(lower_CC).all():
            return torch.linalg.solve_triangular(lower_CC, identity_CC, upper=False).flip(0, 1), damped_CC
    raise QuantError(
        f"the Hessian has no Cholesky factor even with {damping * 10 ** (DAMPING_TRIALS - 1):g} of its mean diagonal "
        "added: it is no matrix of second moments"
    )


def input_factor(hessian_CC: Tensor, damping: float) -> Tensor:
    """U_CC of factor_and_damped."""
    return factor_and_damped(hessian_CC, damping)[0]


def checked_hessian(hessian_CC: Tensor, columns: int) -> Tensor:
    """H in float64, made symmetric to the last bit. Raises QuantError."""
    if hessian_CC.shape != (columns, columns):
        raise QuantError(f"the Hessian is {tuple(hessian_CC.shape)}, the weights have {columns} columns")
    check_finite(hessian_CC, "the Hessian")
    hessian_CC = hessian_CC.double()
    if (hessian_CC.diagonal() < 0).any():
        raise QuantError("the Hessian has negative values on its diagonal: it is no matrix of second moments")
    return (hessian_CC + hessian_CC.T) / 2


class ColumnGrid:
    """Step and range of levels of one column after the other.

    Where groups have steps of their own by a rule, those of a group are chosen when its first column is due, from
    its weights as they have been moved by then. Groups are neighbours in the matrix, in whatever order they come.
    """

    def __init__(self, weight_RC: Tensor, spec: QuantSpec, scales: StepSizes | None):
        rows, columns = weight_RC.shape
        self.spec, self.columns = spec, columns
        self.column_scale_C = None
        late = scales is None and spec.granularity == "group"
        if late:
            groups = -(-columns // spec.group_size)
        elif scales is None:
            scale_SG, zero_SG = grid_of(weight_RC.float(), spec)
            groups = scale_SG.size(1)
        else:
            scale_SG, zero_SG = scales.scale_SG.to(weight_RC.device).float(), None
            groups = scale_SG.size(1)
            if scales.column_scale_C is not None:
                self.column_scale_C = scales.column_scale_C.to(weight_RC.device).float()
        self.width = group_width(columns, groups)
        self.step_G1S: list[Tensor | None] = [None] * groups if late else list(scale_SG.T[:, None])
        self.zero_G1S: list[Tensor | None] = [None] * groups if late or zero_SG is None else list(zero_SG.T[:, None])

    def undecided(self, column: int) -> Tensor | None:
        """The columns of the column's group, where their steps have still to be chosen."""
        group = column // self.width
        if self.step_G1S[group] is not None:
            return None
        return torch.arange(group * self.width, min((group + 1) * self.width, self.columns))

    def decide(self, column: int, weight_NR: Tensor) -> None:
        """Choose the steps of the column's group for these weights of its columns."""
        step_R1, zero_R1 = choose_steps(weight_NR.T.float(), self.spec)
        self.step_G1S[column // self.width] = step_R1.T
        self.zero_G1S[column // self.width] = None if zero_R1 is None else zero_R1.T

    def column(self, column: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """step_1S of a column, and its smallest and largest level."""
        step_1S = self.step_G1S[column // self.width]
        if self.column_scale_C is not None:
            step_1S = step_1S * self.column_scale_C[column]
        return step_1S, *level_range(self.spec, self.zero_G1S[column // self.width])

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """scale_SG and zero_SG, once every group has been met."""
        zero_SG = None if self.zero_G1S[0] is None else torch.cat(self.zero_G1S).T
        return torch.cat(self.step_G1S).T, zero_SG


@dataclass(frozen=True, eq=False)
class RatePrice:
    """What codes cost: bits, and for each row the error in units of H that is worth a bit."""

    costs: CodeCosts
    slope_1R: Tensor


@dataclass(frozen=True, eq=False)
class GptqProblem:
    """A matrix and its inputs in the order in which columns are rounded."""

    weight_CR: Tensor
    """float64, columns in that order."""
    factor_CC: Tensor
    """U, in that order."""
    damped_CC: Tensor
    """What U factors the inverse of, in that order."""
    order: list[int]
    """Which column of the matrix comes when."""
    block: int

    def round_columns(self, grid: ColumnGrid, price: RatePrice | None = None) -> Tensor:
        """level_RC in the order of the matrix."""
        columns, factor_CC = len(self.order), self.factor_CC
        weight_CR, error_CR = self.weight_CR.clone(), torch.empty_like(self.weight_CR)
        level_CR = torch.empty_like(self.weight_CR, dtype=torch.float32)
        place_C = torch.tensor(self.order).argsort()
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            for now in range(start, stop):
                column = self.order[now]
                members = grid.undecided(column)
                if members is not None:
                    place_N = place_C[members].to(weight_CR.device)
                    grid.decide(column, weight_CR[place_N] - factor_CC[start:now, place_N].T @ error_CR[start:now])
                weight_1R = weight_CR[now : now + 1] - factor_CC[start:now, now : now + 1].T @ error_CR[start:now]
                level_1R, step_1S = self.round_column(weight_1R, column, grid, factor_CC[now, now], price)
                level_CR[column] = level_1R[0]
                error_CR[now] = (weight_1R - level_1R.double() * step_1S.double())[0] / factor_CC[now, now]
            weight_CR[stop:] -= factor_CC[start:stop, stop:].T @ error_CR[start:stop]
        return level_CR.T

    def descend(
        self, level_RC: Tensor, grid: ColumnGrid, price: RatePrice | None = None, passes: int = DESCENT_PASSES
    ) -> Tensor:
        """level_RC after some passes over the columns that choose each code anew for the errors of all others.

        Coordinate descent on e H e^T (and the bits): no pass makes it worse but for the damping and costs that change.
        """
        damped_CC, columns = self.damped_CC, len(self.order)
        step_CS = torch.cat([grid.column(column)[0] for column in self.order]).double()
        level_CR = level_RC.T[self.order].contiguous()
        error_CR = self.weight_CR - level_CR * step_CS
        for start in [*range(0, columns, self.block)] * passes:
            stop = min(start + self.block, columns)
            inner_BB, before_BR = damped_CC[start:stop, start:stop], error_CR[start:stop].clone()
            pull_BR = damped_CC[start:stop] @ error_CR - inner_BB @ before_BR
            for now in range(start, stop):
                power = damped_CC[now, now]
                others_1R = pull_BR[now - start] + inner_BB[now - start] @ error_CR[start:stop]
                best_1R = self.weight_CR[now] + others_1R / power - error_CR[now]
                level_1R, step_1S = self.round_column(best_1R[None], self.order[now], grid, power.rsqrt(), price)
                level_CR[now] = level_1R[0]
                error_CR[now] = (self.weight_CR[now] - level_1R.double() * step_1S.double())[0]
        found_CR = torch.empty_like(level_CR)
        found_CR[self.order] = level_CR
        return found_CR.T

    @staticmethod
    def round_column(
        weight_1R: Tensor, column: int, grid: ColumnGrid, factor: Tensor, price: RatePrice | None
    ) -> tuple[Tensor, Tensor]:
        """level_1R and step_1S of a column."""
        step_1S, low, high = grid.column(column)
        ratio_1R = weight_1R.float() / step_1S
        if price is None:
            return nearest_level(ratio_1R, low, high, grid.spec), step_1S
        price_1R = (price.slope_1R * (factor / step_1S.double()).square()).float()
        return cheapest_level(ratio_1R, low, high, price.costs, column, price_1R), step_1S


def gptq_problem(weight_RC: Tensor, hessian_CC: Tensor, options: GptqOptions) -> GptqProblem:
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    order_C = torch.arange(weight_RC.size(1), device=weight_RC.device)
    if options.act_order:
        order_C = hessian_CC.diagonal().argsort(descending=True, stable=True)
    factor_CC, damped_CC = factor_and_damped(hessian_CC[order_C][:, order_C], options.damping)
    return GptqProblem(weight_RC.double().T[order_C], factor_CC, damped_CC, order_C.tolist(), options.block)


def rate_price(problem: GptqProblem, level_RC: Tensor, grid: ColumnGrid, options: GptqOptions) -> RatePrice:
    """Costs of codes like these, and a bit's price: the loss of error by a bit where all steps are made finer at once.

    That of D = sum of row_weight_r step_rc^2 / U_cc^2 / 12, which falls by 2 ln 2 of its mean for a bit more in each.
    """
    scale_SG, zero_SG = grid.parts()
    rows, columns = level_RC.shape
    weight_R = torch.ones(rows, dtype=torch.float64, device=level_RC.device)
    if options.row_weight_R is not None:
        weight_R = options.row_weight_R.to(weight_R)
    slope = options.rate_slope
    if slope is None:
        step_SC = step_matrix(scale_SG, grid.column_scale_C, columns).double()
        power_C = torch.empty(columns, dtype=torch.float64, device=level_RC.device)
        power_C[problem.order] = problem.factor_CC.diagonal().square().reciprocal()
        slope = float(HIGH_RATE_SLOPE * (weight_R[:, None] * step_SC.square() * power_C).mean())
    most = grid_clip(grid.spec.bits) if zero_SG is None else 2**grid.spec.bits - 1
    return RatePrice(learn_costs(level_RC, most), (options.rate_weight * slope / weight_R.clamp(min=1e-300))[None])


def quantize_matrix(
    weight_RC: Tensor,
    spec: QuantSpec,
    hessian_CC: Tensor | None = None,
    options: GptqOptions = GPTQ_DEFAULTS,
    scales: StepSizes | None = None,
) -> QuantizedTensor:
    """Codes, steps and zero points of a matrix: rounded to nearest, or by GPTQ where H of its inputs is given.

    `scales` are steps to use instead of those of the spec's rule and granularity; they go with symmetric grids.
    H may be the sum or the mean of x x^T; without inputs in a column, the column is rounded to nearest. Raises
    QuantError for what is not finite, does not fit, or is no H.
    """
    check_quantizable(weight_RC, spec, options, scales)
    if hessian_CC is None:
        return round_to_nearest(weight_RC, spec, scales)
    weight_RC = weight_RC.detach().float()
    problem = gptq_problem(weight_RC, hessian_CC, options)
    grid = ColumnGrid(weight_RC, spec, scales)
    level_RC, price = problem.round_columns(grid), None
    if options.rate_weight > 0 and not (spec.bits == 1 and spec.symmetric):
        for _ in range(options.rate_passes):
            price = rate_price(problem, level_RC, grid, options)
            grid = ColumnGrid(weight_RC, spec, scales)
            level_RC = problem.round_columns(grid, price)
    if options.descent_passes > 0:
        level_RC = problem.descend(level_RC, grid, price, options.descent_passes)
    return stored_form(level_RC, *grid.parts(), spec, grid.column_scale_C)


def check_quantizable(weight_RC: Tensor, spec: QuantSpec, options: GptqOptions, scales: StepSizes | None) -> None:
    if weight_RC.dim() != 2 or not weight_RC.numel():
        raise QuantError(f"weights of shape {tuple(weight_RC.shape)} are no matrix to quantize")
    check_finite(weight_RC, "the weight matrix")
    if not (options.damping > 0 and options.block > 0 and options.rate_weight >= 0 and options.rate_passes > 0):
        raise QuantError("damping, block and rate_passes are above 0, rate_weight is not below 0")
    if scales is not None:
        check_step_sizes(scales, *weight_RC.shape)
        if not spec.symmetric:
            raise QuantError("given steps go with a symmetric grid: they come without zero points")


# ---- golf/quant/trellis_search.py ------------------------------------------------------------------------------------

"""Codes of the trellis grid (trellis.py) by Viterbi's search inside GPTQ's error feedback.

Every row keeps one survivor for each state, and each survivor feeds the errors of its own past to the columns ahead.

R rows, C columns, B columns of a block, S states of the trellis, Z parities, A arms that lead to a state.
"""

TRELLIS_BLOCK = 128
"""Columns over which survivors compete; the winner's error goes to the later columns. The next block starts in its
state: that costs 0.005 bit a weight against survivors that live on."""
HALF_CODES = 63
"""Codes stay in -126..125."""


def trellis_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """next_SZ, the state after each state and parity; from_SA, the two (state * 2 + parity) that lead to a state."""
    state_S, parity_Z = torch.arange(TRELLIS_STATES, device=device), torch.arange(2, device=device)
    next_SZ = (state_S >> 1 ^ (state_S & 1) * (PARITY_H0 >> 1))[:, None] ^ parity_Z * (PARITY_H1 >> 1)
    return next_SZ, next_SZ.flatten().argsort(stable=True).view(TRELLIS_STATES, 2)


def search_block(
    weight_RB: Tensor, factor_BB: Tensor, scale_RB: Tensor, state_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """codes_RB, errors_RB over the factor's diagonal, and state_R after them, of each row's best walk from `state_R`.

    The cost of a walk is the sum of (error / factor_jj)^2, GPTQ's.
    """
    rows, columns = weight_RB.shape
    next_SZ, from_SA = trellis_steps(weight_RB.device)
    half_S = torch.arange(TRELLIS_STATES, device=weight_RB.device) & 1
    first_SZ = half_S[:, None] + torch.tensor([0, 2], device=half_S.device)
    cost_RS = torch.full((rows, TRELLIS_STATES), torch.inf, device=weight_RB.device).scatter_(1, state_R[:, None], 0.0)
    error_RSB = weight_RB.new_zeros(rows, TRELLIS_STATES, columns)
    code_RSB = torch.zeros(rows, TRELLIS_STATES, columns, dtype=torch.int8, device=weight_RB.device)
    for j in range(columns):
        scale_R11 = scale_RB[:, j, None, None]
        value_RS1 = (weight_RB[:, j, None] - error_RSB[:, :, :j] @ factor_BB[:j, j])[:, :, None]
        turns_RSZ = ((value_RS1 / scale_R11 - first_SZ) / 4).round().clamp(-HALF_CODES, HALF_CODES - 1)
        point_RSZ = first_SZ + 4 * turns_RSZ
        errors_RSZ = (value_RS1 - point_RSZ * scale_R11) / factor_BB[j, j]
        cost_RS, arm_RS = (cost_RS[:, :, None] + errors_RSZ**2).flatten(1)[:, from_SA].min(2)
        chosen_RS = from_SA.expand(rows, -1, -1).gather(2, arm_RS[:, :, None])[:, :, 0]
        past_RSB = (chosen_RS // 2)[:, :, None].expand(-1, -1, j)
        error_RSB[:, :, :j], code_RSB[:, :, :j] = error_RSB.gather(1, past_RSB), code_RSB.gather(1, past_RSB)
        error_RSB[:, :, j] = errors_RSZ.flatten(1).gather(1, chosen_RS)
        code_RSB[:, :, j] = ((point_RSZ - half_S[:, None]) / 2).flatten(1).gather(1, chosen_RS).to(torch.int8)
    best_R = cost_RS.argmin(1)
    row_R = torch.arange(rows, device=weight_RB.device)
    return code_RSB[row_R, best_R], error_RSB[row_R, best_R], best_R


def quantize_trellis(weight_RC: Tensor, factor_CC: Tensor, scales: StepSizes) -> QuantizedTensor:
    """Codes whose points are near `weight_RC` in the metric of H, with factor_CC the upper U of H^-1 = U^T U in the
    columns' natural order. `scales` are steps of the coarse grid, halved here. Runs in fp32: survivors are compared,
    and what is stored is whole numbers."""
    scale_S1 = scales.scale_SG * 0.5
    column_C = scales.column_scale_C if scales.column_scale_C is not None else torch.ones_like(weight_RC[0]).half()
    scale_RC = (scale_S1.float() * column_C.float()).expand_as(weight_RC)
    weight_RC, factor_CC = weight_RC.float().clone(), factor_CC.float()
    codes_RC = torch.empty_like(weight_RC, dtype=torch.int8)
    state_R = torch.zeros(len(weight_RC), dtype=torch.int64, device=weight_RC.device)
    for start in range(0, weight_RC.size(1), TRELLIS_BLOCK):
        block, later = slice(start, start + TRELLIS_BLOCK), slice(start + TRELLIS_BLOCK, None)
        found = search_block(weight_RC[:, block], factor_CC[block, block], scale_RC[:, block], state_R)
        codes_RC[:, block], errors_RB, state_R = found
        weight_RC[:, later] -= errors_RB @ factor_CC[block, later]
    return QuantizedTensor(codes_RC.cpu(), scale_S1.cpu(), 8, column_C.cpu(), trellis=True)


# ---- golf/quant/steps.py ---------------------------------------------------------------------------------------------

"""Step sizes for the least loss at a given size: every code's error costs the same.

With an entropy coder behind it a weight w on a grid of step s costs about log2(|w| / s) bits and s^2 / 12 of squared
error, which GPTQ turns into row_weight_r * s^2 / (12 U_cc^2) nats (golf/quant/calibration.py for the row weights,
golf/quant/gptq.py for U). The least sum of both over all weights of all matrices is reached where every weight has
the same cost per squared step (reverse water-filling, Cover and Thomas, Elements of Information Theory, section
13.3.3): one water level for the whole model gives all steps,

    step_rc = sqrt(level / row_weight_r) * U_cc,

the product of a scale for the row and one for the column. Both lie on a logarithmic grid, so that they are cheap to
send. R rows, C columns.
"""

STEPS_PER_OCTAVE = 16
WIDEST = QuantSpec(8)
"""Codes are as large as int8 holds: the coder pays for what is used."""
CODE_ROOM = 0.9
"""Share of the largest code that the weights as they were may reach: error feedback moves them."""
RATE_WEIGHT = 0.15
"""What a code's bits count beside its error. In theory 1; but codes that are all moved towards zero have errors that
add up, and the divergence from the unquantized model is least near this (docs/LOG.md)."""
LEAST_ROW_WEIGHT = 1e-4
"""In units of the mean row's: a row that calibration never saw act may act after all."""


def nearest_on_log_grid(scale: Tensor) -> Tensor:
    """fp16 values m / 1024 * 2^e nearest to `scale` in ratio, m one of STEPS_PER_OCTAVE whole numbers an octave."""
    k = (scale.double().clamp(FP16_TINY, FP16_MAX / 2).log2() * STEPS_PER_OCTAVE).round()
    octave = (k / STEPS_PER_OCTAVE).floor()
    mantissa = (1024 * torch.exp2(k / STEPS_PER_OCTAVE - octave)).round()
    return (mantissa / 1024 * torch.exp2(octave)).half()


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """A matrix with all that does not depend on the water level."""

    weight_RC: Tensor
    problem: GptqProblem
    row_weight_R: Tensor
    hessian_CC: Tensor

    def step_sizes(self, level: float) -> StepSizes:
        """Scales of rows and columns at a water level, coarse enough for the weights to stay within int8 codes."""
        column_C = self.problem.factor_CC.diagonal()
        center = column_C.log().mean().exp()
        column_C = nearest_on_log_grid(column_C / center)
        row_R = (level / self.row_weight_R).sqrt() * center
        most_R = (self.weight_RC.double().abs() / column_C.double()).amax(dim=1)
        row_R = torch.maximum(row_R, most_R / (CODE_ROOM * grid_clip(WIDEST.bits)))
        return StepSizes(nearest_on_log_grid(row_R).unsqueeze(1), column_C)

    def quantize(self, level: float, rate_weight: float = RATE_WEIGHT, trellis: bool = True) -> QuantizedTensor:
        """GPTQ with the steps of `level`, each code chosen by its error and its bits at the price that the level stands
        for; or, where that costs less, the codes of a trellis (its search takes ten times as long)."""
        scales = self.step_sizes(level)
        plain = self.quantize_plain(scales, level, rate_weight)
        if not trellis:
            return plain
        woven = quantize_trellis(self.weight_RC, self.problem.factor_CC, scales)
        return min(plain, woven, key=lambda entry: self.cost(entry, level))

    def quantize_plain(self, scales: StepSizes, level: float, rate_weight: float) -> QuantizedTensor:
        options = GptqOptions(
            rate_weight=rate_weight, rate_slope=HIGH_RATE_SLOPE * level, row_weight_R=self.row_weight_R
        )
        grid = ColumnGrid(self.weight_RC, WIDEST, scales)
        level_RC, price = self.problem.round_columns(grid), None
        for _ in range(options.rate_passes if rate_weight else 0):
            price = rate_price(self.problem, level_RC, grid, options)
            level_RC = self.problem.round_columns(grid, price)
        level_RC = self.problem.descend(level_RC, grid, price)
        return stored_form(level_RC, *grid.parts(), WIDEST, grid.column_scale_C)

    def cost(self, entry: QuantizedTensor, level: float) -> float:
        """Nats per token: the loss that is predicted, and the codes' bits at the price that the level stands for."""
        bits = class_entropy(entry.codes_RC.float()) * entry.codes_RC.numel()
        return self.loss_added(dequantize_tensor(entry)) + 0.5 * HIGH_RATE_SLOPE * level * bits

    def codes_not_nearest(self, entry: QuantizedTensor) -> int:
        """Codes that rounding each weight by itself, with the steps of `entry`, would have chosen otherwise; all those
        of a trellis, which has no nearest."""
        if entry.trellis:
            return entry.codes_RC.numel()
        column_scale_C = entry.column_scale_C.to(self.weight_RC.device)
        nearest = round_to_nearest(self.weight_RC, WIDEST, StepSizes(entry.scale_SG, column_scale_C))
        return int((nearest.codes_RC != entry.codes_RC).sum())

    def loss_added(self, restored_RC: Tensor) -> float:
        """Predicted nats per token."""
        error_RC = restored_RC.to(self.weight_RC.device).double() - self.weight_RC.double()
        return 0.5 * float(((error_RC @ self.hessian_CC) * error_RC).sum(1) @ self.row_weight_R)


def prepare_matrix(weight_RC: Tensor, statistics: LayerStatistics, damping: float = 0.01) -> PreparedMatrix:
    """Columns keep their natural order: with steps of their own, act-order changes nothing (docs/LOG.md), and a trellis
    runs from left to right. Raises QuantError for weights or statistics that are not finite or don't fit together."""
    weight_RC = weight_RC.detach().float()
    statistics = LayerStatistics(
        *(part.to(weight_RC.device) for part in (statistics.hessian_CC, statistics.row_weight_R))
    )
    row_weight_R = statistics.row_weight_R.clamp_min(
        LEAST_ROW_WEIGHT * statistics.row_weight_R.mean().clamp_min(1e-300)
    )
    problem = gptq_problem(weight_RC, statistics.hessian_CC, GptqOptions(damping=damping, act_order=False))
    return PreparedMatrix(weight_RC, problem, row_weight_R, statistics.hessian_CC)


# ---- golf/artifact/level_fit.py --------------------------------------------------------------------------------------

"""Fit by the water level: the steps of all matrices at which the artifact, as it is really coded, fills the limit.

One number decides (golf/quant/steps.py): its base-2 logarithm is bracketed and then found by the secant of the coded
size, which falls by about half a bit a weight for each doubling. What is returned was packed.
"""

FINEST, COARSEST = -36.0, 0.0
"""Base-2 logarithms of the levels that are tried: codes fill int8 at the one, nearly all are zero at the other."""
CPU = torch.device("cpu")
FIRST_GUESS = -21.0
NEAR_ENOUGH = 500
"""Bytes below the goal at which the search ends (a limit of 16,000,000 is filled to 0.003 %)."""
MOST_PACKINGS = 16


@dataclass(frozen=True, eq=False)
class LevelArtifact:
    """The model at one water level."""

    log_level: float
    data: bytes
    sizes: SizeReport
    stored: QuantizedState
    loss_added: float
    """Predicted, nats per token."""


@dataclass(eq=False)
class LevelSearch:
    """Weights that are ready for any level."""

    state: Mapping[str, Tensor]
    statistics: Mapping[str, LayerStatistics]
    quant: QuantConfig
    model: ModelConfig
    tokenizer_sha256: str = "0" * 64
    log: Callable[[str], None] = print
    trellis: bool = False
    first_guess: float = FIRST_GUESS
    near_enough: int = NEAR_ENOUGH
    device: torch.device = CPU
    tried: dict[float, LevelArtifact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hidden units come in the order that suits the coder: 0.2 to 0.4 % of the bytes for nothing."""
        orders = hidden_orders(self.state)
        self.state = permute_hidden_units(self.state, orders)
        self.statistics = permute_statistics(self.statistics, orders)
        self.matrices: dict[str, PreparedMatrix] = {
            name: prepare_matrix(self.state[name].to(self.device), one) for name, one in self.statistics.items()
        }

    def quantize(self, log_level: float) -> QuantizedState:
        """All tensors at a level, those that are no matrices as fp16."""
        level, rate_weight, trellis = 2.0**log_level, self.quant.rate_weight, self.trellis
        codes = {name: matrix.quantize(level, rate_weight, trellis) for name, matrix in self.matrices.items()}
        return {name: codes[name] if name in codes else part.detach().cpu().half() for name, part in self.state.items()}

    def at(self, log_level: float) -> LevelArtifact:
        """Quantized and packed at a level."""
        if log_level not in self.tried:
            stored = self.quantize(log_level)
            data, sizes = pack_artifact(stored, self.model, self.tokenizer_sha256, self.quant.codec, verify=False)
            loss = sum(matrix.loss_added(dequantize_tensor(stored[name])) for name, matrix in self.matrices.items())
            self.tried[log_level] = LevelArtifact(log_level, data, sizes, stored, loss)
            self.log(f"fit: level 2^{log_level:.4f}: {len(data):,} bytes, {loss:.5f} nats per token expected")
        return self.tried[log_level]

    def fill(self, goal: int) -> LevelArtifact:
        """The largest artifact within `goal` bytes, up to `near_enough`; less only where no finer step is of use.

        Raises FitError where the coarsest is larger.
        """
        over = within = None  # the nearest levels of either kind
        guess = self.first_guess
        for packing in range(MOST_PACKINGS):
            size = len(self.at(guess).data)
            over, within = (over, guess) if size <= goal else (guess, within)
            if goal - self.near_enough <= size <= goal or (within == FINEST and size <= goal) or over == COARSEST:
                break
            guess = self.next_guess(goal, over, within, halve=packing % 4 == 3)
        if within is None:
            smallest = min(len(one.data) for one in self.tried.values())
            raise FitError(
                f"the artifact can't fit in {goal:,} bytes: {smallest:,} is the smallest, with nearly all codes zero; "
                "train a smaller model"
            )
        return self.at(within)

    def next_guess(self, goal: int, over: float | None, within: float | None, halve: bool) -> float:
        """Between levels of both kinds where the line through their sizes meets the goal, or in their middle; else as
        far on as half a bit a weight for each octave says, and a bit."""
        if over is None or within is None:
            known = over if within is None else within
            octaves = 16 * (len(self.tried[known].data) - goal) / self.tried[known].sizes.weights
            return min(max(known + 1.2 * octaves + math.copysign(0.05, octaves), FINEST), COARSEST)
        if halve:
            return (over + within) / 2
        most, least = (math.log(len(self.tried[level].data)) for level in (over, within))
        share = (most - math.log(goal - self.near_enough / 2)) / (most - least)
        return over + min(max(share, 0.02), 0.98) * (within - over)


def fit_by_level(
    statistics: Mapping[str, LayerStatistics], state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig,
    tokenizer_sha256: str, limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
    device: torch.device = CPU,
) -> FittedArtifact:  # fmt: skip
    """The artifact that fills the limit, less a reserve: the level is sought with plain grids, which are quick, and
    from there on with trellises. Deterministic. Raises FitError, QuantError."""
    goal = limit_bytes_model - reserve_bytes
    roughly = max(NEAR_ENOUGH, goal // 50)
    search = LevelSearch(state, statistics, quant, model, tokenizer_sha256, log, near_enough=roughly, device=device)
    first_guess, packings = search.fill(goal).log_level, len(search.tried)
    search = replace(search, trellis=True, first_guess=first_guess, near_enough=NEAR_ENOUGH, tried={})
    found, packings = search.fill(goal), packings + len(search.tried)
    zeros = sum(int((found.stored[name].codes_RC == 0).sum()) for name in statistics)
    codes = sum(found.stored[name].codes_RC.numel() for name in statistics)
    woven = sum(found.stored[name].trellis for name in statistics)
    action = (
        f"water level 2^{found.log_level:.4f}, {found.loss_added:.5f} nats per token expected, {woven} of "
        f"{len(statistics)} matrices on a trellis, {zeros / codes:.1%} of the codes zero"
    )
    log(f"fit: {len(found.data):,} bytes in {packings} packings: {action}")
    moved = sum(matrix.codes_not_nearest(found.stored[name]) for name, matrix in search.matrices.items())
    data, sizes = pack_artifact(found.stored, model, tokenizer_sha256, quant.codec)  # read back and compared
    assert data == found.data
    return FittedArtifact(data, sizes, found.stored, [], [action], codes_not_nearest=moved)


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
    tensors, grids = {}, {}
    for name, entry in all_entries(stored).items():
        if isinstance(entry, QuantizedTensor):
            parts = {part: getattr(entry, part) for part in PLAIN_PARTS}
            tensors |= {f"{name}:{part}": tensor.contiguous() for part, tensor in parts.items() if tensor is not None}
            grids[name] = [entry.bits, entry.trellis]
        else:
            tensors[name] = entry.contiguous()
    write_file_atomically(path, save(tensors, {"grids": json.dumps(grids), "names": json.dumps(list(stored))}))


def load_quantized(path: Path) -> QuantizedState:
    """Inverse of save_quantized. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            grids, names = (json.loads(file.metadata()[key]) for key in ("grids", "names"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: load_entry(name, tensors, grids) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"cannot read quantized weights from {path}: {error}") from None


def load_entry(name: str, tensors: Mapping[str, Tensor], grids: Mapping[str, list]) -> QuantizedTensor | Tensor:
    """A stored weight with the factors of its correction. Raises KeyError."""
    if name not in grids:
        return tensors[name]
    bits, trellis = grids[name]
    sides = [f"{name}:{side}" for side in FACTOR_NAMES]
    factors = tuple(load_entry(side, tensors, grids) for side in sides) if sides[0] in grids else None
    parts = {part: tensors.get(f"{name}:{part}") for part in PLAIN_PARTS}
    return QuantizedTensor(bits=bits, trellis=trellis, low_rank=factors, **parts)


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
        "calibration": (quant.quantizer == "fit", "set quantizer=grid"),
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


def global_batch(
    stream: TokenStream,
    step: int,
    batch_tokens: int,
    seq_len: int,
    rank: int = 0,
    world_size: int = 1,
    order: str = "sequential",
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of the global batch of `step`: inputs_BT and targets_BT, int64, on the CPU.

    In sequential order (the competition's) the global batch is tokens step * batch_tokens, ...,
    (step + 1) * batch_tokens of the stream, the last one only as a target; in spread order its rows come from all
    over the stream (`spread_start`); the other orders are for a stream of shuffled documents (golf/data/orders.py).
    Rows are dealt out contiguously, so that the ranks' rows, taken together, are the same for every world size.
    Raises DataError where they can't be dealt out equally.
    """
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


class BatchPrefetcher:
    """Reads the batches of the next steps in a thread while the current one is in use.

    `get(step)` is `global_batch(stream, step, ...)` on the device, only sooner when steps are asked for in order. On
    CUDA the batch waits in pinned memory, and its copy does not hold up the host.
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
        batch = global_batch(self.stream, step, *self.shape)
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


# ---- golf/run/calibrating.py -----------------------------------------------------------------------------------------

"""The rows that weights are calibrated on, and the calibration of a run: chosen by the seed, recorded, timed."""

@dataclass(frozen=True, eq=False)
class RunCalibration:
    """Statistics of all matrices, and how they came about."""

    statistics: dict[str, LayerStatistics]
    record: dict[str, Any]


SETTLING = 0.25
"""Seconds of the cap that are left for the sums of all ranks."""
NO_CALIBRATION: dict[str, Any] = {"calibration_seconds": 0.0, "calibration_tokens": 0}


def training_rows(stream: TokenStream, tokens: int, length: int, seed: int) -> Tensor:
    """int64 rows_NT of `length` tokens from all over the stream, distinct, in order; the same for a seed.

    Raises QuantError where there is no row.
    """
    rows, whole = tokens // length, len(stream) // length
    if rows < 1 or whole < 1:
        raise QuantError(
            f"no row to calibrate on: {tokens:,} tokens of the training shards' {len(stream):,}, in rows of {length:,}"
        )
    numbers = np.sort(np.random.default_rng(seed).choice(whole, min(rows, whole), replace=False))
    return torch.from_numpy(np.stack([stream.tokens(int(number) * length, length) for number in numbers]))


def calibrate_run(
    state: Mapping[str, Tensor],
    config: Config,
    stream: TokenStream,
    runtime: Runtime,
    seconds: float = math.inf,
    rows: int = 0,
) -> RunCalibration:
    """Calibrate trained weights as the configuration says, all ranks together, within `seconds`: what was trained and
    what is calibrated share one cap. On fewer `rows` for a rehearsal."""
    quant, length, started = config.quant, config.model.train_seq_len, time.perf_counter()
    model = GPT(config.model, runtime.compute_dtype)
    model.load_state_dict(state)
    model.to(runtime.device)
    tokens = rows * length or quant.calibration_tokens
    if quant.calibration_text == "train":
        rows_NT = training_rows(stream, tokens, length, config.run.seed)
    else:
        rows_NT = generated_rows(model, tokens // length, length, config.run.seed)
    batch_rows = max(1, config.train.micro_batch_tokens // length)
    left = seconds - (time.perf_counter() - started)
    statistics, tokens = calibrate_within(left, model, rows_NT, runtime, batch_rows, config.run.seed)
    record = {
        "calibration_seconds": time.perf_counter() - started,
        "calibration_tokens": tokens,
        "calibration_text": quant.calibration_text,
        "calibration_seed": config.run.seed,
    }
    return RunCalibration(statistics, record)


def seconds_left(config: Config, train_seconds: float) -> float:
    """For calibration, of the wall clock's cap."""
    cap = config.train.max_wallclock_seconds
    return cap - train_seconds - SETTLING if cap else math.inf


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
    tokenizer: TextTokenizer
    data_id: str


def locate_data(config: Config, runtime: Runtime, root: Path) -> Config:
    """`config` with data_path and tokenizer_path filled in; prepares shards from `corpus` where they are missing.

    Preparation is a program of its own (data/prepare.py beside the training script): it is not part of the
    code that a submission ships.
    """
    if config.data.data_path:
        return with_vocabulary(with_tokenizer_path(config))
    prepared = prepare_corpus_data(config, root) if runtime.is_main else ""
    folder = Path(runtime.text_of_main(prepared))
    if str(folder).startswith("!"):
        raise ConfigError(str(folder)[1:])
    data = replace(config.data, data_path=str(folder), tokenizer_path=str(tokenizer_beside(folder)))
    return with_vocabulary(replace(config, data=data))


def corpus_tokenizer(config: Config) -> str:
    """What `corpus` is prepared with, as data/prepare.py calls it: a file, trained pieces, or characters."""
    pieces = config.model.vocab_size
    return config.data.tokenizer_path or (f"train:{pieces}" if pieces else "chars")


def with_vocabulary(config: Config) -> Config:
    """`config` with the vocabulary of its tokenizer, where the model leaves that open. Raises DataError."""
    if config.model.vocab_size:
        return config
    vocab_size = load_tokenizer(config.data.tokenizer_path).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


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
    command += ["--tokenizer", corpus_tokenizer(config)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        return f"!data/prepare.py failed (exit status {finished.returncode}); its message stands above"
    return json.loads(finished.stdout)["folder"]


def check_vocabulary(config: Config, tokenizer: TextTokenizer) -> None:
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


def training_budget(config: Config) -> Budget:
    """Of optimizer steps: the wall clock's cap, less what calibration will need of it."""
    seconds = config.train.max_wallclock_seconds
    if seconds and config.quant.quantizer == "fit":
        assert seconds > config.quant.calibration_reserve  # check_config refuses the rest; 0 would be no limit
        seconds -= config.quant.calibration_reserve
    return Budget(config.train.iterations, seconds)


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
        self.budget = training_budget(config)
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
    """int8 where MLP and attention share a width, int5int6 where they do not; fit where steps fill the limit."""
    if quant.quantizer == "fit":
        return "fit"
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
        f"quantizer:{quant.quantizer} prune:{quant.prune_frac} eval_seq_len:{config.score.eval_seq_len} "
        f"warmdown:{train.warmdown_shape}",
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
    weights: Mapping[str, Tensor] | None, stored: QuantizedState, config: Config, ids: list[int], runtime: Runtime
) -> dict[str, Any]:
    """parity.json: a row of training text, and the nats of its tokens by the trained weights, through the forward
    and the grid of training (what is stored as fp16 is rounded to it); without `weights`, by what is stored."""
    model = GPT(config.model, runtime.compute_dtype)
    if weights is None:
        model.load_state_dict(dequantize_state(stored))
    else:
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

REHEARSED_ROWS = 4
STATE_COPIES = 12
"""Bytes on the disk for each fp32 byte of weights: three checkpoints of weights, optimizer state and average."""


class RehearsalError(UserError):
    """Something that the stages after training need is not there."""


def quantize_once(trainer: Trainer) -> QuantizedState:
    """The untrained weights as they would be stored, calibrated on a few rows where the run will calibrate."""
    config, state = trainer.config, trainer.model.state_dict()
    if config.quant.quantizer == "grid":
        return quantize_state(prune_state(state, config.quant)[0], config.quant)
    alone = replace(trainer.runtime, rank=0, world_size=1)
    calibration = calibrate_run(state, config, trainer.batches.stream, alone, rows=REHEARSED_ROWS)
    search = LevelSearch(state, calibration.statistics, config.quant, config.model, log=lambda line: None)
    return search.quantize(FIRST_GUESS)


def rehearse(trainer: Trainer, tokenizer: TextTokenizer, folder: RunFolder) -> str:
    """Quantize, pack, reload and score a sliver of training text at the real shapes; returns a line for the log.

    Raises what the stages after training would raise, and RehearsalError for a disk that is too full.
    """
    config, state, runtime = trainer.config, trainer.model.state_dict(), trainer.runtime
    needed, free = STATE_COPIES * sum(4 * part.numel() for part in state.values()), shutil.disk_usage(folder.path).free
    if free < needed:
        raise RehearsalError(f"{folder.path}: {free >> 20} MiB are free, and a run needs {needed >> 20}: free some")
    path = folder.path / "rehearsal.golf"
    try:
        sizes = write_artifact(path, quantize_once(trainer), config.model, tokenizer.sha256, config.quant.codec)
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
        ("training", figures["train_seconds"] + figures["calibration_seconds"], figures["max_wallclock_seconds"]),
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
        "codes_not_nearest": fitted.codes_not_nearest,
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
    if config.quant.quantizer == "fit":
        moved = pruned["codes_not_nearest"]
        witness.act("calibration", count=pruned["calibration_tokens"])
        witness.prove("calibration", moved > 0, f"{moved} codes are not the nearest to their weights")
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
        session.do("quantize", lambda: quantize(config, session), together=True)
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
    """From weights to integer codes: those of the training's grid, coarser where the artifact would be over the limit;
    or those that fill the limit with the least loss, after calibration on all ranks."""
    folder, runtime, saved = session.folder, session.runtime, load_weights(session.folder.weights)
    stream, fit, record = open_training_data(config).stream, fit_to_limit, NO_CALIBRATION
    if config.quant.quantizer == "fit":
        with session.ledger.phase("calibrate"):
            seconds = seconds_left(config, folder.load_json(folder.training)["train_seconds"])
            calibration = calibrate_run(saved.state, config, stream, runtime, seconds)
        fit, record = partial(fit_by_level, calibration.statistics, device=runtime.device), calibration.record
    if not runtime.is_main:
        return []
    room = config.run.limit_bytes - folder.code.stat().st_size
    fitted = fit(
        saved.state, config.quant, config.model, saved.tokenizer_sha256, room, config.run.reserve_bytes, runtime.print
    )
    session.packed = fitted.data, fitted.sizes
    save_quantized(folder.quantized, fitted.stored)
    folder.save_json(folder.pruning, pruning_record(fitted) | record)
    row = stream.tokens(0, config.model.train_seq_len + 1).tolist()
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
