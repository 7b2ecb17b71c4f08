"""Compresses byte streams by lzma, zstd, brotli, zlib or none. Decoding never makes more bytes than were declared.

Quantized weights are close to independent draws, so a codec gains from the symbols' frequencies and loses by looking
for repeats. Hence lzma's literal coder without context bits, and zstd with long minimal matches: the smallest that were
measured on trained codes, zstd 1.5 to 3 % below lzma.
"""

import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from golf.config.knobs import UserError

SAMPLE_BYTES = 2**20
"""Bytes of a stream on which codec settings are chosen: encoding all of it with each would take minutes."""
LZMA_SETTINGS = ((2**12, 0, 0), (2**16, 0, 0), (2**26, 0, 0), (2**16, 3, 2))
"""Settings to try: (dictionary bytes, literal context bits, position bits). Repeats in codes are chance: a short
dictionary makes them cheap to name, and is quick; a table whose rows resemble each other needs a long one."""
ZSTD_SETTINGS = ((22, 7), (1, 7), (22, 3))
"""Settings to try: (level, length of the shortest match)."""
LARGEST_WINDOW = 2**27


class ArtifactError(UserError):
    """Reports bytes that are not a sound artifact, or weights that can't become one."""


def encode_lzma(data: bytes, settings: tuple[int, int, int]) -> bytes:
    """Encodes LZMA2 without the xz container; the stream itself records the context bits."""
    dict_size, lc, pb = settings
    options = {"dict_size": min(dict_size, max(len(data), 4096)), "lc": lc, "lp": 0, "pb": pb, "nice_len": 273}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, **options}])


def decode_lzma(data: bytes, size: int) -> bytes:
    """Decodes at most `size` + 1 bytes of LZMA2.

    The dictionary's size need not be known: any dictionary reaches at most to the beginning of the stream.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": min(max(size, 4096), LARGEST_WINDOW)}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, max_length=size + 1)


def require_zstandard() -> ModuleType:
    """Returns the zstandard package. Raises ArtifactError without it: another codec would silently change the size."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ArtifactError("codec zstd needs the package zstandard: pip install zstandard, or choose lzma") from None
    return zstandard


def encode_zstd(data: bytes, settings: tuple[int, int]) -> bytes:
    zstandard = require_zstandard()
    level, min_match = settings
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=len(data),
        min_match=min_match,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_checksum=False,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def decode_zstd(data: bytes, size: int) -> bytes:
    zstandard = require_zstandard()
    decoder = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        with decoder.stream_reader(io.BytesIO(data)) as reader:
            return reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"a zstd stream is damaged: {error}") from None


def require_brotli() -> ModuleType:
    """Returns the brotli package, in a version whose output can be bounded. Raises ArtifactError without it."""
    try:
        import brotli
    except ModuleNotFoundError:
        raise ArtifactError(
            "codec brotli needs the package brotli: pip install 'brotli>=1.2', or choose rans"
        ) from None
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise ArtifactError(f"codec brotli needs brotli 1.2 or later, this is {brotli.__version__}")
    return brotli


def encode_brotli(data: bytes) -> bytes:
    return require_brotli().compress(data, quality=11, lgwin=24)


def decode_brotli(data: bytes, size: int) -> bytes:
    brotli = require_brotli()
    decoder = brotli.Decompressor()
    try:
        decoded = decoder.process(data, output_buffer_limit=size + 1)
        while len(decoded) <= size and not decoder.can_accept_more_data():
            more = decoder.process(b"", output_buffer_limit=size + 1 - len(decoded))
            if not more:
                break
            decoded += more
    except brotli.error as error:
        raise ArtifactError(f"a brotli stream is damaged: {error}") from None
    if not decoder.is_finished():
        raise ArtifactError("a brotli stream is damaged: it does not end where it should")
    return decoded


def encode_zlib(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return encoder.compress(data) + encoder.flush()


def decode_zlib(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


@dataclass(frozen=True)
class ByteCodec:
    """Compresses bytes by one of several encoders, which share a decoder of (data, declared size)."""

    encoders: tuple[Callable[[bytes], bytes], ...]
    decode: Callable[[bytes, int], bytes]


LZMA = ByteCodec(tuple(partial(encode_lzma, settings=settings) for settings in LZMA_SETTINGS), decode_lzma)
BY_CODEC = {
    "lzma": LZMA,
    "zstd": ByteCodec(tuple(partial(encode_zstd, settings=settings) for settings in ZSTD_SETTINGS), decode_zstd),
    "brotli": ByteCodec((encode_brotli,), decode_brotli),
    "zlib": ByteCodec((encode_zlib,), decode_zlib),
    "none": ByteCodec((bytes,), lambda data, size: data),
}
"""Codecs that compress bytes, by name; rans models codes instead (streams.py)."""


def encode_smallest(codec: ByteCodec, data: bytes) -> bytes:
    """Encodes `data` by the encoder that is best on its beginning, of equals the first.

    The same data and library version give the same bytes.
    """
    encoders = codec.encoders
    if len(encoders) > 1 and len(data) > SAMPLE_BYTES:
        encoders = (min(encoders, key=lambda encoder: len(encoder(data[:SAMPLE_BYTES]))),)
    return min((encoder(data) for encoder in encoders), key=len)


def compress_stream(codec: str, data: bytes) -> bytes:
    """Returns `data` compressed by the codec of that name."""
    return encode_smallest(BY_CODEC[codec], data)


def decode_exactly(codec: ByteCodec, data: bytes, size: int) -> bytes:
    """Returns exactly `size` bytes, in memory of a few times `size` and the codec's window. Raises ArtifactError."""
    try:
        decoded = codec.decode(data, size)
    except (lzma.LZMAError, zlib.error, EOFError, MemoryError) as error:
        raise ArtifactError(f"a compressed stream is damaged: {error}") from None
    if len(decoded) != size:
        raise ArtifactError(f"a compressed stream does not hold the {size:,} bytes that were declared")
    return decoded


def decompress_stream(codec: str, data: bytes, size: int) -> bytes:
    """Inverts compress_stream. Raises ArtifactError."""
    return decode_exactly(BY_CODEC[codec], data, size)
