"""Checks the logs themselves: whether they end, how long they took, whether they are one experiment."""

import hashlib
import re
from collections.abc import Sequence

from lab.record.finding import Findings, error, group_by, warning
from lab.record.log_reading import LogReading
from lab.record.record_folder import RecordFolder
from lab.record.run_check import feature_audit

MOST_TRAIN_SECONDS, MOST_EVAL_SECONDS = 600.5, 600.0
"""Published timers read 600.0 to 600.5 s where the clock stopped the last step."""
ANNOUNCEMENT = re.compile(
    r"(?<![a-z_])(?:late_|tight_)?(swa|ema|lawa|qat|ttt)(?:_enabled)?:\s*(?:True|1)\b", re.IGNORECASE
)
"""Features with a moment at which they act. Architecture acts in every step and has no line."""
SETTING_LINE = re.compile(r"^\s*\w+:\s*(?:[-+\d.\[({'\"/]\S*|True|False|None)\s*$")
LEAST_COMMON_LOSSES = 3


def ending_findings(record: RecordFolder) -> Findings:
    """Finds logs that do not reach a final score, and what went wrong on the way."""
    for log in record.logs:
        final = log.last_final
        if final is None:
            last = log.last_line.strip()[:80]
            yield error("S10-truncated", f"{log.name} has no final score: it ends with {last!r}")
        # the first and the last alone: the ranks of one job repeat each other
        for number, text in dict.fromkeys(log.troubles[:1] + log.troubles[-1:]):
            make = error if final is None or number > final.line else warning
            after = ", after the final score" if final and number > final.line else ""
            yield make("S11-trouble", f"{log.name} line {number}{after}: {text[:120]}")


def clock_findings(record: RecordFolder) -> Findings:
    """Holds training and evaluation against the time of the track; runs are held against their own caps elsewhere."""
    make = warning if "non" in record.track else error
    for log in record.logs if not record.runs else ():
        trained, longest = log.train_seconds or 0.0, max((*log.eval_seconds, log.total_eval_seconds or 0.0))
        if trained > MOST_TRAIN_SECONDS:
            yield make("S30-train-time", f"{log.name}: trained {trained:.1f} s, over {MOST_TRAIN_SECONDS:g} s")
        together = sum(log.eval_seconds)
        if longest > MOST_EVAL_SECONDS:
            yield make("S31-eval-time", f"{log.name}: evaluated {longest:.1f} s, over {MOST_EVAL_SECONDS:g} s")
        elif together > MOST_EVAL_SECONDS:
            text = f"{log.name}: its {len(log.eval_seconds)} evaluations took {together:.1f} s together"
            yield warning("S32-eval-sum", f"{text}: say which of them the score needs")


def experiment_findings(record: RecordFolder) -> Findings:
    """Checks that several logs are several runs of one configuration."""
    yield from duplicate_findings(record.logs)
    yield from difference_findings(record.logs)
    count = len(record.logs)
    if 0 < count < 3:
        yield warning("S43-few-seeds", f"{count} log{'s' * (count > 1)}: records are asked for three seeds")
    stated = record.claim("seeds")
    numbers = sorted(int(seed) for seed in stated if str(seed).isdecimal()) if isinstance(stated, list | dict) else []
    found = sorted({log.seed for log in record.logs if log.seed is not None})
    if numbers and found and not set(numbers) <= set(found):
        absent = ", ".join(str(seed) for seed in numbers if seed not in found)
        yield error("S44-seed-list", f"submission.json names seed {absent}, but the logs are of {found}")


def duplicate_findings(logs: Sequence[LogReading]) -> Findings:
    for code, what, key in (
        ("S41-log-twice", "are the same file", lambda log: log.sha256),
        ("S41-log-twice", "have the same training losses, so they are one run", training_losses),
        ("S40-seed-twice", "are of the same seed", lambda log: log.seed),
    ):
        groups = group_by(logs, key, "name")
        doubles = [names for value, names in groups.items() if value not in (None, "") and len(names) > 1]
        yield from (error(code, f"{' and '.join(names)} {what}") for names in doubles)
        if doubles:
            return


def training_losses(log: LogReading) -> str:
    """Hashes the losses and times of the step lines; empty where there are too few to tell two runs apart."""
    lines = [line.strip() for line in log.lines if "train_loss:" in line and "train_time:" in line]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if len(lines) >= LEAST_COMMON_LOSSES else ""


def difference_findings(logs: Sequence[LogReading]) -> Findings:
    """Finds settings that not all logs share (a setting that a log does not print is no difference)."""
    for key in sorted({key for log in logs for key in log.config}):
        values = group_by((log for log in logs if key in log.config), lambda log, key=key: log.config[key], "name")
        if len(values) > 1:
            texts = "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
            yield error("S42-config-differs", f"the logs are of different configurations: {key} is {texts}")


def announcement_findings(record: RecordFolder) -> Findings:
    """Finds features that a log announces and that act in no line of it, and in no feature audit either."""
    proven = {run.seed: feature_audit(run.result) for run in record.runs}
    silent: dict[str, list[str]] = {}
    for log in record.logs:
        for feature in announced_features(log):
            acts = proven.get(log.seed, {}).get(feature, {}).get("count", 0)
            if not acts and not has_acting_line(log, feature):
                silent.setdefault(feature, []).append(log.name)
    for feature, names in silent.items():
        text = f"{feature} is announced as on in {', '.join(names)}, and no line says that it acted"
        yield warning("S61-never-acted", text)


def announced_features(log: LogReading) -> list[str]:
    found = (match[1].lower() for line in log.lines for match in ANNOUNCEMENT.finditer(line))
    return list(dict.fromkeys(found))


def has_acting_line(log: LogReading, feature: str) -> bool:
    word = re.compile(rf"(?<![a-z]){feature}", re.IGNORECASE)
    lines = [line for line in log.lines if word.search(line)]
    return any(not ANNOUNCEMENT.search(line) and not SETTING_LINE.match(line) for line in lines)
