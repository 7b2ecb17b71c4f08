"""tools/demo.py as it runs: its server, and its page in a headless Chromium; one server for all tests."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest

from tests.demo_fixtures import FORMS, PROMPT, make_demo_artifacts

pytestmark = pytest.mark.slow
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")
PATIENCE = 600_000
"""Milliseconds after which what the page should show won't come."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, repository) -> list[Path]:
    return make_demo_artifacts(tmp_path_factory.mktemp("demo"), repository / "docs" / "loss.png")


# ---- the server ----

WATCH_CONNECTIONS = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        with open({log!r}, "a") as file:
            print(event, arguments[1] if event != "socket.getaddrinfo" else arguments[0], file=file)
sys.addaudithook(watch)
"""


@dataclass
class Served:
    process: subprocess.Popen
    address: str
    record: dict
    connections: Path


@pytest.fixture(scope="module")
def served(artifacts, repository, tmp_path_factory) -> Iterator[Served]:
    """The command, serving three models and a broken file."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("gradio is not installed (requirements-demo.txt)")
    folder = tmp_path_factory.mktemp("served")
    log = folder / "connections"
    (folder / "sitecustomize.py").write_text(WATCH_CONNECTIONS.format(log=str(log)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder)}
    command = [
        sys.executable,
        "tools/demo.py",
        *map(str, artifacts),
        "--json",
        "--tokens",
        "40",
        "--temperature",
        "1.2",
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        record = json.loads(line)
        yield Served(process, record["address"], record, log)
    finally:
        process.kill()
        process.wait()


def test_the_server_listens_to_this_machine_alone(served):
    place = urlsplit(served.address)
    assert place.hostname == "127.0.0.1"
    socket.create_connection(("127.0.0.1", place.port), timeout=60).close()
    with pytest.raises(ConnectionRefusedError):  # what listens on all addresses has this one too
        socket.create_connection(("127.0.0.2", place.port), timeout=60)


def test_it_says_what_it_opened(served, artifacts):
    assert [model["title"] for model in served.record["models"]] == [*FORMS, "broken"]
    assert [bool(model["problem"]) for model in served.record["models"]] == [False, False, False, True]
    pictures = list(map(Path, served.record["pictures"]))
    assert [picture.name for picture in pictures[:2]] == ["compare_quant.png", "rate_curve.png"]
    assert all("records" in picture.parts for picture in pictures[2:])


def test_only_pictures_leave_the_disk(served, artifacts):
    fetch = build_opener(ProxyHandler({})).open
    picture = served.record["pictures"][0]
    with fetch(f"{served.address}gradio_api/file={picture}") as answer:
        assert answer.read() == Path(picture).read_bytes()
    for path in (artifacts[0], artifacts[0].parent / "config.json", Path(__file__)):
        with pytest.raises(HTTPError) as refused:
            fetch(f"{served.address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


# ---- the page in a browser ----


def find_browser() -> str:
    return next(filter(None, map(shutil.which, BROWSERS)), "")


@pytest.fixture(scope="module")
def browser(served):
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    with playwright.sync_playwright() as driver:
        found = find_browser() or driver.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
        opened = driver.chromium.launch(executable_path=found, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, served):
    """Opens the page at a width; afterwards nothing may have been asked of another machine, and no script failed."""
    asked, faults, contexts = [], [], []

    def open_it(width: int, height: int = 900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(served.address)
        page.wait_for_selector("#answer")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert len(asked) > 10 and {urlsplit(url).hostname for url in asked if not url.startswith("data:")} == {"127.0.0.1"}
    assert faults == []


WRITTEN = "document.querySelectorAll('.golf-writing').length == 0 && document.querySelectorAll('.golf-new').length == 3"
EMPTIED = "document.querySelectorAll('.golf-new').forEach(text => text.remove())"


def answers_on(page, press: str = "#answer") -> list[str]:
    """Press a button; the texts of the three columns when they have been written."""
    page.evaluate(EMPTIED)
    page.click(press)
    page.wait_for_function(WRITTEN, timeout=PATIENCE)
    return page.locator(".golf-new").all_text_contents()


FITS = """document.documentElement.scrollWidth <= innerWidth
    && [...document.querySelectorAll('main *')].every(part => part.getBoundingClientRect().right <= innerWidth)"""


def seed_on(page) -> str:
    return page.locator("#controls").get_by_label("Seed").input_value()


def set_number(page, name: str, value: str) -> None:
    page.locator("#controls").get_by_label(f"number input for {name}").fill(value)


def test_three_columns_fill_and_a_seed_gives_its_text_again(open_page):
    page = open_page(1400)
    page.fill("#prompt textarea", PROMPT)
    first = answers_on(page)
    assert all(len(text) >= 20 for text in first)
    assert page.locator(".golf-prompt").all_text_contents() == [PROMPT] * 3
    assert answers_on(page) == first
    other = answers_on(page, "#next-seed")
    assert seed_on(page) == "1" and all(text != before for text, before in zip(other, first, strict=True))
    page.locator("#controls").get_by_label("Seed").fill("0")
    assert answers_on(page) == first
    figures = page.locator(".golf-figures dd").all_text_contents()
    assert len(figures) == 15 and all(float(figures[5 * column + 4].replace(",", "")) > 0 for column in range(3))
    assert "broken.golf" in page.locator(".golf-problem").inner_text()


def test_temperature_zero_is_the_same_for_every_seed(open_page):
    page = open_page(1400)
    page.fill("#prompt textarea", "")
    set_number(page, "Temperature", "0")
    first = answers_on(page)
    assert all(first) and answers_on(page, "#next-seed") == first


def test_columns_stand_side_by_side_or_stack_without_scrolling_sideways(open_page):
    wide, phone = open_page(1400), open_page(390, 844)
    for page, stacked in ((wide, False), (phone, True)):
        texts = answers_on(page)
        boxes = [page.locator(f"#column-{number}").bounding_box() for number in range(3)]
        assert (boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]) == stacked and all(texts)
        assert (boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]) != stacked
        assert page.evaluate(FITS)
        assert min(box["width"] for box in boxes) > 300


def test_what_is_typed_is_text_and_stop_stops(open_page):
    page = open_page(1000)
    typed = "{{value}} ${1+1} <b>bold</b> \u00e9\u4e2d"
    page.fill("#prompt textarea", typed)
    set_number(page, "Tokens", "1000")
    set_number(page, "Temperature", "0")  # else a document may end before anybody can stop it
    page.click("#answer")
    page.wait_for_selector(".golf-writing .golf-new")
    assert page.locator(".golf-prompt").first.text_content() == typed
    page.click("#stop")
    texts, before = page.locator(".golf-new").all_text_contents(), None
    for _ in range(20):
        time.sleep(0.8)
        texts, before = page.locator(".golf-new").all_text_contents(), texts
        if texts == before:
            break
    assert texts == before and max(map(len, texts)) < 900, "writing went on"
    assert page.locator(".golf-writing").count() == 0
    set_number(page, "Tokens", "5")
    assert all(0 < len(text) <= 5 for text in answers_on(page)), "the models are free again"


def test_pictures_are_shown(open_page, served):
    page = open_page(390, 844)
    page.get_by_role("tab", name="Pictures").click()
    wanted = len(served.record["pictures"])
    page.wait_for_function(f"[...document.images].filter(image => image.naturalWidth > 100).length == {wanted}")
    assert page.evaluate(FITS)
    assert "compare_quant.png" in page.locator("figcaption").first.inner_text()


# ---- last: the end of the server ----


def test_the_server_asked_nothing_of_any_other_machine(served):
    lines = served.connections.read_text().splitlines()
    assert any("socket.bind" in line for line in lines), "the watch saw nothing"
    foreign = [line for line in lines if not re.search(r"127\.0\.0\.1|localhost|::1|'/|''", line)]
    assert foreign == []


def test_ctrl_c_ends_it_cleanly(served):
    served.process.send_signal(signal.SIGINT)
    output, complaint = served.process.communicate(timeout=600)
    assert (served.process.returncode, output) == (0, ""), complaint
    assert "Traceback" not in complaint and "ERROR" not in complaint
