"""The .golfz file: a text, coded with a model that both sides have.

    GOLFZ, version, header length   8 bytes
    header                          JSON: hashes of artifact, tokenizer and text, the pieces, the settings, the machine
    checksums                       uint32 a block of coded tokens
    coded tokens, raw pieces        raw ones by xz
    CRC-32 of all before it         4 bytes

The header says where the text was cut. A piece that its tokens would not give back exactly is kept raw, and so is a
file that is not UTF-8. Nothing is read beyond the sizes that the header names, and these are bounded.
"""

import hashlib
import json
import lzma
import platform
import struct
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from golf.config.knobs import parse_json
from golf.config.scoring import ScoreConfig
from golf.score.scorer import ScoreSettings
from lab.compress.predictor import StreamPredictor
from lab.compress.stream_code import BLOCK, CompressionError, Progress, decode_streams_of, encode_streams_of
from lab.generate.text_model import TextModel

MAGIC = b"GOLFZ"
VERSION, READ_VERSIONS = 2, (1, 2)
HEAD = struct.Struct("<5sBH")
MOST_STREAMS = 256
TOKENS_PER_STREAM = 4000
"""A stream more for so many tokens: streams are read beside each other, and each begins without a context."""
MOST_BYTES, MOST_SUCCESSORS = 1 << 32, 1 << 16


@dataclass(frozen=True)
class Piece:
    """Describes a part of the text."""

    tokens: int
    """0: kept raw."""
    bytes: int


