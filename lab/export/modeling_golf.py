"""Opens a model of golf in transformers: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

The file of this name in an exported folder is made from this one and from golf's own model: its forward pass is the one
that trained and that was scored.

B rows, T positions, S positions whose logits are wanted, V tokens of the vocabulary.
"""

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from golf.config.model import ModelConfig
from golf.model.cache import KeyValueCache, PlainLayer
from golf.model.gpt import GPT

BUNDLED = False


class GolfConfig(PretrainedConfig):
    """Holds the network's own configuration as `golf`."""

    model_type = "golf"

    def __init__(self, golf: dict[str, Any] | None = None, **others: Any):
        self.golf = golf or {}
        super().__init__(**others)


class BeamLayer(PlainLayer):
    """Keeps keys and values of rows that change places."""

    def reorder(self, row_B: Tensor) -> None:
        for name in ("last_key", "k_BGUK", "v_BGUK"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else part[row_B])


class BeamCache(KeyValueCache):
    """Keeps what rows have read, for a search that drops some and doubles others."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, BeamLayer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder(beam_idx)
        for name in ("recent_BR", "document_BU", "latest_B1"):
            part = getattr(self, name)
            setattr(self, name, None if part is None else part[beam_idx])


class GolfForCausalLM(PreTrainedModel, GenerationMixin):
    """Predicts each next token. Rows have one length: there is no padding, which the network never saw."""

    config_class = GolfConfig

    def __init__(self, config: GolfConfig):
        super().__init__(config)
        known = {field.name for field in fields(ModelConfig)}
        self.golf = GPT(ModelConfig(**{name: value for name, value in config.golf.items() if name in known}))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        cache: BeamCache | None = None, use_cache: bool | None = None, logits_to_keep: int = 0, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Returns fp32 logits_BSV of the last `logits_to_keep` positions (0: all), and the mean loss where there are
        `labels_BT` (-100: not counted). Raises ValueError for a mask that hides something."""
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all()):
            raise ValueError("this model takes no padding: give rows of one length, or one row at a time")
        if use_cache and cache is None:
            cache = BeamCache(self.golf.config)
        logits_BSV = self.golf.logits(input_ids, logits_to_keep or None, cache=cache)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, cache=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: BeamCache | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> dict[str, Any]:
        """Returns what `forward` takes: the tokens that the cache has not read."""
        read = cache.length if cache is not None else 0
        uses = others.get("use_cache")
        return {
            "input_ids": input_ids[:, read:], "attention_mask": attention_mask, "cache": cache,
            "use_cache": True if uses is None else uses, "logits_to_keep": 1,
        }  # fmt: skip


if __name__ != "__main__":  # `save_pretrained` writes this file too
    GolfConfig.register_for_auto_class()
    GolfForCausalLM.register_for_auto_class("AutoModelForCausalLM")
