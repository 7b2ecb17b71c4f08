"""Writes and reads checkpoints: all the state that training needs to resume, in safetensors files put in place at once.

Every rank writes its own file, because the momentum of a matrix is kept on one rank alone; a checkpoint is whole when
the files of all ranks are there. The training waits only while its tensors are copied; a thread writes the copy.
"""

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from golf.config.knobs import UserError
from golf.optim.average import averaged_weights
from golf.run.feature_audit import FeatureAudit
from golf.runtime import replacing

CHECKPOINT_NAME = re.compile(r"step(\d{7})-rank(\d+)of(\d+)\.safetensors")


class CheckpointError(UserError):
    """Reports a checkpoint that can't be read or does not fit."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Holds a training's tensors by name, and its plain numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def tensors_under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def generator_tensors() -> dict[str, Tensor]:
    """Returns the states of torch's generators; nobody draws from Python's and NumPy's (a test looks)."""
    on_cuda = {"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return on_cuda | {"rng.torch": torch.get_rng_state()}


def restore_generators(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def checkpoint_path(folder: Path, step: int, rank: int, world_size: int) -> Path:
    return folder / f"step{step:07d}-rank{rank}of{world_size}.safetensors"


def features_of(numbers: dict[str, Any]) -> dict[str, Any]:
    """Returns the feature audit in a checkpoint's numbers, under its present or its older name."""
    return numbers.get("features", numbers.get("witness"))


class CheckpointWriter:
    """Writes this rank's part of checkpoints in a thread, and keeps the last two."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        for torn in folder.glob(f".step*-rank{rank}of*.tmp"):  # left by a process that was killed
            torn.unlink()

    def write(self, state: TrainingState, step: int) -> Path:
        """Copies the state and lets the thread write it, after the previous write is done, whose OSError this
        raises."""
        self.wait()
        path = checkpoint_path(self.folder, step, self.rank, self.world_size)
        # From CUDA into pinned memory, which torch takes for copies that do not block.
        tensors = {name: part.detach().to("cpu", copy=True, non_blocking=True) for name, part in state.tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.pending = self.thread.submit(self.put, path, tensors, {"numbers": json.dumps(state.numbers)})
        return path

    def put(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)  # unlike save, it releases Python's lock to the training
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None
        whole = newest_checkpoint(self.folder)  # another rank may be behind: keep what its checkpoint needs to be whole
        for old in checkpoint_files(self.folder, self.rank)[:-2]:
            if whole and old.name < whole[0].name:
                old.unlink()

    def wait(self) -> None:
        """Waits until nothing is being written. Raises the OSError of a write that failed."""
        if self.pending:
            self.pending.result()
        self.pending = None

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()


def checkpoint_files(folder: Path, rank: int) -> list[Path]:
    """Returns the files of one rank, oldest first."""
    paths = sorted(folder.glob(f"step*-rank{rank}of*.safetensors"))
    return [path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)]


def newest_checkpoint(folder: Path) -> list[Path]:
    """Returns the files of the newest whole checkpoint, rank 0 first; an empty list where there is none."""
    for path in reversed(checkpoint_files(folder, rank=0)):
        step, _, world_size = map(int, CHECKPOINT_NAME.fullmatch(path.name).groups())
        files = [checkpoint_path(folder, step, rank, world_size) for rank in range(world_size)]
        if all(file.exists() for file in files):
            return files
    return []


def read_checkpoint(files: list[Path]) -> TrainingState:
    """Merges the files of all ranks; where two hold a tensor, the first one's counts. Raises CheckpointError."""
    tensors, numbers = {}, {}
    for path in reversed(files):
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads((file.metadata() or {})["numbers"])
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read ({error}): remove it, and the one before is used") from None
    return TrainingState(tensors, numbers)


def final_weights(state: TrainingState, audit: FeatureAudit) -> dict[str, Tensor]:
    """Returns the final weights: the average where there is one, else the last."""
    last, mean = (tensors_under(kind, state.tensors) for kind in ("model.", "average."))
    return averaged_weights(last, mean, state.numbers["average"][0], audit.config.average, audit)
