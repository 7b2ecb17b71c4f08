"""One readable file from an entry script and the golf modules that it needs.

Modules follow each other in the order in which Python would have run them, each under a ruler with its path.
Project imports go, external ones are gathered at the top, and the rest of the text stays as it was written,
comments included. Whatever could mean something else in one file than in many is refused with file:line.

The entry says where it stands with a plain `BUNDLED = False` at its top level, which reads `BUNDLED = True`
in the bundle. The idea of an amalgamation with a header of provenance is SQLite's.
"""

import ast
import builtins
import hashlib
from pathlib import Path

from lab.bundle.parts import (
    ENTRY_ATTRIBUTES,
    BundleError,
    SourcePart,
    bound_names,
    check_import_forms,
    check_module_attributes,
    external_bindings,
    is_project_module,
    parse_oldest,
    read_part,
)
from lab.bundle.specialize import Frozen, specialize

BUNDLE_LINE_LENGTH = 120


def bundle_source(entry: Path, root: Path, frozen: Frozen | None = None) -> str:
    """Returns the text of one file that does what `entry` does with the package under `root`; for one configuration,
    where that is given. Raises BundleError."""
    parts = collect_parts(entry, root)
    check_futures(parts)
    check_names(parts)
    *library, script = parts
    blocks = [bundle_header(parts), script_docstring(script), render_imports(parts)]
    blocks += [render_section(part, section_lines(part)) for part in library]
    blocks += [render_section(script, mark_bundled(script))]
    shebang = script.text.split("\n", 1)[0] + "\n" if script.text.startswith("#!") else ""
    text = shebang + "\n".join(block for block in blocks if block)
    nodes = ast.walk(parse_oldest(text, "bundle"))
    assert not any(isinstance(node, ast.ImportFrom) and is_project_module(node.module) for node in nodes)
    return specialize(text, frozen) if frozen else text


def collect_parts(entry: Path, root: Path) -> list[SourcePart]:
    """Every file that the entry needs, imported ones first; the entry is the last."""
    root = root.resolve()
    if not entry.resolve().is_relative_to(root):
        raise BundleError(f"{entry} is not under {root}")
    path = entry.resolve().relative_to(root).as_posix()
    if not (root / path).is_file():
        raise BundleError(f"{entry} does not exist: name the script to bundle")
    finished: dict[str, SourcePart] = {}
    visit_part(root, path, [], finished)
    return list(finished.values())


def visit_part(root: Path, path: str, trail: list[str], finished: dict[str, SourcePart]) -> SourcePart:
    """Depth first, in the order of the import statements: the order in which Python runs modules."""
    part = read_part(root, path)
    check_import_forms(part)
    check_neighbours(part, root)
    check_module_attributes(part, allowed=frozenset() if trail else ENTRY_ATTRIBUTES)
    trail = [*trail, path]
    for node in part.project_imports:
        target = module_path(part, node, root)
        if target in trail:
            raise part.fault(node.lineno, f"import cycle: {' -> '.join([*trail[trail.index(target) :], target])}")
        imported = finished.get(target) or visit_part(root, target, trail, finished)
        defined = bound_names(imported)
        for alias in node.names:
            if alias.name not in defined:
                raise part.fault(node.lineno, f"{alias.name} is not defined in {target}: import it from where it is")
    return finished.setdefault(path, part)


def module_path(part: SourcePart, node: ast.ImportFrom, root: Path) -> str:
    """Path of the module that an import names; packages on the way must be empty, for the bundle leaves them out."""
    names = str(node.module).split(".")
    path = "/".join(names) + ".py"
    if not (root / path).is_file():
        raise part.fault(node.lineno, f"{node.module} is not a module: there is no {path}")
    for depth in range(1, len(names)):
        package = root.joinpath(*names[:depth], "__init__.py")
        if package.is_file() and ast.parse(package.read_text(encoding="utf-8")).body:
            raise BundleError(f"{package.relative_to(root).as_posix()}:1: must be empty: a bundle has no packages")
    return path


def check_neighbours(part: SourcePart, root: Path) -> None:
    """Refuse imports of project files outside the package (tools, tests, other scripts)."""
    for node in ast.walk(part.tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) and not is_project_module(node.module) else []
        for name in (module.split(".")[0] for module in modules):
            if (root / f"{name}.py").is_file() or any((root / name).glob("*.py")):
                raise part.fault(node.lineno, f"{name} is a project file outside the package: it can't be bundled")


def check_futures(parts: list[SourcePart]) -> None:
    """A future statement holds for a whole file, so all parts must agree on it."""
    shared = set.intersection(*(part.futures for part in parts))
    for part in parts:
        if part.futures - shared:
            extra = ", ".join(sorted(part.futures - shared))
            raise part.fault(1, f"`from __future__ import {extra}` would act on all parts: write it in each or in none")


