"""Does one run of a study: a training, or the quantization of another run's weights.

    python tools/ablation_run.py --spec spec.json --out FOLDER

spec.json (tools/ablate.py writes them: DIR/runs/KEY/spec.json) says all that decides about the run. FOLDER gets
result.json, last of all files, curve.jsonl (losses and codes by step), blocks.json (nats of the validation stream's
blocks) and model.golf. Exit status: 0 finished, 1 failed (result.json says how), 2 bad input, 5 the machine.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_BAD_INPUT, UserError
from lab.cli import ToolOptions, run_command
from lab.study.running import run_ablation
from lab.study.spec import StudyError, study_code_sha256

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Options(ToolOptions):
    spec: Path | None = None
    """File that describes the run."""
    out: Path | None = None
    """Folder for what the run leaves."""
    serve: bool = False
    """Do one run after the other, each in a process of its own, as lines [SPEC, OUT, LOG] come; answer with their exit
    status. Libraries are loaded once."""


def work(options: Options) -> int:
    code_sha256 = study_code_sha256(ROOT)
    if options.serve:
        return serve(code_sha256)
    if not options.spec or not options.out:
        raise StudyError("--spec and --out are both needed, or --serve")
    return run_ablation(options.spec, options.out, code_sha256)


def serve(code_sha256: str) -> int:
    """Does a run for each line of the standard input; ends with it, and ends the run under way too."""
    importlib.import_module("torch._dynamo")  # the first optimizer of a process imports it, for 1.5 s
    for line in iter(sys.stdin.readline, ""):
        spec, out, log = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(served_run(Path(spec), Path(out), Path(log), code_sha256))
        print(wait_while_asked(child), flush=True)
    return 0


def wait_while_asked(child: int) -> int:
    """Returns a child's exit status, minus the signal that killed it; kills it where nobody waits for the answer."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:  # no line comes before the answer: the pipe is closed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(0)


def served_run(spec: Path, out: Path, log: Path, code_sha256: str) -> int:
    """Does run_ablation as run_command would do it, with all that it prints in `log`."""
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            return run_ablation(spec, out, code_sha256)
        except (UserError, OSError) as error:
            print(f"ablation_run: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
