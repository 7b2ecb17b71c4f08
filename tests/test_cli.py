"""What the commands share: libraries that only they need, JSON objects, Markdown tables."""

import json
import subprocess
import sys

import pytest

from golf.config.knobs import UserError
from lab.cli import lab_library, markdown_table, read_json_object


class PlantedError(UserError):
    """An error of one tool's own."""


def test_a_library_is_imported_or_named(monkeypatch):
    assert lab_library("json.decoder") is sys.modules["json.decoder"]
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"^scipy can't be imported .*pip install -r requirements-lab.txt$") as caught:
        lab_library("scipy.stats")
    assert "\n" not in str(caught.value)


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"µ": [1]}), encoding="utf-8")
    assert read_json_object(tmp_path / "a.json", PlantedError) == {"µ": [1]}


@pytest.mark.parametrize(("content", "message"), [
    (None, "is missing"),
    (b"{", "can't be read as JSON"),
    (b"\xff\xfe", "can't be read as JSON"),
    (b"[]", "must hold a JSON object, not a list"),
])  # fmt: skip
def test_what_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlantedError, match=message) as caught:
        read_json_object(path, PlantedError)
    assert str(path) in str(caught.value)


def test_a_markdown_table():
    text = markdown_table(("what", "how", "much"), [("a|b", "", 1.5), ("c", None, 2)], texts=2)
    assert text == "| what | how | much |\n| --- | --- | --: |\n| a\\|b |  | 1.5 |\n| c | None | 2 |\n"
    assert markdown_table(("a", "b"), []) == "| a | b |\n| --- | --: |\n"


@pytest.mark.parametrize("tool", ["make_submission", "check_submission", "compare"])
def test_a_tool_starts_without_the_libraries_of_a_run_and_of_others(repository, tool):
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'scipy', 'jinja2'} & sys.modules.keys())"
    command = [sys.executable, "-c", code, f"tools/{tool}.py"]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert finished.stdout == "set()\n", finished.stderr
