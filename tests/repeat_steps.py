"""Trains from the same weights again and again: `python tests/repeat_steps.py REPEATS key=value...`

Prints a line for each repetition: SHA-256 of the trained weights and every step's loss. The model is built and compiled
once, as a run does it. With RACING=1 torch may add in any order again, which is the planted violation.
"""

import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from golf.config.config import build_config
from golf.optim.optimizers import Optimizers
from golf.run.datasets import open_training_data
from golf.run.trainer import Trainer, new_trainer
from golf.runtime import start_runtime


def train_again(trainer: Trainer, weights: dict[str, torch.Tensor]) -> str:
    trainer.model.load_state_dict(weights)
    trainer.optimizers = Optimizers(trainer.model, trainer.config.optim, trainer.runtime)
    losses, steps = [], trainer.config.train.iterations
    for trainer.step in range(steps):
        loss, _, _ = trainer.take_step(trainer.step / steps)
        losses.append(loss.item())
    digest = hashlib.sha256()
    for weight in trainer.model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return f"{digest.hexdigest()} {losses}"


def main(repeats: int, knobs: dict[str, str]) -> None:
    config = build_config("local", {}, knobs)
    with start_runtime(config.run, "train") as runtime:
        if "RACING" in os.environ:
            torch.use_deterministic_algorithms(False)
        trainer = new_trainer(config, runtime, open_training_data(config).stream)
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        for _ in range(repeats):
            print("trained", train_again(trainer, weights), flush=True)
        trainer.batches.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:]))
