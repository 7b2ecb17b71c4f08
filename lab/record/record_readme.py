"""README.md of a record: every number in it comes from result.json, none from a person."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from golf.config.config import changed_knobs, config_from_dict
from lab.record.run_check import feature_audit

PLACE_KNOBS = frozenset({"run_id", "runs_root", "seed"})
"""Knobs that name a run: the command to reproduce gives the seed itself."""


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


def render_readme(facts: RecordFacts) -> str:
    sections = (
        heading_section, score_section, experiment_section, feature_section, probe_section, time_section,
        machine_section, reproduction_section, hash_section, file_section,
    )  # fmt: skip
    return "\n".join(section(facts).strip() + "\n" for section in sections)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words and the others figures, which stand to the right."""
    marks = ["---" if column < texts else "--:" for column in range(len(header))]
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def shared_or_each(values: Sequence[Any]) -> str:
    """One value where all seeds agree, else one for each, in the order of the seeds."""
    return str(values[0]) if len(set(map(str, values))) == 1 else " / ".join(map(str, values))


# ---- sections ----


def heading_section(facts: RecordFacts) -> str:
    claims, count = facts.claims, len(facts.results)
    deviation = claims["val_bpb_std"]
    spread = f"mean of {count} seeds, sample sd {deviation:.6f}" if count > 1 else "one seed"
    return f"""# {claims["name"]}

{claims["blurb"]}

**val_bpb {claims["val_bpb"]:.6f}** ({spread}), val_loss {claims["val_loss"]:.6f} nats per token, at most \
{claims["bytes_total"]:,} of {claims["limit_bytes"]:,} bytes, track `{claims["track"]}`, {claims["author"]} \
({claims["github_id"]}), {claims["date"]}.

Made by `tools/make_submission.py` from the files of {"these runs" if count > 1 else "this run"}: apart from author, \
name and blurb no word or number was typed. `python tools/check_submission.py` on this folder checks all of it again.
"""


def score_section(facts: RecordFacts) -> str:
    header = ("seed", "val_bpb", "val_loss", "steps", "train s", "eval s", "code", "model", "total", "artifact sha256")
    rows = [
        (
            result["seed"], f"{result['val_bpb']:.8f}", f"{result['val_loss']:.8f}", f"{result['steps']:,}",
            f"{result['train_seconds']:.1f}", f"{result['eval_seconds']:.1f}", f"{result['bytes_code']:,}",
            f"{result['bytes_model']:,}", f"{result['bytes_total']:,}", f"`{result['artifact_sha256'][:16]}`",
        )
        for result in facts.results
    ]  # fmt: skip
    claims = facts.claims
    if len(rows) > 1:
        rows.append(("mean", f"{claims['val_bpb']:.8f}", f"{claims['val_loss']:.8f}", *[""] * 7))
        rows.append(("sample sd", f"{claims['val_bpb_std']:.8f}", f"{claims['val_loss_std']:.8f}", *[""] * 7))
    few = {
        1: "\nOne seed: nothing is claimed about the spread over seeds, and no test of significance was made.\n",
        2: "\nTwo seeds: the sd is a rough one, and no test of significance was made.\n",
    }
    return f"""## Scores
{markdown_table(header, rows)}
Scored by a fresh process from the packed bytes. Bytes are decimal; total = packed code + artifact. A row is the last
line of `train_seed<N>.log`, and `runs/seed<N>/result.json`. In `submission.json`, bytes, steps and seconds are the
largest over the seeds, and `artifact_bytes` is the total, as elsewhere in the field.
{few.get(len(facts.results), "")}"""


def experiment_section(facts: RecordFacts) -> str:
    first, results = facts.results[0], facts.results
    strides = shared_or_each([result["eval_stride"] for result in results])
    ratio = first["val_bytes"] / first["val_tokens"]
    rows: list[tuple[str, Any]] = [
        ("preset", f"`{first['preset']}`"),
        ("knobs changed from the preset", f"`{' '.join(knob_words(facts)) or 'none'}`"),
        ("parameters", f"{first['params']:,}"),
        ("training tokens", shared_or_each([f"{result['train_tokens']:,}" for result in results])),
        ("training data", f"`{first['data_id']}`"),
        ("validation data", f"`{first['val_data_id']}`"),
        (
            "validation tokens, bytes, documents",
            f"{first['val_tokens']:,}, {first['val_bytes']:,}, {first['val_docs']:,}",
        ),
        ("bytes per token", f"{ratio:.6f}"),
        ("scoring windows", f"{first['eval_seq_len']} tokens, stride {strides}"),
        ("size was fitted by", shared_or_each(["; ".join(r.get("fit_actions") or ()) or "nothing" for r in results])),
        ("caps", f"{first['max_wallclock_seconds']:g} s training, {first['max_eval_seconds']:g} s scoring (0: none)"),
    ]
    if all(result.get("unquantized") for result in results):
        before = [f"{result['unquantized']['val_bpb']:.6f}" for result in results]
        rows.append(
            ("val_bpb before quantization", f"{shared_or_each(before)} ({first['unquantized'].get('note', '')})")
        )
    return f"## Experiment\n{markdown_table(('what', 'value'), rows, texts=2)}"


