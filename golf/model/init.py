"""Initialises weights as a function of the configuration and the seed alone, the same on every device."""

import math

import torch
from torch import Tensor, nn

from golf.config.model import ModelConfig
from golf.model.gpt import GPT
from golf.model.layers import Linear


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
    if config.late_mix_hidden:
        nn.init.normal_(model.late_mix.inner, std=config.model_dim**-0.5, generator=generator)
    return model


def init_matrix(weight_OI: Tensor, name: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Initialises a matrix as `matrix_init` says.

    orthogonal: orthogonal, with the matrices that write into the stream scaled by 1/sqrt(2L) (the stream sums 2L of
    them); orthogonal_zero: the blocks' at zero. uniform: torch's default for Linear, with the blocks' output matrices
    at zero (the baseline's). The bigram's projection is never zero: its table is, and zero times zero would have no
    gradient for ever.
    """
    if name == "head":
        nn.init.normal_(weight_OI, std=config.tied_embed_init_std, generator=generator)
    elif config.matrix_init == "orthogonal_zero" and name.endswith(("attn.proj", "mlp.proj")):
        nn.init.zeros_(weight_OI)
    elif config.matrix_init != "uniform":
        gain = 1 / math.sqrt(2 * config.num_layers) if name.endswith("proj") else 1.0
        nn.init.orthogonal_(weight_OI, gain=gain, generator=generator)
    elif not name.endswith(("attn.proj", "mlp.proj")):
        bound = 1 / math.sqrt(weight_OI.size(1))
        nn.init.uniform_(weight_OI, -bound, bound, generator=generator)
