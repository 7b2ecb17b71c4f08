"""How long a ternary product by additions takes beside torch's matrix product with the same weights in floats.

N tokens, R rows, C columns.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from golf.quant.grid import QuantizedTensor, dequantize_tensor
from lab.bench.ternary_product import additive_product, pack_trit_rows, packed_product, sign_matrix


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
    """After one that warms up."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def random_ternary(rows: int, columns: int, seed: int) -> QuantizedTensor:
    """Gaussian weights at BitNet's threshold of half the mean magnitude: 31 % zeros."""
    weight_RC = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale = weight_RC.abs().mean()
    codes_RC = (weight_RC / scale).round().clamp(-1, 1).to(torch.int8)
    return QuantizedTensor(codes_RC, scale.half().view(1, 1), 2)


def bench_ternary(
    rows: int = 512, columns: int = 512, tokens: int = 1, int8: bool = False, repetitions: int = 20, seed: int = 0
) -> TernaryLatency:
    """Time all three on the same random codes and inputs; what is prepared once per matrix is not in the times."""
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
