"""Leaves out of a one-file script what one configuration can't reach.

Tests of knobs that the configuration decides are folded, features that are off are not registered, and definitions and
methods that nothing names any more go. Three conventions of golf/ carry this:
- a section of knobs is called by its name or `config` (`quant.codec`, `self.config.model.smear_gate`), and a parameter
  that holds the value of a knob with choices has the knob's name (`codec`);
- a dictionary BY_<KNOB> has an entry for each choice of a knob;
- a feature is a statement `register_feature(Feature("name", ...))`.
A knob that is on stays a test, because proofs switch features off for a moment; only what is off, and which choice was
made, is taken for granted.
"""

import ast
import builtins
import copy
import symtable
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lab.bundle.parts import BundleError
from lab.bundle.printing import print_code
from lab.bundle.reach import Function, bound_by, is_own_class, is_text, may_go, reach, uses_of

SPECIALISED_MARK = "# Left out: all that the configuration in FROZEN does not use."
"""A line of the header of a specialised script."""
SECTION_NAMES = {"config", "run", "data", "model", "train", "optim", "average", "quant", "score"}
TRUE_MARKERS = {"FROZEN", "BUNDLED"}
UNKNOWN = object()
COMPARISONS = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Gt: lambda a, b: a > b, ast.Lt: lambda a, b: a < b,
    ast.GtE: lambda a, b: a >= b, ast.LtE: lambda a, b: a <= b,
}  # fmt: skip


@dataclass(frozen=True)
class Frozen:
    """The configuration that a script is made for."""

    knobs: Mapping[str, Any]
    """What FROZEN becomes: the knobs that differ from their defaults."""
    values: Mapping[str, Any]
    """Knobs whose value may be taken for granted: those with choices, and those that are off."""
    choices: frozenset[str]
    """Knobs with choices."""
    features: frozenset[str]
    """Features that are on."""
    calls: Mapping[str, Any]
    """Functions of the configuration, and what they return for it."""
    free: frozenset[str] = frozenset()
    """Knobs that the script still accepts."""


