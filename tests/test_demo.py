"""What tools/demo.py shows: answers side by side, what cannot be opened, what the cards say."""

import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golf.runtime import Runtime
from lab.cli import run_command
from lab.demo.answers import (
    Answer,
    Column,
    DemoError,
    answer_together,
    column_titles,
    departure,
    find_pictures,
    open_columns,
)
from lab.demo.page import all_cards, choose_port, column_card, import_gradio, picture_list, plain, responder
from lab.generate.sampling import SamplingError, SamplingOptions
from lab.generate.text_model import open_text_model
from tests.demo_fixtures import PROMPT, make_demo_artifacts
from tools import demo

torch.set_num_threads(1)
CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> list[Path]:
    return make_demo_artifacts(tmp_path_factory.mktemp("demo"), demo.REPOSITORY / "docs/loss.png")


@pytest.fixture(scope="module")
def columns(artifacts) -> list[Column]:
    return open_columns(artifacts, None, CPU)


# ---- answers ----


@dataclass
class FakeGeneration:
    """Writes the letters of a word, and may fail; what was written where goes into one list of all."""

    name: str
    word: str
    written: list[str]
    fails_at: int = 99
    statistics: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(generated_tokens=0, tokens_per_second=0)
    )
    notes: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=lambda: [""])

    def __next__(self) -> list[str]:
        at = self.statistics.generated_tokens
        if at == self.fails_at:
            raise SamplingError("its weights are broken")
        self.written.append(self.name)
        self.statistics = SimpleNamespace(generated_tokens=at + 1, tokens_per_second=10 * (at + 1))
        self.ended = ["length" if at + 1 == len(self.word) else ""]
        return [self.word[at]]


def fake_column(name: str, word: str, written: list[str], **more) -> Column:
    model = SimpleNamespace(
        generate=lambda prompts, options: FakeGeneration(name, word, written, **more),
        bits_per_byte=lambda text: 2.0, artifact_bytes=12_345, bits_per_weight=4.5, val_bpb=None,
    )  # fmt: skip
    return Column(name, f"/runs/{name}.golf", model)


def test_streams_interleave_and_a_longer_one_goes_on_alone():
    written: list[str] = []
    rounds = list(answer_together([fake_column("a", "xyz", written), fake_column("b", "pq", written)], "?", None))
    assert written == ["a", "b", "a", "b", "a"]
    assert [[answer.text for answer in answers] for answers in rounds] == [
        ["", ""], ["x", "p"], ["xy", "pq"], ["xyz", "pq"],
    ]  # fmt: skip
    assert [answer.ended for answer in rounds[2]] == ["", "length"]
    assert [(a.tokens, a.tokens_per_second, a.prompt_bpb) for a in rounds[-1]] == [(3, 30, 2.0), (2, 20, 2.0)]


def test_one_that_fails_keeps_its_text_and_the_others_go_on():
    written: list[str] = []
    columns = [
        fake_column("a", "xyz", written, fails_at=1),
        Column("b", "b", None, "is none"),
        fake_column("c", "pqr", written),
    ]
    *_, last = answer_together(columns, "", None)
    assert [(a.text, a.ended, a.problem) for a in last] == [
        ("x", "problem", "its weights are broken"), ("", "problem", "is none"), ("pqr", "length", ""),
    ]  # fmt: skip
    assert last[0].prompt_bpb is None, "an empty prompt has no byte"


def sampling(seed: int) -> SamplingOptions:
    return SamplingOptions(tokens=24, temperature=1.2, seed=seed)


def final_texts(columns: list[Column], seed: int) -> list[str]:
    *_, last = answer_together(columns, PROMPT, sampling(seed))
    return [answer.text for answer in last]


def test_one_seed_gives_one_text_and_it_is_that_of_the_model_alone(artifacts, columns):
    first = final_texts(columns, seed=5)
    assert all(first[:3]) and first == final_texts(columns, seed=5) and first != final_texts(columns, seed=6)
    alone = open_text_model(artifacts[2], runtime=CPU).generate([PROMPT], sampling(5))
    assert first[2] == "".join(new for [new] in alone)


def test_figures_are_those_of_the_model(artifacts, columns):
    *_, last = answer_together(columns, PROMPT, SamplingOptions(tokens=3))
    for path, column, answer in list(zip(artifacts, columns, last, strict=True))[:3]:
        assert column.model.artifact_bytes == path.stat().st_size
        assert answer.tokens == 3 and answer.tokens_per_second > 0
        assert answer.prompt_bpb == column.model.bits_per_byte(PROMPT) and 0 < answer.prompt_bpb < 8


def test_a_prompt_that_can_not_be_measured_is_answered_all_the_same():
    def unmeasurable(text: str) -> float:
        raise SamplingError("no text")

    column = fake_column("a", "xy", [])
    column.model.bits_per_byte = unmeasurable
    *_, last = answer_together([column], " ", None)
    assert (last[0].text, last[0].prompt_bpb, last[0].problem) == ("xy", None, "")
    assert last[0].remarks == ("no bits per byte of the prompt: no text",)


def test_a_bad_artifact_is_a_message_in_its_column(artifacts, columns):
    assert [column.model is None for column in columns] == [False, False, False, True]
    assert columns[3].problem.startswith(str(artifacts[3])) and columns[0].problem == ""
    *_, last = answer_together(columns, PROMPT, SamplingOptions(tokens=2))
    assert last[3] == Answer(ended="problem", problem=columns[3].problem)


