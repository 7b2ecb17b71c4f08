"""Defines the knobs of the score."""

from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import Rule


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
    mixture_successors: int = 0
    """Most tokens that followed a known context whose probabilities are corrected at last; 0: none."""
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


def score_rules(config: Any) -> list[Rule]:
    """Returns the rules between the knobs of a Config that concern the score."""
    score = config.score
    return [
        (1 <= score.eval_stride <= score.eval_seq_len, "eval_stride must be 1 to eval_seq_len (equal: plain rows)"),
        (
            score.eval_rope == "none" or score.eval_seq_len > config.model.train_seq_len,
            "eval_rope=ntk acts only where eval_seq_len is beyond train_seq_len: set eval_rope=none",
        ),
        (1 <= score.mixture_orders <= 16, "mixture_orders must be 1 to 16: a context of one token at least is counted"),
        (score.adapter_lanes >= 1, "adapter_lanes must be at least 1"),
        (score.mixture_parts >= 1, "mixture_parts must be at least 1"),
    ]
