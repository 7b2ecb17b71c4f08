"""Writes a run's figures as TensorBoard's event files, beside metrics.jsonl."""

from pathlib import Path

from golf.run.folder import RunFolder
from lab.track.figures import Figures


class EventFiles:
    """Writes new event files in the run's folder `tensorboard`, in place of earlier ones, which held the same figures.

    Wall clocks of events are the start of the run plus the seconds of training, so that TensorBoard's relative time is
    that of the training.
    """

    def __init__(self, folder: RunFolder):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, and a package that other tools don't need

        place = events_folder(folder)
        for path in place.glob("events.out.tfevents.*"):
            path.unlink()
        self.writer = SummaryWriter(str(place))
        self.flush, self.close = self.writer.flush, self.writer.close

    def add(self, figures: Figures, started: float) -> None:
        for name, value in figures.values.items():
            self.writer.add_scalar(name, value, figures.step, walltime=started + figures.elapsed)


def events_folder(folder: RunFolder) -> Path:
    return folder.path / "tensorboard"
