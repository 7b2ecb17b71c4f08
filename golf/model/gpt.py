"""Defines the network: embeddings, U-Net of blocks, tied head. One forward pass serves every stage of a run.

B batch, T time, S scored positions (the last S of T), U keys, M knowledge tokens, R recent ids of a cache, D model
width, V vocabulary, P = head width / 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import Feature, register_feature
from golf.config.model import ModelConfig
from golf.model.block import Block, Positions, causal_attention, visible_keys
from golf.model.cache import KeyValueCache
from golf.model.embedding import BigramHash, SmearGate, TokenSmearGate, has_predecessor
from golf.model.lanes import run_lanes
from golf.model.late_mix import LateMix, run_late
from golf.model.layers import (
    Embedding,
    Linear,
    RmsNorm,
    Unembedding,
    acts_always,
    changed_model,
    rms_norm,
    rotary_dims,
    rotary_tables,
)
from golf.model.recurrence import layer_order
from golf.model.segments import flash_runs, segment_attention, segment_bounds


class GPT(nn.Module):
    """Decodes with U-Net skips: place i of the first half feeds place L-1-i of the second, of the L places at which
    blocks run.

    Weights are fp32; activations have `compute_dtype`; logits and losses are fp32.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.tok_emb = Embedding(config.vocab_size, config.model_dim)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.model_dim, config.vocab_size)
            self.head.trains_as = "table"
        self.knowledge = None
        if config.knowledge_tokens:
            layers = () if config.knowledge_at == "input" else (config.num_layers,)
            self.knowledge = nn.Parameter(torch.zeros(*layers, config.knowledge_tokens, config.model_dim))
        self.bigram = (
            BigramHash(config.bigram_vocab_size, config.bigram_dim, config.model_dim)
            if config.bigram_vocab_size
            else None
        )
        self.smear = None
        if config.smear_gate:
            self.smear = (
                TokenSmearGate(config.smear_gate_dims) if config.smear_gate_dims else SmearGate(config.model_dim)
            )
        self.rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        """Tables by row length and base, made by `keep_rotary`."""
        self.looping = True
        """Whether blocks repeat, as they do but for the first part of the training (golf/model/recurrence.py)."""
        skips = len(layer_order(config)) // 2
        self.skip_weights = nn.Parameter(torch.ones(skips, config.model_dim))
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(skips, config.model_dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if config.late_mix_hidden:
            self.late_mix = LateMix(config.model_dim, config.late_mix_hidden)
        self.final_norm = RmsNorm()
        self.unembed = Unembedding()

    def embed(self, ids_BT: Tensor, embedding_VD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Returns the first block's input: token (+ hashed bigram), normalised, smeared with its predecessor."""
        known = 0 if cache is None or cache.recent_BR is None else cache.recent_BR.size(1)
        if known:
            ids_BT = torch.cat((cache.recent_BR, ids_BT), 1)
        has_previous_BT = has_predecessor(ids_BT, self.config.bos_id)
        e_BTD = self.tok_emb(ids_BT, embedding_VD).to(self.compute_dtype)
        if self.bigram is not None:
            e_BTD = e_BTD + self.bigram(ids_BT, has_previous_BT, self.compute_dtype)
        if self.config.smear_gate_dims:
            return rms_norm(self.smear(e_BTD, has_previous_BT))[:, known:]
        e_BTD = rms_norm(e_BTD)
        return (e_BTD if self.smear is None else self.smear(e_BTD, has_previous_BT))[:, known:]

    def keep_rotary(self, length: int, rope_base: float | None = None) -> None:
        """Makes the rotary tables of rows of `length` tokens once: a compiled graph takes them as inputs and does not
        compute powers, sines and cosines in every kernel that turns queries or keys."""
        base, device = rope_base or self.config.rope_base, self.skip_weights.device
        self.rotary[length, base] = rotary_tables(length, rotary_dims(self.config), base, device)

    def rotary_of(self, length: int, base: float, device: torch.device, start: int) -> tuple[Tensor, Tensor]:
        """Returns cos_TP and sin_TP of positions start .. length-1: the kept tables where there are some."""
        kept = None if start else self.rotary.get((length, base))
        if kept is not None and kept[0].device == device and 2 * kept[0].size(1) == rotary_dims(self.config):
            return kept
        return rotary_tables(length, rotary_dims(self.config), base, device, start)

    def positions(self, ids_BT: Tensor, rope_base: float, cache: KeyValueCache | None = None) -> Positions:
        """Returns rotary tables and attention of the new positions; knowledge tokens come first and are not rotated."""
        config, past, device = self.config, 0 if cache is None else cache.length, ids_BT.device
        new = 0 if past else config.knowledge_tokens
        tables = self.rotary_of(past + ids_BT.size(1), rope_base, device, past)
        if new:
            unturned = torch.ones, torch.zeros
            tables = tuple(
                torch.cat((fill(new, table.size(1), device=device), table))
                for fill, table in zip(unturned, tables, strict=True)
            )
        follows_BT = None
        if config.key_offset:
            follows_BT = ids_BT != config.bos_id
            follows_BT[:, 0] &= past > 0
            follows_BT = F.pad(follows_BT, (new, 0))
        if not (config.document_attention or config.attention_window):
            return Positions(*tables, causal_attention, follows_BT)
        if cache is None and not new and flash_runs(device, self.compute_dtype):
            start_BT = (ids_BT == config.bos_id) & config.document_attention
            bounds = segment_bounds(start_BT | (torch.arange(ids_BT.size(1), device=device) == 0))
            attend = partial(segment_attention, bounds=bounds, window=config.attention_window)
            return Positions(*tables, attend, follows_BT)
        document_BU = F.pad((ids_BT == config.bos_id).cumsum(1), (new, 0))
        document_BU = document_BU if cache is None else cache.documents(document_BU)
        visible = visible_keys(
            new + ids_BT.size(1), document_BU.size(1), config.knowledge_tokens, config.attention_window, device,
            document_BU if config.document_attention else None,
        )  # fmt: skip
        return Positions(*tables, partial(causal_attention, visible=visible), follows_BT)

    def with_knowledge(self, layer: int, x_BTD: Tensor, replaced: int = 0) -> Tensor:
        """Returns the stream with this block's knowledge tokens before the text, in place of the first `replaced`
        positions."""
        knowledge_MD = self.knowledge if self.knowledge.dim() == 2 else self.knowledge[layer]
        knowledge_BMD = knowledge_MD.to(x_BTD.dtype).expand(x_BTD.size(0), -1, -1)
        return torch.cat((knowledge_BMD, x_BTD[:, replaced:]), 1)

    def trunk(self, x0_BTD: Tensor, positions: Positions, last: int, cache: KeyValueCache | None = None) -> Tensor:
        """Returns x_BSD after all blocks; joins the stream of each encoder block before its decoder twin."""
        joins = self.knowledge is not None and (cache is None or not cache.length)
        renewed = joins and self.knowledge.dim() == 3
        x_BTD = x0_BTD = self.with_knowledge(0, x0_BTD) if joins else x0_BTD
        order, time, skips = range(len(self.blocks)), x0_BTD.size(1), []
        if self.config.loop_repeats:
            order = layer_order(self.config, self.looping)
        half = len(order) // 2
        for place, layer in enumerate(order):
            block, kept = self.blocks[layer], None if cache is None else cache.layers[place]
            if self.config.lanes_from and layer == self.config.lanes_from:
                lane_BTD = x_BTD
            if place >= half and skips:
                skip_BTD = self.skip_weights[place - half].to(x_BTD.dtype) * skips.pop()
                if self.config.skip_gates:
                    x_BTD = gated_skip(x_BTD, skip_BTD, self.skip_gates[place - half])
                else:
                    x_BTD = x_BTD + skip_BTD
            if renewed and layer:
                x_BTD = self.with_knowledge(layer, x_BTD, self.config.knowledge_tokens)
            shown = last if place == len(order) - 1 else time
            if self.config.lanes_from and layer >= self.config.lanes_from:
                x_BTD, lane_BTD = run_lanes(block, x_BTD, lane_BTD, x0_BTD, positions, shown, kept)
            elif self.config.late_mix_hidden and place == len(order) - 1:
                x_BTD = run_late(self.late_mix, block, x_BTD, x0_BTD, positions, shown, kept)
            else:
                x_BTD = block(x_BTD, x0_BTD, positions, shown, kept)
            if place < half:
                skips.append(x_BTD)
        return (x_BTD + lane_BTD) / 2 if self.config.lanes_from else x_BTD

    def final_states(
        self, ids_BT: Tensor, last: int | None = None, rope_base: float | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Returns the normalised stream x_BSD of the `last` S positions (default: all), and the head's weight_VD.

        `rope_base` replaces the model's own base (for rows longer than the training length). With a `cache`, `ids_BT`
        continue the positions that it keeps, under the same base, and are added to it.
        """
        embedding_VD = self.tok_emb.effective_weight()
        x0_BTD = self.embed(ids_BT, embedding_VD, cache)
        positions = self.positions(ids_BT, rope_base or self.config.rope_base, cache)
        x_BSD = self.trunk(x0_BTD, positions, last or ids_BT.size(1), cache)
        if cache is not None:
            cache.advance(ids_BT)
        return self.final_norm(x_BSD), embedding_VD if self.head is None else self.head.effective_weight()

    def logits(
        self, ids_BT: Tensor, last: int | None = None, rope_base: float | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns fp32 logits_BSV of what `final_states` takes, soft-capped to +-logit_softcap."""
        logits_BSV = self.unembed(*self.final_states(ids_BT, last, rope_base, cache)).float()
        return self.config.logit_softcap * torch.tanh(logits_BSV / self.config.logit_softcap)

    def token_losses(self, ids_BT: Tensor, targets_BS: Tensor, rope_base: float | None = None) -> Tensor:
        """Returns fp32 losses_BS in nats of the last S positions' targets."""
        logits_BSV = self.logits(ids_BT, targets_BS.size(1), rope_base)
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view(targets_BS.shape)

    def token_nats(self, ids_BT: Tensor, last: int, rope_base: float | None = None) -> Tensor:
        """Returns fp32 nats_BSV of every token of the vocabulary behind the last S positions."""
        return -self.logits(ids_BT, last, rope_base).log_softmax(-1)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Returns the mean loss in nats, the training objective."""
        return self.token_losses(ids_BT, targets_BT).mean()


def gated_skip(x_BTD: Tensor, skip_BTD: Tensor, gate_D: Tensor) -> Tensor:
    """Returns skip + sigmoid(gate) (x - skip), half of each at first."""
    return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(gate_D).to(x_BTD.dtype))


@contextmanager
def opposite_knowledge(model: GPT) -> Iterator[None]:
    """Negates the knowledge tokens of `model` within the context."""
    model.knowledge.neg_()
    yield
    model.knowledge.neg_()


register_feature(
    Feature(
        "document_attention", lambda config: config.model.document_attention, "set document_attention=0", acts_always,
        without=partial(changed_model, document_attention=False),
        shows_in=lambda model, ids_BT: bool((ids_BT[:, 1:] == model.config.bos_id).any()),
    )
)  # fmt: skip
register_feature(
    Feature(
        "attention_window", lambda config: config.model.attention_window > 0, "set attention_window=0", acts_always,
        without=partial(changed_model, attention_window=0),
    )
)  # fmt: skip
register_feature(
    Feature(
        "knowledge_tokens", lambda config: config.model.knowledge_tokens > 0, "set knowledge_tokens=0", acts_always,
        without=opposite_knowledge,
    )
)  # fmt: skip
register_feature(
    Feature("skip_gates", lambda config: config.model.skip_gates, "set skip_gates=0", learned_weight="skip_gates")
)
