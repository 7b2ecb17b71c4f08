"""Downloads from a hub that misbehaves end with right files, or say which are not. pytest tests/test_download.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FAULTS, LISTING, FakeHub, flipped, random_shard, shard_bytes

from data import download
from golf.config.knobs import EXIT_FINDINGS, EXIT_INTERRUPTED, EXIT_MACHINE
from golf.data.manifest import data_identity
from golf.data.tokenizer import load_tokenizer
from lab.cli import run_command
from lab.prepare.hub import Hub
from lab.prepare.published import DownloadError, plan_download
from lab.prepare.transfer import Download, sole_downloader
from lab.prepare.verification import DOWNLOADS_NAME, verify_folder
from lab.prepare.vocabulary import train_tokenizer

REPOSITORY_ID = "somebody/some-golf"
NAME = "fineweb10B_sp300"
SHARDS = f"datasets/datasets/{NAME}"
MODEL = "datasets/tokenizers/fineweb_300_bpe.model"
MANIFEST = "datasets/manifest.json"


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    return train_tokenizer(["some text to train on, and more of it to have pieces\n" * 20], 300)


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch) -> None:
    """huggingface_hub waits whole seconds between its own attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(model_bytes) -> Iterator[FakeHub]:
    manifest = {
        "datasets": [
            {
                "name": NAME,
                "tokenizer_name": "sp_bpe_300",
                "vocab_size": 300,
                "stats": {"files_train": 4, "files_val": 1},
            }
        ],
        "tokenizers": [
            {
                "name": "sp_bpe_300",
                "model_path": "tokenizers/fineweb_300_bpe.model",
                "vocab_path": "tokenizers/none.vocab",
            }
        ],
    }
    files = {f"{SHARDS}/fineweb_train_{index:06d}.bin": random_shard(index) for index in range(4)}
    files |= {f"{SHARDS}/fineweb_val_000000.bin": random_shard(99, 2000), MODEL: model_bytes}
    files |= {MANIFEST: json.dumps(manifest).encode(), "README.md": b"about it"}
    with FakeHub(REPOSITORY_ID, files) as server:
        yield server


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def open_client(hub: FakeHub, root: Path, offline: bool = False) -> Hub:
    return Hub(REPOSITORY_ID, hub.url, root.parent / "cache", offline, attempts=4, longest_wait=0.03)


def start_download(hub: FakeHub, root: Path, train_shards: int | None = 3, **options) -> Download:
    client = open_client(hub, root, options.pop("offline", False))
    known = json.loads((root / "datasets" / NAME / DOWNLOADS_NAME).read_text()) if client.offline else {}
    listing = client.list_files(options.pop("revision", "main"), known)
    plan = plan_download(listing, "sp300", root, train_shards, client.read_manifest(listing, SHARDS))
    return Download(client, plan, **options)


