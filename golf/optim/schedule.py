"""What changes during training, as functions of progress: the share of the binding budget that is used up."""

import math
from dataclasses import dataclass

from golf.config.config import Config, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Budget:
    """At most `iterations` steps and `seconds` seconds; 0 means no limit of that kind."""

    iterations: int
    seconds: float

    def progress(self, step: int, elapsed: float) -> float:
        """Share used up after `step` steps and `elapsed` seconds, of whichever limit is nearer."""
        by_steps = step / self.iterations if self.iterations else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def exhausted(self, step: int, elapsed: float, step_seconds: float) -> bool:
        """True when one more step, at the measured time of a step, would go past a limit."""
        out_of_steps = self.iterations > 0 and step >= self.iterations
        return out_of_steps or (self.seconds > 0 and elapsed + step_seconds > self.seconds)


def training_budget(config: Config) -> Budget:
    """Of optimizer steps: the wall clock's cap, less what calibration will need of it."""
    seconds = config.train.max_wallclock_seconds
    if seconds and config.quant.quantizer == "waterfill":
        assert seconds > config.quant.calibration_reserve  # check_config refuses the rest; 0 would be no limit
        seconds -= config.quant.calibration_reserve
    return Budget(config.train.iterations, seconds)


def learning_rate_scale(progress: float, config: TrainConfig) -> float:
    """1, then down to 0 over the last `warmdown_fraction` of the budget: 0.5 (1 + cos(pi t)) or 1 - t."""
    if progress < 1 - config.warmdown_fraction or config.warmdown_fraction == 0:
        return 1.0
    t = (progress - (1 - config.warmdown_fraction)) / config.warmdown_fraction
    return 0.5 * (1 + math.cos(math.pi * t)) if config.warmdown_shape == "cosine" else 1 - t


def muon_momentum(progress: float, config: OptimConfig) -> float:
    """Linear from `muon_momentum_start` to `muon_momentum` over `muon_momentum_warmup_fraction` of the budget."""
    warmup = config.muon_momentum_warmup_fraction
    share = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum
