"""Computes attention within documents and windows on CUDA, by FlashAttention: in memory that grows with the positions.

The plain form of the same function is `causal_attention` with the mask of `visible_keys` (golf/model/block.py), which
other devices, knowledge tokens and caches take. A segment is what a row's queries see at most: a document's part in the
row, or the row.

B batch, T time, S last positions of T (the queries), N = B T positions of a batch (B S for queries), M bounds of
segments, H query heads, G key/value heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from golf.config.knobs import ConfigError, UserError
from golf.config.model import ModelConfig

MOST_SEGMENTS = 65_535
"""Of a batch: CUDA's limit of the grid's second axis, along which FlashAttention lays them."""


def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether FlashAttention computes in `dtype` there: in 16 bits, on CUDA."""
    return device.type == "cuda" and dtype.itemsize == 2


def check_flash(model: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError where FlashAttention would be needed and can't run."""
    if device.type != "cuda" or model.knowledge_tokens:
        return
    width, present = model.model_dim // model.num_heads, torch.backends.cuda.is_flash_attention_available()
    if width % 8 or width > 256 or not present or torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            "document_attention and attention_window run by FlashAttention on CUDA: it needs a GPU from Ampere on, a"
            f" torch that was built with it, and heads of a multiple of 8 up to 256 (here {width})"
        )


def segment_attention(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, bounds: tuple[Tensor, Tensor], window: int
) -> Tensor:
    """Returns y_BHSK: each query attends to its segment's keys up to its own position, and to the last `window` of them
    (0: all); `bounds` come from `segment_bounds`."""
    q_NHK, k_NGK, v_NGK = (part.transpose(1, 2).flatten(0, 1) for part in (q_BHSK, k_BGTK, v_BGTK))
    queries = q_BHSK.size(2)
    y_NHK, _ = flash_segments(q_NHK, k_NGK, v_NGK, *bounds, queries, k_BGTK.size(2), window)
    return y_NHK.unflatten(0, (-1, queries)).transpose(1, 2)


# Custom operators, because a graph of fixed shapes can't hold a number of segments that every batch changes: the graph
# carries bounds of fixed length and their number, and only what runs below it cuts them.
@torch.library.custom_op("golf::segment_bounds", mutates_args=())
def segment_bounds(start_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where segments start among all N positions, int32 (N + 1,), filled up with N, and their number, on the
    CPU: this waits for the device once, so that no layer has to."""
    start_S = start_BT.flatten().nonzero().flatten()
    bound_M = start_S.new_full((start_BT.numel() + 1,), start_BT.numel(), dtype=torch.int32)
    bound_M[: len(start_S)] = start_S
    return bound_M, torch.tensor(len(start_S))


@segment_bounds.register_fake
def segment_bounds_shape(start_BT: Tensor) -> tuple[Tensor, Tensor]:
    bound_M = start_BT.new_empty((start_BT.numel() + 1,), dtype=torch.int32)
    return bound_M, torch.empty((), dtype=torch.int64, device="cpu")


def flash_arguments(bound_M: Tensor, segments: Tensor, queries: int, keys: int) -> tuple[Any, ...]:
    """Returns the bounds of queries and keys, and the most of each in a segment.

    The number of segments is rounded up to a power of two by empty ones, so that the kernels' working memory has few
    sizes. Raises UserError where a batch has too many segments.
    """
    count = int(segments)
    if count > MOST_SEGMENTS:
        raise UserError(f"{count:,} documents and rows in a batch, FlashAttention takes {MOST_SEGMENTS:,}: fewer rows")
    bound_M = bound_M[: min(1 << (count - 1).bit_length(), MOST_SEGMENTS) + 1]
    bound_q_M = bound_M
    if queries < keys:
        bound_q_M = bound_M // keys * queries + (bound_M % keys - (keys - queries)).clamp(min=0)
    # One query a segment would let the kernel take the segments for rows of a decoder.
    return bound_q_M, bound_M, max(queries, 2), keys


@torch.library.custom_op("golf::segment_attention", mutates_args=())
def flash_segments(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, bound_M: Tensor, segments: Tensor, queries: int, keys: int, window: int
) -> tuple[Tensor, Tensor]:
    """Returns y_NHK and its logarithms of sums, by FlashAttention 2 (Dao 2023, arXiv 2307.08691) for rows of unequal
    lengths.

    torch.nn.attention.varlen wraps the same operators from torch 2.10 on, and for grouped queries from 2.12 on; they
    are older.
    """
    arguments, near = flash_arguments(bound_M, segments, queries, keys), dict(window_size_left=window - 1)
    found = torch.ops.aten._flash_attention_forward(
        q_NHK, k_NGK, v_NGK, *arguments, 0.0, not window, False, **near, window_size_right=0
    )
    return found[:2]


@flash_segments.register_fake
def flash_segments_shape(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, bound_M: Tensor, segments: Tensor, queries: int, keys: int, window: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_NHK), q_NHK.new_empty((q_NHK.size(1), q_NHK.size(0)), dtype=torch.float32)


@torch.library.custom_op("golf::segment_attention_backward", mutates_args=())
def flash_gradients(
    g_NHK: Tensor, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, y_NHK: Tensor, sums_HN: Tensor, bound_M: Tensor,
    segments: Tensor, queries: int, keys: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of `flash_segments` by queries, keys and values."""
    arguments, near = flash_arguments(bound_M, segments, queries, keys), dict(window_size_left=window - 1)
    chance = torch.zeros(2, dtype=torch.uint64, device=q_NHK.device), q_NHK.new_empty(0)  # of dropout, which is off
    return torch.ops.aten._flash_attention_backward(
        g_NHK, q_NHK, k_NGK, v_NGK, y_NHK, sums_HN, *arguments, 0.0, not window, *chance, **near, window_size_right=0
    )


@flash_gradients.register_fake
def flash_gradients_shape(
    g_NHK: Tensor, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, y_NHK: Tensor, sums_HN: Tensor, bound_M: Tensor,
    segments: Tensor, queries: int, keys: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q_NHK), torch.empty_like(k_NGK), torch.empty_like(v_NGK)


def keep_for_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what the gradients need (torch passes the arguments by these names)."""
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.sizes = inputs[5:]


flash_segments.register_autograd(
    lambda ctx, g_NHK, _: (*flash_gradients(g_NHK, *ctx.saved_tensors, *ctx.sizes), *[None] * 5),
    setup_context=keep_for_gradients,
)
