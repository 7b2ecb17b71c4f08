"""Compresses a text by the compressors that everybody has, for a table beside a model's."""

import bz2
import lzma
import time
from collections.abc import Callable

import brotli
import zstandard

DICTIONARY_BYTES = 110_000
SAMPLE_BYTES = 4_000
"""Of training text in one sample for a dictionary."""


def others(training: bytes) -> dict[str, Callable[[bytes], bytes]]:
    """Returns compressors by name; `training` text makes the dictionary of one, where there is some."""
    found: dict[str, Callable[[bytes], bytes]] = {
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "bzip2 -9": lambda data: bz2.compress(data, 9),
        "brotli 11": lambda data: brotli.compress(data, quality=11, lgwin=24),
        "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    }
    if training:
        samples = [training[a : a + SAMPLE_BYTES] for a in range(0, len(training), SAMPLE_BYTES)]
        dictionary = zstandard.train_dictionary(DICTIONARY_BYTES, samples)
        found["zstd -19, dictionary"] = zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress
    return found


def measure(name: str, compress: Callable[[bytes], bytes], data: bytes) -> dict[str, object]:
    """Returns a row: bytes, bits per byte of text, seconds."""
    started = time.perf_counter()
    size = len(compress(data))
    bits = 8 * size / max(1, len(data))
    return {"what": name, "bytes": size, "bits_per_byte": bits, "seconds": time.perf_counter() - started}
