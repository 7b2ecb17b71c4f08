"""tools/evals.py: what is asked, which answer counts, chance and its margin, and the way through lm-eval."""

import json
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golf.artifact.container import pack_artifact
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.init import build_model
from golf.quant.export import quantize_state
from lab.cli import run_command
from lab.evals.lm_eval_backend import has_lm_eval, score_by_lm_eval
from lab.evals.zero_shot import (
    ZeroShotError,
    ZeroShotItem,
    ZeroShotResult,
    chosen,
    load_items,
    read_items,
    score_items,
    zero_shot_remarks,
)
from lab.generate.sampling import SamplingError
from lab.generate.text_model import open_text_model
from lab.prepare.text_tokenizer import PlainTokenizer, bytes_tokenizer_file
from tools import evals

FIXTURES = Path(__file__).parent / "fixtures"
DATA = {task: FIXTURES / f"{task}_tiny.jsonl" for task in ("hellaswag", "boolq")}
HELLASWAG = {
    "activity_label": "Rowing",
    "ctx_a": "A boat lies there.",
    "ctx_b": "IT is",
    "endings": ["a", "b"],
    "label": 1,
}
BOOLQ = {"question": "is it so", "passage": "It is so.", "answer": True}


class LetterModel:
    """Stands in for a model: so many nats for each letter of a choice, by what it begins with; a token a character."""

    tokenizer = PlainTokenizer(bytes_tokenizer_file())

    def __init__(self, prices: dict[str, float], context: int = 1000):
        self.prices, self.context, self.asked = prices, context, []

    def continuation_nats(self, context: str, continuation: str) -> tuple[float, int, int]:
        self.asked.append((context, continuation))
        if len(continuation) > self.context:
            raise SamplingError("too long")
        begins = [price for begin, price in self.prices.items() if continuation.strip().startswith(begin)]
        return (begins[0] if begins else 1.0) * len(continuation.strip()), len(continuation), len(continuation)


def lines(*records: object) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records).encode()


# ---- items ----


def test_hellaswag_items_are_put_together_as_the_harness_does():
    items, sha256 = load_items("hellaswag", DATA["hellaswag"])
    assert len(items) == 6 and [item.answer for item in items] == [0, 1, 2, 3, 0, 1] and len(sha256) == 64
    assert items[0].context == "Baking bread: A woman puts flour and water into a bowl. She"
    assert items[0].choices[0] == "kneads the dough on the table until it is smooth."
    assert items[3].context == (  # of WikiHow, with its marks
        "Home and Garden: How to clean a window. Take a bucket of warm water. Add a little soap to it."
    )
    assert items[3].choices[3] == "Wipe the glass with a soft cloth and dry it. Begin at the top."
    assert not any(mark in text for item in items for text in (item.context, *item.choices) for mark in "[]")


def test_hellaswag_labels_may_be_texts():
    both = [read_items("hellaswag", lines(*[HELLASWAG | {"label": label}] * 2), "f") for label in (1, "1")]
    assert both[0] == both[1] and both[0][0] == ZeroShotItem("Rowing: A boat lies there. It is", ("a", "b"), 1)


def test_boolq_items_of_both_publications():
    items, _ = load_items("boolq", DATA["boolq"])
    assert [item.answer for item in items] == [1, 0, 0, 1, 1, 1] and {item.choices for item in items} == {("no", "yes")}
    assert items[1].context.startswith("Penguins are") and items[1].context.endswith(
        "\nQuestion: can penguins fly?\nAnswer:"
    )
    renamed = {"label" if key == "answer" else key: value for key, value in BOOLQ.items()}
    found = [
        read_items("boolq", lines(record, "", record), "f")[0] for record in (BOOLQ, renamed, renamed | {"label": 1})
    ]
    assert found == [ZeroShotItem("It is so.\nQuestion: is it so?\nAnswer:", ("no", "yes"), 1)] * 3


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("hellaswag", "{", "line 3: no item of hellaswag: "), ("hellaswag", "7", "it is no JSON object"),
        ("hellaswag", BOOLQ, "activity_label must be a text"),
        ("hellaswag", HELLASWAG | {"ctx_b": None}, "ctx_b must be a text"),
        ("hellaswag", HELLASWAG | {"endings": "ab"}, "endings must be a list"),
        ("hellaswag", HELLASWAG | {"endings": ["a", 1]}, "endings must be texts"),
        ("hellaswag", HELLASWAG | {"label": 2}, "label 2 is not the number of an ending"),
        ("hellaswag", HELLASWAG | {"label": ""}, "give the part that has answers"),
        ("hellaswag", HELLASWAG | {"label": True}, "label True is not the number of an ending"),
        ("hellaswag", HELLASWAG | {"endings": ["a", " [step]"]}, "none of them empty"),
        ("hellaswag", HELLASWAG | {"endings": ["a"], "label": 0}, "two choices at least"),
        ("boolq", HELLASWAG, "passage must be a text"), ("boolq", BOOLQ | {"answer": "yes"}, "neither true nor false"),
        ("boolq", {"question": "q", "passage": "p"}, "answer None is neither true nor false"),
    ],
)  # fmt: skip
def test_lines_that_hold_no_item_are_named(task, line, message):
    good = {"hellaswag": HELLASWAG, "boolq": BOOLQ}[task]
    with pytest.raises(ZeroShotError, match="some.jsonl, line 3: no item of") as caught:
        read_items(task, lines(good, "", line, good), "some.jsonl")
    assert message in str(caught.value)


