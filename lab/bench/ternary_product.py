"""Multiplies by a binary or ternary matrix by additions and subtractions alone, and one multiplication an output.

The reference for the claim that such weights need no multiplier: it is exact and slow (bench_ternary says by how
much). Two ways from the same codes: sums of the inputs that a row adds, less those that it subtracts; and from bytes of
five codes in base 3, as the artifact packs them, by looking up the sums that five inputs can have.

N tokens, R rows, C columns, B bytes of a row, K sums that a byte may ask for, S rows of scales, G groups of columns,
L codes of magnitude 1.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from golf.quant.grid import QuantizedTensor, dequantize_tensor, group_width
from golf.quant.tensor_classes import QuantError

TRITS_PER_BYTE = 5
LARGEST_SUM = 2**31 // 128
"""Columns up to which sums of int8 fit in int32."""


@dataclass(frozen=True, eq=False)
class SignMatrix:
    """Where a matrix adds an input and where it subtracts one, by group of columns."""

    shape: tuple[int, int]
    scale_SG: Tensor
    """fp32."""
    added: tuple[tuple[Tensor, Tensor], ...]
    """(row_L, column_L) of the codes 1 of each group."""
    subtracted: tuple[tuple[Tensor, Tensor], ...]
    """Of the codes -1."""


def sign_matrix(entry: QuantizedTensor) -> SignMatrix:
    """Returns the matrix that `entry` stores. Raises QuantError for one that takes more than signs and a scale."""
    check_signs(entry)
    width = group_width(entry.codes_RC.size(1), entry.scale_SG.size(1))
    parts = entry.codes_RC.split(width, dim=1)
    starts = range(0, entry.codes_RC.size(1), width)

    def places(code: int) -> tuple[tuple[Tensor, Tensor], ...]:
        found = (torch.nonzero(part == code, as_tuple=True) for part in parts)
        return tuple((row_L, column_L + start) for (row_L, column_L), start in zip(found, starts, strict=True))

    return SignMatrix(tuple(entry.codes_RC.shape), entry.scale_SG.float(), places(1), places(-1))


def check_signs(entry: QuantizedTensor) -> None:
    odd = {
        "codes beyond -1, 0 and 1": bool((entry.codes_RC.abs() > 1).any()),
        "zero points": entry.zero_SG is not None,
        "scales of columns": entry.column_scale_C is not None,
        "a correction": entry.low_rank is not None,
        "codes of a trellis": entry.trellis,
    }
    for what, is_there in odd.items():
        if is_there:
            raise QuantError(f"a product by additions needs signs and scales alone, this matrix has {what}")


def wide_inputs(x_NC: Tensor, columns: int) -> Tensor:
    """Returns `x_NC` in the type that sums are taken in: int32 of int8, else fp32."""
    assert x_NC.dim() == 2 and x_NC.size(1) == columns, f"inputs {tuple(x_NC.shape)} for {columns} columns"
    if x_NC.dtype == torch.int8:
        assert columns <= LARGEST_SUM
        return x_NC.int()
    assert x_NC.is_floating_point()
    return x_NC.float()


def scaled_sums(sums_GNR: Tensor, scale_SG: Tensor) -> Tensor:
    """Returns y_NR, fp32, by a multiplication with its scale for each output (and each group of several)."""
    return (sums_GNR.float() * scale_SG.T.unsqueeze(1)).sum(0)


def signed_sums(matrix: SignMatrix, x_NC: Tensor) -> Tensor:
    """Returns sums_GNR of codes times inputs by group, without a multiplication: int32, exact, for int8; else fp32."""
    x_CN = wide_inputs(x_NC, matrix.shape[1]).T.contiguous()
    sums = []
    for added, subtracted in zip(matrix.added, matrix.subtracted, strict=True):
        up_RN, down_RN = (
            torch.zeros(matrix.shape[0], x_CN.size(1), dtype=x_CN.dtype).index_add_(0, row_L, x_CN[column_L])
            for row_L, column_L in (added, subtracted)
        )
        sums.append((up_RN - down_RN).T)
    return torch.stack(sums)


def additive_product(matrix: SignMatrix, x_NC: Tensor) -> Tensor:
    """Returns y_NR = x_NC W_RC^T, fp32, of inputs in int8 (their own scale still to come) or in floats."""
    return scaled_sums(signed_sums(matrix, x_NC), matrix.scale_SG)


def pack_trit_rows(entry: QuantizedTensor) -> Tensor:
    """Returns uint8 byte_RB, each row's codes five to a byte in base 3, the last filled up with 0.

    Where rows are multiples of five, their bytes one after another are those of the artifact's ternary stream. Raises
    QuantError for a matrix that takes more than signs and a scale.
    """
    check_signs(entry)
    rows, columns = entry.codes_RC.shape
    padded_RC = torch.nn.functional.pad(entry.codes_RC.long(), (0, -columns % TRITS_PER_BYTE))
    digits_RB5 = padded_RC.view(rows, -1, TRITS_PER_BYTE) + 1
    return (digits_RB5 * 3 ** torch.arange(TRITS_PER_BYTE)).sum(-1).to(torch.uint8)


def five_sums(x_NC: Tensor) -> Tensor:
    """Returns sums_NBK: for each five inputs, the sums of all ways to add, leave out or subtract each, by additions."""
    tokens, columns = x_NC.shape
    x_NB5 = torch.nn.functional.pad(x_NC, (0, -columns % TRITS_PER_BYTE)).view(tokens, -1, TRITS_PER_BYTE)
    sums_NBK = torch.zeros_like(x_NB5[..., :1])
    for place in range(TRITS_PER_BYTE):
        one_NB1 = x_NB5[..., place : place + 1]
        sums_NBK = torch.cat((sums_NBK - one_NB1, sums_NBK, sums_NBK + one_NB1), dim=-1)
    return sums_NBK


def packed_product(byte_RB: Tensor, scale_SG: Tensor, x_NC: Tensor) -> Tensor:
    """Returns y_NR = x_NC W_RC^T, fp32, from packed codes: a look-up and an addition for five columns. One group alone.

    Raises QuantError for several groups.
    """
    if scale_SG.size(1) != 1:
        raise QuantError(
            "packed codes are multiplied with one scale a row, or one for all: groups have no bytes' edges"
        )
    sums_NBK = five_sums(wide_inputs(x_NC, x_NC.size(1)))
    assert sums_NBK.size(1) == byte_RB.size(1), f"inputs of {sums_NBK.size(1)} bytes for rows of {byte_RB.size(1)}"
    byte_BR = byte_RB.long().T
    sums_NR = torch.zeros(x_NC.size(0), byte_RB.size(0), dtype=sums_NBK.dtype)
    for place in range(byte_RB.size(1)):  # one after the other, so that memory stays that of the table
        sums_NR += sums_NBK[:, place].index_select(1, byte_BR[place])
    return scaled_sums(sums_NR.unsqueeze(0), scale_SG.float())


@dataclass(frozen=True)
class TernaryLatency:
    """Medians of one product of `tokens` inputs with a matrix of rows x columns, on the CPU."""

    rows: int
    columns: int
    tokens: int
    inputs: str
    """float32 or int8; torch multiplies floats in both cases."""
    threads: int
    matmul_ms: float
    additions_ms: float
    """By the codes' places (additive_product)."""
    lookups_ms: float
    """From bytes of five codes (packed_product)."""
    largest_error: float
    """Largest difference of an output to torch's, in units of its largest output."""

    @property
    def verdict(self) -> str:
        fastest = min(self.additions_ms, self.lookups_ms)
        if fastest >= self.matmul_ms:
            return f"by additions {fastest / self.matmul_ms:.1f} times slower than torch's product: no speed is claimed"
        return f"by additions {self.matmul_ms / fastest:.1f} times faster than torch's product"


