"""Forecast a training step on H100s without a GPU: kernels, bytes, operations, memory, and modelled milliseconds.

python tools/gpu_forecast.py --preset leaderboard [--world-size 8] [--machine-code] [--json]\n    [key=value ...]

Counts are of the code that is generated for the device; times are modelled from them. Needs the triton package (it is
among the tests' requirements). Exit status: 0 printed, 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.config.config import build_config
from golf.run.command import parse_overrides
from lab.cli import ToolOptions, run_command
from lab.machine.fake_gpu import pretend


@dataclass(frozen=True)
class Options(ToolOptions):
    knobs: tyro.conf.Positional[tuple[str, ...]] = ()
    """key=value changes to the preset."""
    preset: str = "leaderboard"
    world_size: int = 8
    """GPUs."""
    machine_code: bool = False
    """Compile every generated kernel, and count its instructions and spills (half a minute more)."""


def work(options: Options) -> int:
    """Prints the forecast as a table, or as JSON."""
    config = build_config(options.preset, {}, parse_overrides(options.knobs))
    pretend()
    from lab.machine.gpu_forecast import forecast_step, forecast_table
    from lab.machine.machine_code import code_table, kernel_codes

    forecast = forecast_step(config, options.world_size)
    kernels = [kernel for program in forecast.programs if options.machine_code for kernel in kernel_codes(program)]
    if options.json:
        sums = {"modelled_ms": forecast.modelled_ms, "launches": forecast.launches, "peak_bytes": forecast.memory.peak}
        record = asdict(forecast) | sums | {"kernels": [asdict(kernel) for kernel in kernels]}
        print(json.dumps({key: value for key, value in record.items() if key != "programs"}))
    else:
        print(forecast_table(forecast))
        if kernels:
            print(code_table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
