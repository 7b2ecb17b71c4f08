"""Pruning removes exactly its share, the same weights every time, and only where it changes what is stored."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.config.quantization import QuantConfig
from golf.quant.export import prune_state, zero_smallest
from golf.quant.grid import quantize_rows

torch.set_num_threads(1)


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_exactly_the_smallest_share_goes(elements, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight_RC = (torch.randperm(elements, generator=generator) + 1.0).view(1, -1)
    weight_RC *= torch.where(torch.rand(weight_RC.shape, generator=generator) < 0.5, -1.0, 1.0)
    pruned_RC = zero_smallest(weight_RC, share)
    count = int(share * elements)
    assert int((pruned_RC == 0).sum()) == count
    assert torch.equal(pruned_RC != 0, weight_RC.abs() > count)
    assert torch.equal(pruned_RC[pruned_RC != 0], weight_RC[pruned_RC != 0])


def test_of_equal_magnitudes_the_first_go():
    assert zero_smallest(torch.tensor([[2.0, -1.0, 1.0, 1.0, -1.0]]), 0.4).tolist() == [[2.0, 0.0, 0.0, 1.0, -1.0]]


def state_of_two() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "tok_emb.weight": torch.randn(64, 32, generator=generator),
        "blocks.0.mlp.fc.weight": torch.randn(64, 32, generator=generator),
        "blocks.0.attn.q_gain": torch.randn(4, generator=generator),
    }


def test_fp16_tensors_are_left_alone_and_codes_counted():
    state = state_of_two()
    quant = QuantConfig(mlp_bits=5, embed_bits=16, prune_frac=0.3)
    pruned, (report,) = prune_state(state, quant)
    assert pruned["tok_emb.weight"] is state["tok_emb.weight"]
    assert pruned["blocks.0.attn.q_gain"] is state["blocks.0.attn.q_gain"]
    name = "blocks.0.mlp.fc.weight"
    changed = (quantize_rows(state[name], 5)[0] != quantize_rows(pruned[name], 5)[0]).sum()
    assert report.name == name and report.zeroed == int(0.3 * 64 * 32) and report.codes_changed == changed > 0


def test_pruning_that_changes_no_code_is_off():
    """On a 2-bit grid whatever is below half of the row's largest is zero anyway."""
    state = state_of_two()
    pruned, (report,) = prune_state(state, QuantConfig(mlp_bits=2, prune_frac=0.05))
    assert pruned["blocks.0.mlp.fc.weight"] is state["blocks.0.mlp.fc.weight"]
    assert (report.zeroed, report.codes_changed) == (0, 0)


def test_share_of_zero_does_nothing():
    state = state_of_two()
    pruned, reports = prune_state(state, QuantConfig(prune_frac=0.0))
    assert reports == [] and all(pruned[name] is state[name] for name in state)
