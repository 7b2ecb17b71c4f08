"""What every tool does around its work: a typed command line, one line for a mistake, an exit status.

A tool that is started without the packages of its purpose says in one line which file names them, whether it misses
them where it is imported or in the midst of its work.
"""

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import tyro

from golf.config.config import EXIT_BAD_INPUT, UserError


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """What all tools understand."""

    json: bool = False
    """Print one JSON object instead of tables."""
    debug: bool = False
    """Show a traceback with an error."""


OPTIONAL_PACKAGES = {
    "requirements-data.txt": ("huggingface_hub", "pyarrow", "tiktoken", "tiktoken_ext"),
    "requirements-demo.txt": ("gradio",),
    "requirements-lab.txt": ("jinja2", "scipy"),
}
"""Packages that are imported for some purposes only, by the file that installs them."""
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
    """Exit status of `work` on the options of the command line; 2 after one clear line where the input is bad."""
    options = tyro.cli(options_type, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        return work(options)
    except (UserError, OSError, ModuleNotFoundError) as error:
        hint = missing_package_hint(error)
        if isinstance(error, ModuleNotFoundError) and not hint:
            raise
        if options.debug:
            traceback.print_exc()
        print_complaint(hint or str(error))
        return EXIT_BAD_INPUT
