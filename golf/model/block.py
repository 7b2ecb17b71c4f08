"""Defines one transformer block: grouped-query attention and a squared-ReLU MLP, and what may be done in them.

B batch, T time, S last positions of T, U keys, D model width, H query heads, G key/value heads, K head width, P = K/2.
A caller may ask for the last S positions only: keys and values then come from all of T, the rest is computed for S.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.config.model import ModelConfig
from golf.model.cache import LayerCache
from golf.model.layers import (
    ActivationSite,
    DepthNorm,
    Linear,
    RmsNorm,
    acts_always,
    changed_model,
    rms_norm,
    rotate,
    rotate_first,
)


class Positions(NamedTuple):
    """Holds the RoPE tables, and attention among the positions."""

    cos_TP: Tensor
    sin_TP: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Returns y_BHSK from q_BHSK, k_BGTK and v_BGTK: causal_attention, or segment_attention."""
    follows_BT: Tensor | None = None
    """Whether a position has one before it in its document, where keys are taken from there."""


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


def offset_keys(k_BGTK: Tensor, pairs: int, follows_BT: Tensor, cache: LayerCache | None) -> Tensor:
    """Returns keys half of whose dimensions are those of the position before, in its document (partial key offset,
    modded-nanogpt): of the pairs that RoPE turns, the slower half, and half of the dimensions that it leaves.

    A query then finds what followed a token like its own in one layer, which otherwise takes two.
    """
    first_BG1K = k_BGTK[:, :, :1] if cache is None or cache.last_key is None else cache.last_key
    if cache is not None:
        cache.last_key = k_BGTK[:, :, -1:]
    before_BGTK = torch.cat((first_BG1K, k_BGTK[:, :, :-1]), 2)
    dim_K = torch.arange(k_BGTK.size(-1), device=k_BGTK.device)
    rest_K = dim_K - 2 * pairs
    taken_K = torch.where(rest_K < 0, dim_K % pairs >= pairs // 2, rest_K >= (len(dim_K) - 2 * pairs) // 2)
    return torch.where(follows_BT[:, None, :, None] & taken_K, before_BGTK, k_BGTK)


def without_own_value(y_BHSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """Returns y - (y . u) u, with u the direction of the position's own value in the head's group (exclusive
    self-attention, parameter-golf pull request 265)."""
    direction_BGSK = F.normalize(v_BGSK, dim=-1)
    u_BHSK = direction_BGSK.repeat_interleave(y_BHSK.size(1) // v_BGSK.size(1), dim=1)
    return y_BHSK - (y_BHSK * u_BHSK).sum(-1, keepdim=True) * u_BHSK


def gate_heads(y_BHSK: Tensor, x_BSD: Tensor, gate_HI: Tensor) -> Tensor:
    """Multiplies each head's result by sigmoid(W x / 2) of the first I dimensions of the attention's input x
    (parameter-golf pull request 1787)."""
    gate_BSH = torch.sigmoid(0.5 * F.linear(x_BSD[..., : gate_HI.size(1)], gate_HI.to(x_BSD.dtype)))
    return y_BHSK * gate_BSH.transpose(1, 2).unsqueeze(-1)


class CausalSelfAttention(nn.Module):
    """Computes grouped-query attention with normalised queries and keys and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.head_dim = config, config.model_dim // config.num_heads
        self.c_q = Linear(config.model_dim, config.model_dim)
        self.c_k = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.c_v = Linear(config.model_dim, config.num_kv_heads * self.head_dim)
        self.proj = Linear(config.model_dim, config.model_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.attention_gate_dims:
            self.gate = nn.Parameter(torch.zeros(config.num_heads, config.attention_gate_dims))
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
        turn = rotate_first if self.config.rope_dims else rotate
        q_BHSK = self.act_q(turn(q_BHSK, cos_TP[-last:], sin_TP[-last:])) * self.q_gain.to(x_BTD.dtype)[:, None, None]
        if self.config.key_offset:
            k_BGTK = offset_keys(k_BGTK, cos_TP.size(1), positions.follows_BT, cache)
        k_BGTK = turn(k_BGTK, cos_TP, sin_TP)
        if cache is None:
            k_BGTK, v_BGTK = self.act_k(k_BGTK), self.act_v(v_BGTK)
        else:
            k_BGTK, v_BGTK = cache.extend(k_BGTK, v_BGTK, self.act_k, self.act_v)
        y_BHSK = positions.attend(q_BHSK, k_BGTK, v_BGTK)
        y_BHSK = self.finish(y_BHSK, v_BGTK[:, :, -last:], x_BTD[:, -last:])
        return self.proj(self.act_out(y_BHSK.transpose(1, 2).flatten(-2)))

    def finish(self, y_BHSK: Tensor, v_BGSK: Tensor, x_BSD: Tensor) -> Tensor:
        """Returns the heads' results as they go into the output matrix."""
        if self.config.exclusive_attention:
            y_BHSK = without_own_value(y_BHSK, v_BGSK)
        if self.config.attention_gate_dims:
            y_BHSK = gate_heads(y_BHSK, x_BSD, self.gate)
        return y_BHSK


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
register_feature(
    Feature(
        "exclusive_attention", lambda config: config.model.exclusive_attention, "set exclusive_attention=0",
        acts_always, without=lambda model: changed_model(model, exclusive_attention=False),
    )
)  # fmt: skip
register_feature(
    Feature(
        "key_offset", lambda config: config.model.key_offset, "set key_offset=0",
        acts_always, without=lambda model: changed_model(model, key_offset=False),
    )
)  # fmt: skip
register_feature(
    Feature(
        "partial_rope", lambda config: config.model.rope_dims > 0, "set rope_dims=0",
        acts_always, without=lambda model: changed_model(model, rope_dims=0),
    )
)  # fmt: skip
register_feature(
    Feature(
        "attention_gate", lambda config: config.model.attention_gate_dims > 0, "set attention_gate_dims=0",
        learned_weight="blocks.0.attn.gate",
    )
)  # fmt: skip
