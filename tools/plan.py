"""What a run will do at which second and step, how large it will be, how long it will be scored: before it costs.

python train_gpt.py --plan [--preset P] [--step-ms X] [--world-size N] [--no-code] [key=value ...]

Exit status: 0 all that is switched on will act, 1 something will not (each is a line), 2 bad input.
"""

import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from golf.config import UserError, build_config
from golf.run.command import parse_overrides
from golf.run.plan import plan_lines, plan_run
from golf.submit.bundler import bundle_source
from golf.submit.packer import pack_source

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PlanOptions:
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
    code: bool = True
    """Count the packed code too (it takes seconds to pack)."""
    debug: bool = False
    """Show a traceback with an error."""


def plan(options: PlanOptions) -> int:
    named = {"preset": options.preset, "corpus": options.corpus}
    overrides = parse_overrides(options.knobs) | {knob: value for knob, value in named.items() if value}
    config = build_config("leaderboard" if torch.cuda.is_available() else "local", os.environ, overrides)
    code = pack_source(bundle_source(REPOSITORY / "train_gpt.py", REPOSITORY)) if options.code else ""
    step_seconds = None if options.step_ms is None else options.step_ms / 1000
    planned = plan_run(config, step_seconds, options.world_size, len(code.encode()))
    print("\n".join(plan_lines(planned)))
    return 1 if planned.problems else 0


def main() -> int:
    options = tyro.cli(PlanOptions, description=__doc__)
    try:
        return plan(options)
    except (UserError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"plan.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
