"""Assigns the targets of a token stream to the windows that score them.

A stream of N + 1 tokens has N targets; target t is token t + 1, predicted from the tokens up to t. A window [start,
end) reads tokens start .. end - 1 as input and may score the targets start .. end - 1. Window 0 scores all of its own;
window k ends S targets further on (the last one at N) and scores what no earlier window has: each target is scored
exactly once, the tail included, and every target but those of window 0 is predicted from at least L - S + 1 tokens. A
stride of L is the plain evaluation in rows.

Letters: N targets of the stream, W windows, L window length, S stride.
"""

from dataclasses import dataclass

import numpy as np

from golf.config.knobs import UserError


class WindowError(UserError):
    """Reports a stream that no window fits, or a stride that would leave targets out."""


@dataclass(frozen=True)
class WindowPlan:
    """Lists the windows of one stream, in order; each scores the targets [first_scored, end)."""

    length: int
    """Tokens of every window: the length asked for, or the whole stream where that is shorter."""
    stride: int
    """Most targets scored by a window other than the first."""
    starts_W: np.ndarray
    ends_W: np.ndarray
    first_scored_W: np.ndarray

    def __len__(self) -> int:
        return len(self.ends_W)


def plan_windows(targets: int, length: int, stride: int) -> WindowPlan:
    """Plans windows of at most `length` tokens over a stream of `targets` targets. Raises WindowError.

    Window k ends at min(L + k S, N) and has full length, so the last one overlaps more instead of being shorter: all
    windows have one shape, and one compiled graph serves them.
    """
    if targets < 1:
        raise WindowError(f"a stream of {targets} targets has nothing to score: it needs at least two tokens")
    if not 1 <= stride <= length:
        raise WindowError(f"window stride {stride} must be 1 to the window length, {length}")
    length = min(length, targets)
    count = 1 + -(-(targets - length) // stride)
    ends_W = np.minimum(length + stride * np.arange(count, dtype=np.int64), targets)
    first_scored_W = np.concatenate([np.zeros(1, dtype=np.int64), ends_W[:-1]])
    return WindowPlan(length, min(stride, length), ends_W - length, ends_W, first_scored_W)


def stream_documents(tokens_N1: np.ndarray, bos_id: int) -> list[tuple[int, int]]:
    """Returns [begin, end) of each document's targets; the next document's start is the last of them."""
    starts = np.flatnonzero(tokens_N1[:-1] == bos_id)
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(tokens_N1) - 1], strict=True))


def rank_share(windows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns the contiguous [begin, end) of `windows` that `rank` scores; shares differ by one window at most."""
    assert 0 <= rank < world_size
    return windows * rank // world_size, windows * (rank + 1) // world_size
