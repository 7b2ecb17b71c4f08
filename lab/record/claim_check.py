"""Holds submission.json against logs and results: types, headline, each seed's score, every number."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from lab.record.finding import Findings, error, listed, note, warning
from lab.record.headline import LAST, TOLERANCE
from lab.record.log_reading import LogReading
from lab.record.record_folder import ALIASES, RecordFolder
from lab.record.run_check import is_number

CANONICAL_KEYS: dict[str, tuple[bool, type | tuple[type, ...]]] = {
    "author": (True, str), "github_id": (True, str), "name": (False, str), "date": (False, str),
    "val_bpb": (True, (int, float)), "val_loss": (False, (int, float)), "blurb": (False, str), "track": (False, str),
    "bytes_total": (False, int), "bytes_code": (False, int), "seeds": (False, (list, dict)),
    "seed_results": (False, dict), "hardware": (False, str), "val_bpb_std": (False, (int, float)),
    "val_loss_std": (False, (int, float)), "pytorch_version": (False, str), "step_stop": (False, int),
    "wallclock_seconds": (False, (int, float)), "eval_time_seconds": (False, (int, float)),
    "artifact_bytes_max": (False, int), "artifact_bytes_mean": (False, (int, float)),
}  # fmt: skip
"""Key -> (whether the rules ask for it, type)."""
WANTED_KEYS = ("name", "date", "val_loss", "bytes_total", "seeds", "blurb")
"""Not required, but most published records have them."""
MOST_VALUE_TEXT, LAST_EARLIER = 60, 3
FIGURE_DIGITS = 8
"""Decimals of scores: as many as a log's exact line has."""


def key_findings(record: RecordFolder) -> Findings:
    """Checks keys and types of submission.json."""
    claims = record.claims
    absent = []
    for key, (required, kinds) in CANONICAL_KEYS.items() if claims is not None else ():
        if claims.get(key) is not None or (required and key in claims):
            yield from type_findings(key, claims[key], kinds)
        elif alias := next((other for other in ALIASES.get(key, ()) if other in claims), None):
            yield note("S05-json-alias", f"submission.json says {alias!r}: the field's key is {key!r}")
        elif required:
            yield error("S03-json-key", f"submission.json has no {key!r}")
        elif key in WANTED_KEYS:
            absent.append(key)
    if absent:
        yield note("S03-json-key", f"submission.json does without {listed(absent)}, which most have")


def type_findings(key: str, value: Any, kinds: type | tuple[type, ...]) -> Findings:
    wrong, is_figure = "", kinds in (int, (int, float))
    if is_figure and isinstance(value, list) and value and all(map(is_number, value)):
        yield note("S04-json-type", f"submission.json: {key} is a list, one number for each seed")
    elif is_figure and not is_number(value):
        wrong = f"must be a finite number, not {short(value)}"
    elif kinds is int and value != int(value):
        wrong = f"must be a whole number, not {short(value)}"
    elif not is_figure and not isinstance(value, kinds):
        wrong = f"must be {'text' if kinds is str else 'a list or an object'}, not {short(value)}"
    elif kinds is str and not value.strip():
        wrong = "is empty"
    if wrong:
        yield error("S04-json-type", f"submission.json: {key} {wrong}")


def short(value: Any) -> str:
    """Writes a value of somebody's JSON for a text of one line."""
    if isinstance(value, int) and abs(value) >= 10**MOST_VALUE_TEXT:
        return "a whole number of more digits than any figure has"
    text = repr(value)
    return text if len(text) <= MOST_VALUE_TEXT else text[:MOST_VALUE_TEXT] + "..."


# ---- the headline ----


