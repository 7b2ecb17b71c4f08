"""Training through quantizers of single sites: what trained is what the artifact holds, and each site acts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from golf.artifact.container import encode_streams, pack_artifact, read_artifact, restore_model
from golf.artifact.weights import load_weights, save_weights
from golf.config.config import build_config
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.model.layers import ActivationSite
from golf.quant.export import quantize_state, quantized_parameters
from golf.quant.grid import QuantizedTensor
from golf.quant.qat import install_activation_quantizers, quantized_gpt
from golf.run.parity import parity_row, row_losses
from golf.run.trainer import Trainer
from golf.runtime import Runtime

torch.set_num_threads(1)
CPU = Runtime(torch.device("cpu"))
TINY = dict(
    vocab_size="64", model_dim="32", num_heads="2", num_kv_heads="1", bigram_vocab_size="64", bigram_dim="8",
    train_seq_len="32", iterations="4", max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="64",
    warmup_steps="1", threads="1", eval_seq_len="64", eval_stride="16", swa_enabled="0", compile="off",
    quantizer="rtn", qat_enabled="1", prune_frac="0", mlp_bits="16", attn_bits="16", bigram_bits="16",
    embed_bits="16", codec="rans",
)  # fmt: skip
BLOCKS = ("q", "k", "v", "o", "up", "down")
TERNARY = {f"weight_{site}": "ternary" for site in BLOCKS}
FLOAT = {"qat_enabled": "0"}
CASES = {
    "ternary": TERNARY,
    "legacy shared scale": {f"weight_{site}": "ternary-qkvo-fork-attached" for site in "qkv"},
    "every grid": dict(
        weight_q="binary-row", weight_k="ternary-g8-leastsq-dge5", weight_v="int3-attached", weight_o="int4-g8",
        weight_up="ternary-row-t0.7-clipped", weight_down="int8", weight_embed="int4", weight_head="ternary-row",
        tie_embeddings="0",
    ),
    "every activation": TERNARY | dict(
        act_attn_in="int8", act_q="tanh-ternary-fork", act_k="int4", act_v="ternary", act_attn_out="twosided8",
        act_mlp_in="int8-clipped", act_hidden="unsigned8",
    ),
    "activations alone": FLOAT | dict(mlp_activation="tanh", act_hidden="unit-ternary-dge3"),
    "knowledge": FLOAT | dict(knowledge_tokens="3"),
    "knowledge in layers, window": FLOAT
    | dict(knowledge_tokens="3", knowledge_at="layers", attention_window="5", late_mix_hidden="0"),
}  # fmt: skip
FEATURES = ("qat", "activation_quantizers", "attention_window", "knowledge_tokens")


def trainer_of(folder: Path, knobs: dict[str, str]) -> Trainer:
    write_shard(folder / "a_train_000000.bin", np.random.default_rng(0).integers(-2, 3, 5120).cumsum() % 60 + 4)
    config = build_config("local", {}, TINY | knobs)
    model = install_activation_quantizers(build_model(config.model, 0))
    return Trainer(model, config, CPU, TokenStream([folder / "a_train_000000.bin"]))


def trained(folder: Path, knobs: dict[str, str], plant: Callable[[Trainer], None] = lambda trainer: None) -> Trainer:
    trainer = trainer_of(folder, knobs)
    plant(trainer)
    trainer.warm_up()
    assert all(np.isfinite(report.train_loss) for report in trainer.steps())
    trainer.finish()
    return trainer


def feature_findings(trainer: Trainer) -> list[str]:
    return [finding for finding in trainer.audit.findings() if finding.startswith(FEATURES)]


@pytest.mark.parametrize("case", CASES)
def test_the_artifact_says_what_the_trained_model_said(case, tmp_path):
    trainer = trained(tmp_path, CASES[case])
    config, state = trainer.config, trainer.model.state_dict()
    assert not feature_findings(trainer)
    save_weights(tmp_path / "weights.safetensors", state, config.model, config.quant, "0" * 64)
    saved = load_weights(tmp_path / "weights.safetensors")
    assert (saved.model, saved.quant) == (config.model, config.quant)
    stored = quantize_state(saved.state, config.quant)
    data, _ = pack_artifact(stored, config.model, "0" * 64, config.quant.codec)
    artifact = read_artifact(data)
    assert artifact.model == config.model
    ids = TokenStream([tmp_path / "a_train_000000.bin"]).tokens(0, 33).tolist()
    record = parity_row(state, stored, config, ids, CPU)
    restored = restore_model(artifact, CPU)
    with torch.no_grad():
        assert torch.equal(row_losses(restored, ids), torch.tensor(record["losses"]))
    covered = sum(part.codes_RC.numel() for part in stored.values() if isinstance(part, QuantizedTensor))
    assert covered == quantized_parameters({name: part.shape for name, part in state.items()}, config.quant)


def test_a_weight_is_on_the_grid_of_its_own_site_and_no_other(tmp_path):
    state = trained(tmp_path, {"weight_v": "ternary", "weight_up": "int3"}).model.state_dict()
    stored = quantize_state(state, build_config("local", {}, TINY | {"weight_v": "ternary", "weight_up": "int3"}).quant)
    bits = {name: part.bits for name, part in stored.items() if isinstance(part, QuantizedTensor)}
    assert bits == {f"blocks.{i}.{name}.weight": b for i in (0, 1) for name, b in (("attn.c_v", 2), ("mlp.fc", 3))}


def test_with_all_sites_off_training_is_bit_identical_to_a_model_without_them(tmp_path):
    def tear_out(trainer: Trainer) -> None:
        for module in list(trainer.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, ActivationSite):
                    setattr(module, name, nn.Identity())

    states = [trained(tmp_path, FLOAT, plant).model.state_dict() for plant in (lambda trainer: None, tear_out)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "knobs, feature",
    [
        (TERNARY, "qat"),
        (CASES["every activation"], "activation_quantizers"),
        (CASES["knowledge"], "knowledge_tokens"),
        (FLOAT | {"attention_window": "2"}, "attention_window"),
    ],
)
def test_a_step_that_is_compiled_without_the_feature_is_found_out(knobs, feature, tmp_path):
    def plant(trainer: Trainer) -> None:
        bare = GPT(build_config("local", {}, TINY | FLOAT).model)

        def forward(*batch: torch.Tensor) -> torch.Tensor:
            bare.load_state_dict(trainer.model.state_dict(), strict=False)
            loss = bare(*batch)
            return loss + 0.0 * sum(parameter.sum() for parameter in trainer.model.parameters())

        trainer.forward = forward

    findings = feature_findings(trained(tmp_path, knobs, plant))
    assert any(finding.startswith(feature) for finding in findings), findings


def test_a_model_whose_quantizers_were_not_put_in_says_so():
    config = build_config("local", {}, TINY | CASES["every activation"]).model
    with pytest.raises(AssertionError, match="was not put in"):
        GPT(config)(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    assert quantized_gpt(config)(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).isfinite()


def test_ternary_codes_take_what_five_to_a_byte_take_or_less():
    """8 bits for 5 codes are 1.6 bits; log2 3 = 1.585; codes of a Gaussian, 31 % zeros, are not far below."""
    weight_RC = torch.randn(256, 500, generator=torch.Generator().manual_seed(0))
    quant = build_config("local", {}, TINY | TERNARY).quant
    (size, *_), _ = encode_streams(quantize_state({"blocks.0.mlp.fc.weight": weight_RC}, quant), "rans")
    assert size.role == "codes" and size.bits == 2
    assert size.entropy_bytes / weight_RC.numel() * 8 <= size.bits_per_element < 1.6
