"""Reads what is in a folder of shards: documents, tokens, bytes, lengths, pieces, documents in both splits.

Shape letters: N tokens, D documents, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golf.data.loader import TokenStream
from golf.data.shards import DataError, find_shards, shard_token_count
from golf.data.sidecar import read_sidecar
from lab.prepare.text_tokenizer import TextTokenizer
from lab.probe.documents import SharedDocuments, document_blocks, find_shared_documents

QUICK_TRAIN_TOKENS = 200_000_000
"""Training tokens that are read without being asked to, in whole shards: some tens of seconds."""
SAMPLE_TOKENS = 120
LENGTH_BINS = 24
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}

Advance = Callable[[int], None]
"""Told of tokens that are done with."""


@dataclass(frozen=True)
class SplitContent:
    """Holds what was read of one split."""

    split: str
    shards: int
    paths: list[Path]
    """Of the shards that were read."""
    tokens: int
    bytes: int
    """Of the original text, as the tokenizer counts them."""
    sidecar_bytes: int | None
    """The same by the files of bytes beside validation shards."""
    lengths_D: np.ndarray
    """Tokens of each document, without its start."""
    counts_V: np.ndarray
    """How often each id occurs."""

    @property
    def documents(self) -> int:
        return len(self.lengths_D)

    @property
    def bytes_per_token(self) -> float:
        """Divides the bytes of text by the tokens that are no document starts."""
        return self.bytes / max(1, int(self.lengths_D.sum()))


@dataclass(frozen=True)
class DataContent:
    """Holds what was read of a folder."""

    splits: list[SplitContent]
    shared: SharedDocuments | None
    """None where a split is missing."""
    findings: list[str]


def read_split(
    split: str, paths: Sequence[Path], shards: int, tokenizer: TextTokenizer, advance: Advance = lambda tokens: None
) -> SplitContent:
    """Reads `paths` of a split that has `shards` shards. Raises DataError for tokens of another tokenizer."""
    sidecar = read_sidecar(paths) if split == "val" else None
    counts_V, lengths, byte_count = np.zeros(tokenizer.vocab_size, dtype=np.int64), [], 0
    for block_N in document_blocks(paths, tokenizer.bos_id, advance):
        counted = np.bincount(block_N, minlength=tokenizer.vocab_size)
        if len(counted) > tokenizer.vocab_size:
            raise DataError(
                f"{paths[0].parent}: token {len(counted) - 1} is outside of the {tokenizer.vocab_size} pieces of "
                f"{tokenizer.name}: name the tokenizer that made the shards"
            )
        counts_V += counted
        # without a start in front the first tokens are a document all the same
        starts = np.flatnonzero(np.concatenate([[True], block_N[1:] == tokenizer.bos_id]))
        lengths.append(np.diff(starts, append=len(block_N)) - (block_N[starts] == tokenizer.bos_id))
        byte_count += int(tokenizer.target_bytes(block_N).sum())
    beside = None if sidecar is None else int(sidecar.sum(dtype=np.int64))
    tokens = int(counts_V.sum())
    return SplitContent(split, shards, list(paths), tokens, byte_count, beside, np.concatenate(lengths), counts_V)


def quick_paths(paths: Sequence[Path]) -> list[Path]:
    """Returns the first shards, as many as are read without being asked to; one in any case."""
    ends = np.cumsum([shard_token_count(path) for path in paths])
    return list(paths[: max(1, int((ends <= QUICK_TRAIN_TOKENS).sum()))])


def shards_by_split(folder: Path, full: bool) -> dict[str, tuple[list[Path], int]]:
    """Returns (shards to read, shards there) of each split that the folder has. Raises ShardError where it has none."""
    splits = {}
    for split in ("train", "val"):
        if split == "train" or any(folder.glob("*_val_[0-9]*.bin")):
            paths = find_shards(folder, split)
            splits[split] = (paths if full or split == "val" else quick_paths(paths)), len(paths)
    return splits


def inspect_folder(
    folder: Path, tokenizer: TextTokenizer, full: bool = False, advance: Advance = lambda tokens: None
) -> DataContent:
    """Reads the shards of a folder: all of validation, and of training what is quick, or all. Raises DataError."""
    chosen = shards_by_split(folder, full)
    splits = [read_split(split, paths, there, tokenizer, advance) for split, (paths, there) in chosen.items()]
    shared = None
    if len(chosen) == 2:
        shared = find_shared_documents(chosen["train"][0], chosen["val"][0], tokenizer.bos_id, advance)
    return DataContent(splits, shared, find_faults(splits, shared))


def find_faults(splits: Sequence[SplitContent], shared: SharedDocuments | None) -> list[str]:
    """Returns one line for each thing that sound data does not have."""
    faults = []
    for content in splits:
        if empty := int((content.lengths_D == 0).sum()):
            faults.append(f"{content.split}: {empty:,} of {content.documents:,} documents are empty")
        if content.sidecar_bytes not in (None, content.bytes):
            sums = f"{content.sidecar_bytes:,} bytes, the tokens' text has {content.bytes:,}"
            faults.append(f"{content.split}: the files of bytes count {sums}")
    if shared and shared.shared:
        faults.append(
            f"{shared.shared:,} validation documents are in training too, the first is number {shared.example}"
        )
    return faults


def planned_tokens(folder: Path, full: bool) -> int:
    """Counts the tokens that `inspect_folder` tells `advance` of: training shards are read twice, for duplicates."""
    chosen = shards_by_split(folder, full)
    sizes = {split: sum(map(shard_token_count, paths)) for split, (paths, _) in chosen.items()}
    return sum(sizes.values()) + (sizes["train"] if len(sizes) == 2 else 0)


def length_edges(lengths_D: np.ndarray) -> np.ndarray:
    """Returns the edges of a histogram's bins, int64: begin <= length < end; about evenly spaced in their logarithm."""
    longest, shortest = int(lengths_D.max()), int(lengths_D.min())
    edges = np.geomspace(max(1, shortest), longest + 1, LENGTH_BINS + 1).round().astype(np.int64)
    return np.unique([*edges, *([0] if shortest == 0 else [])])


