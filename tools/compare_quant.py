"""Compares quantized forms of one model with its fp32 weights, on the same tokens: loss, bytes, and what is noise.

    python tools/compare_quant.py --run runs/RUN_ID --methods fp32,fp16,naive8,rtn8,gptq8,rtn4,gptq4,gptq4-g64
        [--tokens N] [--val 'GLOB'] [--tokenizer FILE] [--out DIR] [--json]

rtnB and gptqB put every matrix on a grid of B bits (-gN: a step for N columns); naive8 is the small-GPT study's int8
by row, with the embedding left in fp16. Each form is packed, loaded back from its bytes and scored on all of the
validation tokens, or the first N. DIR gets compare_quant.json, .md and .png. Exit status: 0 compared, 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golf.config.quantization import CODECS
from golf.data.loader import TokenStream
from golf.quant.calibration import training_rows
from golf.runtime import Log, Runtime, start_runtime, write_file_atomically
from golf.score.scorer import ScoreSettings, sliding_settings
from lab.cli import DeviceOptions, run_command
from lab.rates.pictures import draw_variants
from lab.rates.quant_comparison import (
    ComparisonSubject,
    QuantComparison,
    QuantVariant,
    VariantResult,
    compare_variants,
    gptq_moments,
    parse_variants,
)
from lab.rates.trained_run import (
    TrainedRun,
    TrainedRunError,
    load_float_model,
    open_trained_run,
    scoring_config,
)


@dataclass(frozen=True)
class Options(DeviceOptions):
    run: Path
    """Folder of the run: weights.safetensors and config.json."""
    methods: str = "fp32,fp16,naive8,rtn8,gptq8,rtn6,gptq6,rtn5,gptq5,rtn4,gptq4,gptq4-g64,rtn3,gptq3"
    """Names with commas between them; fp32 is always there."""
    tokens: int = 0
    """Score the first targets of the validation stream, this many; 0: all."""
    val: str = ""
    """Pattern of the validation shards, quoted; default: the run's."""
    tokenizer: str = ""
    """Default: the run's."""
    calibration: str = ""
    """Pattern of the training shards that GPTQ calibrates on; default: the run's."""
    calibration_tokens: int = 65_536
    """Tokens to calibrate on, in rows of the training length from all over the shards."""
    codec: CODECS | None = None
    """Of the artifacts; default: what the run was configured with."""
    fp16_embedding: bool = False
    """Leave the token embedding in fp16 in all forms, as naive8 does."""
    block_tokens: int = -1
    """Targets of a block of the bootstrap; 0: a document is a block; -1: documents where there are 20, else rows."""
    alpha: float = 0.05
    """Chance that an interval misses the true difference."""
    seed: int = 0
    """Of the calibration rows and of the bootstrap."""
    window: int = 0
    """Tokens in a scoring window; 0: the training length."""
    stride: int = 0
    """Targets that a window scores; 0: the window, plain rows."""
    out: Path | None = None
    """Folder for the results; default: compare_quant in the folder of the run."""


def hessians_of(
    run: TrainedRun, variants: list[QuantVariant], options: Options, runtime: Runtime
) -> tuple[dict[str, Any], int]:
    """Returns (hessian_CC by name, tokens seen) where a variant asks for them."""
    if not any(variant.method == "gptq" for variant in variants):
        return {}, 0
    rows_NT = training_rows(
        TokenStream(run.train_paths), options.calibration_tokens, run.saved.model.train_seq_len, options.seed
    )
    return gptq_moments(load_float_model(run.saved, runtime), rows_NT, runtime, table=True), rows_NT.numel()


def compare(options: Options) -> tuple[TrainedRun, QuantComparison, dict[str, Any]]:
    """Returns the comparison, and how it was made. Raises UserError, OSError."""
    run_config = options.run_config()
    variants = parse_variants(options.methods, options.fp16_embedding)
    run = open_trained_run(options.run, options.val, options.tokenizer, options.calibration)
    if not 0 <= options.tokens < len(run.tokens_N) or options.tokens == 1:
        raise TrainedRunError(f"--tokens {options.tokens}: the stream has {len(run.tokens_N) - 1:,} targets; 0 is all")
    if options.block_tokens < -1:
        raise TrainedRunError(f"--block-tokens {options.block_tokens}: give a number of tokens, 0 or -1")
    with start_runtime(run_config, "compare", Log(sys.stderr)) as runtime:
        config = scoring_config(run.saved.model, options.window, options.stride, runtime.device.type)
        settings: ScoreSettings = sliding_settings(config, run.saved.model)
        hessians, calibration_tokens = hessians_of(run, variants, options, runtime)
        tokens_N1 = run.tokens_N[: options.tokens + 1] if options.tokens else run.tokens_N
        codec = options.codec or run.saved.quant.codec
        subject = ComparisonSubject(run, tokens_N1, settings, codec, hessians, runtime)
        block_tokens = None if options.block_tokens == -1 else options.block_tokens
        found = compare_variants(variants, subject, block_tokens, options.alpha, options.seed, print_progress)
    how = {
        "codec": codec, "calibration_tokens": calibration_tokens, "seed": options.seed,
        "window": settings.seq_len, "stride": settings.stride, "device": runtime.device.type,
        "fp16_embedding": options.fp16_embedding, "weights_sha256": run.weights_sha256,
        "tokenizer_sha256": run.saved.tokenizer_sha256, "val_data_id": run.val_data_id,
    }  # fmt: skip
    return run, found, how


