"""Documents in an order that every epoch draws anew from the seed.

Shape letters: N tokens, D documents.
"""

from itertools import pairwise

import numpy as np

from golf.data.loader import TokenStream
from golf.data.shards import DataError


def order_stream(stream: TokenStream, row_order: str, bos_id: int, seed: int) -> "TokenStream | ShuffledDocuments":
    """The stream that rows in `row_order` are cut from."""
    return ShuffledDocuments(stream, bos_id, seed) if row_order in ("shuffled", "documents") else stream


def document_starts(stream: TokenStream, bos_id: int) -> np.ndarray:
    """Where documents start in the stream, int64 (D,); its first token counts as a start, whatever it is."""
    shards = zip(stream.starts, stream.shards, strict=False)
    starts_D = np.unique(np.concatenate([[0], *(begin + np.flatnonzero(shard == bos_id) for begin, shard in shards)]))
    return starts_D[starts_D < len(stream)]


class ShuffledDocuments:
    """The documents of a stream, over and over, in another order in each epoch: a TokenStream of them.

    The order is that of random numbers of (seed, epoch), as Philox gives them: NumPy keeps those the same for ever.
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
        """(where in the stream each document of the epoch comes from, where in the epoch it begins); int64 (D,), and
        (D + 1,) with the end of the epoch."""
        latest = self.latest
        if latest is None or latest[0] != epoch:
            key = np.array([self.seed, epoch], dtype=np.uint64)
            order_D = np.argsort(np.random.Philox(key=key).random_raw(len(self.starts_D)), kind="stable")
            lengths_D = np.diff(self.starts_D, append=len(self))[order_D]
            latest = self.latest = epoch, self.starts_D[order_D], np.concatenate([[0], np.cumsum(lengths_D)])
        return latest[1:]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens start, ..., start + count - 1 of the endless stream, int64 (count,)."""
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
        """Where row number `row` starts that is to begin as a document does: at the first one from row * seq_len on.

        Where that is a whole row away, in a document of several rows, the row stays. So ends of documents are left out
        of an epoch and beginnings are in two rows (14 % of the tokens each, with lengths as in FineWeb and rows of
        2,048); the next epoch cuts at other places.
        """
        epoch, position = divmod(row * seq_len, len(self))
        begins_D = self.layout(epoch)[1]
        ahead = int(begins_D[np.searchsorted(begins_D, position)]) - position
        return row * seq_len + (ahead if ahead < seq_len else 0)
