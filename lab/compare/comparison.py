"""Compares two arms of runs: what they show, and what so few runs can't show.

Welch's test decides, always, so that nobody picks a test after seeing the figures; the paired test stands beside it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from golf.config.knobs import parse_json
from lab.compare.comparable import ComparedRun, ComparisonError, check_comparable, read_compared_run, result_files
from lab.compare.statistics import (
    Equivalence,
    MeanDifference,
    SampleSummary,
    bpb_per_nat,
    confidence_interval,
    minimum_detectable_difference,
    paired,
    summarize_sample,
    tost,
    welch,
)

ARMS = ("A", "B")
MEASURE_UNITS = {"val_loss": "nats per token", "val_bpb": "bits per byte", "train_loss": "nats per token"}
ARM_TOLERANCE = 0.01
"""Share by which the arms' mean steps, seconds or tokens may differ before it is said."""
WINDOW_SHARE = 0.1
"""Share of the smaller step count, at its end, over which training losses are averaged at equal steps."""
NEEDS_RUNS = "needs 2 runs an arm"
NOT_RESOLVED = "not resolved"


@dataclass(frozen=True)
class ComparisonSettings:
    alpha: float = 0.05
    """Chance of calling a difference real where there is none, two-sided."""
    variants_tried: int = 1
    """How many variants were tried to find this one; alpha is divided by it (Bonferroni)."""
    margin_nats: float = 0.005
    """Nats per token within which the arms count as equivalent; the competition's rule is in nats, not in bpb."""
    power: float = 0.8
    """Chance of showing the smallest detectable difference."""
    include_invalid: bool = False
    """Compare INVALID runs too; they are labelled."""

    def check(self) -> None:
        """Raises ComparisonError for settings under which no test has a meaning."""
        if not 0 < self.alpha < 1:
            raise ComparisonError(f"alpha must lie between 0 and 1, not {self.alpha}")
        if self.variants_tried < 1:
            raise ComparisonError(f"variants_tried counts this variant too: at least 1, not {self.variants_tried}")
        if not (0 < self.margin_nats < math.inf):
            raise ComparisonError(f"margin_nats must be above 0, not {self.margin_nats}")
        if not self.alpha < self.power < 1:
            raise ComparisonError(f"the power must lie between alpha={self.alpha} and 1, not {self.power}")

    @property
    def corrected_alpha(self) -> float:
        """Bonferroni: with K variants tried, the best of them must pass alpha / K."""
        return self.alpha / self.variants_tried


@dataclass(frozen=True)
class DifferenceFigures:
    test: MeanDifference
    interval: tuple[float, float] | None
    equivalence: Equivalence | None
    minimum_detectable_difference: float | None
    verdict: str
    """`A is lower`, `B is lower`, or `not resolved` with the reason."""


@dataclass(frozen=True)
class Measure:
    """One quantity in both arms; `welch` is None where an arm has one run, `paired` where the runs don't pair."""

    name: str
    unit: str
    arms: dict[str, SampleSummary]
    difference: float
    """Mean of A minus mean of B."""
    margin: float
    """Of equivalence, in `unit`."""
    welch: DifferenceFigures | None
    paired: DifferenceFigures | None


@dataclass(frozen=True)
class Comparison:
    settings: ComparisonSettings
    corrected_alpha: float
    arms: dict[str, list[ComparedRun]]
    measures: list[Measure]
    """val_loss, val_bpb and, where step counts differ, the training loss at equal steps."""
    verdict: str
    """Of Welch's test on val_loss."""
    not_paired: str
    """Why the runs were not paired by seed; empty where they were."""
    equal_steps: str
    """What the training loss at equal steps is, or why there is none; empty where step counts agree."""
    equal_time: bool
    """Whether the arms trained for the same time."""
    same_machines: bool
    """Whether both arms ran on the same machines, and all are known."""
    warnings: list[str]


def share_machines(a: list[ComparedRun], b: list[ComparedRun]) -> bool:
    return all(run.machine_id for run in a + b) and {run.machine_id for run in a} == {run.machine_id for run in b}