def headline_findings(record: RecordFolder) -> Findings:
    """Holds the claimed val_bpb against the logs: it is their mean, or that of one log, or what else."""
    claim, headline = record.claimed("val_bpb"), record.headline
    scored = [log for log in record.logs if log.finals]
    if claim is None or not scored:
        return
    if headline.kind in ("mean", "one"):
        yield from chosen_log_findings(record, claim)
        return
    late = [(log.name, score) for log in scored for score in [*log.earlier][-LAST_EARLIER:]]
    earlier = [f"line {score.line} of {name}" for name, score in late if is_near(score.val_bpb, claim)]
    if headline.kind == "subset":
        names = listed(log.name for log in headline.logs)
        text = f"is the mean of {names} alone: say why the other logs do not count, or take them out"
    elif earlier:
        text = f"is a score of weights before quantization ({earlier[0]}), not of the artifact"
    else:
        text = "is the final value of no log, and no mean of them"
    yield error("S12-headline", f"val_bpb {claim:.6g} of submission.json {text}; {describe_endings(scored)}")
    best = min(score.val_bpb for log in scored for score in log.finals.values())
    if claim < best - TOLERANCE and not earlier:
        text = f"val_bpb {claim:.6g} is better than every final value in every log (best {best:.6f})"
        yield error("S13-too-good", text)


def chosen_log_findings(record: RecordFolder, claim: float) -> Findings:
    """Finds logs of the same settings and of other seeds that the claim leaves out."""
    headline, seeds = record.headline, {log.seed for log in record.headline.logs}
    stage = LAST if LAST in headline.stages else min(headline.stages)
    twins = [log for log in twins_of(record, headline.logs[0]) if stage == LAST or stage in log.finals]
    if all(log in headline.logs or (headline.kind == "mean" and log.seed in seeds) for log in twins):
        return
    mean = statistics.fmean((twin.finals.get(stage) or twin.last_final).val_bpb for twin in twins)
    which = "that" if headline.kind == "one" else "the mean"
    text = f"is {which} of {listed(log.name for log in headline.logs)} alone"
    yield warning("S15-one-of-many", f"val_bpb {claim:.6g} {text}; the mean over the {len(twins)} logs is {mean:.6f}")


def twins_of(record: RecordFolder, log: LogReading) -> list[LogReading]:
    """Returns the logs of the same settings that reach a final score, the log among them."""
    return [other for other in record.logs if other.finals and not differing_settings([log, other])]


def is_near(value: float, claim: float) -> bool:
    return abs(value - claim) <= TOLERANCE


def differing_settings(logs: Sequence[LogReading]) -> dict[str, dict[str, list[str]]]:
    """Returns setting -> value -> logs, where not all agree (a setting that a log does not print is no difference)."""
    differing = {}
    for key in sorted({key for log in logs for key in log.config}):
        values: dict[str, list[str]] = {}
        for log in logs:
            if key in log.config:
                values.setdefault(log.config[key], []).append(log.name)
        if len(values) > 1:
            differing[key] = values
    return differing


def describe_endings(logs: Sequence[LogReading]) -> str:
    endings = [(log.name, log.last_final.val_bpb) for log in logs if log.last_final]
    mean = f", mean {statistics.fmean(value for _, value in endings):.6f}" if len(endings) > 1 else ""
    return "the logs end with " + listed(f"{value:.6f} in {name}" for name, value in endings) + mean


# ---- the other claims ----


def loss_findings(record: RecordFolder) -> Findings:
    """Holds the claimed val_loss against each log's, and the mean over the logs, as the headline."""
    claim, stages = record.claimed("val_loss"), loss_stages(record)
    if claim is None or not stages:
        return
    fitting = {name for name, values in stages.items() if any(is_near(v, claim) for v in means_and_values(values))}
    if not fitting:
        known = listed(f"{value:.6f}" for values in stages.values() for value in values)
        bpbs = [score.val_bpb for log in record.counted for score in log.finals.values()]
        hint = ": it is a val_bpb" if min(bpbs) - TOLERANCE <= claim <= max(bpbs) + TOLERANCE else ""
        yield error("S17-val-loss", f"val_loss {claim:.6g} of submission.json is in no log ({known}){hint}")
    elif not fitting & stage_names(record, record.headline.stages):
        names = listed(sorted(record.headline.stages - {LAST}) or [LAST])
        text = f"val_loss {claim:.6g} is that of {listed(sorted(fitting))}, val_bpb that of {names}"
        if record.headline.stages:
            yield warning("S19-other-stage", f"{text}: two stages of evaluation")


