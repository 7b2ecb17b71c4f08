# Made by tools/bundle.py from train_gpt.py and the modules it needs: edit those, not this file.
# Left out: all that the configuration in FROZEN does not use.
# sha256 of the parts: 6eca83228c320d4167f35b2ca2359d0dc26e9ed3f799d6ecad7f5aa65f50aa58
#   a66d24688384559f    94 lines  golf/config/knobs.py
#   d4dd657139053e31   172 lines  golf/artifact/codecs.py
#   15681418b2291ebe   148 lines  golf/config/model.py
#   c3385dd2909e908f   100 lines  golf/config/presets.py
#   25731aab202985a3   198 lines  golf/config/site_quantizers.py
#   a59d727e8bf4688f    92 lines  golf/config/quantization.py
#   4358f289e6fd594f    55 lines  golf/config/run.py
#   a7d909d081a483ce    49 lines  golf/config/scoring.py
#   49018019502acdd6   168 lines  golf/config/training.py
#   7f1e787fa6be5fac   202 lines  golf/config/config.py
#   cc5477c441e09407    81 lines  golf/config/features.py
#   6b55533a89de15fd    46 lines  golf/model/recurrence.py
#   d94bc3055714a8e6    90 lines  golf/model/cache.py
#   449b4e858e82e159   141 lines  golf/model/layers.py
#   ac645fb018567005   158 lines  golf/model/attention.py
#   486bcba12b96c457    97 lines  golf/model/block.py
#   beda33471f3e16cf    90 lines  golf/model/embedding.py
#   f7a95ad143ee8f75    37 lines  golf/model/lanes.py
#   4e30233ba61c9c86   140 lines  golf/model/segments.py
#   44ee64873f027b11   232 lines  golf/model/gpt.py
#   4aeefda5daad5234    47 lines  golf/quant/trellis.py
#   a608335454f14112   240 lines  golf/quant/grid.py
#   2323646cd1f2c8ce    68 lines  golf/quant/tensor_classes.py
#   1eb7e55dce829c0e   292 lines  golf/artifact/description.py
#   702c939f7d329693    87 lines  golf/artifact/frame.py
#   36a5b131928e6df8   101 lines  golf/artifact/rans.py
#   14daf16709fddba1   249 lines  golf/artifact/context_model.py
#   e403f74a5aa7af54   182 lines  golf/artifact/stacks.py
#   cb1b2ee23104f00e   139 lines  golf/artifact/sequences.py
#   549bbd86d4604235   117 lines  golf/artifact/streams.py
#   52765b2b52c08b0f   230 lines  golf/artifact/layout.py
#   722e030d9dabe4e7    99 lines  golf/artifact/sizes.py
#   89202303bb38a067   316 lines  golf/quant/site_grid.py
#   03842d709512b81e   110 lines  golf/quant/site_operator.py
#   c013fb5e92454cee   301 lines  golf/runtime.py
#   7bfd68421ff2925f   168 lines  golf/quant/qat.py
#   37635724d5f5f933   272 lines  golf/artifact/container.py
#   bec7a1a29123fde9   111 lines  golf/data/shards.py
#   919e44610e096544   250 lines  golf/data/loader.py
#   326f09a8f2d7e84b   301 lines  golf/quant/calibration.py
#   b6f08cd313f60ffa   126 lines  golf/quant/export.py
#   4b498498e3dc4661    95 lines  golf/quant/rate.py
#   5ce4d5c478a1cff2   251 lines  golf/quant/gptq.py
#   bf23b9bf03d8891e    56 lines  golf/quant/spreading.py
#   0cc17b392afc659b   152 lines  golf/quant/trellis_search.py
#   37b25cba57cc9cd7   225 lines  golf/quant/waterfill.py
#   2a83797d139557f3   323 lines  golf/artifact/fill_limit.py
#   c8cfc58b81c10f85   104 lines  golf/artifact/weights.py
#   e584dbc9ee9e9cc5    87 lines  golf/optim/average.py
#   44f01534fa0d61c3    83 lines  golf/run/feature_audit.py
#   46bab922927bd10e   141 lines  golf/run/checkpoint.py
#   847c23ddd84c4cee    66 lines  golf/run/guard.py
#   2497e7380bee2092   121 lines  golf/run/folder.py
#   c7b0c908bced7915    84 lines  golf/run/command.py
#   d033b73e4970037d   249 lines  golf/data/tokenizer.py
#   b02f529ca5ece1a6    78 lines  golf/data/manifest.py
#   2c7ae7a2d7f577b9   105 lines  golf/run/datasets.py
#   2c42b02eb559c013    68 lines  golf/run/frozen_code.py
#   4996988192aca60e    43 lines  golf/model/init.py
#   33a535c79661ace2   267 lines  golf/optim/optimizers.py
#   4e91503e2895bacf    66 lines  golf/optim/prefix_target.py
#   5dbce32c8588897f    69 lines  golf/optim/schedule.py
#   30f2260f3c93b498    53 lines  golf/run/proofs.py
#   91063210f6e77d0e   309 lines  golf/run/trainer.py
#   1fcea4366664f986    69 lines  golf/score/journal.py
#   8b8678a0220cc664   114 lines  golf/data/sidecar.py
#   cd2ab2aad7b3c481    56 lines  golf/score/progress.py
#   7aab617523766a43    65 lines  golf/score/windows.py
#   a09c1fe8aa4aead1   373 lines  golf/score/scorer.py
#   46a676bfad366b4b   169 lines  golf/run/log_lines.py
#   3eefd014c3a3dbc3    80 lines  golf/run/parity.py
#   fb7c10e340e971b4   274 lines  golf/score/counts.py
#   b9686c0cb9327b31   183 lines  golf/score/mixture.py
#   cd361258a636930c    66 lines  golf/run/rehearsal.py
#   dfd847ac9b22cced   110 lines  golf/run/ledger.py
#   bb8575fb5d4b1ff0   186 lines  golf/run/session.py
#   5c5fd154c23ca746   147 lines  golf/run/result.py
#   1b9518688b969ef2    41 lines  golf/run/stages.py
#   4de7d4ad8d4d096a    97 lines  golf/run/train_loop.py
#   bc251139ef989d99   187 lines  golf/score/adapters.py
#   c297e5c465a2bb4d   139 lines  golf/score/adapted.py
#   1fc1cf163b1ccd3a    62 lines  golf/score/deadline.py
#   5f35e50614de4322   149 lines  golf/score/roundtrip.py
#   08404ea97b8fd216   264 lines  train_gpt.py

"""Trains the best language model that fits a byte budget, from text and a wall-clock budget, and proves its score.

    config -> data -> train -> average -> quantize -> pack | a fresh process: reload -> score -> report

Run it with `python train_gpt.py` or `torchrun --standalone --nproc_per_node=N train_gpt.py` (--help lists the knobs). A
run writes everything to runs/<run_id>/, and `--resume <run_id>` continues an interrupted run: every stage reads from
the disk what the stage before it wrote. golf/ holds the functions that this script calls.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import lzma
import math
import numpy as np
import os
import platform
import re
import sentencepiece
import shutil
import signal
import sys
import tempfile
import threading
import time
import torch
import torch.distributed as dist
import torch.nn.functional as F
import traceback
import zlib
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, cached_property, lru_cache, partial
from importlib import import_module
from itertools import accumulate, groupby, islice, pairwise
from math import gcd, prod
from pathlib import Path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from types import FrameType, FunctionType
from typing import Any, Literal, NamedTuple, NoReturn, TextIO, get_args, get_origin


Auditor = Batch = Forward = Guide = KeyValueCache = LayerCache = PruneReport = Recorder = Rule = Shapes = StackShape = StepCoder = Strengths = Verdict = object  # named in annotations alone


# ---- golf/config/knobs.py --------------------------------------------------------------------------------------------

"""Defines what every folder shares: errors, exit statuses, the type of a rule, the knobs' docs, people's JSON."""

EXIT_FINDINGS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE = 1, 2, 4, 5
"""Exit statuses of all programs; run.sh exits with 3 where the set-up failed."""


class UserError(ValueError):
    """Reports a mistake that a person can correct, in one clear line that says what is wrong and what to do.

    Every folder has its own subclass.
    """


class ConfigError(UserError):
    """Reports an unknown knob, a value that does not parse, or values that do not fit together."""


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Adds `path` to an error of writing to it: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON, write null")


def parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


JSON_HOOKS = {"parse_constant": refuse_constant, "parse_float": parse_float}


def parse_json(data: str | bytes, **hooks: Any) -> Any:
    """Parses JSON that people wrote, with or without a byte order mark; `hooks` are those of json.loads.

    Raises ValueError, of one line, for anything else: not UTF-8, NaN (read with parse_constant=float), a number or a
    nesting that is too large for Python, half of a surrogate pair.
    """
    text = (data.decode() if isinstance(data, bytes) else data).removeprefix("\ufeff")
    try:
        value = json.loads(text, **(JSON_HOOKS | hooks))
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no Unicode text") from None
    return value


# ---- golf/artifact/codecs.py -----------------------------------------------------------------------------------------


SAMPLE_BYTES = 2**20
"""Bytes of a stream on which codec settings are chosen: encoding all of it with each would take minutes."""
LZMA_SETTINGS = ((2**12, 0, 0), (2**16, 0, 0), (2**26, 0, 0), (2**16, 3, 2))
"""Settings to try: (dictionary bytes, literal context bits, position bits). Repeats in codes are chance: a short
dictionary makes them cheap to name, and is quick; a table whose rows resemble each other needs a long one."""
LARGEST_WINDOW = 2**27


class ArtifactError(UserError):
    """Reports bytes that are not a sound artifact, or weights that can't become one."""


def encode_lzma(data: bytes, settings: tuple[int, int, int]) -> bytes:
    """Encodes LZMA2 without the xz container; the stream itself records the context bits."""
    dict_size, lc, pb = settings
    options = {"dict_size": min(dict_size, max(len(data), 4096)), "lc": lc, "lp": 0, "pb": pb, "nice_len": 273}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, **options}])


def decode_lzma(data: bytes, size: int) -> bytes:
    """Decodes at most `size` + 1 bytes of LZMA2.

    The dictionary's size need not be known: any dictionary reaches at most to the beginning of the stream.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": min(max(size, 4096), LARGEST_WINDOW)}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, max_length=size + 1)


def encode_zlib(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return encoder.compress(data) + encoder.flush()


def decode_zlib(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


@dataclass(frozen=True)
class ByteCodec:
    """Compresses bytes by one of several encoders, which share a decoder of (data, declared size)."""

    encoders: tuple[Callable[[bytes], bytes], ...]
    decode: Callable[[bytes, int], bytes]


LZMA = ByteCodec(tuple(partial(encode_lzma, settings=settings) for settings in LZMA_SETTINGS), decode_lzma)
BY_CODEC = {}
"""Codecs that compress bytes, by name; rans models codes instead (streams.py)."""


def encode_smallest(codec: ByteCodec, data: bytes) -> bytes:
    """Encodes `data` by the encoder that is best on its beginning, of equals the first.

    The same data and library version give the same bytes.
    """
    encoders = codec.encoders
    if len(encoders) > 1 and len(data) > SAMPLE_BYTES:
        encoders = (min(encoders, key=lambda encoder: len(encoder(data[:SAMPLE_BYTES]))),)
    return min((encoder(data) for encoder in encoders), key=len)


def compress_stream(codec: str, data: bytes) -> bytes:
    """Returns `data` compressed by the codec of that name."""
    return encode_smallest(BY_CODEC[codec], data)


def decode_exactly(codec: ByteCodec, data: bytes, size: int) -> bytes:
    """Returns exactly `size` bytes, in memory of a few times `size` and the codec's window. Raises ArtifactError."""
    try:
        decoded = codec.decode(data, size)
    except (lzma.LZMAError, zlib.error, EOFError, MemoryError) as error:
        raise ArtifactError(f"a compressed stream is damaged: {error}") from None
    if len(decoded) != size:
        raise ArtifactError(f"a compressed stream does not hold the {size:,} bytes that were declared")
    return decoded


# ---- golf/config/model.py --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """Sets the network's shape and features: all that an artifact stores about its model."""

    vocab_size: int = 1024
    """Pieces of the tokenizer; 0: as many as it has, and text is then prepared in characters."""
    num_layers: int = 10
    """Transformer blocks; the first half feeds the second (U-Net skips)."""
    model_dim: int = 512
    """Width of the residual stream."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads, each shared by num_heads / num_kv_heads query heads."""
    mlp_mult: float = 3.0
    """MLP hidden width as a multiple of `model_dim`."""
    bigram_vocab_size: int = 10_240
    """Rows of the hashed bigram table, the last one reserved for "no previous token"; 0: no table."""
    bigram_dim: int = 128
    """Width of the bigram table's rows, before their projection to `model_dim`."""
    smear_gate: bool = True
    """Mix each embedding with the one before, by a learned gate."""
    resid_mix_init: Literal["phase", "stream"] = "phase"
    """phase: early blocks lean on the embedding, late ones on the stream; stream: all of the stream."""
    matrix_init: Literal["orthogonal", "orthogonal_zero", "uniform"] = "orthogonal"
    """orthogonal: outputs scaled by 1/sqrt(2 layers); orthogonal_zero: outputs zero; uniform: torch's, outputs zero."""
    qk_gain_init: float = 1.5
    """Initial gain of the normalised queries, learned per head."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    logit_softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial embedding and head."""
    train_seq_len: int = 2048
    """Tokens in a training row; the length at which RoPE is unscaled."""
    bos_id: int = 1
    """Token that starts a document."""
    tie_embeddings: bool = True
    """One table for the embedding and the head; off: the head has its own."""
    mlp_activation: Literal["relu2", "leaky_relu2", "tanh", "sigmoid", "identity"] = "relu2"
    """Non-linearity of the MLP."""
    exclusive_attention: bool = False
    """Take from each head's result its part along the position's own value (XSA)."""
    key_offset: bool = False
    """Take half of each key from the position before."""
    knowledge_tokens: int = 0
    """Learned vectors that every query sees beside the text, never a target (External Knowledge Tokens)."""
    act_attn_in: str = ""
    """Quantizer (golf/config/site_quantizers.py) of the attention's input; it is part of the model."""
    act_q: str = ""
    """Quantizer of the queries, after RoPE."""
    act_k: str = ""
    """Quantizer of the keys, after RoPE."""
    act_v: str = ""
    """Quantizer of the values."""
    act_attn_out: str = ""
    """Quantizer of the attention's result, before its output matrix."""
    act_mlp_in: str = ""
    """Quantizer of the MLP's input."""
    act_hidden: str = ""
    """Quantizer of the MLP's hidden values, after its non-linearity."""


# ---- golf/config/quantization.py -------------------------------------------------------------------------------------


CODECS = Literal["rans", "brotli", "lzma", "zstd", "zlib", "none"]


@dataclass(frozen=True)
class QuantConfig:
    """Sets how weights become codes, and codes bytes."""

    qat_enabled: bool = True
    """Weights pass through the export grid in the forward pass of training."""
    qat_start: float = 0.0
    """Share of the budget after which training uses the export grid."""
    mlp_bits: int = 5
    """Bits of the MLP's matrices, 2 to 8; 16: stored as fp16."""
    attn_bits: int = 6
    """Bits of the attention's matrices, 2 to 8; 16: stored as fp16."""
    bigram_bits: int = 6
    """Bits of the bigram table and its projection, 2 to 8; 16: stored as fp16."""
    embed_bits: int = 16
    """Bits of the token embedding, 2 to 8; 16: stored as fp16."""
    prune_frac: float = 0.05
    """Share of smallest weights set to zero per tensor, where that can change a code."""
    codec: CODECS = "lzma"
    """Coder of the artifact's streams; rans is the project's own."""
    quantizer: Literal["rtn", "waterfill"] = "rtn"
    """rtn: rounded to nearest on the bits above; waterfill: GPTQ after calibration, steps chosen to fill the limit."""
    calibration_tokens: int = 131_072
    """Tokens on which quantizer=waterfill measures the weights' sensitivity."""
    calibration_text: Literal["train", "generated"] = "train"
    """Text to calibrate on: training text, or text that the model generates."""
    calibration_reserve: float = 8.0
    """Seconds of max_wallclock_seconds that training leaves to the calibration of quantizer=waterfill."""
    rd_lambda: float = 0.15
    """Weight of a code's bits against its error in quantizer=waterfill; 1: full price; 0: the error alone decides."""


# ---- golf/config/run.py ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """Sets where a run computes, where it writes, and what it may use."""

    preset: str = "leaderboard"
    """Name of the preset that the other knobs start from."""
    run_id: str = ""
    """Name of the folder under `runs_root`; empty: preset, time and seed."""
    seed: int = 42
    """Seed of the initial weights, of shuffled orders and of calibration."""
    runs_root: str = "runs"
    """Folder of all runs."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to compute on; auto: CUDA where torch sees one."""
    compile: Literal["auto", "on", "off"] = "on"
    """torch.compile the training step and the scorer; auto: where a trial of it works."""
    threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    limit_bytes: int = 16_000_000
    """Most bytes that packed code and artifact may have together."""
    reserve_bytes: int = 10_000
    """Bytes to stay below the limit by where weights had to be coarsened to fit."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints; 0: only at the end and on SIGTERM or SIGINT."""
    rehearse: bool = True
    """Quantize, pack, reload and score the untrained model before the first step, so that missing parts show early."""


@dataclass(frozen=True)
class DataConfig:
    """Sets which text a model learns from, and in which order."""

    data_path: str = "data/datasets/fineweb10B_sp1024"
    """Folder of *_train_*.bin and *_val_*.bin shards; empty: prepared from `corpus` at first use."""
    tokenizer_path: str = "data/tokenizers/fineweb_1024_bpe.model"
    """SentencePiece model; empty: the one prepared with `corpus`."""
    corpus: str = ""
    """`embedded` (texts of Python's standard library) or a path: .txt, .jsonl, .jsonl.xz, a folder of them."""
    row_order: Literal["sequential", "spread", "shuffled", "documents"] = "sequential"
    """sequential: as in the shards; spread: from all over; shuffled: documents; documents: and rows start with one."""


def data_rules(config: Any) -> list[Rule]:
    """Returns the rules between the knobs of a Config that concern its data."""
    return [(bool(config.data.data_path) or bool(config.data.corpus), "set data_path, or corpus to prepare data from")]


# ---- golf/config/scoring.py ------------------------------------------------------------------------------------------

"""Defines the knobs of the score."""

@dataclass(frozen=True)
class ScoreConfig:
    """Sets how the validation stream is cut into windows, and how long scoring may take."""

    eval_seq_len: int = 4096
    """Tokens in a scoring window."""
    eval_stride: int = 64
    """Targets scored by a window (the first window scores all of its own)."""
    eval_batch_seqs: int = 32
    """Windows in one forward pass on one rank."""
    eval_rope: Literal["ntk", "none"] = "ntk"
    """RoPE beyond the training length: NTK-aware base, or the training base as it is."""
    mixture: bool = False
    """Mix the network's probabilities with counts of what was scored before, score first."""
    mixture_orders: int = 6
    """Longest context that is counted, in tokens."""
    mixture_parts: int = 1
    """Parts of the stream with counts of their own, which ranks take in turn: as many as there are ranks, or 1."""
    adapter_rank: int = 0
    """Rank of the changes that the network learns in each document while it is scored, score first; 0: none."""
    adapter_lr: float = 0.002
    """Step size of these changes."""
    adapter_lanes: int = 4
    """Documents that are scored beside each other on one rank; each in steps of eval_stride targets."""
    max_eval_seconds: float = 600.0
    """Most seconds of scoring: a stride that would take longer is raised before anything is scored; 0: no limit."""


# ---- golf/config/training.py -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Sets the budget, the batches, the learning rate's shape, and how often training reports."""

    iterations: int = 20_000
    """Most optimizer steps; 0: no limit."""
    max_wallclock_seconds: float = 600.0
    """Most seconds of training; 0: no limit (then equal seeds give equal bytes)."""
    train_batch_tokens: int = 786_432
    """Tokens of a step over all ranks and micro-steps."""
    micro_batch_tokens: int = 98_304
    """Most tokens of one forward pass on one rank."""
    short_seq_len: int = 0
    """Length of the rows in the first part of the budget; 0: always train_seq_len."""
    short_seq_fraction: float = 0.0
    """Share of the budget that is trained on the short rows."""
    middle_seq_len: int = 0
    """Length of the rows that follow the short ones; 0: none between them and train_seq_len."""
    middle_seq_fraction: float = 0.0
    """Share of the budget at which rows of train_seq_len follow."""
    loop_start: float = 0.0
    """Share of the budget after which blocks are repeated (loop_repeats)."""
    warmup_steps: int = 20
    """Untimed steps that compile and warm the caches; their effect is undone."""
    warmdown_fraction: float = 0.45
    """Share of the budget over which the learning rate falls to zero (272 of 600 s in the recipe's log)."""
    warmdown_shape: Literal["cosine", "linear"] = "cosine"
    """Curve on which the learning rate falls."""
    holdout_every: int = 500
    """Steps between scorings of the weights in training, on training text that is held out for it; 0: never."""
    train_log_every: int = 100
    """Steps between lines of the log."""
    holdout_tokens: int = 524_288
    """Training tokens held out for `holdout_every`."""
    eval_batch_tokens: int = 524_288
    """Tokens of a batch that is scored in plain rows, over all ranks."""


