"""Estimates what the arithmetic of a token's forward pass would cost: operations by site times the energy of one
operation.

An estimate for hardware that has the arithmetic, and of nothing else: this program computes in floating point whatever
the codes are. What it leaves out is part of every EnergyEstimate, in words.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from golf.artifact.description import expected_shapes
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import SiteQuantizer, activation_sites
from golf.model.recurrence import layer_order, runs_of
from golf.quant.grid import QuantizedState, QuantizedTensor, grid_clip, spread_groups
from golf.quant.tensor_classes import FP16_BITS, SITE_PATHS, bits_of, tensor_class, weight_site

OPERATION_PICOJOULES = {
    "7nm": {"fp32": (0.38, 1.31), "fp16": (0.16, 0.34), "int8": (0.007, 0.07)},
    "45nm": {"fp32": (0.9, 3.7), "fp16": (0.4, 1.1), "int8": (0.03, 0.2)},
}
"""Process -> arithmetic -> pJ of an addition and of a multiplication: BitNet (arXiv 2310.11453), table 2."""
SIGNS, INTEGERS = "signs", "int8"
"""Kinds of operand besides the two floats: codes of magnitude 1 or 0, and wider codes, 8 bits at most."""
WEIGHT_INPUTS = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "attn_out", "up": "mlp_in", "down": "hidden"}
"""Site of a weight -> site of the activations that it multiplies; the others' are floats."""
PRODUCT_PATHS = SITE_PATHS | {"bigram.proj": "bigram"}
ATTENTION_SITES = ("scores", "values")
"""Products of activations with activations, which are told apart and are not in the total."""


@dataclass(frozen=True)
class OperationCount:
    """The product at one site: what multiplies what, and how often for one token."""

    site: str
    macs: float
    weight: str
    """Of the first operand: the text of its quantizer, or of its grid, or the float's name."""
    weight_kind: str
    activation: str
    activation_kind: str
    zero_share: float | None = None
    """Of the first operand's codes; None: not measured."""

    @property
    def arithmetic(self) -> str:
        """Is fp32, fp16 or int8: a float's where an operand is one."""
        kinds = {self.weight_kind, self.activation_kind} - {SIGNS, INTEGERS}
        return max(kinds, default=INTEGERS)

    @property
    def multiplies(self) -> bool:
        """Says whether it multiplies: a factor of -1, 0 or 1 takes an addition, a subtraction or nothing."""
        return SIGNS not in (self.weight_kind, self.activation_kind)

    @property
    def in_total(self) -> bool:
        return self.site not in ATTENTION_SITES

    def additions(self, zero_skip: bool = False) -> float:
        return self.macs * (1 - (self.zero_share or 0.0) if zero_skip else 1)

    def multiplications(self, zero_skip: bool = False) -> float:
        return self.additions(zero_skip) if self.multiplies else 0.0

    def microjoules(self, process: str = "7nm", zero_skip: bool = False) -> float:
        """Returns uJ for one token, the zeros of the first operand's codes left out where `zero_skip` says so."""
        add, multiply = OPERATION_PICOJOULES[process][self.arithmetic]
        return 1e-6 * (self.additions(zero_skip) * add + self.multiplications(zero_skip) * multiply)


@dataclass(frozen=True)
class EnergyEstimate:
    """uJ a token, by site; `assumptions` belong to every figure that is printed."""

    sites: tuple[OperationCount, ...]
    float_kind: str
    assumptions: tuple[str, ...]

    def microjoules(self, process: str = "7nm", zero_skip: bool = False) -> float:
        """Returns those of all products with weights, attention's scores and values left out."""
        return sum(site.microjoules(process, zero_skip) for site in self.sites if site.in_total)

    def float_microjoules(self, process: str = "7nm") -> float:
        """Returns the cost of the same products in floats: what the savings are measured against."""
        return sum(site.macs for site in self.sites if site.in_total) * sum(
            1e-6 * picojoules for picojoules in OPERATION_PICOJOULES[process][self.float_kind]
        )

    def attention_microjoules(self, process: str = "7nm") -> float:
        """Returns those of attention's scores and values, which grow with the context."""
        return sum(site.microjoules(process) for site in self.sites if not site.in_total)

    def head_share(self, process: str = "7nm", zero_skip: bool = False) -> float:
        """Returns the share of the total that is the head's."""
        head = sum(site.microjoules(process, zero_skip) for site in self.sites if site.site == "head")
        return head / self.microjoules(process, zero_skip)

    @property
    def measured(self) -> bool:
        """Says whether zeros were counted in stored codes, so that skipping them means something."""
        return any(site.zero_share is not None for site in self.sites)

    def summary(self) -> list[str]:
        """Returns one line for each process, then the assumptions."""
        lines = []
        for process in OPERATION_PICOJOULES:
            floats, own = self.float_microjoules(process), self.microjoules(process)
            line = f"{process}: {own:.4g} uJ/token (estimate), {floats / own:.2f} times less than {self.float_kind}'s "
            line += f"{floats:.4g}; the head is {self.head_share(process):.0%} of it"
            if self.measured:
                skipped = self.microjoules(process, zero_skip=True)
                line += f"; {skipped:.4g} with zeros skipped ({floats / skipped:.2f} times less)"
            lines.append(f"{line}; attention's scores and values {self.attention_microjoules(process):.4g} more")
        return [*lines, *self.assumptions]


