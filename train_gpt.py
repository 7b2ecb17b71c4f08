"""Trains the best language model that fits a byte budget, from text and a wall-clock budget, and proves its score.

    config -> data -> train -> average -> quantize -> pack | a fresh process: reload -> score -> report

Run it with `python train_gpt.py` or `torchrun --standalone --nproc_per_node=N train_gpt.py` (--help lists the knobs). A
run writes everything to runs/<run_id>/, and `--resume <run_id>` continues an interrupted run: every stage reads from
the disk what the stage before it wrote. golf/ holds the functions that this script calls.
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path

from golf.artifact.container import pack_artifact, read_artifact, restore_model
from golf.artifact.fill_limit import FittedArtifact
from golf.artifact.sizes import size_report_dict
from golf.artifact.weights import load_quantized, load_weights, save_quantized, save_weights
from golf.config.config import Config
from golf.config.knobs import EXIT_FINDINGS, UserError
from golf.data.shards import find_shards
from golf.run.checkpoint import CheckpointWriter, features_of, final_weights, read_checkpoint
from golf.run.command import Command, parse_command
from golf.run.datasets import locate_data, open_training_data
from golf.run.feature_audit import FeatureAudit
from golf.run.folder import RunFolder, choose_run_folder
from golf.run.forecast import forecast_line
from golf.run.frozen_code import Program
from golf.run.log_lines import final_lines, opening_lines, packing_lines, partial_line, result_line, scoring_lines
from golf.run.parity import check_parity, ntk_effect, parity_row
from golf.run.rehearsal import rehearse
from golf.run.result import build_result, pruning_record, score_record, training_record
from golf.run.session import Session, StageResult, explain_error
from golf.run.stages import quantize_weights
from golf.run.train_loop import take_steps, take_up_checkpoint
from golf.run.trainer import new_trainer
from golf.runtime import Runtime, leave, start_runtime, write_file_atomically
from golf.score.journal import ScoreJournal
from golf.score.roundtrip import load_artifact_tokenizer, score_artifact, score_weights

BUNDLED = False  # True in the single file that tools/bundle.py makes of this script and golf/
PROGRAM = Program(Path(__file__).resolve(), BUNDLED)


def main(command: Command, session: Session) -> int:
    if command.score:
        return reload_and_score(RunFolder(command.score), session)
    folder = train_and_pack(command, session)
    return start_fresh_process(folder, command.debug)


# ---- first process: train, average, quantize, pack ----


def train_and_pack(command: Command, session: Session) -> RunFolder:
    """Runs every stage from the text to the artifact's bytes, and skips those that the run has finished."""
    with start_runtime(command.config.run, "train", session.log) as runtime:
        folder = (
            take_up(command.resume, command.new_code, runtime) if command.resume else open_run(command.config, runtime)
        )
        session.open(folder, runtime)
        config = folder.load_config()
        session.do("train", lambda: train(config, session), together=True)
        session.do("average", lambda: average(config, session))
        fitted = session.do("quantize", lambda: quantize(config, session), together=True)
        session.do("pack", lambda: pack(config, session, fitted))
        session.ledger.flush()
        session.interruption.check(f"before scoring; go on with --resume {folder.path.name}")
    return folder


def open_run(config: Config, runtime: Runtime) -> RunFolder:
    """Creates a new run's folder with its configuration, its machine's fingerprint and the code as it would ship."""
    config = locate_data(config, runtime, PROGRAM.script.parent)
    open_training_data(config)  # fails on bad data before a folder exists
    folder = choose_run_folder(config, runtime)
    if runtime.is_main:
        folder.create(config)
        world_size = str(runtime.world_size)
        PROGRAM.freeze(folder, lambda: PROGRAM.run_tool("fingerprint.py", folder.path, "--world-size", world_size))
    runtime.barrier()
    return folder


def take_up(path: Path, new_code: bool, runtime: Runtime) -> RunFolder:
    """Returns the folder of a run to resume; raises where other code runs now, unless `new_code` replaces the run's."""
    folder = RunFolder(path)
    if new_code and runtime.is_main:
        PROGRAM.replace_code(folder)
    runtime.barrier()
    PROGRAM.check(folder)
    return folder


