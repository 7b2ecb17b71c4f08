"""Small models of every kind that a cache has to serve, and rows of several documents for them."""

import torch

from golf.config.model import ModelConfig
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.qat import install_activation_quantizers

CACHED = ModelConfig(
    vocab_size=40, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, bigram_vocab_size=37,
    bigram_dim=8, train_seq_len=24, tied_embed_init_std=0.5,
)  # fmt: skip


def cached_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """A model in which every parameter matters, with its activation quantizers."""
    model = install_activation_quantizers(build_model(config, seed, dtype))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows_with_documents(seed: int, rows: int, length: int, config: ModelConfig = CACHED) -> torch.Tensor:
    """Random ids_BT; about every seventh token starts a document, at places of each row's own."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, config.vocab_size, (rows, length), generator=generator)
    ids_BT[torch.rand(ids_BT.shape, generator=generator) < 1 / 7] = config.bos_id
    return ids_BT
