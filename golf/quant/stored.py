"""The stored form of a weight: integer codes, their steps, and the exact way back to fp32.

R rows, C columns, S rows of scales (R, or 1 for all), G groups of columns, K rank of the correction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.trellis import trellis_halves

PLAIN_PARTS = ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
"""Tensors of a QuantizedTensor, the optional ones last."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """weight_rc = (code_rc - zero_rg) * scale_rg * column_scale_c + (left @ right)_rc, g the group of column c.

    Groups are equally wide but for the last, which may be narrower. Everything is small whole numbers or fp16, so
    dequantization is the same on every machine.
    """

    codes_RC: Tensor
    """int8, within the grid of `bits`: -clip..clip, without 0 for 1 bit; 0..2^bits - 1 (less 128 for 8) with zeros."""
    scale_SG: Tensor
    """fp16, positive; one row of scales serves all rows, or each row has its own."""
    bits: int
    column_scale_C: Tensor | None = None
    """fp16, positive; None: 1 for every column."""
    zero_SG: Tensor | None = None
    """int8, the code that stands for 0; None: symmetric."""
    low_rank: tuple["QuantizedTensor", "QuantizedTensor"] | None = None
    """left_RK and right_KC, quantized themselves: a correction of the rounding error (LQER, arXiv 2402.02446)."""
    trellis: bool = False
    """Codes stand for points 2 code + half of the trellis grid (golf/quant/trellis.py)."""


QuantizedState = dict[str, QuantizedTensor | Tensor]
"""Stored form of each tensor by name: codes and scales, or an fp16 tensor."""


def group_width(columns: int, groups: int) -> int:
    """Columns of every group but the last."""
    return -(-columns // groups)


def spread_groups(values_SG: Tensor, columns: int) -> Tensor:
    """values_SC: each group's value at each of its columns; as it is where there is one group."""
    groups = values_SG.size(1)
    if groups == 1:
        return values_SG
    return values_SG.repeat_interleave(group_width(columns, groups), dim=1)[:, :columns]


def dequantize_tensor(entry: QuantizedTensor) -> Tensor:
    """The fp32 weights that `entry` stands for."""
    columns = entry.codes_RC.size(1)
    weight_RC = entry.codes_RC.float()
    if entry.trellis:
        weight_RC = 2 * weight_RC + trellis_halves(entry.codes_RC).float()
    if entry.zero_SG is not None:
        weight_RC = weight_RC - spread_groups(entry.zero_SG.float(), columns)
    weight_RC = weight_RC * spread_groups(entry.scale_SG.float(), columns)
    if entry.column_scale_C is not None:
        weight_RC = weight_RC * entry.column_scale_C.float()
    if entry.low_rank is not None:
        left_RK, right_KC = map(dequantize_tensor, entry.low_rank)
        for k in range(left_RK.size(1)):  # one after the other: the order of a matrix product is the machine's
            weight_RC = weight_RC + left_RK[:, k : k + 1] * right_KC[k]
    return weight_RC


def dequantize_state(stored: QuantizedState) -> dict[str, Tensor]:
    """fp32 weights that `stored` stands for: those of the model that is scored."""
    return {
        name: dequantize_tensor(entry) if isinstance(entry, QuantizedTensor) else entry.float()
        for name, entry in stored.items()
    }


def same_stored(one: QuantizedTensor | Tensor | None, other: QuantizedTensor | Tensor | None) -> bool:
    """Whether two stored tensors hold the same numbers in the same form."""
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        pairs = [
            (getattr(one, part), getattr(other, part)) for part in ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
        ]
        pairs += zip(one.low_rank or (None, None), other.low_rank or (None, None), strict=True)
        return (one.bits, one.trellis) == (other.bits, other.trellis) and all(same_stored(*pair) for pair in pairs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is None and other is None
