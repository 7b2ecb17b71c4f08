"""One transformer block: grouped-query attention and a squared-ReLU MLP.

B batch, T time, S last positions of T, D model width, H query heads, G key/value heads, K head width, P = K/2.
A block may be asked for its last S positions only: keys and values come from all of T, the rest is done for S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config import ModelConfig
from golf.model.layers import Linear, rms_norm
from golf.model.rotary import rotate


def causal_attention(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """y_BHSK: each query attends to the keys up to its own position, the queries being the last S of T.

    With the number of each position's document, to those of its own document only.
    """
    queries, time, heads = q_BHSK.size(2), k_BGTK.size(2), q_BHSK.size(1)
    if queries == time and document_BT is None:
        return F.scaled_dot_product_attention(q_BHSK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    # Kernels that take a mask want as many key heads as query heads.
    k_BHTK, v_BHTK = (part.repeat_interleave(heads // part.size(1), dim=1) for part in (k_BGTK, v_BGTK))
    visible = torch.ones(queries, time, dtype=torch.bool, device=q_BHSK.device).tril(time - queries)
    if document_BT is not None:
        visible = visible & (document_BT[:, None, -queries:, None] == document_BT[:, None, None])
    return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=visible)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.model_dim // config.num_heads
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, *document_BT: Tensor, last: int) -> Tensor:
        """y_BSD of the `last` positions."""
        q_BHSK = rms_norm(self.split_heads(self.c_q(x_BTD[:, -last:])))
        k_BGTK = rms_norm(self.split_heads(self.c_k(x_BTD)))
        v_BGTK = self.split_heads(self.c_v(x_BTD))
        q_BHSK = rotate(q_BHSK, cos_TP[-last:], sin_TP[-last:]) * self.q_gain.to(x_BTD.dtype)[:, None, None]
        y_BHSK = causal_attention(q_BHSK, rotate(k_BGTK, cos_TP, sin_TP), v_BGTK, *document_BT)
        return self.proj(y_BHSK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """proj(relu(fc(x))^2) (So et al. 2021, Primer, arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.mlp_mult * config.model_dim)
        self.fc = Linear(config.model_dim, hidden)
        self.proj = Linear(hidden, config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x_BTD)).square())


class Block(nn.Module):
    """Mix the stream with the embedding, then add attention and MLP, each scaled per dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(config.model_dim), torch.zeros(config.model_dim))))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, *tables: Tensor, last: int) -> Tensor:
        """The stream x_BSD of the `last` positions after this block. `tables`: cos_TP, sin_TP, and document_BT where
        attention stays within documents."""
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        attended_BSD = self.attn(rms_norm(x_BTD), *tables, last=last)
        x_BSD = x_BTD[:, -last:] + self.attn_scale.to(x_BTD.dtype) * attended_BSD
        return x_BSD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(rms_norm(x_BSD))
