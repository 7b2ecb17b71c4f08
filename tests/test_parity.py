"""One model in three forms says the same; the way after training is walked before it; the weights that count."""

import copy
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from golf.artifact.codecs import ArtifactError
from golf.artifact.container import pack_artifact, read_artifact, restore_model
from golf.artifact.fill_limit import FittedArtifact, fit_to_limit
from golf.config.config import Config, build_config
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.data.tokenizer import ByteTable
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.grid import QuantizedTensor, dequantize_state
from golf.run.checkpoint import TrainingState, final_weights
from golf.run.feature_audit import FeatureAudit
from golf.run.folder import RunFolder
from golf.run.parity import ParityError, check_parity, ntk_effect, parity_row, row_losses
from golf.run.rehearsal import STATE_COPIES, RehearsalError, rehearse
from golf.run.trainer import Trainer
from golf.runtime import Log, Runtime
from lab.prepare.text_tokenizer import SentencePieceTokenizer
from lab.prepare.vocabulary import train_tokenizer

CPU = Runtime(torch.device("cpu"), log=Log())
LIMIT = 1_000_000


def tiny_config(vocab_size: int, **knobs: str) -> Config:
    tiny = dict(
        vocab_size=str(vocab_size), model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="32",
        iterations="12", max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="128",
        warmup_steps="0", threads="1", eval_seq_len="64", eval_stride="16", eval_batch_seqs="4", compile="off",
        quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd",
    )  # fmt: skip
    return build_config("local", {}, tiny | knobs)


SENTENCE = "a run that can not be lost and can not lie is killed at any moment and goes on from where it was"


@pytest.fixture(scope="module")
def text() -> str:
    draw = random.Random(0)
    return "\n".join(" ".join(draw.choices(SENTENCE.split(), k=9)) for _ in range(400))


@pytest.fixture(scope="module")
def tokenizer(text) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer([text], 300))


@pytest.fixture(scope="module")
def stream(text, tokenizer, tmp_path_factory) -> TokenStream:
    path = tmp_path_factory.mktemp("shards") / "own_train_000000.bin"
    write_shard(path, [1, *tokenizer.encode(text)])
    return TokenStream([path])


@pytest.fixture(scope="module")
def trainer(tokenizer, stream) -> Trainer:
    """Twelve steps old, so that no weight is zero."""
    config = tiny_config(tokenizer.vocab_size)
    trainer = Trainer(build_model(config.model, 0), config, CPU, stream)
    list(trainer.steps())
    trainer.set_fake_quantization(False)
    return trainer


# ---- parity ----


def fit(trainer: Trainer, sha256: str, limit: int = LIMIT) -> FittedArtifact:
    config = trainer.config
    return fit_to_limit(trainer.model.state_dict(), config.quant, config.model, sha256, limit, 0, lambda line: None)


@pytest.fixture(scope="module")
def fitted(trainer, tokenizer) -> FittedArtifact:
    return fit(trainer, tokenizer.sha256)


@pytest.fixture(scope="module")
def record(trainer, fitted, stream) -> dict:
    row = stream.tokens(0, trainer.config.model.train_seq_len + 1).tolist()
    return parity_row(fitted.pruned, fitted.stored, trainer.config, row, CPU)


def test_trained_model_artifact_and_scorer_agree(record, fitted, tokenizer):
    parity = check_parity(restore_model(read_artifact(fitted.data), CPU), record, ByteTable(tokenizer), CPU)
    assert parity["largest_difference"] < 1e-5 and len(record["losses"]) == 32 and len(record["ids"]) == 33
    assert parity["trained"] == pytest.approx(parity["reloaded"], abs=1e-5)
    assert parity["scorer"] == pytest.approx(parity["reloaded"], abs=1e-6) and parity["trained"] > 1


def test_they_agree_too_where_bits_were_taken_to_fit(trainer, fitted, tokenizer, record):
    coarser = fit(trainer, tokenizer.sha256, int(0.75 * len(fitted.data)))
    assert any("bits" in action for action in coarser.actions)
    row = parity_row(coarser.pruned, coarser.stored, trainer.config, record["ids"], CPU)
    model = restore_model(read_artifact(coarser.data), CPU)
    assert check_parity(model, row, ByteTable(tokenizer), CPU)["largest_difference"] < 1e-5
    with pytest.raises(ParityError):
        check_parity(model, record, ByteTable(tokenizer), CPU)


