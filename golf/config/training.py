"""Defines the knobs of training: the budget, the optimizers, the averaging of weights.

Horizons are shares of the binding budget (steps or seconds, whichever is nearer its end), so that they act on a machine
of any speed.
"""

from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import Rule


@dataclass(frozen=True)
class TrainConfig:
    """Sets the budget, the batches, the learning rate's shape, and how often training reports."""

    iterations: int = 20_000
    """Most optimizer steps; 0: no limit."""
    max_wallclock_seconds: float = 600.0
    """Most seconds of training; 0: no limit (then equal seeds give equal bytes)."""
    knowledge_frozen: bool = False
    """Keep the knowledge tokens at their random initial vectors: a control."""
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
    seq_rewarmup_fraction: float = 0.0
    """Share of the budget over which the learning rate rises again from zero after rows have become longer."""
    loop_start: float = 0.0
    """Share of the budget after which blocks are repeated (loop_repeats)."""
    prefix_weight: float = 0.0
    """Weight of a second target at first: the longest piece that begins the token (0: none)."""
    prefix_fraction: float = 0.333
    """Share of the budget over which it stays, and over which it then falls to 0."""
    warmup_steps: int = 20
    """Untimed steps that compile and warm the caches; their effect is undone."""
    warmdown_fraction: float = 0.45
    """Share of the budget over which the learning rate falls to zero (272 of 600 s in the recipe's log)."""
    warmdown_floor: float = 0.0
    """Share of the learning rate that is left at the end."""
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
    muon_row_norm: bool = False
    """Bring the rows of an update to one norm before the iterations."""
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
    ema_fraction: float = 0.0
    """Share of the budget over which the weight of a step in an exponential average falls to 1/e; 0: none."""
    ema_blend: float = 1.0
    """Share of the exponential average in the weights that ship; the last weights have the rest."""


def budget_rules(config: Any) -> list[Rule]:
    """Returns the rules of a Config that a change of its budget or its machine can break."""
    model, train = config.model, config.train
    return [
        (train.iterations > 0 or train.max_wallclock_seconds > 0, "set iterations or max_wallclock_seconds"),
        (train.micro_batch_tokens >= model.train_seq_len, "micro_batch_tokens must hold one row of train_seq_len"),
    ]


def training_rules(config: Any) -> list[Rule]:
    """Returns the rules between the knobs of a Config that concern training and averaging."""
    model, train, average = config.model, config.train, config.average
    short = train.short_seq_len
    return [
        (train.train_batch_tokens % model.train_seq_len == 0, "train_batch_tokens must be rows of train_seq_len"),
        (
            0 < short < model.train_seq_len and model.train_seq_len % short == 0 < train.short_seq_fraction < 1
            if short
            else not train.short_seq_fraction,
            "short_seq_len must be a part of train_seq_len, with a short_seq_fraction between 0 and 1; or both be 0",
        ),
        (
            short < train.middle_seq_len < model.train_seq_len
            and train.short_seq_fraction < train.middle_seq_fraction < 1
            and train.train_batch_tokens % train.middle_seq_len == 0
            if train.middle_seq_len
            else not train.middle_seq_fraction,
            "middle_seq_len must lie between short_seq_len and train_seq_len and divide train_batch_tokens, with"
            " middle_seq_fraction after short_seq_fraction; or both be 0",
        ),
        (
            not train.seq_rewarmup_fraction or short or train.middle_seq_len,
            "seq_rewarmup_fraction does nothing where all rows have one length",
        ),
        (
            max(train.loop_start, train.seq_rewarmup_fraction, train.warmdown_floor) < 1,
            "loop_start, seq_rewarmup_fraction and warmdown_floor are shares, 0 to below 1",
        ),
        (
            not train.prefix_weight or 0 < train.prefix_fraction < 0.5,
            "prefix_fraction is a share, above 0 and below 0.5: the second target ends before the training does",
        ),
        (0 <= train.warmdown_fraction <= 1, "warmdown_fraction is a share, 0 to 1"),
        (
            config.optim.muon_iteration == "quintic" or config.optim.muon_ns_steps <= 5,
            "muon_iteration=polar_express has coefficients for 5 iterations: muon_ns_steps must be at most 5",
        ),
        (
            not (average.swa_enabled and average.ema_fraction) and average.ema_blend <= 1,
            "swa_enabled and ema_fraction are two averages: choose one; ema_blend is a share, 0 to 1",
        ),
        (0 <= average.swa_start < 1, "swa_start is a share, 0 to below 1"),
        (average.swa_snapshots >= 2 or not average.swa_enabled, "swa_snapshots must be at least 2"),
    ]
