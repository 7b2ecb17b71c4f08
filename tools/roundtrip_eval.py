"""Scores an artifact: bits per byte from its bytes, a tokenizer and validation shards, and nothing else.

    python tools/roundtrip_eval.py --artifact FILE --val 'GLOB' --tokenizer FILE [--window 4096] [--stride 64]

The model's configuration is in the artifact. Runs in one process, or under torchrun on several.
Exit status: 0 scored, 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from golf.artifact.container import Artifact, read_artifact
from golf.config.config import Config, check_config
from golf.config.model import ModelConfig
from golf.config.scoring import ScoreConfig
from golf.data.shards import expand_glob
from golf.runtime import Log, leave, start_runtime
from golf.score.roundtrip import score_artifact
from golf.score.scorer import Score
from lab.cli import DeviceOptions, run_command

BATCH_TOKENS = {"cuda": 131_072, "cpu": 16_384}
"""Window tokens of a batch where none is asked for."""


@dataclass(frozen=True)
class Options(DeviceOptions):
    artifact: Path
    """The artifact to score."""
    val: str
    """Pattern of the validation shards, quoted."""
    tokenizer: Path
    """The SentencePiece model that made the shards."""
    window: int = 0
    """Tokens in a window; 0: twice the model's training length."""
    stride: int = 0
    """Targets that a window scores; 0: 64, or the window where that is shorter."""
    rope: Literal["ntk", "none"] = "ntk"
    """RoPE beyond the training length: NTK-aware base, or the training base as it is."""
    max_seconds: float = 0.0
    """Most seconds of scoring: a stride that would take longer is raised before anything is scored; 0: no limit."""
    mixture: bool = False
    """Mix the network's probabilities with counts of what was scored before, with the default knobs."""
    batch: int = 0
    """Windows in one forward pass of a process; 0: what fits the device."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the forward; auto: on CUDA."""


def score_config(options: Options, model: ModelConfig, device: str) -> ScoreConfig:
    """Returns the options, with what was left open filled in for this model and device."""
    window = options.window or 2 * model.train_seq_len
    batch = options.batch or max(1, BATCH_TOKENS[device] // window)
    stride = options.stride or min(64, window)
    return ScoreConfig(window, stride, batch, options.rope, options.mixture, max_eval_seconds=options.max_seconds)


def report(artifact: Artifact, config: ScoreConfig, score: Score, device: str, processes: int) -> dict[str, object]:
    return {
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "tokens": score.tokens,
        "bytes": score.bytes,
        **score.parts,
        "documents": score.documents,
        "seconds": score.seconds,
        "windows": score.windows,
        "window_tokens_per_second": score.window_tokens / score.seconds,
        "device": device,
        "processes": processes,
        "artifact_sha256": artifact.sha256,
        "artifact_bytes": artifact.byte_count,
        "tokenizer_sha256": artifact.tokenizer_sha256,
        **asdict(config),
    }


def print_table(values: dict[str, object]) -> None:
    table = Table("measure", "value", title="score of the reloaded artifact")
    decimals = {"val_loss": 8, "val_bpb": 8, "seconds": 1, "window_tokens_per_second": 0}
    for name, value in values.items():
        shown = f"{value:,.{decimals.get(name, 3)}f}" if isinstance(value, float) else value
        table.add_row(name, f"{shown:,}" if isinstance(shown, int) else str(shown))
    Console().print(table)


def work(options: Options) -> int:
    run = options.run_config(options.compile)
    check_config(Config(run=run, score=ScoreConfig(max_eval_seconds=options.max_seconds)))
    with start_runtime(run, "roundtrip", Log(sys.stderr)) as runtime:
        artifact = read_artifact(options.artifact)
        device = runtime.device.type
        config = score_config(options, artifact.model, device)
        compiled = runtime.compiles and (options.compile == "on" or device == "cuda")
        shards = expand_glob(options.val)
        score, val_data_id = score_artifact(artifact, options.tokenizer, shards, config, runtime, compiled=compiled)
        if not runtime.is_main:
            return 0
        config = replace(config, eval_stride=score.stride)
        values = report(artifact, config, score, device, runtime.world_size) | {"val_data_id": val_data_id}
    if options.json:
        print(json.dumps(values))
    else:
        print_table(values)
    return 0


if __name__ == "__main__":
    leave(run_command(Options, __doc__, work))
