"""Steps of fewer kinds than water-filling's, and scales of rows and columns refitted to codes that are there.

WaterSIC (arXiv 2603.04956) gives a column the step c / L_jj, one c for a matrix and none for a row, and fits row and
column factors to its codes by alternating least squares; its shrinkage within the loop is not part of this.

R rows, C columns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from golf.quant.gptq import CODE_CLIP, StepSizes
from golf.quant.grid import FP16_MAX, FP16_TINY, QuantizedTensor, dequantize_tensor
from golf.quant.waterfill import CODE_ROOM, PreparedMatrix, nearest_on_log_grid

ROUNDS = 4
"""Of row factors and column factors in turn."""
RIDGE = 1e-3
"""Share of the mean of the normal equations' diagonal that draws column factors to 1."""
LARGEST_FACTOR = 2.0
"""A factor that would be larger, or smaller than its inverse, fits a row or column of codes that says nothing."""


def steps_of_matrix(matrix: PreparedMatrix, level: float, by_column: bool) -> StepSizes:
    """Returns one step for the matrix at a water level, times U_cc for each column where asked for."""
    column_C = matrix.factor_CC.diagonal()
    center = column_C.log().mean().exp()
    column_C = nearest_on_log_grid(column_C / center if by_column else torch.ones_like(column_C))
    most = (matrix.weight_RC.double().abs() / column_C.double()).amax() / (CODE_ROOM * CODE_CLIP)
    step = torch.maximum((level / matrix.row_weight_R.mean()).sqrt() * center, most)
    return StepSizes(nearest_on_log_grid(step.reshape(1, 1)), column_C if by_column else None)


def refit_scales(matrix: PreparedMatrix, entry: QuantizedTensor) -> QuantizedTensor:
    """Returns the codes of `entry` with scales of rows and columns that lessen the predicted loss, as fp16."""
    restored_RC = dequantize_tensor(entry).double().to(matrix.weight_RC.device)
    weight_RC, hessian_CC = matrix.weight_RC.double(), matrix.damped_CC
    wanted_RC, rows = weight_RC @ hessian_CC, restored_RC.size(0)
    row_R1, column_C = torch.ones(rows, 1).to(restored_RC), torch.ones_like(restored_RC[0])
    for _ in range(ROUNDS):
        now_RC = restored_RC * column_C
        power_R = ((now_RC @ hessian_CC) * now_RC).sum(1).clamp_min(1e-300)
        row_R1 = bounded((wanted_RC * now_RC).sum(1) / power_R)[:, None]
        column_C = fit_columns(restored_RC * row_R1, wanted_RC, hessian_CC, matrix.row_weight_R)
    scale_R1 = (entry.scale_SG.double().to(row_R1.device) * row_R1).clamp(FP16_TINY, FP16_MAX).half()
    given_C = torch.ones_like(column_C) if entry.column_scale_C is None else entry.column_scale_C.to(column_C)
    column_C = (given_C * column_C).clamp(FP16_TINY, FP16_MAX).half()
    return replace(entry, scale_SG=scale_R1.cpu(), column_scale_C=column_C.cpu())


def fit_columns(now_RC: Tensor, wanted_RC: Tensor, hessian_CC: Tensor, row_weight_R: Tensor) -> Tensor:
    """Returns factors of columns for the least sum of row_weight (w - now factor) H (w - now factor)^T."""
    weighted_RC = now_RC * row_weight_R.double()[:, None]
    normal_CC = hessian_CC * (now_RC.T @ weighted_RC)
    ridge = RIDGE * normal_CC.diagonal().mean()
    right_C = (weighted_RC * wanted_RC).sum(0) + ridge
    return bounded(torch.linalg.solve(normal_CC + ridge * torch.eye(len(right_C)).to(normal_CC), right_C))


def bounded(factor: Tensor) -> Tensor:
    """Returns factors within LARGEST_FACTOR; 1 where one is beyond it."""
    return torch.where((factor > 1 / LARGEST_FACTOR) & (factor < LARGEST_FACTOR), factor, torch.ones_like(factor))
