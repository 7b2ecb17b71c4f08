"""Cuts batches from shards: a step's batch is a function of the data, the seed and the step alone.

Shape letters: N tokens, B rows, T time, D documents.
"""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from math import gcd
from pathlib import Path

import numpy as np
import torch

from golf.data.shards import DataError, read_shard

READ_AHEAD = 2
"""Batches read in advance: one is copied to the device while a slow disk still reads the other."""


class TokenStream:
    """Reads the tokens of several shards, in order, as one endless stream that starts over at its end.

    The last `held_out` tokens are not part of it: training is evaluated on them without validation data.
    """

    def __init__(self, paths: Sequence[str | Path], held_out: int = 0):
        if not paths:
            raise DataError("a token stream needs at least one shard")
        self.shards = [np.asarray(read_shard(path)) for path in paths]  # plain views of the maps slice faster
        self.starts = list(accumulate(map(len, self.shards), initial=0))
        self.held_out = held_out
        if 10 * held_out > self.starts[-1]:
            raise DataError(
                f"{self.starts[-1]} training tokens are too few to hold {held_out} out of them: "
                "set holdout_every=0, or a smaller holdout_tokens"
            )

    def __len__(self) -> int:
        return self.starts[-1] - self.held_out

    def held_out_tokens(self, bos_id: int) -> np.ndarray:
        """Returns the held-out tokens from their first document start on, uint16 (N,). Raises DataError."""
        pairs = zip(self.starts, self.shards, strict=False)
        rest = np.concatenate([shard[max(0, len(self) - start) :] for start, shard in pairs])
        starts = np.flatnonzero(rest[:-1] == bos_id)  # a start needs a token to score after it
        if not len(starts):
            raise DataError(f"no document starts in the last {self.held_out} training tokens: set holdout_every=0")
        return rest[starts[0] :]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Returns tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
        tokens_N = np.empty(count, dtype=np.int64)
        self.read_into(tokens_N, start)
        return tokens_N

    def read_into(self, tokens_N: np.ndarray, start: int) -> None:
        """Fills `tokens_N` with the endless stream from `start` on."""
        filled = 0
        while filled < len(tokens_N):
            position = (start + filled) % len(self)
            index = bisect_right(self.starts, position) - 1
            offset = position - self.starts[index]
            part = self.shards[index][offset : offset + min(len(tokens_N) - filled, len(self) - position)]
            tokens_N[filled : filled + len(part)] = part
            filled += len(part)


def check_batch_shape(batch_tokens: int, seq_len: int, world_size: int) -> None:
    """Raises DataError unless the batch is whole rows that can be divided equally among the ranks."""
    if batch_tokens % seq_len:
        raise DataError(f"train_batch_tokens={batch_tokens} is not a multiple of train_seq_len={seq_len}")
    rows = batch_tokens // seq_len
    if rows % world_size:
        raise DataError(
            f"{rows} rows of {seq_len} tokens can't be dealt out equally to {world_size} ranks: "
            "change train_batch_tokens or the number of processes"
        )


