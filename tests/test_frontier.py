"""The frontier's stack: each technique and the whole network against a plain reference in float64, written from the
published forward pass."""

import math
from dataclasses import replace

import pytest
import torch

from golf.config.config import ConfigError, build_config
from golf.config.model import ModelConfig
from golf.config.training import AverageConfig, OptimConfig, TrainConfig
from golf.model.cache import KeyValueCache
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.model.recurrence import layer_order, run_once, runs_of
from golf.optim.average import ExponentialAverage, averaged_weights
from golf.optim.optimizers import BY_MUON_ITERATION, equal_rows, newton_schulz
from golf.optim.schedule import learning_rate_scale

BOS = 1
PLAIN = ModelConfig(
    vocab_size=64, num_layers=6, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, bigram_vocab_size=0,
    bigram_dim=0, smear_gate=False, resid_mix_init="stream", train_seq_len=16, tied_embed_init_std=0.5,
)  # fmt: skip
TECHNIQUES = {
    "leaky_relu2": dict(mlp_activation="leaky_relu2"),
    "partial_rope": dict(rope_dims=4),
    "norm_by_depth": dict(norm_by_depth=True),
    "exclusive_attention": dict(exclusive_attention=True),
    "key_offset": dict(key_offset=True),
    "attention_gate": dict(attention_gate_dims=12),
    "smear": dict(smear_gate=True, smear_gate_dims=12),
    "skip_gates": dict(skip_gates=True),
    "recurrence": dict(loop_first=1, loop_last=2, loop_repeats=2),
    "lanes": dict(lanes_from=4),
    "documents": dict(document_attention=True),
}
WHOLE = {knob: value for knobs in TECHNIQUES.values() for knob, value in knobs.items()}
TECHNIQUES["late_mix"] = dict(late_mix_hidden=8)  # which knows no lanes
LATE = WHOLE | dict(lanes_from=0, late_mix_hidden=8)


