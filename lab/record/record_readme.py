"""README.md of a record: every number in it comes from result.json, none from a person; words are in templates/."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf.config.config import changed_knobs, config_from_dict
from lab.cli import lab_library, markdown_table
from lab.record.run_check import feature_audit

TEMPLATES = Path(__file__).with_name("templates")
PLACE_KNOBS = frozenset({"run_id", "runs_root", "seed"})
"""Knobs that name a run: the command to reproduce gives the seed itself."""
PARITY_ROWS = {"trained": "model in memory", "reloaded": "reloaded artifact", "scorer": "scorer"}
Row = tuple[Any, ...]


@dataclass(frozen=True)
class RecordFacts:
    """What the README is made from."""

    claims: dict[str, Any]
    results: list[dict[str, Any]]
    """One for each seed, in the order of the seeds."""
    config: dict[str, Any]
    hashes: dict[str, Any]

    @property
    def seeds(self) -> list[str]:
        return [str(result["seed"]) for result in self.results]

    def column(self, key: str, form: str = "") -> list[str]:
        """Returns a value of each result as text."""
        return [format(result[key], form) for result in self.results]


def render_readme(facts: RecordFacts) -> str:
    """Fills in templates/record_readme.md.j2. Raises UserError where jinja2 is not installed."""
    jinja2, results = lab_library("jinja2"), facts.results
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["figure"] = format
    return environment.get_template("record_readme.md.j2").render(
        claims=facts.claims,
        results=results,
        seeds=facts.seeds,
        seed_headings=[f"seed {seed}" for seed in facts.seeds],
        several=len(results) > 1,
        several_machines=len({(result["fingerprint"] or {}).get("machine_id") for result in results}) > 1,
        resumed=[f"seed {result['seed']}: {result['resumes']}" for result in results if result.get("resumes")],
        command=reproduction_command(facts),
        corpus=facts.config.get("data", {}).get("corpus"),
        hashes=facts.hashes,
        table=markdown_table,
        score_rows=score_rows(facts),
        experiment_rows=experiment_rows(facts),
        feature_rows=feature_rows(facts),
        parity_rows=parity_rows(facts),
        probe_rows=probe_rows(facts),
        time_rows=time_rows(facts),
        machine_rows=machine_rows(facts),
    )


def shared_or_each(values: Sequence[Any]) -> str:
    """Returns one value where all seeds agree, else one for each, in the order of the seeds."""
    return str(values[0]) if len(set(map(str, values))) == 1 else " / ".join(map(str, values))


def score_rows(facts: RecordFacts) -> list[Row]:
    rows: list[Row] = [
        (
            result["seed"], f"{result['val_bpb']:.8f}", f"{result['val_loss']:.8f}", f"{result['steps']:,}",
            f"{result['train_seconds']:.1f}", f"{result['eval_seconds']:.1f}", f"{result['bytes_code']:,}",
            f"{result['bytes_model']:,}", f"{result['bytes_total']:,}", f"`{result['artifact_sha256'][:16]}`",
        )
        for result in facts.results
    ]  # fmt: skip
    for name, ending in (("mean", ""), ("sample sd", "_std")) if len(rows) > 1 else ():
        rows.append((name, *(f"{facts.claims[key + ending]:.8f}" for key in ("val_bpb", "val_loss")), *[""] * 7))
    return rows


def experiment_rows(facts: RecordFacts) -> list[Row]:
    first, results = facts.results[0], facts.results
    rows = [
        ("preset", f"`{first['preset']}`"),
        ("knobs changed from the preset", f"`{' '.join(knob_words(facts)) or 'none'}`"),
        ("parameters", f"{first['params']:,}"),
        ("training tokens", shared_or_each(facts.column("train_tokens", ","))),
        ("training data", f"`{first['data_id']}`"),
        ("validation data", f"`{first['val_data_id']}`"),
        ("validation tokens, bytes, documents", ", ".join(f"{first[f'val_{unit}']:,}" for unit in VALIDATION_UNITS)),
        ("bytes per token", f"{first['val_bytes'] / first['val_tokens']:.6f}"),
        ("scoring windows", f"{first['eval_seq_len']} tokens, stride {shared_or_each(facts.column('eval_stride'))}"),
        ("size was fitted by", shared_or_each(["; ".join(r.get("fit_actions") or ()) or "nothing" for r in results])),
        ("caps", f"{first['max_wallclock_seconds']:g} s training, {first['max_eval_seconds']:g} s scoring (0: none)"),
    ]
    if all(result.get("unquantized") for result in results):
        before = shared_or_each([f"{result['unquantized']['val_bpb']:.6f}" for result in results])
        rows.append(("val_bpb before quantization", f"{before} ({first['unquantized'].get('note', '')})"))
    return rows


VALIDATION_UNITS = ("tokens", "bytes", "docs")


def feature_rows(facts: RecordFacts) -> list[Row]:
    """Tells of every switched-on feature what proves that it acted."""
    audits = [feature_audit(result) for result in facts.results]
    rows = []
    for feature, seen in audits[0].items():
        records = [audit[feature] for audit in audits]
        acts = shared_or_each([f"{record['count']:,}" for record in records])
        proven = "yes" if all(record["proven"] for record in records) else "NO"
        rows.append((feature, acts, shared_or_each(list(map(step_span, records))), proven, seen["effect"]))
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


def probe_rows(facts: RecordFacts) -> list[Row]:
    """Lists the legality probes of every seed."""
    probes = [result["probes"] for result in facts.results]
    names = list(dict.fromkeys(name for probe in probes for name in probe))
    verdicts = {name: [probe.get(name, {}).get("verdict", "-") for probe in probes] for name in names}
    return [(name, *verdicts[name], probes[0].get(name, {}).get("detail", "")) for name in names]


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


def machine_rows(facts: RecordFacts) -> list[Row]:
    prints = [result["fingerprint"] or {} for result in facts.results]
    values = {
        "machine": facts.column("machine"),
        "processes": facts.column("world_size"),
        "machine id": [found.get("machine_id", "-") for found in prints],
        "CPU": [found.get("cpu") or "-" for found in prints],
        "driver, CUDA": [f"{found.get('driver') or '-'}, {found.get('cuda') or '-'}" for found in prints],
        "torch, Python": [f"{result['torch']}, {result['python']}" for result in facts.results],
        "compiled": [result.get("compiled", "-") for result in facts.results],
    }
    return [(name, shared_or_each(of_seeds)) for name, of_seeds in values.items()]


def reproduction_command(facts: RecordFacts) -> str:
    """Returns the exact command but for the seed."""
    first = facts.results[0]
    processes = first["world_size"]
    launcher = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    return " ".join([launcher, "train_gpt.py", "--preset", first["preset"], *knob_words(facts)])


def knob_words(facts: RecordFacts) -> list[str]:
    """Writes key=value for every knob that differs from the preset's, fit for a shell."""
    sections = {name: part for name, part in facts.config.items() if isinstance(part, dict)}
    changed = changed_knobs(config_from_dict(sections))
    return [f"{knob}={shlex.quote(str(value))}" for knob, value in changed.items() if knob not in PLACE_KNOBS]
