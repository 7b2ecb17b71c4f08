"""Energy estimates: the published study's figures, operations against a model that counts them, and what is skipped."""

from dataclasses import replace

import pytest
import torch

from golf.artifact.description import expected_shapes
from golf.config.config import build_config
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.block import visible_keys
from golf.model.layers import Linear
from golf.quant.export import quantize_state
from golf.quant.qat import quantized_gpt
from golf.quant.tensor_classes import SITE_PATHS
from lab.cost.energy import (
    OPERATION_PICOJOULES,
    EnergyEstimate,
    OperationCount,
    energy_estimate,
    measured_zero_shares,
)
from lab.study.legacy_study import load_study
from tests.stored_fixtures import stored_tensor

WIDTH, HIDDEN, VOCABULARY, ATTENTIONS, MLPS = 768, 3072, 50_304, 10, 11
FORK_MACS = {
    **dict.fromkeys(("q", "k", "v", "o"), ATTENTIONS * WIDTH**2),
    **dict.fromkeys(("up", "down"), MLPS * WIDTH * HIDDEN),
    "head": WIDTH * VOCABULARY,
}
"""The published study's model: its first block has no attention and no MLP, its eighth no attention; gates left out."""
TERNARY_SITES = ("q", "k", "v", "up", "down")
"""What its run of weights alone made ternary: neither the attention's output nor the head."""
PLAIN = QuantConfig(qat_enabled=False, quantizer="rtn", prune_frac=0.0, mlp_bits=16, attn_bits=16, bigram_bits=16)


def fork_estimate(ternary: tuple[str, ...], zero_share: float | None = None) -> EnergyEstimate:
    counts = [
        OperationCount(site, macs, "ternary", "signs", "fp16", "fp16", zero_share)
        if site in ternary
        else OperationCount(site, macs, "fp16", "fp16", "fp16", "fp16")
        for site, macs in FORK_MACS.items()
    ]
    return EnergyEstimate(tuple(counts), "fp16", ())


def test_the_study_s_own_model_costs_what_was_worked_out_for_it():
    """57.1 uJ a token in fp16; 33.4 with q, k, v and the MLP ternary; 29.9 with 31 % of their codes skipped."""
    assert sum(FORK_MACS[site] for site in TERNARY_SITES) == 69_599_232
    baseline, ternary = fork_estimate(()), fork_estimate(TERNARY_SITES, 0.31)
    assert round(baseline.microjoules("7nm"), 1) == round(ternary.float_microjoules("7nm"), 1) == 57.1
    assert round(ternary.microjoules("7nm"), 1) == 33.4
    assert round(ternary.microjoules("7nm", zero_skip=True), 1) == 29.9
    assert round(baseline.microjoules() / ternary.microjoules(), 2) == 1.71
    assert round(baseline.microjoules() / ternary.microjoules(zero_skip=True), 2) == 1.91
    assert ternary.head_share() == pytest.approx(38_633_472 * 0.5e-6 / ternary.microjoules())


@pytest.mark.parametrize(
    ("weight", "activation", "arithmetic", "multiplies"),
    [
        ("fp16", "fp16", "fp16", True), ("fp32", "fp32", "fp32", True), ("int8", "fp16", "fp16", True),
        ("signs", "fp16", "fp16", False), ("signs", "fp32", "fp32", False), ("fp16", "signs", "fp16", False),
        ("int8", "int8", "int8", True), ("signs", "int8", "int8", False), ("int8", "signs", "int8", False),
        ("signs", "signs", "int8", False),
    ],
)  # fmt: skip
def test_arithmetic_follows_from_both_operands(weight, activation, arithmetic, multiplies):
    count = OperationCount("q", 1e6, weight, weight, activation, activation)
    assert (count.arithmetic, count.multiplies) == (arithmetic, multiplies)
    for process, table in OPERATION_PICOJOULES.items():
        add, multiply = table[arithmetic]
        assert count.microjoules(process) == pytest.approx(add + multiply * multiplies)


def estimate_of(*overrides: str, **arguments) -> EnergyEstimate:
    knobs = dict(pair.split("=") for pair in ("quantizer=rtn", "prune_frac=0", *overrides))
    config = build_config("local", {}, {"qat_enabled": "0", "embed_bits": "16"} | knobs)
    return energy_estimate(config.model, config.quant, **arguments)


def kinds_of(estimate: EnergyEstimate) -> dict[str, tuple[str, str, str]]:
    return {site.site: (site.weight, site.activation, site.arithmetic) for site in estimate.sites}


