"""FlashAttention's operators in plain loops on the CPU, from their documentation: for tests of what calls them.

For segment i, queries bound_q[i] .. bound_q[i+1] - 1 see keys bound_k[i] .. bound_k[i+1] - 1. The last query is level
with the last key; from there, a query sees `left` keys before its own and `right` after it (-1: all).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """What an operator was given beside queries, keys and values."""

    segments: int
    most_queries: int
    most_keys: int
    causal: bool
    left: int
    right: int


def visible_slices(bounds_q: list[int], bounds_k: list[int], left: int, right: int) -> Iterator[tuple[int, slice]]:
    """Yields every query with the keys that it sees."""
    for (first, last), (begin, end) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        for query in range(first, last):
            own = end - (last - query)
            low = begin if left < 0 else max(begin, own - left)
            yield query, slice(low, end if right < 0 else min(end, own + right + 1))


class FlashStandIn:
    """Stands for aten's two operators. What no segment holds is NaN, as memory that was never written may be."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def pairs(
        self, q_NHK: Tensor, k_NGK: Tensor, bound_q: Tensor, bound_k: Tensor, call: Call
    ) -> list[tuple[int, int, int, slice]]:
        """Returns (query, head, key head, keys) of all that is computed, and checks what a kernel takes for granted."""
        self.calls.append(call)
        for bound_M, positions, most in (
            (bound_q, len(q_NHK), call.most_queries),
            (bound_k, len(k_NGK), call.most_keys),
        ):
            sizes = bound_M.diff()
            assert bound_M.dtype == torch.int32 and bound_M.is_contiguous() and len(bound_M) == call.segments + 1
            assert bound_M[0] == 0 and bound_M[-1] == positions and (sizes >= 0).all() and sizes.max() <= most
        # With one query at the most, the kernel takes the segments for rows of one query each.
        assert call.most_queries > 1 or len(q_NHK) == call.segments
        assert not call.causal or (call.left, call.right) == (-1, 0)
        shared = q_NHK.size(1) // k_NGK.size(1)
        seen = visible_slices(bound_q.tolist(), bound_k.tolist(), call.left, call.right)
        return [(query, head, head // shared, keys) for query, keys in seen for head in range(q_NHK.size(1))]

    def forward(
        self, q_NHK, k_NGK, v_NGK, bound_q, bound_k, most_q, most_k, dropout, causal, debug, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        """Returns y_NHK, the logarithms of sums, fp32 (H, N), and three tensors that dropout and debugging need."""
        assert dropout == 0 and not debug and scale is seqused_k is alibi_slopes is block_table is None
        call = Call(len(bound_k) - 1, most_q, most_k, causal, window_size_left, window_size_right)
        y_NHK, sums_HN = torch.full_like(q_NHK, torch.nan), torch.full(q_NHK.shape[1::-1], torch.nan)
        for query, head, group, keys in self.pairs(q_NHK, k_NGK, bound_q, bound_k, call):
            scores_U = k_NGK[keys, group] @ q_NHK[query, head] / q_NHK.size(2) ** 0.5
            y_NHK[query, head] = torch.softmax(scores_U, 0) @ v_NGK[keys, group]
            sums_HN[head, query] = torch.logsumexp(scores_U, 0)
        return y_NHK, sums_HN, torch.zeros(2, dtype=torch.uint64), q_NHK.new_empty(0), q_NHK.new_empty(0)

    def backward(
        self, g_NHK, q_NHK, k_NGK, v_NGK, y_NHK, sums_HN, bound_q, bound_k, most_q, most_k, dropout, causal, random,
        unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        """Returns the gradients by queries, keys and values."""
        assert dropout == 0 and scale is None and random.dtype == torch.uint64 and unused.numel() == 0
        call = Call(len(bound_k) - 1, most_q, most_k, causal, window_size_left, window_size_right)
        dq_NHK, dk_NGK, dv_NGK = torch.full_like(q_NHK, torch.nan), torch.zeros_like(k_NGK), torch.zeros_like(v_NGK)
        for query, head, group, keys in self.pairs(q_NHK, k_NGK, bound_q, bound_k, call):
            q_K, keys_UK, g_K = q_NHK[query, head], k_NGK[keys, group], g_NHK[query, head]
            scores_U = keys_UK @ q_K / q_NHK.size(2) ** 0.5
            torch.testing.assert_close(sums_HN[head, query].double(), torch.logsumexp(scores_U, 0).double())
            share_U = torch.softmax(scores_U, 0)
            slope_U = share_U * (v_NGK[keys, group] @ g_K - g_K @ y_NHK[query, head]) / q_NHK.size(2) ** 0.5
            dq_NHK[query, head] = slope_U @ keys_UK
            dk_NGK[keys, group] += torch.outer(slope_U, q_K)
            dv_NGK[keys, group] += torch.outer(share_U, g_K)
        return dq_NHK, dk_NGK, dv_NGK


@contextmanager
def flash_on_cpu() -> Iterator[FlashStandIn]:
    """Lets aten's operators of FlashAttention, which exist on CUDA alone, run on the CPU within the context."""
    stand_in, library = FlashStandIn(), torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", stand_in.forward, "CPU")
    library.impl("_flash_attention_backward", stand_in.backward, "CPU")
    try:
        yield stand_in
    finally:
        library._destroy()
