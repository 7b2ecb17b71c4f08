"""Defines the grid of trellis-coded quantization: codes of a coarse grid that stand for points of one twice as fine.

The fine grid is split into its even and its odd points. Each row walks through a trellis: its state says which half the
next weight comes from, and the parity of the code moves the state on. A code costs as much as on the coarse grid, while
a search over the walks (trellis_search.py) finds points nearly as close as on the fine one. Union quantizers with codes
for the index given the half: Marcellin and Fischer 1990, Joshi, Crump and Fischer 1995 (ECTCQ); "dependent
quantization" in VVC. The trellis is the systematic feedback code of 8 states of Ungerboeck 1982, table I.

R rows, C columns.
"""

import torch
from torch import Tensor

TRELLIS_STATES, PARITY_H0, PARITY_H1 = 8, 0b1011, 0b100
"""Number of states and parity-check polynomials: bit i is the coefficient of D^i, D a column's delay."""


def shifted_columns(bits_RC: Tensor, by: int) -> Tensor:
    """Shifts each row `by` columns to the right, filling with zeros."""
    moved_RC = torch.zeros_like(bits_RC)
    if by < bits_RC.size(1):
        moved_RC[:, by:] = bits_RC[:, : bits_RC.size(1) - by]
    return moved_RC


def times_polynomial(bits_RC: Tensor, polynomial: int, stretch: int = 1) -> Tensor:
    """Multiplies rows, as power series over GF(2), by polynomial(D^stretch)."""
    product_RC = torch.zeros_like(bits_RC)
    for i in range(polynomial.bit_length()):
        if polynomial >> i & 1:
            product_RC ^= shifted_columns(bits_RC, i * stretch)
    return product_RC


def trellis_halves(codes_RC: Tensor) -> Tensor:
    """Returns int8 0 or 1 per code: the half of its point in the fine grid, rows starting in state 0. No loop over
    columns.

    halves = parities h1 / h0, and 1 / h0 = h0(D) h0(D^2) h0(D^4) ..., because h0(D)^(2^k) = h0(D^(2^k)) is 1 up to D^C.
    """
    halves_RC = times_polynomial(codes_RC & 1, PARITY_H1)
    stretch = 1
    while stretch < codes_RC.size(1):
        halves_RC = times_polynomial(halves_RC, PARITY_H0, stretch)
        stretch *= 2
    return halves_RC
