"""Reads what training logs say: ours, and those of the competition's published records, which share their lines.

A log is read once, line by line, so that one of any length takes the memory of a short one. Every pattern is bounded or
anchored: none takes more than linear time in the length of its line.
"""

import hashlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.record.feature_reading import FEATURE_WORDS, FeatureReading, GateCount, read_gates
from lab.record.log_stream import CHUNK_CHARACTERS, read_parts

FIGURE = r"[-+]?\d[\d,]{0,30}(?:\.\d{1,40})?(?:[eE][-+]?\d{1,4})?(?![\d,])|nan|inf"
WHOLE = r"(\d[\d,]{0,24})(?![\d,])"
SCORE = re.compile(rf"(?<!\w)val_bpb[:=]\s{{0,20}}(?P<bpb>{FIGURE})(?![\w.])")
LOSS = re.compile(rf"(?<!\w)val_loss[:=]\s{{0,20}}(?P<loss>{FIGURE})(?![\w.])")
FINAL_NAME = re.compile(
    r"(?:final_|legal_|ttt_|quantized|post_?quant|sliding|roundtrip)\w{0,80}(?::done|:)?$", re.IGNORECASE
)
TRAIN_TIME = re.compile(r"train_time:\s{0,9}(\d{1,15}(?:\.\d{1,15})?)\s?(ms|s|m)\b")
STEP_COUNT = re.compile(
    r"(?:step:\s{0,9}|stopping_early.{0,200}?\bstep:\s{0,9}|(?=\d{1,15}/\d{1,15} train_loss))(\d{1,15})(?=/)"
)
FINAL_STEM = re.compile(r"final|legal|ttt_|quant|sliding|roundtrip")
EVAL_TIME = re.compile(r"(?P<total>total_)?eval_time:\s{0,9}(\d{1,15}(?:\.\d{1,15})?)\s?(ms|s|m)\b")
SCORE_TIME = re.compile(r"(?<!\w)time:(\d{1,15})(ms)\b")
TOTAL_SIZE = re.compile(
    rf"(?:total submission(?: size)?(?P<what>[^:|]{{0,60}})|(?<!\w)artifact(?:[ _]size|_bytes)?):\s{{0,9}}{WHOLE}"
    r"(?=\s{0,9}bytes|\s{0,9}$)",
    re.IGNORECASE,
)
BUDGET = re.compile(rf"(?<!\w)budget:{WHOLE}/\d")
BUDGET_MEGABYTES = re.compile(r"(?<![\d.])(\d{1,3}\.\d{1,6})/\d{1,3}(?:\.\d{1,6})?MB FITS")
MODEL_SIZE = re.compile(
    r"(?:Serialized model \S[^:]{0,60}|(?<!\S)\S{0,20}(?:zlib|lzma|zstd|brotli)\S{0,20} model)"
    rf":\s{{0,9}}{WHOLE} bytes",
    re.IGNORECASE,
)
CODE_SIZE = re.compile(
    rf"(?<!\w)code(?: size(?P<how>[^:]{{0,40}}))?:\s{{0,9}}{WHOLE}(?= bytes|\s{{0,9}}$)", re.IGNORECASE
)
SEED = re.compile(r"(?<!\w)seed[:=]\s{0,9}(\d{1,18})(?!\w)", re.IGNORECASE)
SEED_IN_NAME = re.compile(r"(?:seed|_s)[_-]?(\d{1,18})", re.IGNORECASE)
VAL_TOKENS = re.compile(r"(?:val_loader:.{0,400}?\btokens:|^val[_ ]tokens:\s{0,9})(\d{1,15})(?!\d)")
TROUBLE = re.compile(
    r"^.{0,40}Traceback \(most recent call last\)|CUDA out of memory|OutOfMemoryError|\bSIG(?:TERM|KILL)\b"
    r"|Signal (?:15|9)\b",
)
TROUBLE_WORDS = ("traceback (", "of memory", "outofmemory", "sigterm", "sigkill", "signal ")
CODE_HASH = re.compile(r"\bcode_sha256:([0-9a-f]{1,64})")
CONFIG_LINE = re.compile(
    r"(model_params|world_size|attention_mode|tie_embeddings|train_batch_tokens|qat|preset|val_loader|train_loader):"
)
LISTED_KNOB = re.compile(r"\s{2,40}(\w{1,80}): (\S.{0,400})$")
CONFIG_PAIR = re.compile(r"(?<!\w)(\w{1,80})[:=]([^\s,]{1,400})")
OWN_KNOBS = re.compile(r"seed|run_id|(local_)?rank|pattern|dataset|.{0,80}(path|dir|file)s?", re.IGNORECASE)
"""Settings that may differ between the seeds of one experiment: names and places."""
CLOCK = re.compile(r"(?:\d{9,12}\.\d{1,9}|\[?\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}Z?\]?)\s")
"""What some loggers write before each line."""
STEP_LINE = re.compile(r"step:|warmup_step:|\d{1,15}/\d{1,15} ")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0}
LEAST_PAIRS = 12
"""Of a line that holds nothing but settings."""
PIECE_LINES, LAST_SCORES, MOST_OPENING_LINES = 500, 3, 20_000
MOST_OPENING, MOST_SCORES, MOST_NOTED, MOST_LOSSES, MOST_TEXT = 400, 10_000, 1_000, 100_000, 400