MEASURED_NOTHING = "this program computes in floats whatever the codes are: no such energy was measured"


def energy_estimate(
    model: ModelConfig, quant: QuantConfig, zero_shares: Mapping[str, float] | None = None,
    context: int = 0, float_kind: str = "fp16",
) -> EnergyEstimate:  # fmt: skip
    """Estimates a token's forward pass, averaged over a row of `context` tokens (0: the training length).

    `zero_shares`: share of codes that are 0 by site of the weights, as measured_zero_shares gives them. `float_kind`:
    fp16 or fp32, what is priced where nothing is quantized.
    """
    assert float_kind in ("fp16", "fp32")
    shares = dict(zero_shares or {})
    assert all(0 <= share <= 1 for share in shares.values()), shares
    context = context or model.train_seq_len
    sites = [*weight_counts(model, quant, shares, float_kind), *attention_counts(model, context, float_kind)]
    assert shares.keys() <= {site.site for site in sites}, f"zeros of sites that the model does not have: {shares}"
    lines = [*assumption_lines(sites, float_kind), *scope_lines(model, quant, context), MEASURED_NOTHING]
    return EnergyEstimate(tuple(sites), float_kind, tuple(lines))


def weight_counts(
    model: ModelConfig, quant: QuantConfig, zero_shares: Mapping[str, float], float_kind: str
) -> Iterator[OperationCount]:
    """Yields the products with weights, and the embedding's lookups, which multiply nothing."""
    macs = dict.fromkeys(("q", "k", "v", "o", "up", "down", "bigram", "head", "embed"), 0)
    operands: dict[str, tuple[str, str]] = {}
    for name, shape in expected_shapes(model).items():
        if (site := product_site(name)) is None:
            continue
        if site != "embed":
            macs[site] += prod(shape) * runs_of(name, model)
        operands[site] = weight_operand(name, shape, quant, float_kind)
    if model.tie_embeddings:
        macs["head"], operands["head"] = model.vocab_size * model.model_dim, operands["embed"]
    activations = activation_sites(model)
    for site, count in macs.items():
        if site in operands:
            activation = site_operand(activations.get(WEIGHT_INPUTS.get(site, "")), float_kind)
            yield OperationCount(site, count, *operands[site], *activation, zero_shares.get(site))


def product_site(name: str) -> str | None:
    """Returns the site whose product a tensor is part of, by its name; the bigram's table is only looked up."""
    return PRODUCT_PATHS.get(".".join(name.removesuffix(".weight").split(".")[-2:]))


def weight_operand(name: str, shape: tuple[int, ...], quant: QuantConfig, float_kind: str) -> tuple[str, str]:
    """Returns (text, kind) of a stored matrix; a fit's steps differ by column, so its weights are floats again."""
    if quantizer := weight_site(name, quant):
        return quantizer.text, code_kind(quantizer)
    bits, is_fit = bits_of(name, shape, quant), quant.quantizer == "waterfill"
    if tensor_class(name, shape) == "small" or (bits == FP16_BITS and not is_fit):
        return float_kind, float_kind
    if is_fit:
        return "waterfill", float_kind
    return f"grid{bits}", SIGNS if grid_clip(bits) == 1 else INTEGERS


def code_kind(quantizer: SiteQuantizer) -> str:
    return SIGNS if max(-quantizer.low, quantizer.high) == 1 else INTEGERS


def site_operand(quantizer: SiteQuantizer | None, float_kind: str) -> tuple[str, str]:
    return (quantizer.text, code_kind(quantizer)) if quantizer else (float_kind, float_kind)


