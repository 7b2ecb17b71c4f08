"""Reports scoring time: a forecast after the first batches, progress."""

import time

from golf.runtime import ProgressLine, Runtime

FORECAST_BATCHES = 4
"""Batches that the forecast is measured on, after one that warms up."""


class ScoreProgress:
    """Reports forecast and progress of the main rank's windows: one updating line on a terminal, ten lines in a
    file."""

    def __init__(self, runtime: Runtime, windows: int, window_length: int, share: int):
        self.runtime, self.windows, self.window_length, self.share = runtime, windows, window_length, share
        self.line = ProgressLine(shown=runtime.is_main)
        self.started = self.warm_at = time.perf_counter()
        self.batches = self.done = self.skipped = self.warm_windows = self.tenths = 0

    def skip(self, windows: int) -> None:
        """Counts `windows` of this rank's share that an earlier process scored."""
        self.done += windows
        self.skipped += windows

    def advance(self, windows: int) -> None:
        """Counts `windows` more of this rank's share, which were sent to the device."""
        self.batches += 1
        self.done += windows
        if self.batches == 2:  # the first regular batch comes second, after the long first window
            self.runtime.synchronize()
            self.warm_at, self.warm_windows = time.perf_counter(), self.done
        elif self.batches == 2 + FORECAST_BATCHES:
            self.runtime.synchronize()
            self.line.clear()
            self.forecast()
        self.show()

    def forecast(self) -> None:
        """Prints the time that all windows will take, at the speed of the batches since the warm one."""
        now = time.perf_counter()
        rate = (self.done - self.warm_windows) / (now - self.warm_at)
        seconds = now - self.started + (self.share - self.done) / rate
        speed = rate * self.window_length * self.runtime.world_size
        self.runtime.print(f"score:forecast seconds:{seconds:.0f} windows:{self.windows} tokens_per_second:{speed:.0f}")

    def show(self) -> None:
        elapsed, part = time.perf_counter() - self.started, self.done / self.share
        left = elapsed * (self.share - self.done) / (self.done - self.skipped)
        if self.line.shown:
            self.line.update(f"score {part:.1%}  {elapsed:.0f} s, {left:.0f} s left")
            if part == 1:
                self.line.clear()
        elif int(10 * part) > self.tenths:
            self.tenths = int(10 * part)
            self.runtime.print(f"score:progress {part:.0%} seconds:{elapsed:.0f} eta_seconds:{left:.0f}")
