"""The symmetric per-row grid of training and export: one rule, so that the weights that trained are those that ship.

R rows, C columns.
"""

import torch
from torch import Tensor

FP16_TINY = 2.0**-14
"""Smallest normal fp16 (6.104e-5): the floor of a row's scale, so that an all-zero row has one too."""
FP16_MAX = 65_504.0


def grid_clip(bits: int) -> int:
    """Largest code of a symmetric grid: 1 for 1 bit (codes -1 and 1), 15 for 5 bits, 31 for 6, 127 for 8."""
    assert 1 <= bits <= 8
    return max(2 ** (bits - 1) - 1, 1)


def grid_codes_and_scale(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers, as fp32) and the fp32 values of the fp16 scales, shape (R, 1).

    scale = fp16(max|row| / clip), within fp16's normal range; code = clamp(round_half_even(w / scale), -clip, clip).
    """
    clip = grid_clip(bits)
    weight_RC = weight_RC.float()
    largest_R1 = weight_RC.abs().amax(dim=1, keepdim=True)
    # Dividing by a tensor: CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
    scale_R1 = (largest_R1 / torch.full_like(largest_R1, clip)).clamp(FP16_TINY, FP16_MAX).half().float()
    return (weight_RC / scale_R1).round_().clamp_(-clip, clip), scale_R1


def quantize_rows(weight_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes_RC in -clip..clip and fp16 scale_R of a finite matrix."""
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.to(torch.int8), scale_R1.squeeze(1).half()


# An operator of its own, which torch.compile calls but does not rewrite: inductor keeps the fp16 rounding of the
# scale in fp32 and approximates the division, and then nearly every value differs from the exported one.
@torch.library.custom_op("golf::fake_quantize_rows", mutates_args=())
def fake_quantize_rows(weight_RC: Tensor, bits: int) -> Tensor:
    """What the exported codes and scales gives, bit for bit, with the gradient of the identity.

    Straight-through estimator: Bengio et al. 2013, arXiv 1308.3432. Works eager and in torch.compile(fullgraph=True).
    """
    codes_RC, scale_R1 = grid_codes_and_scale(weight_RC, bits)
    return codes_RC.add_(0.0).mul_(scale_R1)  # + 0.0 turns -0.0, which int8 cannot hold, into 0.0


@fake_quantize_rows.register_fake
def fake_quantize_rows_shape(weight_RC: Tensor, bits: int) -> Tensor:
    return torch.empty_like(weight_RC, dtype=torch.float32)


def straight_through(context: object, gradient_RC: Tensor) -> tuple[Tensor, None]:
    return gradient_RC, None


fake_quantize_rows.register_autograd(straight_through)
