"""Quantizes by several ways from trained weights to stored ones, each over a range of rates: the competitors of the
rate curve."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from golf.artifact.fill_limit import LevelSearch
from golf.artifact.weights import SavedWeights
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.quant.calibration import LayerStatistics, calibrate
from golf.quant.export import prune_state, quantize_state
from golf.quant.grid import QuantizedState, QuantizedTensor, grid_clip
from golf.quant.tensor_classes import tensor_class
from golf.quant.waterfill import RD_LAMBDA
from golf.runtime import Runtime
from lab.rates.corrections import correct_worst, protected_steps
from lab.rates.grids import QuantSpec
from lab.rates.quantizers import GptqOptions, quantize_matrix
from lab.rates.rate_points import RateMethod
from lab.rates.rescaling import refit_scales, steps_of_matrix
from lab.rates.trained_run import load_float_model

FRONTIER_GRIDS = {"attn": (6, 13.0), "mlp": (6, 11.5), "embed": (7, 14.0), "bigram": (6, 13.0)}
"""Bits and k of SDClip, step = k * std(row) / largest code, by class (parameter-golf PR #1855)."""
RECIPE_OFFSETS = {"mlp_bits": 0, "attn_bits": 1, "bigram_bits": 1, "embed_bits": 1}
"""Bits of the recipe's grids above those of its MLPs (2026-03-20 record: int5 and int6; the embedding, which it
keeps as fp16, on a grid here: at these sizes fp16 would be half of the artifact)."""


@dataclass(frozen=True, eq=False)
class MethodInput:
    """Trained weights, and what calibration says of them."""

    state: Mapping[str, Tensor]
    model: ModelConfig
    quant: QuantConfig
    statistics: dict[str, LayerStatistics]

    @cached_property
    def search(self) -> LevelSearch:
        return LevelSearch(self.state, self.statistics, self.quant, self.model)


def prepare_method_input(saved: SavedWeights, rows_NT: Tensor, runtime: Runtime) -> MethodInput:
    """Returns the weights with their calibration on rows of training tokens. Raises QuantError."""
    statistics = calibrate(load_float_model(saved, runtime), rows_NT, runtime)
    return MethodInput(saved.state, saved.model, saved.quant, statistics)


def others_as_fp16(given: MethodInput, stored: QuantizedState) -> QuantizedState:
    """Returns all tensors in the model's order: those of `stored`, the rest as fp16."""
    return {name: stored.get(name, part.half()) for name, part in given.state.items()}


def round_like_recipe(given: MethodInput, rate: float) -> QuantizedState:
    """Rounds to nearest on absmax rows, 5 % pruned; `rate` is the bits of the MLPs."""
    bits = {knob: min(8, int(rate) + offset) for knob, offset in RECIPE_OFFSETS.items()}
    quant = replace(given.quant, prune_frac=0.05, **bits)
    pruned, _ = prune_state(given.state, quant)
    return quantize_state(pruned, quant)


def frontier_grid(name: str, weight_RC: Tensor, rate: float) -> QuantSpec:
    """Returns SDClip with k divided by `rate`. The step counts: codes are int8's, so that a fine one does not clip."""
    bits, k = FRONTIER_GRIDS[tensor_class(name, weight_RC.shape)]
    return QuantSpec(8, scale_rule="std", parameter=k / rate * grid_clip(8) / grid_clip(bits))


def round_like_frontier(given: MethodInput, rate: float) -> QuantizedState:
    """Rounds by GPTQ on rows of step k * std / clip."""
    return others_as_fp16(given, frontier_codes(given, rate))


def frontier_codes(given: MethodInput, rate: float) -> dict[str, QuantizedTensor]:
    return {
        name: quantize_matrix(given.state[name], frontier_grid(name, given.state[name], rate), one.hessian_CC)
        for name, one in given.statistics.items()
    }


def round_with_correction(given: MethodInput, rate: float) -> QuantizedState:
    """Adds to the frontier's codes LQER of rank 4 for the three matrices of largest error (PR #1797)."""
    hessians = {name: one.hessian_CC for name, one in given.statistics.items()}
    weights = {name: given.state[name] for name in hessians}
    return others_as_fp16(given, correct_worst(weights, frontier_codes(given, rate), hessians, 3))


def round_with_protection(given: MethodInput, rate: float) -> QuantizedState:
    """Rounds on the frontier's grids with two bits more for the most salient 64 columns of the embedding (PR #1908)."""
    stored, name = frontier_codes(given, rate), "tok_emb.weight"
    weight_RC, hessian_CC = given.state[name], given.statistics[name].hessian_CC
    bits, k = FRONTIER_GRIDS["embed"]
    spec = QuantSpec(6, scale_rule="std", parameter=k / rate * grid_clip(6) / grid_clip(bits))
    spec, steps = protected_steps(weight_RC, hessian_CC, spec)
    return others_as_fp16(given, stored | {name: quantize_matrix(weight_RC, spec, hessian_CC, scales=steps)})


def round_by_level(
    given: MethodInput, rate: float, rd_lambda: float = RD_LAMBDA, trellis: bool = True
) -> QuantizedState:
    """Rounds by one water level for all matrices (golf/quant/waterfill.py), 2^-rate nats."""
    given.search.trellis, given.search.quant = trellis, replace(given.quant, rd_lambda=rd_lambda)
    return given.search.quantize(-rate)


def round_by_matrix(given: MethodInput, rate: float, by_column: bool) -> QuantizedState:
    """Rounds by GPTQ with one step for each matrix at a water level of 2^-rate nats; `by_column`: WaterSIC's steps for
    its columns, and scales refitted to the codes."""
    stored, spec = {}, QuantSpec(8, "tensor")
    for name, matrix in given.search.matrices.items():
        scales = steps_of_matrix(matrix, 2.0**-rate, by_column)
        hessian_CC = matrix.damped_CC - matrix.damping_C.diag()
        entry = quantize_matrix(matrix.weight_RC, spec, hessian_CC, GptqOptions(act_order=False), scales)
        stored[name] = refit_scales(matrix, entry) if by_column else entry
    return others_as_fp16(given, stored)


RECIPE_RATES = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
FRONTIER_RATES = (0.3, 0.45, 0.65, 1.0, 1.5, 2.2, 3.2)
LEVEL_RATES = (19.5, 20.5, 21.5, 22.5, 23.5, 24.5, 25.5, 27.0)

METHODS: dict[str, RateMethod] = {
    method.name: method
    for method in (
        RateMethod("recipe", "int5/int6 round to nearest, 5 % pruned, lzma", "lzma", RECIPE_RATES, round_like_recipe),
        RateMethod("recipe-rans", "the recipe's codes, our coder", "rans", RECIPE_RATES, round_like_recipe),
        RateMethod("frontier", "GPTQ, SDClip, brotli", "brotli", FRONTIER_RATES, round_like_frontier),
        RateMethod("frontier-rans", "GPTQ, SDClip, our coder", "rans", FRONTIER_RATES, round_like_frontier),
        RateMethod("frontier-lqer", "GPTQ, SDClip, low-rank correction, our coder", "rans", FRONTIER_RATES,
                   round_with_correction),
        RateMethod("frontier-awq", "GPTQ, SDClip, a protected group, our coder", "rans", FRONTIER_RATES,
                   round_with_protection),
        RateMethod("gptq-step", "GPTQ, one step a matrix by one water level, our coder", "rans", LEVEL_RATES,
                   lambda given, rate: round_by_matrix(given, rate, by_column=False)),
        RateMethod("watersic", "WaterSIC's steps of columns, scales refitted, our coder", "rans", LEVEL_RATES,
                   lambda given, rate: round_by_matrix(given, rate, by_column=True)),
        RateMethod("fit-nearest", "one water level, plain grids, codes by error alone", "rans", LEVEL_RATES,
                   lambda given, rate: round_by_level(given, rate, 0.0, trellis=False)),
        RateMethod("fit-plain", "one water level, plain grids, codes by error and bits", "rans", LEVEL_RATES,
                   lambda given, rate: round_by_level(given, rate, trellis=False)),
        RateMethod("waterfill", "one water level, plain grids and trellises", "rans", LEVEL_RATES, round_by_level),
    )
}  # fmt: skip
