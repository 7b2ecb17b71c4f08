"""Holds scores against the validation text: its bytes per token, and whether all of it was scored."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lab.record.claim_check import is_near, loss_stages, means_and_values
from lab.record.finding import Findings, error, listed, warning
from lab.record.log_reading import LogReading
from lab.record.record_folder import RecordFolder

BYTES_PER_TOKEN = {"sp1024": 2.436, "sp4096": 3.32, "sp8192": 3.727, "caseops": 3.157, "byte260": 1.0}
"""Measured on the competition's validation texts, by tokenizer, over some 1,100 published submissions."""
DOUBLE_SPACE_RATIO = 4.386
RATIO_TOLERANCE, EXACT_TOLERANCE = 0.002, 2e-5
"""Relative: of a table of four digits, and where tokens and bytes were counted."""
VAL_BYTES = 151_085_000
"""The competition's validation text, by tokens times bytes per token of each of its tokenizers, within 0.02 %."""
COVERAGE_TOLERANCE = 0.01
TOKENIZER_MARKS = {
    "sp1024": ("fineweb_1024_bpe", "sp1024"), "sp4096": ("fineweb_4096_bpe", "sp4096"),
    "sp8192": ("fineweb_8192_bpe", "sp8192"), "byte260": ("byte260",),
}  # fmt: skip
"""Tokenizer -> words by which the opening lines of a log name it."""
SUBSET_KNOB = re.compile(r"(?=.*(?:val|eval))(?=.*(?:max|limit|subset|cap))(?=.*(?:tok|doc|byte|shard|file))\w{1,60}")
KNOB_DEFAULT = re.compile(r"""["'](\w{1,60})["']\s?,\s?["']?(\d[\d_]{0,14})""")


@dataclass(frozen=True)
class Ratio:
    """Holds the bytes per token that a pair of val_loss and val_bpb implies."""

    place: str
    value: float
    tokenizer: str
    val_tokens: int | None


def arithmetic_findings(record: RecordFolder) -> Findings:
    """Checks that val_loss / (ln 2 * val_bpb) is the text's bytes per token, which no model can change."""
    exact = [run.result["val_bytes"] / run.result["val_tokens"] for run in record.runs]
    groups: dict[tuple, list[Ratio]] = {}
    for ratio in ratios(record):
        groups.setdefault((round(ratio.value, 2), ratio.tokenizer), []).append(ratio)
    for group in groups.values():
        places = listed((ratio.place for ratio in group), 3)
        yield from ratio_findings(places, max(group, key=lambda ratio: ratio.val_tokens or 0), exact)
    if not exact:
        yield from coverage_findings(record)


def ratios(record: RecordFolder) -> Iterator[Ratio]:
    tokenizers = {log.name: tokenizer_of(log) for log in record.logs}
    loss, bpb = record.claimed("val_loss"), record.claimed("val_bpb")
    logged = [value for values in loss_stages(record).values() for value in means_and_values(values)]
    if loss and bpb and min(loss, bpb) > 0 and (record.runs or not any(is_near(value, loss) for value in logged)):
        tokenizer = next(filter(None, (tokenizers[log.name] for log in record.counted)), "")
        yield Ratio("submission.json", loss / (math.log(2) * bpb), tokenizer, None)
    for log in record.logs:
        for score in log.finals.values():
            if score.val_loss and score.val_loss > 0 and 0 < score.val_bpb < math.inf:
                value = score.val_loss / (math.log(2) * score.val_bpb)
                yield Ratio(f"line {score.line} of {log.name}", value, tokenizers[log.name], log.val_tokens)


def tokenizer_of(log: LogReading) -> str:
    """Names which of the competition's tokenizers a log is of; empty where none can be told."""
    opening = "\n".join(line for line in log.opening if "tokenizer" in line or "dataset" in line or "vocab" in line)
    if log.config.get("caseops_enabled", "").lower() in ("true", "1") or "caseops" in opening.lower():
        return "caseops"
    return next((name for name, marks in TOKENIZER_MARKS.items() if any(mark in opening for mark in marks)), "")


