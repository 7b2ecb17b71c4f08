"""One transformer block: grouped-query attention and a squared-ReLU MLP.

B batch, T time, D model width, H query heads, G key/value heads, K head width, F MLP hidden, P = K/2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config import ModelConfig
from golf.model.layers import Linear, rms_norm
from golf.model.rotary import rotate


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.model_dim // config.num_heads
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))

    def split_heads(self, x_BTD: Tensor, heads: int) -> Tensor:
        batch, time, _ = x_BTD.shape
        return x_BTD.view(batch, time, heads, self.head_dim).transpose(1, 2)

    def forward(self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        q_BHTK = rotate(rms_norm(self.split_heads(self.c_q(x_BTD), self.num_heads)), cos_TP, sin_TP)
        k_BGTK = rotate(rms_norm(self.split_heads(self.c_k(x_BTD), self.num_kv_heads)), cos_TP, sin_TP)
        v_BGTK = self.split_heads(self.c_v(x_BTD), self.num_kv_heads)
        q_BHTK = q_BHTK * self.q_gain.to(q_BHTK.dtype)[:, None, None]
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
        return self.proj(y_BHTK.transpose(1, 2).reshape(x_BTD.shape))


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

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        x_BTD = x_BTD + self.attn_scale.to(x_BTD.dtype) * self.attn(rms_norm(x_BTD), cos_TP, sin_TP)
        return x_BTD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(rms_norm(x_BTD))
