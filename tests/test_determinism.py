"""Same steps, same bytes: with the compiler and two threads, as the README's command runs; and who can't says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golf.run.log_lines import determinism_line
from golf.runtime import Runtime

REPEATS = 20
"""Without the setting no two of 20 repetitions of these steps agreed (docs/LOG.md, 2026-11-28)."""
KNOBS = [
    "vocab_size=400", "model_dim=64", "bigram_vocab_size=64", "bigram_dim=16", "num_heads=2", "num_kv_heads=1",
    "iterations=6", "max_wallclock_seconds=0", "compile=on", "threads=2",
]  # fmt: skip


def test_a_run_says_whether_it_is_deterministic():
    assert determinism_line(Runtime(torch.device("cpu"))) == "deterministic:yes"
    assert determinism_line(Runtime(torch.device("cuda"))).startswith("deterministic:no (CUDA sums")


def repeat_steps(repeats: int, prepared: list[str], cache: Path, **environment: str) -> tuple[list[str], str]:
    """(what each repetition ended with, the C++ that was generated for it)"""
    command = [sys.executable, "tests/repeat_steps.py", str(repeats), *prepared, *KNOBS]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    root = Path(__file__).resolve().parents[1]
    finished = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600)
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("trained ")]
    return lines, "\n".join(path.read_text() for path in cache.rglob("*.cpp"))


@pytest.mark.slow
def test_compiled_steps_of_two_threads_repeat_bit_by_bit(prepared, tmp_path):
    ends, code = repeat_steps(REPEATS, prepared, tmp_path)
    assert len(ends) == REPEATS and len(set(ends)) == 1, "\n".join(ends)
    assert "#pragma omp" in code and "atomic_add" not in code


@pytest.mark.slow
def test_the_planted_race_is_in_the_code(prepared, tmp_path):
    """What the two additions come to is chance; that they are there is not."""
    _, code = repeat_steps(int(os.environ.get("RACES", "1")), prepared, tmp_path, RACING="1")
    assert "#pragma omp" in code and "atomic_add" in code
