"""Computes schedules as functions of progress: the share of the binding budget that is used up."""

import math
from dataclasses import dataclass
from typing import Any

from golf.config.config import Config
from golf.config.features import Feature, StepFacts, register_feature
from golf.config.training import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Limits training to `iterations` steps and `seconds` seconds; 0 means no limit of that kind."""

    iterations: int
    seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """Returns the share used up after `step` steps and `elapsed` seconds, of whichever limit is nearer."""
        by_steps = step / self.iterations if self.iterations else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def exhausted(self, step: int, elapsed: float, step_seconds: float) -> bool:
        """Returns True when one more step of `step_seconds` would go past a limit."""
        out_of_steps = self.iterations > 0 and step >= self.iterations
        return out_of_steps or (self.seconds > 0 and elapsed + step_seconds > self.seconds)


def training_budget(config: Config) -> Budget:
    """Returns the budget of optimizer steps: the wall clock's cap less what calibration will need of it."""
    seconds = config.train.max_wallclock_seconds
    if seconds and config.quant.quantizer == "waterfill":
        assert seconds > config.quant.calibration_reserve  # check_config refuses the rest; 0 would be no limit
        seconds -= config.quant.calibration_reserve
    return Budget(config.train.iterations, seconds)


def learning_rate_scale(progress: float, config: TrainConfig) -> float:
    """Returns 1, then falls over the last `warmdown_fraction` of the budget: 0.5 (1 + cos(pi t)) or 1 - t, to 0 or to
    `warmdown_floor`; after a change to longer rows it rises again from 0."""
    scale = 1.0
    if progress >= 1 - config.warmdown_fraction and config.warmdown_fraction > 0:
        t = (progress - (1 - config.warmdown_fraction)) / config.warmdown_fraction
        scale = 0.5 * (1 + math.cos(math.pi * t)) if config.warmdown_shape == "cosine" else 1 - t
    if config.warmdown_floor:
        scale = config.warmdown_floor + (1 - config.warmdown_floor) * scale
    return scale * rewarmup_scale(progress, config) if config.seq_rewarmup_fraction else scale


def rewarmup_scale(progress: float, config: TrainConfig) -> float:
    """Returns the share of the learning rate after the last change to longer rows."""
    changes = [change for change in (config.short_seq_fraction, config.middle_seq_fraction) if 0 < change <= progress]
    return min(1.0, (progress - max(changes)) / config.seq_rewarmup_fraction) if changes else 1.0


def warmdown_acts(config: Any, facts: StepFacts) -> tuple[bool, str]:
    """Returns whether a step's learning rate was below its peak, and the effect."""
    scale = learning_rate_scale(facts.progress, config.train)
    return scale < 1, f"learning rate down to {scale:.4f} of its height" if scale < 1 else ""


register_feature(
    Feature(
        "warmdown", lambda config: config.train.warmdown_fraction > 0, "train longer, or set warmdown_fraction=0",
        warmdown_acts,
    )
)  # fmt: skip