def train(config: Config, session: Session) -> StageResult:
    """Takes steps until the budget is used up, and writes the last checkpoint."""
    folder, runtime, ledger = session.folder, session.runtime, session.ledger
    with ledger.phase("setup"):
        data = open_training_data(config)
        trainer = new_trainer(config, runtime, data.stream)
        for line in opening_lines(trainer, data, folder):
            runtime.print(line)
    if config.run.track != "off" and runtime.is_main:
        PROGRAM.start_tracker(folder, config.run.track)
    if config.run.rehearse and runtime.is_main:
        with ledger.phase("rehearse"):
            runtime.print(rehearse(trainer, data.tokenizer, folder))
    with ledger.phase("compile"):
        runtime.barrier()
        trainer.warm_up()
        take_up_checkpoint(trainer, folder)
        if not BUNDLED and not trainer.step:
            runtime.print(forecast_line(trainer, data.data_id))
    writer = CheckpointWriter(folder.checkpoints, runtime.rank, runtime.world_size)
    take_steps(trainer, data, session, writer)
    trainer.finish()
    last = writer.write(trainer.state(), trainer.step)
    writer.close()
    if runtime.is_main:
        folder.save_json(folder.training, training_record(trainer, data.data_id, data.tokenizer))
    return StageResult([last, folder.training])


def average(config: Config, session: Session) -> StageResult:
    """Turns the last checkpoint into the final weights, averaged where averaging is on."""
    folder, training = session.folder, session.folder.load_json(session.folder.training)
    state = read_checkpoint([folder.path / next(iter(session.book.stages["train"]))])
    audit = FeatureAudit(config, features_of(state.numbers))
    weights = final_weights(state, audit)
    if training["swa_snapshots"] >= 2:
        kind = "ema" if config.average.ema_fraction else "swa"
        session.runtime.print(f"{kind}:applying averaged {training['swa_snapshots']} checkpoints")
    audit.note_weights(weights, training["steps"])
    folder.save_json(folder.effects, audit.record())
    save_weights(folder.weights, weights, config.model, config.quant, training["tokenizer_sha256"])
    return StageResult([folder.weights, folder.effects])


def quantize(config: Config, session: Session) -> StageResult:
    """Turns weights into the integer codes whose artifact fits beside the code under the byte limit."""
    folder, runtime, saved = session.folder, session.runtime, load_weights(session.folder.weights)
    stream, room = open_training_data(config).stream, config.run.limit_bytes - folder.code.stat().st_size
    train_seconds, calibrating = (
        folder.load_json(folder.training)["train_seconds"],
        partial(session.ledger.phase, "calibrate"),
    )
    fitted, record = quantize_weights(saved, config, stream, runtime, train_seconds, room, calibrating)
    if fitted is None:  # only the main rank holds the result
        return StageResult([])
    save_quantized(folder.quantized, fitted.stored)
    folder.save_json(folder.pruning, pruning_record(fitted) | record)
    row = stream.tokens(0, config.model.train_seq_len + 1).tolist()
    folder.save_json(folder.parity, parity_row(fitted.pruned, fitted.stored, config, row, runtime))
    return StageResult([folder.quantized, folder.pruning, folder.parity], fitted)


def pack(config: Config, session: Session, fitted: FittedArtifact | None) -> StageResult:
    """Writes the artifact: the bytes that the quantize stage measured, or the same bytes made from its codes on the
    disk."""
    folder = session.folder
    if fitted is None:
        sha256 = folder.load_json(folder.training)["tokenizer_sha256"]
        data, sizes = pack_artifact(load_quantized(folder.quantized), config.model, sha256, config.quant.codec)
    else:
        data, sizes = fitted.data, fitted.sizes
    write_file_atomically(folder.artifact, data)
    folder.save_json(folder.packing, {"sizes": size_report_dict(sizes)})
    for line in packing_lines(folder, config):
        session.runtime.print(line)
    return StageResult([folder.artifact, folder.packing])


# ---- second process: reload, score, report ----


def start_fresh_process(folder: RunFolder, debug: bool) -> int:
    """Replaces this process by a new one that knows only the run's folder, so that the score depends on the bytes
    alone."""
    sys.stdout.flush()
    options = ["--debug"] if debug else []
    os.execv(sys.executable, [sys.executable, str(PROGRAM.script), "--score", str(folder.path), *options])


