"""Plans a run on paper: the budget and the schedules of training step by step, its bytes, its seconds of scoring.

R rows, C columns.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from golf.artifact.container import encode_streams
from golf.artifact.description import expected_shapes
from golf.artifact.fill_limit import near_enough
from golf.config.config import Config, changed_knobs
from golf.config.features import features_on
from golf.config.knobs import ConfigError
from golf.config.model import ModelConfig
from golf.config.quantization import QuantConfig
from golf.optim.average import new_average
from golf.optim.optimizers import muon_momentum
from golf.optim.schedule import learning_rate_scale, training_budget
from golf.quant.export import quantize_state
from golf.quant.tensor_classes import FP16_BITS, bits_of
from golf.run.trainer import STEP_MARGIN, count_micro_steps
from golf.score.windows import plan_windows
from lab.cli import import_rooms

EXPECTED_STEP_SECONDS = {
    "leaderboard": (0.0908, "8xH100, log of pull request #326"),
    "baseline": (0.0435, "8xH100, log of the competition's baseline"),
    "local": (0.132, "2 cores of an AMD EPYC virtual machine"),
    "baseline-local": (0.110, "2 cores of an AMD EPYC virtual machine"),
    "stories": (0.28, "2 cores of an AMD EPYC virtual machine"),
    "frontier-base": (0.122, "8xH100, log of pull request 2014"),
    "frontier-base-local": (0.25, "2 cores of an AMD EPYC virtual machine"),
    "frontier": (0.122, "8xH100, log of pull request 2014"),
    "frontier-local": (0.25, "2 cores of an AMD EPYC virtual machine"),
}
"""Seconds of a step of each preset as it is, and where; those of the local twins are medians of three runs
(docs/LOG.md), that of `stories` is 2.1 times `local`'s, as measured one after the other on a busier machine, that of
`frontier-base-local` is the mean of 12 rounds of four steps, before blocks repeat (0.19) and after (0.28)."""
EXPECTED_VAL_TOKENS = {
    "leaderboard": 62_021_846, "baseline": 62_021_846, "local": 119_474, "baseline-local": 147_151, "stories": 398_296,
    "frontier-base": 47_853_344, "frontier-base-local": 119_474, "frontier": 47_853_344, "frontier-local": 119_474,
}  # fmt: skip
SCORING_SPEED = (1.3, 6.0)
"""Window tokens per second in scoring over tokens per second in training. Measured on a CPU: `local` 4.9 to 5.6,
`leaderboard`'s shape 2.7 to 3.7, plain rows of the baselines 1.5 to 2.2. A script of the competition, which computes
every logit, reached 1.3 on 8xH100 with windows of 2,048 at stride 64 (168 s; 89.4 ms a step)."""
ADAPTING_SPEED = (0.8, 1.5)
"""The same where each window is also learned from. Measured on a CPU: `local` 1.27; no GPU has run it. Two thirds of
training's products, since the matrices' own gradients are not needed, would be 1.5."""
SHORTER_CHUNKS = 3, 950
"""Windows that a document adds by beginning with shorter chunks and ending within one, at most, and its tokens:
FineWeb's validation documents have 957 CaseOps pieces on average."""
MIXING_SPEED = (100_000, 400_000)
"""Targets a second that one process mixes with counts: whole text of millions (its tables outgrow the caches: modelled)
and 119,473 (measured 386,000 to 414,000)."""
CORRECTING_SPEED = (10_000, 25_000)
"""The same with `mixture_successors=128` and 2,048 tokens: 119,473 targets in 5.5 to 5.8 s where MIXING_SPEED's take
0.3 s, and twice as long beside other work (modelled)."""
MOST_STEPS = 1_000_000
TRAINED_SHARE = (0.90, 1.01)
"""Bytes of trained weights over those of Gaussian ones (which no training of ours has passed: trained rows have longer
tails, and the grid spans a row's largest weight). 15 trainings of `local` and `baseline-local`, 61 to 2,467 steps,
pruned by 5 % or not, each in lzma, zstd and zlib: 0.936 to 0.989, falling as training goes on. Widened at both ends for
other shapes and longer trainings; over untrained weights the same bytes are 1.00 to 1.40, by how they were initialised.
"""
FINEST_BITS = 8
FORECAST_SAMPLE = 2**16  # weights; their bytes per weight are within 0.4 % of those of whole models


class Moment(NamedTuple):
    step: int  # which begins then (for what acts in it) or ends (for what follows it)
    seconds: float
    progress: float


@dataclass
class RunPlan:
    config: Config
    step_seconds: float
    source: str  # of the time of a step
    acts: dict[str, list[Moment]]  # by the features' names; `muon_momentum`: steps at full momentum; `training`: all
    bytes_model: tuple[int, int]
    bytes_code: int
    scoring_seconds: tuple[float, float] | None

    @property
    def end(self) -> Moment:
        return self.acts["training"][-1]

    @property
    def problems(self) -> list[str]:
        return plan_problems(self)


