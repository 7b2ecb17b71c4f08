"""A product with a binary or ternary matrix by additions and subtractions alone, and one multiplication an output.

The reference for the claim that such weights need no multiplier: it is exact and slow (lab/bench/ternary_bench.py
says by how much). Two ways from the same codes: sums of the inputs that a row adds, less those that it subtracts; and
from bytes of five codes in base 3, as the artifact packs them, by looking up the sums that five inputs can have.

N tokens, R rows, C columns, B bytes of a row, K sums that a byte may ask for, S rows of scales, G groups of columns,
L codes of magnitude 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.grid import QuantizedTensor, group_width
from golf.quant.tensor_classes import QuantError

TRITS_PER_BYTE = 5
LARGEST_SUM = 2**31 // 128
"""Columns up to which sums of int8 fit in int32."""


@dataclass(frozen=True, eq=False)
class SignMatrix:
    """Where a matrix adds an input and where it subtracts one, by group of columns."""

    shape: tuple[int, int]
    scale_SG: Tensor
    """fp32."""
    added: tuple[tuple[Tensor, Tensor], ...]
    """(row_L, column_L) of the codes 1 of each group."""
    subtracted: tuple[tuple[Tensor, Tensor], ...]
    """Of the codes -1."""


def sign_matrix(entry: QuantizedTensor) -> SignMatrix:
    """The matrix that `entry` stores. Raises QuantError for one that takes more than signs and a scale."""
    check_signs(entry)
    width = group_width(entry.codes_RC.size(1), entry.scale_SG.size(1))
    parts = entry.codes_RC.split(width, dim=1)
    starts = range(0, entry.codes_RC.size(1), width)

    def places(code: int) -> tuple[tuple[Tensor, Tensor], ...]:
        found = (torch.nonzero(part == code, as_tuple=True) for part in parts)
        return tuple((row_L, column_L + start) for (row_L, column_L), start in zip(found, starts, strict=True))

    return SignMatrix(tuple(entry.codes_RC.shape), entry.scale_SG.float(), places(1), places(-1))


def check_signs(entry: QuantizedTensor) -> None:
    odd = {
        "codes beyond -1, 0 and 1": bool((entry.codes_RC.abs() > 1).any()),
        "zero points": entry.zero_SG is not None,
        "scales of columns": entry.column_scale_C is not None,
        "a correction": entry.low_rank is not None,
        "codes of a trellis": entry.trellis,
    }
    for what, is_there in odd.items():
        if is_there:
            raise QuantError(f"a product by additions needs signs and scales alone, this matrix has {what}")


def wide_inputs(x_NC: Tensor, columns: int) -> Tensor:
    """`x_NC` in the type that sums are taken in: int32 of int8, else fp32."""
    assert x_NC.dim() == 2 and x_NC.size(1) == columns, f"inputs {tuple(x_NC.shape)} for {columns} columns"
    if x_NC.dtype == torch.int8:
        assert columns <= LARGEST_SUM
        return x_NC.int()
    assert x_NC.is_floating_point()
    return x_NC.float()


def scaled_sums(sums_GNR: Tensor, scale_SG: Tensor) -> Tensor:
    """y_NR, fp32: a multiplication by its scale for each output (and each group, where there are several)."""
    return (sums_GNR.float() * scale_SG.T.unsqueeze(1)).sum(0)


def signed_sums(matrix: SignMatrix, x_NC: Tensor) -> Tensor:
    """sums_GNR of codes times inputs by group, without a multiplication: int32 and exact for int8, else fp32."""
    x_CN = wide_inputs(x_NC, matrix.shape[1]).T.contiguous()
    sums = []
    for added, subtracted in zip(matrix.added, matrix.subtracted, strict=True):
        up_RN, down_RN = (
            torch.zeros(matrix.shape[0], x_CN.size(1), dtype=x_CN.dtype).index_add_(0, row_L, x_CN[column_L])
            for row_L, column_L in (added, subtracted)
        )
        sums.append((up_RN - down_RN).T)
    return torch.stack(sums)


def additive_product(matrix: SignMatrix, x_NC: Tensor) -> Tensor:
    """y_NR = x_NC W_RC^T, fp32, of inputs in int8 (their own scale still to come) or in floats."""
    return scaled_sums(signed_sums(matrix, x_NC), matrix.scale_SG)


def pack_trit_rows(entry: QuantizedTensor) -> Tensor:
    """uint8 byte_RB, each row's codes five to a byte in base 3, the last filled up with 0.

    Where rows are multiples of five, their bytes one after another are those of the artifact's ternary stream. Raises
    QuantError for a matrix that takes more than signs and a scale.
    """
    check_signs(entry)
    rows, columns = entry.codes_RC.shape
    padded_RC = torch.nn.functional.pad(entry.codes_RC.long(), (0, -columns % TRITS_PER_BYTE))
    digits_RB5 = padded_RC.view(rows, -1, TRITS_PER_BYTE) + 1
    return (digits_RB5 * 3 ** torch.arange(TRITS_PER_BYTE)).sum(-1).to(torch.uint8)


def five_sums(x_NC: Tensor) -> Tensor:
    """sums_NBK: for each five inputs, the sums of all ways to add, leave out or subtract each, by additions."""
    tokens, columns = x_NC.shape
    x_NB5 = torch.nn.functional.pad(x_NC, (0, -columns % TRITS_PER_BYTE)).view(tokens, -1, TRITS_PER_BYTE)
    sums_NBK = torch.zeros_like(x_NB5[..., :1])
    for place in range(TRITS_PER_BYTE):
        one_NB1 = x_NB5[..., place : place + 1]
        sums_NBK = torch.cat((sums_NBK - one_NB1, sums_NBK, sums_NBK + one_NB1), dim=-1)
    return sums_NBK


def packed_product(byte_RB: Tensor, scale_SG: Tensor, x_NC: Tensor) -> Tensor:
    """y_NR = x_NC W_RC^T, fp32, from packed codes: a look-up and an addition for five columns. One group alone.

    Raises QuantError for several groups.
    """
    if scale_SG.size(1) != 1:
        raise QuantError(
            "packed codes are multiplied with one scale a row, or one for all: groups have no bytes' edges"
        )
    sums_NBK = five_sums(wide_inputs(x_NC, x_NC.size(1)))
    assert sums_NBK.size(1) == byte_RB.size(1), f"inputs of {sums_NBK.size(1)} bytes for rows of {byte_RB.size(1)}"
    byte_BR = byte_RB.long().T
    sums_NR = torch.zeros(x_NC.size(0), byte_RB.size(0), dtype=sums_NBK.dtype)
    for place in range(byte_RB.size(1)):  # one after the other, so that memory stays that of the table
        sums_NR += sums_NBK[:, place].index_select(1, byte_BR[place])
    return scaled_sums(sums_NR.unsqueeze(0), scale_SG.float())
