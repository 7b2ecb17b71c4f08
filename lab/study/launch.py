"""Runs the runs of a study in processes of their own, several at once; what is finished is not done again."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from golf.config.knobs import EXIT_BAD_INPUT, EXIT_MACHINE
from lab.study.plan import StudyPlan, run_folder
from lab.study.spec import FAILED, FINISHED, INVALID, KILLED, RunSpec, load_result, require, save_failure, save_spec

DONE = (FINISHED, INVALID, FAILED)
"""Runs in these states are not tried again; a run that was killed is."""
RunReport = Callable[[RunSpec, Mapping[str, Any]], None]


def finished_runs(plan: StudyPlan, out: Path) -> dict[str, dict[str, Any]]:
    """Returns results by key of the runs that need not be done (again). Raises StudyError."""
    found = {}
    for key, spec in plan.runs.items():
        folder = run_folder(out, key)
        result = load_result(folder, key)
        if result is None or result["status"] not in DONE:
            continue
        if not spec.keeps_weights or result["status"] == FAILED or (folder / "weights.safetensors").is_file():
            found[key] = result
    return found


class RunServer:
    """A process that has loaded all libraries and does one run after the other, each in a fork of itself."""

    def __init__(self, program: Path):
        command = [sys.executable, str(program), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)

    def run(self, folder: Path) -> int | None:
        """Does the run of folder/spec.json; returns its exit status, minus the signal that killed it.

        Returns None where the server itself is gone.
        """
        paths = [str(folder / "spec.json"), str(folder), str(folder / "run.log")]
        try:
            print(json.dumps(paths), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            return None
        return int(answer) if answer.strip() else None

    def kill(self) -> None:
        """Ends it and its run now."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Launcher:
    """Hands the runs of a plan to `jobs` servers."""

    def __init__(self, plan: StudyPlan, out: Path, program: Path, jobs: int, report: RunReport):
        require(jobs >= 1, f"--jobs {jobs}: a study takes at least one")
        self.plan, self.out, self.program, self.jobs, self.report = plan, out, program, jobs, report
        self.servers: list[RunServer] = []
        self.idle: queue.SimpleQueue[RunServer | None] = queue.SimpleQueue()
        """A place for each job: a server for the next run, or None where one has to be started."""
        self.stopped = False

    def run_all(self, keys: Sequence[str]) -> None:
        """Does these runs: trainings, then what needs their weights. Raises StudyError where no run can be done.

        The same servers do all of them, so that all runs are of the same code.
        """
        for _ in range(self.jobs):
            self.idle.put(None)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for needs_weights in (False, True):
                specs = [self.plan.runs[key] for key in keys if bool(self.plan.runs[key].method) == needs_weights]
                for future in as_completed([pool.submit(self.do, spec) for spec in specs]):
                    self.report(*future.result())
        finally:
            self.stopped = True
            for server in self.servers:
                server.kill()
            pool.shutdown(cancel_futures=True)

    def do(self, spec: RunSpec) -> tuple[RunSpec, dict[str, Any]]:
        """Does one run; whatever becomes of it, its folder has a result, unless the study was stopped."""
        folder = run_folder(self.out, spec.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        save_spec(spec, folder / "spec.json")
        return spec, self.broken_source(spec, folder) or self.served_result(spec, folder)

    def served_result(self, spec: RunSpec, folder: Path) -> dict[str, Any]:
        server = self.idle.get()
        if server is None:
            server = RunServer(self.program)
            self.servers.append(server)
            if self.stopped:  # and so are those that were there before
                server.kill()
        status = server.run(folder)
        self.idle.put(None if status is None else server)
        require(not self.stopped, "the study was stopped")
        ends = status is None and server.process.wait() > 0
        require(not ends, f"{self.program} does not start: read its message above")
        require(status not in (EXIT_BAD_INPUT, EXIT_MACHINE), f"{spec.name}: {last_line(folder / 'run.log')}")
        result = load_result(folder, spec.key)
        if result is None:
            cause = f"signal {-status}" if status and status < 0 else f"status {status}"
            cause = "its process was lost" if status is None else cause
            return save_failure(folder, spec, KILLED, f"killed ({cause}): {last_line(folder / 'run.log')}")
        return result

    def broken_source(self, spec: RunSpec, folder: Path) -> dict[str, Any] | None:
        """Writes and returns the result of a run whose weights to quantize never came to be; None for any other run."""
        if not spec.source_key:
            return None
        source = load_result(run_folder(self.out, spec.source_key), spec.source_key) or {"status": KILLED}
        if source["status"] == FINISHED:
            return None
        status, cause = KILLED if source["status"] == KILLED else FAILED, source.get("error", source["status"])
        return save_failure(folder, spec, status, f"the training of its weights: {cause}")


def last_line(log: Path) -> str:
    """Returns the last line of a run's log, without the name of the program."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].removeprefix("ablation_run: ") if lines else "it left no message"
