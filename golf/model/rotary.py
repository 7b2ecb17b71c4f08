"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its NTK-aware extension.

B batch, T time, H heads, K head width, F = K/2 frequencies. Tables are fp32 in every path: bf16 has
8 bits of mantissa, so it can't even tell position 256 from 257.
"""

import torch
from torch import Tensor


def ntk_rope_base(base: float, length: int, train_length: int, head_dim: int) -> float:
    """The base at which the lowest frequency, at `length`, turns as far as it did at `train_length`.

    base * s^(d / (d - 2)) with s = length / train_length and d = head_dim ("NTK-aware" scaling, bloc97 2023;
    the highest frequency stays as it is). Up to the training length the base is unchanged.
    """
    if length <= train_length:
        return base
    return base * (length / train_length) ** (head_dim / (head_dim - 2))


def rotary_tables(
    length: int, head_dim: int, base: float, device: torch.device, start: int = 0
) -> tuple[Tensor, Tensor]:
    """cos_TF and sin_TF, fp32, of positions start .. length-1 at frequencies base^(-2i/d)."""
    exponent_F = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle_TF = torch.outer(torch.arange(start, length, device=device, dtype=torch.float32), base**-exponent_F)
    return angle_TF.cos(), angle_TF.sin()


def rotate(x_BHTK: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of every head by the angle of their position; fp32 inside."""
    first_BHTF, second_BHTF = x_BHTK.float().chunk(2, dim=-1)
    turned = (first_BHTF * cos_TF + second_BHTF * sin_TF, second_BHTF * cos_TF - first_BHTF * sin_TF)
    return torch.cat(turned, dim=-1).to(x_BHTK.dtype)
