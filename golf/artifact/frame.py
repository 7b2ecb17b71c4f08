"""Frames an artifact: magic, version, checksum, codec, fields.

    b"GOLF" | version, 1 byte | SHA-256, 32 bytes | codec, 1 byte | (LEB128 length, bytes) ...

The SHA-256 is of the version byte and all that follows the SHA-256; in version 1 of the latter alone.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from golf.artifact.codecs import ArtifactError

ARTIFACT_MAGIC = b"GOLF"
ARTIFACT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Versions that this code reads; 1 has neither brotli nor rans, and only tensors with a scale for each row."""
DIGEST_START = len(ARTIFACT_MAGIC) + 1
DIGEST_END = DIGEST_START + 32
LARGEST_FILE = 2**30
LONGEST_NUMBER = 5
"""Most bytes of a LEB128 number; enough for 2**35."""
CODEC_IDS = {"none": 0, "zlib": 1, "lzma": 2, "zstd": 3, "brotli": 4, "rans": 5}


def encode_number(value: int) -> bytes:
    """Encodes LEB128: seven bits a byte, lowest first, the top bit set while more follow."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def decode_number(data: bytes, start: int) -> tuple[int, int]:
    """Returns (value, position after it). Raises ArtifactError."""
    value = 0
    for index, digit in enumerate(data[start : start + LONGEST_NUMBER]):
        value |= (digit & 127) << (7 * index)
        if digit < 128:
            return value, start + index + 1
    raise ArtifactError("the artifact is damaged: a length does not end")


def frame_digest(version: int, body: bytes) -> bytes:
    return hashlib.sha256((b"" if version == 1 else bytes([version])) + body).digest()


def frame_artifact(codec: str, fields: Iterable[bytes]) -> bytes:
    body = bytes([CODEC_IDS[codec]]) + b"".join(encode_number(len(field)) + field for field in fields)
    return ARTIFACT_MAGIC + bytes([ARTIFACT_VERSION]) + frame_digest(ARTIFACT_VERSION, body) + body


def unframe_artifact(data: bytes) -> tuple[str, list[bytes]]:
    """Returns (codec, fields) of an artifact whose checksum holds. Raises ArtifactError."""
    if data[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise ArtifactError("not an artifact: it does not begin with GOLF")
    if len(data) <= DIGEST_END:
        raise ArtifactError("the artifact is truncated: it ends within its header")
    version = data[DIGEST_START - 1]
    if version not in READABLE_VERSIONS:
        raise ArtifactError(f"artifact version {version} is unknown: this reads up to {ARTIFACT_VERSION}")
    if frame_digest(version, data[DIGEST_END:]) != data[DIGEST_START:DIGEST_END]:
        raise ArtifactError("the artifact is damaged or truncated: its checksum does not match")
    codecs = {number: name for name, number in CODEC_IDS.items()}
    if data[DIGEST_END] not in codecs:
        raise ArtifactError(f"the artifact has unknown codec {data[DIGEST_END]}")
    fields, position = [], DIGEST_END + 1
    while position < len(data):
        length, position = decode_number(data, position)
        if length > len(data) - position:
            raise ArtifactError("the artifact is truncated: a field is longer than what is left of the file")
        fields.append(data[position : position + length])
        position += length
    return codecs[data[DIGEST_END]], fields


def read_file_bounded(path: Path) -> bytes:
    """Reads a whole file that is no larger than LARGEST_FILE. Raises ArtifactError."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path}: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise ArtifactError(f"{path} is larger than any artifact ({LARGEST_FILE:,} bytes)")
    return data
