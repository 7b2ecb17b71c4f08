"""Reads a shipped script without running it: packed sources, local modules, named files, knobs that nothing reads.

About a hundred published scripts are one `exec` of a compressed and printable source. Every long constant is tried
with every printable code and every decompressor of the standard library, with bounds on memory and output, so that it
does not matter how the loader spells its calls.
"""

import ast
import base64
import binascii
import bz2
import hashlib
import io
import lzma
import os
import re
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab.bundle.parts import OLDEST_PYTHON

MOST_UNPACKED_BYTES = 16_000_000
MOST_SOURCE_LAYERS = 4
SHORTEST_PAYLOAD = 12
MOST_PAYLOADS = 16
MOST_NEIGHBOUR_BYTES = 4_000_000
"""Of a file at the top of the folder that a loader could take its source from."""

RUNNERS = ("exec", "eval", "compile")
LOADERS = ("import_module", "__import__", "run_module", "find_spec")
MOST_FILE_NAME, MOST_PACKAGES = 200, 20
BLOCK_START = re.compile(r"(?!(?:else|elif|except|finally)\b)[^\s#)\]}]")
SOURCE_LINES = re.compile(r"^(?:import \w|from [\w.]+ import|def \w|class \w)", re.MULTILINE)
LEAST_SOURCE_LINES = 3
IMPORTED = re.compile(r"(?<![.\w])(?:import|from)[ \t]+([A-Za-z_]\w{0,80})")
READABLE_NAME = "train_gpt_readable.py"
"""Where our runs and records keep the source of the packed script."""


@dataclass(frozen=True)
class ScriptReading:
    """Holds one script with the sources that are packed in it."""

    path: Path
    data: bytes
    layers: tuple[str, ...]
    """The text as shipped, then each source that was packed in the one before."""
    opaque: bool
    """It runs something that could not be unpacked, so that not all of it was looked at."""
    trees: tuple[ast.Module, ...]
    """Of the layers, in order: of one that does not parse, what stands in blocks that do."""
    unread: str = ""
    """The blocks that do not parse: newer Python than this one, or none."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def innermost(self) -> str:
        return self.layers[-1]

    @property
    def unread_share(self) -> float:
        return len(self.unread) / max(1, sum(map(len, self.layers)))


@dataclass(frozen=True)
class Neighbours:
    """Holds the files beside a script that belong to its code, or that its code names."""

    modules: dict[str, int]
    """Path in the folder -> bytes, for Python files that it runs in any way, and that theirs run."""
    files: dict[str, int]
    """Path -> bytes, of other files that are named in the source."""
    missing: tuple[str, ...]
    """Python files that it loads and that are not there."""


def read_script(path: Path, folder: Path) -> ScriptReading:
    """Reads and unpacks a script. Raises OSError."""
    data, texts = path.read_bytes(), (".md", ".json", ".log", ".txt")
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix not in texts]
    neighbours = {file.name: file.read_bytes() for file in files if file.stat().st_size < MOST_NEIGHBOUR_BYTES}
    layers, opaque = source_layers(script_text(data), neighbours)
    read = [parse_blocks(layer) for layer in layers]
    return ScriptReading(path, data, tuple(layers), opaque, tuple(r[0] for r in read), "\n".join(r[1] for r in read))


def script_text(data: bytes) -> str:
    """Decodes a script as Python does: by the coding that it names in its first lines, else as UTF-8."""
    try:
        coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(coding, errors="replace")
    except (SyntaxError, LookupError):
        return data.decode("utf-8-sig", errors="replace")


def oldest_grammar_error(script: ScriptReading) -> str:
    """Says why a layer is not Python 3.10; empty where all are."""
    for layer in script.layers:
        try:
            ast.parse(layer, feature_version=OLDEST_PYTHON)
        except SyntaxError as error:
            return f"line {error.lineno}: {error.msg}"
        except (RecursionError, MemoryError):
            return "nested too deeply to be parsed"
        except ValueError as error:
            return str(error)
    return ""


# ---- the syntax tree ----


def parse_quietly(text: str) -> ast.Module | None:
    """Parses by the grammar of the Python that runs this; None where the text has no syntax tree."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def parse_blocks(text: str) -> tuple[ast.Module, str]:
    """Parses a text: (its syntax tree, the text that has none). Where it does not parse as a whole, as that of newer
    Python than this one, each statement at its margin is parsed alone."""
    if (tree := parse_quietly(text)) is not None:
        return tree, ""
    statements: list[ast.stmt] = []
    unread = []
    for block in margin_blocks(text):
        tree = parse_quietly(block)
        statements += tree.body if tree else []
        unread += [] if tree else [block]
    return ast.Module(statements, []), "\n".join(unread)


