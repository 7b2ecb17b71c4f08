"""Defines one transformer block: grouped-query attention and a squared-ReLU MLP.

B batch, T time, S last positions of T, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.config.model import ModelConfig
from golf.model.attention import CausalSelfAttention, Positions
from golf.model.cache import LayerCache
from golf.model.layers import ActivationSite, DepthNorm, Linear, RmsNorm, acts_always

BY_MLP_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(), "leaky_relu2": lambda x: F.leaky_relu(x, 0.5).square(),
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x,
}  # fmt: skip
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
    if config.resid_mix_init == "stream":
        return torch.ones(())
    return torch.sigmoid(torch.tensor(3.0 * (layer / (config.num_layers - 1) - 0.5)))


class Block(nn.Module):
    """Mixes the stream with the embedding, then adds attention and MLP, each scaled per dimension."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm = DepthNorm(layer + 1) if config.norm_by_depth else RmsNorm()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        share = stream_share(layer, config)
        self.resid_mix = nn.Parameter(torch.stack((share, 1 - share))[:, None].repeat(1, config.model_dim))
        if config.lanes_from and layer >= config.lanes_from:
            self.lane_decay = nn.Parameter(torch.full((2,), 1.1))
            self.lane_inputs = nn.Parameter(torch.ones(2, 2))

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


@contextmanager
def equal_norms(model: nn.Module) -> Iterator[None]:
    """Takes the depth out of the norms of a GPT within the context."""
    for block in model.blocks:
        block.norm.depth = 1
    yield
    for layer, block in enumerate(model.blocks):
        block.norm.depth = layer + 1


register_feature(
    Feature(
        "norm_by_depth", lambda config: config.model.norm_by_depth, "set norm_by_depth=0",
        acts_always, without=equal_norms,
    )
)  # fmt: skip
