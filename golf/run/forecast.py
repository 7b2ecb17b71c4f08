"""Says before the first step how many of them the budget holds on this machine, and what runs with so many scored.

Packed scripts leave it out: it costs bytes, and changes no result.
"""

from statistics import median

from golf.config.config import Config, config_hash
from golf.optim.optimizers import Optimizers
from golf.run.trainer import STEP_MARGIN, Trainer
from golf.runtime import Stopwatch

FORECAST_STEPS = 3
"""Steps of each phase that are timed, off the training clock, after the warm-up."""
RECORDED_SCORES = {
    ("d38dd1604b089d8d9416", "7e426bd209081b39"): (
        (1_144, 1.1263),
        (1_289, 1.1149),
        (1_358, 1.1164),
        (1_875, 1.0904),
        (1_910, 1.0849),
        (1_941, 1.0804),
    ),
}
"""Steps and val_bpb of finished runs, by the hashes of their configuration and of their training text: `local` on the
embedded text (records/track_local/2026-11-29_local_sp2048_d160_successors and _quick_hour)."""
ALIKE = 1.25
"""Ratio of steps up to which a run on record says something of this one."""


def time_phase(trainer: Trainer, phase: tuple[bool, int, bool]) -> float:
    """Returns the median seconds of a few steps that change no weight."""
    trainer.enter(phase)
    watches = [Stopwatch() for _ in range(FORECAST_STEPS)]
    for watch in watches:
        with watch:
            trainer.accumulate_gradients(0)
            trainer.optimizers.step(progress=0.0, lr_scale=0.0)
            trainer.runtime.synchronize()
    return median(watch.seconds for watch in watches)


def forecast_budget(trainer: Trainer) -> tuple[int, float]:
    """Returns how many steps the budget holds, and their seconds, by a few steps of each phase; leaves no trace."""
    phases = set(map(trainer.phase, trainer.phase_starts()))
    timed = {phase: time_phase(trainer, phase) for phase in sorted(phases, reverse=True)}
    trainer.optimizers = Optimizers(trainer.model, trainer.config.optim, trainer.runtime)
    budget, steps, elapsed, margin = trainer.budget, 0, 0.0, STEP_MARGIN * max(timed.values())
    while not budget.exhausted(steps, elapsed, margin):
        elapsed += timed[trainer.phase(budget.progress(steps, elapsed))]
        steps += 1
    return steps, elapsed


def scores_on_record(config: Config, data_id: str, steps: int) -> str:
    """Returns what runs of this very configuration and text scored; nothing where there are none on record."""
    rows = RECORDED_SCORES.get((config_hash(config), data_id), ())
    alike = [row for row in rows if steps / ALIKE <= row[0] <= steps * ALIKE]
    if not rows:
        return ""
    counts, scores = zip(*(alike or rows), strict=True)
    text = f"; runs of {config.run.preset} with {min(counts):,} to {max(counts):,} steps scored "
    return text + f"{min(scores):.3f} to {max(scores):.3f}" + ("" if alike else ", none on record had so many as this")


def forecast_line(trainer: Trainer, data_id: str) -> str:
    """Returns a line for the log on the training that is about to begin."""
    steps, seconds = forecast_budget(trainer)
    step_text = f"{1000 * seconds / max(steps, 1):.0f} ms a step (timed after the warm-up)"
    scores = scores_on_record(trainer.config, data_id, steps)
    return f"forecast: {step_text}, about {steps:,} steps in {seconds:,.0f} s{scores}"
