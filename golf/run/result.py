"""result.json: what a run measured, from the bytes on the disk."""

import hashlib
import json
from typing import Any

from golf.artifact.container import Artifact
from golf.config import Config, config_hash
from golf.run.findings import feature_findings, packing_findings
from golf.run.folder import RunFolder
from golf.run.training import Trainer
from golf.score.scorer import Score


def training_record(trainer: Trainer, data_id: str) -> dict[str, Any]:
    """training.json: what the training measured; the process that scores knows it only from here."""
    return {
        "params": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.step,
        "train_seconds": trainer.clock.seconds,
        "train_tokens": trainer.step * trainer.config.train.train_batch_tokens,
        "swa_snapshots": trainer.average.count,
        "data_id": data_id,
        "world_size": trainer.runtime.world_size,
        "compiled": trainer.runtime.compiles,
        "findings": feature_findings(trainer),
    }


def build_result(folder: RunFolder, config: Config, artifact: Artifact, score: Score, machine: str) -> dict[str, Any]:
    """All figures of the run; `findings` is empty when it is valid."""
    training = json.loads(folder.training.read_text())
    packing = json.loads(folder.packing.read_text())
    code = folder.code.read_bytes()
    bytes_total = artifact.byte_count + len(code)
    findings = training.pop("findings") + packing_findings(config, packing["pruned_codes"], bytes_total)
    return {
        "run_id": folder.path.name,
        "preset": config.run.preset,
        "config_hash": config_hash(config),
        "seed": config.run.seed,
        "valid": not findings,
        "findings": findings,
        **training,
        "eval_seconds": score.seconds,
        "val_loss": score.val_loss,
        "val_bpb": score.val_bpb,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "val_docs": score.documents,
        "eval_seq_len": config.score.eval_seq_len,
        "eval_stride": config.score.eval_stride,
        "eval_tokens_per_second": score.window_tokens / score.seconds,
        "bytes_code": len(code),
        "bytes_model": artifact.byte_count,
        "bytes_total": bytes_total,
        "limit_bytes": config.run.limit_bytes,
        "tokenizer_sha256": artifact.tokenizer_sha256,
        "artifact_sha256": artifact.sha256,
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "machine": machine,
        **packing,
    }