@dataclass(frozen=True, slots=True)
class FinalScore:
    """Holds a score that a log gives; `name` is the line's, without `_exact`."""

    name: str
    val_loss: float | None
    val_bpb: float
    line: int
    exact: bool
    is_final: bool
    """Whether the line speaks of the artifact, and not of weights in training or before quantization."""


@dataclass(eq=False)
class LogReading:
    """Holds what one log says; figures that it does not give are None or empty. Line numbers are those of the file."""

    name: str
    """Its path in the folder."""
    sha256: str = ""
    opening: list[str] = field(default_factory=list)
    """The heads of the first lines that were printed."""
    last_line: str = ""
    source: str = ""
    """That of the script, which the competition's logs begin with."""
    finals: dict[str, FinalScore] = field(default_factory=dict)
    """The last score under each name; the one with all digits where a line has both forms."""
    earlier: deque[FinalScore] = field(default_factory=lambda: deque(maxlen=MOST_SCORES))
    """Scores of weights that are not the artifact's."""
    steps: int | None = None
    train_seconds: float | None = None
    eval_seconds: list[float] = field(default_factory=list)
    """Every evaluation after the training."""
    total_eval_seconds: float | None = None
    total_bytes: int | None = None
    rounded_total: int | None = None
    """Of logs that give it in megabytes."""
    model_bytes: int | None = None
    code_bytes: tuple[int, ...] = ()
    compressed_code: int | None = None
    """Of logs that count the code compressed."""
    seed: int | None = None
    config: dict[str, str] = field(default_factory=dict)
    val_tokens: int | None = None
    losses: tuple[int, str] = (0, "")
    """(number of step lines with a loss, hash of them)."""
    code_hashes: set[str] = field(default_factory=set)
    troubles: list[tuple[int, str]] = field(default_factory=list)
    """(line, text) of exceptions, signals and memory errors: the first and the last."""
    features: FeatureReading = field(default_factory=FeatureReading)
    gates: list[GateCount] = field(default_factory=list)

    @property
    def last_final(self) -> FinalScore | None:
        return max(self.finals.values(), key=lambda score: score.line, default=None)

    @property
    def name_seed(self) -> int | None:
        """The seed that the file's name says."""
        found = SEED_IN_NAME.search(self.name.rsplit("/", 1)[-1])
        return int(found[1]) if found else None

    @property
    def seeds(self) -> set[int]:
        return {seed for seed in (self.seed, self.name_seed) if seed is not None}


def read_log(path: Path, name: str = "") -> LogReading:
    """Reads a log of any length. Raises OSError."""
    reader = LogReader(LogReading(name or path.name, file_sha256(path)))
    for part in read_parts(path):
        if part.is_source:
            reader.begin_run("\n".join(part.lines))
        else:
            reader.take(part.first, part.lines)
    return reader.finish()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_CHARACTERS):
            digest.update(block)
    return digest.hexdigest()


