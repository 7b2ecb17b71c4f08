"""Codes stacks of matrices as one modelled byte stream; a row may be a share of an earlier row and a residual.

Token embeddings resemble each other: rows that training never touched are nearly equal, and those of related tokens
correlate. L layers, R rows, C columns, B rows of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from golf.artifact.codecs import ArtifactError
from golf.artifact.context_model import (
    TILES_DOWN,
    AdaptiveTables,
    StackShape,
    Strengths,
    bell_counts,
    code_stack,
    tile_edges,
)
from golf.artifact.frame import decode_number, encode_number
from golf.artifact.rans import RansReader, RansWriter

LOCAL_ROWS = 16
"""Flag added to the first strength: rows are predicted from those above them, not from all."""
LARGEST_CODE = 511
"""Largest residual code; codes less their zero point reach 255."""

Guide = tuple[int, np.ndarray]
"""Number of an earlier stack whose rows are this one's columns, and the step sizes of its rows as fp16's bits."""


@dataclass(frozen=True, eq=False)
class StackSpec:
    """Describes what reader and writer know of a stack before its codes."""

    shape: StackShape
    trellis: bool = False
    guide: Guide | None = None

    @property
    def size(self) -> int:
        layers, rows, columns = self.shape
        return layers * rows * columns


def guess_columns(code_LRC: np.ndarray, pattern_LR: np.ndarray) -> np.ndarray:
    """Returns the columns' expected relative magnitudes, 256 for the typical one, from rows of codes and their fp16
    steps."""
    step_LR = ((pattern_LR & 0x3FF | 0x400).astype(np.int64)) << (pattern_LR >> 10 & 31).astype(np.int64)
    size_LR = (16 * np.abs(code_LRC.astype(np.int64)).sum(axis=2) // code_LRC.shape[2] + 1) * step_LR
    size_LR >>= max(0, int(size_LR.max()).bit_length() - 30)
    return (size_LR * 256 * size_LR.shape[1] // size_LR.sum(axis=1, keepdims=True).clip(1)).clip(1, 2**14)


def stack_strengths(code_LRC: np.ndarray, guess_LC: np.ndarray | None = None) -> Strengths:
    """Returns the priors of a stack's row factors, column factors and column means, by how much those differ beyond
    chance.

    The writer chooses them and stores them for the reader, so it may use floating point.
    """
    magnitude_LRC = np.abs(code_LRC).astype(np.float32)
    size_LRC = magnitude_LRC / np.maximum(magnitude_LRC.mean(axis=(1, 2), keepdims=True), 1e-9)
    noise, (_, rows, columns) = float(size_LRC.var()), code_LRC.shape
    row_LR, column_LC = size_LRC.mean(axis=2), size_LRC.mean(axis=1)
    if guess_LC is not None:
        column_LC = column_LC / (guess_LC / 256)
    mean_square = float(np.square(code_LRC.mean(axis=1)).mean())
    apart = float(np.log(row_LR + 0.01).var()), float(np.log((row_LR + 0.01) / near_rows(row_LR)).var())
    return (
        prior_strength(noise, min(apart) - noise / columns) | LOCAL_ROWS * (apart[1] < apart[0]),
        prior_strength(noise, float(column_LC.var()) - noise / rows),
        prior_strength(float(code_LRC.var()), mean_square - float(code_LRC.var()) / rows),
    )


def near_rows(row_LR: np.ndarray) -> np.ndarray:
    """Approximates the row factors that FactorModel.leave_rows would predict."""
    near_LR, near_L = np.ones_like(row_LR), np.ones(len(row_LR), np.float32)
    for top, bottom in pairwise(tile_edges(row_LR.shape[1], TILES_DOWN)):
        near_LR[:, top:bottom] = near_L[:, None]
        near_L = (near_L + row_LR[:, top:bottom].mean(axis=1)) / 2
    return near_LR + 0.01


def prior_strength(noise: float, spread: float) -> int:
    """Returns log2 of noise / spread, 0 to 15: the number of observations of variance `noise` that inform as much as
    knowing the variance `spread` of what they observe."""
    return int(np.clip(np.rint(np.log2(max(noise, 1e-9) / max(spread, 1e-9))), 0, 15))


def encode_stacks(
    specs: Sequence[StackSpec], stacks: Sequence[np.ndarray], strengths: Strengths | None = None
) -> bytes:
    """Encodes the largest magnitude, each stack's strengths (given, or chosen for it), and the symbols of all."""
    largest = max(int(np.abs(stack).max()) + spec.trellis for spec, stack in zip(specs, stacks, strict=True))
    header, writer, tables = encode_number(largest), RansWriter(), AdaptiveTables(bell_counts(largest))
    for spec, code_LRC in zip(specs, stacks, strict=True):
        guess_LC = guess_columns(stacks[spec.guide[0]], spec.guide[1]) if spec.guide else None
        chosen = strengths or stack_strengths(code_LRC, guess_LC)
        header += encode_number(chosen[0] << 8 | chosen[1] << 4 | chosen[2])
        code_stack(writer, tables, spec.shape, spec.trellis, chosen, guess_LC, code_LRC)
    return header + writer.finish(sum(spec.size for spec in specs))


