"""The fit by water level: it fills a limit, says what can't be, keeps a score, and is deterministic."""

from dataclasses import replace

import pytest
import torch

from golf.artifact.container import read_artifact, same_stored_state
from golf.artifact.fill_limit import NEAR_ENOUGH, FitError, LevelSearch, fill_limit
from golf.config.config import Config as Knobs
from golf.config.config import check_config, with_knobs
from golf.config.knobs import ConfigError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.optim.schedule import training_budget
from golf.quant.calibration import calibrate
from golf.quant.grid import QuantizedTensor, dequantize_state
from golf.runtime import Runtime
from lab.rates.packing_fit import FINE_ENOUGH, smallest_at_score

MODEL = ModelConfig(
    vocab_size=96, num_layers=2, model_dim=48, num_heads=2, num_kv_heads=1, mlp_mult=2, bigram_vocab_size=64,
    bigram_dim=16, train_seq_len=16, tied_embed_init_std=0.3,
)  # fmt: skip
QUANT = QuantConfig(qat_enabled=False, prune_frac=0.0, quantizer="waterfill", codec="zlib")
TOKENIZER = "cd" * 32
ROWS_NT = torch.randint(2, 96, (16, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def trained():
    """Weights with outlying rows and columns, as training leaves them, and their statistics."""
    model = build_model(MODEL, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.endswith("weight"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
                parameter *= torch.exp(0.7 * torch.randn(parameter.size(0), 1, generator=generator))
    return dict(model.state_dict()), calibrate(model, ROWS_NT, Runtime(torch.device("cpu")))


def fit(trained, limit, reserve=0, log=lambda line: None, quant=QUANT):
    state, statistics = trained
    return fill_limit(statistics, state, quant, MODEL, TOKENIZER, limit, reserve, log)


@pytest.mark.parametrize(
    ("limit", "reserve", "codec"),
    [(11_000, 0, "zlib"), pytest.param(12_000, 1_000, "rans", marks=pytest.mark.slow)],
)
def test_lands_just_under_the_limit(trained, limit, reserve, codec):
    lines = []
    fitted = fit(trained, limit, reserve, lines.append, replace(QUANT, codec=codec))
    assert limit - reserve - NEAR_ENOUGH <= len(fitted.data) <= limit - reserve
    assert same_stored_state(read_artifact(fitted.data).state, fitted.stored)
    assert fitted.codes_not_nearest > 0 and fitted.pruned is None
    assert all(line.startswith("fit: ") for line in lines) and "packings" in lines[-1]


def divergence(trained, fitted) -> float:
    """KL from the predictions of the weights to those of the artifact, nats per token."""
    model, predictions = GPT(MODEL), []
    for weights in (trained[0], dequantize_state(fitted.stored)):
        model.load_state_dict(weights)
        with torch.no_grad():
            predictions.append(torch.log_softmax(model.logits(ROWS_NT), -1))
    return (predictions[0].exp() * (predictions[0] - predictions[1])).sum(-1).mean().item()


@pytest.mark.slow
def test_more_bytes_are_nearer_to_the_model(trained):
    divergences = [divergence(trained, fit(trained, limit)) for limit in (6_000, 9_000, 13_000)]
    assert divergences[0] > 2 * divergences[1] > 4 * divergences[2] > 0


@pytest.mark.slow
def test_same_bytes_every_time(trained):
    assert fit(trained, 9_000).data == fit(trained, 9_000).data


def test_a_limit_that_nothing_meets_says_what_the_smallest_is(trained):
    with pytest.raises(FitError, match=r"can't fit in 900 bytes: [\d,]+ is the smallest"):
        fit(trained, 900)


def test_room_that_codes_leave_is_filled_with_fp16(trained):
    lines, some = [], fit(trained, 50_000)
    every = fit(trained, 10_000_000, log=lines.append)
    kept = [sum(isinstance(entry, QuantizedTensor) for entry in one.stored.values()) for one in (some, every)]
    assert 0 < kept[0] < len(trained[1]) and kept[1] == 0
    assert 40_000 < len(some.data) <= 50_000 < len(every.data)
    assert divergence(trained, every) < 1e-5 < 10 * divergence(trained, some) < 1e-2
    assert same_stored_state(read_artifact(some.data).state, some.stored)
    said = next(line for line in lines if "in fp16" in line)
    assert "15 of 15 matrices in fp16" in said and f"{10_000_000 - len(every.data):,} bytes stay free" in said


@pytest.mark.slow
def test_the_smallest_artifact_that_keeps_a_score(trained):
    state, statistics = trained
    search = LevelSearch(state, statistics, QUANT, MODEL, TOKENIZER, lambda line: None)
    seen = {}

    def score_of(data):
        """Stands in for the scorer: more bytes, less loss."""
        seen[len(data)] = 1 + 1000 / len(data)
        return seen[len(data)]

    found = smallest_at_score(search, score_of, 1.125, lambda line: None)
    assert seen[len(found.data)] <= 1.125
    coarser = search.at(found.log_level + FINE_ENOUGH + 1e-3)
    assert score_of(coarser.data) > 1.125 or len(coarser.data) >= len(found.data)
    with pytest.raises(FitError, match="no artifact of these weights has 0.5 bits per byte: the finest"):
        smallest_at_score(search, score_of, 0.5, lambda line: None)


def test_knobs_that_do_not_go_with_a_fit_are_refused():
    knobs = {"quantizer": "waterfill", "qat_enabled": False, "prune_frac": 0.0}
    check_config(with_knobs(Knobs(), knobs))
    for wrong, message in (
        ({"qat_enabled": True}, "quantizer=waterfill chooses its own grid"),
        ({"prune_frac": 0.05}, "quantizer=waterfill chooses its own grid"),
        ({"calibration_tokens": 100}, "calibration_tokens"),
        ({"calibration_reserve": 600.0}, "calibration_reserve leaves no time"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_config(with_knobs(Knobs(), knobs | wrong))


def test_calibration_takes_its_time_from_the_training():
    config = with_knobs(Knobs(), {"quantizer": "waterfill", "qat_enabled": False, "prune_frac": 0.0})
    assert training_budget(config).seconds == 600.0 - 8.0
    assert training_budget(Knobs()).seconds == 600.0
    endless = replace(config, train=replace(config.train, max_wallclock_seconds=0.0))
    assert training_budget(endless).seconds == 0.0


def test_a_sample_of_rows_finds_the_level_of_all(trained, monkeypatch):
    state, statistics = trained
    weights = sum(state[name].numel() for name in statistics)
    monkeypatch.setattr("golf.artifact.fill_limit.SAMPLE_WEIGHTS", weights // 3)
    lines = []
    fitted = fit(trained, 11_000, log=lines.append)
    assert 11_000 - NEAR_ENOUGH <= len(fitted.data) <= 11_000
    sampled = [line for line in lines if "by one row in 3" in line]
    first = next(line for line in lines if line.startswith("fit: level") and line not in sampled)
    level, size = sampled[-1].split()[2], int(first.split()[3].replace(",", ""))
    assert first.split()[2] == level and abs(size / 11_000 - 1) < 0.15  # so few codes that each coder starts anew
    assert fitted.stored["tok_emb.weight"].codes_RC.shape == state["tok_emb.weight"].shape
