"""Opens the folder of a scored run as probes and proofs need it: everything that made the score, and what it said."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golf.artifact.container import Artifact, read_artifact
from golf.config.config import Config
from golf.config.run import RunConfig
from golf.data.shards import find_shards
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.run.folder import RunFolder
from golf.runtime import Runtime, choose_compile, choose_device
from golf.score.roundtrip import load_validation, stream_identity
from golf.score.scorer import ScoreSettings, check_settings, sliding_settings
from lab.prepare.text_tokenizer import TextTokenizer, load_text_tokenizer
from lab.probe.data_probes import ProbeError, read_run_record


@dataclass(frozen=True)
class ScoredRun:
    """Holds a run's folder as the probes need it."""

    folder: Path
    config: Config
    figures: dict[str, Any]
    artifact: Artifact
    tokenizer: TextTokenizer
    tokens_N1: np.ndarray
    counter: ByteTable | StreamBytes
    """Of the bytes of the tokens."""


def load_run(path: Path) -> ScoredRun:
    """Loads a run's folder. Raises UserError or OSError for one that is not that of a scored run."""
    folder = RunFolder(path)
    if folder.config.exists():
        read_run_record(folder.config, ["config_hash", "run", "data", "score"])
    config = folder.load_config()
    figures = load_figures(folder)
    artifact = read_artifact(folder.artifact)
    tokenizer = load_text_tokenizer(config.data.tokenizer_path)
    if figures.get("artifact_sha256", artifact.sha256) != artifact.sha256:
        raise ProbeError(f"{folder.artifact} is not the artifact that was scored (other SHA-256): score the run again")
    if tokenizer.sha256 != artifact.tokenizer_sha256:
        raise ProbeError(f"{config.data.tokenizer_path} is not the artifact's tokenizer: give the one of its shards")
    val_shards = find_shards(config.data.data_path, "val")
    tokens_N1, counter = load_validation(artifact.tokenizer_sha256, config.data.tokenizer_path, val_shards)
    val_data_id = stream_identity(tokens_N1)
    if figures.get("val_data_id", val_data_id) != val_data_id:
        raise ProbeError(
            f"{config.data.data_path}: not the validation shards that were scored, {figures['val_data_id']}"
        )
    return ScoredRun(path, config, figures, artifact, tokenizer, tokens_N1, counter)


def load_figures(folder: RunFolder) -> dict[str, Any]:
    """Reads what the score says of itself, in the terms of result.json, which may be missing yet. Raises ProbeError."""
    records = [path for path in (folder.score, folder.result) if path.is_file()]
    if not records:
        raise ProbeError(f"{folder.path} has neither score.json nor result.json: score the run first")
    figures: dict[str, Any] = {}
    for path in records:
        figures |= read_run_record(path)
    for key in ("val_loss", "val_bpb", "val_tokens", "val_bytes"):
        if type(figures.get(key)) not in (int, float):
            raise ProbeError(f"{records[-1]}: no record of a score, it has no number {key}: score the run again")
    return figures


def score_settings(run: ScoredRun) -> ScoreSettings:
    """Returns those of the score: its stride is larger than the configured one where time was short."""
    stride = run.figures.get("eval_stride", run.config.score.eval_stride)
    settings = sliding_settings(replace(run.config.score, eval_stride=stride), run.artifact.model)
    check_settings(settings)
    return settings


def single_runtime(config: RunConfig) -> Runtime:
    """Sets this process alone up as the scoring was, whatever a launcher's variables say."""
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.threads:
        torch.set_num_threads(config.threads)
    return Runtime(device, compiles=choose_compile(config.compile, device))
