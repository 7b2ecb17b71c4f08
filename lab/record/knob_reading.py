"""Finds the knobs that a script takes from the environment and that nothing in it reads."""

import ast
import re
from collections.abc import Iterator, Mapping

from lab.record.script_reading import ScriptReading, call_name, constant_text

PRINTERS = ("print", "log")
NO_PRINTERS = frozenset({"math", "torch", "np", "numpy", "cmath"})
"""Modules whose log() is arithmetic."""
FORMATTERS = ("str", "repr", "int", "float", "bool", "round", "len", "format", "join", "dumps", "getattr")
"""Calls that can stand inside a printing one without using the value for anything else."""


def ghost_knobs(script: ScriptReading) -> tuple[list[str], list[str]]:
    """Lists (knobs from the environment that nothing reads, those that are only printed), sorted.

    A name that is used as an attribute, a variable or a whole string anywhere counts as read, so that a knob is named
    here only where no way of reading it was seen.
    """
    declared: dict[str, set[int]] = {}  # name -> identities of the statements that take it from the environment
    for tree in script.trees:
        helpers = environment_helpers(tree)
        for name, statement in declared_knobs(tree, helpers):
            declared.setdefault(name, set()).add(id(statement))
    uses = {use for tree in script.trees for use in knob_uses(tree, declared)}
    uses |= {(word, False) for word in re.findall(r"(?<!\w)\w{1,80}(?!\w)", script.unread)}
    unread = {name for name in declared if (name, False) not in uses}
    printed = {name for name in unread if (name, True) in uses}
    return sorted(unread - printed), sorted(printed)


def environment_helpers(tree: ast.Module) -> set[str]:
    """Names functions of the script that read the environment for their callers."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.args.args and len(f.body) < 12 and reads_environment(f, set())}


def reads_environment(node: ast.AST, helpers: set[str]) -> bool:
    for inner in ast.walk(node):
        if getattr(inner, "attr", getattr(inner, "id", "")) in ("environ", "getenv"):
            return True
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in helpers:
            return any(map(constant_text, inner.args))
    return False


def declared_knobs(tree: ast.Module, helpers: set[str]) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and reads_environment(node.value, helpers):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name | ast.Attribute):
                    yield getattr(target, "id", getattr(target, "attr", "")), node


def knob_uses(tree: ast.Module, declared: Mapping[str, set[int]]) -> Iterator[tuple[str, bool]]:
    """Finds uses of knobs, as (name, whether it is only printed: it stands in the arguments of a call that prints)."""
    waiting: list[tuple[ast.AST, bool, ast.AST | None]] = [(tree, False, None)]
    while waiting:
        node, prints, statement = waiting.pop()
        if isinstance(node, ast.Assign | ast.AnnAssign):
            statement = node
        name, text = loaded_name(node), constant_text(node)
        if name in declared or (text in declared and id(statement) not in declared[text]):
            yield name or text, prints
        if isinstance(node, ast.Call):
            prints = is_printer(node) or (prints and call_name(node) in FORMATTERS)
        waiting.extend((child, prints, statement) for child in ast.iter_child_nodes(node))


def loaded_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
        return node.attr if isinstance(node, ast.Attribute) else node.id
    return ""


def is_printer(call: ast.Call) -> bool:
    root = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    name = call_name(call).lower().lstrip("_")
    if isinstance(root, ast.Name) and root.id in NO_PRINTERS:
        return False
    return name.startswith(PRINTERS) or (isinstance(root, ast.Name) and root.id.startswith("logg"))
