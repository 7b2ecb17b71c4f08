"""What must hold of a finished run. A feature that was switched on and never acted makes the run invalid."""

from golf.config import Config
from golf.run.training import Trainer


def feature_findings(trainer: Trainer) -> list[str]:
    """One line for each feature that was armed and did not act."""
    config, findings = trainer.config, []
    if config.average.swa_enabled and not trainer.average.applied:
        findings.append(
            f"swa_enabled=1 but only {trainer.average.count} snapshots were due in {trainer.step} steps, so nothing "
            "was averaged: train longer or lower swa_start"
        )
    if config.quant.qat_enabled and trainer.fake_quantized_steps == 0:
        findings.append("qat_enabled=1 but no step ran on the export grid: train longer or lower qat_start")
    return findings


def packing_findings(config: Config, pruned_codes: int, bytes_total: int) -> list[str]:
    findings, over = [], bytes_total - config.run.limit_bytes
    if config.quant.prune_frac > 0 and pruned_codes == 0:
        findings.append(f"prune_frac={config.quant.prune_frac} changed no code of the artifact: set prune_frac=0")
    if over > 0:
        findings.append(
            f"{bytes_total:,} bytes of code and artifact are {over:,} over the limit of {config.run.limit_bytes:,}: "
            "use fewer parameters or fewer bits"
        )
    return findings
