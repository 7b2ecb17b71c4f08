"""Compares a matrix of configurations, trained or quantized, on the same tokens, and tells what is noise.

    python tools/ablate.py --matrix configs/studies/lowbit.toml --profile cpu-smoke|screen|full --seeds N
        [--groups A,B] [--out DIR] [--resume] [--dry-run] [--tables] [--jobs N] [--threads N] [KNOB=VALUE ...]

Equal configurations are run once, finished runs never again (--resume goes on with what DIR holds; --tables makes
tables and pictures anew and runs nothing). DIR gets runs/, results.csv, .md and .tex, pictures/ and index.html. A run
is tools/ablation_run.py. Exit status: 0 all rows finished, 1 a row failed, 2 bad input.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.config.knobs import EXIT_FINDINGS
from golf.run.session import take_lock
from lab.cli import ToolOptions, run_command
from lab.study.launch import Launcher, finished_runs
from lab.study.matrix import read_matrix
from lab.study.plan import CostForecast, StudyPlan, forecast, plan_study, save_plan
from lab.study.report import write_report
from lab.study.spec import FINISHED, RunSpec, StudyError, study_code_sha256

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options(ToolOptions):
    matrix: Path
    """File of the study: base configuration, profiles, groups of rows (lab/study/matrix.py)."""
    profile: str = "cpu-smoke"
    """Size of the study: the name of one of the file's profiles."""
    seeds: int = 1
    """Runs of each configuration, with the base configuration's seed and those after it."""
    groups: str = ""
    """Letters with commas between them; empty: all. The baseline is always there."""
    out: Path | None = None
    """Folder for runs and results; default: runs/studies/NAME-PROFILE."""
    resume: bool = False
    """Go on with the runs that the folder holds."""
    dry_run: bool = False
    """List the runs, which of them are finished, and what the others will cost."""
    tables: bool = False
    """Make tables and pictures of what the folder holds; run nothing."""
    jobs: int = 1
    """Runs at once."""
    threads: int = 1
    """CPU threads of a run."""
    knobs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Knobs of all rows, as key=value, over those of base and profile."""


def parse_knobs(words: tuple[str, ...]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise StudyError(f"{word!r} is no knob: write key=value")
    return dict(word.split("=", 1) for word in words)


def work(options: Options) -> int:
    matrix = read_matrix(options.matrix)
    profile, knobs = matrix.profile(options.profile), parse_knobs(options.knobs)
    out = options.out or Path("runs") / "studies" / f"{matrix.name}-{profile.name}"
    if options.tables:
        return print_results(write_report(out), out, options)
    held = (out / "plan.json").exists() or (out / "runs").exists()
    if held and not (options.resume or options.dry_run):
        raise StudyError(f"{out} holds runs: go on with them by --resume, or give another --out")
    code_sha256 = study_code_sha256(ROOT)
    plan = plan_study(
        matrix, profile, options.groups, options.seeds, knobs, options.threads, ROOT, out.absolute(), code_sha256
    )
    finished = finished_runs(plan, out)
    expected = forecast(plan, finished, options.jobs)
    if options.dry_run:
        return print_plan(plan, finished, expected, options)
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out / ".lock"):
        run_study(plan, finished, expected, out, options.jobs)
        return print_results(write_report(out), out, options)


def run_study(
    plan: StudyPlan, finished: Mapping[str, Mapping[str, Any]], expected: CostForecast, out: Path, jobs: int
) -> None:
    """Does what is left. Raises StudyError."""
    save_plan(plan, out)
    left = [key for key in plan.runs if key not in finished]
    cost = f"about {expected.wall_seconds:,.0f} s by {expected.basis}"
    print(f"{len(left)} of {len(plan.runs)} runs to do, {cost}", file=sys.stderr, flush=True)
    done, started = 0, time.perf_counter()

    def report(spec: RunSpec, result: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        told = f"{result['status'].upper()}: {result['error']}"
        if result["status"] == FINISHED:
            told = f"{result['val_loss']:.4f} nats, {result['total_seconds']:.1f} s"
        place = f"[{done}/{len(left)}, {time.perf_counter() - started:,.0f} s]"
        print(f"{place} {spec.name}, seed {spec.config.run.seed}: {told}", file=sys.stderr, flush=True)

    Launcher(plan, out.absolute(), ROOT / "tools" / "ablation_run.py", jobs, report).run_all(left)


def print_plan(
    plan: StudyPlan, finished: Mapping[str, Mapping[str, Any]], expected: CostForecast, options: Options
) -> int:
    """Prints the runs that there are to do; nothing was run."""
    names: dict[str, list[str]] = {}
    for row in plan.rows:
        for key in row.keys:
            names.setdefault(key, []).append(f"{row.group} {row.name}")
    if options.json:
        states = {key: finished.get(key, {}).get("status", "to do") for key in plan.runs}
        runs = [
            {"key": key, "seed": spec.config.run.seed, "rows": names.get(key, []), "status": states[key]}
            for key, spec in plan.runs.items()
        ]
        print(json.dumps({"runs": runs, "forecast": asdict(expected)}))
        return 0
    for key, spec in plan.runs.items():
        status = finished.get(key, {}).get("status", "to do")
        told = " = ".join(names.get(key, ["(its weights are needed)"]))
        print(f"{key[:12]}  seed {spec.config.run.seed:<5} {status:<9} {told}")
    asked = sum(len(row.keys) for row in plan.rows)
    print(f"{asked} runs asked for, {len(plan.runs)} distinct, {len(finished)} finished, {expected.runs} to do")
    walled = f"{expected.wall_seconds:,.0f} s with --jobs {options.jobs}"
    print(f"about {expected.seconds:,.0f} s of runs, {walled}, by {expected.basis}")
    return 0


def print_results(rows: list[dict[str, Any]], out: Path, options: Options) -> int:
    """Prints the table; returns 1 where a row is not whole."""
    if options.json:
        print(json.dumps({"rows": rows}, allow_nan=False))
    else:
        for row in rows:
            nats = f"{float(row['val_nll']):.4f} nats" if row["val_nll"] else "no loss"
            print(f"{row['rows']}: {row['status']}, {nats}, {row['delta_text']}")
        print(out / "results.md", out / "index.html", sep="\n")
    return EXIT_FINDINGS if any(row["status"] != FINISHED for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
