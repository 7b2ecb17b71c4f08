"""Registers features: beside its code, each defines when it is on and how it shows that it acted.

A run counts the acts of every feature that is on and verifies its effect once (golf/run/feature_audit.py); a feature
that never acted makes the run invalid. A feature only has to register: no other folder knows it by name.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

Verdict = tuple[bool, str]
"""Whether an effect was seen, and a description of it."""


@dataclass(frozen=True)
class StepFacts:
    """Describes a finished training step."""

    progress: float
    """Share of the budget that was used up before the step."""
    seq_len: int
    """Tokens of a row in the step."""
    fake_quantized: bool
    gradient_norm: float | None
    """Norm before clipping; None where gradients are not clipped."""


@dataclass(frozen=True)
class Feature:
    """Describes one feature of a run.

    Hooks that do not apply stay None; one hook must count the feature's acts, and one must verify its effect.
    """

    name: str
    is_on: Callable[[Any], bool]
    """Returns whether a Config switches it on."""
    hint: str
    """Advice for the user when it is on and never acts."""
    in_step: Callable[[Any, StepFacts], tuple[bool, str]] | None = None
    """Returns (whether it acted in a training step, the effect that this verifies or ""), from the Config and the
    step."""
    without: Callable[[Any], AbstractContextManager[None]] | None = None
    """Context in which a GPT computes as if the feature were off: the compiled step's loss must differ from the loss in
    it."""
    shows_in: Callable[[Any, Any], bool] | None = None
    """Returns whether a batch (GPT, ids_BT) can show the difference; None: any batch can."""
    verify_step: Callable[[Callable, Any, tuple], Verdict] | None = None
    """Verifies the compiled step from (compiled forward, GPT, batch), where a difference of losses can't show the
    effect."""
    verified_at_start: bool = False
    """True: verify before the first step, with the untrained weights; else after the last."""
    learned_weight: str = ""
    """Name of a weight that starts at zero and acts by what it learns."""
    in_files: Callable[[Mapping[str, Any]], tuple[int, bool, str]] | None = None
    """Returns (acts, whether an effect was seen, the effect) from the files of later stages: pruning, reload, score."""


FEATURES: dict[str, Feature] = {}
"""Features by name, in the order in which their modules register them."""


class Auditor(Protocol):
    """Receives the counts and verifications that a feature's own code reports."""

    def count(self, feature: str, step: int | None = None, count: int = 1) -> None: ...

    def verify(self, feature: str, holds: bool, effect: str) -> None: ...


def register_feature(feature: Feature) -> Feature:
    """Adds a feature to the registry and returns it."""
    assert feature.name not in FEATURES, f"two features are called {feature.name}"
    FEATURES[feature.name] = feature
    return feature


def features_on(config: Any) -> dict[str, Feature]:
    """Returns the features that a Config switches on, by name."""
    return {name: feature for name, feature in FEATURES.items() if feature.is_on(config)}