def loss_stages(record: RecordFolder) -> dict[str, list[float]]:
    """Returns stage -> val_loss of each log that the claims rest on."""
    stages: dict[str, list[float]] = {}
    for log in record.counted:
        for name, score in log.finals.items():
            if score.val_loss is not None:
                stages.setdefault(name, []).append(score.val_loss)
    return stages


def means_and_values(values: Sequence[float]) -> list[float]:
    return [*values, statistics.fmean(values)]


def stage_names(record: RecordFolder, stages: Iterable[str]) -> set[str]:
    """Returns the names of stages, that of the last line of each log among them."""
    last = {log.last_final.name for log in record.counted if log.last_final} if LAST in stages else set()
    return {*stages, *last}


def seed_findings(record: RecordFolder) -> Findings:
    """Holds seed_results against the log of each seed, and the standard deviation against that of the seeds."""
    lost, others = [], {}
    for seed, score in record.seed_scores.items():
        logs = logs_of(record, seed)
        fitting = {name for log in logs for name, final in log.finals.items() if is_near(final.val_bpb, score)}
        if not logs and not any(log.name_seed == seed_number(seed) for log in record.logs):
            lost.append(seed)
        elif any(log.finals for log in logs) and not fitting:
            yield error("S16-seed-result", f"seed {seed}: {lost_score(record, logs, score)}")
        elif fitting and record.headline.stages and not fitting & stage_names(record, record.headline.stages):
            others.setdefault(listed(sorted(fitting)), []).append(seed)
    if lost and any(log.seeds for log in record.logs):
        yield error("S16-seed-result", f"submission.json has results of seed {listed(lost)}, but no log is of that")
    if bare := [seed for seed in record.seed_results if seed not in record.seed_scores]:
        yield note("S16-seed-result", f"submission.json gives no val_bpb of seed {listed(bare)}")
    for stage, seeds in others.items():
        names = listed(sorted(record.headline.stages - {LAST}) or sorted(stage_names(record, [LAST])))
        text = f"the val_bpb of seed {listed(seeds)} is that of {stage}, the headline that of {names}"
        yield warning("S19-other-stage", text)
    yield from spread_findings(record, [*record.seed_scores.values()])


def seed_number(seed: str) -> int:
    found = re.search(r"\d{1,18}", seed)
    return int(found[0]) if found else -1


def logs_of(record: RecordFolder, seed: str) -> list[LogReading]:
    """Returns the logs of a seed: those that say it, or else those that say none and are named after it."""
    said = [log for log in record.logs if log.seed == seed_number(seed)]
    return said or [log for log in record.logs if log.seed is None and log.name_seed == seed_number(seed)]


def lost_score(record: RecordFolder, logs: Sequence[LogReading], score: float) -> str:
    """Says that a claimed score is not in the logs of its seed, and in which log it is."""
    ends = listed(f"{log.last_final.val_bpb:.6f} in {log.name}" for log in logs if log.last_final)
    homes = [log for log in record.logs if any(is_near(final.val_bpb, score) for final in log.finals.values())]
    home = f"; {homes[0].name}, of seed {homes[0].seed}, has it" if homes else ""
    return f"val_bpb {score:.6g} of submission.json is in no log of that seed ({ends}){home}"


def spread_findings(record: RecordFolder, values: list[float]) -> Findings:
    claim = record.claimed("val_bpb_std")
    finals = [log.last_final.val_bpb for log in record.counted if log.last_final]
    staged = [
        [log.finals[s].val_bpb for log in record.headline.logs if s in log.finals] for s in record.headline.stages
    ]
    series = [found for found in (values, finals, *staged) if len(found) > 1 and all(map(math.isfinite, found))]
    deviations = [spread(found) for found in series for spread in (statistics.stdev, statistics.pstdev)]
    if claim is None or not deviations:
        return
    if not any(abs(claim - deviation) <= max(TOLERANCE, 0.02 * deviation) for deviation in deviations):
        text = f"val_bpb_std {claim:.6g} is not the standard deviation of the seeds ({deviations[0]:.6f})"
        yield error("S18-spread", text)


# ---- the claims that follow from results ----


def rounded_mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), FIGURE_DIGITS)


