"""Makes the table of a study: a row for each configuration, means over seeds, paired differences to the baseline.

Seeds are paired: run s of a row differs from run s of the baseline in the configuration alone, and the interval is
Student's t over these differences. A difference is resolved where it is at least two standard errors and its interval
leaves out zero (with few seeds the second says more). A row of one seed that rounds the baseline's own weights has an
interval over blocks of text instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from golf.config.config import Config
from golf.config.knobs import parse_json
from golf.config.quantization import QuantConfig
from golf.config.site_quantizers import WEIGHT_SITES
from golf.quant.tensor_classes import FP16_BITS
from lab.compare.statistics import bootstrap_ratio, confidence_interval, paired, student_t_quantile, summarize_sample
from lab.cost.energy import energy_estimate
from lab.cost.kv_bytes import kv_bytes_per_token
from lab.rates.quant_comparison import parse_variant
from lab.study.measures import bits_text
from lab.study.plan import PlannedRow, StudyPlan, load_plan, run_folder
from lab.study.spec import FINISHED, StudyError, load_result, read_object, require, spec_config

ALPHA = 0.05
FEWEST_ERRORS = 2.0
"""Standard errors below which a difference is not resolved, however many seeds."""
NOT_RUN = {"status": "not run", "error": ""}
SAME_IN_A_TABLE = ("device", "threads", "compile", "torch", "cuda", "numpy", "python")
MEANS = {
    "val_nll": "val_loss", "bpb": "val_bpb", "train_loss": "train_loss", "params": "params",
    "bytes_matrices": "bytes_matrices", "bytes_whole": "bytes_model", "zero_fraction": "zero_fraction",
    "train_ms_per_step": "step_ms", "train_ms_p10": "step_ms_p10", "train_ms_p90": "step_ms_p90",
    "train_tokens_per_s": "train_tokens_per_s",
}  # fmt: skip
"""Cell -> the figure of results whose mean over seeds it is."""


@dataclass(frozen=True)
class RunCurve:
    """curve.jsonl of one training."""

    val: Mapping[int, float] = field(default_factory=dict)
    """Step -> loss of the same validation tokens at every look."""
    codes: Sequence[Mapping[str, Any]] = ()
    """Rows of step, matrix, shares of codes, and flips since the look before."""


@dataclass(frozen=True)
class CurveBand:
    """Mean, least and most of several runs at the steps that all of them have."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def load_run_curve(folder: Path) -> RunCurve:
    """Reads a run's curve, empty where it has none. Raises StudyError for a damaged file."""
    path = folder / "curve.jsonl"
    if not path.is_file():
        return RunCurve()
    try:
        rows = [parse_json(line, parse_constant=float) for line in path.read_bytes().splitlines()]
        val = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    except (ValueError, KeyError, TypeError):
        raise StudyError(f"{path}: damaged: remove its folder and run the study again with --resume") from None
    return RunCurve(val, [row for row in rows if "matrix" in row])