def test_files_with_fewer_than_two_items_and_other_limits():
    with pytest.raises(ZeroShotError, match="f has 1 items"):
        read_items("boolq", lines(BOOLQ), "f")
    with pytest.raises(ZeroShotError, match="--limit -1"):
        read_items("boolq", lines(BOOLQ, BOOLQ), "f", -1)
    assert len(read_items("boolq", lines(BOOLQ, BOOLQ, "damaged"), "f", 2)) == 2


# ---- answers ----


def test_the_answer_is_the_choice_of_most_likelihood_per_character():
    item = ZeroShotItem("c", ("ab", "abcdefgh", "abcd"), 1)
    assert chosen([2.0, 4.0, 4.1], item) == (1, 0)  # 1, 0.5 and 1.03 nats a character
    assert chosen([1.0, 4.0, 2.0], item) == (0, 0)  # of equal ones the first


def test_both_accuracies_are_counted():
    items = [
        ZeroShotItem("c", ("x" * 9, "y"), 0),
        ZeroShotItem("c", ("x" * 9, "y"), 1),
        ZeroShotItem("c", ("z", "y"), 1),
    ]
    model, seen = LetterModel({"x": 0.5, "y": 1.0, "z": 2.0}), []
    result = score_items(model, "own", items, seen.append)
    assert (result.items, result.left_out, result.cut_items, seen) == (3, 0, 0, [1, 2, 3])
    assert result.accuracy == pytest.approx(2 / 3) and result.accuracy_unnormalised == pytest.approx(2 / 3)
    swapped = score_items(LetterModel({"x": 0.1, "y": 1.0, "z": 2.0}), "own", items)
    assert swapped.accuracy_unnormalised == pytest.approx(2 / 3)
    assert (result.chance, result.majority) == (0.5, pytest.approx(2 / 3))
    assert model.asked[0] == ("c", " xxxxxxxxx")


def test_a_perfect_model_and_one_that_is_always_wrong():
    items, _ = load_items("hellaswag", DATA["hellaswag"])
    right = {item.choices[item.answer]: 0.1 for item in items}
    best, worst = (score_items(LetterModel(dict.fromkeys(right, price)), "hellaswag", items) for price in (0.1, 9.0))
    assert (best.accuracy, best.standard_error, best.verdict) == (1.0, 0.0, "above chance")
    assert worst.accuracy == 0 and worst.verdict == "not distinguishable from chance"  # six items can't tell
    assert best.chance == 0.25 and best.majority == pytest.approx(1 / 3)


def test_long_contexts_are_cut_and_long_choices_left_out_and_both_are_said():
    items = [
        ZeroShotItem("short", ("yes", "no"), 0), ZeroShotItem("long " * 9, ("yes", "no"), 0),
        ZeroShotItem("short", ("n" * 40, "no"), 0),
    ]  # fmt: skip
    result = score_items(LetterModel({"yes": 0.5}, context=40), "own", items)
    assert (result.items, result.cut_items, result.left_out, result.accuracy) == (2, 1, 1, 1.0)
    remarks = "\n".join(zero_shot_remarks(result, 40))
    assert "1 items are longer than the context of 40 tokens" in remarks and "1 items left out" in remarks
    assert "longer" not in "\n".join(zero_shot_remarks(replace(result, cut_items=0, left_out=0), 40))
    exact = ZeroShotItem("c" * 36, ("yes", "no"), 0)  # 36 and a blank and three: all of it is read
    assert score_items(LetterModel({}, context=40), "own", [exact] * 2).cut_items == 0
    assert score_items(LetterModel({}, context=39), "own", [exact] * 2).cut_items == 2
    with pytest.raises(ZeroShotError, match="2 of 3 items have choices longer than the context"):
        score_items(LetterModel({}, context=3), "own", [*items[:2], ZeroShotItem("", ("a", "b"), 0)])


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_broken_model_is_an_error(nats):
    with pytest.raises(ZeroShotError, match="its weights are broken"):
        score_items(LetterModel({"y": nats}), "own", [ZeroShotItem("c", ("x", "y"), 0)] * 2)


