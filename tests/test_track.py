"""Figures for TensorBoard: the same as metrics.jsonl's, read back from the event files; followed, resumed, damaged."""

import json
import threading

import pytest

import tools.track
from golf.run.folder import RunFolder
from lab.track import event_files
from lab.track.event_files import write_events
from lab.track.figures import MetricsReader, TrackError

pytest.importorskip("tensorboard", reason="tensorboard is not installed (requirements-track.txt)")

RESULT = {"val_bpb": 1.25, "val_loss": 2.5, "bytes_total": 498_000, "run_id": "x", "params": None}


def step_row(step: int, loss: float = 2.0) -> dict:
    return {"step": step, "train_loss": loss / step, "elapsed": step / 4, "progress": step / 10, "lr_scale": 1.0}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.config.write_text("{}")
    for step in range(1, 6):
        folder.append_metrics(step_row(step))
    folder.append_metrics({"step": 5, "elapsed": 1.25, "holdout_loss": 0.5})
    return folder


def read_events(folder: RunFolder) -> dict[str, list[tuple[int, float, float]]]:
    """(step, seconds since the run began, value) of each name, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    started = folder.config.stat().st_mtime
    return {
        name: [(event.step, event.wall_time - started, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def expected_events(folder: RunFolder) -> dict[str, list[tuple[int, float, float]]]:
    expected = {}
    for row in folder.metrics_rows():
        for name in row.keys() - {"step", "elapsed"}:
            expected.setdefault(name, []).append((row["step"], row["elapsed"], row[name]))
    return expected


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        for one, other in zip(found[name], expected[name], strict=True):
            assert one[0] == other[0] and one[1:] == pytest.approx(other[1:], rel=1e-6, abs=1e-5), name


def test_the_event_files_hold_the_figures_of_metrics_and_result(folder):
    folder.save_json(folder.result, RESULT)
    assert write_events(folder, lambda: True) == (6, 5)
    shown = {name: value for name, value in RESULT.items() if name not in ("run_id", "params")}
    expected = expected_events(folder) | {f"result/{name}": [(5, 1.25, value)] for name, value in shown.items()}
    assert_same(read_events(folder), expected)


def test_writing_again_replaces_what_was_written_and_no_other_file(folder):
    write_events(folder, lambda: True)
    other = folder.path / "tensorboard" / "notes.txt"
    other.write_text("mine")
    write_events(folder, lambda: True)
    assert_same(read_events(folder), expected_events(folder))
    assert other.read_text() == "mine" and len(list(other.parent.iterdir())) == 2


def test_following_takes_rows_as_they_appear_and_begins_anew_where_the_run_was_resumed(folder):
    looks = iter(range(100))

    def ended() -> bool:
        """Each look finds the run a bit further: a row, half a row, its end, a resumption from step 3, the result."""
        look = next(looks)
        if look == 1:
            folder.append_metrics(step_row(6))
        elif look == 2:
            with folder.metrics.open("a") as file:
                file.write(json.dumps(step_row(7))[:20])
        elif look == 3:
            with folder.metrics.open("a") as file:
                file.write(json.dumps(step_row(7))[20:] + "\n")
        elif look == 4:
            folder.trim_metrics(3)
            for step in (4, 5):
                folder.append_metrics(step_row(step, loss=9.0))
        elif look == 5:
            folder.save_json(folder.result, RESULT)
        return folder.result.exists()

    assert write_events(folder, ended, pause=0.0) == (len(folder.metrics_rows()), 5)
    found = read_events(folder)
    assert found.pop("result/val_bpb") == [(5, pytest.approx(1.25, abs=1e-5), 1.25)]
    assert_same({name: rows for name, rows in found.items() if "/" not in name}, expected_events(folder))


def test_rows_that_are_written_while_it_reads_are_all_read_once(tmp_path):
    folder = RunFolder(tmp_path)
    writer = threading.Thread(target=lambda: [folder.append_metrics(step_row(step)) for step in range(1, 400)])
    reader, steps = MetricsReader(folder), []
    writer.start()
    while writer.is_alive():
        steps += [figures.step for figures in reader.read()[1]]
    steps += [figures.step for figures in reader.read()[1]]
    assert steps == list(range(1, 400))


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"step": 6, "elapsed": 1, "train_loss": "x"}'])
def test_a_damaged_row_is_named(folder, line):
    write_events(folder, lambda: True)
    with folder.metrics.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrackError, match=r"metrics\.jsonl, line 7, is no row of metrics"):
        write_events(folder, lambda: True)
    assert len(read_events(folder)["train_loss"]) == 5, "what was written before is lost"


def test_a_run_that_has_not_trained_is_one_line(tmp_path, folder, run_tool_here):
    folder.metrics.unlink()
    status, said, complaint = run_tool_here(str(tmp_path))
    assert (status, said) == (2, "") and "the run has not trained yet" in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture
def run_tool_here(monkeypatch, capsys):
    """Runs the tool in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tools/track.py", *arguments])
        status = tools.track.run_command(tools.track.Options, tools.track.__doc__, tools.track.work)
        return status, *capsys.readouterr()

    return run


def test_the_tool_follows_a_run_to_its_result_at_the_lowest_priority(folder, run_tool_here, monkeypatch):
    nice = []
    monkeypatch.setattr("os.nice", nice.append)
    monkeypatch.setattr(event_files.time, "sleep", lambda seconds: folder.save_json(folder.result, RESULT))
    status, said, _ = run_tool_here(str(folder.path), "--follow", "--json")
    assert (status, nice) == (0, [19]) and json.loads(said)["rows"] == 6
    assert read_events(folder)["result/val_loss"][0][2] == 2.5


def test_interrupted_it_keeps_what_was_written(folder, run_tool_here, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.nice", lambda priority: None)
    monkeypatch.setattr(event_files.time, "sleep", interrupt)
    assert run_tool_here(str(folder.path), "--follow")[0] == 0
    assert_same(read_events(folder), expected_events(folder))