def plan_run(
    config: Config, step_seconds: float | None = None, world_size: int = 1, bytes_code: int = 0, val_tokens: int = 0
) -> RunPlan:
    """Plans a run whose steps take `step_seconds` on all ranks together; None and 0: as expected of its preset.

    Raises ConfigError for a time that no step takes, and for rows that can't be dealt to `world_size` ranks.
    """
    count_micro_steps(config, world_size)
    expected, machine = EXPECTED_STEP_SECONDS[config.run.preset]
    source = "as given" if step_seconds else f"assumed: the preset's on {machine}; --step-ms X says otherwise"
    step_seconds = expected if step_seconds is None else step_seconds
    if not val_tokens and "corpus" not in changed_knobs(config):
        val_tokens = EXPECTED_VAL_TOKENS[config.run.preset]
    scoring = forecast_scoring_seconds(config, val_tokens, step_seconds) if val_tokens else None
    room = config.run.limit_bytes - config.run.reserve_bytes - bytes_code
    fits = config.quant.quantizer == "waterfill"
    bytes_model = forecast_filled_bytes(config.model, room) if fits else forecast_bytes(config.model, config.quant)
    acts = simulate_training(config, step_seconds)
    return RunPlan(config, step_seconds, source, acts, bytes_model, bytes_code, scoring)


def simulate_training(config: Config, step_seconds: float) -> dict[str, list[Moment]]:
    """Returns acts by feature in a training whose steps all take `step_seconds`."""
    train, quant, optim = config.train, config.quant, config.optim
    budget = training_budget(config)
    limits = budget.iterations or math.inf, budget.seconds / max(step_seconds, 1e-9) or math.inf
    if not 1e-9 < step_seconds < math.inf or min(limits) > MOST_STEPS:
        raise ConfigError(f"steps of {1000 * step_seconds:g} ms make no plan: give the milliseconds of a real step")
    average = new_average(config.average)
    no_model = nn.Module()  # the average's own rule says when a snapshot is due
    acts: dict[str, list[Moment]] = defaultdict(list)
    step, elapsed, saved_at = 0, 0.0, 0.0
    while not budget.exhausted(step, elapsed, STEP_MARGIN * step_seconds if step else 0.0):
        begin = Moment(step + 1, elapsed, budget.progress(step, elapsed))
        step, elapsed = step + 1, (step + 1) * step_seconds
        end = Moment(step, elapsed, budget.progress(step, elapsed))
        warm = muon_momentum(begin.progress, optim) == optim.muon_momentum
        for feature, moment, acting in (
            ("training", end, True),
            ("qat", begin, quant.qat_enabled and begin.progress >= quant.qat_start),
            ("warmdown", begin, learning_rate_scale(begin.progress, train) < 1),
            ("muon_momentum" if warm else "muon_momentum_warmup", begin, True),
            ("swa", end, average.observe(no_model, end.progress)),
            ("holdout", end, train.holdout_every and step % train.holdout_every == 0),
            ("checkpoint", end, 0 < config.run.checkpoint_seconds <= elapsed - saved_at),
        ):
            if acting:
                acts[feature].append(moment)
        saved_at = acts["checkpoint"][-1].seconds if acts["checkpoint"] else 0.0
    averaged = acts["swa"] and acts["swa"][-1].step == step
    if not averaged and average.observe(no_model, 1.0):  # the last weights count, however early the cap strikes
        acts["swa"].append(end)
    return acts


def forecast_bytes(model: ModelConfig, quant: QuantConfig) -> tuple[int, int]:
    """Returns the least and most bytes that a trained model's artifact is expected to have, from its shapes alone."""
    bits = 0.0
    for name, shape in expected_shapes(model).items():
        width = bits_of(name, shape, quant)
        columns = shape[-1] if width < FP16_BITS else 1
        bits += prod(shape) * gaussian_bits(columns, width, quant.codec)
        if width < FP16_BITS:
            bits += shape[0] * gaussian_bits(1, FP16_BITS, quant.codec)
    return tuple(int(share * bits / 8) for share in TRAINED_SHARE)


def forecast_filled_bytes(model: ModelConfig, room: int) -> tuple[int, int]:
    """Returns the least and most bytes of a waterfill: it fills `room`, unless the finest codes of all take less."""
    most = sum(prod(shape) for shape in expected_shapes(model).values()) * FINEST_BITS // 8
    return (room - near_enough(room), room) if room <= most else (int(most * 0.7), most)


