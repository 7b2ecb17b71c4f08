"""A training of an ablation: the pipeline's own trainer, looked at on a fixed grid of tokens, packed and scored."""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from golf.artifact.weights import SavedWeights, save_weights
from golf.config.config import Config
from golf.run.checkpoint import final_weights
from golf.run.datasets import TrainingData, open_training_data
from golf.run.stages import quantize_weights
from golf.run.trainer import Trainer, new_trainer
from golf.runtime import Runtime
from golf.score.scorer import plain_settings
from lab.rates.targets import first_targets, target_nats
from lab.study.measures import (
    ByteCounter,
    CodeWatch,
    current_state,
    measure_artifact,
    median_and_tails,
    open_validation,
)
from lab.study.spec import FINISHED, INVALID, RunSpec, StudyError

WARM_STEPS = 5
"""First steps, which no figure of speed counts."""
CUT_OFF_FEATURES = (
    "warmdown",
    "swa",
    "muon_momentum_warmup",
    "grad_clip",
    "short_seq",
    "holdout",
    "ntk_rope",
    "prune",
)
"""Features of the feature audit that a schedule cut short, or a way other than train_gpt.py's, leaves out."""
TAIL_SHARE = 0.05
"""Of the steps: the last ones, whose mean is the training loss that is reported."""


class CurveKeeper:
    """What a run's curve.jsonl is made from: training loss of each step; validation loss and codes at each look."""

    def __init__(self, trainer: Trainer, spec: RunSpec, validation: tuple[np.ndarray, ByteCounter]):
        self.trainer, self.spec = trainer, spec
        self.tokens_N1, self.counter = first_targets(*validation, spec.look_tokens)
        self.watch = CodeWatch(spec.config.quant)
        self.rows: list[dict[str, Any]] = self.watch.look(current_state(trainer.model), 0)
        self.step_seconds: list[float] = []
        self.elapsed = trainer.clock.seconds

    def note(self, step: int, train_loss: float, elapsed: float) -> None:
        self.rows.append({"step": step, "train_loss": train_loss})
        self.step_seconds.append(elapsed - self.elapsed)
        self.elapsed = elapsed

    def is_due(self, step: int) -> bool:
        every = self.spec.look_every
        return every > 0 and (step % every == 0 or step == self.spec.train_steps)

    def look(self, step: int) -> None:
        """Validation loss of the weights as the next step would use them, and their codes."""
        model, tokens = self.trainer.model, step * self.spec.config.train.train_batch_tokens
        rows = max(1, self.spec.config.train.eval_batch_tokens // model.config.train_seq_len)
        settings = plain_settings(model.config, min(rows, self.spec.config.score.eval_batch_seqs))
        nats_N, _ = target_nats(model, self.tokens_N1, self.counter, settings, self.trainer.runtime)
        self.rows.append({"step": step, "tokens": tokens, "val_loss": float(nats_N.mean())})
        self.rows += self.watch.look(current_state(model), step)

    @property
    def tail_loss(self) -> float:
        """Mean training loss of the last steps."""
        losses = [row["train_loss"] for row in self.rows if "train_loss" in row]
        return float(np.mean(losses[-max(1, round(TAIL_SHARE * len(losses))) :]))

    def speed(self) -> dict[str, Any]:
        counted = self.step_seconds[WARM_STEPS:] or self.step_seconds
        figures = dict(median_and_tails(counted))
        tokens = self.spec.config.train.train_batch_tokens
        rate = tokens / float(np.median(counted)) if counted else None
        return figures | {"train_tokens_per_s": rate, "steps_timed": len(counted)}


def check_training_data(spec: RunSpec, data: TrainingData) -> None:
    if data.data_id != spec.data_id:
        raise StudyError(
            f"{spec.config.data.data_path}: the training data is not the study's ({data.data_id}, not {spec.data_id}): "
            "give the data that the study was planned on"
        )


def artifact_room(config: Config) -> float:
    """Returns the bytes that a study's artifact may have: the limit where the quantizer fills one, else no limit."""
    return config.run.limit_bytes if config.quant.quantizer == "waterfill" else math.inf


def run_training(spec: RunSpec, runtime: Runtime, folder: Path) -> tuple[dict[str, Any], list, list[float], bytes]:
    """(figures, rows of the curve, nats of the blocks, artifact) of a training. Raises UserError."""
    config, clock = spec.config, [time.perf_counter()]
    data = open_training_data(config)
    check_training_data(spec, data)
    validation = open_validation(spec, data.tokenizer.sha256)
    trainer = new_trainer(config, runtime, data.stream)
    trainer.warm_up()
    curve = CurveKeeper(trainer, spec, validation)
    clock.append(time.perf_counter())
    for report in itertools.islice(trainer.steps(), spec.train_steps):
        curve.note(report.step, report.train_loss, report.elapsed)
        if curve.is_due(report.step):
            curve.look(report.step)
    trainer.finish()
    clock.append(time.perf_counter())
    weights = {name: weight.cpu() for name, weight in final_weights(trainer.state(), trainer.audit).items()}
    trainer.audit.note_weights(weights, trainer.step)
    saved = SavedWeights(weights, config.model, config.quant, data.tokenizer.sha256)
    fitted, _ = quantize_weights(saved, config, data.stream, runtime, trainer.clock.seconds, artifact_room(config))
    if spec.keeps_weights:
        save_weights(folder / "weights.safetensors", weights, config.model, config.quant, data.tokenizer.sha256)
    clock.append(time.perf_counter())
    figures, blocks = measure_artifact(fitted.data, fitted.stored, spec, validation, runtime)
    clock.append(time.perf_counter())
    findings = training_findings(trainer)
    setup, training, packing, scoring = (after - before for before, after in itertools.pairwise(clock))
    figures |= curve.speed() | {
        "status": INVALID if findings else FINISHED,
        "error": "; ".join(findings),
        "steps": trainer.step,
        "train_tokens": trainer.step * config.train.train_batch_tokens,
        "train_loss": curve.tail_loss,
        "train_params": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "seconds": {"setup": setup, "training": training, "packing": packing, "scoring": scoring},
    }
    return figures, curve.rows, blocks, fitted.data


def training_findings(trainer: Trainer) -> list[str]:
    """What the feature audit says of features that act in the steps themselves."""
    return [line for line in trainer.audit.findings() if line.split()[0] not in CUT_OFF_FEATURES]
