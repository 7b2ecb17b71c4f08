"""tools/sample.py: what it prints where, its JSON, and bad input."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.cli import run_command
from lab.generate.sampling import SamplingOptions
from lab.generate.text_model import open_text_model
from tests.sampled_run_fixtures import make_sampled_run
from tests.trained_run_fixtures import copied_run
from tools import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_sampled_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run_tool(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        words = [*map(str, arguments), "--device", "cpu", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        return run_command(sample.Options, sample.__doc__, sample.work), *capsys.readouterr()

    return call


def text_of(run: Path, prompt: str, **options) -> str:
    return "".join(new[0] for new in open_text_model(run).generate([prompt], SamplingOptions(**options)))


def test_text_goes_out_and_figures_beside_it(run_tool, run):
    status, output, figures = run_tool("--run", run, "--prompt", "The cat", "--tokens", 50, "--seed", 3)
    assert (status, output) == (0, "The cat" + text_of(run, "The cat", tokens=50, seed=3) + "\n")
    note, model, prompt, speed = figures.splitlines()
    assert note.startswith("the context of 32 tokens was full: the text was cut to its last 16 tokens")
    assert model.startswith("run: ") and "bits per weight" in model and "val_bpb" not in model
    assert prompt.startswith("prompt: 8 tokens in ") and prompt.endswith(" tokens/s")
    assert speed.startswith("generated: 50 tokens in ") and "tokens/s on cpu; cache " in speed


def test_a_stream_is_the_same_text(run_tool, run):
    words = ["--artifact", run / "model.golf", "--prompt", "The dog", "--tokens", 40]
    whole, streamed = run_tool(*words), run_tool(*words, "--stream")
    assert whole[:2] == streamed[:2] == (0, "The dog" + text_of(run, "The dog", tokens=40) + "\n")


def test_any_of_several_stop_texts_ends_the_row(run_tool, run):
    words = ["--run", run, "--prompt", "The", "--temperature", 0, "--tokens", 40]
    text = text_of(run, "The", temperature=0.0, tokens=40)
    for first, second in ((text[5:8], "\0"), ("\0", text[5:8])):
        output = run_tool(*words, "--stop", first, "--stop", second, "--stream")[1]
        assert output == "The" + text[: text.index(text[5:8])] + "\n"


def test_the_prompt_may_come_from_standard_input(run_tool, run, monkeypatch):
    for data, text in (("The é\n".encode(), "The é\n"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status, output, _ = run_tool("--run", run, "--prompt", "-", "--temperature", 0, "--tokens", 10)
        assert (status, output) == (0, text + text_of(run, text, temperature=0.0, tokens=10) + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    status, output, complaint = run_tool("--run", run, "--prompt", "-")
    assert (status, output) == (2, "") and "standard input is not UTF-8" in complaint


def test_rows_of_a_batch_in_json(run_tool, run):
    words = ["--run", run, "--prompt", "The", "--tokens", 20, "--batch", 3, "--seed", 5, "--top-k", 20, "--top-p", 0.9]
    status, output, complaint = run_tool(*words, "--json")
    content = json.loads(output)
    assert (status, complaint) == (0, "")
    assert [row["seed"] for row in content["rows"]] == [5, 6, 7]
    for row in content["rows"]:
        assert row["text"] == text_of(run, "The", tokens=20, seed=row["seed"], top_k=20, top_p=0.9)
        assert row["ended"] in ("length", "document")
    assert content["prompt_tokens"] == 12 and 20 < content["generated_tokens"] <= 60
    assert content["tokens_per_second"] > 0 and content["val_bpb"] is None and content["notes"] == []
    plain = run_tool(*words)[1]
    assert plain == "".join(f"=== seed {row['seed']}\nThe{row['text']}\n" for row in content["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --artifact FILE or --run FOLDER"),
        (["--run", "{run}", "--artifact", "{run}/model.golf"], "give either"),
        (["--run", "{run}/none"], "no such file or folder"),
        (["--run", "{empty}"], "is not the folder of a run"),
        (["--run", "{untrained}"], "the run has none yet"),
        (["--artifact", "{run}/weights.safetensors"], "not an artifact"),
        (["--artifact", "{alone}"], "name its tokenizer with --tokenizer"),
        (["--run", "{run}", "--tokenizer", "{run}/none.json"], "no such tokenizer"),
        (["--run", "{run}", "--tokenizer", "{other}"], "is not that of the artifact's tokenizer"),
        (["--run", "{run}", "--batch", "0"], "batch=0"),
        (["--run", "{run}", "--batch", "2", "--stream"], "--stream is for one row"),
        (["--run", "{run}", "--stream", "--json"], "--stream is for one row"),
        (["--run", "{run}", "--tokens", "0"], "tokens=0"),
        (["--run", "{run}", "--temperature", "-1"], "temperature=-1"),
        (["--run", "{run}", "--top-p", "0"], "top_p=0"),
        (["--run", "{run}", "--stop", ""], "stop: texts"),
        (["--run", "{run}", "--packed-cache"], "act_k or act_v"),
    ],
)
def test_bad_input_is_one_line(run_tool, run, tmp_path, arguments, message):
    untrained = copied_run(run, tmp_path)
    alone = shutil.move(untrained / "model.golf", tmp_path / "alone.golf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"kind": "chars", "characters": "a"}')
    places = {"run": run, "untrained": untrained, "alone": alone, "empty": tmp_path / "empty"}
    places["other"] = tmp_path / "other.json"
    status, output, complaint = run_tool(*[word.format(**places) for word in arguments])
    assert (status, output) == (2, "")
    assert complaint.startswith("sample: ") and message in complaint and complaint.count("\n") == 1