@pytest.fixture
def plant(trainer, tokenizer, fitted) -> Callable[[str, Callable], GPT]:
    """The artifact's model with one stored tensor changed, packed and read back."""
    config = trainer.config

    def planted(name: str, change: Callable) -> GPT:
        stored = copy.deepcopy(fitted.stored)
        stored[name] = change(stored[name])
        data, _ = pack_artifact(stored, config.model, tokenizer.sha256, config.quant.codec)
        return restore_model(read_artifact(data), CPU)

    return planted


def one_code_off(entry: QuantizedTensor) -> QuantizedTensor:
    entry.codes_RC[3, 5] += 1 if entry.codes_RC[3, 5] < 0 else -1
    return entry


def transposed(entry: QuantizedTensor) -> QuantizedTensor:
    return replace(entry, codes_RC=entry.codes_RC.T.contiguous())


def row_of_a_token(entry: QuantizedTensor) -> QuantizedTensor:
    codes_RC = entry.codes_RC.clone()
    codes_RC[1] = -codes_RC[1]  # the document start, which the row begins with
    return replace(entry, codes_RC=codes_RC)


CHANGES = {
    "one code": ("blocks.1.attn.c_v.weight", one_code_off),
    "a scale": ("blocks.0.attn.c_v.weight", lambda entry: replace(entry, scale_SG=entry.scale_SG * 1.1)),
    "rows and columns": ("blocks.0.attn.proj.weight", transposed),
    "an fp16 vector": ("skip_weights", lambda tensor: tensor * 1.01),
    "a row of the embedding": ("tok_emb.weight", row_of_a_token),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_artifact_that_is_not_the_trained_model_is_refused(record, plant, tokenizer, change):
    model = plant(*CHANGES[change])
    with pytest.raises(ParityError, match="the artifact is not the model that was trained"):
        check_parity(model, record, ByteTable(tokenizer), CPU)


def test_another_grid_than_that_of_training_is_refused(trainer, fitted, record, tokenizer):
    """The weights before they were rounded are another model."""
    model = GPT(trainer.config.model)
    model.load_state_dict(fitted.pruned)
    with pytest.raises(ParityError):
        check_parity(model, record, ByteTable(tokenizer), CPU)


@pytest.mark.parametrize("change", [{"losses": 1.0}, {"losses": float("nan")}, {"ids": 1}])
def test_a_record_of_other_text_or_other_losses_is_refused(record, fitted, tokenizer, change):
    record = copy.deepcopy(record)
    if "ids" in change:
        record["ids"][5] = record["ids"][6] + 1
    else:
        record["losses"][7] += change["losses"]
    with pytest.raises(ParityError):
        check_parity(restore_model(read_artifact(fitted.data), CPU), record, ByteTable(tokenizer), CPU)


def test_a_scorer_that_computes_otherwise_is_refused(record, fitted, tokenizer, monkeypatch):
    """As a forward pass of its own would."""
    model, losses = restore_model(read_artifact(fitted.data), CPU), GPT.token_losses
    scorer_runs = []

    def other_losses(self, ids_BT, targets_BS, rope_base=None):
        scorer_runs.append(1)
        return losses(self, ids_BT, targets_BS, rope_base) + 0.01 * (len(scorer_runs) > 1)

    monkeypatch.setattr(GPT, "token_losses", other_losses)
    with pytest.raises(ParityError, match="by the scorer"):
        check_parity(model, record, ByteTable(tokenizer), CPU)
    assert len(scorer_runs) == 2


def test_parity_needs_no_other_rank(record, fitted, tokenizer):
    """The main rank checks alone; a collective here would wait for ever."""
    pair = replace(CPU, world_size=2)
    assert check_parity(restore_model(read_artifact(fitted.data), CPU), record, ByteTable(tokenizer), pair)


def test_a_scaled_rope_base_changes_losses_and_the_models_own_does_not(trainer, fitted, record):
    model, score = restore_model(read_artifact(fitted.data), CPU), trainer.config.score
    assert ntk_effect(model, record, score) > 1e-6
    assert ntk_effect(model, record, replace(score, eval_rope="none")) == 0


# ---- rehearsal ----


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def fresh_trainer(tokenizer, stream, **knobs: str) -> Trainer:
    config = tiny_config(tokenizer.vocab_size, **knobs)
    return Trainer(build_model(config.model, 0), config, CPU, stream)


def random_states() -> tuple:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


def test_a_rehearsal_walks_the_whole_way_and_leaves_no_trace(tokenizer, stream, folder):
    rehearsed, other = (fresh_trainer(tokenizer, stream) for _ in range(2))
    before = random_states()
    line = rehearse(rehearsed, tokenizer, folder)
    assert random_states() == before and list(folder.path.iterdir()) == []
    assert line.startswith("rehearsal: untrained artifact ") and float(line.split()[-4]) == pytest.approx(5.7, abs=0.1)
    losses = [[report.train_loss for report in trainer.steps()] for trainer in (rehearsed, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    states = rehearsed.state().tensors, other.state().tensors
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1] if not name.startswith("rng"))


def test_a_rehearsal_comes_between_steps_too(tokenizer, stream, folder):
    """A resumed run rehearses again, with the grid in place and the model in training mode."""
    trainer = fresh_trainer(tokenizer, stream, qat_start="0")
    trainer.set_fake_quantization(True)
    before = copy.deepcopy(trainer.model.state_dict())
    rehearse(trainer, tokenizer, folder)
    assert trainer.model.training and trainer.fake_quantized
    assert all(module.fake_quantize for name, module in trainer.model.named_modules() if name.endswith("attn.q"))
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


def test_a_codec_that_is_missing_shows_before_the_first_step(tokenizer, stream, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ArtifactError, match="zstandard"):
        rehearse(fresh_trainer(tokenizer, stream, codec="zstd"), tokenizer, folder)
    assert list(folder.path.iterdir()) == []


def test_a_disk_that_is_too_full_shows_before_the_first_step(tokenizer, stream, folder, monkeypatch):
    trainer = fresh_trainer(tokenizer, stream)
    needed = STATE_COPIES * 4 * sum(weight.numel() for weight in trainer.model.state_dict().values())
    usage = shutil.disk_usage(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    rehearse(trainer, tokenizer, folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(RehearsalError, match=r"MiB are free, and a run needs \d+: free some") as caught:
        rehearse(trainer, tokenizer, folder)
    assert str(folder.path) in str(caught.value)


def test_weights_that_can_not_be_stored_show_before_the_first_step(tokenizer, stream, folder):
    trainer = fresh_trainer(tokenizer, stream)
    with torch.no_grad():
        trainer.model.skip_weights[0, 0] = 1e6
    with pytest.raises(ValueError, match="skip_weights"):
        rehearse(trainer, tokenizer, folder)


# ---- the weights that count ----


@pytest.mark.parametrize("snapshots", [0, 1, 2, 7])
def test_the_mean_counts_from_two_snapshots_on(snapshots):
    config = build_config("local", {}, {})
    last, mean = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, {"a": torch.tensor([1.0, 2.5])}
    mean["b"] = last["b"].clone()
    tensors = {f"model.{name}": part for name, part in last.items()}
    tensors |= {f"average.{name}": part for name, part in mean.items()} | {"rng.torch": torch.zeros(1)}
    audit = FeatureAudit(config)
    weights = final_weights(TrainingState(tensors, {"average": [snapshots, snapshots, 5]}), audit)
    chosen = mean if snapshots >= 2 else last
    assert weights.keys() == chosen.keys() and all(torch.equal(weights[name], chosen[name]) for name in chosen)
    record = audit.records["swa"]
    assert record.proven == (snapshots >= 2)
    expected = f"mean of {snapshots} snapshots, at most 0.5 from the last weights" if snapshots >= 2 else ""
    assert record.effect == expected


def test_rounding_is_what_the_record_is_made_of(trainer, fitted, record):
    """The record is of the trained weights through the grid of training, not of the artifact's own numbers."""
    model = GPT(trainer.config.model)
    model.load_state_dict(dequantize_state(fitted.stored))
    own = row_losses(model, record["ids"])
    assert (own - torch.tensor(record["losses"])).abs().max() < 1e-5
