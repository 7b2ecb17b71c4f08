"""Restricts which data and network a process may use in each stage, where Python opens files and sockets (PEP 578)."""

import os
import sys
from typing import Any

from golf.config.knobs import UserError
from golf.data.shards import SHARD_NAME

CLOSED_SPLITS = {
    "setup": ("val",),
    "train": ("val",),
    "average": ("val",),
    "quantize": ("val",),
    "pack": ("val", "train"),
    "reload": ("val", "train"),
    "score": ("train",),
}
"""Splits that are closed in a stage: validation before it is scored, training text once calibration is over."""
NETWORK_EVENTS = tuple(f"socket.{call}" for call in ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg"))


class GuardError(UserError):
    """Reports data or network that was used outside its stage."""


class AccessGuard:
    """Refuses shards and network outside their stage, and records what each stage opened."""

    def __init__(self) -> None:
        self.stage = "setup"
        self.opened: dict[str, list[str]] = {}

    def watch(self) -> None:
        """Starts watching for the life of the process: an audit hook can't be removed."""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            base = os.path.basename(name).replace("_val_bytes_", "_val_")  # a sidecar reveals the text's bytes too
            if match := SHARD_NAME.fullmatch(base):
                self.touch(match["split"], name)
        elif event in NETWORK_EVENTS:
            self.touch("network", f"{event} {arguments[1:]}")

    def touch(self, kind: str, what: str) -> None:
        if kind not in self.opened.setdefault(self.stage, []):
            self.opened[self.stage].append(kind)
        closed = ("network",) if self.stage == "score" else ()
        if kind in (*CLOSED_SPLITS.get(self.stage, ()), *closed):
            raise GuardError(f"{what} in the {self.stage} stage, where {kind} is closed: the run would be void")

    def record(self, earlier: dict[str, list[str]]) -> dict[str, Any]:
        """Returns the content of access.json, from this process and `earlier` ones."""
        stages = earlier | self.opened
        opened = {stage: sorted({*earlier.get(stage, []), *self.opened.get(stage, [])}) for stage in stages}
        before, after = ("setup", "train", "average", "quantize", "pack", "reload"), ("pack", "reload", "score")
        return {
            "watched": True,
            "validation_opened_before_score": any("val" in opened.get(stage, []) for stage in before),
            "training_opened_after_calibration": any("train" in opened.get(stage, []) for stage in after),
            "network_during_scoring": "network" in opened.get("score", []),
            "violations": [],
            "opened": opened,
        }
