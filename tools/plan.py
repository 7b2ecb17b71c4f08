"""Says what a run will do at which second and step, how large it will be, how long it will be scored: before it costs.

python train_gpt.py --plan [--preset P] [--step-ms X] [--world-size N] [--no-code] [--json] [key=value ...]

Exit status: 0 all that is switched on will act, 1 something will not (each is a line), 2 bad input.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from golf.config.config import Config, build_config
from golf.config.knobs import EXIT_FINDINGS, ConfigError
from golf.run.command import parse_overrides
from lab.bundle.bundler import bundle_source
from lab.bundle.frozen import freeze_config
from lab.bundle.packer import pack_source
from lab.cli import ToolOptions, run_command
from lab.machine.plan import RunPlan, plan_lines, plan_run, timeline

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    knobs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Knobs as key=value."""
    preset: str = ""
    """Default: the one that the training script would take here."""
    corpus: str = ""
    """Text to train on, as for the training script."""
    step_ms: float | None = None
    """Milliseconds of a step; default: what was measured of the preset, on the machine that is named."""
    world_size: int = 1
    """Processes that share a step."""
    no_code: bool = False
    """Leave out the bytes of the packed code (it takes seconds to pack)."""


def plan_dict(plan: RunPlan) -> dict[str, Any]:
    """Returns the figures of the plan; those that are forecast as the least and the most."""
    config = plan.config
    return {
        "preset": config.run.preset,
        "steps": plan.end.step,
        "train_seconds": plan.end.seconds,
        "step_ms": 1000 * plan.step_seconds,
        "step_ms_source": plan.source,
        "train_batch_tokens": config.train.train_batch_tokens,
        "timeline": [moment._asdict() | {"what": what} for moment, what in timeline(plan)],
        "bytes_code": plan.bytes_code,
        "bytes_model": list(plan.bytes_model),
        "bytes_total": [part + plan.bytes_code for part in plan.bytes_model],
        "limit_bytes": config.run.limit_bytes,
        "eval_seconds": plan.scoring_seconds and list(plan.scoring_seconds),
        "max_eval_seconds": config.score.max_eval_seconds,
        "problems": plan.problems,
    }


def packed_code(config: Config) -> bytes:
    """Returns the script that a run with this configuration would ship."""
    return pack_source(bundle_source(REPOSITORY / "train_gpt.py", REPOSITORY, freeze_config(config)))


def work(options: Options) -> int:
    if options.world_size < 1:
        raise ConfigError(f"--world-size {options.world_size}: a step needs at least one process")
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides = parse_overrides(options.knobs) | {knob: value for knob, value in named.items() if value}
    config = build_config("leaderboard" if torch.cuda.is_available() else "local", os.environ, overrides)
    code = b"" if options.no_code else packed_code(config)
    step_seconds = None if options.step_ms is None else options.step_ms / 1000
    planned = plan_run(config, step_seconds, options.world_size, len(code))
    print(json.dumps(plan_dict(planned)) if options.json else "\n".join(plan_lines(planned)))
    return EXIT_FINDINGS if planned.problems else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