def test_where_none_opens_there_is_nothing_to_show(artifacts, tmp_path):
    with pytest.raises(DemoError, match="no artifact can be opened: .*broken.*; .*missing"):
        open_columns([artifacts[3], tmp_path / "missing.golf"], None, CPU)


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_where_a_text_departs(reference, text):
    common = departure(reference, text)
    assert reference[:common] == text[:common] or common > len(reference)
    if common < len(text):
        assert common < len(reference) and reference[common] != text[common]
    else:
        assert text.startswith(reference) or reference.startswith(text)


def test_titles_tell_artifacts_apart():
    assert column_titles([Path("runs/a/model.golf"), Path("b/int4.golf")]) == ["a", "int4"]
    assert column_titles([Path("x/a/model.golf"), Path("y/a/model.golf"), Path("c.golf")]) == ["x/a", "y/a", "c"]
    assert column_titles([Path("c.golf"), Path("c.golf"), Path("/model.golf")]) == ["c", "c (again)", "model"]
    assert column_titles([]) == []


def test_pictures_of_the_runs_the_project_and_the_folders(artifacts, tmp_path, write_tree):
    home, own = tmp_path / "home", tmp_path / "other/run/rate_curve/rate_curve.png"
    names = ("docs/rate_curve.png", "docs/more.png", "records/track/ablation/gap.png", "records/track/README.md")
    write_tree(tmp_path, {f"home/{name}": "" for name in names})
    write_tree(tmp_path, {"shown/deep/loss.svg": "", "shown/table.md": "", "other/run/rate_curve/rate_curve.png": ""})
    found = find_pictures(artifacts, [tmp_path / "shown"], home)
    places = ["compare_quant/compare_quant.png", "docs/rate_curve.png", "records/track/ablation/gap.png"]
    assert [picture.caption for picture in found][1:3] == places[1:] and found[0].caption == f"run/{places[0]}"
    assert found[0].path == artifacts[0].parent / places[0] and found[3].path == tmp_path / "shown/deep/loss.svg"
    assert [picture.path for picture in find_pictures([own.parents[1] / "model.golf"], [], tmp_path)] == [own]
    with pytest.raises(DemoError, match="holds no picture"):
        find_pictures(artifacts, [tmp_path / "nowhere"], home)


# ---- cards ----


def test_a_card_shows_figures_and_a_dash_where_one_is_not_known():
    card = column_card(
        0, fake_column("a", "", []), "p", Answer("text", 4, 1234.4, 1.25, ("was cut",), "document"), "te"
    )
    figures = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", card))
    assert figures == {
        "bytes": "12,345", "bits per weight": "4.500", "val_bpb": "&ndash;", "bits per byte of the prompt": "1.250",
        "tokens/s": "1,234",
    }  # fmt: skip
    assert "was cut" in card and "golf-end" in card and "golf-writing" not in card and "golf-departed" not in card


def test_text_is_shown_as_it_is_and_marked_from_where_it_departs():
    text = "<b>&{{value}}${1}"
    assert not set("<>{}$") & set(plain(text)) and "&lt;b&gt;&amp;" in plain(text)
    columns = [fake_column("a", "", []), fake_column("b", "", [])]
    cards = all_cards(columns, "<i>", [Answer("same<x"), Answer("same<y>")])
    assert "golf-departed" not in cards[0] and '<span class="golf-departed">y&gt;</span>' in cards[1]
    assert all("golf-writing" in card and "&lt;i&gt;" in card and "<i>" not in card for card in cards)


def test_the_first_model_that_opened_is_the_one_that_others_are_told_apart_from():
    columns = [Column("x", "x", None, "is none"), fake_column("a", "", []), fake_column("b", "", [])]
    cards = all_cards(columns, "", [Answer(ended="problem", problem="is none"), Answer("k"), Answer("m")])
    assert "is none" in cards[0] and "golf-figures" not in cards[0]
    assert "golf-departed" not in cards[1] and "golf-departed" in cards[2]


def test_cards_come_at_most_ten_times_a_second_and_the_last_is_whole():
    clock = iter(range(1000))
    column = fake_column("a", "x" * 50, [])
    shown = list(responder(None, [column], now=lambda: next(clock) / 50)("", 50, 0.8, 0, 1.0, None))
    assert 5 < len(shown) < 26 and "x" * 50 in shown[-1][0] and "golf-writing" not in shown[-1][0]
    gradio = SimpleNamespace(Error=lambda text, **_: RuntimeError(text))
    for emptied, complaint in (
        ([5, 1, 0, 2, 0], "top_p=2"),
        ([None, 1, 0, 1, 0], "tokens=0"),
        ([5, 1, 0, None, 0], "top_p=0"),
        ([5, None, 0, 1, 0], "temperature=nan"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            next(responder(gradio, [column])("", *emptied))


def test_no_pictures_are_a_sentence():
    assert picture_list([]).startswith('<p class="golf-idle">No pictures')


# ---- the command ----


def test_a_port_is_free_or_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DemoError, match=f"--port {port} can't be had"):
            choose_port(port)
        assert choose_port(0) not in (0, port)
    with pytest.raises(DemoError):
        choose_port(-1)


def run_demo(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    return run_command(demo.Options, demo.__doc__, demo.work), *capsys.readouterr()


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys, artifacts):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DemoError):
        import_gradio()
    status, output, complaint = run_demo(monkeypatch, capsys, str(artifacts[1]))
    assert (status, output) == (2, "") and complaint.count("\n") == 1
    assert "pip install -r requirements-demo.txt" in complaint


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "no artifact is named"), (["x.golf", "--top-p", "0"], "top_p=0")]
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    status, output, complaint = run_demo(monkeypatch, capsys, *arguments)
    assert (status, output) == (2, "") and complaint.startswith(f"demo: {message}") and complaint.count("\n") == 1
