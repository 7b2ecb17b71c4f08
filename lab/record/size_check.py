"""Checks the bytes of a submission: of artifact and code together, and of the code, as claimed, logged and shipped."""

import lzma
import statistics
from collections.abc import Iterator
from typing import Any

from lab.record.code_check import source_difference
from lab.record.finding import Findings, error, group_by, listed, note, warning
from lab.record.log_reading import LogReading
from lab.record.record_folder import RecordFolder
from lab.record.run_check import COMPETITION_BYTES, is_number

LAYOUT_BYTES, FEW_BYTES = 4, 64
"""Scripts that differ in their length by as much may differ in an end of line, or in a comment."""
LEAST_COMPRESSION_SHARE = 0.5
"""Of what lzma makes of a script: better packers (with minified source) reach 0.8 of it."""


def byte_limit(record: RecordFolder) -> int:
    """Returns what the runs were held to, and never more than the track's."""
    limit = min((run.result["limit_bytes"] for run in record.runs), default=COMPETITION_BYTES)
    return min(limit, COMPETITION_BYTES) if "16mb" in record.track else limit


def total_findings(record: RecordFolder) -> Findings:
    """Checks that what is shipped fits: by the logs' model bytes and the script on the disk, and by what is claimed."""
    limit, over, later = byte_limit(record), {}, {}
    for log in filter(record.needs, record.logs):  # what adapts an artifact later may not say its bytes
        counted = counted_total(record, log)
        total = log.total_bytes if counted is None else counted
        if total is not None and total > limit:
            over[log.name] = total
        elif log.total_bytes is not None and log.total_bytes > limit:
            later[log.name] = log.total_bytes
    if over:
        text = f"artifact and code are over {limit:,} bytes by up to {max(over.values()) - limit:,}"
        yield error("S20-over-limit", f"{text}: {amounts(over)}")
    if later:
        text = f"logged bytes are over {limit:,}, with the shipped script they are not"
        yield warning("S22-logged-over", f"{text}: {amounts(later)}")
    if silent := [log.name for log in record.counted if record.needs(log) and not any(sizes_of(record, log))]:
        yield warning("S24-no-size", f"{listed(silent)}: nothing says how many bytes the artifact has")
    if not over:
        yield from claimed_total_findings(record, limit)


def amounts(totals: dict[str, int]) -> str:
    return listed(f"{total:,} in {name}" for name, total in totals.items())


def counted_total(record: RecordFolder, log: LogReading) -> int | None:
    """Returns the bytes of a log's artifact with the shipped script, compressed where the log counts it so."""
    if log.model_bytes is None or record.bytes_code is None:
        return None
    modules = sum(record.neighbours.modules.values())
    return log.model_bytes + (record.bytes_code if log.compressed_code is None else log.compressed_code + modules)


def sizes_of(record: RecordFolder, log: LogReading) -> tuple[int | None, ...]:
    """Returns what a log, or submission.json of its seed, says of the artifact's bytes."""
    entries = (record.seed_results.get(str(seed)) for seed in log.seeds)
    stated = (total_of(entry) for entry in entries if isinstance(entry, dict))
    return (log.total_bytes, log.model_bytes, log.rounded_total, *stated)


def total_of(entry: dict[str, Any]) -> int | None:
    size = entry.get("artifact_bytes", entry.get("bytes_total"))
    return int(size) if is_number(size) else None


def stated_totals(record: RecordFolder) -> list[int]:
    """Returns the bytes that seed_results give, under one of two names."""
    found = (total_of(entry) for entry in record.seed_results.values() if isinstance(entry, dict))
    return [size for size in found if size is not None]


def claimed_total_findings(record: RecordFolder, limit: int) -> Findings:
    """Holds bytes_total against what the logs give; a mean and a rounded figure are what people write too."""
    stated = record.claimed("bytes_total")
    if stated is None:
        return
    totals = {size for log in record.logs for size in (log.total_bytes, counted_total(record, log)) if size is not None}
    known, figures = {*totals, *stated_totals(record)}, f"bytes_total {stated:,} of submission.json"
    logged = [log.total_bytes for log in record.counted if log.total_bytes]
    means = [statistics.fmean(sizes) for sizes in (logged, stated_totals(record)) if sizes]
    if stated > limit:
        yield error("S20-over-limit", f"{figures} is {stated - limit:,} over {limit:,}")
    elif not totals or stated in totals or (stated in known and not logged):
        return
    elif any(abs(stated - mean) <= 1 for mean in means[:1]):
        yield note("S21-bytes-total", f"{figures} is the mean over the logs: the largest is {max(totals):,}")
    elif is_rounded(stated, max(totals)):
        yield note("S21-bytes-total", f"{figures} is rounded: the logs say up to {max(totals):,}")
    else:
        yield error("S21-bytes-total", f"{figures} is in no log ({listed(f'{total:,}' for total in sorted(totals))})")