def length_counts(lengths_D: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts the documents in each bin."""
    return np.bincount(np.searchsorted(edges, lengths_D, side="right") - 1, minlength=len(edges) - 1)


def piece_text(tokenizer: TextTokenizer, token: int) -> str:
    """Spells one of a tokenizer's pieces, in quotes; as its text where it has no spelling of its own."""
    processor = getattr(tokenizer, "processor", None)
    return repr(processor.id_to_piece(token) if processor else tokenizer.decode([token]))


def frequent_pieces(content: SplitContent, tokenizer: TextTokenizer, count: int) -> list[tuple[str, int, int]]:
    """Returns (piece, id, occurrences) of the most frequent tokens, document starts left out; equal ones by id."""
    counts_V = content.counts_V.copy()
    counts_V[tokenizer.bos_id] = 0
    order = np.argsort(-counts_V, kind="stable")[:count]
    return [(piece_text(tokenizer, int(token)), int(token), int(counts_V[token])) for token in order if counts_V[token]]


def sample_documents(content: SplitContent, tokenizer: TextTokenizer, count: int) -> list[str]:
    """Decodes the beginnings of `count` documents, evenly spread over the split; all where they are few."""
    stream, ends_D = TokenStream(content.paths), np.cumsum(content.lengths_D + 1)
    ends_D += content.tokens - ends_D[-1]  # the first document may have no start of its own
    numbers = {number * content.documents // count for number in range(count)}
    ends = [int(ends_D[number]) for number in sorted(numbers)]
    lengths = [int(content.lengths_D[number]) for number in sorted(numbers)]
    places = zip(ends, lengths, strict=True)
    return [tokenizer.decode(stream.tokens(end - size, min(size, SAMPLE_TOKENS)).tolist()) for end, size in places]


def content_figures(content: SplitContent, tokenizer: TextTokenizer, top: int) -> dict[str, Any]:
    """Returns plain numbers of a split, for JSON."""
    edges = length_edges(content.lengths_D)
    counts = length_counts(content.lengths_D, edges)
    return {
        "shards": content.shards,
        "shards_read": len(content.paths),
        "documents": content.documents,
        "tokens": content.tokens,
        "bytes": content.bytes,
        "sidecar_bytes": content.sidecar_bytes,
        "bytes_per_token": content.bytes_per_token,
        "vocabulary_used": int((content.counts_V > 0).sum()),
        "lengths": length_figures(content.lengths_D),
        "length_histogram": {"edges": edges.tolist(), "documents": counts.tolist()},
        "frequent_pieces": [list(row) for row in frequent_pieces(content, tokenizer, top)],
    }


def length_figures(lengths_D: np.ndarray) -> dict[str, float]:
    """Returns quantiles and mean of documents' lengths in tokens."""
    quantiles = np.quantile(lengths_D, list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)} | {
        "mean": float(lengths_D.mean())
    }
