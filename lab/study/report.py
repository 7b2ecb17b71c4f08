"""What a study leaves for people: results.csv, .md and .tex, pictures, and a page with all of it inside."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from golf.runtime import write_file_atomically
from lab.study.code_pictures import draw_study
from lab.study.page import study_page
from lab.study.render import csv_text, delta_cell, latex_report, markdown_report, read_csv_rows
from lab.study.table import ALPHA, FEWEST_ERRORS, Study, load_study_results, table_rows


def study_title(study: Study) -> str:
    groups = ", ".join(study.plan.groups)
    return f"{study.plan.study}, profile {study.plan.profile}, groups {groups}"


def study_notes(study: Study) -> list[str]:
    """What tables and pictures leave unsaid."""
    plan, machine = study.plan, study.environment
    done = [result for row in study.rows for result in row.results if "val_tokens" in result]
    device = "of the process, Python and its libraries included" if not machine.get("cuda") else "of the allocator"
    return [
        *(f"group {letter}: {title}" for letter, title in plan.groups.items()),
        *subject_notes(done),
        f"seeds {', '.join(map(str, plan.seeds))} (initial weights); ± and [ ]: {100 * (1 - ALPHA):g} % of Student's t "
        "over seeds, differences paired by seed",
        f"not resolved: under {FEWEST_ERRORS:g} standard errors, or an interval that holds 0; a single seed resolves "
        "nothing but a rounding of the baseline's own weights, over blocks of text",
        "bytes: the artifact as it is, without optimizer state; of matrices: the blocks' alone, packed the same way",
        "energy: an estimate by operations, 7 nm, products with weights only (lab/cost/energy.py has its "
        "assumptions); nothing was measured",
        f"peak MiB: {device}",
        *machine_notes(machine),
    ]


def subject_notes(done: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was trained on, and what was scored."""
    if done:
        tokens, size = done[0]["val_tokens"], done[0]["val_bytes"]
        yield (
            f"the same {tokens:,} validation tokens ({size:,} bytes) for all rows, scored from the bytes of the "
            "artifact; NLL in nats per token, bpb in bits per byte of text"
        )
    trained = [result for result in done if "train_tokens" in result]
    if trained:
        steps, tokens = (max(result[name] for result in trained) for name in ("steps", "train_tokens"))
        yield f"{steps:,} steps of training, {tokens:,} tokens, in the same order for all rows of a seed"


def machine_notes(machine: Mapping[str, Any]) -> Iterator[str]:
    if machine:
        compiled = "compiled" if machine["compile"] else "not compiled"
        cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)} a run"
        libraries = f"torch {machine['torch']}{cuda}, numpy {machine['numpy']}, Python {machine['python']}"
        yield f"{machine['device']}, {threads}, {compiled}; {libraries}"


def write_report(out: Path) -> list[dict[str, Any]]:
    """Tables, pictures and page of what the folder of a study holds; returns the rows. Raises AblationError."""
    study = load_study_results(out)
    title, notes = study_title(study), study_notes(study)
    text = csv_text(table_rows(study))
    rows = read_csv_rows(text)
    write_file_atomically(out / "results.csv", text)
    write_file_atomically(out / "results.md", markdown_report(title, rows, notes))
    write_file_atomically(out / "results.tex", latex_report(rows, notes))
    pictures = draw_study(study, out / "pictures")
    write_file_atomically(out / "index.html", study_page(title, rows, notes, pictures))
    return [dict(row) | {"delta_text": delta_cell(row)} for row in rows]
