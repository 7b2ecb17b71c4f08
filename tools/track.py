"""Writes a run's figures for TensorBoard, or for Weights & Biases in its offline mode, into the run's folder.

    python tools/track.py runs/RUN_ID [--to wandb] [--follow]
    tensorboard --logdir runs

The figures are those of metrics.jsonl, and of the result at the last step. With --follow it goes on while the run does,
at the lowest priority, until the run has a result; Ctrl-C ends it before that, with all that was written kept. Nothing
leaves the machine. `track=tensorboard` or `track=wandb` starts it with a run. Needs requirements-track.txt.

Exit status: 0 written, 2 bad input.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.run.folder import RunFolder
from lab.cli import ToolOptions, run_command
from lab.track.event_files import EventFiles, events_folder
from lab.track.following import follow_run
from lab.track.offline_runs import OfflineRun, offline_folder

TRACKERS = {
    "tensorboard": (EventFiles, events_folder, "tensorboard --logdir {}"),
    "wandb": (OfflineRun, offline_folder, "`wandb sync` would send it: {}"),
}


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Literal["tensorboard", "wandb"] = "tensorboard"
    """Whose files to write."""
    follow: bool = False
    """Go on while the run does."""
    process: int = 0
    """With --follow: end where this process, which is the run's, has ended."""


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def work(options: Options) -> int:
    folder = RunFolder(options.run)
    open_tracker, place_of, shown_by = TRACKERS[options.to]

    def ended() -> bool:
        return not options.follow or folder.result.exists() or bool(options.process and not is_running(options.process))

    if options.follow:
        os.nice(19)  # a laptop's two cores are the training's
    try:
        rows, step = follow_run(folder, open_tracker, ended)
    except KeyboardInterrupt:
        print("track: ended before the run", file=sys.stderr)
        return 0
    place = place_of(folder)
    if options.json:
        print(json.dumps({"rows": rows, "step": step, "folder": str(place)}))
    else:
        print(f"{rows:,} rows up to step {step:,} in {place}: {shown_by.format(place)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
