"""What a shipped script contains: packed sources, local modules, files that it names, knobs that nothing reads."""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.bundle.parts import OLDEST_PYTHON
from lab.record.payloads import parse_quietly, source_layers

PRINTERS = ("print", "log")
NO_PRINTERS = frozenset({"math", "torch", "np", "numpy", "cmath"})
"""Modules whose log() is arithmetic."""
LOADERS = frozenset({"import_module", "__import__", "run_module", "find_spec"})
FORMATTERS = frozenset({"str", "repr", "int", "float", "bool", "round", "len", "format", "join", "dumps", "getattr"})
"""Calls that can stand inside a printing one without using the value for anything else."""
MOST_FILE_NAME = 200
READABLE_NAME = "train_gpt_readable.py"
"""Where our runs and records keep the source of the packed script."""


@dataclass(frozen=True)
class ScriptReading:
    """One script, with what is packed in it and what it imports beside it."""

    path: Path
    data: bytes
    layers: tuple[str, ...]
    """The text as shipped, then each source that was packed in the one before."""
    opaque: bool
    """It runs something that could not be unpacked, so that not all of it was looked at."""
    trees: tuple[ast.Module, ...]
    """Of the layers that parse, in order."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def innermost(self) -> str:
        return self.layers[-1]


@dataclass(frozen=True)
class Neighbours:
    """Files beside a script that belong to its code, or that its code names."""

    modules: dict[str, int]
    """Path in the folder -> bytes, for Python files that it runs in any way, and that theirs run."""
    files: dict[str, int]
    """Path -> bytes, of other files that are named in the source."""
    missing: tuple[str, ...]
    """Python files that it loads and that are not there."""


def read_script(path: Path, folder: Path) -> ScriptReading:
    """Read and unpack a script. Raises OSError."""
    data = path.read_bytes()
    text = data.decode("utf-8-sig", errors="replace")
    layers, opaque = source_layers(text, small_neighbours(folder))
    trees = tuple(tree for layer in layers if (tree := parse_quietly(layer)) is not None)
    return ScriptReading(path, data, tuple(layers), opaque, trees)


def small_neighbours(folder: Path) -> dict[str, bytes]:
    """Files at the top of the folder that a loader could read its source from."""
    files = [
        path for path in folder.iterdir() if path.is_file() and path.suffix not in (".md", ".json", ".log", ".txt")
    ]
    return {path.name: path.read_bytes() for path in files if path.stat().st_size < 4_000_000}


def oldest_grammar_error(script: ScriptReading) -> str:
    """Why a layer is not Python 3.10; empty where all are."""
    for layer in script.layers:
        try:
            ast.parse(layer, feature_version=OLDEST_PYTHON)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except ValueError as error:
            return str(error)
    return ""


# ---- what lies beside the script ----


def find_neighbours(script: ScriptReading, folder: Path) -> Neighbours:
    """Follow imports, importlib, runpy and exec of files, through packed layers too; only files in the folder count."""
    modules: dict[str, int] = {}
    files: dict[str, int] = {}
    missing: set[str] = set()
    waiting = [script]
    while waiting:
        current = waiting.pop()
        for tree in current.trees:
            missing |= set(missing_modules(tree, folder))
            for path in named_files(tree, folder):
                name = path.relative_to(folder).as_posix()
                if path == script.path or name in modules:
                    continue
                if path.suffix == ".py":
                    modules[name] = path.stat().st_size
                    waiting.append(read_script(path, folder))
                else:
                    files[name] = path.stat().st_size
    return Neighbours(modules, files, tuple(sorted(missing)))


def named_files(tree: ast.Module, folder: Path) -> Iterator[Path]:
    """Files of the folder that a source imports, or names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (path for module in imported_names(node) for path in module_files(module, folder))
        elif isinstance(node, ast.Call) and call_name(node) in LOADERS:
            yield from (path for text in string_arguments(node) for path in module_files(text, folder))
        elif isinstance(node, ast.Constant) and node.value != READABLE_NAME:
            # (A run writes a file of that name. In a record it is held against the packed script.)
            yield from file_named(node.value, folder)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that the statement may load: a name that is imported from a package may be one too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = [node.module] if node.module else []
    return base + [".".join([*base, alias.name]) for alias in node.names if alias.name != "*"]


