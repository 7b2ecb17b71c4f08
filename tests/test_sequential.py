"""True-sequential quantization: every matrix once, in order, for the inputs that the rounded ones before it give."""

import torch

from golf.config import ModelConfig
from golf.model.init import build_model
from golf.quant.calibration import collect_hessians
from golf.quant.gptq import quantize_matrix
from golf.quant.sequential import matrix_groups, quantize_in_sequence
from golf.quant.spec import QuantSpec
from golf.quant.stored import dequantize_tensor

MODEL = ModelConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2, bigram_vocab_size=24,
    bigram_dim=8, train_seq_len=12, tied_embed_init_std=0.5,
)  # fmt: skip
ROWS_NT = torch.randint(2, 40, (12, 12), generator=torch.Generator().manual_seed(0))


def test_each_matrix_is_rounded_behind_the_rounded_ones():
    model, order, hessians = build_model(MODEL, seed=3), [], {}

    def encode(name, hessian_CC):
        order.append(name)
        hessians[name] = hessian_CC
        return quantize_matrix(model.get_parameter(name).detach(), QuantSpec(3), hessian_CC)

    before = collect_hessians(model, ROWS_NT)
    stored = quantize_in_sequence(model, ROWS_NT, encode)
    matrices = [name for name in build_model(MODEL, seed=3).state_dict() if name.endswith("weight")]
    assert sorted(order) == sorted(matrices) == sorted(name for group in matrix_groups(model) for name in group)
    for name, entry in stored.items():
        assert torch.equal(model.get_parameter(name).detach(), dequantize_tensor(entry))
    assert hessians["bigram.embed.weight"] is None
    first, last = "blocks.0.attn.c_q.weight", "blocks.1.mlp.proj.weight"
    assert not torch.allclose(hessians[last], before[last], rtol=1e-2)
    assert (
        order.index(first) < order.index("blocks.0.mlp.fc.weight") < order.index(last) < order.index("tok_emb.weight")
    )


def test_the_hessian_is_that_of_the_model_as_it_is_by_then():
    """That of the second block, measured again on a model whose first block has the rounded weights."""
    model, seen = build_model(MODEL, seed=3), {}

    def encode(name, hessian_CC):
        seen[name] = hessian_CC, {key: part.clone() for key, part in model.state_dict().items()}
        return quantize_matrix(model.get_parameter(name).detach(), QuantSpec(3), hessian_CC)

    quantize_in_sequence(model, ROWS_NT, encode)
    hessian_CC, state = seen["blocks.1.attn.c_q.weight"]
    again = build_model(MODEL, seed=0)
    again.load_state_dict(state)
    assert torch.equal(hessian_CC, collect_hessians(again, ROWS_NT)["blocks.1.attn.c_q.weight"])
