"""Attention within documents: nothing of one document reaches the next, and the artifact remembers it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import golf.model.gpt
from golf.artifact.codecs import ArtifactError
from golf.artifact.container import pack_artifact, read_artifact
from golf.artifact.description import model_from_json, model_to_json
from golf.config.config import build_config
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.block import causal_attention, visible_keys
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.export import quantize_state
from golf.run.trainer import Trainer
from golf.runtime import Runtime

SMALL = ModelConfig(
    vocab_size=64, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, bigram_vocab_size=97, bigram_dim=8,
    train_seq_len=32, tied_embed_init_std=0.5, document_attention=True,
)  # fmt: skip
BOS = SMALL.bos_id
STARTS = (0, 9, 10, 21)


def lively_model(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which every parameter matters."""
    model = build_model(config, 0, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_rows(seed: int = 0, rows: int = 2, length: int = 32) -> torch.Tensor:
    ids_BT = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids_BT[:, STARTS] = BOS
    return ids_BT


def changed_document(ids_BT: torch.Tensor, number: int) -> torch.Tensor:
    """The rows with other words in one document."""
    bounds = (*STARTS, ids_BT.size(1))
    words = slice(bounds[number] + 1, bounds[number + 1])
    changed_BT = ids_BT.clone()
    changed_BT[:, words] = 2 + (ids_BT[:, words] + 3) % 62
    return changed_BT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("options", [{}, {"last": 8}, {"rope_base": 30_000.0}, {"last": 32}])
def test_another_document_leaves_the_logits_bit_identical(dtype, number, options):
    model, ids_BT = lively_model(dtype=dtype), random_rows()
    later = (STARTS + (32,))[number + 1]
    with torch.no_grad():
        before, after = (model.logits(rows, **options) for rows in (ids_BT, changed_document(ids_BT, number)))
    first = max(0, later - (32 - before.size(1)))
    assert torch.equal(before[:, first:], after[:, first:]), "a later document sees an earlier one"
    if first:
        assert not torch.equal(before[:, :first], after[:, :first])


def test_without_the_flag_the_documents_see_each_other():
    model, ids_BT = lively_model(replace(SMALL, document_attention=False)), random_rows()
    with torch.no_grad():
        before, after = (model.logits(rows) for rows in (ids_BT, changed_document(ids_BT, 0)))
    assert not torch.equal(before[:, 21:], after[:, 21:])


def test_the_future_stays_unseen():
    model, ids_BT = lively_model(), random_rows()
    changed_BT = ids_BT.clone()
    changed_BT[:, 16:] = random_rows(5)[:, 16:]
    with torch.no_grad():
        assert torch.equal(model.logits(ids_BT)[:, :16], model.logits(changed_BT)[:, :16])


def test_a_document_in_a_row_is_what_it_is_alone():
    """RoPE is relative: attention cares for distances, and in a document of its own there is nothing else."""
    model, ids_BT = lively_model(), random_rows(rows=1)
    alone = lively_model(replace(SMALL, document_attention=False))
    with torch.no_grad():
        together_TV = model.logits(ids_BT)[0]
        for begin, end in zip(STARTS, (*STARTS[1:], 32), strict=True):
            torch.testing.assert_close(
                together_TV[begin:end], alone.logits(ids_BT[:, begin:end])[0], atol=2e-4, rtol=1e-3
            )


def test_a_row_without_a_start_is_one_text():
    ids_BT = random_rows().where(random_rows() != BOS, 5)
    with torch.no_grad():
        one, other = (lively_model(replace(SMALL, document_attention=flag)).logits(ids_BT) for flag in (True, False))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_no_gradient_crosses_a_document_start():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2))
    document_BT = torch.tensor([[0] * 5 + [1] * 7])
    visible = visible_keys(12, 12, 0, 0, q.device, document_BT)
    causal_attention(q, k, v, visible)[:, :, 5:].square().sum().backward()
    assert k.grad[:, :, :5].abs().max() == 0 == v.grad[:, :, :5].abs().max()
    assert (k.grad[:, :, 5:-1].abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.parametrize("flag", [False, True])
def test_the_mask_is_made_only_where_the_flag_is_on(flag, monkeypatch):
    seen = []

    def spy(*parts, visible=None):
        seen.append(visible is not None)
        return causal_attention(*parts, visible)

    monkeypatch.setattr(golf.model.gpt, "causal_attention", spy)
    with torch.no_grad():
        lively_model(replace(SMALL, document_attention=flag)).logits(random_rows())
    assert seen == [flag] * SMALL.num_layers


# ---- the artifact ----


@pytest.mark.parametrize("flag", [False, True])
def test_the_artifact_remembers_the_flag_and_spends_no_byte_on_its_absence(flag):
    config = replace(SMALL, document_attention=flag)
    stored = quantize_state(lively_model(config).state_dict(), QuantConfig())
    data, _ = pack_artifact(stored, config, "0" * 64, "none")
    assert read_artifact(data).model == config
    assert ("document_attention" in model_to_json(config)) is flag


def test_settings_without_the_field_are_those_of_before():
    values = {name: value for name, value in asdict(SMALL).items() if name != "document_attention"}
    assert model_from_json(values) == replace(SMALL, document_attention=False)
    assert model_from_json(values | {"document_attention": False}) == replace(SMALL, document_attention=False)


@pytest.mark.parametrize("wrong", [{"document_attention": 1}, {"document_attention": "true"}, {"unheard_of": 1}])
def test_settings_of_the_wrong_kind_are_refused(wrong):
    with pytest.raises(ArtifactError):
        model_from_json(asdict(SMALL) | wrong)


def test_a_missing_field_of_before_is_refused():
    values = json.loads(json.dumps(asdict(SMALL)))
    del values["bos_id"]
    with pytest.raises(ArtifactError, match="bos_id"):
        model_from_json(values)


# ---- the feature audit ----

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="6",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="64", warmup_steps="0", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.5", compile="off", document_attention="1",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd",
)  # fmt: skip