def module_files(module: str, folder: Path) -> Iterator[Path]:
    """The files in the folder that importing `a.b.c` runs: packages on the way, and the module."""
    names = module.strip(".").split(".")
    for depth in range(1, len(names) + 1):
        place = folder.joinpath(*names[:depth])
        for path in (place.with_name(place.name + ".py"), place / "__init__.py"):
            if names[depth - 1].isidentifier() and path.is_file():
                yield path


def file_named(value: object, folder: Path) -> Iterator[Path]:
    """The file of the folder that a constant names."""
    if isinstance(value, str) and 0 < len(value) < MOST_FILE_NAME and value.isprintable():
        path = folder / value.removeprefix("./")
        inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
        if inside and "." in path.name and path.is_file():
            yield path


def missing_modules(tree: ast.Module, folder: Path) -> Iterator[str]:
    """Names of Python files that are run from a path and that are not in the folder."""
    runs = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and call_name(node) in {"exec", "run_path"}]
    runs += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and call_name(n) == "spec_from_file_location"]
    compiled = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and call_name(n) == "compile"]
    labels = {id(argument) for call in compiled for argument in call.args[1:]}  # a name for tracebacks
    for node in (inner for call in runs for inner in ast.walk(call) if id(inner) not in labels):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if text.endswith(".py") and len(text) < MOST_FILE_NAME and not (folder / text).is_file():
            yield text


def call_name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def string_arguments(call: ast.Call) -> list[str]:
    return [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# ---- knobs ----


@dataclass
class KnobUse:
    """A knob from the environment, and whether anything in the source reads or prints it."""

    declarations: set[int]
    """Identities of the statements that take it from the environment."""
    read: bool = False
    printed: bool = False


def ghost_knobs(script: ScriptReading) -> tuple[list[str], list[str]]:
    """(knobs from the environment that nothing reads, those that are only printed), sorted.

    A name that is used as an attribute, a variable or a whole string anywhere counts as read, so that a knob is named
    here only where no way of reading it was seen.
    """
    uses: dict[str, KnobUse] = {}
    for tree in script.trees:
        helpers = environment_helpers(tree)
        for name, statement in declared_knobs(tree, helpers):
            uses.setdefault(name, KnobUse(set())).declarations.add(id(statement))
    for tree in script.trees:
        mark_uses(tree, uses, printing=False)
    unread = {name: use for name, use in uses.items() if not use.read}
    printed = sorted(name for name, use in unread.items() if use.printed)
    return sorted(set(unread) - set(printed)), printed


def environment_helpers(tree: ast.Module) -> set[str]:
    """Functions of the script that read the environment for their callers."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if f.args.args and len(f.body) < 12 and reads_environment(f, set())}


def reads_environment(node: ast.AST, helpers: set[str]) -> bool:
    for inner in ast.walk(node):
        if getattr(inner, "attr", getattr(inner, "id", "")) in ("environ", "getenv"):
            return True
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in helpers:
            return bool(string_arguments(inner))
    return False


def declared_knobs(tree: ast.Module, helpers: set[str]) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and reads_environment(node.value, helpers):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name | ast.Attribute):
                    yield getattr(target, "id", getattr(target, "attr", "")), node


def mark_uses(node: ast.AST, uses: dict[str, KnobUse], printing: bool) -> None:
    """Note every use below `node`; what stands in the arguments of a call that prints is only printed."""
    waiting: list[tuple[ast.AST, bool, ast.AST | None]] = [(node, printing, None)]
    while waiting:
        current, prints, statement = waiting.pop()
        if isinstance(current, ast.Assign | ast.AnnAssign):
            statement = current
        for name in used_names(current):
            use = uses.get(name)
            if use is not None and not (id(statement) in use.declarations and isinstance(current, ast.Constant)):
                use.printed |= prints
                use.read |= not prints
        if isinstance(current, ast.Call):
            prints = is_printer(current) or (prints and call_name(current) in FORMATTERS)
        waiting.extend((child, prints, statement) for child in ast.iter_child_nodes(current))


def used_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
        return [node.attr if isinstance(node, ast.Attribute) else node.id]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def is_printer(call: ast.Call) -> bool:
    root = call.func
    while isinstance(root, ast.Attribute):
        root = root.value
    name = call_name(call).lower().lstrip("_")
    if isinstance(root, ast.Name) and root.id in NO_PRINTERS:
        return False
    return name.startswith(PRINTERS) or (isinstance(root, ast.Name) and root.id.startswith("logg"))
