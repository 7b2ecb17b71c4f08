"""Runs of a study in processes of their own, several at once; what is finished is not done again."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from golf.config.knobs import EXIT_BAD_INPUT, EXIT_MACHINE
from lab.study.plan import AblationPlan, run_folder
from lab.study.spec import (
    FAILED,
    FINISHED,
    INVALID,
    KILLED,
    AblationError,
    AblationSpec,
    failed_result,
    load_result,
    save_result,
    save_spec,
)

DONE = (FINISHED, INVALID, FAILED)
"""What is not tried again; a run that was killed is."""
RunReport = Callable[[AblationSpec, Mapping[str, Any]], None]


def finished_runs(plan: AblationPlan, out: Path) -> dict[str, dict[str, Any]]:
    """Results by key of the runs that need not be done (again). Raises AblationError."""
    found = {}
    for key, spec in plan.runs.items():
        result = load_result(run_folder(out, key), key)
        weights = run_folder(out, key) / "weights.safetensors"
        lost = spec.keeps_weights and result is not None and result["status"] != FAILED and not weights.is_file()
        if result and result["status"] in DONE and not lost:
            found[key] = result
    return found


class RunServer:
    """A process that has loaded all libraries and does one run after the other, each in a fork of itself."""

    def __init__(self, program: Path):
        command = [sys.executable, str(program), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)

    def run(self, spec_path: Path, folder: Path) -> int | None:
        """Exit status of a run, minus the signal that killed it; None where the server itself is gone."""
        line = json.dumps([str(spec_path), str(folder), str(folder / "run.log")])
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            return None
        return int(answer) if answer.strip() else None

    def kill(self) -> None:
        """End it and its run now."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class StudyLauncher:
    """Hands the runs of a plan to `jobs` servers."""

    def __init__(self, plan: AblationPlan, out: Path, program: Path, jobs: int, report: RunReport):
        if jobs < 1:
            raise AblationError(f"--jobs {jobs}: a study takes at least one")
        self.plan, self.out, self.program, self.jobs, self.report = plan, out, program, jobs, report
        self.servers: list[RunServer] = []
        self.waiting: queue.Queue[AblationSpec] = queue.Queue()
        self.trouble: list[BaseException] = []
        self.stopped = False

    def run_all(self, keys: Sequence[str]) -> None:
        """Do these runs: trainings, then what needs their weights. Raises AblationError where no run can be done."""
        specs = [self.plan.runs[key] for key in keys]
        try:
            for needs_weights in (False, True):
                self.run_together([spec for spec in specs if bool(spec.method) == needs_weights])
        finally:
            self.stopped = True
            for server in self.servers:
                server.kill()

    def run_together(self, specs: Sequence[AblationSpec]) -> None:
        """Several at once; the same servers go on with the next ones, so that all runs are of the same code."""
        for spec in specs:
            self.waiting.put(spec)
        count = min(self.jobs, len(specs))
        self.servers += [RunServer(self.program) for _ in range(count - len(self.servers))]
        threads = [threading.Thread(target=self.work, args=(place,), daemon=True) for place in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self.trouble:  # join alone would keep Ctrl-C waiting
            time.sleep(0.05)
        if self.trouble:
            raise self.trouble[0]

    def work(self, place: int) -> None:
        """One server's part of what is waiting."""
        try:
            while not self.stopped and not self.trouble:
                try:
                    spec = self.waiting.get_nowait()
                except queue.Empty:
                    break
                if self.do(spec, self.servers[place]) is None:
                    self.servers[place] = RunServer(self.program)
        except Exception as error:  # told in the main thread
            self.trouble.append(error)

    def do(self, spec: AblationSpec, server: RunServer) -> int | None:
        """One run; whatever becomes of it, its folder has a result, unless the study was stopped."""
        folder = run_folder(self.out, spec.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        save_spec(spec, folder / "spec.json")
        if broken := self.broken_source(spec):
            save_result(folder, broken)
            self.report(spec, broken)
            return 0
        status = server.run(folder / "spec.json", folder)
        if self.stopped:
            return status
        if status is None and (server.process.wait() or 0) > 0:
            raise AblationError(f"{self.program} does not start: its message stands above")
        if status in (EXIT_BAD_INPUT, EXIT_MACHINE):
            raise AblationError(f"{spec.name}: {last_line(folder / 'run.log')}")
        result = load_result(folder, spec.key)
        if result is None:
            what = (
                "its process was lost" if status is None else f"signal {-status}" if status < 0 else f"status {status}"
            )
            result = failed_result(spec, KILLED, f"killed ({what}): {last_line(folder / 'run.log')}")
            save_result(folder, result)
        self.report(spec, result)
        return status

    def broken_source(self, spec: AblationSpec) -> dict[str, Any] | None:
        """The result of a run whose weights to quantize never came to be."""
        if not spec.source_key:
            return None
        source = load_result(run_folder(self.out, spec.source_key), spec.source_key) or {"status": KILLED}
        if source["status"] == FINISHED:
            return None
        status = KILLED if source["status"] == KILLED else FAILED
        return failed_result(spec, status, f"the training of its weights: {source.get('error', source['status'])}")


def last_line(log: Path) -> str:
    """The last line of a run's log, without the name of the program."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].removeprefix("ablation_run: ") if lines else "it left no message"
