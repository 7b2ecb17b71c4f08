"""Shows a finished run: a short table on the terminal, and pictures of its loss and its bytes in its folder.

python tools/report.py runs/RUN_ID [--json]      (or --last, the newest run with a result)

Exit status: 0 shown, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.run.folder import RunFolder
from lab.cli import ToolOptions, run_command
from lab.probe.data_probes import ProbeError, read_run_record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
KEY_FIGURES = ("run_id", "valid", "findings", "val_bpb", "val_loss", "val_tokens", "val_bytes", "val_docs", "params")
KEY_FIGURES += ("steps", "train_seconds", "train_tokens", "eval_seconds", "eval_tokens_per_second")
KEY_FIGURES += ("bytes_code", "bytes_model", "bytes_total", "limit_bytes")


@dataclass(frozen=True)
class Options(ToolOptions):
    run: Annotated[str, tyro.conf.Positional] = ""
    """Folder of the run."""
    last: bool = False
    """Take the newest run with a result under `root`."""
    root: str = "runs"


def find_run(options: Options) -> RunFolder:
    if options.run:
        folder = RunFolder(Path(options.run))
        if not folder.result.exists():
            raise ProbeError(f"{folder.result} is missing: the run has not been scored")
        return folder
    results = sorted(Path(options.root).glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    if not options.last or not results:
        raise ProbeError(f"no finished run found under {options.root}: name a run folder")
    return RunFolder(results[-1].parent)


def load_steps(folder: RunFolder) -> list[dict[str, float]]:
    """Returns the rows of the steps that metrics.jsonl has. Raises ProbeError."""
    try:
        rows = [row for row in folder.metrics_rows() if {"elapsed", "train_loss", "lr_scale"} <= row.keys()]
    except (ValueError, AttributeError):
        raise ProbeError(f"{folder.metrics}: damaged, a line of it is no JSON object: run again") from None
    if not rows:
        raise ProbeError(f"{folder.metrics} has no step: there is no loss to draw")
    return rows


def print_table(result: dict, console: Console) -> None:
    table = Table(title=f"{result['run_id']}  ({'valid' if result['valid'] else 'INVALID'})", title_justify="left")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for label, value in (
        ("val_bpb, from the artifact's bytes", f"{result['val_bpb']:.4f}"),
        ("val_loss, nats per token", f"{result['val_loss']:.4f}"),
        ("validation tokens", f"{result['val_tokens']:,}"),
        ("validation bytes in documents", f"{result['val_bytes']:,} in {result['val_docs']:,}"),
        ("parameters", f"{result['params']:,}"),
        ("steps in seconds", f"{result['steps']:,} in {result['train_seconds']:.1f}"),
        ("training tokens per second", f"{result['train_tokens'] / result['train_seconds']:,.0f}"),
        ("scoring seconds", f"{result['eval_seconds']:.1f}"),
        ("scoring window tokens per second", f"{result['eval_tokens_per_second']:,.0f}"),
        ("bytes: code + model", f"{result['bytes_code']:,} + {result['bytes_model']:,}"),
        ("bytes of the limit", f"{result['bytes_total']:,} of {result['limit_bytes']:,}"),
    ):  # fmt: skip
        table.add_row(label, value)
    console.print(table)
    for finding in result["findings"]:
        console.print(f"[red]INVALID:[/red] {escape(finding)}")


def draw_loss(folder: RunFolder, steps: list[dict[str, float]], result: dict) -> Path:
    """Draws the training loss of every step against seconds, and its running mean."""
    seconds = [step["elapsed"] for step in steps]
    losses = [step["train_loss"] for step in steps]
    mean, smooth = losses[0], []
    for loss in losses:
        mean += 0.05 * (loss - mean)
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(seconds, losses, color=GREY, linewidth=0.6, label="each step")
    axes.plot(seconds, smooth, color=BLUE, linewidth=1.8, label="running mean")
    rates = axes.twinx()
    rates.plot(seconds, [step["lr_scale"] for step in steps], color=ORANGE, linewidth=1.2)
    rates.set_ylabel("learning-rate scale", color=ORANGE)
    rates.set_ylim(0, 1.05)
    axes.set_ylim(min(smooth) - 0.3, min(max(losses), min(smooth) + 3))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title(
        f"{result['run_id']}: val_bpb {result['val_bpb']:.4f} from {result['bytes_total']:,} bytes", loc="left"
    )
    axes.legend(frameon=False)
    return save_figure(figure, folder.path / "loss.png")


def stream_name(stream: dict) -> str:
    return stream["label"] if stream["role"] == stream["label"] else f"{stream['label']} {stream['role']}"


def draw_bytes(folder: RunFolder, result: dict) -> Path:
    """Draws the compressed bytes of every tensor class, and the code, against the limit."""
    streams = [stream for stream in result["sizes"]["streams"] if stream["elements"]]
    names = [*(stream_name(stream) for stream in streams), "header", "code"]
    sizes = [
        *(stream["compressed_bytes"] for stream in streams),
        result["sizes"]["overhead_bytes"],
        result["bytes_code"],
    ]
    labels = [*(f"{stream['bits_per_element']:.2f} bits each" for stream in streams), "", ""]
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(names) + 1.4), constrained_layout=True)
    bars = axes.barh(names, sizes, color=[BLUE] * len(streams) + [ORANGE] * 2)
    axes.bar_label(bars, [f"{size:,}  {label}" for size, label in zip(sizes, labels, strict=True)], padding=4)
    axes.set_xlim(0, 1.45 * max(sizes))
    axes.invert_yaxis()
    axes.set_xlabel("bytes")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{result['bytes_total']:,} of {result['limit_bytes']:,} bytes", loc="left")
    return save_figure(figure, folder.path / "bytes.png")


def save_figure(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def work(options: Options) -> int:
    folder = find_run(options)
    result: dict[str, Any] = read_run_record(folder.result, (*KEY_FIGURES, "sizes"))
    steps = load_steps(folder)
    if not options.json:
        print_table(result, Console())
    pictures = [str(draw_loss(folder, steps, result)), str(draw_bytes(folder, result))]
    if options.json:
        print(json.dumps({key: result[key] for key in KEY_FIGURES} | {"pictures": pictures}))
    else:
        print("\n".join(pictures))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
