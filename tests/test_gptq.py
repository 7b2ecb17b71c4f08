"""GPTQ is what the paper says: OBQ column by column, whatever the block; and nothing that it is given breaks it."""

import pytest
import torch

from golf.quant.gptq import StepSizes, checked_hessian, factor_and_damped
from golf.quant.grid import dequantize_tensor, group_width, same_stored, spread_groups
from golf.quant.tensor_classes import QuantError
from lab.rates.grids import QuantSpec, choose_steps, parse_quantizer
from lab.rates.quantizers import GptqOptions, quantize_matrix

torch.set_num_threads(1)


def problem(rows: int, columns: int, seed: int, samples: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and second moments of strongly correlated inputs of unequal power."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, columns, generator=generator) * 0.05
    mix_CC = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs_NC = torch.randn(samples or 4 * columns, columns, generator=generator) @ mix_CC
    inputs_NC = inputs_NC * torch.rand(columns, generator=generator).exp() + 0.5
    return weight_RC, inputs_NC.T.double() @ inputs_NC.double()


def output_error(weight_RC: torch.Tensor, entry, hessian_CC: torch.Tensor) -> float:
    error_RC = (weight_RC - dequantize_tensor(entry)).double()
    return float(((error_RC @ hessian_CC) * error_RC).sum())


GRIDS = [
    "gptq4",
    "gptq8",
    "gptq2-absmean",
    "gptq1",
    "gptq3-zp",
    "gptq4-tensor",
    "gptq3-g5-mse",
    "gptq8-g7-zp",
    "gptq4-sd3",
]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 0.0])
@pytest.mark.parametrize("text", GRIDS)
def test_uncorrelated_inputs_give_rounding_to_nearest(text, scale, act_order):
    """Exactly: the same codes, steps and zero points; and so do inputs that are all zero."""
    spec = parse_quantizer(text)[1]
    weight_RC = problem(12, 23, seed=1)[0]
    weight_RC[3] = (weight_RC[3] * 100).round() * weight_RC[3].abs().max() / 14  # halves between codes
    options = GptqOptions(act_order=act_order, block=8)
    found = quantize_matrix(weight_RC, spec, scale * torch.eye(23), options)
    assert same_stored(found, quantize_matrix(weight_RC, spec))


