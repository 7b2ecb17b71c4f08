"""Reports what an artifact's bytes are spent on, and how near they come to the codes' order-0 entropy."""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from golf.artifact.layout import StreamPlan
from golf.quant.grid import QuantizedState, QuantizedTensor


@dataclass(frozen=True)
class StreamSize:
    """Measures one stream: codes of a class, all scales, all column scales, all zero points, or fp16 tensors."""

    role: str
    label: str
    bits: int
    elements: int
    raw_bytes: int
    """Bytes before compression: one for a code, two for an fp16 value."""
    compressed_bytes: int
    entropy_bytes: float
    """Order-0 entropy of a whole stream of codes, the least that a coder without context can reach; 0 for other
    streams."""
    encode_seconds: float
    decode_seconds: float = 0.0

    @property
    def bits_per_element(self) -> float:
        return 8 * self.compressed_bytes / self.elements

    @property
    def entropy_ratio(self) -> float | None:
        """Returns compressed bytes over the order-0 entropy; None where that is 0."""
        return self.compressed_bytes / self.entropy_bytes if self.entropy_bytes else None


@dataclass(frozen=True)
class SizeReport:
    """Lists all streams; the rest of `total_bytes` is header, description and lengths."""

    codec: str
    streams: tuple[StreamSize, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Returns the model's parameters, without scales and corrections."""
        return sum(s.elements for s in self.streams if s.role in ("codes", "fp16") and s.label != "low rank")

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(stream.compressed_bytes for stream in self.streams)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.weights

    @property
    def codes(self) -> StreamSize:
        """Returns the sum of all streams of codes; their entropies are added, each with its own frequencies."""
        parts = [stream for stream in self.streams if stream.role == "codes"]
        names = ("elements", "raw_bytes", "compressed_bytes", "entropy_bytes", "encode_seconds", "decode_seconds")
        return StreamSize("codes", "all", 0, **{name: sum(getattr(part, name) for part in parts) for name in names})


def measure_stream(plan: StreamPlan, entries: QuantizedState, compressed_bytes: int, seconds: float) -> StreamSize:
    """Measures a stream that was encoded in `seconds` to `compressed_bytes`."""
    codes = [entry.codes_RC for name in plan.names if isinstance(entry := entries[name], QuantizedTensor)]
    entropy = code_entropy_bytes(codes) if plan.role == "codes" else 0.0
    return StreamSize(
        plan.role, plan.label, plan.bits, plan.elements, plan.raw_bytes, compressed_bytes, entropy, seconds
    )  # fmt: skip


def code_entropy_bytes(codes: list[torch.Tensor]) -> float:
    """Returns the order-0 entropy of int8 codes of any shapes, all together."""
    counts = sum(np.bincount(part.numpy().reshape(-1).view(np.uint8), minlength=256) for part in codes)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum() * counts.sum() / 8)


def size_report_dict(report: SizeReport) -> dict:
    """Returns the streams and the sums, for JSON."""
    streams = [stream_dict(stream) for stream in report.streams]
    return {
        "codec": report.codec,
        "streams": streams,
        "codes": stream_dict(report.codes) if report.codes.elements else None,
        "weights": report.weights,
        "overhead_bytes": report.overhead_bytes,
        "bits_per_weight": report.bits_per_weight,
        "bytes_model": report.total_bytes,
    }


def stream_dict(stream: StreamSize) -> dict:
    return asdict(stream) | {"bits_per_element": stream.bits_per_element, "entropy_ratio": stream.entropy_ratio}
