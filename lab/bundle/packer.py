"""The self-extracting form of a script: minified, raw LZMA2, in a loader of a few lines of Latin-1.

Comments, docstrings, wide layout, annotations that nothing reads and the names of local variables go; other names stay,
because tracebacks name functions (the readable form can be made again from the commit). The compressed bytes stand in a
string as they are: Latin-1 has a character for each byte, and only four of them have to be escaped there (1.6 % more
bytes; base85 takes 25 %). The same source gives the same bytes on every Python (lab/bundle/printing.py; compared on
3.10, 3.11 and 3.13). The loader puts the source into linecache, where inspect and traceback look for it: without it
Triton can't compile a kernel of a script that was started by exec (triton-lang/triton issue 5386).
"""

import ast
import hashlib
import lzma
import re
from types import SimpleNamespace
from unittest import mock

import python_minifier
from python_minifier import expression_printer
from python_minifier.transforms.remove_annotations_options import RemoveAnnotationsOptions

from lab.bundle.parts import OLDEST_PYTHON, BundleError, parse_oldest
from lab.bundle.reach import strip_annotations
from lab.bundle.specialize import SPECIALISED_MARK

MAX_SOURCE_BYTES = 16_000_000
PACKED_TEMPLATE = """\
# coding: latin-1
# Packed by tools/bundle.py from the readable bundle with sha256 {digest}
import linecache as C,lzma as L,sys,traceback as T
s=L.decompress({payload}.encode("latin-1"),L.FORMAT_RAW,None,[{{"id":L.FILTER_LZMA2}}]).decode();f=__file__+":src"
C.cache[f]=len(s),None,s.splitlines(True),f;sys.excepthook=T.print_exception
exec(compile(s,f,"exec"))
"""
"""mtime None keeps linecache from dropping the entry; Python's own excepthook reads only files on the disk."""


def minify_source(source: str) -> str:
    """The same program without what only people read. Raises BundleError where it is not Python 3.10."""
    tree = parse_oldest(source, "bundle")
    # The printer would use the f-strings of the Python that runs it (3.12 may nest equal quotes, PEP 701).
    oldest = mock.patch.object(expression_printer, "sys", SimpleNamespace(version_info=OLDEST_PYTHON))
    with oldest:
        return python_minifier.minify(
            strip_annotations(source) if SPECIALISED_MARK in source else source,
            remove_annotations=RemoveAnnotationsOptions(
                remove_variable_annotations=True,
                remove_return_annotations=False,
                remove_argument_annotations=False,
                remove_class_attribute_annotations=False,
            ),
            remove_literal_statements=True,
            hoist_literals=False,
            rename_locals=True,
            # Under another name, which takes an assignment, Triton would make a tensor of a kernel's constant.
            preserve_locals=[part.arg for part in ast.walk(tree) if isinstance(part, ast.arg) and is_constant(part)],
            rename_globals=False,
            preserve_shebang=False,
        )


def is_constant(parameter: ast.arg) -> bool:
    """Returns whether a parameter is one of a Triton kernel that has to be known when that is compiled."""
    return isinstance(parameter.annotation, ast.Name) and parameter.annotation.id == "constexpr"


def pack_source(source: str) -> bytes:
    """Returns a script in Latin-1 that runs `source`. Raises BundleError where that is not Python 3.10."""
    payload = quote_bytes(compress_smallest(minify_source(source).encode()))
    return PACKED_TEMPLATE.format(digest=hashlib.sha256(source.encode()).hexdigest(), payload=payload).encode("latin-1")


def quote_bytes(data: bytes) -> str:
    """Returns a string literal of these bytes as Latin-1, with as few escapes as Python's grammar allows: it knows no
    null bytes, and takes carriage returns for line ends."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
    text = re.sub(r'"(?="")|"\Z', r'\\"', text)
    text = re.sub("\0(?=[0-7])", r"\\000", text).replace("\0", r"\0")
    return f'"""{text}"""'


def compress_smallest(data: bytes) -> bytes:
    """The shortest raw LZMA2 stream over the bits of literal context. Text has no aligned words: lp and pb are 0 (of
    36 settings with others the shortest six had lp 0, and each of them was shorter with pb 0)."""
    streams = (lzma.compress(data, lzma.FORMAT_RAW, filters=[lzma2_filter(lc)]) for lc in range(5))
    return min(streams, key=len)


def lzma2_filter(lc: int) -> dict[str, int]:
    return {
        "id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20,
        "lc": lc, "lp": 0, "pb": 0, "nice_len": 273, "depth": 4096,
    }  # fmt: skip


def unpack_source(packed: bytes) -> str:
    """Returns the minified source in a packed script, without running it. Raises BundleError for any other bytes."""
    tree = parse_oldest(packed.decode("latin-1"), "packed script")
    payload = max((node.value for node in ast.walk(tree) if is_text_constant(node)), key=len, default="")
    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
        source = stream.decompress(payload.encode("latin-1"), MAX_SOURCE_BYTES).decode()
    except (ValueError, lzma.LZMAError) as error:
        raise BundleError(f"this is not a script that tools/bundle.py packed: {error}") from None
    if not stream.eof or stream.unused_data:
        raise BundleError("this is not a script that tools/bundle.py packed: its payload is not one stream")
    return source


def is_text_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
