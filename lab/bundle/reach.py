"""What a script needs of itself: from its entry and the features that are on to all the definitions that these name.

Methods count one by one: of a class without a base of somebody else's, those go that nothing names. Names that only
annotations use are told apart, because annotations can go too.
"""

import ast
import copy
from dataclasses import dataclass

TYPED_DECORATORS = ("custom_op", "register_fake", "jit")
"""Decorators that read the annotations of what they decorate."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


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


class Stripper(ast.NodeTransformer):
    """Takes away annotations that nothing reads at run time."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if not reads_annotations(node):
            for argument in arguments_of(node):
                if argument.annotation and ast.unparse(argument.annotation) != "constexpr":  # Triton reads it
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
