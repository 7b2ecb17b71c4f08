"""Loops over the training steps: logs, evaluates held-out text, writes checkpoints, and resumes from them."""

from dataclasses import asdict

from golf.config.features import Feature, register_feature
from golf.data.tokenizer import ByteTable
from golf.run.checkpoint import CheckpointWriter, newest_checkpoint, read_checkpoint
from golf.run.datasets import TrainingData
from golf.run.folder import RunFolder
from golf.run.log_lines import holdout_line, progress_text, step_line, stop_line
from golf.run.session import Interrupted, Session
from golf.run.trainer import StepReport, Trainer
from golf.runtime import ProgressLine
from golf.score.scorer import plain_settings, score_stream

LAST_CHECKPOINT = 0.99
"""Share of the budget after which only the end writes one: the time of a copy would go past the cap."""


def take_up_checkpoint(trainer: Trainer, folder: RunFolder) -> None:
    """Resumes from the newest checkpoint, if there is one; the clock always resumes from its last reading."""
    files, runtime = newest_checkpoint(folder.checkpoints), trainer.runtime
    state = read_checkpoint(files) if files else None
    latest = folder.trim_metrics(state.numbers["step"] if state else 0) if runtime.is_main else 0.0
    (latest,) = runtime.max_over_ranks(latest)
    if state:
        trainer.load_state(state, latest)
    elif latest:
        trainer.clock.total = trainer.lost_seconds = latest
    else:
        return
    lost = f"{trainer.lost_seconds:.1f} s of training lost"
    runtime.print(f"resume: from step {trainer.step}, clock at {trainer.clock.seconds:.1f} s, {lost}")


def take_steps(trainer: Trainer, data: TrainingData, session: Session, writer: CheckpointWriter) -> None:
    """Trains until the budget is used up, with periodic checkpoints. Raises Interrupted, after a last checkpoint."""
    config, runtime, folder = trainer.config, trainer.runtime, session.folder
    progress, saved_at, report = ProgressLine(shown=runtime.is_main), trainer.clock.seconds, None

    def holds_out(step: int) -> bool:
        return config.train.holdout_every > 0 and step % config.train.holdout_every == 0

    for report in trainer.steps(lambda: session.interruption.requested):
        log_step(report, trainer, folder, progress)
        due = 0 < config.run.checkpoint_seconds <= report.elapsed - saved_at and report.progress < LAST_CHECKPOINT
        trainer.waits = due or trainer.stop_agreed or holds_out(report.step + 1)
        if trainer.queued:  # the state is no longer this step's
            continue
        if holds_out(report.step):
            with session.ledger.phase("hold out"):
                eval_holdout(trainer, data, report, folder)
        if trainer.stop_agreed:
            progress.clear()
            writer.write(trainer.state(), report.step)
            writer.close()
            runtime.barrier()  # a launcher ends all ranks when the first one exits
            session.interruption.check(f"after step {report.step}; go on with --resume {folder.path.name}")
            raise Interrupted(f"another process was stopped after step {report.step}")
        if due:
            with trainer.clock:  # the copy delays training, so it counts
                writer.write(trainer.state(), report.step)
            saved_at = report.elapsed
            session.ledger.flush()
    progress.clear()
    if report and not 0 < config.train.iterations <= report.step:
        runtime.print(stop_line(report, config))


def log_step(report: StepReport, trainer: Trainer, folder: RunFolder, progress: ProgressLine) -> None:
    """Writes a row of metrics, and periodically a line for the log."""
    config = trainer.config
    if trainer.runtime.is_main:
        folder.append_metrics(asdict(report))
        progress.update(progress_text(report, config))
    if report.step <= 10 or report.step % config.train.train_log_every == 0:
        progress.clear()
        trainer.runtime.print(step_line(report, config))


def eval_holdout(trainer: Trainer, data: TrainingData, report: StepReport, folder: RunFolder) -> None:
    """Scores the current weights on held-out training text; this is not the artifact's score."""
    config, runtime, model = trainer.config, trainer.runtime, trainer.config.model
    rows = max(1, config.train.eval_batch_tokens // model.train_seq_len // runtime.world_size)
    tokens = data.stream.held_out_tokens(model.bos_id)
    table, settings = ByteTable(data.tokenizer), plain_settings(model, rows)
    score = score_stream(trainer.model, tokens, table, settings, runtime, announce=False)
    runtime.print(holdout_line(score, report, config))
    if runtime.is_main:
        folder.append_metrics({"step": report.step, "elapsed": report.elapsed, "holdout_loss": score.val_loss})
    trainer.audit.count("holdout", report.step)
    trainer.audit.verify("holdout", score.nats > 0, f"{score.val_loss:.4f} nats per held-out token")


register_feature(
    Feature("holdout", lambda config: config.train.holdout_every > 0, "train longer, or set holdout_every=0")
)
