"""A grid is described by one value and one short text, and what is no grid is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.quant.tensor_classes import QuantError
from lab.rates.grids import NAIVE_INT8, RULE_TEXTS, QuantSpec, parse_quantizer


@pytest.mark.parametrize(
    ("text", "method", "spec"),
    [
        ("rtn8", "rtn", NAIVE_INT8),
        ("gptq4-g64", "gptq", QuantSpec(4, "group", 64)),
        ("gptq6-sd12.85", "gptq", QuantSpec(6, scale_rule="std", parameter=12.85)),
        ("rtn3-tensor-zp-mse", "rtn", QuantSpec(3, "tensor", symmetric=False, scale_rule="mse")),
        ("rtn2-absmean", "rtn", QuantSpec(2, scale_rule="absmean")),
        ("gptq5-g32-zp-pct99.5", "gptq", QuantSpec(5, "group", 32, False, "percentile", 99.5)),
    ],
)
def test_a_text_is_a_method_and_a_grid(text, method, spec):
    assert parse_quantizer(text) == (method, spec)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    granularity = draw(st.sampled_from(["tensor", "row", "group"]))
    rule, bits, symmetric = draw(st.sampled_from(["absmax", "percentile", "mse", "std", "absmean"])), 8, True
    if rule != "absmean":
        bits, symmetric = draw(st.integers(1, 8)), draw(st.booleans())
    parameter = None
    if rule not in ("absmax", "mse") and draw(st.booleans()):
        parameter = draw(st.integers(5001, 10_000)) / 100
    size = draw(st.integers(1, 999)) if granularity == "group" else 0
    return QuantSpec(min(bits, 2) if rule == "absmean" else bits, granularity, size, symmetric, rule, parameter)


def quantizer_text(method: str, spec: QuantSpec) -> str:
    """The shortest text of a grid, by the rules that parse_quantizer's docstring names."""
    size = {"row": "", "tensor": "-tensor", "group": f"-g{spec.group_size}"}[spec.granularity]
    rule = "" if spec.scale_rule == "absmax" else f"-{RULE_TEXTS[spec.scale_rule]}"
    parameter = "" if spec.parameter is None else f"{spec.parameter:f}".rstrip("0").rstrip(".")
    return f"{method}{spec.bits}{size}{'' if spec.symmetric else '-zp'}{rule}{parameter}"


@given(specs(), st.sampled_from(["rtn", "gptq"]))
@settings(max_examples=200, deadline=None)
def test_every_grid_has_a_text(spec, method):
    assert parse_quantizer(quantizer_text(method, spec)) == (method, spec)


@pytest.mark.parametrize(
    "text",
    ["", "rtn", "8", "awq4", "rtn9", "rtn0", "rtn4-g0", "rtn4-h64", "rtn4-mse3", "rtn4-absmean", "rtn4-pct101",
     "rtn4-pct50", "rtn4-sd0", "rtn1-zp-absmean", "rtn4-", "rtn4-g64-tensor", "RTN4", "rtn4 "],
)  # fmt: skip
def test_a_text_that_says_nothing_is_refused(text):
    with pytest.raises(QuantError):
        parse_quantizer(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"bits": 9}, "bits are 1 to 8"),
        ({"bits": 4, "granularity": "column"}, "granularity is"),
        ({"bits": 4, "granularity": "group"}, "group_size 0"),
        ({"bits": 4, "group_size": 64}, "group_size 64"),
        ({"bits": 4, "scale_rule": "max"}, "scale rule is one of"),
        ({"bits": 4, "parameter": 2.0}, "has no parameter"),
        ({"bits": 4, "scale_rule": "std", "parameter": float("nan")}, "no parameter of"),
        ({"bits": 3, "scale_rule": "absmean"}, "1 and 2 bits"),
    ],
)
def test_what_is_no_grid_is_refused_by_name(arguments, complaint):
    with pytest.raises(QuantError, match=complaint):
        QuantSpec(**arguments)