# ---- chance ----


def result_of(hits: int, items: int, chance: float = 0.25, majority: float = 0.26) -> ZeroShotResult:
    return ZeroShotResult("hellaswag", "own", items, 0, 0, hits / items, hits / items, chance, majority, 1.0)


@given(st.integers(2, 3000), st.data())
def test_the_standard_error_is_that_of_a_mean(items, data):
    hits = data.draw(st.integers(0, items))
    scores = torch.tensor([1.0] * hits + [0.0] * (items - hits), dtype=torch.float64)
    assert result_of(hits, items).standard_error == pytest.approx(float(scores.std()) / math.sqrt(items))


@pytest.mark.parametrize(
    ("hits", "items", "chance", "majority", "verdict"),
    [
        (268, 1000, 0.25, 0.26, "not distinguishable from chance"), (300, 1000, 0.25, 0.26, "above chance"),
        (200, 1000, 0.25, 0.26, "below chance"), (230, 1000, 0.25, 0.26, "not distinguishable from chance"),
        (620, 1000, 0.5, 0.622, "above chance, but not above one answer for every item"),
        (660, 1000, 0.5, 0.622, "above chance"), (2, 2, 0.5, 0.5, "not distinguishable from chance"),
        (3, 3, 0.25, 0.5, "above chance"), (0, 4, 0.25, 0.5, "not distinguishable from chance"),
    ],
)  # fmt: skip
def test_verdicts(hits, items, chance, majority, verdict):
    assert result_of(hits, items, chance, majority).verdict == verdict


# ---- the tool, on an artifact ----


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> tuple[Path, Path]:
    """An untrained model that sees 120 bytes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "tokenizer.json").write_bytes(bytes_tokenizer_file())
    model = ModelConfig(vocab_size=260, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, bigram_vocab_size=64,
                        bigram_dim=16, train_seq_len=120, tied_embed_init_std=0.3)  # fmt: skip
    stored = quantize_state(build_model(model, seed=5).state_dict(), QuantConfig())
    tokenizer = PlainTokenizer(bytes_tokenizer_file())
    (folder / "model.golf").write_bytes(pack_artifact(stored, model, tokenizer.sha256, "zlib")[0])
    return folder / "model.golf", folder / "tokenizer.json"


@pytest.fixture
def ask(artifact, monkeypatch, capsys):
    """Runs the tool on the artifact: (exit status, stdout, stderr)."""

    def run(task: str, *arguments: str, data: Path | None = None) -> tuple[int, str, str]:
        files = ["--data", data or DATA[task], "--artifact", artifact[0], "--tokenizer", artifact[1], "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["evals.py", "--task", task, *map(str, files), *arguments])
        return run_command(evals.Options, evals.__doc__, evals.work), *capsys.readouterr()

    return run


@torch.no_grad()
def answers_by_hand(artifact: tuple[Path, Path], task: str) -> list[bool]:
    """Whether each item's answer is right, from logits over the last bytes that fit; a byte is a token."""
    text_model = open_text_model(*artifact)
    hits = []
    for item in load_items(task, DATA[task])[0]:
        per_character = []
        for choice in item.choices:
            ids = [text_model.tokenizer.bos_id, *text_model.tokenizer.encode(f"{item.context} {choice}")]
            targets, inputs = ids[-len(choice) - 1 :], ids[:-1][-120:]
            log_p_TV = torch.log_softmax(text_model.model.logits(torch.tensor([inputs]))[0].double(), -1)
            total = sum(float(log_p_TV[i - len(targets), token]) for i, token in enumerate(targets))
            per_character.append(-total / len(choice))
        hits.append(per_character.index(min(per_character)) == item.answer)
    return hits


@pytest.mark.parametrize(("task", "cut"), [("hellaswag", 1), ("boolq", 6)])
def test_the_tool_gives_what_the_logits_say(ask, artifact, task, cut):
    status, output, complaint = ask(task, "--json", "--backend", "own")
    assert status == 0, complaint
    found, hits = json.loads(output), answers_by_hand(artifact, task)
    assert (found["items"], found["backend"], found["left_out"]) == (6, "own", 0)
    assert found["accuracy"] == sum(hits) / 6 and found["cut_items"] == cut
    assert found["chance"] == {"hellaswag": 0.25, "boolq": 0.5}[task]
    assert found["verdict"] == "not distinguishable from chance"
    assert found["standard_error"] == pytest.approx(math.sqrt(sum(hits) / 6 * (1 - sum(hits) / 6) / 5))
    assert "6 of 6 items" in complaint


