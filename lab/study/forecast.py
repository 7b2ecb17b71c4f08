"""What a study will cost, from runs that are finished, or from a rough model where none are."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from golf.artifact.description import expected_shapes
from golf.config.model import ModelConfig
from lab.study.plan import AblationPlan
from lab.study.spec import AblationSpec

ROUGH_FLOPS = {"cpu": 2e10, "cuda": 5e13}
"""Per second of a CPU thread or a GPU: an order of magnitude, for lack of anything measured."""
ROUGH_START_SECONDS = 1.0


@dataclass(frozen=True)
class CostForecast:
    """Seconds of the runs that are left."""

    runs: int
    seconds: float
    """Of one process after the other."""
    wall_seconds: float
    basis: str
    """measured, or rough, in words."""


def forward_flops(model: ModelConfig, tokens: int, context: int) -> float:
    """Two for each weight of a matrix product, and attention's scores and values at half of the context."""
    shapes = expected_shapes(model)
    weights = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight"))
    return tokens * (2 * weights + 2 * model.num_layers * model.model_dim * context)


def run_flops(spec: AblationSpec, val_tokens: int) -> float:
    """Of training (three forwards), looks, and scoring; of a rounding, calibration and scoring."""
    config, model = spec.config, spec.config.model
    scored = spec.val_tokens or val_tokens
    scored = scored * config.score.eval_seq_len // config.score.eval_stride
    flops = forward_flops(model, scored, config.score.eval_seq_len)
    if spec.method:
        return flops + forward_flops(model, spec.calibration_sequences * model.train_seq_len, model.train_seq_len)
    looks = spec.train_steps // spec.look_every if spec.look_every else 0
    tokens = 3 * spec.train_steps * config.train.train_batch_tokens + looks * spec.look_tokens
    return flops + forward_flops(model, tokens, model.train_seq_len)


def forecast(plan: AblationPlan, finished: Mapping[str, Mapping[str, Any]], jobs: int) -> CostForecast:
    """Of the runs that are not in `finished`, whose measured seconds say how fast this machine is."""
    left = [spec for key, spec in plan.runs.items() if key not in finished]
    seconds, known, unknown = 0.0, False, False
    for kind in (False, True):
        flops_left = [run_flops(spec, plan.val_tokens) for spec in left if bool(spec.method) == kind]
        pairs = [
            (run_flops(spec, plan.val_tokens), finished[key]["total_seconds"])
            for key, spec in plan.runs.items()
            if bool(spec.method) == kind and "total_seconds" in finished.get(key, {})
        ]
        known, unknown = known or bool(pairs and flops_left), unknown or bool(flops_left and not pairs)
        if pairs:
            seconds += sum(flops_left) * sum(time for _, time in pairs) / sum(flops for flops, _ in pairs)
        elif flops_left:
            run = left[0].config.run
            rate = ROUGH_FLOPS["cuda" if run.device == "cuda" else "cpu"] * max(1, run.threads)
            seconds += sum(flops_left) / rate + ROUGH_START_SECONDS * len(flops_left)
    count = sum("total_seconds" in result for result in finished.values())
    parts = [f"the measured seconds of {count} finished runs"] * known + [
        "a rough model of what no run has measured"
    ] * unknown
    basis = " and ".join(parts) or "nothing that is left to do"
    return CostForecast(len(left), seconds, seconds / max(1, min(jobs, len(left))), basis)
