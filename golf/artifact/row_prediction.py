"""Rows told as a share of an earlier row and what is left: token embeddings resemble each other.

Rows that training never touched are nearly equal, and those of related tokens correlate. R rows, C columns, B rows of a
block.
"""

import numpy as np

from golf.artifact.codecs import ArtifactError
from golf.artifact.stacks import LARGEST_CODE

SHARE_BITS = 3
"""Shares are in eighths, at most twice the earlier row."""
LARGEST_SHARE = 2 << SHARE_BITS
FEWEST_ROWS, MOST_ROWS = 256, 2**16
SHARE_COST, LEARNING_COST = 5, 256
"""Bits, about, that a row's share takes beside its reference's number; and LEARNING_COST / columns more that it takes
until the row is known for smaller."""
SEARCH_BLOCK = 512


def shared_part(code_RC: np.ndarray, share_R: np.ndarray) -> np.ndarray:
    return (code_RC.astype(np.int64) * share_R[..., None] + (1 << SHARE_BITS - 1)) >> SHARE_BITS


def refer_rows(code_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual codes, shares and reference rows: for each row the earlier row that explains most, where that pays.

    Only a choice of the writer's, so it may use floating point.
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
    """Mean square of each row, with what rounding adds."""
    return np.square(code_BC.astype(np.float32)).mean(axis=1) + 1 / 6


def restore_rows(residual_RC: np.ndarray, share_R: np.ndarray, reference_R: np.ndarray) -> np.ndarray:
    """Inverse of `refer_rows`. Raises ArtifactError where a row refers to itself, a later one, or past all codes."""
    code_RC = residual_RC.copy()
    for row in np.flatnonzero(share_R):
        if reference_R[row] >= row:
            raise ArtifactError("a rans stream is damaged: a row refers to one that is not yet known")
        whole_C = code_RC[row] + shared_part(code_RC[reference_R[row]], share_R[row])
        if np.abs(whole_C).max() > LARGEST_CODE:
            raise ArtifactError("a rans stream is damaged: its codes are too large")
        code_RC[row] = whole_C
    return code_RC
