"""A folder for transformers: the same logits, texts and ids as here, offline, by the project's own forward pass."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import tools.export
from golf.artifact.description import expected_shapes
from golf.config.config import build_config
from golf.config.presets import PRESETS
from lab.export.transformers_folder import ExportError, export_folder, write_code, write_tokenizer
from lab.generate.text_model import TextModel, open_text_model
from lab.prepare.text_tokenizer import bytes_tokenizer_file, chars_tokenizer_file
from tests.sampled_run_fixtures import make_sampled_run
from tests.test_text_model import with_tokenizer
from tests.tokenizer_fixtures import SAMPLE, small_tokenizers

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-export.txt)")
TEXTS = [
    *SAMPLE[:2],
    "",
    "  two blanks\n\n\ttab",
    "<s> no mark </s>",
    "\u2581 a mark of theirs",
    "caf\u00e9 \U0001f40d",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_sampled_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    export_folder(run, None, out)
    return out


@pytest.fixture(scope="module")
def ours(run) -> TextModel:
    return open_text_model(run)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """transformers copies the code of a model into its cache."""
    patch = pytest.MonkeyPatch()
    place = str(tmp_path_factory.mktemp("modules"))
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
    patch.syspath_prepend(place)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def test_logits_are_ours_to_the_last_bit_and_so_is_the_loss(theirs, ours):
    ids_BT = torch.randint(4, ours.model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, logits_BTV = theirs(ids_BT, labels=ids_BT), ours.model.logits(ids_BT)
        losses_BT = ours.model.token_losses(ids_BT[:, :-1], ids_BT[:, 1:])
    assert torch.equal(found.logits, logits_BTV)
    assert found.loss.item() == pytest.approx(losses_BT.mean().item(), abs=1e-6)


def greedy(ours: TextModel, ids_1T: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest tokens, each from the whole text before it."""
    for _ in range(count):
        with torch.no_grad():
            ids_1T = torch.cat((ids_1T, ours.model.logits(ids_1T, 1)[:, 0].argmax(-1, keepdim=True)), 1)
        if ids_1T[0, -1] == ours.tokenizer.bos_id:
            break
    return ids_1T


def test_generation_over_its_cache_gives_the_likeliest_tokens(theirs, tokenizer, ours):
    ids_1T = tokenizer("The Quick", return_tensors="pt").input_ids
    expected = greedy(ours, ids_1T, 30)
    assert torch.equal(theirs.generate(ids_1T, max_new_tokens=30, do_sample=False), expected)
    assert torch.equal(theirs.generate(ids_1T, max_new_tokens=30, do_sample=False, use_cache=False), expected)


def test_a_search_with_beams_is_the_same_with_a_cache_and_without(theirs, tokenizer):
    ids_1T = tokenizer("The Quick", return_tensors="pt").input_ids
    options = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    assert torch.equal(theirs.generate(ids_1T, **options), theirs.generate(ids_1T, use_cache=False, **options))


def test_padding_is_refused(theirs):
    ids_BT = torch.full((1, 4), 5)
    with pytest.raises(ValueError, match="takes no padding"):
        theirs(ids_BT, attention_mask=torch.tensor([[0, 1, 1, 1]]))


@pytest.mark.parametrize("kind", small_tokenizers())
def test_ids_and_text_are_those_of_each_kind_of_tokenizer(kind, ours, tmp_path):
    given = small_tokenizers()[kind]
    source = tmp_path / ("source.json" if kind in ("bytes", "chars") else "source.model")
    files = {"bytes": bytes_tokenizer_file(), "chars": chars_tokenizer_file(["The caf\u00e9s."])}
    source.write_bytes(files.get(kind) or given.processor.serialized_model_proto())
    write_code(tmp_path, ours.model.config, source)
    write_tokenizer(tmp_path, with_tokenizer(ours, given), source)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True, local_files_only=True)
    for text in TEXTS:
        ids = given.encode(text)
        assert found(text).input_ids == [given.bos_id, *ids], (kind, text)
        assert found.decode(ids) == given.decode(ids), (kind, text)


def test_it_is_saved_and_opened_again_with_its_code(theirs, tokenizer, tmp_path):
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, local_files_only=True)
    ids_1T = tokenizer(SAMPLE[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids_1T).logits, theirs(ids_1T).logits)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True, local_files_only=True)
    assert words(SAMPLE[0]).input_ids == tokenizer(SAMPLE[0]).input_ids


@pytest.mark.parametrize(
    "preset", ["local", *(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS if p != "local")]
)
def test_the_code_of_every_preset_s_network_stands_alone(preset, tmp_path):
    """In another process, in which the project can't be imported; its state has the names that we write."""
    config = build_config(preset, {}, {})
    write_code(tmp_path, config.model, Path("x.model"))
    program = (
        "import sys, json, torch\nfrom modeling_golf import *\nwith torch.device('meta'):\n"
        "    model = GolfForCausalLM(GolfConfig(golf=json.loads(sys.argv[1])))\n"
        "print(json.dumps(sorted(model.state_dict())))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(asdict(config.model))]
    finished = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    names = sorted(f"golf.{name}" for name in expected_shapes(config.model))
    assert json.loads(finished.stdout.splitlines()[-1]) == names


def test_a_folder_that_exists_is_left_alone_and_a_failure_leaves_none(run, folder, tmp_path):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ExportError, match="exists: name another folder"):
        export_folder(run, None, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(Exception, match="no-such"):
        export_folder(run, tmp_path / "no-such.model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tools/export.py", str(run), "--out", str(tmp_path / "a"), "--json"])
    assert tools.export.run_command(tools.export.Options, tools.export.__doc__, tools.export.work) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files.keys() == {path.name for path in (tmp_path / "a").iterdir()} and "model.safetensors" in files
    assert "No result of a run." in (tmp_path / "a" / "README.md").read_text()
