"""Holds submission.json against the logs: types, the headline, each seed's score, the arithmetic of bits per byte."""

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lab.record.finding import SubmissionFinding, doubt, fault
from lab.record.log_reading import FinalScore, LogReading
from lab.record.record_folder import RecordFolder
from lab.record.run_check import is_number

CANONICAL_KEYS: dict[str, tuple[bool, type | tuple[type, ...]]] = {
    "author": (True, str), "github_id": (True, str), "name": (True, str), "date": (True, str),
    "val_bpb": (True, (int, float)), "val_loss": (False, (int, float)), "blurb": (False, str), "track": (False, str),
    "bytes_total": (False, int), "bytes_code": (False, int), "seeds": (False, (list, dict)),
    "seed_results": (False, dict), "hardware": (False, str), "val_bpb_std": (False, (int, float)),
    "val_loss_std": (False, (int, float)), "pytorch_version": (False, str), "step_stop": (False, int),
    "wallclock_seconds": (False, (int, float)), "eval_time_seconds": (False, (int, float)),
    "artifact_bytes_max": (False, int), "artifact_bytes_mean": (False, (int, float)),
}  # fmt: skip
"""Key -> (whether a submission can't do without, type)."""
WANTED_KEYS = ("val_loss", "bytes_total", "seeds", "blurb")
"""Not required, but most published records have them."""
ALIASES = {
    "val_bpb": ("mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb", "val_bpb_roundtrip", "sliding_val_bpb", "score"),
    "val_loss": ("mean_val_loss", "val_loss_mean", "mean_val_loss_nats", "val_loss_nats", "val_loss_roundtrip"),
    "val_bpb_std": ("std_bpb", "bpb_std", "std_val_bpb"),
    "bytes_total": ("artifact_bytes", "artifact_size_bytes", "total_bytes", "submission_bytes"),
    "bytes_code": ("code_bytes",),
    "github_id": ("github", "github_username", "github_user"),
    "author": ("authors", "author_name"),
    "name": ("run_name", "title"),
    "seeds": ("seed", "n_seeds", "seed_scores"),
}
TOLERANCE = 5e-5 + 1e-9
"""A headline of four decimals is as far as this from what it was rounded from."""
BYTES_PER_TOKEN = {"sp1024": 2.436, "sp4096": 3.32, "sp8192": 3.727, "caseops": 3.157, "byte260": 1.0}
"""Of the competition's validation texts, by tokenizer: measured over some 1,100 published submissions."""
DOUBLE_SPACE_RATIO = 4.386
RATIO_TOLERANCE, EXACT_TOLERANCE = 0.002, 2e-5
"""Relative: of a table of four digits, and where tokens and bytes were counted."""
MOST_SUBSET_LOGS = 8


def key_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """Keys and types of submission.json."""
    claims = record.claims
    if claims is None:
        return
    for key, (required, kinds) in CANONICAL_KEYS.items():
        if key not in claims:
            alias = next((other for other in ALIASES.get(key, ()) if other in claims), None)
            if alias:
                make = fault if required else doubt
                yield make("S05-json-alias", f"submission.json says {alias!r}: the field's key is {key!r}")
            elif required or key in WANTED_KEYS:
                yield (fault if required else doubt)("S03-json-key", f"submission.json has no {key!r}")
            continue
        seeds = claims.get("seeds")
        alone = not isinstance(seeds, list | dict) or len(seeds) < 2
        yield from type_findings(key, claims[key], kinds, alone)


def type_findings(key: str, value: Any, kinds: type | tuple[type, ...], alone: bool) -> Iterator[SubmissionFinding]:
    if value is None and key.endswith("_std") and alone:
        return  # one seed has no standard deviation
    number = kinds is int or kinds == (int, float)
    if number and not is_number(value):
        yield fault("S04-json-type", f"submission.json: {key} must be a finite number, not {value!r}")
    elif not isinstance(value, kinds):
        kind = "a whole number" if kinds is int else "text" if kinds is str else "a list or an object"
        yield fault("S04-json-type", f"submission.json: {key} must be {kind}, not {value!r}")
    elif kinds is str and not value.strip():
        yield fault("S04-json-type", f"submission.json: {key} is empty")


def claimed(record: RecordFolder, key: str) -> float | None:
    """A number of submission.json, under its own name or one that is in use for it."""
    claims = record.claims or {}
    for name in (key, *ALIASES.get(key, ())):
        if is_number(claims.get(name)):
            return claims[name]
    return None


