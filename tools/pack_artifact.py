"""Prunes, quantizes and packs weights into an artifact, and holds its size against the limit.

    python tools/pack_artifact.py --weights FILE.safetensors --out FILE [--limit-bytes 16000000] [--prune 0.05]
        [--codec rans|brotli|lzma|zstd|zlib|none] [--code FILE] [--json]
    python tools/pack_artifact.py --weights FILE --out FILE --fit [--calibration 'GLOB'] [--reserve-bytes N]
        [--target-bpb X --val 'GLOB' --tokenizer FILE]
    python tools/pack_artifact.py --weights FILE --out FILE --tokenizer FILE --fit [--knobs 'train_seq_len=1024 ...']
        [--val 'GLOB']

Weights are this project's, or those of another script of the competition (the baseline's or the recipe's names, as
.safetensors), which need --tokenizer. With --val the loss is measured too.

--fit chooses the step of every row and column after calibration, so that the artifact fills the limit with the least
loss; with --target-bpb it is the smallest that keeps the score. Exit status: 0 packed; 1 over the limit (nothing is
written); 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import pack_artifact, read_artifact
from golf.artifact.sizes import SizeReport, StreamSize, size_report_dict
from golf.artifact.weights import SavedWeights
from golf.config.config import Config, check_config
from golf.config.knobs import EXIT_FINDINGS, ConfigError
from golf.config.quantization import CODECS, QuantConfig
from golf.data.shards import expand_glob
from golf.quant.export import PruneReport, prune_state, quantize_state
from golf.runtime import Log, Runtime, start_runtime, write_file_atomically
from golf.score.roundtrip import score_artifact, score_weights
from lab.cli import DeviceOptions, run_command
from lab.rates.foreign_weights import open_weights
from lab.rates.packing_fit import FitRequest, fit_weights
from lab.rates.trained_run import scoring_config

WIDTH_OF_TABLE = 100


@dataclass(frozen=True)
class Options(DeviceOptions):
    weights: Path
    """weights.safetensors of a training run, or the weights of another script (.safetensors)."""
    out: Path
    """The artifact to write; an existing one is replaced only by one that fits."""
    limit_bytes: int = 16_000_000
    """Most bytes of artifact and code together."""
    prune: float | None = None
    """Share of smallest weights set to zero; default: what the run was configured with."""
    codec: CODECS | None = None
    """Default: what the run was configured with."""
    code: Path | None = None
    """The code file of the submission, counted with the artifact; default: no code is counted."""
    fit: bool = False
    """Choose all steps anew to fill the limit (codec rans unless another one is asked for)."""
    reserve_bytes: int = 0
    """With --fit: bytes to stay below the limit."""
    calibration: str = ""
    """With --fit: pattern of training shards to calibrate on, quoted; default: text that the model makes up itself."""
    calibration_tokens: int = 65_536
    """With --fit: tokens to calibrate on, in rows of the training length."""
    seed: int = 0
    """With --fit: of the choice of rows, or of the text."""
    target_bpb: float | None = None
    """With --fit: the smallest artifact of at most so many bits per byte on --val, in plain rows."""
    val: str = ""
    """Pattern of validation shards, quoted: says bits per byte before and after, in plain rows."""
    tokenizer: Path | None = None
    """With --val, or weights of another script: the tokenizer."""
    knobs: str = ""
    """With weights of another script: what their shapes don't say, such as 'train_seq_len=4096 rope_base=50000'."""


@dataclass(frozen=True)
class PackResult:
    sizes: SizeReport
    pruned: list[PruneReport]
    bytes_code: int
    limit_bytes: int
    code_counted: bool
    fit: dict[str, Any] | None = None
    """How a fit came about."""
    val_bpb: tuple[float, float] | None = None
    """Bits per byte of the weights, and of the artifact, in plain rows."""

    @property
    def bytes_total(self) -> int:
        return self.sizes.total_bytes + self.bytes_code

    @property
    def fits(self) -> bool:
        return self.bytes_total <= self.limit_bytes


def choose_quantization(saved: SavedWeights, options: Options) -> QuantConfig:
    quant = saved.quant
    if options.prune is not None:
        quant = replace(quant, prune_frac=options.prune)
    if options.codec is not None:
        quant = replace(quant, codec=options.codec)
    check_config(Config(quant=quant))
    return quant


def pack(options: Options) -> PackResult:
    """Writes the artifact if it fits. Raises UserError or OSError for bad input."""
    if not options.out.parent.is_dir():
        raise ArtifactError(f"there is no folder {options.out.parent} to write {options.out.name} to")
    if options.val and not options.tokenizer:
        raise ConfigError("--val is counted in bytes of text: give its --tokenizer too")
    bytes_code = options.code.stat().st_size if options.code else 0
    saved, reading = open_weights(options.weights, options.tokenizer, options.knobs)
    with start_runtime(options.run_config(), "pack", Log(sys.stderr)) as runtime:
        if reading:
            runtime.print(reading)
        packed = pack_fitted if options.fit else pack_as_configured
        data, result = packed(saved, options, bytes_code, runtime)
        if result.fits and options.val and options.target_bpb is None:
            result = replace(result, val_bpb=score_before_and_after(saved, data, options, runtime))
    if result.fits:
        write_file_atomically(options.out, data)
    return result