class Folder(ast.NodeTransformer):
    """Replaces tests whose outcome the configuration decides by the branch that is taken."""

    def __init__(self, frozen: Frozen):
        self.frozen = frozen

    def value(self, node: ast.AST) -> Any:
        """Returns what an expression is under the configuration, or UNKNOWN."""
        frozen = self.frozen
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return True if node.id in TRUE_MARKERS else UNKNOWN
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            return frozen.values.get(node.attr, UNKNOWN) if owner in SECTION_NAMES else UNKNOWN
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [self.value(part) for part in node.elts]
            return UNKNOWN if UNKNOWN in parts else tuple(parts)
        if isinstance(node, ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand)
            return UNKNOWN if inner is UNKNOWN else not inner
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        if isinstance(node, ast.BoolOp):
            return self.connective(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "bool" and len(node.args) == 1:
                inner = self.value(node.args[0])
                return UNKNOWN if inner is UNKNOWN else bool(inner)
            return frozen.calls.get(node.func.id, UNKNOWN)
        return UNKNOWN

    def operand(self, node: ast.expr) -> Any:
        """Returns what a side of a comparison is: there alone a bare name may be that of a knob with choices."""
        known = isinstance(node, ast.Name) and node.id in self.frozen.choices
        return self.frozen.values[node.id] if known else self.value(node)

    def comparison(self, node: ast.Compare) -> Any:
        operands = [self.operand(part) for part in (node.left, *node.comparators)]
        if any(operand is UNKNOWN for operand in operands) or any(type(op) not in COMPARISONS for op in node.ops):
            return UNKNOWN
        pairs = zip(node.ops, operands, operands[1:], strict=False)
        return all(COMPARISONS[type(op)](left, right) for op, left, right in pairs)

    def connective(self, node: ast.BoolOp) -> Any:
        decides = isinstance(node.op, ast.Or)
        values = [self.value(part) for part in node.values]
        for value in values:
            if value is not UNKNOWN and bool(value) == decides:
                return value
        return UNKNOWN if UNKNOWN in values else values[-1]

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        value = self.value(node.test)
        if value is UNKNOWN:
            node.test = self.test(node.test)
            return self.generic_visit(node)
        taken = [self.visit(part) for part in (node.body if value else node.orelse)]
        return [part for one in taken for part in (one if isinstance(one, list) else [one]) if part is not None]

    def test(self, node: ast.expr) -> ast.expr:
        """Returns what is left of an expression that is only tested for truth."""
        return self.visit_BoolOp(node, tested=True) if isinstance(node, ast.BoolOp) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        value = self.value(node.test)
        return self.generic_visit(node) if value is UNKNOWN else self.visit(node.body if value else node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp, tested: bool = False) -> ast.AST:
        """Drops the operands that don't decide; the last one too where the whole is only tested for truth."""
        neutral = isinstance(node.op, ast.And)
        last = -1 if tested else len(node.values) - 1
        kept = [
            part for number, part in enumerate(node.values)
            if number == last or self.value(part) is UNKNOWN or bool(self.value(part)) != neutral
        ]  # fmt: skip
        node.values = kept
        return self.generic_visit(node) if len(kept) > 1 else self.visit(kept[0])

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self.fold_choices(node, getattr(node.targets[0], "id", ""))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        name = getattr(node.target, "id", "")
        if name == "FROZEN":
            node.value = ast.parse(repr(dict(self.frozen.knobs)), mode="eval").body
            return node
        return self.fold_choices(node, name)

    def fold_choices(self, node: Any, name: str) -> ast.AST:
        knob = name.removeprefix("BY_").lower()
        if name.startswith("BY_") and knob in self.frozen.choices and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            kept = [(key, value) for key, value in pairs if self.value(key) in (UNKNOWN, self.frozen.values[knob])]
            node.value = ast.Dict([key for key, _ in kept], [value for _, value in kept])
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body = until_return(node.body) or [ast.Pass()]
        return node


def until_return(body: list[ast.stmt]) -> list[ast.stmt]:
    """Returns the statements up to the first that leaves; what follows a folded test can't be reached."""
    for number, statement in enumerate(body):
        if isinstance(statement, ast.Return | ast.Raise):
            return body[: number + 1]
    return body


# ---- the readable text ----


def specialize(source: str, frozen: Frozen) -> str:
    """Returns the script without what the configuration can't reach; what is left stands as it was written, but for
    functions in which tests were folded. Raises BundleError where a name would be missing."""
    tree = ast.parse(source)
    folder = Folder(frozen)
    folded = [folder.visit(node) for node in ast.parse(source).body]  # no deep copy: nodes of Python's are shared
    changed = [ast.dump(new) != ast.dump(old) for new, old in zip(folded, tree.body, strict=True)]
    reached = reach(folded, frozen.features)
    lines: list[str | None] = list(source.split("\n"))
    for number, (old, new) in enumerate(zip(tree.body, folded, strict=True)):
        if is_text(old):
            if number and number - 1 not in reached.statements:
                cut(lines, old, [])
        elif isinstance(old, ast.Import | ast.ImportFrom):
            continue
        elif number not in reached.statements:
            cut(lines, old, [])
        elif isinstance(old, ast.ClassDef):
            cut_methods(lines, old, new, reached.attributes)
            if old.name.endswith("Config"):
                cut_knobs(lines, old, reached.attributes | set(frozen.knobs) | set(frozen.free))
        elif changed[number]:
            cut(lines, old, print_code(new).split("\n"))
    return tidy([line for line in lines if line is not None])


def cut(lines: list[str | None], node: ast.stmt, replacement: list[str]) -> None:
    """Replaces a statement, with its decorators and, where it goes for good, the comment right above it."""
    first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))]) - 1
    while not replacement and first and str(lines[first - 1] or "").lstrip().startswith("#"):
        if str(lines[first - 1]).startswith("# ----"):
            break
        first -= 1
    span = node.end_lineno - first
    lines[first : node.end_lineno] = ["\n".join(replacement) if replacement else None, *[None] * (span - 1)]


