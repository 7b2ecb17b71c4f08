"""What a grid is: bits, granularity, symmetry and the rule that chooses its steps, as a value and as a short text."""

import re
from dataclasses import dataclass

from golf.quant.tensor_classes import QuantError

SCALE_RULES = {"absmax": 1.0, "percentile": 99.9, "mse": 1.0, "std": 3.0, "absmean": 1.0}
"""Rules for the step, and the parameter that each has when none is given."""
RULE_TEXTS = {"absmax": "absmax", "percentile": "pct", "mse": "mse", "std": "sd", "absmean": "absmean"}
QUANTIZER_METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantSpec:
    """A grid of 2^bits - 1 codes around 0, or with a zero point of 2^bits codes from 0 on (1 bit: -1 and 1).

    Raises QuantError for what is no grid.
    """

    bits: int
    """1 to 8. Symmetric: 1 is binary {-1, 1}, 2 is ternary {-1, 0, 1}, b is -(2^(b-1) - 1) .. 2^(b-1) - 1."""
    granularity: str = "row"
    """What shares a step: tensor, row, or group (of neighbouring columns of a row)."""
    group_size: int = 0
    """Most columns of a group; groups of a row are as equal as stored.group_width makes them."""
    symmetric: bool = True
    """False: each step comes with the code that stands for 0, itself a code of the grid."""
    scale_rule: str = "absmax"
    """absmax: the largest magnitude gets the largest code; percentile: that of all magnitudes; mse: the shrunk absmax
    range of least squared error; std: k standard deviations get the largest code (the field's SDClip); absmean: a
    multiple of the mean magnitude (ternary: BitNet b1.58, arXiv 2402.17764; binary: XNOR-Net, arXiv 1603.05279)."""
    parameter: float | None = None
    """percentile: 50 < p <= 100; std: k; absmean: the multiple; absmax and mse have none. None: SCALE_RULES."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise QuantError(f"bits are 1 to 8, not {self.bits}")
        if self.granularity not in ("tensor", "row", "group"):
            raise QuantError(f"granularity is tensor, row or group, not {self.granularity!r}")
        if (self.group_size > 0) != (self.granularity == "group"):
            raise QuantError(f"granularity {self.granularity!r} and group_size {self.group_size} do not fit together")
        if self.scale_rule not in SCALE_RULES:
            raise QuantError(f"scale rule is one of {', '.join(SCALE_RULES)}, not {self.scale_rule!r}")
        self.check_parameter()

    def check_parameter(self) -> None:
        rule, value = self.scale_rule, self.rule_parameter
        if rule in ("absmax", "mse") and self.parameter is not None:
            raise QuantError(f"scale rule {rule!r} has no parameter, {self.parameter:g} was given")
        if not (50 < value <= 100 if rule == "percentile" else 0 < value < 1e4):
            raise QuantError(f"{value:g} is no parameter of scale rule {rule!r}")
        if rule == "absmean" and (self.bits > 2 or not self.symmetric):
            raise QuantError("scale rule 'absmean' is for symmetric grids of 1 and 2 bits")

    @property
    def rule_parameter(self) -> float:
        return SCALE_RULES[self.scale_rule] if self.parameter is None else self.parameter


NAIVE_INT8 = QuantSpec(8)
"""The small-GPT study's naive quantizer: int8, per row, symmetric, max/127 (its zero rows are 0/0, ours are zero)."""

METHOD_PATTERN = re.compile(
    r"(?P<method>[a-z]+)(?P<bits>\d+)(?:-(?P<tensor>tensor)|-g(?P<group>\d+))?(?P<zero>-zp)?"
    rf"(?:-(?P<rule>{'|'.join(RULE_TEXTS.values())})(?P<parameter>\d+(?:\.\d+)?)?)?"
)


def parse_quantizer(text: str) -> tuple[str, QuantSpec]:
    """Method and grid of METHOD BITS [-tensor | -gN] [-zp] [-RULE[PARAMETER]], such as rtn8, gptq4-g64, rtn3-zp-mse.

    Rules: absmax (the default), pctP, mse, sdK (gptq6-sd12.85), absmeanM. Raises QuantError.
    """
    match = METHOD_PATTERN.fullmatch(text)
    if match is None or match["method"] not in QUANTIZER_METHODS:
        raise QuantError(
            f"no quantizer {text!r}: rtn or gptq, bits, then -tensor or -gN, -zp, and one of -absmax -pct99.9 -mse "
            "-sd3 -absmean, such as gptq4-g64 or rtn3-zp-mse"
        )
    rules = {short: rule for rule, short in RULE_TEXTS.items()}
    spec = QuantSpec(
        bits=int(match["bits"]),
        granularity="tensor" if match["tensor"] else "group" if match["group"] else "row",
        group_size=int(match["group"] or 0),
        symmetric=not match["zero"],
        scale_rule=rules[match["rule"] or "absmax"],
        parameter=None if match["parameter"] is None else float(match["parameter"]),
    )
    return match["method"], spec


def quantizer_text(method: str, spec: QuantSpec) -> str:
    """The shortest text that parse_quantizer reads as `method` and `spec`."""
    parts = [f"{method}{spec.bits}"]
    if spec.granularity != "row":
        parts.append("tensor" if spec.granularity == "tensor" else f"g{spec.group_size}")
    if not spec.symmetric:
        parts.append("zp")
    if spec.scale_rule != "absmax":
        parts.append(
            RULE_TEXTS[spec.scale_rule]
            + ("" if spec.parameter is None else f"{spec.parameter:f}".rstrip("0").rstrip("."))
        )
    return "-".join(parts)
