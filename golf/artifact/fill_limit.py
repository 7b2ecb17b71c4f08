"""Fits artifacts to the byte limit: by coarser weights where one would be too large, or by the water level that fills
it.

Coarser: pruning is raised first, then matrices lose a bit each, the least sensitive first. Order and bytes follow from
the weights alone. Water level: one number decides the steps of all matrices (golf/quant/waterfill.py); its base-2
logarithm is found by the secant of the coded size, which falls by about half a bit a weight for each doubling. Whatever
is returned was packed.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from golf.artifact.container import encode_streams, pack_artifact, read_back
from golf.artifact.sizes import SizeReport
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.quant.calibration import LayerStatistics
from golf.quant.export import PruneReport, prune_state, quantize_state
from golf.quant.grid import QuantizedState, QuantizedTensor, dequantize_state, dequantize_tensor
from golf.quant.spreading import batch_equal_shapes, share_entries, spread_matrices
from golf.quant.tensor_classes import FP16_BITS, bits_of, tensor_class, weight_site
from golf.quant.waterfill import (
    PreparedMatrix,
    hidden_orders,
    permute_hidden_units,
    permute_statistics,
    prepare_matrix,
    quantize_matrices,
)
from golf.runtime import Runtime

PRUNE_SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
PRUNE_SAVES = 0.02  # share of the bytes, about, that each of PRUNE_SHARES saves: only decides where to look first
FEWEST_BITS = 3
GUIDED_PACKINGS = 5  # this many packings follow the expected savings, later ones bisect


class FitError(UserError):
    """Reports weights that no allowed coarsening brings under the limit."""


@dataclass(frozen=True)
class FitAction:
    """Describes one step towards fewer bytes: `value` is the bits of `tensor`, or (no tensor) the share that is
    pruned."""

    tensor: str
    value: float
    text: str
    saves: float


@dataclass(frozen=True, eq=False)
class FittedArtifact:
    data: bytes
    sizes: SizeReport
    stored: QuantizedState
    prune_reports: list[PruneReport]
    actions: list[str]  # in order; empty where it fitted as configured
    pruned: dict[str, Tensor] | None = None
    """Weights that `stored` was rounded to nearest from; None where codes were chosen otherwise."""
    codes_not_nearest: int = 0
    """Codes that error feedback or their price moved away from the nearest."""
    matrices_fp16: int = 0
    """Matrices that the limit had room for without codes."""


def fit_to_limit(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str,
    limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
) -> FittedArtifact:  # fmt: skip
    """Packs `state` as configured, where that is within the limit; else coarsened by the fewest actions that suffice.

    Actions are taken in order until `reserve_bytes` stay free. Raises FitError when all of them together are not
    enough.
    """
    packed = partial(pack_coarsened, state, quant, model, tokenizer_sha256)
    fitted = packed([])
    size, goal = len(fitted.data), limit_bytes_model - reserve_bytes
    if size <= limit_bytes_model:
        return fitted
    log(f"fit: over by {size - limit_bytes_model:,} bytes: {size:,} of {limit_bytes_model:,}; to fit in {goal:,}")
    shares = [quant.prune_frac, *(share for share in PRUNE_SHARES if share > quant.prune_frac)]
    actions = [FitAction("", b, f"prune_frac {a:g} -> {b:g}", PRUNE_SAVES * size) for a, b in pairwise(shares)]
    actions += coarsening_actions(state, quant)
    saved = [0.0, *accumulate(action.saves for action in actions)]
    best, smallest, packings, tried = None, size, 1, 0
    low, high = 0, len(saved)  # `low` actions are too few, `high` are enough (or more than exist)
    while high - low > 1:
        guess = bisect_left(saved, saved[tried] + size - goal) if packings <= GUIDED_PACKINGS else (low + high) // 2
        tried = min(max(guess, low + 1), high - 1)
        candidate = packed(actions[:tried])
        size, packings = len(candidate.data), packings + 1
        smallest = min(smallest, size)
        best, low, high = (candidate, low, tried) if size <= goal else (best, tried, high)
    if best is None:
        raise FitError(
            f"the artifact can't fit in {goal:,} bytes ({limit_bytes_model:,} beside the code, less a reserve of "
            f"{reserve_bytes:,}): {smallest:,} is the smallest that pruning and fewer bits reach; train a smaller model"
        )
    for action in best.actions:
        log(f"fit: {action}")
    log(f"fit: {len(best.data):,} bytes by {len(best.actions)} actions, found in {packings} packings")
    return best


def coarsening_actions(state: Mapping[str, Tensor], quant: QuantConfig) -> list[FitAction]:
    """Returns every bit that a matrix can lose, by the relative squared error added per code bit saved, smallest
    first."""
    ranked = []
    for name, tensor in state.items():
        if tensor_class(name, tensor.shape) == "small" or weight_site(name, quant):
            continue  # a tensor with its own quantizer trained for that one
        widths = [bits_of(name, tensor.shape, quant)]
        widths += range(min(widths[0] - 1, 8), FEWEST_BITS - 1, -1)
        errors, cost = [rounding_error(name, tensor, bits, quant) for bits in widths], 0.0
        for (before, error), (after, larger_error) in pairwise(zip(widths, errors, strict=True)):
            saved_bits = (before - after) * tensor.numel()
            cost = max(cost, (larger_error - error) / saved_bits)  # a tensor loses one bit after another
            action = FitAction(name, after, f"{name} {before} -> {after} bits", saved_bits / 8)
            ranked.append((cost, len(ranked), action))
    return [action for _, _, action in sorted(ranked)]


def rounding_error(name: str, tensor: Tensor, bits: int, quant: QuantConfig) -> float:
    """Returns the squared error of a tensor stored in `bits` bits, relative to the tensor's own square."""
    exact = tensor.detach().cpu().double()
    restored = dequantize_state(quantize_state({name: tensor}, quant, {name: bits}))[name]
    return ((restored - exact).square().sum() / exact.square().sum().clamp_min(1e-300)).item()


