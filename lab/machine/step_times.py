"""Times training steps on random tokens in the place of text: what they say does not matter, only their shape."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from golf.config.config import Config
from golf.config.knobs import ConfigError
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.qat import install_activation_quantizers
from golf.run.trainer import Trainer
from golf.runtime import Runtime
from lab.machine.fingerprint import gpu_states


def random_tokens(count: int, config: Config) -> np.ndarray:
    """Returns `count` ids of the model's vocabulary, uint16 (N,), the same ones each time; documents are of one row.

    Raises ConfigError for a model whose vocabulary is its tokenizer's.
    """
    if not config.model.vocab_size:
        raise ConfigError("without text there is no tokenizer to take the vocabulary from: set vocab_size=512")
    tokens_N = np.random.default_rng(0).integers(4, config.model.vocab_size, count, dtype=np.uint16)
    tokens_N[:: max(1, config.model.train_seq_len)] = config.model.bos_id
    return tokens_N


def time_steps(config: Config, runtime: Runtime, steps: int) -> tuple[GPT, list[float], list[dict[str, Any]] | None]:
    """Trains after a warm-up; returns the model, the seconds of each step, and the GPUs' states right after the last.

    Fewer than `steps` are taken where the configured budget ends before.
    """
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "random_train_000000.bin"
        write_shard(shard, random_tokens(4 * config.train.train_batch_tokens + 1, config))
        model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
        trainer = Trainer(install_activation_quantizers(model), config, runtime, TokenStream([shard]))
        trainer.warm_up()
        elapsed = [0.0]
        for report in trainer.steps():
            elapsed.append(report.elapsed)
            trainer.waits = report.step + 1 >= steps
            if report.step == steps:
                break
        states = gpu_states()
        trainer.finish()
    return model, np.diff(elapsed).tolist(), states
