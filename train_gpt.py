"""From text and a wall-clock budget to the best language model that fits a byte budget, and its proven score.

    config -> data -> model -> train -> average -> quantize -> pack | a fresh process: reload -> score -> report

Run it with `python train_gpt.py` or `torchrun --standalone --nproc_per_node=N train_gpt.py` (--help lists the
knobs). Everything that a run leaves is in runs/<run_id>/. The words of this story are in golf/.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from golf.artifact.container import read_artifact, write_artifact
from golf.artifact.sizes import size_report_dict
from golf.artifact.weights import save_weights
from golf.config import Config, UserError
from golf.data.shards import find_shards
from golf.model.gpt import GPT
from golf.model.init import build_model
from golf.quant.export import quantize_state
from golf.quant.prune import prune_state
from golf.run.command import parse_command
from golf.run.datasets import TrainingData, ValidationData, locate_data, open_training_data, open_validation_data
from golf.run.folder import RunFolder, choose_run_folder
from golf.run.report import (
    final_lines,
    machine_description,
    opening_lines,
    packing_lines,
    progress_text,
    scoring_lines,
    step_line,
    stop_line,
    validation_line,
)
from golf.run.result import build_result, training_record
from golf.run.training import StepReport, Trainer
from golf.runtime import ProgressLine, Runtime, start_runtime
from golf.score.roundtrip import score_artifact
from golf.score.scorer import plain_settings, score_stream

BUNDLED = False  # True in the single file that tools/bundle.py makes of this script and golf/
SCRIPT = Path(__file__).resolve()
EXIT_FINDINGS, EXIT_BAD_INPUT = 1, 2


def main() -> None:
    command = parse_command(sys.argv[1:], os.environ)
    if command.config is not None:
        folder = train_and_pack(command.config)
        start_fresh_process(folder)
    sys.exit(reload_and_score(RunFolder(command.score)))


# ---- first process: train, average, quantize, pack ----


def train_and_pack(config: Config) -> RunFolder:
    """Everything from the text to the artifact's bytes."""
    with start_runtime(config.run, stage="train") as runtime:
        config = locate_data(config, runtime, SCRIPT.parent)
        data = open_training_data(config)
        validation = open_validation_data(config, data.tokenizer)
        model = build_model(config.model, config.run.seed, runtime.compute_dtype).to(runtime.device)
        trainer = Trainer(model, config, runtime, data.stream)
        folder = open_run(trainer, data, validation)

        trainer.warm_up()
        last = train(trainer, validation, folder)
        trainer.finish()
        score_before_export(trainer, validation, folder, last)
        if runtime.is_main:
            save_weights(folder.weights, model.state_dict(), config.model, config.quant, data.tokenizer.sha256)
            folder.save_json(folder.training, training_record(trainer, data.data_id))
            pack(model, config, data.tokenizer.sha256, folder, runtime)
        runtime.barrier()
    return folder


def open_run(trainer: Trainer, data: TrainingData, validation: ValidationData) -> RunFolder:
    """The run's folder, with its configuration and the code that runs, packed as it would be shipped."""
    config, runtime = trainer.config, trainer.runtime
    folder = choose_run_folder(config, runtime)
    if runtime.is_main:
        folder.create(config)
        runtime.log.attach(folder.log)
        freeze_code(folder)
        for line in opening_lines(trainer, data, len(validation.tokens_N), folder.log):
            runtime.print(line)
    return folder


def freeze_code(folder: RunFolder) -> None:
    if BUNDLED:
        shutil.copyfile(SCRIPT, folder.code)
        return
    bundler = SCRIPT.parent / "tools" / "bundle.py"
    subprocess.run([sys.executable, bundler, "--pack", "--out", folder.code], check=True, stdout=subprocess.DEVNULL)


