"""Knowledge tokens and windows: every query sees the tokens, none is scored, and what is too far back is unseen."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.artifact.container import pack_artifact
from golf.artifact.description import expected_shapes
from golf.config.config import build_config
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.block import visible_keys
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.optim.optimizers import parameters_of_group
from golf.quant.export import quantize_state
from tests.test_low_bit_training import FLOAT, trained

torch.set_num_threads(1)
BASE = ModelConfig(
    vocab_size=64, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, bigram_vocab_size=97, bigram_dim=8,
    train_seq_len=32, tied_embed_init_std=0.5, knowledge_tokens=3,
)  # fmt: skip
PLACES = ("input", "layers")


def lively_gpt(config: ModelConfig) -> GPT:
    model, generator = build_model(config, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_rows(seed: int = 0, length: int = 20) -> torch.Tensor:
    return torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(1, 9), st.integers(0, 6), st.integers(0, 3), st.integers(0, 6),
    st.lists(st.booleans(), min_size=18, max_size=18), st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_what_is_visible_by_brute_force(queries, past, pinned, window, starts, documents):
    keys = queries + past + pinned
    document_BU = torch.tensor([starts[:keys]]).cumsum(1) if documents else None
    seen = visible_keys(queries, keys, pinned, window, torch.device("cpu"), document_BU)
    seen = seen[0, 0] if documents else seen
    for s in range(queries):
        for u in range(keys):
            own = keys - queries + s
            near = (not window or own - u < window) and (not documents or document_BU[0, own] == document_BU[0, u])
            assert bool(seen[s, u]) == (u <= own and (near or u < pinned)), (s, u)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, {"attention_window": 2}, {"document_attention": True}])
def test_every_query_sees_every_knowledge_token(place, options):
    model, ids_BT = lively_gpt(replace(BASE, knowledge_at=place, **options)), some_rows()
    ids_BT[:, [0, 7, 8]] = BASE.bos_id
    logits_BTV = model.logits(ids_BT)
    assert logits_BTV.shape == (2, 20, 64)
    for t in (0, 1, 8, 19):
        gradient = torch.autograd.grad(logits_BTV[0, t].square().sum(), model.knowledge, retain_graph=True)[0]
        assert (gradient.abs().amax(-1) > 0).all(), f"position {t}"


@pytest.mark.parametrize("place", PLACES)
def test_the_text_stays_causal_and_a_shorter_tail_is_the_same(place):
    model, ids_BT = lively_gpt(replace(BASE, knowledge_at=place)), some_rows()
    changed_BT = ids_BT.clone()
    changed_BT[:, 12:] = some_rows(5)[:, 12:]
    with torch.no_grad():
        full = model.logits(ids_BT)
        assert torch.equal(full[:, :12], model.logits(changed_BT)[:, :12])
        torch.testing.assert_close(full[:, -4:], model.logits(ids_BT, last=4), rtol=1e-5, atol=1e-5)


def test_knowledge_tokens_have_no_position_and_no_order():
    """Anew before every block they are keys and values alone, which attention takes in any order; RoPE would tell."""
    model, ids_BT = lively_gpt(replace(BASE, knowledge_at="layers")), some_rows()
    with torch.no_grad():
        before = model.logits(ids_BT)
        model.knowledge.copy_(model.knowledge[:, [2, 0, 1]].clone())
        torch.testing.assert_close(model.logits(ids_BT), before, rtol=1e-4, atol=1e-4)
        model.knowledge.neg_()
        assert (model.logits(ids_BT) - before).abs().max() > 1e-2


def test_a_window_ends_where_it_says():
    """One query sees W positions through a block; through two blocks, 2 (W - 1) before its own."""
    config = replace(BASE, num_layers=2, bigram_vocab_size=0, smear_gate=False, attention_window=4, knowledge_tokens=0)
    model, ids_BT = lively_gpt(config), some_rows()
    with torch.no_grad():
        before = model.logits(ids_BT)[:, -1]
        for t in range(20):
            changed_BT = ids_BT.clone()
            changed_BT[:, t] = (ids_BT[:, t] - 2 + 7) % 62 + 2
            assert torch.equal(model.logits(changed_BT)[:, -1], before) == (t < 19 - 6), t


@pytest.mark.parametrize("place", PLACES)
def test_they_are_counted_in_parameters_and_bytes(place):
    config = replace(BASE, knowledge_at=place)
    model, without = build_model(config, 0), build_model(replace(BASE, knowledge_tokens=0), 0)
    extra = 3 * 32 * (3 if place == "layers" else 1)
    count = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, without)]
    assert count[0] - count[1] == extra
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_shapes(config) == shapes
    sizes = []
    for one in (model, without):
        stored = quantize_state(one.state_dict(), QuantConfig())
        data, _ = pack_artifact(stored, one.config, "0" * 64, "none")
        sizes.append(len(data))
    assert sizes[0] - sizes[1] >= 2 * extra


def test_a_model_with_the_same_parameters_elsewhere_is_the_control():
    """M vectors of width D are as many parameters as M / (2 L) more hidden values in each of L MLPs."""
    base = build_config("stories", {}, FLOAT | dict(vocab_size="64", knowledge_tokens="12")).model
    wider = replace(base, knowledge_tokens=0, mlp_mult=(4 * 192 + 1) / 192)
    counts = [sum(parameter.numel() for parameter in GPT(config).parameters()) for config in (base, wider)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_tokens_stay_what_they_were(frozen, tmp_path):
    knobs = FLOAT | {"knowledge_tokens": "3", "knowledge_frozen": str(int(frozen))}
    trainer = trained(tmp_path, knobs)
    drawn = build_model(trainer.config.model, 0).knowledge
    assert torch.equal(trainer.model.knowledge, drawn) == frozen
    vectors = parameters_of_group(trainer.model, "vector")
    assert any(parameter is trainer.model.knowledge for parameter in vectors) != frozen