def dense_elimination(weight_RC, hessian_CC, spec, order, scale_SG=None):
    """OBQ with a fixed order of columns, as it is defined: after each column, the best move of all that are left.

    H^-1 of what is left is found by inverting what is left. Returns the rounded weights and the groups' steps.
    """
    weight_RC, rounded_RC, columns = weight_RC.double(), torch.zeros_like(weight_RC).double(), weight_RC.size(1)
    groups = -(-columns // spec.group_size) if spec.granularity == "group" else 1
    width, steps = group_width(columns, groups), {}
    clip = max(2 ** (spec.bits - 1) - 1, 1)
    for i, column in enumerate(order):
        left, group = order[i:], column // width
        if group not in steps:
            part_RN = weight_RC[:, group * width : (group + 1) * width]
            steps[group] = choose_steps(part_RN.float(), spec)[0] if scale_SG is None else scale_SG[:, group, None]
        step_R = steps[group][:, 0].double()
        rounded_RC[:, column] = (weight_RC[:, column] / step_R).round().clamp(-clip, clip) * step_R
        inverse_LL = torch.linalg.inv(hessian_CC[left][:, left])
        error_R = (weight_RC[:, column] - rounded_RC[:, column]) / inverse_LL[0, 0]
        weight_RC[:, left] -= error_R[:, None] * inverse_LL[0]
    return rounded_RC, torch.cat([steps[g] for g in range(groups)], dim=1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("text", ["gptq4", "gptq2-absmean", "gptq3-g5", "gptq4-g8-mse"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_dense_elimination(seed, text, act_order):
    spec = parse_quantizer(text)[1]
    weight_RC, hessian_CC = problem(9, 21, seed)
    damped_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(21).double()
    order = hessian_CC.diagonal().argsort(descending=True).tolist() if act_order else list(range(21))
    rounded_RC, scale_SG = dense_elimination(weight_RC, damped_CC, spec, order)
    entry = quantize_matrix(weight_RC, spec, hessian_CC, GptqOptions(act_order=act_order, block=4))
    torch.testing.assert_close(entry.scale_SG.float(), scale_SG, rtol=1e-3, atol=0)
    torch.testing.assert_close(dequantize_tensor(entry).double(), rounded_RC, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("text", [*GRIDS, "gptq5-g64"])
@pytest.mark.parametrize("rd_lambda", [0.0, 1.0])
def test_block_size_has_no_effect(text, rd_lambda):
    spec = parse_quantizer(text)[1]
    weight_RC, hessian_CC = problem(16, 50, seed=3)
    entries = [
        quantize_matrix(weight_RC, spec, hessian_CC, GptqOptions(block=block, rd_lambda=rd_lambda))
        for block in (1, 7, 16, 128)
    ]
    assert all(same_stored(entries[0], entry) for entry in entries[1:])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("gptq8", 0.7),
        ("gptq4", 0.8),
        ("gptq3-zp", 0.8),
        ("gptq2-absmean", 1),
        ("gptq4-g16", 0.8),
        ("gptq3-tensor", 0.9),
    ],
)
def test_output_error_is_at_most_that_of_rounding_to_nearest(text, share):
    """Much less, but where a coarse grid clips most of the moves."""
    spec = parse_quantizer(text)[1]
    for seed in range(20):
        weight_RC, hessian_CC = problem(16, 48, seed)
        nearest = output_error(weight_RC, quantize_matrix(weight_RC, spec), hessian_CC)
        for act_order in (False, True):
            entry = quantize_matrix(weight_RC, spec, hessian_CC, GptqOptions(act_order=act_order))
            assert output_error(weight_RC, entry, hessian_CC) < share * nearest


def test_the_published_mistake_would_show():
    """Rows of the full inverse instead of its factor (no elimination) are several times worse on such inputs."""
    weight_RC, hessian_CC = problem(16, 48, seed=5)
    inverse_CC = torch.linalg.inv(hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(48).double())
    entry = quantize_matrix(weight_RC, QuantSpec(4), hessian_CC)
    step_R, moved_RC, wrong_RC = entry.scale_SG[:, 0].double(), weight_RC.double(), weight_RC.double()
    for c in range(48):
        wrong_RC[:, c] = (moved_RC[:, c] / step_R).round().clamp(-7, 7) * step_R
        error_R = (moved_RC[:, c] - wrong_RC[:, c]) / inverse_CC[c, c]
        moved_RC[:, c + 1 :] -= error_R[:, None] * inverse_CC[c, c + 1 :]
    difference_RC = weight_RC - wrong_RC
    wrong = float(((difference_RC @ hessian_CC) * difference_RC).sum())
    assert wrong > 1.5 * output_error(weight_RC, entry, hessian_CC)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("text", ["gptq4", "gptq4-g6", "gptq3-zp"])
def test_dead_columns_and_too_few_inputs_are_no_trouble(text, act_order):
    spec = parse_quantizer(text)[1]
    weight_RC, _ = problem(8, 40, seed=6)
    inputs_NC = torch.randn(5, 40, generator=torch.Generator().manual_seed(7)).double()
    inputs_NC[:, 3:9] = 0
    entry = quantize_matrix(weight_RC, spec, inputs_NC.T @ inputs_NC, GptqOptions(act_order=act_order))
    assert dequantize_tensor(entry).isfinite().all()
    if spec.granularity == "row":
        assert torch.equal(entry.codes_RC[:, 3:9], quantize_matrix(weight_RC, spec).codes_RC[:, 3:9])


def test_the_factor_is_the_factor_of_the_inverse():
    _, hessian_CC = problem(1, 30, seed=8)
    factor_CC, _ = factor_and_damped(hessian_CC, 0.01)
    damped_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(30).double()
    assert torch.equal(factor_CC, factor_CC.triu()) and (factor_CC.diagonal() > 0).all()
    torch.testing.assert_close(factor_CC.T @ factor_CC @ damped_CC, torch.eye(30).double(), rtol=0, atol=1e-9)


def test_damping_grows_until_there_is_a_factor():
    hessian_CC = torch.eye(4).double()
    hessian_CC[0, 1] = hessian_CC[1, 0] = 1.5  # eigenvalue -0.5: 1 % and 10 % are too little, 100 % does it
    factor_CC, _ = factor_and_damped(hessian_CC, 0.01)
    torch.testing.assert_close(torch.linalg.inv(factor_CC.T @ factor_CC), hessian_CC + torch.eye(4))
    with pytest.raises(QuantError, match="no Cholesky factor"):
        factor_and_damped(hessian_CC, 1e-9)


@pytest.mark.parametrize(
    ("hessian_CC", "complaint"),
    [
        (torch.eye(5), r"\(5, 5\), the weights have 6 columns"),
        (torch.ones(6), "the weights have 6 columns"),
        (torch.full((6, 6), float("nan")), "the Hessian has NaN"),
        (torch.eye(6) * float("inf"), "the Hessian has NaN or infinite"),
        (-torch.eye(6), "negative values on its diagonal"),
    ],
)
def test_what_is_no_hessian_is_refused(hessian_CC, complaint):
    with pytest.raises(QuantError, match=complaint):
        quantize_matrix(torch.ones(3, 6), QuantSpec(4), hessian_CC)


def test_broken_weights_and_options_are_refused():
    weight_RC = torch.ones(3, 6)
    for options in (
        GptqOptions(damping=0),
        GptqOptions(block=0),
        GptqOptions(rd_lambda=-1),
        GptqOptions(rate_passes=0),
    ):
        with pytest.raises(QuantError, match="above 0"):
            quantize_matrix(weight_RC, QuantSpec(4), torch.eye(6), options)
    with pytest.raises(QuantError, match="symmetric grid"):
        steps = StepSizes(torch.ones(3, 1).half())
        quantize_matrix(weight_RC, QuantSpec(4, symmetric=False), torch.eye(6), scales=steps)
    weight_RC[1, 1] = float("nan")
    with pytest.raises(QuantError, match="the weight matrix has NaN"):
        quantize_matrix(weight_RC, QuantSpec(4), torch.eye(6))


def test_given_steps_are_those_of_the_same_problem():
    """Steps per row, per group and per column: as if the columns, the inputs and the steps had another unit."""
    weight_RC, hessian_CC = problem(8, 24, seed=9)
    column_scale_C = 2.0 ** torch.randint(-2, 3, (24,), generator=torch.Generator().manual_seed(1))
    scale_SG = quantize_matrix(weight_RC, QuantSpec(5)).scale_SG
    entry = quantize_matrix(
        weight_RC, QuantSpec(8), hessian_CC, GptqOptions(act_order=False), StepSizes(scale_SG, column_scale_C.half())
    )
    other_CC = hessian_CC + 0.01 * hessian_CC.diagonal().mean() * torch.eye(24).double()
    other_CC = other_CC * column_scale_C.double() * column_scale_C.double()[:, None]
    options = GptqOptions(act_order=False, damping=1e-12)
    other = quantize_matrix(weight_RC / column_scale_C, QuantSpec(8), other_CC, options, StepSizes(scale_SG))
    assert torch.equal(entry.codes_RC, other.codes_RC) and torch.equal(entry.scale_SG, scale_SG)
    assert torch.equal(entry.column_scale_C, column_scale_C.half())
    error_RC = weight_RC - dequantize_tensor(entry)
    assert error_RC.abs().max() < 40 * float(scale_SG.max())


def test_two_runs_give_the_same_bytes_and_change_nothing():
    weight_RC, hessian_CC = problem(8, 40, seed=10)
    before = weight_RC.clone(), hessian_CC.clone()
    options = GptqOptions(rd_lambda=0.5)
    entries = [quantize_matrix(weight_RC, QuantSpec(4, "group", 16), hessian_CC, options) for _ in range(2)]
    assert same_stored(*entries) and checked_hessian(hessian_CC, 40) is not hessian_CC
    assert torch.equal(weight_RC, before[0]) and torch.equal(hessian_CC, before[1])
    assert spread_groups(entries[0].scale_SG, 40).shape == (8, 40)
