"""Does what every tool does around its work: a typed command line, one line for a mistake, an exit status.

A tool that is started without the packages of its purpose says in one line which file names them, whether it misses
them where it is imported or in the midst of its work.
"""

import errno
import json
import pkgutil
import re
import sys
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, TypeVar

import tyro

import golf
from golf.config.config import Config, check_config
from golf.config.knobs import EXIT_BAD_INPUT, EXIT_MACHINE, UserError, naming, parse_json
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


OPTIONAL_PACKAGES = {
    "requirements-data.txt": ("huggingface_hub", "pyarrow", "tiktoken", "tiktoken_ext"),
    "requirements-demo.txt": ("gradio",),
    "requirements-lab.txt": ("jinja2", "scipy"),
    "requirements-track.txt": ("tensorboard", "wandb"),
}
"""Packages that are imported for some purposes only, by the file that installs them."""
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Of the disk: the command was right, and nothing of it needs to change."""
LONE_SURROGATE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")
AnyOptions = TypeVar("AnyOptions", bound=ToolOptions)


def missing_package_hint(error: BaseException) -> str:
    """Returns one line that says how to install an optional package that was not found; "" for any other error."""
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    for requirements, packages in OPTIONAL_PACKAGES.items():
        if missing in packages:
            return f"{missing} is not installed: pip install -r {requirements} (bash run.sh does it)"
    return ""


def fail_without_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that nothing caught: one line and status 2 for a missing optional package, else a traceback."""
    hint = missing_package_hint(error)
    if not hint:
        return sys.__excepthook__(kind, error, trace)
    print_complaint(hint)
    raise SystemExit(EXIT_BAD_INPUT)


sys.excepthook = fail_without_package  # imports at the top of a tool fail before any code of the tool could catch them


def print_complaint(text: str) -> None:
    """Prints one line on standard error, behind the name of the tool that runs."""
    print(f"{Path(sys.argv[0]).stem}: {' '.join(text.splitlines())}", file=sys.stderr)


def run_command(options_type: type[AnyOptions], description: str | None, work: Callable[[AnyOptions], int]) -> int:
    """Returns the exit status of `work` on the command line's options, or after one line 2 for bad input, 5 for a disk
    that is full or fails. What a terminal's encoding lacks is replaced."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = tyro.cli(options_type, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        status = work(options)
        flush_output()
        return status
    except (UserError, OSError, ModuleNotFoundError) as error:
        hint = missing_package_hint(error)
        if isinstance(error, ModuleNotFoundError) and not hint:
            raise
        if options.debug:
            traceback.print_exc()
        print_complaint(hint or str(error))
        return EXIT_MACHINE if getattr(error, "errno", None) in MACHINE_ERRORS else EXIT_BAD_INPUT


def flush_output() -> None:
    """Writes what waits for standard output. Raises OSError, which names it, where its disk is full."""
    with naming("standard output"):
        sys.stdout.flush()


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
    data = b""
    try:
        data = path.read_bytes()
        content = parse_json(data, parse_constant=float)  # a run that diverged says NaN of its loss
    except FileNotFoundError:
        raise error_type(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise error_type(f"{path} can't be read as JSON: {locate(error, data)}") from None
    if not isinstance(content, dict):
        raise error_type(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def locate(error: Exception, data: bytes) -> str:
    """Returns what an error of parse_json on `data` says, with the line where that is not told."""
    lines = data.decode(errors="replace").splitlines(keepends=True)
    if not isinstance(error, ValueError) or isinstance(error, json.JSONDecodeError) or len(lines) < 2:
        return str(error)

    def is_reached(end: int) -> bool:
        """Says whether the first `end` lines have the error, and not only an end too early."""
        head = "".join(lines[:end])
        try:
            parse_json(head, parse_constant=float)
        except ValueError as found:
            return not isinstance(found, json.JSONDecodeError) or LONE_SURROGATE.search(head) is not None
        return True

    return f"{error} (line {1 + bisect_left(range(1, len(lines) + 1), True, key=is_reached)})"


def markdown_cell(value: object) -> str:
    """Writes a value so that it stays in its cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Returns a Markdown table whose first `texts` columns hold words and the others figures, aligned right."""
    marks = ["---" if column < texts else "--:" for column in range(len(header))]
    return "".join("| " + " | ".join(map(markdown_cell, line)) + " |\n" for line in [header, marks, *rows])


def import_rooms() -> None:
    """Imports every module of golf/, so that all rooms have registered their features."""
    for module in pkgutil.walk_packages(golf.__path__, "golf."):
        import_module(module.name)
