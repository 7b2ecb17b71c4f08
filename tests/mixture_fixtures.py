"""A small stream in which text comes again, and a network of random probabilities."""

import io
from collections.abc import Callable

import numpy as np
import torch

from golf.config.config import Config, with_knobs
from golf.runtime import Log, Runtime

VOCABULARY, BOS = 12, 1
SCORE = with_knobs(Config(), dict(mixture=True, mixture_orders=3)).score
MODEL = with_knobs(
    Config(),
    dict(vocab_size=VOCABULARY, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, bigram_vocab_size=0)
    | dict(bigram_dim=0, train_seq_len=8, tied_embed_init_std=0.5),
).model


def repetitive_stream(seed: int = 0, lengths=(90, 1, 40, 75, 30)) -> np.ndarray:
    """Documents of words that come again, with other tokens among them."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(2, VOCABULARY, size) for size in (3, 5, 2, 7)]
    parts = []
    for length in lengths:
        body = np.concatenate([words[k] for k in rng.integers(0, 4, length)])[: max(length - 1, 0)]
        noise = rng.random(len(body)) < 0.1
        parts.append([BOS, *np.where(noise, rng.integers(2, VOCABULARY, len(body)), body)])
    return np.concatenate(parts).astype(np.uint16)


class Killed(Exception):
    """Stands for the end of a process."""


def killed_after(calls: int) -> Callable[[], None]:
    """Returns a check that lets so many calls pass."""
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise Killed

    return check


def network_rows(targets: int, seed: int = 5) -> np.ndarray:
    logits_NV = np.random.default_rng(seed).normal(size=(targets, VOCABULARY))
    rows_NV = np.exp(logits_NV)
    return rows_NV / rows_NV.sum(1, keepdims=True)


def quiet(rank: int = 0, world_size: int = 1) -> Runtime:
    return Runtime(torch.device("cpu"), rank, world_size, log=Log(io.StringIO()))
