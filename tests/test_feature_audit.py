"""The audit: what is switched on must act and prove its effect, or the run is invalid."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from golf.config.config import Config, build_config
from golf.config.features import features_on
from golf.data.loader import TokenStream
from golf.data.shards import write_shard
from golf.model.init import build_model
from golf.run.checkpoint import final_weights
from golf.run.feature_audit import FeatureAudit
from golf.run.result import run_findings
from golf.run.trainer import Trainer
from golf.runtime import Runtime
from lab.cli import import_rooms

TINY = dict(
    vocab_size="64", model_dim="32", bigram_vocab_size="64", bigram_dim="8", train_seq_len="16", iterations="12",
    max_wallclock_seconds="0", train_batch_tokens="128", micro_batch_tokens="128", warmup_steps="1", threads="1",
    eval_seq_len="32", eval_stride="8", swa_start="0.5", compile="off",
    quantizer="rtn", qat_enabled="1", prune_frac="0.05", codec="zstd", mixture="0", adapter_rank="0",
)  # fmt: skip
import_rooms()
SWITCHES = {
    "warmdown": ["warmdown_fraction=0"],
    "muon_momentum_warmup": ["muon_momentum_warmup_fraction=0", "muon_momentum_start=0.99"],
    "grad_clip": ["grad_clip_norm=0"],
    "qat": ["qat_enabled=0"],
    "swa": ["swa_enabled=0"],
    "smear_gate": ["smear_gate=0"],
    "bigram_hash": ["bigram_vocab_size=0"],
    "holdout": ["holdout_every=0"],
    "prune": ["prune_frac=0"],
    "ntk_rope": ["eval_rope=none"],
}
"""Every feature with the knobs that switch it off in the leaderboard preset, which switches all of them on."""


def tiny_config(**overrides: str) -> Config:
    return build_config("local", {}, TINY | overrides)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> TokenStream:
    path = tmp_path_factory.mktemp("shards") / "tiny_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(-2, 3, 5000).cumsum() % 62 + 2)
    return TokenStream([Path(path)])


def new_trainer(config: Config, stream: TokenStream) -> Trainer:
    return Trainer(build_model(config.model, config.run.seed), config, Runtime(torch.device("cpu")), stream)


def test_the_leaderboard_preset_arms_every_feature():
    assert set(features_on(build_config("leaderboard", {}, {}))) == set(SWITCHES)


@pytest.mark.parametrize(("feature", "knob"), [(feature, knob) for feature in SWITCHES for knob in SWITCHES[feature]])
def test_a_feature_that_is_switched_off_is_not_armed_and_the_others_are(feature, knob):
    config = build_config("leaderboard", {}, dict([knob.split("=")]))
    assert set(features_on(config)) == set(SWITCHES) - {feature}
    with pytest.raises(KeyError):
        FeatureAudit(config).count(feature)


@pytest.mark.parametrize("feature", SWITCHES)
def test_a_feature_that_never_acted_or_never_proved_an_effect_is_found(feature):
    config = build_config("leaderboard", {}, {})
    audit = FeatureAudit(config)
    for other in SWITCHES:
        if other != feature:
            audit.count(other, 3)
            audit.verify(other, True, "seen")
    (finding,) = audit.findings()
    assert (
        finding.startswith(f"{feature} was switched on and never acted: ")
        and features_on(config)[feature].hint in finding
    )
    audit.count(feature, 5)
    audit.count(feature, 8, count=3)
    (finding,) = audit.findings()
    assert finding == f"{feature} acted 4 times, but its effect was not seen (no measurement)"
    audit.verify(feature, False, "moved by 0")
    assert audit.findings() == [f"{feature} acted 4 times, but its effect was not seen (moved by 0)"]
    audit.verify(feature, True, "moved by 1")
    assert audit.findings() == []
    told = {"first": 5, "last": 8, "count": 4, "effect": "moved by 1", "proven": True}
    assert audit.record()[feature] == told
    assert FeatureAudit(config, audit.record()).record() == audit.record()


def test_a_later_process_goes_on_counting():
    config = build_config("leaderboard", {}, {})
    first = FeatureAudit(config)
    first.count("qat", 1)
    second = FeatureAudit(config, first.record())
    second.count("qat", 2)
    assert (second.records["qat"].first, second.records["qat"].last, second.records["qat"].count) == (
        1,
        2,
        2,
    )


def test_a_whole_training_testifies_for_itself(stream):
    config = tiny_config(qat_start="0.5", grad_clip_norm="0.001", swa_snapshots="4")
    trainer = new_trainer(config, stream)
    trainer.warm_up()
    list(trainer.steps())
    trainer.finish()
    weights = final_weights(trainer.state(), trainer.audit)
    trainer.audit.note_weights(weights, trainer.step)
    record = trainer.audit.record()
    counts = {feature: (said["first"], said["last"], said["count"]) for feature, said in record.items()}
    assert counts == {
        "warmdown": (4, 12, 9), "muon_momentum_warmup": (1, 3, 3), "grad_clip": (1, 12, 12), "qat": (7, 12, 6),
        "swa": (8, 12, 4), "smear_gate": (1, 12, 12), "bigram_hash": (1, 12, 12), "prune": (None, None, 0),
        "ntk_rope": (None, None, 0), "exclusive_attention": (1, 12, 12), "key_offset": (1, 12, 12),
        "late_mix": (1, 12, 12),
    }  # fmt: skip
    assert [finding.split()[0] for finding in trainer.audit.findings()] == ["prune", "ntk_rope"]


def ignore_grid(trainer: Trainer) -> None:
    """A step that computes with the same parameters, and never sees the grid."""
    without = copy.deepcopy(trainer.model)
    trainer.forward = lambda *batch: functional_call(without, dict(trainer.model.named_parameters()), batch)


def fold_the_flag(trainer: Trainer) -> None:
    """The field's most common dead feature: torch.compile has made a constant of the flag, and never looks again."""
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    trainer.forward = torch.compile(trainer.model, backend="eager", dynamic=False, fullgraph=True, options=options)
    trainer.accumulate_gradients(0)
    trainer.model.zero_grad(set_to_none=True)


