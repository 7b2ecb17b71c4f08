"""Over the byte limit: a fixed order of coarsening, as little of it as fits, or an error; never a byte too many."""

from dataclasses import replace

import pytest
import torch

from golf.artifact.container import pack_artifact, read_artifact, same_stored_state, stored_bits
from golf.artifact.description import expected_shapes
from golf.artifact.fill_limit import FitError, FittedArtifact, coarsening_actions, fit_to_limit
from golf.config.config import build_config
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.quant.export import prune_state, quantize_state
from golf.quant.grid import QuantizedTensor, dequantize_state
from golf.quant.tensor_classes import QuantError, tensor_class
from lab.machine.plan import TRAINED_SHARE, forecast_bytes

TOKENIZER = "c0ffee00" * 8
TINY = ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, bigram_vocab_size=40,
    bigram_dim=8, train_seq_len=16,
)  # fmt: skip
QUANT = QuantConfig(codec="zlib")
PRUNING = ["0.05 -> 0.1", "0.1 -> 0.15", "0.15 -> 0.2", "0.2 -> 0.25", "0.25 -> 0.3"]


def gaussian_state(model: ModelConfig = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(model).items()}


def pack(state: dict[str, torch.Tensor], quant: QuantConfig, bits: dict[str, int] | None = None) -> bytes:
    """The artifact without any fitting."""
    stored = quantize_state(prune_state(state, quant, bits)[0], quant, bits)
    return pack_artifact(stored, TINY, TOKENIZER, quant.codec)[0]


def fit(limit: int, reserve: int = 0, quant: QuantConfig = QUANT) -> tuple[FittedArtifact, list[str]]:
    """The fitted artifact, and the log."""
    lines: list[str] = []
    return fit_to_limit(gaussian_state(), quant, TINY, TOKENIZER, limit, reserve, lines.append), lines


def whole_order(quant: QuantConfig = QUANT) -> list[str]:
    return [f"prune_frac {step}" for step in PRUNING] + [a.text for a in coarsening_actions(gaussian_state(), quant)]


@pytest.fixture(scope="module")
def configured() -> bytes:
    return pack(gaussian_state(), QUANT)


@pytest.fixture(scope="module")
def smallest() -> int:
    """Bytes after all actions, by hand."""
    state, quant = gaussian_state(), replace(QUANT, prune_frac=0.30)
    return len(pack(state, quant, {name: 3 for name in state if tensor_class(name, state[name].shape) != "small"}))


def test_exactly_the_limit_passes_untouched(configured):
    fitted, lines = fit(len(configured), reserve=1000)
    assert fitted.data == configured and fitted.actions == lines == []
    assert fitted.sizes.total_bytes == len(configured) and sum(r.codes_changed for r in fitted.prune_reports) > 0


def test_one_byte_over_is_brought_below_limit_and_reserve(configured):
    limit = len(configured) - 1
    fitted, lines = fit(limit)
    assert len(fitted.data) <= limit and fitted.actions == ["prune_frac 0.05 -> 0.1"]
    assert lines[0] == f"fit: over by 1 bytes: {limit + 1:,} of {limit:,}; to fit in {limit:,}"
    assert lines[1] == "fit: prune_frac 0.05 -> 0.1"
    assert lines[2:] == [f"fit: {len(fitted.data):,} bytes by 1 actions, found in 2 packings"]
    reserve = limit - len(fitted.data) + 1
    reserved, _ = fit(limit, reserve)
    assert len(reserved.data) <= limit - reserve and reserved.actions == whole_order()[:2]


def test_actions_are_the_shortest_sufficient_beginning_of_the_order(configured, smallest):
    order, counts = whole_order(), []
    for limit in range(smallest, len(configured), 613):
        fitted, lines = fit(limit)
        count = len(fitted.actions)
        assert len(fitted.data) <= limit and fitted.actions == order[:count]
        assert lines[1:-1] == [f"fit: {action}" for action in fitted.actions]
        assert int(lines[-1].split()[-2]) <= 12, "few packings: one takes seconds at full size"
        assert len(pack_prefix(order[: count - 1])) > limit
        counts.append(count)
    assert len(set(counts)) > 5 and counts == sorted(counts, reverse=True)


def pack_prefix(actions: list[str]) -> bytes:
    """What the log's words say, done by hand."""
    share, bits = QUANT.prune_frac, {}
    for words in map(str.split, actions):
        if words[0] == "prune_frac":
            share = float(words[3])
        else:
            bits[words[0]] = int(words[3])
    return pack(gaussian_state(), replace(QUANT, prune_frac=share), bits)