def rounded_spread(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation; None where one seed has none."""
    return round(statistics.stdev(values), FIGURE_DIGITS) if len(values) > 1 else None


MEASURED_CLAIMS: dict[str, tuple[str, Callable[[list[Any]], Any]]] = {
    "val_loss": ("val_loss", rounded_mean), "val_bpb": ("val_bpb", rounded_mean),
    "val_loss_std": ("val_loss", rounded_spread), "val_bpb_std": ("val_bpb", rounded_spread),
    "seeds": ("seed", list), "seed_results": ("seed", list), "bytes_total": ("bytes_total", max),
    "bytes_code": ("bytes_code", itemgetter(0)), "artifact_bytes_max": ("bytes_total", max),
    "artifact_bytes_mean": ("bytes_total", lambda values: round(statistics.fmean(values), 1)),
    "limit_bytes": ("limit_bytes", min), "step_stop": ("steps", max),
    "train_steps_mean": ("steps", lambda values: round(statistics.fmean(values), 1)),
    "wallclock_seconds": ("train_seconds", lambda values: round(max(values), 3)),
    "eval_time_seconds": ("eval_seconds", lambda values: round(max(values), 3)),
    "model_params": ("params", itemgetter(0)), "eval_seq_len": ("eval_seq_len", itemgetter(0)),
    "eval_stride": ("eval_stride", max), "hardware": ("machine", lambda values: "; ".join(sorted(set(values)))),
    "pytorch_version": ("torch", lambda values: ", ".join(sorted(set(values)))),
    "python_version": ("python", lambda values: ", ".join(sorted(set(values)))),
    **{key: (key, itemgetter(0)) for key in ("preset", "data_id", "val_data_id", "tokenizer_sha256", "config_hash",
                                             "code_sha256")},
}  # fmt: skip
"""Key of submission.json -> (key of result.json, how the seeds' values make one)."""
SEED_CLAIMS = {
    "val_bpb": ("val_bpb", FIGURE_DIGITS), "val_loss": ("val_loss", FIGURE_DIGITS),
    "artifact_bytes": ("bytes_total", None), "bytes_model": ("bytes_model", None), "steps": ("steps", None),
    "train_seconds": ("train_seconds", 3), "eval_time_seconds": ("eval_seconds", 3),
    "artifact_sha256": ("artifact_sha256", None),
}  # fmt: skip
"""Key of an entry of seed_results -> (key of result.json, decimals); the artifact's bytes are those of the code too."""


def measured_claims(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes what submission.json says of results, in the field's keys."""
    claims = {key: combine([result[name] for result in results]) for key, (name, combine) in MEASURED_CLAIMS.items()}
    claims["seed_results"] = {
        str(result["seed"]): {
            key: result[name] if digits is None else round(result[name], digits)
            for key, (name, digits) in SEED_CLAIMS.items()
        }
        for result in results
    }
    return claims


def agreement_findings(record: RecordFolder) -> Findings:
    """Compares every number that submission.json shares with the results in runs/, which only our records have."""
    if not record.runs:
        return
    results = {str(run.seed): run.result for run in record.runs}
    expected, stated = measured_claims(list(results.values())), record.claim("seed_results")
    stated = stated if isinstance(stated, dict) else {}
    if set(stated) != set(results):
        yield error("S81-run-disagrees", f"seed_results is of {sorted(stated)}, runs/ of {sorted(results)}")
    by_seed = expected.pop("seed_results")
    del expected["seeds"]  # held against the logs
    yield from differing_claims("submission.json", record.claims or {}, expected)
    for seed in sorted(set(stated) & set(results)):
        if isinstance(stated[seed], dict):
            yield from differing_claims(f"submission.json, seed {seed}", stated[seed], by_seed[seed])


def differing_claims(place: str, stated: Mapping[str, Any], expected: Mapping[str, Any]) -> Findings:
    for key, value in expected.items():
        claim = stated.get(key, value)
        tolerance = 1e-3 if "seconds" in key else 1e-8  # what rounding leaves
        both = isinstance(claim, int | float) and isinstance(value, int | float)
        if claim != value and not (both and abs(claim - value) <= tolerance):
            yield error("S81-run-disagrees", f"{place}: {key} is {claim}, but the results say {value}")
