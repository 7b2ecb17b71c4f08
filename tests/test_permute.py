"""Hidden units can be put in any order without a change of the function."""

import pytest
import torch

from golf.config.model import ModelConfig
from golf.model.init import build_model
from golf.quant.tensor_classes import QuantError
from golf.quant.waterfill import hidden_order, mlp_blocks, permute_hidden_units

torch.set_num_threads(1)
TINY = ModelConfig(
    vocab_size=48,
    num_layers=3,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    bigram_vocab_size=40,
    bigram_dim=16,
    train_seq_len=16,
)


def logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = build_model(TINY, seed=0)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.logits(torch.arange(30).view(2, 15))


@pytest.mark.parametrize("by_norm", [True, False])
def test_logits_are_the_same_up_to_rounding(by_norm):
    state = build_model(TINY, seed=3).state_dict()
    generator = torch.Generator().manual_seed(1)
    state = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    orders = None if by_norm else {f"blocks.{i}": torch.randperm(32, generator=generator) for i in range(3)}
    permuted = permute_hidden_units(state, orders)
    torch.testing.assert_close(logits(permuted), logits(state), rtol=1e-4, atol=1e-5)
    changed = {name for name in state if not torch.equal(state[name], permuted[name])}
    assert changed == {f"blocks.{i}.mlp.{part}.weight" for i in range(3) for part in ("fc", "proj")}
    half = state | {"blocks.1.mlp.fc.weight": permuted["blocks.1.mlp.fc.weight"]}
    assert (logits(half) - logits(state)).abs().max() > 1e-2  # the test would see one matrix without the other


def test_units_come_by_falling_norm():
    state = build_model(TINY, seed=3).state_dict()
    permuted = permute_hidden_units(state)
    up_HD, down_DH = permuted["blocks.0.mlp.fc.weight"], permuted["blocks.0.mlp.proj.weight"]
    strength_H = up_HD.norm(dim=1) * down_DH.norm(dim=0)
    assert (strength_H.diff() <= 1e-6).all()
    again = permute_hidden_units(permuted)
    assert all(torch.equal(again[name], permuted[name]) for name in state)
    assert hidden_order(torch.ones(4, 2), torch.ones(2, 4)).tolist() == [0, 1, 2, 3]


def test_states_without_the_pair_are_refused():
    state = build_model(TINY, seed=3).state_dict()
    assert mlp_blocks(state) == ["blocks.0", "blocks.1", "blocks.2"]
    del state["blocks.1.mlp.proj.weight"]
    with pytest.raises(QuantError, match="blocks.1.mlp.fc.weight has no"):
        permute_hidden_units(state)
    with pytest.raises(QuantError, match="no permutation of 32"):
        permute_hidden_units(
            build_model(TINY, seed=3).state_dict(), {f"blocks.{i}": torch.zeros(32).long() for i in range(3)}
        )
