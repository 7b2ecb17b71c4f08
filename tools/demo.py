"""Shows models side by side on a local page: one prompt, one seed, the text and figures of each; a tab of pictures.

    python tools/demo.py ARTIFACT [ARTIFACT ...] [--tokenizer FILE] [--pictures FOLDER ...] [--prompt TEXT] [--port N]
        [--open] [--json]

Needs gradio (pip install -r requirements-demo.txt). The page is served to this machine alone and asks nothing of any
other. An artifact that can't be opened becomes a message in its column. Ctrl-C ends it.
Exit status: 0 ended, 2 bad input, or no artifact that can be opened.
"""

import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.config import Config, check_config
from golf.config.run import RunConfig
from golf.runtime import Log, start_runtime
from lab.cli import ToolOptions, run_command
from lab.demo.answers import Column, DemoError, Picture, find_pictures, open_columns
from lab.demo.page import build_page, choose_port, close_page, import_gradio, launch_page
from lab.generate.sampling import SamplingOptions

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    artifacts: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Artifacts, a column for each."""
    tokenizer: Path | None = None
    """Tokenizer of all of them; default: each run's."""
    pictures: tuple[Path, ...] = ()
    """Folders with pictures to show beside the rate curves."""
    prompt: str = "Once upon a time"
    """The prompt that the page shows at first; so are the next five."""
    tokens: int = 120
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    port: int = 0
    """0: one that is free."""
    open: bool = False
    """Open the page in the browser."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    threads: int = 0
    """CPU threads; 0: torch's own choice."""


def announce(address: str, columns: Sequence[Column], pictures: Sequence[Picture], as_json: bool) -> None:
    if as_json:
        models = [{"title": c.title, "artifact": c.source, "problem": c.problem} for c in columns]
        record = {"address": address, "models": models, "pictures": [str(picture.path) for picture in pictures]}
        print(json.dumps(record), flush=True)
        return
    for column in columns:
        print(f"{column.title}: {column.problem or 'open'}")
    print(f"{address}  (Ctrl-C ends it)", flush=True)


def wait_for_interrupt() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def work(options: Options) -> int:
    if not options.artifacts:
        raise DemoError("no artifact is named: give one or more, a run's is model.golf in its folder")
    sampling = SamplingOptions(
        tokens=options.tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seed=options.seed,
    )  # fmt: skip
    port = choose_port(options.port)
    run_config = RunConfig(device=options.device, threads=options.threads, compile="off")
    check_config(Config(run=run_config))
    with start_runtime(run_config, "demo", Log(sys.stderr)) as runtime:
        columns = open_columns(options.artifacts, options.tokenizer, runtime)
        pictures = find_pictures(options.artifacts, options.pictures, REPOSITORY)
        gradio = import_gradio()
        page = build_page(gradio, columns, pictures, options.prompt, sampling)
        announce(launch_page(gradio, page, pictures, port, options.open), columns, pictures, options.json)
        wait_for_interrupt()
        close_page(page)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
