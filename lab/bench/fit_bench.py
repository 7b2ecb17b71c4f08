"""Measures where the time goes when weights are fitted to a byte limit by water-filling, without training any.

R rows, C columns, N positions.
"""

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from golf.artifact import fill_limit as fitting
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.init import build_model
from golf.quant import waterfill
from golf.quant.calibration import LayerStatistics
from golf.quant.spreading import spread_matrices
from golf.quant.tensor_classes import tensor_class

BITS_PER_WEIGHT = 3.55
"""16,000,000 bytes for 36 million weights."""
MODELLED_RANKS = 8
COUNTED_SHAPE = (64, 128)
"""Of two matrices whose launches are counted: a block of columns."""
VIEWS = {"view", "_unsafe_view", "select", "slice", "unsqueeze", "squeeze", "expand", "permute", "t", "transpose",
         "diagonal", "split", "split_with_sizes", "detach", "alias", "unbind", "as_strided"}  # fmt: skip


def frontier_shapes(megaweights: float) -> ModelConfig:
    """Returns a model of the frontier's shapes: 512 wide, MLP four times as wide, 8,192 tokens; 11 layers for 36
    million weights."""
    layers = max(1, round(11 * megaweights / 36))
    return ModelConfig(
        vocab_size=8192, num_layers=layers, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=4.0,
        bigram_vocab_size=0, bigram_dim=0, smear_gate=False,
    )  # fmt: skip


def synthetic_statistics(rows: int, columns: int, draw: torch.Generator) -> LayerStatistics:
    """Returns moments of inputs whose power falls by e^4 over a quarter of the directions, above a floor of noise."""
    rank = columns // 4
    strength_K1 = torch.exp(-4 * torch.arange(rank) / rank)[:, None]
    mix_KC = torch.randn(rank, columns, generator=draw) * strength_K1
    x_NC = torch.randn(2 * columns, rank, generator=draw) @ mix_KC + 0.3 * torch.randn(
        2 * columns, columns, generator=draw
    )
    x_NC *= torch.exp(0.5 * torch.randn(columns, generator=draw))
    row_weight_R = 1e-3 * torch.exp(torch.randn(rows, generator=draw)).double()
    return LayerStatistics((x_NC.T @ x_NC).double() / len(x_NC), row_weight_R)


def synthetic_weights(model: ModelConfig, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, LayerStatistics]]:
    """Returns a state of Gaussian matrices whose rows differ in size, and statistics of each matrix."""
    draw, state, statistics = torch.Generator().manual_seed(seed), dict(build_model(model, seed).state_dict()), {}
    for name, part in state.items():
        if tensor_class(name, part.shape) != "small":
            rows, columns = part.shape
            row_R1 = torch.exp(0.3 * torch.randn(rows, 1, generator=draw))
            state[name] = 0.02 * row_R1 * torch.randn(rows, columns, generator=draw)
            statistics[name] = synthetic_statistics(rows, columns, draw)
    return state, statistics


class LaunchCount(TorchDispatchMode):
    """Counts the operators that compute, each of which is about one kernel on a GPU; views cost none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def launches_per_column() -> dict[str, float]:
    """Counts operators for each column of a loop over two matrices, by part; setting up is divided among them too."""
    (rows, columns), draw = COUNTED_SHAPE, torch.Generator().manual_seed(0)
    matrices = [
        waterfill.prepare_matrix(torch.randn(rows, columns, generator=draw), synthetic_statistics(rows, columns, draw))
        for _ in range(2)
    ]
    scales = [matrix.step_sizes(1e-5) for matrix in matrices]
    problem, grid = waterfill.join_problems(matrices), waterfill.ColumnGrid(scales, torch.device("cpu"))
    level_MRC = problem.round_columns(grid)
    price = waterfill.rate_price(level_MRC, 1e-6, [matrix.row_weight_R for matrix in matrices])
    factors = [matrix.problem.factor_CC for matrix in matrices]
    parts: dict[str, Callable[[], object]] = {
        "plain": lambda: problem.round_columns(grid),
        "priced": lambda: problem.round_columns(grid, price),
        "descent": lambda: problem.descend(level_MRC, grid, price, passes=1),
        "trellis": lambda: waterfill.quantize_trellises([matrix.weight_RC for matrix in matrices], factors, scales),
    }
    counts = {}
    for part, action in parts.items():
        with LaunchCount() as launches:
            action()
        counts[part] = launches.count / columns
    return counts


class PartTimes:
    """Adds up CPU and wall seconds by part of a fit."""

    def __init__(self) -> None:
        self.cpu, self.wall, self.calls = Counter[str](), Counter[str](), Counter[str]()

    @contextmanager
    def replacing(self, module: Any, name: str, part: str) -> Iterator[None]:
        """Times every call of module.name."""
        action = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            result = action(*args, **kwargs)
            self.cpu[part] += time.process_time() - cpu
            self.wall[part] += time.perf_counter() - wall
            self.calls[part] += 1
            return result

        with patch.object(module, name, timed):
            yield


PARTS = (
    (fitting, "prepare_matrix", "prepare"), (waterfill, "quantize_plain", "round"),
    (waterfill, "quantize_trellises", "trellis"), (fitting, "pack_artifact", "pack"),
    (fitting, "quantize_matrices", "quantize"),
)  # fmt: skip


def bench_fit(model: ModelConfig, log: Callable[[str], None]) -> dict[str, float]:
    """Fits synthetic weights of a model and returns seconds by part, bytes, memory and launches.

    The seconds on MODELLED_RANKS are modelled: packing and what else every rank does, and the share of the rest that
    the rank with the most work has.
    """
    quant = QuantConfig(qat_enabled=False, prune_frac=0.0, quantizer="waterfill", codec="rans")
    state, statistics = synthetic_weights(model)
    weights = sum(state[name].numel() for name in statistics)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, PartTimes()
    goal, cpu, wall = round(weights * BITS_PER_WEIGHT / 8), time.process_time(), time.perf_counter()
    with ExitStack() as stack:
        for module, name, part in PARTS:
            stack.enter_context(times.replacing(module, name, part))
        fitted = fitting.fill_limit(statistics, state, quant, model, "0" * 64, goal, 0, log)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    figures = {"weights": weights, "limit_bytes": goal, "bytes": len(fitted.data), "wall_s": wall, "cpu_s": cpu}
    figures |= {f"{part}_cpu_s": seconds for part, seconds in times.cpu.items()}
    figures |= {f"{part}_wall_s": seconds for part, seconds in times.wall.items()}
    spread = times.cpu["prepare"] + times.cpu["quantize"]
    figures["modelled_s_on_8_ranks"] = cpu - spread + spread * largest_share(state, statistics)
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures["peak_mib_before"] = before / 1024
    return figures | {f"modelled_launches_a_column_{part}": count for part, count in launches_per_column().items()}


def largest_share(state: dict[str, Tensor], statistics: dict[str, LayerStatistics]) -> float:
    """Returns the share of all matrices' work that the busiest of MODELLED_RANKS has."""
    shapes, work = {name: tuple(state[name].shape) for name in statistics}, Counter[int]()
    for name, rank in spread_matrices(shapes, MODELLED_RANKS).items():
        work[rank] += state[name].numel() * (1024 + shapes[name][1])
    return max(work.values()) / work.total()
