"""Check the CUDA path on a real GPU in its first ten minutes: PASS, FAIL or a figure for each check.

python tools/gpu_check.py [--preset leaderboard] [--seconds 540] [--out gpu_check.json] [key=value ...]

Stops by itself after nine minutes; every result is on the disk at once. Whole runs need data: give corpus=PATH, or have
the preset's shards. Exit status: 0 all passed, 1 a check failed or was not run, 2 bad input.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.config.config import build_config
from golf.config.knobs import EXIT_FINDINGS, ConfigError
from golf.run.command import parse_overrides
from golf.runtime import start_runtime
from lab.cli import ToolOptions, run_command
from lab.machine.gpu_check import CHECKS, DEFAULT_SECONDS, RUN_KNOBS, Setting, run_checks


@dataclass(frozen=True)
class Options(ToolOptions):
    knobs: tyro.conf.Positional[tuple[str, ...]] = ()
    """key=value changes to the preset."""
    preset: str = "leaderboard"
    seconds: float = DEFAULT_SECONDS
    """After which no check begins."""
    out: Path = Path("gpu_check.json")
    """File of the results."""
    only: tuple[str, ...] = ()
    """Names of the checks to run; default: all."""


def work(options: Options) -> int:
    """Runs the checks and prints a line for each, or all of them as JSON."""
    if unknown := sorted(set(options.only) - CHECKS.keys()):
        raise ConfigError(f"there is no check {unknown[0]!r}: choose of {', '.join(CHECKS)}")
    config = build_config(options.preset, {}, parse_overrides(options.knobs))
    tell = (lambda line: None) if options.json else print
    with tempfile.TemporaryDirectory() as folder, start_runtime(config.run, "check") as runtime:
        setting = Setting(config, runtime, Path(folder), (*RUN_KNOBS, *options.knobs))
        rows = run_checks(setting, options.out, options.seconds, options.only, tell=tell)
    if options.json:
        print(json.dumps(rows, default=str))
    return 0 if all(row["verdict"] == "PASS" for row in rows) else EXIT_FINDINGS


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
