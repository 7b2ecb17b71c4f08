"""Reads what a log says of features: which are armed, which acted, what their counters and those of gates show."""

import re
from dataclasses import dataclass, field

FEATURES = "swa|ema|lawa|qat|ttt|ngram|tilt|prune|lora|gptq|lqer|awq|moe|slot|mtp"
"""Features with a moment at which they act. Architecture acts in every step and has no line."""
FEATURE_WORDS = tuple(FEATURES.split("|"))
ANNOUNCED = ("swa", "ema", "lawa", "qat", "ttt")
"""Those of which every script that has them prints a line when they act."""
FEATURE = re.compile(rf"(?<![a-z])({FEATURES})(?![a-z]{{0,20}}[.]py)", re.IGNORECASE)
ANNOUNCEMENT = re.compile(
    rf"(?<![a-z_])(?:late_|tight_)?({FEATURES})(?:_tilt|_lite)?(?:_enabled)?[:=]\s{{0,3}}(?:True|1|on)\b",
    re.IGNORECASE,
)
SETTING_LINE = re.compile(r"^\s{0,40}\w{1,80}:\s{0,9}(?:[-+\d.\[({'\"/]\S{0,400}|True|False|None)\s{0,9}$")
NAMING_LINE = re.compile(
    r"^\s{0,40}(?:logfile|log_file|run_id|run_name|\w{0,60}(?:path|dir|file)s?)\s?[:=]", re.IGNORECASE
)
"""A run may be named after a feature that it does not use."""
COUNT_WORDS = (
    "count|counts|snapshots?|updates?|applied|fired|hits?|hints?|averaged|checkpoints?|activations?|collected|"
    "applications|layers_quantized|chunks"
)
COUNTER = re.compile(
    rf"(?<![a-z])(?:{COUNT_WORDS})\s?[:=]\s?(\d{{1,15}})(?![\d.])|(?<![\d.])(\d{{1,15}}) (?:{COUNT_WORDS})(?![a-z])",
    re.IGNORECASE,
)
COUNT_STEM = re.compile(r"count|snapsh|update|appli|fired|hit|hint|averag|checkp|activat|collect|chunks")
ALL_READ, MOST_READ = 1000, 50
"""Lines of a feature that are all read, and how many of each piece of a log after them."""
OWN_WORD_GATE = re.compile(
    r"(?<![a-z])((?:within|word)(?:_(?:word|start))?_(?:gate|gated|hints?|expert|valid|fired|hits?))[:=]\s?(\d{1,15})(?![\d.])",
    re.IGNORECASE,
)
SAID, RIGHT = (
    re.compile(rf"(?<![a-z])(?:{words})[:=]\s?(\d{{1,15}})(?![\d.])", re.IGNORECASE)
    for words in ("hints|gated|fired|proposed", "hits|correct|right|agreed")
)
LEAST_SAID, TOO_OFTEN_RIGHT = 1000, 0.995


@dataclass(frozen=True)
class GateCount:
    """Holds a counter that no gate could show without reading the token that is scored."""

    line: int
    name: str
    count: int
    of: int | None = None
    """How often it spoke, for an expert that was right nearly each time."""


@dataclass
class FeatureReading:
    """Holds which features a log names, and how."""

    announced: dict[str, int] = field(default_factory=dict)
    """Feature -> line that says it is on."""
    acting: set[str] = field(default_factory=set)
    """Features of lines that are neither settings nor names."""
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Feature -> (the largest count after training began, the last line with one)."""

    seen: dict[str, int] = field(default_factory=dict)
    """Feature -> how many lines with it were read."""

    def worth_reading(self, word: str, hits: list[int], lines: list[str]) -> list[int]:
        """Chooses the lines of a feature that may tell more than those before: all at first, then those that count."""
        before = self.seen.get(word, 0)
        self.seen[word] = before + len(hits)
        known = word in self.acting and self.counters.get(word, (0, 0))[0] > 0
        if before < ALL_READ:
            return hits
        return [index for index in hits if not known and COUNT_STEM.search(lines[index])][:MOST_READ]

    def read(self, number: int, line: str, trains: bool) -> None:
        """Reads one line; what stands before the first step is a setting and counts nothing."""
        words = {word.lower() for word in FEATURE.findall(line)}
        if not words or NAMING_LINE.match(line):
            return
        announced = {word.lower() for word in ANNOUNCEMENT.findall(line)}
        for word in announced:
            self.announced.setdefault(word, number)
        if not announced and not SETTING_LINE.match(line):
            self.acting |= words
        counts = [int(one or other) for one, other in COUNTER.findall(line)] if trains else []
        for word in words if counts else ():
            self.counters[word] = (max(*counts, self.counters.get(word, (0, 0))[0]), number)


def read_gates(number: int, line: str) -> list[GateCount]:
    """Finds counters of gates that speak by the word of the scored token, and experts that are always right."""
    found = [GateCount(number, name, int(count)) for name, count in OWN_WORD_GATE.findall(line) if int(count)]
    said, right = SAID.search(line), RIGHT.search(line)
    if said and right and int(said[1]) >= LEAST_SAID and int(right[1]) >= TOO_OFTEN_RIGHT * int(said[1]):
        found.append(GateCount(number, "hits", int(right[1]), int(said[1])))
    return found