def run_tool(hub: FakeHub, root: Path, *arguments: str, monkeypatch) -> int:
    where = ["--endpoint", hub.url, "--root", str(root), "--cache-dir", str(root.parent / "cache")]
    command = ["download.py", "--repo-id", REPOSITORY_ID, "--variant", "sp300", *where, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return run_command(download.Options, download.__doc__, download.work)


def assert_whole(hub: FakeHub, root: Path, train_shards: int = 3) -> None:
    wanted = [f"{SHARDS}/fineweb_train_{index:06d}.bin" for index in range(train_shards)]
    for remote in [*wanted, f"{SHARDS}/fineweb_val_000000.bin", MODEL]:
        assert (root / remote.removeprefix("datasets/")).read_bytes() == hub.files[remote], remote
    report = verify_folder(root / "datasets" / NAME, full=True)
    assert (report.problems, report.unhashed, report.facts_from) == ([], 0, DOWNLOADS_NAME)
    assert not list((root / "datasets" / NAME).glob(".parts*"))


def test_the_files_arrive_and_the_data_id_is_that_of_runs(hub, root):
    first = start_download(hub, root)
    assert first.run() == {} and first.fetched_files == 5
    assert_whole(hub, root)
    folder = root / "datasets" / NAME
    tokenizer = load_tokenizer(root / "tokenizers" / "fineweb_300_bpe.model")
    assert first.data_id() == data_identity(folder, tokenizer) == verify_folder(folder).data_id
    assert not (folder / "fineweb_train_000003.bin").exists()
    before = len(hub.fetched())
    again = start_download(hub, root)
    assert again.run() == {} and again.fetched_files == 0
    assert hub.fetched()[before:] == []  # the manifest too is in the cache
    more = start_download(hub, root, None)
    assert more.run() == {} and hub.fetched()[before:] == [f"{SHARDS}/fineweb_train_000003.bin"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_misbehaves_is_asked_again(hub, root, fault):
    hub.faults[f"{SHARDS}/fineweb_train_000001.bin"] = [fault] if fault == "slow" else [fault, fault]
    if fault != "wrong file":  # there is no other one of their sizes
        hub.faults[f"{SHARDS}/fineweb_val_000000.bin"] = [fault]
        hub.faults[MODEL] = [fault]
    hub.pause = 0.001
    assert start_download(hub, root).run() == {}
    assert not any(hub.faults.values())
    assert_whole(hub, root)


@pytest.mark.parametrize("fault", ["429", "500"])
def test_the_list_of_files_and_the_manifest_are_asked_for_again(hub, root, fault):
    hub.faults[LISTING] = [fault, fault]
    hub.faults[MANIFEST] = [f"head {fault}", fault, "flip"]
    assert start_download(hub, root).run() == {}
    assert not any(hub.faults.values())


@pytest.mark.parametrize("fault", ["500", "truncate", "flip", "wrong file", "empty"])
def test_a_file_that_stays_bad_is_named_and_has_no_place(hub, root, fault):
    path = f"{SHARDS}/fineweb_train_000001.bin"
    hub.faults[path] = [fault] * 99
    lines = []
    attempt = start_download(hub, root, on_note=lines.append)
    assert list(attempt.run()) == ["fineweb_train_000001.bin"]
    assert len(lines) == 3 and all(line.startswith("fineweb_train_000001.bin: ") for line in lines)
    folder = root / "datasets" / NAME
    assert not (folder / "fineweb_train_000001.bin").exists() and (folder / "fineweb_train_000002.bin").exists()
    hub.faults.clear()
    before = len(hub.fetched())
    assert start_download(hub, root).run() == {}
    assert hub.fetched()[before:] == [path]
    assert_whole(hub, root)


def damage_flip(folder: Path) -> None:
    path = folder / "fineweb_train_000001.bin"
    with path.open("r+b") as file:  # in place: the linked file of the cache is damaged with it
        data = flipped(path.read_bytes())
        file.write(data)


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "fineweb_train_000001.bin", 5000)


def damage_empty(folder: Path) -> None:
    os.truncate(folder / "fineweb_val_000000.bin", 0)


def damage_swap(folder: Path) -> None:
    one, two, aside = (folder / f"fineweb_train_{index}.bin" for index in ("000001", "000002", "aside"))
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def damage_magic(folder: Path) -> None:
    path = folder / "fineweb_train_000001.bin"
    data = path.read_bytes()
    path.unlink()  # the cache keeps the right one
    path.write_bytes(b"\0\0\0\0" + data[4:])


def damage_missing(folder: Path) -> None:
    (folder / "fineweb_train_000001.bin").unlink()


DAMAGES = [damage_flip, damage_truncate, damage_empty, damage_swap, damage_magic, damage_missing]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_on_this_machine_is_found_and_mended(hub, root, damage):
    start_download(hub, root).run()
    damage(root / "datasets" / NAME)
    assert verify_folder(root / "datasets" / NAME, full=True).problems
    assert start_download(hub, root).run() == {}
    assert_whole(hub, root)


def test_recheck_reads_what_looks_untouched(hub, root):
    start_download(hub, root).run()
    path = root / "datasets" / NAME / "fineweb_train_000001.bin"
    stat = path.stat()
    damage_flip(path.parent)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert start_download(hub, root, recheck=True).run() == {}
    assert_whole(hub, root)


def test_files_are_copied_where_they_cannot_be_linked(hub, root, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert start_download(hub, root).run() == {}
    assert (root / "datasets" / NAME / "fineweb_train_000000.bin").stat().st_nlink == 1
    assert_whole(hub, root)


def test_a_hub_without_hashes_is_recorded_at_the_first_download(hub, root):
    hub.hashes = False
    hub.faults[f"{SHARDS}/fineweb_train_000002.bin"] = ["wrong file"]  # a double of the first, so it is noticed
    assert start_download(hub, root, workers=1).run() == {}
    record = json.loads((root / "datasets" / NAME / DOWNLOADS_NAME).read_text())
    assert {entry["hash_from"] for entry in record["files"].values()} == {"first download"}
    assert_whole(hub, root)
    damage_flip(root / "datasets" / NAME)
    assert start_download(hub, root).run() == {}
    assert_whole(hub, root)


def test_shards_of_another_tokenizer_are_refused(hub, root):
    hub.files[f"{SHARDS}/fineweb_train_000001.bin"] = random_shard(5, vocab_size=301)
    tokens = shard_bytes([*range(250, 301)])
    hub.files[f"{SHARDS}/fineweb_train_000001.bin"] = tokens
    failures = start_download(hub, root).run()
    assert "holds token 300, but its tokenizer has 300 pieces" in failures["fineweb_train_000001.bin"]


def test_a_later_download_stays_with_its_commit(hub, root, monkeypatch, capsys):
    def figures(*arguments: str) -> dict:
        assert run_tool(hub, root, "--train-shards", "2", "--json", *arguments, monkeypatch=monkeypatch) == 0
        return json.loads(capsys.readouterr().out)

    first = figures()
    hub.files[f"{SHARDS}/fineweb_train_000000.bin"] = random_shard(1234)
    again = figures()
    assert first["revision"] == again["revision"] != hub.commit
    assert (again["fetched_files"], again["data_id"]) == (0, first["data_id"])
    moved = figures("--revision", "main")
    assert (moved["revision"], moved["fetched_files"]) == (hub.commit, 1)
    assert moved["data_id"] != first["data_id"]
    assert_whole(hub, root, 2)
    shutil.rmtree(root)
    assert figures()["data_id"] == moved["data_id"]
    shutil.rmtree(root)
    assert figures("--offline")["data_id"] == moved["data_id"]  # the cache holds both commits


def test_offline_from_the_cache(hub, root, monkeypatch, capsys):
    assert run_tool(hub, root, "--train-shards", "3", "--json", monkeypatch=monkeypatch) == 0
    online = json.loads(capsys.readouterr().out)
    shutil.rmtree(root)
    asked = len(hub.requests)
    assert run_tool(hub, root, "--offline", "--train-shards", "3", "--json", monkeypatch=monkeypatch) == 0
    offline = json.loads(capsys.readouterr().out)
    assert (offline["data_id"], offline["revision"]) == (online["data_id"], online["revision"])
    assert_whole(hub, root)
    shutil.rmtree(root.parent / "cache")
    assert run_tool(hub, root, "--offline", "--json", monkeypatch=monkeypatch) == 0  # all is in its place
    capsys.readouterr()
    assert run_tool(hub, root, "--offline", "--train-shards", "4", monkeypatch=monkeypatch) == 2
    assert (
        capsys.readouterr().err == "download: 4 training shards wanted, the cache holds 3: ask for --train-shards 3\n"
    )
    shutil.rmtree(root)
    assert run_tool(hub, root, "--offline", monkeypatch=monkeypatch) == 2
    assert "nothing of somebody/some-golf is in the cache" in capsys.readouterr().err
    assert len(hub.requests) == asked


def test_damage_that_cannot_be_mended_offline_is_taken_away(hub, root):
    start_download(hub, root).run()
    folder = root / "datasets" / NAME
    damage_flip(folder)  # in the cache too
    assert list(start_download(hub, root, offline=True).run()) == ["fineweb_train_000001.bin"]
    assert not (folder / "fineweb_train_000001.bin").exists()
    assert start_download(hub, root).run() == {}
    assert_whole(hub, root)


def test_a_dry_run_shows_and_writes_nothing(hub, root, monkeypatch, capsys):
    assert run_tool(hub, root, "--dry-run", monkeypatch=monkeypatch) == 0
    assert "to fetch" in capsys.readouterr().out and not root.exists()
    assert run_tool(hub, root, "--dry-run", "--json", monkeypatch=monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {entry["state"] for entry in figures["files"]} == {"to fetch"} and len(figures["files"]) == 6
    assert hub.fetched() == [MANIFEST]


def test_the_tool_names_what_failed(hub, root, monkeypatch, capsys):
    hub.faults[f"{SHARDS}/fineweb_train_000001.bin"] = ["flip"] * 99
    monkeypatch.setattr(download, "Hub", lambda *arguments: Hub(*arguments, attempts=2, longest_wait=0.03))
    assert run_tool(hub, root, monkeypatch=monkeypatch) == EXIT_FINDINGS
    lines = capsys.readouterr().err.splitlines()
    assert "download: fineweb_train_000001.bin: damaged, or another file: SHA-256" in lines[-2]
    assert lines[-1] == "download: 1 files could not be had: run the same command again"


def test_a_full_disk_stops_before_the_first_byte(hub, root, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run_tool(hub, root, monkeypatch=monkeypatch) == EXIT_MACHINE
    assert "GB needed, 0.0 GB free" in capsys.readouterr().err and hub.fetched() == [MANIFEST]


@pytest.fixture
def plain_interrupt():
    """SIGINT raises, as in a process of its own: tests of runs that were here before may have left their handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_whole(hub, root, monkeypatch, capsys, plain_interrupt):
    hub.faults[f"{SHARDS}/fineweb_train_000001.bin"] = ["slow"]
    hub.pause = 0.2  # a piece; the interrupt must be there before the last one, on a busy machine too
    sent = []

    def finish(display, wanted):
        if not sent and wanted.kind == "train":
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(download.DownloadDisplay, "finish", finish)
    assert run_tool(hub, root, monkeypatch=monkeypatch) == EXIT_INTERRUPTED
    assert "interrupted; what is complete stays" in capsys.readouterr().err
    folder = root / "datasets" / NAME
    there = {path.name for path in folder.glob("*.bin")}
    assert there and "fineweb_train_000001.bin" not in there
    assert not list(folder.glob(".parts*"))
    before = len(hub.fetched())
    assert start_download(hub, root, 4).run() == {}
    assert not {path.split("/")[-1] for path in hub.fetched()[before:]} & there
    assert_whole(hub, root, 4)


@pytest.mark.slow
def test_a_killed_download_is_gone_on_with(hub, root, repository):
    """In processes of their own, with huggingface_hub's own settings (HF_ENDPOINT, HF_HOME)."""
    hub.faults[f"{SHARDS}/fineweb_train_000001.bin"] = ["slow"]
    hub.pause = 3600.0  # longer than any machine takes for the others; the end of the hub cuts it short
    command = [sys.executable, "data/download.py", "--repo-id", REPOSITORY_ID, "--variant", "sp300", "--json"]
    command += ["--root", str(root)]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(root.parent / "home"), "HF_HUB_OFFLINE": ""}
    killed = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = root / "datasets" / NAME
    deadline = time.monotonic() + 600
    tokenizer = root / "tokenizers" / "fineweb_300_bpe.model"  # may well be the last of the quick ones
    while time.monotonic() < deadline and killed.poll() is None:
        if len(list(folder.glob("*.bin"))) == 4 and tokenizer.exists():
            break
        hub.pace.wait(0.05)
    killed.kill()
    killed.communicate()
    there = {path.name for path in folder.glob("*.bin")}
    assert len(there) == 4 and "fineweb_train_000001.bin" not in there
    before = len(hub.fetched())
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert [path.split("/")[-1] for path in hub.fetched()[before:]] == ["fineweb_train_000001.bin"]
    assert json.loads(finished.stdout)["data_id"] == verify_folder(folder).data_id != ""
    assert_whole(hub, root, 4)


def test_a_second_download_into_a_folder_is_refused(hub, root):
    with sole_downloader(root / "datasets" / NAME), pytest.raises(DownloadError, match="another download is at work"):
        start_download(hub, root).run()


BAD_QUESTIONS = {
    ("--variant", "sp7"): "does not have sp7; it has fineweb10B_sp300",
    ("--train-shards", "5"): "5 training shards wanted, there are 4",
    ("--train-shards", "-1"): "must not be negative",
    ("--repo-id", "no/where"): "the hub has no dataset no/where",
    ("--repo-id", "a/b/c"): "is no repository of the hub",
    ("--revision", "v9"): "has no revision v9",
    ("--endpoint", "http://127.0.0.1:9"): "can't reach the hub",
}


@pytest.mark.parametrize(("arguments", "message"), BAD_QUESTIONS.items())
def test_bad_questions_get_one_line(hub, root, arguments, message, monkeypatch, capsys):
    assert run_tool(hub, root, *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("download: ") and error.count("\n") == 1 and message in error
