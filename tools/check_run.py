"""Probes the legality of a scored run: causality, normalisation, order and count of scoring, data, bytes, network.

    python tools/check_run.py runs/RUN_ID [--full] [--json] [--write]

The run's artifact is loaded and scored again on the beginning of the validation text, by the scorer and with the
settings that made the run's score, while the probes change what it may not depend on.
Exit status: 0 no probe failed, 1 some failed, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golf.artifact.container import restore_model
from golf.config.knobs import EXIT_FINDINGS
from golf.data.shards import find_shards
from golf.run.folder import RunFolder
from golf.runtime import ProgressLine, write_file_atomically
from golf.score.scorer import compiled_losses
from lab.cli import ToolOptions, run_command
from lab.probe.adaptive_scorer import AdaptedScorer, MixtureScorer
from lab.probe.data_probes import probe_access, probe_bytes, probe_disjoint
from lab.probe.probes import FAIL, Probe, probe_scorer
from lab.probe.scored_run import ScoredRun, load_run, score_settings, single_runtime
from lab.probe.scorer_adapter import ArtifactScorer, probe_plan, probe_stream_tokens

SEED = 20_240_520
COLOURS = {"PASS": "green", "FAIL": "bold red", "NOT EXERCISED": "yellow"}


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    full: bool = False
    """Hash all training documents, decode all of the validation text, sample more windows."""
    write: bool = False
    """Write probes.json into the folder of the run."""


def probe_run(run: ScoredRun, full: bool) -> list[Probe]:
    """Runs all probes, on the artifact and the scorer that made the score."""
    settings, runtime = score_settings(run), single_runtime(run.config.run)
    model = restore_model(run.artifact, runtime)
    forward = compiled_losses(model) if runtime.compiles_scoring else None
    windows, score = ArtifactScorer(model, run.counter, settings, forward), run.config.score
    network = AdaptedScorer(model, settings, score) if score.adapter_rank else windows
    scorer = MixtureScorer(network, score) if score.mixture else network
    tokens_N1 = run.tokens_N1[: probe_stream_tokens(settings, runtime.device)]
    points = windows.points(len(tokens_N1) - 1, SEED, windows=8 if full else 1)
    *rules, single_pass, isolation = probe_scorer(scorer, tokens_N1, points, SEED)
    whole = probe_plan(len(run.tokens_N1) - 1, run.figures["val_tokens"], settings, single_pass)
    found_bytes = probe_bytes(run.tokenizer, run.tokens_N1, run.figures, full, run.counter)
    return [*rules, whole, isolation, probe_splits(run, full), found_bytes, *probe_access(RunFolder(run.folder).access)]


def probe_splits(run: ScoredRun, full: bool) -> Probe:
    data_path, line = run.config.data.data_path, ProgressLine(shown=True)
    train, val = find_shards(data_path, "train"), find_shards(data_path, "val")
    command = f"`python tools/check_run.py {run.folder} --full`"
    probe = probe_disjoint(
        train, val, run.tokenizer.bos_id, full, command, lambda done, total: line.update(f"hashed {done / total:.0%}")
    )
    line.clear()
    return probe


def print_table(run: ScoredRun, probes: list[Probe]) -> None:
    table = Table("probe", "verdict", "evidence", title=escape(f"legality of {run.folder}"), title_justify="left")
    for probe in probes:
        colour = COLOURS[probe.verdict]
        table.add_row(probe.name, f"[{colour}]{probe.verdict}[/{colour}]", escape(probe.detail))
    Console().print(table)


def work(options: Options) -> int:
    run = load_run(options.run)
    probes = probe_run(run, options.full)
    found = {probe.name: {"verdict": probe.verdict, "detail": probe.detail} for probe in probes}
    if options.write:
        write_file_atomically(RunFolder(options.run).probes, json.dumps(found, indent=2) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        print_table(run, probes)
    return EXIT_FINDINGS if any(probe.verdict == FAIL for probe in probes) else 0


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
