"""Weighs, token by token, what the last block reads and adds: late multiway dynamic dense connections.

MUDD: Xiao et al. 2025 (arXiv 2502.12170); in the last block alone: modded-nanogpt, records 81 and 85.

B batch, T time, S last positions of T, D model width, N hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.model.block import Block, Positions
from golf.model.cache import LayerCache
from golf.model.layers import rms_norm

LATE_WEIGHTS = 6
"""Of the embedding and of the stream in what the block reads, of its attention, of its MLP, and of the embedding and of
the stream in what leaves it."""
LATE_SCALE = 0.3
"""Slows the weights down, which AdamW would move as fast as a gain of 1."""


class LateMix(nn.Module):
    """Computes each token's weights from the stream; all are 0 at first."""

    def __init__(self, model_dim: int, hidden: int):
        super().__init__()
        self.inner = nn.Parameter(torch.zeros(hidden, model_dim))
        self.outer = nn.Parameter(torch.zeros(LATE_WEIGHTS, hidden))
        self.bias = nn.Parameter(torch.zeros(LATE_WEIGHTS))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Returns each weight with a last axis of 1, which spreads over the stream's width."""
        dtype = x_BTD.dtype
        hidden_BTN = F.gelu(F.linear(rms_norm(x_BTD), self.inner.to(dtype)))
        weights_BT6 = LATE_SCALE * F.linear(hidden_BTN, self.outer.to(dtype), self.bias.to(dtype))
        return weights_BT6.unsqueeze(-1).unbind(-2)


def run_late(
    late_mix: LateMix, block: Block, x_BTD: Tensor, x0_BTD: Tensor, positions: Positions, last: int,
    cache: LayerCache | None,
) -> Tensor:  # fmt: skip
    """Returns the stream x_BSD of the `last` positions after the last block."""
    weights, dtype = late_mix(x_BTD), x_BTD.dtype
    read_BTD = block.mixed(x_BTD, x0_BTD) + weights[0] * x0_BTD + weights[1] * x_BTD
    to_attention, to_mlp, to_x0, to_x = (weight_BT1[:, -last:] for weight_BT1 in weights[2:])
    attended_BSD = block.attn_scale.to(dtype) * block.attn(block.norm(read_BTD), positions, last, cache)
    y_BSD = read_BTD[:, -last:] + (1 + to_attention) * attended_BSD
    y_BSD = y_BSD + (1 + to_mlp) * block.mlp_scale.to(dtype) * block.mlp(block.norm(y_BSD))
    return y_BSD + to_x0 * x0_BTD[:, -last:] + to_x * x_BTD[:, -last:]


register_feature(
    Feature(
        "late_mix", lambda config: config.model.late_mix_hidden > 0, "set late_mix_hidden=0",
        learned_weight="late_mix.outer",
    )
)  # fmt: skip
