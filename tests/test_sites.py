"""The text that names a site's quantizer: what it says, what it refuses, and which configurations fit together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf.config.config import Config, build_config
from golf.config.knobs import ConfigError
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import ACTIVATION_SITES, WEIGHT_SITES, SiteError, parse_site, weight_sites

PLAIN = dict(qat_enabled="1", quantizer="rtn", prune_frac="0", mlp_bits="16", attn_bits="16", embed_bits="16")
KINDS = ["binary", "ternary", *(f"int{bits}" for bits in range(2, 9))]


@pytest.mark.parametrize(
    "text, activation, low, high, bits, granularity, scale, gradient",
    [
        ("ternary", False, -1, 1, 2, "tensor", "absmean", "ste"),
        ("binary", False, -1, 1, 1, "tensor", "absmean", "ste"),
        ("int2", False, -1, 1, 2, "row", "absmax", "ste"),
        ("int8", False, -127, 127, 8, "row", "absmax", "ste"),
        ("ternary-row-leastsq-t0.7-dge5-attached", False, -1, 1, 2, "row", "leastsq", "dge"),
        ("ternary-qkvo-fork-attached", False, -1, 1, 2, "qkvo", "absmean", "fork"),
        ("ternary-g64-absmax", False, -1, 1, 2, "group", "absmax", "ste"),
        ("int4", True, -7, 7, 4, "row", "absmax", "ste"),
        ("ternary", True, -1, 1, 2, "row", "absmean", "ste"),
        ("unsigned8-fork-attached", True, 0, 255, 8, "row", "absmax", "fork"),
        ("twosided8", True, -127, 127, 8, "row", "twosided", "ste"),
        ("tanh-ternary-fork", True, -1, 1, 2, "row", "unit", "fork"),
        ("sigmoid-binary", True, 0, 1, 1, "row", "unit", "ste"),
        ("unit-int8", True, -127, 127, 8, "row", "unit", "ste"),
    ],
)
def test_a_text_says_all_of_a_quantizer(text, activation, low, high, bits, granularity, scale, gradient):
    site = parse_site(text, activation)
    assert (site.low, site.high, site.bits, site.granularity) == (low, high, bits, granularity)
    assert (site.scale, site.gradient, site.text) == (scale, gradient, text)
    assert site.attached == text.endswith("attached") and site.threshold == (0.7 if "t0.7" in text else 0.5)


def test_options_of_the_estimator_are_read():
    assert (parse_site("int4-dge8", True).power, parse_site("int4-dge8", True).largest_slope) == (8, 3.0)
    assert parse_site("int4-dge3c1.5", True).largest_slope == 1.5
    assert parse_site("ternary-g64", False).group_size == 64
    assert parse_site("", True) is None


@pytest.mark.parametrize(
    "text, activation, complaint",
    [
        ("trenary", False, "names no quantizer"),
        ("int9", False, "names no quantizer"),
        ("ternary-g0", False, "names no quantizer"),
        ("ternary-dge1", False, "names no quantizer"),
        ("ternary-dge5-row", False, "names no quantizer"),
        ("int8-g" + "1" * 5000, False, "names no quantizer"),
        ("ternary-g\u0661", False, "names no quantizer"),
        ("ternary-t0.0", False, "a threshold is above 0"),
        ("ternary-dge5c0", False, "cut off at 0"),
        ("tanh-ternary", False, "activations alone"),
        ("unsigned8", False, "activations alone"),
        ("twosided8", False, "activations alone"),
        ("int8-tensor", True, "leave the granularity out"),
        ("int8-qkvo", False, "qkvo is for"),
        ("ternary-qkvo-leastsq", False, "absmean"),
        ("sigmoid-ternary", True, "goes with binary"),
        ("unit-binary", True, "goes with ternary"),
        ("tanh-ternary-absmax", True, "step is fixed"),
        ("twosided8-absmax", True, "step is fixed"),
        ("int8-absmean", False, "absmean and leastsq"),
        ("int8-t0.7", False, "a threshold is for ternary"),
        ("ternary-absmax-t0.7", False, "a threshold goes with"),
        ("binary-fork", False, "not defined for binary"),
        ("tanh-ternary-attached", True, "fixed step has no gradient"),
    ],
)
def test_a_text_that_contradicts_itself_is_refused(text, activation, complaint):
    with pytest.raises(SiteError, match=complaint):
        parse_site(text, activation)


@given(st.text(alphabet="abdefgiklmnoqrstuxy0123456789-.", max_size=24), st.booleans())
def test_any_other_text_is_refused_and_never_taken_for_another(text, activation):
    try:
        site = parse_site(text, activation)
    except SiteError:
        return
    assert site is None if not text else site.text == text


def test_every_site_is_switched_alone():
    for site in WEIGHT_SITES:
        quant = QuantConfig(**{f"weight_{site}": "ternary"})
        assert list(weight_sites(quant)) == [site]
        tie = {"tie_embeddings": "0"} if site == "head" else {}
        assert build_config("stories", {}, PLAIN | tie | {f"weight_{site}": "int4"})
    for site in ACTIVATION_SITES:
        config = build_config("stories", {}, {f"act_{site}": "int8"})
        assert getattr(config.model, f"act_{site}") == "int8" and config != Config()


@pytest.mark.parametrize(
    "knobs, complaint",
    [
        (dict(weight_q="ternary", qat_enabled="0"), "qat_enabled=1"),
        (dict(), "qat_enabled=1 has nothing to act on"),
        (dict(weight_q="ternary", prune_frac="0.05"), "prune_frac=0"),
        (dict(weight_q="ternary", quantizer="waterfill"), "quantizer=rtn"),
        (dict(weight_head="ternary"), "tie_embeddings=0"),
        (dict(weight_up="ternary-qkvo"), "attention"),
        (dict(weight_q="int4", act_hidden="unsigned8", mlp_activation="tanh"), "never negative"),
        (dict(weight_q="int4", act_q="unsigned8"), "negative"),
        (dict(weight_q="int4", knowledge_at="layers"), "knowledge_tokens"),
        (dict(weight_q="int4", knowledge_frozen="1"), "knowledge_tokens"),
        (dict(weight_q="int77"), "names no quantizer"),
        (dict(mlp_bits="12", weight_q="int4"), "2 to 8, or 16"),
        (dict(weight_q="int4", attention_window="256"), "hides nothing"),
    ],
)
def test_what_would_do_nothing_is_refused(knobs, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build_config("stories", {}, PLAIN | knobs)
