"""The table of a study: a row for each configuration, its means over seeds, its paired difference to the baseline.

Seeds are paired: run s of a row differs from run s of the baseline in the configuration alone, and the interval is
Student's t over these differences. A difference is resolved where it is at least two standard errors and its interval
leaves out zero (with few seeds the second says more). A row of one seed that rounds the baseline's own weights has an
interval over blocks of text instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golf.config.config import Config, QuantConfig
from golf.quant.tensor_classes import FP16_BITS
from lab.compare.statistics import bootstrap_ratio, confidence_interval, paired, student_t_quantile, summarize_sample
from lab.cost.energy import energy_estimate
from lab.cost.kv_bytes import kv_bytes_per_token
from lab.rates.quant_comparison import parse_variant
from lab.study.codes import bits_text
from lab.study.curves import CurveBand, RunCurve, band, load_run_curve, step_of_loss
from lab.study.plan import PlannedRow, SavedPlan, load_plan, run_folder
from lab.study.spec import (
    FINISHED,
    AblationError,
    load_result,
    read_study_json,
    spec_config,
)

ALPHA = 0.05
FEWEST_ERRORS = 2.0
"""Standard errors below which a difference is not resolved, however many seeds."""
NOT_RUN = {"status": "not run", "error": ""}
SAME_IN_A_TABLE = ("device", "threads", "compile", "torch", "cuda", "numpy", "python")


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
        """A figure of the seeds that have it."""
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

    plan: SavedPlan
    rows: Sequence[StudyRow]
    environment: Mapping[str, Any]

    @property
    def baseline(self) -> StudyRow:
        return next(row for row in self.rows if self.plan.baseline in row.names)


def load_study_results(out: Path) -> Study:
    """What a study's folder holds. Raises AblationError where it can't stand in one table."""
    plan = load_plan(out)
    by_keys: dict[tuple[str, ...], list[PlannedRow]] = {}
    for row in plan.rows:
        by_keys.setdefault(row.keys, []).append(row)
    rows = [load_row(out, keys, same) for keys, same in by_keys.items()]
    results = [result for row in rows for result in row.results if "environment" in result]
    check_one_device(results)
    check_same_tokens(results)
    return Study(plan, rows, results[0]["environment"] if results else {})


def load_row(out: Path, keys: tuple[str, ...], same: Sequence[PlannedRow]) -> StudyRow:
    folders = [run_folder(out, key) for key in keys]
    results = [sound_part(load_result(folder, key) or NOT_RUN) for folder, key in zip(folders, keys, strict=True)]
    specs = [folder / "spec.json" for folder in folders if (folder / "spec.json").is_file()]
    block_files = [folder / "blocks.json" for folder in folders]
    blocks = [read_study_json(path) if path.is_file() else {} for path in block_files]
    return StudyRow(
        tuple(row.name for row in same), tuple(row.group for row in same), keys, results,
        [load_run_curve(f) if r["status"] == FINISHED else RunCurve() for f, r in zip(folders, results, strict=True)],
        blocks, spec_config(specs[0]) if specs else None,
        same[0].method, same[0].source,
    )  # fmt: skip


def sound_part(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a run that is not sound, what became of it and no figure."""
    if result["status"] == FINISHED:
        return result
    return {name: result[name] for name in ("status", "error", "seed") if name in result}


