"""Spreads matrices over ranks and over loops; what each rank makes of its own, all get. R rows, C columns."""

import math
from collections.abc import Mapping
from itertools import accumulate

import torch

from golf.quant.gptq import CODE_BITS
from golf.quant.grid import QuantizedTensor
from golf.runtime import Runtime

ROWS_TOGETHER = 8192
"""Most rows that a CPU rounds in one loop: more do not fit its caches (12 % slower). A GPU takes all."""
Shapes = Mapping[str, tuple[int, ...]]


def spread_matrices(shapes: Shapes, ranks: int) -> dict[str, int]:
    """Returns the rank of each matrix: equal shapes side by side, cut into stretches of about equal cost.

    A rank so meets few shapes, each of which takes a loop over its columns. A weight costs its part in moving all
    columns, and the choice of its code, which costs as much as 1,024 columns.
    """
    names = sorted(shapes, key=lambda name: (shapes[name][::-1], name))
    costs = [math.prod(shapes[name]) * (1024 + shapes[name][1]) for name in names]
    ends = accumulate(costs)
    return {
        name: ranks * (2 * end - cost) // (2 * sum(costs)) for name, cost, end in zip(names, costs, ends, strict=True)
    }


def batch_equal_shapes(shapes: Shapes, device: torch.device) -> list[list[str]]:
    """Returns the names in groups of equal shapes, which are small enough for the device."""
    found: dict[tuple[int, ...], list[list[str]]] = {}
    for name, shape in shapes.items():
        groups = found.setdefault(shape, [[]])
        if device.type == "cpu" and groups[-1] and (len(groups[-1]) + 1) * shape[0] > ROWS_TOGETHER:
            groups.append([])
        groups[-1].append(name)
    return [group for groups in found.values() for group in groups]


def share_entries(mine: Mapping[str, QuantizedTensor], shapes: Shapes, runtime: Runtime) -> dict[str, QuantizedTensor]:
    """Returns every rank's entries by name, on the CPU: sums in which all ranks but one have zeros, thus exact."""
    entries = {}
    for name, (rows, columns) in shapes.items():
        codes_RC, numbers_N = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows + columns + 1)
        if entry := mine.get(name):
            codes_RC, flag = entry.codes_RC, torch.tensor([float(entry.trellis)])
            numbers_N = torch.cat([entry.scale_SG[:, 0].float(), entry.column_scale_C.float(), flag])
        codes_RC, numbers_N = (runtime.sum_over_ranks(part.to(runtime.device)).cpu() for part in (codes_RC, numbers_N))
        scale_R, column_C, flag = numbers_N.split([rows, columns, 1])
        entries[name] = QuantizedTensor(
            codes_RC, scale_R.half().unsqueeze(1), CODE_BITS, column_C.half(), trellis=bool(flag)
        )
    return entries
