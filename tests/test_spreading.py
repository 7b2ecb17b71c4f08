"""Water-filling on several ranks and in one loop for many matrices: a matrix gets the same codes in any company."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.quant.calibration import LayerStatistics
from golf.quant.grid import same_stored
from golf.quant.spreading import ROWS_TOGETHER, batch_equal_shapes, spread_matrices
from golf.quant.waterfill import prepare_matrix, quantize_matrices

FRONTIER = {
    f"blocks.{layer}.{kind}": shape
    for layer in range(11)
    for kind, shape in {
        "q": (512, 512), "k": (256, 512), "v": (256, 512), "o": (512, 512), "up": (2048, 512), "down": (512, 2048),
    }.items()
} | {"table": (8192, 512)}  # fmt: skip


def prepared(rows, columns, count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x_NC = torch.randn(2 * columns, columns // 4, generator=generator) @ torch.randn(
            columns // 4, columns, generator=generator
        )
        x_NC += 0.3 * torch.randn(x_NC.shape, generator=generator)
        row_weight_R = torch.exp(torch.randn(rows, generator=generator)).double()
        weight_RC = torch.randn(rows, columns, generator=generator)
        yield prepare_matrix(weight_RC, LayerStatistics((x_NC.T @ x_NC).double() / len(x_NC), row_weight_R))


@pytest.mark.parametrize("trellis", [False, True])
def test_a_matrix_gets_the_same_codes_in_any_company(trellis):
    matrices = list(prepared(40, 150, 5))
    together = quantize_matrices(matrices, 1e-2, trellis=trellis)
    assert any(entry.trellis for entry in together) == trellis
    assert len({entry.codes_RC.float().abs().mean().item() for entry in together}) == 5
    for number, matrix in enumerate(matrices):
        pair = quantize_matrices([matrices[number - 1], matrix], 1e-2, trellis=trellis)
        assert same_stored(matrix.quantize(1e-2, trellis=trellis), together[number])
        assert same_stored(pair[1], together[number])


@given(st.integers(1, 64))
@settings(deadline=None, max_examples=20)
def test_every_matrix_has_one_rank_and_equal_shapes_stay_together(ranks):
    found = spread_matrices(FRONTIER, ranks)
    assert found.keys() == FRONTIER.keys() and set(found.values()) <= set(range(ranks))
    for rank in range(ranks - 1):
        here, there = ({FRONTIER[name] for name in found if found[name] == number} for number in (rank, rank + 1))
        assert len(here & there) <= 1


def test_eight_ranks_share_the_work_of_the_frontier_about_evenly():
    found = spread_matrices(FRONTIER, 8)
    work = [0] * 8
    for name, (rows, columns) in FRONTIER.items():
        work[found[name]] += rows * columns * (1024 + columns)
    assert max(work) < 1.25 * sum(work) / 8 and min(work) > 0


def test_one_loop_takes_equal_shapes_and_a_bounded_number_of_rows_on_a_cpu():
    groups = batch_equal_shapes(FRONTIER, torch.device("cpu"))
    assert sorted(name for group in groups for name in group) == sorted(FRONTIER)
    for group in groups:
        (shape,) = {FRONTIER[name] for name in group}
        assert len(group) * shape[0] <= ROWS_TOGETHER or len(group) == 1
    assert len(batch_equal_shapes(FRONTIER, torch.device("cuda"))) == len(set(FRONTIER.values())) == 5


def fit_on(ranks: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    root = Path(__file__).resolve().parents[1]
    finished = subprocess.run(
        [*command, "tests/fit_on_ranks.py"], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=3600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return [line for line in finished.stdout.splitlines() if line.startswith("fitted ")]


@pytest.mark.slow
def test_the_artifact_does_not_depend_on_the_number_of_ranks():
    found = {ranks: fit_on(ranks) for ranks in (1, 2, 4)}
    assert [len(lines) for lines in found.values()] == [1, 2, 4]
    digests = {line.partition(" shares ")[0] for lines in found.values() for line in lines}
    assert len(digests) == 1, found
    assert "0" not in found[4][0].partition(" shares ")[2].strip("[]").split(", ")  # every rank had matrices
