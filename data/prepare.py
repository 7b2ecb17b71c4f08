"""Splits documents, tokenizes them, and writes shards, tokenizer and manifest to a folder.

python data/prepare.py --input embedded --tokenizer train:1024 [--out DIR] [--json]

Stopped or killed, the same command goes on where it was; the bytes don't depend on the number of workers.
Exit status: 0 prepared, or found as it is; 2 bad input; 4 stopped.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_INTERRUPTED
from golf.data.manifest import PreparedData
from golf.data.shards import DataError
from lab.cli import ToolOptions, print_complaint, run_command
from lab.prepare.prepare import (
    PLAIN_KINDS,
    SHARD_TOKENS,
    TRAINED,
    VAL_FRACTION,
    Preparation,
    preparation_folder,
    preparation_remarks,
    prepare_data,
)

CACHE = Path(os.path.relpath(Path(__file__).resolve().parent / "cache"))


@dataclass(frozen=True)
class Options(ToolOptions):
    input: str = "embedded"
    """`embedded` (texts of Python's standard library), a .txt, .jsonl, .jsonl.xz, .jsonl.zst or .parquet file, a
    folder of them, a Hugging Face data set (owner/name or owner/name:folder), or a folder of GPT-2 token shards."""
    tokenizer: str = "train:1024"
    """train:VOCABULARY, a SentencePiece .model file (or the .json file of another kind), bytes, chars, or gpt2."""
    out: Path | None = None
    """Folder to make, left as it is when it holds the same data already; by default one in data/cache/."""
    val_fraction: float = VAL_FRACTION
    """Share of the documents that is held out, by the hash of their text."""
    val_docs: int = 0
    """Hold out the first documents, this many, instead, and keep the order of the input (the competition: 50000)."""
    order: Literal["auto", "shuffled", "source"] = "auto"
    """shuffled: distinct documents in a random order; source: as they come; auto: source with --val-docs."""
    transform: Literal["auto", "none", "caseops"] = "auto"
    """caseops: the lossless case transform; auto: what the tokenizer was made for."""
    drop_shared: bool = False
    """With --val-docs: leave held-out documents that come again out of training, instead of refusing them."""
    merges: Path | None = None
    """GPT-2's merges file (vocab.bpe), for GPT-2 shards and the tokenizer gpt2."""
    workers: int = 0
    """Processes that encode; 0: one per core."""
    no_word_cache: bool = False
    """Encode every document in one piece, even where a table of words gives the same ids sooner."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a shard."""


def prepare(options: Options) -> PreparedData:
    """Prepares the data that the options ask for. Raises DataError."""
    if options.tokenizer.startswith("train:") and not TRAINED.fullmatch(options.tokenizer):
        raise DataError(f"--tokenizer {options.tokenizer}: write train:1024, or give a .model file")
    if options.tokenizer in PLAIN_KINDS and options.transform == "caseops":
        raise DataError(f"--tokenizer {options.tokenizer}: has no case operators; give a CaseOps model or train one")
    if options.workers < 0:
        raise DataError(f"--workers {options.workers}: give a number of processes, or 0 for one per core")
    preparation = Preparation(
        source=options.input,
        tokenizer=options.tokenizer,
        val_fraction=options.val_fraction,
        val_docs=options.val_docs,
        order=options.order,
        transform=options.transform,
        drop_shared=options.drop_shared,
        merges=str(options.merges) if options.merges else None,
        shard_tokens=options.shard_tokens,
    )
    out = options.out or preparation_folder(preparation, CACHE)
    rate = TextColumn("{task.fields[megabytes]:,.0f} MB, {task.fields[rate]:.1f} MB/s")
    columns = (TextColumn("[progress.description]{task.description}"), rate, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=options.json) as progress:
        task = progress.add_task("reading", total=None, megabytes=0.0, rate=0.0)
        done, started = 0, time.perf_counter()

        def advance(text_bytes: int) -> None:
            nonlocal done, started
            if not done:
                started = time.perf_counter()
            done += text_bytes
            rate = done / 1e6 / max(1e-3, time.perf_counter() - started)
            progress.update(task, description="encoding", megabytes=done / 1e6, rate=rate)

        workers = options.workers or os.cpu_count() or 1
        return prepare_data(preparation, out, workers, not options.no_word_cache, advance)


def print_table(prepared: PreparedData, seconds: float) -> None:
    table = Table(title=f"{prepared.folder}  data_id {prepared.data_id}  {seconds:.1f} s")
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(heading, justify="right")
    for split, counts in prepared.manifest["splits"].items():
        numbers = [f"{counts[name]:,}" for name in ("documents", "tokens", "bytes")]
        table.add_row(split, *numbers, f"{counts['bytes'] / max(1, counts['tokens'] - counts['documents']):.3f}")
    Console(markup=False).print(table)


def work(options: Options) -> int:
    started = time.perf_counter()
    try:
        prepared = prepare(options)
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    for remark in preparation_remarks(prepared):
        print_complaint(remark)
    if options.json:
        paths = {"folder": str(prepared.folder), "tokenizer_path": str(prepared.tokenizer_path)}
        print(json.dumps(paths | prepared.manifest))
    else:
        print_table(prepared, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
