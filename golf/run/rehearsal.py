"""Dry-runs quantize, pack, reload and score on the untrained model, so that missing parts show before training."""

import shutil
from dataclasses import replace

import numpy as np

from golf.artifact.container import read_artifact, restore_model, write_artifact
from golf.artifact.fill_limit import FIRST_GUESS, LevelSearch
from golf.config.knobs import UserError
from golf.data.tokenizer import ByteTable, Tokenizer
from golf.quant.calibration import calibrate_run
from golf.quant.export import prune_state, quantize_state
from golf.quant.grid import QuantizedState
from golf.run.folder import RunFolder
from golf.run.trainer import Trainer
from golf.score.mixture import forecast_mixture
from golf.score.scorer import evaluation_mode, prepare_job, score_windows, sliding_settings

REHEARSED_ROWS = 4
STATE_COPIES = 12
"""Bytes on the disk for each fp32 byte of weights: three checkpoints of weights, optimizer state and average."""


class RehearsalError(UserError):
    """Reports that something is missing which the stages after training need."""


def quantize_once(trainer: Trainer) -> QuantizedState:
    """Returns the untrained weights in stored form, calibrated on a few rows where the run will calibrate."""
    config, state = trainer.config, trainer.model.state_dict()
    if config.quant.quantizer == "rtn":
        return quantize_state(prune_state(state, config.quant)[0], config.quant)
    alone = replace(trainer.runtime, rank=0, world_size=1)
    calibration = calibrate_run(state, config, trainer.batches.stream, alone, rows=REHEARSED_ROWS)
    search = LevelSearch(
        state, calibration.statistics, config.quant, config.model, log=lambda line: None, runtime=alone
    )
    return search.quantize(FIRST_GUESS)


def rehearse(trainer: Trainer, tokenizer: Tokenizer, folder: RunFolder) -> str:
    """Quantizes, packs, reloads and scores a little training text at the real shapes; returns a line for the log.

    Raises what the stages after training would raise, and RehearsalError for a disk that is too full.
    """
    config, state, runtime = trainer.config, trainer.model.state_dict(), trainer.runtime
    needed, free = STATE_COPIES * sum(4 * part.numel() for part in state.values()), shutil.disk_usage(folder.path).free
    if free < needed:
        raise RehearsalError(f"{folder.path}: {free >> 20} MiB are free, and a run needs {needed >> 20}: free some")
    path = folder.path / "rehearsal.golf"
    try:
        sizes = write_artifact(path, quantize_once(trainer), config.model, tokenizer.sha256, config.quant.codec)
        model = restore_model(read_artifact(path), runtime)
    finally:
        path.unlink(missing_ok=True)
    settings = sliding_settings(config.score, config.model)
    count = settings.seq_len + settings.stride * settings.batch_seqs
    tokens = trainer.batches.stream.tokens(0, count + 1).astype(np.uint16)
    job = prepare_job(model, tokens, ByteTable(tokenizer), settings, runtime.device)
    with evaluation_mode(model):
        sums = score_windows(job, 0, len(job.plan))
    assert sums.tokens == count
    if config.score.mixture:
        forecast_mixture(tokens, config.model, config.score, replace(runtime, rank=0, world_size=1))
    return f"rehearsal: untrained artifact {sizes.total_bytes} bytes, {sums.nats / sums.tokens:.4f} nats per token"
