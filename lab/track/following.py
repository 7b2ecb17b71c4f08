"""Hands a run's figures to a tracker, while the run goes on or when it has ended.

It is a process of its own that reads what the run has written: the training's clock knows nothing of it.
"""

import time
from collections.abc import Callable
from typing import Protocol

from golf.run.folder import RunFolder
from lab.track.figures import Figures, MetricsReader, TrackError, result_figures

PAUSE = 2.0
"""Seconds between two looks at a run that goes on."""


class Tracker(Protocol):
    """Takes figures in the order of the steps."""

    def add(self, figures: Figures, started: float) -> None:
        """Takes the figures of one step of a run that `started` at so many seconds of the epoch."""

    def flush(self) -> None:
        """Makes what it took readable for others."""

    def close(self) -> None:
        """Ends it, whole."""


def follow_run(
    folder: RunFolder, open_tracker: Callable[[RunFolder], Tracker], ended: Callable[[], bool], pause: float = PAUSE
) -> tuple[int, int]:
    """Hands over all figures until the run has `ended`, the result's at its last step; returns the rows and that step.

    A run that was resumed from an earlier step gets a new tracker. Raises TrackError.
    """
    if not folder.config.exists():
        raise TrackError(f"{folder.config} is missing: {folder.path} is not the folder of a run")
    started, reader, rows = folder.config.stat().st_mtime, MetricsReader(folder), 0
    tracker, last = None, Figures(0, 0.0, {})
    try:
        while True:
            is_last = ended()  # before reading, so that nothing that was written before the end is missed
            anew, new = reader.read()
            rows = len(new) + (0 if anew else rows)
            if anew and tracker:
                tracker.close()
                tracker = None
            if new and not tracker:  # what an earlier one wrote stays until there is something to put in its place
                tracker = open_tracker(folder)
            for last in new:
                tracker.add(last, started)
            if tracker:
                tracker.flush()
            if is_last:
                break
            time.sleep(pause)
        if not tracker:
            raise TrackError(f"{folder.metrics} has no rows: the run has not trained yet (--follow waits for it)")
        tracker.add(last._replace(values=result_figures(folder)), started)
    finally:
        if tracker:
            tracker.close()
    return rows, last.step
