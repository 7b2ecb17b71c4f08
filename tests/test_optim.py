"""Muon, schedules under a fake clock, and the average of weights."""

import pytest
import torch
from torch import nn

import golf.optim.optimizers
from golf.config.config import build_config
from golf.config.training import AverageConfig, OptimConfig, TrainConfig
from golf.model.init import build_model
from golf.optim.average import WeightAverage
from golf.optim.optimizers import (
    Muon,
    clip_gradients,
    muon_momentum,
    newton_schulz,
    orthogonal_updates,
    parameters_of_group,
)
from golf.optim.schedule import Budget, learning_rate_scale
from golf.runtime import Runtime


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


SETTINGS = OptimConfig(matrix_lr=0.02, muon_weight_decay=0.04, muon_ns_steps=5)


def muon_of(matrices: list[nn.Parameter], rank: int = 0, world_size: int = 1) -> Muon:
    muon = Muon(matrices, SETTINGS, Runtime(torch.device("cpu"), rank, world_size))
    muon.param_groups[0]["muon_momentum"] = 0.9
    return muon


@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
def test_muon_agrees_with_torchs_own(shape):
    ours, theirs = (nn.Parameter(random_matrix(*shape)) for _ in range(2))
    own = muon_of([ours])
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, weight_decay=0.04, ns_steps=5, nesterov=True, adjust_lr_fn="original"
    )
    for step in range(5):
        ours.grad = random_matrix(*shape, seed=10 + step)
        theirs.grad = ours.grad.clone()
        own.step()
        reference.step()
    moved = (theirs - random_matrix(*shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bf16, we in fp32


SHAPES = [(8, 8)] * 5 + [(8, 24), (24, 8), (4, 8), (8, 4), (16, 2)]


def muon_in_float64(weights: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Trains matrices one by one by the rule of Muon's docstring."""
    trained = []
    for place, weight in enumerate(weights):
        weight_RC, momentum_RC = weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)
        for step in gradients:
            gradient_RC = step[place].double()
            momentum_RC = 0.9 * momentum_RC + gradient_RC
            nesterov_RC = gradient_RC + 0.9 * momentum_RC
            x_RC = nesterov_RC.T if weight.size(0) > weight.size(1) else nesterov_RC
            x_RC = x_RC / x_RC.norm()
            for _ in range(5):
                gram_RR = x_RC @ x_RC.T
                x_RC = 3.4445 * x_RC + (-4.7750 * gram_RR + 2.0315 * gram_RR @ gram_RR) @ x_RC
            x_RC = x_RC.T if weight.size(0) > weight.size(1) else x_RC
            scale = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
            weight_RC = (1 - 0.02 * 0.04) * weight_RC - 0.02 * scale * x_RC
        trained.append(weight_RC)
    return trained


def random_training(steps: int = 3) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    matrices = [nn.Parameter(random_matrix(*shape, seed)) for seed, shape in enumerate(SHAPES)]
    gradients = [
        [random_matrix(*shape, 100 * step + seed) for seed, shape in enumerate(SHAPES)] for step in range(1, steps + 1)
    ]
    return matrices, gradients


def set_gradients_of(matrices: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    for matrix, gradient in zip(matrices, gradients, strict=True):
        matrix.grad = gradient.clone()


def test_muon_equals_its_rule_in_float64():
    matrices, gradients = random_training()
    expected = muon_in_float64(matrices, gradients)
    muon = muon_of(matrices)
    assert len(muon.stacks) == 4, "one for matrices of a shape, or its transpose"
    for step in gradients:
        versions = [matrix._version for matrix in matrices]
        set_gradients_of(matrices, step)
        muon.step()
        assert all(matrix._version > before for matrix, before in zip(matrices, versions, strict=True)), "grids need it"
    for matrix, reference in zip(matrices, expected, strict=True):
        assert (matrix - reference).norm() < 1e-6 * reference.norm()


def test_one_stack_for_all_shapes_gives_the_same_updates():
    """As on CUDA: zeros around a matrix change nothing."""
    _, (gradients,) = random_training(1)
    momenta = [torch.zeros(len(gradients), 8, 24), *(torch.zeros(1, *sorted(shape)) for shape in SHAPES)]
    rest = torch.tensor(0.9), SETTINGS, torch.zeros(3)
    together = orthogonal_updates([(gradients, momenta[0], None)], *rest)
    alone = orthogonal_updates([([g], one, None) for g, one in zip(gradients, momenta[1:], strict=True)], *rest)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert len(together) == 3 + sum(g.numel() for g in gradients) and together[-3:].eq(0).all()
    for one, shape, alone_MRC in zip(momenta[0], SHAPES, momenta[1:], strict=True):
        rows, columns = sorted(shape)
        assert torch.equal(one[:rows, :columns], alone_MRC[0]) and one.count_nonzero() == rows * columns


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_ranks_of_muon_share_the_work_without_overlap(world_size, monkeypatch):
    matrices, (gradients,) = random_training(1)
    alone = muon_of(matrices)
    set_gradients_of(matrices, gradients)
    alone.step()
    expected = [matrix.detach().clone() for matrix in matrices]
    again, _ = random_training(1)
    ranks = [muon_of(again, rank, world_size) for rank in range(world_size)]
    held = [matrix for muon in ranks for matrix in muon.state]
    assert len(held) == len(again) == len(set(held))
    set_gradients_of(again, gradients)
    given = [[([matrix.grad for matrix in stack], *rest) for stack, *rest in muon.stacks] for muon in ranks]
    sent = [
        orthogonal_updates(own, torch.tensor(0.9), OptimConfig(), muon.padding_N)
        for own, muon in zip(given, ranks, strict=True)
    ]
    assert len({len(part_N) for part_N in sent}) == 1
    ranks[0].update = lambda *given: sent[0]
    monkeypatch.setattr(golf.optim.optimizers, "gather_updates", lambda whole_N, own_N: whole_N.copy_(torch.cat(sent)))
    ranks[0].step()
    for matrix, reference in zip(again, expected, strict=True):
        torch.testing.assert_close(matrix.detach(), reference, atol=1e-6, rtol=1e-5)


def test_clipping_goes_by_the_float64_norm():
    flat_N = random_matrix(900, 1000).flatten()
    gradients_KN = torch.cat([flat_N, torch.zeros(-len(flat_N) % 4096)]).view(-1, 4096)
    norm = clip_gradients(gradients_KN, 0.3)
    reference = flat_N.double().norm()
    assert abs(norm - reference) < 3e-7 * reference < abs(flat_N.norm() - reference), "one fp32 sum is off by 1e-5"
    clipped_N = gradients_KN.flatten()[: len(flat_N)].double()
    torch.testing.assert_close(clipped_N, flat_N.double() * 0.3 / (reference + 1e-6), atol=0, rtol=1e-6)
    before = gradients_KN.clone()
    clip_gradients(gradients_KN, 1.0)
    assert torch.equal(before, gradients_KN), "a small gradient is left alone"


def test_every_parameter_is_in_exactly_one_group():
    model = build_model(build_config("local", {}, {}).model, 0)
    matrices, tables, vectors = (parameters_of_group(model, group) for group in ("matrix", "table", "vector"))
    grouped = [id(parameter) for group in (matrices, tables, vectors) for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert all(matrix.ndim == 2 for matrix in matrices) and len(tables) == 2
    small = {(1, 160), (2, 160), (16, 160), (6, 16)}  # skips, mixes and the last block's weights are no matrices
    assert {tuple(v.shape) for v in vectors if v.ndim == 2} == small


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
