"""Checks the code that is shipped: whether it is what ran, what it needs beside it, what it declares and never uses."""

import ast
from collections import Counter

from lab.bundle.packer import minify_source
from lab.bundle.parts import BundleError
from lab.record.finding import Findings, error, listed, note, warning
from lab.record.knob_reading import ghost_knobs
from lab.record.record_folder import DOCUMENTS, RecordFolder
from lab.record.script_reading import READABLE_NAME, oldest_grammar_error, parse_quietly

MOST_NAMES = 12
LEAST_SOURCE = 1000
"""Characters of a script that are told in the midst of what several processes printed."""


def neighbour_findings(record: RecordFolder) -> Findings:
    """Finds files that the script names, and files that it needs and that are not there."""
    for name in record.neighbours.missing:
        yield error("S27-missing-module", f"{record.script_name} runs {name}, which is not in the folder")
    logs = {log.name for log in record.logs}
    data = {name: size for name, size in record.neighbours.files.items() if name not in DOCUMENTS | logs}
    if data:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in data.items())
        yield warning(
            "S26-data-file", f"{record.script_name} names {names}: what it reads when it scores counts into the total"
        )


def ran_code_findings(record: RecordFolder) -> Findings:
    """Checks that the source that a log begins with is the shipped one, packed or not."""
    script = record.script
    groups: dict[str, list[str]] = {}
    for log in record.counted if script else ():
        if source := log.source.strip():
            groups.setdefault(source_difference(source, record), []).append(log.name)
    place = f"the source that ran stands at the top, and {record.script_name}"
    for difference, names in groups.items():
        if difference == "code":
            yield error("S64-other-code", f"{listed(names)}: {place} is another")
        elif difference == "constants":
            yield warning("S64-other-code", f"{listed(names)}: {place} differs from it in values")
        elif difference == "comments":
            yield note("S64-other-code", f"{listed(names)}: {place} differs from it in comments or layout")


def source_difference(source: str, record: RecordFolder) -> str:
    """Says in what a source differs from every script of the folder: in nothing (""), or in which of three things."""
    layers = [text.strip() for text in (*record.scripts.values(), *(record.script.layers if record.script else ()))]
    if any(layer == source or (len(layer) > LEAST_SOURCE and layer in source) for layer in layers):
        return ""
    nearest = min(layers, key=lambda layer: abs(len(layer) - len(source)))
    trees = [parse_quietly(text) for text in (source, nearest)]
    if "".join(source.split()) == "".join(nearest.split()):
        return "comments"
    if None not in trees and trees[0].body and code_outline(trees[0], True) == code_outline(trees[1], True):
        return "comments"
    if differs_in_knobs(source, nearest):
        return "constants"
    alike = None not in trees and trees[0].body and code_outline(trees[0]) == code_outline(trees[1])
    return "constants" if alike else "code"


def differs_in_knobs(source: str, other: str) -> bool:
    """Says whether all lines that only one of two sources has are comments or take a knob from the environment."""
    counts = Counter(line.strip() for line in source.splitlines())
    counts.subtract(Counter(line.strip() for line in other.splitlines()))
    differing = [line for line, count in counts.items() if count and line and not line.startswith("#")]
    return all("environ" in line or "getenv" in line for line in differing)


def code_outline(tree: ast.Module, values: bool = False) -> list[tuple[str, ...]]:
    """Lists the nodes of a tree with their names, and with their values or without."""
    names = ("id", "attr", "name", "arg", "module", *(["value"] if values else []))
    plain = str | int | float | bytes | complex | None
    fields = ([getattr(node, name, None) for name in names] for node in ast.walk(tree))
    return [
        (type(node).__name__, *(repr(value) for value in found if isinstance(value, plain)))
        for node, found in zip(ast.walk(tree), fields, strict=True)
    ]


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
    except (BundleError, RecursionError, MemoryError) as problem:
        reason = str(problem)[:200] if isinstance(problem, BundleError) else "it is nested too deeply to be read"
        yield error("S65-readable", f"{READABLE_NAME}: {reason}")
        return
    if minified != record.script.innermost:
        yield error("S65-readable", f"{READABLE_NAME} is not the source that is packed in {record.script_name}")


def lint_findings(record: RecordFolder) -> Findings:
    """Finds what a reviewer would ask about in the source."""
    script, name = record.script, record.script_name
    if script is None:
        return
    if script.opaque:
        yield warning("S63-opaque", f"{name} runs text that could not be unpacked: nothing inside it was looked at")
    if problem := oldest_grammar_error(script):
        make = note if any(log.finals for log in record.logs) and "deeply" not in problem else warning
        partly = f"; {script.unread_share:.0%} of it was not looked at" if script.unread else ""
        yield make("S62-grammar", f"{name} is not Python 3.10 ({problem}){partly}")
    unread_knobs, printed_knobs = ghost_knobs(script)
    for names, what in ((unread_knobs, "read by nothing"), (printed_knobs, "printed and used for nothing")):
        if names:
            text = f"{name} takes knobs from the environment that are {what}: {listed(names, MOST_NAMES)}"
            yield warning("S60-ghost-knob", text)
