"""Rounding to nearest on every grid: the formula of its rule, no code outside of it, and nothing that breaks it."""

import itertools

import numpy as np
import pytest
import torch

from golf.quant.gptq import StepSizes
from golf.quant.grid import FP16_TINY, QuantizedTensor, dequantize_tensor, grid_clip, group_width
from golf.quant.tensor_classes import QuantError
from lab.rates.grids import NAIVE_INT8, QuantSpec, choose_steps, parse_quantizer, squared_error
from lab.rates.quantizers import quantize_matrix

torch.set_num_threads(1)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_naive_int8_is_its_formula():
    """s = max|row| / 127, q = clip(round(w / s)): per row, symmetric, with the step in fp16."""
    weight_RC = normal(16, 48).numpy()
    scale_R1 = (np.abs(weight_RC).max(1, keepdims=True) / np.float32(127)).astype(np.float16)
    entry = quantize_matrix(torch.from_numpy(weight_RC), NAIVE_INT8)
    np.testing.assert_array_equal(entry.scale_SG.numpy(), scale_R1)
    np.testing.assert_array_equal(
        entry.codes_RC.numpy(), np.rint(weight_RC / scale_R1.astype(np.float32)).clip(-127, 127)
    )


RULES = ["", "-mse", "-pct99", "-sd3"]
GRIDS = [
    f"rtn{bits}{granularity}{zero}{rule}"
    for bits, granularity, zero, rule in itertools.product(range(1, 9), ["", "-tensor", "-g7"], ["", "-zp"], RULES)
] + ["rtn1-absmean", "rtn2-absmean", "rtn2-g7-absmean", "rtn1-tensor-absmean1.2"]


@pytest.mark.parametrize("text", GRIDS)
def test_every_grid_keeps_its_promises(text):
    """Codes of the grid, normal fp16 steps, shapes as stored; zero rows, zero columns, huge and constant rows."""
    spec = parse_quantizer(text)[1]
    weight_RC = normal(8, 24)
    weight_RC[1], weight_RC[2], weight_RC[3], weight_RC[4], weight_RC[:, 5] = 0, 1e-30, 1e9, 0.25, 0
    weight_RC[6] = weight_RC[6].abs()
    entry = quantize_matrix(weight_RC, spec)
    rows = 1 if spec.granularity == "tensor" else 8
    assert entry.scale_SG.shape == (rows, 4 if spec.granularity == "group" else 1)
    assert entry.codes_RC.dtype == torch.int8 and entry.scale_SG.dtype == torch.float16 and entry.bits == spec.bits
    assert entry.scale_SG.isfinite().all() and (entry.scale_SG >= FP16_TINY).all()
    codes_RC = entry.codes_RC.int()
    if spec.symmetric:
        assert entry.zero_SG is None and codes_RC.abs().max() <= grid_clip(spec.bits)
        assert spec.bits > 1 or (codes_RC != 0).all()
    else:
        shift = 128 if spec.bits == 8 else 0
        assert entry.zero_SG.dtype == torch.int8 and entry.zero_SG.shape == entry.scale_SG.shape
        for part in (codes_RC, entry.zero_SG.int()):
            assert part.min() >= -shift and part.max() <= 2**spec.bits - 1 - shift
    back_RC = dequantize_tensor(entry)
    assert back_RC.isfinite().all()
    if spec.granularity != "tensor" and not (spec.bits == 1 and spec.symmetric):
        assert (back_RC[1:3] == 0).all()
        if spec.scale_rule == "absmax":  # no weight is further than half a step off, bar the step's own rounding
            step_RC = entry.scale_SG.float().repeat_interleave(group_width(24, entry.scale_SG.size(1)), 1)[:, :24]
            inside_R = [0, 4, 5, 6, 7]
            assert ((back_RC - weight_RC).abs() <= step_RC * (1.0 if spec.symmetric else 1.5))[inside_R].all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_point_is_the_formula(bits):
    weight_RC = normal(6, 40) + 0.03
    most, low_R1 = 2**bits - 1, weight_RC.amin(1, keepdim=True).clamp(max=0)
    scale_R1 = ((weight_RC.amax(1, keepdim=True) - low_R1) / most).half()
    zero_R1 = (-low_R1 / scale_R1.float()).round()
    entry = quantize_matrix(weight_RC, QuantSpec(bits, symmetric=False))
    shift = 128 if bits == 8 else 0
    assert torch.equal(entry.scale_SG, scale_R1)
    assert torch.equal(entry.zero_SG.float(), zero_R1 - shift)
    codes_RC = (weight_RC / scale_R1.float()).round() + zero_R1
    assert torch.equal(entry.codes_RC.float(), codes_RC.clamp(0, most) - shift)


def test_rules_are_their_formulas():
    weight_RC = normal(5, 200)

    def scale(text: str) -> torch.Tensor:
        return quantize_matrix(weight_RC, parse_quantizer(text)[1]).scale_SG[:, 0]

    assert torch.equal(scale("rtn6-sd12.85"), (12.85 * weight_RC.std(1, correction=0) / 31).half())
    assert torch.equal(scale("rtn5-pct99"), (weight_RC.abs().sort(1).values[:, 197] / 15).half())  # 198th of 200
    assert torch.equal(scale("rtn2-absmean"), weight_RC.abs().mean(1).half())
    assert torch.equal(scale("rtn1-absmean"), weight_RC.abs().mean(1).half())
    assert torch.equal(scale("rtn3-tensor"), (weight_RC.abs().max() / 3).half()[None])


