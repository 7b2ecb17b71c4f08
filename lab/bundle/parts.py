"""One source file as the bundler sees it: what it imports, what it binds, and what has no meaning in one file."""

import ast
import hashlib
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from golf.config.knobs import UserError

PROJECT_PACKAGE = "golf"
PROJECT_PACKAGES = (PROJECT_PACKAGE, "lab")
OLDEST_PYTHON = (3, 10)
ENTRY_ATTRIBUTES = frozenset({"__file__", "__name__"})
"""What only the entry may read: in one file they are the entry's. Its docstring it may not: packing drops it."""
MODULE_ATTRIBUTES = ENTRY_ATTRIBUTES | {"__doc__", "__package__", "__spec__", "__loader__", "__path__"}
IMPORT_ADVICE = f"write `from {PROJECT_PACKAGE}.x.y import name`"


class BundleError(UserError):
    """Source that can't be made one file, or a file that was not packed here; the place is given as file:line."""


@dataclass(frozen=True)
class SourcePart:
    """A file of the project: `path` is relative to the root, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Import statements at the top level, in order."""
        return [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]

    @property
    def project_imports(self) -> list[ast.ImportFrom]:
        return [node for node in self.imports if isinstance(node, ast.ImportFrom) and is_project_module(node.module)]

    @property
    def external_imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Top-level imports of other people's modules, `from __future__` left out."""
        ours = {id(node) for node in self.project_imports}
        return [node for node in self.imports if id(node) not in ours and not is_future_import(node)]

    @property
    def futures(self) -> set[str]:
        return {alias.name for node in self.imports if is_future_import(node) for alias in node.names}

    def fault(self, line: int, message: str) -> BundleError:
        return BundleError(f"{self.path}:{line}: {message}")


def is_project_module(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in PROJECT_PACKAGES


def is_future_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def read_part(root: Path, path: str) -> SourcePart:
    """Read and parse a file. Raises BundleError where it is not Python 3.10, OSError where it can't be read."""
    try:
        text = (root / path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not UTF-8 (byte {error.start}): give a Python script") from None
    return SourcePart(path, text, parse_oldest(text, path))


def parse_oldest(text: str, path: str) -> ast.Module:
    """The syntax tree, read by the grammar of the oldest Python that must run it."""
    try:
        return ast.parse(text, filename=path, feature_version=OLDEST_PYTHON)
    except (SyntaxError, ValueError) as error:  # null bytes are a ValueError before Python 3.12
        (major, minor), line = OLDEST_PYTHON, getattr(error, "lineno", None) or 1
        raise BundleError(f"{path}:{line}: not Python {major}.{minor}: {getattr(error, 'msg', error)}") from None


def check_import_forms(part: SourcePart) -> None:
    """Refuse every import that can't be taken out of one file without changing what the code means."""
    top_level = {id(node) for node in part.tree.body}
    for node in ast.walk(part.tree):
        if isinstance(node, ast.Import) and any(is_project_module(alias.name) for alias in node.names):
            raise part.fault(node.lineno, f"`import {PROJECT_PACKAGE}`: {IMPORT_ADVICE}")
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            raise part.fault(node.lineno, f"relative import: {IMPORT_ADVICE}")
        if any(alias.name == "*" for alias in node.names):
            raise part.fault(node.lineno, "star import: import each name that is used")
        if not is_project_module(node.module):
            continue
        if node.module == PROJECT_PACKAGE:
            raise part.fault(node.lineno, f"`from {PROJECT_PACKAGE} import`: {IMPORT_ADVICE}")
        if any(alias.asname for alias in node.names):
            raise part.fault(node.lineno, "alias import: one file has one name for one thing")
        if id(node) not in top_level:
            raise part.fault(node.lineno, f"import of {node.module} that is not at the top level of the file")


def check_module_attributes(part: SourcePart, allowed: frozenset[str] = frozenset()) -> None:
    """Refuse names that Python gives each module (`if __name__ == ...`), but for those that are allowed."""
    for node in ast.walk(part.tree):
        if isinstance(node, ast.Name) and node.id in MODULE_ATTRIBUTES - allowed:
            raise part.fault(node.lineno, f"{node.id} would not mean this file in the bundle: do without it")


def external_bindings(part: SourcePart) -> Iterator[tuple[str, str, int]]:
    """(name bound, statement that binds it, line) for every external import at the top level."""
    for node in part.external_imports:
        for alias in node.names:
            renamed = f" as {alias.asname}" if alias.asname else ""
            if isinstance(node, ast.ImportFrom):
                yield alias.asname or alias.name, f"from {node.module} import {alias.name}{renamed}", node.lineno
            elif alias.asname:
                yield alias.asname, f"import {alias.name}{renamed}", node.lineno
            else:  # `import a.b` and `import a.c` both bind `a`
                package = alias.name.split(".")[0]
                yield package, f"import {package}", node.lineno


def bound_names(part: SourcePart) -> dict[str, int]:
    """Names that the file itself makes global, with the line of each; top-level imports are left out."""
    table = symtable.symtable(part.text, part.path, "exec")
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_annotated() or s.is_imported()}
    imported = {alias.asname or alias.name.split(".")[0] for node in part.imports for alias in node.names}
    assigned = {s.get_name() for s in table.get_symbols() if s.is_assigned()}
    names = names - (imported - assigned) | set(declared_global(table))
    return {name: binding_line(part.tree, name) for name in sorted(names)}


def declared_global(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that a function assigns after `global name`."""
    for child in table.get_children():
        yield from (s.get_name() for s in child.get_symbols() if s.is_declared_global() and s.is_assigned())
        yield from declared_global(child)


def binding_line(tree: ast.Module, name: str) -> int:
    """Line of the first statement that binds `name`, outer scopes first."""
    for node in ast.walk(tree):
        if getattr(node, "name", None) == name or getattr(node, "asname", None) == name:
            return node.lineno
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            return node.lineno
    return 1


def imported_files(root: Path, *entries: str) -> list[str]:
    """The entries (relative to `root`) and every file of golf/ and lab/ that they import, directly or not, sorted."""
    found, waiting = set(), list(entries)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        imports = [node for node in ast.walk(read_part(root, path).tree) if isinstance(node, ast.ImportFrom)]
        modules = [node.module for node in imports if (node.module or "").split(".")[0] in PROJECT_PACKAGES]
        waiting += [module.replace(".", "/") + ".py" for module in modules]
    return sorted(found)


def code_sha256(root: Path, *entries: str) -> str:
    """Hash over the names and bytes of all files that the entries run, those of the program included: all of golf/."""
    program = (path.relative_to(root).as_posix() for path in root.glob("golf/**/*.py"))
    lines = [
        f"{path} {hashlib.sha256((root / path).read_bytes()).hexdigest()}"
        for path in sorted({*imported_files(root, *entries), *program})
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
