"""What must hold of a finished run's figures; what features did is the witness's matter (witness.py)."""

import math
from collections.abc import Mapping
from typing import Any


def run_findings(figures: Mapping[str, Any]) -> list[str]:
    """One line for each limit that was broken and each probe that failed."""
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
    for name, probe in figures["probes"].items():
        if probe["verdict"] == "FAIL":
            findings.append(f"legality probe {name} failed: {probe['detail']}")
    return findings
