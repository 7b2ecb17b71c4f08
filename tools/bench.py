"""Measures how fast this machine trains, scores, packs and unpacks a preset's model.

    python tools/bench.py --preset local [--device cuda] [--json] [key=value ...]
    python tools/bench.py --loader
    python tools/bench.py --coders [--weights FILE.safetensors] [--share 1]
    python tools/bench.py --ternary
    python tools/bench.py --fit 36
    python tools/bench.py --data [--text SOURCE] [--tokenizer MODEL] [--megabytes 10 100] [--workers 2]

Training is timed at the preset's batch and length, scoring at its window and stride, both on random tokens; every
figure is a median. With --coders: what every codec makes of the same codes. With --ternary: a
product with ternary weights by additions alone, beside torch's. With --fit: what each part of fitting so many million
synthetic weights to a byte limit takes, on one thread. With --loader: how long a step waits for
its batch, in every order. With --data: how fast data/prepare.py turns text into shards, against one bare SentencePiece
thread in the same run. Run it on a quiet machine: two busy processes on two cores tell nothing.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.artifact.container import pack_artifact, read_artifact
from golf.artifact.weights import load_weights
from golf.config.config import Config, build_config
from golf.config.knobs import ConfigError
from golf.config.quantization import CODECS
from golf.config.run import DataConfig
from golf.data.shards import DataError, write_shard
from golf.model.gpt import GPT
from golf.quant.export import quantize_state
from golf.run.command import parse_overrides
from golf.run.log_lines import machine_description
from golf.runtime import Log, Runtime, start_runtime
from golf.score.scorer import compiled_losses, score_stream, sliding_settings
from lab.bench.coder_bench import bench_coders, gptq_like_codes
from lab.bench.data_bench import bench_data, bench_loader
from lab.bench.fit_bench import bench_fit, frontier_shapes
from lab.bench.forward_timer import ForwardTimer
from lab.bench.ternary_product import bench_ternary
from lab.cli import ToolOptions, run_command
from lab.machine.step_times import random_tokens, time_steps
from lab.prepare.readers import iter_documents
from lab.prepare.vocabulary import train_competition_tokenizer

REPETITIONS = 3
SCORED_BATCHES = 8
LOADER_TOKENS = 50_000_000


@dataclass(frozen=True)
class Options(ToolOptions):
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Knobs as key=value."""
    preset: str = "local"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    steps: int = 10
    """Training steps to time, after the preset's warm-up."""
    data: bool = False
    """Time the preparation of data instead."""
    text: str = "embedded"
    """With --data: what data/prepare.py takes as --input."""
    tokenizer: Path | None = None
    """With --data: a SentencePiece model; by default one of 1,024 pieces is trained on the text."""
    megabytes: tuple[int, ...] = (10, 100)
    """With --data: amounts of text, 10^6 bytes each."""
    loader: bool = False
    """Time how long a step waits for its batch instead."""
    coders: bool = False
    """Time every codec on the same codes instead."""
    ternary: bool = False
    """Time products with ternary weights, 512 x 512, instead."""
    fit: float = 0.0
    """Fit so many million synthetic weights of the frontier's shapes to a limit instead."""
    weights: Path | None = None
    """With --coders: weights.safetensors of a run, quantized as it was configured; default: random codes."""
    share: float = 0.1
    """With --coders and no weights: of 36 million random codes."""
    workers: int = 2
    """With --data: processes that encode."""


