"""Runs the Triton kernel of golf/quant/grid.py on the CPU, in Triton's interpreter, and compares it with the plain
form, bit for bit. A program of its own: the interpreter is chosen before triton is imported (TRITON_INTERPRET=1)."""

import torch

from golf.quant.grid import RowGrids, grid_values, launch_rows


def main() -> None:
    generator, grids = torch.Generator().manual_seed(0), RowGrids()
    for bits in range(2, 9):
        for rows, columns in ((5, 64), (3, 100), (2, 7)):
            weight_RC = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(
                rows, 1, generator=generator
            )
            weight_RC[0] = 0.0
            weight_RC[1] = (weight_RC[1] * 4).round() / 2  # many values half way between two codes
            for dtype in (torch.float32, torch.bfloat16):
                grids.add(weight_RC, bits, dtype)
    weights = [*grids.weights, torch.full((1, 4), 1e-7), torch.full((1, 4), 1e7)]  # scales below and above fp16's
    grids.add(weights[-2], 6, torch.float32), grids.add(weights[-1], 6, torch.float32)
    tables = grids.row_tables()
    assert len(tables) == 2, "one kernel for each dtype"
    for table_N4, dtype in tables:
        launch_rows(table_N4, dtype, 100)
    for weight_RC, bits, values_RC in zip(grids.weights, grids.bits, grids.values, strict=True):
        expected_RC = grid_values(weight_RC, bits).to(values_RC.dtype)
        if values_RC.dtype == torch.bfloat16:  # the interpreter cuts where a device rounds
            expected_RC = (grid_values(weight_RC, bits).view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        integers = torch.int32 if values_RC.dtype == torch.float32 else torch.int16
        assert torch.equal(values_RC.view(integers), expected_RC.view(integers)), (bits, weight_RC.shape)
    print(f"{len(grids.values)} equal")


if __name__ == "__main__":
    main()
