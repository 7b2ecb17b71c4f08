"""Random tokens in the place of text, for measurements of speed: what they say does not matter, only their shape."""

import numpy as np

from golf.config import Config


def random_tokens(count: int, config: Config) -> np.ndarray:
    """`count` ids of the model's vocabulary, uint16 (N,), the same ones each time; documents of one row's length."""
    tokens_N = np.random.default_rng(0).integers(4, config.model.vocab_size, count, dtype=np.uint16)
    tokens_N[:: max(1, config.model.train_seq_len)] = config.model.bos_id
    return tokens_N