@cache
def gaussian_bits(columns: int, bits: int, codec: str) -> float:
    """Returns the bits that `codec` takes for a Gaussian weight in a row of `columns`, measured on a sample."""
    sample_RC = torch.randn(max(1, FORECAST_SAMPLE // columns), columns, generator=torch.Generator().manual_seed(0))
    name = "blocks.0.mlp.fc.weight"
    (size, *_), _ = encode_streams(quantize_state({name: sample_RC}, QuantConfig(), {name: bits}), codec)
    return size.bits_per_element


def forecast_scoring_seconds(config: Config, tokens: int, step_seconds: float) -> tuple[float, float]:
    """Returns the least and most seconds to score so many tokens, on ranks that train at `step_seconds` a step."""
    score, speed = config.score, SCORING_SPEED
    windows = plan_windows(tokens - 1, score.eval_seq_len, score.eval_stride)
    least = most = len(windows)
    if score.adapter_rank:
        speed, (more, document) = ADAPTING_SPEED, SHORTER_CHUNKS
        most += more * (tokens // document + 1)
    window_seconds = windows.length * step_seconds / config.train.train_batch_tokens
    part = score.mixture * tokens / score.mixture_parts  # as many ranks as parts
    slow, fast = (part / targets for targets in (CORRECTING_SPEED if score.mixture_successors else MIXING_SPEED))
    return least * window_seconds / speed[1] + fast, most * window_seconds / speed[0] + slow


def plan_problems(plan: RunPlan) -> list[str]:
    """Returns what was asked for and would not happen, with what to do."""
    import_rooms()
    config, acts, armed = plan.config, plan.acts, features_on(plan.config)
    missing = {name: "never acts" for name in ("warmdown", "qat", "holdout") if not acts[name]}
    if (snapshots := len({moment.step for moment in acts["swa"]})) < 2:
        missing["swa"] = f"gets {snapshots} of the two snapshots that it needs"
    if not acts["muon_momentum"]:
        missing["muon_momentum_warmup"] = f"never reaches muon_momentum={config.optim.muon_momentum:g}"
    steps = f"in {plan.end.step:,} steps"
    problems = [f"{steps} {name} {text}: {armed[name].hint}" for name, text in missing.items() if name in armed]
    if plan.bytes_model[0] + plan.bytes_code > config.run.limit_bytes:
        problems.append("the artifact would be over limit_bytes: take fewer parameters, or fewer bits")
    if plan.scoring_seconds and 0 < config.score.max_eval_seconds < plan.scoring_seconds[0]:
        problems.append("scoring would take more than max_eval_seconds: raise eval_stride")
    return problems


def timeline(plan: RunPlan) -> list[tuple[Moment, str]]:
    """Returns what happens when, in order: the first and last act of what is counted, the beginning of all else."""
    config, events = plan.config, [(Moment(1, 0.0, 0.0), "training begins")]
    texts = {
        "qat": "weights go through the export grid from here on",
        "muon_momentum": f"momentum is at its full {config.optim.muon_momentum:g} from here on",
        "warmdown": f"learning rate falls from here on ({config.train.warmdown_shape})",
        "swa": "snapshot {} of {} for the average",
        "holdout": "look {} of {} at held-out text",
        "checkpoint": "checkpoint {} of {}",
    }
    for name, text in texts.items():
        moments = plan.acts[name]
        numbers = [1, len(moments)] if "{}" in text and len(moments) > 1 else [1][: len(moments)]
        events += [(moments[number - 1], text.format(number, len(moments))) for number in numbers]
    spent = "iterations" if plan.end.step == config.train.iterations else "seconds"
    events.append((plan.end, f"training ends: its {spent} are used up"))
    return sorted(events, key=lambda event: event[0])


def plan_lines(plan: RunPlan) -> list[str]:
    """Returns the plan as a table of plain text, the forecasts, and the problems."""
    config, end, code = plan.config, plan.end, plan.bytes_code
    rows = [("step", "seconds", "budget", "what happens")]
    rows += [(f"{m.step:,}", f"{m.seconds:,.1f}", f"{m.progress:.1%}", text) for m, text in timeline(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    limit, limit_seconds = config.run.limit_bytes, config.score.max_eval_seconds or math.inf
    least, most = (part + code for part in plan.bytes_model)
    coarser = "; where that is over, weights get coarser" * (most > limit)
    lines = [
        f"plan of {config.run.preset}: {end.step:,} steps in {end.seconds:,.1f} s",
        f"a step: {config.train.train_batch_tokens:,} tokens, {1000 * plan.step_seconds:g} ms ({plan.source})",
        *("  ".join([*map(str.rjust, row, widths), row[3]]) for row in rows),
        f"bytes of artifact {'and' if code else 'without'} code: {least:,} to {most:,} of {limit:,}{coarser}",
    ]
    if plan.scoring_seconds:
        least, most = plan.scoring_seconds
        wider = "; where that is over, the stride grows" * (most > limit_seconds)
        lines.append(f"seconds of scoring: {least:,.0f} to {most:,.0f} of {limit_seconds:,.0f}{wider}")
    return [*lines, *(f"problem: {problem}" for problem in plan.problems)]
