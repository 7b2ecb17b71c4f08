"""Parses the short texts that name quantizers for single sites (weights or activations) of the model.

    KIND[-option...]        such as ternary, ternary-row-leastsq-dge5, int8, tanh-ternary-fork; empty: no quantizer

Kinds: binary, ternary and int2 to int8 for weights and activations; for activations also unsigned2 to unsigned8 (for
values that are never negative), twosided8 (a step for each sign, as in the published study), and after a squashing
function tanh-KIND, sigmoid-binary, unit-KIND, whose step is fixed. Options: which values share a step (tensor, row, gN:
N neighbouring columns of a row, qkvo), the rule for it (absmean, absmax, leastsq), the threshold of a ternary code
(t0.7), the gradient (ste, clipped, dgeK or dgeKcLARGEST, fork), and attached (the gradient flows through the step too).
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

WEIGHT_SITES = ("q", "k", "v", "o", "up", "down", "embed", "head")
ACTIVATION_SITES = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "hidden")
SHARED_SCALE_SITES = ("q", "k", "v", "o")
LARGEST_SLOPE = 3.0


class SiteError(ValueError):
    """Reports a text that names no quantizer, or quantizers that do not fit together."""


@dataclass(frozen=True)
class SiteQuantizer:
    """Describes a quantizer: codes low..high, a rule for the step between them, and the gradient that replaces
    rounding's."""

    text: str
    low: int
    high: int
    bits: int
    """Bits of a stored code; 2 for ternary."""
    granularity: str
    """What shares a step: tensor, row (of activations: a token, or a token's head), group, or qkvo."""
    group_size: int
    scale: str
    """Rule for the step: absmean, absmax, leastsq, twosided, or unit (the largest code stands for 1)."""
    threshold: float
    """Multiple of the mean magnitude beyond which a ternary code is not 0."""
    gradient: str
    power: int
    """Exponent k of the differentiable gradient estimator (arXiv 2501.17116)."""
    largest_slope: float
    """Bound on that estimator's slope, which is infinite halfway between two codes."""
    attached: bool
    squash: str
    """Function applied before quantizing: tanh, sigmoid, or empty."""

    @property
    def is_binary(self) -> bool:
        """Returns whether the codes are -1 and 1, without a 0 between them."""
        return self.low == -1 and self.bits == 1

    @property
    def step_of_levels(self) -> int:
        return 2 if self.is_binary else 1


SITE_PATTERN = re.compile(
    r"(?:(?P<squash>tanh|sigmoid|unit)-)?(?P<kind>binary|ternary|int[2-8]|unsigned[2-8]|twosided8)"
    r"(?:-(?P<granularity>tensor|row|qkvo|g[1-9][0-9]{0,6}))?(?:-(?P<scale>absmean|absmax|leastsq))?"
    r"(?:-t(?P<threshold>0?\.[0-9]{1,6}|1(?:\.[0-9]{1,6})?))?"
    r"(?:-(?P<gradient>ste|clipped|dge(?P<power>[2-9])(?:c(?P<clamp>[0-9]{1,9}(?:\.[0-9]{1,6})?))?|fork))?"
    r"(?P<attached>-attached)?"
)
CODE_RANGES = {"binary": (-1, 1, 1), "ternary": (-1, 1, 2), "twosided8": (-127, 127, 8)}
"""(low, high, bits) by kind."""


def code_range(kind: str, squash: str) -> tuple[int, int, int]:
    if squash == "sigmoid":
        return 0, 1, 1
    if kind in CODE_RANGES:
        return CODE_RANGES[kind]
    bits = int(kind[-1])
    return (0, 2**bits - 1, bits) if kind.startswith("unsigned") else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, bits)


@cache
def parse_site(text: str, activation: bool) -> SiteQuantizer | None:
    """Returns the quantizer that `text` names, None for an empty text. Raises SiteError."""
    if not text:
        return None
    match = SITE_PATTERN.fullmatch(text)
    if match is None:
        raise SiteError(
            f"{text!r} names no quantizer: KIND[-tensor|-row|-gN|-qkvo][-absmean|-absmax|-leastsq][-tX]"
            "[-ste|-clipped|-dgeK|-fork][-attached], KIND one of binary, ternary, int2 to int8; for activations also "
            "unsignedB, twosided8, tanh-KIND, unit-KIND, sigmoid-binary"
        )
    kind, squash, granularity = match["kind"], match["squash"] or "", match["granularity"]
    low, high, bits = code_range(kind, squash)
    few, grouped = kind in ("binary", "ternary"), (granularity or "").startswith("g")
    scale = "unit" if squash else "twosided" if kind == "twosided8" else match["scale"]
    gradient = match["gradient"] or "ste"
    site = SiteQuantizer(
        text, low, high, bits,
        granularity="group" if grouped else granularity or ("tensor" if few and not activation else "row"),
        group_size=int(granularity[1:]) if grouped else 0,
        scale=scale or ("absmean" if few else "absmax"),
        threshold=float(match["threshold"] or 0.5),
        gradient=gradient[:3] if match["power"] else gradient,
        power=int(match["power"] or 0),
        largest_slope=float(match["clamp"] or LARGEST_SLOPE),
        attached=bool(match["attached"]),
        squash=squash,
    )  # fmt: skip
    check_site(site, kind, match, activation)
    return site


