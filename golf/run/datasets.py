"""Locates and opens a run's data: training stream, tokenizer, and their identity."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from golf.config.config import FROZEN, Config
from golf.config.knobs import ConfigError
from golf.data.loader import TokenStream
from golf.data.manifest import data_identity
from golf.data.shards import find_shards
from golf.data.tokenizer import Tokenizer, load_tokenizer
from golf.runtime import Runtime


@dataclass(frozen=True)
class TrainingData:
    stream: TokenStream
    shards: int
    tokenizer: Tokenizer
    data_id: str


def locate_data(config: Config, runtime: Runtime, root: Path) -> Config:
    """Returns `config` with data_path and tokenizer_path filled in; prepares shards from `corpus` where they are
    missing.

    A separate program (data/prepare.py beside the training script) prepares them: it is not part of the code that a
    submission ships.
    """
    if config.data.data_path:
        return with_vocabulary(with_tokenizer_path(config))
    prepared = prepare_corpus_data(config, root) if runtime.is_main else ""
    folder = Path(runtime.text_of_main(prepared))
    if str(folder).startswith("!"):
        raise ConfigError(str(folder)[1:])
    data = replace(config.data, data_path=str(folder), tokenizer_path=str(tokenizer_beside(folder)))
    return with_vocabulary(replace(config, data=data))


def corpus_tokenizer(config: Config) -> str:
    """Returns the tokenizer to prepare `corpus` with, in data/prepare.py's terms: a file, trained pieces, or
    characters."""
    pieces = config.model.vocab_size
    return config.data.tokenizer_path or (f"train:{pieces}" if pieces else "chars")


def with_vocabulary(config: Config) -> Config:
    """Returns `config` with the vocabulary size of its tokenizer, where the model leaves that open. Raises
    DataError."""
    if config.model.vocab_size:
        return config
    vocab_size = load_tokenizer(config.data.tokenizer_path).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def with_tokenizer_path(config: Config) -> Config:
    """Returns `config` with the tokenizer beside the shards, where it names none. Raises ConfigError."""
    if config.data.tokenizer_path:
        return config
    return replace(config, data=replace(config.data, tokenizer_path=str(tokenizer_beside(Path(config.data.data_path)))))


def tokenizer_beside(folder: Path) -> Path:
    """Returns the tokenizer that preparation left beside the shards. Raises ConfigError."""
    found = [path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).exists()]
    if not found:
        raise ConfigError(f"tokenizer_path is not set, and {folder} has no tokenizer.model: name the shards' tokenizer")
    return found[0]


def prepare_corpus_data(config: Config, root: Path) -> str:
    """Prepares the corpus and returns its folder, or "!" and a message where that failed (so that all ranks fail)."""
    program = root / "data" / "prepare.py"
    if FROZEN or not program.exists():
        return f"!{program} is missing: set data_path and tokenizer_path to prepared shards and their tokenizer"
    command = [sys.executable, str(program), "--input", config.data.corpus, "--json"]
    command += ["--tokenizer", corpus_tokenizer(config)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        return f"!data/prepare.py failed (exit status {finished.returncode}); its message stands above"
    return json.loads(finished.stdout)["folder"]


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != config.model.vocab_size or tokenizer.bos_id != config.model.bos_id:
        raise ConfigError(
            f"{config.data.tokenizer_path} has {tokenizer.vocab_size} pieces and BOS {tokenizer.bos_id}; the model has "
            f"vocab_size={config.model.vocab_size} and bos_id={config.model.bos_id}: "
            f"run with vocab_size={tokenizer.vocab_size} bos_id={tokenizer.bos_id}, or name the right tokenizer"
        )


def open_training_data(config: Config) -> TrainingData:
    """Maps the training shards and loads the tokenizer. Raises DataError or ConfigError."""
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    check_vocabulary(config, tokenizer)
    shards = find_shards(config.data.data_path, "train")
    held_out = config.train.holdout_tokens if config.train.holdout_every else 0
    stream = TokenStream(shards, held_out)
    if held_out:
        stream.held_out_tokens(config.model.bos_id)  # fails now where no document is held out, and not after hours
    return TrainingData(stream, len(shards), tokenizer, data_identity(config.data.data_path, tokenizer))
