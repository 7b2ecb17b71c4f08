"""Measures what each part of adaptive scoring brings on one artifact: the same windows, with and without it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from golf.artifact.container import Artifact, restore_model
from golf.config.scoring import ScoreConfig
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import Runtime
from golf.score.adapted import score_adapted
from golf.score.mixture import NetworkNats, mix_score
from golf.score.roundtrip import load_validation
from golf.score.scorer import (
    Score,
    ScoreSettings,
    batch_shapes,
    evaluation_mode,
    gather_windows,
    prepare_job,
    score_batch,
    score_stream,
    sliding_settings,
)

CONTEXT, CONFIDENCE, BOOST = 16, 0.8, 2.625
"""Tokens of a context, least share of its commonest successor, and what is added to that one's logit (pull request
2135)."""


@dataclass(frozen=True)
class PartRow:
    """Holds one way to score."""

    what: str
    val_bpb: float
    seconds: float


@dataclass(frozen=True, eq=False)
class OpenedArtifact:
    """Holds what is scored again and again."""

    artifact: Artifact
    tokens_N1: np.ndarray
    counter: ByteTable | StreamBytes
    settings: ScoreSettings
    score: ScoreConfig
    """With the knobs of all parts; which of them are on is chosen here."""
    runtime: Runtime

    def model(self) -> GPT:
        """Returns a fresh model."""
        return restore_model(self.artifact, self.runtime)


def open_artifact(
    artifact: Artifact, tokenizer: Path, val_paths: Sequence[Path], score: ScoreConfig, runtime: Runtime,
    targets: int = 0,
) -> OpenedArtifact:  # fmt: skip
    """Loads the validation text of an artifact, its first `targets` targets where that is not 0."""
    tokens_N1, counter = load_validation(artifact.tokenizer_sha256, tokenizer, val_paths)
    if targets and isinstance(counter, ByteTable):
        tokens_N1 = tokens_N1[: targets + 1]
    settings = sliding_settings(score, artifact.model)
    return OpenedArtifact(artifact, tokens_N1, counter, settings, score, runtime)


def measure_parts(opened: OpenedArtifact) -> Iterator[PartRow]:
    """Yields the score of the network alone, with the published tilt, and with each part and both."""
    for adapters in (False, True):
        vocabulary = opened.artifact.model.vocab_size if opened.score.mixture_successors else 0
        nats = NetworkNats(len(opened.tokens_N1) - 1, None, vocabulary)
        name = "adapters of each document" if adapters else "network alone"
        network = score_network(opened, adapters, nats)
        yield PartRow(name, network.val_bpb, network.seconds)
        if not adapters:
            yield tilt_row(opened, network, nats)
        for successors, words in ((0, "counts"), (opened.score.mixture_successors, "corrected counts")):
            if successors or words == "counts":
                score = replace(opened.score, mixture_successors=successors)
                mixed = mix_score(network, nats, opened.tokens_N1, opened.artifact.model, score, opened.runtime)
                yield PartRow(f"{name} + {words}", mixed.val_bpb, mixed.seconds)


def score_network(opened: OpenedArtifact, adapters: bool, nats: NetworkNats) -> Score:
    model, runtime = opened.model(), opened.runtime
    distributions = nats.record_distributions if opened.score.mixture_successors else None
    recorders = {"recorder": nats.record, "distributions": distributions}
    if adapters:
        return score_adapted(
            model, opened.tokens_N1, opened.counter, opened.settings, opened.score, runtime, **recorders
        )
    return score_stream(model, opened.tokens_N1, opened.counter, opened.settings, runtime, **recorders)


# ---- the published tilt ----


def token_hints(tokens_N1: np.ndarray) -> np.ndarray:
    """Returns for each target the token that followed its context of 16 tokens in at least 80 % of the cases before, or
    -1."""
    hints_N, seen = np.full(len(tokens_N1) - 1, -1), {}
    for target in range(CONTEXT - 1, len(hints_N)):
        counts = seen.setdefault(tokens_N1[target - CONTEXT + 1 : target + 1].tobytes(), {})
        if counts:
            token, count = max(counts.items(), key=lambda item: item[1])
            if count >= CONFIDENCE * sum(counts.values()):
                hints_N[target] = token
        following = int(tokens_N1[target + 1])
        counts[following] = counts.get(following, 0) + 1
    return hints_N


def hint_nats(opened: OpenedArtifact, hints_N: np.ndarray) -> np.ndarray:
    """Returns the network's nats_N of the hinted tokens, in the windows that score the real ones."""
    model, nats_N = opened.model(), np.zeros(len(hints_N))
    job = prepare_job(model, opened.tokens_N1, opened.counter, opened.settings, opened.runtime.device)
    asked_N = torch.from_numpy(np.maximum(hints_N, 0)).to(opened.runtime.device)

    def record(index_M: Tensor, nats_M: Tensor) -> None:
        nats_N[index_M.cpu().numpy()] = nats_M.cpu().numpy()

    with evaluation_mode(model):
        for first, last, rows, scored in batch_shapes(job, 0, len(job.plan)):
            batch = gather_windows(job, first, last, rows, scored)
            score_batch(job, replace(batch, targets_BS=asked_N[batch.index_BS]), record)
    return nats_N


def tilt_row(opened: OpenedArtifact, network: Score, nats: NetworkNats) -> PartRow:
    """Returns the score with the logit of a hinted token raised: p'(a) = p(a) e^(b [a = h]) / (1 + p(h) (e^b - 1))."""
    started, hints_N = time.perf_counter(), token_hints(opened.tokens_N1)
    tilted_N = np.array(nats.nats_N)
    mass_N = np.log1p(np.exp(-hint_nats(opened, hints_N)) * np.expm1(BOOST))
    hinted_N = hints_N >= 0
    tilted_N[hinted_N] += (mass_N - BOOST * (hints_N == opened.tokens_N1[1:]))[hinted_N]
    tilted = replace(network, nats=float(tilted_N.sum()))
    what = f"network + token-only tilt ({hinted_N.mean():.1%} of the targets)"
    return PartRow(what, tilted.val_bpb, network.seconds + time.perf_counter() - started)