def is_rounded(stated: float, exact: float) -> bool:
    """Says whether a claim is a round number near the exact one."""
    return stated % 100 == 0 and abs(stated - exact) <= max(0.02 * exact, 2_500)


# ---- the code ----


def code_size_findings(record: RecordFolder) -> Findings:
    """Checks that the code that was counted is the code that is shipped, local modules included."""
    script, modules, whole = record.script, record.neighbours.modules, record.bytes_code
    if script is None or whole is None or not script.data:
        return
    logged = {size for log in record.logs for size in (*log.code_bytes, log.compressed_code) if size is not None}
    claim, alone = record.claimed("bytes_code"), len(script.data)
    if modules:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in modules.items())
        text = f"{record.script_name} runs {names}: code is {whole:,} bytes with it, {alone:,} without"
        yield (warning if whole in logged | {claim} else error)("S25-local-module", text)
    if claim is not None and claim not in {whole, alone, *logged}:
        rounded = any(is_rounded(claim, size) for size in (whole, alone, *logged))
        text = (
            f"bytes_code {claim:,} of submission.json is {'rounded' if rounded else 'not what the code has'}: {whole:,}"
        )
        yield (note if rounded else error)("S23-code-size", text)
    yield from logged_code_findings(record, {whole, alone})


def logged_code_findings(record: RecordFolder, shipped: set[int]) -> Findings:
    """Holds the code sizes of logs against the script, but for logs whose own source tells that it is another."""
    script, alone = record.script, len(record.script.data) if record.script else 0
    unpacked = {len(layer.encode()) for layer in script.layers[1:]} if script else set()
    logs = [log for log in record.counted if not log.source or not source_difference(log.source.strip(), record)]
    for sizes, names in group_by(logs, lambda log: log.code_bytes, "name").items():
        if not sizes or set(sizes) & (shipped | {len(text.encode()) for text in record.scripts.values()}):
            continue
        text = f"{listed(names)}: logged code size {sizes[-1]:,} bytes, but {record.script_name} has {alone:,}"
        if set(sizes) & unpacked:
            yield warning("S23-code-size", f"{text}: it was packed after the run")
        elif (changed := min(abs(sizes[-1] - size) for size in (*shipped, *unpacked))) <= FEW_BYTES:
            make = note if changed <= LAYOUT_BYTES or any(log.source for log in logs if log.name in names) else warning
            yield make("S23-code-size", f"{text}: it was changed after the run")
        else:
            yield error("S23-code-size", f"{text}: it is not the script that ran")
    yield from compressed_code_findings(record)


def compressed_code_findings(record: RecordFolder) -> Findings:
    """Finds compressed sizes that no packer reaches, and says which scripts fit in their compressed form alone."""
    script, limit = record.script, byte_limit(record)
    logs = [log for log in record.counted if log.compressed_code is not None]
    if not logs or script is None:
        return
    smallest = len(lzma.compress(script.data)) * LEAST_COMPRESSION_SHARE
    if small := [log for log in logs if (log.compressed_code or 0) < smallest]:
        text = (
            f"{len(script.data):,} bytes of {record.script_name} are said to be {small[0].compressed_code:,} compressed"
        )
        yield error("S28-compressed-code", f"{small[0].name}: {text}: no packer makes them less than {smallest:,.0f}")
    elif over := list(plain_totals(record, logs, limit)):
        text = f"the logs count {record.script_name} compressed; as it lies here the total is up to {max(over):,} bytes"
        yield note("S28-compressed-code", text)


def plain_totals(record: RecordFolder, logs: list[LogReading], limit: int) -> Iterator[int]:
    for log in logs:
        total = (log.model_bytes or 0) + (record.bytes_code or 0)
        if total > limit:
            yield total
