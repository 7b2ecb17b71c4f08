"""Write what of this machine changes speed or numerics into a run's machine.json.

python tools/fingerprint.py RUN [--world-size N] [--json]

The run's configuration says which device and which attention shapes are asked about.
Exit status: 0 written, 2 bad input.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.run.folder import RunFolder
from golf.runtime import Runtime, choose_compile, choose_device
from lab.cli import ToolOptions, run_command
from lab.machine.fingerprint import machine_fingerprint


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    world_size: int = 1
    """Processes of the run."""


def work(options: Options) -> int:
    """Writes the file, and prints it with --json."""
    folder = RunFolder(options.run)
    config = folder.load_config()
    device = choose_device(config.run.device)
    runtime = Runtime(device, compiles=choose_compile(config.run.compile, device))
    runtime = replace(runtime, world_size=options.world_size)
    found = machine_fingerprint(runtime, os.environ, folder.path, config)
    folder.save_json(folder.machine, found)
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
