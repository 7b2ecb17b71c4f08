"""Compares quantized forms of one model with its fp32 weights, on the same tokens: loss, bytes, and what is resolved.

Every form but fp32 is packed into an artifact, loaded back from its bytes and scored; the losses of single targets
come from the scorer, which records them. C columns, N targets of the stream (N + 1 tokens).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from golf.artifact.container import pack_artifact, read_artifact, restore_model
from golf.model.gpt import GPT
from golf.quant.calibration import MomentRecorder, add_outer, calibrate, check_rows
from golf.quant.export import check_storable
from golf.quant.grid import QuantizedState
from golf.quant.tensor_classes import FP16_BITS, QuantError, tensor_class
from golf.runtime import Runtime
from golf.score.scorer import ScoreSettings, evaluation_mode
from lab.compare.statistics import BootstrapInterval, block_numbers, bootstrap_ratio
from lab.rates.grids import NAIVE_INT8, QuantSpec, parse_quantizer
from lab.rates.quantizers import GPTQ_DEFAULTS, GptqOptions, quantize_matrix
from lab.rates.targets import first_targets, target_nats
from lab.rates.trained_run import TrainedRun, TrainedRunError, load_float_model

FP32, FP16, NAIVE = "fp32", "fp16", "naive8"
FEWEST_DOCUMENTS = 20
"""Documents from which on they are the blocks of the bootstrap; below, rows of the training length are."""
TOKEN_UNITS = {"bytes": "byte", "chars": "character"}

TIED_TABLE = "tok_emb.weight"


@dataclass(frozen=True)
class QuantVariant:
    """One form of the weights; `spec` is None where nothing is put on a grid."""

    name: str
    method: str
    spec: QuantSpec | None
    keeps_embedding: bool = False
    """The token embedding stays fp16."""


@dataclass(frozen=True)
class VariantResult:
    """One form, scored on all targets."""

    name: str
    nll: float
    """Nats per token."""
    perplexity: float
    """exp(nll), per token."""
    bpb: float
    bytes: int
    """Of the artifact, or of the fp32 weights' file; neither holds optimizer state."""
    bits_per_weight: float
    difference: BootstrapInterval | None
    """nll less that of fp32, with its interval; None for fp32 itself."""
    bpb_difference: float
    quantize_seconds: float
    pack_seconds: float
    score_seconds: float
    artifact_sha256: str

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "reference"
        if not self.difference.resolved:
            return "not resolved"
        return "worse" if self.difference.low > 0 else "better"


@dataclass(frozen=True)
class QuantComparison:
    """All forms on the same tokens."""

    results: list[VariantResult]
    tokens: int
    of_tokens: int
    """Targets of the whole validation stream."""
    bytes: int
    token_unit: str
    blocks: str
    """What the bootstrap draws."""
    alpha: float


def parse_variants(text: str, keeps_embedding: bool = False) -> list[QuantVariant]:
    """Returns the variants that words with commas name, fp32 first, each once. Raises QuantError."""
    words = list(dict.fromkeys([FP32, *(word.strip() for word in text.split(","))]))
    return [parse_variant(word, keeps_embedding) for word in words]


def parse_variant(word: str, keeps_embedding: bool) -> QuantVariant:
    if word in (FP32, FP16):
        return QuantVariant(word, word, None)
    if word == NAIVE:
        return QuantVariant(word, "rtn", NAIVE_INT8, keeps_embedding=True)
    try:
        method, spec = parse_quantizer(word)
    except QuantError as error:
        raise QuantError(f"unknown method {word!r}: fp32, fp16, naive8, or a quantizer: {error}") from None
    return QuantVariant(word, method, spec, keeps_embedding)


def collect_hessians(model: GPT, rows_NT: Tensor, batch_rows: int = 8) -> dict[str, Tensor]:
    """Returns the mean of x x^T at every matrix product, by forward passes alone; the tied table's is the head's.

    Raises QuantError for no rows.
    """
    check_rows(rows_NT, model)
    recorder = MomentRecorder(model)
    with torch.no_grad(), recorder.hooks():
        for start in range(0, len(rows_NT), batch_rows):
            model.logits(rows_NT[start : start + batch_rows])
            x_PC = recorder.normed_BTD.flatten(0, 1).float()
            add_outer(recorder.sums["head"], x_PC, torch.ones(len(x_PC), device=x_PC.device))
    sums = recorder.sums | {"tok_emb.weight": recorder.sums.pop("head")}
    return {name: (part.hessian_CC / part.weight).cpu() for name, part in sums.items() if part.weight > 0}


def gptq_moments(model: GPT, rows_NT: Tensor, runtime: Runtime, table: bool) -> dict[str, Tensor]:
    """Returns hessian_CC of every matrix; with `table`, of the tied embedding by both of its uses (by that of the head
    alone, GPTQ is worse than rounding: docs/LOG.md). Raises QuantError."""
    with evaluation_mode(model):
        hessians = collect_hessians(model, rows_NT.to(runtime.device))
    if table:
        hessians[TIED_TABLE] = calibrate(model, rows_NT, runtime)[TIED_TABLE].hessian_CC
    return hessians


