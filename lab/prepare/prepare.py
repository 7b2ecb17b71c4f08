"""Makes verified shards of documents: splits, tokenizes, writes and describes them.

A prepared folder holds the tokenizer, `text_train_%06d.bin`, `text_val_%06d.bin` and `manifest.json`. It appears
under its name only when it is whole; what a killed preparation left beside it is gone on with.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from golf.config.knobs import naming
from golf.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, PreparedData, load_prepared
from golf.data.shards import DataError
from golf.data.tokenizer import CASE_OPERATORS
from golf.runtime import file_sha256, write_file_atomically
from lab.prepare.encoding import EncodedChunk, WorkerLostError, chunk_documents, encode_chunks
from lab.prepare.readers import iter_documents, source_identity
from lab.prepare.text_tokenizer import (
    TextTokenizer,
    bytes_tokenizer_file,
    chars_tokenizer_file,
    encode_caseops,
    gpt2_tokenizer_file,
    load_text_tokenizer,
)
from lab.prepare.vocabulary import train_competition_tokenizer, train_tokenizer
from lab.prepare.work_files import (
    GrowingShards,
    build_spool,
    check_val_bytes,
    check_val_fraction,
    document_digest,
    is_held_out,
    open_spool,
    read_state,
    write_state,
)

PREPARED_FORMAT = 2
"""Changes with anything that changes the prepared bytes."""
PLAIN_KINDS = ("bytes", "chars", "gpt2")
VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
DATASET = "text"
PLAIN_TOKENIZER_NAME = "tokenizer.json"
NOTED_CHUNKS = 64
"""Chunks between two notes of how far a preparation is (about 32 MB of text)."""
TRAINED = re.compile(r"train:(\d+)")
LONGEST_NAME = 120
"""Bytes of a source's name that are taken into the name of its folder; names may have 255 in all."""
FEW_VAL_BYTES = 10_000
"""Validation text below which a score is told to be uncertain."""


@dataclass(frozen=True)
class Preparation:
    """Holds all that decides about the prepared bytes."""

    source: str
    """See lab/prepare/readers.py."""
    tokenizer: str = "train:1024"
    """train:VOCABULARY, a tokenizer file, or bytes, chars, gpt2."""
    val_fraction: float = VAL_FRACTION
    """Share of the documents that is held out, by the hash of their text; not with val_docs."""
    val_docs: int = 0
    """Documents from the beginning that are held out, instead."""
    order: str = "auto"
    """shuffled (distinct documents), source (as they come), or auto: source with val_docs."""
    transform: str = "auto"
    """caseops, none, or auto: what the tokenizer asks for."""
    drop_shared: bool = False
    """In source order: leave documents out of training that are held out too, instead of refusing them."""
    merges: str | None = None
    """GPT-2's merges file."""
    shard_tokens: int = SHARD_TOKENS
    seed: int = 0
    """Of the shuffled order."""

    def __post_init__(self):
        if self.val_docs < 0 or self.shard_tokens < 1:
            raise DataError(f"val_docs={self.val_docs} and shard_tokens={self.shard_tokens} can't be negative")
        if not self.val_docs:
            check_val_fraction(self.val_fraction)
        if self.val_docs and self.order == "shuffled":
            raise DataError("the first documents can't be held out of a shuffled order: leave out val_docs or order")

    @property
    def is_shuffled(self) -> bool:
        return self.order == "shuffled" or (self.order == "auto" and not self.val_docs)

    def label(self) -> str:
        """Returns what the tokenizer is called in a folder's name."""
        trained = TRAINED.fullmatch(self.tokenizer)
        if trained:
            return f"{'caseops' if self.transform == 'caseops' else 'sp'}{trained[1]}"
        if self.tokenizer in PLAIN_KINDS:
            return self.tokenizer
        tokenizer = load_text_tokenizer(self.tokenizer)
        return f"{'sp' if tokenizer.kind == 'sentencepiece' else tokenizer.kind}{tokenizer.vocab_size}"

    def tokenizer_identity(self) -> str:
        """Says how the tokenizer is made of the text, or gives the hash of its file. Raises DataError."""
        if TRAINED.fullmatch(self.tokenizer) or self.tokenizer in ("bytes", "chars"):
            return self.tokenizer
        if self.tokenizer == "gpt2":
            return hashlib.sha256(gpt2_file(self)).hexdigest()
        tokenizer = load_text_tokenizer(self.tokenizer)
        check_transform(tokenizer, self.transform)
        return tokenizer.sha256

    def recipe(self) -> dict[str, str | float | int | bool]:
        """Returns the settings, with the identity of source and tokenizer for their names and without defaults."""
        recipe = {
            "format": PREPARED_FORMAT,
            "source": source_identity(self.source),
            "tokenizer": self.tokenizer_identity(),
            "val_fraction": 0 if self.val_docs else self.val_fraction,
            "seed": self.seed,
        }
        rarer = {
            "val_docs": self.val_docs,
            "order": "" if self.is_shuffled else "source",
            "drop_shared": self.drop_shared,
            "transform": self.transform if TRAINED.fullmatch(self.tokenizer) and self.transform == "caseops" else "",
            "shard_tokens": 0 if self.shard_tokens == SHARD_TOKENS else self.shard_tokens,
        }
        return recipe | {name: value for name, value in rarer.items() if value}


