"""Finds the logs and the stage of evaluation that the val_bpb of submission.json rests on."""

import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lab.record.log_reading import LogReading

TOLERANCE = 5e-5 + 1e-9
"""A headline of four decimals is as far as this from what it was rounded from."""
LAST = "last"
"""The stage of a log's last final line, whatever its name."""
MOST_SUBSET_LOGS, MOST_CHOICES = 8, 2000
Group = tuple[LogReading, ...]


@dataclass(frozen=True)
class Headline:
    """Holds what a claimed val_bpb rests on."""

    kind: Literal["mean", "one", "subset", "none"]
    """The mean over logs that belong together (or the only one), one of several, a choice of some, or nothing."""
    logs: Group = ()
    stages: frozenset[str] = frozenset()


def match_headline(
    claim: float | None, logs: Sequence[LogReading], seeds: set[int], results: Sequence[float]
) -> Headline:
    """Matches a claim with the logs; of several ways, the one that comes nearest.

    Seeds and their results, as far as submission.json has them, say which logs belong together.
    """
    scored = tuple(log for log in logs if log.finals)
    if claim is None or not scored:
        return Headline("none")
    groups = tuple(dict.fromkeys(natural_groups(scored, seeds, results)))
    for kind, choices in (("mean", groups), ("one", [(log,) for log in scored]), ("subset", subsets(scored))):
        found = [(abs(mean - claim), group) for group in choices for mean in stage_means(group).values()]
        near = [
            (distance, -len(group), number) for number, (distance, group) in enumerate(found) if distance <= TOLERANCE
        ]
        if near:
            group = found[min(near)[2]][1]
            stages = (stage for stage, mean in stage_means(group).items() if abs(mean - claim) <= TOLERANCE)
            return Headline(kind, group, frozenset(stages))
    return Headline("none")


def natural_groups(logs: Group, seeds: set[int], results: Sequence[float]) -> Iterator[Group]:
    """Yields logs that belong together: all, those of one folder or one form of name, one of each seed or result."""
    yield logs
    keys = (lambda log: log.name.rpartition("/")[0], lambda log: re.sub(r"\d+", "#", log.name))
    for key in keys:
        named: dict[str, Group] = {}
        for log in logs:
            named[key(log)] = (*named.get(key(log), ()), log)
        yield from (group for group in named.values() if len(group) > 1)
    of_seeds = [[log for log in logs if seed in log.seeds] for seed in sorted(seeds)]
    of_results = [[log for log in logs if has_score(log, result)] for result in results]
    for choices in (of_seeds, of_results):
        if len(choices) > 1 and all(choices):
            groups = itertools.islice(itertools.product(*choices), MOST_CHOICES)
            yield from (group for group in groups if len(set(group)) == len(choices))


def has_score(log: LogReading, value: float) -> bool:
    return any(abs(score.val_bpb - value) <= TOLERANCE for score in log.finals.values())


def stage_means(logs: Group) -> dict[str, float]:
    """Returns stage -> mean over logs that all have it."""
    common = [name for name in logs[0].finals if all(name in log.finals for log in logs)]
    means = {name: statistics.fmean(log.finals[name].val_bpb for log in logs) for name in common}
    return means | {LAST: statistics.fmean(log.last_final.val_bpb for log in logs if log.last_final)}


def subsets(logs: Group) -> Iterator[Group]:
    """Yields some of the logs whose mean may be the claim: a choice that has to be explained."""
    for size in range(len(logs) - 1, 1, -1) if len(logs) <= MOST_SUBSET_LOGS else ():
        yield from itertools.combinations(logs, size)