def comparison_warnings(a: list[ComparedRun], b: list[ComparedRun]) -> Iterator[str]:
    """Finds what does not forbid the comparison, but may explain its outcome."""
    unknown = sum(not run.machine_id for run in a + b)
    if unknown:
        yield f"{unknown} of {len(a + b)} runs don't say on which machine they ran"
    elif not share_machines(a, b):
        yield "the arms ran on different machines, and a machine can move the score by more than a seed does"
    for key, unit in (("train_seconds", "seconds of training"), ("tokens_per_step", "tokens in a step")):
        if arms_differ(a, b, key):
            yield f"{mean_of_runs(a, key):,.1f} {unit} in A, {mean_of_runs(b, key):,.1f} in B"
    if a[0].config_hash == b[0].config_hash:
        yield f"both arms have the configuration {a[0].config_hash}: they can differ by noise, machine and code only"
    for arm, runs in zip(ARMS, (a, b), strict=True):
        scripts = len({run.code_sha256 for run in runs})
        if scripts > 1:
            yield f"the runs of arm {arm} ran {scripts} different scripts (code_sha256)"
        invalid = [run.run_id for run in runs if not run.valid]
        if invalid:
            yield f"arm {arm} has INVALID runs: {', '.join(invalid)}"


def pairs_by_seed(a: list[ComparedRun], b: list[ComparedRun]) -> tuple[list[tuple[int, int]], str]:
    """Pairs runs of one seed and machine: (index in a and in b of each pair, reason why there are none)."""
    seeds_a, seeds_b = [run.seed for run in a], [run.seed for run in b]
    for arm, seeds in zip(ARMS, (seeds_a, seeds_b), strict=True):
        if len(set(seeds)) < len(seeds):
            return [], f"arm {arm} has a seed more than once"
    if {*seeds_a} != {*seeds_b}:
        listed = [", ".join(map(str, sorted(seeds))) for seeds in (seeds_a, seeds_b)]
        return [], f"the seeds are {listed[0]} in A and {listed[1]} in B"
    pairs = [(seeds_a.index(seed), seeds_b.index(seed)) for seed in sorted(seeds_a)]
    for i, j in pairs:
        if not (a[i].machine_id and b[j].machine_id):
            return [], f"the machine of seed {a[i].seed} is not known in both arms"
        if a[i].machine_id != b[j].machine_id:
            return [], f"seed {a[i].seed} ran on different machines"
    return (pairs, "") if len(pairs) > 1 else ([], NEEDS_RUNS)


def window_losses(run: ComparedRun, window: tuple[int, int]) -> dict[int, float]:
    """Reads training losses by step, inside the window, from metrics.jsonl. Raises ComparisonError, OSError."""
    path, losses = run.path.with_name("metrics.jsonl"), {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line, parse_constant=float)
            if "train_loss" in row and window[0] <= row["step"] <= window[1]:
                losses[row["step"]] = float(row["train_loss"])  # a resumed run writes a step again: the later counts
        except (ValueError, TypeError, KeyError) as error:
            raise ComparisonError(f"{path}, line {number}, is no row of metrics: {error!r}") from error
    if not all(map(math.isfinite, losses.values())):
        raise ComparisonError(f"{path} holds a training loss that is no finite number")
    return losses


def losses_at_equal_steps(runs: list[ComparedRun]) -> tuple[list[float], str]:
    """Returns (mean training loss of each run over the same steps, what that is); ([], why not) where there is none.

    The steps are the last tenth of the smallest step count.
    """
    last = min(run.steps for run in runs)
    first = last - max(1, round(WINDOW_SHARE * last)) + 1
    missing = [run.path.with_name("metrics.jsonl") for run in runs if not run.path.with_name("metrics.jsonl").is_file()]
    if missing:
        return [], f"step counts differ, and equal steps can't be shown: {missing[0]} is missing"
    losses = [window_losses(run, (first, last)) for run in runs]
    shared = sorted(set.intersection(*map(set, losses)))
    if not shared:
        return [], f"step counts differ, and equal steps can't be shown: no step of {first} to {last} is in all runs"
    label = (
        f"train_loss is the training loss at equal steps, the mean of {len(shared):,} steps from {shared[0]:,} to "
        f"{shared[-1]:,}: runs stand at different points of their warm-down there, so it is no final score"
    )
    return [math.fsum(each[step] for step in shared) / len(shared) for each in losses], label


