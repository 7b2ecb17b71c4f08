"""A trained model as people meet it: text in, text out, and how well it knows a text.

Opened from an artifact or the folder of a run, with the tokenizer that the artifact names by its SHA-256. T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch

from golf.artifact.container import Artifact, read_artifact, restore_model
from golf.artifact.description import expected_shapes
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.run.folder import RunFolder
from golf.runtime import Runtime
from golf.score.roundtrip import load_artifact_tokenizer
from golf.score.scorer import Score, ScoreSettings, score_stream
from lab.generate.generation import TextGeneration
from lab.generate.sampling import SamplingError, SamplingOptions, drawable_ids, text_ids
from lab.prepare.text_tokenizer import TextTokenizer, load_text_tokenizer
from lab.probe.data_probes import read_run_record


@dataclass(frozen=True, eq=False)
class TextModel:
    """A model with its tokenizer."""

    model: GPT
    tokenizer: TextTokenizer
    byte_table: ByteTable
    name: str
    artifact_bytes: int
    bits_per_weight: float
    """Of the whole artifact, over all parameters."""
    val_bpb: float | None
    """What its run measured; None where no result of this artifact is beside it."""
    runtime: Runtime

    @property
    def context(self) -> int:
        """Tokens that the model was trained to see at once."""
        return self.model.config.train_seq_len

    def generate(self, prompts: Sequence[str], options: SamplingOptions) -> TextGeneration:
        """Go on with each prompt; iterate for the new texts, token by token. Raises SamplingError, QuantError."""
        return TextGeneration(self.model, self.tokenizer, prompts, options, self.runtime)

    def score(self, text: str) -> Score:
        """The score of a text as one document, in windows of the context that overlap by half.

        Raises SamplingError for no text, DataError for one with characters that the tokenizer does not have.
        """
        ids = text_ids(self.tokenizer, text)
        if not ids:
            raise SamplingError("there is no text to measure: give some")
        tokens_T = np.array([self.tokenizer.bos_id, *ids])
        counter = self.byte_table
        if not counter.exact:
            counter = StreamBytes(np.concatenate([[0], self.tokenizer.target_bytes(ids)]))
        settings = ScoreSettings(self.context, max(1, self.context // 2), batch_seqs=1)
        return score_stream(self.model, tokens_T, counter, settings, self.runtime, announce=False)

    def bits_per_byte(self, text: str) -> float:
        """As `score`."""
        return self.score(text).val_bpb

    def continuation_nats(self, context: str, continuation: str) -> tuple[float, int, int]:
        """(nats, tokens, bytes) of a continuation after a context, for choosing among several.

        Tokens are those of the whole text from the first that the context alone does not have: where a token would
        span both, it counts. As much of the context as fits is read. Raises SamplingError where the continuation is
        empty, or longer than the model's context.
        """
        before, whole = (text_ids(self.tokenizer, text) for text in (context, context + continuation))
        count = len(whole) - len(commonprefix([before, whole]))
        if not 1 <= count <= self.context:
            raise SamplingError(f"the continuation has {count} tokens: it must have 1 to {self.context}, the context")
        tokens_T = torch.tensor([self.tokenizer.bos_id, *whole], device=self.runtime.device)
        with torch.no_grad():
            ids_1T, targets_1T = tokens_T[:-1][-self.context :], tokens_T[-count:]
            nats = self.model.token_losses(ids_1T[None], targets_1T[None]).double().sum()
        return float(nats), count, len(continuation.encode())


def open_text_model(
    artifact_or_run_path: Path | str, tokenizer_path: Path | str | None = None, runtime: Runtime | None = None
) -> TextModel:
    """The model in an artifact, or that of a run's folder, and its tokenizer: the run's where none is named.

    Without a `runtime`, on the CPU.

    Raises UserError (ArtifactError, DataError, ProbeError, SamplingError, ScoreError), OSError.
    """
    path = Path(artifact_or_run_path)
    folder = RunFolder(path if path.is_dir() else path.parent)
    source = find_artifact(path, folder)
    artifact = read_artifact(source)
    tokenizer_path = tokenizer_path or run_tokenizer_path(source, folder)
    table, tokenizer = load_artifact_tokenizer(artifact, tokenizer_path), load_text_tokenizer(tokenizer_path)
    drawable_ids(tokenizer, artifact.model.vocab_size)
    if tokenizer.bos_id != artifact.model.bos_id:
        raise SamplingError(f"{source}: its documents start with {artifact.model.bos_id}, not {tokenizer.bos_id}")
    runtime = runtime or Runtime(torch.device("cpu"))
    model = restore_model(artifact, runtime)
    own = folder.config.is_file() and source.name == folder.artifact.name
    return TextModel(
        model=model,
        tokenizer=tokenizer,
        byte_table=table,
        name=folder.path.resolve().name if own else source.stem,
        artifact_bytes=artifact.byte_count,
        bits_per_weight=8 * artifact.byte_count / sum(map(prod, expected_shapes(artifact.model).values())),
        val_bpb=measured_bpb(artifact, folder),
        runtime=runtime,
    )


def find_artifact(path: Path, folder: RunFolder) -> Path:
    """The file itself, or that of a run. Raises SamplingError."""
    if not path.exists():
        raise SamplingError(f"{path}: no such file or folder; give an artifact, or the folder of a run")
    if not path.is_dir():
        return path
    if not folder.config.is_file():
        raise SamplingError(f"{folder.config} is missing: {path} is not the folder of a run")
    if not folder.artifact.is_file():
        raise SamplingError(f"{folder.artifact} is missing: the run has none yet; resume it, or wait for its end")
    return folder.artifact


def run_tokenizer_path(source: Path, folder: RunFolder) -> Path:
    """What the configuration beside an artifact names. Raises SamplingError, ProbeError."""
    if not folder.config.is_file():
        raise SamplingError(f"{source} does not lie in the folder of a run: name its tokenizer with --tokenizer")
    data = read_run_record(folder.config, ["data"])["data"]
    named = data.get("tokenizer_path") if isinstance(data, dict) else None
    if not isinstance(named, str) or not Path(named).is_file():
        raise SamplingError(f"the run's tokenizer, {named}, is not there (seen from here): name it with --tokenizer")
    return Path(named)


def measured_bpb(artifact: Artifact, folder: RunFolder) -> float | None:
    """The score of this very artifact in the result beside it. Raises ProbeError for a damaged file."""
    if not folder.result.is_file():
        return None
    result = read_run_record(folder.result)
    figure = result.get("val_bpb")
    return figure if result.get("artifact_sha256") == artifact.sha256 and isinstance(figure, float) else None
