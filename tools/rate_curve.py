"""Measures val_bpb against real bytes: every method of making an artifact, at several rates, on the weights of one run.

    python tools/rate_curve.py --run runs/RUN_ID [--methods recipe,frontier,...] [--rates 1,2,3] [--val 'GLOB']
        [--tokenizer FILE] [--out DIR] [--resume] [--json]

Every point is packed into bytes, read back from them and scored by the scorer, and is kept in DIR/points as soon as it
is finished; DIR/rate_curve.json and DIR/rate_curve.png are made of them. Quantizers see training shards only.
Exit status: 0 measured, 2 bad input.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golf.config.scoring import ScoreConfig
from golf.data.loader import TokenStream
from golf.quant.calibration import training_rows
from golf.runtime import Log, Runtime, start_runtime, write_file_atomically
from lab.cli import DeviceOptions, run_command
from lab.rates.methods import METHODS, prepare_method_input
from lab.rates.pictures import draw_rate_curves
from lab.rates.rate_curve import (
    ANCHORS,
    MOST_EXCESS,
    STATED_EXCESSES,
    CurveSet,
    MethodCurve,
    build_curves,
    parse_methods,
    parse_rates,
)
from lab.rates.rate_difference import RateError
from lab.rates.rate_points import (
    UNQUANTIZED,
    PointStore,
    RateMethod,
    RatePoint,
    RateSubject,
    describe_machine,
    measure_rate_point,
    measure_unquantized,
    rate_subject,
)
from lab.rates.trained_run import TrainedRun, open_trained_run, scoring_config

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(DeviceOptions):
    run: Path
    """Folder of the run: weights.safetensors and config.json."""
    methods: str = ""
    """Names with commas between them; default: all methods that there are."""
    rates: str = ""
    """Rates with commas between them, for every method; default: each method's own."""
    val: str = ""
    """Pattern of the validation shards, quoted; default: the run's."""
    tokenizer: str = ""
    """Default: the run's."""
    calibration: str = ""
    """Pattern of the training shards to calibrate on; default: the run's."""
    calibration_tokens: int = 65_536
    """Tokens to calibrate on, in rows of the training length from all over the shards."""
    seed: int = 0
    """Of the choice of calibration rows."""
    window: int = 0
    """Tokens in a scoring window; 0: the training length."""
    stride: int = 0
    """Targets that a window scores; 0: the window, plain rows."""
    most_excess: float = MOST_EXCESS
    """Largest val_bpb above the unquantized weights that counts in a rate difference."""
    out: Path | None = None
    """Folder for points, table and picture; default: rate_curve in the folder of the run."""
    resume: bool = False
    """Go on in a folder that has points: what is there is kept and not measured again."""


def choose_out(options: Options) -> Path:
    """Returns the folder to write to. Raises RateError where it has points that nobody asked to keep."""
    out = options.out or options.run / "rate_curve"
    if out.exists() and not out.is_dir():
        raise RateError(f"{out} is no folder: give another --out")
    if not options.resume and out.exists() and any(out.iterdir()):
        raise RateError(f"{out} is not empty: add --resume to keep and use its points, or give another --out")
    return out


def measure_points(
    options: Options, run: TrainedRun, score: ScoreConfig, chosen: Mapping[str, tuple[float, ...]], runtime: Runtime
) -> tuple[list[RatePoint], RateSubject, dict[str, Any]]:
    """Returns all points, the unquantized first; what they have in common; the machine."""
    rows_NT = training_rows(
        TokenStream(run.train_paths), options.calibration_tokens, run.saved.model.train_seq_len, options.seed
    )
    out, subject = choose_out(options), rate_subject(run, rows_NT, score, runtime, REPOSITORY)
    machine, store = describe_machine(runtime, out, run.saved.model, score), PointStore(out / "points", subject)
    points, given = [], None
    wanted = [(UNQUANTIZED, 0.0), *((name, rate) for name, rates in chosen.items() for rate in rates)]
    for number, (name, rate) in enumerate(wanted, 1):
        point = store.load(name, rate)
        if point is None:
            if name == UNQUANTIZED:
                point = measure_unquantized(run, score, runtime, machine["machine_id"])
            else:
                given = prepare_method_input(run.saved, rows_NT, runtime) if given is None else given
                point = measure_rate_point(
                    METHODS[name], rate, given, run, score, runtime, machine["machine_id"], store.by_state
                )
            store.save(point)
        points.append(point)
        print(f"{number}/{len(wanted)} {point_line(point)}", file=sys.stderr, flush=True)
    calibration = {
        "tokens": rows_NT.numel(),
        "rows": len(rows_NT),
        "seed": options.seed,
        "shards": len(run.train_paths),
    }
    return points, subject, {"machine": machine, "calibration": calibration}


