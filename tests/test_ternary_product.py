"""Products by additions: exact for whole numbers, close for floats, from places and from bytes, never multiplying."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from golf.artifact.streams import pack_trits
from golf.quant.grid import dequantize_tensor
from golf.quant.tensor_classes import QuantError
from lab.bench.ternary_product import (
    additive_product,
    bench_ternary,
    five_sums,
    pack_trit_rows,
    packed_product,
    random_ternary,
    sign_matrix,
    signed_sums,
)
from lab.bundle.bundler import collect_parts
from tests.stored_fixtures import integers, stored_tensor


def whole_inputs(tokens: int, columns: int, salt: int = 0) -> torch.Tensor:
    return integers((tokens, columns), salt + 50, -128, 127).to(torch.int8)


SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 33), st.integers(1, 4), st.integers(1, 2), st.booleans())


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 1000))
def test_sums_of_whole_numbers_are_exact(shape, salt):
    """Against the definition, one product at a time; both ways, ternary and binary, one scale or one a row."""
    rows, columns, tokens, bits, shared = shape
    entry = stored_tensor((rows, columns), bits, salt, shared=shared)
    x_NC = whole_inputs(tokens, columns, salt)
    expected = [[sum(int(c) * int(x) for c, x in zip(code_C, x_C, strict=True)) for code_C in entry.codes_RC]
                for x_C in x_NC]  # fmt: skip
    sums_GNR = signed_sums(sign_matrix(entry), x_NC)
    assert sums_GNR.dtype == torch.int32 and sums_GNR[0].tolist() == expected
    scaled_NR = torch.tensor(expected).float() * entry.scale_SG.float().T
    assert torch.equal(additive_product(sign_matrix(entry), x_NC), scaled_NR)
    assert torch.equal(packed_product(pack_trit_rows(entry), entry.scale_SG, x_NC), scaled_NR)


@pytest.mark.parametrize("groups", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_equals_the_product_with_the_weights_that_the_codes_stand_for(groups, dtype):
    entry = stored_tensor((24, 40), 2, groups=groups)
    x_NC = (whole_inputs(6, 40).float() / (1 if dtype == torch.int8 else 50)).to(dtype)
    expected_NR = x_NC.double() @ dequantize_tensor(entry).double().T
    found_NR = additive_product(sign_matrix(entry), x_NC)
    assert found_NR.dtype == torch.float32 and found_NR.shape == (6, 24)
    torch.testing.assert_close(found_NR.double(), expected_NR, rtol=1e-5, atol=1e-5)
    if groups == 1:
        packed_NR = packed_product(pack_trit_rows(entry), entry.scale_SG, x_NC)
        torch.testing.assert_close(packed_NR.double(), expected_NR, rtol=1e-5, atol=1e-5)


def test_the_largest_inputs_do_not_overflow():
    entry = stored_tensor((2, 70_000), 1)
    entry = replace(entry, codes_RC=torch.ones_like(entry.codes_RC))
    x_NC = torch.full((1, 70_000), -128, dtype=torch.int8)
    assert signed_sums(sign_matrix(entry), x_NC).tolist() == [[[-128 * 70_000] * 2]]


def test_rows_pack_as_the_artifact_packs_codes():
    entry = stored_tensor((6, 35), 2)
    assert pack_trit_rows(entry).numpy().tobytes() == pack_trits(entry.codes_RC.numpy().reshape(-1).astype(np.int16))
    assert pack_trit_rows(stored_tensor((6, 36), 2)).shape == (6, 8)


def test_every_byte_finds_its_five_signs():
    x_NC = torch.tensor([[1, 10, 100, 1000, 10_000]], dtype=torch.int32)
    sums = five_sums(x_NC)[0, 0].tolist()
    digits = [[value // 3**place % 3 - 1 for place in range(5)] for value in range(3**5)]
    assert sums == [sum(d * 10**place for place, d in enumerate(signs)) for signs in digits]


class Multiplications(TorchDispatchMode):
    """Elements that came out of any operator that multiplies."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("mul", "mm", "dot", "linear", "einsum", "conv", "baddb", "div", "pow")):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("groups", [1, 4])
def test_one_multiplication_for_each_output_and_group(groups):
    entry, x_NC = stored_tensor((24, 40), 2, groups=groups), whole_inputs(3, 40)
    matrix, byte_RB = sign_matrix(entry), pack_trit_rows(entry)
    with Multiplications() as counted:
        additive_product(matrix, x_NC)
    assert counted.elements == groups * 3 * 24
    if groups == 1:
        with Multiplications() as counted:
            packed_product(byte_RB, entry.scale_SG, x_NC)
        assert counted.elements == 3 * 24
    with Multiplications() as counted:
        x_NC.float() @ dequantize_tensor(entry).T
    assert counted.elements, "the counter sees no matrix product"


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ({"bits": 3}, "codes beyond -1, 0 and 1"), ({"bits": 2, "zeros": True}, "codes beyond"),
        ({"bits": 1, "zeros": True}, "zero points"), ({"bits": 2, "columns": True}, "scales of columns"),
        ({"bits": 2, "rank": 2}, "a correction"), ({"bits": 2, "trellis": True}, "codes of a trellis"),
    ],
)  # fmt: skip
def test_matrices_that_need_more_than_signs_are_refused(form, what):
    entry = stored_tensor((8, 40), **form)
    for build in (sign_matrix, pack_trit_rows):
        with pytest.raises(QuantError, match=what):
            build(entry)


def test_groups_are_not_multiplied_from_bytes():
    entry = stored_tensor((8, 40), 2, groups=4)
    with pytest.raises(QuantError, match="one scale a row"):
        packed_product(pack_trit_rows(entry), entry.scale_SG, whole_inputs(1, 40))


@pytest.mark.parametrize("int8", [False, True])
def test_latency_is_measured_on_products_that_agree(int8):
    found = bench_ternary(rows=32, columns=40, tokens=2, int8=int8, repetitions=2)
    assert found.largest_error < 1e-5 and min(found.matmul_ms, found.additions_ms, found.lookups_ms) > 0
    assert found.inputs == ("int8" if int8 else "float32")
    slower = replace(found, matmul_ms=1.0, additions_ms=3.0, lookups_ms=2.0).verdict
    assert slower == "by additions 2.0 times slower than torch's product: no speed is claimed"
    faster = replace(found, matmul_ms=6.0, additions_ms=3.0, lookups_ms=2.0).verdict
    assert faster == "by additions 3.0 times faster than torch's product"
    zeros = (random_ternary(256, 256, 0).codes_RC == 0).float().mean()
    assert abs(float(zeros) - 0.31) < 0.01


def test_the_shipped_script_does_without(repository):
    shipped = {part.path for part in collect_parts(repository / "train_gpt.py", repository)}
    assert "golf/quant/grid.py" in shipped and "lab/bench/ternary_product.py" not in shipped
