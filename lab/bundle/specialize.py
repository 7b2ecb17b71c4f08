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

SECTION_NAMES = {"config", "run", "data", "model", "train", "optim", "average", "quant", "score"}
TRUE_MARKERS = {"FROZEN", "BUNDLED"}
UNKNOWN = object()
COMPARISONS = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Gt: lambda a, b: a > b, ast.Lt: lambda a, b: a < b,
    ast.GtE: lambda a, b: a >= b, ast.LtE: lambda a, b: a <= b,
}  # fmt: skip
TYPED_DECORATORS = ("custom_op", "register_fake", "jit")
"""Decorators that read the annotations of what they decorate."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


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
            return True if node.id in TRUE_MARKERS else frozen.values[node.id] if node.id in frozen.choices else UNKNOWN
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

    def comparison(self, node: ast.Compare) -> Any:
        operands = [self.value(part) for part in (node.left, *node.comparators)]
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


# ---- what is reached ----


@dataclass
class Uses:
    """Names that code needs when it runs, and those that only its annotations name."""

    names: set[str]
    attributes: set[str]
    annotations: set[str]


def uses_of(node: ast.AST) -> Uses:
    """Returns the names that a statement uses; annotations of classes of knobs and typed operators are needed ones."""
    uses, annotations = Uses(set(), set(), set()), set()
    for part in ast.walk(node):
        if isinstance(part, Function) and not reads_annotations(part):
            annotations |= {id(argument.annotation) for argument in arguments_of(part)} | {id(part.returns)}
        elif isinstance(part, ast.ClassDef) and not part.name.endswith("Config"):
            annotations |= {id(item.annotation) for item in part.body if isinstance(item, ast.AnnAssign)}
    if isinstance(node, ast.AnnAssign):
        annotations.add(id(node.annotation))
    collect_uses(node, annotations, False, uses)
    return uses


def arguments_of(function: Function) -> list[ast.arg]:
    own = function.args
    every = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
    return [argument for argument in every if argument]


def collect_uses(node: ast.AST, annotations: set[int], inside: bool, uses: Uses) -> None:
    inside = inside or id(node) in annotations
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        (uses.annotations if inside else uses.names).add(node.id)
    elif isinstance(node, ast.Attribute):
        uses.attributes.add(node.attr)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        uses.attributes.add(node.value)
    for child in ast.iter_child_nodes(node):
        collect_uses(child, annotations, inside, uses)


def reads_annotations(function: Function) -> bool:
    return any(word in ast.unparse(decorator) for decorator in function.decorator_list for word in TYPED_DECORATORS)


def bound_by(node: ast.stmt) -> set[str]:
    """Returns the global names that a top-level statement binds."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)}


def acts_on(node: ast.stmt) -> str | None:
    """Returns the name that a statement without a name of its own belongs to (`operator.register_autograd(...)`), or
    that decorates it (`@operator.register_fake`)."""
    calls = [node.value] if isinstance(node, ast.Expr) else getattr(node, "decorator_list", [])
    for call in calls:
        function = call.func if isinstance(call, ast.Call) else call
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return function.value.id
    return None


def feature_name(node: ast.stmt) -> str | None:
    """Returns the name of the feature that a statement registers."""
    call = node.value if isinstance(node, ast.Expr) else None
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_feature":
        return call.args[0].args[0].value
    return None


@dataclass
class Reached:
    """Top-level statements that the script needs, by their place, and the attribute names that they use."""

    statements: set[int]
    attributes: set[str]
    annotations: set[str]


def reach(body: list[ast.stmt], features: frozenset[str] | None) -> Reached:
    """Finds what the script runs: from its last test of __name__ and the features that are on to all that these name.
    `features` None: every registered one counts."""
    makers = {name: number for number, node in enumerate(body) for name in bound_by(node)}
    owned: dict[str, list[int]] = {}
    waiting: list[int] = []
    for number, node in enumerate(body):
        owner = acts_on(node)
        if owner in makers and not isinstance(body[makers[owner]], ast.Import | ast.ImportFrom):
            owned.setdefault(owner, []).append(number)
        elif name := feature_name(node):
            waiting += [number] if features is None or name in features else []
        elif not bound_by(node) and not is_text(node):
            waiting.append(number)
    reached, methods = Reached(set(), set(), set()), Methods()
    while waiting or (waiting := methods.due(reached.attributes)):
        number = waiting.pop()
        node = number if isinstance(number, ast.AST) else body[number]
        if not isinstance(number, ast.AST):
            if number in reached.statements:
                continue
            reached.statements.add(number)
            waiting += [other for name in bound_by(node) for other in owned.get(name, [])]
            node = methods.hold_back(node)
        uses = uses_of(node)
        reached.attributes |= uses.attributes
        reached.annotations |= uses.annotations
        waiting += [makers[name] for name in uses.names if name in makers]
    return reached


class Methods:
    """Methods of reached classes, held back until something names them. A class with a base of somebody else's keeps
    all of its methods, and every class its special ones."""

    def __init__(self) -> None:
        self.held: list[Function] = []

    def hold_back(self, node: ast.stmt) -> ast.stmt:
        """Returns a class without the methods that may not be needed."""
        if not is_own_class(node):
            return node
        node = copy.copy(node)
        self.held += [item for item in node.body if may_go(item)]
        node.body = [item for item in node.body if not may_go(item)]
        return node

    def due(self, attributes: set[str]) -> list[Function]:
        """Takes out the methods that are named by now."""
        found = [method for method in self.held if method.name in attributes]
        self.held = [method for method in self.held if method.name not in attributes]
        return found


def is_own_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and all(ast.unparse(base) == "Protocol" for base in node.bases)


def may_go(item: ast.AST) -> bool:
    return isinstance(item, Function) and not item.name.startswith("__")


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


# ---- the readable text ----


def specialize(source: str, frozen: Frozen) -> str:
    """Returns the script without what the configuration can't reach; what is left stands as it was written, but for
    functions in which tests were folded. Raises BundleError where a name would be missing."""
    tree = ast.parse(source)
    folder = Folder(frozen)
    folded = [folder.visit(copy.deepcopy(node)) for node in tree.body]
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
        elif changed[number]:
            cut(lines, old, ast.unparse(ast.fix_missing_locations(new)).split("\n"))
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
            text = ast.unparse(ast.fix_missing_locations(folded[item.name]))
            cut(lines, item, textwrap.indent(text, " " * item.col_offset).split("\n"))


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


# ---- the packed form ----


class Stripper(ast.NodeTransformer):
    """Takes away annotations that nothing reads at run time."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if not reads_annotations(node):
            for argument in arguments_of(node):
                argument.annotation = None
            node.returns = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if not node.name.endswith("Config"):
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    item.annotation = ast.Constant(0)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return self.generic_visit(node)


def strip_annotations(source: str) -> str:
    """Returns the program of a script without annotations that only people read, and without what these alone named."""
    tree = ast.fix_missing_locations(Stripper().visit(ast.parse(source)))
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.AnnAssign):
            new = ast.Assign([node.target], node.value) if node.value else ast.Pass()
            tree.body[number] = ast.copy_location(new, node)
    reached = reach(tree.body, None)
    needed = {name for number in reached.statements for name in uses_of(tree.body[number]).names}
    body = []
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in needed]
            body += [node] if node.names else []
        elif number in reached.statements:
            if is_own_class(node):
                node.body = [i for i in node.body if not may_go(i) or i.name in reached.attributes] or [ast.Pass()]
            body.append(node)
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
