"""Writes a run's figures as TensorBoard's event files, beside metrics.jsonl, while it goes on or when it has ended.

It is a process of its own that reads what the run has written: the training's clock knows nothing of it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from golf.run.folder import RunFolder
from lab.track.figures import Figures, MetricsReader, TrackError, result_figures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PAUSE = 2.0
"""Seconds between two looks at a run that goes on."""


def open_events(folder: RunFolder) -> "SummaryWriter":
    """Returns a writer of new event files in the run's folder `tensorboard`, in place of earlier ones, which held the
    same figures."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds, and a package that other tools don't need

    place = events_folder(folder)
    for path in place.glob("events.out.tfevents.*"):
        path.unlink()
    return SummaryWriter(str(place))


def events_folder(folder: RunFolder) -> Path:
    return folder.path / "tensorboard"


def write_events(folder: RunFolder, ended: Callable[[], bool], pause: float = PAUSE) -> tuple[int, int]:
    """Writes all figures until the run has `ended`; returns the rows and the last step. Raises TrackError.

    Wall clocks of events are the start of the run plus the seconds of training, so that TensorBoard's relative time is
    that of the training. A run that was resumed from an earlier step gets new files.
    """
    if not folder.config.exists():
        raise TrackError(f"{folder.config} is missing: {folder.path} is not the folder of a run")
    started, reader, rows = folder.config.stat().st_mtime, MetricsReader(folder), 0
    writer, last = None, Figures(0, 0.0, {})
    try:
        while True:
            is_last = ended()  # before reading, so that nothing that was written before the end is missed
            anew, new = reader.read()
            rows = len(new) + (0 if anew else rows)
            if anew and writer:
                writer.close()
                writer = None
            if new and not writer:  # earlier event files stay until there is something to put in their place
                writer = open_events(folder)
            for last in new:
                add(writer, last, started)
            if writer:
                writer.flush()
            if is_last:
                break
            time.sleep(pause)
        if not writer:
            raise TrackError(f"{folder.metrics} has no rows: the run has not trained yet (--follow waits for it)")
        add(writer, last._replace(values=result_figures(folder)), started)
    finally:
        if writer:
            writer.close()
    return rows, last.step


def add(writer: "SummaryWriter", figures: Figures, started: float) -> None:
    for name, value in figures.values.items():
        writer.add_scalar(name, value, figures.step, walltime=started + figures.elapsed)