def test_sites_take_their_operands_from_the_knobs():
    estimate = estimate_of(
        "qat_enabled=1", "weight_q=ternary", "weight_k=binary", "weight_up=int4", "weight_embed=ternary-row",
        "act_attn_in=int8", "act_hidden=unsigned8-fork", "act_q=tanh-ternary-fork", "act_k=int4", "attn_bits=16",
    )  # fmt: skip
    assert kinds_of(estimate) == {
        "q": ("ternary", "int8", "int8"), "k": ("binary", "int8", "int8"), "v": ("fp16", "int8", "fp16"),
        "o": ("fp16", "fp16", "fp16"), "up": ("int4", "fp16", "fp16"), "down": ("grid5", "unsigned8-fork", "int8"),
        "bigram": ("grid6", "fp16", "fp16"), "embed": ("ternary-row", "fp16", "fp16"),
        "head": ("ternary-row", "fp16", "fp16"), "scores": ("tanh-ternary-fork", "int4", "int8"),
        "values": ("fp16", "fp16", "fp16"),
    }  # fmt: skip
    multiplying = {site.site for site in estimate.sites if site.macs and site.multiplies}
    assert multiplying == {"v", "o", "up", "down", "bigram", "values"}


def test_a_grid_of_two_bits_is_one_of_signs_and_a_head_of_its_own_has_its_own_grid():
    estimate = estimate_of(
        "tie_embeddings=0", "qat_enabled=1", "weight_head=ternary", "weight_down=int2", "mlp_bits=2", "embed_bits=8"
    )
    sites = {site.site: site for site in estimate.sites}
    assert (sites["up"].weight, sites["up"].multiplies) == ("grid2", False)
    assert (sites["down"].weight, sites["down"].multiplies) == ("int2", False)
    assert (sites["head"].weight, sites["embed"].weight) == ("ternary", "grid8")


def test_weights_of_a_fit_and_matrices_too_small_for_a_grid_are_floats():
    config = build_config("local", {}, {})
    sites = {site.site: site for site in energy_estimate(config.model, config.quant).sites}
    assert config.quant.quantizer == "waterfill" and {sites[s].weight for s in ("q", "down", "head", "bigram")} == {
        "waterfill"
    }
    assert all(site.arithmetic == "fp16" for site in sites.values())
    tiny = replace(config.model, model_dim=8, num_heads=2, num_kv_heads=1, bigram_vocab_size=0, mlp_mult=4.0)
    sites = {site.site: site for site in energy_estimate(tiny, QuantConfig()).sites}
    assert (sites["q"].weight, sites["up"].weight, "bigram" in sites) == ("fp16", "grid5", False)


SHAPES = [
    ModelConfig(vocab_size=90, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, bigram_vocab_size=32,
                bigram_dim=8, mlp_mult=2.5, train_seq_len=12),
    ModelConfig(vocab_size=50, num_layers=2, model_dim=24, num_heads=2, num_kv_heads=2, bigram_vocab_size=0,
                tie_embeddings=False, train_seq_len=10, attention_window=4, knowledge_tokens=3, knowledge_at="layers"),
]  # fmt: skip


@pytest.mark.parametrize("model", SHAPES, ids=["grouped", "window"])
def test_operations_are_those_that_a_model_does(model):
    """Every Linear of a real forward pass counts the products that it makes; visible keys are counted one by one."""
    torch.manual_seed(0)
    gpt, done = quantized_gpt(model), {}
    for name, module in gpt.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: done.update({name: output.numel() * inputs[0].size(-1)})
            )
    time, read = model.train_seq_len, model.train_seq_len + model.knowledge_tokens
    gpt.logits(torch.randint(2, 50, (1, time)))
    estimate = energy_estimate(model, PLAIN)
    macs = {site.site: site.macs for site in estimate.sites}
    for path, site in {path: site for path, site in SITE_PATHS.items() if "." in path}.items():
        first = {name: count for name, count in done.items() if name.endswith(path)}
        # the last block answers for the text alone; keys and values of knowledge tokens are read in each
        positions = {name: read if site in "kv" or name.split(".")[1] != f"{model.num_layers - 1}" else time
                     for name in first}  # fmt: skip
        assert macs[site] == pytest.approx(sum(first[name] / positions[name] for name in first))
    if model.bigram_vocab_size:
        assert macs["bigram"] == done["bigram.proj"] / time
    assert macs["head"] == model.vocab_size * model.model_dim and macs["embed"] == 0
    seen = visible_keys(time, read, model.knowledge_tokens, model.attention_window, torch.device("cpu")).sum()
    expected = float(seen) / time * model.model_dim * model.num_layers
    assert macs["scores"] == macs["values"] == pytest.approx(expected)


