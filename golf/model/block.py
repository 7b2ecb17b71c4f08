"""Defines one transformer block: grouped-query attention and a squared-ReLU MLP.

B batch, T time, S last positions of T, U keys, D model width, H query heads, G key/value heads, K head width, P = K/2.
A caller may ask for the last S positions only: keys and values then come from all of T, the rest is computed for S.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.model import ModelConfig
from golf.model.cache import LayerCache
from golf.model.layers import ActivationSite, Linear, rms_norm, rotate


class Positions(NamedTuple):
    """Holds the RoPE tables, and attention among the positions."""

    cos_TP: Tensor
    sin_TP: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Returns y_BHSK from q_BHSK, k_BGTK and v_BGTK: causal_attention, or segment_attention."""


def causal_attention(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, visible: Tensor | None = None) -> Tensor:
    """Returns y_BHSK: each query attends to the keys up to its own position, the queries being the last S of T.

    With `visible` (boolean, broadcast to BHTT; its last S rows count), queries attend to the keys that it marks.
    """
    queries, time, heads = q_BHSK.size(2), k_BGTK.size(2), q_BHSK.size(1)
    if queries == time and visible is None:
        return F.scaled_dot_product_attention(q_BHSK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    # Kernels that take a mask want as many key heads as query heads.
    k_BHTK, v_BHTK = (part.repeat_interleave(heads // part.size(1), dim=1) for part in (k_BGTK, v_BGTK))
    if visible is None:
        visible = torch.ones(queries, time, dtype=torch.bool, device=q_BHSK.device).tril(time - queries)
    return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=visible[..., -queries:, :])


def visible_keys(
    queries: int, keys: int, pinned: int, window: int, device: torch.device, document_BU: Tensor | None = None
) -> Tensor:
    """Returns the attention mask, bool_SU, or bool_B1SU with documents.

    The last S of U positions see earlier positions within the last `window` (0: all) and within their own document, and
    always the first `pinned`, the knowledge tokens.
    """
    key_U = torch.arange(keys, device=device)
    age_SU = key_U[keys - queries :, None] - key_U
    near = age_SU < window if window else torch.ones_like(age_SU, dtype=torch.bool)
    if document_BU is not None:
        near = near & (document_BU[:, None, -queries:, None] == document_BU[:, None, None])
    return (age_SU >= 0) & (near | (key_U < pinned))


BY_MLP_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(), "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda x: x,
}  # fmt: skip
"""relu2: So et al. 2021 (Primer, arXiv 2109.08668)."""


class CausalSelfAttention(nn.Module):
    """Computes grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.model_dim // config.num_heads
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.act_in, self.act_out = ActivationSite(config.act_attn_in), ActivationSite(config.act_attn_out)
        self.act_q, self.act_k, self.act_v = map(ActivationSite, (config.act_q, config.act_k, config.act_v))

    def split_heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, positions: Positions, last: int, cache: LayerCache | None = None) -> Tensor:
        """Returns y_BSD of the `last` positions; the queries' gain follows their quantizer, whose scale it learns."""
        x_BTD, cos_TP, sin_TP = self.act_in(x_BTD), positions.cos_TP, positions.sin_TP
        q_BHSK = rms_norm(self.split_heads(self.c_q(x_BTD[:, -last:])))
        k_BGTK = rms_norm(self.split_heads(self.c_k(x_BTD)))
        v_BGTK = self.split_heads(self.c_v(x_BTD))
        q_BHSK = self.act_q(rotate(q_BHSK, cos_TP[-last:], sin_TP[-last:])) * self.q_gain.to(x_BTD.dtype)[:, None, None]
        k_BGTK = rotate(k_BGTK, cos_TP, sin_TP)
        if cache is None:
            k_BGTK, v_BGTK = self.act_k(k_BGTK), self.act_v(v_BGTK)
        else:
            k_BGTK, v_BGTK = cache.extend(k_BGTK, v_BGTK, self.act_k, self.act_v)
        y_BHSK = positions.attend(q_BHSK, k_BGTK, v_BGTK)
        return self.proj(self.act_out(y_BHSK.transpose(1, 2).flatten(-2)))


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
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        share = stream_share(layer, config)
        self.resid_mix = nn.Parameter(torch.stack((share, 1 - share))[:, None].repeat(1, config.model_dim))

    def forward(
        self, x_BTD: Tensor, x0_BTD: Tensor, positions: Positions, last: int, cache: LayerCache | None = None
    ) -> Tensor:
        """Returns the stream x_BSD of the `last` positions after this block."""
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        attended_BSD = self.attn(rms_norm(x_BTD), positions, last, cache)
        x_BSD = x_BTD[:, -last:] + self.attn_scale.to(x_BTD.dtype) * attended_BSD
        return x_BSD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(rms_norm(x_BSD))
