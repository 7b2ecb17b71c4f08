"""Measures what each part of adaptive scoring brings on the artifacts of runs.

    python tools/adaptation.py RUN [RUN ...] [--targets N] [--picture FILE.png] [--json]

Rows: the network alone, with the published token-only tilt, with counts, with adapters of each document, with both. The
windows are those of the runs; knobs of parts that a run had off are the defaults, the rank of adapters is 8.
`--picture` draws the gains over the network's own score, with lines to `--wanted` bits per byte; it needs three runs.
`--rows FILE` adds what an earlier call printed with --json. Exit status: 0 measured, 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.artifact.container import read_artifact
from golf.config.presets import PRESETS
from golf.data.shards import expand_glob, find_shards
from golf.run.folder import RunFolder
from golf.runtime import Log, leave, start_runtime
from lab.cli import DeviceOptions, markdown_table, run_command
from lab.compare.adaptation import measure_parts, open_artifact
from lab.compare.gain_picture import draw_gains, read_rows
from lab.compare.statistics import StatisticsError


@dataclass(frozen=True)
class Options(DeviceOptions):
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs with an artifact."""
    val: str = ""
    """Pattern of other validation shards than a run's, quoted."""
    targets: int = 0
    """Only so many targets of the validation text; 0: all."""
    picture: Path | None = None
    """File for a picture of the gains, a .png."""
    wanted: float = 1.06
    """Bits per byte of the network to which the picture's lines go."""
    rows: tuple[Path, ...] = ()
    """Files of rows that were measured before."""


def work(options: Options) -> int:
    rows = [row for path in options.rows for row in read_rows(path)]
    if options.picture and len({row["run"] for row in rows} | {path.name for path in options.runs}) < 3:
        raise StatisticsError("--picture needs the rows of three runs at least: name more runs, or --rows FILE")
    with start_runtime(options.run_config(), "adaptation", Log(sys.stderr)) as runtime:
        for path in options.runs:
            folder = RunFolder(path)
            config, artifact = folder.load_config(), read_artifact(folder.artifact)
            score = replace(config.score, adapter_rank=config.score.adapter_rank or PRESETS["local"]["adapter_rank"])
            shards = expand_glob(options.val) if options.val else find_shards(config.data.data_path, "val")
            opened = open_artifact(artifact, config.data.tokenizer_path, shards, score, runtime, options.targets)
            rows += [{"run": path.name} | asdict(row) for row in measure_parts(opened)]
    if options.json:
        print(json.dumps(rows))
    else:
        cells = [(row["run"], row["what"], f"{row['val_bpb']:.4f}", f"{row['seconds']:.1f}") for row in rows]
        print(markdown_table(("run", "what", "bits per byte", "seconds"), cells, texts=2), end="")
    if options.picture:  # last, so that nothing that was measured is lost with it
        for way, (gain, low, high) in draw_gains(rows, options.wanted, options.picture).items():
            print(f"{way}: {gain:.4f} ({low:.4f} to {high:.4f}) at {options.wanted}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    leave(run_command(Options, __doc__, work))
