"""Builds result.json: what a run measured, from the bytes on the disk, and the limits that its figures must keep."""

import hashlib
import math
import platform
from collections.abc import Mapping
from typing import Any

import torch

from golf.artifact.container import read_artifact
from golf.artifact.fill_limit import FittedArtifact
from golf.config.config import Config, config_hash
from golf.data.tokenizer import Tokenizer
from golf.run.feature_audit import FeatureAudit
from golf.run.log_lines import machine_description
from golf.run.session import Session
from golf.run.trainer import Trainer
from golf.score.scorer import Score


def run_findings(figures: Mapping[str, Any]) -> list[str]:
    """Returns one line for each limit that was broken and each probe that failed."""
    findings, over = [], figures["bytes_total"] - figures["limit_bytes"]
    if not math.isfinite(figures["val_bpb"]):
        findings.append(f"val_bpb is {figures['val_bpb']}: the model is no model")
    if over > 0:
        findings.append(
            f"{figures['bytes_total']:,} bytes of code and artifact are {over:,} over the limit of "
            f"{figures['limit_bytes']:,}: use fewer parameters or fewer bits"
        )
    for what, spent, cap in (
        ("training", figures["train_seconds"] + figures["calibration_seconds"], figures["max_wallclock_seconds"]),
        ("scoring", figures["eval_seconds"], figures["max_eval_seconds"]),
    ):
        if 0 < cap < spent:
            findings.append(f"{what} took {spent:.1f} s, over its cap of {cap:.0f} s")
    for change in figures.get("code_changes", []):
        done = ", ".join(change["stages"]) or "no stage"
        findings.append(f"the code was changed in the middle of the run (by code {change['from'][:12]}: {done})")
    for name, probe in figures["probes"].items():
        if probe["verdict"] == "FAIL":
            findings.append(f"legality probe {name} failed: {probe['detail']}")
    return findings


def training_record(trainer: Trainer, data_id: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of training.json: what the training measured."""
    return {
        "params": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.step,
        "train_seconds": trainer.clock.seconds,
        "train_seconds_lost": trainer.lost_seconds,
        "train_tokens": trainer.step * trainer.config.train.train_batch_tokens,
        "swa_snapshots": trainer.average.count,
        "data_id": data_id,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_kind": tokenizer.kind,
        "world_size": trainer.runtime.world_size,
        "compiled": trainer.runtime.compiles,
    }


def pruning_record(fitted: FittedArtifact) -> dict[str, Any]:
    """Returns the content of pruning.json: how many codes pruning and fitting changed, and what fitting did."""
    return {
        "pruned_codes": sum(tensor.codes_changed for tensor in fitted.prune_reports),
        "codes": sum(tensor.weights for tensor in fitted.prune_reports),
        "codes_not_nearest": fitted.codes_not_nearest,
        "matrices_fp16": fitted.matrices_fp16,
        "fit_actions": fitted.actions,
    }


def score_record(score: Score, val_data_id: str, unquantized: Score) -> dict[str, Any]:
    """Returns the content of score.json: the artifact's score, and that of the weights before quantization."""
    return {
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "val_tokens": score.tokens,
        "of_tokens": score.tokens,
        "partial": False,
        "val_bytes": score.bytes,
        "val_docs": score.documents,
        "val_data_id": val_data_id,
        "eval_stride": score.stride,
        "eval_windows": score.windows,
        "eval_seconds": score.seconds,
        "eval_tokens_per_second": score.window_tokens / score.seconds,
        **score.parts,
        "unquantized": {
            "val_loss": unquantized.val_loss,
            "val_bpb": unquantized.val_bpb,
            "note": "weights before pruning and quantization, in plain rows",
        },
    }


def full_audit(config: Config, session: Session) -> FeatureAudit:
    """Returns the feature audit of training and averaging, with what the later stages' files add."""
    folder = session.folder
    audit = FeatureAudit(config, folder.load_json(folder.effects))
    audit.note_files({name: folder.load_json(getattr(folder, name)) for name in ("pruning", "reload", "score")})
    return audit


def build_result(config: Config, session: Session, probed: bool) -> dict[str, Any]:
    """Returns all figures of the run; `findings` is empty when it is valid. `probed`: the legality probes ran."""
    folder, runtime = session.folder, session.runtime
    artifact, code = read_artifact(folder.artifact), folder.code.read_bytes()
    audit = full_audit(config, session)
    figures = {
        "run_id": folder.path.name,
        "preset": config.run.preset,
        "config_hash": config_hash(config),
        "seed": config.run.seed,
        **folder.load_json(folder.training),
        **folder.load_json(folder.score),
        **folder.load_json(folder.pruning),
        **folder.load_json(folder.packing),
        "eval_seq_len": config.score.eval_seq_len,
        "eval_stride_asked": config.score.eval_stride,
        "max_wallclock_seconds": config.train.max_wallclock_seconds,
        "max_eval_seconds": config.score.max_eval_seconds,
        "iterations": config.train.iterations,
        "bytes_code": len(code),
        "bytes_model": artifact.byte_count,
        "bytes_total": len(code) + artifact.byte_count,
        "limit_bytes": config.run.limit_bytes,
        "artifact_sha256": artifact.sha256,
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "machine": machine_description(runtime),
        "device": runtime.device.type,
        "deterministic": not runtime.nondeterminism,
        "nondeterminism": runtime.nondeterminism,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "resumes": len({row["session"] for row in session.ledger.rows}) - 1,
        "fingerprint": folder.load_json(folder.machine) if folder.machine.exists() else {},
        "features": audit.record(),
        "parity": folder.load_json(folder.reload)["parity"],
        "probes": folder.load_json(folder.probes) if folder.probes.exists() else {},
        "code_changes": folder.code_changes_list(),
        "ledger": session.ledger.summary(),
    }
    broken = [] if probed else ["tools/check_run.py could not probe the score; see its message"]
    findings = [*audit.findings(), *run_findings(figures), *broken]
    return figures | {"valid": not findings, "findings": findings}
