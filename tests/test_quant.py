"""The grid of training is the grid of export, to the last bit; and each tensor gets the bits of its class."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.gpt import GPT
from golf.quant.export import quantize_state
from golf.quant.grid import (
    QuantizedTensor,
    RowGrids,
    dequantize_state,
    dequantize_tensor,
    grid_clip,
    grid_values,
    quantize_rows,
    through_grid,
)
from golf.quant.qat import install_fake_quantization, remove_fake_quantization
from golf.quant.tensor_classes import QuantError, bits_of, tensor_class
from lab.rates.grids import QuantSpec
from lab.rates.quantizers import quantize_matrix

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


def bit_pattern(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 as integers: tells -0.0 from 0.0."""
    return tensor.contiguous().view(torch.int32)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Rows of very different size: all zero, below the smallest scale, ordinary, huge, exact ties."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight_RC = torch.randn(rows, columns, generator=generator)
    sizes = draw(
        st.lists(st.sampled_from([0.0, 1e-30, 1e-5, 1e-3, 0.02, 1.0, 37.0, 1e5, 1e9]), min_size=rows, max_size=rows)
    )
    if draw(st.booleans()):
        weight_RC = (weight_RC * 4).round() / 2  # many values half way between two codes
    return weight_RC * torch.tensor(sizes)[:, None]


@given(matrices(), st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_fake_quantization_is_the_exported_grid_bit_for_bit(weight_RC, bits):
    codes_RC, scale_R = quantize_rows(weight_RC, bits)
    exported_RC = dequantize_tensor(QuantizedTensor(codes_RC, scale_R.unsqueeze(1), bits))
    assert torch.equal(bit_pattern(grid_values(weight_RC, bits)), bit_pattern(exported_RC))
    assert codes_RC.dtype == torch.int8 and scale_R.dtype == torch.float16 and scale_R.isfinite().all()
    assert codes_RC.abs().max() <= grid_clip(bits)


@given(matrices(), st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_rounding_to_nearest_by_absmax_is_the_training_grid(weight_RC, bits):
    entry = quantize_matrix(weight_RC, QuantSpec(bits))
    codes_RC, scale_R = quantize_rows(weight_RC, bits)
    assert torch.equal(entry.codes_RC, codes_RC) and torch.equal(entry.scale_SG[:, 0], scale_R)
    assert torch.equal(bit_pattern(dequantize_tensor(entry)), bit_pattern(grid_values(weight_RC, bits)))


@given(matrices(), st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_grid_is_the_formula(weight_RC, bits):
    """fp16(max / clip) and round half to even, by numpy."""
    clip = np.float32(2 ** (bits - 1) - 1)
    scale_R1 = (np.abs(weight_RC.numpy()).max(1, keepdims=True) / clip).clip(2**-14, 65504).astype(np.float16)
    codes_RC = np.rint(weight_RC.numpy() / scale_R1.astype(np.float32)).clip(-clip, clip)
    codes, scale = quantize_rows(weight_RC, bits)
    np.testing.assert_array_equal(codes.numpy(), codes_RC)
    np.testing.assert_array_equal(scale.numpy(), scale_R1[:, 0])


def test_quantizing_twice_changes_nothing():
    weight_RC = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    once_RC = grid_values(weight_RC, 6)
    error_RC = (once_RC - weight_RC).abs()
    assert (error_RC <= weight_RC.abs().amax(1, keepdim=True) / 31 * 0.51).all()
    assert (quantize_rows(weight_RC, 6)[0] == quantize_rows(once_RC, 6)[0]).float().mean() > 0.99


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_on_the_grid_and_the_gradient_is_the_identity(compiled, dtype):
    weight_RC, probe_RC, grids = torch.randn(8, 12, requires_grad=True), torch.randn(8, 12, dtype=dtype), RowGrids()
    values_RC = grids.add(weight_RC, 5, dtype)

    def loss(weight_RC: torch.Tensor, probe_RC: torch.Tensor) -> torch.Tensor:
        return (through_grid(weight_RC, values_RC, grids) * probe_RC).sum()

    function = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    grids.renew()
    value = function(weight_RC, probe_RC)
    value.backward()
    assert torch.equal(weight_RC.grad, probe_RC.float())
    assert torch.equal(value, (grid_values(weight_RC.detach(), 5).to(dtype) * probe_RC).sum())


def test_a_changed_weight_is_put_on_the_grid_again_and_no_other(monkeypatch):
    model = fp16_friendly_model(1)
    _, grids = install_fake_quantization(model, QuantConfig())
    ids_BT = torch.arange(30).view(2, 15)
    before = model.logits(ids_BT)
    weight_RC = model.blocks[0].mlp.fc.weight
    with torch.no_grad():
        weight_RC.neg_()
    assert not torch.equal(model.logits(ids_BT), before)
    renewed = []
    monkeypatch.setattr("golf.quant.grid.grid_values", lambda *given: renewed.append(given))
    grids.renew()
    model.logits(ids_BT)
    assert not renewed
    with torch.no_grad():
        weight_RC.neg_()
    monkeypatch.undo()
    assert torch.equal(model.logits(ids_BT), before)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "bits"),
    [
        ("tok_emb.weight", (1024, 512), "embed", 16),
        ("bigram.embed.weight", (10_240, 128), "bigram", 6),
        ("bigram.proj.weight", (512, 128), "bigram", 6),
        ("bigram.scale", (), "small", 16),
        ("blocks.3.attn.c_k.weight", (256, 512), "attn", 6),
        ("blocks.3.attn.proj.weight", (512, 512), "attn", 6),
        ("blocks.3.attn.q_gain", (8,), "small", 16),
        ("blocks.3.mlp.proj.weight", (512, 1536), "mlp", 5),
        ("blocks.3.resid_mix", (2, 512), "small", 16),
        ("skip_weights", (5, 512), "small", 16),
        ("blocks.0.mlp.fc.weight", (3, 5), "small", 16),
    ],
)
def test_classes_and_bits(name, shape, kind, bits):
    assert (tensor_class(name, shape), bits_of(name, shape, QuantConfig())) == (kind, bits)


def test_unknown_matrix_is_an_error():
    with pytest.raises(QuantError, match="strange"):
        tensor_class("strange.weight", (64, 64))


def fp16_friendly_model(seed: int) -> GPT:
    """Random weights whose fp16 tensors are exact in fp16, so that only the grid moves anything."""
    model, generator = GPT(TINY), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).half().float())
    return model


