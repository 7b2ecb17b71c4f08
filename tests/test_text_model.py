"""A model opened from its artifact: what it scores, and every file that it can't be opened from."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from golf.artifact.container import read_artifact
from golf.config.knobs import UserError
from golf.data.shards import DataError
from golf.data.tokenizer import ByteTable
from golf.model.init import build_model
from golf.score.scorer import plain_settings, score_stream
from lab.generate.sampling import SamplingError, SamplingOptions
from lab.generate.text_model import TextModel, open_text_model
from lab.prepare.text_tokenizer import TextTokenizer
from lab.rates.trained_run import open_trained_run
from tests.sampled_run_fixtures import make_sampled_run
from tests.tokenizer_fixtures import BYTES, SAMPLE, small_tokenizers, trained
from tests.trained_run_fixtures import copied_run

LN2 = math.log(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_sampled_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(run) -> TextModel:
    return open_text_model(run)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TextTokenizer]:
    return small_tokenizers()


def with_tokenizer(model: TextModel, tokenizer: TextTokenizer) -> TextModel:
    """Another tokenizer, with an untrained model that has all of its ids."""
    wider = build_model(replace(model.model.config, vocab_size=tokenizer.vocab_size), seed=0).eval()
    return TextModel(wider, tokenizer, ByteTable(tokenizer), "other", 1, 1.0, None, model.runtime)


@torch.no_grad()
def nats_by_hand(model: TextModel, text: str) -> list[float]:
    """Of each token, each from all that is before it: the text must fit the context."""
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    assert len(ids) - 1 <= model.context
    log_p_TV = torch.log_softmax(model.model.logits(torch.tensor([ids[:-1]]))[0].double(), -1)
    return [-float(log_p_TV[i, token]) for i, token in enumerate(ids[1:])]


# ---- what is opened ----


def test_a_run_and_its_artifact_are_one_model(run, model):
    artifact = read_artifact(run / "model.golf")
    assert (model.name, model.artifact_bytes, model.context) == ("run", artifact.byte_count, 32)
    assert model.bits_per_weight == 8 * artifact.byte_count / sum(p.numel() for p in model.model.parameters())
    assert model.val_bpb is None and not model.model.training
    by_file = open_text_model(run / "model.golf")
    options = SamplingOptions(tokens=30, seed=1)
    texts = ["".join(new[0] for new in one.generate(["The cat"], options)) for one in (model, by_file)]
    assert texts[0] == texts[1] and by_file.name == "run"


def test_an_artifact_elsewhere_wants_its_tokenizer(run, tmp_path):
    alone = shutil.copy(run / "model.golf", tmp_path / "small.golf")
    with pytest.raises(SamplingError, match=r"small\.golf does not lie in the folder of a run: .*--tokenizer"):
        open_text_model(alone)
    assert open_text_model(alone, run.parent / "data" / "tokenizer.json").name == "small"


def test_the_result_counts_where_it_is_of_this_artifact(run, tmp_path):
    folder = copied_run(run, tmp_path)
    result = {"val_bpb": 1.25, "artifact_sha256": read_artifact(folder / "model.golf").sha256}
    (folder / "result.json").write_text(json.dumps(result))
    assert open_text_model(folder).val_bpb == 1.25
    (folder / "result.json").write_text(json.dumps(result | {"artifact_sha256": "0" * 64}))
    assert open_text_model(folder).val_bpb is None
    (folder / "result.json").write_text("{")
    with pytest.raises(UserError, match="holds no JSON"):
        open_text_model(folder)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_tokenizer(folder: Path) -> None:
    path = folder / "other.json"
    path.write_text('{"kind": "chars", "characters": "abc"}')
    name_tokenizer(folder, str(path))


def name_tokenizer(folder: Path, name: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["data"]["tokenizer_path"] = name
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (lambda run: (run / "model.golf").unlink(), r"model\.golf is missing: the run has none yet"),
        (lambda run: (run / "config.json").unlink(), "is not the folder of a run"),
        (lambda run: damage(run / "model.golf"), "checksum does not match"),
        (lambda run: (run / "model.golf").write_bytes(b"text"), "not an artifact"),
        (lambda run: (run / "model.golf").write_bytes(b""), "not an artifact"),
        (lambda run: (run / "config.json").write_text("?"), "holds no JSON"),
        (lambda run: name_tokenizer(run, "no/such.model"), "the run's tokenizer, no/such.model, is not there"),
        (lambda run: name_tokenizer(run, None), "the run's tokenizer, None, is not there"),
        (other_tokenizer, "is not that of the artifact's tokenizer"),
    ],
)
def test_what_no_model_comes_from_is_one_clear_line(run, tmp_path, change: Callable[[Path], object], message):
    folder = copied_run(run, tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_text_model(folder)
    assert "\n" not in str(caught.value)


# ---- what it scores ----


def test_bits_per_byte_of_a_text(model):
    text = "The cat sees the dog. é"
    assert model.bits_per_byte(text) == pytest.approx(sum(nats_by_hand(model, text)) / LN2 / 24, rel=1e-6)
    assert model.bits_per_byte("The cat sees the dog.") < 2.5 < model.bits_per_byte("qZ#x7 🐍")


def test_a_long_text_is_scored_by_the_scorer(model, run):
    opened = open_trained_run(run)
    end = [i for i, token in enumerate(opened.tokens_N) if token == BYTES.bos_id][1]
    text = BYTES.decode(opened.tokens_N[1:end])
    assert len(text) > 2 * model.context
    score = model.score(text)
    assert (score.tokens, score.bytes, score.documents) == (end - 1, end - 1, 1)
    plain = plain_settings(opened.saved.model, 4)
    rows = score_stream(model.model, opened.tokens_N[:end], opened.counter, plain, model.runtime, announce=False)
    assert score.bytes == rows.bytes and score.val_bpb != rows.val_bpb == pytest.approx(score.val_bpb, rel=0.1)


def test_texts_that_have_no_score(model, tokenizers):
    with pytest.raises(SamplingError, match="no text to measure"):
        model.bits_per_byte("")
    for call in (model.bits_per_byte, lambda text: model.generate([text], SamplingOptions())):
        with pytest.raises(SamplingError, match="surrogate"):
            call("caf\udcc3")
    strict = with_tokenizer(model, trained(SAMPLE, byte_fallback=False))
    with pytest.raises(DataError, match="unknown pieces"):
        strict.bits_per_byte("a 🐍")


def test_bytes_are_those_of_the_text_for_every_tokenizer(model, tokenizers):
    for tokenizer in tokenizers.values():
        text = "The Quick café, iPhones 🐍"
        assert with_tokenizer(model, tokenizer).score(text).bytes == len(
            tokenizer.decode(tokenizer.encode(text)).encode()
        )
    cased = with_tokenizer(model, tokenizers["caseops"])
    assert cased.score("The \ue001 FOX").bytes == len("The \ue001 FOX".encode())


def test_nats_of_a_continuation(model):
    nats = nats_by_hand(model, "The cat sees")
    assert model.continuation_nats("The cat", " sees") == (pytest.approx(sum(nats[7:]), rel=1e-6), 5, 5)
    whole = model.continuation_nats("", "The cat sees")
    assert whole == (pytest.approx(sum(nats), rel=1e-6), 12, 12)
    first, rest = model.continuation_nats("", "The"), model.continuation_nats("The", " cat sees")
    assert first[0] + rest[0] == pytest.approx(whole[0], rel=1e-6)
    likely, unlikely = (model.continuation_nats("The old horse likes the", end)[0] for end in (" dog", " qzx"))
    assert likely < unlikely


def test_a_long_context_is_read_as_far_as_it_fits(model):
    context = "The dog likes the cat. " * 9
    nats, tokens, size = model.continuation_nats(context, "The cat")
    ids_T = torch.tensor(BYTES.encode(context + "The cat"))
    with torch.no_grad():
        expected = model.model.token_losses(ids_T[None, -33:-1], ids_T[None, -7:]).double().sum()
    assert (nats, tokens, size) == (pytest.approx(float(expected), rel=1e-6), 7, 7)
    for end in ("", "x" * 33):
        with pytest.raises(SamplingError, match="1 to 32"):
            model.continuation_nats("a", end)
    assert model.continuation_nats("a", "x" * 32)[1] == 32


def test_a_token_that_spans_context_and_continuation_counts(model, tokenizers):
    tokenizer = tokenizers["prefix"]
    other = with_tokenizer(model, tokenizer)
    before, whole = tokenizer.encode("The Qui"), tokenizer.encode("The Quick")
    assert whole[: len(before)] != before
    nats, tokens, size = other.continuation_nats("The Qui", "ck")
    shared = next(i for i in range(len(whole)) if before[: i + 1] != whole[: i + 1])
    assert (tokens, size) == (len(whole) - shared, 2) and nats > 0
