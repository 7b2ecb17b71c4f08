"""Caches keys and values of the positions that a model has read, so that later tokens need not read them again.

B batch, G key/value heads, T new positions, U kept positions, K head width. A cache belongs to one model, one batch and
one RoPE base. Knowledge tokens come first and are never evicted.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from golf.config.model import ModelConfig
from golf.model.recurrence import layer_order

QuantizerSite = Callable[[Tensor], Tensor]
"""An activation's quantizer, or the identity."""


class LayerCache(Protocol):
    """Keeps one block's keys and values."""

    last_key: Tensor | None
    """Key of the last position before RoPE and `key_offset`, which the next one takes a part of."""

    def extend(
        self, k_BGTK: Tensor, v_BGTK: Tensor, act_k: QuantizerSite, act_v: QuantizerSite
    ) -> tuple[Tensor, Tensor]:
        """Quantizes new keys (after RoPE) and values and keeps them; returns all kept ones, the new ones last."""

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the kept tensors."""


class PlainLayer:
    """Keeps keys and values unpacked: the first `pinned` positions and the last `window` (0: all)."""

    def __init__(self, pinned: int, window: int):
        self.pinned, self.window, self.last_key = pinned, window, None
        self.k_BGUK = self.v_BGUK = None

    def extend(
        self, k_BGTK: Tensor, v_BGTK: Tensor, act_k: QuantizerSite, act_v: QuantizerSite
    ) -> tuple[Tensor, Tensor]:
        k_BGTK, v_BGTK = act_k(k_BGTK), act_v(v_BGTK)
        if self.k_BGUK is not None:
            k_BGTK, v_BGTK = (torch.cat((old, new), 2) for old, new in ((self.k_BGUK, k_BGTK), (self.v_BGUK, v_BGTK)))
        self.k_BGUK, self.v_BGUK = (keep_window(part, self.pinned, self.window) for part in (k_BGTK, v_BGTK))
        return k_BGTK, v_BGTK

    @property
    def nbytes(self) -> int:
        return 0 if self.k_BGUK is None else self.k_BGUK.nbytes + self.v_BGUK.nbytes


def keep_window(x: Tensor, pinned: int, window: int, dim: int = 2) -> Tensor:
    """Returns the positions that later queries can still see: the pinned ones and the last `window` - 1 (0: all)."""
    kept = max(window - 1, 0)
    if not window or x.size(dim) <= pinned + kept:
        return x
    first, last = x.narrow(dim, 0, pinned), x.narrow(dim, x.size(dim) - kept, kept)
    return torch.cat((first, last), dim)


class KeyValueCache:
    """Caches a whole model's keys and values, empty at first; `layers` holds each block's part."""

    def __init__(self, config: ModelConfig, make_layer: Callable[[int, int], LayerCache] = PlainLayer):
        self.config, self.length = config, 0
        self.layers = [make_layer(config.knowledge_tokens, config.attention_window) for _ in layer_order(config)]
        self.recent_BR: Tensor | None = None
        """The last two ids, on which the next embedding depends."""
        self.document_BU: Tensor | None = None
        self.latest_B1: Tensor | None = None
        """The last document's number, which a window of 1 does not keep."""

    def advance(self, ids_BT: Tensor) -> None:
        """Records that the model has read `ids_BT`."""
        self.length += ids_BT.size(1)
        known_BR = ids_BT if self.recent_BR is None else torch.cat((self.recent_BR, ids_BT), 1)
        self.recent_BR = known_BR[:, -2:]

    def documents(self, document_BT: Tensor) -> Tensor:
        """Returns the document numbers of all keys, given those of the new positions, which count from 0."""
        if self.document_BU is not None:
            document_BT = torch.cat((self.document_BU, document_BT + self.latest_B1), 1)
        self.latest_B1 = document_BT[:, -1:]
        self.document_BU = keep_window(document_BT, self.config.knowledge_tokens, self.config.attention_window, 1)
        return document_BT
