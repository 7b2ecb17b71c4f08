"""Prints the knobs of a published low-bit configuration: what its flags mean here, ready for the command line.

    python tools/study.py NAME|FILE.json [--json]
    python train_gpt.py --preset stories $(python tools/study.py quant_weights)

NAME is a file of configs/: normal, quant_weights, quant_weights_attn_act or quant_extreme. Exit status: 0 printed, 2
bad input: a flag that is unknown, or that does nothing without another.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.cli import ToolOptions, run_command
from lab.study.legacy_study import read_study


@dataclass(frozen=True)
class Options(ToolOptions):
    study: tyro.conf.Positional[str]
    """Name of a file of configs/, or a path."""


def work(options: Options) -> int:
    study = read_study(options.study)
    if options.json:
        print(json.dumps({"name": study.name, "flags": dict(study.flags), "knobs": study.knobs}))
    else:
        print(" ".join(f"{knob}={value}" for knob, value in study.knobs.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
