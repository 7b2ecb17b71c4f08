"""Defines the knobs of a run as a whole, and of its data."""

from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import Rule


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
    attention_kernels: Literal["torch", "cudnn"] = "torch"
    """Order in which CUDA's attention kernels are tried: torch's own, or cuDNN's first (untried)."""
    compile: Literal["auto", "on", "off"] = "on"
    """torch.compile the training step and the scorer; auto: where a trial of it works."""
    kernels: Literal["auto", "on", "off"] = "off"
    """Train by fused forms (golf/model/fused.py) of loss, MLP and exclusive attention with gates; auto: on CUDA."""
    threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    limit_bytes: int = 16_000_000
    """Most bytes that packed code and artifact may have together."""
    reserve_bytes: int = 10_000
    """Bytes to stay below the limit by where weights had to be coarsened to fit."""
    checkpoint_seconds: float = 60.0
    """Seconds of training between checkpoints; 0: only at the end and on SIGTERM or SIGINT."""
    track: Literal["off", "tensorboard", "wandb"] = "off"
    """Whose files tools/track.py writes into the run's folder meanwhile; wandb: in its offline mode."""
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
