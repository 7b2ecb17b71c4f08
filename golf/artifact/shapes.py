"""Names and shapes of a model's tensors, from its configuration alone."""

from golf.config.config import ModelConfig


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
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, model.model_dim)
    if model.knowledge_tokens:
        layers = () if model.knowledge_at == "input" else (model.num_layers,)
        shapes["knowledge"] = (*layers, model.knowledge_tokens, model.model_dim)
    if model.smear_gate:
        shapes["smear.gate"] = (model.model_dim,)
    shapes["skip_weights"] = (model.num_layers // 2, model.model_dim)
    for layer in range(model.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model).items()}
    return shapes