def pack_as_configured(saved: SavedWeights, options: Options, bytes_code: int, _: Runtime) -> tuple[bytes, PackResult]:
    """Returns the artifact on the configured grids. Raises UserError."""
    if options.target_bpb is not None or options.calibration or options.reserve_bytes:
        raise ConfigError("--target-bpb, --calibration and --reserve-bytes go with --fit")
    quant = choose_quantization(saved, options)
    state, pruned = prune_state(saved.state, quant)
    data, sizes = pack_artifact(quantize_state(state, quant), saved.model, saved.tokenizer_sha256, quant.codec)
    return data, PackResult(sizes, pruned, bytes_code, options.limit_bytes, options.code is not None)


def pack_fitted(saved: SavedWeights, options: Options, bytes_code: int, runtime: Runtime) -> tuple[bytes, PackResult]:
    """Returns the artifact that a fit gives. Raises UserError."""
    if options.prune is not None:
        raise ConfigError("--prune has no place in --fit: it sets codes to zero by itself")
    goal = options.limit_bytes - options.reserve_bytes - bytes_code
    request = FitRequest(
        goal, options.calibration, options.calibration_tokens, options.seed, options.codec or "rans",
        options.target_bpb, options.val, options.tokenizer,
    )  # fmt: skip
    fitted, record = fit_weights(saved, request, runtime, runtime.print)
    return fitted.data, PackResult(fitted.sizes, [], bytes_code, options.limit_bytes, options.code is not None, record)


def score_before_and_after(saved: SavedWeights, data: bytes, options: Options, runtime: Runtime) -> tuple[float, float]:
    """Returns bits per byte on --val of the weights, and of the artifact read back. Raises UserError."""
    artifact, paths = read_artifact(data), expand_glob(options.val)
    score = scoring_config(saved.model, 0, 0, runtime.device.type)
    before = score_weights(saved.state, artifact, options.tokenizer, paths, score.eval_batch_seqs, runtime)
    after, _ = score_artifact(artifact, options.tokenizer, paths, score, runtime)
    return before.val_bpb, after.val_bpb


def result_dict(result: PackResult) -> dict:
    return size_report_dict(result.sizes) | {
        "bytes_code": result.bytes_code,
        "bytes_total": result.bytes_total,
        "limit_bytes": result.limit_bytes,
        "fits": result.fits,
        "pruned": [asdict(report) for report in result.pruned],
        "fit": result.fit,
        "val_bpb": result.val_bpb,
    }


def size_table(result: PackResult) -> Table:
    """Makes the table; codes have also their order-0 entropy in bytes, their share of it, and seconds in and out."""
    table = Table("tensors", "as", "values", "entropy", "compressed", "ratio", "bits/value", "s in", "s out")
    for column in table.columns[2:]:
        column.justify = "right"
    sizes = result.sizes
    for stream in sizes.streams:
        kind = f"int{stream.bits}" if stream.role in ("codes", "zeros") else "fp16"
        table.add_row(stream.label, kind, *stream_cells(stream))
    if sizes.codes.elements:
        table.add_row("all codes", "", *stream_cells(sizes.codes))
    table.add_row("description", "", "", "", f"{sizes.overhead_bytes:,}", end_section=True)
    bits = f"{sizes.bits_per_weight:.3f}"
    table.add_row("artifact", sizes.codec, f"{sizes.weights:,}", "", f"{sizes.total_bytes:,}", "", bits)
    code = f"{result.bytes_code:,}" if result.code_counted else "no --code"
    table.add_row("code", "", "", "", code)
    table.add_row("total", "", "", "", f"{result.bytes_total:,}")
    table.add_row("limit", "", "", "", f"{result.limit_bytes:,}")
    return table


def stream_cells(stream: StreamSize) -> tuple[str, ...]:
    ratio, entropy = stream.entropy_ratio, f"{stream.entropy_bytes:,.0f}" if stream.entropy_bytes else ""
    return (
        f"{stream.elements:,}", entropy, f"{stream.compressed_bytes:,}", "" if ratio is None else f"{ratio:.4f}",
        f"{stream.bits_per_element:.3f}", f"{stream.encode_seconds:.1f}", f"{stream.decode_seconds:.1f}",
    )  # fmt: skip


def print_result(result: PackResult) -> None:
    console = Console()
    console.width = max(console.width, WIDTH_OF_TABLE)
    console.print(size_table(result))
    if result.val_bpb:
        before, after = result.val_bpb
        console.print(f"{after:.4f} bits per byte; {before:.4f} before, in plain rows")
    if result.fit:
        console.print(*result.fit["fit_actions"], sep="; ")
        return
    zeroed, changed = sum(r.zeroed for r in result.pruned), sum(r.codes_changed for r in result.pruned)
    weights = sum(report.weights for report in result.pruned)
    console.print(f"pruning set {zeroed:,} of {weights:,} weights to zero; {changed:,} codes changed by it")


def work(options: Options) -> int:
    result = pack(options)
    if options.json:
        print(json.dumps(result_dict(result)))
    else:
        print_result(result)
    if result.fits:
        return 0
    over = result.bytes_total - result.limit_bytes
    print(f"pack_artifact: over the limit by {over:,} bytes; {options.out} was not written", file=sys.stderr)
    return EXIT_FINDINGS


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
