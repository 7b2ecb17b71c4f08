"""What surrounds the work of a run's stages: which are done, on which clock, with what doors closed."""

import fcntl
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch

from golf.artifact.sizes import SizeReport
from golf.config.config import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE, UserError
from golf.run.folder import RunFolder
from golf.run.guard import AccessGuard
from golf.run.interruption import Interrupted, Interruption
from golf.run.ledger import Ledger
from golf.run.stages import StageBook, StageError
from golf.runtime import Log, Runtime

LOST_PEER = re.compile("gloo|nccl|peer|socket|connection|TCPStore", re.IGNORECASE)


def explain_error(error: Exception, world_size: int) -> tuple[int, str]:
    """(exit status, one line) of an error that is not a mistake of ours; (0, "") for one that is."""
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, str(error)
    if isinstance(error, UserError):
        return EXIT_BAD_INPUT, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return EXIT_MACHINE, "out of memory on the device: lower micro_batch_tokens or eval_batch_seqs; then --resume"
    if isinstance(error, OSError):
        return EXIT_MACHINE, f"{error}: mend that, then go on with --resume; what was written before is whole"
    if isinstance(error, RuntimeError) and world_size > 1 and LOST_PEER.search(str(error)):
        first = str(error).strip().splitlines()[0][:200]
        return EXIT_MACHINE, f"another process of the run was lost ({first}); go on with --resume"
    return 0, ""


def take_lock(path: Path) -> TextIO:
    """A lock that this process has until it ends, however it ends. Raises StageError while another one has it."""
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not shared with forked workers
    except BlockingIOError:
        raise StageError(f"{path.parent} is at work in another process: wait for it, or end it") from None
    return lock


class Session:
    """One process of a run; `open` binds it to the run's folder once that is known."""

    def __init__(self) -> None:
        self.log, self.guard, self.ledger, self.interruption = Log(), AccessGuard(), Ledger("setup"), Interruption()
        self.packed: tuple[bytes, SizeReport] | None = None
        """The artifact as the quantize stage measured it, so that the pack stage need not pack again."""
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
        runtime.barrier()  # every rank has read the same book before a stage is added to it

    def do(self, stage: str, work: Callable[[], Sequence[Path]], together: bool = False) -> None:
        """Do a stage unless it is finished: `work`, on the main rank or on all together, returns the files it left."""
        if stage in self.book:
            return
        self.interruption.check(f"before the {stage} stage; go on with --resume {self.folder.path.name}")
        if self.runtime.is_main:
            self.book.require_before(stage)
        self.guard.stage = stage
        with self.ledger.phase({"reload": "load"}.get(stage, stage)):
            if together or self.runtime.is_main:
                outputs = work()
            if together:
                self.runtime.barrier()  # what the other ranks leave is there too
            if self.runtime.is_main:
                self.folder.save_access(self.guard)
                self.book.finish(stage, outputs)
            self.runtime.barrier()
