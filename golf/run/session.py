"""Runs a process's stages: skips finished ones, times each, restricts files and sockets, stops at a safe place.

stages.json lists the finished stages of a run, with the SHA-256 of every file that they wrote.
"""

import fcntl
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import torch

from golf.config.knobs import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE, UserError
from golf.run.folder import RunFolder
from golf.run.guard import AccessGuard
from golf.run.ledger import Ledger
from golf.runtime import Log, Runtime, explain_compile_error, file_sha256, write_file_atomically

STAGES = ("train", "average", "quantize", "pack", "reload", "score", "report")


class StageError(UserError):
    """Reports a stage whose files are not what it wrote, or a stage that can't start."""


class StageBook:
    """Records the finished stages of the run in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "stages.json"
        self.stages: dict[str, dict[str, str]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def finish(self, stage: str, outputs: Sequence[Path]) -> None:
        """Records that `stage` wrote these files, all of them on the disk."""
        assert stage in STAGES
        hashes = {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in outputs}
        self.stages[stage] = hashes
        write_file_atomically(self.path, json.dumps(self.stages, indent=2) + "\n")

    def require_before(self, stage: str) -> None:
        """Raises StageError unless the stage before `stage` is finished."""
        for before in STAGES[: STAGES.index(stage)][-1:]:
            if before not in self.stages:
                raise StageError(f"{self.folder}: stage {before} is not finished: go on with --resume")

    def verify(self, stage: str) -> None:
        """Raises StageError unless the files of a finished stage are as it wrote them."""
        for name, sha256 in self.stages[stage].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                state = "is not what" if path.is_file() else "is missing, which"
                raise StageError(f"{path} {state} stage {stage} left: bring the file back, or start a new run")


GRACE_SECONDS = 20.0
"""Seconds that one of several processes waits for the others before it exits: a lost one would block it in a
collective."""


class Interrupted(UserError):
    """Reports that the run was asked to stop; nothing is lost."""


class Interruption:
    """Records whether a signal asked for a stop.

    A second signal acts at once. Of several processes, none exits before its grace period is over (the launcher passes
    on a signal that they already received, while they are writing checkpoints).
    """

    def __init__(self) -> None:
        self.signal, self.world_size = 0, 1

    def watch(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, number
        if self.world_size == 1:
            signal.signal(number, signal.SIG_DFL)
        elif first:
            leave = threading.Timer(GRACE_SECONDS, os._exit, [EXIT_INTERRUPTED])
            leave.daemon = True
            leave.start()

    @property
    def requested(self) -> bool:
        return self.signal > 0

    def check(self, where: str) -> None:
        """Raises Interrupted where a stop was asked for."""
        if self.requested:
            sys.stdout.flush()
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name} {where}")


LOST_PEER = re.compile("gloo|nccl|peer|socket|connection|TCPStore", re.IGNORECASE)


def explain_error(error: Exception, world_size: int) -> tuple[int, str]:
    """Returns (exit status, one line) for an error that is not a mistake of ours, (0, "") for one that is."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, str(error)
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return EXIT_MACHINE, "out of memory on the device: lower micro_batch_tokens or eval_batch_seqs; then --resume"
    if isinstance(error, OSError):
        return EXIT_MACHINE, f"{error}: mend that, then go on with --resume; what was written before is whole"
    if type(error).__name__ in ("BackendCompilerFailed", "InductorError"):  # of torch's private modules
        return EXIT_MACHINE, f"torch.compile failed ({explain_compile_error(error)}): start a run with compile=off"
    if isinstance(error, RuntimeError) and world_size > 1 and LOST_PEER.search(str(error)):
        first = str(error).strip().splitlines()[0][:200]
        return EXIT_MACHINE, f"another process of the run was lost ({first}); go on with --resume"
    return 0, ""


def take_lock(path: Path) -> TextIO:
    """Returns a lock that this process holds until it ends. Raises StageError while another process holds it."""
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not shared with forked workers
    except BlockingIOError:
        raise StageError(f"{path.parent} is at work in another process: wait for it, or end it") from None
    return lock


class StageResult(NamedTuple):
    """Holds the files that a stage wrote, and the value that it passes to the next one in this process."""

    outputs: Sequence[Path]
    value: Any = None


class Session:
    """Represents one process of a run; `open` binds it to the run's folder once that is known."""

    def __init__(self) -> None:
        self.log, self.guard, self.ledger, self.interruption = Log(), AccessGuard(), Ledger("setup"), Interruption()
        self.guard.watch()
        self.interruption.watch()

    def open(self, folder: RunFolder, runtime: Runtime) -> None:
        self.folder, self.runtime, self.interruption.world_size = folder, runtime, runtime.world_size
        if runtime.is_main:
            self.lock = take_lock(folder.path / ".lock")
            self.log.attach(folder.log)
            self.ledger.attach(folder.ledger)
        self.book = StageBook(folder.path)
        if runtime.is_main:
            for stage in self.book.stages:
                self.book.verify(stage)
        runtime.barrier()  # every rank must read the same book before a stage is added

    def do(self, stage: str, work: Callable[[], "StageResult"], together: bool = False) -> Any:
        """Runs a stage unless it is finished, on the main rank or on all together, and returns its value.

        The value is None where the stage was finished before: the next stage then reads its files.
        """
        if stage in self.book:
            return None
        self.interruption.check(f"before the {stage} stage; go on with --resume {self.folder.path.name}")
        if self.runtime.is_main:
            self.book.require_before(stage)
        self.guard.stage, result = stage, StageResult([])
        with self.ledger.phase({"reload": "load"}.get(stage, stage)):
            if together or self.runtime.is_main:
                result = work()
            if together:
                self.runtime.barrier()  # wait for the files of the other ranks
            if self.runtime.is_main:
                self.folder.save_access(self.guard)
                self.book.finish(stage, result.outputs)
            self.runtime.barrier()
        return result.value
