"""Record folders that no program would write: each fault is one line of the check, and never a traceback."""

import json
import os
from pathlib import Path

import pytest
from evidence_fixtures import edit_log, write_json, write_published

from lab.record.folder_check import check_record
from lab.record.record_folder import read_record


@pytest.fixture
def published(tmp_path) -> Path:
    return write_published(tmp_path / "track_10min_16mb" / "record")


def swap(key: str, value: str):
    """A change of submission.json as text: values that no json module would write."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "submission.json").read_text()) | {key: "@"}
        write_json(folder / "submission.json", content)
        text = (folder / "submission.json").read_text()
        (folder / "submission.json").write_text(text.replace('"@"', value))

    return spoil


def in_log(line: str):
    return lambda folder: edit_log(folder, "model_params", f"{line}\nmodel_params")


def as_script(source: str):
    return lambda folder: (folder / "train_gpt.py").write_text(source)


MALFORMED = {
    "deep JSON": (swap("name", "[" * 9000 + "]" * 9000), "S02-json-invalid"),
    "10^400": (swap("val_bpb", "1" + "0" * 400), "S04-json-type"),
    "10^400 bytes": (swap("bytes_total", "1" + "0" * 400), "S04-json-type"),
    "surrogate": (swap("author", r'"\ud800"'), "S02-json-invalid"),
    "5,000 digits": (in_log("Total submission size int8+zlib: " + "9" * 5000 + " bytes"), None),
    "seed of 5,000 digits": (in_log("seed:" + "9" * 5000), None),
    "two points": (in_log("final_x_roundtrip eval_time:1.2.3s"), None),
    "a comma of bytes": (in_log("Code size: , bytes\nTotal submission size int8+zlib: , bytes"), None),
    "unary chain": (as_script("x = " + "-" * 20_000 + "1\n"), "S62-grammar"),
    # Python 3.10 reads these two, later ones find them too deep; either way they are not the code of the record.
    "attribute chain": (as_script("x = a" + ".b" * 20_000 + "\n"), "S64-other-code"),
    "sum": (as_script("x = 1" + " + 1" * 20_000 + "\n"), "S64-other-code"),
    "elif chain": (as_script("if a: pass\n" + "elif a: pass\n" * 20_000), "S62-grammar"),
    "middling sum": (as_script("x = 1" + " + 1" * 1500 + "\n"), "S64-other-code"),
    "deep readable script": (
        lambda f: (f / "train_gpt_readable.py").write_text("x = 1" + " + 1" * 20_000 + "\n"),
        "S65-readable",
    ),
    "HASHES.json is a folder": (lambda f: (f / "HASHES.json").mkdir(), "S70-hash"),
    "submission.json is a folder": (
        lambda f: ((f / "submission.json").unlink(), (f / "submission.json").mkdir()),
        "S02-json-invalid",
    ),
    "dangling link": (lambda f: os.symlink("nowhere", f / "notes.txt"), "S09-dangling-link"),
    "dangling script": (
        lambda f: ((f / "train_gpt.py").unlink(), os.symlink("nowhere", f / "train_gpt.py")),
        "S01-missing-file",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "code"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_input_is_one_line(published, spoil, code):
    spoil(published)
    found = [finding for finding in check_record(read_record(published)) if finding.code == code]
    assert len(found) == (code is not None) and all("\n" not in one.text and len(one.text) < 600 for one in found)