def test_the_words_of_the_log_tell_the_bytes(configured, smallest):
    fitted, _ = fit((len(configured) + smallest) // 2)
    assert len(fitted.actions) > 6 and pack_prefix(fitted.actions) == fitted.data


def test_twice_the_same_bytes(configured, smallest):
    limit = (len(configured) + 2 * smallest) // 3
    (first, lines), (second, other_lines) = fit(limit, 10), fit(limit, 10)
    assert first.data == second.data and first.actions == second.actions and lines == other_lines


def test_the_impossible_names_the_smallest_that_can_be_reached(smallest):
    assert fit(smallest)[0].data
    for limit, reserve in ((smallest - 1, 0), (smallest, 1), (100, 10_000)):
        with pytest.raises(FitError, match=f"{smallest:,} is the smallest") as caught:
            fit(limit, reserve)
        assert f"can't fit in {limit - reserve:,} bytes" in str(caught.value) and "\n" not in str(caught.value)


def test_mixed_bits_of_one_class_come_back():
    order = whole_order()
    first_of_mlp = next(i for i, action in enumerate(order) if ".mlp." in action)
    fitted, _ = fit(len(pack_prefix(order[: first_of_mlp + 1])))
    artifact = read_artifact(fitted.data)
    assert same_stored_state(artifact.state, fitted.stored)
    bits = [stored_bits(entry) for name, entry in artifact.state.items() if ".mlp." in name]
    assert sorted(bits) == [4, 5, 5, 5]
    streams = [(stream.label, stream.bits) for stream in fitted.sizes.streams]
    assert ("mlp", 4) in streams and ("mlp", 5) in streams


def test_every_mix_of_bits_round_trips():
    generator, state = torch.Generator().manual_seed(7), gaussian_state()
    for _ in range(20):
        bits = {
            name: int(torch.randint(2, 9, (), generator=generator))
            for name, tensor in state.items()
            if tensor_class(name, tensor.shape) != "small"
        }
        stored = quantize_state(state, QUANT, bits)
        assert {name: entry.bits for name, entry in stored.items() if isinstance(entry, QuantizedTensor)} == bits
        data, _ = pack_artifact(stored, TINY, TOKENIZER, "lzma")
        assert same_stored_state(read_artifact(data).state, stored)


def test_order_is_by_error_per_bit_and_stops_at_three_bits():
    state = gaussian_state()
    actions = coarsening_actions(state, QUANT)
    costs = [cost_of(state, action.text) for action in actions]
    assert costs == sorted(costs)
    steps = {name: [a.text.split()[1:4:2] for a in actions if a.tensor == name] for name in state}
    assert steps["tok_emb.weight"] == [["16", "8"], ["8", "7"], ["7", "6"], ["6", "5"], ["5", "4"], ["4", "3"]]
    assert steps["blocks.1.mlp.fc.weight"] == [["5", "4"], ["4", "3"]]
    assert all(not steps[name] for name in state if tensor_class(name, state[name].shape) == "small")
    assert sum(action.saves for action in actions if action.tensor == "tok_emb.weight") == 13 * 64 * 32 / 8


def cost_of(state: dict[str, torch.Tensor], text: str) -> float:
    """Relative squared error that the action adds, per bit of codes that it saves."""
    name, before, _, after, _ = text.split()
    errors = []
    for bits in (int(before), int(after)):
        restored = dequantize_state(quantize_state({name: state[name]}, QUANT, {name: bits}))[name]
        errors.append(((restored.double() - state[name].double()) ** 2).sum() / (state[name].double() ** 2).sum())
    return float((errors[1] - errors[0]) / ((int(before) - int(after)) * state[name].numel()))


def test_a_robust_matrix_goes_first():
    state = gaussian_state()
    generator = torch.Generator().manual_seed(5)
    signs_RC = torch.where(torch.rand(64, 32, generator=generator) < 0.5, -1.0, 1.0)
    state["blocks.1.mlp.fc.weight"] = signs_RC  # +1 and -1: every grid holds them
    first, second = coarsening_actions(state, QUANT)[:2]
    assert (first.text, second.text) == ("blocks.1.mlp.fc.weight 5 -> 4 bits", "blocks.1.mlp.fc.weight 4 -> 3 bits")


def test_weights_of_nothing_but_zeros_can_be_ranked():
    state = gaussian_state() | {"tok_emb.weight": torch.zeros(64, 32)}
    assert all(action.tensor == "tok_emb.weight" for action in coarsening_actions(state, QUANT)[:6])


def test_a_codec_that_gains_nothing_from_fewer_bits_fails(configured):
    quant = replace(QUANT, codec="none", embed_bits=8)
    size = len(pack(gaussian_state(), quant))
    with pytest.raises(FitError, match=f"{size:,} is the smallest"):
        fit(size - 1, quant=quant)


def test_bits_of_a_tensor_that_is_not_there_are_refused():
    with pytest.raises(QuantError, match=r"tensor_bits.*no\.such\.weight"):
        quantize_state(gaussian_state(), QUANT, {"no.such.weight": 4})


@pytest.mark.parametrize("preset", ["local", "baseline-local"])
@pytest.mark.parametrize("codec", ["lzma", "zlib", "zstd", "none"])
def test_forecast_knows_the_bytes_of_gaussian_weights(preset, codec):
    config = build_config(preset, {}, {"codec": codec})
    stored = quantize_state(gaussian_state(config.model, seed=3), config.quant)
    size = len(pack_artifact(stored, config.model, TOKENIZER, codec)[0])
    least, most = forecast_bytes(config.model, config.quant)
    assert 0.99 * TRAINED_SHARE[0] < least / size < 1.01 * TRAINED_SHARE[0]
    assert 0.99 * TRAINED_SHARE[1] < most / size < 1.01 * TRAINED_SHARE[1]


def test_forecast_of_the_leaderboard_model_needs_no_weights_of_its_size():
    config = build_config("leaderboard", {}, {})
    least, most = forecast_bytes(config.model, config.quant)
    assert least < 15_854_739 < most  # 25.5 million Gaussian weights, packed (docs/LOG.md)
    assert most < 1.03 * 15_854_739
