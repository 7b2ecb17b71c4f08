"""Looks inside self-extracting scripts without running them.

About a hundred published scripts are one `exec` of a compressed and printable source. Every long constant is tried
with every printable code and every decompressor of the standard library, with bounds on memory and output, so that it
does not matter how the loader spells its calls.
"""

import ast
import base64
import binascii
import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping

MOST_UNPACKED_BYTES = 16_000_000
MOST_SOURCE_LAYERS = 4
SHORTEST_PAYLOAD = 12
RUNNERS = frozenset({"exec", "eval", "compile"})


def parse_quietly(text: str) -> ast.Module | None:
    """The syntax tree by the grammar of the Python that runs this; None where it has none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def source_layers(text: str, neighbours: Mapping[str, bytes]) -> tuple[list[str], bool]:
    """([the script, the source packed in it, the source packed in that, ...], whether the last one runs something
    that was not found). `neighbours` are files beside the script that a loader may read its payload from."""
    layers = [text]
    while len(layers) < MOST_SOURCE_LAYERS:
        tree = parse_quietly(layers[-1])
        if tree is None or not runs_text(tree):
            return layers, False
        inner = packed_source(tree, neighbours)
        if inner is None:
            return layers, runs_made_text(tree)
        layers.append(inner)
    return layers, True


def calls_of(tree: ast.AST, names: frozenset[str]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def runs_text(tree: ast.Module) -> bool:
    return next(calls_of(tree, RUNNERS), None) is not None


def runs_made_text(tree: ast.Module) -> bool:
    """Whether `exec` gets something that the script makes, and not a constant or a file that is read as it is."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    made = any(call.args and not isinstance(call.args[0], ast.Constant) for call in calls_of(tree, frozenset({"exec"})))
    return made and any("decompress" in name or "decode" in name or name == "loads" for name in names)


def packed_source(tree: ast.Module, neighbours: Mapping[str, bytes]) -> str | None:
    """The longest constant or neighbouring file that decodes to Python."""
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [
        value.encode() if isinstance(value, str) else value for value in constants if isinstance(value, str | bytes)
    ]
    named = [neighbours[value] for value in constants if isinstance(value, str) and value in neighbours]
    for payload in sorted((t for t in texts + named if len(t) >= SHORTEST_PAYLOAD), key=len, reverse=True)[:16]:
        for packed in printable_decodings(payload):
            for data in decompressions(packed):
                if (source := python_text(data)) is not None:
                    return source
    return None


def printable_decodings(payload: bytes) -> Iterator[bytes]:
    yield payload
    decoders: tuple[Callable[[bytes], bytes], ...] = (
        base64.b85decode,
        lambda data: base64.b64decode(data, validate=True),
        base64.a85decode,
        base64.b32decode,
        binascii.unhexlify,
    )
    compact = b"".join(payload.split())
    for decode in decoders:
        try:
            yield decode(compact)
        except ValueError:  # binascii.Error is one
            continue


def decompressions(data: bytes) -> Iterator[bytes]:
    raw_lzma = [{"id": lzma.FILTER_LZMA2}]
    makers: tuple[Callable, ...] = (
        lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw_lzma),
        bz2.BZ2Decompressor,
        lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),  # zlib or gzip
        lambda: zlib.decompressobj(-zlib.MAX_WBITS),
    )
    for maker in makers:
        stream = maker()
        try:
            unpacked = stream.decompress(data, MOST_UNPACKED_BYTES)
        except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error):
            continue
        if stream.eof:
            yield unpacked
    yield data


def python_text(data: bytes) -> str | None:
    """`data` as source, where it is Python that does something."""
    if len(data) < 8 or b"\0" in data:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    tree = parse_quietly(text)
    useful = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Call
    if tree is None or not any(isinstance(node, useful) for node in ast.walk(tree)):
        return None
    return text