def margin_blocks(text: str) -> Iterator[str]:
    """Divides a source before each line that begins a statement at the margin; a decorator stays with what it is of."""
    block: list[str] = []
    for line in text.splitlines():
        if BLOCK_START.match(line) and not (block and block[-1].startswith("@")):
            yield "\n".join(block)
            block = []
        block.append(line)
    yield "\n".join(block)


def calls_of(tree: ast.AST, *names: str, bare: bool = False) -> Iterator[ast.Call]:
    """Finds the calls of functions by their names; `bare`: not as the attribute of anything."""
    for node in ast.walk(tree):
        named = isinstance(node, ast.Call) and call_name(node) in names
        if named and (isinstance(node.func, ast.Name) or not bare):
            yield node


def call_name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def constant_text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


# ---- what is packed in the script ----


def source_layers(text: str, neighbours: Mapping[str, bytes]) -> tuple[list[str], bool]:
    """Unpacks a script: ([it, the source packed in it, the one packed in that, ...], whether the last runs something
    that was not found). `neighbours` are files beside the script that a loader may read its payload from."""
    layers = [text]
    while len(layers) < MOST_SOURCE_LAYERS:
        tree, _ = parse_blocks(layers[-1])
        if next(calls_of(tree, *RUNNERS, bare=True), None) is None:
            return layers, False
        inner = packed_source(tree, neighbours)
        if inner is None:
            return layers, runs_made_text(tree)
        layers.append(inner)
    return layers, True


