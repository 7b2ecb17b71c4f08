"""Reads training logs: ours, and those of the competition's published records, which share their lines."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIGURE = r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|nan|inf"
SCORE_LINE = re.compile(
    rf"^(?P<name>.*?)\s*(?:val_loss:\s*(?P<loss>{FIGURE})\s+)?val_bpb:\s*(?P<bpb>{FIGURE})(?![\w.])"
)
FINAL_NAME = re.compile(r"(final_|legal_|ttt_|quantized|post_?quant|sliding|roundtrip)\w*$", re.IGNORECASE)
TRAIN_TIME = re.compile(r"^(?:step:|stopping_early|\d+/\d+ ).*?train_time:\s*([\d.]+)\s*(ms|s|m)\b")
STEP_COUNT = re.compile(r"^(?:step:\s*(\d+)/|stopping_early.*\bstep:\s*(\d+)|(\d+)/\d+ train_loss)")
EVAL_TIME = re.compile(r"(?P<total>total_)?eval_time:\s*([\d.]+)\s*(ms|s|m)\b")
TOTAL_SIZE = re.compile(r"Total submission size(?P<what>[^:]*):\s*([\d,]+)\s*bytes", re.IGNORECASE)
MODEL_SIZE = re.compile(r"Serialized model (?P<what>\S[^:]*):\s*([\d,]+)\s*bytes", re.IGNORECASE)
CODE_SIZE = re.compile(r"Code size[^:]*:\s*([\d,]+)\s*bytes", re.IGNORECASE)
SEED = re.compile(r"(?<!\w)seed[:=]\s*(\d+)(?!\w)", re.IGNORECASE)
SEED_IN_NAME = re.compile(r"(?:seed|_s)_?(\d+)", re.IGNORECASE)
TROUBLE = re.compile(
    r"^.{0,40}Traceback \(most recent call last\)|CUDA out of memory|OutOfMemoryError|\bSIG(?:TERM|KILL)\b"
    r"|Signal (?:15|9)\b",
)
CONFIG_LINE = re.compile(
    r"^(model_params|world_size|attention_mode|tie_embeddings|train_batch_tokens|qat|preset|val_loader|train_loader):"
)
LISTED_KNOB = re.compile(r"^\s{2,}(\w+): (\S.*)$")
CONFIG_PAIR = re.compile(r"(\w+)[:=]([^\s,]+)")
OWN_KNOBS = re.compile(r"seed|run_id|(local_)?rank|pattern|dataset|.*(path|dir|file)s?", re.IGNORECASE)
"""Settings that may differ between the seeds of one experiment: names and places."""
SOURCE_LINE = re.compile(r"^(import \w|from \w+ import|def \w|class \w)", re.MULTILINE)
BAR = re.compile(r"^={100}$", re.MULTILINE)
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class FinalScore:
    """Holds a score that a log gives; `name` is the line's, without `_exact`."""

    name: str
    val_loss: float | None
    val_bpb: float
    line: int
    exact: bool

    @property
    def is_final(self) -> bool:
        """Says whether the line speaks of the artifact, and not of weights in training or before quantization."""
        return FINAL_NAME.match(self.name) is not None and "pre_quant" not in self.name.lower()


@dataclass(frozen=True)
class LogReading:
    """Holds what one log says; figures that it does not give are None or empty."""

    name: str
    sha256: str
    lines: tuple[str, ...]
    """Without the source of the script, which the competition's logs begin with."""
    source: str
    scores: tuple[FinalScore, ...]
    steps: int | None
    train_seconds: float | None
    eval_seconds: tuple[float, ...]
    """Every evaluation after the training."""
    total_eval_seconds: float | None
    total_bytes: int | None
    model_bytes: int | None
    code_bytes: tuple[int, ...]
    seed: int | None
    config: dict[str, str]
    troubles: tuple[tuple[int, str], ...]
    """(line, text) of exceptions, signals and memory errors."""

    @property
    def last_final(self) -> FinalScore | None:
        finals = self.finals
        return max(finals.values(), key=lambda score: score.line) if finals else None

    @property
    def finals(self) -> dict[str, FinalScore]:
        """Returns the last score under each name; the one with all digits where a line has both forms."""
        found: dict[str, FinalScore] = {}
        for score in self.scores:
            earlier = found.get(score.name)
            if score.is_final and not (earlier and earlier.exact and not score.exact and score.line - earlier.line < 2):
                found[score.name] = score
        return found

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.lines) if line.strip()), "")


