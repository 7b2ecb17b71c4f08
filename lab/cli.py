"""What every tool does around its work: a typed command line, one line for a mistake, an exit status."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from golf.config.knobs import EXIT_BAD_INPUT, UserError


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """What all tools understand."""

    json: bool = False
    """Print one JSON object instead of tables."""
    debug: bool = False
    """Show a traceback with an error."""


AnyOptions = TypeVar("AnyOptions", bound=ToolOptions)


def run_command(options_type: type[AnyOptions], description: str | None, work: Callable[[AnyOptions], int]) -> int:
    """Exit status of `work` on the options of the command line; 2 after one clear line where the input is bad."""
    options = tyro.cli(options_type, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return work(options)
    except (UserError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_BAD_INPUT
