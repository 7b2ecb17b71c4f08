"""Calibration: sums against autograd and brute force, ranks, generated text, bad input."""

import pytest
import torch

from golf.config.config import Config, with_knobs
from golf.config.model import ModelConfig
from golf.model.init import build_model
from golf.model.layers import rms_norm
from golf.quant.calibration import calibrate, calibrate_within, generated_rows, training_rows
from golf.quant.tensor_classes import QuantError
from golf.run.stages import SETTLING, seconds_left
from golf.runtime import Runtime
from lab.rates.quant_comparison import collect_hessians

TINY = ModelConfig(
    vocab_size=40, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2, bigram_vocab_size=24,
    bigram_dim=8, train_seq_len=12, matrix_init="orthogonal", tied_embed_init_std=0.5,
)  # fmt: skip
ALONE = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    model = build_model(TINY, seed=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # nothing at its initial zero, or nothing flows
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def rows_NT():
    return torch.randint(2, 40, (24, 12), generator=torch.Generator().manual_seed(0))


def test_hessians_are_the_second_moments_of_the_inputs(model, rows_NT):
    seen = {}
    module = model.blocks[1].mlp.proj
    handle = module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0]))
    last = model.blocks[-1].register_forward_hook(lambda _, inputs, output: seen.update(h=rms_norm(output)))
    with torch.no_grad():
        model.logits(rows_NT)
    handle.remove(), last.remove()
    hessians = collect_hessians(model, rows_NT, batch_rows=5)
    for name, key in (("blocks.1.mlp.proj.weight", "x"), ("tok_emb.weight", "h")):
        x_PC = seen[key].flatten(0, 1).double()
        torch.testing.assert_close(hessians[name], x_PC.T @ x_PC / len(x_PC), rtol=1e-5, atol=1e-7)
    matrices = {name for name, part in model.state_dict().items() if name.endswith("weight")}
    assert hessians.keys() == matrices - {"bigram.embed.weight"}