def test_ternary_and_binary_are_bitnet_and_sign():
    weight_RC = normal(4, 64)
    mean_R1 = weight_RC.abs().mean(1, keepdim=True).half().float()
    ternary = quantize_matrix(weight_RC, parse_quantizer("rtn2-absmean")[1])
    assert torch.equal(ternary.codes_RC.float(), (weight_RC / mean_R1).round().clamp(-1, 1))
    assert set(ternary.codes_RC.unique().tolist()) == {-1, 0, 1}
    weight_RC[0, :2] = torch.tensor([0.0, -0.0])
    binary = quantize_matrix(weight_RC, parse_quantizer("rtn1-absmean")[1])
    assert torch.equal(binary.codes_RC.float(), torch.where(weight_RC >= 0, 1.0, -1.0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "spec", [QuantSpec(b, symmetric=s, scale_rule="mse") for b in (1, 2, 3, 5) for s in (True, False)]
)
def test_mse_search_finds_the_least_error(spec, weighted):
    """Within 1 % of a search over 400 shares of the range, weighted or not."""
    weight_SN = normal(6, 300, seed=4) ** 3 + 1e-5
    importance_SN = torch.rand(1, 300, generator=torch.Generator().manual_seed(5)) ** 4 if weighted else None
    found_S1 = squared_error(weight_SN, *choose_steps(weight_SN, spec, importance_SN), spec, importance_SN)
    least_S1 = torch.full_like(found_S1, float("inf"))
    for share in np.linspace(0.01, 1, 400):
        plain = QuantSpec(spec.bits, symmetric=spec.symmetric)
        clipped_SN = weight_SN.clamp(weight_SN.amin(1, keepdim=True) * share, weight_SN.amax(1, keepdim=True) * share)
        if spec.symmetric:
            limit_S1 = weight_SN.abs().amax(1, keepdim=True) * share
            clipped_SN = weight_SN.clamp(-limit_S1, limit_S1)
        least_S1 = torch.minimum(
            least_S1, squared_error(weight_SN, *choose_steps(clipped_SN, plain), plain, importance_SN)
        )
    assert (found_S1 <= least_S1 * 1.01).all()
    absmax_S1 = squared_error(weight_SN, *choose_steps(weight_SN, QuantSpec(spec.bits)), QuantSpec(spec.bits), None)
    assert weighted or ((found_S1 <= absmax_S1).all() and (found_S1 < absmax_S1).any())


def test_given_steps_are_used():
    weight_RC = normal(4, 12)
    scale_SG = torch.tensor([[0.01, 0.02], [0.03, 0.04], [0.05, 0.06], [0.07, 0.08]]).half()
    column_scale_C = torch.linspace(0.5, 1.5, 12).half()
    entry = quantize_matrix(weight_RC, QuantSpec(8), scales=StepSizes(scale_SG, column_scale_C))
    step_RC = scale_SG.float().repeat_interleave(6, 1) * column_scale_C.float()
    assert torch.equal(entry.codes_RC.float(), (weight_RC / step_RC).round())
    assert torch.equal(dequantize_tensor(entry), (weight_RC / step_RC).round() * step_RC)
    one = quantize_matrix(weight_RC, QuantSpec(8), scales=StepSizes(torch.tensor([[0.01]]).half()))
    assert one.scale_SG.shape == (1, 1) and torch.equal(
        one.codes_RC.float(), (weight_RC / one.scale_SG.float()).round()
    )


@pytest.mark.parametrize(
    ("scales", "complaint"),
    [
        (StepSizes(torch.ones(3, 1).half()), "do not fit"),
        (StepSizes(torch.ones(4).half()), "do not fit"),
        (StepSizes(torch.ones(4, 1).half(), torch.ones(11).half()), "do not fit"),
        (StepSizes(torch.ones(4, 1)), "fp16"),
        (StepSizes(torch.zeros(4, 1).half()), "above zero"),
        (StepSizes(torch.ones(4, 1).half(), torch.full((12,), float("inf")).half()), "column_scale_C"),
    ],
)
def test_steps_that_do_not_fit_are_refused(scales, complaint):
    with pytest.raises(QuantError, match=complaint):
        quantize_matrix(normal(4, 12), QuantSpec(8), scales=scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused(value):
    weight_RC = normal(4, 12)
    weight_RC[2, 3] = value
    with pytest.raises(QuantError, match="the weight matrix has NaN or infinite"):
        quantize_matrix(weight_RC, QuantSpec(4))


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(QuantError, match="no matrix"):
        quantize_matrix(torch.zeros(shape), QuantSpec(4))


def test_entries_hold_plain_numbers_only():
    assert isinstance(quantize_matrix(normal(4, 12).double().requires_grad_(), QuantSpec(4)), QuantizedTensor)