def check_names(parts: list[SourcePart]) -> None:
    """Refuse a global name that two parts bind, or that hides an imported or built-in name from the others."""
    statements: dict[str, tuple[str, str]] = {}
    for part in parts:
        for name, statement, line in external_bindings(part):
            if hasattr(builtins, name):
                raise part.fault(line, f"`{statement}` hides the built-in {name} from every other part")
            first, place = statements.setdefault(name, (statement, f"{part.path}:{line}"))
            if first != statement:
                raise part.fault(line, f"`{statement}`, but {name} is `{first}` at {place}")
    owners: dict[str, str] = {}
    for part in parts:
        for name, line in bound_names(part).items():
            if hasattr(builtins, name):
                raise part.fault(line, f"top-level name {name} hides a built-in from every other part: rename it")
            if name in statements:
                raise part.fault(line, f"top-level name {name} hides `{statements[name][0]}` at {statements[name][1]}")
            if name in owners:
                raise part.fault(line, f"top-level name {name} is bound at {owners[name]} too: rename one")
            owners[name] = f"{part.path}:{line}"


def parts_sha256(parts: list[SourcePart]) -> str:
    """Returns the hash over the names and hashes of all parts."""
    return hashlib.sha256("".join(f"{part.path} {part.sha256}\n" for part in parts).encode()).hexdigest()


def bundle_header(parts: list[SourcePart]) -> str:
    """Comment lines: what made the file, and the hash of each part."""
    whole = parts_sha256(parts)
    lines = [f"# Made by tools/bundle.py from {parts[-1].path} and the modules it needs: edit those, not this file."]
    lines += [f"# sha256 of the parts: {whole}"]
    lines += [f"#   {part.sha256[:16]}  {part.text.count(chr(10)):>4} lines  {part.path}" for part in parts]
    return "\n".join(lines) + "\n"


def render_imports(parts: list[SourcePart]) -> str:
    """All external imports, each name once: future, then `import x`, then `from x import y`, sorted."""
    plain: set[str] = set()
    from_modules: dict[str, set[str]] = {}
    for node in (node for part in parts for node in part.external_imports):
        for alias in node.names:
            name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if isinstance(node, ast.ImportFrom):
                from_modules.setdefault(str(node.module), set()).add(name)
            else:
                plain.add(f"import {name}")
    lines = [f"from __future__ import {', '.join(sorted(parts[0].futures))}"] if parts[0].futures else []
    lines += sorted(plain) + [
        render_from_import(module, sorted(names)) for module, names in sorted(from_modules.items())
    ]
    return "".join(line + "\n" for line in lines)


def render_from_import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= BUNDLE_LINE_LENGTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def script_docstring(script: SourcePart) -> str:
    """The entry's docstring, which must stay the first statement of the file to stay a docstring."""
    if ast.get_docstring(script.tree) is None:
        return ""
    node = script.tree.body[0]
    return "\n".join(script.text.split("\n")[node.lineno - 1 : node.end_lineno]) + "\n"


def mark_bundled(script: SourcePart) -> list[str | None]:
    """The entry's lines, without its docstring and with BUNDLED set."""
    lines = section_lines(script)
    if script.text.startswith("#!"):
        lines[0] = None
    if ast.get_docstring(script.tree) is not None:
        node = script.tree.body[0]
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    for node in script.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node) == "BUNDLED = False":
            lines[node.lineno - 1] = str(lines[node.lineno - 1]).replace("False", "True", 1)
            return lines
    raise script.fault(1, "has no top-level `BUNDLED = False`, by which the script can know that it was bundled")


def section_lines(part: SourcePart) -> list[str | None]:
    """The part's lines, None where an import stood."""
    lines: list[str | None] = list(part.text.split("\n"))
    imports = part.imports
    for node in imports:
        span = range(node.lineno, node.end_lineno + 1)
        if any(other is not node and {other.lineno, other.end_lineno} & set(span) for other in part.tree.body):
            raise part.fault(node.lineno, "an import shares its line with another statement: give it its own")
        lines[node.lineno - 1 : node.end_lineno] = [None] * len(span)
    return lines


def render_section(part: SourcePart, lines: list[str | None]) -> str:
    """A ruler and the lines that are left, without the blank ones that stood after what is gone."""
    kept: list[str] = []
    gone = True
    for line in lines:
        gone = line is None or (gone and not line.strip())
        if not gone:
            kept.append(str(line))
    ruler = f"# ---- {part.path} ".ljust(BUNDLE_LINE_LENGTH, "-")
    return "\n".join(["", ruler, "", *kept]).rstrip("\n") + "\n"
