"""result.json: what a run measured, from the bytes on the disk."""

import hashlib
import json
from typing import Any

from golf.config import Config, config_hash
from golf.run.findings import size_findings
from golf.run.folder import RunFolder
from golf.score.scorer import Score


def build_result(folder: RunFolder, config: Config, score: Score, machine: str) -> dict[str, Any]:
    """All figures of the run; `findings` is empty when it is valid."""
    training = json.loads(folder.training.read_text())
    packing = json.loads(folder.packing.read_text())
    artifact, code = folder.artifact.read_bytes(), folder.code.read_bytes()
    bytes_total = len(artifact) + len(code)
    findings = training.pop("findings") + size_findings(bytes_total, config.run.limit_bytes)
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
        "bytes_model": len(artifact),
        "bytes_total": bytes_total,
        "limit_bytes": config.run.limit_bytes,
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "machine": machine,
        **packing,
    }