def check_site(site: SiteQuantizer, kind: str, match: re.Match[str], activation: bool) -> None:
    """Raises SiteError for options that contradict each other, or that nothing would read."""
    few = kind in ("binary", "ternary")
    rules = [
        (activation or not (site.squash or kind.startswith(("unsigned", "twosided"))), "it is for activations alone"),
        (not activation or site.granularity == "row", "an activation's step is its token's: leave the granularity out"),
        (match["granularity"] != "qkvo" or few, "qkvo is for ternary and binary"),
        (site.squash != "sigmoid" or kind == "binary", "sigmoid- goes with binary"),
        (site.squash != "unit" or kind != "binary", "unit- goes with ternary and intB"),
        (not (site.squash or kind == "twosided8") or match["scale"] is None, "its step is fixed: leave the rule out"),
        (not kind.startswith("unsigned") or site.scale == "absmax" != match["scale"], "unsigned has one rule"),
        (few or site.scale not in ("absmean", "leastsq"), "absmean and leastsq are for binary and ternary"),
        (kind == "ternary" or match["threshold"] is None, "a threshold is for ternary"),
        (not site.squash or match["threshold"] is None, "its threshold is fixed"),
        (site.scale in ("absmean", "leastsq") or match["threshold"] is None, "a threshold goes with absmean, leastsq"),
        (site.threshold > 0, "a threshold is above 0"),
        (site.largest_slope > 0, "a gradient that is cut off at 0 is none"),
        (site.gradient != "fork" or not site.is_binary, "the fork's gradient is not defined for binary"),
        (not (site.attached and site.scale == "unit"), "attached: a fixed step has no gradient"),
        (match["granularity"] != "qkvo" or site.scale == "absmean", "qkvo shares the mean: it goes with absmean"),
    ]
    for holds, message in rules:
        if not holds:
            raise SiteError(
                f"{site.text!r} is no quantizer {'of activations' if activation else 'of weights'}: {message}"
            )


def weight_sites(quant: Any) -> dict[str, SiteQuantizer]:
    """Returns the quantizers that a QuantConfig names for weights, by site. Raises SiteError."""
    texts = (
        quant.weight_q, quant.weight_k, quant.weight_v, quant.weight_o, quant.weight_up, quant.weight_down,
        quant.weight_embed, quant.weight_head,
    )  # fmt: skip
    named = {site: parse_site(text, activation=False) for site, text in zip(WEIGHT_SITES, texts, strict=True)}
    for site, quantizer in named.items():
        if quantizer and quantizer.granularity == "qkvo" and site not in SHARED_SCALE_SITES:
            raise SiteError(f"weight_{site}: qkvo is one step for the attention's matrices")
    return {site: quantizer for site, quantizer in named.items() if quantizer}


def activation_sites(model: Any) -> dict[str, SiteQuantizer]:
    """Returns the quantizers that a ModelConfig names for activations, by site. Raises SiteError."""
    texts = (
        model.act_attn_in, model.act_q, model.act_k, model.act_v, model.act_attn_out, model.act_mlp_in,
        model.act_hidden,
    )  # fmt: skip
    named = {site: parse_site(text, activation=True) for site, text in zip(ACTIVATION_SITES, texts, strict=True)}
    return {site: quantizer for site, quantizer in named.items() if quantizer}


def site_rules(model: Any, quant: Any) -> list[tuple[bool, str]]:
    """Returns (whether it holds, what to do where it does not) for each rule of the low-bit knobs. Raises SiteError."""
    weights, activations = weight_sites(quant), activation_sites(model)
    hidden = activations.get("hidden")
    widths = [
        quant.embed_bits, quant.mlp_bits, quant.attn_bits, quant.bigram_bits if model.bigram_vocab_size else 16
    ]  # fmt: skip
    return [
        (not weights or quant.qat_enabled, "weights train through weight_*: set qat_enabled=1, or leave weight_* out"),
        (
            bool(weights) or not quant.qat_enabled or min(widths) < 16,
            "qat_enabled=1 has nothing to act on: all bits are 16 and no weight_* is set",
        ),
        (
            not weights or (quant.quantizer, quant.prune_frac) == ("rtn", 0),
            "weight_* have grids of their own: set quantizer=rtn and prune_frac=0",
        ),
        (
            "head" not in weights or not model.tie_embeddings,
            "weight_head needs tie_embeddings=0: a tied head is the embedding's, which weight_embed quantizes",
        ),
        (model.tie_embeddings or quant.quantizer == "rtn", "quantizer=waterfill knows tied embeddings alone"),
        (
            hidden is None or hidden.low < 0 or bool(hidden.squash) or model.mlp_activation in ("relu2", "sigmoid"),
            f"act_hidden={model.act_hidden} is for values that are never negative, which mlp_activation="
            f"{model.mlp_activation} does not give",
        ),
        (
            all(site.low < 0 or site.squash for place, site in activations.items() if place != "hidden"),
            "unsignedB is for act_hidden: other activations have negative values",
        ),
    ]
