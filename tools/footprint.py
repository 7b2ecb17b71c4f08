"""Counts what a trained model costs: bytes by component, keys and values of a text, and an estimate of the energy of a
token.

    python tools/footprint.py RUN [--memory-mb 64] [--json]

RUN is a finished run's folder. Bytes are those of the artifact as it is, and of its matrices packed alone the same
way; keys and values are counted at every setting of their quantizers; the energy is an estimate by operations, with
the zeros of the stored codes skipped or not, and its assumptions are printed. Exit status: 0 printed, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from golf.artifact.container import Artifact, read_artifact
from golf.config.config import Config
from golf.config.knobs import UserError
from golf.quant.grid import QuantizedTensor
from golf.run.folder import RunFolder
from lab.cli import ToolOptions, run_command
from lab.cost.energy import energy_estimate, measured_zero_shares
from lab.cost.kv_bytes import kv_table
from lab.study.measures import matrix_bytes


class FootprintError(UserError):
    """A run that has nothing to weigh."""


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of a finished run."""
    memory_mb: float = 64.0
    """MiB for keys and values: the longest text that they hold is told."""


def weigh(artifact: Artifact, size: int, config: Config, memory_bytes: int) -> dict[str, Any]:
    """Returns all figures, plain. Raises UserError."""
    energy = energy_estimate(artifact.model, config.quant, measured_zero_shares(artifact.state))
    weights = {
        name: entry.codes_RC.numel() if isinstance(entry, QuantizedTensor) else entry.numel()
        for name, entry in artifact.state.items()
    }
    quantized = sum(weights[name] for name, entry in artifact.state.items() if isinstance(entry, QuantizedTensor))
    return {
        "bytes": size,
        "bytes_matrices": matrix_bytes(artifact.state, config.quant.codec),
        "parameters": sum(weights.values()),
        "quantized_parameters": quantized,
        "energy": {
            process: {"uj": energy.microjoules(process), "uj_zeros_skipped": energy.microjoules(process, True),
                      "uj_in_floats": energy.float_microjoules(process), "head_share": energy.head_share(process)}
            for process in ("7nm", "45nm")
        },
        "energy_lines": energy.summary(),
        "keys_and_values": [
            {"act_k": row.act_k, "act_v": row.act_v, "bytes_per_token": row.bytes.per_token, "gain": row.gain,
             "longest_text": row.longest_text}
            for row in kv_table(artifact.model, memory_bytes=memory_bytes)
        ],
    }  # fmt: skip


def print_footprint(found: dict[str, Any], memory_mb: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    share = found["quantized_parameters"] / found["parameters"]
    print(f"{found['parameters']:,} parameters, {share:.1%} of them on a grid")
    print(
        f"{found['bytes']:,} bytes in all; {found['bytes_matrices']:,} the blocks' matrices alone, packed the same way"
    )
    table = Table(title="keys and values, scales in fp32", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("keys", "values", "bytes/token", "gain", f"tokens in {memory_mb:g} MiB"):
        table.add_column(heading, justify="left" if heading in ("keys", "values") else "right")
    for row in found["keys_and_values"]:
        longest = "any number" if row["longest_text"] is None else f"{row['longest_text']:,}"
        cells = (row["act_k"] or "16 bits", row["act_v"] or "16 bits", f"{row['bytes_per_token']:,}")
        table.add_row(*cells, f"{row['gain']:.2f}", longest)
    console.print(table)
    print("energy of a token's forward pass (estimate):", *found["energy_lines"], sep="\n- ")


def work(options: Options) -> int:
    folder = RunFolder(options.run)
    if not folder.artifact.is_file():
        raise FootprintError(f"{options.run}: there is no {folder.artifact.name}: name the folder of a finished run")
    if options.memory_mb <= 0:
        raise FootprintError(f"--memory-mb {options.memory_mb:g}: give a positive number")
    artifact, config = read_artifact(folder.artifact), folder.load_config()
    found = weigh(artifact, folder.artifact.stat().st_size, config, int(options.memory_mb * 2**20))
    if options.json:
        print(json.dumps({"run": options.run.name} | found))
    else:
        print_footprint(found, options.memory_mb)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
