"""Holds logs against each other, the clock and themselves: ends, seeds, settings, features that acted or did not."""

from collections.abc import Sequence

from lab.record.claim_check import differing_settings, twins_of
from lab.record.feature_reading import ANNOUNCED
from lab.record.finding import Findings, error, group_by, listed, note, warning
from lab.record.headline import LAST
from lab.record.log_reading import LogReading
from lab.record.record_folder import RecordFolder
from lab.record.run_check import feature_audit

MOST_TRAIN_SECONDS, MOST_EVAL_SECONDS = 600.5, 600.0
"""Published timers read 600.0 to 600.5 s where the clock stopped the last step."""
LEAST_COMMON_LOSSES = 3


def ending_findings(record: RecordFolder) -> Findings:
    """Finds logs that do not reach a final score, and what went wrong on the way."""
    for log in record.logs:
        final, counts = log.last_final, record.needs(log)
        if final is None:
            make = error if counts else note
            yield make("S10-truncated", f"{log.name} has no final score: it ends with {log.last_line.strip()[:80]!r}")
        # the first and the last alone: the ranks of one job repeat each other
        for number, text in log.troubles:
            make = note if not counts else error if final is None or number > final.line else warning
            after = ", after the final score" if final and number > final.line else ""
            yield make("S11-trouble", f"{log.name} line {number}{after}: {text[:120]}")


def clock_findings(record: RecordFolder) -> Findings:
    """Holds training and evaluation against the time of the track; runs are held against their own caps elsewhere."""
    make = note if record.is_non_record else error
    for log in record.counted if not record.runs else ():
        trained, longest = log.train_seconds or 0.0, max((*log.eval_seconds, log.total_eval_seconds or 0.0))
        if trained > MOST_TRAIN_SECONDS:
            yield make("S30-train-time", f"{log.name}: trained {trained:.1f} s, over {MOST_TRAIN_SECONDS:g} s")
        together = sum(log.eval_seconds)
        if longest > MOST_EVAL_SECONDS:
            yield make("S31-eval-time", f"{log.name}: evaluated {longest:.1f} s, over {MOST_EVAL_SECONDS:g} s")
        elif together > MOST_EVAL_SECONDS and not record.is_non_record:
            text = f"{log.name}: its {len(log.eval_seconds)} evaluations took {together:.1f} s together"
            yield warning("S32-eval-sum", f"{text}: say which of them the score needs")


# ---- several logs ----


def experiment_findings(record: RecordFolder) -> Findings:
    """Checks that several logs are several runs of one configuration, with the seeds that are claimed."""
    yield from duplicate_findings(record)
    yield from difference_findings(record)
    yield from seed_list_findings(record)
    one = record.headline.kind == "one"
    count = len(twins_of(record, record.counted[0]) if one else record.counted)
    if 0 < count < 3 and not record.is_non_record:
        yield warning("S43-few-seeds", f"{count} log{'s' * (count > 1)}: records are asked for three seeds")


def duplicate_findings(record: RecordFolder) -> Findings:
    """Finds one run under two seeds, and two runs of one seed where different ones are claimed."""
    logs = [log for log in record.logs if log.losses[0] >= LEAST_COMMON_LOSSES]
    for names in group_by(logs, lambda log: log.losses, "name").values():
        seeds = {seed for log in logs if log.name in names for seed in (log.name_seed, log.seed) if seed is not None}
        make = error if len(seeds) > 1 else note
        if len(names) > 1:
            yield make("S41-log-twice", f"{listed(names)} have the same training losses, so they are one run")
    seeded = [log for log in record.counted if log.seed is not None]
    for seed, names in group_by(seeded, lambda log: log.seed, "name").items():
        if len(names) > 1:
            make = error if record.headline.kind == "mean" and len(record.counted) < 6 else note
            yield make("S40-seed-twice", f"{listed(names)} are of the same seed, {seed}")


def difference_findings(record: RecordFolder) -> Findings:
    """Finds settings that not all logs of the headline share."""
    stages = record.headline.stages - {LAST} or {log.last_final.name for log in record.counted if log.last_final}
    adapted = any("ttt" in stage.lower() for stage in stages)
    differing = {
        key: values
        for key, values in differing_settings(record.counted).items()
        if adapted or not key.startswith("ttt")
    }  # (what only an adaptation reads changes no score before it)
    if differing:
        first = [
            f"{key} is " + "; ".join(f"{value[:40]} in {listed(names, 3)}" for value, names in values.items())
            for key, values in list(differing.items())[:3]
        ]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        make = error if record.headline.kind == "mean" else note
        yield make("S42-config-differs", f"the logs are of different configurations: {', '.join(first)}{more}")


def seed_list_findings(record: RecordFolder) -> Findings:
    """Holds the claimed list of seeds against the logs, and the names of logs against what they say."""
    for log in record.logs:
        if None not in (log.seed, log.name_seed) and log.seed != log.name_seed and "seed" in log.name.lower():
            yield error("S45-seed-name", f"{log.name} is of seed {log.seed}, and not of the seed in its name")
    stated = record.claim("seeds")
    listed_seeds = record.claimed_seeds - {int(seed) for seed in record.seed_results if seed.isdecimal()}
    found = sorted({seed for log in record.logs for seed in log.seeds})
    if isinstance(stated, list) and found and (absent := sorted(listed_seeds - set(found))):
        yield error("S44-seed-list", f"submission.json names seed {listed(absent)}, but the logs are of {found}")


# ---- features ----


def announcement_findings(record: RecordFolder) -> Findings:
    """Finds features that a log announces and that act in no line of it, and in no feature audit either."""
    audits = {run.seed: feature_audit(run.result) for run in record.runs}
    silent: dict[str, list[str]] = {}
    for log in record.counted:
        for feature in log.features.announced:
            counted = audits.get(log.seed, {}).get(feature, {}).get("count", 0)
            if feature in ANNOUNCED and not counted and feature not in log.features.acting:
                silent.setdefault(feature, []).append(log.name)
    for feature, names in silent.items():
        text = f"{feature} is announced as on in {listed(names)}, and no line says that it acted"
        yield warning("S61-never-acted", text)
    yield from counter_findings(record.counted)


def counter_findings(logs: Sequence[LogReading]) -> Findings:
    """Finds features whose counters stay at zero though they are on, and gates that knew the scored token."""
    idle: dict[str, list[str]] = {}
    for log in logs:
        for feature, (count, line) in log.features.counters.items():
            if feature in log.features.announced and count == 0:
                idle.setdefault(feature, []).append(f"line {line} of {log.name}")
    for feature, places in idle.items():
        yield error("S66-zero-count", f"{feature} is on, and its counter stays at zero: {listed(places, 3)}")
    for log in logs:
        for gate in list({gate.name: gate for gate in log.gates}.values()):
            where = f"line {gate.line} of {log.name}"
            if gate.of is None:
                text = f"{gate.name} counts {gate.count:,}: it opens by whether the scored token goes on with a word"
            else:
                text = f"an expert was right in {gate.count:,} of the {gate.of:,} times that it spoke"
            yield error("S67-reads-target", f"{where}: {text}, which only that token itself tells")
