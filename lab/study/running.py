"""One run of an ablation in its folder: whatever happens, result.json says what became of it, and comes last."""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from golf.config.knobs import EXIT_FINDINGS, EXIT_MACHINE
from golf.run.session import take_lock
from golf.runtime import Log, start_runtime, write_file_atomically
from lab.study.measures import peak_mib, study_environment
from lab.study.rounding import run_rounding
from lab.study.spec import FAILED, RunSpec, StudyError, failed_result, read_spec, save_result
from lab.study.training import run_training


def run_ablation(spec_path: Path, folder: Path, code_sha256: str) -> int:
    """Do the run that `spec_path` describes; its files go to `folder`. `code_sha256` is that of the code that runs.

    Returns 0, or 1 where the run failed, which is a result too, or 5 where the machine is at fault (out of disk).
    Raises StudyError, and leaves no result, where spec, data or code are not those of the study.
    """
    spec = read_spec(spec_path)
    if spec.code_sha256 != code_sha256:
        raise StudyError(f"{spec_path}: the code is not the study's any more: start tools/ablate.py again")
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / ".lock")
    try:
        return finish_run(spec, folder)
    finally:
        lock.close()


def finish_run(spec: RunSpec, folder: Path) -> int:
    started, figures, curve, blocks = time.perf_counter(), {}, [], []
    try:
        with start_runtime(spec.config.run, "ablation", Log(sys.stderr)) as runtime:
            environment = study_environment(spec.config, runtime)
            run = run_rounding if spec.method else run_training
            figures, curve, blocks, artifact = run(spec, runtime, folder)
            figures |= {"environment": environment, "peak_mib": peak_mib(runtime)}
    except StudyError:
        raise
    except OSError as error:
        print(f"ablation_run: {error}", file=sys.stderr)
        return EXIT_MACHINE
    except Exception as error:  # a row of the table, whatever it was
        traceback.print_exc()
        save_result(folder, failed_result(spec, FAILED, f"{type(error).__name__}: {error}"))
        return EXIT_FINDINGS
    write_file_atomically(folder / "model.golf", artifact)
    write_lines(folder / "curve.jsonl", curve)
    block_record = {"block_tokens": spec.config.model.train_seq_len, "nats": blocks}
    write_file_atomically(folder / "blocks.json", json.dumps(block_record) + "\n")
    save_result(folder, failed_result(spec, "", "") | whole_result(spec, figures, time.perf_counter() - started))
    return 0


def whole_result(spec: RunSpec, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the figures don't say of themselves."""
    kind = {"method": spec.method, "source_key": spec.source_key, "act_order": spec.act_order,
            "calibration_sequences": spec.calibration_sequences}  # fmt: skip
    return figures | kind | {"total_seconds": seconds}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_file_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
