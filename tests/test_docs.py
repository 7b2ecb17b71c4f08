"""README.md and docs/: short, without dead ends, and true of the names in the code.

python -m pytest tests/test_docs.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from golf.config.config import KNOBS, parse_value
from golf.config.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
LIVING_PAGES = [page for page in PAGES if page.name != "LOG.md"]
"""A diary keeps the names of its day."""
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
EVERY_LIVING_PAGE = pytest.mark.parametrize("page", LIVING_PAGES, ids=lambda page: page.name)
MOST_LINES_OF_README, MOST_CHARACTERS, MOST_FILES_OF_TECHNIQUE = 120, 110, 3


def links(text: str) -> list[str]:
    """Targets of the links and images of a page, outside its code, that are on this machine."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """What a link may name after #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(text: str) -> Iterator[str]:
    """Code spans and blocks of a page, but for blocks of Python."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language != "python":
            yield block
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def knob_faults(code: str) -> Iterator[str]:
    """What is wrong with the key=value words and presets of a piece of code."""
    for knob, values in re.findall(r"(?<![\w.$-])(\w+)=([^\s`'\"]+)", code):
        if knob == "key" or (knob.isupper() and knob.lower() not in KNOBS):  # any knob; a variable of the shell
            continue
        for value in values.split("|"):
            try:
                parse_value(knob, KNOBS[knob.lower()][1], value)
            except (KeyError, ValueError) as error:
                yield f"{knob}={value}: {error}"
    for preset in re.findall(r"--preset[ =](\w[\w-]*)", code):
        if preset not in PRESETS and not preset.isupper():
            yield f"--preset {preset}"


def too_long(text: str) -> list[str]:
    """Lines over the width of a page, outside tables and links."""
    lines = [line for line in text.splitlines() if not line.startswith("|") and not re.search(r"\]\(", line)]
    return [line for line in lines if len(line) > MOST_CHARACTERS]


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


@EVERY_LIVING_PAGE
def test_lines_are_short(page):
    assert too_long(page.read_text(encoding="utf-8")) == []


@EVERY_PAGE
def test_every_link_and_image_exists(page):
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reachable_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = [target.partition("#")[0] for target in links(page.read_text(encoding="utf-8"))]
            waiting += [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
    assert set(PAGES) <= reached


def test_every_picture_is_shown():
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page.read_text(encoding="utf-8"))}
    assert set((REPOSITORY / "docs").glob("*.png")) <= shown


def test_every_tool_has_a_row():
    rows = re.findall(r"^\| `python ((?:tools|data)/\w+\.py)", (REPOSITORY / "docs/TOOLS.md").read_text(), re.MULTILINE)
    scripts = [path for folder in ("tools", "data") for path in (REPOSITORY / folder).glob("*.py")]
    assert sorted(rows) == sorted(path.relative_to(REPOSITORY).as_posix() for path in scripts)


@EVERY_LIVING_PAGE
def test_knobs_and_presets_exist(page):
    faults = [fault for code in code_of(page.read_text(encoding="utf-8")) for fault in knob_faults(code)]
    assert faults == []


@EVERY_LIVING_PAGE
def test_files_exist(page):
    for name in re.findall(r"(?<![\w/<])((?:golf|lab|tools|data|tests|configs)/[\w/.]*\w)`", page.read_text()):
        if not name.startswith(("data/datasets", "data/tokenizers")) and not Path(name).stem.isupper():
            assert (REPOSITORY / name).exists(), name


def test_planted_mistakes_are_found(tmp_path):
    assert (
        list(knob_faults("num_layers=3 key=value SEED=7 PYTHON=python3 quantizer=rtn|waterfill --preset local")) == []
    )
    for wrong in ("num_layer=3", "num_layers=few", "quantizer=fit", "quantizer=rtn|grid", "--preset lokal", "SEED=x"):
        assert len(list(knob_faults(wrong))) == 1, wrong
    assert list(code_of("a `x=1` b\n```\ny=2\n```\n```python\nz=3\n```\n")) == ["y=2\n", "x=1"]
    assert links("[a](b.md) ![c](d.png) [e](https://f) `[g](h)`") == ["b.md", "d.png"]
    assert too_long("x" * 111) and not too_long("|" + "x" * 111) and not too_long("x" * 110)
    (tmp_path / "page.md").write_text("# On 8xH100\n## What runs, and how\n")
    assert anchors(tmp_path / "page.md") == {"on-8xh100", "what-runs-and-how"}


TECHNIQUES = {
    "A residual mix": (r"resid_mix", "tests/test_model.py"),
    "An optimizer for some parameters": (r"\bMuon\b|muon_|MUON", "tests/test_optim.py"),
    "A quantizer for a site": (r"twosided|two_sided|\bdge\d?\b|-dge|\|dge", "tests/test_site_grid.py"),
}
"""Heading in docs/ADDING.md: how its names are known, and its test."""


def living_text(path: Path) -> str:
    """A file without the list of what files of version 1 hold, which no technique is added to."""
    return re.sub(r"^VERSION_1_FIELDS = \{.*?^\}", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("heading", TECHNIQUES)
def test_a_technique_is_in_few_files_and_adding_names_them(heading):
    pattern, test = TECHNIQUES[heading]
    paths = [path for folder in ("golf", "configs") for path in (REPOSITORY / folder).rglob("*.*")]
    texts = {path.relative_to(REPOSITORY).as_posix(): path for path in paths if path.suffix in (".py", ".toml")}
    files = {name for name, path in texts.items() if re.search(pattern, living_text(path))}
    assert len(files) <= MOST_FILES_OF_TECHNIQUE, sorted(files)
    assert re.search(pattern, (REPOSITORY / test).read_text(encoding="utf-8"))
    page = (REPOSITORY / "docs/ADDING.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w/.]+)` \|", page.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    assert set(table) == files | {test}
