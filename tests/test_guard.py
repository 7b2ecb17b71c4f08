"""The guard on data and network: planted violations are refused and recorded, everything else passes.

An audit hook stays for the life of its process, so the guard is watched in processes of their own.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from golf.data.shards import write_shard
from golf.run.guard import CLOSED_SPLITS, AccessGuard, GuardError
from golf.run.session import STAGES

ATTEMPTS = """
import io, json, os, socket, sys
from pathlib import Path
import numpy as np
from golf.data.shards import read_shard
from golf.run.guard import AccessGuard, GuardError

folder = Path(sys.argv[1])
train, val = folder / "text_train_000000.bin", folder / "text_val_000000.bin"
server = socket.create_server(("127.0.0.1", 0))
address = server.getsockname()

def connect():
    socket.create_connection(address, timeout=60).close()

def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.sendto(b"x", address)

def send_message():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.sendmsg([b"x"], [], 0, address)

WAYS = {
    "open": lambda path: path.open("rb").close(),
    "bytes": lambda path: open(os.fsencode(path), "rb").close(),
    "FileIO": lambda path: io.FileIO(path).close(),
    "os.open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "fromfile": lambda path: np.fromfile(path, dtype="<u2"),
    "memmap": lambda path: np.memmap(path, dtype="<u2", mode="r"),
    "read_shard": read_shard,
}
ATTEMPTS = {f"{way} {path.name}": (lambda act=act, path=path: act(path))
            for way, act in WAYS.items() for path in (train, val, folder / "notes.txt") if way != "read_shard"
            or path.suffix == ".bin"}
ATTEMPTS |= {"connect": connect, "sendto": send, "sendmsg": send_message,
             "getaddrinfo": lambda: socket.getaddrinfo("127.0.0.1", 80),
             "gethostbyname": lambda: socket.gethostbyname("127.0.0.1")}
guard = AccessGuard()
guard.watch()
outcomes, records = {}, {}
for stage in sys.argv[2:]:
    guard.stage, guard.opened = stage, {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            outcomes[f"{stage}: {name}"] = ""
        except GuardError as error:
            outcomes[f"{stage}: {name}"] = str(error)
    records[stage] = guard.record({})
print(json.dumps({"outcomes": outcomes, "records": records}))
"""
STAGES_TRIED = ("setup", *STAGES)


@pytest.fixture(scope="module")
def tried(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every way to every file in every stage: what was refused, and what was recorded."""
    folder = tmp_path_factory.mktemp("guard")
    for split in ("train", "val"):
        write_shard(folder / f"text_{split}_000000.bin", np.arange(10))
    (folder / "notes.txt").write_text("notes!")
    script = folder / "attempts.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(repository)!r})\n{ATTEMPTS}")
    command = [sys.executable, script, folder, *STAGES_TRIED]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def refused(tried: dict, stage: str, split: str) -> set[str]:
    """The ways in which a split was refused in a stage."""
    names = {name.partition(": ")[2]: error for name, error in tried["outcomes"].items() if name.startswith(stage)}
    return {name for name, error in names.items() if f"_{split}_" in name and error}


ALL_WAYS = {"open", "bytes", "FileIO", "os.open", "fromfile", "memmap", "read_shard"}


@pytest.mark.parametrize("stage", STAGES_TRIED)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_is_closed_in_its_stages_to_every_way_of_opening_and_open_in_the_others(tried, stage, split):
    closed = {
        "val": {"setup", "train", "average", "quantize", "pack", "reload"},
        "train": {"pack", "reload", "score"},
    }[split]
    expected = {f"{way} text_{split}_000000.bin" for way in ALL_WAYS} if stage in closed else set()
    assert refused(tried, stage, split) == expected


@pytest.mark.parametrize("way", ["connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname"])
def test_the_network_is_closed_while_scoring_and_only_then(tried, way):
    errors = {stage: tried["outcomes"][f"{stage}: {way}"] for stage in STAGES_TRIED}
    assert [stage for stage, error in errors.items() if error] == ["score"]
    assert "network is closed" in errors["score"] and "score stage" in errors["score"]


def test_other_files_are_never_refused(tried):
    others = {name: error for name, error in tried["outcomes"].items() if "notes.txt" in name}
    assert len(others) == len(STAGES_TRIED) * (len(ALL_WAYS) - 1) and not any(others.values())


def test_an_error_names_file_and_stage(tried):
    error = tried["outcomes"]["train: memmap text_val_000000.bin"]
    assert "text_val_000000.bin in the train stage, where val is closed" in error and "\n" not in error


def test_what_was_refused_is_recorded_all_the_same(tried):
    flags = ("validation_opened_before_score", "training_opened_after_calibration", "network_during_scoring")
    raised = {stage: [flag for flag in flags if tried["records"][stage][flag]] for stage in STAGES_TRIED}
    assert raised == {
        "setup": [flags[0]], "train": [flags[0]], "average": [flags[0]], "quantize": [flags[0]],
        "pack": list(flags[:2]), "reload": list(flags[:2]), "score": list(flags[1:]), "report": [],
    }  # fmt: skip
    assert all(record["watched"] and record["violations"] == [] for record in tried["records"].values())


def test_an_innocent_run_has_a_clean_record():
    guard = AccessGuard()
    for stage, split in (("train", "train"), ("quantize", "train"), ("score", "val")):
        guard.stage = stage
        guard.hook("open", (f"/data/text_{split}_000007.bin", "r", 0))
        guard.hook("open", (3, "r", 0))
    record = guard.record({"setup": ["train"]})
    assert record["opened"] == {"setup": ["train"], "train": ["train"], "quantize": ["train"], "score": ["val"]}
    assert not any(record[flag] for flag in record if flag not in ("watched", "opened"))


def test_a_record_adds_up_what_all_processes_of_a_run_opened():
    guard = AccessGuard()
    guard.stage = "score"
    guard.hook("open", ("text_val_000000.bin", "r", 0))
    earlier = {"train": ["train", "val"], "score": ["network"]}
    record = guard.record(earlier)
    assert record["opened"] == {"train": ["train", "val"], "score": ["network", "val"]}
    assert record["validation_opened_before_score"] and record["network_during_scoring"]


def test_names_that_only_look_like_shards_are_no_shards():
    guard = AccessGuard()
    guard.stage = "train"
    for name in ("text_val_000000.bin.tmp", "text_val_0.bin", "val_000000.bin.md", "text_val_000000.bin/manifest.json"):
        guard.hook("open", (name, "r", 0))
    assert guard.opened == {}
    with pytest.raises(GuardError):
        guard.hook("open", (b"/x/fineweb_val_000000.bin", "r", 0))


def test_every_stage_that_is_named_exists():
    assert set(CLOSED_SPLITS) <= set(STAGES_TRIED)
