"""Split documents, tokenize them, and write shards, tokenizer and manifest to a folder.

python data/prepare.py --input embedded --tokenizer train:1024 [--out DIR] [--json]

Exit status: 0 prepared, or found as it is; 2 bad input.
"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.data.manifest import PreparedData
from golf.data.prepare import VAL_FRACTION, prepare_corpus, prepared_folder
from golf.data.shards import DataError
from golf.data.tokenizer import load_tokenizer
from golf.submit.tool import ToolOptions, run_command

CACHE = Path(os.path.relpath(Path(__file__).resolve().parent / "cache"))


@dataclass(frozen=True)
class Options(ToolOptions):
    input: str = "embedded"
    """`embedded` (texts of Python's standard library), or a .txt, .jsonl, .jsonl.xz file or a folder of them."""
    tokenizer: str = "train:1024"
    """train:VOCABULARY, or a SentencePiece .model file."""
    out: Path | None = None
    """Folder to make, left as it is when it holds the same data already; by default one in data/cache/."""
    val_fraction: float = VAL_FRACTION
    """Share of the documents that is held out, by the hash of their text."""


def prepare(options: Options) -> PreparedData:
    """Do what the options ask for. Raises DataError."""
    vocabulary = re.fullmatch(r"train:(\d+)", options.tokenizer)
    if vocabulary is None and options.tokenizer.startswith("train:"):
        raise DataError(f"--tokenizer {options.tokenizer}: write train:1024, or give a .model file")
    model = None if vocabulary else Path(options.tokenizer)
    vocab_size = int(vocabulary[1]) if vocabulary else load_tokenizer(model).vocab_size
    out = options.out or prepared_folder(options.input, vocab_size, CACHE, options.val_fraction, model)
    return prepare_corpus(options.input, out, vocab_size, options.val_fraction, model)


def print_table(prepared: PreparedData, seconds: float) -> None:
    table = Table(title=f"{prepared.folder}  data_id {prepared.data_id}  {seconds:.1f} s")
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(heading, justify="right")
    for split, counts in prepared.manifest["splits"].items():
        numbers = [f"{counts[name]:,}" for name in ("documents", "tokens", "bytes")]
        table.add_row(split, *numbers, f"{counts['bytes'] / (counts['tokens'] - counts['documents']):.3f}")
    Console().print(table)


def work(options: Options) -> int:
    started = time.perf_counter()
    prepared = prepare(options)
    if options.json:
        print(json.dumps({"folder": str(prepared.folder), **prepared.manifest}))
    else:
        print_table(prepared, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
