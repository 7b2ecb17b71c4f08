"""Repeats blocks in the middle of the network: depth recurrence (parameter-golf pull requests 1204, 1493)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from golf.config.features import Feature, StepFacts, register_feature
from golf.config.model import ModelConfig


def layer_order(model: ModelConfig, looping: bool = True) -> list[int]:
    """Returns the blocks in the order in which they run; with `looping`, those that repeat several times in a row."""
    layers = list(range(model.num_layers))
    if not (looping and model.loop_repeats):
        return layers
    first, behind = model.loop_first, model.loop_last + 1
    return layers[:first] + (1 + model.loop_repeats) * layers[first:behind] + layers[behind:]


def runs_of(name: str, model: ModelConfig) -> int:
    """Returns how often a forward pass uses the tensor of that name."""
    place = name.removeprefix("blocks.").split(".")[0]
    return layer_order(model).count(int(place)) if name.startswith("blocks.") else 1


@contextmanager
def run_once(model: nn.Module) -> Iterator[None]:
    """Runs every block of a GPT once within the context."""
    looping, model.looping = model.looping, False
    yield
    model.looping = looping


def blocks_repeat(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step repeats blocks."""
    return facts.progress >= config.train.loop_start, ""


register_feature(
    Feature(
        "depth_recurrence", lambda config: config.model.loop_repeats > 0, "train longer, or lower loop_start",
        blocks_repeat, without=run_once,
    )
)  # fmt: skip
