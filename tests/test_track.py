"""Figures for trackers: the same as metrics.jsonl's, read back from their files; followed, resumed, damaged."""

import json
import os
import struct
import threading

import pytest

import tools.track
from golf.config.config import build_config, config_hash
from golf.config.knobs import ConfigError
from golf.run import frozen_code
from golf.run.folder import RunFolder
from golf.run.frozen_code import Program
from lab.bundle.frozen import freeze_config
from lab.track import following
from lab.track.event_files import EventFiles
from lab.track.figures import MetricsReader, TrackError
from lab.track.following import follow_run
from lab.track.offline_runs import OfflineRun

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
    assert follow_run(folder, EventFiles, lambda: True) == (6, 5)
    shown = {name: value for name, value in RESULT.items() if name not in ("run_id", "params")}
    expected = expected_events(folder) | {f"result/{name}": [(5, 1.25, value)] for name, value in shown.items()}
    assert_same(read_events(folder), expected)


def test_writing_again_replaces_what_was_written_and_no_other_file(folder):
    follow_run(folder, EventFiles, lambda: True)
    other = folder.path / "tensorboard" / "notes.txt"
    other.write_text("mine")
    follow_run(folder, EventFiles, lambda: True)
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

    assert follow_run(folder, EventFiles, ended, pause=0.0) == (len(folder.metrics_rows()), 5)
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
    follow_run(folder, EventFiles, lambda: True)
    with folder.metrics.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TrackError, match=r"metrics\.jsonl, line 7, is no row of metrics"):
        follow_run(folder, EventFiles, lambda: True)
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
    monkeypatch.setattr(following.time, "sleep", lambda seconds: folder.save_json(folder.result, RESULT))
    status, said, _ = run_tool_here(str(folder.path), "--follow", "--json")
    assert (status, nice) == (0, [19]) and json.loads(said)["rows"] == 6
    assert read_events(folder)["result/val_loss"][0][2] == 2.5


def test_interrupted_it_keeps_what_was_written(folder, run_tool_here, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.nice", lambda priority: None)
    monkeypatch.setattr(following.time, "sleep", interrupt)
    assert run_tool_here(str(folder.path), "--follow")[0] == 0
    assert_same(read_events(folder), expected_events(folder))


# ---- Weights & Biases, offline ----

BLOCK = 32_768
"""Of LevelDB's log format, in which wandb writes its records, behind a header of 7 bytes."""


def read_offline_run(folder: RunFolder) -> dict[int, dict[str, float]]:
    """The figures of each step, by the file's own format."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")
    (path,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    data, place, part, found = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a last part
            record = records.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                row = {(one.key or one.nested_key[0]): json.loads(one.value_json) for one in record.history.item}
                found[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
    return found


def test_an_offline_run_holds_the_figures_of_metrics_and_result(folder, run_tool_here):
    pytest.importorskip("wandb", reason="wandb is not installed (requirements-track.txt)")
    folder.save_json(folder.result, RESULT)
    for _ in range(2):  # the second replaces what the first wrote
        status, said, _ = run_tool_here(str(folder.path), "--to", "wandb", "--json")
    assert status == 0 and json.loads(said)["rows"] == 6
    rows = [row for row in folder.metrics_rows() if row["step"] < 5]
    found = read_offline_run(folder)
    assert [found[row["step"]] for row in rows] == [
        pytest.approx({k: v for k, v in row.items() if k != "step"}) for row in rows
    ]
    assert found[5]["holdout_loss"] == 0.5 and found[5]["result/val_bpb"] == 1.25 and found[5]["elapsed"] == 1.25


def test_an_offline_run_needs_no_network(folder, monkeypatch):
    """wandb is asked for its offline mode, and for no report of faults, before it is imported."""
    asked = {}

    class Wandb:
        def Settings(self, **settings):
            asked["reports"] = os.environ["WANDB_ERROR_REPORTING"]
            return settings

        def init(self, **arguments):
            asked.update(arguments)
            return self

        def define_metric(self, *arguments, **names):
            pass

        teardown = None

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb())
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    OfflineRun(folder)
    assert asked["settings"]["mode"] == "offline" and asked["reports"] == "false"


# ---- with a run ----


def test_it_ends_with_the_run_s_process(folder, run_tool_here, monkeypatch):
    """A run that was killed has no result, and nobody must wait for it for ever."""
    monkeypatch.setattr("os.nice", lambda priority: None)
    monkeypatch.setattr(following.time, "sleep", lambda seconds: pytest.fail("it waited"))
    gone = 2**22 + 1  # above the most that Linux gives
    assert run_tool_here(str(folder.path), "--follow", "--process", str(gone))[0] == 0
    assert len(read_events(folder)["train_loss"]) == 5


def test_a_run_says_what_tracking_lacks_before_it_trains(folder, tmp_path, monkeypatch):
    program = Program(tmp_path / "train_gpt.py", bundled=False)
    with pytest.raises(ConfigError, match="track=tensorboard needs .*track.py, which is not there: set track=off"):
        program.start_tracker(folder, "tensorboard")
    monkeypatch.setattr(frozen_code, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="track=wandb: wandb is not installed: pip install -r requirements-track"):
        program.start_tracker(folder, "wandb")


def test_tracking_is_no_part_of_what_a_configuration_is():
    plain, tracked = build_config("local", {}, {}), build_config("local", {}, {"track": "wandb"})
    assert config_hash(plain) == config_hash(tracked)
    assert freeze_config(plain) == freeze_config(tracked)
