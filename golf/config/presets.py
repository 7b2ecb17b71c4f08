"""Defines the named presets as changes to the defaults of golf/config/config.py, which are the leaderboard recipe's."""

from typing import Any

LOCAL: dict[str, Any] = dict(
    limit_bytes=500_000, data_path="", tokenizer_path="", corpus="embedded", row_order="spread", device="cpu",
    compile="auto", vocab_size=2048, num_layers=2, model_dim=160, num_heads=4, num_kv_heads=2, mlp_mult=2.5,
    exclusive_attention=True, key_offset=True, late_mix_hidden=16, bigram_vocab_size=1024, bigram_dim=32,
    train_seq_len=256, max_wallclock_seconds=180.0,
    train_batch_tokens=2048, micro_batch_tokens=2048, warmup_steps=2, warmdown_fraction=0.8, muon_momentum=0.95,
    swa_start=0.94, swa_snapshots=16, holdout_every=0, train_log_every=100, holdout_tokens=16_384,
    eval_batch_tokens=16_384, embed_bits=5,
    qat_enabled=False, prune_frac=0.0, quantizer="waterfill", codec="rans", calibration_tokens=32_768,
    calibration_reserve=6.0, reserve_bytes=1_000, eval_seq_len=320, eval_stride=64, eval_batch_seqs=64,
    mixture=True, mixture_successors=128, adapter_rank=8,
)  # fmt: skip

BASELINE: dict[str, Any] = dict(
    num_layers=9, mlp_mult=2.0, bigram_vocab_size=0, bigram_dim=0, smear_gate=False, resid_mix_init="stream",
    matrix_init="uniform", train_seq_len=1024, train_batch_tokens=524_288, micro_batch_tokens=65_536,
    warmdown_fraction=0.09, warmdown_shape="linear", matrix_lr=0.04, embed_lr=0.05, scalar_lr=0.04,
    muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup_fraction=0.036, muon_weight_decay=0.0,
    embed_weight_decay=0.0, scalar_weight_decay=0.0, grad_clip_norm=0.0, swa_enabled=False, qat_enabled=False,
    mlp_bits=8, attn_bits=8, bigram_bits=8, embed_bits=8, prune_frac=0.0, quantizer="rtn", codec="zlib",
    eval_seq_len=1024, eval_stride=1024, eval_rope="none", holdout_every=1000, train_log_every=200, seed=1337,
)  # fmt: skip

BASELINE_LOCAL: dict[str, Any] = LOCAL | BASELINE | dict(
    vocab_size=1024, num_layers=3, model_dim=128, train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048,
    holdout_every=0, train_log_every=100, reserve_bytes=10_000, eval_seq_len=256, eval_stride=256,
    exclusive_attention=False, key_offset=False, late_mix_hidden=0, mixture=False, mixture_successors=0,
    adapter_rank=0,
)  # fmt: skip

STORIES: dict[str, Any] = LOCAL | dict(
    vocab_size=0, num_layers=6, model_dim=192, num_heads=6, num_kv_heads=6, mlp_mult=4.0, bigram_vocab_size=0,
    bigram_dim=0, smear_gate=False, train_seq_len=256, train_batch_tokens=1024, micro_batch_tokens=1024,
    max_wallclock_seconds=300.0, qat_enabled=False, mlp_bits=8, attn_bits=8, embed_bits=16, prune_frac=0.0,
    quantizer="rtn", codec="lzma", reserve_bytes=10_000, limit_bytes=4_000_000, eval_seq_len=256, eval_stride=256,
    eval_rope="none", eval_batch_seqs=8, exclusive_attention=False, key_offset=False, late_mix_hidden=0,
    mixture=False, mixture_successors=0, adapter_rank=0,
)  # fmt: skip