def median_milliseconds(work: Callable[[], torch.Tensor], repetitions: int) -> float:
    """Returns the median time of some runs, after one that warms up."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def random_ternary(rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Returns Gaussian weights at BitNet's threshold of half the mean magnitude: 31 % zeros."""
    weight_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale = weight_RC.abs().mean()
    codes_RC = (weight_RC / scale).round().clamp(-1, 1).to(torch.int8)
    return QuantizedTensor(codes_RC, scale.half().view(1, 1), 2)


def bench_ternary(
    rows: int = 512, columns: int = 512, tokens: int = 1, int8: bool = False, repetitions: int = 20, seed: int = 0
) -> TernaryLatency:
    """Times all three on the same random codes and inputs; what is prepared once per matrix is not in the times."""
    entry = random_ternary(rows, columns, seed)
    x_NC = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed + 1))
    if int8:
        x_NC = (40 * x_NC).round().clamp(-127, 127).to(torch.int8)
    float_NC, weight_CR = x_NC.float(), dequantize_tensor(entry).T.contiguous()
    matrix, byte_RB = sign_matrix(entry), pack_trit_rows(entry)
    expected_NR = float_NC @ weight_CR
    found = additive_product(matrix, x_NC), packed_product(byte_RB, entry.scale_SG, x_NC)
    error = max(float((y_NR - expected_NR).abs().max()) for y_NR in found)
    return TernaryLatency(
        rows, columns, tokens, str(x_NC.dtype).removeprefix("torch."), torch.get_num_threads(),
        median_milliseconds(lambda: float_NC @ weight_CR, repetitions),
        median_milliseconds(lambda: additive_product(matrix, x_NC), repetitions),
        median_milliseconds(lambda: packed_product(byte_RB, entry.scale_SG, x_NC), repetitions),
        error / float(expected_NR.abs().max()),
    )  # fmt: skip
