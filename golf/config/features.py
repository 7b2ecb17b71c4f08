"""The registry of features: each says beside its own code when it is on, and how it shows that it acted.

A run counts the acts of every feature that is on and verifies an effect once (golf/run/feature_audit.py); one that
never acted makes the run invalid. Registering is all that a room does to take part: no other room knows a feature
by name.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

Verdict = tuple[bool, str]
"""Whether an effect was seen, and what it was."""


@dataclass(frozen=True)
class StepFacts:
    """What a finished training step was."""

    progress: float
    """Share of the budget that was used up before it."""
    seq_len: int
    """Tokens of its rows."""
    fake_quantized: bool
    gradient_norm: float | None
    """Before clipping; None where gradients are not clipped."""


@dataclass(frozen=True)
class Feature:
    """One feature of a run. Hooks that do not apply stay None; one must count its acts, and one verify its effect."""

    name: str
    is_on: Callable[[Any], bool]
    """Whether a Config switches it on."""
    hint: str
    """What to do about one that is on and never acts."""
    in_step: Callable[[Any, StepFacts], tuple[bool, str]] | None = None
    """(whether it acted in a training step, the effect that this verifies or ""), from the Config and the step."""
    without: Callable[[Any], AbstractContextManager[None]] | None = None
    """Within it a GPT computes as if the feature were off: the compiled step must differ from that."""
    shows_in: Callable[[Any, Any], bool] | None = None
    """Whether a batch (GPT, ids_BT) can show the difference; None: any can."""
    verify_step: Callable[[Callable, Any, tuple], Verdict] | None = None
    """Own verification of the compiled step, from (compiled forward, GPT, batch), where losses can't show it."""
    verified_at_start: bool = False
    """Verify before the first step, with the untrained weights; else after the last."""
    learned_weight: str = ""
    """Weight that starts at zero, and acts by what it learns."""
    in_files: Callable[[Mapping[str, Any]], tuple[int, bool, str]] | None = None
    """(acts, whether an effect was seen, the effect) from the files of later stages: pruning, reload, score."""


FEATURES: dict[str, Feature] = {}
"""By name, in the order of the rooms."""


class Auditor(Protocol):
    """What a feature's own code is handed where it counts and verifies by itself."""

    def count(self, feature: str, step: int | None = None, count: int = 1) -> None: ...

    def verify(self, feature: str, holds: bool, effect: str) -> None: ...


def register_feature(feature: Feature) -> Feature:
    """Adds a feature to the registry, and returns it."""
    assert feature.name not in FEATURES, f"two features are called {feature.name}"
    FEATURES[feature.name] = feature
    return feature


def features_on(config: Any) -> dict[str, Feature]:
    """Returns the features that a Config switches on, by name."""
    return {name: feature for name, feature in FEATURES.items() if feature.is_on(config)}
