"""The score that counts: from the artifact's bytes, the tokenizer and the validation shards, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from golf.artifact.container import Artifact
from golf.artifact.restore import restore_model
from golf.config import ScoreConfig
from golf.data.loader import validation_tokens
from golf.data.tokenizer import ByteTable, load_tokenizer
from golf.runtime import Runtime
from golf.score.scorer import Score, ScoreError, compiled_losses, score_stream, sliding_settings


def score_artifact(
    artifact: Artifact,
    tokenizer_path: str | Path,
    val_paths: Sequence[str | Path],
    score: ScoreConfig,
    runtime: Runtime,
    *,
    compiled: bool = False,
) -> Score:
    """Score the model in `artifact` on the validation shards, over all ranks, with sliding windows.

    Raises ScoreError for a tokenizer that is not the artifact's, or a stream that can't be scored; DataError for
    files that can't be read.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.sha256 != artifact.tokenizer_sha256:
        raise ScoreError(
            f"{tokenizer_path}: SHA-256 {tokenizer.sha256[:12]}... is not that of the artifact's tokenizer,"
            f" {artifact.tokenizer_sha256[:12]}...: give the tokenizer that made the training shards"
        )
    model = restore_model(artifact, runtime)
    return score_stream(
        model,
        validation_tokens(val_paths),
        ByteTable(tokenizer),
        sliding_settings(score, artifact.model),
        runtime,
        forward=compiled_losses(model) if compiled else None,
    )
