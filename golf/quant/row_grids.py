"""Keeps the values that matrices have on export's grid, for quantization-aware training: all renewed in one pass.

A step trains on them and passes their gradients straight through to the weights. R rows, C columns.
"""

from collections import defaultdict
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from golf.quant.grid import grid_clip, grid_values

# The package comes with torch's CUDA builds; a CPU does not need it.
triton = import_module("triton") if find_spec("triton") else None
tl = import_module("triton.language") if triton else None
constexpr = getattr(tl, "constexpr", None)


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


@cache
def compiled_row_kernel() -> Any:
    return triton.jit(grid_row_kernel)


def launch_rows(table_N4: Tensor, dtype: torch.dtype, columns: int) -> None:
    """Renews the values, of `dtype`, of all rows of the table in one kernel."""
    sample = torch.empty(0, dtype=dtype, device=table_N4.device)
    compiled_row_kernel()[(len(table_N4),)](table_N4, sample, BLOCK=triton.next_power_of_2(columns))