def read_log(path: Path) -> LogReading:
    """Reads a log of any length; bytes that are not UTF-8 are replaced. Raises OSError."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"  # what PowerShell's tee writes
    source, text = split_source(data.decode(encoding, errors="replace").replace("\r\n", "\n"))
    lines = tuple(text.split("\n"))
    times = [match for line in lines if (match := TRAIN_TIME.search(line))]
    evaluations = [match for line in lines if (match := EVAL_TIME.search(line)) and not line.startswith("step:")]
    return LogReading(
        name=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        lines=lines,
        source=source,
        scores=tuple(read_scores(lines)),
        steps=last_number(lines, STEP_COUNT),
        train_seconds=max((seconds_of(*match.groups()) for match in times), default=None),
        eval_seconds=tuple(seconds_of(*match.groups()[1:]) for match in evaluations if not match["total"]),
        total_eval_seconds=max((seconds_of(*m.groups()[1:]) for m in evaluations if m["total"]), default=None),
        total_bytes=read_total(lines),
        model_bytes=last_number(lines, MODEL_SIZE, group=2),
        code_bytes=tuple(whole(match[1]) for line in lines if (match := CODE_SIZE.search(line))),
        seed=read_seed(path.name, lines),
        config=read_settings(lines),
        troubles=tuple((number, line.strip()) for number, line in enumerate(lines, 1) if TROUBLE.search(line)),
    )


def split_source(text: str) -> tuple[str, str]:
    """Splits a log in (source of the script, the rest): the competition's begin with it and a bar of 100 signs."""
    *parts, last = BAR.split(text)
    sources = [part for part in parts if SOURCE_LINE.search(part)]
    rest = [part for part in parts if not SOURCE_LINE.search(part)]
    return (sources[-1] if sources else ""), "\n".join([*rest, last])


def read_scores(lines: tuple[str, ...]) -> Iterator[FinalScore]:
    for number, line in enumerate(lines, 1):
        match = SCORE_LINE.search(line)
        if not match or line.startswith("result:"):
            continue
        words = match["name"].strip().rstrip(":").split()
        named = words and FINAL_NAME.match(words[-1]) and "diagnostic" not in match["name"].lower()
        name = words[-1] if named else " ".join(words)
        loss, bpb = (float(text.replace(",", "")) if text else None for text in (match["loss"], match["bpb"]))
        yield FinalScore(name.removesuffix("_exact"), loss, bpb, number, name.endswith("_exact"))


def read_total(lines: tuple[str, ...]) -> int | None:
    """Reads the compressed total: of the last line that names a codec, or else the last one (the raw sum is first)."""
    totals = [(match["what"].strip(), whole(match[2])) for line in lines if (match := TOTAL_SIZE.search(line))]
    named = [count for what, count in totals if what] or [count for _, count in totals]
    return named[-1] if named else None


def read_seed(name: str, lines: tuple[str, ...]) -> int | None:
    found = [match for line in lines if (match := SEED.search(line))] or [SEED_IN_NAME.search(name)]
    return int(found[0][1]) if found[0] else None


def read_settings(lines: tuple[str, ...]) -> dict[str, str]:
    """Reads the settings that the log's opening lines give, but for names and places."""
    pairs: dict[str, str] = {}
    for line in lines:
        if line.startswith(("step:", "warmup_step:")):
            break
        if listed := LISTED_KNOB.match(line):
            pairs[listed[1]] = listed[2].strip()
        elif CONFIG_LINE.match(line):
            prefix = line.split(":", 1)[0] + "_" if line.startswith(("val_loader", "train_loader")) else ""
            pairs |= {prefix + key: value for key, value in CONFIG_PAIR.findall(line)}
    return {key: value for key, value in pairs.items() if not OWN_KNOBS.fullmatch(key.rsplit("loader_", 1)[-1])}


def last_number(lines: tuple[str, ...], pattern: re.Pattern[str], group: int = 0) -> int | None:
    """Returns the last whole number that the pattern finds; group 0: the first group that matched."""
    for line in reversed(lines):
        if match := pattern.search(line):
            return whole(match[group] if group else next(text for text in match.groups() if text))
    return None


def whole(text: str) -> int:
    return int(text.replace(",", ""))


def seconds_of(figure: str, unit: str) -> float:
    return float(figure) * SECONDS[unit]