def point_line(point: RatePoint) -> str:
    seconds = point.quantize_seconds + point.encode_seconds + point.decode_seconds + point.score_seconds
    return f"{point.method} {point.rate:g}: {point.bytes:,} bytes, val_bpb {point.val_bpb:.5f}, {seconds:.1f} s"


def point_table(curves: CurveSet) -> Table:
    table = Table(title="points", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for heading in ("rate", "bytes", "bits/weight", "val_bpb", "excess", "quantize s", "pack s", "read s", "score s"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = curves.unquantized
    table.add_row(
        UNQUANTIZED, "", f"{base.bytes:,}", f"{base.bits_per_weight:.3f}", f"{base.val_bpb:.5f}", end_section=True
    )
    for curve in curves.methods:
        for point, excess in zip(curve.points, curve.excess_bpb, strict=True):
            seconds = (point.quantize_seconds, point.encode_seconds, point.decode_seconds, point.score_seconds)
            table.add_row(
                escape(curve.name), f"{point.rate:g}", f"{point.bytes:,}", f"{point.bits_per_weight:.3f}",
                f"{point.val_bpb:.5f}", f"{excess:+.5f}", *(f"{value:.2f}" for value in seconds),
            )  # fmt: skip
        table.add_section()
    return table


def difference_table(curves: CurveSet) -> Table:
    anchors = [name for name in ANCHORS if any(curve.name == name for curve in curves.methods)]
    table = Table(title="bytes at equal loss (Bjontegaard's rate difference)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for name in anchors:
        table.add_column(f"% against {name}", justify="right")
        table.add_column("over excesses", justify="right")
        table.add_column("by log(excess), %", justify="right")
    for curve in curves.methods:
        cells = [cell for name in anchors for cell in difference_cells(curve, name)]
        table.add_row(escape(curve.name), *cells)
    return table


def difference_cells(curve: MethodCurve, anchor: str) -> tuple[str, str, str]:
    found = curve.against[anchor]
    span = f"{found.span[0]:.4f} to {found.span[1]:.4f}" if found.span else "-"
    return shown_percent(found.percent), span, shown_percent(found.log_percent)


def shown_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def stated_table(curves: CurveSet) -> Table:
    table = Table(title="bytes at a stated excess of val_bpb", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for excess in STATED_EXCESSES:
        table.add_column(f"{excess:g}", justify="right")
    for curve in curves.methods:
        cells = []
        for stated in curve.stated:
            told = [f"{-percent:+.1f} % against {name}" for name, percent in stated.saved_percent.items()
                    if percent is not None and name != curve.name]  # fmt: skip
            cells.append("not reached" if stated.bytes is None else "\n".join([f"{stated.bytes:,}", *told]))
        table.add_row(escape(curve.name), *cells)
    return table


def print_curves(curves: CurveSet) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(point_table(curves), difference_table(curves), stated_table(curves))
    for line in curves.notes:
        console.print(line, highlight=False, markup=False)


def work(options: Options) -> int:
    run_config = options.run_config()
    chosen_methods = parse_methods(options.methods, METHODS)
    rates = parse_rates(options.rates) if options.rates else ()
    if not options.most_excess > 0:
        raise RateError(f"--most-excess {options.most_excess}: give a number of bits per byte above 0")
    out, run = choose_out(options), open_trained_run(options.run, options.val, options.tokenizer, options.calibration)
    chosen = {method.name: rates or method.rates for method in chosen_methods}
    with start_runtime(run_config, "rate", Log(sys.stderr)) as runtime:
        score = scoring_config(run.saved.model, options.window, options.stride, runtime.device.type)
        points, subject, record = measure_points(options, run, score, chosen, runtime)
    curves = build_curves(chosen_methods, points, points[0], options.most_excess)
    content = (
        {"run": run.path.name}
        | subject_dict(run, subject)
        | record
        | {"most_excess": options.most_excess}
        | asdict(curves)
    )
    write_results(out, content, curves, chosen_methods)
    if options.json:
        print(json.dumps(content, allow_nan=False))
    else:
        print_curves(curves)
        print(out / "rate_curve.json", out / "rate_curve.png", sep="\n")
    return 0


def subject_dict(run: TrainedRun, subject: RateSubject) -> dict[str, Any]:
    model = run.saved.model
    shape = {"layers": model.num_layers, "width": model.model_dim, "vocabulary": model.vocab_size}
    weights = sum(tensor.numel() for tensor in run.saved.state.values())
    return {"model": shape, "weights": weights, "val_tokens": len(run.tokens_N) - 1, "subject": asdict(subject)}


def write_results(out: Path, content: dict[str, Any], curves: CurveSet, methods: list[RateMethod]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_file_atomically(out / "rate_curve.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    title = f"{content['run']}: {content['weights']:,} weights, {content['val_tokens']:,} tokens scored"
    draw_rate_curves(curves, title, out / "rate_curve.png")


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
