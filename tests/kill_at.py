"""Runs train_gpt.py and kills it with SIGKILL at a given point: `python tests/kill_at.py POINT ARGUMENTS...`

POINT: none, before:STAGE (its outputs are there, its record is not), after:STAGE, step:N, moment:N (in the midst of
step N), checkpoint:N (while the N-th checkpoint of the process is written), chunk:N (after chunk N is scored), torn:N
(half of chunk N's line is written); at stop:N the process sends itself SIGTERM after chunk N instead. The fresh process
that scores is watched in the same way. The code of the run is not packed here (a small file stands for it), and
pictures are not drawn: both have their own tests.

So that nothing depends on the machine's speed: of several processes only that of rank KILL_RANK dies, where that
variable is set, and with STEP_SECONDS every step takes so long on the training clock.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import golf.run.checkpoint
import golf.run.trainer
import train_gpt
from golf.run.frozen_code import Program
from golf.run.session import StageBook
from golf.run.trainer import Trainer
from golf.runtime import Stopwatch, leave
from golf.score.journal import ScoreJournal

KIND, _, WHERE = sys.argv[1].partition(":")


def die_at(kind: str, where: object) -> None:
    if (kind, str(where)) == (KIND, WHERE) and os.environ.get("KILL_RANK") in (None, os.environ.get("RANK")):
        os.kill(os.getpid(), signal.SIGTERM if kind == "stop" else signal.SIGKILL)


class ConstantStopwatch(Stopwatch):
    """Every step takes STEP_SECONDS."""

    def __init__(self) -> None:
        self.time = 0.0
        super().__init__(now=lambda: self.time)

    def start(self) -> None:
        super().start()
        self.time += float(os.environ["STEP_SECONDS"])


def watch_stages() -> None:
    finish = StageBook.finish

    def watched(self: StageBook, stage: str, outputs) -> None:
        die_at("before", stage)
        finish(self, stage, outputs)
        die_at("after", stage)

    StageBook.finish = watched


def watch_training() -> None:
    if "STEP_SECONDS" in os.environ:
        golf.run.trainer.Stopwatch = ConstantStopwatch
    take_step, accumulate = Trainer.take_step, Trainer.accumulate_gradients

    def watched_step(self: Trainer, progress: float):
        die_at("step", self.step)
        return take_step(self, progress)

    def watched_gradients(self: Trainer, step: int):
        loss = accumulate(self, step)
        if self.recent_seconds[-1]:  # a step of the training, not of the warm-up
            die_at("moment", self.step)
        return loss

    Trainer.take_step, Trainer.accumulate_gradients = watched_step, watched_gradients
    save, written = golf.run.checkpoint.save_file, []

    def watched_save(tensors: dict, path: Path, metadata: dict) -> None:
        written.append(path)
        save(tensors, path, metadata)
        if KIND == "checkpoint" and len(written) == int(WHERE):
            os.truncate(path, path.stat().st_size // 2)
        die_at("checkpoint", len(written))

    golf.run.checkpoint.save_file = watched_save


def watch_scoring() -> None:
    add = ScoreJournal.add

    def watched(self: ScoreJournal, begin: int, end: int, sums, seconds: float) -> None:
        if KIND == "torn" and len(self.chunks) == int(WHERE):
            self.file.write('{"begin": ' + str(begin))
            self.file.flush()
            die_at("torn", WHERE)
        add(self, begin, end, sums, seconds)
        die_at("chunk", len(self.chunks))
        die_at("stop", len(self.chunks))

    ScoreJournal.add = watched


def stay_watched() -> None:
    """The process that scores is started through this file too, and what is slow has no part in it."""
    execute = os.execv
    os.execv = lambda program, words: execute(program, [program, __file__, sys.argv[1], *words[2:]])
    Program.freeze = lambda self, folder, meanwhile: folder.code.write_text("# code\n")
    Program.check = lambda self, folder: None
    Program.run_tool = lambda self, name, *arguments: None


for watch in (watch_stages, watch_training, watch_scoring, stay_watched):
    watch()
leave(train_gpt.run_program(sys.argv[2:]))
