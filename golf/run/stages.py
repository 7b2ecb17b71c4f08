"""stages.json: which stages of a run are finished, and the SHA-256 of every file that they left."""

import json
from collections.abc import Sequence
from pathlib import Path

from golf.config.config import UserError
from golf.runtime import file_sha256, write_file_atomically

STAGES = ("train", "average", "quantize", "pack", "reload", "score", "report")


class StageError(UserError):
    """A stage's output that is not what the stage left."""


class StageBook:
    """The finished stages of the run in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "stages.json"
        self.stages: dict[str, dict[str, str]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.stages

    def finish(self, stage: str, outputs: Sequence[Path]) -> None:
        """Record that `stage` left these files, all of them on the disk."""
        assert stage in STAGES
        hashes = {path.relative_to(self.folder).as_posix(): file_sha256(path) for path in outputs}
        self.stages[stage] = hashes
        write_file_atomically(self.path, json.dumps(self.stages, indent=2) + "\n")

    def require_before(self, stage: str) -> None:
        """Raise StageError unless the stage before `stage` is finished."""
        for before in STAGES[: STAGES.index(stage)][-1:]:
            if before not in self.stages:
                raise StageError(f"{self.folder}: stage {before} is not finished: go on with --resume")

    def verify(self, stage: str) -> None:
        """Raise StageError unless the files of a finished stage are as it left them."""
        for name, sha256 in self.stages[stage].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != sha256:
                state = "is not what" if path.is_file() else "is missing, which"
                raise StageError(f"{path} {state} stage {stage} left: bring the file back, or start a new run")
