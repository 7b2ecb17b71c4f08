"""Holds submission.json against logs and results: types, headline, each seed's score, bits per byte, every number."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from lab.record.finding import Findings, error, warning
from lab.record.log_reading import LogReading
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
"""Measured on the competition's validation texts, by tokenizer, over some 1,100 published submissions."""
DOUBLE_SPACE_RATIO = 4.386
RATIO_TOLERANCE, EXACT_TOLERANCE = 0.002, 2e-5
"""Relative: of a table of four digits, and where tokens and bytes were counted."""
TOKENIZER_MARKS = {
    "sp1024": ("fineweb_1024_bpe", "sp1024"), "sp4096": ("fineweb_4096_bpe", "sp4096"),
    "sp8192": ("fineweb_8192_bpe", "sp8192"), "byte260": ("byte260",),
}  # fmt: skip
"""Tokenizer -> words by which the opening lines of a log name it."""
MOST_SUBSET_LOGS = 8
FIGURE_DIGITS = 8
"""Decimals of scores: as many as a log's exact line has."""
Column = Sequence[tuple[str, float]]
"""(log, figure) of final lines that have one name."""


def key_findings(record: RecordFolder) -> Findings:
    """Checks keys and types of submission.json."""
    claims = record.claims
    for key, (required, kinds) in CANONICAL_KEYS.items() if claims is not None else ():
        make = error if required else warning
        if key in claims:
            seeds = claims.get("seeds")
            alone = not isinstance(seeds, list | dict) or len(seeds) < 2
            yield from type_findings(key, claims[key], kinds, alone)
        elif alias := next((other for other in ALIASES.get(key, ()) if other in claims), None):
            yield make("S05-json-alias", f"submission.json says {alias!r}: the field's key is {key!r}")
        elif required or key in WANTED_KEYS:
            yield make("S03-json-key", f"submission.json has no {key!r}")


def type_findings(key: str, value: Any, kinds: type | tuple[type, ...], alone: bool) -> Findings:
    wrong = ""
    if value is None and key.endswith("_std") and alone:
        return  # one seed has no standard deviation
    if kinds in (int, (int, float)) and not is_number(value):
        wrong = f"must be a finite number, not {value!r}"
    elif not isinstance(value, kinds):
        kind = "a whole number" if kinds is int else "text" if kinds is str else "a list or an object"
        wrong = f"must be {kind}, not {value!r}"
    elif kinds is str and not value.strip():
        wrong = "is empty"
    if wrong:
        yield error("S04-json-type", f"submission.json: {key} {wrong}")


def claimed(record: RecordFolder, key: str) -> float | None:
    """Returns a number of submission.json, under its own name or one that is in use for it."""
    return next(filter(is_number, map(record.claim, (key, *ALIASES.get(key, ())))), None)


# ---- the headline ----


def headline_findings(record: RecordFolder) -> Findings:
    """Holds the claimed val_bpb against each log's final value, and the mean over the logs."""
    claim = claimed(record, "val_bpb")
    scored = [log for log in record.logs if log.finals]
    if claim is None or not scored:
        return
    columns = final_columns(scored, "val_bpb")
    unquantized = [(log, score) for log in scored for score in log.scores if not score.is_final]
    columns["last"] = [(log.name, log.last_final.val_bpb) for log in scored]
    if any(is_near(mean_of(column), claim) for column in columns.values()):
        return
    for column in columns.values():
        for log in (name for name, value in column if is_near(value, claim)):
            if len(column) > 1:
                text = f"is that of {log} alone; the mean over the {len(column)} logs is {mean_of(column):.6f}"
                yield warning("S15-one-of-many", f"val_bpb {claim:.6g} {text}")
            return
    earlier = [f"line {score.line} of {log.name}" for log, score in unquantized if is_near(score.val_bpb, claim)]
    if subset := matching_subset(columns, claim):
        text = f"is the mean of {', '.join(subset)} alone: say why the other logs do not count, or take them out"
    elif earlier:
        text = f"is a score of weights before quantization ({earlier[0]}), not of the artifact"
    else:
        text = "is the final value of no log, and no mean of them"
    yield error("S12-headline", f"val_bpb {claim:.6g} of submission.json {text}; {describe_endings(columns['last'])}")
    best = min(value for column in columns.values() for _, value in column)
    if claim < best - TOLERANCE:
        text = f"val_bpb {claim:.6g} is better than every final value in every log (best {best:.6f})"
        yield error("S13-too-good", text)


def is_near(value: float, claim: float) -> bool:
    return abs(value - claim) <= TOLERANCE


def mean_of(column: Column) -> float:
    return statistics.fmean(value for _, value in column)


def final_columns(logs: Sequence[LogReading], figure: str) -> dict[str, Column]:
    """Collects a figure of all final lines by the lines' names."""
    columns: dict[str, Column] = {}
    for log in logs:
        for name, score in log.finals.items():
            if (value := getattr(score, figure)) is not None:
                columns.setdefault(name, []).append((log.name, value))
    return columns


