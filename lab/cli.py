"""Does what every tool does around its work: a typed command line, one line for a mistake, an exit status."""

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import tyro

from golf.config.config import Config, check_config
from golf.config.knobs import EXIT_BAD_INPUT, UserError
from golf.config.run import RunConfig


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


def lab_library(module: str) -> ModuleType:
    """Imports a module of requirements-lab.txt, which a run does not need. Raises UserError where it is not installed.

    Called where the module is used, so that a tool starts without the libraries of other tools.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise UserError(f"{library} can't be imported ({error}): pip install -r requirements-lab.txt") from error


def read_json_object(path: Path, error_type: type[UserError]) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises `error_type` where the file is missing, unreadable or of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_type(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise error_type(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise error_type(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def markdown_cell(value: object) -> str:
    """Writes a value so that it stays in its cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns hold words and the others figures, aligned right."""
    marks = ["---" if column < texts else "--:" for column in range(len(header))]
    return "".join("| " + " | ".join(map(markdown_cell, line)) + " |\n" for line in [header, marks, *rows])