def visible_on_average(model: ModelConfig, context: int) -> float:
    """Returns how many keys a query sees, averaged over the positions of a row, knowledge tokens among them."""
    window = min(model.attention_window or context, context)
    pairs = window * (window + 1) // 2 + (context - window) * window
    return pairs / context + model.knowledge_tokens


def attention_counts(model: ModelConfig, context: int, float_kind: str) -> Iterator[OperationCount]:
    """Yields queries times keys, and probabilities (floats) times values: model_dim products with each visible key."""
    macs = len(layer_order(model)) * model.model_dim * visible_on_average(model, context)
    act = activation_sites(model)
    query, key, value = (site_operand(act.get(site), float_kind) for site in ("q", "k", "v"))
    yield OperationCount("scores", macs, *query, *key)
    yield OperationCount("values", macs, *value, float_kind, float_kind)


def assumption_lines(sites: Sequence[OperationCount], float_kind: str) -> Iterator[str]:
    """Yields what the price of each operation rests on, one sentence a line."""
    yield "energy is an estimate: operations counted from the configuration, times published energies of one operation"
    for process, table in OPERATION_PICOJOULES.items():
        prices = ", ".join(f"{kind} {add:g} and {multiply:g}" for kind, (add, multiply) in table.items())
        yield f"{process}, pJ of an addition and a multiplication: {prices} (BitNet, arXiv 2310.11453, table 2)"
    yield f"floats count as {float_kind}, bf16 as fp16; a factor of -1, 0 or 1 costs one addition and no multiplication"
    if any(INTEGERS in (site.weight_kind, site.activation_kind, site.arithmetic) for site in sites):
        yield (
            "codes with codes count as int8 whatever their width, and so do their sums: the table has no other "
            "integers; wider codes than -1, 0 and 1 with floats count as floats"
        )
    if any("twosided8" in text for site in sites for text in (site.weight, site.activation)):
        yield "twosided8: positive and negative codes are summed apart, since each sign has its own scale"
    if any(site.zero_share is not None for site in sites):
        yield (
            "zeros skipped: without the products of weight codes that are 0, as counted in the stored codes, on "
            "hardware that finds them for nothing; zeros of activations are not skipped"
        )


def scope_lines(model: ModelConfig, quant: QuantConfig, context: int) -> Iterator[str]:
    """Yields what is in the total, and what is not."""
    yield (
        "scope: products with weight matrices, the head's among them; memory traffic, embedding lookups, norms, "
        "softmax, non-linearities, the quantizers themselves and the scale of each output are not counted"
    )
    yield (
        f"attention's scores and values are told apart, at {visible_on_average(model, context):,.1f} visible keys on "
        f"average over a row of {context:,} tokens, and are not in the total"
    )
    if model.knowledge_tokens:
        yield "knowledge tokens are visible keys; what they cost themselves, once a row, is not counted"
    if quant.quantizer == "waterfill":
        yield "quantizer=waterfill: steps differ by row and column, so weights count as floats"


def measured_zero_shares(stored: QuantizedState) -> dict[str, float]:
    """Returns the share of weights whose stored code stands for 0, by site; sites without any codes are left out.

    The keys are those that energy_estimate takes: a tied head's zeros are the embedding's.
    """
    zeros, weights = dict[str, int](), dict[str, int]()
    coded = set()
    for name, entry in stored.items():
        shape = tuple(entry.codes_RC.shape) if isinstance(entry, QuantizedTensor) else tuple(entry.shape)
        if site := product_site(name):
            zeros[site] = zeros.get(site, 0) + zero_codes(entry)
            weights[site] = weights.get(site, 0) + prod(shape)
            if isinstance(entry, QuantizedTensor):
                coded.add(site)
    shares = {site: zeros[site] / weights[site] for site in weights if site in coded}
    if "embed" in shares and "head" not in weights:
        shares["head"] = shares["embed"]
    return shares


def zero_codes(entry: QuantizedTensor | Tensor) -> int:
    """Counts weights that are 0 for sure: none of a trellis, whose codes depend on each other, or with a correction."""
    if not isinstance(entry, QuantizedTensor) or entry.trellis or entry.low_rank is not None:
        return 0
    if entry.zero_SG is None:
        return int((entry.codes_RC == 0).sum())
    return int((entry.codes_RC == spread_groups(entry.zero_SG, entry.codes_RC.size(1))).sum())