def train(folder, every: int, plant: Callable[[Trainer], None] = lambda trainer: None, **knobs: str) -> Trainer:
    tokens_N = np.random.default_rng(0).integers(-2, 3, 5120).cumsum() % 60 + 4
    tokens_N[::every] = BOS
    write_shard(folder / "a_train_000000.bin", tokens_N)
    config = build_config("local", {}, TINY | knobs)
    model = build_model(config.model, 0)
    trainer = Trainer(model, config, Runtime(torch.device("cpu")), TokenStream([folder / "a_train_000000.bin"]))
    plant(trainer)
    trainer.warm_up()
    list(trainer.steps())
    trainer.finish()
    return trainer


def read_as_one_text(trainer: Trainer) -> None:
    """A compiled step that does not know of the flag."""
    without = GPT(replace(trainer.config.model, document_attention=False))
    for name, parameter in trainer.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        without.get_submodule(owner)._parameters[leaf] = parameter
    trainer.forward = without


def compile_step(trainer: Trainer) -> None:
    trainer.forward = torch.compile(trainer.model, backend="eager", dynamic=False, fullgraph=True)


@pytest.mark.parametrize(("plant", "proven"), [(lambda _: None, True), (compile_step, True), (read_as_one_text, False)])
def test_a_step_that_joins_documents_is_found(tmp_path, plant, proven):
    trainer = train(tmp_path, 21, plant, qat_enabled="0")
    record = trainer.audit.records["document_attention"]
    assert (record.first, record.last, record.count, record.proven) == (1, 6, 6, proven)
    found = [finding for finding in trainer.audit.findings() if finding.startswith("document_attention")]
    assert len(found) == (not proven) and trainer.model.config.document_attention


@pytest.mark.parametrize("every", [5120, 64])
def test_documents_that_never_meet_in_a_row_prove_nothing(tmp_path, every):
    """64: all documents start where a row does, so that there is nothing to keep apart."""
    record = train(tmp_path, every, row_order="sequential").audit.records["document_attention"]
    assert not record.proven and "no row of 100 batches" in record.effect
