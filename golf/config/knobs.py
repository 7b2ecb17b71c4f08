"""Defines what every folder shares: errors, exit statuses, the type of a rule, the knobs' docs, people's JSON."""

import ast
import contextlib
import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

EXIT_FINDINGS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE = 1, 2, 4, 5
"""Exit statuses of all programs; run.sh exits with 3 where the set-up failed."""


class UserError(ValueError):
    """Reports a mistake that a person can correct, in one clear line that says what is wrong and what to do.

    Every folder has its own subclass.
    """


class ConfigError(UserError):
    """Reports an unknown knob, a value that does not parse, or values that do not fit together."""


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Adds `path` to an error of writing to it: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


Rule = tuple[bool, str]
"""(whether the rule holds, what to do where it does not)."""


def knob_docs(section: type) -> dict[str, str]:
    """Returns the line below each field of a class of knobs; empty lines where there is no source (in a packed
    script)."""
    docs = {field.name: "" for field in fields(section)}
    try:
        body = ast.parse(inspect.getsource(section)).body[0].body
    except OSError:
        return docs
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[node.target.id] = str(after.value.value)
    return docs


SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON, write null")


def parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


JSON_HOOKS = {"parse_constant": refuse_constant, "parse_float": parse_float}


def parse_json(data: str | bytes, **hooks: Any) -> Any:
    """Parses JSON that people wrote, with or without a byte order mark; `hooks` are those of json.loads.

    Raises ValueError, of one line, for anything else: not UTF-8, NaN (read with parse_constant=float), a number or a
    nesting that is too large for Python, half of a surrogate pair.
    """
    text = (data.decode() if isinstance(data, bytes) else data).removeprefix("\ufeff")
    try:
        value = json.loads(text, **(JSON_HOOKS | hooks))
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no Unicode text") from None
    return value


def takes_model_files_only() -> bool:
    """Returns whether a script has code for SentencePiece's tokenizers alone: the bundler decides, where the run's is
    one (lab/bundle/frozen.py)."""
    return False