def feature_section(facts: RecordFacts) -> str:
    """Every switched-on feature, and what proves that it acted."""
    witnesses = [feature_audit(result) for result in facts.results]
    rows = []
    for feature, seen in witnesses[0].items():
        acts = shared_or_each([f"{witness[feature]['count']:,}" for witness in witnesses])
        spans = [step_span(witness[feature]) for witness in witnesses]
        proven = all(witness[feature]["proven"] for witness in witnesses)
        rows.append((feature, acts, shared_or_each(spans), "yes" if proven else "NO", seen["effect"]))
    header = ("feature", "acts", "steps", "effect seen", f"effect (seed {facts.seeds[0]})")
    parity = markdown_table(("parity of one batch, nats per token", *facts.seeds), parity_rows(facts))
    order = (
        f" Figures are for seeds {' / '.join(facts.seeds)} where they differ."
        if len(rows) and len(witnesses) > 1
        else ""
    )
    return f"""## Features that were on
{markdown_table(header, rows, texts=5)}
A feature that is on and never acts makes a run invalid.{order}

{parity}"""


def step_span(record: dict[str, Any]) -> str:
    first, last = record["first"], record["last"]
    return "outside of training" if first is None else f"{first:,} to {last:,}"


def parity_rows(facts: RecordFacts) -> list[tuple[str, ...]]:
    names = {"trained": "model in memory", "reloaded": "reloaded artifact", "scorer": "scorer"}
    rows = [
        (text, *(f"{result['parity'][name]:.6f}" if is_figure(result, name) else "-" for result in facts.results))
        for name, text in names.items()
    ]
    largest = (
        f"{r['parity']['largest_difference']:.2g}" if is_figure(r, "largest_difference") else "-" for r in facts.results
    )
    return [*rows, ("largest difference", *largest)]


def is_figure(result: dict[str, Any], name: str) -> bool:
    return isinstance((result["parity"] or {}).get(name), int | float)


def probe_section(facts: RecordFacts) -> str:
    """The legality probes of every seed."""
    probes = [result["probes"] for result in facts.results]
    names = list(dict.fromkeys(name for probe in probes for name in probe))
    rows = [
        (
            name,
            *(probe.get(name, {}).get("verdict", "-") for probe in probes),
            probes[0].get(name, {}).get("detail", ""),
        )
        for name in names
    ]
    header = ("probe", *(f"seed {seed}" for seed in facts.seeds), f"detail (seed {facts.seeds[0]})")
    if not rows:
        return "## Legality probes\nNone was run.\n"
    return f"## Legality probes\n{markdown_table(header, rows, texts=len(header))}"


def time_section(facts: RecordFacts) -> str:
    """Every second of the processes, and what it counts against under the two conventions."""
    ledgers = [result["ledger"] for result in facts.results]
    phases: dict[str, tuple[str, str]] = {}
    for ledger in ledgers:
        for row in ledger["phases"]:
            phases.setdefault(row["phase"], (row["script"] or "-", row["process"] or "-"))
    rows = []
    for phase, (script, process) in phases.items():
        seconds = [sum(row["seconds"] for row in ledger["phases"] if row["phase"] == phase) for ledger in ledgers]
        rows.append((phase, script, process, *(f"{value:.1f}" for value in seconds)))
    for kind, text in (("script", "by the script's timers"), ("process", "by the process's clock")):
        for budget in ("train", "eval"):
            row = (f"{ledger[kind].get(budget, 0.0):.1f}" for ledger in ledgers)
            rows.append((f"**{budget}, {text}**", "", "", *row))
    rows.append(("**whole process**", "", "", *(f"{ledger['process_seconds']:.1f}" for ledger in ledgers)))
    resumed = [f"seed {result['seed']}: {result['resumes']}" for result in facts.results if result.get("resumes")]
    note = f"\nThe run was resumed (times): {', '.join(resumed)}.\n" if resumed else ""
    header = (
        "phase, seconds",
        "script counts it as",
        "process counts it as",
        *(f"seed {seed}" for seed in facts.seeds),
    )
    return f"## Time\n{markdown_table(header, rows, texts=3)}{note}"


