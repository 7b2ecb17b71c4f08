"""Measures the zero-shot accuracy of an artifact on HellaSwag or BoolQ, from a local file.

    python tools/evals.py --task hellaswag|boolq --data FILE.jsonl --artifact FILE | --run RUN [--tokenizer FILE]
        [--limit N] [--backend auto|own|lm-eval]

FILE is hellaswag_val.jsonl (github.com/rowanz/hellaswag) or BoolQ's dev.jsonl
(github.com/google-research-datasets/boolean-questions); SuperGLUE's val.jsonl will do. The accuracy comes with its
standard error, beside what guessing would give. Exit status: 0 evaluated, 2 bad input.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from golf.runtime import Log, ProgressLine, start_runtime
from lab.cli import DeviceOptions, run_command
from lab.evals.lm_eval_backend import has_lm_eval, score_by_lm_eval
from lab.evals.zero_shot import (
    ZeroShotError,
    ZeroShotResult,
    load_items,
    score_items,
    zero_shot_remarks,
)
from lab.generate.text_model import TextModel, open_text_model


@dataclass(frozen=True)
class Options(DeviceOptions):
    task: Literal["hellaswag", "boolq"]
    data: Path
    """Items with their answers, one JSON object a line."""
    artifact: Path | None = None
    """The artifact to ask; or give --run."""
    run: Path | None = None
    """Folder of a run that has an artifact."""
    tokenizer: Path | None = None
    """Default: that of the run, whose folder the artifact may lie in."""
    limit: int = 0
    """Ask the first items only, this many; 0: all."""
    backend: Literal["auto", "own", "lm-eval"] = "auto"
    """auto: lm-eval where it is installed, else our own scorer."""


def progress_of(items: int) -> Callable[[int], None]:
    """Shows how many of the items are done: one line that updates on a terminal, ten lines in a file."""
    line, tenths = ProgressLine(shown=True), [0]

    def advance(done: int) -> None:
        if line.shown:
            line.update(f"{done:,} of {items:,} items")
            if done == items:
                line.clear()
        elif 10 * done // items > tenths[0]:
            tenths[0] = 10 * done // items
            print(f"evals: {done:,} of {items:,} items", file=sys.stderr, flush=True)

    return advance


def evaluate(options: Options) -> tuple[TextModel, ZeroShotResult, str]:
    """Returns the model, its result, and the SHA-256 of the data. Raises UserError, OSError."""
    if bool(options.artifact) == bool(options.run):
        raise ZeroShotError("give either --artifact FILE or --run FOLDER")
    run_config = options.run_config()
    items, sha256 = load_items(options.task, options.data, options.limit)
    with start_runtime(run_config, "evals", Log(sys.stderr)) as runtime:
        model = open_text_model(options.artifact or options.run, options.tokenizer, runtime)
        advance = progress_of(len(items))
        if options.backend == "lm-eval" or (options.backend == "auto" and has_lm_eval()):
            return model, score_by_lm_eval(model, options.task, options.data, items, advance), sha256
        return model, score_items(model, options.task, items, advance), sha256


def print_result(model: TextModel, result: ZeroShotResult) -> None:
    table = Table("measure", "value", title=f"{result.task}, {model.name}, by {result.backend}")
    table.columns[1].justify = "right"
    table.add_row("accuracy", f"{result.accuracy:.2%} +- {result.standard_error:.2%}")
    unnormalised = f"{result.accuracy_unnormalised:.2%} +- {result.standard_error_unnormalised:.2%}"
    table.add_row("without normalisation", unnormalised)
    table.add_row("chance", f"{result.chance:.2%}")
    table.add_row("items", f"{result.items:,}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    console = Console(markup=False)
    console.print(table)
    for line in (result.verdict, *zero_shot_remarks(result, model.context)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def work(options: Options) -> int:
    model, result, data_sha256 = evaluate(options)
    if not options.json:
        print_result(model, result)
        return 0
    errors = {name: getattr(result, name) for name in ("standard_error", "standard_error_unnormalised", "verdict")}
    described = {"model": model.name, "artifact_bytes": model.artifact_bytes, "data_sha256": data_sha256}
    remarks = {"remarks": zero_shot_remarks(result, model.context)}
    print(json.dumps(described | asdict(result) | errors | remarks, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
