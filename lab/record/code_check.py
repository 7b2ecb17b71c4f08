"""Checks the code that is shipped: its bytes, what it needs beside it, what it declares and never uses."""

from lab.bundle.packer import minify_source
from lab.bundle.parts import BundleError
from lab.record.finding import Findings, error, group_by, warning
from lab.record.record_folder import DOCUMENTS, SCRIPT_NAME, RecordFolder
from lab.record.run_check import COMPETITION_BYTES
from lab.record.script_reading import READABLE_NAME, ghost_knobs, oldest_grammar_error

MOST_NAMES = 12


def total_findings(record: RecordFolder) -> Findings:
    """Checks that what is shipped fits: by the logs' model bytes and the script on the disk, and by what is claimed.

    The limit is what the runs were held to, and never more than the track's.
    """
    limit = min((run.result["limit_bytes"] for run in record.runs), default=COMPETITION_BYTES)
    limit = min(limit, COMPETITION_BYTES) if "16mb" in record.track else limit
    code, stated, totals = record.bytes_code, record.claim("bytes_total"), set()
    for log in record.logs:
        counted = None if log.model_bytes is None or code is None else log.model_bytes + code
        totals |= {log.total_bytes, counted} - {None}
        total = log.total_bytes if counted is None else counted
        if total is None:
            yield warning("S24-no-size", f"{log.name} does not say how many bytes the artifact has")
        elif total > limit:
            text = f"{log.name}: artifact and code are {total:,} bytes, {total - limit:,} over {limit:,}"
            yield error("S20-over-limit", text)
        elif log.total_bytes is not None and log.total_bytes > limit:
            text = f"{log.name} logs {log.total_bytes:,} bytes, over {limit:,}; with the shipped script it is {total:,}"
            yield warning("S22-logged-over", text)
    if isinstance(stated, int) and stated > limit:
        yield error("S20-over-limit", f"bytes_total {stated:,} of submission.json is {stated - limit:,} over {limit:,}")
    elif isinstance(stated, int) and totals and stated not in totals:
        known = ", ".join(f"{total:,}" for total in sorted(totals))
        yield error("S21-bytes-total", f"bytes_total {stated:,} of submission.json is in no log ({known})")


def code_size_findings(record: RecordFolder) -> Findings:
    """Checks that the code that was counted is the code that is shipped, local modules included."""
    script, modules, whole = record.script, record.neighbours.modules, record.bytes_code
    if script is None or whole is None:
        return
    claim, alone = record.claim("bytes_code"), len(script.data)
    if modules:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in modules.items())
        logged = {claim, *(size for log in record.logs for size in log.code_bytes)}
        text = f"{SCRIPT_NAME} runs {names}: code is {whole:,} bytes with it, {alone:,} without"
        yield (warning if whole in logged else error)("S25-local-module", text)
    if isinstance(claim, int) and claim not in (whole, alone):
        text = f"bytes_code {claim:,} of submission.json is not what the code has: {whole:,}"
        yield error("S23-code-size", text)
    unpacked = {len(layer.encode()) for layer in script.layers[1:]}
    for sizes, names in group_by(record.logs, lambda log: log.code_bytes, "name").items():
        if sizes and not set(sizes) & {whole, alone}:
            text = f"{', '.join(names)}: logged code size {sizes[-1]:,} bytes, but {SCRIPT_NAME} has {alone:,}"
            if set(sizes) & unpacked:
                yield warning("S23-code-size", f"{text}: it was packed after the run")
            else:
                yield error("S23-code-size", f"{text}: it is not the script that ran")


def neighbour_findings(record: RecordFolder) -> Findings:
    """Finds files that the script names, and files that it needs and that are not there."""
    for name in record.neighbours.missing:
        yield error("S27-missing-module", f"{SCRIPT_NAME} runs {name}, which is not in the folder")
    logs = {log.name for log in record.logs}
    data = {name: size for name, size in record.neighbours.files.items() if name not in DOCUMENTS | logs}
    if data:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in data.items())
        yield warning(
            "S26-data-file", f"{SCRIPT_NAME} names {names}: what it reads when it scores counts into the total"
        )


def ran_code_findings(record: RecordFolder) -> Findings:
    """Checks that the source that a log begins with is the shipped one, packed or not."""
    if record.script is None:
        return
    shipped = {layer.strip() for layer in record.script.layers}
    others = [log.name for log in record.logs if log.source.strip() and log.source.strip() not in shipped]
    if others:
        text = f"{', '.join(others)}: the source that ran stands at the top, and {SCRIPT_NAME} is another"
        yield error("S64-other-code", text)


def readable_findings(record: RecordFolder) -> Findings:
    """Checks that a readable script beside a packed one is what was packed."""
    path = record.path / READABLE_NAME
    if record.script is None or not path.is_file():
        return
    readable = path.read_text(encoding="utf-8", errors="replace")
    if readable in record.script.layers:
        return
    try:
        minified = minify_source(readable)
    except BundleError as problem:
        minified = ""
        yield error("S65-readable", f"{READABLE_NAME}: {problem}")
    if minified != record.script.innermost:
        yield error("S65-readable", f"{READABLE_NAME} is not the source that is packed in {SCRIPT_NAME}")


def lint_findings(record: RecordFolder) -> Findings:
    """Finds what a reviewer would ask about in the source."""
    script = record.script
    if script is None:
        return
    if script.opaque:
        text = f"{SCRIPT_NAME} runs text that could not be unpacked: nothing inside it was looked at"
        yield warning("S63-opaque", text)
    if problem := oldest_grammar_error(script):
        unread = "" if len(script.trees) == len(script.layers) else "; nothing inside it was looked at"
        yield warning("S62-grammar", f"{SCRIPT_NAME} is not Python 3.10 ({problem}){unread}")
    unread_knobs, printed_knobs = ghost_knobs(script)
    for names, what in ((unread_knobs, "read by nothing"), (printed_knobs, "printed and used for nothing")):
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            text = f"{SCRIPT_NAME} takes knobs from the environment that are {what}: {', '.join(names[:MOST_NAMES])}"
            yield warning("S60-ghost-knob", text + more)