class LogReader:
    """Collects what the lines of one log say."""

    def __init__(self, log: LogReading) -> None:
        self.log = log
        self.losses, self.loss_count = hashlib.sha256(), 0
        self.named_total = False
        self.training_line: int | None = None
        """That of the first step: what stands before it are settings."""
        self.readers: dict[str, Callable[[int, str], None]] = {
            "eval_time:": self.read_eval_time, "seed": self.read_seed, "tokens:": self.read_tokens,
            **dict.fromkeys(("bytes", "budget:", "artifact", "code:", "mb fits"), self.read_size),
            **dict.fromkeys(TROUBLE_WORDS, self.read_trouble),
            **dict.fromkeys(("_gate", "expert", "hint"), self.read_gate), "code_sha": self.read_hash,
        }  # fmt: skip
        """Word in small letters, without digits -> what reads the lines that hold it."""

    def begin_run(self, source: str) -> None:
        """Notes the source of a run: its evaluations are its own."""
        self.log.source = source
        self.log.eval_seconds.clear()
        self.training_line = None

    def take(self, number: int, lines: list[str]) -> None:
        """Reads neighbouring lines, of which `number` is the first, some at a time: most hold no word of a reader."""
        for start in range(0, len(lines), PIECE_LINES):
            piece = lines[start : start + PIECE_LINES]
            self.take_piece(number + start, piece, "\n".join(piece).lower())

    def take_piece(self, number: int, lines: list[str], lower: str) -> None:
        if self.training_line is None:
            self.read_opening(number, lines)
        if "train_time:" in lower:
            self.read_steps(lines, lower)
        shapes = line_shapes(lower)
        words = [word for word in (*self.readers, "val_bpb", *FEATURE_WORDS) if word.encode() in shapes]
        small = lower.split("\n") if words else []
        for word in words:
            hits = [index for index, line in enumerate(small) if word in line]
            if word == "val_bpb":
                hits = final_or_last(hits, small)
            elif word in FEATURE_WORDS:
                hits = self.log.features.worth_reading(word, hits, small)
            read = self.readers.get(word, self.read_score if word == "val_bpb" else self.read_features)
            for index in hits:
                read(number + index, lines[index])
        if said := next((line for line in reversed(lines) if line.strip()), ""):
            self.log.last_line = said[: MOST_TEXT * 4]

    def finish(self) -> LogReading:
        self.log.losses = (self.loss_count, self.losses.hexdigest())
        return self.log

    # ---- many lines ----

    def read_opening(self, number: int, lines: list[str]) -> None:
        """Reads the settings that the log's opening lines give, but for names and places."""
        for index, whole_line in enumerate(lines, number):
            line = without_clock(whole_line[: MOST_TEXT * 10])
            if len(self.log.opening) < MOST_OPENING:
                self.log.opening.append(line[:MOST_TEXT])
            if STEP_LINE.match(line) or index > MOST_OPENING_LINES:
                self.training_line = index
                return
            if len(self.log.config) < MOST_NOTED:
                pairs = settings_of(line).items()
                own = {key: value for key, value in pairs if not OWN_KNOBS.fullmatch(key.rsplit("loader_", 1)[-1])}
                self.log.config |= own

    def read_steps(self, lines: list[str], lower: str) -> None:
        """Reads times and the last step, and hashes the losses with their times, by which two runs are told apart."""
        seconds = [seconds_of(*found) for found in set(TRAIN_TIME.findall(lower))]
        self.log.train_seconds = max((*seconds, self.log.train_seconds or 0.0))
        steps = (STEP_COUNT.match(without_clock(line)) for line in reversed(lines) if "step:" in line or "/" in line)
        if found := next(filter(None, steps), None):
            self.log.steps = int(found[1])
        if self.loss_count < MOST_LOSSES:
            losses = [line.strip() for line in lines if "train_loss" in line and "train_time:" in line]
            self.loss_count += len(losses)
            self.losses.update("\n".join(losses).encode(errors="replace"))

    # ---- one line ----

    def read_score(self, number: int, line: str) -> None:
        log, line = self.log, without_clock(line)
        bpb, loss = SCORE.search(line), LOSS.search(line)
        if bpb is None or line.startswith("result:"):
            return
        name, exact, final = score_name(line[: min(match.start() for match in (bpb, loss) if match)])
        values = [float(match[1].replace(",", "")) if match else None for match in (loss, bpb)]
        score = FinalScore(name, values[0], values[1] or 0.0, number, exact, final)
        before = log.finals.get(name)
        if not final:
            log.earlier.append(score)
        elif not (before and before.exact and not exact and number - before.line < 2):
            if before or len(log.finals) < MOST_NOTED:
                log.finals[name] = score
            if timed := SCORE_TIME.search(line):
                self.add_eval_seconds(seconds_of(*timed.groups()))

    def read_eval_time(self, number: int, line: str) -> None:
        found = EVAL_TIME.search(line)
        if found is None or line.startswith("step:") or "diagnostic" in line.lower():
            return  # (a diagnosis is no part of the score)
        seconds = seconds_of(*found.groups()[1:])
        if found["total"]:
            self.log.total_eval_seconds = max(self.log.total_eval_seconds or 0.0, seconds)
        else:
            self.add_eval_seconds(seconds)

    def add_eval_seconds(self, seconds: float) -> None:
        if len(self.log.eval_seconds) < MOST_SCORES:
            self.log.eval_seconds.append(seconds)

    def read_size(self, number: int, line: str) -> None:
        """Reads bytes. The total is the last one that names a codec, or else the last one: the raw sum comes first."""
        log, line = self.log, without_clock(line)
        if (found := TOTAL_SIZE.search(line)) and (named := bool((found["what"] or "").strip())) >= self.named_total:
            log.total_bytes, self.named_total = whole(found[2]), named
        elif found := BUDGET.search(line):
            log.total_bytes = whole(found[1])
        elif found := BUDGET_MEGABYTES.search(line):
            log.rounded_total = round(1e6 * float(found[1]))
        if found := MODEL_SIZE.search(line):
            log.model_bytes = whole(found[1])
        if (found := CODE_SIZE.search(line)) and len(log.code_bytes) < MOST_NOTED:
            if "(compressed" in (found["how"] or "").lower():
                log.compressed_code = whole(found[2])
            else:
                log.code_bytes = tuple(dict.fromkeys((*log.code_bytes, whole(found[2]))))

    def read_seed(self, number: int, line: str) -> None:
        if self.log.seed is None and (found := SEED.search(line)):
            self.log.seed = int(found[1])

    def read_tokens(self, number: int, line: str) -> None:
        if found := VAL_TOKENS.search(without_clock(line)):
            self.log.val_tokens = int(found[1])

    def read_hash(self, number: int, line: str) -> None:
        if len(self.log.code_hashes) < MOST_NOTED:
            self.log.code_hashes |= set(CODE_HASH.findall(line))

    def read_trouble(self, number: int, line: str) -> None:
        if TROUBLE.search(line):
            self.log.troubles[1:] = [(number, line.strip()[:MOST_TEXT])]

    def read_features(self, number: int, line: str) -> None:
        trains = self.training_line is not None and number > self.training_line
        self.log.features.read(number, without_clock(line[: MOST_TEXT * 4]), trains)

    def read_gate(self, number: int, line: str) -> None:
        if len(self.log.gates) < MOST_NOTED:
            self.log.gates += [gate for gate in read_gates(number, line[: MOST_TEXT * 4]) if gate not in self.log.gates]