def mean_of_runs(runs: list[ComparedRun], key: str) -> float:
    return math.fsum(getattr(run, key) for run in runs) / len(runs)


def arms_differ(a: list[ComparedRun], b: list[ComparedRun], key: str) -> bool:
    mean_a, mean_b = mean_of_runs(a, key), mean_of_runs(b, key)
    return abs(mean_a - mean_b) > ARM_TOLERANCE * min(mean_a, mean_b)


def figures_of_test(test: MeanDifference, margin: float, settings: ComparisonSettings) -> DifferenceFigures:
    alpha = settings.corrected_alpha
    if test.p_two_sided is None or test.p_two_sided >= alpha:
        verdict = f"{NOT_RESOLVED}: {test.note}" if test.note else NOT_RESOLVED
    else:
        verdict = "A is lower" if test.difference < 0 else "B is lower"
    detectable = minimum_detectable_difference(test, alpha, settings.power)
    return DifferenceFigures(test, confidence_interval(test, alpha), tost(test, margin), detectable, verdict)


def measure_arms(
    name: str, values: dict[str, list[float]], pairs: list[tuple[int, int]], margin: float, settings: ComparisonSettings
) -> Measure:
    """Runs both tests of one quantity; `margin` is in its unit."""
    a, b = (values[arm] for arm in ARMS)
    arms = {arm: summarize_sample(values[arm]) for arm in ARMS}
    independent = figures_of_test(welch(a, b), margin, settings) if min(len(a), len(b)) > 1 else None
    by_seed = paired([a[i] for i, _ in pairs], [b[j] for _, j in pairs]) if pairs else None
    return Measure(
        name=name,
        unit=MEASURE_UNITS[name],
        arms=arms,
        difference=arms["A"].mean - arms["B"].mean,
        margin=margin,
        welch=independent,
        paired=figures_of_test(by_seed, margin, settings) if by_seed else None,
    )


def compare_runs(a: Sequence[Path], b: Sequence[Path], settings: ComparisonSettings) -> Comparison:
    """Compares the runs found at the paths of arm A with those of arm B. Raises ComparisonError, OSError."""
    settings.check()
    paths = dict(zip(ARMS, (a, b), strict=True))
    arms = {arm: [read_compared_run(file) for path in paths[arm] for file in result_files(path)] for arm in ARMS}
    check_comparable(arms, settings.include_invalid)
    pairs, not_paired = pairs_by_seed(arms["A"], arms["B"])
    question = arms["A"][0].question
    margin_bpb = settings.margin_nats * bpb_per_nat(question["val_tokens"], question["val_bytes"])
    measures = [
        measure_arms(name, {arm: [getattr(run, name) for run in arms[arm]] for arm in ARMS}, pairs, margin, settings)
        for name, margin in (("val_loss", settings.margin_nats), ("val_bpb", margin_bpb))
    ]
    equal_steps = ""
    if arms_differ(arms["A"], arms["B"], "steps"):
        losses, equal_steps = losses_at_equal_steps(arms["A"] + arms["B"])
        values = {"A": losses[: len(arms["A"])], "B": losses[len(arms["A"]) :]}
        measures += [measure_arms("train_loss", values, pairs, settings.margin_nats, settings)] if losses else []
    deciding = measures[0].welch
    return Comparison(
        settings=settings,
        corrected_alpha=settings.corrected_alpha,
        arms=arms,
        measures=measures,
        verdict=deciding.verdict if deciding else f"{NOT_RESOLVED}: {NEEDS_RUNS}",
        not_paired=not_paired,
        equal_steps=equal_steps,
        equal_time=not arms_differ(arms["A"], arms["B"], "train_seconds"),
        same_machines=share_machines(arms["A"], arms["B"]),
        warnings=list(comparison_warnings(arms["A"], arms["B"])),
    )