def machine_section(facts: RecordFacts) -> str:
    prints = [result["fingerprint"] or {} for result in facts.results]
    rows = [
        ("machine", shared_or_each([result["machine"] for result in facts.results])),
        ("processes", shared_or_each([result["world_size"] for result in facts.results])),
        ("machine id", shared_or_each([print_.get("machine_id", "-") for print_ in prints])),
        ("CPU", shared_or_each([print_.get("cpu") or "-" for print_ in prints])),
        ("driver, CUDA", shared_or_each([f"{p.get('driver') or '-'}, {p.get('cuda') or '-'}" for p in prints])),
        ("torch, Python", shared_or_each([f"{result['torch']}, {result['python']}" for result in facts.results])),
        ("compiled", shared_or_each([result.get("compiled", "-") for result in facts.results])),
    ]
    several = len({print_.get("machine_id") for print_ in prints}) > 1
    note = "\nThe seeds ran on different machines: their steps and times are not those of one.\n" if several else ""
    whole = "The whole fingerprint is in `runs/seed<N>/result.json`.\n"
    return f"## Machine\n{markdown_table(('what', 'value'), rows, texts=2)}\n{whole}{note}"


def reproduction_section(facts: RecordFacts) -> str:
    """The exact commands."""
    processes = facts.results[0]["world_size"]
    launcher = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    words = ["--preset", facts.results[0]["preset"], *knob_words(facts)]
    commands = "\n".join(f"{launcher} train_gpt.py {' '.join(words)} seed={seed}" for seed in facts.seeds)
    prepared = facts.config.get("data", {}).get("corpus")
    place = (
        "Run them in the repository, where `train_gpt.py` prepares the text at first use; or in a copy of this folder\n"
        "with `data_path=FOLDER` added, the folder that the repository's `data/prepare.py` made of the text."
        if prepared
        else "Run them in a copy of this folder; `data_path=FOLDER tokenizer_path=FILE` name shards and tokenizer."
    )
    return f"""## How to reproduce
```
pip install -r requirements.txt
{commands}
```
{place}
Each makes `runs/<run_id>/`; its log must open with the hashes below. `train_gpt.py` of this folder is the
packed code that ran, byte for byte; `train_gpt_readable.py` is the same program to read.
"""


def knob_words(facts: RecordFacts) -> list[str]:
    """key=value for every knob that differs from the preset's, fit for a shell."""
    sections = {name: part for name, part in facts.config.items() if isinstance(part, dict)}
    changed = changed_knobs(config_from_dict(sections))
    return [f"{knob}={shlex.quote(str(value))}" for knob, value in changed.items() if knob not in PLACE_KNOBS]


def hash_section(facts: RecordFacts) -> str:
    hashes = facts.hashes
    rows = [(name, f"`{hashes[name]}`") for name in ("config_hash", "code_sha256", "tokenizer_sha256")]
    rows += [(name, f"`{hashes[name]}`") for name in ("data_id", "val_data_id")]
    rows += [(f"artifact of seed {seed}", f"`{digest}`") for seed, digest in hashes["artifact_sha256"].items()]
    text = "`HASHES.json` has these, and the sha256 of every file of this folder."
    return f"## Hashes\n{markdown_table(('what', 'hash'), rows, texts=2)}\n{text}\n"


def file_section(facts: RecordFacts) -> str:
    rows = [
        ("`submission.json`", "the claims, in the field's keys"),
        ("`train_seed<N>.log`", "the log of each seed, as the run wrote it"),
        ("`train_gpt.py`, `train_gpt_readable.py`", "the code that ran, packed and readable"),
        ("`runs/seed<N>/`", "`result.json`: all that was measured; `config.json`: every knob"),
        ("`requirements.txt`, `HASHES.json`", "what the code needs; what all of it hashes to"),
    ]
    return f"## Files\n{markdown_table(('file', 'what'), rows, texts=2)}"
