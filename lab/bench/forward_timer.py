"""Measures the seconds that a device spends in a scorer's forward."""

import time
from collections.abc import Callable
from typing import Any

import torch


class ForwardTimer:
    """Sums the time inside `with timer:`; on CUDA by events, so that measuring never makes the device wait."""

    def __init__(self, device: torch.device):
        self.uses_events = device.type == "cuda"
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = 0.0
        self.entered = 0.0

    def __enter__(self) -> None:
        if self.uses_events:
            self.pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.pairs[-1][0].record()
        self.entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.total += time.perf_counter() - self.entered
        if self.uses_events:
            self.pairs[-1][1].record()

    def seconds(self) -> float:
        """Returns the seconds inside; on CUDA only after a synchronize."""
        if self.uses_events:
            return sum(start.elapsed_time(stop) for start, stop in self.pairs) / 1000
        return self.total

    def timing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `forward`, each of its calls timed."""

        def timed(*arguments: Any) -> Any:
            with self:
                return forward(*arguments)

        return timed