@pytest.fixture
def own_graphs() -> Iterator[None]:
    """torch.compile keeps graphs by code, not by model: those of a plant must serve no other test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_honestly(trainer: Trainer) -> None:
    trainer.forward = torch.compile(trainer.model, backend="eager", dynamic=False, fullgraph=True)


@pytest.mark.parametrize(
    ("plant", "dead"), [(ignore_grid, True), (fold_the_flag, True), (compile_honestly, False), (lambda _: None, False)]
)
@pytest.mark.parametrize(
    "knobs", [{"qat_start": "0"}, pytest.param({"qat_start": "0.5", "embed_bits": "16"}, marks=pytest.mark.slow)]
)
def test_fake_quantization_that_is_dead_in_the_compiled_step_is_found(stream, own_graphs, plant, dead, knobs):
    trainer = new_trainer(tiny_config(**knobs), stream)
    plant(trainer)
    trainer.warm_up()
    list(trainer.steps())
    found = [finding for finding in trainer.audit.findings() if finding.startswith("qat")]
    assert len(found) == dead, found
    assert not dead or "times, but its effect was not seen (loss nan" in found[0]


def test_an_average_that_does_not_move_is_found(stream):
    """As one that is accumulated in bf16: small changes round away, and the mean stays where it was."""
    trainer = new_trainer(tiny_config(), stream)
    list(trainer.steps())
    trainer.finish()
    state = trainer.state()
    audit = FeatureAudit(trainer.config, state.numbers["features"])
    weights = final_weights(state, audit)
    assert audit.records["swa"].proven and not torch.equal(weights["skip_weights"], trainer.model.skip_weights)
    for name in weights:
        state.tensors[f"average.{name}"] = state.tensors[f"model.{name}"].clone()
    audit = FeatureAudit(trainer.config, state.numbers["features"])
    final_weights(state, audit)
    found = [finding for finding in audit.findings() if finding.startswith("swa")]
    assert len(found) == 1 and "its effect was not seen" in found[0] and "at most 0 from the last" in found[0]


def test_one_snapshot_is_no_average(stream):
    trainer = new_trainer(tiny_config(), stream)
    trainer.average.observe(trainer.model, 1.0)
    trainer.audit.count("swa", 1)
    state = trainer.state()
    weights = final_weights(state, trainer.audit)
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.model.state_dict().items())
    assert any(finding.startswith("swa acted 1 times, but") for finding in trainer.audit.findings())


@pytest.mark.parametrize("name", ["smear.gate", "bigram.embed.weight"])
def test_a_learned_feature_that_learned_nothing_is_found(stream, name):
    trainer = new_trainer(tiny_config(), stream)
    list(trainer.steps())
    weights = dict(trainer.model.state_dict())
    weights[name] = torch.zeros_like(weights[name])
    trainer.audit.note_weights(weights, trainer.step)
    features = {"smear.gate": "smear_gate", "bigram.embed.weight": "bigram_hash"}
    found = [f for f in trainer.audit.findings() if f.startswith(tuple(features.values()))]
    assert len(found) == 1 and found[0].startswith(f"{features[name]} acted 12 times, but") and "(0 of" in found[0]


FIGURES = dict(
    val_bpb=1.2,
    bytes_total=16_000_000, limit_bytes=16_000_000, train_seconds=600.0, max_wallclock_seconds=600.0,
    calibration_seconds=0.0,
    eval_seconds=600.0, max_eval_seconds=600.0, probes={"C1": {"verdict": "PASS", "detail": ""}},
)  # fmt: skip


def test_a_score_that_is_no_number_is_found():
    (finding,) = run_findings(FIGURES | dict(val_bpb=float("nan")))
    assert "val_bpb is nan" in finding


def test_figures_at_their_limits_are_valid():
    assert run_findings(FIGURES) == []
    assert (
        run_findings(FIGURES | dict(train_seconds=1e6, max_wallclock_seconds=0, eval_seconds=1e6, max_eval_seconds=0))
        == []
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(bytes_total=16_000_001), "16,000,001 bytes of code and artifact are 1 over the limit of 16,000,000"),
        (dict(train_seconds=600.01), "training took 600.0 s, over its cap of 600 s"),
        (dict(eval_seconds=651.0), "scoring took 651.0 s, over its cap of 600 s"),
        (dict(probes={"C2": {"verdict": "FAIL", "detail": "sums to 1.1"}}), "legality probe C2 failed: sums to 1.1"),
    ],
)
def test_one_step_beyond_a_limit_is_found(change, words):
    (finding,) = run_findings(FIGURES | change)
    assert words in finding


def test_a_probe_that_was_not_exercised_is_no_finding():
    assert run_findings(FIGURES | dict(probes={"C3": {"verdict": "NOT EXERCISED", "detail": "no updates"}})) == []