def runs_made_text(tree: ast.Module) -> bool:
    """Says whether `exec` gets something that the script makes, not a constant or a file that is read as it is."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = calls_of(tree, "exec", bare=True)
    made = any(call.args and not isinstance(call.args[0], ast.Constant) for call in calls)
    return made and any("decompress" in name or "decode" in name or name == "loads" for name in names)


def packed_source(tree: ast.Module, neighbours: Mapping[str, bytes]) -> str | None:
    """Returns the longest constant or neighbouring file that decodes to Python, decoded."""
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [v.encode() if isinstance(v, str) else v for v in constants if isinstance(v, str | bytes)]
    texts += [v.encode("latin-1") for v in constants if isinstance(v, str) and not v.isascii() and max(v) <= "\xff"]
    texts += [neighbours[v] for v in constants if isinstance(v, str) and v in neighbours]
    for payload in sorted((t for t in texts if len(t) >= SHORTEST_PAYLOAD), key=len, reverse=True)[:MOST_PAYLOADS]:
        for packed in printable_decodings(payload):
            for data in decompressions(packed):
                if (source := python_text(data, data is not packed)) is not None:
                    return source
    return None


def printable_decodings(payload: bytes) -> Iterator[bytes]:
    yield payload
    strict_base64 = partial(base64.b64decode, validate=True)
    compact = b"".join(payload.split())
    for decode in (base64.b85decode, strict_base64, base64.a85decode, base64.b32decode, binascii.unhexlify):
        with suppress(ValueError):  # binascii.Error is one
            yield decode(compact)


def decompressions(data: bytes) -> Iterator[bytes]:
    for maker in (
        partial(lzma.LZMADecompressor, lzma.FORMAT_AUTO, memlimit=1 << 28),
        partial(lzma.LZMADecompressor, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]),
        bz2.BZ2Decompressor,
        partial(zlib.decompressobj, zlib.MAX_WBITS | 32),  # zlib or gzip
        partial(zlib.decompressobj, -zlib.MAX_WBITS),
    ):
        stream = maker()
        try:
            unpacked = stream.decompress(data, MOST_UNPACKED_BYTES)
        except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error):
            continue
        if stream.eof:
            yield unpacked
    yield data


def python_text(data: bytes, was_packed: bool) -> str | None:
    """Decodes data that is Python which does something; None for all other. What was packed may be of newer Python."""
    if len(data) < 8 or b"\0" in data:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    tree = parse_quietly(text)
    if tree is None:
        return text if was_packed and len(SOURCE_LINES.findall(text)) >= LEAST_SOURCE_LINES else None
    useful = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Call
    return text if any(isinstance(node, useful) for node in ast.walk(tree)) else None


# ---- what lies beside the script ----


def find_neighbours(script: ScriptReading, folder: Path) -> Neighbours:
    """Follows imports, importlib, runpy and exec of files in the folder, through packed layers too."""
    sizes: dict[Path, int] = {}
    missing: set[str] = set()
    waiting = [script]
    while waiting:
        reading = waiting.pop()
        imports = IMPORTED.findall(reading.unread)
        unread = ast.Module([ast.Import([ast.alias(name) for name in imports])] if imports else [], [])
        for tree in (*reading.trees, unread):
            missing |= set(missing_modules(tree, folder))
            for path in named_files(tree, folder):
                if path != script.path and path not in sizes:
                    sizes[path] = path.stat().st_size
                    if path.suffix == ".py":
                        waiting.append(read_script(path, folder))
    modules, files = (
        {path.relative_to(folder).as_posix(): size for path, size in sizes.items() if (path.suffix == ".py") == is_code}
        for is_code in (True, False)
    )
    return Neighbours(modules, files, tuple(sorted(missing)))


def named_files(tree: ast.Module, folder: Path) -> Iterator[Path]:
    """Finds files of the folder that a source imports, or names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (path for module in imported_names(node) for path in module_files(module, folder))
        elif isinstance(node, ast.Call) and call_name(node) in LOADERS:
            yield from (path for text in map(constant_text, node.args) for path in module_files(text, folder))
        elif isinstance(node, ast.Constant) and node.value != READABLE_NAME:
            # (A run writes a file of that name. In a record it is held against the packed script.)
            yield from file_named(node.value, folder)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Names modules that the statement may load: a name that is imported from a package may be one too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = [node.module] if node.module else []
    return base + [".".join([*base, alias.name]) for alias in node.names if alias.name != "*"]


def module_files(module: str, folder: Path) -> Iterator[Path]:
    """Finds the files in the folder that importing `a.b.c` runs: packages on the way, and the module."""
    names = module.strip(".").split(".")[:MOST_PACKAGES]
    for depth in range(1, len(names) + 1):
        place = folder.joinpath(*names[:depth])
        for path in (place.with_name(place.name + ".py"), place / "__init__.py"):
            if names[depth - 1].isidentifier() and os.path.isfile(path):
                yield path


def file_named(value: object, folder: Path) -> Iterator[Path]:
    """Finds the file of the folder that a constant names."""
    if isinstance(value, str) and 0 < len(value) < MOST_FILE_NAME and value.isprintable():
        path = folder / value.removeprefix("./")
        inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
        if inside and "." in path.name and os.path.isfile(path):
            yield path


def missing_modules(tree: ast.Module, folder: Path) -> Iterator[str]:
    """Names Python files that are run from a path and that are not in the folder."""
    labels = {id(argument) for call in calls_of(tree, "compile") for argument in call.args[1:]}  # a name for tracebacks
    for call in calls_of(tree, "exec", "run_path", "spec_from_file_location"):
        for text in (constant_text(inner) for inner in ast.walk(call) if id(inner) not in labels):
            if text.endswith(".py") and len(text) < MOST_FILE_NAME and not os.path.isfile(folder / text):
                yield text
