"""From documents to verified shards: split, tokenize, write, describe.

A prepared folder holds `tokenizer.model`, `text_train_%06d.bin`, `text_val_%06d.bin` and `manifest.json`.
It appears under its name only when it is whole.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from golf.data.corpus import EMBEDDED_CORPUS, corpus_files, read_documents, split_documents
from golf.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, PreparedData, load_prepared
from golf.data.shards import DataError, write_shard
from golf.data.tokenizer import ByteTable, Tokenizer, check_byte_counts, load_tokenizer
from golf.data.vocabulary import train_tokenizer
from golf.runtime import file_sha256, write_file_atomically

PREPARED_FORMAT = 1
"""Changes with anything that changes the prepared bytes."""
VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
ENCODING_BATCH = 256


def source_identity(source: str | Path) -> str:
    """What stands for the text of `source` without reading it: Python's version, or names, sizes and times."""
    if str(source) == EMBEDDED_CORPUS:
        return f"{EMBEDDED_CORPUS}-py{platform.python_version()}"
    path = Path(source)
    listing = [(file.relative_to(path).as_posix(), file.stat()) for file in corpus_files(path)]
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in listing]
    return f"{path.resolve().stem}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def prepared_folder(
    source: str | Path,
    vocab_size: int,
    root: str | Path = "data/cache",
    val_fraction: float = VAL_FRACTION,
    model: str | Path | None = None,
) -> Path:
    """The folder in `root` where prepare_corpus would put data made like this. Raises DataError."""
    recipe = preparation_recipe(source, vocab_size, val_fraction, model)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return Path(root) / f"{recipe['source']}-sp{vocab_size}-{digest[:8]}"


def preparation_recipe(
    source: str | Path, vocab_size: int, val_fraction: float, model: str | Path | None, seed: int = 0
) -> dict[str, str | float]:
    """All that decides about the prepared bytes."""
    return {
        "format": PREPARED_FORMAT,
        "source": source_identity(source),
        "tokenizer": f"train:{vocab_size}" if model is None else load_tokenizer(model).sha256,
        "val_fraction": val_fraction,
        "seed": seed,
    }


def prepare_corpus(
    source: str | Path,
    out: str | Path,
    vocab_size: int = 1024,
    val_fraction: float = VAL_FRACTION,
    model: str | Path | None = None,
    seed: int = 0,
) -> PreparedData:
    """Prepare `source` in the folder `out`, or return what is there already from the same recipe.

    The tokenizer is trained on the training split, or is the existing SentencePiece `model`. Processes that
    want the same folder wait for the first one. Raises DataError, also when `out` holds anything else.
    """
    out = Path(out)
    recipe = preparation_recipe(source, vocab_size, val_fraction, model, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(out.with_name(f".{out.name}.lock")):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return prepared_already(out, recipe)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed preparation left
        partial.mkdir()
        write_prepared(read_documents(source), partial, recipe, vocab_size, model)
        os.replace(partial, out)
    return load_prepared(out)


def prepared_already(out: Path, recipe: dict) -> PreparedData:
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out}: exists and is no prepared data; give another folder")
    prepared = load_prepared(out)
    if prepared.manifest["recipe"] != recipe:
        raise DataError(f"{out}: holds data that was prepared otherwise; give another folder or delete this one")
    return prepared


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_prepared(
    documents: Sequence[str], folder: Path, recipe: dict, vocab_size: int, model: str | Path | None
) -> None:
    """Fill `folder` with tokenizer, shards and, last, the manifest."""
    split = split_documents(documents, recipe["val_fraction"], recipe["seed"])
    model_bytes = train_tokenizer(split.train, vocab_size) if model is None else Path(model).read_bytes()
    tokenizer = Tokenizer(model_bytes, str(model or TOKENIZER_NAME))
    (folder / TOKENIZER_NAME).write_bytes(model_bytes)
    table = ByteTable(tokenizer)
    counts = {
        "train": write_split(split.train, tokenizer, table, folder, "train"),
        "val": write_split(split.val, tokenizer, table, folder, "val"),
    }
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    manifest = {
        "recipe": recipe,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "duplicates": split.duplicates,
        "splits": counts,
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": files[name]} for name in files},
        "data_id": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16],
    }
    write_file_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")


def write_split(
    documents: Sequence[str], tokenizer: Tokenizer, table: ByteTable, folder: Path, split: str
) -> dict[str, int]:
    """Write one split's shards. Returns documents, tokens (BOS included), bytes as scored, bytes of the text."""
    counts = {"documents": len(documents), "tokens": 0, "bytes": 0, "text_bytes": 0, "shards": 0}
    waiting_N = np.empty(0, dtype=np.uint16)

    def write_next(tokens_N: np.ndarray) -> None:
        write_shard(folder / f"text_{split}_{counts['shards']:06d}.bin", tokens_N)
        counts["shards"] += 1

    for start in range(0, len(documents), ENCODING_BATCH):
        texts = documents[start : start + ENCODING_BATCH]
        encoded = tokenizer.encode_documents(texts, threads=os.cpu_count() or 1)
        batch_N = np.concatenate([np.array([tokenizer.bos_id, *ids], dtype=np.uint16) for ids in encoded])
        counts["tokens"] += len(batch_N)
        counts["text_bytes"] += sum(len(text.encode()) for text in texts)
        counts["bytes"] += check_byte_counts(tokenizer, table, batch_N)
        waiting_N = np.concatenate([waiting_N, batch_N])
        while len(waiting_N) > SHARD_TOKENS:
            write_next(waiting_N[:SHARD_TOKENS])
            waiting_N = waiting_N[SHARD_TOKENS:]
    write_next(waiting_N)
    return counts