def quantize_variant(
    state: Mapping[str, Tensor],
    variant: QuantVariant,
    hessians: Mapping[str, Tensor],
    options: GptqOptions = GPTQ_DEFAULTS,
) -> QuantizedState:
    """Returns codes for the matrices, fp16 for the rest; GPTQ rounds a table that is only looked up to nearest.

    `hessians` hold hessian_CC of each matrix by name. Raises QuantError.
    """
    stored: QuantizedState = {}
    for name, tensor in state.items():
        kind = tensor_class(name, tensor.shape)
        if variant.spec is None or kind == "small" or (kind == "embed" and variant.keeps_embedding):
            check_storable(name, tensor, FP16_BITS)
            stored[name] = tensor.half()
        else:
            hessian_CC = hessians.get(name) if variant.method == "gptq" else None
            stored[name] = quantize_matrix(tensor, variant.spec, hessian_CC, options)
    return stored


@dataclass(frozen=True, eq=False)
class ComparisonSubject:
    """Holds what all variants are made from and scored on."""

    run: TrainedRun
    tokens_N1: np.ndarray
    settings: ScoreSettings
    codec: str
    hessians: Mapping[str, Tensor]
    runtime: Runtime


@dataclass(frozen=True, eq=False)
class ScoredVariant:
    """A variant's targets, before it is compared."""

    name: str
    nats_N: np.ndarray
    bytes_scored: int
    size: int
    seconds: tuple[float, float, float]
    """To quantize, to pack, to score."""
    artifact_sha256: str


def score_variant(variant: QuantVariant, subject: ComparisonSubject) -> ScoredVariant:
    """Quantizes, packs, loads back and scores a form. Raises UserError."""
    saved, runtime, clock = subject.run.saved, subject.runtime, [time.perf_counter()]
    if variant.name == FP32:
        model = load_float_model(saved, runtime)
        size, sha256 = subject.run.weights_path.stat().st_size, subject.run.weights_sha256
        clock += [time.perf_counter()] * 2
    else:
        stored = quantize_variant(saved.state, variant, subject.hessians)
        clock.append(time.perf_counter())
        data, _ = pack_artifact(stored, saved.model, saved.tokenizer_sha256, subject.codec)
        clock.append(time.perf_counter())
        artifact = read_artifact(data)
        model, size, sha256 = restore_model(artifact, runtime), len(data), artifact.sha256
    scored = first_targets(subject.run.tokens_N, subject.run.counter, len(subject.tokens_N1) - 1)
    nats_N, bytes_scored = target_nats(model, *scored, subject.settings, runtime)
    clock.append(time.perf_counter())
    if not np.isfinite(nats_N).all():
        raise TrainedRunError(f"{variant.name}: the model gives a token NaN or infinite nats")
    quantizing, packing, scoring = (after - before for before, after in zip(clock[:-1], clock[1:], strict=True))
    return ScoredVariant(variant.name, nats_N, bytes_scored, size, (quantizing, packing, scoring), sha256)


def compare_variants(
    variants: Sequence[QuantVariant],
    subject: ComparisonSubject,
    block_tokens: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    advance: Callable[[VariantResult], None] = lambda result: None,
) -> QuantComparison:
    """Scores all variants, fp32 first, and compares each with fp32.

    `block_tokens` targets are a block of the bootstrap; 0: a document is; None: whichever there is enough of.
    Raises UserError.
    """
    assert variants[0].name == FP32
    run, targets = subject.run, len(subject.tokens_N1) - 1
    starts_N = subject.tokens_N1[1:] == run.saved.model.bos_id
    if block_tokens is None:
        block_tokens = 0 if starts_N.sum() >= FEWEST_DOCUMENTS else subject.settings.seq_len
    block_N = block_numbers(starts_N, block_tokens)
    reference = score_variant(variants[0], subject)
    results = []
    for variant in variants:
        scored = reference if variant.name == FP32 else score_variant(variant, subject)
        results.append(variant_result(scored, reference, block_N, run, alpha, seed))
        advance(results[-1])
    blocks = f"{block_N[-1] + 1:,} " + (f"blocks of {block_tokens:,} tokens" if block_tokens else "documents")
    unit = TOKEN_UNITS.get(run.tokenizer_kind, f"token ({run.saved.model.vocab_size:,} pieces)")
    return QuantComparison(results, targets, len(run.tokens_N) - 1, reference.bytes_scored, unit, blocks, alpha)


def variant_result(
    scored: ScoredVariant, reference: ScoredVariant, block_N: np.ndarray, run: TrainedRun, alpha: float, seed: int
) -> VariantResult:
    """Compares a form with the reference, by the same draws of blocks for every variant: one seed."""
    nll, difference = float(scored.nats_N.mean()), None
    nats_per_bpb = math.log(2) * scored.bytes_scored / len(scored.nats_N)
    if scored is not reference:
        sums_K = np.bincount(block_N, scored.nats_N - reference.nats_N)
        difference = bootstrap_ratio(sums_K, np.bincount(block_N), alpha, seed=seed)
        difference = replace(difference, difference=float((scored.nats_N - reference.nats_N).mean()))
    weights = sum(tensor.numel() for tensor in run.saved.state.values())
    return VariantResult(
        name=scored.name,
        nll=nll,
        perplexity=math.exp(nll),
        bpb=nll / nats_per_bpb,
        bytes=scored.size,
        bits_per_weight=8 * scored.size / weights,
        difference=difference,
        bpb_difference=(nll - float(reference.nats_N.mean())) / nats_per_bpb,
        quantize_seconds=scored.seconds[0],
        pack_seconds=scored.seconds[1],
        score_seconds=scored.seconds[2],
        artifact_sha256=scored.artifact_sha256,
    )
