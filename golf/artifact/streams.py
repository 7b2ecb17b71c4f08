"""Encodes a stream of codes for codec rans, in the shortest of several ways.

The stream's first byte names the way. R rows, N codes, B bytes.
"""

from collections.abc import Sequence

import numpy as np

from golf.artifact.codecs import ArtifactError
from golf.artifact.frame import decode_number, encode_number
from golf.artifact.sequences import decode_list, decode_sequence, encode_list, encode_sequence
from golf.artifact.stacks import (
    FEWEST_ROWS,
    MOST_ROWS,
    StackSpec,
    decode_stacks,
    encode_stacks,
    refer_rows,
    restore_rows,
)

RAW, MODELLED, TRITS, BINARY = range(4)
"""Ways to store codes: a byte each, modelled, five ternary codes a byte, eight binary codes a byte."""


def may_refer(spec: StackSpec) -> bool:
    """Returns whether earlier rows may predict rows of such a stack: in tables of many rows."""
    return spec.shape[0] == 1 and FEWEST_ROWS <= spec.shape[1] <= MOST_ROWS and not spec.trellis


def encode_modelled(specs: Sequence[StackSpec], stacks: Sequence[np.ndarray]) -> bytes:
    """Encodes stacks by the context model, with references between rows where `may_refer` allows them.

    Each such stack has the size of its rows' shares in bytes (0: no row has a reference), the shares, the size of the
    references and the references; the codes of all stacks follow.
    """
    sides, residuals = [], []
    for spec, stack in zip(specs, stacks, strict=True):
        residuals.append(stack)
        if not may_refer(spec):
            continue
        residual_RC, share_R, reference_R = refer_rows(stack[0])
        referring = np.flatnonzero(share_R)
        if not len(referring):
            sides.append(encode_number(0))
            continue
        shares = encode_list(share_R)
        references = encode_sequence(reference_R[referring])
        sides.append(encode_number(len(shares)) + shares + encode_number(len(references)) + references)
        residuals[-1] = residual_RC[None]
    return b"".join(sides) + encode_stacks(specs, residuals)


def decode_modelled(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """Inverts `encode_modelled`. Raises ArtifactError."""
    position, links = 0, {}
    for number, spec in enumerate(specs):
        size, position = decode_number(data, position) if may_refer(spec) else (0, position)
        if size:
            share_R = decode_list(data[position : position + size], spec.shape[1])
            size, position = decode_number(data, position + size)
            reference_R = np.zeros(spec.shape[1], np.int64)
            reference_R[share_R != 0] = decode_sequence(data[position : position + size], np.count_nonzero(share_R))
            links[number], position = (share_R, reference_R), position + size
    stacks = decode_stacks(data[position:], specs)
    for number, link in links.items():
        stacks[number] = restore_rows(stacks[number][0], *link)[None]
    return stacks


def encode_codes(specs: Sequence[StackSpec], stacks: Sequence[np.ndarray]) -> bytes:
    """Encodes stacks of codes (int16) in the shortest way."""
    code_N = np.concatenate([stack.reshape(-1) for stack in stacks])
    ways = [bytes([MODELLED]) + encode_modelled(specs, stacks)]
    largest = int(np.abs(code_N).max(initial=0))
    if largest <= 1:
        ways.append(bytes([TRITS]) + pack_trits(code_N))
    if (np.abs(code_N) == 1).all():
        ways.append(bytes([BINARY]) + np.packbits(code_N > 0).tobytes())
    if largest < 128:
        ways.append(bytes([RAW]) + code_N.astype(np.int8).tobytes())
    return min(ways, key=len)


def decode_codes(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """Returns int16 stacks of these shapes. Raises ArtifactError."""
    if data[:1] == bytes([MODELLED]):
        return decode_modelled(data[1:], specs)
    sizes = [spec.size for spec in specs]
    ways = {RAW: (1, unpack_raw), TRITS: (5, unpack_trits), BINARY: (8, unpack_bits)}
    per_byte, unpack = ways.get(data[0] if data else -1, (0, unpack_raw))
    if not per_byte or len(data) - 1 != -(-sum(sizes) // per_byte):
        raise ArtifactError("a stream of codes is damaged: it does not hold what was declared")
    code_N = unpack(np.frombuffer(data, np.uint8, offset=1))[: sum(sizes)].astype(np.int16)
    parts = np.split(code_N, np.cumsum(sizes)[:-1])
    return [part.reshape(spec.shape) for part, spec in zip(parts, specs, strict=True)]


def pack_trits(code_N: np.ndarray) -> bytes:
    """Packs five codes of -1..1 into a byte, in base 3: 1.6 bits each."""
    digits_B5 = np.resize(np.append(code_N + 1, np.zeros(-len(code_N) % 5)), (-(-len(code_N) // 5), 5))
    return (digits_B5.astype(np.int64) @ 3 ** np.arange(5)).astype(np.uint8).tobytes()


def unpack_trits(byte_B: np.ndarray) -> np.ndarray:
    if byte_B.max(initial=0) >= 3**5:
        raise ArtifactError("a stream of ternary codes is damaged")
    return (byte_B[:, None] // 3 ** np.arange(5) % 3 - 1).reshape(-1)


def unpack_bits(byte_B: np.ndarray) -> np.ndarray:
    return np.unpackbits(byte_B).astype(np.int16) * 2 - 1


def unpack_raw(byte_B: np.ndarray) -> np.ndarray:
    return byte_B.view(np.int8)
