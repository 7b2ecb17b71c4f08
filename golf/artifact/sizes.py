"""What an artifact's bytes are spent on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from golf.artifact.layout import StreamPlan


@dataclass(frozen=True)
class StreamSize:
    """One stream: codes of a class, all scales, or fp16 tensors."""

    role: str
    label: str
    bits: int
    elements: int
    raw_bytes: int
    """Before compression: one byte a code, two an fp16 value."""
    compressed_bytes: int

    @property
    def bits_per_element(self) -> float:
        return 8 * self.compressed_bytes / self.elements


@dataclass(frozen=True)
class SizeReport:
    """All streams, and the rest (header, description, lengths)."""

    codec: str
    streams: tuple[StreamSize, ...]
    total_bytes: int

    @property
    def weights(self) -> int:
        """Parameters of the model: scales stand for none."""
        return sum(stream.elements for stream in self.streams if stream.role != "scales")

    @property
    def overhead_bytes(self) -> int:
        return self.total_bytes - sum(stream.compressed_bytes for stream in self.streams)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.weights


def measure_stream(plan: StreamPlan, planes: Sequence[bytes]) -> StreamSize:
    """Sizes of a stream whose compressed planes these are."""
    raw_bytes = plan.elements * plan.planes
    return StreamSize(plan.role, plan.label, plan.bits, plan.elements, raw_bytes, sum(map(len, planes)))


def size_report_dict(report: SizeReport) -> dict:
    """For JSON: the streams and the sums."""
    streams = [asdict(stream) | {"bits_per_element": stream.bits_per_element} for stream in report.streams]
    return {
        "codec": report.codec,
        "streams": streams,
        "weights": report.weights,
        "overhead_bytes": report.overhead_bytes,
        "bits_per_weight": report.bits_per_weight,
        "bytes_model": report.total_bytes,
    }
