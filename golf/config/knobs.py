"""Defines what every folder shares: errors, exit statuses, the type of a rule, the knobs' docs."""

import ast
import inspect
from dataclasses import fields

EXIT_FINDINGS, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE = 1, 2, 4, 5
"""Exit statuses of all programs; run.sh exits with 3 where the set-up failed."""


class UserError(ValueError):
    """Reports a mistake that a person can correct, in one clear line that says what is wrong and what to do.

    Every folder has its own subclass.
    """


class ConfigError(UserError):
    """Reports an unknown knob, a value that does not parse, or values that do not fit together."""


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