def band(curves: Sequence[Mapping[int, float]]) -> CurveBand:
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return CurveBand(steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def differences(curves: Sequence[Mapping[int, float]], others: Sequence[Mapping[int, float]]) -> list[dict[int, float]]:
    """Returns each curve less the other of its pair, where both have a value."""
    pairs = zip(curves, others, strict=True)
    return [{step: one[step] - other[step] for step in one if step in other} for one, other in pairs]


def step_of_loss(curve: CurveBand, loss: float) -> float | None:
    """Returns the first step at which the mean curve is down at `loss`, on straight lines between looks; None: never.

    Before the first look nothing is known: a loss that is reached by then has that look's step.
    """
    for number, (step, value) in enumerate(zip(curve.steps, curve.mean, strict=True)):
        if value <= loss:
            if number == 0:
                return float(step)
            before, above = curve.steps[number - 1], curve.mean[number - 1]
            return before + (step - before) * (above - loss) / (above - value)
    return None


@dataclass(frozen=True)
class StudyRow:
    """One configuration: every name that it has in the study, and what its runs left, seed by seed."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    keys: tuple[str, ...]
    results: Sequence[Mapping[str, Any]]
    curves: Sequence[RunCurve]
    blocks: Sequence[Mapping[str, Any]]
    config: Config | None
    method: str
    source: str

    @property
    def label(self) -> str:
        return " = ".join(f"{group} {name}" for group, name in zip(self.groups, self.names, strict=True))

    def values(self, figure: str) -> list[Any]:
        """Returns a figure of the seeds that have it."""
        return [result[figure] for result in self.results if result.get(figure) is not None]

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return float(np.mean(values)) if values else None

    @property
    def val_curves(self) -> list[Mapping[int, float]]:
        return [curve.val for curve in self.curves if curve.val]


@dataclass(frozen=True)
class Study:
    """All rows, of one device and on one data."""

    plan: StudyPlan
    rows: Sequence[StudyRow]
    environment: Mapping[str, Any]

    @property
    def baseline(self) -> StudyRow:
        return next(row for row in self.rows if self.plan.baseline in row.names)


def load_study_results(out: Path) -> Study:
    """Reads what a study's folder holds. Raises StudyError where it can't be compared in one table."""
    plan = load_plan(out)
    keys = dict.fromkeys(row.keys for row in plan.rows)
    rows = [load_row(out, own, [row for row in plan.rows if row.keys == own]) for own in keys]
    results = [result for row in rows for result in row.results if "environment" in result]
    check_one_device(results)
    check_same_tokens(results)
    return Study(plan, rows, results[0]["environment"] if results else {})


def load_row(out: Path, keys: tuple[str, ...], same: Sequence[PlannedRow]) -> StudyRow:
    folders = [run_folder(out, key) for key in keys]
    results = [sound_part(load_result(folder, key) or NOT_RUN) for folder, key in zip(folders, keys, strict=True)]
    blocks = [read_object(path) if (path := folder / "blocks.json").is_file() else {} for folder in folders]
    specs = [path for folder in folders if (path := folder / "spec.json").is_file()]
    return StudyRow(
        tuple(row.name for row in same), tuple(row.group for row in same), keys, results,
        [load_run_curve(f) if r["status"] == FINISHED else RunCurve() for f, r in zip(folders, results, strict=True)],
        blocks, spec_config(specs[0]) if specs else None, same[0].method, same[0].source,
    )  # fmt: skip


def sound_part(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the result, without its figures where the run is not sound."""
    if result["status"] == FINISHED:
        return result
    return {name: result[name] for name in ("status", "error", "seed") if name in result}


def check_one_device(results: Sequence[Mapping[str, Any]]) -> None:
    """Raises StudyError for results of two devices or versions: times would not compare, nor would the last bits."""
    for name in SAME_IN_A_TABLE:
        found = sorted({str(result["environment"].get(name)) for result in results})
        several = f"the runs are of {' and '.join(found)} ({name}): a table is of one device and one set of versions"
        require(len(found) <= 1, f"{several}; run all of them on one, into an --out of its own")


def check_same_tokens(results: Sequence[Mapping[str, Any]]) -> None:
    found = {(result["val_data_id"], result["val_tokens"], result["val_bytes"]) for result in results}
    require(len(found) <= 1, "the runs were scored on different tokens: run the study into an --out of its own")


@dataclass(frozen=True)
class RowDifference:
    """A row's loss less the baseline's."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    verdict: str = ""
    basis: str = ""


def row_difference(row: StudyRow, baseline: StudyRow) -> RowDifference:
    """Compares a row with the baseline, paired over the seeds that both have finished."""
    if row is baseline:
        return RowDifference(verdict="reference")
    pairs = zip(row.results, baseline.results, strict=True)
    seeds = [seed for seed, both in enumerate(pairs) if all("val_loss" in result for result in both)]
    if not seeds:
        return RowDifference()
    if len(seeds) == 1:
        return difference_of_one_seed(row, baseline, seeds[0])
    test = paired(*([side.results[seed]["val_loss"] for seed in seeds] for side in (row, baseline)))
    interval, basis = confidence_interval(test, ALPHA), f"{len(seeds)} seeds"
    if interval is None:
        return RowDifference(test.difference, verdict="not resolved", basis=f"{basis}, {test.note}")
    verdict = verdict_of(test.difference, test.standard_error, not interval[0] <= 0 <= interval[1])
    return RowDifference(test.difference, *interval, test.standard_error, verdict, basis)


def verdict_of(difference: float, error: float, excludes_zero: bool) -> str:
    if not excludes_zero or abs(difference) < FEWEST_ERRORS * error:
        return "not resolved"
    return "worse" if difference > 0 else "better"


def difference_of_one_seed(row: StudyRow, baseline: StudyRow, seed: int) -> RowDifference:
    """Compares over blocks of text where the row rounds the baseline's own weights: no noise between seeds is in that.

    Any other pair of one seed is not resolved.
    """
    result, own, others = row.results[seed], row.blocks[seed].get("nats", []), baseline.blocks[seed].get("nats", [])
    difference = result["val_loss"] - baseline.results[seed]["val_loss"]
    if result.get("source_key") != baseline.keys[seed] or len(own) != len(others) or len(own) < 2:
        return RowDifference(difference, verdict="not resolved", basis="one seed")
    tokens, width = result["val_tokens"], row.blocks[seed]["block_tokens"]
    counts = [min(width, tokens - start) for start in range(0, tokens, width)]
    found = bootstrap_ratio(np.subtract(own, others), counts, ALPHA)
    error = (found.high - found.low) / (2 * -student_t_quantile(ALPHA / 2, 1e6))
    verdict = verdict_of(difference, error, found.resolved)
    return RowDifference(difference, found.low, found.high, error, verdict, f"one seed, {len(own)} blocks of text")


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Returns Student's interval of the mean; none for fewer than two values."""
    if len(values) < 2:
        return None, None
    sample = summarize_sample(values)
    half = -student_t_quantile(ALPHA / 2, sample.n - 1) * sample.sd / math.sqrt(sample.n)
    return sample.mean - half, sample.mean + half


def row_status(row: StudyRow) -> str:
    """Returns finished, or how many seeds are, and what became of the first that is not."""
    broken = [result for result in row.results if result["status"] != FINISHED]
    if not broken:
        return FINISHED
    cause = ": ".join(filter(None, (broken[0]["status"], broken[0].get("error", ""))))
    return f"{len(row.results) - len(broken)} of {len(row.results)} finished; {cause}"


def rounded_quant(config: Config, row: StudyRow) -> QuantConfig:
    """Returns the row's bits as the estimate of energy reads them: of a rounding, its own."""
    variant = parse_variant(row.method, keeps_embedding=True) if row.method else None
    if variant is None:
        return config.quant
    # Stored as it is, in 16 bits; and codes with a zero point are no signs, whatever their width.
    bits = FP16_BITS if variant.spec is None else max(2 if variant.spec.symmetric else 3, variant.spec.bits)
    widths = {"mlp_bits": bits, "attn_bits": bits, "bigram_bits": bits, "embed_bits": FP16_BITS}
    return QuantConfig(**(vars(config.quant) | {f"weight_{site}": "" for site in WEIGHT_SITES} | widths))


def cost_cells(row: StudyRow) -> dict[str, Any]:
    """Returns the bytes of keys and values, and the estimate of energy by the configuration and the codes' zeros."""
    zeros = row.values("zero_shares")
    if row.config is None or not zeros:
        return {}
    shares = {site: float(np.mean([one[site] for one in zeros])) for site in zeros[0]}
    estimate = energy_estimate(row.config.model, rounded_quant(row.config, row), shares)
    return {
        "kv_bytes_per_token": kv_bytes_per_token(row.config.model).per_token,
        "energy_uj": estimate.microjoules(),
        "energy_uj_zero_skip": estimate.microjoules(zero_skip=True),
    }


def equal_loss_cells(row: StudyRow, baseline: StudyRow) -> dict[str, Any]:
    """Returns when the baseline had the row's last loss, and when the row had the baseline's."""
    own, other = band(row.val_curves), band(baseline.val_curves)
    if not own.steps or not other.steps:
        return {}

    def reached(curve: CurveBand, loss: float) -> str:
        step = step_of_loss(curve, loss)
        return f">{curve.steps[-1]}" if step is None else f"{step:.0f}"

    return {
        "baseline_step_of_equal_loss": reached(other, own.mean[-1]),
        "steps_to_baseline_loss": reached(own, other.mean[-1]),
    }


def table_rows(study: Study) -> list[dict[str, Any]]:
    """Returns the cells of the table, as numbers and texts; None where there is nothing."""
    return [row_cells(row, study) for row in study.rows]


def row_cells(row: StudyRow, study: Study) -> dict[str, Any]:
    losses, found = row.values("val_loss"), row_difference(row, study.baseline)
    bits = next((bits_text(r["weight_bits"], r["activation_bits"]) for r in row.results if "weight_bits" in r), None)
    cells = {cell: row.mean(figure) for cell, figure in MEANS.items()}
    nll, train_loss, covered = cells["val_nll"], cells["train_loss"], row.mean("covered")
    low, high = mean_interval(losses)
    cells |= {
        "rows": row.label, "seeds": len(losses), "status": row_status(row), "val_nll_low": low, "val_nll_high": high,
        "perplexity": None if nll is None else math.exp(nll),
        "delta": found.mean, "delta_low": found.low, "delta_high": found.high, "delta_error": found.error,
        "verdict": found.verdict, "delta_basis": found.basis,
        "train_val_gap": None if nll is None or train_loss is None else nll - train_loss,
        "bits": bits, "covered_percent": None if covered is None else 100 * covered,
        "device": study.environment.get("device"), "peak_mib": max(row.values("peak_mib"), default=None),
        "method": row.method,
    }  # fmt: skip
    return cells | cost_cells(row) | equal_loss_cells(row, study.baseline)