# ---- the headline ----


def headline_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """The claimed val_bpb must be one log's final value, or the mean over the logs."""
    claim = claimed(record, "val_bpb")
    scored = [log for log in record.logs if log.finals]
    if claim is None or not scored:
        return
    columns = final_columns(scored)
    if any(is_near(statistics.fmean(values.values()), claim) for values in columns.values()):
        return
    single = [(log, name) for name, values in columns.items() for log, value in values.items() if is_near(value, claim)]
    if single:
        yield from one_of_many_findings(single[0][0], columns[single[0][1]], claim)
        return
    if subset := matching_subset(columns, claim):
        text = f"is the mean of {', '.join(subset)} alone: say why the other logs do not count, or take them out"
    elif earlier := score_before_export(scored, claim):
        text = f"is a score of weights before quantization ({earlier}), not of the artifact"
    else:
        text = "is the final value of no log, and no mean of them"
    yield fault("S12-headline", f"val_bpb {claim:.6g} of submission.json {text}; {describe_columns(columns)}")
    best = min(value for values in columns.values() for value in values.values())
    if claim < best - TOLERANCE:
        yield fault(
            "S13-too-good", f"val_bpb {claim:.6g} is better than every final value in every log (best {best:.6f})"
        )


def is_near(value: float, claim: float) -> bool:
    return abs(value - claim) <= TOLERANCE


def final_columns(logs: Sequence[LogReading]) -> dict[str, dict[str, float]]:
    """Name of a final line -> log -> value; `last` has each log's last final line, whatever its name."""
    columns: dict[str, dict[str, float]] = {}
    for log in logs:
        for name, score in log.finals.items():
            columns.setdefault(name, {})[log.name] = score.val_bpb
    columns["last"] = {log.name: log.last_final.val_bpb for log in logs if log.last_final}
    return columns


def one_of_many_findings(name: str, values: dict[str, float], claim: float) -> Iterator[SubmissionFinding]:
    if len(values) > 1:
        mean = statistics.fmean(values.values())
        yield doubt(
            "S15-one-of-many",
            f"val_bpb {claim:.6g} is that of {name} alone; the mean over the {len(values)} logs is {mean:.6f}",
        )


def matching_subset(columns: dict[str, dict[str, float]], claim: float) -> tuple[str, ...]:
    """Some of the logs whose mean is the claim: a choice that has to be explained."""
    for values in columns.values():
        for size in range(len(values) - 1, 1, -1):
            if len(values) > MOST_SUBSET_LOGS:
                break
            for names in itertools.combinations(sorted(values), size):
                if is_near(statistics.fmean(values[name] for name in names), claim):
                    return names
    return ()


def score_before_export(logs: Sequence[LogReading], claim: float) -> str:
    for log in logs:
        for score in log.scores:
            if not score.is_final and is_near(score.val_bpb, claim):
                return f"line {score.line} of {log.name}"
    return ""


def describe_columns(columns: dict[str, dict[str, float]]) -> str:
    values = columns["last"]
    texts = [f"{value:.6f} in {name}" for name, value in values.items()]
    mean = f", mean {statistics.fmean(values.values()):.6f}" if len(values) > 1 else ""
    return "the logs end with " + ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "") + mean


# ---- the other claims ----


def loss_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """The claimed val_loss must be one log's, or the mean over the logs, as the headline."""
    claim = claimed(record, "val_loss")
    columns: dict[str, list[float]] = {}
    for log in record.logs:
        for name, score in log.finals.items():
            if score.val_loss is not None:
                columns.setdefault(name, []).append(score.val_loss)
    if claim is None or not columns:
        return
    means = [statistics.fmean(values) for values in columns.values()]
    if not any(is_near(value, claim) for value in itertools.chain(means, *columns.values())):
        texts = ", ".join(f"{value:.6f}" for values in columns.values() for value in values)
        yield fault("S17-val-loss", f"val_loss {claim:.6g} of submission.json is in no log ({texts})")


