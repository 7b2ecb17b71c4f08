"""Make one self-contained script from train_gpt.py and the golf modules that it needs.

python tools/bundle.py [--entry train_gpt.py] [--out submission/train_gpt.py] [--pack] [--json]
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.runtime import write_file_atomically
from golf.submit.bundler import bundle_source
from golf.submit.packer import minify_source, pack_source
from golf.submit.parts import BundleError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class BundleCommand:
    """Make one self-contained script from an entry script and the golf modules that it needs."""

    entry: Path = REPOSITORY / "train_gpt.py"
    """Script to bundle; it must lie in the repository."""
    out: Path = REPOSITORY / "submission" / "train_gpt.py"
    """File to write."""
    pack: bool = False
    """Write the self-extracting form (minified, lzma, base85) and not the readable one."""
    readable_out: Path | None = None
    """File for the readable form, beside `out`."""
    sizes: bool = True
    """Measure all three forms, for which the script is packed even where the readable form is asked for."""
    json: bool = False
    """Print one JSON object and no table."""


def write_bundle(command: BundleCommand) -> dict[str, int | str]:
    """Write the script; the sizes of its three forms, and what was written. Raises BundleError, OSError."""
    readable = bundle_source(command.entry, REPOSITORY)
    packed = pack_source(readable) if command.pack or command.sizes else None
    written = packed if command.pack else readable
    command.out.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(command.out, written)
    if command.readable_out:
        write_file_atomically(command.readable_out, readable)
    sizes = {"readable": readable, "minified": minify_source(readable), "packed": packed} if command.sizes else {}
    return {
        "out": str(command.out),
        "form": "packed" if command.pack else "readable",
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


def main() -> int:
    command = tyro.cli(BundleCommand)
    try:
        report = write_bundle(command)
    except (BundleError, OSError) as error:
        print(f"bundle.py: {error}", file=sys.stderr)
        return 2
    if command.json:
        print(json.dumps(report))
    else:
        print_bundle(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
