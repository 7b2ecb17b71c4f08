"""Proves a score by decompression: the beginning of the validation text is coded with the model's probabilities, as the
scorer scored it, and decoded where that text can't be read.

A decoder has nothing but the artifact, the tokenizer and the coded bytes. What it gets back, it has predicted: from
earlier text alone (C1), with probabilities that add up to 1 (C2; a coder that trusted others could not be decoded),
learning only from what it has decoded (C3), every token once (C4). The coded bits must be those of the scorer's nats.

N targets of the whole stream, T those that are proven.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from golf.config.knobs import parse_json
from golf.config.scoring import ScoreConfig
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.runtime import write_file_atomically
from golf.score.adapters import LaneScorer, lane_steps
from golf.score.mixture import NetworkNats, score_documents, stream_parts
from golf.score.scorer import ScoreSettings, evaluation_mode, prepare_job, score_windows
from golf.score.windows import stream_documents
from lab.compress.container import this_machine
from lab.compress.predictor import StreamPredictor
from lab.compress.stream_code import CompressionError, Progress, decode_streams_of, encode_streams_of
from lab.prepare.text_tokenizer import TextTokenizer

NAME = "proof by decompression"
RELATIVE_GAP, BIT_GAP = 0.001, 64
"""How far the coded bits may be from the scorer's: rounding of frequencies and of two orders of arithmetic."""
Quiet: Progress = lambda done, total: None  # noqa: E731


@dataclass(frozen=True)
class Proof:
    """Holds what the two processes found."""

    verdict: str
    detail: str
    targets: int
    bytes: int
    file_bits: int
    scorer_bits: float
    artifact_sha256: str
    val_data_id: str


@dataclass(frozen=True)
class CodedBeginning:
    """Holds what the decoder gets, beside the model: no token of the text."""

    targets: int
    whole: int
    """Targets of the whole stream, on which its windows and parts depend."""
    stride: int
    made_on: str
    checksums: list[int]
    data: bytes

    def write(self, path: Path) -> None:
        write_file_atomically(path, json.dumps(asdict(self) | {"data": self.data.hex()}))

    @classmethod
    def read(cls, path: Path) -> "CodedBeginning":
        content = parse_json(path.read_bytes())
        return cls(**content | {"data": bytes.fromhex(content["data"])})


def count_targets(bytes_N: np.ndarray, wanted: int) -> int:
    """Returns how many targets spell at least `wanted` bytes: all where the text is shorter; 0 bytes: all."""
    reached = int(np.searchsorted(np.cumsum(bytes_N), wanted)) + 1
    return min(reached, len(bytes_N)) if wanted else len(bytes_N)


def scorer_nats(
    model: GPT, tokens_N1: np.ndarray, counter: ByteTable | StreamBytes, settings: ScoreSettings, score: ScoreConfig,
    targets: int,
) -> np.ndarray:  # fmt: skip
    """Returns float64 nats_T of the first targets, by the scorer's own code."""
    job = prepare_job(model, tokens_N1, counter, settings, next(model.parameters()).device)
    corrects = score.mixture and score.mixture_successors > 0
    network = NetworkNats(len(tokens_N1) - 1, None, model.config.vocab_size if corrects else 0)
    distributions = network.record_distributions if corrects else None
    with evaluation_mode(model):
        if score.adapter_rank:
            lanes = LaneScorer(model, job.tokens_N1, settings, score, distributions)
            documents = [part for part in stream_documents(tokens_N1, model.config.bos_id) if part[0] < targets]
            for step in lane_steps(documents, score.adapter_lanes, settings.stride):
                lanes.step(step, network.record)
        else:
            job = replace(job, distributions=distributions)
            score_windows(job, 0, int(np.searchsorted(job.plan.ends_W, targets)) + 1, recorder=network.record)
    if not score.mixture:
        return network.nats_N[:targets]
    network_N = network.nats_NV if corrects else network.nats_N
    mixed_T = np.zeros(targets)
    for documents in stream_parts(tokens_N1, model.config.bos_id, score.mixture_parts):
        begun = [(begin, min(end, targets)) for begin, end in documents if begin < targets]
        score_documents(tokens_N1.astype(np.int32), network_N, begun, model.config, score, mixed_T)
    return mixed_T


def encode_beginning(
    model: GPT, tokens_N1: np.ndarray, settings: ScoreSettings, score: ScoreConfig, targets: int,
    progress: Progress = Quiet,
) -> CodedBeginning:  # fmt: skip
    """Codes the first targets of a stream."""
    whole = len(tokens_N1) - 1
    predictor = StreamPredictor(model, settings, score, [targets], whole)
    data, checksums = encode_streams_of(predictor, [tokens_N1[1 : targets + 1].tolist()], progress)
    return CodedBeginning(targets, whole, settings.stride, this_machine(), checksums.tolist(), data)


def decode_beginning(
    model: GPT, coded: CodedBeginning, settings: ScoreSettings, score: ScoreConfig, progress: Progress = Quiet
) -> np.ndarray:
    """Returns the stream's first tokens, the document start first. Raises CompressionError."""
    predictor = StreamPredictor(model, settings, score, [coded.targets], coded.whole)
    checksums = np.array(coded.checksums, np.uint32)
    (tokens,) = decode_streams_of(predictor, coded.data, checksums, coded.made_on, progress)
    return np.array([model.config.bos_id, *tokens])


def spell(tokenizer: TextTokenizer, tokens_T1: np.ndarray) -> bytes:
    """Returns the text of a stream's documents, one after another."""
    edges = [*np.flatnonzero(tokens_T1 == tokenizer.bos_id).tolist(), len(tokens_T1)]
    texts = (tokenizer.decode(tokens_T1[a + 1 : b].tolist()) for a, b in zip(edges, edges[1:], strict=False))
    return "".join(texts).encode()


def judge(
    coded: CodedBeginning, nats_T: np.ndarray, text: bytes, decode: Callable[[], bytes], identity: dict[str, str]
) -> Proof:
    """Returns the proof, given what the scorer says of the same targets, their text, and how the other process decodes
    it."""
    file_bits, scorer_bits = 8 * len(coded.data), float(nats_T.sum() / np.log(2))
    allowed = RELATIVE_GAP * scorer_bits + BIT_GAP
    verdict, bits = "PASS", f"{file_bits:,} bits in the file, {scorer_bits:,.0f} by the scorer"
    if not abs(file_bits - scorer_bits) <= allowed:
        verdict, detail = "FAIL", f"{bits}: more than {allowed:,.0f} apart, the score is not that of its probabilities"
    else:
        try:
            same, fault = decode() == text, "the decoded text is another"
        except CompressionError as error:
            same, fault = False, str(error)
        verdict = "PASS" if same else "FAIL"
        detail = f"{bits}; {len(text):,} bytes of text came back without the text" if same else fault
    return Proof(verdict, detail, coded.targets, len(text), file_bits, scorer_bits, **identity)
