"""Reads what a folder of shards says about itself, and gives its data the id that runs record."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from golf.config.knobs import parse_json
from golf.data.shards import SHARD_HEADER_BYTES, DataError, find_shards, shard_token_count
from golf.data.tokenizer import Tokenizer

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
FINGERPRINT_BYTES = 4096
"""Bytes read from each end of a shard that no manifest vouches for."""


@dataclass(frozen=True)
class PreparedData:
    """Holds a whole folder of shards with its tokenizer; `manifest` is the content of manifest.json."""

    folder: Path
    manifest: dict

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest["tokenizer"].get("file", TOKENIZER_NAME)

    @property
    def data_id(self) -> str:
        return self.manifest["data_id"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]


def load_prepared(folder: str | Path) -> PreparedData:
    """Opens the prepared data in `folder`; checks its files' sizes against the manifest. Raises DataError."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder}: no prepared data there (no {MANIFEST_NAME}); prepare it (data/README.md)")
    try:
        manifest = parse_json(path.read_bytes())
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a manifest of prepared data; delete the folder and prepare it again") from None
    for name, size in sizes.items():
        held = (folder / name).stat().st_size if (folder / name).is_file() else None
        if held != size:
            state = "is missing" if held is None else f"has {held} bytes, not {size}"
            raise DataError(f"{folder / name}: {state}; delete the folder and prepare it again")
    return PreparedData(folder, manifest)


def data_identity(folder: str | Path, tokenizer: Tokenizer) -> str:
    """Returns the data id that runs record: 16 hex digits.

    A prepared folder has it in its manifest. For any other folder of shards it is a hash over the tokenizer
    and, of each training shard, name, size, and first and last 4 KiB (the header among them): quick on 10 billion
    tokens, and different for anything but deliberate changes; validation shards stay closed. Raises DataError,
    also when the tokenizer is not the one that made a prepared folder.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).is_file():
        prepared = load_prepared(folder)
        if prepared.manifest["tokenizer"]["sha256"] != tokenizer.sha256:
            raise DataError(f"{folder} was not made with {tokenizer.name}; use {prepared.tokenizer_path}")
        return prepared.data_id
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for path in find_shards(folder, "train"):
        size = SHARD_HEADER_BYTES + 2 * shard_token_count(path)
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
