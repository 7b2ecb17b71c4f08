"""Opens a trained run for comparisons of its quantized forms: weights, a validation stream, rows to calibrate on.

N tokens of a stream, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from golf.artifact.weights import SavedWeights, load_weights
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.scoring import ScoreConfig
from golf.data.manifest import MANIFEST_NAME
from golf.data.shards import SHARD_NAME, expand_glob, find_shards
from golf.data.sidecar import StreamBytes, without_sidecars
from golf.data.tokenizer import ByteTable, load_tokenizer
from golf.model.gpt import GPT
from golf.quant.qat import quantized_gpt
from golf.run.folder import RunFolder
from golf.runtime import Runtime, file_sha256
from golf.score.roundtrip import load_validation, stream_identity
from golf.score.scorer import ScoreSettings, check_settings, check_stream
from lab.probe.data_probes import read_run_record

SCORED_AT_ONCE = {"cuda": 131_072, "cpu": 1024}
"""Window tokens of one forward pass; on a CPU few, so that the logits stay in its cache (1.6 times the speed)."""


class TrainedRunError(UserError):
    """A run, or data beside it, that no comparison can be made from."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """Checked: tokens, tokenizer and weights belong together, and no validation shard is among the training shards."""

    path: Path
    saved: SavedWeights
    weights_path: Path
    weights_sha256: str
    tokenizer_path: Path
    tokenizer_kind: str
    val_paths: list[Path]
    tokens_N: np.ndarray
    counter: ByteTable | StreamBytes
    """Of the bytes of the tokens."""
    train_paths: list[Path]

    @property
    def val_data_id(self) -> str:
        return stream_identity(self.tokens_N)


def load_float_model(saved: SavedWeights, runtime: Runtime) -> GPT:
    """Returns the model of trained weights as they are, on the runtime's device."""
    model = quantized_gpt(saved.model, runtime.compute_dtype)
    model.load_state_dict(saved.state)
    return model.to(runtime.device)


def open_trained_run(path: Path, val: str = "", tokenizer: str = "", calibration: str = "") -> TrainedRun:
    """Opens the run in a folder, on its own data or another `tokenizer` (file), `val` and `calibration` (patterns).

    Raises UserError, OSError.
    """
    folder = RunFolder(path)
    if folder.config.exists():
        read_run_record(folder.config, ["config_hash", "run", "data"])
    data = folder.load_config().data
    if not folder.weights.is_file():
        raise TrainedRunError(f"{folder.weights} is missing: the run has not been trained to its end; resume it")
    saved = load_weights(folder.weights)
    tokenizer_path = Path(tokenizer or data.tokenizer_path)
    val_paths = [
        Path(shard) for shard in without_sidecars(expand_glob(val) if val else find_shards(data.data_path, "val"))
    ]
    train_paths = expand_glob(calibration) if calibration else find_shards(data.data_path, "train")
    tokens_N, counter = load_validation(saved.tokenizer_sha256, tokenizer_path, val_paths)
    for shards in (val_paths, train_paths):
        check_shards_tokenizer(shards, saved.tokenizer_sha256)
    check_stream(torch.from_numpy(tokens_N.astype(np.int32)), saved.model)
    check_calibration_shards(train_paths, val_paths)
    kind = load_tokenizer(tokenizer_path).kind
    weights_sha256 = file_sha256(folder.weights)
    return TrainedRun(
        path, saved, folder.weights, weights_sha256, tokenizer_path, kind, val_paths, tokens_N, counter, train_paths
    )


def check_shards_tokenizer(shards: Sequence[Path], tokenizer_sha256: str) -> None:
    """Raises TrainedRunError where the manifest beside the shards names another tokenizer.

    A smaller vocabulary would pass as tokens of a larger one.
    """
    for manifest in sorted({path.parent / MANIFEST_NAME for path in shards}):
        if not manifest.is_file():
            continue
        named = read_run_record(manifest).get("tokenizer")
        sha256 = named.get("sha256") if isinstance(named, dict) else None
        if sha256 not in (None, tokenizer_sha256):
            raise TrainedRunError(
                f"{manifest.parent}: the shards were made with another tokenizer ({sha256[:12]}...) than the run's "
                f"({tokenizer_sha256[:12]}...): name shards of the run's tokenizer"
            )


def check_calibration_shards(train_paths: Sequence[Path], val_paths: Sequence[Path]) -> None:
    """Raises TrainedRunError for a validation shard, or a copy of one, among the training shards."""
    sizes = {path.stat().st_size for path in val_paths}
    held_out = {file_sha256(path) for path in val_paths}
    for path in train_paths:
        name = SHARD_NAME.fullmatch(path.name)
        if name and name["split"] == "val":
            raise TrainedRunError(f"{path} is a validation shard: quantizers are calibrated on training shards only")
        if path.stat().st_size in sizes and file_sha256(path) in held_out:
            raise TrainedRunError(f"{path} holds the validation text: calibrate on training shards")


def scoring_config(model: ModelConfig, window: int, stride: int, device: str) -> ScoreConfig:
    """Returns windows of `window` tokens (0: the training length) at `stride` (0: plain rows), without a limit of time.

    Raises ScoreError.
    """
    window = window or model.train_seq_len
    rope = "ntk" if window > model.train_seq_len else "none"
    score = ScoreConfig(window, stride or window, max(1, SCORED_AT_ONCE[device] // max(1, window)), rope, 0.0)
    check_settings(ScoreSettings(window, score.eval_stride, score.eval_batch_seqs))
    return score
