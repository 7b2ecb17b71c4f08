"""Trains a SentencePiece BPE tokenizer with the competition's settings, and says how far it compresses held-out text.

python data/train_tokenizer.py --input TEXT --vocab 1024 [--out FILE.model] [--transform caseops]
python data/train_tokenizer.py --input TEXT --sweep [--sizes 512 1024 2048 4096 8192]

Settings: BPE, coverage 0.999 of characters, byte pieces for the rest, digits split, nmt_nfkc, no dummy prefix, ids 0 to
3 pad, BOS, EOS, unknown. A vocabulary holds 4 control and 256 byte pieces: the smallest is 261.
Exit status: 0 trained; 2 bad input.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.data.shards import DataError
from golf.runtime import write_file_atomically
from lab.cli import ToolOptions, run_command
from lab.prepare.prepare import VAL_FRACTION
from lab.prepare.vocabulary import TokenizerFigures, sample_texts, train_and_measure

TOKENIZERS = Path(os.path.relpath(Path(__file__).resolve().parent / "tokenizers"))


@dataclass(frozen=True)
class Options(ToolOptions):
    input: str = "embedded"
    """Text as data/prepare.py takes it."""
    held_out: str | None = None
    """Text to measure on; by default a share of the documents of the input, by the hash of their text."""
    val_fraction: float = VAL_FRACTION
    """This share."""
    vocab: int = 1024
    """Pieces, 261 to 65,536."""
    sweep: bool = False
    """Train all --sizes and compare them; written only with --out, which is a folder then."""
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    transform: Literal["none", "caseops"] = "none"
    """caseops: for text without capital letters, with the four operators as pieces."""
    train_mb: int = 32
    """Megabytes (2^20 bytes) of text to train on, from the beginning of the input."""
    out: Path | None = None
    """The .model file to write; by default one in data/tokenizers/."""
    merges: Path | None = None
    """GPT-2's merges file, for GPT-2 token shards."""


def figures_table(results: list[TokenizerFigures], documents: int) -> Table:
    table = Table(title=f"on {documents:,} held-out documents", title_justify="left")
    for heading in ("vocabulary", "bytes/token", "tokens", "bytes", "model bytes", "training s"):
        table.add_column(heading, justify="right")
    for result in results:
        numbers = [f"{result.tokens:,}", f"{result.counted_bytes:,}", f"{len(result.model):,}"]
        table.add_row(
            f"{result.vocab_size:,}", f"{result.bytes_per_token:.4f}", *numbers, f"{result.train_seconds:.1f}"
        )
    return table


def output_path(options: Options, result: TokenizerFigures) -> Path | None:
    infix = "_caseops" if options.transform == "caseops" else ""
    name = f"own_{result.asked}_bpe{infix}.model"
    if options.sweep:
        return options.out / name if options.out else None
    return options.out or TOKENIZERS / name


def work(options: Options) -> int:
    sizes = options.sizes if options.sweep else (options.vocab,)
    if not sizes or options.train_mb < 1:
        raise DataError("--sizes takes a number or more, and --train-mb at least 1")
    train_bytes = options.train_mb * 2**20
    train, measured = sample_texts(options.input, train_bytes, options.val_fraction, options.held_out, options.merges)
    results, rows = [], []
    for size in sizes:
        result = train_and_measure(train, measured, size, options.transform, train_bytes)
        path = output_path(options, result)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(path, result.model)
        results.append(result)
        rows.append(result.row() | {"asked": size, "path": str(path) if path else None})
    if options.json:
        print(json.dumps({"documents": len(measured), "tokenizers": rows}))
        return 0
    console = Console(markup=False)
    console.print(figures_table(results, len(measured)))
    for row in rows:
        if row["path"]:
            console.print(f"{row['path']}  sha256 {row['sha256']}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
