"""The bench of the fit, and how many kernels a column of water-filling would launch on a GPU."""

import pytest

from golf.config.model import ModelConfig
from lab.bench.fit_bench import bench_fit, frontier_shapes, launches_per_column

CEILINGS = {"plain": 12, "priced": 31, "descent": 36, "trellis": 48}
"""Launches a column, modelled: of two matrices, or of any number of one shape but for products once a run."""


def test_the_launches_of_a_column_stay_few():
    for part, launches in launches_per_column().items():
        assert 0.6 * CEILINGS[part] < launches <= CEILINGS[part], part


@pytest.mark.slow
def test_a_toy_model_is_fitted_and_its_time_divided():
    model = ModelConfig(
        vocab_size=96, num_layers=2, model_dim=48, num_heads=2, num_kv_heads=1, mlp_mult=2, bigram_vocab_size=0,
        bigram_dim=0, smear_gate=False,
    )  # fmt: skip
    lines = []
    figures = bench_fit(model, lines.append)
    assert 0 < figures["limit_bytes"] - figures["bytes"] <= 500 and "packings" in lines[-1]
    parts = [figures[f"{part}_cpu_s"] for part in ("prepare", "quantize", "pack")]
    assert min(parts) > 0 and sum(parts) <= figures["cpu_s"]
    assert figures["round_cpu_s"] + figures["trellis_cpu_s"] <= figures["quantize_cpu_s"]


def test_the_frontier_has_36_million_weights():
    model = frontier_shapes(36)
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 2048 * 512
    assert model.num_layers == 11 and model.num_layers * layer + model.vocab_size * model.model_dim == 35_913_728
