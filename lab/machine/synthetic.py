"""Random tokens in the place of text, for measurements of speed: what they say does not matter, only their shape."""

import numpy as np

from golf.config.config import Config
from golf.config.knobs import ConfigError


def random_tokens(count: int, config: Config) -> np.ndarray:
    """`count` ids of the model's vocabulary, uint16 (N,), the same ones each time; documents of one row's length.

    Raises ConfigError for a model whose vocabulary is its tokenizer's.
    """
    if not config.model.vocab_size:
        raise ConfigError("without text there is no tokenizer to take the vocabulary from: set vocab_size=512")
    tokens_N = np.random.default_rng(0).integers(4, config.model.vocab_size, count, dtype=np.uint16)
    tokens_N[:: max(1, config.model.train_seq_len)] = config.model.bos_id
    return tokens_N