@dataclass(frozen=True)
class OptimConfig:
    """Sets learning rates, momentum and decay of each group of parameters."""

    matrix_lr: float = 0.02
    """Learning rate of the matrices, which Muon trains."""
    embed_lr: float = 0.03
    """Learning rate of the embedding, bigram and head tables, which AdamW trains."""
    scalar_lr: float = 0.02
    """Learning rate of vectors and scalars, which AdamW trains."""
    muon_momentum: float = 0.99
    """Muon's momentum after its warm-up."""
    muon_momentum_start: float = 0.92
    """Muon's momentum at the first step."""
    muon_momentum_warmup_fraction: float = 0.23
    """Share of the budget over which momentum rises (1,500 of 6,606 steps in the recipe's log)."""
    muon_ns_steps: int = 5
    """Newton-Schulz iterations of an update."""
    muon_iteration: Literal["quintic", "polar_express"] = "quintic"
    """Coefficients of these iterations: equal ones in all, or the five sets of Polar Express."""
    muon_weight_decay: float = 0.04
    """Decoupled weight decay of the matrices, times the learning rate."""
    embed_weight_decay: float = 0.04
    """Decoupled weight decay of the tables, times the learning rate."""
    scalar_weight_decay: float = 0.04
    """Decoupled weight decay of vectors and scalars, times the learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the gradients' mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradients' mean square."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip_norm: float = 0.3
    """Largest norm of all gradients together; 0: no clipping."""


@dataclass(frozen=True)
class AverageConfig:
    """Sets the averaging of weights over the last part of the budget."""

    swa_enabled: bool = True
    """Ship the mean of snapshots and not the last weights."""
    swa_start: float = 0.82
    """Share of the budget after which weights are averaged (step 5,425 of 6,606 in the recipe's log)."""
    swa_snapshots: int = 48
    """Snapshots in the average, evenly spaced (fewer when fewer steps are left)."""


def budget_rules(config: Any) -> list[Rule]:
    """Returns the rules of a Config that a change of its budget or its machine can break."""
    model, train = config.model, config.train
    return [
        (train.iterations > 0 or train.max_wallclock_seconds > 0, "set iterations or max_wallclock_seconds"),
        (train.micro_batch_tokens >= model.train_seq_len, "micro_batch_tokens must hold one row of train_seq_len"),
    ]


# ---- golf/config/config.py -------------------------------------------------------------------------------------------


FROZEN: dict[str, Any] = {'preset': 'local', 'device': 'cpu', 'compile': 'auto', 'limit_bytes': 500000, 'reserve_bytes': 1000, 'data_path': '', 'tokenizer_path': '', 'corpus': 'embedded', 'row_order': 'spread', 'vocab_size': 2048, 'num_layers': 2, 'model_dim': 160, 'num_heads': 4, 'num_kv_heads': 2, 'mlp_mult': 2.5, 'bigram_vocab_size': 1024, 'bigram_dim': 32, 'train_seq_len': 256, 'exclusive_attention': True, 'key_offset': True, 'max_wallclock_seconds': 180.0, 'train_batch_tokens': 2048, 'micro_batch_tokens': 2048, 'warmup_steps': 2, 'warmdown_fraction': 0.8, 'holdout_every': 0, 'holdout_tokens': 16384, 'eval_batch_tokens': 16384, 'muon_momentum': 0.95, 'swa_start': 0.94, 'swa_snapshots': 16, 'qat_enabled': False, 'embed_bits': 5, 'prune_frac': 0.0, 'codec': 'rans', 'quantizer': 'waterfill', 'calibration_tokens': 32768, 'calibration_reserve': 6.0, 'eval_seq_len': 320, 'eval_batch_seqs': 64, 'mixture': True, 'adapter_rank': 8}
"""Knobs of a script that was made for one configuration (tools/bundle.py); empty in the sources."""
FREE_KNOBS = {
    "run_id", "seed", "runs_root", "device", "compile", "threads", "limit_bytes", "reserve_bytes", "checkpoint_seconds",
    "rehearse", "data_path", "tokenizer_path", "corpus", "iterations", "max_wallclock_seconds", "micro_batch_tokens",
    "warmup_steps", "train_log_every", "eval_batch_tokens", "calibration_reserve", "eval_batch_seqs",
    "max_eval_seconds",
}  # fmt: skip
"""Knobs that such a script still accepts: places, budgets and machines, which no code of a technique depends on."""


OWN_KNOBS = (
    "run_id", "seed", "runs_root", "threads", "checkpoint_seconds", "rehearse", "data_path", "tokenizer_path",
)  # fmt: skip
"""Knobs of one run of many, which do not shape its result or, as paths, do not say what it is made of."""


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
    """Yields (section, knob, type, value) for every scalar of the tree."""
    for section in fields(config):
        part = getattr(config, section.name)
        for knob in fields(part):
            yield section.name, knob.name, knob.type, getattr(part, knob.name)


KNOBS: dict[str, tuple[str, Any]] = {knob: (section, kind) for section, knob, kind, _ in iter_knobs(Config())}


def parse_value(knob: str, kind: Any, text: str) -> Any:
    """Returns the value of `knob` that `text` spells (booleans are 0, 1, true or false). Raises ConfigError."""
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
    """Returns `config` with some knobs set; parses values that are text. Raises ConfigError for an unknown knob."""
    changes: dict[str, dict[str, Any]] = {}
    for knob, value in values.items():
        if knob not in KNOBS:
            raise ConfigError(f'unknown knob {knob!r}: `python train_gpt.py --help` lists the {len(KNOBS)} that exist')
        section, kind = KNOBS[knob]
        changes.setdefault(section, {})[knob] = parse_value(knob, kind, value) if isinstance(value, str) else value
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


def knobs_of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the knobs that environment variables set, retired ones included (so that they are refused by name)."""
    names = {knob.upper(): knob for knob in KNOBS}
    return {names[name]: text for name, text in environ.items() if name in names}


def preset_config(preset: str) -> Config:
    """Returns the configuration of a preset, or the one that this script was made for. Raises ConfigError."""
    return with_knobs(Config(), FROZEN)


def build_config(preset: str, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Config:
    """Returns the resolved configuration: preset, then environment, then overrides. Raises ConfigError."""
    chosen = knobs_of_environment(environ) | dict(overrides)
    base = preset_config(chosen.get('preset', preset))
    if chosen.get('corpus') and chosen.get('data_path'):
        raise ConfigError('corpus and data_path are both set: give the text, or the shards that were made of it')
    if chosen.get('corpus'):
        chosen = {'data_path': '', 'tokenizer_path': ''} | chosen
    config = with_knobs(base, chosen)
    check_frozen(config)
    check_config(config)
    return config


def check_frozen(config: Config) -> None:
    """Raises ConfigError for a knob whose other values this script, made for one configuration, has no code for."""
    frozen = preset_config("")
    for (_, knob, _, value), (*_, made_for) in zip(iter_knobs(config), iter_knobs(frozen), strict=True):
        if knob not in FREE_KNOBS and value != made_for:
            raise ConfigError(f"this script is made for {knob}={made_for}: take the project's sources to change it")


POSITIVE_KNOBS = (
    "num_heads", "num_kv_heads", "model_dim", "mlp_mult", "train_seq_len", "rope_base", "logit_softcap",
    "train_batch_tokens", "micro_batch_tokens", "train_log_every", "holdout_tokens", "eval_batch_tokens",
    "limit_bytes", "eval_batch_seqs",
)  # fmt: skip


def check_config(config: Config) -> None:
    """Raises ConfigError where values do not fit together, before the run has spent any time."""
    for _, knob, _, value in iter_knobs(config):
        if isinstance(value, (int, float)) and (value < 0 or (knob in POSITIVE_KNOBS and value == 0)):
            raise ConfigError(f"{knob}={value} must be {('positive' if knob in POSITIVE_KNOBS else 'at least 0')}")
    rules = [*budget_rules(config), *data_rules(config)]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def changed_knobs(config: Config) -> dict[str, Any]:
    """Returns the knobs that differ from the preset's, except the data's paths."""
    pairs = zip(iter_knobs(preset_config(config.run.preset)), iter_knobs(config), strict=True)
    changed = {knob: value for (_, _, _, before), (_, knob, _, value) in pairs if value != before}
    return {knob: value for knob, value in changed.items() if knob not in ("data_path", "tokenizer_path")}


def config_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the configuration as a plain nested dictionary, for JSON."""
    return asdict(config)


def current_knobs(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the knobs of an older run under their present names and values."""
    return dict(knobs)


def config_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Builds a configuration from config_dict's output, and from that of older runs."""
    return with_knobs(
        Config(), current_knobs({knob: value for part in sections.values() for knob, value in part.items()})
    )


def config_hash(config: Config) -> str:
    """Returns SHA-256 (20 hex digits) of all knobs that shape the result: equal for the seeds of one experiment.

    Knobs at their defaults do not count, so that a knob that comes later changes no hash. Data has its own identity.
    """
    pairs = zip(iter_knobs(Config()), iter_knobs(config), strict=True)
    knobs = {knob: value for (*_, default), (_, knob, _, value) in pairs if value != default and knob not in OWN_KNOBS}
    return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:20]


# ---- golf/config/features.py -----------------------------------------------------------------------------------------

"""Registers features: beside its code, each defines when it is on and how it shows that it acted.

A run counts the acts of every feature that is on and verifies its effect once (golf/run/feature_audit.py); a feature
that never acted makes the run invalid. A feature only has to register: no other folder knows it by name.
"""


@dataclass(frozen=True)
class StepFacts:
    """Describes a finished training step."""

    progress: float
    """Share of the budget that was used up before the step."""
    seq_len: int
    """Tokens of a row in the step."""
    fake_quantized: bool
    gradient_norm: float | None
    """Norm before clipping; None where gradients are not clipped."""


@dataclass(frozen=True)
class Feature:
    """Describes one feature of a run.

    Hooks that do not apply stay None; one hook must count the feature's acts, and one must verify its effect.
    """

    name: str
    is_on: Callable[[Any], bool]
    """Returns whether a Config switches it on."""
    hint: str
    """Advice for the user when it is on and never acts."""
    in_step: Callable[[Any, StepFacts], tuple[bool, str]] | None = None
    """Returns (whether it acted in a training step, the effect that this verifies or ""), from the Config and the
    step."""
    without: Callable[[Any], AbstractContextManager[None]] | None = None
    """Context in which a GPT computes as if the feature were off: the compiled step's loss must differ from the loss in
    it."""
    shows_in: Callable[[Any, Any], bool] | None = None
    """Returns whether a batch (GPT, ids_BT) can show the difference; None: any batch can."""
    verify_step: Callable[[Callable, Any, tuple], Verdict] | None = None
    """Verifies the compiled step from (compiled forward, GPT, batch), where a difference of losses can't show the
    effect."""
    verified_at_start: bool = False
    """True: verify before the first step, with the untrained weights; else after the last."""
    learned_weight: str = ""
    """Name of a weight that starts at zero and acts by what it learns."""
    in_files: Callable[[Mapping[str, Any]], tuple[int, bool, str]] | None = None
    """Returns (acts, whether an effect was seen, the effect) from the files of later stages: pruning, reload, score."""


FEATURES: dict[str, Feature] = {}
"""Features by name, in the order in which their modules register them."""


def register_feature(feature: Feature) -> Feature:
    """Adds a feature to the registry and returns it."""
    assert feature.name not in FEATURES, f"two features are called {feature.name}"
    FEATURES[feature.name] = feature
    return feature


def features_on(config: Any) -> dict[str, Feature]:
    """Returns the features that a Config switches on, by name."""
    return {name: feature for name, feature in FEATURES.items() if feature.is_on(config)}


# ---- golf/model/recurrence.py ----------------------------------------------------------------------------------------

"""Repeats blocks in the middle of the network: depth recurrence (parameter-golf pull requests 1204, 1493)."""

def layer_order(model: ModelConfig, looping: bool=True) -> list[int]:
    """Returns the blocks in the order in which they run; with `looping`, those that repeat several times in a row."""
    layers = list(range(model.num_layers))
    return layers


# ---- golf/model/layers.py --------------------------------------------------------------------------------------------


class Matrix(nn.Module):
    """Holds a 2-D fp32 master weight; `fake_quantize`, when set, maps it to the values that export would keep."""

    trains_as = "matrix"
    """Name of its parameter group (golf/optim/optimizers.py)."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    def effective_weight(self) -> Tensor:
        return self.weight if self.fake_quantize is None else self.fake_quantize(self.weight)


class Linear(Matrix):
    """Computes y_BTO = x_BTI W_OI^T in the dtype of x."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(out_features, in_features)

    def forward(self, x_BTI: Tensor) -> Tensor:
        return F.linear(x_BTI, self.effective_weight().to(x_BTI.dtype))


class Embedding(Matrix):
    """Looks up rows of a table, fp32, or of `weight_VD` where the caller already has the effective weight."""

    trains_as = "table"

    def forward(self, ids_BT: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        return F.embedding(ids_BT, self.effective_weight() if weight_VD is None else weight_VD)


class ActivationSite(nn.Module):
    """Applies the activation quantizer that the model's configuration names here; golf/quant/qat.py installs it."""

    def __init__(self, quantizer: str):
        super().__init__()
        self.quantizer = quantizer
        self.quantize: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.quantize or not self.quantizer, f"{self.quantizer} was not put in: build models by quantized_gpt"
        return x if self.quantize is None else self.quantize(x)


def rms_norm(x_BTD: Tensor) -> Tensor:
    """Returns x / rms(x) over the last axis, with no gain and fp32's epsilon whatever the dtype (the recipe's)."""
    return F.rms_norm(x_BTD, (x_BTD.size(-1),), eps=torch.finfo(torch.float32).eps)


class RmsNorm(nn.Module):
    """Computes `rms_norm` as a module, so that hooks can hear it (golf/quant/calibration.py)."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD)


def ntk_rope_base(base: float, length: int, train_length: int, head_dim: int) -> float:
    """Returns the base at which the lowest frequency turns as far at `length` as it did at `train_length`.

    base * s^(d / (d - 2)) with s = length / train_length and d = head_dim ("NTK-aware" scaling, bloc97 2023; the
    highest frequency stays as it is). Up to the training length the base is unchanged.
    """
    if length <= train_length:
        return base
    return base * (length / train_length) ** (head_dim / (head_dim - 2))


def rotary_dims(model: ModelConfig) -> int:
    """Returns how many dimensions of a head rotate."""
    return model.model_dim // model.num_heads


def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns cos_TF and sin_TF, fp32, of positions start .. length-1 at frequencies base^(-2i/d)."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle_TF = torch.outer(torch.arange(start, length, device=device, dtype=torch.float32), base**-exponent_F)
    return angle_TF.cos(), angle_TF.sin()


def rotate(x_BHTK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the pairs (i, i + K/2) of every head by the angle of their position; computes in fp32."""
    first_BHTF, second_BHTF = x_BHTK.float().chunk(2, dim=-1)
    turned = (first_BHTF * cos_TF + second_BHTF * sin_TF, second_BHTF * cos_TF - first_BHTF * sin_TF)
    return torch.cat(turned, dim=-1).to(x_BHTK.dtype)


@contextmanager
def changed_model(model: nn.Module, **knobs: Any) -> Iterator[None]:
    """Sets other knobs in the `config` of a GPT and its parts within the context."""
    parts = [module for module in model.modules() if hasattr(module, "config")]
    config = model.config
    for part in parts:
        part.config = replace(config, **knobs)
    yield
    for part in parts:
        part.config = config


def acts_always(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Says that a feature of the network acts in every step."""
    return True, ""


# ---- golf/model/attention.py -----------------------------------------------------------------------------------------

"""Defines grouped-query attention, and what may be done to its result before the output matrix.

B batch, T time, S last positions of T, U keys, D model width, H query heads, G key/value heads, K head width, P = K/2.
A caller may ask for the last S positions only: keys and values then come from all of T.
"""

class Positions(NamedTuple):
    """Holds the RoPE tables, and attention among the positions."""

    cos_TP: Tensor
    sin_TP: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Returns y_BHSK from q_BHSK, k_BGTK and v_BGTK: causal_attention, or segment_attention."""
    follows_BT: Tensor | None = None
    """Whether a position has one before it in its document, where keys are taken from there."""


def causal_attention(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, visible: Tensor | None = None) -> Tensor:
    """Returns y_BHSK: each query attends to the keys up to its own position, the queries being the last S of T.

    With `visible` (boolean, broadcast to BHTT; its last S rows count), queries attend to the keys that it marks.
    """
    queries, time, heads = q_BHSK.size(2), k_BGTK.size(2), q_BHSK.size(1)
    if queries == time and visible is None:
        return F.scaled_dot_product_attention(q_BHSK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    # Kernels that take a mask want as many key heads as query heads.
    k_BHTK, v_BHTK = (part.repeat_interleave(heads // part.size(1), dim=1) for part in (k_BGTK, v_BGTK))
    if visible is None:
        visible = torch.ones(queries, time, dtype=torch.bool, device=q_BHSK.device).tril(time - queries)
    return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=visible[..., -queries:, :])


def offset_keys(k_BGTK: Tensor, pairs: int, follows_BT: Tensor, cache: LayerCache | None) -> Tensor:
    """Returns keys half of whose dimensions are those of the position before, in its document (partial key offset,
    modded-nanogpt): of the pairs that RoPE turns, the slower half, and half of the dimensions that it leaves.

    A query then finds what followed a token like its own in one layer, which otherwise takes two.
    """
    first_BG1K = k_BGTK[:, :, :1] if cache is None or cache.last_key is None else cache.last_key
    if cache is not None:
        cache.last_key = k_BGTK[:, :, -1:]
    before_BGTK = torch.cat((first_BG1K, k_BGTK[:, :, :-1]), 2)
    dim_K = torch.arange(k_BGTK.size(-1), device=k_BGTK.device)
    rest_K = dim_K - 2 * pairs
    taken_K = torch.where(rest_K < 0, dim_K % pairs >= pairs // 2, rest_K >= (len(dim_K) - 2 * pairs) // 2)
    return torch.where(follows_BT[:, None, :, None] & taken_K, before_BGTK, k_BGTK)


def without_own_value(y_BHSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """Returns y - (y . u) u, with u the direction of the position's own value in the head's group (exclusive
    self-attention, parameter-golf pull request 265)."""
    direction_BGSK = F.normalize(v_BGSK, dim=-1)
    u_BHSK = direction_BGSK.repeat_interleave(y_BHSK.size(1) // v_BGSK.size(1), dim=1)
    return y_BHSK - (y_BHSK * u_BHSK).sum(-1, keepdim=True) * u_BHSK


class CausalSelfAttention(nn.Module):
    """Computes grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.head_dim = (config, config.model_dim // config.num_heads)
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.act_in, self.act_out = (ActivationSite(config.act_attn_in), ActivationSite(config.act_attn_out))
        self.act_q, self.act_k, self.act_v = map(ActivationSite, (config.act_q, config.act_k, config.act_v))

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, positions: Positions, last: int, cache: LayerCache | None=None) -> Tensor:
        """Returns y_BSD of the `last` positions; the queries' gain follows their quantizer, whose scale it learns."""
        x_BTD, cos_TP, sin_TP = (self.act_in(x_BTD), positions.cos_TP, positions.sin_TP)
        q_BHSK = rms_norm(self.split_heads(self.c_q(x_BTD[:, -last:])))
        k_BGTK = rms_norm(self.split_heads(self.c_k(x_BTD)))
        v_BGTK = self.split_heads(self.c_v(x_BTD))
        turn = rotate
        q_BHSK = self.act_q(turn(q_BHSK, cos_TP[-last:], sin_TP[-last:])) * self.q_gain.to(x_BTD.dtype)[:, None, None]
        if self.config.key_offset:
            k_BGTK = offset_keys(k_BGTK, cos_TP.size(1), positions.follows_BT, cache)
        k_BGTK = turn(k_BGTK, cos_TP, sin_TP)
        if cache is None:
            k_BGTK, v_BGTK = (self.act_k(k_BGTK), self.act_v(v_BGTK))
        else:
            k_BGTK, v_BGTK = cache.extend(k_BGTK, v_BGTK, self.act_k, self.act_v)
        y_BHSK = positions.attend(q_BHSK, k_BGTK, v_BGTK)
        if self.config.exclusive_attention:
            y_BHSK = without_own_value(y_BHSK, v_BGTK[:, :, -last:])
        return self.proj(self.act_out(y_BHSK.transpose(1, 2).flatten(-2)))


register_feature(
    Feature(
        "exclusive_attention", lambda config: config.model.exclusive_attention, "set exclusive_attention=0",
        acts_always, without=lambda model: changed_model(model, exclusive_attention=False),
    )
)  # fmt: skip
register_feature(
    Feature(
        "key_offset", lambda config: config.model.key_offset, "set key_offset=0",
        acts_always, without=lambda model: changed_model(model, key_offset=False),
    )
)  # fmt: skip


# ---- golf/model/block.py ---------------------------------------------------------------------------------------------


BY_MLP_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {'relu2': lambda x: F.relu(x).square()}
"""relu2: So et al. 2021 (Primer, arXiv 2109.08668); leaky_relu2: parameter-golf pull request 493."""


class MLP(nn.Module):
    """Computes proj(f(fc(x))), with f the squared ReLU unless the configuration names another."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.mlp_mult * config.model_dim)
        self.fc = Linear(config.model_dim, hidden)
        self.proj = Linear(hidden, config.model_dim)
        self.nonlinearity = BY_MLP_ACTIVATION[config.mlp_activation]
        self.act_in, self.act_hidden = ActivationSite(config.act_mlp_in), ActivationSite(config.act_hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(self.act_hidden(self.nonlinearity(self.fc(self.act_in(x_BTD)))))


def stream_share(layer: int, config: ModelConfig) -> Tensor:
    """Returns the stream's initial share in a block's input; the rest is the embedding's.

    resid_mix_init=phase: sigmoid(3 (i/(L-1) - 1/2)) in block i of L (parameter-golf PR #326); stream: 1.
    """
    return torch.sigmoid(torch.tensor(3.0 * (layer / (config.num_layers - 1) - 0.5)))


class Block(nn.Module):
    """Mixes the stream with the embedding, then adds attention and MLP, each scaled per dimension."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm = RmsNorm()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        share = stream_share(layer, config)
        self.resid_mix = nn.Parameter(torch.stack((share, 1 - share))[:, None].repeat(1, config.model_dim))

    def mixed(self, x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        """Returns the stream mixed with the embedding."""
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        return mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD

    def forward(
        self, x_BTD: Tensor, x0_BTD: Tensor, positions: Positions, last: int, cache: LayerCache | None = None
    ) -> Tensor:
        """Returns the stream x_BSD of the `last` positions after this block."""
        x_BTD = self.mixed(x_BTD, x0_BTD)
        attended_BSD = self.attn(self.norm(x_BTD), positions, last, cache)
        x_BSD = x_BTD[:, -last:] + self.attn_scale.to(x_BTD.dtype) * attended_BSD
        return x_BSD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(self.norm(x_BSD))


# ---- golf/model/embedding.py -----------------------------------------------------------------------------------------


def has_predecessor(ids_BT: Tensor, bos_id: int) -> Tensor:
    """Returns mask_BT, True where the token before belongs to the same document and is in the row."""
    mask_BT = ids_BT != bos_id
    mask_BT[:, 0] = False
    return mask_BT


class SmearGate(nn.Module):
    """Mixes each embedding with the one before: e_t + g (e_{t-1} - e_t), g = sigmoid(gate) per dimension.

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
    """Returns the bigram table's row for (previous token p, token t): (36313 t XOR 27191 p) mod (buckets - 1).

    The last row stands for "no previous token". int64, so that no vocabulary overflows.
    """
    previous_BT = torch.roll(ids_BT, 1, dims=1)
    hashed_BT = ((36_313 * ids_BT) ^ (27_191 * previous_BT)) % (buckets - 1)
    return torch.where(has_previous_BT, hashed_BT, buckets - 1)


class BigramHash(nn.Module):
    """Looks up token pairs in a hashed table, projected to the model width and scaled.

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


register_feature(
    Feature(
        "smear_gate", lambda config: config.model.smear_gate, "set smear_gate=0", learned_weight="smear.gate",
    )
)  # fmt: skip
register_feature(
    Feature(
        "bigram_hash", lambda config: config.model.bigram_vocab_size > 0, "set bigram_vocab_size=0",
        learned_weight="bigram.embed.weight",
    )
)  # fmt: skip


# ---- golf/model/lanes.py ---------------------------------------------------------------------------------------------

"""Gives attention and MLP of the last blocks a residual stream each (parameter-golf pull requests 1204, 1529).

B batch, T time, S last positions of T, D model width.
"""


# ---- golf/model/gpt.py -----------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Decodes with U-Net skips: place i of the first half feeds place L-1-i of the second, of the L places at which
    blocks run.

    Weights are fp32; activations have `compute_dtype`; logits and losses are fp32.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype=torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.tok_emb = Embedding(config.vocab_size, config.model_dim)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.model_dim, config.vocab_size)
            self.head.trains_as = 'table'
        self.knowledge = None
        self.bigram = BigramHash(config.bigram_vocab_size, config.bigram_dim, config.model_dim) if config.bigram_vocab_size else None
        self.smear = None
        if config.smear_gate:
            self.smear = SmearGate(config.model_dim)
        self.rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        'Tables by row length and base, made by `keep_rotary`.'
        self.looping = True
        'Whether blocks repeat, as they do but for the first part of the training (golf/model/recurrence.py).'
        skips = len(layer_order(config)) // 2
        self.skip_weights = nn.Parameter(torch.ones(skips, config.model_dim))
        self.blocks = nn.ModuleList((Block(config, layer) for layer in range(config.num_layers)))
        self.final_norm = RmsNorm()

    def embed(self, ids_BT: Tensor, embedding_VD: Tensor, cache: KeyValueCache | None=None) -> Tensor:
        """Returns the first block's input: token (+ hashed bigram), normalised, smeared with its predecessor."""
        known = 0 if cache is None or cache.recent_BR is None else cache.recent_BR.size(1)
        if known:
            ids_BT = torch.cat((cache.recent_BR, ids_BT), 1)
        has_previous_BT = has_predecessor(ids_BT, self.config.bos_id)
        e_BTD = self.tok_emb(ids_BT, embedding_VD).to(self.compute_dtype)
        if self.bigram is not None:
            e_BTD = e_BTD + self.bigram(ids_BT, has_previous_BT, self.compute_dtype)
        e_BTD = rms_norm(e_BTD)
        return (e_BTD if self.smear is None else self.smear(e_BTD, has_previous_BT))[:, known:]

    def keep_rotary(self, length: int, rope_base: float | None = None) -> None:
        """Makes the rotary tables of rows of `length` tokens once: a compiled graph takes them as inputs and does not
        compute powers, sines and cosines in every kernel that turns queries or keys."""
        base, device = rope_base or self.config.rope_base, self.skip_weights.device
        self.rotary[length, base] = rotary_tables(length, rotary_dims(self.config), base, device)

    def rotary_of(self, length: int, base: float, device: torch.device, start: int) -> tuple[Tensor, Tensor]:
        """Returns cos_TP and sin_TP of positions start .. length-1: the kept tables where there are some."""
        kept = None if start else self.rotary.get((length, base))
        if kept is not None and kept[0].device == device and 2 * kept[0].size(1) == rotary_dims(self.config):
            return kept
        return rotary_tables(length, rotary_dims(self.config), base, device, start)

    def positions(self, ids_BT: Tensor, rope_base: float, cache: KeyValueCache | None=None) -> Positions:
        """Returns rotary tables and attention of the new positions; knowledge tokens come first and are not rotated."""
        config, past, device = (self.config, 0 if cache is None else cache.length, ids_BT.device)
        new = 0 if past else config.knowledge_tokens
        tables = self.rotary_of(past + ids_BT.size(1), rope_base, device, past)
        if new:
            unturned = (torch.ones, torch.zeros)
            tables = tuple((torch.cat((fill(new, table.size(1), device=device), table)) for fill, table in zip(unturned, tables, strict=True)))
        follows_BT = None
        if config.key_offset:
            follows_BT = ids_BT != config.bos_id
            follows_BT[:, 0] &= past > 0
        return Positions(*tables, causal_attention, follows_BT)

    def with_knowledge(self, layer: int, x_BTD: Tensor, replaced: int = 0) -> Tensor:
        """Returns the stream with this block's knowledge tokens before the text, in place of the first `replaced`
        positions."""
        knowledge_MD = self.knowledge if self.knowledge.dim() == 2 else self.knowledge[layer]
        knowledge_BMD = knowledge_MD.to(x_BTD.dtype).expand(x_BTD.size(0), -1, -1)
        return torch.cat((knowledge_BMD, x_BTD[:, replaced:]), 1)

    def trunk(self, x0_BTD: Tensor, positions: Positions, last: int, cache: KeyValueCache | None=None) -> Tensor:
        """Returns x_BSD after all blocks; joins the stream of each encoder block before its decoder twin."""
        joins = self.knowledge is not None and (cache is None or not cache.length)
        renewed = joins and self.knowledge.dim() == 3
        x_BTD = x0_BTD = self.with_knowledge(0, x0_BTD) if joins else x0_BTD
        order, time, skips = (layer_order(self.config, self.looping), x0_BTD.size(1), [])
        half = len(order) // 2
        for place, layer in enumerate(order):
            block, kept = (self.blocks[layer], None if cache is None else cache.layers[place])
            if place >= half and skips:
                skip_BTD = self.skip_weights[place - half].to(x_BTD.dtype) * skips.pop()
                x_BTD = x_BTD + skip_BTD
            if renewed and layer:
                x_BTD = self.with_knowledge(layer, x_BTD, self.config.knowledge_tokens)
            shown = last if place == len(order) - 1 else time
            x_BTD = block(x_BTD, x0_BTD, positions, shown, kept)
            if place < half:
                skips.append(x_BTD)
        return x_BTD

    def logits(
        self, ids_BT: Tensor, last: int | None = None, rope_base: float | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns fp32 logits_BSV of the `last` S positions (default: all), soft-capped to +-logit_softcap.

        `rope_base` replaces the model's own base (for rows longer than the training length). With a `cache`, `ids_BT`
        continue the positions that it keeps, under the same base, and are added to it.
        """
        embedding_VD = self.tok_emb.effective_weight()
        x0_BTD = self.embed(ids_BT, embedding_VD, cache)
        positions = self.positions(ids_BT, rope_base or self.config.rope_base, cache)
        x_BSD = self.trunk(x0_BTD, positions, last or ids_BT.size(1), cache)
        if cache is not None:
            cache.advance(ids_BT)
        head_VD = embedding_VD if self.head is None else self.head.effective_weight()
        logits_BSV = F.linear(self.final_norm(x_BSD), head_VD.to(x_BSD.dtype)).float()
        return self.config.logit_softcap * torch.tanh(logits_BSV / self.config.logit_softcap)

    def token_losses(self, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
        """Returns fp32 losses_BS in nats of the last S positions' targets."""
        logits_BSV = self.logits(ids_BT, targets_BS.size(1), rope_base)
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Returns the mean loss in nats, the training objective."""
        return self.token_losses(ids_BT, targets_BT).mean()


# ---- golf/quant/trellis.py -------------------------------------------------------------------------------------------


TRELLIS_STATES, PARITY_H0, PARITY_H1 = 8, 0b1011, 0b100
"""Number of states and parity-check polynomials: bit i is the coefficient of D^i, D a column's delay."""


def shifted_columns(bits_RC: Tensor, by: int) -> Tensor:
    """Shifts each row `by` columns to the right, filling with zeros."""
    moved_RC = torch.zeros_like(bits_RC)
    if by < bits_RC.size(1):
        moved_RC[:, by:] = bits_RC[:, : bits_RC.size(1) - by]
    return moved_RC


def times_polynomial(bits_RC: Tensor, polynomial: int, stretch: int = 1) -> Tensor:
    """Multiplies rows, as power series over GF(2), by polynomial(D^stretch)."""
    product_RC = torch.zeros_like(bits_RC)
    for i in range(polynomial.bit_length()):
        if polynomial >> i & 1:
            product_RC ^= shifted_columns(bits_RC, i * stretch)
    return product_RC


def trellis_halves(codes_RC: Tensor) -> Tensor:
    """Returns int8 0 or 1 per code: the half of its point in the fine grid, rows starting in state 0. No loop over
    columns.

    halves = parities h1 / h0, and 1 / h0 = h0(D) h0(D^2) h0(D^4) ..., because h0(D)^(2^k) = h0(D^(2^k)) is 1 up to D^C.
    """
    halves_RC = times_polynomial(codes_RC & 1, PARITY_H1)
    stretch = 1
    while stretch < codes_RC.size(1):
        halves_RC = times_polynomial(halves_RC, PARITY_H0, stretch)
        stretch *= 2
    return halves_RC


# ---- golf/quant/grid.py ----------------------------------------------------------------------------------------------

"""Defines the symmetric per-row grid of training and export, and a weight's stored form: codes, steps, the way to fp32.

Training and export use one rule, so that the trained weights are those that ship. R rows, C columns, S rows of scales
(R, or 1 for all), G groups of columns, K rank of the correction.
"""

FP16_TINY = 2.0**-14
"""Smallest normal fp16 (6.104e-5): the floor of a row's scale, so that an all-zero row has one too."""
FP16_MAX = 65_504.0
tl, constexpr = None, "constexpr"
"""Triton's language and the annotation that it looks for; both are Triton's own from the first launch on."""


def grid_clip(bits: int) -> int:
    """Returns the largest code of a symmetric grid: 1 for 1 bit (codes -1 and 1), 15 for 5 bits, 31 for 6, 127 for
    8."""
    assert 1 <= bits <= 8
    return max(2 ** (bits - 1) - 1, 1)


def grid_codes_and_scale(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns codes (whole numbers, as fp32) and the fp32 values of the fp16 scales, shape (R, 1).

    scale = fp16(max|row| / clip), within fp16's normal range; code = clamp(round_half_even(w / scale), -clip, clip).
    """
    clip = grid_clip(bits)
    weight_RC = weight_RC.float()
    largest_R1 = weight_RC.abs().amax(dim=1, keepdim=True)
    # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
    scale_R1 = (largest_R1 / torch.full_like(largest_R1, clip)).clamp(FP16_TINY, FP16_MAX).half().float()
    return (weight_RC / scale_R1).round_().clamp_(-clip, clip), scale_R1


def grid_values(weight_RC: Tensor, bits: int) -> Tensor:
    """Returns the fp32 weights that the exported codes and scales give, bit for bit."""
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.add_(0.0).mul_(scale_R1)  # + 0.0 turns -0.0, which int8 cannot hold, into 0.0


class RowGrids:
    """Holds matrices that train on the grid of their rows, and their values on it."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.bits: list[int] = []
        self.values: list[Tensor] = []
        self.seen: list[tuple[int, int]] = []
        self.tables: list[tuple[Tensor, torch.dtype]] = []

    def add(self, weight_RC: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """Takes up a matrix; returns its values on the grid, in `dtype`, which `renew` keeps up to date."""
        self.weights.append(weight_RC)
        self.bits.append(bits)
        self.values.append(torch.empty_like(weight_RC, dtype=dtype, requires_grad=False))
        return self.values[-1]

    @torch.no_grad()
    def renew(self) -> None:
        """Puts the weights on the grid again where any has changed; a compiled step needs it before, an eager one calls
        it."""
        current = [(weight.data_ptr(), weight._version) for weight in self.weights]
        if current == self.seen:  # nothing has changed, or there is nothing
            return
        if self.weights[0].is_cuda:
            if [place for place, _ in current] != [place for place, _ in self.seen]:
                self.tables = self.row_tables()
            for table_N4, dtype in self.tables:
                launch_rows(table_N4, dtype, max(weight.size(1) for weight in self.weights))
        else:
            for weight_RC, bits, values_RC in zip(self.weights, self.bits, self.values, strict=True):
                values_RC.copy_(grid_values(weight_RC, bits))
        self.seen = current

    def row_tables(self) -> list[tuple[Tensor, torch.dtype]]:
        """Returns for each dtype of values a table_N4 of rows: address of the weights and of the values, columns,
        largest code."""
        rows = defaultdict(list)
        for weight_RC, bits, values_RC in zip(self.weights, self.bits, self.values, strict=True):
            source, place, columns = weight_RC.data_ptr(), values_RC.data_ptr(), weight_RC.size(1)
            widths = weight_RC.element_size() * columns, values_RC.element_size() * columns
            rows[values_RC.dtype] += [
                (source + row * widths[0], place + row * widths[1], columns, grid_clip(bits))
                for row in range(weight_RC.size(0))
            ]
        return [(torch.tensor(part, device=self.weights[0].device), dtype) for dtype, part in rows.items()]


def grid_row_kernel(table_N4, values, BLOCK: constexpr):
    """Puts row `program_id` on its grid, as grid_values does: each operation rounds as on the CPU."""
    entry = table_N4 + 4 * tl.program_id(0).to(tl.int64)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    places = tl.load(entry + 1).to(tl.pointer_type(values.dtype.element_ty))
    column = tl.arange(0, BLOCK)
    inside = column < tl.load(entry + 2)
    clip = tl.load(entry + 3).to(tl.float32)
    weight = tl.load(weights + column, mask=inside, other=0.0)
    scale = tl.div_rn(tl.max(tl.abs(weight), axis=0), clip)
    scale = tl.minimum(tl.maximum(scale, 2.0**-14), 65504.0).to(tl.float16).to(tl.float32)
    code = tl.div_rn(weight, tl.zeros_like(weight) + scale)
    code = tl.minimum(tl.maximum(code, -clip), clip)
    # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves no -0.
    code = (code + 12582912.0) - 12582912.0
    tl.store(places + column, (code * scale).to(values.dtype.element_ty), mask=inside)


@cache
def compiled_kernel(function: Callable) -> Any:
    """Returns a kernel, made by Triton, which CUDA alone has and whose import reads files."""
    language = import_module("triton.language")
    function.__globals__.update(tl=language, constexpr=language.constexpr)
    return import_module("triton").jit(function)


def launch_rows(table_N4: Tensor, dtype: torch.dtype, columns: int) -> None:
    """Renews the values, of `dtype`, of all rows of the table in one kernel."""
    sample = torch.empty(0, dtype=dtype, device=table_N4.device)
    compiled_kernel(grid_row_kernel)[(len(table_N4),)](table_N4, sample, BLOCK=1 << (columns - 1).bit_length())


PLAIN_PARTS = ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
"""Tensors of a QuantizedTensor, the optional ones last."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Stores weight_rc = (code_rc - zero_rg) * scale_rg * column_scale_c + (left @ right)_rc, g the group of column c.

    Groups are equally wide except the last, which may be narrower. Everything is small whole numbers or fp16, so that
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
    """Whether codes stand for the points 2 code + half of the trellis grid (golf/quant/trellis.py)."""


QuantizedState = dict[str, QuantizedTensor | Tensor]
"""Stored form of each tensor by name: codes and scales, or an fp16 tensor."""


def group_width(columns: int, groups: int) -> int:
    """Returns the columns of every group but the last."""
    return -(-columns // groups)


def spread_groups(values_SG: Tensor, columns: int) -> Tensor:
    """Returns values_SC, each group's value at each of its columns; `values_SG` itself where there is one group."""
    groups = values_SG.size(1)
    if groups == 1:
        return values_SG
    return values_SG.repeat_interleave(group_width(columns, groups), dim=1)[:, :columns]


def dequantize_tensor(entry: QuantizedTensor) -> Tensor:
    """Returns the fp32 weights that `entry` stands for."""
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
        for k in range(left_RK.size(1)):
            weight_RC = weight_RC + left_RK[:, k:k + 1] * right_KC[k]
    return weight_RC


def dequantize_state(stored: QuantizedState) -> dict[str, Tensor]:
    """Returns the fp32 weights that `stored` stands for: those of the scored model."""
    return {
        name: dequantize_tensor(entry) if isinstance(entry, QuantizedTensor) else entry.float()
        for name, entry in stored.items()
    }


def same_stored(one: QuantizedTensor | Tensor | None, other: QuantizedTensor | Tensor | None) -> bool:
    """Returns whether two stored tensors hold the same numbers in the same form."""
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        pairs = [
            (getattr(one, part), getattr(other, part)) for part in ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
        ]
        pairs += zip(one.low_rank or (None, None), other.low_rank or (None, None), strict=True)
        return (one.bits, one.trellis) == (other.bits, other.trellis) and all(same_stored(*pair) for pair in pairs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is None and other is None


# ---- golf/quant/tensor_classes.py ------------------------------------------------------------------------------------

"""Decides how many bits a tensor gets by its class, and its class by its name."""

FP16_BITS = 16
SMALL_ELEMENTS = 256
"""Fewest elements of a quantized matrix: smaller ones are fp16, since scales and rounding would cost more than they
save."""


class QuantError(UserError):
    """Reports a tensor that can't be put on a grid."""


def tensor_class(name: str, shape: Sequence[int]) -> str:
    """Returns embed, bigram, attn or mlp for weight matrices, small for all else: a stack of vectors is no `.weight`.

    Raises QuantError for a matrix of unknown name.
    """
    if len(shape) < 2 or not name.endswith(".weight") or prod(shape) < SMALL_ELEMENTS:
        return "small"
    parts = name.split(".")
    if parts[0] in ("tok_emb", "head"):
        return "embed"
    for part in ("bigram", "attn", "mlp"):
        if part in parts and len(shape) == 2:
            return part
    raise QuantError(f"no quantization rule for tensor {name!r} of shape {tuple(shape)}")


# ---- golf/artifact/description.py ------------------------------------------------------------------------------------


STORED_FIRST = (
    "tok_emb", "bigram.embed", "bigram.proj", "bigram.scale", "head", "knowledge", "smear", "skip_weights",
)  # fmt: skip
"""Parts of a model that files store first, in this order since version 1; other parts follow in the model's order."""


def stored_rank(name: str) -> int:
    """Returns the rank of a tensor's part in STORED_FIRST, or the one after the last."""
    ranks = (rank for rank, part in enumerate(STORED_FIRST) if name == part or name.startswith(f"{part}."))
    return next(ranks, len(STORED_FIRST))


@lru_cache(maxsize=64)
def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a GPT of this configuration, in stored order.

    The model itself gives the shapes, on a device without memory.
    """
    with torch.device("meta"):
        state = GPT(model).state_dict()
    return {name: tuple(state[name].shape) for name in sorted(state, key=stored_rank)}


VERSION_1_FIELDS = {
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "bigram_vocab_size", "bigram_dim",
    "smear_gate", "resid_mix_init", "matrix_init", "qk_gain_init", "rope_base", "logit_softcap", "tied_embed_init_std",
    "train_seq_len", "bos_id",
    "qat_enabled", "qat_start", "mlp_bits", "attn_bits", "bigram_bits", "embed_bits", "prune_frac", "codec",
}  # fmt: skip
"""Knobs that every file has. A model's later knobs are written only where they differ from their default, which a file
without them means."""


def model_to_json(model: ModelConfig) -> dict[str, Any]:
    """Returns the values that `model_from_json` reads."""
    return {k: v for k, v in asdict(model).items() if k in VERSION_1_FIELDS or v != getattr(ModelConfig, k)}


def model_from_json(values: object) -> ModelConfig:
    """Returns the model configuration that parsed JSON spells. Raises ArtifactError."""
    return frozen_model(values)


def frozen_model(values: object) -> ModelConfig:
    """Returns the model that this script was made for, with the stored vocabulary where it leaves that open.

    Raises ArtifactError where `values` spell another model.
    """
    model = preset_config("").model
    if isinstance(values, Mapping) and not model.vocab_size:
        model = replace(model, vocab_size=int(values.get("vocab_size", 0)))
    if values not in (model_to_json(model), asdict(model)):
        raise ArtifactError("the file's model is not the one that this script was made for")
    return model


def quant_from_json(values: object, model: ModelConfig) -> QuantConfig:
    """Returns the quantization of `model` that parsed JSON spells. Raises ArtifactError."""
    return preset_config('').quant


STORABLE_BITS = (*range(1, 9), FP16_BITS)
FACTOR_NAMES = ("left", "right")


@dataclass(frozen=True)
class Form:
    """Describes one tensor, or one factor of a correction (named `tensor:left` or `tensor:right`)."""

    shape: tuple[int, ...]
    bits: int
    row_scales: bool = True
    """Whether each row has its own row of scales; else one serves all."""
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
    """Returns the forms of a stored tensor and of its factors. Raises ArtifactError where its parts don't fit
    together."""
    if isinstance(entry, Tensor):
        return {name: Form(tuple(entry.shape), FP16_BITS)}
    shape, (scale_rows, groups) = (tuple(entry.codes_RC.shape), entry.scale_SG.shape)
    rank = entry.low_rank[0].codes_RC.size(1) if entry.low_rank else 0
    form = Form(shape, entry.bits, scale_rows == shape[0], groups, entry.column_scale_C is not None, entry.zero_SG is not None, entry.trellis, rank)
    sound = entry.bits in STORABLE_BITS[:-1] and 0 < groups <= shape[1] and (scale_rows == form.scale_shape[0])
    if entry.column_scale_C is not None:
        sound &= tuple(entry.column_scale_C.shape) == shape[1:]
    if entry.zero_SG is not None:
        sound &= entry.zero_SG.shape == entry.scale_SG.shape
    forms = {name: form}
    for side, factor in zip(FACTOR_NAMES, entry.low_rank or (), strict=False):
        expected = (shape[0], rank) if side == 'left' else (rank, shape[1])
        sound &= rank > 0 and factor.low_rank is None and (tuple(factor.codes_RC.shape) == expected)
        forms |= forms_of_entry(f'{name}:{side}', factor)
    if not sound:
        raise ArtifactError(f'the parts of tensor {name!r} do not fit together')
    return forms


def forms_of_state(stored: QuantizedState) -> Forms:
    forms: Forms = {}
    for name, entry in stored.items():
        forms |= forms_of_entry(name, entry)
    return forms


def is_factor(name: str) -> bool:
    return ":" in name


def all_entries(stored: QuantizedState) -> QuantizedState:
    """Returns tensors and the factors of their corrections, by the names of `Forms`."""
    entries: QuantizedState = {}
    for name, entry in stored.items():
        entries[name] = entry
        if isinstance(entry, QuantizedTensor):
            entries |= {f'{name}:{side}': f for side, f in zip(FACTOR_NAMES, entry.low_rank or (), strict=False)}
    return entries


def form_to_json(name: str, forms: Forms) -> list:
    """Returns [row_scales, groups, column_scales, zeros, trellis]; with a correction also its rank, and both factors'
    bits and forms."""
    form = forms[name]
    values: list = [int(form.row_scales), form.groups, int(form.column_scales), int(form.zeros), int(form.trellis)]
    if form.rank:
        values.append(form.rank)
        for side in FACTOR_NAMES:
            factor = f"{name}:{side}"
            values += [forms[factor].bits, form_to_json(factor, forms)]
    return values


def forms_from_json(name: str, shape: tuple[int, ...], bits: object, values: object, factor: bool=False) -> Forms:
    """Inverts `form_to_json`, from untrusted values. Raises ArtifactError."""
    if type(bits) is not int or bits not in STORABLE_BITS or (bits != FP16_BITS and len(shape) != 2):
        raise ArtifactError(f'the artifact gives tensor {name!r} an impossible number of bits')
    fits = isinstance(values, list) and len(values) in ((5,) if factor else (5, 10)) and (len(shape) == 2)
    if not fits or bits == FP16_BITS or any((type(values[i]) is not int or values[i] not in (0, 1) for i in (0, 2, 3, 4))):
        raise ArtifactError(f'the artifact gives tensor {name!r} an impossible form')
    rows, columns = shape
    rank = values[5] if len(values) == 10 else 0
    if type(values[1]) is not int or not 1 <= values[1] <= columns:
        raise ArtifactError(f'the artifact gives tensor {name!r} an impossible number of groups')
    if type(rank) is not int or not (len(values) == 10) <= rank <= min(rows, columns):
        raise ArtifactError(f'the artifact gives tensor {name!r} an impossible rank')
    forms = {name: Form(shape, bits, bool(values[0]), values[1], bool(values[2]), bool(values[3]), bool(values[4]), rank)}
    if rank:
        forms |= forms_from_json(f'{name}:left', (rows, rank), values[6], values[7], factor=True)
        forms |= forms_from_json(f'{name}:right', (rank, columns), values[8], values[9], factor=True)
    return forms


def check_codes(name: str, codes_RC: Tensor, form: Form) -> None:
    """Raises ArtifactError for codes outside their grid."""
    low, high = form.code_range
    binary_zero = form.bits == 1 and not form.zeros and bool((codes_RC == 0).any())
    if codes_RC.numel() and (codes_RC.min() < low or codes_RC.max() > high or binary_zero):
        raise ArtifactError(f"tensor {name!r} has codes outside its {form.bits}-bit grid")


def join_entry(name: str, forms: Forms, parts: Mapping[str, Mapping[str, Tensor]]) -> QuantizedTensor | Tensor:
    """Joins a stored tensor from the parts of all streams (role -> name -> tensor). Raises ArtifactError."""
    form = forms[name]
    if form.bits == FP16_BITS:
        return parts['fp16'][name]
    check_codes(name, parts['codes'][name], form)
    factors = tuple((join_entry(f'{name}:{side}', forms, parts) for side in FACTOR_NAMES)) if form.rank else None
    return QuantizedTensor(parts['codes'][name].to(torch.int8), parts['scales'][name], form.bits, parts['columns'].get(name), parts['zeros'].get(name), factors, form.trellis)


# ---- golf/artifact/frame.py ------------------------------------------------------------------------------------------

"""Frames an artifact: magic, version, checksum, codec, fields.

    b"GOLF" | version, 1 byte | SHA-256, 32 bytes | codec, 1 byte | (LEB128 length, bytes) ...

The SHA-256 is of the version byte and all that follows the SHA-256; in version 1 of the latter alone.
"""

ARTIFACT_MAGIC = b"GOLF"
ARTIFACT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Versions that this code reads; 1 has neither brotli nor rans, and only tensors with a scale for each row."""
DIGEST_START = len(ARTIFACT_MAGIC) + 1
DIGEST_END = DIGEST_START + 32
LARGEST_FILE = 2**30
LONGEST_NUMBER = 5
"""Most bytes of a LEB128 number; enough for 2**35."""
CODEC_IDS = {"none": 0, "zlib": 1, "lzma": 2, "zstd": 3, "brotli": 4, "rans": 5}


def encode_number(value: int) -> bytes:
    """Encodes LEB128: seven bits a byte, lowest first, the top bit set while more follow."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def decode_number(data: bytes, start: int) -> tuple[int, int]:
    """Returns (value, position after it). Raises ArtifactError."""
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
    """Returns (codec, fields) of an artifact whose checksum holds. Raises ArtifactError."""
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
    """Reads a whole file that is no larger than LARGEST_FILE. Raises ArtifactError."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path}: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise ArtifactError(f"{path} is larger than any artifact ({LARGEST_FILE:,} bytes)")
    return data


# ---- golf/artifact/rans.py -------------------------------------------------------------------------------------------

"""Implements interleaved range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) in numpy integers, many lanes.

A symbol of frequency f out of 2^16 takes 16 - log2(f) bits. Each lane's state stays in [2^24, 2^40); excess bits leave
it as 16-bit words. The writer processes the symbols backwards, so that the reader can go forwards and adapt its
frequencies to what it has read. Model code calls both through `step` and need not know which one it has. N symbols of a
step, K contexts, A symbols of the alphabet.
"""

FREQUENCY_BITS = 16
LOWEST_STATE = 2**24
STATE_BYTES = 5
FEWEST_LANES, MOST_LANES = 4, 256
SYMBOLS_PER_LANE = 2**14
"""Symbols for each lane, within the limits: a lane costs 5 bytes, few lanes cost time."""


def lane_count(symbols: int) -> int:
    """Returns the number of lanes, a power of 2, for a stream of this many symbols."""
    wanted = max(FEWEST_LANES, min(MOST_LANES, symbols // SYMBOLS_PER_LANE))
    return 1 << (wanted.bit_length() - 1)


class RansWriter:
    """Collects steps in the reader's order; `finish` returns the bytes."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def step(
        self, starts_KA: np.ndarray, frequencies_KA: np.ndarray, context_N: np.ndarray, symbol_N: np.ndarray
    ) -> np.ndarray:
        """Adds symbols. starts_KA: context * 2^16 + the sum of the frequencies before; context_N: row of the tables."""
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
    """Reads back the symbols that a RansWriter wrote. Raises ArtifactError for bytes that no writer made."""

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
        """Returns positions context * A + symbol in the flattened tables. Raises ArtifactError."""
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
        """Raises ArtifactError unless the whole stream was used and the lanes ended as they began in the writer."""
        if self.position != len(self.words) or (self.state_L != LOWEST_STATE).any():
            raise ArtifactError("a rans stream is damaged: it does not end where its symbols do")


# ---- golf/artifact/context_model.py ----------------------------------------------------------------------------------

"""Predicts the size and sign of a weight's code before the coder sees it.

A matrix is coded tile by tile, from the top left. A code's expected magnitude is the product of a factor of its row,
from the tiles to the left, and one of its column, from the tiles above; its expected sign and a share of its magnitude
come from the column's mean. They select a context, and every context has adaptive counts of the codes seen in it. All
of it is integer arithmetic on what the reader has already read, so it is the same on every machine.

L matrices of one kind and shape side by side (the layers), R rows, C columns, K contexts, A symbols, P contexts in use,
N symbols of a tile.

Codes of the trellis grid (golf/quant/trellis.py) come from one of two halves, which follows from the earlier codes in
their row: such a tile is coded column by column, with the half as part of the context.
"""


MEAN_LEVELS = 4
"""Levels of column means: 0, 1/4, 2/4 and 3/4 of the column's expected magnitude, either side of zero."""
PER_OCTAVE = 4
LOWEST_OCTAVE = -4
"""Contexts of magnitude: four to a doubling, from 1/16 of a step."""
GUESS_WORTH, COUNT_UNIT, COUNT_LIMIT = 128, 64, 2**21
"""Symbols that a context's first guess is worth; what a symbol adds; the sum at which a context's counts are halved."""
TILES_DOWN, TILES_ACROSS, LARGEST_SIDE, GROWTH = 12, 24, 64, 4
"""Limits of a tile: at most 1/12 of the rows high, 1/24 of the columns wide and 64 either way, and small at the edges:
eight of 1, then a quarter of the length before it."""


class AdaptiveTables:
    """Counts symbols in each of K contexts, and adapts to what is coded."""

    def __init__(self, counts_KA: np.ndarray) -> None:
        self.counts_KA = counts_KA.copy()

    def open(self, context_N: np.ndarray) -> None:
        """Turns the counts of these contexts into frequencies, for the steps until `close`."""
        contexts, symbols = self.counts_KA.shape
        self.present_P = np.flatnonzero(np.bincount(context_N, minlength=contexts))
        self.rank_K = np.zeros(contexts, np.int64)
        self.rank_K[self.present_P] = np.arange(len(self.present_P))
        sums_PA = self.counts_KA[self.present_P].cumsum(axis=1)
        self.full_P = sums_PA[:, -1] > COUNT_LIMIT
        room = 2**FREQUENCY_BITS - symbols  # every symbol keeps a frequency of at least 1
        ends_PA = sums_PA * room // sums_PA[:, -1:] + np.arange(1, symbols + 1)
        self.frequencies_PA = ends_PA.copy()
        self.frequencies_PA[:, 1:] -= ends_PA[:, :-1]
        self.starts_PA = ends_PA - self.frequencies_PA + (np.arange(len(ends_PA)) << FREQUENCY_BITS)[:, None]
        self.seen: list[np.ndarray] = []

    def code(self, coder: StepCoder, context_N: np.ndarray, symbol_N: np.ndarray | None) -> np.ndarray:
        """Returns the symbols: `symbol_N` itself for a writer, those read for a reader."""
        rank_N = self.rank_K[context_N]
        index_N = coder.step(self.starts_PA, self.frequencies_PA, rank_N, symbol_N)
        self.seen.append(index_N)
        return index_N - rank_N * self.counts_KA.shape[1]

    def close(self) -> None:
        """Counts what was coded since `open`."""
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
    """Returns the first guess of counts_KA for codes in -largest..largest: bells with each context's mean magnitude.

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
    """Returns 0, 1, 2, ... `length`: edges whose steps grow with the length before them, up to 1/parts of the whole."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + max(1, min(edges[-1] // GROWTH, -(-length // parts), LARGEST_SIDE))))
    return edges


def bounded(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.minimum(np.maximum(values, low), high)  # numpy's own clip takes four times as long on a tile


class FactorModel:
    """Keeps running sums of a stack of matrices, and derives each tile's contexts from them.

    Sums are of doubled codes, plus 1 for the odd half of a trellis grid. Fixed point: a row's factor has 8 fractional
    bits, a column's (a magnitude) 12, their product 20. `strengths` are the numbers of symbols that the first guesses
    of a row's factor, a column's and a column's mean are worth, as powers of 2.
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
        """Returns row_LR, column_LC and signed mean_LC of a tile."""
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
        """Predicts the next rows from those that are done, where rows resemble their neighbours."""
        if self.local:
            row_LR, _, _ = self.factors(rows, slice(0, 0))
            self.near_L1 = bounded((self.near_L1 + row_LR.sum(axis=1, keepdims=True) // row_LR.shape[1]) >> 1, 1, 2**16)

    def contexts(self, row_LR: np.ndarray, column_LC: np.ndarray, mean_LC: np.ndarray) -> np.ndarray:
        """Returns context_LRC, even numbers of contexts: those of the even half, or of a grid without halves."""
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
    """Codes a stack of matrices through `coder` and returns int16 codes: those given to a writer, those read by a
    reader.

    `guess_LC` holds the columns' first relative magnitudes, 256 for 1; None: all alike.
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
    """Fills columns `along` of a band of T rows, code_LTC: in one step, or with halves column by column."""
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
    """Returns half_LR1 of a column, from the codes and halves to its left: h0(D) half = h1(D) parity."""
    half_LR1 = np.zeros((*code_LRC.shape[:2], 1), np.int16)
    for delay in range(1, min(column, TRELLIS_STATES.bit_length() - 1) + 1):
        if PARITY_H0 >> delay & 1:
            half_LR1 ^= half_LRC[:, :, column - delay, None]
        if PARITY_H1 >> delay & 1:
            half_LR1 ^= code_LRC[:, :, column - delay, None] & 1
    return half_LR1


# ---- golf/artifact/stacks.py -----------------------------------------------------------------------------------------

"""Codes stacks of matrices as one modelled byte stream; a row may be a share of an earlier row and a residual.

Token embeddings resemble each other: rows that training never touched are nearly equal, and those of related tokens
correlate. L layers, R rows, C columns, B rows of a block.
"""

LOCAL_ROWS = 16
"""Flag added to the first strength: rows are predicted from those above them, not from all."""
LARGEST_CODE = 511
"""Largest residual code; codes less their zero point reach 255."""


@dataclass(frozen=True, eq=False)
class StackSpec:
    """Describes what reader and writer know of a stack before its codes."""

    shape: StackShape
    trellis: bool = False
    guide: Guide | None = None

    @property
    def size(self) -> int:
        layers, rows, columns = self.shape
        return layers * rows * columns


def guess_columns(code_LRC: np.ndarray, pattern_LR: np.ndarray) -> np.ndarray:
    """Returns the columns' expected relative magnitudes, 256 for the typical one, from rows of codes and their fp16
    steps."""
    step_LR = ((pattern_LR & 0x3FF | 0x400).astype(np.int64)) << (pattern_LR >> 10 & 31).astype(np.int64)
    size_LR = (16 * np.abs(code_LRC.astype(np.int64)).sum(axis=2) // code_LRC.shape[2] + 1) * step_LR
    size_LR >>= max(0, int(size_LR.max()).bit_length() - 30)
    return (size_LR * 256 * size_LR.shape[1] // size_LR.sum(axis=1, keepdims=True).clip(1)).clip(1, 2**14)


def stack_strengths(code_LRC: np.ndarray, guess_LC: np.ndarray | None = None) -> Strengths:
    """Returns the priors of a stack's row factors, column factors and column means, by how much those differ beyond
    chance.

    The writer chooses them and stores them for the reader, so it may use floating point.
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
    """Approximates the row factors that FactorModel.leave_rows would predict."""
    near_LR, near_L = np.ones_like(row_LR), np.ones(len(row_LR), np.float32)
    for top, bottom in pairwise(tile_edges(row_LR.shape[1], TILES_DOWN)):
        near_LR[:, top:bottom] = near_L[:, None]
        near_L = (near_L + row_LR[:, top:bottom].mean(axis=1)) / 2
    return near_LR + 0.01


def prior_strength(noise: float, spread: float) -> int:
    """Returns log2 of noise / spread, 0 to 15: the number of observations of variance `noise` that inform as much as
    knowing the variance `spread` of what they observe."""
    return int(np.clip(np.rint(np.log2(max(noise, 1e-9) / max(spread, 1e-9))), 0, 15))


def encode_stacks(
    specs: Sequence[StackSpec], stacks: Sequence[np.ndarray], strengths: Strengths | None = None
) -> bytes:
    """Encodes the largest magnitude, each stack's strengths (given, or chosen for it), and the symbols of all."""
    largest = max(int(np.abs(stack).max()) + spec.trellis for spec, stack in zip(specs, stacks, strict=True))
    header, writer, tables = encode_number(largest), RansWriter(), AdaptiveTables(bell_counts(largest))
    for spec, code_LRC in zip(specs, stacks, strict=True):
        guess_LC = guess_columns(stacks[spec.guide[0]], spec.guide[1]) if spec.guide else None
        chosen = strengths or stack_strengths(code_LRC, guess_LC)
        header += encode_number(chosen[0] << 8 | chosen[1] << 4 | chosen[2])
        code_stack(writer, tables, spec.shape, spec.trellis, chosen, guess_LC, code_LRC)
    return header + writer.finish(sum(spec.size for spec in specs))


def decode_stacks(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """Returns int16 stacks. Raises ArtifactError."""
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


SHARE_BITS = 3
"""Shares are in eighths, at most twice the earlier row."""
LARGEST_SHARE = 2 << SHARE_BITS
FEWEST_ROWS, MOST_ROWS = 256, 2**16
SHARE_COST, LEARNING_COST = 5, 256
"""Bits, about, that a row's share takes beside its reference's number; and LEARNING_COST / columns more until the model
has learnt that the row is smaller."""
SEARCH_BLOCK = 512


def shared_part(code_RC: np.ndarray, share_R: np.ndarray) -> np.ndarray:
    return (code_RC.astype(np.int64) * share_R[..., None] + (1 << SHARE_BITS - 1)) >> SHARE_BITS


def refer_rows(code_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns residual codes, shares and reference rows: for each row the earlier row that explains most, where that
    pays.

    The writer alone chooses them, so it may use floating point.
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
    """Returns the mean square of each row, with what rounding adds."""
    return np.square(code_BC.astype(np.float32)).mean(axis=1) + 1 / 6


def restore_rows(residual_RC: np.ndarray, share_R: np.ndarray, reference_R: np.ndarray) -> np.ndarray:
    """Inverts `refer_rows`. Raises ArtifactError where a row refers to itself, a later one, or exceeds the largest
    code."""
    code_RC = residual_RC.copy()
    for row in np.flatnonzero(share_R):
        if reference_R[row] >= row:
            raise ArtifactError("a rans stream is damaged: a row refers to one that is not yet known")
        whole_C = code_RC[row] + shared_part(code_RC[reference_R[row]], share_R[row])
        if np.abs(whole_C).max() > LARGEST_CODE:
            raise ArtifactError("a rans stream is damaged: its codes are too large")
        code_RC[row] = whole_C
    return code_RC


# ---- golf/artifact/sequences.py --------------------------------------------------------------------------------------

"""Codes sequences of 16-bit numbers (scales, zero points, small fp16 tensors) through the coder of matrices.

fp16 numbers of one sign are ordered like their bit patterns, 1,024 to an octave, so neighbouring rows of like scales
have near patterns. Each number is coded as its difference from a prediction, whose upper part is modelled and whose
lowest bits, which are noise, are packed uncompressed. Sequences of few distinct numbers are first replaced by their
ranks. N numbers, D distinct ones.
"""

LARGEST_VALUE = 2**16 - 1
CENTRED = 7
PREDICTORS = (CENTRED, 0, 1, 2, 3)
"""Shifts of a running mean: 0 predicts the previous number; CENTRED predicts the median for all."""
MOST_DISTINCT = 256
MODELLED_MAGNITUDE = 8
"""Median magnitude of the modelled part above which low bits are packed instead."""
LIST_STRENGTHS = (15, 4, 15)
RANKED = 8
PLANES = 2
"""First byte of fp16 numbers as two lzma'd byte planes; 0 and 1 are sequences without and with negative numbers."""


def predict(shift: int, centre: int, given_N: list[int], restore: bool) -> list[int]:
    """Returns differences of numbers from their predictions, or (restore) numbers from those differences."""
    if shift == CENTRED:
        return [value + centre if restore else value - centre for value in given_N]
    result, running = [], centre << 8
    for given in given_N:
        prediction = running >> 8
        result.append(given + prediction if restore else given - prediction)
        running += (((result[-1] if restore else given) << 8) - running) >> shift
    return result


def encode_list(value_N: np.ndarray) -> bytes:
    """Encodes small whole numbers of either sign, each by the counts of those before."""
    return encode_stacks([StackSpec((1, len(value_N), 1))], [value_N.reshape(1, -1, 1)], LIST_STRENGTHS)


def decode_list(data: bytes, count: int) -> np.ndarray:
    """Inverts encode_list; returns int64. Raises ArtifactError."""
    return decode_stacks(data, [StackSpec((1, count, 1))])[0].reshape(-1).astype(np.int64)


def encode_ranked(value_N: np.ndarray, ranked: bool) -> bytes:
    """Encodes flags, lowest bits a number, first prediction, distinct numbers where ranked, low bits, modelled rest."""
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
    """Encodes whole numbers in 0..LARGEST_VALUE, ranked or not, whichever is shorter."""
    if not len(value_N):
        return b""
    value_N = value_N.astype(np.int64)
    ways = [encode_ranked(value_N, ranked=False)]
    if len(np.unique(value_N)) <= MOST_DISTINCT:
        ways.append(encode_ranked(value_N, ranked=True))
    return min(ways, key=len)


def decode_sequence(data: bytes, count: int) -> np.ndarray:
    """Returns `count` numbers as int64. Raises ArtifactError."""
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
    """Encodes fp16 bit patterns: magnitudes as a sequence, with the signs before them where any is negative; or by
    lzma."""
    negative_N = pattern_N > 0x7FFF
    signs = np.packbits(negative_N).tobytes() if negative_N.any() else b""
    high, low = (encode_smallest(LZMA, plane.astype(np.uint8).tobytes()) for plane in (pattern_N >> 8, pattern_N & 255))
    modelled = bytes([bool(signs)]) + signs + encode_sequence(pattern_N & 0x7FFF)
    return min(modelled, bytes([PLANES]) + encode_number(len(high)) + high + low, key=len)


def decode_halves(data: bytes, count: int) -> np.ndarray:
    """Returns uint16 bit patterns. Raises ArtifactError."""
    if data[:1] == bytes([PLANES]):
        size, start = decode_number(data, 1)
        planes = [decode_exactly(LZMA, part, count) for part in (data[start : start + size], data[start + size :])]
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


# ---- golf/artifact/streams.py ----------------------------------------------------------------------------------------

"""Encodes a stream of codes for codec rans, in the shortest of several ways.

The stream's first byte names the way. R rows, N codes, B bytes.
"""

RAW, MODELLED, TRITS, BINARY = range(4)
"""Ways to store codes: a byte each, modelled, five ternary codes a byte, eight binary codes a byte."""


def may_refer(spec: StackSpec) -> bool:
    """Returns whether earlier rows may predict rows of such a stack: in tables of many rows."""
    return spec.shape[0] == 1 and FEWEST_ROWS <= spec.shape[1] <= MOST_ROWS and not spec.trellis


def encode_modelled(specs: Sequence[StackSpec], stacks: Sequence[np.ndarray]) -> bytes:
    """Encodes stacks by the context model, with references between rows where `may_refer` allows them.

    Each such stack has the size of its rows' shares in bytes (0: no row has a reference), the shares, the size of the
    references and the references; the codes of all stacks follow.
    """
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
    """Inverts `encode_modelled`. Raises ArtifactError."""
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
    """Encodes stacks of codes (int16) in the shortest way."""
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
    """Returns int16 stacks of these shapes. Raises ArtifactError."""
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
    """Packs five codes of -1..1 into a byte, in base 3: 1.6 bits each."""
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

"""Arranges stored tensors in streams, so that a coder sees like values together.

Part of the format: a change here is a new version. Measured on trained codes (docs/LOG.md). Byte codecs: one symbol per
byte; kinds of matrix together, layers one after the other; zigzag (0, -1, 1, -2, ...) symbols; the MLP's output matrix
column by column (its columns, the hidden units, differ more than its rows: 1.7 % of its bytes); fp16 split into high
and low bytes. Codec rans: the matrices of one kind and shape side by side, with their zero points subtracted. R rows, C
columns, L layers, S rows of scales, G groups, N numbers.
"""

COLUMN_MAJOR_ENDING = "mlp.proj.weight"
HALF_ROLES = ("fp16", "scales", "columns")

Parts = dict[str, dict[str, Tensor]]
"""Role -> tensor name -> codes (int8 or int16), fp16 scales, fp16 column scales, int8 zero points or fp16 tensor."""


@dataclass(frozen=True)
class StreamPlan:
    """Plans one stream: its role (codes, scales, columns, zeros or fp16) and its tensors."""

    role: str
    label: str
    bits: int
    names: tuple[str, ...]
    elements: int

    def fields(self, codec: str) -> int:
        """Returns the number of separately compressed fields: byte codecs split fp16 streams into high and low
            bytes."""
        return 1

    @property
    def raw_bytes(self) -> int:
        """Returns the bytes before compression: one for a code, two for an fp16 value."""
        return self.elements * (2 if self.role in HALF_ROLES else 1)


def stream_label(name: str, bits: int) -> str:
    """Returns the label whose tensors share a stream: by name for matrices on a grid; fp16 ones are embed or small."""
    parts = name.split(".")
    if is_factor(name):
        return "low rank"
    if parts[0] in ("tok_emb", "head"):
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
    """Returns the streams of an artifact, in stored order."""
    groups: dict[tuple[str, int, str], list[str]] = {}
    for name in sorted(forms, key=kind_and_layer):
        bits = forms[name].bits
        groups.setdefault((stream_label(name, bits), bits, 'fp16' if bits == FP16_BITS else 'codes'), []).append(name)
    plans = [(role, label, bits, names) for (label, bits, role), names in sorted(groups.items())]
    coded = [name for role, _, _, names in plans if role == 'codes' for name in names]
    plans.append(('scales', 'scales', FP16_BITS, coded))
    plans.append(('columns', 'column scales', FP16_BITS, [name for name in coded if forms[name].column_scales]))
    plans.append(('zeros', 'zero points', 8, [name for name in coded if forms[name].zeros]))
    return [StreamPlan(role, label, bits, tuple(names), sum((prod(part_shape(role, forms[name])) for name in names))) for role, label, bits, names in plans if names]


def part_of(role: str, entry: QuantizedTensor | Tensor) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    part = {"codes": entry.codes_RC, "scales": entry.scale_SG, "columns": entry.column_scale_C, "zeros": entry.zero_SG}
    found = part[role]
    assert found is not None
    return found


def encode_stream(codec: str, plan: StreamPlan, entries: QuantizedState, forms: Forms) -> list[bytes]:
    """Encodes the fields of a stream."""
    parts = {name: part_of(plan.role, entries[name]) for name in plan.names}
    if plan.role == 'codes':
        stacks = stacks_of(plan, forms)
        steps = {name: part_of('scales', entries[name]) for name in plan.names}
        return [encode_codes(specs_of(stacks, forms, steps), [stack_of(names, entries) for names in stacks])]
        return [compress_stream(codec, b''.join((symbols_of(name, part) for name, part in parts.items())))]
    numbers_N = torch.cat([part.flatten() for part in parts.values()]).numpy()
    if plan.role == 'zeros':
        shifted_N = numbers_N.astype(np.int16) + 128
        return [encode_sequence(shifted_N)]
    pattern_N = numbers_N.view(np.uint16)
    return [encode_halves(pattern_N)]


def decode_stream(codec: str, plan: StreamPlan, fields: Sequence[bytes], forms: Forms, parts: Parts) -> dict[str, Tensor]:
    """Decodes a stream's parts by tensor name; codes need the zero points in `parts`. Raises ArtifactError."""
    if plan.role == 'codes':
        return decode_code_stream(codec, plan, fields[0], forms, parts)
    if plan.role == 'zeros':
        plain = np.zeros(0)
        numbers_N = decode_sequence(fields[0], plan.elements)
        if numbers_N.max() > 255:
            raise ArtifactError('the zero points hold values that no sound model has')
        values_N = torch.from_numpy((numbers_N - 128).astype(np.int8))
    else:
        values_N = decode_half_stream(codec, plan, fields)
    return {name: part.clone() for name, part in split_parts(plan, values_N, forms).items()}


def decode_half_stream(codec: str, plan: StreamPlan, fields: Sequence[bytes]) -> Tensor:
    """Decodes fp16 values. Raises ArtifactError for values that are not finite and scales that are too small."""
    pattern_N = decode_halves(fields[0], plan.elements)
    halves_N = pattern_N.view(np.float16)
    if not (np.isfinite(halves_N) & (halves_N >= FP16_TINY if plan.role != 'fp16' else True)).all():
        raise ArtifactError(f'the {plan.role} of {plan.label} hold values that no sound model has')
    return torch.from_numpy(halves_N)


def split_parts(plan: StreamPlan, values_N: Tensor, forms: Forms) -> dict[str, Tensor]:
    shapes = [part_shape(plan.role, forms[name]) for name in plan.names]
    pieces = values_N.split([prod(shape) for shape in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(plan.names, pieces, shapes, strict=True)}


def decode_code_stream(codec: str, plan: StreamPlan, field: bytes, forms: Forms, parts: Parts) -> dict[str, Tensor]:
    """Decodes int16 codes_RC by tensor name, not checked against their grids."""
    stacks = stacks_of(plan, forms)
    codes = {}
    for names, stack_LRC in zip(stacks, decode_codes(field, specs_of(stacks, forms, parts['scales'])), strict=True):
        for name, code_RC in zip(names, torch.from_numpy(stack_LRC), strict=True):
            zero_SG = parts['zeros'].get(name)
            codes[name] = code_RC if zero_SG is None else code_RC + spread_groups(zero_SG.short(), code_RC.size(1))
    return codes


def specs_of(stacks: list[list[str]], forms: Forms, steps: Mapping[str, Tensor]) -> list[StackSpec]:
    """Returns what the coder knows of each stack in advance.

    The MLP's input matrix, where it is in the same stream, guides its output matrix: a hidden unit that is large in one
    is large in the other.
    """
    specs: list[StackSpec] = []
    for names in stacks:
        form, guide = forms[names[0]], None
        inputs = [name.replace(COLUMN_MAJOR_ENDING, "mlp.fc.weight") for name in names]
        if inputs != names and inputs in stacks[: len(specs)] and forms[inputs[0]].shape[0] == form.shape[1]:
            guide = stacks.index(inputs), np.stack([steps[name].numpy().view(np.uint16)[:, 0] for name in inputs])
        specs.append(StackSpec((len(names), *form.shape), form.trellis, guide))
    return specs


def symbols_of(name: str, codes_RC: Tensor) -> bytes:
    """Returns codes as unsigned bytes, small magnitudes first: 0, -1, 1, -2, ..."""
    codes_N = (codes_RC.T if name.endswith(COLUMN_MAJOR_ENDING) else codes_RC).numpy().reshape(-1).astype(np.int16)
    return ((codes_N << 1) ^ (codes_N >> 15)).astype(np.uint8).tobytes()


def stacks_of(plan: StreamPlan, forms: Forms) -> list[list[str]]:
    """Groups a codes stream's names by kind, shape and grid."""
    stacks: dict[tuple, list[str]] = {}
    for name in plan.names:
        stacks.setdefault((*kind_and_layer(name)[0], forms[name].shape, forms[name].trellis), []).append(name)
    return list(stacks.values())


def stack_of(names: list[str], entries: QuantizedState) -> np.ndarray:
    """Returns int16 codes_LRC of matrices of one shape, less their zero points."""
    matrices = []
    for name in names:
        entry = entries[name]
        assert isinstance(entry, QuantizedTensor)
        code_RC = entry.codes_RC.short()
        if entry.zero_SG is not None:
            code_RC = code_RC - spread_groups(entry.zero_SG.short(), code_RC.size(1))
        matrices.append(code_RC)
    return torch.stack(matrices).numpy()


# ---- golf/artifact/sizes.py ------------------------------------------------------------------------------------------

"""Reports what an artifact's bytes are spent on, and how near they come to the codes' order-0 entropy."""

@dataclass(frozen=True)
class StreamSize:
    """Measures one stream: codes of a class, all scales, all column scales, all zero points, or fp16 tensors."""

    role: str
    label: str
    bits: int
    elements: int
    raw_bytes: int
    """Bytes before compression: one for a code, two for an fp16 value."""
    compressed_bytes: int
    entropy_bytes: float
    """Order-0 entropy of a whole stream of codes, the least that a coder without context can reach; 0 for other
    streams."""
    encode_seconds: float
    decode_seconds: float = 0.0

    @property
    def bits_per_element(self) -> float:
        return 8 * self.compressed_bytes / self.elements

    @property
    def entropy_ratio(self) -> float | None:
        """Returns compressed bytes over the order-0 entropy; None where that is 0."""
        return self.compressed_bytes / self.entropy_bytes if self.entropy_bytes else None


@dataclass(frozen=True)
class SizeReport:
    """Lists all streams; the rest of `total_bytes` is header, description and lengths."""

    codec: str
    streams: tuple[StreamSize, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Returns the model's parameters, without scales and corrections."""
        return sum(s.elements for s in self.streams if s.role in ("codes", "fp16") and s.label != "low rank")

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(stream.compressed_bytes for stream in self.streams)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.weights

    @property
    def codes(self) -> StreamSize:
        """Returns the sum of all streams of codes; their entropies are added, each with its own frequencies."""
        parts = [stream for stream in self.streams if stream.role == "codes"]
        names = ("elements", "raw_bytes", "compressed_bytes", "entropy_bytes", "encode_seconds", "decode_seconds")
        return StreamSize("codes", "all", 0, **{name: sum(getattr(part, name) for part in parts) for name in names})


def measure_stream(plan: StreamPlan, entries: QuantizedState, compressed_bytes: int, seconds: float) -> StreamSize:
    """Measures a stream that was encoded in `seconds` to `compressed_bytes`."""
    codes = [entry.codes_RC for name in plan.names if isinstance(entry := entries[name], QuantizedTensor)]
    entropy = code_entropy_bytes(codes) if plan.role == "codes" else 0.0
    return StreamSize(
        plan.role, plan.label, plan.bits, plan.elements, plan.raw_bytes, compressed_bytes, entropy, seconds
    )  # fmt: skip


def code_entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Returns the order-0 entropy of int8 codes of any shapes, all together."""
    counts = sum(np.bincount(part.numpy().reshape(-1).view(np.uint8), minlength=256) for part in codes)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * counts.sum() / 8)


def size_report_dict(report: SizeReport) -> dict:
    """Returns the streams and the sums, for JSON."""
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


# ---- golf/quant/site_grid.py -----------------------------------------------------------------------------------------

"""Computes the quantizers of golf/config/site_quantizers.py: codes, scales, and the gradients that replace rounding's.

    step from the values' size (by tensor, row, group), code = clamp(round(x / step), low, high), value = code * scale

The scale is the step, except for `leastsq` (the scale that fits the codes best) and thresholds other than 1/2. Scales
of weights are fp16, so that training uses what is exported, bit for bit; those of activations are fp32.

The plain form comes first, then the one kernel that stands for it on CUDA: operations round as in the plain form, so
values and gradients are equal bit for bit, but for slopes that are powers (fork, dge), which are the device's
approximations there, good to about 1e-6.

R rows, C columns, S rows of scales (R or 1), G groups of columns.
"""


# ---- the kernel ----


# ---- golf/runtime.py -------------------------------------------------------------------------------------------------


class Log:
    """Prints lines to the terminal, with marks for what its encoding lacks, and, once a file is attached, to it too."""

    def __init__(self, terminal: TextIO | None = None):
        self.terminal = terminal or sys.stdout
        if hasattr(self.terminal, "reconfigure"):
            self.terminal.reconfigure(errors="replace")
        self.file: TextIO | None = None

    def attach(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def error(self, text: str) -> None:
        """Prints a line to stderr, and to the file too."""
        print(text, file=sys.stderr, flush=True)
        if self.file:
            with contextlib.suppress(OSError):  # the error reported may be a full disk
                print(text, file=self.file, flush=True)

    def line(self, text: str) -> None:
        for file in filter(None, (self.terminal, self.file)):
            with naming(getattr(file, "name", "standard output")):
                print(text, file=file, flush=True)


@dataclass(frozen=True)
class Runtime:
    """Describes where this process computes, and exchanges numbers with the other ranks."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    log: Log = field(default_factory=Log)
    compiles: bool = False
    """Whether the training step is compiled by torch.compile."""
    compile_fault: str = ""
    """Why it is not, where compile=auto asked for it."""

    @property
    def compiles_scoring(self) -> bool:
        """Returns whether to compile the scorer: not on a CPU, where compiling takes longer (14 s) than a small score
        (7 s)."""
        return self.compiles and self.device.type == "cuda"

    @property
    def nondeterminism(self) -> str:
        """Returns why two runs of the same steps may end in different bytes; empty where they end in the same."""
        return "CUDA sums gradients of embeddings and attention in any order" if self.device.type == "cuda" else ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of activations: bf16 on CUDA, fp32 on CPU (where bf16 has 0.5 to 0.65 times the speed)."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over all ranks, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def values_of_ranks(self, *values: float) -> list[list[float]]:
        """Returns each value on every rank, by one message between the hosts, which waits for no device."""
        table_VR = torch.zeros(len(values), self.world_size, dtype=torch.float64)
        table_VR[:, self.rank] = torch.tensor(values, dtype=torch.float64)
        return self.sum_over_ranks(table_VR).tolist()

    def max_over_ranks(self, *values: float) -> list[float]:
        """Returns the largest of each value over all ranks, in one message."""
        return [max(row) for row in self.values_of_ranks(*values)]

    def barrier(self) -> None:
        self.max_over_ranks(0.0)

    def text_of_main(self, text: str) -> str:
        """Returns the main rank's `text` on every rank."""
        data = text.encode() if self.is_main else b""
        size = int(*self.max_over_ranks(len(data)))
        return bytes(map(int, self.max_over_ranks(*data.ljust(size, b"\0")))).decode()

    def synchronize(self) -> None:
        """Waits until the device has finished its queued work, so that a clock reading means something."""
        torch.get_device_module(self.device).synchronize(self.device)

    def print(self, line: str) -> None:
        """Writes one line to the log (main rank only)."""
        if self.is_main:
            self.log.line(line)


def choose_device(wanted: str) -> torch.device:
    """Returns the device that was asked for; `auto` is CUDA where there is one. Raises ConfigError, never falls
    back."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("device=cuda was asked for, but torch sees no CUDA device: set device=cpu or mend the driver")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def explain_compile_error(error: Exception) -> str:
    """Returns the one line of many that says why torch.compile failed."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


@functools.cache
def compile_fault(device: torch.device) -> str:
    """Returns why torch.compile can't work here, from a trial, and nothing where it can.

    A mark beside what torch compiles tells other processes of a success; failures are tried again, since what they
    lacked (a header, say) may have come.
    """
    names = "g++", "clang++", "c++", "gcc", "clang", "cc", os.environ.get("CXX", ""), os.environ.get("CC", "")
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        return "no C++ compiler was found"
    identity = repr((device.type, torch.__version__, sys.version, [(path, os.stat(path).st_mtime) for path in paths]))
    key = hashlib.sha256(identity.encode()).hexdigest()[:8]
    mark = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(), f"golf_compiles_{key}")
    try:
        if not mark.exists():
            # The key is in the code, so that torch does not take what another compiler made from its cache.
            torch.compile(lambda x: x + int(key, 16), dynamic=False, fullgraph=True)(torch.ones(8, device=device))
            mark.touch()
    except (RuntimeError, ImportError, OSError) as error:
        return explain_compile_error(error)
    return ""


def choose_compile(wanted: str, device: torch.device) -> bool:
    """Returns whether to use torch.compile (1.3 to 1.5 times as fast on a CPU). Raises ConfigError where it can't."""
    fault = compile_fault(device) if wanted != "off" else ""
    if wanted == "on" and fault:
        needs = "a C++ compiler with OpenMP, and Python's headers (on Debian g++ and python3-dev)"
        raise ConfigError(f"compile=on: torch.compile fails here ({fault}): install {needs}, or set compile=off")
    return wanted != "off" and not fault


@contextlib.contextmanager
def start_runtime(run: RunConfig, stage: str, log: Log | None=None) -> Iterator[Runtime]:
    """Sets up device, threads, seeds and (under torchrun) the process group of one `stage`.

    Stages of one job share torchrun's key store. The stage's name keeps their keys apart, because a process that
    replaced itself for the next stage must not read addresses that the previous stage left.
    """
    device = choose_device(run.device)
    compiles = choose_compile(run.compile, device)
    fault = compile_fault(device) if run.compile == 'auto' else ''
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    torch.use_deterministic_algorithms(device.type == 'cpu')
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    rank, world_size = (int(os.environ.get('RANK', '0')), int(os.environ.get('WORLD_SIZE', '1')))
    if world_size > 1:
        store, rank, world_size = next(rendezvous('env://', rank, world_size))
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        store = dist.PrefixStore(stage, store)
        dist.init_process_group(backend, timeout=timedelta(hours=2), world_size=world_size, rank=rank, store=store)
    with contextlib.nullcontext():
        yield Runtime(device, rank, world_size, log or Log(), compiles, fault)
    if world_size > 1:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process with `status`.

    One of several ends without Python's own tidying, in which a process that had done its work was seen to abort
    ("terminate called without an active exception": a thread of the process group wants Python's lock and finds it
    gone), and torchrun called the run failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def flush_to_disk(path: Path) -> None:
    """Syncs a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write beside `path`, and moves it to `path` once it is on the disk: readers never see a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
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
    """Returns SHA-256 as 64 hex digits, in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ProgressLine:
    """Rewrites one line on a terminal, at most ten times a second; does nothing where there is no terminal."""

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
    """Measures time only between start and stop, on a monotonic clock; `now` is injectable for tests."""

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


# ---- golf/quant/qat.py -----------------------------------------------------------------------------------------------

"""Installs and removes the grids of quantization-aware training on weights and activations."""

def quantized_gpt(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """Returns a GPT with its activation quantizers, before its weights are loaded."""
    return install_activation_quantizers(GPT(config, compute_dtype))


def load_gpt(config: ModelConfig, state: Mapping[str, Tensor], runtime: Runtime) -> GPT:
    """Returns a GPT with these weights and its activation quantizers, on the runtime's device in its dtype."""
    model = quantized_gpt(config, runtime.compute_dtype)
    model.load_state_dict(state)
    return model.to(runtime.device)


def install_activation_quantizers(model: GPT) -> GPT:
    """Installs a quantizer in every activation site that the model's configuration names; returns the model."""
    return model


# ---- golf/artifact/container.py --------------------------------------------------------------------------------------


LARGEST_DESCRIPTION = 2**16
FREE_ELEMENTS = 2**24
ELEMENTS_PER_BYTE = 256
"""Bounds on the weights that a file may declare: FREE_ELEMENTS, and this many more for each of its bytes. So a small
file can't claim huge memory."""
PLAIN_FORM = [1, 1, 0, 0, 0]
"""Form of a tensor that "forms" does not list: a row of scales for each row, one group, nothing else."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """Holds the content of an artifact."""

    model: ModelConfig
    tokenizer_sha256: str
    state: QuantizedState
    codec: str
    sha256: str
    """SHA-256 of the whole file."""
    byte_count: int


def pack_artifact(
    stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str, verify: bool = True
) -> tuple[bytes, SizeReport]:
    """Returns the artifact's bytes, and a report of what they are spent on. The same input gives the same bytes.

    `verify` reads the bytes back and compares; without it, the report has no seconds to decode. Raises ArtifactError
    when the tensors are not those of `model` or the codec's package is missing.
    """
    shapes = expected_shapes(model)
    check_shapes({name: stored_shape(entry) for name, entry in stored.items()}, shapes)
    ordered = {name: stored[name] for name in shapes}
    sizes, fields = encode_streams(ordered, codec)
    description = encode_zlib(describe_artifact(model, tokenizer_sha256, ordered))
    data = frame_artifact(codec, [description, *fields])
    if verify:
        sizes = read_back(data, stored, sizes)
    return data, SizeReport(codec, tuple(sizes), len(data))


def read_back(data: bytes, stored: QuantizedState, sizes: Iterable[StreamSize]) -> list[StreamSize]:
    """Returns the sizes with the seconds that reading takes. Raises ArtifactError unless `data` gives `stored` back."""
    artifact, seconds = unpack_artifact(data)
    if not same_stored_state(artifact.state, stored):
        raise ArtifactError(f"packing failed: what codec {artifact.codec} gave back is not what it was given")
    return [replace(size, decode_seconds=spent) for size, spent in zip(sizes, seconds, strict=True)]


def encode_streams(stored: QuantizedState, codec: str) -> tuple[list[StreamSize], list[bytes]]:
    """Returns the sizes of all streams, and their fields, for tensors that may be any part of a model."""
    forms, entries = forms_of_state(stored), all_entries(stored)
    sizes, fields = [], []
    for plan in plan_streams(forms):
        started = time.perf_counter()
        encoded = encode_stream(codec, plan, entries, forms)
        seconds = time.perf_counter() - started
        sizes.append(measure_stream(plan, entries, sum(map(len, encoded)), seconds))
        fields += encoded
    return sizes, fields


def write_artifact(
    path: Path, stored: QuantizedState, model: ModelConfig, tokenizer_sha256: str, codec: str
) -> SizeReport:
    """Packs an artifact and puts the file in place at once. Raises ArtifactError, OSError."""
    data, report = pack_artifact(stored, model, tokenizer_sha256, codec)
    write_file_atomically(path, data)
    return report


def read_artifact(source: Path | str | bytes) -> Artifact:
    """Reads an artifact from a file, or from bytes; runs nothing from it. Raises ArtifactError for any unsound
    bytes."""
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
    """Returns the artifact in bytes, and the seconds that each of its streams took. Raises ArtifactError."""
    codec, fields = unframe_artifact(data)
    model, tokenizer_sha256, forms = parse_description(fields[0] if fields else b'', len(data))
    state, seconds = decode_streams(fields[1:], forms, codec)
    artifact = Artifact(model, tokenizer_sha256, state, codec, hashlib.sha256(data).hexdigest(), len(data))
    return (artifact, seconds)


def decode_streams(fields: list[bytes], forms: Forms, codec: str) -> tuple[QuantizedState, list[float]]:
    """Returns the tensors of `forms` from the fields of all streams, and each stream's seconds. Raises
    ArtifactError."""
    plans = plan_streams(forms)
    if len(fields) != sum(plan.fields(codec) for plan in plans):
        raise ArtifactError("the artifact does not have the streams that its model needs")
    remaining = iter(fields)
    planned = [(plan, list(islice(remaining, plan.fields(codec)))) for plan in plans]
    parts: Parts = {role: {} for role in ("codes", "scales", "columns", "zeros", "fp16")}
    seconds = []
    for plan, own in reversed(planned):  # zero points and scales come last, and codes need them
        started = time.perf_counter()
        parts[plan.role] |= decode_stream(codec, plan, own, forms, parts)
        seconds.append(time.perf_counter() - started)
    names = [name for name in forms if not is_factor(name)]
    return {name: join_entry(name, forms, parts) for name in names}, seconds[::-1]


def describe_artifact(model: ModelConfig, tokenizer_sha256: str, stored: QuantizedState) -> bytes:
    check_sha256(tokenizer_sha256)
    bits = [stored_bits(entry) for entry in stored.values()]
    document = {'model': model_to_json(model), 'tokenizer': tokenizer_sha256, 'bits': bits}
    if (exceptions := describe_forms(stored)):
        document['forms'] = exceptions
    return json.dumps(document, separators=(',', ':')).encode()


def describe_forms(stored: QuantizedState) -> list[tuple[list, list[int]]]:
    """Returns (form, numbers of the tensors that have it) for every form but the plain one."""
    exceptions: dict[str, tuple[list, list[int]]] = {}
    for number, (name, entry) in enumerate(stored.items()):
        plain = not isinstance(entry, QuantizedTensor)
        if not plain and (form := form_to_json(name, forms_of_entry(name, entry))) != PLAIN_FORM:
            exceptions.setdefault(json.dumps(form), (form, []))[1].append(number)
    return list(exceptions.values())


def parse_description(deflated: bytes, file_bytes: int) -> tuple[ModelConfig, str, Forms]:
    """Parses (model, tokenizer_sha256, forms by tensor name) from untrusted bytes. Raises ArtifactError."""
    document = load_description(deflated)
    optional = {'forms'}
    if not isinstance(document, dict) or document.keys() - optional != {'model', 'tokenizer', 'bits'}:
        raise ArtifactError("the artifact's description does not have the entries of this version")
    model, bits = (model_from_json(document['model']), document['bits'])
    check_sha256(document['tokenizer'])
    shapes = expected_shapes(model)
    elements = sum(map(prod, shapes.values()))
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * file_bytes:
        raise ArtifactError(f'the artifact declares {elements:,} weights, more than {file_bytes:,} bytes can hold')
    if not isinstance(bits, list) or len(bits) != len(shapes):
        raise ArtifactError("the artifact's list of bits is not that of its model's tensors")
    exceptions = form_exceptions(document.get('forms', []), len(shapes))
    forms: Forms = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if bits[number] == FP16_BITS and number not in exceptions:
            forms[name] = Form(shape, FP16_BITS)
        else:
            forms |= forms_from_json(name, shape, bits[number], exceptions.get(number, PLAIN_FORM))
    return (model, document['tokenizer'], forms)


def form_exceptions(exceptions: object, tensors: int) -> dict[int, object]:
    """Returns the forms, still as JSON, by a tensor's number. Raises ArtifactError."""
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
    """Parses the JSON document in a bounded deflate stream. Raises ArtifactError."""
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
    """Raises ArtifactError, naming the first tensor, unless the tensors are exactly those expected."""
    for name, shape in expected.items():
        if name not in shapes:
            raise ArtifactError(f"tensor {name!r} is missing: the model's configuration calls for it")
        if tuple(shapes[name]) != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(shapes[name])}, its model calls for {shape}")
    for name in shapes:
        if name not in expected:
            raise ArtifactError(f"tensor {name!r} is not one of the model's")


def same_stored_state(one: QuantizedState, other: QuantizedState) -> bool:
    """Returns whether all codes, scales and fp16 values are equal."""
    return one.keys() == other.keys() and all(same_stored(one[name], other[name]) for name in one)


def restore_model(artifact: Artifact, runtime: Runtime) -> GPT:
    """Returns the quantized model on the runtime's device, in eval mode, without fake quantization."""
    return load_gpt(artifact.model, dequantize_state(artifact.state), runtime).eval()


# ---- golf/data/shards.py ---------------------------------------------------------------------------------------------

"""Reads and writes token files in the competition's format, and checks them whenever they are opened.

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
    """Says that text, tokenizer or token files can't be used as they are."""


class ShardError(DataError):
    """Says that a shard file is missing, damaged, or not a shard."""


def shard_token_count(path: Path) -> int:
    """Counts the tokens in a shard by its header, checked against the size of the file. Raises ShardError."""
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
    """Returns the tokens of a shard as a read-only memory map, uint16 (N,). Raises ShardError."""
    path = Path(path)
    count = shard_token_count(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """Lists the shards of `split` ("train" or "val") in `folder`, sorted, without names that begin with a dot.

    Raises ShardError if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(
            f"{folder}: no such folder of shards; set data_path, or see data/README.md (bash run.sh download)"
        )
    names = [SHARD_NAME.fullmatch(path.name) for path in folder.iterdir() if path.name[0] != "."]
    matches = [match for match in names if match and match["split"] == split]
    datasets = sorted({match["dataset"] for match in matches})
    if not matches:
        raise ShardError(f"{folder}: no *_{split}_NNNNNN.bin shards there; data/README.md says how to get some")
    if len(datasets) > 1:
        raise ShardError(f"{folder}: shards of several data sets ({', '.join(datasets)}); keep one set in a folder")
    return sorted(folder / match.string for match in matches)


# ---- golf/data/loader.py ---------------------------------------------------------------------------------------------


READ_AHEAD = 2
"""Batches read in advance: one is copied to the device while a slow disk still reads the other."""


class TokenStream:
    """Reads the tokens of several shards, in order, as one endless stream that starts over at its end.

    The last `held_out` tokens are not part of it: training is evaluated on them without validation data.
    """

    def __init__(self, paths: Sequence[str | Path], held_out: int = 0):
        if not paths:
            raise DataError("a token stream needs at least one shard")
        self.shards = [np.asarray(read_shard(path)) for path in paths]  # plain views of the maps slice faster
        self.starts = list(accumulate(map(len, self.shards), initial=0))
        self.held_out = held_out
        if 10 * held_out > self.starts[-1]:
            raise DataError(
                f"{self.starts[-1]} training tokens are too few to hold {held_out} out of them: "
                "set holdout_every=0, or a smaller holdout_tokens"
            )

    def __len__(self) -> int:
        return self.starts[-1] - self.held_out

    def held_out_tokens(self, bos_id: int) -> np.ndarray:
        """Returns the held-out tokens from their first document start on, uint16 (N,). Raises DataError."""
        pairs = zip(self.starts, self.shards, strict=False)
        rest = np.concatenate([shard[max(0, len(self) - start) :] for start, shard in pairs])
        starts = np.flatnonzero(rest[:-1] == bos_id)  # a start needs a token to score after it
        if not len(starts):
            raise DataError(f"no document starts in the last {self.held_out} training tokens: set holdout_every=0")
        return rest[starts[0] :]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Returns tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
        tokens_N = np.empty(count, dtype=np.int64)
        self.read_into(tokens_N, start)
        return tokens_N

    def read_into(self, tokens_N: np.ndarray, start: int) -> None:
        """Fills `tokens_N` with the endless stream from `start` on."""
        filled = 0
        while filled < len(tokens_N):
            position = (start + filled) % len(self)
            index = bisect_right(self.starts, position) - 1
            offset = position - self.starts[index]
            part = self.shards[index][offset : offset + min(len(tokens_N) - filled, len(self) - position)]
            tokens_N[filled : filled + len(part)] = part
            filled += len(part)


def check_batch_shape(batch_tokens: int, seq_len: int, world_size: int) -> None:
    """Raises DataError unless the batch is whole rows that can be divided equally among the ranks."""
    if batch_tokens % seq_len:
        raise DataError(f"train_batch_tokens={batch_tokens} is not a multiple of train_seq_len={seq_len}")
    rows = batch_tokens // seq_len
    if rows % world_size:
        raise DataError(
            f"{rows} rows of {seq_len} tokens can't be dealt out equally to {world_size} ranks: "
            "change train_batch_tokens or the number of processes"
        )


def spread_start(row: int, stream_tokens: int, seq_len: int) -> int:
    """Returns where row number `row` (0, 1, 2, ...) of the spread order starts in the stream.

    Rows are visited in strides of about 0.618 of the stream, coprime to their number, so that every row comes once per
    epoch and the rows of a batch come from all over the text (the coprime-stride loader of parameter-golf PR #1306).
    Each epoch cuts the stream at other places.
    """
    rows = (stream_tokens - 1) // seq_len
    stride = next(stride for stride in range(round(0.618 * rows), 2 * rows + 2) if gcd(stride, rows) == 1)
    epoch, index = divmod(row, rows)
    return index * stride % rows * seq_len + epoch * (seq_len // 3 + 1)


def global_batch(stream: TokenStream, step: int, batch_tokens: int, seq_len: int, rank: int=0, world_size: int=1, row_order: str='sequential') -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this rank's rows of the global batch of `step`: inputs_BT and targets_BT, int64, on the CPU.

    In sequential order (the competition's) the global batch is tokens step * batch_tokens, ..., (step + 1) *
    batch_tokens of the stream, the last one only as a target; in spread order its rows come from all over the stream
    (`spread_start`); the other orders are for a stream of shuffled documents (`ShuffledDocuments`). Ranks get
    contiguous rows, so that their rows, taken together, are the same for every world size. Raises DataError where the
    rows can't be divided equally.
    """
    check_batch_shape(batch_tokens, seq_len, world_size)
    rows = batch_tokens // seq_len
    own_rows = range(step * rows + rank * rows // world_size, step * rows + (rank + 1) * rows // world_size)
    check_spread_order(stream, seq_len)
    spans = [stream.tokens(spread_start(row, len(stream), seq_len), seq_len + 1) for row in own_rows]
    inputs_N, targets_N = (np.concatenate([span[cut] for span in spans]) for cut in (slice(-1), slice(1, None)))
    return (torch.from_numpy(inputs_N).view(-1, seq_len), torch.from_numpy(targets_N).view(-1, seq_len))


def check_spread_order(stream: TokenStream, seq_len: int) -> None:
    if len(stream) <= seq_len:
        raise DataError(f"{len(stream)} training tokens do not fill one row of {seq_len}: shorten train_seq_len")


class BatchPrefetcher:
    """Reads the batches of the next steps in a thread while the current one is in use.

    `get(step)` equals `global_batch(stream, step, ...)` on the device, but sooner when steps are asked for in order. On
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
        row_order: str = "sequential",
    ):
        check_batch_shape(batch_tokens, seq_len, world_size)
        self.stream, self.shape = stream, (batch_tokens, seq_len, rank, world_size, row_order)
        self.device = torch.device(device)
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: dict[int, Future] = {}

    def read_ahead(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = global_batch(self.stream, step, *self.shape)
        return tuple(part_BT.pin_memory() for part_BT in batch) if self.device.type == "cuda" else batch

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs_BT and targets_BT of `step`, on the device; starts reading those of the next steps."""
        steps = range(step, step + 1 + READ_AHEAD)
        self.ahead = {n: self.ahead.get(n) or self.reader.submit(self.read_ahead, n) for n in steps}
        inputs_BT, targets_BT = self.ahead[step].result()
        return inputs_BT.to(self.device, non_blocking=True), targets_BT.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stops the thread after the read in progress."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def validation_tokens(paths: Sequence[str | Path]) -> np.ndarray:
    """Returns all tokens of the shards, in order, uint16 (N,), in memory. Raises DataError where there are none."""
    if not paths:
        raise DataError("no validation shards were given")
    return np.concatenate([read_shard(path) for path in paths])


def order_stream(stream: TokenStream, row_order: str, bos_id: int, seed: int) -> 'TokenStream | ShuffledDocuments':
    """Returns the stream from which rows in `row_order` are cut."""
    return stream


# ---- golf/quant/calibration.py ---------------------------------------------------------------------------------------


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
        if self.model.head is not None:
            raise QuantError("calibration knows tied embeddings alone: train with tie_embeddings=1")
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
        handles.append(self.model.final_norm.register_forward_hook(lambda _, inputs, output: self.keep(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, normed_BTD: Tensor) -> None:
        self.normed_BTD = normed_BTD.detach()

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
        add_outer(sums, self.normed_BTD.flatten(0, 1).float(), fisher_PV.sum(1))


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
            drawn_P = torch.multinomial(torch.softmax(logits_BTV.flatten(0, 1), -1), 1, generator=generator)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), drawn_P.flatten().to(ids_BT.device), reduction="sum")
        loss.backward()
    recorder.model.zero_grad(set_to_none=True)


def calibrate_within(
    seconds: float, model: GPT, rows_NT: Tensor, runtime: Runtime, batch_rows: int, seed: int
) -> tuple[dict[str, LayerStatistics], int]:
    """`calibrate` on as many of the rows as there is time for on each rank, one batch at least; and their tokens."""
    check_rows(rows_NT, model)
    recorder, generator = MomentRecorder(model), torch.Generator(runtime.device).manual_seed(seed + runtime.rank)
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
    return finalize_statistics(recorder, int(tokens)), int(tokens)


def finalize_statistics(recorder: MomentRecorder, tokens: int) -> dict[str, LayerStatistics]:
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


@dataclass(frozen=True, eq=False)
class RunCalibration:
    """Statistics of all matrices, and how they came about."""

    statistics: dict[str, LayerStatistics]
    record: dict[str, Any]


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


def calibrate_run(state: Mapping[str, Tensor], config: Config, stream: TokenStream, runtime: Runtime, seconds: float=math.inf, rows: int=0) -> RunCalibration:
    """Calibrate trained weights as the configuration says, all ranks together, within `seconds`: what was trained and
    what is calibrated share one cap. On fewer `rows` for a rehearsal."""
    quant, length, started = (config.quant, config.model.train_seq_len, time.perf_counter())
    model = load_gpt(config.model, state, runtime)
    tokens = rows * length or quant.calibration_tokens
    rows_NT = training_rows(stream, tokens, length, config.run.seed)
    batch_rows = max(1, config.train.micro_batch_tokens // length)
    left = seconds - (time.perf_counter() - started)
    statistics, tokens = calibrate_within(left, model, rows_NT, runtime, batch_rows, config.run.seed)
    record = {'calibration_seconds': time.perf_counter() - started, 'calibration_tokens': tokens, 'calibration_text': quant.calibration_text, 'calibration_seed': config.run.seed}
    return RunCalibration(statistics, record)


def calibration_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Tokens that were calibrated on, and the codes that this moved from the nearest."""
    moved = files["pruning"]["codes_not_nearest"]
    return files["pruning"]["calibration_tokens"], moved > 0, f"{moved} codes are not the nearest to their weights"


register_feature(
    Feature(
        "calibration", lambda config: config.quant.quantizer == "waterfill", "set quantizer=rtn",
        in_files=calibration_acts,
    )
)  # fmt: skip


# ---- golf/quant/export.py --------------------------------------------------------------------------------------------

"""Exports a state dict: codes and scales for the matrices, fp16 for the rest; prunes it first where that can act.

Magnitude pruning (Han et al. 2015, arXiv 1506.02626) acts on weights that go to a coarse grid. On a 5- or 6-bit grid
most of a matrix's smallest weights round to zero anyway; the report says how many codes the pruning really changed, and
a matrix in which it would change none is left as it is. So are tensors that are stored as fp16: zeros there save next
to nothing and cost accuracy.
"""


def quantized_parameters(shapes: Mapping[str, Sequence[int]], quant: QuantConfig) -> int:
    """Counts the parameters that `quant` puts on a grid; the rest is exported as fp16."""
    return sum((prod(shape) for name, shape in shapes.items() if tensor_class(name, shape) != 'small'))


# ---- golf/quant/rate.py ----------------------------------------------------------------------------------------------


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
    """Where the table of the weight's class begins; CMR for several matrices."""

    def of(self, column: int, magnitude_NR: Tensor) -> Tensor:
        """Returns bits_NR of candidate magnitudes of a column's weights."""
        place_NR = (magnitude_NR + self.offset_CR[column]).int()
        return self.bits_F.index_select(0, place_NR.flatten()).view_as(place_NR)


def expected_classes(level_RC: Tensor) -> Tensor:
    """Returns int64 classes_RC, equally full but for ties, by the product of the row's and column's mean magnitudes."""
    magnitude_RC = level_RC.abs().double()
    expected_RC = magnitude_RC.mean(1, keepdim=True) * magnitude_RC.mean(0, keepdim=True)
    sorted_N = expected_RC.flatten().sort().values
    edges = [sorted_N[len(sorted_N) * k // RATE_CLASSES] for k in range(1, RATE_CLASSES)]
    return torch.bucketize(expected_RC, torch.stack(edges), right=True)


def class_counts(class_RC: Tensor, value_RC: Tensor, width: int) -> Tensor:
    """Returns float64 counts_KM of the values 0..width - 1 in each class."""
    cells_N = (class_RC * width + value_RC).flatten()
    return torch.bincount(cells_N, minlength=RATE_CLASSES * width).view(RATE_CLASSES, width).double()


def learn_costs(level_RC: Tensor, most: int) -> CodeCosts:
    """Returns the costs under the distribution of these levels, for levels of magnitude 0..most."""
    width = most + 1
    class_RC = expected_classes(level_RC)
    counts_KM = class_counts(class_RC, level_RC.abs().long(), width)
    overall_M = counts_KM.sum(0) + 0.5  # half a code: what has not been seen is dear, not impossible
    counts_KM = counts_KM + PRIOR_COUNT * overall_M / overall_M.sum()
    bits_KM = -torch.log2(counts_KM / counts_KM.sum(1, keepdim=True))
    bits_KM[:, 1:] += 1.0
    return CodeCosts(bits_KM.flatten().float(), width, (class_RC * width).T.float())


def join_costs(costs: Sequence[CodeCosts]) -> CodeCosts:
    """Returns the costs of several matrices of one shape and width of tables."""
    size = len(costs[0].bits_F)
    offset_CMR = torch.stack([one.offset_CR + number * size for number, one in enumerate(costs)], 1)
    return CodeCosts(torch.cat([one.bits_F for one in costs]), costs[0].width, offset_CMR)


def cheapest_level(
    ratio_MR: Tensor, low: Tensor | float, high: Tensor | float, costs: CodeCosts, column: int, price_MR: Tensor
) -> Tensor:
    """Returns level_MR of least (ratio - level)^2 + price * bits in a column, among 0 and the three next to the ratio.

    Magnitudes floor|ratio| - 1, + 0 and + 1, within low..high; of equal costs the smallest magnitude wins.
    """
    size_MR = ratio_MR.abs()
    next_N11 = torch.tensor([-math.inf, -1, 0, 1], device=ratio_MR.device).view(4, 1, 1)
    magnitude_NMR = (size_MR.floor() + next_N11).clamp_(min=0)
    magnitude_NMR = torch.minimum(magnitude_NMR, torch.where(ratio_MR >= 0, high, -low))
    cost_NMR = (size_MR - magnitude_NMR).square_().add_(price_MR * costs.of(column, magnitude_NMR))
    magnitude_NMR.masked_fill_(cost_NMR > cost_NMR.amin(0), math.inf)
    return magnitude_NMR.amin(0).copysign(ratio_MR)


def class_entropy(level_RC: Tensor) -> float:
    """Returns the bits per code that an ideal adaptive coder with these classes would send."""
    counts_KM = class_counts(expected_classes(level_RC), level_RC.long() + 128, 256)
    share_KM = counts_KM / counts_KM.sum(1, keepdim=True).clamp(min=1)
    return float(-(counts_KM * share_KM.clamp(min=1e-300).log2()).sum() / max(level_RC.numel(), 1))


# ---- golf/quant/gptq.py ----------------------------------------------------------------------------------------------

"""GPTQ rounds column after column and lets the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323. With H the second moments of the inputs, H = sum x x^T, the error of a
rounded row e is e H e^T. U is the upper factor of H^-1 = U^T U, and rounding column j moves the columns k > j by
-(w_j - q_j) / U_jj * U_jk, the move of least error. Columns are numbered in the order in which they are rounded.

Matrices of one shape are rounded together, in one loop over their columns: on a GPU the loop's launches take the time,
whatever they work on. What combines weights is either elementwise or a product of one matrix alone, so that a matrix
gets the same codes in whatever company it is.

M matrices, R rows, C columns, K columns of a run, B of a block, S rows of scales (R, or 1 for all), G groups of
columns. Weights are transposed, CMR: a column's weights lie side by side. A level is a code less its zero point, so
that weight = level * step for every grid.
"""

DAMPING_TRIALS = 7
RUN = 16
"""Columns whose errors move each other elementwise; those of the block that follow are moved once for a run."""
DESCENT_PASSES = 3
"""They lower the error by 1 % with steps for rows, by 4 to 6 % with steps for columns, at equal entropy."""
RATE_PASSES = 2
"""Times that the rounding is done again with the costs of the codes of the time before."""
CODE_BITS = 8
"""Codes are as large as int8 holds: the coder pays for what is used."""
CODE_CLIP = grid_clip(CODE_BITS)


@dataclass(frozen=True, eq=False)
class StepSizes:
    """Given steps: that of weight (r, c) is scale_rg * column_scale_c, g the group of column c."""

    scale_SG: Tensor
    """fp16, within FP16_TINY..FP16_MAX."""
    column_scale_C: Tensor | None = None
    """fp16, positive; None: 1 for every column."""


def check_finite(weight: Tensor, what: str) -> None:
    """Raises QuantError for NaN or infinite values, naming `what` has them."""
    if not torch.isfinite(weight).all():
        raise QuantError(f"{what} has NaN or infinite values: nothing to quantize")


def factor_and_damped(hessian_CC: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns U_CC in float64, upper, and the matrix whose inverse is U^T U: H + damping * mean(diag H) * 1, with ten
    times as much damping until that has a factor; the identity where all inputs are zero.

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


def checked_hessian(hessian_CC: Tensor, columns: int) -> Tensor:
    """Returns H in float64, made symmetric to the last bit. Raises QuantError for what is no H of so many columns."""
    if hessian_CC.shape != (columns, columns):
        raise QuantError(f"the Hessian is {tuple(hessian_CC.shape)}, the weights have {columns} columns")
    check_finite(hessian_CC, "the Hessian")
    hessian_CC = hessian_CC.double()
    if (hessian_CC.diagonal() < 0).any():
        raise QuantError("the Hessian has negative values on its diagonal: it is no matrix of second moments")
    return (hessian_CC + hessian_CC.T) / 2


class ColumnGrid:
    """Gives the grids of all columns: here int8 codes with given steps, one group of columns."""

    run = RUN
    """Most columns of a run: 1 where every column has to be begun."""

    def __init__(self, scales: Sequence[StepSizes], device: torch.device):
        self.scale_MS = torch.cat([one.scale_SG.T for one in scales]).to(device).float()
        self.column_scale_CM1 = torch.stack([one.column_scale_C for one in scales], 1)[:, :, None].to(device).float()

    def begin_run(self, column: int, moved: Callable[[Tensor], Tensor]) -> None:
        """Is called before a run that begins with `column` is rounded, for a grid that chooses its steps then.

        `moved` gives the weights_KR of K columns (by number, of a single matrix) as the errors so far have moved them.
        """

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns step_KMS of a run's columns, and their smallest and largest level."""
        return self.scale_MS * self.column_scale_CM1[start:stop], -CODE_CLIP, CODE_CLIP

    def nearest(self, ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Returns the level nearest to ratio = weight / step, halves to even."""
        return ratio.round().clamp(low, high)


@dataclass(frozen=True, eq=False)
class RatePrice:
    """Holds what codes cost: bits, and for each row the error in units of H that is worth a bit."""

    costs: CodeCosts
    slope_MR: Tensor


class ColumnRun:
    """Rounds columns `start` to `stop` one by one, with what can be known of all of them in advance."""

    def __init__(self, start: int, stop: int, grid: ColumnGrid, factor_KM1: Tensor, price: RatePrice | None):
        self.start, self.grid, self.price = start, grid, price
        self.step_KMS, self.low, self.high = grid.columns(start, stop)
        self.exact_KMS = self.step_KMS.double()
        if price:
            self.price_KMR = (price.slope_MR * (factor_KM1 / self.exact_KMS).square()).float()

    def round(self, k: int, weight_MR: Tensor) -> tuple[Tensor, Tensor]:
        """Returns level_MR of column `start` + k, and the float64 value_MR that they stand for."""
        ratio_MR = weight_MR.float() / self.step_KMS[k]
        if self.price:
            costs, column = self.price.costs, self.start + k
            level_MR = cheapest_level(ratio_MR, self.low, self.high, costs, column, self.price_KMR[k])
        else:
            level_MR = self.grid.nearest(ratio_MR, self.low, self.high)
        return level_MR, level_MR * self.exact_KMS[k]


def add_products(sum_KMR: Tensor, factors: Sequence[Tensor], part_BMR: Tensor, sign: int) -> None:
    """Adds sign * factor_KB @ part_BR to each matrix in place.

    One product a matrix: in a batch of products the order of a sum may depend on their number.
    """
    for m, factor_KB in enumerate(factors):
        sum_KMR[:, m].addmm_(factor_KB, part_BMR[:, m], alpha=sign)


def corners(factors: Sequence[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Returns inner_KKM1 of all matrices, rows and columns `start` to `stop`, and their diagonals_KM1."""
    inner_KKM1 = torch.stack([factor_CC[start:stop, start:stop] for factor_CC in factors], 2)[..., None]
    return inner_KKM1, inner_KKM1.diagonal().movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class GptqProblem:
    """Holds matrices of one shape and their inputs."""

    weight_CMR: Tensor
    """float64."""
    factors: Sequence[Tensor]
    """U_CC of each matrix."""
    damped: Sequence[Tensor]
    """What U factors the inverse of."""
    block: int = 128
    """Columns between two updates of all columns that are left. No effect on the result but the order of sums."""

    @property
    def factor_CC(self) -> Tensor:
        """Returns U of a single matrix."""
        (factor_CC,) = self.factors
        return factor_CC

    def runs(self, run: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields the start and the end of each run of columns, and those of its block."""
        columns = len(self.weight_CMR)
        for first in range(0, columns, self.block):
            last = min(first + self.block, columns)
            for start in range(first, last, run):
                yield start, min(start + run, last), first, last

    def round_columns(self, grid: ColumnGrid, price: RatePrice | None = None) -> Tensor:
        """Returns level_MRC, each code the nearest one or, at a price, the cheapest one of error and bits."""
        weight_CMR, error_CMR = self.weight_CMR.clone(), torch.empty_like(self.weight_CMR)
        level_CMR = torch.empty_like(self.weight_CMR, dtype=torch.float32)

        def moved(start: int, first: int, last: int, place_K: Tensor) -> Tensor:
            factor_BK = self.factor_CC[first:start, place_K] * (place_K >= last)  # the block's own have been moved
            return weight_CMR[place_K, 0] - factor_BK.T @ error_CMR[first:start, 0]

        def move(columns: slice, by: slice) -> None:
            add_products(
                weight_CMR[columns], [factor_CC[by, columns].T for factor_CC in self.factors], error_CMR[by], -1
            )

        for start, stop, first, last in self.runs(grid.run):
            grid.begin_run(start, partial(moved, start, first, last))
            inner_KKM1, diagonal_KM1 = corners(self.factors, start, stop)
            run = ColumnRun(start, stop, grid, diagonal_KM1, price)
            for k, weight_MR in enumerate(weight_CMR[start:stop]):
                level_CMR[start + k], value_MR = run.round(k, weight_MR)
                error_CMR[start + k] = (weight_MR - value_MR) / diagonal_KM1[k]
                weight_CMR[start + k + 1 : stop].addcmul_(inner_KKM1[k, k + 1 :], error_CMR[start + k], value=-1)
            move(slice(stop, last), slice(start, stop))
            if stop == last:
                move(slice(last, None), slice(first, last))
        return level_CMR.permute(1, 2, 0)

    def descend(
        self, level_MRC: Tensor, grid: ColumnGrid, price: RatePrice | None = None, passes: int = DESCENT_PASSES
    ) -> Tensor:
        """Returns level_MRC after some passes over the columns that choose each code anew for the errors of all others.

        Coordinate descent on e H e^T (and the bits): no pass makes it worse but for the damping and costs that change.
        """
        level_CMR = level_MRC.permute(2, 0, 1).contiguous()
        steps = [grid.columns(start, stop)[0] for start, stop, _, _ in self.runs(grid.run)]
        error_CMR = self.weight_CMR - level_CMR * torch.cat(steps).double()
        for start, stop, first, last in [*self.runs(grid.run)] * passes:
            if start == first:
                pull_BMR = torch.zeros_like(error_CMR[first:last])
                add_products(pull_BMR, [damped_CC[first:last] for damped_CC in self.damped], error_CMR, 1)
            inner_KKM1, power_KM1 = corners(self.damped, start, stop)
            run, before_KMR = ColumnRun(start, stop, grid, power_KM1.rsqrt(), price), error_CMR[start:stop].clone()
            pull_KMR, change_KMR = pull_BMR[start - first : stop - first], torch.empty_like(before_KMR)
            for k, weight_MR in enumerate(self.weight_CMR[start:stop]):
                best_MR = weight_MR + pull_KMR[k] / power_KM1[k] - before_KMR[k]
                level_CMR[start + k], value_MR = run.round(k, best_MR)
                error_CMR[start + k] = weight_MR - value_MR
                change_KMR[k] = error_CMR[start + k] - before_KMR[k]
                pull_KMR[k + 1 :].addcmul_(inner_KKM1[k, k + 1 :], change_KMR[k])
            later = [damped_CC[stop:last, start:stop] for damped_CC in self.damped]
            add_products(pull_BMR[stop - first :], later, change_KMR, 1)
        return level_CMR.permute(1, 2, 0)


def gptq_problem(weight_RC: Tensor, hessian_CC: Tensor, damping: float) -> GptqProblem:
    """Returns the problem of fp32 weights and H of their inputs, on the weights' device. Raises QuantError."""
    hessian_CC = checked_hessian(hessian_CC.to(weight_RC.device), weight_RC.size(1))
    factor_CC, damped_CC = factor_and_damped(hessian_CC, damping)
    return GptqProblem(weight_RC.double().T.unsqueeze(1), [factor_CC], [damped_CC])


def rate_price(
    levels: Sequence[Tensor], slope: float, row_weights: Sequence[Tensor], most: int = CODE_CLIP
) -> RatePrice:
    """Returns the costs of each matrix's codes, if like its level_RC, of magnitudes up to `most`, at `slope` of error,
    weighted by row_weight_R, for a bit."""
    costs = join_costs([learn_costs(level_RC, most) for level_RC in levels])
    return RatePrice(costs, slope / torch.stack(list(row_weights)).clamp(min=1e-300))


# ---- golf/quant/spreading.py -----------------------------------------------------------------------------------------

"""Spreads matrices over ranks and over loops; what each rank makes of its own, all get. R rows, C columns."""

ROWS_TOGETHER = 8192
"""Most rows that a CPU rounds in one loop: more do not fit its caches (12 % slower). A GPU takes all."""


def spread_matrices(shapes: Shapes, ranks: int) -> dict[str, int]:
    """Returns the rank of each matrix: equal shapes side by side, cut into stretches of about equal cost.

    A rank so meets few shapes, each of which takes a loop over its columns. A weight costs its part in moving all
    columns, and the choice of its code, which costs as much as 1,024 columns.
    """
    names = sorted(shapes, key=lambda name: (shapes[name][::-1], name))
    costs = [math.prod(shapes[name]) * (1024 + shapes[name][1]) for name in names]
    ends = accumulate(costs)
    return {
        name: ranks * (2 * end - cost) // (2 * sum(costs)) for name, cost, end in zip(names, costs, ends, strict=True)
    }


def batch_equal_shapes(shapes: Shapes, device: torch.device) -> list[list[str]]:
    """Returns the names in groups of equal shapes, which are small enough for the device."""
    found: dict[tuple[int, ...], list[list[str]]] = {}
    for name, shape in shapes.items():
        groups = found.setdefault(shape, [[]])
        if device.type == "cpu" and groups[-1] and (len(groups[-1]) + 1) * shape[0] > ROWS_TOGETHER:
            groups.append([])
        groups[-1].append(name)
    return [group for groups in found.values() for group in groups]


def share_entries(mine: Mapping[str, QuantizedTensor], shapes: Shapes, runtime: Runtime) -> dict[str, QuantizedTensor]:
    """Returns every rank's entries by name, on the CPU: sums in which all ranks but one have zeros, thus exact."""
    entries = {}
    for name, (rows, columns) in shapes.items():
        codes_RC, numbers_N = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows + columns + 1)
        if entry := mine.get(name):
            codes_RC, flag = entry.codes_RC, torch.tensor([float(entry.trellis)])
            numbers_N = torch.cat([entry.scale_SG[:, 0].float(), entry.column_scale_C.float(), flag])
        codes_RC, numbers_N = (runtime.sum_over_ranks(part.to(runtime.device)).cpu() for part in (codes_RC, numbers_N))
        scale_R, column_C, flag = numbers_N.split([rows, columns, 1])
        entries[name] = QuantizedTensor(
            codes_RC, scale_R.half().unsqueeze(1), CODE_BITS, column_C.half(), trellis=bool(flag)
        )
    return entries


# ---- golf/quant/trellis_search.py ------------------------------------------------------------------------------------

"""Finds codes of the trellis grid (trellis.py) by Viterbi's search inside GPTQ's error feedback.

Every row keeps one survivor for each state, and each survivor feeds the errors of its own past to the columns ahead.
Survivors change places at every column, so what each has fed moves with it: within a run of a few columns at every
column, and for the columns after it once, when the run ends.

M matrices of one shape, R rows, C columns, B columns of a block, K of a run, S states of the trellis, Z parities, A
arms that lead to a state.
"""

TRELLIS_BLOCK, TRELLIS_RUN = 128, 16
"""Columns over which survivors compete; the winner's error goes to the later columns. The next block starts in its
state: that costs 0.005 bit a weight against survivors that live on. And columns of a run: no effect on the result but
the order of sums."""
HALF_CODES = 63
"""Bound of half a code: codes stay in -126..125."""


def trellis_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns next_SZ, the state after each state and parity; from_SA, the two (state * 2 + parity) that lead to a
    state."""
    state_S, parity_Z = torch.arange(TRELLIS_STATES, device=device), torch.arange(2, device=device)
    next_SZ = (state_S >> 1 ^ (state_S & 1) * (PARITY_H0 >> 1))[:, None] ^ parity_Z * (PARITY_H1 >> 1)
    return next_SZ, next_SZ.flatten().argsort(stable=True).view(TRELLIS_STATES, 2)


def take_step(
    value_MSR: Tensor, scale_M1R: Tensor, diagonal_M11: Tensor, cost_MSR: Tensor, from_SA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the arm_MSR (second or first) by which each state is reached at the least cost after a column, and of the
    walks there cost_MSR, error_MSR over the factor's diagonal, and code_MSR.

    The cost of a walk is the sum of (error / factor_jj)^2, GPTQ's.
    """
    state_S, parity_Z1 = (
        torch.arange(TRELLIS_STATES, device=from_SA.device),
        torch.arange(2, device=from_SA.device)[:, None],
    )
    first_SZ1 = (state_S & 1)[:, None, None] + 2 * parity_Z1
    value_MS1R, scale_M11R = value_MSR.unsqueeze(2), scale_M1R.unsqueeze(2)
    turns_MSZR = (value_MS1R / scale_M11R).sub(first_SZ1).div_(4).round_().clamp_(-HALF_CODES, HALF_CODES - 1)
    error_MSZR = (value_MS1R - (first_SZ1 + 4 * turns_MSZR) * scale_M11R).div_(diagonal_M11.unsqueeze(2))
    costs_MSZR = error_MSZR.square().add_(cost_MSR.unsqueeze(2))
    first_MSR, second_MSR = (costs_MSZR.flatten(1, 2).index_select(1, from_S) for from_S in from_SA.T)
    arm_MSR = second_MSR < first_MSR
    found = [either(arm_MSR, part.flatten(1, 2), from_SA) for part in (error_MSZR, turns_MSZR.mul_(2).add_(parity_Z1))]
    return arm_MSR, torch.minimum(first_MSR, second_MSR), *found


def either(arm_MSR: Tensor, part: Tensor, from_SA: Tensor) -> Tensor:
    """Returns what stands in the last but one dimension of `part` where each state's better arm comes from."""
    first, second = (part.index_select(-2, from_S) for from_S in from_SA.T)
    return torch.where(arm_MSR, second, first)


def walk_run(
    ahead_KMSR: Tensor, factors: Sequence[Tensor], scale_KMR: Tensor, cost_MSR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the survivors after a run's columns: cost_MSR, the origin_MSR in which each was before it, and on its way
    error_KMSR and code_KMSR.

    `ahead_KMSR` holds the weights as each survivor's errors so far have moved them.
    """
    inner_KKM1, diagonal_KM1 = corners(factors, 0, len(ahead_KMSR))
    from_SA = trellis_steps(cost_MSR.device)[1]
    steps, state_S1 = [], torch.arange(TRELLIS_STATES, device=cost_MSR.device)[:, None]
    for k, scale_MR in enumerate(scale_KMR):
        diagonal_M11 = diagonal_KM1[k].unsqueeze(1)
        arm_MSR, cost_MSR, error_MSR, code_MSR = take_step(
            ahead_KMSR[0], scale_MR.unsqueeze(1), diagonal_M11, cost_MSR, from_SA
        )
        steps.append((either(arm_MSR, state_S1, from_SA // 2), error_MSR, code_MSR.to(torch.int8)))
        ahead_KMSR = either(arm_MSR, ahead_KMSR[1:], from_SA // 2)
        ahead_KMSR.addcmul_(inner_KKM1[k, k + 1 :].unsqueeze(2), error_MSR, value=-1)
    origin_MSR, ways = state_S1.expand_as(cost_MSR), []
    for before_MSR, *parts in reversed(steps):
        ways.append([part_MSR.gather(1, origin_MSR) for part_MSR in parts])
        origin_MSR = before_MSR.gather(1, origin_MSR)
    error_KMSR, code_KMSR = (torch.stack(parts) for parts in zip(*reversed(ways), strict=True))
    return cost_MSR, origin_MSR, error_KMSR, code_KMSR


def search_block(
    weight_BMR: Tensor, factors: Sequence[Tensor], scale_BMR: Tensor, state_MR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes_BMR, errors_BMR over the factors' diagonals, and the end state_MR, of each row's best walk from
    `state_MR`. The factors are those of the block's columns."""
    ahead_BMSR = weight_BMR.unsqueeze(2).repeat(1, 1, TRELLIS_STATES, 1)
    cost_MSR = torch.full_like(ahead_BMSR[0], torch.inf).scatter_(1, state_MR.unsqueeze(1), 0.0)
    runs = []
    for start in range(0, len(weight_BMR), TRELLIS_RUN):
        run, later = slice(start, start + TRELLIS_RUN), slice(start + TRELLIS_RUN, None)
        ahead_KMSR, ahead_BMSR = ahead_BMSR[:TRELLIS_RUN], ahead_BMSR[TRELLIS_RUN:]
        own = [factor_BB[run, run] for factor_BB in factors]
        cost_MSR, origin_MSR, error_KMSR, code_KMSR = walk_run(ahead_KMSR, own, scale_BMR[run], cost_MSR)
        ahead_BMSR = ahead_BMSR.gather(2, origin_MSR.expand_as(ahead_BMSR))
        moves = [factor_BB[run, later].T for factor_BB in factors]
        add_products(ahead_BMSR.flatten(2), moves, error_KMSR.flatten(2), -1)
        runs.append((origin_MSR, error_KMSR, code_KMSR))
    best_MR = cost_MSR.argmin(1)
    state_M1R, found = best_MR.unsqueeze(1), []
    for origin_MSR, *parts in reversed(runs):
        found.append([part.gather(2, state_M1R.expand(len(part), -1, -1, -1)).squeeze(2) for part in parts])
        state_M1R = origin_MSR.gather(1, state_M1R)
    errors_BMR, codes_BMR = (torch.cat(parts) for parts in zip(*reversed(found), strict=True))
    return codes_BMR, errors_BMR, best_MR


def quantize_trellises(
    weights: Sequence[Tensor], factors: Sequence[Tensor], scales: Sequence[StepSizes]
) -> list[QuantizedTensor]:
    """Finds codes whose points are near each weight_RC, all of one shape, in the metric of H, with factor_CC the upper
    U of H^-1 = U^T U.

    Columns are in their natural order. `scales` are steps of the coarse grid, halved here. Runs in fp32: it only
    compares survivors, and stores whole numbers.
    """
    halves = [one.scale_SG * 0.5 for one in scales]
    columns = [
        torch.ones_like(weights[0][0]).half() if one.column_scale_C is None else one.column_scale_C for one in scales
    ]
    steps = [half_S1.float() * column_C.float() for half_S1, column_C in zip(halves, columns, strict=True)]
    scale_CMR = torch.stack([step.expand_as(weight).T for step, weight in zip(steps, weights, strict=True)], 1)
    weight_CMR = torch.stack([weight_RC.float().T for weight_RC in weights], 1)
    factors = [factor_CC.float() for factor_CC in factors]
    codes, state_MR = [], torch.zeros_like(weight_CMR[0], dtype=torch.int64)
    for start in range(0, len(weight_CMR), TRELLIS_BLOCK):
        block, later = slice(start, start + TRELLIS_BLOCK), slice(start + TRELLIS_BLOCK, None)
        own = [factor_CC[block, block] for factor_CC in factors]
        codes_BMR, errors_BMR, state_MR = search_block(weight_CMR[block], own, scale_CMR[block], state_MR)
        add_products(weight_CMR[later], [factor_CC[block, later].T for factor_CC in factors], errors_BMR, -1)
        codes.append(codes_BMR.cpu())
    return [
        QuantizedTensor(code_RC, half_S1.cpu(), 8, column_C.cpu(), trellis=True)
        for code_RC, half_S1, column_C in zip(
            torch.cat(codes).permute(1, 2, 0).contiguous(), halves, columns, strict=True
        )
    ]


# ---- golf/quant/waterfill.py -----------------------------------------------------------------------------------------


UP_SUFFIX, DOWN_SUFFIX = ".mlp.fc.weight", ".mlp.proj.weight"


def hidden_order(up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """Returns order_H: units by falling product of the L2 norms of their two vectors; ties by their old place."""
    strength_H = up_HD.double().norm(dim=1) * down_DH.double().norm(dim=0)
    return strength_H.argsort(descending=True, stable=True)


def mlp_blocks(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the prefixes of the MLPs in `state`. Raises QuantError where one lacks a matrix, or theirs do not fit."""
    prefixes = [name.removesuffix(UP_SUFFIX) for name in state if name.endswith(UP_SUFFIX)]
    for prefix in prefixes:
        up, down = state[prefix + UP_SUFFIX], state.get(prefix + DOWN_SUFFIX)
        if down is None or up.dim() != 2 or down.shape != (up.size(1), up.size(0)):
            raise QuantError(f"{prefix}{UP_SUFFIX} has no {DOWN_SUFFIX} that fits it")
    return prefixes


def hidden_orders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns hidden_order of every MLP by its prefix. Raises QuantError."""
    return {block: hidden_order(state[block + UP_SUFFIX], state[block + DOWN_SUFFIX]) for block in mlp_blocks(state)}


def permute_statistics(
    statistics: Mapping[str, LayerStatistics], orders: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """Returns the statistics of weights whose hidden units are in `orders` (by prefix)."""
    permuted = dict(statistics)
    for prefix, order_H in orders.items():
        up, down = statistics[prefix + UP_SUFFIX], statistics[prefix + DOWN_SUFFIX]
        permuted[prefix + UP_SUFFIX] = LayerStatistics(up.hessian_CC, up.row_weight_R[order_H])
        permuted[prefix + DOWN_SUFFIX] = LayerStatistics(down.hessian_CC[order_H][:, order_H], down.row_weight_R)
    return permuted


def permute_hidden_units(state: Mapping[str, Tensor], orders: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Reorders each MLP's units by `orders` (by prefix, "blocks.0"), or by hidden_order; the function stays the same.

    Raises QuantError for an order that is no permutation.
    """
    permuted = dict(state)
    orders = hidden_orders(state) if orders is None else orders
    for prefix in mlp_blocks(state):
        up_HD, down_DH, order_H = state[prefix + UP_SUFFIX], state[prefix + DOWN_SUFFIX], orders[prefix]
        if not torch.equal(order_H.sort().values.cpu(), torch.arange(len(up_HD))):
            raise QuantError(f"the order of {prefix}'s units is no permutation of {len(up_HD)}")
        permuted[prefix + UP_SUFFIX] = up_HD[order_H].contiguous()
        permuted[prefix + DOWN_SUFFIX] = down_DH[:, order_H].contiguous()
    return permuted


STEPS_PER_OCTAVE = 16
CODE_ROOM = 0.9
"""Share of the largest code that the original weights may reach: error feedback moves them."""
RD_LAMBDA = 0.15
"""Weight of a code's bits against its error. In theory 1; but codes that are all moved towards zero have errors that
add up, and the divergence from the unquantized model is least near this value (docs/LOG.md)."""
LEAST_ROW_WEIGHT = 1e-4
"""Smallest row weight, as a share of the mean row's: a row that calibration never saw act may act after all."""


def nearest_on_log_grid(scale: Tensor) -> Tensor:
    """Returns the fp16 values m / 1024 * 2^e nearest to `scale` in ratio, m one of STEPS_PER_OCTAVE whole numbers an
    octave."""
    k = (scale.double().clamp(FP16_TINY, FP16_MAX / 2).log2() * STEPS_PER_OCTAVE).round()
    octave = (k / STEPS_PER_OCTAVE).floor()
    mantissa = (1024 * torch.exp2(k / STEPS_PER_OCTAVE - octave)).round()
    return (mantissa / 1024 * torch.exp2(octave)).half()


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """Holds a matrix with all that does not depend on the water level."""

    weight_RC: Tensor
    factor_CC: Tensor
    damped_CC: Tensor
    damping_C: Tensor
    """What `damped_CC` has more than the statistics on its diagonal."""
    row_weight_R: Tensor

    def sample(self, stride: int) -> "PreparedMatrix":
        """Returns every `stride`-th row as a matrix."""
        return replace(self, weight_RC=self.weight_RC[::stride], row_weight_R=self.row_weight_R[::stride])

    @property
    def problem(self) -> GptqProblem:
        """Returns what GPTQ wants to know."""
        return GptqProblem(self.weight_RC.double().T.unsqueeze(1), [self.factor_CC], [self.damped_CC])

    def step_sizes(self, level: float) -> StepSizes:
        """Returns scales of rows and columns at a water level, coarse enough for the weights to stay within int8
        codes."""
        column_C = self.factor_CC.diagonal()
        center = column_C.log().mean().exp()
        column_C = nearest_on_log_grid(column_C / center)
        row_R = (level / self.row_weight_R).sqrt() * center
        most_R = (self.weight_RC.double().abs() / column_C.double()).amax(dim=1)
        row_R = torch.maximum(row_R, most_R / (CODE_ROOM * CODE_CLIP))
        return StepSizes(nearest_on_log_grid(row_R).unsqueeze(1), column_C)

    def quantize(self, level: float, rd_lambda: float = RD_LAMBDA, trellis: bool = True) -> QuantizedTensor:
        """Returns quantize_matrices of this one alone."""
        return quantize_matrices([self], level, rd_lambda, trellis)[0]

    def cost(self, entry: QuantizedTensor, level: float) -> float:
        """Returns nats per token: the predicted loss, and the codes' bits at the level's price."""
        bits = class_entropy(entry.codes_RC.float()) * entry.codes_RC.numel()
        return self.loss_added(dequantize_tensor(entry)) + 0.5 * HIGH_RATE_SLOPE * level * bits

    def codes_not_nearest(self, entry: QuantizedTensor) -> int:
        """Counts the codes that differ from rounding each weight alone with the steps of `entry`.

        Counts all codes of a trellis, which has no nearest code.
        """
        if entry.trellis:
            return entry.codes_RC.numel()
        step_RC = (entry.scale_SG.float() * entry.column_scale_C.float()).to(self.weight_RC.device)
        nearest_RC = (self.weight_RC / step_RC).round().clamp(-CODE_CLIP, CODE_CLIP)
        return int((nearest_RC.to(torch.int8).cpu() != entry.codes_RC).sum())

    def loss_added(self, restored_RC: Tensor) -> float:
        """Returns the predicted added loss, nats per token."""
        error_RC = restored_RC.to(self.weight_RC.device).double() - self.weight_RC.double()
        cost_R = ((error_RC @ self.damped_CC) * error_RC).sum(1) - error_RC.square() @ self.damping_C
        return 0.5 * float(cost_R @ self.row_weight_R)


def quantize_matrices(
    matrices: Sequence[PreparedMatrix], level: float, rd_lambda: float = RD_LAMBDA, trellis: bool = True
) -> list[QuantizedTensor]:
    """Quantizes matrices of one shape by GPTQ with the steps of `level`, choosing each code by its error and its bits
    at the level's price.

    Takes the codes of a trellis where they cost less. A matrix gets the same codes in any company.
    """
    scales = [matrix.step_sizes(level) for matrix in matrices]
    plain = quantize_plain(matrices, scales, level, rd_lambda)
    if not trellis:
        return plain
    factors = [matrix.factor_CC for matrix in matrices]
    woven = quantize_trellises([matrix.weight_RC for matrix in matrices], factors, scales)
    return [
        min(entries, key=lambda entry, matrix=matrix: matrix.cost(entry, level))
        for matrix, *entries in zip(matrices, plain, woven, strict=True)
    ]


def join_problems(matrices: Sequence[PreparedMatrix]) -> GptqProblem:
    """Returns the problems of matrices of one shape as one."""
    weight_CMR = torch.cat([matrix.problem.weight_CMR for matrix in matrices], 1)
    return GptqProblem(weight_CMR, [matrix.factor_CC for matrix in matrices], [matrix.damped_CC for matrix in matrices])


def quantize_plain(
    matrices: Sequence[PreparedMatrix], scales: Sequence[StepSizes], level: float, rd_lambda: float
) -> list[QuantizedTensor]:
    """Quantizes matrices of one shape without trellises."""
    grid, price, problem = ColumnGrid(scales, matrices[0].weight_RC.device), None, join_problems(matrices)
    level_MRC = problem.round_columns(grid)
    for _ in range(RATE_PASSES if rd_lambda else 0):
        slope = rd_lambda * (HIGH_RATE_SLOPE * level)
        price = rate_price(level_MRC, slope, [matrix.row_weight_R for matrix in matrices])
        level_MRC = problem.round_columns(grid, price)
    code_MRC = problem.descend(level_MRC, grid, price).to(torch.int8).cpu().contiguous()
    return [
        QuantizedTensor(code_RC, one.scale_SG.cpu(), CODE_BITS, one.column_scale_C.cpu())
        for code_RC, one in zip(code_MRC, scales, strict=True)
    ]


def prepare_matrix(weight_RC: Tensor, statistics: LayerStatistics, damping: float = 0.01) -> PreparedMatrix:
    """Prepares a matrix for any water level. Raises QuantError for weights or statistics that are not finite or don't
    fit.

    Columns keep their natural order: with steps of their own, act-order changes nothing (docs/LOG.md), and a trellis
    runs from left to right.
    """
    weight_RC = weight_RC.detach().float()
    statistics = LayerStatistics(
        *(part.to(weight_RC.device) for part in (statistics.hessian_CC, statistics.row_weight_R))
    )
    row_weight_R = statistics.row_weight_R.clamp_min(
        LEAST_ROW_WEIGHT * statistics.row_weight_R.mean().clamp_min(1e-300)
    )
    problem = gptq_problem(weight_RC, statistics.hessian_CC, damping)
    damping_C = problem.damped[0].diagonal() - statistics.hessian_CC.diagonal()
    return PreparedMatrix(weight_RC, problem.factor_CC, problem.damped[0], damping_C, row_weight_R)


# ---- golf/artifact/fill_limit.py -------------------------------------------------------------------------------------

"""Fits artifacts to the byte limit: by coarser weights where one would be too large, or by the water level that fills
it.

Coarser: pruning is raised first, then matrices lose a bit each, the least sensitive first. Order and bytes follow from
the weights alone. Water level: one number decides the steps of all matrices (golf/quant/waterfill.py); its base-2
logarithm is bracketed and then found by the secant of the coded size, which falls by about half a bit a weight for each
doubling. Whatever is returned was packed.
"""


class FitError(UserError):
    """Reports weights that no allowed coarsening brings under the limit."""


@dataclass(frozen=True, eq=False)
class FittedArtifact:
    data: bytes
    sizes: SizeReport
    stored: QuantizedState
    prune_reports: list[PruneReport]
    actions: list[str]  # in order; empty where it fitted as configured
    pruned: dict[str, Tensor] | None = None
    """Weights that `stored` was rounded to nearest from; None where codes were chosen otherwise."""
    codes_not_nearest: int = 0
    """Codes that error feedback or their price moved away from the nearest."""


FINEST, COARSEST = -36.0, 0.0
"""Base-2 logarithms of the levels that bound the search: codes fill int8 at the first, nearly all are zero at the
second."""
FIRST_GUESS = -21.0
NEAR_ENOUGH = 500
"""Bytes below the goal at which the search ends (a limit of 16,000,000 is filled to 0.003 %)."""
MOST_PACKINGS = 16
SAMPLE_WEIGHTS = 2**22
"""Weights, about, on whose rows the level of a larger model is searched first."""


def single_process() -> Runtime:
    """Returns a runtime of one process on the CPU."""
    return Runtime(torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class LevelArtifact:
    """Holds the model at one water level."""

    log_level: float
    size: int
    """Bytes; of a sample of rows those that all would take."""
    data: bytes
    """Empty for a sample."""
    sizes: SizeReport
    stored: QuantizedState
    loss_added: float
    """Predicted added loss, nats per token."""


@dataclass(eq=False)
class LevelSearch:
    """Searches the water level whose artifact fills a goal, for prepared weights; all ranks together.

    Each rank quantizes its share of the matrices. All of them pack, decide, and come to the same.
    """

    state: Mapping[str, Tensor]
    statistics: Mapping[str, LayerStatistics]
    quant: QuantConfig
    model: ModelConfig
    tokenizer_sha256: str = "0" * 64
    log: Callable[[str], None] = print
    trellis: bool = False
    first_guess: float = FIRST_GUESS
    near_enough: int = NEAR_ENOUGH
    runtime: Runtime = field(default_factory=single_process)
    stride: int = 1
    """Of so many rows, one is quantized: the others cost about as much."""
    tried: dict[float, LevelArtifact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepares this rank's matrices, with hidden units in the order that suits the coder: this saves 0.2 to 0.4 %
        of the bytes."""
        state = {name: part.detach().cpu() for name, part in self.state.items()}  # as the statistics are
        orders = hidden_orders(state)
        self.state = permute_hidden_units(state, orders)
        self.shapes = {name: tuple(self.state[name].shape) for name in self.statistics}
        ranks = spread_matrices(self.shapes, self.runtime.world_size)
        self.matrices: dict[str, PreparedMatrix] = {
            name: prepare_matrix(self.state[name].to(self.runtime.device), one)
            for name, one in permute_statistics(self.statistics, orders).items()
            if ranks[name] == self.runtime.rank
        }

    def quantize(self, log_level: float) -> QuantizedState:
        """Returns all tensors quantized at a level; those that are no matrices as fp16."""
        mine: dict[str, QuantizedTensor] = {}
        shapes = {name: (-(-rows // self.stride), columns) for name, (rows, columns) in self.shapes.items()}
        for names in batch_equal_shapes({name: shapes[name] for name in self.matrices}, self.runtime.device):
            matrices = [self.matrices[name].sample(self.stride) for name in names]
            entries = quantize_matrices(matrices, 2.0**log_level, self.quant.rd_lambda, self.trellis)
            mine |= zip(names, entries, strict=True)
        codes = share_entries(mine, shapes, self.runtime)
        return {name: codes[name] if name in codes else part.detach().cpu().half() for name, part in self.state.items()}

    def of_all(self, value_of: Callable[[PreparedMatrix, QuantizedTensor], float], stored: QuantizedState) -> float:
        """Returns the sum of a value over the matrices of all ranks, which does not depend on who has which."""
        values = [value_of(self.matrices[name], stored[name]) if name in self.matrices else 0.0 for name in self.shapes]
        values_N = torch.tensor(values, dtype=torch.float64, device=self.runtime.device)
        return sum(self.runtime.sum_over_ranks(values_N).tolist())

    def at(self, log_level: float) -> LevelArtifact:
        """Returns the artifact at a level, quantized and packed once."""
        if log_level not in self.tried:
            stored = self.quantize(log_level)
            if self.stride > 1:
                self.tried[log_level] = self.sampled(log_level, stored)
                return self.tried[log_level]
            data, sizes = pack_artifact(stored, self.model, self.tokenizer_sha256, self.quant.codec, verify=False)
            loss = self.of_all(lambda matrix, entry: matrix.loss_added(dequantize_tensor(entry)), stored)
            self.tried[log_level] = LevelArtifact(log_level, len(data), data, sizes, stored, loss)
            self.log(f"fit: level 2^{log_level:.4f}: {len(data):,} bytes, {loss:.5f} nats per token expected")
        return self.tried[log_level]

    def sampled(self, log_level: float, stored: QuantizedState) -> LevelArtifact:
        """Returns what all rows would take, by a sample's streams: codes and scales are as many times more."""
        streams, _ = encode_streams(stored, self.quant.codec)
        size = sum(one.compressed_bytes * (self.stride if one.role in ("codes", "scales") else 1) for one in streams)
        self.log(f"fit: level 2^{log_level:.4f}: about {size:,} bytes by one row in {self.stride}")
        return LevelArtifact(log_level, size, b"", SizeReport(self.quant.codec, tuple(streams), size), stored, math.nan)

    def fill(self, goal: int) -> LevelArtifact:
        """Returns the largest artifact within `goal` bytes, up to `near_enough`; a smaller one where no finer step
        helps.

        Raises FitError where the coarsest is larger.
        """
        over = within = None  # the nearest level that is too large, and that fits
        guess = self.first_guess
        for packing in range(MOST_PACKINGS):
            size = self.at(guess).size
            over, within = (over, guess) if size <= goal else (guess, within)
            if goal - self.near_enough <= size <= goal or (within == FINEST and size <= goal) or over == COARSEST:
                break
            guess = self.next_guess(goal, over, within, halve=packing % 4 == 3)
        if within is None:
            smallest = min(one.size for one in self.tried.values())
            raise FitError(
                f"the artifact can't fit in {goal:,} bytes: {smallest:,} is the smallest, with nearly all codes zero; "
                "train a smaller model"
            )
        return self.at(within)

    def next_guess(self, goal: int, over: float | None, within: float | None, halve: bool) -> float:
        """Returns the next level to try.

        Between a level that is too large and one that fits: where the line through their sizes meets the goal, or with
        `halve` their middle. Else: as far on as half a bit a weight for each octave predicts, and a little further.
        """
        if over is None or within is None:
            known = over if within is None else within
            octaves = 16 * (self.tried[known].size - goal) / (self.stride * self.tried[known].sizes.weights)
            return min(max(known + 1.2 * octaves + math.copysign(0.05, octaves), FINEST), COARSEST)
        if halve:
            return (over + within) / 2
        most, least = (math.log(self.tried[level].size) for level in (over, within))
        share = (most - math.log(goal - self.near_enough / 2)) / (most - least)
        return over + min(max(share, 0.02), 0.98) * (within - over)


def fill_limit(
    statistics: Mapping[str, LayerStatistics], state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig,
    tokenizer_sha256: str, limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
    runtime: Runtime | None = None,
) -> FittedArtifact:  # fmt: skip
    """Returns the artifact that fills the limit, less a reserve, on every rank. Deterministic: the bytes do not depend
    on the number of ranks. Raises FitError, QuantError.

    The level is first searched roughly: on some rows where there are many weights, else with plain grids, which are
    quick. From there on all rows are quantized with trellises.
    """
    goal = limit_bytes_model - reserve_bytes
    stride = max(1, sum(state[name].numel() for name in statistics) // SAMPLE_WEIGHTS)
    roughly = max(NEAR_ENOUGH, goal // (50 if stride == 1 else 500))
    search = LevelSearch(
        state, statistics, quant, model, tokenizer_sha256, log, stride > 1, near_enough=roughly,
        runtime=runtime or single_process(), stride=stride,
    )  # fmt: skip
    search.first_guess, packings = search.fill(goal).log_level, len(search.tried)
    search.trellis, search.near_enough, search.stride, search.tried = True, NEAR_ENOUGH, 1, {}
    found, packings = search.fill(goal), packings + len(search.tried)
    zeros = sum(int((found.stored[name].codes_RC == 0).sum()) for name in statistics)
    codes = sum(found.stored[name].codes_RC.numel() for name in statistics)
    woven = sum(found.stored[name].trellis for name in statistics)
    action = (
        f"water level 2^{found.log_level:.4f}, {found.loss_added:.5f} nats per token expected, {woven} of "
        f"{len(statistics)} matrices on a trellis, {zeros / codes:.1%} of the codes zero"
    )
    log(f"fit: {len(found.data):,} bytes in {packings} packings: {action}")
    moved = int(search.of_all(PreparedMatrix.codes_not_nearest, found.stored))
    sizes = replace(found.sizes, streams=tuple(read_back(found.data, found.stored, found.sizes.streams)))
    return FittedArtifact(found.data, sizes, found.stored, [], [action], codes_not_nearest=moved)


# ---- golf/artifact/weights.py ----------------------------------------------------------------------------------------

"""Saves and loads weights.safetensors: fp32 weights as training leaves them, with metadata that packing needs."""

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
    """Writes weights with their metadata; the file appears at once. Raises ArtifactError, OSError."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected_shapes(model))
    check_sha256(tokenizer_sha256)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    values = (json.dumps(asdict(model)), json.dumps(asdict(quant)), tokenizer_sha256)
    write_file_atomically(path, save(tensors, dict(zip(METADATA_ENTRIES, values, strict=True))))


def load_weights(path: Path) -> SavedWeights:
    """Loads weights and metadata, checked against the model that they name. Raises ArtifactError."""
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
    quant = quant_from_json(load_metadata_json(metadata["quant"]), model)
    check_sha256(metadata["tokenizer_sha256"])
    shapes = expected_shapes(model)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"tensor {name!r} in {path} has NaN or infinite values")
    return SavedWeights({name: state[name].float() for name in shapes}, model, quant, metadata["tokenizer_sha256"])


def save_quantized(path: Path, stored: QuantizedState) -> None:
    """Writes codes, scales and fp16 tensors in their stored form; the file appears at once."""
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
    """Inverts save_quantized. Raises ArtifactError."""
    try:
        with safe_open(path, framework="pt") as file:
            grids, names = (json.loads(file.metadata()[key]) for key in ("grids", "names"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: load_entry(name, tensors, grids) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"cannot read quantized weights from {path}: {error}") from None


def load_entry(name: str, tensors: Mapping[str, Tensor], grids: Mapping[str, list]) -> QuantizedTensor | Tensor:
    """Returns a stored weight with the factors of its correction. Raises KeyError."""
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


# ---- golf/optim/average.py -------------------------------------------------------------------------------------------

"""Averages weights: snapshots of the last part of the budget (SWA: Izmailov et al. 2018, arXiv 1803.05407), or all
steps with exponentially falling shares (EMA)."""

class WeightAverage:
    """Keeps the running mean of evenly spaced snapshots, accumulated in fp32 whatever the dtype of the weights.

    Snapshots fall due at progress start + (1 - start) k / n for k = 1 .. n, so that the last weights count too.
    """

    def __init__(self, config: AverageConfig):
        self.config, self.enabled = config, config.swa_enabled
        self.start, self.snapshots = config.swa_start, config.swa_snapshots
        self.count = 0
        self.seen = 0
        """Slots of snapshots that are used."""
        self.last_step = 0
        """Training step of the last weights that count."""
        self.mean: dict[str, Tensor] = {}

    def slots_due(self, progress: float) -> int:
        return int((progress - self.start) / (1 - self.start) * self.snapshots + 1e-9)

    def observe(self, model: nn.Module, progress: float) -> bool:
        """Takes a snapshot if one is due; returns whether it did (slots missed between two steps count as one)."""
        if not self.enabled or self.slots_due(progress) <= self.seen:
            return False
        self.seen = self.slots_due(progress)
        self.add(model, 1 / (self.count + 1))
        return True

    @torch.no_grad()
    def add(self, model: nn.Module, share: float) -> None:
        """Moves the mean towards a model's weights by a share of the way."""
        self.count += 1
        for name, weight in model.state_dict().items():
            if name not in self.mean:
                self.mean[name] = weight.detach().float().clone()
            else:
                self.mean[name].lerp_(weight.detach().float(), share)

    def observe_step(self, model: nn.Module, progress: float, step: int, audit: Auditor) -> None:
        """Takes a snapshot after a step if one is due, and counts it."""
        if self.observe(model, progress):
            self.last_step = step
            audit.count("swa", step)


def new_average(config: AverageConfig) -> WeightAverage:
    """Returns the average that the configuration asks for."""
    return WeightAverage(config)


def averaged_weights(last: dict[str, Tensor], mean: dict[str, Tensor], snapshots: int, config: AverageConfig, audit: Auditor) -> dict[str, Tensor]:
    """Returns the mean of the weights of at least two steps, or its blend with the last weights; else the last."""
    if snapshots < 2:
        return last
    moved = max(((mean[name] - last[name]).abs().max().item() for name in last))
    effect = f'mean of {snapshots} snapshots, at most {moved:.3g} from the last weights'
    audit.verify('swa', moved > 0, effect)
    return mean


register_feature(Feature("swa", lambda config: config.average.swa_enabled, "train longer, or lower swa_start"))


# ---- golf/run/feature_audit.py ---------------------------------------------------------------------------------------


@dataclass
class FeatureRecord:
    """Records what one feature did; steps are training steps, None for features that act elsewhere."""

    first: int | None = None
    last: int | None = None
    count: int = 0
    effect: str = ""
    proven: bool = False


class FeatureAudit:
    """Keeps records of the features that are on. Counting one that is off is a mistake of ours."""

    def __init__(self, config: Config, values: Mapping[str, Mapping[str, Any]] | None = None):
        self.config, self.features = config, features_on(config)
        self.records = {name: FeatureRecord(**(values or {}).get(name, {})) for name in self.features}

    def count(self, feature: str, step: int | None = None, count: int = 1) -> None:
        """Adds `count` acts of a feature, at `step` of the training."""
        record = self.records[feature]
        record.count += count
        if step is not None:
            record.first = step if record.first is None else record.first
            record.last = step

    def verify(self, feature: str, holds: bool, effect: str) -> None:
        """Records whether the effect of a feature was seen, and what it was."""
        self.records[feature].proven, self.records[feature].effect = bool(holds), effect

    def note_step(self, step: int, facts: StepFacts) -> None:
        """Counts every feature that acted in a training step."""
        for name, feature in self.features.items():
            acted, effect = feature.in_step(self.config, facts) if feature.in_step else (False, "")
            if acted:
                self.count(name, step)
            if effect:
                self.verify(name, True, effect)

    def note_weights(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Counts the features that learn in every step; their weights must have moved from zero."""
        for name, feature in self.features.items():
            if feature.learned_weight:
                weight = weights[feature.learned_weight]
                moved = int((weight != 0).sum())
                self.count(name, 1)
                self.count(name, steps, steps - 1)
                self.verify(name, moved > 0, f"{moved} of {weight.numel()} weights moved from zero")

    def note_files(self, files: Mapping[str, Any]) -> None:
        """Counts what features did after training, from the values in the files of the later stages."""
        for name, feature in self.features.items():
            if feature.in_files:
                acts, holds, effect = feature.in_files(files)
                self.count(name, count=acts)
                self.verify(name, holds, effect)

    def record(self) -> dict[str, dict[str, Any]]:
        """Returns all records as plain values, for JSON."""
        return {name: asdict(record) for name, record in self.records.items()}

    def findings(self) -> list[str]:
        """Returns a line for each feature that was on and did not act, or acted without effect."""
        findings = []
        for name, record in self.records.items():
            if record.count == 0:
                findings.append(f"{name} was switched on and never acted: {self.features[name].hint}")
            elif not record.proven:
                effect = record.effect or "no measurement"
                findings.append(f"{name} acted {record.count} times, but its effect was not seen ({effect})")
        return findings


# ---- golf/run/checkpoint.py ------------------------------------------------------------------------------------------

"""Writes and reads checkpoints: all the state that training needs to resume, in safetensors files put in place at once.

Every rank writes its own file, because the momentum of a matrix is kept on one rank alone; a checkpoint is whole when
the files of all ranks are there. The training waits only while its tensors are copied; a thread writes the copy.
"""

CHECKPOINT_NAME = re.compile(r"step(\d{7})-rank(\d+)of(\d+)\.safetensors")


class CheckpointError(UserError):
    """Reports a checkpoint that can't be read or does not fit."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Holds a training's tensors by name, and its plain numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def tensors_under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def generator_tensors() -> dict[str, Tensor]:
    """Returns the states of torch's generators; nobody draws from Python's and NumPy's (a test looks)."""
    on_cuda = {"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return on_cuda | {"rng.torch": torch.get_rng_state()}


def restore_generators(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def checkpoint_path(folder: Path, step: int, rank: int, world_size: int) -> Path:
    return folder / f"step{step:07d}-rank{rank}of{world_size}.safetensors"


def features_of(numbers: dict[str, Any]) -> dict[str, Any]:
    """Returns the feature audit in a checkpoint's numbers, under its present or its older name."""
    return numbers.get("features", numbers.get("witness"))


class CheckpointWriter:
    """Writes this rank's part of checkpoints in a thread, and keeps the last two."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        for torn in folder.glob(f".step*-rank{rank}of*.tmp"):  # left by a process that was killed
            torn.unlink()

    def write(self, state: TrainingState, step: int) -> Path:
        """Copies the state and lets the thread write it, after the previous write is done, whose OSError this
        raises."""
        self.wait()
        path = checkpoint_path(self.folder, step, self.rank, self.world_size)
        # From CUDA into pinned memory, which torch takes for copies that do not block.
        tensors = {name: part.detach().to("cpu", copy=True, non_blocking=True) for name, part in state.tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.pending = self.thread.submit(self.put, path, tensors, {"numbers": json.dumps(state.numbers)})
        return path

    def put(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)  # unlike save, it releases Python's lock to the training
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None
        whole = newest_checkpoint(self.folder)  # another rank may be behind: keep what its checkpoint needs to be whole
        for old in checkpoint_files(self.folder, self.rank)[:-2]:
            if whole and old.name < whole[0].name:
                old.unlink()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises the OSError of a write that failed."""
        if self.pending:
            self.pending.result()
        self.pending = None

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()


def checkpoint_files(folder: Path, rank: int) -> list[Path]:
    """Returns the files of one rank, oldest first."""
    paths = sorted(folder.glob(f"step*-rank{rank}of*.safetensors"))
    return [path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)]


def newest_checkpoint(folder: Path) -> list[Path]:
    """Returns the files of the newest whole checkpoint, rank 0 first; an empty list where there is none."""
    for path in reversed(checkpoint_files(folder, rank=0)):
        step, _, world_size = map(int, CHECKPOINT_NAME.fullmatch(path.name).groups())
        files = [checkpoint_path(folder, step, rank, world_size) for rank in range(world_size)]
        if all(file.exists() for file in files):
            return files
    return []


def read_checkpoint(files: list[Path]) -> TrainingState:
    """Merges the files of all ranks; where two hold a tensor, the first one's counts. Raises CheckpointError."""
    tensors, numbers = {}, {}
    for path in reversed(files):
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads((file.metadata() or {})["numbers"])
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read ({error}): remove it, and the one before is used") from None
    return TrainingState(tensors, numbers)


def final_weights(state: TrainingState, audit: FeatureAudit) -> dict[str, Tensor]:
    """Returns the final weights: the average where there is one, else the last."""
    last, mean = (tensors_under(kind, state.tensors) for kind in ("model.", "average."))
    return averaged_weights(last, mean, state.numbers["average"][0], audit.config.average, audit)


# ---- golf/run/guard.py -----------------------------------------------------------------------------------------------

"""Restricts which data and network a process may use in each stage, where Python opens files and sockets (PEP 578)."""

CLOSED_SPLITS = {
    "setup": ("val",),
    "train": ("val",),
    "average": ("val",),
    "quantize": ("val",),
    "pack": ("val", "train"),
    "reload": ("val", "train"),
    "score": ("train",),
}
"""Splits that are closed in a stage: validation before it is scored, training text once calibration is over."""
NETWORK_EVENTS = tuple(f"socket.{call}" for call in ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg"))


class GuardError(UserError):
    """Reports data or network that was used outside its stage."""


class AccessGuard:
    """Refuses shards and network outside their stage, and records what each stage opened."""

    def __init__(self) -> None:
        self.stage = "setup"
        self.opened: dict[str, list[str]] = {}

    def watch(self) -> None:
        """Starts watching for the life of the process: an audit hook can't be removed."""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            base = os.path.basename(name).replace("_val_bytes_", "_val_")  # a sidecar reveals the text's bytes too
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
        """Returns the content of access.json, from this process and `earlier` ones."""
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

"""Manages a run's folder: runs/<run_id>/, with one file for each output of a run."""

class RunFolder:
    """Names the paths of one run, and reads and writes its small files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.metrics_file: TextIO | None = None
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
        self.stages = path / "stages.json"
        self.code_changes = path / "code_changes.json"
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
            sections = parse_json(self.config.read_bytes())
        except ValueError:
            raise ConfigError(f"{self.config} is not JSON: it was changed; start a new run") from None
        del sections["config_hash"]
        return config_from_dict(sections)

    def code_changes_list(self) -> list[dict[str, Any]]:
        """Returns a record of each change of the code in the middle of the run."""
        return self.load_json(self.code_changes)["changes"] if self.code_changes.exists() else []

    def save_json(self, path: Path, content: dict[str, Any]) -> None:
        write_file_atomically(path, json.dumps(content, indent=2) + "\n")

    def load_json(self, path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"))

    def save_access(self, guard: AccessGuard) -> None:
        """Adds what this process has opened to the record of earlier processes."""
        earlier = self.load_json(self.access)["opened"] if self.access.exists() else {}
        self.save_json(self.access, guard.record(earlier))

    def journal(self, rank: int) -> Path:
        """Returns the path of a rank's scoring journal."""
        return self.path / f"score-rank{rank}.jsonl"

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl, without a last line that a killed process left half-written."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def trim_metrics(self, step: int) -> float:
        """Removes rows after `step`, whose steps will be repeated; returns the last clock reading of all rows."""
        if self.metrics_file is not None:
            self.metrics_file.close()
            self.metrics_file = None
        rows = self.metrics_rows()
        latest = max((row["elapsed"] for row in rows), default=0.0)
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):  # a process killed before the next row must not lose the reading
            kept.append({"step": step, "elapsed": latest})
        write_file_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return latest

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        with naming(self.metrics):
            if self.metrics_file is None:  # kept open: on a network volume opening takes longer than a step may
                self.metrics_file = self.metrics.open("a", encoding="utf-8")
            self.metrics_file.write(json.dumps(values, allow_nan=False) + "\n")
            self.metrics_file.flush()

    def create(self, config: Config) -> None:
        """Makes the folder. Raises ConfigError where it exists: a run never writes into another's."""
        try:
            self.path.mkdir(parents=True)
            self.checkpoints.mkdir()
        except FileExistsError:
            raise ConfigError(f"{self.path} exists: choose another run_id, or remove the folder") from None
        self.save_config(config)


def choose_run_folder(config: Config, runtime: Runtime) -> RunFolder:
    """Returns the folder named by run_id, or by preset, UTC time and seed; the same on every rank. Raises
    ConfigError."""
    run = config.run
    run_id = run.run_id or f"{run.preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{run.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise ConfigError(f"run_id={run_id!r} can't name a folder: use letters, digits, '.', '_' and '-'")
    return RunFolder(Path(run.runs_root) / runtime.text_of_main(run_id))


# ---- golf/run/command.py ---------------------------------------------------------------------------------------------

"""Parses the command line of train_gpt.py: a run to start, to resume or to score; key=value for every knob."""

@dataclass(frozen=True)
class Command:
    """Describes what to do; `config` is the run's, also of a run that is resumed or scored."""

    config: Config
    resume: Path | None = None
    """Folder of the run to resume."""
    new_code: bool = False
    """Whether to resume with this code a run that other code began."""
    score: Path | None = None
    """Folder of the run whose artifact is only reloaded and scored."""
    debug: bool = False


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Returns key=value words as a dictionary. Raises ConfigError."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not of the form key=value")
    return dict(word.split("=", 1) for word in words)


def command_parser(default_preset: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='train_gpt.py', description='Train, average, quantize, pack, reload in a fresh process, score, report.', epilog='', formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--preset', help='')
    parser.add_argument('--corpus', help='text to train on: embedded, .txt, .jsonl, .jsonl.xz, or a folder of them')
    parser.add_argument('--resume', metavar='RUN_ID', help='go on with a run from wherever it was (or its folder)')
    parser.add_argument('--new-code', action='store_true', help='with --resume: go on though other code began the run')
    parser.add_argument('--score', type=Path, metavar='FOLDER', help='only reload and score the artifact of this run')
    parser.add_argument('--plan', action='store_true', help='print what would happen when (tools/plan.py --help)')
    parser.add_argument('--debug', action='store_true', help='show a traceback with an error')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    return parser


def parse_command(arguments: list[str], environ: Mapping[str, str]) -> Command:
    """Parses the command line. Raises ConfigError for a knob, a value or a run that does not exist."""
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
        return Command(config, None if options.score else folder, options.new_code, options.score, options.debug)
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides |= {knob: value for knob, value in named.items() if value}
    return Command(build_config(default_preset, environ, overrides), debug=options.debug)


# ---- golf/data/tokenizer.py ------------------------------------------------------------------------------------------

"""Gives training and scoring what they need of a tokenizer: its identity, and how many bytes each token stands for.

Bits per byte divides by bytes, so they must be exact: over a document, the counts add up to the UTF-8
length of its decoded text. For a SentencePiece model they are not derived from the spelling of the pieces but asked of
the processor itself, once behind another piece and once at the start of a text (where a model that trims blanks drops
a leading one). On the competition's models that is its rule: U+2581 in front is one byte, except after BOS.
The other tokenizers are lists of byte strings in a JSON file. Encoding and decoding text is lab/prepare's work.

Shape letters: N tokens, V vocabulary.
"""

BLANK = "\u2581"
"""How SentencePiece writes a blank inside its pieces."""
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"
"""CaseOps' TITLE, ALLCAPS, CAPNEXT and ESC. A model that has them as symbols of its own is made for such text."""


class Tokenizer:
    """Holds what every kind of tokenizer has. A document starts where a token is `bos_id`."""

    kind: str
    """sentencepiece, caseops, bytes, chars or gpt2."""
    vocab_size: int
    bos_id: int
    token_bytes: tuple[np.ndarray, ...]
    """unknown_V, boundary_V, inner_V and start_V of its ByteTable; reading it raises DataError where it has none."""

    def __init__(self, data: bytes, name: str = "tokenizer"):
        self.name = name
        self.sha256 = hashlib.sha256(data).hexdigest()
        """Of its file: its identity."""


class SentencePieceModel(Tokenizer):
    """Loads a SentencePiece model; one with the operators of CaseOps as pieces is of that kind. Raises DataError."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        super().__init__(model, name)
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(f"{name}: not a SentencePiece model; give the .model file that made the shards") from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        if self.bos_id < 0:
            raise DataError(f"{name}: the model has no BOS piece, which starts a document; train it with bos_id=1")
        if self.vocab_size > 2**16:
            raise DataError(f"{name}: {self.vocab_size} pieces do not fit 16-bit tokens; use at most 65,536")
        self.operators = [self.processor.piece_to_id(operator) for operator in CASE_OPERATORS]
        # a user-defined symbol has the score 0, a learned piece of one character a negative one
        own = [not self.processor.is_unknown(i) and self.processor.get_score(i) == 0 for i in self.operators]
        self.kind = "caseops" if all(own) else "sentencepiece"

    @property
    def pieces(self) -> list[str]:
        """Returns the text of each token with its blank marks; empty for what is no text."""
        model = self.processor
        special = model.is_control, model.is_unused, model.is_unknown, model.is_byte
        return ["" if any(is_(i) for is_ in special) else model.id_to_piece(i) for i in range(self.vocab_size)]

    @cached_property
    def token_bytes(self) -> tuple[np.ndarray, ...]:
        """Returns unknown_V, boundary_V, inner_V and start_V of ByteTable. Raises DataError."""
        self.check_blank_pieces()
        processor, ids = self.processor, range(self.vocab_size)
        unknown_V = np.array([processor.is_unknown(i) for i in ids])
        boundary_V = np.array([processor.is_control(i) or processor.is_unused(i) for i in ids])
        byte_V = np.array([processor.is_byte(i) for i in ids])
        plain = [i for i in ids if not (boundary_V[i] or unknown_V[i] or byte_V[i])]
        anchor = next(i for i in plain if BLANK not in processor.id_to_piece(i))
        inner_V, start_V = np.zeros((2, self.vocab_size), dtype=np.int64)
        inner_V[plain] = self.decoded_bytes([[anchor, i] for i in plain])
        inner_V[plain] -= self.decoded_bytes([[anchor]])
        start_V[plain] = self.decoded_bytes([[i] for i in plain])
        # One byte alone is no valid UTF-8 (it decodes to U+FFFD, 3 bytes), but it is one byte of the text.
        inner_V[byte_V] = start_V[byte_V] = 1
        if self.kind == "caseops":
            inner_V[self.operators] = start_V[self.operators] = 0
        return unknown_V, boundary_V, inner_V, start_V

    def decoded_bytes(self, sequences: list[list[int]]) -> list[int]:
        return [len(text.encode()) for text in self.processor.decode(sequences)]

    def check_blank_pieces(self) -> None:
        """Raises DataError for a model that writes a blank as three byte pieces (those of U+2581).

        One blank would count as 3 bytes, and bits per byte come out too low (the competition's issue #897).
        """
        spelled = "".join(self.processor.id_to_piece(i) for i in self.processor.encode("a 1  a"))
        if "<0xE2><0x96><0x81>" in spelled:
            raise DataError(
                f"{self.name}: the model has no piece for a single blank and writes it as 3 byte pieces, so bytes "
                "can't be counted: train the tokenizer again with U+2581 among its pieces"
            )


def read_tokenizer_file(path: str | Path) -> bytes:
    """Returns the content of a tokenizer's file. Raises DataError where there is none."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such tokenizer; set tokenizer_path, or prepare the data (data/README.md)")
    return Path(path).read_bytes()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer in a SentencePiece .model file, or in the .json file of one without. Raises DataError."""
    description = read_tokenizer_file(path)
    return SentencePieceModel(description, str(path))


class ByteTable:
    """Says how many bytes of text each token stands for, given the token before it.

    inner_V: bytes behind a token of the same document; start_V: bytes at the start of a document;
    boundary_V: control and unused ids, which are no text and end a document; unknown_V: ids without bytes of
    their own. A table of torch tensors (after `to`) counts tensors; a new one counts NumPy arrays.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.name = tokenizer.name
        self.exact = tokenizer.kind != "caseops"
        """False where the text may hold operators of its own, which the table counts as none: an estimate."""
        self.unknown_V, self.boundary_V, self.inner_V, self.start_V = tokenizer.token_bytes

    def to(self, device: torch.device | str) -> "ByteTable":
        """Returns the same table as torch tensors on `device`."""
        table = object.__new__(ByteTable)
        table.name, table.exact = self.name, self.exact
        for part in ("unknown_V", "boundary_V", "inner_V", "start_V"):
            setattr(table, part, torch.as_tensor(getattr(self, part), device=device))
        return table

    def count(self, previous_N, targets_N):
        """Counts the bytes of each target given the token before it, int64, in the shape of `targets_N`.

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
        """Raises DataError if there are unknown pieces among the tokens, or ids outside of the vocabulary."""
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


# ---- golf/data/manifest.py -------------------------------------------------------------------------------------------

"""Reads what a folder of shards says about itself, and gives its data the id that runs record."""

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
FINGERPRINT_BYTES = 4096
"""Bytes read from each end of a shard that no manifest vouches for."""


@dataclass(frozen=True)
class PreparedData:
    """Holds a whole folder of shards with its tokenizer; `manifest` is the content of manifest.json."""

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
    """Opens the prepared data in `folder`; checks its files' sizes against the manifest. Raises DataError."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder}: no prepared data there (no {MANIFEST_NAME}); prepare it (data/README.md)")
    try:
        manifest = parse_json(path.read_bytes())
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
    """Returns the data id that runs record: 16 hex digits.

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

"""Locates and opens a run's data: training stream, tokenizer, and their identity."""

@dataclass(frozen=True)
class TrainingData:
    stream: TokenStream
    shards: int
    tokenizer: Tokenizer
    data_id: str


def locate_data(config: Config, runtime: Runtime, root: Path) -> Config:
    """Returns `config` with data_path and tokenizer_path filled in; prepares shards from `corpus` where they are
    missing.

    A separate program (data/prepare.py beside the training script) prepares them: it is not part of the code that a
    submission ships.
    """
    if config.data.data_path:
        return with_vocabulary(with_tokenizer_path(config))
    prepared = prepare_corpus_data(config, root) if runtime.is_main else ""
    folder = Path(runtime.text_of_main(prepared))
    if str(folder).startswith("!"):
        raise ConfigError(str(folder)[1:])
    data = replace(config.data, data_path=str(folder), tokenizer_path=str(tokenizer_beside(folder)))
    return with_vocabulary(replace(config, data=data))


def with_vocabulary(config: Config) -> Config:
    """Returns `config` with the vocabulary size of its tokenizer, where the model leaves that open. Raises
    DataError."""
    if config.model.vocab_size:
        return config
    vocab_size = load_tokenizer(config.data.tokenizer_path).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def with_tokenizer_path(config: Config) -> Config:
    """Returns `config` with the tokenizer beside the shards, where it names none. Raises ConfigError."""
    if config.data.tokenizer_path:
        return config
    return replace(config, data=replace(config.data, tokenizer_path=str(tokenizer_beside(Path(config.data.data_path)))))


def tokenizer_beside(folder: Path) -> Path:
    """Returns the tokenizer that preparation left beside the shards. Raises ConfigError."""
    found = [path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).exists()]
    if not found:
        raise ConfigError(f"tokenizer_path is not set, and {folder} has no tokenizer.model: name the shards' tokenizer")
    return found[0]


def prepare_corpus_data(config: Config, root: Path) -> str:
    """Prepares the corpus and returns its folder, or "!" and a message where that failed (so that all ranks fail)."""
    program = root / 'data' / 'prepare.py'
    return f'!{program} is missing: set data_path and tokenizer_path to prepared shards and their tokenizer'


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != config.model.vocab_size or tokenizer.bos_id != config.model.bos_id:
        raise ConfigError(
            f"{config.data.tokenizer_path} has {tokenizer.vocab_size} pieces and BOS {tokenizer.bos_id}; the model has "
            f"vocab_size={config.model.vocab_size} and bos_id={config.model.bos_id}: "
            f"run with vocab_size={tokenizer.vocab_size} bos_id={tokenizer.bos_id}, or name the right tokenizer"
        )


def open_training_data(config: Config) -> TrainingData:
    """Maps the training shards and loads the tokenizer. Raises DataError or ConfigError."""
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    check_vocabulary(config, tokenizer)
    shards = find_shards(config.data.data_path, 'train')
    held_out = 0
    stream = TokenStream(shards, held_out)
    if held_out:
        stream.held_out_tokens(config.model.bos_id)
    return TrainingData(stream, len(shards), tokenizer, data_identity(config.data.data_path, tokenizer))


# ---- golf/run/frozen_code.py -----------------------------------------------------------------------------------------

"""Freezes the code of a run as it would be shipped, and checks that a resumed run still has the same code."""

@dataclass(frozen=True)
class Program:
    """Describes the running script. A bundle is its own code; else tools/bundle.py, beside the script, makes one."""

    script: Path
    bundled: bool

    def freeze(self, folder: RunFolder) -> None:
        """Writes the running code, packed, and the readable text that it was packed from. Raises ConfigError."""
        sources = self.sources()
        shutil.copyfile(self.script, folder.code)
        folder.save_json(folder.sources, sources)

    def check(self, folder: RunFolder) -> None:
        """Raises ConfigError unless the run in `folder` began with this code."""
        if not folder.sources.exists():
            raise ConfigError(f"{folder.path} was stopped before it began: remove it, and start anew")
        if folder.load_json(folder.sources) != self.sources():
            raise ConfigError(
                f"the code is not that of {folder.code}: go back to it, start a new run, or go on all the same with "
                "--new-code, which makes the result invalid"
            )

    def replace_code(self, folder: RunFolder) -> None:
        """Makes this program the code of a run that another one began, and records the change."""
        if folder.load_json(folder.sources) != self.sources():
            changes = folder.code_changes_list()
            stages = list(folder.load_json(folder.stages)) if folder.stages.exists() else []
            changes.append({"from": file_sha256(folder.code), "stages": stages})
            folder.save_json(folder.code_changes, {"changes": changes})
            self.freeze(folder)

    def sources(self) -> dict[str, str]:
        """Returns SHA-256 of every file that the run's code is made from."""
        root = self.script.parent
        library = [] if self.bundled else sorted(root.glob("golf/**/*.py"))
        return {path.relative_to(root).as_posix(): file_sha256(path) for path in [self.script, *library]}

    def run_tool(self, name: str, *arguments: str | Path) -> int | None:
        """Runs a tool and returns its exit status; None where the tool is absent.

            Tools are not part of the code that a submission ships; a run without them goes on.
            """
        return None


# ---- golf/model/init.py ----------------------------------------------------------------------------------------------

"""Initialises weights as a function of the configuration and the seed alone, the same on every device."""

def build_model(config: ModelConfig, seed: int, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """Returns a GPT on the CPU with its initial weights."""
    model = GPT(config, compute_dtype)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.tok_emb.weight, std=config.tied_embed_init_std, generator=generator)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            init_matrix(module.weight, name, config, generator)
    if model.knowledge is not None:  # the size of normalised embeddings, which they stand among
        nn.init.normal_(model.knowledge, generator=generator)
    return model


def init_matrix(weight_OI: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Initialises a matrix as `matrix_init` says.

    orthogonal: orthogonal, with the matrices that write into the stream scaled by 1/sqrt(2L) (the stream sums 2L of
    them); orthogonal_zero: the blocks' at zero. uniform: torch's default for Linear, with the blocks' output matrices
    at zero (the baseline's). The bigram's projection is never zero: its table is, and zero times zero would have no
    gradient for ever.
    """
    if name == 'head':
        nn.init.normal_(weight_OI, std=config.tied_embed_init_std, generator=generator)
    else:
        gain = 1 / math.sqrt(2 * config.num_layers) if name.endswith('proj') else 1.0
        nn.init.orthogonal_(weight_OI, gain=gain, generator=generator)


# ---- golf/optim/optimizers.py ----------------------------------------------------------------------------------------

"""Assigns each parameter its optimizer: matrices train by Muon, tables and vectors by AdamW.

PARAMETER_GROUPS defines the groups as data: a module names its weight's group, a group how its optimizer is built. The
gradients of all lie in one tensor, so that reducing and clipping them are a few kernels each. Muon takes momentum, then
the nearest (semi-)orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon); it stacks matrices, so
that the Newton-Schulz iteration is a few large batched products; under torchrun each rank iterates on its share.

M matrices of a stack, R rows, C columns, N numbers of several tensors, K rows of them.
"""

gather_updates = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Has a new name since torch 2.13, which warns of the old one."""


BY_MUON_ITERATION: dict[str, tuple[tuple[float, float, float], ...]] = {'quintic': ((3.4445, -4.775, 2.0315),)}
"""Coefficients a, b, c of each iteration a X + b (X X^T) X + c (X X^T)^2 X; the last ones go on. quintic: Jordan et al.
2024; polar_express: Amsel et al. 2025 (arXiv 2505.16932), by parameter-golf pull request 1787."""


def newton_schulz(x_MRC: Tensor, steps: int, iteration: str = "quintic") -> Tensor:
    """Drives all singular values of every matrix towards 1 with quintic iterations.

    Costs least where R <= C. Zeros around a matrix stay zeros.
    """
    x_MRC = x_MRC / (x_MRC.norm(dim=2).norm(dim=1)[:, None, None] + 1e-7)
    coefficients = BY_MUON_ITERATION[iteration]
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram_MRR = x_MRC @ x_MRC.mT
        diagonal_RR = x_MRC.new_full((x_MRC.size(1),), a).diag()
        x_MRC = (diagonal_RR + b * gram_MRR + c * (gram_MRR @ gram_MRR)) @ x_MRC
    return x_MRC


def turned(like: Tensor, x_RC: Tensor) -> Tensor:
    """Returns `x_RC`, transposed where `like` has more rows than columns."""
    return x_RC.mT if like.size(0) > like.size(1) else x_RC


def place_of(like: Tensor, x_RC: Tensor) -> Tensor:
    """Returns the view of a matrix of a stack, which may be larger, that holds a matrix in the shape of `like`."""
    rows, columns = sorted(like.shape)
    return turned(like, x_RC.narrow(0, 0, rows).narrow(1, 0, columns))


def orthogonal_updates(stacks: list[tuple[list[Tensor], Tensor, Tensor]], momentum: Tensor, optim: OptimConfig, padding_N: Tensor) -> Tensor:
    """Adds each stack of gradients to its momentum_MRC; returns the orthogonalised updates one after the other, and
    `padding_N`, in whose dtype they are computed."""
    parts = []
    for own, momentum_MRC, turned_M11 in stacks:
        _, rows, columns = momentum_MRC.shape
        nesterov_MRC = torch.stack([F.pad(turned(x, x), (0, columns - max(x.shape), 0, rows - min(x.shape))) for x in own])
        momentum_MRC.mul_(momentum).add_(nesterov_MRC)
        nesterov_MRC.addcmul_(momentum_MRC, momentum)
        update_MRC = newton_schulz(nesterov_MRC.to(padding_N.dtype), optim.muon_ns_steps, optim.muon_iteration)
        parts += [(max(x.shape) / x.size(1)) ** 0.5 * x.flatten() for x in map(place_of, own, update_MRC)]
    return torch.cat([*parts, padding_N])


def compiled_on_gpu(function: Callable, runtime: Runtime) -> Callable:
    """Returns a function compiled, but for a CPU, where it takes a minute and saves nothing, as it is."""
    return torch.compile(function, dynamic=False, fullgraph=True) if runtime.compiles_scoring else function


class Muon(torch.optim.SGD):
    """Updates W <- (1 - lr wd) W - lr sqrt(max(1, R/C)) NewtonSchulz(Nesterov momentum of the gradient).

    Gradients must be averaged over ranks already. Iterates in bf16 on CUDA, where it is fastest and one stack for all
    shapes the fewest kernels; in fp32 and by shapes on CPU. SGD does the last part of the rule, but not fused:
    that would hide from grids that a weight has changed. A step needs the group's "muon_momentum".
    """

    def __init__(self, matrices: list[Tensor], config: OptimConfig, runtime: Runtime):
        matrices = sorted(matrices, key=lambda matrix: sorted(matrix.shape), reverse=True)
        self.config, self.ranks = config, runtime.world_size
        self.update = compiled_on_gpu(orthogonal_updates, runtime)
        shares = [matrices[rank :: self.ranks] for rank in range(self.ranks)]
        sizes = [sum(map(Tensor.numel, share)) for share in shares]
        for share, size in zip(shares, sizes, strict=True):  # all ranks send equally much
            share.append(torch.zeros(max(sizes) - size, device=runtime.device))
        *own, padding_N = shares[runtime.rank]
        self.order, self.padding_N = sum(shares, []), padding_N.to(runtime.compute_dtype)
        super().__init__(self.order, config.matrix_lr, weight_decay=config.muon_weight_decay, foreach=True)
        self.stacks = []
        for _, group in groupby(own, lambda matrix: matrix.is_cuda or sorted(matrix.shape)):
            stack = list(group)
            rows, columns = min(stack[0].shape), max(max(matrix.shape) for matrix in stack)
            momentum_MRC = torch.zeros(len(stack), rows, columns, device=runtime.device)
            turned_M11 = torch.stack([torch.full((1, 1), len(x) > x.size(1), device=runtime.device) for x in stack])
            self.stacks.append((stack, momentum_MRC, turned_M11))
            for matrix, x_RC in zip(stack, momentum_MRC, strict=True):
                self.state[matrix]["momentum"] = place_of(matrix, x_RC)

    @torch.no_grad()
    def step(self):
        gradients = [([matrix.grad for matrix in stack], *rest) for stack, *rest in self.stacks]
        momentum = torch.tensor(self.param_groups[0]["muon_momentum"])
        updates_N = own_N = self.update(gradients, momentum, self.config, self.padding_N)
        if self.ranks > 1:
            updates_N = own_N.new_empty(self.ranks * len(own_N))
            gather_updates(updates_N, own_N)
        set_gradients(self.order, updates_N.float())
        super().step()


def set_gradients(parameters: list[Tensor], flat_N: Tensor) -> None:
    """Makes parts of a flat tensor, one after the other, the gradients of parameters."""
    parts = flat_N.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def muon_momentum(progress: float, config: OptimConfig) -> float:
    """Returns Muon's momentum: linear from its initial to its final value over a share of the budget."""
    warmup = config.muon_momentum_warmup_fraction
    share = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


def build_adamw(parameters: list[Tensor], lr: float, weight_decay: float, config: OptimConfig) -> torch.optim.AdamW:
    """Returns AdamW with the betas and epsilon that all its groups share."""
    betas, eps = (config.beta1, config.beta2), config.adam_eps
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=True)


PARAMETER_GROUPS = {
    "table": lambda own, c, runtime: build_adamw(own, c.embed_lr, c.embed_weight_decay, c),
    "matrix": Muon,
    "vector": lambda own, c, runtime: build_adamw(own, c.scalar_lr, c.scalar_weight_decay, c),
}
"""Makes the optimizer of each group that a module may name for its weight; parameters of modules that name none are in
"vector". The order is that of gradients in their message, and of updates."""


def parameters_of_group(model: GPT, trains_as: str) -> list[Tensor]:
    """Returns a group's parameters in the order of the model; frozen ones are in no group."""
    modules = [module for module in model.modules() if getattr(module, "trains_as", "vector") == trains_as]
    return [part for module in modules for part in module.parameters(recurse=False) if part.requires_grad]


class Optimizers:
    """Runs a model's optimizers under one learning-rate scale and one gradient clip."""

    def __init__(self, model: GPT, config: OptimConfig, runtime: Runtime):
        self.config, self.runtime, self.parameters = config, runtime, []
        self.all: list[torch.optim.Optimizer] = []
        for name, build in PARAMETER_GROUPS.items():
            own = parameters_of_group(model, name)
            self.parameters += own
            self.all.append(build(own, config, runtime))
        total = sum(map(Tensor.numel, self.parameters))
        self.gradients_KN = torch.zeros(total // 4096 + 1, 4096, device=runtime.device)
        self.message_N = self.gradients_KN.flatten().narrow(0, 0, total)

    def sum_gradients(self) -> None:
        """Sums the gradients over ranks in one fp32 message, and leaves views of it in their place."""
        torch.cat([parameter.grad.flatten() for parameter in self.parameters], out=self.message_N)
        self.runtime.sum_over_ranks(self.message_N)
        set_gradients(self.parameters, self.message_N)

    def step(self, progress: float, lr_scale: float) -> Tensor | None:
        """Sums gradients over ranks, clips them, updates every parameter and clears the gradients; returns their norm
        where it is clipped."""
        momentum = muon_momentum(progress, self.config)
        for optimizer in self.all:  # AdamW does not look at momentum
            optimizer.param_groups[0] |= {"lr": optimizer.defaults["lr"] * lr_scale, "muon_momentum": momentum}
        self.sum_gradients()
        clip = self.config.grad_clip_norm
        norm = compiled_on_gpu(clip_gradients, self.runtime)(self.gradients_KN, clip) if clip > 0 else None
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def state_tensors(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Returns all state as optimizer.<parameter>.<entry>; of Muon's, only what this rank holds."""
        return {
            f"optimizer.{names[parameter]}.{entry}": value.contiguous()
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for entry, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor], names: dict[Tensor, str]) -> None:
        """Restores state from state_tensors' output, which may include entries of every rank."""
        for optimizer in self.all:
            # Another rank's momentum would become stale here and be saved again.
            held = optimizer.state if isinstance(optimizer, Muon) else optimizer.param_groups[0]["params"]
            for parameter in held:
                start = f"optimizer.{names[parameter]}."
                for key, value in tensors.items():
                    if key.startswith(start):
                        optimizer.state[parameter].setdefault(
                            key.removeprefix(start), value.to(parameter.device)
                        ).copy_(value)


def clip_gradients(gradients_KN: Tensor, most: float) -> Tensor:
    """Scales gradients to a norm of at most `most`; returns the norm that they had."""
    norm = gradients_KN.norm(dim=1).norm()  # in one go, an fp32 sum of a million squares is off by 1e-5
    gradients_KN.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def momentum_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether the momentum was still below its final value in a step, and the effect."""
    momentum = muon_momentum(facts.progress, config.optim)
    rises = momentum != config.optim.muon_momentum
    return rises, f"momentum from {config.optim.muon_momentum_start} to {momentum:.4f}" if rises else ""


def clip_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step's gradients were clipped, and the effect."""
    norm, most = facts.gradient_norm, config.optim.grad_clip_norm
    cut = norm is not None and norm > most
    return cut, f"norm {norm:.3f} cut to {most}" if cut else ""


register_feature(
    Feature(
        "muon_momentum_warmup",
        lambda config: (
            config.optim.muon_momentum_warmup_fraction > 0
            and config.optim.muon_momentum_start != config.optim.muon_momentum
        ),
        "set muon_momentum_warmup_fraction=0",
        momentum_acts,
    )
)
register_feature(
    Feature(
        "grad_clip", lambda config: config.optim.grad_clip_norm > 0, "lower grad_clip_norm, or set it to 0", clip_acts
    )
)


# ---- golf/optim/prefix_target.py -------------------------------------------------------------------------------------

"""Teaches the beginning of a token beside the token: a second target in the first part of the training.

The second target of a token is the vocabulary's longest piece that is a proper prefix of it. It costs no parameter and
no byte of the artifact, since the same logits serve (modded-nanogpt, record 88).

B batch, T time, V vocabulary.
"""


# ---- golf/optim/schedule.py ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Limits training to `iterations` steps and `seconds` seconds; 0 means no limit of that kind."""

    iterations: int
    seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """Returns the share used up after `step` steps and `elapsed` seconds, of whichever limit is nearer."""
        by_steps = step / self.iterations if self.iterations else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def exhausted(self, step: int, elapsed: float, step_seconds: float) -> bool:
        """Returns True when one more step of `step_seconds` would go past a limit."""
        out_of_steps = self.iterations > 0 and step >= self.iterations
        return out_of_steps or (self.seconds > 0 and elapsed + step_seconds > self.seconds)


def training_budget(config: Config) -> Budget:
    """Returns the budget of optimizer steps: the wall clock's cap less what calibration will need of it."""
    seconds = config.train.max_wallclock_seconds
    if seconds:
        assert seconds > config.quant.calibration_reserve
        seconds -= config.quant.calibration_reserve
    return Budget(config.train.iterations, seconds)


def learning_rate_scale(progress: float, config: TrainConfig) -> float:
    """Returns 1, then falls over the last `warmdown_fraction` of the budget: 0.5 (1 + cos(pi t)) or 1 - t, to 0 or to
    `warmdown_floor`; after a change to longer rows it rises again from 0."""
    scale = 1.0
    if progress >= 1 - config.warmdown_fraction and config.warmdown_fraction > 0:
        t = (progress - (1 - config.warmdown_fraction)) / config.warmdown_fraction
        scale = 0.5 * (1 + math.cos(math.pi * t))
    return scale


def warmdown_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step's learning rate was below its peak, and the effect."""
    scale = learning_rate_scale(facts.progress, config.train)
    return scale < 1, f"learning rate down to {scale:.4f} of its height" if scale < 1 else ""


register_feature(
    Feature(
        "warmdown", lambda config: config.train.warmdown_fraction > 0, "train longer, or set warmdown_fraction=0",
        warmdown_acts,
    )
)  # fmt: skip


# ---- golf/run/proofs.py ----------------------------------------------------------------------------------------------

"""Verifies that the training step, as it is compiled, has the features that are on.

B batch rows, T time.
"""

MOST_BATCHES = 100
"""Most batches to search for one that can show a feature."""


def verify_features(
    audit: FeatureAudit, facts: StepFacts, forward: Callable, model: GPT, batches: Callable[[], Iterator[Batch]],
    at_start: bool,
) -> Iterable[str]:  # fmt: skip
    """Verifies features at the start (or the end) of training; yields a line for each whose effect was not seen.

    Considers those that are verified at that time and act in such a step. `batches` starts over at each call.
    """
    for name, feature in audit.features.items():
        shown = feature.without or feature.verify_step
        if not shown or feature.verified_at_start != at_start or not feature.in_step(audit.config, facts)[0]:
            continue
        holds, effect = verify_feature(feature, forward, model, batches())
        audit.verify(name, holds, effect)
        if not holds:
            yield f"feature audit: the compiled step does not show {name} ({effect}): this run is INVALID"


def verify_feature(feature: Feature, forward: Callable, model: GPT, batches: Iterator[Batch]) -> Verdict:
    """Compares the compiled loss of a batch with that of the model, and with that of the model without the feature."""
    fits = feature.shows_in or (lambda model, ids_BT: True)
    batch = next((batch for _, batch in zip(range(MOST_BATCHES), batches, strict=False) if fits(model, batch[0])), None)
    if batch is None:
        return False, f"no row of {MOST_BATCHES} batches can show it"
    if feature.verify_step:
        return feature.verify_step(forward, model, batch)
    compiled = forward(*batch).item()
    with torch.no_grad():
        on = model(*batch).item()
        with feature.without(model):
            off = model(*batch).item()
    effect = f"loss with it {on:.6f}, without {off:.6f}, compiled {compiled:.6f}"
    return abs(compiled - on) < abs(off - on) / 2, effect


# ---- golf/run/trainer.py ---------------------------------------------------------------------------------------------

"""Trains the model: steps under a budget, on a clock that counts nothing but training.

B batch rows, T time.
"""

STEP_MARGIN = 1.5
"""Multiple of the longest of the last hundred steps that a step may take, so that a slow step still ends within the
cap."""


class TrainingError(UserError):
    """Reports a training that can't continue."""


@dataclass(frozen=True)
class StepReport:
    """Describes one finished step, for the log, the metrics file and the progress line."""

    step: int
    train_loss: float
    elapsed: float
    """Seconds on the training clock."""
    progress: float
    """Share of the budget that is used up."""
    lr_scale: float


def new_trainer(config: Config, runtime: Runtime, stream: TokenStream) -> 'Trainer':
    """Returns a trainer of a new model with its initial weights and activation quantizers.

    Raises ConfigError where the device can't run the model's attention.
    """
    model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
    return Trainer(install_activation_quantizers(model), config, runtime, stream)


class Trainer:
    """Trains a model with its optimizers, average and clock."""

    def __init__(self, model: GPT, config: Config, runtime: Runtime, stream: TokenStream, clock: Stopwatch | None=None):
        self.model, self.config, self.runtime = (model, config, runtime)
        ordered = order_stream(stream, config.data.row_order, config.model.bos_id, config.run.seed)
        self.batches = BatchPrefetcher(ordered, config.train.train_batch_tokens, config.model.train_seq_len, runtime.rank, runtime.world_size, runtime.device, config.data.row_order)
        for length in self.seq_lens():
            model.keep_rotary(length)
        self.objective = model
        compiled = runtime.compiles
        self.forward = torch.compile(self.objective, dynamic=False, fullgraph=True) if compiled else self.objective
        self.optimizers = Optimizers(model, config.optim, runtime)
        self.average = new_average(config.average)
        self.budget = training_budget(config)
        self.micro_steps = count_micro_steps(config, runtime.world_size)
        self.clock = clock or Stopwatch()
        self.recent_seconds: deque[float] = deque([0.0], maxlen=100)
        self.audit = FeatureAudit(config)
        self.fake_quantized, self.row_grids, self.seq_len = (False, RowGrids(), config.model.train_seq_len)
        self.step = 0
        self.lost_seconds = 0.0
        'Training time that kills wasted: it is on the clock, its steps are not in the weights.'
        self.stop_agreed = False
        self.runs_ahead, self.waits = (runtime.device.type == 'cuda', True)
        'Whether a step may be queued before the last is read, and whether whoever takes the reports wants none.'
        self.queued: deque[tuple[int, StepFacts, float, Tensor, torch.Event]] = deque()
        'Number, facts but for the norm, learning-rate scale, loss and norm, and end of each step not yet read.'

    def warm_up(self) -> None:
        """Compiles and touches everything that training will run, then restores weights and optimizers."""
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        model, train = self.model, self.config.train
        changes = self.config.quant.qat_start, train.short_seq_fraction, train.middle_seq_fraction, train.loop_start
        phases = {self.phase(share) for share in (0.0, *changes)}
        for fake_quantized, self.seq_len, model.looping in sorted(phases, reverse=True):
            self.set_fake_quantization(fake_quantized)
            for step in range(train.warmup_steps):
                self.accumulate_gradients(step)
                self.optimizers.step(progress=0.0, lr_scale=0.0)
                self.runtime.print(f"warmup_step:{step + 1}/{train.warmup_steps}")
            self.model.load_state_dict(before)
            self.verify_features(at_start=True)
            self.model.load_state_dict(before)
        self.optimizers = Optimizers(self.model, self.config.optim, self.runtime)

    def seq_lens(self) -> list[int]:
        """Returns the lengths that rows have in training."""
        train = self.config.train
        return list(filter(None, (train.short_seq_len, train.middle_seq_len, self.config.model.train_seq_len)))

    def phase(self, progress: float) -> tuple[bool, int, bool]:
        """Returns (whether weights pass through the export grid, tokens in a row, whether blocks repeat) at a share of
            the budget."""
        quant, train, seq_len = (self.config.quant, self.config.train, self.config.model.train_seq_len)
        looping = True
        return (quant.qat_enabled and progress >= quant.qat_start, seq_len, looping)

    def verify_features(self, at_start: bool) -> None:
        """Verifies that the step, as it is compiled now, has the features that are on."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return (batch for step in range(MOST_BATCHES) for batch in self.micro_batches(step))

        for line in verify_features(self.audit, self.facts(1.0), self.forward, self.model, batches, at_start):
            self.runtime.print(line)

    def facts(self, progress: float) -> StepFacts:
        return StepFacts(progress, self.seq_len, self.fake_quantized, None)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns inputs_BT and targets_BT of each forward pass of `step`, which has the same tokens for every row
        length."""
        parts = (part_BT.view(-1, self.seq_len).chunk(self.micro_steps) for part_BT in self.batches.get(step))
        return zip(*parts, strict=True)

    def set_fake_quantization(self, wanted: bool) -> None:
        self.fake_quantized = wanted

    def accumulate_gradients(self, step: int) -> Tensor:
        """Leaves this rank's part of the gradient of `step` in .grad; returns its share of the mean loss."""
        self.row_grids.renew()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for inputs_BT, targets_BT in self.micro_batches(step):
            loss = self.forward(inputs_BT, targets_BT)
            (loss / (self.micro_steps * self.runtime.world_size)).backward()
            loss_sum += loss.detach()
        return loss_sum / (self.micro_steps * self.runtime.world_size)

    def steps(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
        """Trains until the budget is used up, and yields a report of each step.

        Where nothing is `queued` then, the state is that of the step, and the clock stands still. On CUDA, unless
        `waits` is set, the next step is queued before the numbers of the last are read: the device never waits for the
        host, the clock goes on, and of the budget one more step is kept free.

        Once any rank's `stop_requested` returns True, `stop_agreed` is set on all of them, after the same step.
        """
        elapsed = self.clock.seconds
        while True:
            steps = len(self.queued)
            over = self.budget.exhausted(self.step, elapsed, (steps + 1) * STEP_MARGIN * max(self.recent_seconds))
            if not over and steps <= (self.runs_ahead and not self.waits):
                self.queue_step(elapsed)
            elif steps:
                report = self.read_step(elapsed, stop_requested())
                elapsed = report.elapsed
                yield report
            else:
                return

    def queue_step(self, elapsed: float) -> None:
        """Starts a step and the copy of its numbers to the host; `elapsed` is the last time that ranks agreed on."""
        progress = self.budget.progress(self.step, elapsed)
        if self.queued:  # the weights of the step before are there now, and not when its numbers are read
            self.average.observe_step(self.model, progress, self.step, self.audit)
        else:
            self.clock.start()
        loss, norm, lr_scale = self.take_step(progress)
        numbers_N = torch.stack([loss] if norm is None else [loss, norm.double()]).to("cpu", non_blocking=True)
        done = torch.get_device_module(self.runtime.device).Event()
        done.record()
        self.step += 1
        self.queued.append((self.step, self.facts(progress), lr_scale, numbers_N, done))

    def read_step(self, elapsed: float, stop: bool) -> StepReport:
        """Waits for the oldest queued step, and agrees with the other ranks on loss and time in one message."""
        step, facts, lr_scale, numbers_N, done = self.queued.popleft()
        done.synchronize()
        loss, norm = (*numbers_N.tolist(), None)[:2]
        loss, now, stop = self.runtime.values_of_ranks(loss, self.clock.seconds, stop)
        loss, now, self.stop_agreed = sum(loss), max(now), any(stop)
        progress = self.budget.progress(step, now)
        if not self.queued:
            self.average.observe_step(self.model, progress, step, self.audit)
            self.clock.stop()
        self.recent_seconds.append(now - elapsed)
        if not math.isfinite(loss):  # the loss is the same on every rank, so all stop
            raise TrainingError(f"the loss is {loss} at step {step}: lower matrix_lr or embed_lr")
        self.audit.note_step(step, replace(facts, gradient_norm=norm))
        return StepReport(step, loss, now, progress, lr_scale)

    def take_step(self, progress: float) -> tuple[Tensor, Tensor | None, float]:
        """Returns (this rank's share of the loss, norm of gradients where they are clipped, learning-rate scale)."""
        fake_quantized, self.seq_len, self.model.looping = self.phase(progress)
        self.set_fake_quantization(fake_quantized)
        train_loss = self.accumulate_gradients(self.step)
        lr_scale = learning_rate_scale(progress, self.config.train)
        norm = self.optimizers.step(progress, lr_scale)
        return (train_loss, norm, lr_scale)

    def finish(self) -> None:
        """Ends training: the last weights count in the average, even if the cap came early."""
        self.verify_features(at_start=False)
        self.batches.close()
        self.set_fake_quantization(False)
        if self.step != self.average.last_step:
            self.average.observe_step(self.model, 1.0, self.step, self.audit)

    def state(self) -> TrainingState:
        """Returns all the state that resuming after the last step needs."""
        assert not self.queued
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = self.optimizers.state_tensors(names) | generator_tensors()
        if self.runtime.is_main:  # equal on every rank
            tensors |= {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
            tensors |= {f"average.{name}": mean for name, mean in self.average.mean.items()}
        numbers = {
            "step": self.step,
            "elapsed": self.clock.seconds,
            "lost_seconds": self.lost_seconds,
            "recent_seconds": list(self.recent_seconds),
            "average": [self.average.count, self.average.seen, self.average.last_step],
            "features": self.audit.record(),
        }
        return TrainingState(tensors, numbers)

    def load_state(self, state: TrainingState, latest: float) -> None:
        """Resumes from `state`, with the clock at `latest`, the last reading of a process that was killed later."""
        tensors, numbers = state.tensors, state.numbers
        self.model.load_state_dict(tensors_under("model.", tensors))
        means = tensors_under("average.", tensors)
        self.average.mean = {name: mean.to(self.runtime.device) for name, mean in means.items()}
        self.average.count, self.average.seen, self.average.last_step = numbers["average"]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizers.load_state_tensors(tensors, names)
        restore_generators(tensors)
        self.step, self.clock.total = numbers["step"], max(numbers["elapsed"], latest)
        self.lost_seconds = numbers["lost_seconds"] + self.clock.total - numbers["elapsed"]
        self.recent_seconds.extend(numbers["recent_seconds"])
        self.audit = FeatureAudit(self.config, features_of(numbers))


def count_micro_steps(config: Config, world_size: int) -> int:
    """Returns forward passes per step and rank: the fewest equal parts that fit in `micro_batch_tokens`.

    Raises ConfigError where the rows can't be divided equally among the ranks.
    """
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


@dataclass(frozen=True)
class ScoreSums:
    """Holds what a range of windows adds to the score. Ranges add up, in any order, on any rank."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


class ScoreJournal:
    """Keeps one rank's lines: the identity of the scoring, then chunks in order with their sums and seconds.

    Sums are written with all digits, so that a scoring in parts adds up the same numbers in the same order.
    """

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self.identity: dict[str, Any] | None = json.loads(lines[0]) if lines else None
        rows = [json.loads(line) for line in lines[1:]]
        self.chunks = [row for row in rows if "nats" in row]
        self.preparing = [row["preparing"] for row in rows if "preparing" in row]
        """Seconds that each process took before its first chunk."""
        self.file: TextIO | None = None

    def start(self, identity: Mapping[str, Any], preparing: float = 0.0) -> None:
        """Continues the journal if its identity is the same, else begins it anew. `preparing` seconds preceded."""
        if self.identity != identity:
            self.identity, self.chunks, self.preparing = dict(identity), [], []
        self.preparing += [preparing] if preparing else []
        rows = [self.identity, *({"preparing": seconds} for seconds in self.preparing), *self.chunks]
        write_file_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.path.open("a", encoding="utf-8")

    def sums_of(self, begin: int, end: int) -> ScoreSums | None:
        """Returns the sums of windows begin .. end - 1, or None where they are not scored yet."""
        row = next((row for row in self.chunks if (row["begin"], row["end"]) == (begin, end)), None)
        return ScoreSums(row["nats"], row["tokens"], row["bytes"]) if row else None

    def add(self, begin: int, end: int, sums: ScoreSums, seconds: float) -> None:
        self.chunks.append({"begin": begin, "end": end, **asdict(sums), "seconds": seconds})
        with naming(self.path):
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

"""Reads the bytes of each validation token from files of their own, beside the shards.

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
    """Holds the bytes of each token of one stream, by position: it counts that stream, or its beginning."""

    bytes_N: np.ndarray | torch.Tensor

    def to(self, device: torch.device | str) -> "StreamBytes":
        """Returns the same as an int32 tensor on `device`."""
        return StreamBytes(torch.from_numpy(self.bytes_N.astype(np.int32)).to(device))

    def of_targets(self, tokens: int) -> np.ndarray | torch.Tensor:
        """Returns the bytes of the targets in the first `tokens` tokens of the stream: all of them but the first."""
        if tokens > len(self.bytes_N):
            raise DataError(f"{tokens} tokens to score, but bytes of {len(self.bytes_N)}: {SIDECAR_ADVICE}")
        return self.bytes_N[1:tokens]


def sidecar_path(val_path: str | Path) -> Path | None:
    """Returns where a validation shard's bytes are, if there are any; None for a file of bytes and any other name."""
    name = Path(val_path).name
    found = re.sub(r"_val_(\d{6}\.bin)$", r"_val_bytes_\1", name)
    return None if found == name else Path(val_path).with_name(found)


def without_sidecars(paths: Sequence[str | Path]) -> list[str | Path]:
    """Returns `paths` without files of bytes, which a pattern like `*_val_*.bin` matches too."""
    return [path for path in paths if not re.search(r"_val_bytes_\d{6}\.bin$", str(path))]


def read_sidecar(val_paths: Sequence[str | Path]) -> np.ndarray | None:
    """Reads the bytes of every token of the shards, uint16 (N,); None where no shard has any. Raises DataError."""
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
    """Returns what counts the bytes of the validation stream: its shards' sidecar, or `table` where there is none.

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
    """Counts the bytes of a stream by a table, in pieces that don't make gigabytes of int64."""
    starts = range(0, len(tokens_N) - 1, COUNTED_AT_ONCE)
    pieces = (tokens_N[start : start + COUNTED_AT_ONCE + 1] for start in starts)
    return sum(int(table.count(piece_P[:-1], piece_P[1:]).sum()) for piece_P in pieces)


def manifest_total(folder: Path, val_paths: Sequence[str | Path]) -> int | None:
    """Reads the validation bytes in a folder's manifest; None without one, or where these are not all shards."""
    path = folder / "manifest.json"
    if not path.is_file() or sorted(map(Path, val_paths)) != find_shards(folder, "val"):
        return None
    try:
        return parse_json(path.read_bytes())["splits"]["val"]["bytes"]
    except (KeyError, TypeError):  # someone else's manifest
        return None
    except ValueError:
        raise DataError(f"{path}: damaged, it holds no JSON: {SIDECAR_ADVICE}") from None


# ---- golf/score/progress.py ------------------------------------------------------------------------------------------

"""Reports scoring time: a forecast after the first batches, progress."""

FORECAST_BATCHES = 4
"""Batches that the forecast is measured on, after one that warms up."""


class ScoreProgress:
    """Reports forecast and progress of the main rank's windows: one updating line on a terminal, ten lines in a
    file."""

    def __init__(self, runtime: Runtime, windows: int, window_length: int, share: int):
        self.runtime, self.windows, self.window_length, self.share = runtime, windows, window_length, share
        self.line = ProgressLine(shown=runtime.is_main)
        self.started = self.warm_at = time.perf_counter()
        self.batches = self.done = self.skipped = self.warm_windows = self.tenths = 0

    def skip(self, windows: int) -> None:
        """Counts `windows` of this rank's share that an earlier process scored."""
        self.done += windows
        self.skipped += windows

    def advance(self, windows: int) -> None:
        """Counts `windows` more of this rank's share, which were sent to the device."""
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
        """Prints the time that all windows will take, at the speed of the batches since the warm one."""
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

"""Assigns the targets of a token stream to the windows that score them.

A stream of N + 1 tokens has N targets; target t is token t + 1, predicted from the tokens up to t. A window [start,
end) reads tokens start .. end - 1 as input and may score the targets start .. end - 1. Window 0 scores all of its own;
window k ends S targets further on (the last one at N) and scores what no earlier window has: each target is scored
exactly once, the tail included, and every target but those of window 0 is predicted from at least L - S + 1 tokens. A
stride of L is the plain evaluation in rows.

Letters: N targets of the stream, W windows, L window length, S stride.
"""

class WindowError(UserError):
    """Reports a stream that no window fits, or a stride that would leave targets out."""


@dataclass(frozen=True)
class WindowPlan:
    """Lists the windows of one stream, in order; each scores the targets [first_scored, end)."""

    length: int
    """Tokens of every window: the length asked for, or the whole stream where that is shorter."""
    stride: int
    """Most targets scored by a window other than the first."""
    starts_W: np.ndarray
    ends_W: np.ndarray
    first_scored_W: np.ndarray

    def __len__(self) -> int:
        return len(self.ends_W)


def plan_windows(targets: int, length: int, stride: int) -> WindowPlan:
    """Plans windows of at most `length` tokens over a stream of `targets` targets. Raises WindowError.

    Window k ends at min(L + k S, N) and has full length, so the last one overlaps more instead of being shorter: all
    windows have one shape, and one compiled graph serves them.
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


def stream_documents(tokens_N1: np.ndarray, bos_id: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of each document's targets; the next document's start is the last of them."""
    starts = np.flatnonzero(tokens_N1[:-1] == bos_id)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens_N1) - 1], strict=True))


def rank_share(windows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns the contiguous [begin, end) of `windows` that `rank` scores; shares differ by one window at most."""
    assert 0 <= rank < world_size
    return windows * rank // world_size, windows * (rank + 1) // world_size


# ---- golf/score/scorer.py --------------------------------------------------------------------------------------------

"""Scores a token stream in bits per byte. Every figure of the project comes from here.

bits per byte = sum of nats / ln 2 / bytes, over every target of the stream, each scored once (windows.py). Sums are
float64; targets and bytes are whole numbers, exact in float64 up to 2^53.

Letters: B windows of a batch, T tokens of a window, S scored positions (the last S of T), N targets of the stream, W
windows of the stream.
"""


CHUNKS = 100
"""Parts in which a rank's scoring is journaled."""


class ScoreError(UserError):
    """Reports a stream or settings that no honest score can be made from."""


@dataclass(frozen=True)
class ScoreSettings:
    """Sets how a stream is cut into windows, and the RoPE base in them."""

    seq_len: int
    stride: int
    batch_seqs: int
    """Windows of one forward pass on one rank."""
    rope_base: float | None = None
    """RoPE base; None: the model's own."""


@dataclass(frozen=True)
class Score:
    """Holds the score of a whole stream, over all ranks."""

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
    """Wall clock of the slowest rank, with the journaled seconds of killed processes."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What adaptive scoring says of its parts, by name: `network_bpb` is the score without the mixture with counts."""

    @property
    def val_loss(self) -> float:
        """Returns nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class ScoreJob:
    """Holds one stream on the device, with all that scoring a range of its windows needs."""

    model: nn.Module
    forward: Forward
    settings: ScoreSettings
    plan: WindowPlan
    documents: int
    """Document starts in the stream."""
    tokens_N1: Tensor
    """int32, shape (N + 1,)."""
    bytes_N: Tensor
    """int32 bytes of text that each target stands for."""
    ends_W: Tensor
    first_scored_W: Tensor


@dataclass(frozen=True)
class WindowBatch:
    """Holds the input of one forward pass, and marks which of its losses count."""

    ids_BT: Tensor
    targets_BS: Tensor
    index_BS: Tensor
    """Number of each target in the stream."""
    counted_BS: Tensor
    """False for targets that an earlier window scored, and for rows that only fill up the batch."""


def sliding_settings(score: ScoreConfig, model: ModelConfig) -> ScoreSettings:
    """Returns the final evaluation's settings: overlapping windows, NTK-aware RoPE beyond the training length."""
    scaled_base = ntk_rope_base(model.rope_base, score.eval_seq_len, model.train_seq_len, rotary_dims(model))
    rope_base = scaled_base
    return ScoreSettings(score.eval_seq_len, score.eval_stride, score.eval_batch_seqs, rope_base)


def plain_settings(model: ModelConfig, batch_seqs: int) -> ScoreSettings:
    """Returns settings for evaluation in rows of the training length, without overlap."""
    return ScoreSettings(model.train_seq_len, model.train_seq_len, batch_seqs)


def compiled_losses(model: GPT) -> Forward:
    """Returns model.token_losses compiled as one graph of one shape."""
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
    recorder: Recorder | None = None,
) -> Score:
    """Scores every target of `tokens` (N + 1 integers, a document start first) once, over all ranks.

    `forward` replaces `model.token_losses` for the windows that share a shape (pass its compiled form); `announce`
    prints a forecast of the time and progress. Chunks that a started `journal` holds are not scored again; `check` is
    called between chunks, and may raise; a `recorder` gets what this process scores. Raises ScoreError.
    """
    started = time.perf_counter()
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    progress = ScoreProgress(runtime, len(job.plan), job.plan.length, end - begin) if announce else None
    earlier_seconds = journal.seconds if journal else 0.0
    with evaluation_mode(model):
        local = score_chunks(job, begin, end, progress, journal, check, recorder)
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
    )


def prepare_job(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    device: torch.device,
    forward: Forward | None = None,
) -> ScoreJob:
    """Moves a stream to the device, with its windows and the bytes of its targets. Raises ScoreError."""
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
    """Raises ScoreError where a score would be meaningless."""
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
    """Returns int32 bytes of each target: by position where the stream has a sidecar, else given the token before it.

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
    """Sets eval mode and disables gradients within the context, then restores every module's own mode.

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
    """Divides windows begin .. end - 1 into about CHUNKS ranges that cut between batches."""
    rows = min(job.settings.batch_seqs, len(job.plan))
    size = rows * max(1, -(-(end - begin) // (rows * CHUNKS)))
    alone = 1 if begin == 0 and job.plan.length > job.plan.stride else 0  # the long first window is a batch of its own
    cuts = [begin, *range(begin + alone + size, end, size), end]
    return ((first, last) for first, last in pairwise(cuts) if first < last)


def score_chunks(
    job: ScoreJob,
    begin: int,
    end: int,
    progress: ScoreProgress | None,
    journal: ScoreJournal | None,
    check: Callable[[], None],
    recorder: Recorder | None,
) -> ScoreSums:
    """Returns the sums of windows begin .. end - 1 on this rank, chunk by chunk, in evaluation_mode."""
    total = ScoreSums()
    for first, last in chunk_ranges(job, begin, end):
        sums, started = journal.sums_of(first, last) if journal else None, time.perf_counter()
        if sums and progress:
            progress.skip(last - first)
        if sums is None:
            sums = score_windows(job, first, last, progress, recorder)
            if journal:
                journal.add(first, last, sums, time.perf_counter() - started)
            check()
        total += sums
    return total


def score_windows(
    job: ScoreJob,
    begin: int,
    end: int,
    progress: ScoreProgress | None = None,
    recorder: Recorder | None = None,
) -> ScoreSums:
    """Returns the sums of windows begin .. end - 1 on this rank alone, in evaluation_mode."""
    assert not any(module.training for module in job.model.modules()), "scoring needs eval mode: evaluation_mode"
    sums_3 = torch.zeros(3, dtype=torch.float64, device=job.tokens_N1.device)
    for first, last, rows, scored in batch_shapes(job, begin, end):
        sums_3 += score_batch(job, gather_windows(job, first, last, rows, scored), recorder)
        if progress:
            progress.advance(last - first)
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


def batch_shapes(job: ScoreJob, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (first window, last window + 1, rows, scored positions) of the passes over windows begin .. end - 1.

    Window 0 scores more than a stride, so it goes alone; all other passes have one shape.
    """
    if begin == 0 < end and job.plan.length > job.plan.stride:
        yield 0, 1, 1, job.plan.length
        begin = 1
    rows = min(job.settings.batch_seqs, len(job.plan))
    for first in range(begin, end, rows):
        yield first, min(first + rows, end), rows, job.plan.stride


def gather_windows(job: ScoreJob, first: int, last: int, rows: int, scored: int) -> WindowBatch:
    """Returns windows first .. last - 1, filled up to `rows` with copies of the last one, which don't count."""
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


def score_batch(job: ScoreJob, batch: WindowBatch, recorder: Recorder | None = None) -> Tensor:
    """Returns float64 (nats, targets, bytes) of one forward pass."""
    assert not job.model.training, "the model left eval mode while it was being scored"
    # a compiled forward keeps its one shape: the long first window would make it compile again, for dynamic shapes
    forward = job.forward if batch.targets_BS.size(1) == job.plan.stride else job.model.token_losses
    nats_BS = forward(batch.ids_BT, batch.targets_BS, job.settings.rope_base).double()
    if recorder:
        recorder(batch.index_BS[batch.counted_BS], nats_BS[batch.counted_BS])
    nats = nats_BS.masked_fill(~batch.counted_BS, 0.0).sum()
    byte_count = (job.bytes_N[batch.index_BS] * batch.counted_BS).sum()
    return torch.stack((nats, batch.counted_BS.sum().double(), byte_count.double()))


def sum_sums(local: ScoreSums, runtime: Runtime) -> ScoreSums:
    """Returns the sums over all ranks."""
    values = (local.nats, local.tokens, local.bytes)
    sums_3 = runtime.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=runtime.device))
    nats, tokens, byte_count = sums_3.tolist()
    return ScoreSums(nats, int(tokens), int(byte_count))


def ntk_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (windows scored with the scaled base, whether it changes a row's nats, the change)."""
    effect = files["reload"]["ntk_effect"]
    return files["score"]["eval_windows"], effect > 0, f"changes a token's nats by up to {effect:.3g}"


register_feature(
    Feature("ntk_rope", lambda config: config.score.eval_rope == "ntk", "set eval_rope=none", in_files=ntk_acts)
)


# ---- golf/run/log_lines.py -------------------------------------------------------------------------------------------

"""Formats log lines as the competition does, so that its readers understand our logs."""

def quantization_name(quant: QuantConfig) -> str:
    """Returns int8 where MLP and attention share a width, int5int6 where they do not; waterfill for that quantizer."""
    return 'waterfill'


def opening_lines(trainer: Trainer, data: TrainingData, folder: RunFolder) -> list[str]:
    config, runtime = trainer.config, trainer.runtime
    model, train, optim, average, quant = config.model, config.train, config.optim, config.average, config.quant
    shapes = {name: tuple(parameter.shape) for name, parameter in trainer.model.named_parameters()}
    parameters, covered = sum(map(prod, shapes.values())), quantized_parameters(shapes, quant)
    return [
        f"{folder.log}",
        f"preset:{config.run.preset} config_hash:{config_hash(config)} data_id:{data.data_id} "
        f"tokenizer_sha256:{data.tokenizer.sha256} code_sha256:{file_sha256(folder.code)}",
        "knobs changed from the preset: "
        + (" ".join(f"{knob}={value}" for knob, value in changed_knobs(config).items()) or "none"),
        f"machine:{machine_description(runtime)} compute:{runtime.compute_dtype} compile:{runtime.compiles} "
        f"python:{platform.python_version()} torch:{torch.__version__}",
        *([f"compile=auto goes on uncompiled: {runtime.compile_fault}"] if runtime.compile_fault else []),
        determinism_line(runtime),
        f"val_bpb:enabled tokenizer_kind={data.tokenizer.kind} tokenizer_path={config.data.tokenizer_path}",
        f"train_loader:dataset:{config.data.data_path} train_shards:{data.shards}",
        f"val_loader:shards pattern={config.data.data_path}/*_val_*.bin, closed until the artifact is scored",
        f"model_params:{parameters}",
        f"quantized_params:{covered} ({covered / parameters:.1%}; the rest is exported as fp16)",
        *low_bit_lines(model, quant),
        f"world_size:{runtime.world_size} grad_accum_steps:{trainer.micro_steps}",
        f"attention_mode:gqa num_heads:{model.num_heads} num_kv_heads:{model.num_kv_heads}",
        f"tie_embeddings:{model.tie_embeddings} embed_lr:{optim.embed_lr} head_lr:0.0 matrix_lr:{optim.matrix_lr} "
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


def determinism_line(runtime: Runtime) -> str:
    """Returns a line that says whether another run of the same steps ends in the same bytes."""
    return f"deterministic:no ({runtime.nondeterminism})" if runtime.nondeterminism else "deterministic:yes"


def low_bit_lines(model: ModelConfig, quant: QuantConfig) -> list[str]:
    """Returns a line with the quantizers of single sites and other changes of the model, where there are any."""
    return []


def step_line(report: StepReport, config: Config) -> str:
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} train_loss:{report.train_loss:.4f} "
        f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / report.step:.2f}ms"
    )


def stop_line(report: StepReport, config: Config) -> str:
    """Returns the line that says that the clock, not the number of steps, ended the training."""
    milliseconds = 1000 * report.elapsed
    return f"stopping_early: wallclock_cap train_time:{milliseconds:.0f}ms step:{report.step}/{config.train.iterations}"


def holdout_line(score: Score, report: StepReport, config: Config) -> str:
    """Returns a line on the last weights, before averaging and quantization, scored on training text.

    It is not the artifact's score.
    """
    milliseconds = 1000 * report.elapsed
    return (
        f"step:{report.step}/{config.train.iterations} holdout_loss:{score.val_loss:.4f} "
        f"holdout_bpb:{score.val_bpb:.4f} train_time:{milliseconds:.0f}ms"
    )


def progress_text(report: StepReport, config: Config) -> str:
    """Returns the text of the terminal's progress line."""
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
    """Returns lines that say how the artifact is about to be scored."""
    score = config.score
    scaled = f" ({'NTK-scaled'} RoPE, {score.eval_seq_len} tokens)"
    longer = [f'eval_seq_len:{score.eval_seq_len}{scaled}'] if score.eval_seq_len > model.train_seq_len else []
    return [*longer, f'final_eval_mode:sliding_window stride:{score.eval_stride} batch_seqs:{score.eval_batch_seqs}']


def final_lines(score: Score, quant: QuantConfig) -> list[str]:
    name = f"final_{quantization_name(quant)}_{quant.codec}_roundtrip"
    return [
        f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms",
        f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}",
    ]


def partial_line(journal: ScoreJournal) -> str:
    """Returns a line with the sums of an interrupted scoring so far, which says that they are no score."""
    done = journal.sums
    return f"score:partial tokens:{done.tokens} nats:{done.nats:.4f} of this process, no score: go on with --resume"


def result_line(result: Mapping[str, Any]) -> str:
    """Returns the last line of a log, with the figures of result.json."""
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


# ---- golf/run/parity.py ----------------------------------------------------------------------------------------------

"""Checks parity: the trained model on its grid, the reloaded artifact and the scorer agree on one row of text."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of a token's nats, by compute dtype."""


class ParityError(UserError):
    """Reports two forms of one model that score the same text differently."""


@torch.no_grad()
def parity_row(weights: Mapping[str, Tensor] | None, stored: QuantizedState, config: Config, ids: list[int], runtime: Runtime) -> dict[str, Any]:
    """Returns parity.json's content: a row of training text and its tokens' nats under the trained weights.

    They run through the forward pass and the grid of training, rounded to fp16 where they are stored as fp16. Without
    `weights`, or with quantizer=waterfill, the stored weights give the nats.
    """
    model = load_gpt(config.model, dequantize_state(stored), runtime)
    return {'ids': ids, 'losses': row_losses(model, ids).tolist()}


@torch.no_grad()
def row_losses(model: GPT, ids: list[int]) -> Tensor:
    """Returns fp32 nats of every token but the first."""
    ids_1T = torch.tensor([ids], device=model.skip_weights.device)
    return model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:])[0].cpu()


@torch.no_grad()
def ntk_effect(model: GPT, record: Mapping[str, Any], score: ScoreConfig) -> float:
    """Returns the largest change of a token's nats in the row under the scaled RoPE base; 0 where none is used."""
    ids_1T = torch.tensor([record["ids"]], device=model.skip_weights.device)
    scaled_base = sliding_settings(score, model.config).rope_base
    plain_1T, scaled_1T = (model.token_losses(ids_1T[:, :-1], ids_1T[:, 1:], base) for base in (None, scaled_base))
    return (plain_1T - scaled_1T).abs().max().item()


def check_parity(model: GPT, record: Mapping[str, Any], byte_table: ByteTable, runtime: Runtime) -> dict[str, float]:
    """Returns the row's mean nats under the trained model, the reloaded one and the scorer. Raises ParityError."""
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


# ---- golf/score/counts.py --------------------------------------------------------------------------------------------

"""Predicts targets from counts of what was scored before, mixed with the network's probabilities: score first.

Contexts are the last 0 to K tokens of a document, counted in two scopes: over all that was scored, and in the document.
Four distributions are mixed, each normalised over the vocabulary, so that their mixture is:

    the network's;
    counts of everything: interpolated absolute discounting (Ney, Essen, Kneser 1994), from uniform up to order K;
    counts of the document, which fall back on the former;
    the network's, corrected by the counts of orders 1 to K one after another, with learned shares.

Shares and weights are learned online, by the gradient of each target's log-probability, after the target was scored. A
context is known by a hash of its own tokens alone; its successors are a list, in which the target is looked for.
Nothing depends on a target before it is scored. Loops are plain Python, which numba compiles (`compiled_kernels`).

M targets.
"""

DISCOUNT = 0.6
"""Taken from every count, for what the context has not been followed by. 0.75 gives 0.001 bits per byte more."""
RATE = 0.1
"""Step size of shares and weights. 0.02 and 0.05 are worse."""
COUNT_LEVELS, SPREADS, HITS = 10, 4, 12
"""Classes of a context's count, of its distinct successors, and of the last target's probability."""


class CountTables(NamedTuple):
    """Holds the contexts of one scope by hash, and a list of successors for each, the latest first."""

    keys: np.ndarray
    """uint64 hashes of contexts in open addressing, 0 where there is none; a power of two of them."""
    slots: np.ndarray
    """Number of the context in each slot."""
    total: np.ndarray
    distinct: np.ndarray
    first: np.ndarray
    """Each context's first entry, -1 where it has none."""
    token: np.ndarray
    count: np.ndarray
    following: np.ndarray
    used: np.ndarray
    """int64 (contexts, entries)."""


class MixtureWeights(NamedTuple):
    """Holds what is learned online, as logits."""

    share: np.ndarray
    """Of a context's counts in the corrected distribution: scope, order, class of count, class of distinct."""
    share_by_hit: np.ndarray
    share_by_token: np.ndarray
    """Scope and last token."""
    seen: np.ndarray
    """Times that an entry of `share` was trained."""
    weight: np.ndarray
    """Of the four distributions, by the longest known context over all and in the document."""
    weight_by_hit: np.ndarray
    weight_by_token: np.ndarray
    hit: np.ndarray
    """The class of the last target's probability, int64 (1,)."""


def new_tables(targets: int, orders: int) -> CountTables:
    """Returns empty tables with room for the contexts of orders 0 to `orders` of so many targets."""
    room = targets * (orders + 1) + 1
    slots = 1 << int(2 * room - 1).bit_length()
    whole = [np.zeros(room, np.int32) for _ in range(4)]
    return CountTables(
        np.zeros(slots, np.uint64), np.zeros(slots, np.int32), whole[0], whole[1], np.full(room, -1, np.int32),
        whole[2], whole[3], np.full(room, -1, np.int32), np.zeros(2, np.int64),
    )  # fmt: skip


def new_weights(orders: int, vocabulary: int) -> MixtureWeights:
    """Returns weights that trust a context the more, the oftener it was seen and the fewer successors it had."""
    seen = np.arange(COUNT_LEVELS)[:, None] + 0.5
    trust = seen * (0.8 - 0.2 * np.arange(SPREADS)) / (seen + 1)
    share = np.broadcast_to(np.log(trust / (1 - trust)), (2, orders + 1, COUNT_LEVELS, SPREADS))
    return MixtureWeights(
        share.copy(), np.zeros((2, orders + 1, HITS)), np.zeros((2, vocabulary)), np.zeros(share.shape),
        np.zeros((orders + 2, orders + 2, 4)), np.zeros((HITS, 4)), np.zeros((vocabulary, 4)),
        np.zeros(1, np.int64),
    )  # fmt: skip


def mix_hash(key, token):
    """Returns the hash of a context with one more token, never 0."""
    key = (key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return (key ^ (key >> np.uint64(32))) | np.uint64(1)


def find_context(tables, key):
    """Returns the number of a context, a new one where it is not known yet."""
    mask = np.uint64(len(tables.keys) - 1)
    slot = (key >> np.uint64(7)) & mask
    while tables.keys[slot] != key:
        if tables.keys[slot] == 0:
            tables.keys[slot], tables.slots[slot] = key, tables.used[0]
            tables.used[0] += 1
            break
        slot = (slot + np.uint64(1)) & mask
    return tables.slots[slot]


def count_successor(tables, context, target):
    """Returns how often the target followed the context."""
    entry = tables.first[context]
    while entry >= 0 and tables.token[entry] != target:
        entry = tables.following[entry]
    return tables.count[entry] if entry >= 0 else 0


def count_target(tables, context, target):
    """Counts the target behind the context, and moves it to the front of its list."""
    entry, before = tables.first[context], -1
    while entry >= 0 and tables.token[entry] != target:
        before, entry = entry, tables.following[entry]
    if entry < 0:
        entry = tables.used[1]
        tables.used[1] += 1
        tables.token[entry] = target
        tables.distinct[context] += 1
    elif before >= 0:
        tables.following[before] = tables.following[entry]
    if tables.first[context] != entry:
        tables.following[entry] = tables.first[context]
        tables.first[context] = entry
    tables.count[entry] += 1
    tables.total[context] += 1


def count_level(total):
    """Returns the class of a context's count: 0 to 4 themselves, then up to 6, 10, 20, 60 and above."""
    if total <= 4:
        return total
    return 5 + (total > 6) + (total > 10) + (total > 20) + (total > 60)


def spread_of(total, distinct):
    """Returns the class of a context's distinct successors: one, up to a fourth of its count, up to half, more."""
    if distinct == 1:
        return 0
    return 1 + (4 * distinct > total) + (2 * distinct > total)


def hit_class(probability):
    """Returns the class of the last target's probability, in powers of two."""
    return int(min(HITS - 1.0, max(0.0, np.log2(probability) + HITS - 1)))


def look_up_contexts(scopes, contexts, found, tokens, target):
    """Fills `found` (scope, order, (total, distinct, count of the target)) for the contexts before `target`, the token
    behind `tokens`; returns the longest order whose contexts stay in the document."""
    longest, key = min(contexts.shape[1] - 1, len(tokens)), np.uint64(1)
    for order in range(longest + 1):
        if order:
            key = mix_hash(key, tokens[len(tokens) - order])
        for scope in range(2):
            tables = scopes[scope]
            context = find_context(tables, mix_hash(key, order))
            contexts[scope, order] = context
            found[scope, order, 0] = tables.total[context]
            found[scope, order, 1] = tables.distinct[context]
            found[scope, order, 2] = count_successor(tables, context, target)
    return longest


def discounted_probability(found, longest, probability):
    """Returns the target's probability by the counts of one scope, which fall back order by order on `probability`."""
    for order in range(longest + 1):
        total, distinct, count = found[order]
        if total > 0:
            probability = (max(count - DISCOUNT, 0.0) + DISCOUNT * distinct * probability) / total
    return probability


def longest_known(found, longest):
    """Returns 1 + the longest order that has been counted, 0 where none has: a known context knows its own ends."""
    known = 0
    for order in range(longest + 1):
        if found[order, 0] > 0:
            known = order + 1
    return known


def correct_probability(found, longest, hit, last, weights, probability):
    """Returns the network's `probability` of the target corrected by its counts; trains the shares.

    No share may change before the last is used: it would know the target.
    """
    by_token = weights.share_by_token[0, last], weights.share_by_token[1, last]
    for order in range(1, longest + 1):
        for scope in range(2):
            total, distinct, count = found[scope, order]
            if total == 0:
                continue
            counted = max(count - DISCOUNT, 0.0) / (total - DISCOUNT * distinct)
            level, spread = count_level(total), spread_of(total, distinct)
            logit = weights.share[scope, order, level, spread] + weights.share_by_hit[scope, order, hit]
            share = 1 / (1 + np.exp(-logit - by_token[scope]))
            mixed = (1 - share) * probability + share * counted
            slope = (counted - probability) / mixed * share * (1 - share)
            weights.seen[scope, order, level, spread] += 1
            faster = max(RATE, 0.2 / np.sqrt(weights.seen[scope, order, level, spread] + 1))
            weights.share[scope, order, level, spread] += faster * slope
            weights.share_by_hit[scope, order, hit] += RATE * slope
            weights.share_by_token[scope, last] += RATE * slope
            probability = mixed
    return probability


def mix_probabilities(weight, weight_by_hit, weight_by_token, probability_4):
    """Returns the weighted mean of the four probabilities of the target, and trains the weights."""
    share_4 = np.exp(weight + weight_by_hit + weight_by_token)
    share_4 /= share_4.sum()
    mixed = (share_4 * probability_4).sum()
    slope_4 = RATE * share_4 * (probability_4 / mixed - 1)
    weight += slope_4
    weight_by_hit += slope_4
    weight_by_token += slope_4
    return mixed


def mixed_probability(scopes, weights, contexts, found, tokens, target, network):
    """Returns the mixture's probability of `target` behind `tokens`, given the network's; trains the weights."""
    longest = look_up_contexts(scopes, contexts, found, tokens, target)
    everything = discounted_probability(found[0], longest, 1.0 / len(weights.weight_by_token))
    document = discounted_probability(found[1], longest, everything)
    hit, last = weights.hit[0], tokens[len(tokens) - 1]
    corrected = correct_probability(found, longest, hit, last, weights, network)
    weight = weights.weight[longest_known(found[0], longest), longest_known(found[1], longest)]
    probability_4 = np.array([network, everything, document, corrected])
    return mix_probabilities(weight, weights.weight_by_hit[hit], weights.weight_by_token[last], probability_4)


def score_targets(everything, document, weights, tokens, begin, network_M, mixed_M):
    """Writes the mixture's probabilities of M targets of a document from `begin` on to `mixed_M`, given the network's:
    each is scored, then counted. `tokens` begin with the document's start."""
    scopes, orders = (everything, document), weights.share.shape[1] - 1
    contexts, found = np.zeros((2, orders + 1), np.int64), np.zeros((2, orders + 1, 3), np.int64)
    for m in range(len(network_M)):
        n = begin + m
        target = tokens[n + 1]
        mixed_M[m] = mixed_probability(scopes, weights, contexts, found, tokens[: n + 1], target, network_M[m])
        weights.hit[0] = hit_class(mixed_M[m])
        for order in range(min(orders, n + 1) + 1):
            for scope in range(2):
                count_target(scopes[scope], contexts[scope, order], target)


KERNELS = (
    mix_hash, find_context, count_successor, count_target, count_level, spread_of, hit_class, look_up_contexts,
    discounted_probability, longest_known, correct_probability, mix_probabilities, mixed_probability, score_targets,
)  # fmt: skip
"""Functions that call only those before them."""


@functools.cache
def compiled_kernels() -> dict[str, Any]:
    """Returns the functions of KERNELS by name, as machine code, which is kept beside the source where that is a file:
    a second in place of five. numba is imported here, where it is needed. Raises ImportError where it is missing."""
    from numba import njit

    names = dict(globals())
    for function in KERNELS:
        kept = os.path.exists(function.__code__.co_filename)
        names[function.__name__] = njit(FunctionType(function.__code__, names, function.__name__), cache=kept)
    return names


# ---- golf/score/mixture.py -------------------------------------------------------------------------------------------

"""Scores a stream by the mixture of golf/score/counts.py: the network's nats of all targets, then their documents.

The stream is cut at document starts into `mixture_parts` parts of about equal length. Each part begins with empty
counts, and ranks take parts in turn: the score is the same for any number of ranks.

N targets of a stream or of a document.
"""

TIMED_TARGETS = 20_000
TABLE_GROWTH = 3.0
"""Factor on the seconds of the first targets: tables outgrow the processor's caches. Of 119,000 targets it was 1.4."""
SECONDS_BETWEEN_MARKS = 1.0
"""Least time between two looks at the journal and the interruption."""


class NetworkNats:
    """Collects the network's nats of all targets that this rank scores, in a file where there is a journal.

    The file is kept up to date by the system: what a killed process had scored is there.
    """

    def __init__(self, targets: int, journal: ScoreJournal | None):
        self.path = journal and journal.path.with_suffix(".nats")
        if self.path is None:
            self.nats_N = np.zeros(targets)
        else:
            with self.path.open("ab" if journal.chunks else "wb") as file:  # new: zeros, which take no room yet
                file.truncate(8 * targets)
            self.nats_N = np.memmap(self.path, np.float64, "r+")

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        """Keeps the nats of targets by their numbers in the stream: a Recorder."""
        self.nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()

    def gather(self, total: float, runtime: Runtime) -> np.ndarray:
        """Returns nats_N of all ranks. Raises ScoreError where they don't add up to the `total` that was scored."""
        nats_N = runtime.sum_over_ranks(torch.from_numpy(np.array(self.nats_N)).to(runtime.device)).cpu().numpy()
        if not np.isclose(nats_N.sum(), total, rtol=1e-9):
            raise ScoreError(f"{self.path}: not the nats of this scoring: delete it and {self.path.stem}.jsonl")
        return nats_N


def stream_parts(tokens_N1: np.ndarray, bos_id: int, parts: int) -> list[list[tuple[int, int]]]:
    """Returns the documents of each part: a document belongs where it begins."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for begin, end in stream_documents(tokens_N1, bos_id):
        found[parts * begin // len(tokens_N1)].append((begin, end))
    return found


class CountMixture:
    """Predicts the targets of a part of at most so many targets, document by document, and counts them."""

    def __init__(self, targets: int, vocabulary: int, score: ScoreConfig):
        self.kernels, self.orders = compiled_kernels(), score.mixture_orders
        self.everything, self.weights = new_tables(targets, self.orders), new_weights(self.orders, vocabulary)
        self.document = self.everything

    def open_document(self, targets: int) -> None:
        """Forgets the counts of the last document, and makes room for those of the next."""
        self.document = new_tables(targets, self.orders)


    def score_targets(self, tokens: np.ndarray, begin: int, network_M: np.ndarray) -> np.ndarray:
        """Returns float64 nats_M of targets begin .. begin + M - 1 of the document, given the network's; counts them.

        `tokens` (int32) begin with the document's start.
        """
        mixed_M = np.zeros(len(network_M))
        self.kernels["score_targets"](
            self.everything, self.document, self.weights, tokens, begin, np.exp(-network_M), mixed_M
        )
        return -np.log(mixed_M)

    def score_document(self, tokens: np.ndarray, network_N: np.ndarray) -> np.ndarray:
        """Returns float64 nats_N of a whole document's targets, and counts them."""
        self.open_document(len(network_N))
        return self.score_targets(tokens, 0, network_N)


def score_documents(
    tokens_N1: np.ndarray, network_N: np.ndarray, documents: Sequence[tuple[int, int]], model: ModelConfig,
    score: ScoreConfig, mixed_N: np.ndarray, check: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Writes the mixture's nats of the documents of one part to `mixed_N`; calls `check` after each document."""
    mixture = CountMixture(sum(end - begin for begin, end in documents), model.vocab_size, score)
    for begin, end in documents:
        mixed_N[begin:end] = mixture.score_document(tokens_N1[begin : end + 1], network_N[begin:end])
        check()


def mixed_nats(
    tokens_N1: np.ndarray, network_N: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray:  # fmt: skip
    """Returns float64 nats_N of all targets by the mixture, on every rank, given the network's."""
    tokens_N1, mixed_N = tokens_N1.astype(np.int32), np.zeros(len(network_N))
    for documents in stream_parts(tokens_N1, model.bos_id, score.mixture_parts)[runtime.rank :: runtime.world_size]:
        score_documents(tokens_N1, network_N, documents, model, score, mixed_N, check)
    return runtime.sum_over_ranks(torch.from_numpy(mixed_N).to(runtime.device)).cpu().numpy()


def forecast_mixture(tokens_N1: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime) -> float:
    """Forecasts the slowest rank's seconds of `mix_score`, from the first targets, which are forgotten; compiles.
    Raises ScoreError where numba is missing."""
    first_N1 = tokens_N1[: TIMED_TARGETS + 1].astype(np.int32)
    network_N, documents = np.ones(len(first_N1) - 1), stream_documents(first_N1, model.bos_id)
    try:
        for _ in range(2):
            started = time.perf_counter()
            score_documents(first_N1, network_N, documents, model, score, np.zeros_like(network_N))
    except ImportError as error:
        raise ScoreError(f"mixture=1 needs numba ({error}): install requirements.txt, or set mixture=0") from error
    parts = -(-score.mixture_parts // runtime.world_size)
    share = len(tokens_N1) / len(first_N1) * parts / score.mixture_parts
    return runtime.max_over_ranks(TABLE_GROWTH * share * (time.perf_counter() - started))[0]


def mix_score(
    network: Score, nats: NetworkNats, tokens_N1: np.ndarray, model: ModelConfig, score: ScoreConfig, runtime: Runtime,
    journal: ScoreJournal | None = None, check: Callable[[], None] = lambda: None,
) -> Score:  # fmt: skip
    """Returns the mixture's score of the stream, given that of the network and its nats of single targets.

    A `journal` gets the seconds as they pass; then `check` is called, and may raise. Raises ScoreError.
    """
    started = marked = time.perf_counter()

    def mark() -> None:
        nonlocal marked
        if (seconds := time.perf_counter() - marked) > SECONDS_BETWEEN_MARKS:
            marked += seconds
            if journal:
                journal.add(0, 0, ScoreSums(), seconds)  # no windows: time alone
            check()

    mixed_N = mixed_nats(tokens_N1, nats.gather(network.nats, runtime), model, score, runtime, mark)
    seconds = runtime.max_over_ranks(time.perf_counter() - started)[0]
    mixed = replace(
        network,
        nats=float(mixed_N.sum()),
        parts=network.parts | {"network_bpb": network.val_bpb},
        seconds=network.seconds + seconds,
    )
    words = mixture_words(network.val_bpb, mixed.val_bpb)
    runtime.print(f"mixture: {words}; {network.tokens} targets in {seconds:.1f} s")
    return mixed


def mixture_words(alone: float, mixed: float) -> str:
    return f"{alone:.4f} bits per byte by the network alone, {mixed:.4f} with counts"


def mixture_acts(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (targets that were mixed, whether the score is another one, both scores)."""
    score = files["score"]
    alone, mixed = score["network_bpb"], score["val_bpb"]
    return score["val_tokens"], alone != mixed, mixture_words(alone, mixed)


register_feature(Feature("mixture", lambda config: config.score.mixture, "set mixture=0", in_files=mixture_acts))


# ---- golf/run/rehearsal.py -------------------------------------------------------------------------------------------

"""Dry-runs quantize, pack, reload and score on the untrained model, so that missing parts show before training."""

REHEARSED_ROWS = 4
STATE_COPIES = 12
"""Bytes on the disk for each fp32 byte of weights: three checkpoints of weights, optimizer state and average."""


class RehearsalError(UserError):
    """Reports that something is missing which the stages after training need."""


def quantize_once(trainer: Trainer) -> QuantizedState:
    """Returns the untrained weights in stored form, calibrated on a few rows where the run will calibrate."""
    config, state = (trainer.config, trainer.model.state_dict())
    alone = replace(trainer.runtime, rank=0, world_size=1)
    calibration = calibrate_run(state, config, trainer.batches.stream, alone, rows=REHEARSED_ROWS)
    search = LevelSearch(state, calibration.statistics, config.quant, config.model, log=lambda line: None, runtime=alone)
    return search.quantize(FIRST_GUESS)


def rehearse(trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder) -> str:
    """Quantizes, packs, reloads and scores a little training text at the real shapes; returns a line for the log.

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
    if config.score.mixture:
        forecast_mixture(tokens, config.model, config.score, replace(runtime, rank=0, world_size=1))
    return f"rehearsal: untrained artifact {sizes.total_bytes} bytes, {sums.nats / sums.tokens:.4f} nats per token"


# ---- golf/run/ledger.py ----------------------------------------------------------------------------------------------

"""Keeps the time ledger: every second of every process of a run belongs to exactly one phase."""

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
"""Budgets that a phase counts against: by the script's timers (the competition's habit), by the process's clock."""
IMPORTED_AT = time.monotonic()


def process_identity() -> tuple[str, float]:
    """Returns (a name that this process keeps when it replaces itself by exec, its age in seconds).

    Where there is no /proc the age counts from the import of this module.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(os.getpid()), time.monotonic() - IMPORTED_AT
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks since the boot
    return f"{os.getpid()}-{fields[19]}", time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Ledger:
    """Appends seconds by phase to a file whenever the phase changes, so that it includes killed processes."""

    def __init__(self, phase: str, now=time.monotonic, identity=process_identity):
        self.now, self.phase_name, self.path, self.identity = now, phase, None, identity
        self.session, age = identity()
        self.mark = now() - age
        self.rows: list[dict[str, Any]] = []

    def attach(self, path: Path) -> None:
        """Continues a run's file, which already holds what this process did before it replaced itself."""
        earlier = read_ledger(path)
        self.mark += sum(row["seconds"] for row in earlier if row["session"] == self.session)
        write_file_atomically(path, "".join(json.dumps(row) + "\n" for row in earlier))  # removes a torn last line
        self.path, self.rows, waiting = path, earlier, self.rows
        for row in waiting:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Writes down the phase in progress up to now."""
        now = self.now()
        self.write({"session": self.session, "phase": self.phase_name, "seconds": now - self.mark})
        self.mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Assigns the time inside the context to `name` alone."""
        assert name in PHASES, name
        self.flush()
        outer, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.flush()
            self.phase_name = outer

    def seconds(self, phase: str) -> float:
        return sum(row["seconds"] for row in self.rows if row["phase"] == phase)

    def summary(self) -> dict[str, Any]:
        """Returns the phases for result.json, and their sums under both conventions; flushes first."""
        self.flush()
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
    """Returns the rows of a ledger, without a last line that a killed process left half-written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ---- golf/run/session.py ---------------------------------------------------------------------------------------------

"""Runs a process's stages: skips finished ones, times each, restricts files and sockets, stops at a safe place.

stages.json lists the finished stages of a run, with the SHA-256 of every file that they wrote.
"""

STAGES = ("train", "average", "quantize", "pack", "reload", "score", "report")


class StageError(UserError):
    """Reports a stage whose files are not what it wrote, or a stage that can't start."""


class StageBook:
    """Records the finished stages of the run in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "stages.json"
        self.stages: dict[str, dict[str, str]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def finish(self, stage: str, outputs: Sequence[Path]) -> None:
        """Records that `stage` wrote these files, all of them on the disk."""
        assert stage in STAGES
        hashes = {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in outputs}
        self.stages[stage] = hashes
        write_file_atomically(self.path, json.dumps(self.stages, indent=2) + "\n")

    def require_before(self, stage: str) -> None:
        """Raises StageError unless the stage before `stage` is finished."""
        for before in STAGES[: STAGES.index(stage)][-1:]:
            if before not in self.stages:
                raise StageError(f"{self.folder}: stage {before} is not finished: go on with --resume")

    def verify(self, stage: str) -> None:
        """Raises StageError unless the files of a finished stage are as it wrote them."""
        for name, sha256 in self.stages[stage].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                state = "is not what" if path.is_file() else "is missing, which"
                raise StageError(f"{path} {state} stage {stage} left: bring the file back, or start a new run")


GRACE_SECONDS = 20.0
"""Seconds that one of several processes waits for the others before it exits: a lost one would block it in a
collective."""


class Interrupted(UserError):
    """Reports that the run was asked to stop; nothing is lost."""


class Interruption:
    """Records whether a signal asked for a stop.

    A second signal acts at once. Of several processes, none exits before its grace period is over (the launcher passes
    on a signal that they already received, while they are writing checkpoints).
    """

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
        """Raises Interrupted where a stop was asked for."""
        if self.requested:
            sys.stdout.flush()
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name} {where}")


LOST_PEER = re.compile("gloo|nccl|peer|socket|connection|TCPStore", re.IGNORECASE)


def explain_error(error: Exception, world_size: int) -> tuple[int, str]:
    """Returns (exit status, one line) for an error that is not a mistake of ours, (0, "") for one that is."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, str(error)
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return EXIT_MACHINE, "out of memory on the device: lower micro_batch_tokens or eval_batch_seqs; then --resume"
    if isinstance(error, OSError):
        return EXIT_MACHINE, f"{error}: mend that, then go on with --resume; what was written before is whole"
    if type(error).__name__ in ("BackendCompilerFailed", "InductorError"):  # of torch's private modules
        return EXIT_MACHINE, f"torch.compile failed ({explain_compile_error(error)}): start a run with compile=off"
    if isinstance(error, RuntimeError) and world_size > 1 and LOST_PEER.search(str(error)):
        first = str(error).strip().splitlines()[0][:200]
        return EXIT_MACHINE, f"another process of the run was lost ({first}); go on with --resume"
    return 0, ""


def take_lock(path: Path) -> TextIO:
    """Returns a lock that this process holds until it ends. Raises StageError while another process holds it."""
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not shared with forked workers
    except BlockingIOError:
        raise StageError(f"{path.parent} is at work in another process: wait for it, or end it") from None
    return lock


class StageResult(NamedTuple):
    """Holds the files that a stage wrote, and the value that it passes to the next one in this process."""

    outputs: Sequence[Path]
    value: Any = None


class Session:
    """Represents one process of a run; `open` binds it to the run's folder once that is known."""

    def __init__(self) -> None:
        self.log, self.guard, self.ledger, self.interruption = Log(), AccessGuard(), Ledger("setup"), Interruption()
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
        runtime.barrier()  # every rank must read the same book before a stage is added

    def do(self, stage: str, work: Callable[[], "StageResult"], together: bool = False) -> Any:
        """Runs a stage unless it is finished, on the main rank or on all together, and returns its value.

        The value is None where the stage was finished before: the next stage then reads its files.
        """
        if stage in self.book:
            return None
        self.interruption.check(f"before the {stage} stage; go on with --resume {self.folder.path.name}")
        if self.runtime.is_main:
            self.book.require_before(stage)
        self.guard.stage, result = stage, StageResult([])
        with self.ledger.phase({"reload": "load"}.get(stage, stage)):
            if together or self.runtime.is_main:
                result = work()
            if together:
                self.runtime.barrier()  # wait for the files of the other ranks
            if self.runtime.is_main:
                self.folder.save_access(self.guard)
                self.book.finish(stage, result.outputs)
            self.runtime.barrier()
        return result.value


# ---- golf/run/result.py ----------------------------------------------------------------------------------------------

"""Builds result.json: what a run measured, from the bytes on the disk, and the limits that its figures must keep."""

def run_findings(figures: Mapping[str, Any]) -> list[str]:
    """Returns one line for each limit that was broken and each probe that failed."""
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
    for change in figures.get("code_changes", []):
        done = ", ".join(change["stages"]) or "no stage"
        findings.append(f"the code was changed in the middle of the run (by code {change['from'][:12]}: {done})")
    for name, probe in figures["probes"].items():
        if probe["verdict"] == "FAIL":
            findings.append(f"legality probe {name} failed: {probe['detail']}")
    return findings


def training_record(trainer: Trainer, data_id: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of training.json: what the training measured."""
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
    """Returns the content of pruning.json: how many codes pruning and fitting changed, and what fitting did."""
    return {
        "pruned_codes": sum(tensor.codes_changed for tensor in fitted.prune_reports),
        "codes": sum(tensor.weights for tensor in fitted.prune_reports),
        "codes_not_nearest": fitted.codes_not_nearest,
        "fit_actions": fitted.actions,
    }


def score_record(score: Score, val_data_id: str, unquantized: Score) -> dict[str, Any]:
    """Returns the content of score.json: the artifact's score, and that of the weights before quantization."""
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
        **score.parts,
        "unquantized": {
            "val_loss": unquantized.val_loss,
            "val_bpb": unquantized.val_bpb,
            "note": "weights before pruning and quantization, in plain rows",
        },
    }


def full_audit(config: Config, session: Session) -> FeatureAudit:
    """Returns the feature audit of training and averaging, with what the later stages' files add."""
    folder = session.folder
    audit = FeatureAudit(config, folder.load_json(folder.effects))
    audit.note_files({name: folder.load_json(getattr(folder, name)) for name in ("pruning", "reload", "score")})
    return audit


def build_result(config: Config, session: Session, probed: bool) -> dict[str, Any]:
    """Returns all figures of the run; `findings` is empty when it is valid. `probed`: the legality probes ran."""
    folder, runtime = session.folder, session.runtime
    artifact, code = read_artifact(folder.artifact), folder.code.read_bytes()
    audit = full_audit(config, session)
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
        "deterministic": not runtime.nondeterminism,
        "nondeterminism": runtime.nondeterminism,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "resumes": len({row["session"] for row in session.ledger.rows}) - 1,
        "fingerprint": folder.load_json(folder.machine) if folder.machine.exists() else {},
        "features": audit.record(),
        "parity": folder.load_json(folder.reload)["parity"],
        "probes": folder.load_json(folder.probes) if folder.probes.exists() else {},
        "code_changes": folder.code_changes_list(),
        "ledger": session.ledger.summary(),
    }
    broken = [] if probed else ["tools/check_run.py could not probe the score; see its message"]
    findings = [*audit.findings(), *run_findings(figures), *broken]
    return figures | {"valid": not findings, "findings": findings}


# ---- golf/run/stages.py ----------------------------------------------------------------------------------------------

"""Implements the stages that runs and studies share: from trained weights to codes and bytes."""

SETTLING = 0.25
"""Seconds of the cap that calibration leaves for the sums of all ranks."""


def seconds_left(config: Config, train_seconds: float) -> float:
    """Returns the seconds of the wall clock's cap that calibration may take; math.inf without a cap."""
    cap = config.train.max_wallclock_seconds
    return cap - train_seconds - SETTLING if cap else math.inf


def quantize_weights(saved: SavedWeights, config: Config, stream: TokenStream, runtime: Runtime, train_seconds: float, room: float, calibrating: Callable[[], AbstractContextManager]=nullcontext) -> tuple[FittedArtifact | None, dict[str, Any]]:
    """Returns the artifact of trained weights within `room` bytes (math.inf: no limit), and its calibration's record.

    quantizer=rtn: codes of training's grid, coarser where the artifact would be too large; waterfill: codes that fill
    the limit with the least loss, after calibration on all ranks (within `calibrating`) in what `train_seconds` leaves
    of the cap. The artifact is None on all ranks but the main one. Raises FitError, QuantError.
    """
    given = (saved.state, config.quant, config.model, saved.tokenizer_sha256, room, config.run.reserve_bytes)
    with calibrating():
        calibration = calibrate_run(saved.state, config, stream, runtime, seconds_left(config, train_seconds))
    fitted = fill_limit(calibration.statistics, *given, runtime.print, runtime)
    return (fitted if runtime.is_main else None, calibration.record)


# ---- golf/run/train_loop.py ------------------------------------------------------------------------------------------

"""Loops over the training steps: logs, evaluates held-out text, writes checkpoints, and resumes from them."""

LAST_CHECKPOINT = 0.99
"""Share of the budget after which only the end writes one: the time of a copy would go past the cap."""


def take_up_checkpoint(trainer: Trainer, folder: RunFolder) -> None:
    """Resumes from the newest checkpoint, if there is one; the clock always resumes from its last reading."""
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
    """Trains until the budget is used up, with periodic checkpoints. Raises Interrupted, after a last checkpoint."""
    config, runtime, folder = trainer.config, trainer.runtime, session.folder
    progress, saved_at, report = ProgressLine(shown=runtime.is_main), trainer.clock.seconds, None

    def holds_out(step: int) -> bool:
        return config.train.holdout_every > 0 and step % config.train.holdout_every == 0

    for report in trainer.steps(lambda: session.interruption.requested):
        log_step(report, trainer, folder, progress)
        due = 0 < config.run.checkpoint_seconds <= report.elapsed - saved_at and report.progress < LAST_CHECKPOINT
        trainer.waits = due or trainer.stop_agreed or holds_out(report.step + 1)
        if trainer.queued:  # the state is no longer this step's
            continue
        if holds_out(report.step):
            with session.ledger.phase("hold out"):
                eval_holdout(trainer, data, report, folder)
        if trainer.stop_agreed:
            progress.clear()
            writer.write(trainer.state(), report.step)
            writer.close()
            runtime.barrier()  # a launcher ends all ranks when the first one exits
            session.interruption.check(f"after step {report.step}; go on with --resume {folder.path.name}")
            raise Interrupted(f"another process was stopped after step {report.step}")
        if due:
            with trainer.clock:  # the copy delays training, so it counts
                writer.write(trainer.state(), report.step)
            saved_at = report.elapsed
            session.ledger.flush()
    progress.clear()
    if report and not 0 < config.train.iterations <= report.step:
        runtime.print(stop_line(report, config))


def log_step(report: StepReport, trainer: Trainer, folder: RunFolder, progress: ProgressLine) -> None:
    """Writes a row of metrics, and periodically a line for the log."""
    config = trainer.config
    if trainer.runtime.is_main:
        folder.append_metrics(asdict(report))
        progress.update(progress_text(report, config))
    if report.step <= 10 or report.step % config.train.train_log_every == 0:
        progress.clear()
        trainer.runtime.print(step_line(report, config))


def eval_holdout(trainer: Trainer, data: TrainingData, report: StepReport, folder: RunFolder) -> None:
    """Scores the current weights on held-out training text; this is not the artifact's score."""
    config, runtime, model = trainer.config, trainer.runtime, trainer.config.model
    rows = max(1, config.train.eval_batch_tokens // model.train_seq_len // runtime.world_size)
    tokens = data.stream.held_out_tokens(model.bos_id)
    table, settings = ByteTable(data.tokenizer), plain_settings(model, rows)
    score = score_stream(trainer.model, tokens, table, settings, runtime, announce=False)
    runtime.print(holdout_line(score, report, config))
    if runtime.is_main:
        folder.append_metrics({"step": report.step, "elapsed": report.elapsed, "holdout_loss": score.val_loss})
    trainer.audit.count("holdout", report.step)
    trainer.audit.verify("holdout", score.nats > 0, f"{score.val_loss:.4f} nats per held-out token")


# ---- golf/score/adapters.py ------------------------------------------------------------------------------------------


ADAPTED = ("attn.c_k", "attn.proj", "mlp.fc", "mlp.proj")
"""Matrices that are changed, by the ends of their names. Queries and values are not (pull request 1953)."""
BETAS = 0.9, 0.99
SHORTEST = 4
"""The first chunk of a document is a fourth of the others, so that short documents are learned from too."""


class Chunk(NamedTuple):
    """Describes what a lane scores in a step: targets first .. last - 1 of the stream."""

    document: int
    first: int
    last: int
    window_end: int
    """One behind the last token of its window. It does not say where the document ends, which nobody knows before."""
    opens: bool
    """Whether it is the first of its document."""
    closes: bool


def chunk_size(place: int, size: int) -> int:
    """Returns the size of the chunk that begins at a place in its document."""
    return min(size, max(size // SHORTEST, 1, place))


def document_chunks(number: int, begin: int, end: int, size: int) -> Iterator[Chunk]:
    """Yields a document's chunks: of size/4, size/4, size/2, and then `size` targets. They do not depend on its
    length."""
    first = begin
    while first < end:
        window_end = first + chunk_size(first - begin, size)
        last = min(end, window_end)
        yield Chunk(number, first, last, window_end, first == begin, last == end)
        first = last


def lane_steps(documents: Sequence[tuple[int, int]], lanes: int, size: int) -> Iterator[list[Chunk | None]]:
    """Yields each step's chunks, by lane; None for a lane that has no document left."""
    every = iter(enumerate(documents))
    work: list[Iterator[Chunk]] = [iter(())] * lanes
    while True:
        step: list[Chunk | None] = []
        for lane in range(lanes):
            chunk = next(work[lane], None)
            if chunk is None and (document := next(every, None)):
                work[lane] = document_chunks(document[0], *document[1], size)
                chunk = next(work[lane])
            step.append(chunk)
        if not any(step):
            return
        yield step


class Adapters:
    """Holds a low-rank change of every adapted matrix for each lane, and their optimizer: Adam, with a clock a lane."""

    def __init__(self, model: GPT, score: ScoreConfig):
        self.model, self.score, lanes = model, score, score.adapter_lanes
        device = model.skip_weights.device
        self.modules = [
            module for name, module in model.named_modules() if isinstance(module, Linear) and name.endswith(ADAPTED)
        ]
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = [], []
        for module in self.modules:
            width_out, width_in = module.weight.shape
            start_RI = (2 * torch.rand(score.adapter_rank, width_in, generator=generator) - 1) / width_in**0.5
            self.down.append(start_RI.repeat(lanes, 1, 1).to(device).requires_grad_())
            self.up.append(torch.zeros(lanes, width_out, score.adapter_rank, device=device, requires_grad=True))
        self.starts = [part[0].detach().clone() for part in self.down]
        self.parameters = [*self.down, *self.up]
        self.moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in self.parameters]
        self.clock_B11 = torch.zeros(lanes, 1, 1, device=device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Adds each lane's change to the matrices' outputs within the context; gradients are on."""

        def change(down_BRI: Tensor, up_BOR: Tensor) -> Callable:
            def hook(module: Linear, inputs: tuple[Tensor], y_BTO: Tensor) -> Tensor:
                x_BTI = inputs[0]
                return y_BTO + (x_BTI @ down_BRI.mT.to(x_BTI.dtype)) @ up_BOR.mT.to(x_BTI.dtype)

            return hook

        handles = [
            module.register_forward_hook(change(down_BRI, up_BOR))
            for module, down_BRI, up_BOR in zip(self.modules, self.down, self.up, strict=True)
        ]
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def forget(self, lane: int) -> None:
        """Begins anew in a lane."""
        for down_BRI, start_RI in zip(self.down, self.starts, strict=True):
            down_BRI[lane] = start_RI
        for part in (*self.up, *(moment for pair in self.moments for moment in pair), self.clock_B11):
            part[lane] = 0

    def learn(self, loss_B: Tensor) -> None:
        """Takes an optimizer step on each lane's loss; one that is 0 teaches nothing."""
        gradients = torch.autograd.grad(loss_B, self.parameters, torch.ones_like(loss_B))
        with torch.no_grad():
            self.clock_B11 += 1
            shrink_B11, shrink_squares_B11 = (1 - beta**self.clock_B11 for beta in BETAS)
            for part, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square(), 1 - BETAS[1])
                step = mean / shrink_B11 / ((square / shrink_squares_B11).sqrt() + 1e-8)
                part -= self.score.adapter_lr * step


class LaneScorer:
    """Scores chunks by lanes: predicts, reports, learns."""

    def __init__(self, model: GPT, tokens_N1: Tensor, settings: ScoreSettings, score: ScoreConfig):
        self.model, self.settings, self.adapters = model.requires_grad_(False), settings, Adapters(model, score)
        filler_T = torch.full((settings.seq_len,), model.config.bos_id, dtype=tokens_N1.dtype, device=tokens_N1.device)
        self.padded_N1 = torch.cat((filler_T, tokens_N1, filler_T))  # token t of the stream is at T + t

    def batch(self, step: Sequence[Chunk | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns (ids_BT, targets_BS, index_BS of the targets in the stream, counted_BS)."""
        length, device = self.settings.seq_len, self.padded_N1.device
        spans = [(chunk.first, chunk.last, chunk.window_end) if chunk else (0, 0, 0) for chunk in step]
        first_B1, last_B1, end_B1 = torch.tensor(spans, device=device).T[..., None]
        index_BS = end_B1 + torch.arange(-self.settings.stride, 0, device=device)
        ids_BT = self.padded_N1[end_B1 + torch.arange(length, device=device)].long()
        targets_BS = self.padded_N1[index_BS + length + 1].long()
        return ids_BT, targets_BS, index_BS, (index_BS >= first_B1) & (index_BS < last_B1)

    def step(self, step: Sequence[Chunk | None], recorder: Recorder, learned: Recorder | None = None) -> None:
        """Scores a chunk in each lane, then learns from it; `learned` hears of it afterwards."""
        for lane, chunk in enumerate(step):
            if chunk and chunk.opens:
                self.adapters.forget(lane)
        ids_BT, targets_BS, index_BS, counted_BS = self.batch(step)
        with self.adapters.attached():
            losses_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base)
            loss_B = (losses_BS * counted_BS).sum(1) / counted_BS.sum(1).clamp(min=1)
        nats_BS = losses_BS.detach().double()
        recorder(index_BS[counted_BS], nats_BS[counted_BS])
        self.adapters.learn(loss_B)
        if learned:
            learned(index_BS[counted_BS], nats_BS[counted_BS])

    def effect(self, documents: Sequence[tuple[int, int]]) -> float:
        """Returns by how many nats, at most, a step on a document's first chunk changes a target of the second: of the
        first document that has two."""
        for number, document in enumerate(documents):
            first, *more = islice(document_chunks(number, *document, self.settings.stride), 2)
            if more:
                idle = [None] * (len(self.adapters.clock_B11) - 1)
                self.step([first, *idle], lambda index_M, nats_M: None)
                ids_BT, targets_BS, _, counted_BS = self.batch([*more, *idle])
                plain_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base)
                with self.adapters.attached():
                    adapted_BS = self.model.token_losses(ids_BT, targets_BS, self.settings.rope_base).detach()
                return float(((adapted_BS - plain_BS) * counted_BS).abs().max())
        return 0.0


# ---- golf/score/adapted.py -------------------------------------------------------------------------------------------

"""Scores a stream with a network that adapts to each document (golf/score/adapters.py).

Ranks take documents in turn. N targets of the stream.
"""

TIMED_STEPS = 4


class DocumentSums:
    """Keeps the nats of single targets until their documents are whole."""

    def __init__(self, bytes_N: Tensor, recorder: Recorder | None):
        self.nats_N, self.bytes_N = torch.zeros(len(bytes_N), dtype=torch.float64), bytes_N.cpu()
        self.counted_N, self.recorder = torch.zeros(len(bytes_N), dtype=torch.bool), recorder
        self.seconds = 0.0
        """Of steps that no document in the journal has taken over yet."""

    def record(self, index_M: Tensor, nats_M: Tensor) -> None:
        index_M, nats_M = index_M.cpu(), nats_M.cpu()
        assert not self.counted_N[index_M].any(), "a target was scored twice"
        self.nats_N[index_M], self.counted_N[index_M] = nats_M, True
        if self.recorder:
            self.recorder(index_M, nats_M)

    def close(self, document: tuple[int, int], journal: ScoreJournal | None) -> ScoreSums:
        """Returns the sums of a document that has ended, and journals them."""
        part = slice(*document)
        assert self.counted_N[part].all(), "a target of a document was left out"
        sums = ScoreSums(self.nats_N[part].sum().item(), part.stop - part.start, int(self.bytes_N[part].sum()))
        if journal:
            journal.add(*document, sums, self.seconds)
            self.seconds = 0.0
        return sums


def score_adapted(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable | StreamBytes,
    settings: ScoreSettings,
    score: ScoreConfig,
    runtime: Runtime,
    *,
    journal: ScoreJournal | None = None,
    check: Callable[[], None] = lambda: None,
    recorder: Recorder | None = None,
) -> Score:
    """Scores every target of `tokens` once, over all ranks, as score_stream does, in chunks of `settings.stride`.

    Documents that a started `journal` holds are not scored again; `check` is called after others, and may raise; a
    `recorder` gets what this process scores. Raises ScoreError.
    """
    started, earlier = time.perf_counter(), journal.seconds if journal else 0.0
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    own = own_documents(tokens, model, runtime)
    known = {document: journal.sums_of(*document) for document in own} if journal else {}
    left = [document for document in own if not known.get(document)]
    steps = list(lane_steps(left, score.adapter_lanes, settings.stride))
    sums = DocumentSums(job.bytes_N, recorder)
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score)
        progress = ScoreProgress(runtime, len(steps), settings.seq_len * score.adapter_lanes, len(steps))
        for step in steps:
            began = time.perf_counter()
            scorer.step(step, sums.record)
            sums.seconds += time.perf_counter() - began
            progress.advance(1)
            for document in (left[chunk.document] for chunk in step if chunk and chunk.closes):
                known[document] = sums.close(document, journal)
                check()
        effect = scorer.effect(own)
    seconds, total = time.perf_counter() - started, sum_sums(sum(known.values(), ScoreSums()), runtime)
    assert total.tokens == len(tokens) - 1, f"{total.tokens} targets scored of {len(tokens) - 1}"
    most, effect = runtime.max_over_ranks(earlier + seconds, effect)
    every = enumerate(stream_documents(tokens, model.config.bos_id))
    chunks = sum(1 for number, document in every for _ in document_chunks(number, *document, settings.stride))
    return Score(
        nats=total.nats, tokens=total.tokens, bytes=total.bytes, documents=job.documents, windows=chunks,
        window_tokens=chunks * settings.seq_len, stride=settings.stride, seconds=most,
        parts={"adapter_effect": effect},
    )  # fmt: skip


def own_documents(tokens: np.ndarray, model: GPT, runtime: Runtime) -> list[tuple[int, int]]:
    """Returns this rank's documents."""
    return stream_documents(tokens, model.config.bos_id)[runtime.rank :: runtime.world_size]


def forecast_adapted(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, _: object,
    score: ScoreConfig,
) -> float:  # fmt: skip
    """Forecasts the slowest rank's seconds of `score_adapted`, from a few steps, whose scores are forgotten."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device)
    own = own_documents(tokens, model, runtime)
    steps = sum(1 for _ in lane_steps(own, score.adapter_lanes, settings.stride))
    with evaluation_mode(model):
        scorer = LaneScorer(model, job.tokens_N1, settings, score)
        timed = list(islice(lane_steps(own, score.adapter_lanes, settings.stride), 1 + TIMED_STEPS))
        for number, step in enumerate(timed):
            if number == 1:
                started = time.perf_counter()
            scorer.step(step, lambda index_M, nats_M: None)
        runtime.synchronize()
    seconds = (time.perf_counter() - started) / (len(timed) - 1) if len(timed) > 1 else 0.0
    return runtime.max_over_ranks(seconds * steps)[0]


def adapters_act(files: Mapping[str, Any]) -> tuple[int, bool, str]:
    """Returns (windows that learned, whether they change a target's nats, the change)."""
    score = files["score"]
    effect = score["adapter_effect"]
    return score["eval_windows"], effect > 0, f"a step changes a token's nats by up to {effect:.3g}"


register_feature(
    Feature("adapters", lambda config: config.score.adapter_rank > 0, "set adapter_rank=0", in_files=adapters_act)
)


# ---- golf/score/deadline.py ------------------------------------------------------------------------------------------

"""Chooses a stride that can be scored in time, before scoring starts, by timing batches and discarding them."""

TIMED_BATCHES = 3
MARGIN = 1.05
"""Factor on the forecast, because a few batches are timed and not all."""


def forecast_seconds(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable, settings: ScoreSettings, runtime: Runtime, forward: Forward
) -> float:
    """Forecasts the slowest rank's seconds for scoring `tokens`, from batches of its own share; keeps no score."""
    job = prepare_job(model, tokens, byte_table, settings, runtime.device, forward)
    begin, end = rank_share(len(job.plan), runtime.rank, runtime.world_size)
    first = min(begin + 1, end)  # skips the long first window
    last = min(first + settings.batch_seqs, end)
    with evaluation_mode(model):
        score_windows(job, first, last)  # compiles and warms up
        started = time.perf_counter()
        for _ in range(TIMED_BATCHES):
            score_windows(job, first, last)
    seconds = (time.perf_counter() - started) * (end - begin) / max(TIMED_BATCHES * (last - first), 1)
    return runtime.max_over_ranks(seconds)[0]


def choose_stride(
    model: GPT,
    tokens: np.ndarray,
    byte_table: ByteTable,
    settings: ScoreSettings,
    runtime: Runtime,
    forward: Forward,
    max_seconds: float,
    started: float | None = None,
    forecast: Callable[..., float] | None = None,
) -> ScoreSettings:
    """Returns `settings` with the stride doubled until the forecast fits in what is left of `max_seconds`; 0: no limit.

    `started` is the reading of time.perf_counter when the scoring began, if that was not now. `forecast` replaces
    `forecast_seconds`.
    """
    started = time.perf_counter() if started is None else started
    while max_seconds:
        seconds = MARGIN * (forecast or forecast_seconds)(model, tokens, byte_table, settings, runtime, forward)
        left = max_seconds - runtime.max_over_ranks(time.perf_counter() - started)[0]
        if seconds <= left or settings.stride == settings.seq_len:
            break
        wider = min(2 * settings.stride, settings.seq_len)
        runtime.print(f"score:stride {settings.stride} -> {wider}: {seconds:.0f} s forecast, {left:.0f} s left")
        settings = replace(settings, stride=wider)
    return settings


# ---- golf/score/roundtrip.py -----------------------------------------------------------------------------------------

"""Computes the score that counts, from the artifact's bytes, the tokenizer and the validation shards alone."""

def load_artifact_tokenizer(tokenizer_sha256: str, path: str | Path) -> ByteTable:
    """Returns the byte table of the tokenizer with that hash. Raises ScoreError where the file is another one."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != tokenizer_sha256:
        raise ScoreError(
            f"{path}: SHA-256 {tokenizer.sha256[:12]}... is not that of the artifact's tokenizer,"
            f" {tokenizer_sha256[:12]}...: give the tokenizer that made the training shards"
        )
    return ByteTable(tokenizer)


def load_validation(
    tokenizer_sha256: str, tokenizer_path: str | Path, val_paths: Sequence[str | Path]
) -> tuple[np.ndarray, ByteTable | StreamBytes]:
    """Returns the validation shards' tokens, and what counts their bytes. Raises ScoreError where nothing can."""
    table, shards = load_artifact_tokenizer(tokenizer_sha256, tokenizer_path), without_sidecars(val_paths)
    tokens = validation_tokens(shards)
    counter = validation_bytes(table, shards, tokens)
    if isinstance(counter, ByteTable) and not counter.exact:
        raise ScoreError(
            f"{tokenizer_path}: text in CaseOps is scored by the bytes of the original text, and beside the validation"
            " shards are no *_val_bytes_NNNNNN.bin that say them: prepare or download them with the shards"
        )
    return tokens, counter


def stream_identity(tokens: np.ndarray) -> str:
    """Returns 16 hex digits of SHA-256 over a stream of tokens: the identity of validation data."""
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()[:16]


def score_weights(
    state: Mapping[str, Tensor], artifact: Artifact, tokenizer_path: str | Path, val_paths: Sequence[str | Path],
    rows: int, runtime: Runtime,
) -> Score:  # fmt: skip
    """Scores the weights of the artifact's model before quantization, in plain rows."""
    model = load_gpt(artifact.model, state, runtime)
    settings = plain_settings(artifact.model, max(1, rows // runtime.world_size))
    tokens, counter = load_validation(artifact.tokenizer_sha256, tokenizer_path, val_paths)
    return score_stream(model, tokens, counter, settings, runtime, announce=False)


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
    """Scores the model in `artifact` on the validation shards, over all ranks, with sliding windows.

    With `mixture` the network's probabilities are then mixed with counts. Returns the score and the identity of the
    validation data. A `journal` resumes where a killed process left it; `check` is called between its chunks, and may
    raise. Raises ScoreError for a tokenizer that is not the artifact's, or a stream that can't be scored; DataError for
    files that can't be read.
    """
    started = time.perf_counter()
    tokens, byte_table = load_validation(artifact.tokenizer_sha256, tokenizer_path, val_paths)
    model, settings = restore_model(artifact, runtime), sliding_settings(score, artifact.model)
    check_settings(settings)
    model.keep_rotary(settings.seq_len, settings.rope_base)
    forward = compiled_losses(model) if compiled else model.token_losses
    subject = {
        "artifact": artifact.sha256, "data": stream_identity(tokens), "asked": asdict(settings),
        "rank": runtime.rank, "world_size": runtime.world_size,
    }  # fmt: skip
    if score.adapter_rank:
        subject["adapters"] = [score.adapter_rank, score.adapter_lr, score.adapter_lanes]
    if isinstance(byte_table, StreamBytes):
        subject["bytes"] = stream_identity(byte_table.bytes_N)
    begun = (journal and journal.identity) or {}
    stride = begun["stride"] if subject.items() <= begun.items() else 0
    largest, smallest = runtime.max_over_ranks(stride, -stride)
    if 0 < largest == -smallest:  # all ranks can resume, with the same windows
        settings = replace(settings, stride=stride)
    else:
        seconds = score.max_eval_seconds
        if score.mixture and seconds:
            seconds = max(1e-9, seconds - forecast_mixture(tokens, artifact.model, score, runtime))
        forecast = partial(forecast_adapted, score=score) if score.adapter_rank else None
        settings = choose_stride(model, tokens, byte_table, settings, runtime, forward, seconds, started, forecast)
    preparing = time.perf_counter() - started
    if journal:
        journal.start(subject | {"stride": settings.stride}, preparing)
    measured = measure(model, tokens, byte_table, settings, score, runtime, forward, journal, check)
    return measured if journal else replace(measured, seconds=measured.seconds + preparing), subject["data"]


def measure(
    model: GPT, tokens: np.ndarray, byte_table: ByteTable | StreamBytes, settings: ScoreSettings, score: ScoreConfig,
    runtime: Runtime, forward: Forward, journal: ScoreJournal | None, check: Callable[[], None],
) -> Score:  # fmt: skip
    """Scores the stream by the network, adapted to each document where that is on; then mixes counts in."""
    if score.mixture:
        nats = NetworkNats(len(tokens) - 1, journal)
    recorder = nats.record if score.mixture else None
    if score.adapter_rank:
        measured = score_adapted(
            model, tokens, byte_table, settings, score, runtime, journal=journal, check=check, recorder=recorder
        )  # fmt: skip
    else:
        measured = score_stream(
            model, tokens, byte_table, settings, runtime, forward=forward, journal=journal, check=check,
            recorder=recorder,
        )  # fmt: skip
    if score.mixture:
        measured = mix_score(measured, nats, tokens, model.config, score, runtime, journal, check)
    return measured


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
    """Runs every stage from the text to the artifact's bytes, and skips those that the run has finished."""
    with start_runtime(command.config.run, "train", session.log) as runtime:
        folder = (
            take_up(command.resume, command.new_code, runtime) if command.resume else open_run(command.config, runtime)
        )
        session.open(folder, runtime)
        config = folder.load_config()
        session.do("train", lambda: train(config, session), together=True)
        session.do("average", lambda: average(config, session))
        fitted = session.do("quantize", lambda: quantize(config, session), together=True)
        session.do("pack", lambda: pack(config, session, fitted))
        session.ledger.flush()
        session.interruption.check(f"before scoring; go on with --resume {folder.path.name}")
    return folder


def open_run(config: Config, runtime: Runtime) -> RunFolder:
    """Creates a new run's folder with its configuration, its machine's fingerprint and the code as it would ship."""
    config = locate_data(config, runtime, PROGRAM.script.parent)
    open_training_data(config)  # fails on bad data before a folder exists
    folder = choose_run_folder(config, runtime)
    if runtime.is_main:
        folder.create(config)
        PROGRAM.freeze(folder)
        PROGRAM.run_tool("fingerprint.py", folder.path, "--world-size", str(runtime.world_size))
    runtime.barrier()
    return folder


def take_up(path: Path, new_code: bool, runtime: Runtime) -> RunFolder:
    """Returns the folder of a run to resume; raises where other code runs now, unless `new_code` replaces the run's."""
    folder = RunFolder(path)
    if new_code and runtime.is_main:
        PROGRAM.replace_code(folder)
    runtime.barrier()
    PROGRAM.check(folder)
    return folder


def train(config: Config, session: Session) -> StageResult:
    """Takes steps until the budget is used up, and writes the last checkpoint."""
    folder, runtime, ledger = session.folder, session.runtime, session.ledger
    with ledger.phase("setup"):
        data = open_training_data(config)
        trainer = new_trainer(config, runtime, data.stream)
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
    return StageResult([last, folder.training])


def average(config: Config, session: Session) -> StageResult:
    """Turns the last checkpoint into the final weights, averaged where averaging is on."""
    folder, training = (session.folder, session.folder.load_json(session.folder.training))
    state = read_checkpoint([folder.path / next(iter(session.book.stages['train']))])
    audit = FeatureAudit(config, features_of(state.numbers))
    weights = final_weights(state, audit)
    if training['swa_snapshots'] >= 2:
        kind = 'swa'
        session.runtime.print(f"{kind}:applying averaged {training['swa_snapshots']} checkpoints")
    audit.note_weights(weights, training['steps'])
    folder.save_json(folder.effects, audit.record())
    save_weights(folder.weights, weights, config.model, config.quant, training['tokenizer_sha256'])
    return StageResult([folder.weights, folder.effects])


def quantize(config: Config, session: Session) -> StageResult:
    """Turns weights into the integer codes whose artifact fits beside the code under the byte limit."""
    folder, runtime, saved = session.folder, session.runtime, load_weights(session.folder.weights)
    stream, room = open_training_data(config).stream, config.run.limit_bytes - folder.code.stat().st_size
    train_seconds, calibrating = (
        folder.load_json(folder.training)["train_seconds"],
        partial(session.ledger.phase, "calibrate"),
    )
    fitted, record = quantize_weights(saved, config, stream, runtime, train_seconds, room, calibrating)
    if fitted is None:  # only the main rank holds the result
        return StageResult([])
    save_quantized(folder.quantized, fitted.stored)
    folder.save_json(folder.pruning, pruning_record(fitted) | record)
    row = stream.tokens(0, config.model.train_seq_len + 1).tolist()
    folder.save_json(folder.parity, parity_row(fitted.pruned, fitted.stored, config, row, runtime))
    return StageResult([folder.quantized, folder.pruning, folder.parity], fitted)


def pack(config: Config, session: Session, fitted: FittedArtifact | None) -> StageResult:
    """Writes the artifact: the bytes that the quantize stage measured, or the same bytes made from its codes on the
    disk."""
    folder = session.folder
    if fitted is None:
        sha256 = folder.load_json(folder.training)["tokenizer_sha256"]
        data, sizes = pack_artifact(load_quantized(folder.quantized), config.model, sha256, config.quant.codec)
    else:
        data, sizes = fitted.data, fitted.sizes
    write_file_atomically(folder.artifact, data)
    folder.save_json(folder.packing, {"sizes": size_report_dict(sizes)})
    for line in packing_lines(folder, config):
        session.runtime.print(line)
    return StageResult([folder.artifact, folder.packing])


# ---- second process: reload, score, report ----


def start_fresh_process(folder: RunFolder, debug: bool) -> int:
    """Replaces this process by a new one that knows only the run's folder, so that the score depends on the bytes
    alone."""
    sys.stdout.flush()
    options = ["--debug"] if debug else []
    os.execv(sys.executable, [sys.executable, str(PROGRAM.script), "--score", str(folder.path), *options])


def reload_and_score(folder: RunFolder, session: Session) -> int:
    """Scores the artifact, writes result.json and returns the exit status."""
    config, session.ledger.phase_name = folder.load_config(), "load"
    PROGRAM.check(folder)
    with start_runtime(config.run, "score", session.log) as runtime:
        session.open(folder, runtime)
        session.do("reload", lambda: reload(config, session))
        session.do("score", lambda: score(config, session), together=True)
        session.do("report", lambda: report(config, session))
        return EXIT_FINDINGS if runtime.is_main and folder.load_json(folder.result)["findings"] else 0


def reload(config: Config, session: Session) -> StageResult:
    """Checks that the artifact's model gives the logits that the trained one gave, and that the scorer agrees."""
    folder, artifact = session.folder, read_artifact(session.folder.artifact)
    table = load_artifact_tokenizer(artifact.tokenizer_sha256, config.data.tokenizer_path)
    record, model = folder.load_json(folder.parity), restore_model(artifact, session.runtime)
    parity = check_parity(model, record, table, session.runtime)
    folder.save_json(folder.reload, {"parity": parity, "ntk_effect": ntk_effect(model, record, config.score)})
    return StageResult([folder.reload])


def score(config: Config, session: Session) -> StageResult:
    """Scores the artifact on the validation shards in bits per byte, then the weights before they were quantized."""
    folder, runtime, artifact = session.folder, session.runtime, read_artifact(session.folder.artifact)
    journal = ScoreJournal(folder.journal(runtime.rank))
    val_shards, tokenizer_path = find_shards(config.data.data_path, "val"), config.data.tokenizer_path

    def check() -> None:
        if session.interruption.requested:
            runtime.print(partial_line(journal))
        session.interruption.check(f"while scoring; go on with --resume {folder.path.name}")
        session.ledger.flush()

    for line in scoring_lines(config, artifact.model):
        runtime.print(line)
    measured, val_data_id = score_artifact(
        artifact, tokenizer_path, val_shards, config.score, runtime,
        compiled=runtime.compiles_scoring, journal=journal, check=check,
    )  # fmt: skip
    for line in final_lines(measured, config.quant):
        runtime.print(line)
    with session.ledger.phase("compare"):
        state, rows = load_weights(folder.weights).state, config.train.eval_batch_tokens // config.model.train_seq_len
        unquantized = score_weights(state, artifact, tokenizer_path, val_shards, rows, runtime)
        runtime.print(f"unquantized, plain rows: val_loss:{unquantized.val_loss:.4f} val_bpb:{unquantized.val_bpb:.4f}")
    if runtime.is_main:
        folder.save_json(folder.score, score_record(measured, val_data_id, unquantized))
    return StageResult([folder.score, journal.path])


def report(config: Config, session: Session) -> StageResult:
    """Writes all measurements and findings to result.json, then a table and pictures."""
    folder, runtime = session.folder, session.runtime
    folder.probes.unlink(missing_ok=True)
    status = PROGRAM.run_tool("check_run.py", folder.path, "--write")
    result = build_result(config, session, probed=status is None or folder.probes.exists())
    folder.save_json(folder.result, result)
    for finding in result["findings"]:
        runtime.print(f"INVALID: {finding}")
    runtime.print(result_line(result))
    PROGRAM.run_tool("report.py", folder.path)
    return StageResult([folder.result])


def run_program(arguments: list[str]) -> int:
    """Runs the program and returns its exit status.

    A user's mistake, an interruption or a lost machine prints one line, an error of ours a traceback.
    """
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
    leave(run_program(sys.argv[1:]))