def reload_and_score(folder: RunFolder, session: Session) -> int:
    """Scores the artifact, writes result.json and returns the exit status."""
    config, session.ledger.phase_name = folder.load_config(), "load"
    PROGRAM.check(folder)
    with start_runtime(config.run, "score", session.log) as runtime:
        session.open(folder, runtime)
        session.do("reload", lambda: reload(config, session))
        session.do("score", lambda: score(config, session), together=True)
        session.do("report", lambda: report(config, session))
        return EXIT_FINDINGS if runtime.is_main and folder.load_json(folder.result)["findings"] else 0


def reload(config: Config, session: Session) -> StageResult:
    """Checks that the artifact's model gives the logits that the trained one gave, and that the scorer agrees."""
    folder, artifact = session.folder, read_artifact(session.folder.artifact)
    table = load_artifact_tokenizer(artifact.tokenizer_sha256, config.data.tokenizer_path)
    record, model = folder.load_json(folder.parity), restore_model(artifact, session.runtime)
    parity = check_parity(model, record, table, session.runtime)
    folder.save_json(folder.reload, {"parity": parity, "ntk_effect": ntk_effect(model, record, config.score)})
    return StageResult([folder.reload])


def score(config: Config, session: Session) -> StageResult:
    """Scores the artifact on the validation shards in bits per byte, then the weights before they were quantized."""
    folder, runtime, artifact = session.folder, session.runtime, read_artifact(session.folder.artifact)
    journal = ScoreJournal(folder.journal(runtime.rank))
    val_shards, tokenizer_path = find_shards(config.data.data_path, "val"), config.data.tokenizer_path

    def check() -> None:
        if session.interruption.requested:
            runtime.print(partial_line(journal))
        session.interruption.check(f"while scoring; go on with --resume {folder.path.name}")
        session.ledger.flush()

    for line in scoring_lines(config, artifact.model):
        runtime.print(line)
    measured, val_data_id = score_artifact(
        artifact, tokenizer_path, val_shards, config.score, runtime,
        compiled=runtime.compiles_scoring, journal=journal, check=check,
    )  # fmt: skip
    for line in final_lines(measured, config.quant):
        runtime.print(line)
    with session.ledger.phase("compare"):
        state, rows = load_weights(folder.weights).state, config.train.eval_batch_tokens // config.model.train_seq_len
        unquantized = score_weights(state, artifact, tokenizer_path, val_shards, rows, runtime)
        runtime.print(f"unquantized, plain rows: val_loss:{unquantized.val_loss:.4f} val_bpb:{unquantized.val_bpb:.4f}")
    if runtime.is_main:
        folder.save_json(folder.score, score_record(measured, val_data_id, unquantized))
    return StageResult([folder.score, journal.path])


def report(config: Config, session: Session) -> StageResult:
    """Writes all measurements and findings to result.json, then a table and pictures."""
    folder, runtime = session.folder, session.runtime
    folder.probes.unlink(missing_ok=True)
    status = PROGRAM.run_tool("check_run.py", folder.path, "--write")
    result = build_result(config, session, probed=status is None or folder.probes.exists())
    folder.save_json(folder.result, result)
    for finding in result["findings"]:
        runtime.print(f"INVALID: {finding}")
    runtime.print(result_line(result))
    PROGRAM.run_tool("report.py", folder.path)
    return StageResult([folder.result])


def run_program(arguments: list[str]) -> int:
    """Runs the program and returns its exit status.

    A user's mistake, an interruption or a lost machine prints one line, an error of ours a traceback.
    """
    session = Session()
    try:
        if "--plan" in arguments:
            return PROGRAM.run_tool("plan.py", *(word for word in arguments if word != "--plan")) or 0
        return main(parse_command(arguments, os.environ), session)
    except (UserError, OSError, RuntimeError) as error:
        status, message = explain_error(error, session.interruption.world_size)
        if not status or "--debug" in arguments:
            traceback.print_exc()
        session.log.error(f"train_gpt.py: {message or error}")
        return status or EXIT_FINDINGS


if __name__ == "__main__":
    leave(run_program(sys.argv[1:]))