def ratio_findings(places: str, ratio: Ratio, exact: list[float]) -> Findings:
    known = {"this validation text": exact[0]} if exact else BYTES_PER_TOKEN
    tokenizer, value = ratio.tokenizer, ratio.value
    expected = {tokenizer: known[tokenizer]} if tokenizer in known else known
    tolerance = EXACT_TOLERANCE if exact else RATIO_TOLERANCE
    if not math.isfinite(value) or any(abs(value / wanted - 1) <= tolerance for wanted in expected.values()):
        return
    text = f"{places}: val_loss / (ln 2 * val_bpb) is {value:.6g} bytes per token"
    wanted = " or ".join(f"{number:.6g} ({name})" for name, number in expected.items())
    if abs(value / DOUBLE_SPACE_RATIO - 1) <= RATIO_TOLERANCE:
        yield error("S51-double-space", f"{text}: the leading space of a token was counted twice, val_bpb is too good")
    elif not exact and covered(ratio) is not None and abs(covered(ratio) - 1) > COVERAGE_TOLERANCE:
        return  # another text has another ratio: coverage_findings
    elif tokenizer in known or exact:
        yield error("S50-bytes-per-token", f"{text}, but all of the validation text has {wanted}")
    else:
        yield warning("S52-unknown-tokenizer", f"{text}, which is that of no known tokenizer: {wanted}")


# ---- coverage ----


def covered(ratio: Ratio) -> float | None:
    """Returns the bytes of the tokens that were scored, as a share of the competition's validation text."""
    bytes_per_token = BYTES_PER_TOKEN.get(ratio.tokenizer, ratio.value)
    return ratio.val_tokens * bytes_per_token / VAL_BYTES if ratio.val_tokens else None


def coverage_findings(record: RecordFolder) -> Findings:
    """Finds logs that scored a part of the competition's validation text, or another text."""
    shares: dict[float, list[Ratio]] = {}
    for ratio in ratios(record):
        share = covered(ratio) if ratio.tokenizer else None
        if share is not None and abs(ratio.value / DOUBLE_SPACE_RATIO - 1) > RATIO_TOLERANCE:
            shares.setdefault(round(share, 2), []).append(ratio)
    for share, group in shares.items():
        places, tokens = listed((ratio.place for ratio in group), 3), group[0].val_tokens
        if share < 1 - COVERAGE_TOLERANCE:
            text = f"{tokens:,} tokens were scored, {share:.0%} of the validation text"
            yield error("S53-subset", f"{places}: {text}")
        elif share > 1 + COVERAGE_TOLERANCE:
            text = f"{tokens:,} tokens are {share:.0%} of the competition's validation text: another text was scored"
            yield warning("S54-other-text", f"{places}: {text}")
    if not shares:
        yield from subset_knob_findings(record)


def subset_knob_findings(record: RecordFolder) -> Findings:
    """Finds a limit on the validation text, in the settings of logs that do not say how much was scored."""
    limits = {}
    for log in record.counted:
        for key, value in log.config.items():
            if SUBSET_KNOB.fullmatch(key.lower()) and value.isdecimal() and int(value[:18]):
                limits.setdefault(f"{key}:{value}", []).append(log.name)
    for setting, names in limits.items():
        yield warning("S53-subset", f"{listed(names)}: {setting} bounds the validation text")
    if limits or not record.script or not record.counted:
        return
    defaults = dict(KNOB_DEFAULT.findall(record.script.innermost))
    bounding = {key: value for key, value in defaults.items() if SUBSET_KNOB.fullmatch(key.lower()) and int(value)}
    for key, value in bounding.items():
        if not any(f"{key}=" in text for text in shell_texts(record)):
            text = (
                f"reads no more of the validation text than {key} (default {int(value):,}), and no file here sets that"
            )
            yield warning("S53-subset", f"{record.script_name} {text}")


def shell_texts(record: RecordFolder) -> list[str]:
    """Returns what tells how a run was started: shell scripts and the README."""
    files = [file for file in record.files if file.suffix in (".sh", ".md") and file.stat().st_size < 1 << 20]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]