def test_predicted_loss_is_near_the_measured_one(model, rows_NT):
    """1/2 sum_r row_weight e H e against the KL divergence that noise of that size makes: the sum over all matrices."""
    statistics = calibrate(model, rows_NT, ALONE)
    with torch.no_grad():
        before = torch.log_softmax(model.logits(rows_NT), -1)
    generator, predicted, measured = torch.Generator().manual_seed(1), 0.0, 0.0
    for name, one in statistics.items():
        weight_RC = model.get_parameter(name)
        for _ in range(4):
            noise_RC = 0.03 * weight_RC.detach().std() * torch.randn(weight_RC.shape, generator=generator)
            predicted += 0.5 * (((noise_RC.double() @ one.hessian_CC) * noise_RC).sum(1) @ one.row_weight_R).item()
            with torch.no_grad():
                weight_RC.add_(noise_RC)
                after = torch.log_softmax(model.logits(rows_NT), -1)
                weight_RC.sub_(noise_RC)
            measured += (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.5 < predicted / measured < 2


def test_every_matrix_has_statistics_and_lookups_count_their_rows(model, rows_NT):
    statistics = calibrate(model, rows_NT, ALONE)
    assert statistics.keys() == {name for name in model.state_dict() if name.endswith("weight")}
    for name, one in statistics.items():
        rows, columns = model.get_parameter(name).shape
        assert one.hessian_CC.shape == (columns, columns) and one.row_weight_R.shape == (rows,)
        assert one.hessian_CC.dtype == one.row_weight_R.dtype == torch.float64
        assert (one.row_weight_R > 0).all() and torch.linalg.eigvalsh(one.hessian_CC).min() > -1e-9
    often, never = rows_NT.flatten().bincount(minlength=40).argmax(), 0
    assert statistics["tok_emb.weight"].row_weight_R[often] > statistics["tok_emb.weight"].row_weight_R[never]


def test_same_rows_give_the_same_statistics_and_other_batches_nearly(model, rows_NT):
    first, second, other = (calibrate(model, rows_NT, ALONE, batch_rows=rows) for rows in (8, 8, 5))
    for name in first:
        assert torch.equal(first[name].hessian_CC, second[name].hessian_CC)
        assert torch.equal(first[name].row_weight_R, second[name].row_weight_R)
        torch.testing.assert_close(first[name].hessian_CC.trace(), other[name].hessian_CC.trace(), rtol=0.3, atol=0)


def test_calibration_keeps_to_its_time_but_for_one_batch(model, rows_NT):
    statistics, tokens = calibrate_within(0.0, model, rows_NT, ALONE, 8, 0)
    assert tokens == 8 * 12
    first = calibrate(model, rows_NT[:8], ALONE)
    assert all(torch.equal(statistics[name].hessian_CC, first[name].hessian_CC) for name in first)
    assert calibrate_within(1e9, model, rows_NT, ALONE, 8, 0)[1] == rows_NT.numel()


def test_seconds_that_training_has_left():
    capped = with_knobs(Config(), {"max_wallclock_seconds": 180.0})
    assert seconds_left(capped, 174.0) == 180.0 - 174.0 - SETTLING
    assert seconds_left(with_knobs(Config(), {"max_wallclock_seconds": 0.0}), 174.0) == float("inf")


def test_calibration_leaves_no_gradients_and_no_hooks(model, rows_NT):
    calibrate(model, rows_NT[:2], ALONE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class TwoRanks(Runtime):
    """Adds what the other rank has, as all_reduce would."""

    other: dict

    def sum_over_ranks(self, tensor):
        if self.other.get("record") is not None:
            self.other["record"].append(tensor.clone())
        else:
            tensor += self.other["sums"].pop(0)
        return tensor


def test_ranks_share_the_rows_and_sum_up(model, rows_NT):
    recorder, adder = TwoRanks(torch.device("cpu"), 1, 2), TwoRanks(torch.device("cpu"), 0, 2)
    object.__setattr__(recorder, "other", {"record": []})
    calibrate(model, rows_NT, recorder)
    object.__setattr__(adder, "other", {"sums": recorder.other["record"]})
    both = calibrate(model, rows_NT, adder)
    alone = collect_hessians(model, rows_NT)
    assert both["blocks.0.mlp.fc.weight"].hessian_CC.shape == alone["blocks.0.mlp.fc.weight"].shape
    table = both["bigram.embed.weight"].row_weight_R
    assert table.sum() == pytest.approx(1.0) and not adder.other["sums"]


def test_text_that_the_model_makes_up(model):
    first, second, other = (generated_rows(model, 3, 9, seed) for seed in (5, 5, 6))
    assert first.shape == (3, 9) and torch.equal(first, second) and not torch.equal(first, other)
    assert (first[:, 0] == TINY.bos_id).all() and first.max() < 40


class Stream:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def tokens(self, start, count):
        import numpy as np

        return (np.arange(start, start + count) % self.size).astype(np.int64)


def test_training_rows_come_from_all_parts_of_the_text():
    rows_NT = training_rows(Stream(1000), 70, 7, seed=1)
    starts_N = rows_NT[:, 0]
    assert rows_NT.shape == (10, 7) and len(starts_N.unique()) == 10 and starts_N.tolist() == sorted(starts_N.tolist())
    assert starts_N.min() < 300 and starts_N.max() > 700 and (starts_N % 7 == 0).all()
    assert torch.equal(rows_NT, training_rows(Stream(1000), 70, 7, seed=1))
    assert not torch.equal(rows_NT, training_rows(Stream(1000), 70, 7, seed=2))
    assert training_rows(Stream(30), 1000, 7, seed=1).shape == (4, 7), "no row comes twice"
    with pytest.raises(QuantError, match="no row to calibrate on: 6 tokens"):
        training_rows(Stream(1000), 6, 7, seed=1)


def test_bad_input_is_named(model):
    with pytest.raises(QuantError, match="calibration set is empty"):
        calibrate(model, torch.empty(0, 12, dtype=torch.int64), ALONE)
    with pytest.raises(QuantError, match="empty"):
        collect_hessians(model, torch.empty(0, 12, dtype=torch.int64))
    with pytest.raises(QuantError, match="token 40 is beyond the vocabulary of 40"):
        calibrate(model, torch.full((1, 12), 40), ALONE)
    broken = build_model(TINY, seed=0)
    with torch.no_grad():
        broken.blocks[0].mlp.fc.weight[0, 0] = float("nan")
    with pytest.raises(QuantError, match="NaN"):
        calibrate(broken, torch.randint(2, 40, (2, 12)), ALONE)