class OneBytePerToken:
    """Stands in for a tokenizer's byte table: random tokens spell no text."""

    def to(self, device: torch.device) -> "OneBytePerToken":
        return self

    def count(self, previous_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(targets_N)


def bench_training(config: Config, runtime: Runtime, steps: int) -> tuple[GPT, dict[str, float]]:
    """Returns the trained model, and tokens per second of the median step, over all ranks."""
    model, step_seconds, _ = time_steps(config, runtime, steps)
    median = statistics.median(step_seconds)
    figures = {"train_step_ms": 1000 * median, "train_tokens_per_s": config.train.train_batch_tokens / median}
    if runtime.device.type == "cuda":
        figures["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return model, figures


def bench_scoring(model: GPT, config: Config, runtime: Runtime) -> dict[str, float]:
    """Measures window tokens per second through the sliding scorer, and the share of its time in the forward pass."""
    settings = sliding_settings(config.score, config.model)
    windows = SCORED_BATCHES * settings.batch_seqs * runtime.world_size
    tokens_N = random_tokens(settings.seq_len + windows * settings.stride, config)
    forward = compiled_losses(model) if runtime.compiles_scoring else model.token_losses
    speeds, shares = [], []
    for _ in range(REPETITIONS + 1):
        timer = ForwardTimer(runtime.device)
        timed = timer.timing(forward)
        score = score_stream(model, tokens_N, OneBytePerToken(), settings, runtime, forward=timed, announce=False)
        speeds.append(score.window_tokens / score.seconds)
        shares.append(timer.seconds() / score.seconds)
    return {
        "score_tokens_per_s": statistics.median(speeds[1:]),
        "score_forward_share": statistics.median(shares[1:]),
    }


def bench_packing(model: GPT, config: Config) -> dict[str, float]:
    """Measures megabytes of stored codes and halves per second, to the artifact's bytes and back."""
    stored = quantize_state(model.state_dict(), config.quant)
    data, report = pack_artifact(stored, config.model, "0" * 64, config.quant.codec)
    megabytes = sum(stream.raw_bytes for stream in report.streams) / 1e6
    pack_seconds = median_seconds(lambda: pack_artifact(stored, config.model, "0" * 64, config.quant.codec))
    unpack_seconds = median_seconds(lambda: read_artifact(data))
    return {
        "artifact_bytes": len(data),
        "pack_seconds": pack_seconds,
        "pack_mb_per_s": megabytes / pack_seconds,
        "unpack_mb_per_s": megabytes / unpack_seconds,
    }


def median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def work_on_data(options: Options) -> int:
    if not options.megabytes or min(options.megabytes) < 1 or options.workers < 1:
        raise DataError("--megabytes and --workers must be 1 or more")
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), options.tokenizer
        if model is None:
            model = folder / "trained.model"
            model.write_bytes(train_competition_tokenizer(iter_documents(options.text), 1024))
        program = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
        figures = bench_data(program, options.text, model, options.megabytes, options.workers, folder)
    if options.json:
        print(json.dumps({"text": options.text, "workers": options.workers} | figures))
    else:
        print_table(f"{options.text} into shards, {options.workers} workers", figures)
    return 0


def work_on_coders(options: Options) -> int:
    if not 0 < options.share <= 1:
        raise ConfigError(f"--share {options.share:g} must be above 0, at most 1")
    if options.weights:
        saved = load_weights(options.weights)
        stored = quantize_state(saved.state, saved.quant)
    else:
        stored = gptq_like_codes(options.share)
    figures = bench_coders(stored, get_args(CODECS))
    if options.json:
        print(json.dumps(figures))
        return 0
    table = Table("codec", *next(iter(figures.values())), title=str(options.weights or "random codes"))
    for codec, values in figures.items():
        table.add_row(codec, *(f"{value:,.4f}" if value < 100 else f"{value:,.0f}" for value in values.values()))
    Console().print(table)
    return 0


def work_on_ternary(options: Options) -> int:
    """Times one token and many, in floats and in int8, on the CPU."""
    found = [bench_ternary(tokens=tokens, int8=int8) for tokens in (1, 16, 128) for int8 in (False, True)]
    if options.json:
        print(json.dumps([asdict(result) | {"verdict": result.verdict} for result in found]))
        return 0
    table = Table("tokens", "inputs", "matmul ms", "additions ms", "look-ups ms", title="ternary product")
    for result in found:
        times = (result.matmul_ms, result.additions_ms, result.lookups_ms)
        table.add_row(str(result.tokens), result.inputs, *(f"{value:,.3f}" for value in times))
    Console().print(table)
    print(*(f"{result.tokens} tokens, {result.inputs}: {result.verdict}" for result in found), sep="\n")
    return 0


def work_on_fit(options: Options) -> int:
    """Fits on one thread, so that seconds of CPU are those of a core."""
    torch.set_num_threads(1)
    figures = bench_fit(frontier_shapes(options.fit), lambda line: print(line, file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(figures))
    else:
        print_table(f"fit of {options.fit:g} million weights", figures)
    return 0


def work_on_loader(options: Options) -> int:
    """Times the loader on random documents of 800 tokens, in each order, at 10 million tokens a second."""
    with tempfile.TemporaryDirectory() as name:
        path, draw = Path(name) / "random_train_000000.bin", np.random.default_rng(0)
        tokens = draw.integers(4, 1024, LOADER_TOKENS, dtype=np.uint16)
        tokens[draw.random(LOADER_TOKENS) < 1 / 800] = tokens[0] = 1
        write_shard(path, tokens)
        orders = get_args(DataConfig.__annotations__["row_order"])
        figures = {order: bench_loader([path], order=order) for order in orders}
    if options.json:
        print(json.dumps(figures))
        return 0
    table = Table(
        "measure", *figures, title="loader, 786,432 tokens a step at 10 million a second", title_justify="left"
    )
    for measure in next(iter(figures.values())):
        table.add_row(measure, *(f"{values[measure]:,.4g}" for values in figures.values()))
    Console().print(table)
    return 0


def work(options: Options) -> int:
    if options.data:
        return work_on_data(options)
    if options.loader:
        return work_on_loader(options)
    if options.coders:
        return work_on_coders(options)
    if options.fit:
        return work_on_fit(options)
    if options.ternary:
        return work_on_ternary(options)
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: it takes at least one step to time")
    overrides = parse_overrides(options.overrides)
    config = build_config(options.preset, os.environ, {"device": options.device} | overrides)
    with start_runtime(config.run, "bench", Log(sys.stderr)) as runtime:
        model, figures = bench_training(config, runtime, options.steps)
        figures |= bench_scoring(model, config, runtime)
        figures["score_to_train_speed"] = figures["score_tokens_per_s"] / figures["train_tokens_per_s"]
        figures |= bench_packing(model, config) if runtime.is_main else {}
        machine = machine_description(runtime)
    if runtime.is_main and options.json:
        print(json.dumps({"preset": options.preset, "machine": machine} | figures))
    elif runtime.is_main:
        print_table(f"{options.preset} on {machine}", figures)
    return 0


def print_table(title: str, figures: dict[str, float]) -> None:
    table = Table("measure", "value", title=title, title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
