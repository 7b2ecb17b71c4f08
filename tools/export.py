"""Writes a trained model in a form that other programs open.

    python tools/export.py RUN|ARTIFACT --out DIR [--format hf] [--tokenizer FILE]

hf: a folder for transformers, `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` and `AutoTokenizer`,
with the project's own forward pass and tokenizer as its code. Needs requirements-export.txt to be opened, not to be
written.

Exit status: 0 written, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from lab.cli import ToolOptions, run_command
from lab.export.transformers_folder import export_folder


@dataclass(frozen=True)
class Options(ToolOptions):
    source: tyro.conf.Positional[Path]
    """Folder of a run, or an artifact."""
    out: Path
    """The folder to make. It must not exist."""
    format: Literal["hf"] = "hf"
    tokenizer: Path | None = None
    """The artifact's tokenizer; that of its run where none is named."""


def work(options: Options) -> int:
    export_folder(options.source, options.tokenizer, options.out)
    files = {path.name: path.stat().st_size for path in sorted(options.out.iterdir())}
    if options.json:
        print(json.dumps({"out": str(options.out), "files": files}))
    else:
        print(f"{options.out}: " + ", ".join(f"{name} {size:,}" for name, size in files.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