def test_the_tool_in_words(ask):
    status, output, complaint = ask("hellaswag", "--backend", "own", "--limit", "4")
    assert status == 0, complaint
    assert "\nnot distinguishable from chance\n" in output and "chance: 25.0%" in output
    assert "accuracy" in output and "+-" in output and "4 items, zero-shot" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "runs/x"], "give either --artifact FILE or --run FOLDER"),
        (["--limit", "-3"], "--limit -3: a number of items"),
        (["--limit", "1"], "has 1 items: an accuracy with its error takes 2 at least"),
        (["--data", "no/such/file"], "No such file"),
    ],
)
def test_bad_input_is_one_line(ask, arguments, message):
    status, output, complaint = ask("boolq", *arguments)
    assert (status, output) == (2, "") and message in complaint and complaint.count("\n") == 1


# ---- through lm-eval ----

FAKE_HARNESS = {
    "lm_eval/__init__.py": "",
    "lm_eval/api/__init__.py": "",
    "lm_eval/api/model.py": "class LM:\n    pass\n",
    "lm_eval/tasks/__init__.py": "class TaskManager:\n    def __init__(self, include_defaults): pass\n",
    "lm_eval/evaluator.py": textwrap.dedent(
        """
        import pathlib, types
        CALLS = []
        def simple_evaluate(model, tasks, limit, log_samples, task_manager):
            asked = [types.SimpleNamespace(args=("c", end)) for end in (" x", " y")] * limit
            CALLS.append((pathlib.Path(tasks[0]).read_text(), model.loglikelihood(asked)))
            name = pathlib.Path(tasks[0]).stem
            return {"results": {name: {"acc,none": 0.25, "acc_norm,none": 0.75}}}
        """
    ),
}
"""As much of the package as is called."""


@pytest.fixture
def fake_harness(tmp_path, monkeypatch, write_tree):
    write_tree(tmp_path, FAKE_HARNESS)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_the_harness_is_given_the_file_its_own_task_and_log_likelihoods(fake_harness, capsys):
    items, seen = load_items("boolq", DATA["boolq"], 4)[0], []
    result = score_by_lm_eval(LetterModel({"y": 2.0}), "boolq", DATA["boolq"], items, seen.append)
    ((task, answers),) = sys.modules["lm_eval.evaluator"].CALLS
    assert (result.accuracy, result.accuracy_unnormalised, result.items, result.backend) == (0.75, 0.25, 4, "lm-eval")
    assert answers == [(-1.0, False), (-2.0, False)] * 4 and seen[-1] == 4
    assert f'validation: "{DATA["boolq"]}"' in task and "boolq/default.yaml" in task and "answer | int" in task
    assert has_lm_eval() and capsys.readouterr().out == ""


def test_a_choice_without_room_stops_the_harness(fake_harness):
    items, _ = load_items("hellaswag", DATA["hellaswag"], 2)
    with pytest.raises(ZeroShotError, match="too long; --backend own leaves such items out"):
        score_by_lm_eval(LetterModel({}, context=1), "hellaswag", DATA["hellaswag"], items)


def test_without_the_harness_auto_is_our_own_and_asking_for_it_is_an_error(ask, monkeypatch):
    for module in (evals, sys.modules["lab.evals.lm_eval_backend"]):
        monkeypatch.setattr(module, "has_lm_eval", lambda: False)
    status, output, complaint = ask("boolq", "--json")
    assert status == 0 and json.loads(output)["backend"] == "own", complaint
    status, output, complaint = ask("boolq", "--backend", "lm-eval")
    assert (status, output) == (2, "")
    assert complaint == "evals: lm-eval is not installed: pip install lm_eval, or take --backend own\n"


@pytest.mark.parametrize("task", DATA)
def test_the_real_harness_asks_the_same_and_agrees(task):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    prices = {letter: 0.3 + 0.05 * number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    ours, theirs = LetterModel(prices), LetterModel(prices)
    items, _ = load_items(task, DATA[task])
    own, harness = score_items(ours, task, items), score_by_lm_eval(theirs, task, DATA[task], items)
    assert theirs.asked == ours.asked
    assert replace(harness, backend="own", seconds=own.seconds) == own