def spread_start(row: int, stream_tokens: int, seq_len: int) -> int:
    """Returns where row number `row` (0, 1, 2, ...) of the spread order starts in the stream.

    Rows are visited in strides of about 0.618 of the stream, coprime to their number, so that every row comes once per
    epoch and the rows of a batch come from all over the text (the coprime-stride loader of parameter-golf PR #1306).
    Each epoch cuts the stream at other places.
    """
    rows = (stream_tokens - 1) // seq_len
    stride = next(stride for stride in range(round(0.618 * rows), 2 * rows + 2) if gcd(stride, rows) == 1)
    epoch, index = divmod(row, rows)
    return index * stride % rows * seq_len + epoch * (seq_len // 3 + 1)


def global_batch(
    stream: TokenStream,
    step: int,
    batch_tokens: int,
    seq_len: int,
    rank: int = 0,
    world_size: int = 1,
    row_order: str = "sequential",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this rank's rows of the global batch of `step`: inputs_BT and targets_BT, int64, on the CPU.

    In sequential order (the competition's) the global batch is tokens step * batch_tokens, ..., (step + 1) *
    batch_tokens of the stream, the last one only as a target; in spread order its rows come from all over the stream
    (`spread_start`); the other orders are for a stream of shuffled documents (`ShuffledDocuments`). Ranks get
    contiguous rows, so that their rows, taken together, are the same for every world size. Raises DataError where the
    rows can't be divided equally.
    """
    check_batch_shape(batch_tokens, seq_len, world_size)
    rows = batch_tokens // seq_len
    own_rows = range(step * rows + rank * rows // world_size, step * rows + (rank + 1) * rows // world_size)
    if row_order in ("sequential", "shuffled"):
        spans = [stream.tokens(own_rows.start * seq_len, len(own_rows) * seq_len + 1)]
    elif row_order == "documents":
        spans = [stream.tokens(stream.row_start(row, seq_len), seq_len + 1) for row in own_rows]
    else:
        check_spread_order(stream, seq_len)
        spans = [stream.tokens(spread_start(row, len(stream), seq_len), seq_len + 1) for row in own_rows]
    inputs_N, targets_N = (np.concatenate([span[cut] for span in spans]) for cut in (slice(-1), slice(1, None)))
    return torch.from_numpy(inputs_N).view(-1, seq_len), torch.from_numpy(targets_N).view(-1, seq_len)


def check_spread_order(stream: TokenStream, seq_len: int) -> None:
    if len(stream) <= seq_len:
        raise DataError(f"{len(stream)} training tokens do not fill one row of {seq_len}: shorten train_seq_len")


class BatchPrefetcher:
    """Reads the batches of the next steps in a thread while the current one is in use.

    `get(step)` equals `global_batch(stream, step, ...)` on the device, but sooner when steps are asked for in order. On
    CUDA the batch waits in pinned memory, and its copy does not hold up the host.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_tokens: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        row_order: str = "sequential",
    ):
        check_batch_shape(batch_tokens, seq_len, world_size)
        self.stream, self.shape = stream, (batch_tokens, seq_len, rank, world_size, row_order)
        self.device = torch.device(device)
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.ahead: dict[int, Future] = {}

    def read_ahead(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = global_batch(self.stream, step, *self.shape)
        return tuple(part_BT.pin_memory() for part_BT in batch) if self.device.type == "cuda" else batch

    def get(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs_BT and targets_BT of `step`, on the device; starts reading those of the next steps."""
        steps = range(step, step + 1 + READ_AHEAD)
        self.ahead = {n: self.ahead.get(n) or self.reader.submit(self.read_ahead, n) for n in steps}
        inputs_BT, targets_BT = self.ahead[step].result()
        return inputs_BT.to(self.device, non_blocking=True), targets_BT.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stops the thread after the read in progress."""
        self.reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchPrefetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def validation_tokens(paths: Sequence[str | Path]) -> np.ndarray:
    """Returns all tokens of the shards, in order, uint16 (N,), in memory. Raises DataError where there are none."""
    if not paths:
        raise DataError("no validation shards were given")
    return np.concatenate([read_shard(path) for path in paths])


def order_stream(stream: TokenStream, row_order: str, bos_id: int, seed: int) -> "TokenStream | ShuffledDocuments":
    """Returns the stream from which rows in `row_order` are cut."""
    return ShuffledDocuments(stream, bos_id, seed) if row_order in ("shuffled", "documents") else stream


def document_starts(stream: TokenStream, bos_id: int) -> np.ndarray:
    """Returns where documents start in the stream, int64 (D,); its first token always counts as a start."""
    shards = zip(stream.starts, stream.shards, strict=False)
    starts_D = np.unique(np.concatenate([[0], *(begin + np.flatnonzero(shard == bos_id) for begin, shard in shards)]))
    return starts_D[starts_D < len(stream)]


class ShuffledDocuments:
    """Streams the documents of a TokenStream endlessly, in another order in each epoch.

    The order sorts the random numbers that Philox gives for (seed, epoch), which NumPy keeps the same for ever.
    """

    def __init__(self, stream: TokenStream, bos_id: int, seed: int):
        self.stream, self.seed = stream, seed
        self.starts_D = document_starts(stream, bos_id)
        if len(self.starts_D) < 2:
            raise DataError("there are no two documents to shuffle in the training shards: set row_order=spread")
        self.latest: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.stream)

    def layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where in the stream each document of the epoch comes from, and where in the epoch each begins.

        Both are int64: (D,), and (D + 1,) with the end of the epoch.
        """
        latest = self.latest
        if latest is None or latest[0] != epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            order_D = np.argsort(np.random.Philox(key=key).random_raw(len(self.starts_D)), kind="stable")
            lengths_D = np.diff(self.starts_D, append=len(self))[order_D]
            latest = self.latest = epoch, self.starts_D[order_D], np.concatenate([[0], np.cumsum(lengths_D)])
        return latest[1:]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Returns tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
        tokens_N = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, position = divmod(start + filled, len(self))
            sources_D, begins_D = self.layout(epoch)
            first, last = np.searchsorted(begins_D, (position + 1, position + count - filled)) - (1, 0)
            bounds = pairwise(begins_D[first : last + 1].tolist())
            for source, (begin, end) in zip(sources_D[first:last].tolist(), bounds, strict=True):
                skipped = max(0, position - begin)
                part_N = tokens_N[filled : filled + end - begin - skipped]
                self.stream.read_into(part_N, source + skipped)
                filled += len(part_N)
        return tokens_N

    def row_start(self, row: int, seq_len: int) -> int:
        """Returns the start of row number `row`, moved to the first document start from row * seq_len on.

        Where that is a whole row away, in a document of several rows, the row stays. So ends of documents are left out
        of an epoch and beginnings are in two rows (14 % of the tokens each, with lengths as in FineWeb and rows of
        2,048); the next epoch cuts at other places.
        """
        epoch, position = divmod(row * seq_len, len(self))
        begins_D = self.layout(epoch)[1]
        ahead = int(begins_D[np.searchsorted(begins_D, position)]) - position
        return row * seq_len + (ahead if ahead < seq_len else 0)