def matching_subset(columns: Mapping[str, Column], claim: float) -> list[str]:
    """Names some of the logs whose mean is the claim: a choice that has to be explained."""
    for column in columns.values():
        for size in range(len(column) - 1, 1, -1) if len(column) <= MOST_SUBSET_LOGS else ():
            for subset in itertools.combinations(sorted(column), size):
                if is_near(mean_of(subset), claim):
                    return [name for name, _ in subset]
    return []


def describe_endings(column: Column) -> str:
    texts = [f"{value:.6f} in {name}" for name, value in column]
    mean = f", mean {mean_of(column):.6f}" if len(column) > 1 else ""
    return "the logs end with " + ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "") + mean


# ---- the other claims ----


def loss_findings(record: RecordFolder) -> Findings:
    """Holds the claimed val_loss against each log's, and the mean over the logs, as the headline."""
    claim = claimed(record, "val_loss")
    columns = final_columns(record.logs, "val_loss").values()
    values = [value for column in columns for _, value in column]
    if claim is None or not values:
        return
    if not any(is_near(value, claim) for value in [*map(mean_of, columns), *values]):
        texts = ", ".join(f"{value:.6f}" for value in values)
        yield error("S17-val-loss", f"val_loss {claim:.6g} of submission.json is in no log ({texts})")


def seed_findings(record: RecordFolder) -> Findings:
    """Holds seed_results against the log of each seed, and the standard deviation against that of the seeds."""
    results = record.claim("seed_results")
    values = []
    for seed, stated in results.items() if isinstance(results, dict) else ():
        if not isinstance(stated, dict) or not is_number(stated.get("val_bpb")):
            yield warning("S16-seed-result", f"submission.json: seed_results[{seed!r}] has no number as val_bpb")
            continue
        values.append(float(stated["val_bpb"]))
        number = re.search(r"\d+", seed)
        logs = [log for log in record.logs if number and log.seed == int(number[0])]
        finals = [score.val_bpb for log in logs for score in log.finals.values()]
        if not logs:
            yield error("S16-seed-result", f"submission.json has a result of seed {seed}, but no log is of that seed")
        elif finals and not any(is_near(value, values[-1]) for value in finals):
            text = f"val_bpb {values[-1]:.6g} of submission.json is not in {logs[0].name} ({finals[-1]:.6f})"
            yield error("S16-seed-result", f"seed {seed}: {text}")
    yield from spread_findings(record, values)


def spread_findings(record: RecordFolder, values: list[float]) -> Findings:
    claim = claimed(record, "val_bpb_std")
    finals = [log.last_final.val_bpb for log in record.logs if log.last_final]
    series = [found for found in (values, finals) if len(found) > 1]
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


# ---- arithmetic ----


def arithmetic_findings(record: RecordFolder) -> Findings:
    """Checks that val_loss / (ln 2 * val_bpb) is the text's bytes per token, which no model can change."""
    exact = [run.result["val_bytes"] / run.result["val_tokens"] for run in record.runs]
    tokenizers = [tokenizer_of(log) for log in record.logs]
    figures = claimed(record, "val_loss"), claimed(record, "val_bpb"), next(filter(None, tokenizers), "")
    places = [("submission.json", *figures)]
    for log, tokenizer in zip(record.logs, tokenizers, strict=True):
        for score in log.finals.values():
            places.append((f"line {score.line} of {log.name}", score.val_loss, score.val_bpb, tokenizer))
    for place, loss, bpb, tokenizer in places:
        if loss and bpb and min(loss, bpb) > 0:
            yield from ratio_findings(place, loss / (math.log(2) * bpb), tokenizer, exact)


def tokenizer_of(log: LogReading) -> str:
    """Names which of the competition's tokenizers a log is of; empty where none can be told."""
    opening = "\n".join(line for line in log.lines[:400] if "tokenizer" in line or "dataset" in line or "vocab" in line)
    if log.config.get("caseops_enabled", "").lower() in ("true", "1") or "caseops" in opening.lower():
        return "caseops"
    return next((name for name, marks in TOKENIZER_MARKS.items() if any(mark in opening for mark in marks)), "")


def ratio_findings(place: str, ratio: float, tokenizer: str, exact: list[float]) -> Findings:
    known = {"this validation text": exact[0]} if exact else BYTES_PER_TOKEN
    expected = {tokenizer: known[tokenizer]} if tokenizer in known else known
    tolerance = EXACT_TOLERANCE if exact else RATIO_TOLERANCE
    if not math.isfinite(ratio) or any(abs(ratio / value - 1) <= tolerance for value in expected.values()):
        return
    text = f"{place}: val_loss / (ln 2 * val_bpb) is {ratio:.6g} bytes per token"
    wanted = " or ".join(f"{value:.6g} ({name})" for name, value in expected.items())
    if abs(ratio / DOUBLE_SPACE_RATIO - 1) <= RATIO_TOLERANCE:
        yield error("S51-double-space", f"{text}: the leading space of a token was counted twice, val_bpb is too good")
    elif tokenizer in known or exact:
        yield error("S50-bytes-per-token", f"{text}, but it must be {wanted}")
    else:
        yield warning("S52-unknown-tokenizer", f"{text}, which is that of no known tokenizer: {wanted}")