def pack_coarsened(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str, actions: list[FitAction]
) -> FittedArtifact:
    """Prunes, quantizes and packs `state`, as configured but for `actions`."""
    bits = {action.tensor: int(action.value) for action in actions if action.tensor}
    shares = [quant.prune_frac, *(action.value for action in actions if not action.tensor)]
    pruned, reports = prune_state(state, replace(quant, prune_frac=shares[-1]), bits)
    stored = quantize_state(pruned, quant, bits)
    packed = pack_artifact(stored, model, tokenizer_sha256, quant.codec)
    return FittedArtifact(*packed, stored, reports, [action.text for action in actions], pruned)


FINEST, COARSEST = -36.0, 0.0
"""Base-2 logarithms of the levels that bound the search: codes fill int8 at the first, nearly all are zero at the
second."""
FIRST_GUESS = -21.0
NEAR_ENOUGH = 500
MOST_PACKINGS = 16
SAMPLE_WEIGHTS = 2**22
"""Weights, about, on whose rows the level of a larger model is searched first."""
BLIND_STEP, PATIENCE = 0.05, 4
"""Octaves that a step goes further than predicted where no slope is known, or so many packings brought none within."""


def near_enough(goal: int) -> int:
    """Returns the bytes below the goal at which the search ends: at 16,000,000 a 4,000th, 0.001 bits a weight."""
    return max(NEAR_ENOUGH, goal // 4000)


def single_process() -> Runtime:
    """Returns a runtime of one process on the CPU."""
    return Runtime(torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class LevelArtifact:
    """Holds the model at one water level."""

    log_level: float
    size: int
    """Bytes; of a sample of rows those that all would take."""
    data: bytes
    """Empty for a sample."""
    sizes: SizeReport
    stored: QuantizedState
    loss_added: float
    """Predicted added loss, nats per token."""


@dataclass(eq=False)
class LevelSearch:
    """Searches the water level whose artifact fills a goal, for prepared weights; all ranks together.

    Each rank quantizes its share of the matrices. All of them pack, decide, and come to the same.
    """

    state: Mapping[str, Tensor]
    statistics: Mapping[str, LayerStatistics]
    quant: QuantConfig
    model: ModelConfig
    tokenizer_sha256: str = "0" * 64
    log: Callable[[str], None] = print
    trellis: bool = False
    first_guess: float = FIRST_GUESS
    near_enough: int = NEAR_ENOUGH
    runtime: Runtime = field(default_factory=single_process)
    stride: int = 1
    """Of so many rows, one is quantized: the others cost about as much."""
    slope: float = 0.0
    """Of the size's logarithm over the level, by the last two that were tried; 0: not known yet."""
    tried: dict[float, LevelArtifact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepares this rank's matrices, with hidden units in the order that suits the coder: this saves 0.2 to 0.4 %
        of the bytes."""
        state = {name: part.detach().cpu() for name, part in self.state.items()}  # as the statistics are
        orders = hidden_orders(state)
        self.state = permute_hidden_units(state, orders)
        self.shapes = {name: tuple(self.state[name].shape) for name in self.statistics}
        ranks = spread_matrices(self.shapes, self.runtime.world_size)
        self.matrices: dict[str, PreparedMatrix] = {
            name: prepare_matrix(self.state[name].to(self.runtime.device), one)
            for name, one in permute_statistics(self.statistics, orders).items()
            if ranks[name] == self.runtime.rank
        }

    def quantize(self, log_level: float) -> QuantizedState:
        """Returns all tensors quantized at a level; those that are no matrices as fp16."""
        mine: dict[str, QuantizedTensor] = {}
        shapes = {name: (-(-rows // self.stride), columns) for name, (rows, columns) in self.shapes.items()}
        for names in batch_equal_shapes({name: shapes[name] for name in self.matrices}, self.runtime.device):
            matrices = [self.matrices[name].sample(self.stride) for name in names]
            entries = quantize_matrices(matrices, 2.0**log_level, self.quant.rd_lambda, self.trellis)
            mine |= zip(names, entries, strict=True)
        codes = share_entries(mine, shapes, self.runtime)
        return {name: codes[name] if name in codes else part.detach().cpu().half() for name, part in self.state.items()}

    def of_all(
        self, value_of: Callable[[PreparedMatrix, QuantizedTensor | Tensor], float], stored: QuantizedState
    ) -> dict[str, float]:
        """Returns a value of each matrix, on every rank; it does not depend on who has which."""
        values = [value_of(self.matrices[name], stored[name]) if name in self.matrices else 0.0 for name in self.shapes]
        values_N = torch.tensor(values, dtype=torch.float64, device=self.runtime.device)
        return dict(zip(self.shapes, self.runtime.sum_over_ranks(values_N).tolist(), strict=True))

    def packed(self, log_level: float, stored: QuantizedState) -> LevelArtifact:
        """Returns the artifact of these entries."""
        data, sizes = pack_artifact(stored, self.model, self.tokenizer_sha256, self.quant.codec, verify=False)
        return LevelArtifact(log_level, len(data), data, sizes, stored, sum(self.of_all(loss_of, stored).values()))

    def at(self, log_level: float) -> LevelArtifact:
        """Returns the artifact at a level, quantized and packed once."""
        if log_level not in self.tried:
            stored = self.quantize(log_level)
            if self.stride > 1:
                self.tried[log_level] = self.sampled(log_level, stored)
                return self.tried[log_level]
            found = self.tried[log_level] = self.packed(log_level, stored)
            self.log(
                f"fit: level 2^{log_level:.4f}: {found.size:,} bytes, {found.loss_added:.5f} nats per token expected"
            )
        return self.tried[log_level]

    def sampled(self, log_level: float, stored: QuantizedState) -> LevelArtifact:
        """Returns what all rows would take, by a sample's streams: codes and scales are as many times more."""
        streams, _ = encode_streams(stored, self.quant.codec)
        size = sum(one.compressed_bytes * (self.stride if one.role in ("codes", "scales") else 1) for one in streams)
        self.log(f"fit: level 2^{log_level:.4f}: about {size:,} bytes by one row in {self.stride}")
        return LevelArtifact(log_level, size, b"", SizeReport(self.quant.codec, tuple(streams), size), stored, math.nan)

    def fill(self, goal: int) -> LevelArtifact:
        """Returns the largest artifact within `goal` bytes, up to `near_enough`; a smaller one where no finer step
        helps.

        Raises FitError where the coarsest is larger.
        """
        over = within = None  # the nearest level that is too large, and that fits
        guess = self.first_guess
        for packing in range(MOST_PACKINGS):
            size = self.at(guess).size
            over, within = (over, guess) if size <= goal else (guess, within)
            self.learn(within)
            if goal - self.near_enough <= size <= goal or (within == FINEST and size <= goal) or over == COARSEST:
                break
            guess = self.next_guess(goal, over, within, packing)
        if within is None:
            smallest = min(one.size for one in self.tried.values())
            raise FitError(
                f"the artifact can't fit in {goal:,} bytes: {smallest:,} is the smallest, with nearly all codes zero; "
                "train a smaller model"
            )
        return self.at(within)

    def learn(self, within: float | None) -> None:
        """Takes the slope of the last two levels, and forgets the weights of all but the one that is `within`."""
        *_, before, last = [None, *self.tried]
        if before is not None:
            slope = math.log(self.tried[last].size / self.tried[before].size) / (last - before)
            self.slope = min(slope, 0.0)
        for level in self.tried.keys() - {within}:
            self.tried[level] = replace(self.tried[level], data=b"", stored={})

    def next_guess(self, goal: int, over: float | None, within: float | None, packing: int) -> float:
        """Returns the next level to try.

        Between a level that is too large and one that fits: where the line through their sizes meets the goal, or at
        each fourth packing their middle. Else: where the slope meets it; as far on as half a bit a weight for each
        octave predicts, and a little further, where it is not known or has brought nothing for long.
        """
        aim = goal - self.near_enough / 2
        if over is None or within is None:
            known = over if within is None else within
            size, blind = self.tried[known].size, not self.slope or packing >= PATIENCE
            octaves = 16 * (size - goal) / (self.stride * self.tried[known].sizes.weights)
            step = 1.2 * octaves + math.copysign(BLIND_STEP, octaves) if blind else math.log(aim / size) / self.slope
            return min(max(known + step, FINEST), COARSEST)
        if packing % 4 == 3:
            return (over + within) / 2
        most, least = (math.log(self.tried[level].size) for level in (over, within))
        share = (most - math.log(aim)) / (most - least)
        return over + min(max(share, 0.02), 0.98) * (within - over)


def loss_of(matrix: PreparedMatrix, entry: QuantizedTensor | Tensor) -> float:
    """Returns the predicted loss of a stored matrix, nats per token."""
    return matrix.loss_added(dequantize_tensor(entry) if isinstance(entry, QuantizedTensor) else entry.float())


def fill_with_fp16(search: LevelSearch, found: LevelArtifact, goal: int) -> LevelArtifact:
    """Returns the artifact with matrices as fp16 where the finest codes leave room: those first whose error costs most
    for each of their weights. Says in one line what stays free, and how little more bytes could win."""
    losses, taken, room = search.of_all(loss_of, found.stored), [], goal - found.size
    for name in sorted(losses, key=lambda name: -losses[name] / search.state[name].numel()):
        more = search.state[name].numel() * (FP16_BITS - found.sizes.bits_per_weight) / 8
        if more <= room:
            taken, room = [*taken, name], room - more
    finest = found
    while taken:
        fp16 = {name: search.state[name].half() for name in taken}
        found = search.packed(found.log_level, finest.stored | fp16)
        if found.size <= goal:
            break
        found, taken = finest, taken[:-1]
    search.log(
        f"fit: codes are at their finest, {len(taken)} of {len(losses)} matrices in fp16: {goal - found.size:,} bytes "
        f"stay free, {found.loss_added:.2g} nats per token is the most that more could win"
    )
    return found


def fill_limit(
    statistics: Mapping[str, LayerStatistics], state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig,
    tokenizer_sha256: str, limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
    runtime: Runtime | None = None,
) -> FittedArtifact:  # fmt: skip
    """Returns the artifact that fills the limit, less a reserve, on every rank. Deterministic: the bytes do not depend
    on the number of ranks. Raises FitError, QuantError.

    The level is first searched roughly: on some rows where there are many weights, else with plain grids, which are
    quick. From there on all rows are quantized with trellises.
    """
    goal = limit_bytes_model - reserve_bytes
    stride = max(1, sum(state[name].numel() for name in statistics) // SAMPLE_WEIGHTS)
    roughly = max(NEAR_ENOUGH, goal // (50 if stride == 1 else 500))
    search = LevelSearch(
        state, statistics, quant, model, tokenizer_sha256, log, stride > 1, near_enough=roughly,
        runtime=runtime or single_process(), stride=stride,
    )  # fmt: skip
    search.first_guess, packings = search.fill(goal).log_level, len(search.tried)
    search.trellis, search.near_enough, search.stride, search.tried = True, near_enough(goal), 1, {}
    found, packings = search.fill(goal), packings + len(search.tried)
    if found.log_level == FINEST and goal - found.size > near_enough(goal):
        found = fill_with_fp16(search, found, goal)
    coded = [entry for entry in found.stored.values() if isinstance(entry, QuantizedTensor)]
    zeros = sum(int((entry.codes_RC == 0).sum()) for entry in coded)
    codes = sum(entry.codes_RC.numel() for entry in coded)
    woven, in_fp16 = sum(entry.trellis for entry in coded), sum(isinstance(found.stored[k], Tensor) for k in statistics)
    action = (
        f"water level 2^{found.log_level:.4f}, {found.loss_added:.5f} nats per token expected, {woven} of "
        f"{len(statistics)} matrices on a trellis, {in_fp16} in fp16, "
        f"{zeros / max(codes, 1):.1%} of the codes zero"
    )
    log(f"fit: {len(found.data):,} bytes in {packings} packings: {action}")
    moved = int(sum(search.of_all(PreparedMatrix.codes_not_nearest, found.stored).values()))
    sizes = replace(found.sizes, streams=tuple(read_back(found.data, found.stored, found.sizes.streams)))
    return FittedArtifact(found.data, sizes, found.stored, [], [action], None, moved, in_fp16)