@dataclass
class Header:
    """Says what a file holds and what reads it."""

    artifact: str
    tokenizer: str
    text: str
    """SHA-256 of the text's bytes."""
    pieces: list[Piece] = field(default_factory=list)
    coded_bytes: int = 0
    raw_bytes: int = 0
    window: int = 0
    stride: int = 0
    rope_base: float = 0.0
    orders: int = 0
    """Of the mixture with counts; 0: the network alone."""
    successors: int = 0
    """That are corrected at last."""
    made_on: str = ""

    @property
    def blocks(self) -> int:
        return -(-sum(piece.tokens for piece in self.pieces) // BLOCK)


def this_machine() -> str:
    """Returns what a machine's arithmetic depends on, as far as it is known."""
    parts = f"torch {torch.__version__}", f"{platform.machine()} {platform.processor()}".strip()
    return ", ".join((*parts, f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()))


def cut_text(text: str, streams: int) -> list[str]:
    """Cuts a text into about equal pieces, at ends of lines where they are near."""
    cuts, size = [0], len(text) / streams
    for number in range(1, streams):
        near = text.rfind("\n", cuts[-1], int(number * size)) + 1
        cuts.append(near if near > (number - 0.5) * size else max(cuts[-1], int(number * size)))
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def split_bytes(model: TextModel, data: bytes, streams: int) -> tuple[list[bytes], list[list[int]]]:
    """Returns the pieces of a text and the tokens of each, none for one that they would not give back."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return [data], [[]]
    streams = streams or len(model.tokenizer.encode(text)) // TOKENS_PER_STREAM
    pieces = [piece for piece in cut_text(text, max(1, min(streams, MOST_STREAMS))) if piece]
    tokens = [model.tokenizer.encode(piece) for piece in pieces]
    kept = [
        ids if model.tokenizer.decode(ids) == piece and model.tokenizer.bos_id not in ids else []
        for piece, ids in zip(pieces, tokens, strict=True)
    ]
    return [piece.encode() for piece in pieces], kept


def open_predictor(model: TextModel, header: Header) -> StreamPredictor:
    """Returns the predictor that a header asks for."""
    settings = ScoreSettings(header.window, header.stride, 1, header.rope_base or None)
    score = ScoreConfig(
        mixture=header.orders > 0, mixture_orders=header.orders or 1, mixture_successors=header.successors
    )
    lengths = [piece.tokens for piece in header.pieces if piece.tokens]
    return StreamPredictor(model.model, settings, score, lengths)


def compress_bytes(
    model: TextModel, artifact: str, data: bytes, settings: ScoreSettings, score: ScoreConfig, streams: int = 0,
    progress: Progress = lambda done, total: None,
) -> bytes:  # fmt: skip
    """Returns the file of a text. `artifact` is the model's SHA-256; `streams` 0: as many as the text is long for."""
    pieces, tokens = split_bytes(model, data, streams)
    raw = lzma.compress(b"".join(piece for piece, ids in zip(pieces, tokens, strict=True) if not ids), preset=9)
    header = Header(
        artifact, model.tokenizer.sha256, hashlib.sha256(data).hexdigest(),
        [Piece(len(ids), len(piece)) for piece, ids in zip(pieces, tokens, strict=True)],
        raw_bytes=len(raw), window=settings.seq_len, stride=settings.stride, rope_base=settings.rope_base or 0.0,
        orders=score.mixture_orders if score.mixture else 0, made_on=this_machine(),
        successors=score.mixture_successors if score.mixture else 0,
    )  # fmt: skip
    coded, checksums = b"", np.zeros(0, np.uint32)
    if header.blocks:
        coded, checksums = encode_streams_of(open_predictor(model, header), [ids for ids in tokens if ids], progress)
    header.coded_bytes = len(coded)
    packed = zlib.compress(json.dumps(asdict(header)).encode(), 9)
    body = HEAD.pack(MAGIC, VERSION, len(packed)) + packed + checksums.astype("<u4").tobytes() + coded + raw
    return body + struct.pack("<I", zlib.crc32(body))


def read_header(file: bytes, name: str) -> tuple[Header, memoryview]:
    """Returns a file's header and what follows it. Raises CompressionError for bytes that no compressor wrote."""
    if len(file) < HEAD.size + 4 or not file.startswith(MAGIC):
        raise CompressionError(f"{name}: no .golfz file (its first bytes are others)")
    _, version, length = HEAD.unpack_from(file)
    if version not in READ_VERSIONS:
        raise CompressionError(f"{name}: version {version} of the format; this program reads {READ_VERSIONS}")
    if zlib.crc32(file[:-4]) != struct.unpack("<I", file[-4:])[0]:
        raise CompressionError(f"{name}: damaged or cut off (its checksum does not hold): get the file again")
    try:
        unpacked = zlib.decompressobj().decompress(file[HEAD.size : HEAD.size + length], 1 << 20)
        header = check_header(parse_json(unpacked))
    except (zlib.error, ValueError, TypeError, KeyError) as error:
        raise CompressionError(f"{name}: its header can't be read ({error})") from None
    rest = memoryview(file)[HEAD.size + length : -4]
    if len(rest) != 4 * header.blocks + header.coded_bytes + header.raw_bytes:
        raise CompressionError(f"{name}: its header names other sizes than it has")
    return header, rest


def check_header(content: dict[str, Any]) -> Header:
    """Returns a header of the right kinds and sizes. Raises ValueError, TypeError, KeyError."""
    header = Header(**content | {"pieces": [Piece(**piece) for piece in content["pieces"]]})
    numbers = [header.coded_bytes, header.raw_bytes, header.window, header.stride, header.orders, header.successors]
    numbers += [number for piece in header.pieces for number in (piece.tokens, piece.bytes)]
    if not all(type(number) is int and 0 <= number < MOST_BYTES for number in numbers):
        raise ValueError("a size is out of range")
    if not (
        len(header.pieces) <= MOST_STREAMS
        and header.orders <= 16
        and header.successors <= MOST_SUCCESSORS
        and 1 <= header.stride <= header.window
        and type(header.rope_base) is float
    ):
        raise ValueError("a setting is out of range")
    if not all(type(text) is str for text in (header.artifact, header.tokenizer, header.text, header.made_on)):
        raise ValueError("a name is no text")
    return header


def decompress_bytes(
    model: TextModel, artifact: str, file: bytes, name: str, progress: Progress = lambda done, total: None
) -> bytes:
    """Returns the text of a file. Raises CompressionError where it is damaged, was made with another model, or does not
    come out as it went in."""
    header, rest = read_header(file, name)
    for what, made, given in (
        ("artifact", header.artifact, artifact), ("tokenizer", header.tokenizer, model.tokenizer.sha256),
    ):  # fmt: skip
        if made != given:
            raise CompressionError(f"{name}: made with the {what} {made[:12]}..., not {given[:12]}...: give that one")
    edge = 4 * header.blocks
    checksums, coded = np.frombuffer(rest[:edge], "<u4"), bytes(rest[edge : edge + header.coded_bytes])
    streams = []
    if header.blocks:
        streams = decode_streams_of(open_predictor(model, header), coded, checksums, header.made_on, progress)
    raw, left, ids = unpack_raw(bytes(rest[edge + header.coded_bytes :]), header, name), 0, iter(streams)
    parts = []
    for piece in header.pieces:
        if piece.tokens:
            parts.append(model.tokenizer.decode(next(ids)).encode())
        else:
            parts.append(raw[left : left + piece.bytes])
            left += piece.bytes
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != header.text:
        raise CompressionError(f"{name}: the text does not come out as it went in (its SHA-256 is another)")
    return data


def unpack_raw(packed: bytes, header: Header, name: str) -> bytes:
    """Returns the raw pieces, no more bytes than the header names. Raises CompressionError."""
    size = sum(piece.bytes for piece in header.pieces if not piece.tokens)
    try:
        raw = lzma.LZMADecompressor(memlimit=1 << 28).decompress(packed, size)
    except lzma.LZMAError as error:
        raise CompressionError(f"{name}: its raw pieces can't be read ({error})") from None
    if len(raw) != size:
        raise CompressionError(f"{name}: its raw pieces end too early")
    return raw
