"""Writes a run's figures as TensorBoard's event files, into its folder `tensorboard`.

    python tools/track.py runs/RUN_ID [--follow]
    tensorboard --logdir runs

The figures are those of metrics.jsonl, and of the result at the last step. With --follow it goes on while the run does,
at the lowest priority, until the run has a result; Ctrl-C ends it before that, with all that was written kept. Nothing
leaves the machine. Needs tensorboard (pip install -r requirements-track.txt).

Exit status: 0 written, 2 bad input.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.run.folder import RunFolder
from lab.cli import ToolOptions, run_command
from lab.track.event_files import events_folder, write_events


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    follow: bool = False
    """Go on while the run does."""


def work(options: Options) -> int:
    folder = RunFolder(options.run)
    if options.follow:
        os.nice(19)  # a laptop's two cores are the training's
    try:
        rows, step = write_events(folder, folder.result.exists if options.follow else lambda: True)
    except KeyboardInterrupt:
        print("track: ended before the run", file=sys.stderr)
        return 0
    if options.json:
        print(json.dumps({"rows": rows, "step": step, "folder": str(events_folder(folder))}))
    else:
        print(f"{rows:,} rows up to step {step:,} in {events_folder(folder)}: tensorboard --logdir {folder.path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