def preparation_folder(preparation: Preparation, root: str | Path = "data/cache") -> Path:
    """Returns the folder in `root` named after what is prepared. Raises DataError."""
    recipe = preparation.recipe()
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    name, _, identity = recipe["source"].rpartition("-")
    name = name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
    return Path(root) / f"{name}-{identity}-{preparation.label()}-{digest[:8]}"


def prepare_data(
    preparation: Preparation,
    out: str | Path,
    workers: int = 1,
    word_cache: bool = True,
    advance: Callable[[int], None] = lambda text_bytes: None,
) -> PreparedData:
    """Prepares data in the folder `out`, or returns what is there already from the same recipe.

    Processes that want the same folder wait for the first one. The bytes don't depend on `workers` and `word_cache`;
    `advance` is told of bytes of text as they are done. Raises DataError, also when `out` holds anything else; then
    nothing is left behind, unlike after a kill, from which the same call goes on.
    """
    out = Path(out)
    recipe = preparation.recipe()
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        with locked_file(out.with_name(f".{out.name}.lock")):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                return prepared_already(out, recipe)
            make_folder(preparation, out, recipe, workers, word_cache, advance)
    except DataError:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process works there
                folder.rmdir()
        raise
    return load_prepared(out)


def make_folder(
    preparation: Preparation,
    out: Path,
    recipe: dict,
    workers: int,
    word_cache: bool,
    advance: Callable[[int], None],
) -> None:
    """Prepares data beside `out` and puts it there when it is whole. Raises DataError."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with naming(partial):
            work = PreparationWork(preparation, partial, recipe)
            work.encode(workers, word_cache, advance)
            work.finish()
    except WorkerLostError:
        raise
    except DataError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, out)


def prepared_already(out: Path, recipe: dict) -> PreparedData:
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out}: exists and is no prepared data; give another folder")
    prepared = load_prepared(out)
    if prepared.manifest["recipe"] != recipe:
        raise DataError(f"{out}: holds data that was prepared otherwise; give another folder or delete this one")
    return prepared


def preparation_remarks(prepared: PreparedData) -> list[str]:
    """Returns a line for each thing about prepared data that its reader should know."""
    splits = prepared.manifest["splits"]
    val_bytes, text, counted = (
        splits["val"]["text_bytes"],
        *(sum(counts[kind] for counts in splits.values()) for kind in ("text_bytes", "bytes")),
    )
    remarks = []
    if val_bytes < FEW_VAL_BYTES:
        remarks.append(f"the validation part has only {val_bytes:,} bytes of text: a score on it is uncertain")
    if text != counted:
        remarks.append(
            f"this tokenizer changes text: {text:,} bytes of it are {counted:,} in its normal form "
            f"({abs(text - counted):,} {'less' if counted < text else 'more'}), which scores count"
        )
    return remarks


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`, then removes it; the system lets go when the process ends, however it ends."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the one before removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


class PreparationWork:
    """Runs one preparation in its unfinished folder: from the start, or from where a killed one was."""

    def __init__(self, preparation: Preparation, folder: Path, recipe: dict):
        self.preparation, self.folder = preparation, folder
        self.duplicates = 0
        state = read_state(folder, recipe)
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if preparation.is_shuffled:
                documents = iter_documents(preparation.source, preparation.merges)
                spool = build_spool(documents, folder, preparation.val_fraction, preparation.seed)
                val_bytes, train_bytes = spool.text_bytes("val"), spool.text_bytes("train")
                check_val_bytes(preparation.source, val_bytes, train_bytes, preparation.val_fraction)
            texts = (text for split, text in self.documents() if split == "train")
            path = make_tokenizer(preparation, texts, folder)
            counts = {"documents": 0, "tokens": 0, "bytes": 0, "text_bytes": 0}
            splits = {"train": dict(counts), "val": dict(counts)}
            state = {"recipe": recipe, "tokenizer": path.name, "chunks": 0, "splits": splits}
            write_state(folder, state)
        self.state = state
        self.tokenizer = load_text_tokenizer(folder / state["tokenizer"])
        self.shards = {}
        for name in ("train", "val", "val_bytes") if self.tokenizer.kind == "caseops" else ("train", "val"):
            tokens = state["splits"][name.removesuffix("_bytes")]["tokens"]
            self.shards[name] = GrowingShards(folder, f"{DATASET}_{name}", preparation.shard_tokens, tokens)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields all (split, text) in the order that they are written in."""
        if self.preparation.is_shuffled:
            spool = open_spool(self.folder)
            self.duplicates = spool.duplicates
            return ((split, text) for split in ("train", "val") for text in spool.documents(split))
        return self.source_documents()

    def source_documents(self) -> Iterator[tuple[str, str]]:
        """Yields all (split, text) in the order of the source. Raises DataError for a document in both splits."""
        wanted = self.preparation
        self.duplicates = 0
        held_out: set[bytes] = set()
        for number, text in enumerate(iter_documents(wanted.source, wanted.merges)):
            digest = document_digest(text)
            if not wanted.val_docs:
                yield "val" if is_held_out(digest, wanted.val_fraction) else "train", text
            elif number < wanted.val_docs:
                held_out.add(digest)
                yield "val", text
            elif digest not in held_out:
                yield "train", text
            elif wanted.drop_shared:
                self.duplicates += 1
            else:
                raise DataError(
                    f"{wanted.source}: document {number} ({text[:40]!r}) is also among the first {wanted.val_docs}, "
                    "which are held out: with --drop-shared such documents are left out of training"
                )

    def encode(self, workers: int, word_cache: bool, advance: Callable[[int], None]) -> None:
        """Writes the shards, from the noted chunk on."""
        done = self.state["chunks"]
        chunks = itertools.islice(chunk_documents(self.documents()), done, None)
        path = self.folder / self.state["tokenizer"]
        sidecar_splits = ("val",) if "val_bytes" in self.shards else ()
        for chunk in encode_chunks(chunks, path, workers, word_cache, sidecar_splits):
            self.add(chunk)
            advance(chunk.text_bytes)
            done += 1
            if done % NOTED_CHUNKS == 0:
                self.note(done)

    def add(self, chunk: EncodedChunk) -> None:
        self.shards[chunk.split].append(chunk.tokens)
        if chunk.token_bytes:
            self.shards["val_bytes"].append(chunk.token_bytes)
        counts = self.state["splits"][chunk.split]
        counts["documents"] += chunk.documents
        counts["tokens"] += len(chunk.tokens) // 2
        counts["bytes"] += chunk.counted_bytes
        counts["text_bytes"] += chunk.text_bytes

    def note(self, chunks: int) -> None:
        for shards in self.shards.values():
            shards.sync()
        self.state["chunks"] = chunks
        write_state(self.folder, self.state)

    def finish(self) -> None:
        """Closes the shards and writes the manifest. Raises DataError when a split is empty or not as was asked for."""
        for shards in self.shards.values():
            shards.close()
        splits = self.state["splits"]
        for split, counts in splits.items():
            counts["shards"] = self.shards[split].shards
            if not counts["tokens"]:
                raise DataError(f"{self.preparation.source}: no document is left for {split}; hold out another share")
        wanted, (train_bytes, val_bytes) = self.preparation, (splits[s]["text_bytes"] for s in ("train", "val"))
        check_val_bytes(wanted.source, val_bytes, train_bytes, 0 if wanted.val_docs else wanted.val_fraction)
        paths = [path for shards in self.shards.values() for path in map(shards.path, range(shards.shards))]
        paths = sorted([*paths, self.folder / self.state["tokenizer"]])
        files = {path.name: file_sha256(path) for path in paths}
        tokenizer = self.tokenizer
        identity = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind}
        manifest = {
            "recipe": self.state["recipe"],
            "tokenizer": {**identity, "file": self.state["tokenizer"]},
            "transform": "caseops" if tokenizer.kind == "caseops" else "none",
            "duplicates": self.duplicates,
            "splits": splits,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": files[path.name]} for path in paths},
            "data_id": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16],
        }
        write_file_atomically(self.folder / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
        for path in self.folder.iterdir():  # spool, notes
            if path.name not in files and path.name != MANIFEST_NAME:
                path.unlink()


def check_transform(tokenizer: TextTokenizer, transform: str) -> None:
    """Raises DataError unless the tokenizer is one for text that is transformed like this."""
    asked = "caseops" if tokenizer.kind == "caseops" else "none"
    if transform not in ("auto", asked):
        raise DataError(f"{tokenizer.name}: is a tokenizer for --transform {asked}; leave --transform {transform} out")


def gpt2_file(preparation: Preparation) -> bytes:
    if preparation.merges is None:
        raise DataError("the gpt2 tokenizer takes its merges from a file (GPT-2's vocab.bpe): give --merges FILE")
    return gpt2_tokenizer_file(preparation.merges)


def make_tokenizer(preparation: Preparation, texts: Iterator[str], folder: Path) -> Path:
    """Writes the tokenizer that is asked for to `folder`, trained on `texts` where it is to be trained."""
    wanted, trained = preparation.tokenizer, TRAINED.fullmatch(preparation.tokenizer)
    if trained and preparation.transform == "caseops":
        data = train_competition_tokenizer(map(encode_caseops, texts), int(trained[1]), CASE_OPERATORS)
    elif trained:
        data = train_tokenizer(texts, int(trained[1]))
    elif wanted == "bytes":
        data = bytes_tokenizer_file()
    elif wanted == "chars":
        data = chars_tokenizer_file(texts)
    else:
        data = gpt2_file(preparation) if wanted == "gpt2" else Path(wanted).read_bytes()
    path = folder / (PLAIN_TOKENIZER_NAME if data.startswith(b"{") else TOKENIZER_NAME)
    path.write_bytes(data)
    check_transform(load_text_tokenizer(path), preparation.transform)
    return path