def check_one_device(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise AblationError for results of two devices or versions: times would not compare, nor would the last bits."""
    for name in SAME_IN_A_TABLE:
        found = sorted({str(result["environment"].get(name)) for result in results})
        if len(found) > 1:
            raise AblationError(
                f"the runs are of {' and '.join(found)} ({name}): a table is of one device and one set of versions; "
                "run all of them on one, into an --out of its own"
            )


def check_same_tokens(results: Sequence[Mapping[str, Any]]) -> None:
    found = {(result["val_data_id"], result["val_tokens"], result["val_bytes"]) for result in results}
    if len(found) > 1:
        raise AblationError("the runs were scored on different tokens: run the study into an --out of its own")


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
    """Paired over the seeds that both have finished."""
    if row is baseline:
        return RowDifference(verdict="reference")
    pairs = [
        (one["val_loss"], other["val_loss"])
        for one, other in zip(row.results, baseline.results, strict=True)
        if "val_loss" in one and "val_loss" in other
    ]
    if not pairs:
        return RowDifference()
    if len(pairs) == 1:
        return difference_of_one_seed(row, baseline, pairs[0])
    test = paired(*map(list, zip(*pairs, strict=True)))
    interval = confidence_interval(test, ALPHA)
    seeds = f"{len(pairs)} seeds"
    if interval is None:
        return RowDifference(test.difference, verdict="not resolved", basis=f"{seeds}, {test.note}")
    resolved = abs(test.difference) >= FEWEST_ERRORS * test.standard_error and not interval[0] <= 0 <= interval[1]
    return RowDifference(
        test.difference, *interval, test.standard_error, told_verdict(test.difference, resolved), seeds
    )


def told_verdict(difference: float, resolved: bool) -> str:
    return ("worse" if difference > 0 else "better") if resolved else "not resolved"


def difference_of_one_seed(row: StudyRow, baseline: StudyRow, pair: tuple[float, float]) -> RowDifference:
    """One seed says nothing of the noise between seeds; rounding the baseline's own weights has none of it."""
    difference = pair[0] - pair[1]
    at = next(
        i
        for i, (a, b) in enumerate(zip(row.results, baseline.results, strict=True))
        if "val_loss" in a and "val_loss" in b
    )
    own, others = row.blocks[at].get("nats", []), baseline.blocks[at].get("nats", [])
    if row.results[at].get("source_key") != baseline.keys[at] or len(own) != len(others) or len(own) < 2:
        return RowDifference(difference, verdict="not resolved", basis="one seed")
    tokens, width = row.results[at]["val_tokens"], row.blocks[at]["block_tokens"]
    counts = [min(width, tokens - start) for start in range(0, tokens, width)]
    found = bootstrap_ratio(np.subtract(own, others), counts, ALPHA)
    error = (found.high - found.low) / (2 * -student_t_quantile(ALPHA / 2, 1e6))
    resolved = found.resolved and abs(difference) >= FEWEST_ERRORS * error
    basis = f"one seed, {len(own)} blocks of text"
    return RowDifference(difference, found.low, found.high, error, told_verdict(difference, resolved), basis)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's interval of the mean; none for one value."""
    sample = summarize_sample(values)
    if sample.sd is None:
        return None, None
    half = -student_t_quantile(ALPHA / 2, sample.n - 1) * sample.sd / math.sqrt(sample.n)
    return sample.mean - half, sample.mean + half


def row_status(row: StudyRow) -> str:
    """finished, or how many seeds are, and what became of the first that is not."""
    broken = [result for result in row.results if result["status"] != FINISHED]
    if not broken:
        return FINISHED
    count, told = len(row.results) - len(broken), (broken[0]["status"], broken[0].get("error", ""))
    return f"{count} of {len(row.results)} finished; {': '.join(filter(None, told))}"


def rounded_quant(config: Config, row: StudyRow) -> QuantConfig:
    """What the row's codes are, as the estimate of energy reads it: of a rounding, its own bits."""
    variant = parse_variant(row.method, keeps_embedding=True) if row.method else None
    if variant is None:
        return config.quant
    knobs = {f"weight_{site}": "" for site in ("q", "k", "v", "o", "up", "down", "embed", "head")}
    # Stored as it is, in 16 bits; and codes with a zero point are no signs, whatever their width.
    bits = FP16_BITS if variant.spec is None else max(2 if variant.spec.symmetric else 3, variant.spec.bits)
    widths = {"mlp_bits": bits, "attn_bits": bits, "bigram_bits": bits, "embed_bits": FP16_BITS}
    return QuantConfig(**(vars(config.quant) | knobs | widths))


def cost_cells(row: StudyRow) -> dict[str, Any]:
    """Bytes of keys and values, and the estimate of energy, from the configuration and the codes' zeros."""
    done = [result for result in row.results if "zero_shares" in result]
    if row.config is None or not done:
        return {}
    shares = {site: float(np.mean([r["zero_shares"][site] for r in done])) for site in done[0]["zero_shares"]}
    estimate = energy_estimate(row.config.model, rounded_quant(row.config, row), shares)
    return {
        "kv_bytes_per_token": kv_bytes_per_token(row.config.model).per_token,
        "energy_uj": estimate.microjoules(),
        "energy_uj_zero_skip": estimate.microjoules(zero_skip=True),
    }


def equal_loss_cells(row: StudyRow, baseline: StudyRow) -> dict[str, Any]:
    """When the baseline had the row's last loss, and when the row had the baseline's."""
    own, other = band(row.val_curves), band(baseline.val_curves)
    if not own.steps or not other.steps:
        return {}
    return {
        "baseline_step_of_equal_loss": reached(other, own.mean[-1]),
        "steps_to_baseline_loss": reached(own, other.mean[-1]),
    }


def reached(curve: CurveBand, loss: float) -> str:
    step = step_of_loss(curve, loss)
    return f">{curve.steps[-1]}" if step is None else f"{step:.0f}"


def table_rows(study: Study) -> list[dict[str, Any]]:
    """The cells of the table, as numbers and texts; None where there is nothing."""
    return [row_cells(row, study) for row in study.rows]


def row_cells(row: StudyRow, study: Study) -> dict[str, Any]:
    losses, found = row.values("val_loss"), row_difference(row, study.baseline)
    done = [result for result in row.results if "weight_bits" in result]
    train_loss, nll = row.mean("train_loss"), row.mean("val_loss")
    low, high = mean_interval(losses) if losses else (None, None)
    cells = {
        "rows": row.label, "seeds": len(losses), "status": row_status(row),
        "val_nll": nll, "val_nll_low": low, "val_nll_high": high,
        "perplexity": math.exp(nll) if nll is not None else None, "bpb": row.mean("val_bpb"),
        "delta": found.mean, "delta_low": found.low, "delta_high": found.high, "delta_error": found.error,
        "verdict": found.verdict, "delta_basis": found.basis,
        "train_loss": train_loss,
        "train_val_gap": nll - train_loss if nll is not None and train_loss is not None else None,
        "bits": bits_text(done[0]["weight_bits"], done[0]["activation_bits"]) if done else None,
        "params": row.mean("params"), "covered_percent": scaled(row.mean("covered"), 100),
        "bytes_matrices": row.mean("bytes_matrices"), "bytes_whole": row.mean("bytes_model"),
        "zero_fraction": row.mean("zero_fraction"),
        "train_ms_per_step": row.mean("step_ms"), "train_ms_p10": row.mean("step_ms_p10"),
        "train_ms_p90": row.mean("step_ms_p90"), "train_tokens_per_s": row.mean("train_tokens_per_s"),
        "device": study.environment.get("device"), "peak_mib": max(row.values("peak_mib"), default=None),
        "method": row.method,
    }  # fmt: skip
    return cells | cost_cells(row) | equal_loss_cells(row, study.baseline)


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
