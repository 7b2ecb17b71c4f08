"""Does what every tool does around its work: a typed command line, one line for a mistake, an exit status."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from golf.config.config import EXIT_BAD_INPUT, Config, RunConfig, UserError, check_config


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """Holds what all tools understand."""

    json: bool = False
    """Print one JSON object instead of tables."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(ToolOptions):
    """Holds what tools that run a model understand besides."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    threads: int = 0
    """CPU threads; 0: torch's own choice."""

    def run_config(self, compile: Literal["auto", "on", "off"] = "off") -> RunConfig:
        """Returns the checked configuration of the tool's runtime. Raises ConfigError."""
        run = RunConfig(device=self.device, threads=self.threads, compile=compile)
        check_config(Config(run=run))
        return run


AnyOptions = TypeVar("AnyOptions", bound=ToolOptions)


def run_command(options_type: type[AnyOptions], description: str | None, work: Callable[[AnyOptions], int]) -> int:
    """Returns the exit status of `work` on the command line's options; 2 after one clear line for bad input."""
    options = tyro.cli(options_type, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return work(options)
    except (UserError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_BAD_INPUT
