"""Make one self-contained script from train_gpt.py and the golf modules that it needs.

python tools/bundle.py --preset NAME [--knobs key=value ...] [--out submission/train_gpt.py] [--pack] [--json]

What the configuration can't reach is left out, and the script then takes no other; without --preset all of it is kept.

Exit status: 0 written, 2 bad input (nothing is written).
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.config import build_config
from golf.config.knobs import ConfigError
from golf.run.command import parse_overrides
from golf.runtime import write_file_atomically
from lab.bundle.bundler import bundle_source
from lab.bundle.frozen import freeze_config, run_config
from lab.bundle.packer import pack_source, unpack_source
from lab.bundle.specialize import Frozen
from lab.cli import ToolOptions, read_json_object, run_command

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    entry: Path = REPOSITORY / "train_gpt.py"
    """Script to bundle; it must lie in the repository."""
    out: Path = REPOSITORY / "submission" / "train_gpt.py"
    """File to write."""
    pack: bool = False
    """Write the self-extracting form (minified, lzma) and not the readable one."""
    preset: str = ""
    """Leave out what this preset, with --knobs, does not use."""
    knobs: tuple[str, ...] = ()
    """key=value changes to the preset."""
    run_config: Path | None = None
    """Leave out what the configuration in this config.json of a run does not use."""
    readable_out: Path | None = None
    """File for the readable form, beside `out`."""
    no_sizes: bool = False
    """Do not measure the forms that are not asked for (it takes seconds to pack the script)."""


def chosen_config(options: Options) -> Frozen | None:
    """Returns the configuration to specialise for. Raises ConfigError."""
    if options.run_config:
        return freeze_config(run_config(read_json_object(options.run_config, ConfigError)))
    if not options.preset:
        return None
    return freeze_config(build_config(options.preset, {}, parse_overrides(options.knobs)))


def write_bundle(options: Options) -> dict[str, int | str]:
    """Writes the script; returns the sizes of its three forms, and what was written. Raises BundleError, OSError."""
    readable = bundle_source(options.entry, REPOSITORY, chosen_config(options))
    packed = None if options.no_sizes and not options.pack else pack_source(readable)
    written = packed if options.pack else readable.encode()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(options.out, written)
    if options.readable_out:
        write_file_atomically(options.readable_out, readable)
    sizes = {}
    if not options.no_sizes:
        sizes = {"readable": readable.encode(), "minified": unpack_source(packed).encode(), "packed": packed}
    return {
        "out": str(options.out),
        "form": "packed" if options.pack else "readable",
        **{f"bytes_{form}": len(text) for form, text in sizes.items()},
        "bytes_code": len(written),
        "sha256": hashlib.sha256(written).hexdigest(),
    }


def print_bundle(report: dict[str, int | str]) -> None:
    table = Table("form", "bytes", title=f"{report['out']} ({report['form']})", title_justify="left")
    table.columns[1].justify = "right"
    for form in ("readable", "minified", "packed", "code"):
        if f"bytes_{form}" in report:
            table.add_row(form, f"{report[f'bytes_{form}']:,}")
    Console(markup=False).print(table)


def work(options: Options) -> int:
    report = write_bundle(options)
    if options.json:
        print(json.dumps(report))
    else:
        print_bundle(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