def test_a_longer_context_costs_attention_alone():
    model = SHAPES[0]
    short, long = (energy_estimate(model, PLAIN, context=context) for context in (12, 120))
    assert short.microjoules() == long.microjoules()
    assert long.attention_microjoules() / short.attention_microjoules() == pytest.approx(121 / 13)


def test_zeros_are_counted_in_stored_codes_and_skipped_where_they_were():
    config = build_config("local", {}, load_study("quant_weights"))
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config.model).items()}
    stored = quantize_state(state, config.quant)
    shares = measured_zero_shares(stored)
    assert shares.keys() == set(TERNARY_SITES)
    fc = [entry.codes_RC for name, entry in stored.items() if name.endswith("mlp.fc.weight")]
    assert shares["up"] == sum(int((codes == 0).sum()) for codes in fc) / sum(codes.numel() for codes in fc)
    assert all(abs(share - 0.31) < 0.01 for share in shares.values())  # Gaussian weights, threshold at half the mean
    plain, measured = (energy_estimate(config.model, config.quant, zeros) for zeros in (None, shares))
    assert plain.microjoules() == measured.microjoules() and not plain.measured
    assert plain.microjoules(zero_skip=True) == plain.microjoules()
    saved = measured.microjoules() - measured.microjoules(zero_skip=True)
    sites = {site.site: site for site in measured.sites}
    assert saved == pytest.approx(sum(0.16e-6 * sites[site].macs * shares[site] for site in TERNARY_SITES))
    assert sites["q"].additions(zero_skip=True) == pytest.approx(sites["q"].macs * (1 - shares["q"]))


def test_codes_that_stand_for_zero():
    plain = stored_tensor((8, 40), 2)
    zeros = int((plain.codes_RC == 0).sum())
    assert measured_zero_shares({"head.weight": plain}) == {"head": zeros / 320} and zeros > 0
    shifted = stored_tensor((8, 40), 2, zeros=True, groups=4)
    columns = shifted.zero_SG.repeat_interleave(10, dim=1)
    expected = int((shifted.codes_RC == columns).sum()) / 320
    assert measured_zero_shares({"head.weight": shifted}) == {"head": expected}
    for unknown in {"trellis": True}, {"rank": 2}:
        assert measured_zero_shares({"head.weight": stored_tensor((8, 40), 2, **unknown)}) == {"head": 0}
    halves = {"blocks.0.attn.c_q.weight": plain, "blocks.1.attn.c_q.weight": torch.zeros(8, 40).half()}
    assert measured_zero_shares(halves) == {"q": zeros / 640}
    assert measured_zero_shares({"tok_emb.weight": plain}) == {"embed": zeros / 320, "head": zeros / 320}


def test_all_signs_and_all_zeros_cost_nothing():
    estimate = fork_estimate(tuple(FORK_MACS), 1.0)
    assert estimate.microjoules(zero_skip=True) == 0 < estimate.microjoules()


@pytest.mark.parametrize(
    ("overrides", "said", "unsaid"),
    [
        ((), ("memory traffic", "fp16 0.16 and 0.34", "are not in the total", "no such energy was measured"),
         ("zeros skipped", "twosided8", "quantizer=waterfill", "knowledge")),
        (("act_attn_in=twosided8",), ("twosided8: positive", "codes count as int8"), ("zeros skipped",)),
        (("knowledge_tokens=4",), ("knowledge tokens are visible keys",), ()),
    ],
)  # fmt: skip
def test_assumptions_are_printed_with_the_figures(overrides, said, unsaid):
    estimate = estimate_of(*overrides)
    text = "\n".join(estimate.summary())
    assert text.startswith("7nm: ") and "\n45nm: " in text and "(estimate)" in text and "the head is " in text
    assert all(words in text for words in said) and not any(words in text for words in unsaid), text


def test_skipped_zeros_and_a_fit_are_told():
    config = build_config("local", {}, {})
    assert any("quantizer=waterfill" in line for line in energy_estimate(config.model, config.quant).summary())
    text = "\n".join(estimate_of("qat_enabled=1", "weight_q=ternary", zero_shares={"q": 0.4}).summary())
    assert "with zeros skipped" in text and "zeros skipped: without" in text
