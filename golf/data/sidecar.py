"""Reads the bytes of each validation token from files of their own, beside the shards.

A lossless transform of the text changes its tokens, not its bytes. What a token stands for then does not follow from
its piece, so whoever prepares the shards writes it down: `<dataset>_val_bytes_%06d.bin` beside
`<dataset>_val_%06d.bin`, a shard whose numbers are bytes of the original text (0 for BOS).

Shape letters: N tokens of the stream.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from golf.config.knobs import parse_json
from golf.data.shards import DataError, find_shards, read_shard
from golf.data.tokenizer import ByteTable

SIDECAR_ADVICE = "prepare or download the shards and their bytes again, together"
SIDECAR_TOLERANCE = 0.01
"""Of the bytes that a table estimates: blanks that a tokenizer drops may count or not, operators may not."""
COUNTED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class StreamBytes:
    """Holds the bytes of each token of one stream, by position: it counts that stream, or its beginning."""

    bytes_N: np.ndarray | torch.Tensor

    def to(self, device: torch.device | str) -> "StreamBytes":
        """Returns the same as an int32 tensor on `device`."""
        return StreamBytes(torch.from_numpy(self.bytes_N.astype(np.int32)).to(device))

    def of_targets(self, tokens: int) -> np.ndarray | torch.Tensor:
        """Returns the bytes of the targets in the first `tokens` tokens of the stream: all of them but the first."""
        if tokens > len(self.bytes_N):
            raise DataError(f"{tokens} tokens to score, but bytes of {len(self.bytes_N)}: {SIDECAR_ADVICE}")
        return self.bytes_N[1:tokens]


def sidecar_path(val_path: str | Path) -> Path | None:
    """Returns where a validation shard's bytes are, if there are any; None for a file of bytes and any other name."""
    name = Path(val_path).name
    found = re.sub(r"_val_(\d{6}\.bin)$", r"_val_bytes_\1", name)
    return None if found == name else Path(val_path).with_name(found)


def without_sidecars(paths: Sequence[str | Path]) -> list[str | Path]:
    """Returns `paths` without files of bytes, which a pattern like `*_val_*.bin` matches too."""
    return [path for path in paths if not re.search(r"_val_bytes_\d{6}\.bin$", str(path))]


def read_sidecar(val_paths: Sequence[str | Path]) -> np.ndarray | None:
    """Reads the bytes of every token of the shards, uint16 (N,); None where no shard has any. Raises DataError."""
    pairs = [(Path(path), sidecar_path(path)) for path in val_paths]
    if not any(beside and beside.is_file() for _, beside in pairs):
        return None
    parts = []
    for path, beside in pairs:
        if not beside or not beside.is_file():
            raise DataError(
                f"{path}: no bytes of its tokens beside it, though other shards have them: {SIDECAR_ADVICE}"
            )
        parts.append(read_shard(beside))
        tokens = len(read_shard(path))
        if len(parts[-1]) != tokens:
            raise DataError(f"{beside}: bytes of {len(parts[-1])} tokens, {path.name} has {tokens}: {SIDECAR_ADVICE}")
    return np.concatenate(parts)


def validation_bytes(
    table: ByteTable, val_paths: Sequence[str | Path], tokens_N: np.ndarray
) -> ByteTable | StreamBytes:
    """Returns what counts the bytes of the validation stream: its shards' sidecar, or `table` where there is none.

    Raises DataError for a sidecar that is not that of these tokens.
    """
    bytes_N = read_sidecar(val_paths)
    if bytes_N is None:
        return table
    total, estimate = int(bytes_N.sum(dtype=np.int64)), table_total(table, tokens_N)
    folder = Path(val_paths[0]).parent
    if bytes_N[table.boundary_V[tokens_N]].any():
        raise DataError(f"{folder}: bytes for document starts, which spell none: {SIDECAR_ADVICE}")
    if abs(total - estimate) > (0 if table.exact else SIDECAR_TOLERANCE * estimate):
        raise DataError(f"{folder}: the sidecar counts {total} bytes, the pieces have {estimate}: {SIDECAR_ADVICE}")
    expected = manifest_total(folder, val_paths)
    if expected not in (None, total):
        raise DataError(f"{folder}: the sidecar counts {total} bytes, the manifest {expected}: {SIDECAR_ADVICE}")
    return StreamBytes(bytes_N)


def table_total(table: ByteTable, tokens_N: np.ndarray) -> int:
    """Counts the bytes of a stream by a table, in pieces that don't make gigabytes of int64."""
    starts = range(0, len(tokens_N) - 1, COUNTED_AT_ONCE)
    pieces = (tokens_N[start : start + COUNTED_AT_ONCE + 1] for start in starts)
    return sum(int(table.count(piece_P[:-1], piece_P[1:]).sum()) for piece_P in pieces)


def manifest_total(folder: Path, val_paths: Sequence[str | Path]) -> int | None:
    """Reads the validation bytes in a folder's manifest; None without one, or where these are not all shards."""
    path = folder / "manifest.json"
    if not path.is_file() or sorted(map(Path, val_paths)) != find_shards(folder, "val"):
        return None
    try:
        return parse_json(path.read_bytes())["splits"]["val"]["bytes"]
    except (KeyError, TypeError):  # someone else's manifest
        return None
    except ValueError:
        raise DataError(f"{path}: damaged, it holds no JSON: {SIDECAR_ADVICE}") from None