def print_progress(result: VariantResult) -> None:
    print(f"{result.name}: {result.nll:.5f} nats per token, {result.bytes:,} bytes", file=sys.stderr, flush=True)


HEADINGS = ("method", "NLL", "perplexity", "bpb", "NLL - fp32", "interval", "verdict")
HEADINGS += ("bytes", "bits/weight", "make s", "score s")


def result_cells(result: VariantResult) -> list[str]:
    found = result.difference
    difference = f"{found.difference:+.6f}" if found else ""
    interval = f"{found.low:+.6f} .. {found.high:+.6f}" if found else ""
    perplexity = f"{result.perplexity:.4f}" if result.perplexity < 1e4 else f"{result.perplexity:.3g}"
    return [
        result.name, f"{result.nll:.5f}", perplexity, f"{result.bpb:.5f}", difference, interval,
        result.verdict, f"{result.bytes:,}", f"{result.bits_per_weight:.3f}",
        f"{result.quantize_seconds + result.pack_seconds:.1f}", f"{result.score_seconds:.1f}",
    ]  # fmt: skip


def remarks(found: QuantComparison, how: dict[str, Any]) -> list[str]:
    """Returns what the table leaves unsaid."""
    part = "all" if found.tokens == found.of_tokens else f"the first {found.tokens:,} of {found.of_tokens:,}"
    lines = [
        f"the same targets for every form: {part} of the validation stream ({found.tokens:,} tokens, "
        f"{found.bytes:,} bytes), windows of {how['window']} at stride {how['stride']}",
        f"NLL in nats per {found.token_unit}; perplexity per {found.token_unit}; bpb in bits per byte of text",
        f"interval: {100 * (1 - found.alpha):g} % of the paired difference, bootstrap over {found.blocks}; "
        "not resolved: it holds 0",
        f"bytes: the artifact as it is ({how['codec']}), fp32: the file of weights; no optimizer state in either",
    ]
    if how["calibration_tokens"]:
        lines.append(f"gptq: calibrated on {how['calibration_tokens']:,} training tokens through the fp32 weights")
    return lines


def markdown(run: str, found: QuantComparison, how: dict[str, Any]) -> str:
    """Returns the table and its remarks."""
    rows = [list(HEADINGS), ["---", *["---:"] * (len(HEADINGS) - 1)], *map(result_cells, found.results)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = "\n".join(f"- {line}" for line in remarks(found, how))
    return f"# Quantized forms of {run}\n\n{table}\n\n{notes}\n"


def print_table(run: str, found: QuantComparison, how: dict[str, Any]) -> None:
    table = Table(title=escape(f"quantized forms of {run}"), title_justify="left", box=SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("method", "verdict") else "right", no_wrap=True)
    for result in found.results:
        table.add_row(*map(escape, result_cells(result)))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for line in remarks(found, how):
        console.print(line, highlight=False, markup=False)


def work(options: Options) -> int:
    out = options.out or options.run / "compare_quant"
    if out.exists() and not out.is_dir():
        raise TrainedRunError(f"{out} is no folder: give another --out")
    run, found, how = compare(options)
    results = [asdict(result) | {"verdict": result.verdict} for result in found.results]
    content = {"run": run.path.name} | how | asdict(found) | {"results": results}
    out.mkdir(parents=True, exist_ok=True)
    write_file_atomically(out / "compare_quant.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_file_atomically(out / "compare_quant.md", markdown(run.path.name, found, how))
    draw_variants(found, run.path.name, out / "compare_quant.png")
    if options.json:
        print(json.dumps(content, allow_nan=False))
    else:
        print_table(run.path.name, found, how)
        print(*(out / f"compare_quant.{ending}" for ending in ("json", "md", "png")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
