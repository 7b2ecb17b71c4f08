"""Make one self-contained script from train_gpt.py and the golf modules that it needs.

python tools/bundle.py [--entry train_gpt.py] [--out submission/train_gpt.py] [--pack] [--json]

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

from golf.runtime import write_file_atomically
from lab.bundle.bundler import bundle_source
from lab.bundle.packer import pack_source, unpack_source
from lab.cli import ToolOptions, run_command

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    entry: Path = REPOSITORY / "train_gpt.py"
    """Script to bundle; it must lie in the repository."""
    out: Path = REPOSITORY / "submission" / "train_gpt.py"
    """File to write."""
    pack: bool = False
    """Write the self-extracting form (minified, lzma, base85) and not the readable one."""
    readable_out: Path | None = None
    """File for the readable form, beside `out`."""
    no_sizes: bool = False
    """Do not measure the forms that are not asked for (it takes seconds to pack the script)."""


def write_bundle(options: Options) -> dict[str, int | str]:
    """Write the script; the sizes of its three forms, and what was written. Raises BundleError, OSError."""
    readable = bundle_source(options.entry, REPOSITORY)
    packed = None if options.no_sizes and not options.pack else pack_source(readable)
    written = packed if options.pack else readable
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(options.out, written)
    if options.readable_out:
        write_file_atomically(options.readable_out, readable)
    sizes = {} if options.no_sizes else {"readable": readable, "minified": unpack_source(packed), "packed": packed}
    return {
        "out": str(options.out),
        "form": "packed" if options.pack else "readable",
        **{f"bytes_{form}": len(text.encode()) for form, text in sizes.items()},
        "bytes_code": len(written.encode()),
        "sha256": hashlib.sha256(written.encode()).hexdigest(),
    }


def print_bundle(report: dict[str, int | str]) -> None:
    table = Table("form", "bytes", title=f"{report['out']} ({report['form']})", title_justify="left")
    table.columns[1].justify = "right"
    for form in ("readable", "minified", "packed", "code"):
        if f"bytes_{form}" in report:
            table.add_row(form, f"{report[f'bytes_{form}']:,}")
    Console().print(table)


def work(options: Options) -> int:
    report = write_bundle(options)
    if options.json:
        print(json.dumps(report))
    else:
        print_bundle(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
