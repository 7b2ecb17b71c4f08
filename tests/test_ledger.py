"""The time ledger: every second in one phase, over nested phases, errors, exec and kills."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from golf.run.ledger import PHASES, Ledger, process_identity, read_ledger


class FakeProcess:
    """A clock that is set by hand, and a process that began 5 s before it was at 100."""

    def __init__(self, session: str = "one"):
        self.time, self.session = 100.0, session

    def now(self) -> float:
        return self.time

    def identity(self) -> tuple[str, float]:
        return self.session, self.time - 95.0

    def ledger(self) -> Ledger:
        return Ledger("setup", self.now, self.identity)


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


def test_a_phase_has_the_time_inside_and_what_is_around_it_the_rest(process, tmp_path):
    ledger = process.ledger()
    ledger.attach(tmp_path / "ledger.jsonl")
    process.time += 1
    with ledger.phase("train"):
        process.time += 10
        with ledger.phase("hold out"):
            process.time += 3
            with ledger.phase("calibrate"):
                process.time += 0.5
        process.time += 7
    process.time += 2
    summary = ledger.summary()
    seconds = {phase["phase"]: phase["seconds"] for phase in summary["phases"]}
    assert seconds == {"setup": 5 + 1 + 2, "train": 17, "hold out": 3, "calibrate": 0.5}
    assert sum(seconds.values()) == summary["process_seconds"] == 28.5
    assert read_ledger(tmp_path / "ledger.jsonl") == ledger.rows


def test_sums_under_both_conventions(process):
    ledger = process.ledger()
    for power, name in enumerate(PHASES):
        with ledger.phase(name):
            process.time += 2**power
    ledger.mark = process.time
    rows = {name: 2**power for power, name in enumerate(PHASES)}
    rows["setup"] += 5
    summary = ledger.summary()
    script, process_wall = summary["script"], summary["process"]
    assert script == {"train": rows["train"] + rows["calibrate"], "eval": rows["score"]}
    assert process_wall["eval"] == rows["load"] + rows["score"]
    uncounted = rows["compare"] + rows["report"]
    assert process_wall["train"] == sum(rows.values()) - uncounted - process_wall["eval"]
    assert {phase["phase"]: (phase["script"], phase["process"]) for phase in summary["phases"]} == PHASES


def test_a_phase_that_ends_in_an_error_is_counted_and_over(process):
    ledger = process.ledger()
    with pytest.raises(KeyError), ledger.phase("train"), ledger.phase("hold out"):
        process.time += 4
        raise KeyError
    process.time += 1
    ledger.flush()
    assert [ledger.seconds(name) for name in ("setup", "train", "hold out")] == [6, 0, 4]


def test_a_phase_that_is_not_in_the_table_is_our_mistake(process):
    with pytest.raises(AssertionError, match="lunch"), process.ledger().phase("lunch"):
        pass


def test_what_was_timed_before_the_file_was_known_gets_into_it(process, tmp_path):
    ledger = process.ledger()
    with ledger.phase("compile"):
        process.time += 2
    ledger.attach(tmp_path / "ledger.jsonl")
    assert [(row["phase"], row["seconds"]) for row in read_ledger(tmp_path / "ledger.jsonl")] == [
        ("setup", 5.0),
        ("compile", 2.0),
    ]


def test_a_process_that_replaced_itself_does_not_count_its_time_twice(process, tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = process.ledger()
    first.attach(path)
    with first.phase("train"):
        process.time += 10
    process.time += 1
    first.flush()
    process.time += 2  # the new interpreter starts; the process is the same, and 13 s older
    second = process.ledger()
    second.attach(path)
    with second.phase("score"):
        process.time += 4
    summary = second.summary()
    assert sum(phase["seconds"] for phase in summary["phases"]) == summary["process_seconds"] == 5 + 17
    assert second.seconds("setup") == 5 + 1 + 2


def test_a_resumed_run_has_the_time_of_the_killed_process_too(tmp_path):
    path = tmp_path / "ledger.jsonl"
    killed, resumed = FakeProcess("one"), FakeProcess("two")
    ledger = killed.ledger()
    ledger.attach(path)
    with ledger.phase("train"):
        killed.time += 30
    ledger = resumed.ledger()
    ledger.attach(path)
    with ledger.phase("train"):
        resumed.time += 12
    summary = ledger.summary()
    assert ledger.seconds("train") == 42 and summary["process_seconds"] == 5 + 30 + 5 + 12
    assert sum(phase["seconds"] for phase in summary["phases"]) == summary["process_seconds"]


def test_a_line_that_a_kill_or_a_full_disk_tore_is_no_row_and_harms_no_later_one(process, tmp_path):
    path = tmp_path / "ledger.jsonl"
    row = {"session": "zero", "phase": "train", "seconds": 7.0}
    path.write_text(json.dumps(row) + '\n{"session": "zero", "pha')
    assert read_ledger(path) == [row]
    ledger = process.ledger()
    ledger.attach(path)
    with ledger.phase("score"):
        process.time += 1
    assert read_ledger(path) == ledger.rows and ledger.rows[0] == row and len(ledger.rows) == 3


def test_a_ledger_that_is_not_there_is_empty(tmp_path):
    assert read_ledger(tmp_path / "none.jsonl") == []


def test_where_there_is_no_proc_the_age_counts_from_the_import(monkeypatch):
    def refused(self, *arguments, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refused)
    name, age = process_identity()
    assert name.isdigit() and 0 <= age < 3600


EXEC_TWICE = """
import json, os, sys, time
from pathlib import Path
from golf.run.ledger import Ledger
path, number = Path(sys.argv[1]), int(sys.argv[2])
ledger = Ledger("setup")
ledger.attach(path)
with ledger.phase("train" if number == 1 else "score"):
    time.sleep(0.4)
    if number == 1:
        with ledger.phase("hold out"):
            time.sleep(0.2)
if number == 1:
    ledger.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv[:2], "2"])
summary = ledger.summary()
Path(sys.argv[1] + ".summary").write_text(json.dumps(summary | {"ended": time.monotonic()}))
os._exit(0)
"""


@pytest.mark.slow
def test_phases_of_a_real_process_add_up_to_its_time_within_one_percent(repository, tmp_path):
    script, path = tmp_path / "twice.py", tmp_path / "ledger.jsonl"
    script.write_text(f"import sys; sys.path.insert(0, {str(repository)!r})\n{EXEC_TWICE}")
    before = time.monotonic()
    process = subprocess.Popen([sys.executable, script, path, "1"])
    after = time.monotonic()
    assert process.wait(timeout=600) == 0
    rows = read_ledger(path)
    total = sum(row["seconds"] for row in rows)
    summary = json.loads(Path(f"{path}.summary").read_text())
    outside, inside = summary["ended"] - before, summary["ended"] - after
    assert len({row["session"] for row in rows}) == 1
    # The process began somewhere between the two readings of the clock.
    assert 0.99 * inside < total < 1.01 * outside, (inside, total, outside)
    assert abs(total - summary["process_seconds"]) < 0.01 * outside
    seconds = {phase["phase"]: phase["seconds"] for phase in summary["phases"]}
    assert seconds["train"] >= 0.4 and seconds["score"] >= 0.4 and seconds["hold out"] >= 0.2
    assert seconds["setup"] > 0, "two starts of the interpreter are in it"