def train(trainer: Trainer, validation: ValidationData, folder: RunFolder) -> StepReport:
    """Take steps until the budget is used up, and tell about them; returns the last one."""
    config, runtime = trainer.config, trainer.runtime
    progress, averaging = ProgressLine(shown=runtime.is_main), False
    for report in trainer.steps():
        if runtime.is_main:
            folder.append_metrics(asdict(report))
            progress.update(progress_text(report, config))
        if report.step <= 10 or report.step % config.train.train_log_every == 0:
            progress.clear()
            runtime.print(step_line(report, config))
        if trainer.average.count == 1 and not averaging:
            averaging = True
            runtime.print(f"swa:start step:{report.step}")
        if config.train.val_loss_every and report.step % config.train.val_loss_every == 0:
            grid = "fake-quantized" if trainer.fake_quantized else "not-quantized"
            validate(trainer, validation, folder, report, f"last,{grid}")
    progress.clear()
    if report.step < config.train.iterations or not config.train.iterations:
        runtime.print(stop_line(report, config))
    return report


def validate(trainer: Trainer, validation: ValidationData, folder: RunFolder, report: StepReport, weights: str) -> None:
    """Score the model in memory in plain rows. What it says is not the artifact's score, and the line says so."""
    config, runtime = trainer.config, trainer.runtime
    rows = max(1, config.train.val_batch_size // config.model.train_seq_len // runtime.world_size)
    settings = plain_settings(config.model, rows)
    score = score_stream(trainer.model, validation.tokens_N, validation.byte_table, settings, runtime, announce=False)
    runtime.print(validation_line(score, report, config, weights))
    if runtime.is_main:
        measured = {"val_loss": score.val_loss, "val_bpb": score.val_bpb, "weights": weights}
        folder.append_metrics({"step": report.step, "elapsed": report.elapsed} | measured)


def score_before_export(trainer: Trainer, validation: ValidationData, folder: RunFolder, last: StepReport) -> None:
    if trainer.runtime.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        trainer.runtime.print(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    if trainer.average.applied:
        trainer.runtime.print(f"swa:applying averaged {trainer.average.count} checkpoints")
    validate(trainer, validation, folder, last, ("averaged" if trainer.average.applied else "last") + ",not-quantized")


def pack(model: GPT, config: Config, tokenizer_sha256: str, folder: RunFolder, runtime: Runtime) -> None:
    """Prune, quantize and compress the weights into the artifact."""
    pruned, prune_reports = prune_state(model.state_dict(), config.quant)
    stored = quantize_state(pruned, config.quant)
    sizes = write_artifact(folder.artifact, stored, config.model, tokenizer_sha256, config.quant.codec)
    pruned_codes = sum(tensor.codes_changed for tensor in prune_reports)
    folder.save_json(folder.packing, {"pruned_codes": pruned_codes, "sizes": size_report_dict(sizes)})
    for line in packing_lines(folder, config, pruned_codes, sum(tensor.weights for tensor in prune_reports)):
        runtime.print(line)


# ---- second process: reload, score, report ----


def start_fresh_process(folder: RunFolder) -> None:
    """Become a new process that knows nothing but the run's folder: what it scores is what the bytes say."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(SCRIPT), "--score", str(folder.path)])


def reload_and_score(folder: RunFolder) -> int:
    """Score the artifact and write result.json; returns the exit status."""
    config = folder.load_config()
    with start_runtime(config.run, stage="score") as runtime:
        if runtime.is_main:
            runtime.log.attach(folder.log)
        artifact = read_artifact(folder.artifact)
        for line in scoring_lines(config, artifact.model):
            runtime.print(line)
        val_shards = find_shards(config.data.data_path, "val")
        score = score_artifact(
            artifact, config.data.tokenizer_path, val_shards, config.score, runtime, compiled=runtime.compiles_scoring
        )
        for line in final_lines(score, config.quant):
            runtime.print(line)
        if not runtime.is_main:
            return 0
        result = build_result(folder, config, artifact, score, machine_description(runtime))
        folder.save_json(folder.result, result)
        for finding in result["findings"]:
            runtime.print(f"INVALID: {finding}")
        show_report(folder)
        return EXIT_FINDINGS if result["findings"] else 0


def show_report(folder: RunFolder) -> None:
    """The table and the pictures are a tool's work: not part of the code that a submission ships."""
    tool = SCRIPT.parent / "tools" / "report.py"
    if tool.exists():
        subprocess.run([sys.executable, tool, folder.path], check=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # a user's mistake has one line; ours has a traceback
        print(f"train_gpt.py: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
