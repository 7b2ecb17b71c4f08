"""Shows what is in a folder of shards: documents, tokens, bytes, lengths with a picture, pieces, samples, duplicates.

python tools/inspect_data.py DIR [--tokenizer FILE] [--full] [--samples 2] [--top 20] [--picture FILE.png] [--json]

Validation is read whole; of training the first 200 million tokens, all of it with --full.
Exit status: 0 sound, 1 documents in both splits or empty ones, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_FINDINGS
from golf.data.shards import DataError, find_shards
from lab.cli import ToolOptions, run_command
from lab.prepare.data_report import (
    DataContent,
    SplitContent,
    content_figures,
    frequent_pieces,
    inspect_folder,
    length_counts,
    length_edges,
    length_figures,
    planned_tokens,
    sample_documents,
)
from lab.prepare.text_tokenizer import TextTokenizer, load_text_tokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BAR = 24
COLOURS = {"train": "#2b6cb0", "val": "#dd6b20"}


@dataclass(frozen=True)
class Options(ToolOptions):
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of *_train_*.bin and *_val_*.bin shards."""
    tokenizer: Path | None = None
    """The tokenizer that made the shards; default: the one that lies beside them."""
    full: bool = False
    """Read all training shards, however many there are."""
    samples: int = 2
    """Documents of each split to show."""
    top: int = 20
    """Most frequent pieces to show."""
    picture: Path | None = None
    """Draw the lengths of documents into this PNG file."""


def open_tokenizer(options: Options) -> TextTokenizer:
    find_shards(options.folder, "train")
    beside = [options.folder / f"tokenizer.{suffix}" for suffix in ("model", "json")]
    path = options.tokenizer or next(filter(Path.is_file, beside), None)
    if path is None:
        raise DataError(
            f"{options.folder}: no tokenizer beside the shards: name the one that made them, --tokenizer FILE"
        )
    return load_text_tokenizer(path)


def summary_table(content: DataContent, folder: Path) -> Table:
    table = Table(title=escape(str(folder)), title_justify="left")
    table.add_column("")
    for split in content.splits:
        table.add_column(split.split, justify="right")
    rows = {
        "shards": lambda split: f"{split.shards:,}",
        "shards read": lambda split: f"{len(split.paths):,}",
        "documents": lambda split: f"{split.documents:,}",
        "tokens": lambda split: f"{split.tokens:,}",
        "bytes of text": lambda split: f"{split.bytes:,}",
        "bytes per token": lambda split: f"{split.bytes_per_token:.4f}",
        "pieces in use": lambda split: f"{int((split.counts_V > 0).sum()):,} of {len(split.counts_V):,}",
    }
    for name, show in rows.items():
        table.add_row(name, *map(show, content.splits))
    figures = [length_figures(split.lengths_D) for split in content.splits]
    for name in figures[0]:
        label = {"mean": "mean document"}.get(name, f"{name} document")
        table.add_row(label, *(f"{lengths[name]:,.0f}" for lengths in figures))
    return table


def histogram_table(content: DataContent) -> Table:
    edges = length_edges(np.concatenate([split.lengths_D for split in content.splits]))
    table = Table("tokens", title="lengths of documents", title_justify="left")
    columns = []
    for split in content.splits:
        table.add_column(split.split, justify="right")
        table.add_column()
        counts = length_counts(split.lengths_D, edges)
        columns.append([(f"{number:,}", "█" * round(BAR * number / counts.max())) for number in counts])
    for begin, end, *cells in zip(edges[:-1], edges[1:], *columns, strict=True):
        label = f"{begin:,}" if end == begin + 1 else f"{begin:,} to {end - 1:,}"
        table.add_row(label, *(cell for pair in cells for cell in pair))
    return table


def pieces_table(split: SplitContent, tokenizer: TextTokenizer, count: int) -> Table:
    table = Table("piece", "id", "occurrences", "share", title="most frequent pieces of " + split.split)
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for piece, token, number in frequent_pieces(split, tokenizer, count):
        table.add_row(escape(piece), str(token), f"{number:,}", f"{number / split.tokens:.2%}")
    return table


def draw_lengths(content: DataContent, path: Path) -> None:
    """Draws the share of documents by length, both splits over each other, as a PNG file."""
    edges = length_edges(np.concatenate([split.lengths_D for split in content.splits]))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for split in content.splits:
        shares = length_counts(split.lengths_D, edges) / split.documents
        label = f"{split.split}: {split.documents:,} documents, {split.lengths_D.mean():,.0f} tokens on average"
        axes.stairs(shares, edges, label=label, color=COLOURS[split.split], fill=True, alpha=0.5)
    axes.set(xscale="symlog", xlabel="tokens of a document", ylabel="share of documents", title="Lengths of documents")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def print_content(
    content: DataContent, samples: dict[str, list[str]], tokenizer: TextTokenizer, options: Options
) -> None:
    console = Console()
    console.print(summary_table(content, options.folder))
    console.print(histogram_table(content))
    console.print(pieces_table(content.splits[0], tokenizer, options.top))
    for split, texts in samples.items():
        for number, text in enumerate(texts, start=1):
            console.rule(f"{split} document, sample {number} of {len(texts)}", align="left")
            console.print(text, markup=False, highlight=False)
    shared = content.shared
    if shared:
        sets = f"{shared.val_documents:,} validation and {shared.train_documents:,} training documents"
        console.print(f"documents in both splits: {shared.shared:,} ({sets})")
    for split in content.splits:
        if len(split.paths) < split.shards:
            console.print(f"{split.split}: {len(split.paths)} of {split.shards} shards were read; --full reads all")
    for finding in content.findings:
        console.print(f"FINDING: {finding}", markup=False)
    if options.picture:
        console.print(f"lengths drawn in {options.picture}", markup=False)


def work(options: Options) -> int:
    tokenizer = open_tokenizer(options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=planned_tokens(options.folder, options.full))
        content = inspect_folder(options.folder, tokenizer, options.full, lambda tokens: progress.advance(task, tokens))
    samples = {split.split: sample_documents(split, tokenizer, options.samples) for split in content.splits}
    if options.picture:
        draw_lengths(content, options.picture)
    if options.json:
        splits = {split.split: content_figures(split, tokenizer, options.top) for split in content.splits}
        shared = content.shared.shared if content.shared else None
        figures = {"splits": splits, "shared_documents": shared, "samples": samples, "findings": content.findings}
        print(json.dumps({"folder": str(options.folder), "tokenizer": tokenizer.name} | figures))
    else:
        print_content(content, samples, tokenizer, options)
    return EXIT_FINDINGS if content.findings else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
