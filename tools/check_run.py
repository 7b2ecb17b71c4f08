"""Probes the legality of a scored run: causality, normalisation, order and count of scoring, data, bytes, network.

    python tools/check_run.py runs/RUN_ID [--full] [--json] [--write]

The run's artifact is loaded and scored again on the beginning of the validation text, by the scorer and with the
settings that made the run's score, while the probes change what it may not depend on.
Exit status: 0 no probe failed, 1 some failed, 2 bad input.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golf.artifact.container import Artifact, read_artifact, restore_model
from golf.config.config import Config
from golf.config.knobs import EXIT_FINDINGS
from golf.config.run import RunConfig
from golf.data.shards import find_shards
from golf.data.sidecar import StreamBytes
from golf.data.tokenizer import ByteTable
from golf.run.folder import RunFolder
from golf.runtime import ProgressLine, Runtime, choose_compile, choose_device, write_file_atomically
from golf.score.roundtrip import load_validation, stream_identity
from golf.score.scorer import ScoreSettings, check_settings, compiled_losses, sliding_settings
from lab.cli import ToolOptions, run_command
from lab.prepare.text_tokenizer import TextTokenizer, load_text_tokenizer
from lab.probe.data_probes import ProbeError, probe_access, probe_bytes, probe_disjoint, read_run_record
from lab.probe.mixture_adapter import MixtureScorer
from lab.probe.probes import FAIL, Probe, probe_scorer
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


@dataclass(frozen=True)
class ScoredRun:
    """Holds a run's folder as the probes need it."""

    folder: Path
    config: Config
    figures: dict[str, Any]
    artifact: Artifact
    tokenizer: TextTokenizer
    tokens_N1: np.ndarray
    counter: ByteTable | StreamBytes
    """Of the bytes of the tokens."""


def load_run(path: Path) -> ScoredRun:
    """Loads a run's folder. Raises UserError or OSError for one that is not that of a scored run."""
    folder = RunFolder(path)
    if folder.config.exists():
        read_run_record(folder.config, ["config_hash", "run", "data", "score"])
    config = folder.load_config()
    figures = load_figures(folder)
    artifact = read_artifact(folder.artifact)
    tokenizer = load_text_tokenizer(config.data.tokenizer_path)
    if figures.get("artifact_sha256", artifact.sha256) != artifact.sha256:
        raise ProbeError(f"{folder.artifact} is not the artifact that was scored (other SHA-256): score the run again")
    if tokenizer.sha256 != artifact.tokenizer_sha256:
        raise ProbeError(f"{config.data.tokenizer_path} is not the artifact's tokenizer: give the one of its shards")
    val_shards = find_shards(config.data.data_path, "val")
    tokens_N1, counter = load_validation(artifact.tokenizer_sha256, config.data.tokenizer_path, val_shards)
    val_data_id = stream_identity(tokens_N1)
    if figures.get("val_data_id", val_data_id) != val_data_id:
        raise ProbeError(
            f"{config.data.data_path}: not the validation shards that were scored, {figures['val_data_id']}"
        )
    return ScoredRun(path, config, figures, artifact, tokenizer, tokens_N1, counter)


def load_figures(folder: RunFolder) -> dict[str, Any]:
    """Reads what the score says of itself, in the terms of result.json, which may be missing yet. Raises ProbeError."""
    records = [path for path in (folder.score, folder.result) if path.is_file()]
    if not records:
        raise ProbeError(f"{folder.path} has neither score.json nor result.json: score the run first")
    figures: dict[str, Any] = {}
    for path in records:
        figures |= read_run_record(path)
    for key in ("val_loss", "val_bpb", "val_tokens", "val_bytes"):
        if type(figures.get(key)) not in (int, float):
            raise ProbeError(f"{records[-1]}: no record of a score, it has no number {key}: score the run again")
    return figures


def score_settings(run: ScoredRun) -> ScoreSettings:
    """Returns those of the score: its stride is larger than the configured one where time was short."""
    stride = run.figures.get("eval_stride", run.config.score.eval_stride)
    settings = sliding_settings(replace(run.config.score, eval_stride=stride), run.artifact.model)
    check_settings(settings)
    return settings


def single_runtime(config: RunConfig) -> Runtime:
    """Sets this process alone up as the scoring was, whatever a launcher's variables say."""
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.threads:
        torch.set_num_threads(config.threads)
    return Runtime(device, compiles=choose_compile(config.compile, device))


def probe_run(run: ScoredRun, full: bool) -> list[Probe]:
    """Runs all probes, on the artifact and the scorer that made the score."""
    settings, runtime = score_settings(run), single_runtime(run.config.run)
    model = restore_model(run.artifact, runtime)
    forward = compiled_losses(model) if runtime.compiles_scoring else None
    network = ArtifactScorer(model, run.counter, settings, forward)
    scorer = MixtureScorer(network, run.config.score) if run.config.score.mixture else network
    tokens_N1 = run.tokens_N1[: probe_stream_tokens(settings, runtime.device)]
    points = network.points(len(tokens_N1) - 1, SEED, windows=8 if full else 1)
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