def lively_model(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which every parameter matters: no zero matrices, no identity gates."""
    model, generator = build_model(config, seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_ids(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Rows of three documents."""
    ids_BT = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids_BT[:, 5] = ids_BT[0, 11] = BOS
    return ids_BT


# ---- the reference: lists of vectors, one position, one head at a time ----


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt()


def turn(x_K: torch.Tensor, position: int, dims: int) -> torch.Tensor:
    y_K = x_K.clone()
    for i in range(dims // 2):
        angle = position * 10_000.0 ** (-2 * i / dims)
        a, b = x_K[i], x_K[i + dims // 2]
        y_K[i] = a * math.cos(angle) + b * math.sin(angle)
        y_K[i + dims // 2] = b * math.cos(angle) - a * math.sin(angle)
    return y_K


def offset_key(k: list, s: int, group: slice, ids: list[int], c: ModelConfig) -> torch.Tensor:
    own = rms(k[s][group])
    before = rms(k[s - 1][group]) if c.key_offset and s and ids[s] != BOS else own
    width, pairs = len(own), (c.rope_dims or len(own)) // 2
    slow = [*range(pairs // 2, pairs), *range(pairs + pairs // 2, 2 * pairs)]
    taken = {*slow, *range(2 * pairs + (width - 2 * pairs) // 2, width)}
    return torch.stack([(before if d in taken else own)[d] for d in range(width)])


def attention(p: dict, i: int, n: list, ids: list[int], c: ModelConfig) -> list:
    width, per_group = c.model_dim // c.num_heads, c.num_heads // c.num_kv_heads
    q, k, v = ([p[f"blocks.{i}.attn.{part}.weight"] @ x for x in n] for part in ("c_q", "c_k", "c_v"))
    result = []
    for t in range(len(n)):
        heads = []
        first = max((s for s in range(t + 1) if ids[s] == BOS), default=0) if c.document_attention else 0
        for h in range(c.num_heads):
            own, shared = slice(h * width, (h + 1) * width), h // per_group
            group = slice(shared * width, (shared + 1) * width)
            query = p[f"blocks.{i}.attn.q_gain"][h] * turn(rms(q[t][own]), t, c.rope_dims or width)
            keys = [offset_key(k, s, group, ids, c) for s in range(first, t + 1)]
            keys = [turn(key, s, c.rope_dims or width) for s, key in zip(range(first, t + 1), keys, strict=True)]
            shares = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(width), 0)
            y = sum(share * v[s][group] for share, s in zip(shares, range(first, t + 1), strict=True))
            if c.exclusive_attention:
                u = v[t][group] / v[t][group].norm()
                y = y - (y @ u) * u
            if c.attention_gate_dims:
                y = y * torch.sigmoid(0.5 * p[f"blocks.{i}.attn.gate"][h] @ n[t][: c.attention_gate_dims])
            heads.append(y)
        result.append(p[f"blocks.{i}.attn.proj.weight"] @ torch.cat(heads))
    return result


def mlp(p: dict, i: int, x: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    h = p[f"blocks.{i}.mlp.fc.weight"] @ x
    h = torch.where(h > 0, h, (0.5 if c.mlp_activation == "leaky_relu2" else 0.0) * h).square()
    return p[f"blocks.{i}.mlp.proj.weight"] @ h


def late_weights(p: dict, x: torch.Tensor) -> torch.Tensor:
    h = p["late_mix.inner"] @ rms(x)
    return 0.3 * (p["late_mix.outer"] @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2) + p["late_mix.bias"])


def reference_logits(model: GPT, ids: list[int], looping: bool = True) -> torch.Tensor:
    c = model.config
    p = {name: value.double() for name, value in model.state_dict().items()}
    x = [p["tok_emb.weight"][token] for token in ids]
    if c.smear_gate:
        share = [p["smear.strength"] * torch.sigmoid(p["smear.gate"] @ e[: c.smear_gate_dims]) for e in x]
        x = [e + share[t] * x[t - 1] if t and ids[t] != BOS else e for t, e in enumerate(x)]
    x = [rms(e) for e in x]
    x0, skips, lane = list(x), [], None
    looped = list(range(c.loop_first, c.loop_last + 1)) * c.loop_repeats if looping else []
    order = list(range(c.loop_last + 1)) + looped + list(range(c.loop_last + 1, c.num_layers))

    def normed(vectors: list, i: int) -> list:
        return [rms(e) / math.sqrt(i + 1 if c.norm_by_depth else 1) for e in vectors]

    for place, i in enumerate(order):
        two = c.lanes_from and i >= c.lanes_from
        if two and lane is None:
            lane = list(x)
        if place >= len(order) // 2 and skips:
            j, skip = place - len(order) // 2, skips.pop()
            joined = [p["skip_weights"][j] * e for e in skip]
            if c.skip_gates:
                g = torch.sigmoid(p["skip_gates"][j])
                x = [a + g * (b - a) for a, b in zip(joined, x, strict=True)]
            else:
                x = [a + b for a, b in zip(joined, x, strict=True)]
        mix, block = p[f"blocks.{i}.resid_mix"], f"blocks.{i}."
        u = [mix[0] * a + mix[1] * b for a, b in zip(x, x0, strict=True)]
        late = c.late_mix_hidden and place == len(order) - 1
        w = [late_weights(p, e) if late else torch.zeros(6) for e in x]
        u = [e + w[t][0] * x0[t] + w[t][1] * x[t] for t, e in enumerate(u)]
        attended = [p[block + "attn_scale"] * y for y in attention(p, i, normed(u, i), ids, c)]
        if two:
            f = [p[block + "mlp_scale"] * mlp(p, i, e, c) for e in normed(lane, i)]
            decay, inputs = p[block + "lane_decay"], p[block + "lane_inputs"]
            x, lane = (
                [d * e + to_a * a + to_m * m for e, a, m in zip(stream, attended, f, strict=True)]
                for stream, d, (to_a, to_m) in zip((x, lane), decay, inputs, strict=True)
            )
        else:
            u = [a + (1 + w[t][2]) * b for t, (a, b) in enumerate(zip(u, attended, strict=True))]
            added = [p[block + "mlp_scale"] * mlp(p, i, n, c) for n in normed(u, i)]
            ends = [w[t][4] * x0[t] + w[t][5] * x[t] for t in range(len(x))]
            x = [e + (1 + w[t][3]) * f + end for t, (e, f, end) in enumerate(zip(u, added, ends, strict=True))]
        if place < len(order) // 2:
            skips.append(x)
    if lane is not None:
        x = [(a + b) / 2 for a, b in zip(x, lane, strict=True)]
    return torch.stack([30 * torch.tanh(p["tok_emb.weight"] @ rms(e) / 30) for e in x])


@pytest.mark.parametrize("technique", [*TECHNIQUES, "none"])
def test_each_technique_alone_is_its_formula(technique):
    knobs = TECHNIQUES.get(technique, {})
    model, ids_BT = lively_model(replace(PLAIN, **knobs)), random_ids(1)
    with torch.no_grad():
        found = model.logits(ids_BT)[0].double()
        torch.testing.assert_close(found, reference_logits(model, ids_BT[0].tolist()), atol=1e-4, rtol=1e-4)
        if knobs:  # and it is not what the network does without it
            plain = lively_model(PLAIN)
            own = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
            plain.load_state_dict(own | {"skip_weights": own["skip_weights"][:3]})
            assert (plain.logits(ids_BT)[0] - found).abs().max() > 1e-2


@pytest.mark.parametrize("looping", [True, False])
def test_the_whole_network_is_the_published_forward_pass(looping):
    model, ids_BT = lively_model(replace(PLAIN, **WHOLE)), random_ids()
    model.looping = looping
    with torch.no_grad():
        for row, ids in zip(model.logits(ids_BT), ids_BT.tolist(), strict=True):
            torch.testing.assert_close(row.double(), reference_logits(model, ids, looping), atol=1e-4, rtol=1e-4)


def test_blocks_run_in_the_published_order():
    model = build_config("frontier-base", {}, {}).model
    assert layer_order(model) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layer_order(model, looping=False) == list(range(11))
    names = ("blocks.4.mlp.fc.weight", "blocks.10.mlp.fc.weight", "tok_emb.weight")
    assert [runs_of(name, model) for name in names] == [3, 1, 1]


def test_the_preset_has_the_published_parameters():
    """The published script also keeps the six numbers of two lanes for each of the eight blocks of one stream."""
    with torch.device("meta"):
        model = GPT(build_config("frontier-base", {}, {}).model)
    assert sum(parameter.numel() for parameter in model.parameters()) + 8 * 6 == 35_945_671
    assert model.skip_weights.shape == model.skip_gates.shape == (8, 512)


@pytest.mark.parametrize("knobs", [WHOLE, LATE], ids=["lanes", "late_mix"])
@pytest.mark.parametrize("position", [0, 4, 9, 14])
def test_the_future_leaves_earlier_logits_bit_identical(position, knobs):
    model, ids_BT = lively_model(replace(PLAIN, **knobs)), random_ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, position + 1 :] = random_ids(seed=9)[:, position + 1 :]
    with torch.no_grad():
        before, after = model.logits(ids_BT), model.logits(changed_BT)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.equal(before[:, position + 1 :], after[:, position + 1 :])


@pytest.mark.parametrize("knobs", [WHOLE, LATE], ids=["lanes", "late_mix"])
def test_another_document_leaves_the_logits_bit_identical(knobs):
    model, ids_BT = lively_model(replace(PLAIN, **knobs)), random_ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, :5] = random_ids(seed=9)[:, :5]
    with torch.no_grad():
        before, after = model.logits(ids_BT), model.logits(changed_BT)
    assert torch.equal(before[:, 5:], after[:, 5:]) and not torch.equal(before[:, :5], after[:, :5])


@pytest.mark.parametrize("knobs", [WHOLE, LATE], ids=["lanes", "late_mix"])
def test_losses_of_the_last_positions_are_a_slice_of_all_losses(knobs):
    model, ids_BT, targets_BT = lively_model(replace(PLAIN, **knobs)), random_ids(), random_ids(seed=5)
    with torch.no_grad():
        everything = model.token_losses(ids_BT, targets_BT)
        torch.testing.assert_close(model.token_losses(ids_BT, targets_BT[:, -3:]), everything[:, -3:])


@pytest.mark.parametrize("knobs", [WHOLE, LATE], ids=["lanes", "late_mix"])
def test_a_cache_of_every_run_of_a_block_gives_the_same_logits(knobs):
    model, ids_BT = lively_model(replace(PLAIN, **knobs)), random_ids()
    cache = KeyValueCache(model.config)
    assert len(cache.layers) == 10
    with torch.no_grad():
        whole = model.logits(ids_BT)
        parts = [model.logits(part_BT, cache=cache) for part_BT in ids_BT.split([7, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", [WHOLE, LATE], ids=["lanes", "late_mix"])
def test_gradients_agree_with_finite_differences(monkeypatch, knobs):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # RoPE and logits are fp32, whose steps would show
    model, ids_BT, targets_BT = lively_model(replace(PLAIN, **knobs)), random_ids(), random_ids(seed=5)
    model.double().compute_dtype = torch.float64
    model.keep_rotary(16)
    model.rotary = {key: tuple(part.double() for part in tables) for key, tables in model.rotary.items()}
    model(ids_BT, targets_BT).backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * 1e-5 * direction)
                losses.append(model(ids_BT, targets_BT).item())
            parameter.add_(1e-5 * direction)
        slope = (parameter.grad * direction).sum().item()
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=2e-3, abs=2e-6), name


def test_blocks_run_once_within_the_proofs_context():
    model, ids_BT = lively_model(replace(PLAIN, **WHOLE)), random_ids()
    with torch.no_grad():
        looped = model.logits(ids_BT)
        with run_once(model):
            assert not torch.equal(model.logits(ids_BT), looped)
        assert torch.equal(model.logits(ids_BT), looped)


def test_late_weights_do_nothing_at_first():
    plain, late = (build_model(replace(PLAIN, late_mix_hidden=hidden), 0) for hidden in (0, 8))
    assert late.late_mix.inner.std().item() == pytest.approx(32**-0.5, rel=0.15)
    with torch.no_grad():
        assert torch.equal(plain.logits(random_ids()), late.logits(random_ids()))


def test_outputs_begin_at_zero_where_asked():
    model = build_model(replace(PLAIN, matrix_init="orthogonal_zero"), 0)
    assert not model.blocks[0].attn.proj.weight.any() and not model.blocks[5].mlp.proj.weight.any()
    torch.testing.assert_close(model.blocks[0].attn.c_q.weight @ model.blocks[0].attn.c_q.weight.T, torch.eye(32))


# ---- optimizer, schedule, average ----


def test_polar_express_is_its_iteration_in_float64():
    x_MRC = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_MRC = x_MRC / x_MRC.flatten(1).norm(dim=1)[:, None, None]
    for a, b, c in BY_MUON_ITERATION["polar_express"]:
        gram_MRR = expected_MRC @ expected_MRC.mT
        expected_MRC = a * expected_MRC + (b * gram_MRR + c * gram_MRR @ gram_MRR) @ expected_MRC
    found_MRC = newton_schulz(x_MRC, 5, "polar_express")
    torch.testing.assert_close(found_MRC, expected_MRC, atol=1e-5, rtol=1e-5)
    singular = torch.linalg.svdvals(found_MRC)
    assert 0.8 < singular.min() <= singular.max() < 1.2


def test_rows_of_the_model_get_one_norm_also_where_the_stack_holds_them_as_columns():
    tall, wide = torch.randn(9, 4), torch.randn(4, 9)
    stack_MRC = torch.stack((tall.T, wide))
    normed = equal_rows(stack_MRC, torch.tensor([True, False])[:, None, None])
    torch.testing.assert_close(normed[0].T.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(normed[1].norm(dim=1), torch.ones(4))
    torch.testing.assert_close(normed[0].T, tall / tall.norm(dim=1, keepdim=True))


def test_the_learning_rate_falls_to_its_floor_and_rises_again_after_longer_rows():
    train = TrainConfig(warmdown_fraction=0.85, warmdown_shape="linear", warmdown_floor=0.1)
    assert [learning_rate_scale(share, train) for share in (0.0, 0.15)] == [1.0, 1.0]
    assert learning_rate_scale(0.575, train) == pytest.approx(0.55)
    assert learning_rate_scale(1.0, train) == pytest.approx(0.1)
    grows = replace(train, short_seq_fraction=0.1, middle_seq_fraction=0.7, seq_rewarmup_fraction=0.02)
    assert learning_rate_scale(0.09, grows) == 1.0 and learning_rate_scale(0.1, grows) == 0.0
    assert learning_rate_scale(0.11, grows) == pytest.approx(0.5)
    assert learning_rate_scale(0.71, grows) == pytest.approx(0.5 * learning_rate_scale(0.71, train))
    assert learning_rate_scale(0.73, grows) == learning_rate_scale(0.73, train)


class Counts:
    """Stands in for a feature audit."""

    def __init__(self):
        self.counted, self.verified = [], []

    def count(self, feature, step=None, count=1):
        self.counted.append((feature, step))

    def verify(self, feature, holds, effect):
        self.verified.append((feature, holds))


@pytest.mark.parametrize("blend", [1.0, 0.6])
def test_an_exponential_average_fades_with_the_budget_and_not_with_the_steps(blend):
    config, audit = AverageConfig(swa_enabled=False, ema_fraction=0.1, ema_blend=blend), Counts()
    average, model = ExponentialAverage(config), torch.nn.Linear(3, 2, bias=False)
    expected, before = None, 0.0
    for step, progress in enumerate((0.1, 0.15, 0.4, 0.42, 1.0), start=1):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.observe_step(model, progress, step, audit)
        kept, weight = math.exp((before - progress) / 0.1), model.weight.detach().double()
        expected, before = weight if expected is None else kept * expected + (1 - kept) * weight, progress
    last = {"weight": model.weight.detach()}
    found = averaged_weights(last, average.mean, average.count, config, audit)["weight"]
    torch.testing.assert_close(found.double(), (1 - blend) * last["weight"].double() + blend * expected)
    assert audit.counted == [("ema", step) for step in range(1, 6)] and audit.verified == [("ema", True)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_dims": "5"}, {"rope_dims": "66"}, {"loop_first": "6"}, {"loop_last": "11"}, {"loop_repeats": "0"},
        {"lanes_from": "4"}, {"lanes_from": "11"}, {"smear_gate": "0"}, {"attention_gate_dims": "600"},
        {"ema_blend": "1.5"}, {"swa_enabled": "1"}, {"muon_ns_steps": "6"}, {"middle_seq_len": "1024"},
        {"middle_seq_fraction": "0.05"}, {"loop_start": "1"},
        {"late_mix_hidden": "16"},
    ],
)  # fmt: skip
def test_knobs_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ConfigError):
        build_config("frontier-base", {}, wrong)


def test_the_twin_is_the_same_stack():
    base, twin = (build_config(name, {}, {}) for name in ("frontier-base", "frontier-base-local"))
    for knob in ("mlp_activation", "exclusive_attention", "norm_by_depth", "skip_gates", "loop_repeats"):
        assert getattr(base.model, knob) == getattr(twin.model, knob)
    assert base.optim == twin.optim and OptimConfig().muon_iteration == "quintic"
