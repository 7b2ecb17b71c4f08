"""Audits features: counts the acts of each that is on, and verifies its effect; one without makes a run invalid."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from golf.config.config import Config
from golf.config.features import StepFacts, features_on


@dataclass
class FeatureRecord:
    """Records what one feature did; steps are training steps, None for features that act elsewhere."""

    first: int | None = None
    last: int | None = None
    count: int = 0
    effect: str = ""
    proven: bool = False


class FeatureAudit:
    """Keeps records of the features that are on. Counting one that is off is a mistake of ours."""

    def __init__(self, config: Config, values: Mapping[str, Mapping[str, Any]] | None = None):
        self.config, self.features = config, features_on(config)
        self.records = {name: FeatureRecord(**(values or {}).get(name, {})) for name in self.features}

    def count(self, feature: str, step: int | None = None, count: int = 1) -> None:
        """Adds `count` acts of a feature, at `step` of the training."""
        record = self.records[feature]
        record.count += count
        if step is not None:
            record.first = step if record.first is None else record.first
            record.last = step

    def verify(self, feature: str, holds: bool, effect: str) -> None:
        """Records whether the effect of a feature was seen, and what it was."""
        self.records[feature].proven, self.records[feature].effect = bool(holds), effect

    def note_step(self, step: int, facts: StepFacts) -> None:
        """Counts every feature that acted in a training step."""
        for name, feature in self.features.items():
            acted, effect = feature.in_step(self.config, facts) if feature.in_step else (False, "")
            if acted:
                self.count(name, step)
            if effect:
                self.verify(name, True, effect)

    def note_weights(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Counts the features that learn in every step; their weights must have moved from zero."""
        for name, feature in self.features.items():
            if feature.learned_weight:
                weight = weights[feature.learned_weight]
                moved = int((weight != 0).sum())
                self.count(name, 1)
                self.count(name, steps, steps - 1)
                self.verify(name, moved > 0, f"{moved} of {weight.numel()} weights moved from zero")

    def note_files(self, files: Mapping[str, Any]) -> None:
        """Counts what features did after training, from the values in the files of the later stages."""
        for name, feature in self.features.items():
            if feature.in_files:
                acts, holds, effect = feature.in_files(files)
                self.count(name, count=acts)
                self.verify(name, holds, effect)

    def record(self) -> dict[str, dict[str, Any]]:
        """Returns all records as plain values, for JSON."""
        return {name: asdict(record) for name, record in self.records.items()}

    def findings(self) -> list[str]:
        """Returns a line for each feature that was on and did not act, or acted without effect."""
        findings = []
        for name, record in self.records.items():
            if record.count == 0:
                findings.append(f"{name} was switched on and never acted: {self.features[name].hint}")
            elif not record.proven:
                effect = record.effect or "no measurement"
                findings.append(f"{name} acted {record.count} times, but its effect was not seen ({effect})")
        return findings
