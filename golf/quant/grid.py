"""Defines the symmetric per-row grid of training and export, and a weight's stored form: codes, steps, the way to fp32.

Training and export use one rule, so that the trained weights are those that ship. R rows, C columns, S rows of scales
(R, or 1 for all), G groups of columns, K rank of the correction.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf.config.config import stores_plain_rows
from golf.model.kernels import compiled_kernel, constexpr, tl
from golf.quant.trellis import trellis_halves

FP16_TINY = 2.0**-14
"""Smallest normal fp16 (6.104e-5): the floor of a row's scale, so that an all-zero row has one too."""
FP16_MAX = 65_504.0


def grid_clip(bits: int) -> int:
    """Returns the largest code of a symmetric grid: 1 for 1 bit (codes -1 and 1), 15 for 5 bits, 31 for 6, 127 for
    8."""
    assert 1 <= bits <= 8
    return max(2 ** (bits - 1) - 1, 1)


def grid_codes_and_scale(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns codes (whole numbers, as fp32) and the fp32 values of the fp16 scales, shape (R, 1).

    scale = fp16(max|row| / clip), within fp16's normal range; code = clamp(round_half_even(w / scale), -clip, clip).
    """
    clip = grid_clip(bits)
    weight_RC = weight_RC.float()
    largest_R1 = weight_RC.abs().amax(dim=1, keepdim=True)
    # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
    scale_R1 = (largest_R1 / torch.full_like(largest_R1, clip)).clamp(FP16_TINY, FP16_MAX).half().float()
    return (weight_RC / scale_R1).round_().clamp_(-clip, clip), scale_R1


def quantize_rows(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns int8 codes_RC in -clip..clip and fp16 scale_R of a finite matrix."""
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.to(torch.int8), scale_R1.squeeze(1).half()


def grid_values(weight_RC: Tensor, bits: int) -> Tensor:
    """Returns the fp32 weights that the exported codes and scales give, bit for bit."""
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.add_(0.0).mul_(scale_R1)  # + 0.0 turns -0.0, which int8 cannot hold, into 0.0


class StraightThrough(torch.autograd.Function):
    """Uses a weight's values on the grid; the weight receives their gradient (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(context: Any, weight_RC: Tensor, values_RC: Tensor) -> Tensor:
        return values_RC.view_as(values_RC)

    @staticmethod
    def backward(context: Any, gradient_RC: Tensor) -> tuple[Tensor, None]:
        return gradient_RC.float(), None


class RowGrids:
    """Holds matrices that train on the grid of their rows, and their values on it."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.bits: list[int] = []
        self.values: list[Tensor] = []
        self.seen: list[tuple[int, int]] = []
        self.tables: list[tuple[Tensor, torch.dtype]] = []

    def add(self, weight_RC: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """Takes up a matrix; returns its values on the grid, in `dtype`, which `renew` keeps up to date."""
        self.weights.append(weight_RC)
        self.bits.append(bits)
        self.values.append(torch.empty_like(weight_RC, dtype=dtype, requires_grad=False))
        return self.values[-1]

    @torch.no_grad()
    def renew(self) -> None:
        """Puts the weights on the grid again where any has changed; a compiled step needs it before, an eager one calls
        it."""
        current = [(weight.data_ptr(), weight._version) for weight in self.weights]
        if current == self.seen:  # nothing has changed, or there is nothing
            return
        if self.weights[0].is_cuda:
            if [place for place, _ in current] != [place for place, _ in self.seen]:
                self.tables = self.row_tables()
            for table_N4, dtype in self.tables:
                launch_rows(table_N4, dtype, max(weight.size(1) for weight in self.weights))
        else:
            for weight_RC, bits, values_RC in zip(self.weights, self.bits, self.values, strict=True):
                values_RC.copy_(grid_values(weight_RC, bits))
        self.seen = current

    def row_tables(self) -> list[tuple[Tensor, torch.dtype]]:
        """Returns for each dtype of values a table_N4 of rows: address of the weights and of the values, columns,
        largest code."""
        rows = defaultdict(list)
        for weight_RC, bits, values_RC in zip(self.weights, self.bits, self.values, strict=True):
            source, place, columns = weight_RC.data_ptr(), values_RC.data_ptr(), weight_RC.size(1)
            widths = weight_RC.element_size() * columns, values_RC.element_size() * columns
            rows[values_RC.dtype] += [
                (source + row * widths[0], place + row * widths[1], columns, grid_clip(bits))
                for row in range(weight_RC.size(0))
            ]
        return [(torch.tensor(part, device=self.weights[0].device), dtype) for dtype, part in rows.items()]


def through_grid(weight_RC: Tensor, values_RC: Tensor, grids: RowGrids) -> Tensor:
    """Returns `values_RC` with the gradient of the identity on `weight_RC`."""
    if not torch.compiler.is_compiling():
        grids.renew()
    return StraightThrough.apply(weight_RC, values_RC)


def grid_row_kernel(table_N4, values, BLOCK: constexpr):
    """Puts row `program_id` on its grid, as grid_values does: each operation rounds as on the CPU."""
    entry = table_N4 + 4 * tl.program_id(0).to(tl.int64)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    places = tl.load(entry + 1).to(tl.pointer_type(values.dtype.element_ty))
    column = tl.arange(0, BLOCK)
    inside = column < tl.load(entry + 2)
    clip = tl.load(entry + 3).to(tl.float32)
    weight = tl.load(weights + column, mask=inside, other=0.0)
    scale = tl.div_rn(tl.max(tl.abs(weight), axis=0), clip)
    scale = tl.minimum(tl.maximum(scale, 2.0**-14), 65504.0).to(tl.float16).to(tl.float32)
    code = tl.div_rn(weight, tl.zeros_like(weight) + scale)
    code = tl.minimum(tl.maximum(code, -clip), clip)
    # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves no -0.
    code = (code + 12582912.0) - 12582912.0
    tl.store(places + column, (code * scale).to(values.dtype.element_ty), mask=inside)


def launch_rows(table_N4: Tensor, dtype: torch.dtype, columns: int) -> None:
    """Renews the values, of `dtype`, of all rows of the table in one kernel."""
    sample = torch.empty(0, dtype=dtype, device=table_N4.device)
    compiled_kernel(grid_row_kernel)[(len(table_N4),)](table_N4, sample, BLOCK=1 << (columns - 1).bit_length())


PLAIN_PARTS = ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
"""Tensors of a QuantizedTensor, the optional ones last."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Stores weight_rc = (code_rc - zero_rg) * scale_rg * column_scale_c + (left @ right)_rc, g the group of column c.

    Groups are equally wide except the last, which may be narrower. Everything is small whole numbers or fp16, so that
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
    """Whether codes stand for the points 2 code + half of the trellis grid (golf/quant/trellis.py)."""


QuantizedState = dict[str, QuantizedTensor | Tensor]
"""Stored form of each tensor by name: codes and scales, or an fp16 tensor."""


def group_width(columns: int, groups: int) -> int:
    """Returns the columns of every group but the last."""
    return -(-columns // groups)


def spread_groups(values_SG: Tensor, columns: int) -> Tensor:
    """Returns values_SC, each group's value at each of its columns; `values_SG` itself where there is one group."""
    groups = values_SG.size(1)
    if groups == 1:
        return values_SG
    return values_SG.repeat_interleave(group_width(columns, groups), dim=1)[:, :columns]


def dequantize_tensor(entry: QuantizedTensor) -> Tensor:
    """Returns the fp32 weights that `entry` stands for."""
    columns = entry.codes_RC.size(1)
    weight_RC = entry.codes_RC.float()
    if stores_plain_rows():
        return weight_RC * entry.scale_SG.float()
    if entry.trellis:
        weight_RC = 2 * weight_RC + trellis_halves(entry.codes_RC).float()
    if entry.zero_SG is not None:
        weight_RC = weight_RC - spread_groups(entry.zero_SG.float(), columns)
    weight_RC = weight_RC * spread_groups(entry.scale_SG.float(), columns)
    if entry.column_scale_C is not None:
        weight_RC = weight_RC * entry.column_scale_C.float()
    if entry.low_rank is not None:
        left_RK, right_KC = map(dequantize_tensor, entry.low_rank)
        for k in range(left_RK.size(1)):  # one by one: a matrix product's order of summation depends on the machine
            weight_RC = weight_RC + left_RK[:, k : k + 1] * right_KC[k]
    return weight_RC


def dequantize_state(stored: QuantizedState) -> dict[str, Tensor]:
    """Returns the fp32 weights that `stored` stands for: those of the scored model."""
    return {
        name: dequantize_tensor(entry) if isinstance(entry, QuantizedTensor) else entry.float()
        for name, entry in stored.items()
    }


def same_stored(one: QuantizedTensor | Tensor | None, other: QuantizedTensor | Tensor | None) -> bool:
    """Returns whether two stored tensors hold the same numbers in the same form."""
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        pairs = [
            (getattr(one, part), getattr(other, part)) for part in ("codes_RC", "scale_SG", "column_scale_C", "zero_SG")
        ]
        pairs += zip(one.low_rank or (None, None), other.low_rank or (None, None), strict=True)
        return (one.bits, one.trellis) == (other.bits, other.trellis) and all(same_stored(*pair) for pair in pairs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is None and other is None
