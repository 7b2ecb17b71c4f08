"""Writes a run's figures as a run of Weights & Biases in its offline mode, beside metrics.jsonl.

Nothing leaves the machine: its files are sent by `wandb sync FOLDER`, where somebody wants that.
"""

import os
import shutil
from pathlib import Path

from golf.run.folder import RunFolder
from lab.track.figures import Figures

PROJECT = "golf"


class OfflineRun:
    """Writes a new offline run in the run's folder `wandb`, in place of earlier ones, which held the same figures.

    Figures stand against the step and against `elapsed`, the seconds of training.
    """

    def __init__(self, folder: RunFolder):
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read at the import: no report of a fault may leave the machine
        import wandb  # takes seconds, and a package that other tools don't need

        shutil.rmtree(offline_folder(folder), ignore_errors=True)
        settings = wandb.Settings(
            mode="offline", console="off", silent=True, save_code=False, disable_git=True, x_disable_stats=True,
            x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        self.run = wandb.init(
            project=PROJECT, name=folder.path.name, dir=str(folder.path), config=folder.load_json(folder.config),
            settings=settings,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="elapsed")
        self.teardown = wandb.teardown

    def add(self, figures: Figures, started: float) -> None:
        self.run.log({**figures.values, "elapsed": figures.elapsed}, step=figures.step)

    def flush(self) -> None:
        """Does nothing: a process of wandb's own writes what was logged."""

    def close(self) -> None:
        self.run.finish()
        self.teardown()  # waits for the process that writes: `finish` came back before its file was whole (0.31.0)


def offline_folder(folder: RunFolder) -> Path:
    return folder.path / "wandb"
