"""The network: embeddings, U-Net of blocks, tied head. One forward pass serves every stage of a run.

B batch, T time, S scored positions (the last S of T), D model width, V vocabulary, P = head width / 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config import ModelConfig
from golf.model.block import Block
from golf.model.embedding import BigramHash, SmearGate, has_predecessor
from golf.model.layers import Embedding, rms_norm
from golf.model.rotary import rotary_tables


class GPT(nn.Module):
    """Decoder with U-Net skips: block i of the first half feeds block L-1-i of the second.

    Weights are fp32; activations have `compute_dtype`; logits and losses are fp32.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.tok_emb = Embedding(config.vocab_size, config.model_dim)
        self.bigram = (
            BigramHash(config.bigram_vocab_size, config.bigram_dim, config.model_dim)
            if config.bigram_vocab_size
            else None
        )
        self.smear = SmearGate(config.model_dim) if config.smear_gate else None
        self.encoder_layers = config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, config.model_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def embed(self, ids_BT: Tensor, embedding_VD: Tensor) -> Tensor:
        """What the first block sees: token (+ hashed bigram), normalised, smeared with its predecessor."""
        has_previous_BT = has_predecessor(ids_BT, self.config.bos_id)
        e_BTD = self.tok_emb(ids_BT, embedding_VD).to(self.compute_dtype)
        if self.bigram is not None:
            e_BTD = e_BTD + self.bigram(ids_BT, has_previous_BT, self.compute_dtype)
        e_BTD = rms_norm(e_BTD)
        return e_BTD if self.smear is None else self.smear(e_BTD, has_previous_BT)

    def tables(self, ids_BT: Tensor, rope_base: float) -> tuple[Tensor, ...]:
        """What attention knows of positions: cos_TP, sin_TP, and document_BT where it stays within documents."""
        config = self.config
        rotary = rotary_tables(ids_BT.size(1), config.model_dim // config.num_heads, rope_base, ids_BT.device)
        return (*rotary, (ids_BT == config.bos_id).cumsum(1)) if config.document_attention else rotary

    def trunk(self, x0_BTD: Tensor, tables: tuple[Tensor, ...], last: int) -> Tensor:
        """x_BSD after all blocks; the stream of encoder block i is added before its decoder twin."""
        time = x0_BTD.size(1)
        x_BTD, skips = x0_BTD, []
        for block in self.blocks[: self.encoder_layers]:
            x_BTD = block(x_BTD, x0_BTD, *tables, last=time)
            skips.append(x_BTD)
        for j, block in enumerate(self.blocks[self.encoder_layers :]):
            if skips:
                x_BTD = x_BTD + self.skip_weights[j].to(x_BTD.dtype) * skips.pop()
            x_BTD = block(x_BTD, x0_BTD, *tables, last=last if block is self.blocks[-1] else time)
        return x_BTD

    def logits(self, ids_BT: Tensor, last: int | None = None, rope_base: float | None = None) -> Tensor:
        """fp32 logits_BSV of the `last` S positions (default: all), soft-capped to +-logit_softcap.

        `rope_base` replaces the model's own base (for rows longer than the training length).
        """
        embedding_VD = self.tok_emb.effective_weight()
        x0_BTD = self.embed(ids_BT, embedding_VD)
        tables = self.tables(ids_BT, rope_base or self.config.rope_base)
        x_BSD = self.trunk(x0_BTD, tables, last or ids_BT.size(1))
        logits_BSV = F.linear(rms_norm(x_BSD), embedding_VD.to(x_BSD.dtype)).float()
        return self.config.logit_softcap * torch.tanh(logits_BSV / self.config.logit_softcap)

    def token_losses(self, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
        """fp32 losses_BS in nats of the last S positions' targets."""
        logits_BSV = self.logits(ids_BT, targets_BS.size(1), rope_base)
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss in nats, the training objective."""
        return self.token_losses(ids_BT, targets_BT).mean()