def decode_stacks(data: bytes, specs: Sequence[StackSpec]) -> list[np.ndarray]:
    """Returns int16 stacks. Raises ArtifactError."""
    largest, position = decode_number(data, 0)
    if largest > LARGEST_CODE:
        raise ArtifactError("a rans stream is damaged: its codes are too large")
    strengths, stacks = [], []
    for _ in specs:
        packed, position = decode_number(data, position)
        strengths.append((packed >> 8 & 31, packed >> 4 & 15, packed & 15))
    reader = RansReader(data[position:], sum(spec.size for spec in specs))
    tables = AdaptiveTables(bell_counts(largest))
    for spec, chosen in zip(specs, strengths, strict=True):
        guess_LC = guess_columns(stacks[spec.guide[0]], spec.guide[1]) if spec.guide else None
        stacks.append(code_stack(reader, tables, spec.shape, spec.trellis, chosen, guess_LC, None))
    reader.finish()
    return stacks


SHARE_BITS = 3
"""Shares are in eighths, at most twice the earlier row."""
LARGEST_SHARE = 2 << SHARE_BITS
FEWEST_ROWS, MOST_ROWS = 256, 2**16
SHARE_COST, LEARNING_COST = 5, 256
"""Bits, about, that a row's share takes beside its reference's number; and LEARNING_COST / columns more until the model
has learnt that the row is smaller."""
SEARCH_BLOCK = 512


def shared_part(code_RC: np.ndarray, share_R: np.ndarray) -> np.ndarray:
    return (code_RC.astype(np.int64) * share_R[..., None] + (1 << SHARE_BITS - 1)) >> SHARE_BITS


def refer_rows(code_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns residual codes, shares and reference rows: for each row the earlier row that explains most, where that
    pays.

    The writer alone chooses them, so it may use floating point.
    """
    rows, columns = code_RC.shape
    exact_RC, residual_RC = code_RC.astype(np.float32), code_RC.astype(np.int16)
    square_R = np.maximum(np.square(exact_RC).sum(axis=1), 1e-6)
    share_R, reference_R = np.zeros((2, rows), np.int64)
    for top in range(0, rows, SEARCH_BLOCK):
        bottom = min(rows, top + SEARCH_BLOCK)
        product_BR = exact_RC[top:bottom] @ exact_RC[:bottom].T
        explained_BR = np.tril(product_BR * product_BR / square_R[:bottom], top - 1)
        best_B = explained_BR.argmax(axis=1)
        share_B = np.rint(product_BR[np.arange(bottom - top), best_B] / square_R[best_B] * (1 << SHARE_BITS))
        share_B = share_B.clip(-LARGEST_SHARE, LARGEST_SHARE).astype(np.int64)
        left_BC = code_RC[top:bottom] - shared_part(code_RC[best_B], share_B)
        saved_B = columns / 2 * np.log2(spread(code_RC[top:bottom]) / spread(left_BC))
        good_B = (saved_B > np.log2(rows) + SHARE_COST + LEARNING_COST / columns) & (best_B < np.arange(top, bottom))
        good_B &= (share_B != 0) & (np.abs(left_BC).max(axis=1) <= LARGEST_CODE)
        residual_RC[top:bottom][good_B] = left_BC[good_B]
        share_R[top:bottom], reference_R[top:bottom] = share_B * good_B, best_B * good_B
    return residual_RC, share_R, reference_R


def spread(code_BC: np.ndarray) -> np.ndarray:
    """Returns the mean square of each row, with what rounding adds."""
    return np.square(code_BC.astype(np.float32)).mean(axis=1) + 1 / 6


def restore_rows(residual_RC: np.ndarray, share_R: np.ndarray, reference_R: np.ndarray) -> np.ndarray:
    """Inverts `refer_rows`. Raises ArtifactError where a row refers to itself, a later one, or exceeds the largest
    code."""
    code_RC = residual_RC.copy()
    for row in np.flatnonzero(share_R):
        if reference_R[row] >= row:
            raise ArtifactError("a rans stream is damaged: a row refers to one that is not yet known")
        whole_C = code_RC[row] + shared_part(code_RC[reference_R[row]], share_R[row])
        if np.abs(whole_C).max() > LARGEST_CODE:
            raise ArtifactError("a rans stream is damaged: its codes are too large")
        code_RC[row] = whole_C
    return code_RC
