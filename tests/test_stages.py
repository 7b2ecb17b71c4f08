"""Stages and what surrounds them: the book, the session's order of things on every rank, stops, errors, frozen code."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError

import golf.run.session
from golf.config.knobs import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MACHINE, ConfigError
from golf.data.shards import DataError
from golf.run.folder import RunFolder
from golf.run.frozen_code import Program
from golf.run.guard import AccessGuard, GuardError
from golf.run.session import (
    STAGES,
    Interrupted,
    Interruption,
    Session,
    StageBook,
    StageError,
    StageResult,
    explain_error,
    take_lock,
)
from golf.runtime import Log, Runtime

# ---- the book ----


def test_a_book_remembers_stages_and_the_hashes_of_their_files(tmp_path):
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "a", tmp_path / "deep" / "b"]
    for path in files:
        path.write_text(path.name)
    StageBook(tmp_path).finish("train", files)
    book = StageBook(tmp_path)
    assert "train" in book and "average" not in book and list(book.stages["train"]) == ["a", "deep/b"]
    book.verify("train")
    files[1].write_text("c")
    with pytest.raises(StageError, match="deep/b is not what stage train left"):
        book.verify("train")
    files[1].unlink()
    with pytest.raises(StageError, match="deep/b is missing, which stage train left: bring the file back"):
        book.verify("train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep", "stages.json"]


def test_a_stage_that_is_not_finished_is_one_clear_line(tmp_path):
    with pytest.raises(StageError, match="stage pack is not finished: go on with --resume"):
        StageBook(tmp_path).require_before("reload")
    StageBook(tmp_path).require_before("train")


def test_a_stage_is_not_finished_without_its_files_or_under_another_name(tmp_path):
    book = StageBook(tmp_path)
    with pytest.raises(FileNotFoundError):
        book.finish("train", [tmp_path / "nothing"])
    with pytest.raises(AssertionError):
        book.finish("rehearse", [])
    assert not (tmp_path / "stages.json").exists() and book.stages == {}


def hold_lock(path: Path, held) -> None:
    lock = take_lock(path)
    held.set()
    signal.pause()
    lock.close()


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold_lock, args=(tmp_path / ".lock", held), daemon=True)
    other.start()
    assert held.wait(600)
    with pytest.raises(StageError, match="is at work in another process"):
        take_lock(tmp_path / ".lock")
    other.kill()
    other.join()
    take_lock(tmp_path / ".lock").close()


# ---- the session ----


class WatchedRuntime(Runtime):
    """One rank of several, alone: notes what is in the book whenever it meets the others."""

    def meet(self, folder: RunFolder) -> None:
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "seen", [])

    def barrier(self) -> None:
        self.seen.append(list(StageBook(self.folder.path).stages))


@pytest.fixture
def open_session(tmp_path, monkeypatch) -> Callable[[int], Session]:
    """A session of a rank, without the audit hook and signal handlers that would outlive the test."""
    monkeypatch.setattr(AccessGuard, "watch", lambda self: None)
    monkeypatch.setattr(Interruption, "watch", lambda self: None)

    def build(rank: int = 0) -> Session:
        session, folder = Session(), RunFolder(tmp_path)
        runtime = WatchedRuntime(torch.device("cpu"), rank, 2, Log())
        runtime.meet(folder)
        session.open(folder, runtime)
        return session

    return build


def work_of(session: Session, stage: str, calls: list[tuple[str, str, str]]) -> Callable[[], StageResult]:
    def work() -> StageResult:
        calls.append((stage, session.guard.stage, session.ledger.phase_name))
        path = session.folder.path / f"{stage}.out"
        path.write_text(stage)
        return StageResult([path], stage)

    return work


def do_all(session: Session, calls: list, stages=STAGES) -> None:
    for stage in stages:
        session.do(stage, work_of(session, stage, calls), together=stage in ("train", "score"))


def test_stages_run_in_their_phase_behind_their_guard_and_once(open_session):
    session, calls = open_session(), []
    do_all(session, calls)
    phases = {stage: {"reload": "load"}.get(stage, stage) for stage in STAGES}
    assert calls == [(stage, stage, phases[stage]) for stage in STAGES]
    assert session.ledger.phase_name == "setup"
    do_all(session, calls)
    session.lock.close()
    do_all(open_session(), calls)
    assert len(calls) == len(STAGES)
    access = json.loads((session.folder.path / "access.json").read_text())
    assert access["watched"] and not access["validation_opened_before_score"]


def test_all_ranks_meet_equally_often_and_only_the_main_one_writes(open_session, tmp_path):
    calls: list = []
    other = open_session(rank=1)
    do_all(other, calls)
    assert [call[0] for call in calls] == ["train", "score"] and not (tmp_path / "stages.json").exists()
    assert not (tmp_path / "ledger.jsonl").exists() and not (tmp_path / "train.log").exists()
    main = open_session(rank=0)
    do_all(main, calls)
    assert len(main.runtime.seen) == len(other.runtime.seen)


def test_no_stage_is_noted_before_every_rank_has_read_the_book_and_left_its_files(open_session):
    """A rank that reads the book later would skip what the others wait for; a rank that still writes its part of the
    last checkpoint would leave a finished training without it."""
    session = open_session()
    do_all(session, [])
    assert session.runtime.seen == [
        [], [], ["train"], list(STAGES[:2]), list(STAGES[:3]), list(STAGES[:4]), list(STAGES[:5]), list(STAGES[:5]),
        list(STAGES[:6]), list(STAGES),
    ]  # fmt: skip


def test_a_changed_output_stops_the_next_stage(open_session):
    session = open_session()
    do_all(session, [], STAGES[:2])
    (session.folder.path / "average.out").write_text("changed")
    calls: list = []
    for _ in range(2):  # the next process sees it, and the one after, whatever stage it is about to do
        with pytest.raises(StageError, match=r"average\.out is not what stage average left"):
            do_all(open_session(), calls, STAGES[:3])
    assert calls == []


def test_a_stage_that_fails_is_not_finished_and_its_time_is_in_the_ledger(open_session):
    session = open_session()

    def fail() -> StageResult:
        time.sleep(0.01)
        raise DataError("no")

    with pytest.raises(DataError):
        session.do("train", fail, together=True)
    assert "train" not in StageBook(session.folder.path) and session.ledger.seconds("train") >= 0.01


def test_a_stop_that_was_asked_for_comes_before_the_next_stage(open_session):
    session, calls = open_session(), []
    do_all(session, calls, STAGES[:1])
    session.interruption.signal = signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped by SIGTERM before the average stage; go on with --resume"):
        do_all(session, calls, STAGES[:2])
    assert [call[0] for call in calls] == ["train"]


def test_scoring_a_run_that_is_not_packed_is_one_clear_line(open_session):
    session = open_session()
    with pytest.raises(StageError, match="stage pack is not finished"):
        session.do("reload", lambda: StageResult([]))


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "world_size", "status", "words"),
    [
        (Interrupted("stopped by SIGTERM"), 1, EXIT_INTERRUPTED, "stopped by SIGTERM"),
        (DataError("bad shard"), 1, EXIT_BAD_INPUT, "bad shard"),
        (GuardError("closed"), 2, EXIT_BAD_INPUT, "closed"),
        (OSError(28, "No space left on device"), 1, EXIT_MACHINE, "No space left on device: mend that, then"),
        (PermissionError(13, "Permission denied", "/x"), 1, EXIT_MACHINE, "'/x': mend that, then go on with --resume"),
        (
            RuntimeError("[gloo/pair.cc:547] Connection closed by peer\n at"),
            2,
            EXIT_MACHINE,
            "Connection closed by peer)",
        ),
        (RuntimeError("NCCL error: remote process exited"), 8, EXIT_MACHINE, "another process of the run was lost"),
        (
            InductorError(RuntimeError("CppCompileError:\nx.cpp: error: y"), None),
            1,
            EXIT_MACHINE,
            "(x.cpp: error: y): start a run",
        ),
        (RuntimeError("NCCL error"), 1, 0, ""),
        (RuntimeError("stored tensors can't be restored"), 2, 0, ""),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, 0, ""),
    ],
)
def test_every_kind_of_error_has_its_status_and_one_line(error, world_size, status, words):
    found, message = explain_error(error, world_size)
    assert found == status and words in message and "\n" not in message and bool(message) == bool(status)


def test_a_full_disk_does_not_hide_its_own_message(capsys):
    log = Log()
    log.attach(Path("/dev/full"))
    log.error("the disk is full")
    assert capsys.readouterr().err == "the disk is full\n"


# ---- stops ----


def watch_signals(world_size: int, line) -> None:
    """A process that may be stopped: it says so, and that it was; its grace is over when the other side says so."""

    def wait_for_word(seconds: float, leave: Callable, arguments: list) -> threading.Thread:
        assert seconds == golf.run.session.GRACE_SECONDS
        return threading.Thread(target=lambda: leave(*arguments) if line.recv() else None)

    threading.Timer = wait_for_word
    interruption = Interruption()
    interruption.world_size = world_size
    interruption.watch()
    line.send("watching")
    while not interruption.requested:
        time.sleep(0.02)
    try:
        interruption.check("here")
    except Interrupted as stop:
        line.send(str(stop))
    while True:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("world_size", "number", "status"),
    [
        (1, signal.SIGTERM, -signal.SIGTERM),
        (1, signal.SIGINT, -signal.SIGINT),
        (2, signal.SIGTERM, EXIT_INTERRUPTED),
    ],
)
def test_the_first_signal_asks_and_the_second_ends_or_among_several_processes_the_grace(world_size, number, status):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=watch_signals, args=(world_size, there), daemon=True)
    process.start()
    assert here.poll(600) and here.recv() == "watching"
    os.kill(process.pid, number)
    assert here.poll(600) and here.recv() == f"stopped by {number.name} here"
    assert process.is_alive()
    os.kill(process.pid, number)
    if world_size > 1:
        here.send("the grace is over")
    process.join(600)
    assert process.exitcode == status


# ---- the code ----

FAKE_BUNDLER = """
import sys
from pathlib import Path
words = sys.argv[1:]
if (Path(__file__).parent / "broken").exists():
    sys.exit(2)
