"""SIGTERM and SIGINT ask a run to stop; it stops at the next safe place, and can go on later."""

import os
import signal
import sys
import threading
from types import FrameType

from golf.config.config import EXIT_INTERRUPTED, UserError

GRACE_SECONDS = 20.0
"""How long a process of several waits for the others before it leaves: a lost one would hold it in a collective."""


class Interrupted(UserError):
    """The run was asked to stop; nothing is lost."""


class Interruption:
    """Whether a stop was asked for. A second signal acts at once; of several processes, none leaves before its grace is
    over (the launcher passes on a signal that they got already, while their checkpoints are being written)."""

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
        """Raise Interrupted where a stop was asked for."""
        if self.requested:
            sys.stdout.flush()
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name} {where}")