FRONTIER_BASE: dict[str, Any] = dict(
    data_path="data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    tokenizer_path="data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", vocab_size=8192,
    num_layers=11, mlp_mult=4.0, mlp_activation="leaky_relu2", bigram_vocab_size=0, bigram_dim=0,
    smear_gate_dims=12, resid_mix_init="stream", matrix_init="orthogonal_zero", qk_gain_init=5.25, rope_dims=16,
    norm_by_depth=True, exclusive_attention=True, attention_gate_dims=12, skip_gates=True, loop_first=3, loop_last=5,
    loop_repeats=2, loop_start=0.35, lanes_from=8, document_attention=True,
    train_seq_len=3072, short_seq_len=1024, short_seq_fraction=0.1, middle_seq_len=2048, middle_seq_fraction=0.7,
    seq_rewarmup_fraction=0.0066, warmdown_fraction=0.85, warmdown_shape="linear", warmdown_floor=0.1,
    matrix_lr=0.026, muon_momentum=0.97, muon_momentum_warmup_fraction=0.3, muon_iteration="polar_express",
    muon_row_norm=True, muon_weight_decay=0.095, embed_weight_decay=0.085, scalar_weight_decay=0.02, beta2=0.99,
    swa_enabled=False, ema_fraction=0.058, qat_enabled=False, prune_frac=0.0, quantizer="waterfill", codec="rans",
    eval_seq_len=3072, eval_rope="none", holdout_every=1000, kernels="auto",
)  # fmt: skip
"""The published stack behind 1.0565 bpb (parameter-golf pull requests 1855, 2014, 2135), with this project's quantizer
and coder; docs/FRONTIER.md compares it part by part."""

FRONTIER_BASE_LOCAL: dict[str, Any] = LOCAL | FRONTIER_BASE | dict(
    data_path="", tokenizer_path="", vocab_size=2048, num_layers=5, model_dim=128, rope_dims=8, loop_first=2,
    loop_last=2, lanes_from=4,
    train_seq_len=256, short_seq_len=64, middle_seq_len=0, middle_seq_fraction=0.0, key_offset=False, late_mix_hidden=0,
    holdout_every=0, eval_seq_len=256, eval_stride=64, mixture=False, mixture_successors=0, adapter_rank=0,
    kernels="off",
)  # fmt: skip

ADAPTIVE: dict[str, Any] = dict(mixture=True, adapter_rank=8)
FRONTIER: dict[str, Any] = (
    FRONTIER_BASE | ADAPTIVE | dict(mixture_parts=8, adapter_lanes=32, eval_seq_len=2048, eval_stride=64)
)
FRONTIER_LOCAL: dict[str, Any] = FRONTIER_BASE_LOCAL | ADAPTIVE | dict(mixture_successors=128)

PRESETS: dict[str, dict[str, Any]] = {
    "leaderboard": {},
    "local": LOCAL,
    "baseline": BASELINE,
    "baseline-local": BASELINE_LOCAL,
    "stories": STORIES,
    "frontier-base": FRONTIER_BASE,
    "frontier-base-local": FRONTIER_BASE_LOCAL,
    "frontier": FRONTIER,
    "frontier-local": FRONTIER_LOCAL,
}
"""Presets by name."""

RETIRED_KNOBS = {
    "WARMDOWN_ITERS": "warmdown_fraction (a share of the budget, not a step count)",
    "MUON_MOMENTUM_WARMUP_STEPS": "muon_momentum_warmup_fraction (a share of the budget)",
    "MUON_MOMENTUM_WARMUP_START": "muon_momentum_start",
    "MUON_BACKEND_STEPS": "muon_ns_steps",
    "WEIGHT_DECAY": "muon_weight_decay, embed_weight_decay and scalar_weight_decay",
    "SWA_START_FRAC": "swa_start (a share of the budget, not of the learning rate)",
    "SWA_EVERY": "swa_snapshots",
    "HEAD_LR": "embed_lr (the embedding's and the head's)",
    "TIED_EMBED_LR": "embed_lr (the embedding's and the head's)",
    "VAL_LOSS_EVERY": "holdout_every (training text that is held out: validation text is closed until it is scored)",
    "VAL_BATCH_SIZE": "holdout_tokens and eval_batch_tokens",
    "RATE_WEIGHT": "rd_lambda",
    "SKIP_ROUNDTRIP_EVAL": "nothing: a run without a measured score is not a run",
    "CONTROL_TENSOR_NAME_PATTERNS": "nothing: vectors train in their own group by shape",
    "FP16_KEEP_NAME_PATTERNS": "embed_bits=16",
}
"""Knobs of the competition's scripts that have no honest counterpart here, and what to set instead."""

RENAMED_KNOBS = {
    "tied_embed_lr": ("embed_lr",), "val_loss_every": ("holdout_every",), "rate_weight": ("rd_lambda",),
    "val_batch_size": ("holdout_tokens", "eval_batch_tokens"),
}  # fmt: skip
"""Older names of knobs, which the configurations of older runs use, and the present ones."""
RENAMED_VALUES = {("quantizer", "grid"): "rtn", ("quantizer", "fit"): "waterfill"}
