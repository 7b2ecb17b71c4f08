"""Salient columns get finer steps, and only they."""

import pytest
import torch

from golf.quant.grid import dequantize_tensor
from golf.quant.tensor_classes import QuantError
from lab.rates.corrections import column_saliency, most_salient_group, protected_steps
from lab.rates.grids import QuantSpec
from lab.rates.quantizers import quantize_matrix

torch.set_num_threads(1)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(16, 160, generator=generator) * 0.05
    power_C = torch.rand(160, generator=generator)
    power_C[54:108] *= 9
    return weight_RC, torch.diag(power_C)


def test_saliency_is_input_times_weight():
    weight_RC, hessian_CC = problem()
    expected_C = hessian_CC.diagonal().sqrt() * weight_RC.abs().mean(0)
    torch.testing.assert_close(column_saliency(weight_RC, hessian_CC), expected_C.double())


def test_the_group_is_where_the_power_is():
    assert most_salient_group(*problem(), 64) == slice(54, 108)  # 160 columns make groups of 54
    assert most_salient_group(torch.ones(2, 10), torch.eye(10), 4) == slice(0, 4)
    weight_RC, hessian_CC = torch.ones(2, 10), torch.eye(10)
    hessian_CC[9, 9] = 100
    assert most_salient_group(weight_RC, hessian_CC, 4) == slice(8, 10)


@pytest.mark.parametrize("with_gptq", [False, True])
def test_protected_columns_are_finer_and_the_rest_is_as_before(with_gptq):
    weight_RC, hessian_CC = problem()
    spec, steps = protected_steps(weight_RC, hessian_CC, QuantSpec(4))
    plain = quantize_matrix(weight_RC, QuantSpec(4))
    entry = quantize_matrix(weight_RC, spec, hessian_CC if with_gptq else None, scales=steps)
    inside_C = torch.zeros(160, dtype=torch.bool)
    inside_C[54:108] = True
    assert spec.bits == 6 and torch.equal(entry.scale_SG, plain.scale_SG)
    assert torch.equal(entry.codes_RC[:, ~inside_C], plain.codes_RC[:, ~inside_C])
    error_C = (dequantize_tensor(entry) - weight_RC).square().mean(0)
    plain_C = (dequantize_tensor(plain) - weight_RC).square().mean(0)
    assert 0.5 / 16 < error_C[inside_C].sum() / plain_C[inside_C].sum() < 2 / 16
    assert entry.codes_RC.abs().max() <= 31


@pytest.mark.parametrize("spec", [QuantSpec(7), QuantSpec(1), QuantSpec(4, symmetric=False)])
def test_grids_without_room_are_refused(spec):
    with pytest.raises(QuantError, match="can have up to 8"):
        protected_steps(*problem(), spec)
