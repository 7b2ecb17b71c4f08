"""Teaches the beginning of a token beside the token: a second target in the first part of the training.

The second target of a token is the vocabulary's longest piece that is a proper prefix of it. It costs no parameter and
no byte of the artifact, since the same logits serve (modded-nanogpt, record 88).

B batch, T time, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config.features import Feature, StepFacts, register_feature
from golf.config.training import TrainConfig
from golf.data.tokenizer import Tokenizer
from golf.model.gpt import GPT

NO_PREFIX = -100
"""What nll_loss ignores."""


def prefix_table(tokenizer: Tokenizer) -> Tensor:
    """Returns for each token of the vocabulary the one of its longest proper prefix, or NO_PREFIX."""
    numbers = {piece: number for number, piece in enumerate(tokenizer.pieces) if piece}

    def prefix_of(piece: str | bytes) -> int:
        shorter = (piece[:length] for length in range(len(piece) - 1, 0, -1))
        return next((numbers[part] for part in shorter if part in numbers), NO_PREFIX)

    return torch.tensor([prefix_of(piece) for piece in tokenizer.pieces])


def prefix_weight(progress: float, train: TrainConfig) -> float:
    """Returns the second target's weight: constant for a share of the budget, then falling to 0 over another such."""
    return train.prefix_weight * min(1.0, max(0.0, 2 - progress / train.prefix_fraction))


class PrefixObjective(nn.Module):
    """Computes the mean loss of the targets, plus `weight` times that of their prefixes."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        super().__init__()
        self.model, device = model, model.skip_weights.device
        self.register_buffer("table_V", prefix_table(tokenizer).to(device), persistent=False)
        self.register_buffer("weight", torch.zeros((), device=device), persistent=False)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        log_p_NV, targets_N = self.model.logits(ids_BT).flatten(0, 1).log_softmax(-1), targets_BT.flatten()
        prefix_loss = F.nll_loss(log_p_NV, self.table_V[targets_N], ignore_index=NO_PREFIX, reduction="sum")
        return F.nll_loss(log_p_NV, targets_N) + self.weight * prefix_loss / targets_N.numel()


def prefixes_count(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether prefixes counted in a step, and when they no longer do the effect."""
    weight = prefix_weight(facts.progress, config.train)
    return weight > 0, "" if weight else f"prefixes weighed {config.train.prefix_weight} at first, then 0"


register_feature(
    Feature(
        "prefix_target", lambda config: config.train.prefix_weight > 0, "train longer, or set prefix_weight=0",
        prefixes_count,
    )
)  # fmt: skip
