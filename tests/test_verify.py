"""Every kind of damage to a folder of shards is found, and a sound folder passes. pytest tests/test_verify.py"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import verify
from golf.config.knobs import EXIT_FINDINGS
from golf.data.manifest import MANIFEST_NAME
from golf.data.shards import DataError, ShardError, write_shard
from lab.cli import run_command
from lab.prepare.verification import (
    DOWNLOADS_NAME,
    FileFacts,
    ends_fingerprint,
    leaks,
    scan_file,
    verify_folder,
)

TOKENS, VOCABULARY = 6000, 500


@pytest.fixture
def bare(tmp_path) -> Path:
    """Three training shards and one for validation, with its sidecar, that no record vouches for."""
    folder = tmp_path / "fineweb10B_sp500"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train_000000", "train_000001", "train_000002", "val_000000", "val_bytes_000000"):
        write_shard(folder / f"fineweb_{split}.bin", generator.integers(0, VOCABULARY, TOKENS))
    return folder


def file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture
def prepared(bare) -> Path:
    (bare / "tokenizer.model").write_bytes(b"pieces" * 100)
    files = {path.name: file_entry(path) for path in sorted(bare.iterdir())}
    tokenizer = {"sha256": files["tokenizer.model"]["sha256"], "vocab_size": VOCABULARY}
    splits = {"train": {"tokens": 3 * TOKENS}, "val": {"tokens": TOKENS}}
    manifest = {"tokenizer": tokenizer, "splits": splits, "files": files, "data_id": "0123456789abcdef"}
    (bare / MANIFEST_NAME).write_text(json.dumps(manifest))
    return bare


@pytest.fixture
def downloaded(bare) -> Path:
    model = bare.parent / "tokenizers" / "some.model"
    model.parent.mkdir()
    model.write_bytes(b"pieces" * 100)
    files = {path.name: file_entry(path) | {"ends": ends_fingerprint(path)} for path in sorted(bare.iterdir())}
    files["../tokenizers/some.model"] = file_entry(model)
    tokenizer = {"file": "../tokenizers/some.model", "sha256": file_entry(model)["sha256"], "vocab_size": VOCABULARY}
    (bare / DOWNLOADS_NAME).write_text(json.dumps({"tokenizer": tokenizer, "files": files}))
    return bare


@pytest.fixture(params=["bare", "prepared", "downloaded"])
def sound(request) -> Path:
    return request.getfixturevalue(request.param)


def overwrite(folder: Path, name: str, position: int, data: bytes) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(position)
        file.write(data)


def truncate(folder: Path) -> None:
    data = (folder / "fineweb_train_000001.bin").read_bytes()
    (folder / "fineweb_train_000001.bin").write_bytes(data[:-100])


def remove_train(folder: Path) -> None:
    (folder / "fineweb_train_000001.bin").unlink()


def double_shard(folder: Path) -> None:
    (folder / "fineweb_train_000002.bin").write_bytes((folder / "fineweb_train_000000.bin").read_bytes())


def swap_shards(folder: Path) -> None:
    one, two = folder / "fineweb_train_000000.bin", folder / "fineweb_train_000002.bin"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def foreign_shard(folder: Path) -> None:
    write_shard(folder / "other_train_000000.bin", np.arange(50))


def shorter_sidecar(folder: Path) -> None:
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.arange(TOKENS - 1) % 7)


def large_token(folder: Path) -> None:
    overwrite(folder, "fineweb_val_000000.bin", 1024 + TOKENS, VOCABULARY.to_bytes(2, "little"))


def other_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer.model", folder.parent / "tokenizers" / "some.model"):
        if path.exists():
            path.write_bytes(b"PIECES" * 100)


EVERYWHERE = {
    "empty": (lambda folder: (folder / "fineweb_val_000000.bin").write_bytes(b""), "empty (0 bytes)"),
    "truncated": (truncate, "truncated|but the file holds 5950"),
    "shorter than a header": (lambda folder: (folder / "fineweb_val_000000.bin").write_bytes(b"x" * 9), "9 bytes"),
    "wrong magic": (lambda folder: overwrite(folder, "fineweb_val_000000.bin", 0, b"\1\2\3\4"), "not a token shard"),
    "wrong version": (lambda folder: overwrite(folder, "fineweb_val_000000.bin", 4, b"\7"), "shard version 7"),
    "wrong count": (lambda folder: overwrite(folder, "fineweb_train_000000.bin", 8, b"\1"), "header says"),
    "missing": (remove_train, "missing"),
    "no validation": (lambda folder: (folder / "fineweb_val_000000.bin").unlink(), "missing|no shards of this split"),
    "double": (double_shard, "has the content of fineweb_train_000000.bin|not the file that was recorded"),
    "foreign": (foreign_shard, "shards of another data set"),
    "sidecar too short": (shorter_sidecar, "5999 byte counts|truncated"),
}
"""Damage that a quick check finds with and without a record: what is done, and one thing that is said."""

RECORDED = {
    "swapped": swap_shards,
    "one token": lambda folder: overwrite(folder, "fineweb_train_000001.bin", 1024 + TOKENS, b"\0\0\1\1"),
    "token beyond the vocabulary": large_token,
    "swapped tokenizer": other_tokenizer,
    "foreign": foreign_shard,
}
"""Damage that a full check finds where there is a record."""


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_folder_passes(sound, full):
    read = []
    report = verify_folder(sound, full, advance=read.append)
    assert report.problems == []
    counts = {"shards": 1, "tokens": TOKENS}
    assert report.splits == {"train": {"shards": 3, "tokens": 3 * TOKENS}, "val": counts, "val bytes": counts}
    recorded = report.facts_from != ""
    assert report.unhashed == (0 if recorded else 5) and bool(report.data_id) == recorded
    assert sum(read) == 5 * (1024 + 2 * TOKENS) * full + 600 * recorded


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_quick_check_finds(sound, kind):
    damage, message = EVERYWHERE[kind]
    damage(sound)
    problems = [problem.problem for problem in verify_folder(sound).problems]
    assert any(part in problem for problem in problems for part in message.split("|")), problems


@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("record", ["prepared", "downloaded"])
def test_a_full_check_finds(record, kind, request):
    folder = request.getfixturevalue(record)
    RECORDED[kind](folder)
    report = verify_folder(folder, full=True)
    assert report.problems and report.data_id == ""


def test_a_downloaded_folder_shows_swapped_shards_at_a_quick_look(downloaded):
    swap_shards(downloaded)
    found = {problem.file: problem.problem for problem in verify_folder(downloaded).problems}
    assert found.keys() == {"fineweb_train_000000.bin", "fineweb_train_000002.bin"}
    assert all("not the file that was recorded" in problem for problem in found.values())


def test_a_token_beyond_the_vocabulary_is_named(prepared):
    large_token(prepared)
    manifest = json.loads((prepared / MANIFEST_NAME).read_text())
    manifest["files"]["fineweb_val_000000.bin"] = file_entry(prepared / "fineweb_val_000000.bin")
    (prepared / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert verify_folder(prepared).problems == []
    (problem,) = verify_folder(prepared, full=True).problems
    assert problem.problem.startswith("holds token 500, but its tokenizer has 500 pieces")


def test_counts_of_tokens_must_be_those_of_the_manifest(prepared):
    manifest = json.loads((prepared / MANIFEST_NAME).read_text())
    manifest["splits"]["train"]["tokens"] += 1
    (prepared / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert [problem.problem for problem in verify_folder(prepared).problems] == ["18000 tokens, must be 18001"]


@pytest.mark.parametrize(
    ("shards", "tokens", "known"),
    [(1499, 149_900_000_000, True), (80, 800_000_000, True), (80, 8_000_000_000, False), (8, 800_000_000, False)],
)
def test_shard_sets_that_hold_validation_text_are_known_by_their_size(shards, tokens, known):
    assert leaks(shards, tokens) == known


def test_a_folder_with_the_fingerprint_of_a_leak_is_refused(bare, monkeypatch):
    monkeypatch.setattr("lab.prepare.verification.leaks", lambda shards, tokens: shards == 3)
    assert any("validation documents" in problem.problem for problem in verify_folder(bare).problems)


def test_numbers_may_begin_at_one_but_not_later(bare):
    for index in (2, 1, 0):
        (bare / f"fineweb_train_{index:06d}.bin").rename(bare / f"fineweb_train_{index + 1:06d}.bin")
    assert verify_folder(bare).problems == []
    (bare / "fineweb_train_000001.bin").unlink()
    (problem,) = verify_folder(bare).problems
    assert (problem.file, problem.problem[:7]) == ("fineweb_train_000001.bin", "missing")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": 3}', '{"files": {"x": 3}}', '{"files": {}, "splits": 3}'])
def test_an_unreadable_record_is_bad_input(bare, text):
    for name in (MANIFEST_NAME, DOWNLOADS_NAME):
        (bare / name).write_text(text)
        with pytest.raises(DataError, match=name):
            verify_folder(bare)
        (bare / name).unlink()


def test_a_scan_agrees_with_git_and_with_numpy(bare):
    path = bare / "fineweb_train_000000.bin"
    data = path.read_bytes()
    scan = scan_file(path)
    assert scan.sha256 == hashlib.sha256(data).hexdigest()
    assert scan.git_sha1 == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert scan.largest_token == np.frombuffer(data, "<u2")[512:].max()
    (bare / "empty").write_bytes(b"")
    assert scan_file(bare / "empty").git_sha1 == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert not FileFacts().hashed and FileFacts(git_sha1="0").hashed


@pytest.fixture
def run_verify(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, arguments)])
        return run_command(verify.Options, verify.__doc__, verify.work), *capsys.readouterr()

    return run


def test_the_tool_lists_what_it_finds(downloaded, run_verify):
    assert run_verify(downloaded)[0] == 0
    status, output, _ = run_verify(downloaded, "--full")
    assert status == 0 and f"{downloaded}: sound, data_id" in output and "18,000" in output
    truncate(downloaded)
    status, output, _ = run_verify(downloaded.parent)
    assert status == EXIT_FINDINGS
    assert output.splitlines()[-2] == f"{downloaded}/fineweb_train_000001.bin: truncated: 12924 bytes, must be 13024"
    status, output, _ = run_verify(downloaded, "--json")
    figures = json.loads(output)
    assert (status, figures["sound"], figures["folders"][0]["sound"]) == (EXIT_FINDINGS, False, False)
    assert figures["folders"][0]["problems"][0]["file"] == "fineweb_train_000001.bin"


def test_the_tool_says_when_no_hash_vouches(bare, run_verify):
    status, output, _ = run_verify(bare, "--full")
    assert status == 0 and "no recorded hash vouches for 5 of 5 files" in output


@pytest.mark.parametrize("arguments", [["no/such/place"], ["."], [".", "--quick", "--full"]])
def test_bad_input_is_one_line(arguments, run_verify, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, error = run_verify(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith("verify: ") and error.count("\n") == 1


def test_it_is_a_shard_error_no_more_than_a_finding(bare):
    """What the loaders raise for a damaged shard is a finding here, and does not stop the check."""
    overwrite(bare, "fineweb_train_000000.bin", 0, b"\0\0\0\0")
    try:
        report = verify_folder(bare)
    except ShardError:
        pytest.fail("a damaged shard stopped the check")
    assert len(report.problems) == 1
