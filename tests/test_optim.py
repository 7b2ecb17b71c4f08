"""Muon, schedules under a fake clock, and the average of weights."""

import pytest
import torch
from torch import nn

from golf.config.config import build_config
from golf.config.training import AverageConfig, OptimConfig, TrainConfig
from golf.model.init import build_model
from golf.optim.average import WeightAverage
from golf.optim.optimizers import Muon, muon_momentum, newton_schulz, parameters_of_group
from golf.optim.schedule import Budget, learning_rate_scale


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_newton_schulz_is_nearly_orthogonal(shape):
    update_MRC = torch.stack([random_matrix(*shape, seed=seed) for seed in range(3)])
    singular = torch.linalg.svdvals(newton_schulz(update_MRC, steps=5).double())
    assert singular.max() < 1.3 and (singular > 0.6).double().mean() > 0.95  # the smallest of a square may lag
    raw = torch.linalg.svdvals(update_MRC.double())  # the check can fail: the input is far from orthogonal
    assert (raw / raw.max() > 0.6).double().mean() < 0.7


def test_newton_schulz_keeps_the_singular_vectors():
    matrix_RC = random_matrix(24, 40).double()
    left, _, right = torch.linalg.svd(matrix_RC, full_matrices=False)
    core = left.T @ newton_schulz(matrix_RC[None], 5)[0] @ right.T
    assert (core - core.diag().diag()).abs().max() < 1e-6


def test_muon_agrees_with_torchs_own():
    ours, theirs = (nn.Parameter(random_matrix(32, 64)) for _ in range(2))
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.04, ns_steps=5)
    own = Muon([ours], **settings)
    reference = torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="original", **settings)
    for step in range(5):
        ours.grad = theirs.grad = random_matrix(32, 64, seed=10 + step)
        own.step()
        reference.step()
    moved = (theirs - random_matrix(32, 64)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bf16, we in fp32


def test_ranks_of_muon_share_the_work_without_overlap():
    matrices = [nn.Parameter(random_matrix(8, 8, seed)) for seed in range(5)]
    for seed, matrix in enumerate(matrices):
        matrix.grad = random_matrix(8, 8, 100 + seed)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.0, ns_steps=5)
    alone = Muon(matrices, **settings)
    everything = alone.own_updates(alone.param_groups[0])
    for world_size in (2, 4, 8):
        for rank in range(world_size):
            shared = Muon(matrices, **settings, rank=rank, world_size=world_size)
            own = shared.own_updates(shared.param_groups[0])
            torch.testing.assert_close(own, everything[rank::world_size], atol=1e-6, rtol=1e-5)


def test_every_parameter_is_in_exactly_one_group():
    model = build_model(build_config("local", {}, {}).model, 0)
    matrices, tables, vectors = (parameters_of_group(model, group) for group in ("matrix", "table", "vector"))
    grouped = [id(parameter) for group in (matrices, tables, vectors) for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert all(matrix.ndim == 2 for matrix in matrices) and len(tables) == 2
    assert {tuple(v.shape) for v in vectors if v.ndim == 2} == {(1, 160), (2, 160)}  # skips and mixes are no matrices


def test_budget_is_bound_by_whichever_limit_is_nearer():
    assert Budget(1000, 100.0).progress(step=10, elapsed=50.0) == 0.5
    assert Budget(1000, 100.0).progress(step=900, elapsed=50.0) == 0.9
    assert Budget(1000, 0).progress(step=10, elapsed=1e9) == 0.01
    assert Budget(0, 100.0).progress(step=10**9, elapsed=1.0) == 0.01


def test_budget_stops_before_a_step_that_would_end_late():
    budget = Budget(0, 100.0)
    assert not budget.exhausted(5, elapsed=98.0, step_seconds=1.9)
    assert budget.exhausted(5, elapsed=98.0, step_seconds=2.1)
    assert Budget(10, 0).exhausted(10, 0.0, 0.0) and not Budget(10, 0).exhausted(9, 1e9, 1.0)


@pytest.mark.parametrize("step_seconds", [0.09, 0.7, 6.0])
def test_fractions_act_on_a_machine_of_any_speed(step_seconds):
    """A fake clock: warmdown, momentum and averaging begin and end at their share of the seconds."""
    train, optim = TrainConfig(), OptimConfig()
    average = WeightAverage(AverageConfig(swa_start=0.6, swa_snapshots=20))
    model, budget = nn.Linear(1, 1), Budget(train.iterations, train.max_wallclock_seconds)
    step, scales, snapshots = 0, [], []
    while not budget.exhausted(step, step * step_seconds, step_seconds):
        progress = budget.progress(step, step * step_seconds)
        scales.append((progress, learning_rate_scale(progress, train), muon_momentum(progress, optim)))
        step += 1
        progress = budget.progress(step, step * step_seconds)
        if average.observe(model, progress):
            snapshots.append(progress)
    if average.observe(model, 1.0):  # as at the end of training: the last weights count too
        snapshots.append(1.0)
    slack = step_seconds / 600
    assert max(p for p, scale, _ in scales if scale == 1.0) == pytest.approx(0.55, abs=1.1 * slack)
    assert scales[-1][1] < 0.002 and scales[-1][2] == optim.muon_momentum and scales[0][2] == 0.92
    assert len(snapshots) == 20 and snapshots[0] == pytest.approx(0.62, abs=2 * slack)
    assert snapshots[-1] > 1 - 2 * slack


def test_warmdown_shapes():
    cosine, linear = TrainConfig(warmdown_fraction=0.5), TrainConfig(warmdown_fraction=0.5, warmdown_shape="linear")
    assert [learning_rate_scale(p, cosine) for p in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert [learning_rate_scale(p, linear) for p in (0.5, 0.6, 1.0)] == pytest.approx([1, 0.8, 0])
    assert learning_rate_scale(0.999, TrainConfig(warmdown_fraction=0.0)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_equals_the_float64_mean(dtype):
    model = nn.Linear(50, 50).to(dtype)
    average = WeightAverage(AverageConfig(swa_start=0.0, swa_snapshots=48))
    snapshots = []
    for step in range(1, 49):
        with torch.no_grad():
            model.weight.add_((0.01 * random_matrix(50, 50, step)).to(dtype))
        assert average.observe(model, step / 48)
        snapshots.append(model.weight.detach().double().clone())
    truth = torch.stack(snapshots).mean(0)
    assert (average.mean["weight"] - truth).norm() < 1e-6 * truth.norm()
    naive = sum(s.to(dtype) for s in snapshots) / 48  # what accumulating in bf16 would give
    assert dtype == torch.float32 or (naive.double() - truth).norm() > 1e-3 * truth.norm()


def test_a_snapshot_is_taken_once_when_it_is_due():
    model = nn.Linear(2, 2)
    average = WeightAverage(AverageConfig(swa_start=0.5, swa_snapshots=4))
    assert not average.observe(model, 0.55) and not average.mean
    assert average.observe(model, 0.7) and not average.observe(model, 0.71)
    assert average.observe(model, 1.0) and average.count == 2
