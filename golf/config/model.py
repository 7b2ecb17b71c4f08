"""Defines the knobs of the network."""

from dataclasses import dataclass
from typing import Any, Literal

from golf.config.knobs import Rule


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
    smear_gate_dims: int = 0
    """Dimensions of an embedding that decide how much of the one before is added to it; 0: a gate per dimension."""
    resid_mix_init: Literal["phase", "stream"] = "phase"
    """phase: early blocks lean on the embedding, late ones on the stream; stream: all of the stream."""
    matrix_init: Literal["orthogonal", "orthogonal_zero", "uniform"] = "orthogonal"
    """orthogonal: outputs scaled by 1/sqrt(2 layers); orthogonal_zero: outputs zero; uniform: torch's, outputs zero."""
    qk_gain_init: float = 1.5
    """Initial gain of the normalised queries, learned per head."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_dims: int = 0
    """Dimensions of a head that rotate with the position, the first ones; 0: all."""
    logit_softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    tied_embed_init_std: float = 0.005
    """Standard deviation of the initial embedding and head."""
    train_seq_len: int = 2048
    """Tokens in a training row; the length at which RoPE is unscaled."""
    bos_id: int = 1
    """Token that starts a document."""
    document_attention: bool = False
    """Keep attention within a document; off: a query sees the whole row before it."""
    attention_window: int = 0
    """Positions that a query sees, its own the last of them; 0: all before it."""
    tie_embeddings: bool = True
    """One table for the embedding and the head; off: the head has its own."""
    mlp_activation: Literal["relu2", "leaky_relu2", "tanh", "sigmoid", "identity"] = "relu2"
    """Non-linearity of the MLP."""
    norm_by_depth: bool = False
    """Divide what block i takes through its norms by sqrt(i + 1)."""
    exclusive_attention: bool = False
    """Take from each head's result its part along the position's own value (XSA)."""
    key_offset: bool = False
    """Take half of each key from the position before."""
    attention_gate_dims: int = 0
    """Dimensions of the attention's input from which a gate per head is computed; 0: no gates."""
    skip_gates: bool = False
    """Mix a skip with the stream by a learned gate per dimension; off: add it."""
    loop_first: int = 0
    """First of the blocks that run several times (depth recurrence)."""
    loop_last: int = 0
    """Last of them."""
    loop_repeats: int = 0
    """How many times more they run; 0: every block runs once."""
    lanes_from: int = 0
    """Block from which attention and MLP have a residual stream each; 0: one stream."""
    late_mix_hidden: int = 0
    """Hidden width of what weighs, for each token, all that the last block reads and adds; 0: no such weights."""
    knowledge_tokens: int = 0
    """Learned vectors that every query sees beside the text, never a target (External Knowledge Tokens)."""
    knowledge_at: Literal["input", "layers"] = "input"
    """input: before the first block, which then treats them as positions; layers: anew before every block."""
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


def model_rules(config: Any) -> list[Rule]:
    """Returns the rules between the knobs of a Config that concern its model."""
    model = config.model
    return [
        (model.model_dim % model.num_heads == 0, "model_dim must be a multiple of num_heads"),
        (model.num_heads % model.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads"),
        (model.model_dim // model.num_heads % 2 == 0, "the head width model_dim / num_heads must be even"),
        (model.num_layers >= 2, "num_layers must be at least 2 (U-Net skips need an encoder and a decoder)"),
        (model.vocab_size <= 65_536, "vocab_size must fit in 16 bits (65,536)"),
        (model.bigram_vocab_size != 1, "bigram_vocab_size must be 0 (off) or at least 2"),
        (model.bigram_vocab_size == 0 or model.bigram_dim > 0, "bigram_dim must be positive"),
        (
            bool(model.knowledge_tokens) or model.knowledge_at == "input",
            "knowledge_at=layers does nothing without knowledge_tokens",
        ),
        (
            bool(model.knowledge_tokens) or not config.train.knowledge_frozen,
            "knowledge_frozen does nothing without knowledge_tokens",
        ),
        (
            model.rope_dims % 2 == 0 and model.rope_dims <= model.model_dim // model.num_heads,
            "rope_dims must be even, and at most the head width",
        ),
        (
            max(model.smear_gate_dims, model.attention_gate_dims) <= model.model_dim,
            "smear_gate_dims and attention_gate_dims are dimensions of the model: at most model_dim",
        ),
        (model.smear_gate or not model.smear_gate_dims, "smear_gate_dims does nothing without smear_gate"),
        (
            model.loop_first <= model.loop_last < model.num_layers and model.loop_repeats <= 8,
            "loop_first to loop_last must be blocks, and loop_repeats at most 8",
        ),
        (
            model.loop_repeats > 0 or not (model.loop_first or model.loop_last or config.train.loop_start),
            "loop_first, loop_last and loop_start do nothing without loop_repeats",
        ),
        (
            not model.lanes_from
            or max(model.loop_last, model.num_layers // 2 - 1) < model.lanes_from
            and model.lanes_from < model.num_layers,
            "lanes_from must be a block of the second half, behind those that are repeated",
        ),
        (
            model.knowledge_at == "input" or not (model.loop_repeats or model.lanes_from),
            "knowledge_at=layers knows no repeated blocks and no lanes",
        ),
        (
            not model.late_mix_hidden or not model.lanes_from and model.knowledge_at == "input",
            "late_mix_hidden knows no lanes and no knowledge_at=layers: set those off, or it to 0",
        ),
        (
            model.attention_window < model.train_seq_len,
            "attention_window hides nothing from rows of train_seq_len: make it smaller, or 0",
        ),
    ]
