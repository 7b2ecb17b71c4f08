"""Mixes each embedding with its predecessor's before the first block: SmearGate and BigramHash.

B batch, T time, D model width, E bigram width. Neither looks across the start of a document: a BOS has no predecessor,
nor has the first position of a row.
"""

import torch
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.model.layers import Embedding, Linear


def has_predecessor(ids_BT: Tensor, bos_id: int) -> Tensor:
    """Returns mask_BT, True where the token before belongs to the same document and is in the row."""
    mask_BT = ids_BT != bos_id
    mask_BT[:, 0] = False
    return mask_BT


class SmearGate(nn.Module):
    """Mixes each embedding with the one before: e_t + g (e_{t-1} - e_t), g = sigmoid(gate) per dimension.

    Without a predecessor the embedding passes unchanged. Source: parameter-golf PR #65's family.
    """

    def __init__(self, model_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(model_dim))

    def forward(self, e_BTD: Tensor, has_previous_BT: Tensor) -> Tensor:
        previous_BTD = torch.roll(e_BTD, 1, dims=1)
        gate_BTD = torch.sigmoid(self.gate).to(e_BTD.dtype) * has_previous_BT.unsqueeze(-1)
        return e_BTD + gate_BTD * (previous_BTD - e_BTD)


class TokenSmearGate(nn.Module):
    """Adds to each embedding a share of the one before, strength * sigmoid(gate . e_t) over the first dimensions of
    e_t: the second form of SmearGate (parameter-golf pull request 1667). It begins as the identity."""

    def __init__(self, dims: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dims))
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, e_BTD: Tensor, has_previous_BT: Tensor) -> Tensor:
        dtype = e_BTD.dtype
        share_BT = self.strength.to(dtype) * torch.sigmoid(e_BTD[..., : len(self.gate)] @ self.gate.to(dtype))
        return e_BTD + (share_BT * has_previous_BT).unsqueeze(-1) * torch.roll(e_BTD, 1, dims=1)


def bigram_buckets(ids_BT: Tensor, has_previous_BT: Tensor, buckets: int) -> Tensor:
    """Returns the bigram table's row for (previous token p, token t): (36313 t XOR 27191 p) mod (buckets - 1).

    The last row stands for "no previous token". int64, so that no vocabulary overflows.
    """
    previous_BT = torch.roll(ids_BT, 1, dims=1)
    hashed_BT = ((36_313 * ids_BT) ^ (27_191 * previous_BT)) % (buckets - 1)
    return torch.where(has_previous_BT, hashed_BT, buckets - 1)


class BigramHash(nn.Module):
    """Looks up token pairs in a hashed table, projected to the model width and scaled.

    Source: the 2026-03-20 records of the parameter-golf repository (10 layers, int5 MLP).
    """

    def __init__(self, buckets: int, bigram_dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = Embedding(buckets, bigram_dim)
        self.proj = Linear(bigram_dim, model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids_BT: Tensor, has_previous_BT: Tensor, dtype: torch.dtype) -> Tensor:
        e_BTE = self.embed(bigram_buckets(ids_BT, has_previous_BT, self.buckets)).to(dtype)
        return self.proj(e_BTE) * self.scale.to(dtype)


register_feature(
    Feature(
        "smear_gate", lambda config: config.model.smear_gate, "set smear_gate=0", learned_weight="smear.gate",
    )
)  # fmt: skip
register_feature(
    Feature(
        "bigram_hash", lambda config: config.model.bigram_vocab_size > 0, "set bigram_vocab_size=0",
        learned_weight="bigram.embed.weight",
    )
)  # fmt: skip
