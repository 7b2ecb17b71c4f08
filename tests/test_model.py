"""The network: causality, document starts, RoPE, initial weights, and what the recipe says of its shape."""

from dataclasses import replace

import pytest
import torch

from golf.config.config import build_config
from golf.config.model import ModelConfig
from golf.config.presets import PRESETS
from golf.model.embedding import bigram_buckets, has_predecessor
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.model.layers import ntk_rope_base, rotary_tables

SMALL = ModelConfig(
    vocab_size=64, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, bigram_vocab_size=97, bigram_dim=8,
    train_seq_len=16, tied_embed_init_std=0.5,
)  # fmt: skip
BOS = SMALL.bos_id


def lively_model(config: ModelConfig = SMALL, seed: int = 0) -> GPT:
    """A model in which every parameter matters: no zero tables, no identity gates."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", [0, 7, 14])
def test_future_tokens_leave_earlier_log_probabilities_bit_identical(position):
    model, ids_BT = lively_model(), random_ids(2, 16)
    changed_BT = ids_BT.clone()
    changed_BT[:, position + 1 :] = random_ids(2, 15 - position, seed=9)
    with torch.no_grad():
        before, after = model.logits(ids_BT), model.logits(changed_BT)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.equal(before[:, position + 1 :], after[:, position + 1 :])


def test_smear_and_bigram_do_not_look_across_a_document_start():
    model, ids_BT = lively_model(), random_ids(1, 8)
    ids_BT[0, 4] = BOS
    changed_BT = ids_BT.clone()
    changed_BT[0, 3] = (ids_BT[0, 3] + 1) % SMALL.vocab_size + 2
    embedding_VD = model.tok_emb.weight
    with torch.no_grad():
        before, after = model.embed(ids_BT, embedding_VD), model.embed(changed_BT, embedding_VD)
        assert torch.equal(before[:, 4:], after[:, 4:])
        ids_BT[0, 4] = changed_BT[0, 4] = 5  # no document start: now the predecessor must be seen
        before, after = model.embed(ids_BT, embedding_VD), model.embed(changed_BT, embedding_VD)
        assert not torch.equal(before[:, 4], after[:, 4])


def test_bigram_buckets_follow_the_formula_and_do_not_overflow():
    ids_BT = torch.tensor([[5, 65_535, 65_534, BOS, 7]])
    buckets_BT = bigram_buckets(ids_BT, has_predecessor(ids_BT, BOS), 10_240)
    expected = [10_239, ((36_313 * 65_535) ^ (27_191 * 5)) % 10_239, ((36_313 * 65_534) ^ (27_191 * 65_535)) % 10_239]
    assert buckets_BT.tolist() == [[*expected, 10_239, ((36_313 * 7) ^ (27_191 * BOS)) % 10_239]]


def test_losses_of_the_last_positions_are_a_slice_of_all_losses():
    model, ids_BT, targets_BT = lively_model(), random_ids(2, 16), random_ids(2, 16, seed=5)
    with torch.no_grad():
        everything = model.token_losses(ids_BT, targets_BT)
        torch.testing.assert_close(model.token_losses(ids_BT, targets_BT[:, -3:]), everything[:, -3:])
        torch.testing.assert_close(model(ids_BT, targets_BT), everything.mean())


def test_logits_agree_with_float64():
    model, ids_BT = lively_model(), random_ids(2, 16)
    with torch.no_grad():
        single = model.logits(ids_BT)
        model.compute_dtype = torch.float64
        double = model.double().logits(ids_BT)
    torch.testing.assert_close(single, double, atol=1e-3, rtol=1e-3)


def test_ntk_base_is_the_closed_form_of_the_recipe():
    base = ntk_rope_base(10_000.0, 4096, 2048, 64)
    assert base == pytest.approx(20_452.23, abs=0.01)
    exponents = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    ratio = base**-exponents / 10_000.0**-exponents
    assert ratio[0].item() == 1 and ratio[-1].item() == pytest.approx(0.5)
    assert ntk_rope_base(10_000.0, 2048, 2048, 64) == ntk_rope_base(10_000.0, 100, 2048, 64) == 10_000.0


def test_rotary_tables_tell_all_positions_apart_in_fp32():
    cos_TP, sin_TP = rotary_tables(4096, 64, 10_000.0, torch.device("cpu"))
    assert cos_TP.dtype == sin_TP.dtype == torch.float32
    positions = torch.arange(4096, dtype=torch.float64)
    frequencies = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    truth = torch.outer(positions, frequencies)
    assert (cos_TP - truth.cos()).abs().max() < 1e-3 and (sin_TP - truth.sin()).abs().max() < 1e-3
    assert len(torch.unique(torch.cat((cos_TP, sin_TP), dim=1), dim=0)) == 4096


def test_rope_base_of_a_longer_row_changes_the_logits():
    model, ids_BT = lively_model(), random_ids(1, 32)
    with torch.no_grad():
        assert not torch.equal(model.logits(ids_BT), model.logits(ids_BT, rope_base=30_000.0))


def test_leaderboard_has_the_parameters_of_the_recipe():
    model = GPT(build_config("leaderboard", {}, {}).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_517_137
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_initial_weights_are_orthogonal_and_projections_gain_scaled():
    model = build_model(SMALL, 0)
    gain_squared = 1 / (2 * SMALL.num_layers)
    for name, gain in (("attn.c_q", 1.0), ("attn.proj", gain_squared)):
        weight = model.blocks[1].get_submodule(name).weight.detach()
        torch.testing.assert_close(weight @ weight.T, gain * torch.eye(32), atol=1e-5, rtol=0)
    bigram = model.bigram.proj.weight.detach()
    torch.testing.assert_close(bigram.T @ bigram, gain_squared * torch.eye(8), atol=1e-5, rtol=0)


def test_gain_scaled_projections_act_on_the_first_forward_pass():
    model, ids_BT = build_model(SMALL, 0), random_ids(1, 16)
    with torch.no_grad():
        before = model.logits(ids_BT)
        model.blocks[1].mlp.proj.weight.mul_(2)
        assert not torch.equal(before, model.logits(ids_BT))


def test_resid_mix_starts_with_the_phase_of_the_recipe():
    model = build_model(build_config("leaderboard", {}, {"model_dim": "16", "num_heads": "4"}).model, 0)
    phase = [round(block.resid_mix[0, 0].item(), 4) for block in model.blocks]
    assert phase == [0.1824, 0.2375, 0.3029, 0.3775, 0.4584, 0.5416, 0.6225, 0.6971, 0.7625, 0.8176]


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5])
def test_every_parameter_gets_a_gradient(num_layers):
    model = lively_model(replace(SMALL, num_layers=num_layers))
    model(random_ids(2, 16), random_ids(2, 16, seed=1)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_weights(preset):
    shrink = {"model_dim": "48", "vocab_size": "64", "rope_dims": "0"}
    config = build_config(preset, {}, shrink).model
    first, second, other = (build_model(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def test_a_compiled_step_takes_kept_rotary_tables_as_inputs():
    """No power, sine or cosine is in its graph; without kept tables there are some, so the test can see them."""
    found = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        names = {str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes}
        found.append(names & {"pow", "rpow", "__rpow__", "cos", "sin", "outer"})
        return graph

    model = build_model(SMALL, seed=0)
    ids_BT = torch.randint(0, SMALL.vocab_size, (2, SMALL.train_seq_len))
    plain = model(ids_BT, ids_BT)
    torch.compile(model, backend=backend, fullgraph=True)(ids_BT, ids_BT)
    model.keep_rotary(SMALL.train_seq_len)
    torch.compiler.reset()
    kept = torch.compile(model, backend=backend, fullgraph=True)(ids_BT, ids_BT)
    assert found[0] and not found[1] and torch.equal(plain, kept)
    assert "rotary" not in " ".join(model.state_dict())
