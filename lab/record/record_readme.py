"""README.md of a record: every number in it comes from result.json, none from a person; words are in templates/."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf.config.config import changed_knobs, config_from_dict
from lab.cli import lab_library, markdown_cell, markdown_table
from lab.record.run_check import feature_audit

TEMPLATES = Path(__file__).with_name("templates")
PLACE_KNOBS = frozenset({"run_id", "runs_root", "seed"})
"""Knobs that name a run: the command to reproduce gives the seed itself."""
PARITY_ROWS = {"trained": "model in memory", "reloaded": "reloaded artifact", "scorer": "scorer"}
Row = tuple[Any, ...]


@dataclass(frozen=True)
class RecordFacts:
    """Holds what the README is made from."""

    claims: dict[str, Any]
    results: list[dict[str, Any]]
    """One for each seed, in the order of the seeds."""
    config: dict[str, Any]
    hashes: dict[str, Any]

    @property
    def seeds(self) -> list[str]:
        return [str(result["seed"]) for result in self.results]


def render_readme(facts: RecordFacts) -> str:
    """Fills in templates/record_readme.md.j2. Raises UserError where jinja2 is not installed."""
    jinja2, results = lab_library("jinja2"), facts.results
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"figure": format, "cell": markdown_cell, "each": shared_or_each}
    processes = results[0]["world_size"]
    unquantized = [result.get("unquantized") for result in results]
    return environment.get_template("record_readme.md.j2").render(
        claims=facts.claims,
        results=results,
        first=results[0],
        several=len(results) > 1,
        seeds=facts.seeds,
        seed_headings=[f"seed {seed}" for seed in facts.seeds],
        knobs=knob_words(facts),
        fitted=[{"by": "; ".join(result.get("fit_actions") or ()) or "nothing"} for result in results],
        unquantized=unquantized if all(unquantized) else [],
        fingerprints=[result["fingerprint"] or {} for result in results],
        resumed=[f"seed {result['seed']}: {result['resumes']}" for result in results if result.get("resumes")],
        launcher="python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}",
        corpus=facts.config.get("data", {}).get("corpus"),
        hashes=facts.hashes,
        table=markdown_table,
        feature_rows=feature_rows(facts),
        parity_rows=parity_rows(facts),
        probes=list(dict.fromkeys(name for result in results for name in result["probes"])),
        time_rows=time_rows(facts),
    )


def shared_or_each(rows: Sequence[Mapping[str, Any]], *keys: str, form: str = "") -> str:
    """Returns the values of `keys` as a table's cell: once where all seeds agree, else for each, in their order."""
    values = [[row.get(key) for key in keys] for row in rows]
    texts = [", ".join("-" if v in (None, "") else format(v, form) for v in of_seed) for of_seed in values]
    return markdown_cell(" / ".join(texts[:1] if len(set(texts)) == 1 else texts))


def feature_rows(facts: RecordFacts) -> list[Row]:
    """Tells of every switched-on feature what proves that it acted."""
    audits = [feature_audit(result) for result in facts.results]
    rows = []
    for feature, seen in audits[0].items():
        records = [audit[feature] | {"steps": step_span(audit[feature])} for audit in audits]
        proven = "yes" if all(record["proven"] for record in records) else "NO"
        acts, steps = shared_or_each(records, "count", form=","), shared_or_each(records, "steps")
        rows.append((feature, acts, steps, proven, seen["effect"]))
    return rows


def step_span(record: dict[str, Any]) -> str:
    first, last = record["first"], record["last"]
    return "outside of training" if first is None else f"{first:,} to {last:,}"


def parity_rows(facts: RecordFacts) -> list[Row]:
    def figures(name: str, form: str) -> list[str]:
        values = [(result["parity"] or {}).get(name) for result in facts.results]
        return [format(value, form) if isinstance(value, int | float) else "-" for value in values]

    rows = [(text, *figures(name, ".6f")) for name, text in PARITY_ROWS.items()]
    return [*rows, ("largest difference", *figures("largest_difference", ".2g"))]


def time_rows(facts: RecordFacts) -> list[Row]:
    """Counts every second of the processes, and what it counts against under the two conventions."""
    ledgers = [result["ledger"] for result in facts.results]
    phases: dict[str, Row] = {}
    for row in (row for ledger in ledgers for row in ledger["phases"]):
        phases.setdefault(row["phase"], (row["script"] or "-", row["process"] or "-"))
    rows: list[Row] = []
    for phase, counted in phases.items():
        seconds = (sum(row["seconds"] for row in ledger["phases"] if row["phase"] == phase) for ledger in ledgers)
        rows.append((phase, *counted, *(f"{value:.1f}" for value in seconds)))
    for kind, text in (("script", "by the script's timers"), ("process", "by the process's clock")):
        for budget in ("train", "eval"):
            sums = (f"{ledger[kind].get(budget, 0.0):.1f}" for ledger in ledgers)
            rows.append((f"**{budget}, {text}**", "", "", *sums))
    return [*rows, ("**whole process**", "", "", *(f"{ledger['process_seconds']:.1f}" for ledger in ledgers))]


def knob_words(facts: RecordFacts) -> list[str]:
    """Writes key=value for every knob that differs from the preset's, fit for a shell."""
    sections = {name: part for name, part in facts.config.items() if isinstance(part, dict)}
    changed = changed_knobs(config_from_dict(sections))
    return [f"{knob}={shlex.quote(str(value))}" for knob, value in changed.items() if knob not in PLACE_KNOBS]
