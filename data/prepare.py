"""Text to token shards: python data/prepare.py --input embedded --tokenizer train:1024 [--out DIR]"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.data.manifest import PreparedData
from golf.data.prepare import VAL_FRACTION, prepare_corpus, prepared_folder
from golf.data.shards import DataError
from golf.data.tokenizer import load_tokenizer

CACHE = Path(os.path.relpath(Path(__file__).resolve().parent / "cache"))


@dataclass(frozen=True)
class Arguments:
    """Split documents, tokenize them, and write shards, tokenizer and manifest to a folder."""

    input: str = "embedded"
    """`embedded` (texts of Python's standard library), or a .txt, .jsonl, .jsonl.xz file or a folder of them."""
    tokenizer: str = "train:1024"
    """train:VOCABULARY, or a SentencePiece .model file."""
    out: Path | None = None
    """Folder to make, left as it is when it holds the same data already; by default one in data/cache/."""
    val_fraction: float = VAL_FRACTION
    """Share of the documents that is held out, by the hash of their text."""
    json: bool = False
    """Print the manifest as JSON instead of a table."""


def prepare(arguments: Arguments) -> PreparedData:
    """Do what the arguments ask for. Raises DataError."""
    vocabulary = re.fullmatch(r"train:(\d+)", arguments.tokenizer)
    if vocabulary is None and arguments.tokenizer.startswith("train:"):
        raise DataError(f"--tokenizer {arguments.tokenizer}: write train:1024, or give a .model file")
    model = None if vocabulary else Path(arguments.tokenizer)
    vocab_size = int(vocabulary[1]) if vocabulary else load_tokenizer(model).vocab_size
    out = arguments.out or prepared_folder(arguments.input, vocab_size, CACHE, arguments.val_fraction, model)
    return prepare_corpus(arguments.input, out, vocab_size, arguments.val_fraction, model)


def print_table(prepared: PreparedData, seconds: float) -> None:
    table = Table(title=f"{prepared.folder}  data_id {prepared.data_id}  {seconds:.1f} s")
    for heading in ("split", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(heading, justify="right")
    for split, counts in prepared.manifest["splits"].items():
        numbers = [f"{counts[name]:,}" for name in ("documents", "tokens", "bytes")]
        table.add_row(split, *numbers, f"{counts['bytes'] / (counts['tokens'] - counts['documents']):.3f}")
    Console().print(table)


def main() -> int:
    arguments = tyro.cli(Arguments)
    started = time.perf_counter()
    try:
        prepared = prepare(arguments)
    except (DataError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"folder": str(prepared.folder), **prepared.manifest}))
    else:
        print_table(prepared, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
