"""How long a training step would wait for its data, with a consumer that only sleeps in the place of the GPU."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from golf.config.knobs import UserError
from golf.data.loader import BatchPrefetcher, TokenStream, order_stream

CONSUMER_TOKENS_PER_SECOND = 10_000_000.0
"""About what 8xH100 train: 786,432 tokens in 91 ms are 8.7 million a second."""


class LoaderBenchError(UserError):
    """Figures that no loader can be measured with."""


def bench_loader(
    paths: Sequence[str | Path],
    batch_tokens: int = 786_432,
    seq_len: int = 2048,
    order: str = "sequential",
    steps: int = 50,
    tokens_per_second: float = CONSUMER_TOKENS_PER_SECOND,
    world_size: int = 1,
    bos_id: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """How long rank 0 of `world_size` waits in `steps` steps that take batch_tokens / tokens_per_second each.

    The first step starts with nothing read ahead, so its wait stands alone. `wait_share` is the waiting of all others
    as a share of their time. Raises DataError, LoaderBenchError.
    """
    if steps < 2 or tokens_per_second <= 0:
        raise LoaderBenchError(f"{steps} steps at {tokens_per_second:g} tokens a second can't be timed: take 2 or more")
    started = time.perf_counter()
    stream = order_stream(TokenStream(paths), order, bos_id, seed)
    setup_seconds, step_seconds, waits = time.perf_counter() - started, batch_tokens / tokens_per_second, []
    with BatchPrefetcher(stream, batch_tokens, seq_len, 0, world_size, torch.device(device), order) as batches:
        asked = time.perf_counter()
        for step in range(1000, 1003):
            batches.read_ahead(step)
        read_seconds = (time.perf_counter() - asked) / 3
        for step in range(steps):
            asked = time.perf_counter()
            batches.get(step)
            waits.append(time.perf_counter() - asked)
            time.sleep(step_seconds)
    return {
        "setup_seconds": setup_seconds,
        "read_ms": 1000 * read_seconds,
        "read_tokens_per_s": batch_tokens / world_size / read_seconds,
        "step_ms": 1000 * step_seconds,
        "first_wait_ms": 1000 * waits[0],
        "median_wait_ms": 1000 * statistics.median(waits[1:]),
        "longest_wait_ms": 1000 * max(waits[1:]),
        "wait_share": sum(waits[1:]) / (sum(waits[1:]) + step_seconds * (steps - 1)),
    }