def seed_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """seed_results must be what the log of that seed says, and the standard deviation that of the seeds."""
    results = (record.claims or {}).get("seed_results")
    values = []
    for seed, stated in results.items() if isinstance(results, dict) else ():
        if not isinstance(stated, dict) or not is_number(stated.get("val_bpb")):
            yield doubt("S16-seed-result", f"submission.json: seed_results[{seed!r}] has no number as val_bpb")
            continue
        values.append(float(stated["val_bpb"]))
        number = re.search(r"\d+", seed)
        logs = [log for log in record.logs if number and log.seed == int(number[0])]
        finals = [score.val_bpb for log in logs for score in log.finals.values()]
        if not logs:
            yield fault("S16-seed-result", f"submission.json has a result of seed {seed}, but no log is of that seed")
        elif finals and not any(is_near(value, values[-1]) for value in finals):
            text = (
                f"seed {seed}: val_bpb {values[-1]:.6g} of submission.json is not in {logs[0].name} ({finals[-1]:.6f})"
            )
            yield fault("S16-seed-result", text)
    yield from spread_findings(record, values)


def spread_findings(record: RecordFolder, values: list[float]) -> Iterator[SubmissionFinding]:
    claim = claimed(record, "val_bpb_std")
    finals = [log.last_final.val_bpb for log in record.logs if log.last_final]
    series = [found for found in (values, finals) if len(found) > 1]
    deviations = [spread(found) for found in series for spread in (statistics.stdev, statistics.pstdev)]
    if claim is None or not deviations:
        return
    if not any(abs(claim - deviation) <= max(TOLERANCE, 0.02 * deviation) for deviation in deviations):
        yield fault(
            "S18-spread", f"val_bpb_std {claim:.6g} is not the standard deviation of the seeds ({deviations[0]:.6f})"
        )


# ---- arithmetic ----


def arithmetic_findings(record: RecordFolder) -> Iterator[SubmissionFinding]:
    """val_loss / (ln 2 * val_bpb) is the text's bytes per token, whatever the model: it can't be another number."""
    exact = [run.result["val_bytes"] / run.result["val_tokens"] for run in record.runs if run.result["val_tokens"]]
    loss, bpb = claimed(record, "val_loss"), claimed(record, "val_bpb")
    if loss and bpb:
        tokenizer = next(filter(None, map(tokenizer_of, record.logs)), "")
        yield from ratio_findings("submission.json", bytes_per_token(loss, bpb), tokenizer, exact)
    for log in record.logs:
        for score in log.finals.values():
            if score.val_loss and score.val_bpb:
                place = f"line {score.line} of {log.name}"
                yield from ratio_findings(place, score_ratio(score), tokenizer_of(log), exact)


def bytes_per_token(val_loss: float, val_bpb: float) -> float:
    """Nats per token over nats per byte."""
    return val_loss / (math.log(2) * val_bpb) if val_bpb > 0 and val_loss > 0 else math.nan


def score_ratio(score: FinalScore) -> float:
    return bytes_per_token(score.val_loss or math.nan, score.val_bpb)


def tokenizer_of(log: LogReading) -> str:
    """Which of the competition's tokenizers a log names; empty where none can be told."""
    opening = "\n".join(line for line in log.lines[:400] if "tokenizer" in line or "dataset" in line or "vocab" in line)
    if log.config.get("caseops_enabled", "").lower() in ("true", "1") or "caseops" in opening.lower():
        return "caseops"
    for name, marks in (
        ("sp1024", ("fineweb_1024_bpe", "sp1024")),
        ("sp4096", ("fineweb_4096_bpe", "sp4096")),
        ("sp8192", ("fineweb_8192_bpe", "sp8192")),
        ("byte260", ("byte260",)),
    ):
        if any(mark in opening for mark in marks):
            return name
    return ""


def ratio_findings(place: str, ratio: float, tokenizer: str, exact: list[float]) -> Iterator[SubmissionFinding]:
    known = {"this validation text": exact[0]} if exact else BYTES_PER_TOKEN
    expected = {tokenizer: known[tokenizer]} if tokenizer in known else known
    tolerance = EXACT_TOLERANCE if exact else RATIO_TOLERANCE
    if not math.isfinite(ratio) or any(abs(ratio / value - 1) <= tolerance for value in expected.values()):
        return
    text = f"{place}: val_loss / (ln 2 * val_bpb) is {ratio:.6g} bytes per token"
    wanted = " or ".join(f"{value:.6g} ({name})" for name, value in expected.items())
    if abs(ratio / DOUBLE_SPACE_RATIO - 1) <= RATIO_TOLERANCE:
        yield fault("S51-double-space", f"{text}: the leading space of a token was counted twice, val_bpb is too good")
    elif tokenizer in known or exact:
        yield fault("S50-bytes-per-token", f"{text}, but it must be {wanted}")
    else:
        yield doubt("S52-unknown-tokenizer", f"{text}, which is that of no known tokenizer: {wanted}")
