"""Fit to the byte limit: coarser weights in a fixed order, and only where the artifact would be over.

First pruning is raised, then matrices lose a bit each, the least sensitive first. Order and bytes follow from the
weights alone. How many actions it takes is found by packing, and what is returned was packed.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

from torch import Tensor

from golf.artifact.container import pack_artifact
from golf.artifact.sizes import SizeReport
from golf.config.config import ModelConfig, QuantConfig, UserError
from golf.quant.export import quantize_state
from golf.quant.prune import PruneReport, prune_state
from golf.quant.stored import QuantizedState, dequantize_state
from golf.quant.tensor_classes import bits_of, tensor_class, weight_site

PRUNE_SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
PRUNE_SAVES = 0.02  # share of the bytes, about, by each of PRUNE_SHARES: only says where to look first
FEWEST_BITS = 3
GUIDED_PACKINGS = 5  # so many packings follow the expected savings, later ones halve what is left


class FitError(UserError):
    """Weights that no allowed coarsening brings under the limit."""


@dataclass(frozen=True)
class FitAction:
    """One step towards fewer bytes: `value` is the bits that `tensor` gets, or (no tensor) the share that is pruned."""

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
    """The weights that `stored` was rounded to nearest from; None where codes were chosen otherwise."""
    codes_not_nearest: int = 0
    """Codes that error feedback or their price has moved from the nearest."""


def fit_to_limit(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str,
    limit_bytes_model: int, reserve_bytes: int, log: Callable[[str], None],
) -> FittedArtifact:  # fmt: skip
    """The artifact of `state` as configured, where that is within the limit; else by the fewest actions of the order
    that leave `reserve_bytes` free. Raises FitError when all of them together do not."""
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
    low, high = 0, len(saved)  # `low` actions are too few, `high` are enough (or more than there are)
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
    """Every bit that a matrix can lose, by the relative squared error added per code bit saved, smallest first."""
    ranked = []
    for name, tensor in state.items():
        if tensor_class(name, tensor.shape) == "small" or weight_site(name, quant):
            continue  # what has a quantizer of its own trained for that one
        widths = [bits_of(name, tensor.shape, quant)]
        widths += range(min(widths[0] - 1, 8), FEWEST_BITS - 1, -1)
        errors, cost = [rounding_error(name, tensor, bits, quant) for bits in widths], 0.0
        for (before, error), (after, larger_error) in pairwise(zip(widths, errors, strict=True)):
            saved_bits = (before - after) * tensor.numel()
            cost = max(cost, (larger_error - error) / saved_bits)  # a tensor loses one bit after the other
            action = FitAction(name, after, f"{name} {before} -> {after} bits", saved_bits / 8)
            ranked.append((cost, len(ranked), action))
    return [action for _, _, action in sorted(ranked)]


def rounding_error(name: str, tensor: Tensor, bits: int, quant: QuantConfig) -> float:
    """Squared difference between a tensor and what `bits` bits store of it, over the tensor's own square."""
    exact = tensor.detach().cpu().double()
    restored = dequantize_state(quantize_state({name: tensor}, quant, {name: bits}))[name]
    return ((restored - exact).square().sum() / exact.square().sum().clamp_min(1e-300)).item()


def pack_coarsened(
    state: Mapping[str, Tensor], quant: QuantConfig, model: ModelConfig, tokenizer_sha256: str, actions: list[FitAction]
) -> FittedArtifact:
    """`state` pruned, quantized and packed, as configured but for `actions`."""
    bits = {action.tensor: int(action.value) for action in actions if action.tensor}
    shares = [quant.prune_frac, *(action.value for action in actions if not action.tensor)]
    pruned, reports = prune_state(state, replace(quant, prune_frac=shares[-1]), bits)
    stored = quantize_state(pruned, quant, bits)
    packed = pack_artifact(stored, model, tokenizer_sha256, quant.codec)
    return FittedArtifact(*packed, stored, reports, [action.text for action in actions], pruned)
