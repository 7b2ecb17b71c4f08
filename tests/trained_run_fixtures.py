"""A small run folder with trained weights, shards and a tokenizer of bytes, for tests of what compares its forms."""

import shutil
from pathlib import Path

import numpy as np
import torch

from golf.artifact.weights import save_weights
from golf.config.config import Config, with_knobs
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.folder import RunFolder
from lab.prepare.text_tokenizer import PlainTokenizer, bytes_tokenizer_file

KNOBS = dict(
    vocab_size=260, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, bigram_vocab_size=64, bigram_dim=16,
    train_seq_len=32, tied_embed_init_std=0.3, train_batch_tokens=512, micro_batch_tokens=512, eval_seq_len=64,
    eval_stride=32, device="cpu", compile="off", qat_enabled=False,
)  # fmt: skip
ANIMALS, VERBS = ("cat", "dog", "small mouse", "old horse"), ("sees", "hears", "likes", "follows")


def stories(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    sentences = [f"The {a} {v} the {b}." for a in ANIMALS for v in VERBS for b in ANIMALS]
    return [" ".join(rng.choice(sentences, 4)) + f" {seed}.{number}" for number in range(count)]


def write_split(folder: Path, split: str, texts: list[str], tokenizer: PlainTokenizer) -> None:
    ids = [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]
    write_shard(folder / f"text_{split}_000000.bin", ids)


def make_trained_run(root: Path, steps: int = 120) -> Path:
    """root/run with weights that have learned something, and root/data; returns the folder of the run."""
    data, run = root / "data", RunFolder(root / "run")
    data.mkdir(parents=True)
    (data / "tokenizer.json").write_bytes(bytes_tokenizer_file())
    tokenizer = PlainTokenizer(bytes_tokenizer_file())
    write_split(data, "train", stories(120, seed=1), tokenizer)
    write_split(data, "val", stories(30, seed=2), tokenizer)
    places = {"data_path": str(data), "tokenizer_path": str(data / "tokenizer.json"), "preset": "local"}
    config = with_knobs(Config(), KNOBS | places)
    run.create(config)
    tokens = torch.from_numpy(np.fromfile(data / "text_train_000000.bin", "<u2")[512:].astype(np.int64))
    model = build_model(config.model, seed=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 33, (8, 1), generator=generator)
        rows_BT = tokens[starts + torch.arange(33)]
        optimizer.zero_grad()
        model(rows_BT[:, :-1], rows_BT[:, 1:]).backward()
        optimizer.step()
    save_weights(run.weights, model.state_dict(), config.model, config.quant, tokenizer.sha256)
    return run.path


def copied_run(run: Path, root: Path) -> Path:
    """A copy of the run alone, to damage; its data stays where it was."""
    return Path(shutil.copytree(run, root / "copy"))