def line_shapes(lower: str) -> bytes:
    """Returns the lines that differ in more than figures, each once: most of a long log are of a few forms."""
    return b"\n".join(set(lower.encode(errors="replace").translate(None, b"0123456789.,").split(b"\n")))


def final_or_last(hits: list[int], lines: list[str]) -> list[int]:
    """Chooses the lines with a score that may speak of the artifact, and the last of the others."""
    finals = [index for index in hits if FINAL_STEM.search(lines[index])] if len(hits) > LAST_SCORES else hits
    return sorted({*finals, *hits[-LAST_SCORES:]})


def without_clock(line: str) -> str:
    """Removes the time that some loggers write before a line."""
    clock = CLOCK.match(line) if line[:1].isdigit() or line[:1] == "[" else None
    return line[clock.end() :] if clock else line


def score_name(head: str) -> tuple[str, bool, bool]:
    """Names the score that a line gives after `head`: (its stage, whether it has all digits, whether it is final)."""
    words = head[:MOST_TEXT].strip().split()
    finals = [word.removesuffix(":done").rstrip(":") for word in words if FINAL_NAME.match(word)]
    spoken = head.lower()
    final = bool(finals) and "diagnostic" not in spoken and "pre_quant" not in spoken and "pre-quant" not in spoken
    name = " ".join(finals if final else words).rstrip(":")
    exact = any(word.endswith("_exact") for word in words)
    return name.replace("_exact", ""), exact, final


def settings_of(line: str) -> dict[str, str]:
    """Reads the settings of one opening line."""
    if listed := LISTED_KNOB.match(line):
        return {listed[1]: listed[2].strip()}
    if not CONFIG_LINE.match(line):
        pairs = dict(CONFIG_PAIR.findall(line))
        return pairs if len(pairs) >= LEAST_PAIRS else {}
    prefix = line.split(":", 1)[0] + "_" if line.startswith(("val_loader", "train_loader")) else ""
    return {prefix + key: value for key, value in CONFIG_PAIR.findall(line)}


def whole(text: str) -> int:
    return int(text.replace(",", ""))


def seconds_of(figure: str, unit: str) -> float:
    return float(figure) * SECONDS[unit]