@pytest.mark.parametrize("embed_bits", [6, 16])
def test_model_in_training_is_the_exported_model(embed_bits):
    quant = QuantConfig(embed_bits=embed_bits)
    model, exported = fp16_friendly_model(0), GPT(TINY)
    exported.load_state_dict(dequantize_state(quantize_state(model.state_dict(), quant)))
    ids_BT = torch.arange(30).view(2, 15)
    raw = model.logits(ids_BT)
    names, _ = install_fake_quantization(model, quant)
    assert torch.equal(model.logits(ids_BT), exported.logits(ids_BT))
    assert not torch.equal(model.logits(ids_BT), raw)
    quantized = {
        name for name, e in quantize_state(model.state_dict(), quant).items() if isinstance(e, QuantizedTensor)
    }
    assert set(names) == quantized
    assert len(names) == 2 + 3 * 4 + (embed_bits == 6)  # keys and values of this model are small
    remove_fake_quantization(model)
    assert torch.equal(model.logits(ids_BT), raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tok_emb.weight", float("nan")),
        ("blocks.1.mlp.fc.weight", float("inf")),
        ("skip_weights", 1e5),
        ("blocks.0.attn.c_q.weight", 1e7),
    ],
)
def test_weights_that_cannot_be_stored_are_named(name, value):
    state = fp16_friendly_model(1).state_dict()
    state[name].view(-1)[3] = value
    with pytest.raises(QuantError, match=name):
        quantize_state(state, QuantConfig())


def test_export_of_float16_is_rounding_to_float16():
    state = {"smear.gate": torch.tensor([0.1, 1e-9, -3.0])}
    stored = quantize_state(state, dataclasses.replace(QuantConfig(), embed_bits=8))
    assert torch.equal(dequantize_state(stored)["smear.gate"], state["smear.gate"].half().float())