def cut_methods(lines: list[str | None], old: ast.ClassDef, new: ast.ClassDef, attributes: set[str]) -> None:
    """Drops the methods of a class that nothing names, and rewrites those in which a test was folded."""
    folded = {item.name: item for item in new.body if isinstance(item, Function)}
    for item in old.body:
        if not isinstance(item, Function):
            continue
        if is_own_class(old) and may_go(item) and item.name not in attributes:
            cut(lines, item, [])
        elif ast.dump(folded[item.name]) != ast.dump(item):
            text = print_code(folded[item.name])
            cut(lines, item, textwrap.indent(text, " " * item.col_offset).split("\n"))


def cut_knobs(lines: list[str | None], section: ast.ClassDef, named: set[str]) -> None:
    """Drops the knobs of a section that nothing names any more, each with the line that describes it."""
    for knob, description in zip(section.body, section.body[1:], strict=False):
        if isinstance(knob, ast.AnnAssign) and is_text(description) and knob.target.id not in named:
            cut(lines, knob, [])
            cut(lines, description, [])


def tidy(lines: list[str]) -> str:
    """Drops rulers without a section, imports and runs of blank lines that nothing needs, and names that annotations
    alone still use stand for any object."""
    source = "\n".join(lines)
    tree = ast.parse(source)
    defined = {name for node in tree.body for name in bound_by(node)}
    uses = [uses_of(node) for node in tree.body]
    needed = {name for use in uses for name in use.names | use.annotations}
    missing = sorted(needed - defined - set(dir(builtins)) - {"__file__", "__name__"} - local_names(tree))
    strong = {name for use in uses for name in use.names}
    if unknown := [name for name in missing if name in strong]:
        raise BundleError(f"the specialised script lacks {', '.join(unknown)}: a convention of golf/ was not kept")
    text = source.split("\n")
    for node in reversed(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            text[node.lineno - 1 : node.end_lineno] = import_lines(node, needed)
    if missing:
        last = next(number for number, line in enumerate(text) if line.startswith("# ---- "))
        text.insert(last, " = ".join([*missing, "object"]) + "  # named in annotations alone\n")
    first = next(number for number, line in enumerate(text) if line.startswith("#"))
    text.insert(first + 1, SPECIALISED_MARK)
    return squeeze("\n".join(text))


def import_lines(node: ast.Import | ast.ImportFrom, needed: set[str]) -> list[str]:
    node = copy.copy(node)
    node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in needed]
    return textwrap.wrap(ast.unparse(node), 10_000) if node.names else []


def local_names(tree: ast.Module) -> set[str]:
    """Returns names that functions, classes and comprehensions bind for themselves."""
    table = symtable.symtable(ast.unparse(tree), "bundle", "exec")

    def walk(scope: symtable.SymbolTable) -> Iterator[str]:
        for child in scope.get_children():
            yield from (s.get_name() for s in child.get_symbols() if s.is_local() or s.is_parameter())
            yield from walk(child)

    return set(walk(table))


def squeeze(text: str) -> str:
    """Returns the text with two blank lines at the most, and without rulers that have nothing below."""
    kept: list[str] = []
    for line in text.split("\n"):
        if line.startswith("# ---- ") and line.rstrip("-").endswith(".py "):
            while kept and (not kept[-1].strip() or is_ruler(kept[-1])):
                kept.pop()
            kept += ["", "", line]
        elif line.strip() or (kept and not (len(kept) > 1 and not kept[-1].strip() and not kept[-2].strip())):
            kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"


def is_ruler(line: str) -> bool:
    return line.startswith("# ---- ") and line.rstrip("-").endswith(".py ")
