"""Build a record folder from finished runs alone; only author, name and blurb are typed.

python tools/make_submission.py RUN [RUN ...] --name NAME --author A --github-id G --blurb TEXT
    [--track track_10min_16mb|track_non_record_16mb|track_local] [--records records] [--date YYYY-MM-DD] [--json]

Exit status: 0 built; 1 refused, with every reason; 2 bad input.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf.config.knobs import EXIT_FINDINGS
from lab.cli import ToolOptions, run_command
from lab.record.evidence import SubmissionOrder, SubmissionOutcome, make_record
from lab.record.finding import EvidenceError

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs: the seeds of one experiment."""
    name: str
    """Name of the submission; with blanks as underscores it names the folder too."""
    author: str
    github_id: str
    blurb: str
    """What it is, in a sentence or two."""
    track: Literal["track_10min_16mb", "track_non_record_16mb", "track_local"] = "track_local"
    records: Path = REPOSITORY / "records"
    """Where the tracks are."""
    date: str = ""
    """YYYY-MM-DD; default: the day (UTC) on which the newest result was written."""


def outcome_dict(outcome: SubmissionOutcome) -> dict:
    return {
        "folder": str(outcome.folder),
        "built": not outcome.reasons,
        "reasons": [asdict(reason) for reason in outcome.reasons],
        "submission": outcome.claims,
    }


def print_outcome(outcome: SubmissionOutcome) -> None:
    console = Console(highlight=False, soft_wrap=True)
    claims = outcome.claims
    if outcome.reasons:
        console.print("[bold red]refused:[/]", escape(f"{outcome.folder} was not built"))
        for number, reason in enumerate(outcome.reasons, 1):
            console.print(f"{number:>3}. {reason.code}: {reason.text}", markup=False)
        return
    table = Table("seed", "val_bpb", "val_loss", "steps", "train s", "eval s", "bytes", title=claims["name"])
    table.title_justify = "left"
    for column in table.columns:
        column.justify = "right"
    for seed, result in claims["seed_results"].items():
        figures = (f"{result['val_bpb']:.6f}", f"{result['val_loss']:.6f}", f"{result['steps']:,}")
        seconds = (f"{result['train_seconds']:.1f}", f"{result['eval_time_seconds']:.1f}")
        table.add_row(seed, *figures, *seconds, f"{result['artifact_bytes']:,}")
    if claims["val_bpb_std"] is not None:
        table.add_section()
        table.add_row("mean", f"{claims['val_bpb']:.6f}", f"{claims['val_loss']:.6f}")
        table.add_row("sd", f"{claims['val_bpb_std']:.6f}", f"{claims['val_loss_std']:.6f}")
    console.print(table)
    few = len(claims["seeds"]) < 3
    console.print(f"built {outcome.folder}", markup=False)
    if few:
        console.print("fewer than 3 seeds: the README says so and claims no significance")


def work(options: Options) -> int:
    texts = {name: getattr(options, name).strip() for name in ("name", "author", "github_id", "blurb")}
    for name, text in texts.items():
        if not text:
            raise EvidenceError(f"--{name.replace('_', '-')} is empty")
    order = SubmissionOrder(
        options.runs, **texts, track=options.track, records=options.records, date=options.date,
        requirements=REPOSITORY / "requirements.txt",
    )  # fmt: skip
    outcome = make_record(order)
    if options.json:
        print(json.dumps(outcome_dict(outcome)))
    else:
        print_outcome(outcome)
    return EXIT_FINDINGS if outcome.reasons else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