source = (Path(__file__).parents[1] / "script.py").read_text()
Path(words[words.index("--out") + 1]).write_text(("packed " if "--pack" in words else "") + source)
if "--readable-out" in words:
    Path(words[words.index("--readable-out") + 1]).write_text(source)
"""


@pytest.fixture
def project(tmp_path) -> tuple[Path, RunFolder]:
    """A script with a bundler beside it, and the folder of a run."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "script.py").write_text("one\n")
    (tmp_path / "tools" / "bundle.py").write_text(FAKE_BUNDLER)
    return tmp_path / "script.py", RunFolder(tmp_path / "run")


@pytest.mark.parametrize("bundled", [False, True])
def test_a_run_goes_on_only_with_the_code_that_began_it(project, bundled):
    script, folder = project
    program = Program(script, bundled)
    program.freeze(folder)
    assert folder.code.read_text() == ("one\n" if bundled else "packed one\n")
    assert folder.readable_code.exists() == (not bundled)
    program.check(folder)
    script.write_text("two\n")
    with pytest.raises(ConfigError, match="the code is not that of"):
        program.check(folder)
    script.write_text("one\n")
    program.check(folder)
    left = {"sources.json", "train_gpt.py"} | (set() if bundled else {"train_gpt_readable.py"})
    assert {path.name for path in folder.path.iterdir()} == left


@pytest.mark.parametrize("bundled", [False, True])
def test_a_run_that_was_killed_before_its_code_was_frozen_is_one_clear_line(project, bundled):
    script, folder = project
    with pytest.raises(ConfigError, match="run was stopped before it began: remove it, and start anew"):
        Program(script, bundled).check(folder)


def test_code_that_can_not_be_bundled_stops_the_run(project):
    script, folder = project
    (script.parent / "tools" / "broken").touch()
    with pytest.raises(ConfigError, match="could not bundle the code"):
        Program(script, False).freeze(folder)


def test_a_tool_is_run_where_there_is_one(project):
    script, _ = project
    program = Program(script, True)
    assert program.run_tool("nothing.py") is None
    (script.parent / "tools" / "seven.py").write_text("import sys; sys.exit(len(sys.argv[1:]))\n")
    assert program.run_tool("seven.py", *"abcdefg") == 7
