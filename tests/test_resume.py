"""A run can't be lost: killed anywhere and taken up again, it gives the bytes and the score of an undisturbed one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TINY = [
    "vocab_size=400", "model_dim=32", "bigram_vocab_size=64", "bigram_dim=8", "train_seq_len=32", "iterations=24",
    "max_wallclock_seconds=0", "train_batch_tokens=256", "micro_batch_tokens=256", "warmup_steps=1", "threads=1",
    "swa_start=0.5", "compile=off", "swa_snapshots=6", "eval_seq_len=64", "eval_stride=32", "eval_batch_seqs=16",
    "checkpoint_seconds=0.000001", "qat_start=0.3", "holdout_every=5", "holdout_tokens=16384",
    "eval_batch_tokens=16384",
    "quantizer=rtn", "qat_enabled=1", "prune_frac=0.05", "codec=zstd",
]  # fmt: skip
STAGES = ("train", "average", "quantize", "pack", "reload", "score", "report")


class Runs:
    """Starts runs under tests/kill_at.py in one folder."""

    def __init__(self, repository: Path, root: Path, prepared: list[str]):
        self.repository, self.root, self.prepared = repository, root, prepared

    def command(self, point: str, *arguments: str) -> list[str]:
        return [sys.executable, "tests/kill_at.py", point, *arguments]

    def start(self, run_id: str, *knobs: str) -> list[str]:
        return ["--preset", "local", *self.prepared, *TINY, *knobs, f"runs_root={self.root}", f"run_id={run_id}"]

    def resume(self, run_id: str) -> list[str]:
        return ["--resume", str(self.root / run_id)]

    def run(self, point: str, arguments: list[str], **options) -> subprocess.CompletedProcess:
        command = self.command(point, *arguments)
        return subprocess.run(command, cwd=self.repository, capture_output=True, text=True, timeout=600, **options)

    def result(self, run_id: str) -> dict:
        return json.loads((self.root / run_id / "result.json").read_text())

    def artifact(self, run_id: str) -> bytes:
        return (self.root / run_id / "model.golf").read_bytes()

    def losses(self, run_id: str) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (self.root / run_id / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]


@pytest.fixture(scope="module")
def runs(repository: Path, prepared: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With one undisturbed run, `whole`."""
    runs = Runs(repository, tmp_path_factory.mktemp("runs"), prepared)
    finished = runs.run("none", runs.start("whole"))
    assert finished.returncode == 0, finished.stderr
    return runs


def assert_same_run(runs: Runs, run_id: str) -> None:
    whole, other = runs.result("whole"), runs.result(run_id)
    assert runs.artifact(run_id) == runs.artifact("whole")
    for key in ("val_bpb", "val_loss", "val_tokens", "val_bytes", "artifact_sha256", "steps", "valid", "features"):
        assert other[key] == whole[key], key
    assert runs.losses(run_id) == runs.losses("whole")
    assert other["valid"] and other["resumes"] > 0


def kill_chain(runs: Runs, run_id: str, points: list[str]) -> None:
    """Kill one run at one point after the other, then let it finish."""
    arguments = runs.start(run_id)
    for point in points:
        finished = runs.run(point, arguments)
        assert finished.returncode == -signal.SIGKILL, f"{point}: {finished.returncode} {finished.stderr}"
        arguments = runs.resume(run_id)
    finished = runs.run("none", arguments)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(runs, run_id)
    assert runs.result(run_id)["resumes"] == len(points)


def test_killed_at_every_stage_boundary(runs):
    kill_chain(runs, "boundaries", [f"{side}:{stage}" for stage in STAGES for side in ("before", "after")][:-1])


def test_killed_at_ten_random_moments_of_training(runs):
    moments = sorted(random.Random(1).sample(range(1, 24), 10))
    kinds = ["step", "moment"]
    points = [f"{kinds[i % 2]}:{moment}" for i, moment in enumerate(moments)]
    kill_chain(runs, "training", [*points[:5], "checkpoint:2", *points[5:]])


def scored_chunks(journal: str) -> int:
    """Counts rows with targets; a mixture that takes long leaves rows of time alone."""
    return journal.count('"nats"') - journal.count('"end": 0,')


def test_killed_at_ten_random_moments_of_scoring(runs):
    chunks = scored_chunks((runs.root / "whole" / "score-rank0.jsonl").read_text())
    assert chunks >= 20, "too few chunks for ten random moments"
    moments = sorted(random.Random(2).sample(range(1, chunks), 10))
    kill_chain(runs, "scoring", [f"{('chunk', 'torn')[i % 2]}:{moment}" for i, moment in enumerate(moments)])
    journal = (runs.root / "scoring" / "score-rank0.jsonl").read_text()
    assert scored_chunks(journal) == chunks and journal.count('"preparing"') == 11


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_leaves_a_checkpoint_and_a_status_of_its_own(runs, number):
    run_id = f"signal{number}"
    command = runs.command("none", *runs.start(run_id, "checkpoint_seconds=0", "iterations=100000"))
    process = subprocess.Popen(command, cwd=runs.repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step:7/"):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 4 and f"stopped by {number.name}" in errors and "--resume" in errors
    assert "Traceback" not in errors and errors.count("\n") == 1
    log = (runs.root / run_id / "train.log").read_text()
    assert f"stopped by {number.name}" in log
    (checkpoint,) = (runs.root / run_id / "checkpoints").glob("step*.safetensors")
    assert int(re.search(r"step(\d+)", checkpoint.name)[1]) >= 7


def test_a_signal_in_scoring_is_resumed_at_the_next_chunk(runs):
    run_id = "stopped-scoring"
    stopped = runs.run("stop:5", runs.start(run_id))
    assert stopped.returncode == 4, stopped.stderr
    partial = next(line for line in stopped.stdout.splitlines() if line.startswith("score:partial"))
    assert "no score" in partial and "val_bpb" not in partial
    assert not (runs.root / run_id / "result.json").exists()
    assert runs.run("none", runs.resume(run_id)).returncode == 0
    assert_same_run(runs, run_id)


def test_the_clock_goes_on_so_that_a_resumed_run_trains_no_longer_than_its_cap(runs):
    start = runs.start("clock", "iterations=0", "max_wallclock_seconds=4", "checkpoint_seconds=1", "holdout_every=0")
    environment = os.environ | {"STEP_SECONDS": "0.05"}
    assert runs.run("step:52", start, env=environment).returncode == -signal.SIGKILL  # between two checkpoints
    killed_at = json.loads((runs.root / "clock" / "metrics.jsonl").read_text().split("\n")[-2])["elapsed"]
    assert 2.5 < killed_at < 3
    finished = runs.run("none", runs.resume("clock"), env=environment)
    assert finished.returncode == 0, finished.stderr
    result = runs.result("clock")
    assert result["valid"] and result["train_seconds"] <= 4
    resumed = re.search(r"clock at (\d+\.\d) s, (\d+\.\d) s of training lost", finished.stdout)
    assert float(resumed[1]) >= killed_at - 0.1 and 0 < result["train_seconds_lost"] < 2
    steps = [step for step, _ in runs.losses("clock")]
    assert steps == list(range(1, result["steps"] + 1))


def test_a_full_disk_is_one_clear_line_and_loses_nothing(runs):
    """A limit on the size of files stands for the full disk: the checkpoint is larger, what comes before is not."""
    words = " ".join(f"'{word}'" for word in runs.command("none", *runs.start("full")))
    shell = ["bash", "-c", f"ulimit -f 64; exec {words}"]
    finished = subprocess.run(shell, cwd=runs.repository, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 5, finished.stderr
    assert finished.stderr.count("\n") == 1 and "File too large" in finished.stderr and "--resume" in finished.stderr
    assert list((runs.root / "full" / "checkpoints").iterdir()) == []
    assert runs.run("none", runs.resume("full")).returncode == 0
    assert_same_run(runs, "full")


def test_a_target_that_can_not_be_written_is_one_clear_line(runs):
    arguments = ["--preset", "local", *runs.prepared, *TINY, "runs_root=/dev/null/runs"]
    finished = runs.run("none", arguments)
    assert finished.returncode == 5 and finished.stderr.count("\n") == 1 and "/dev/null/runs" in finished.stderr


def test_a_run_is_at_work_in_one_process_only(runs):
    command = runs.command("none", *runs.start("busy", "iterations=100000", "holdout_every=0"))
    process = subprocess.Popen(command, cwd=runs.repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.startswith("step:1/"))
    second = runs.run("none", runs.resume("busy"))
    assert second.returncode == 2 and "is at work in another process" in second.stderr
    assert second.stderr.count("\n") == 1 and process.poll() is None
    process.kill()
    process.communicate()


def test_a_changed_output_is_not_taken_for_the_stage_that_left_it(runs):
    finished = runs.run("after:quantize", runs.start("changed"))
    assert finished.returncode == -signal.SIGKILL
    path = runs.root / "changed" / "quantized.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    finished = runs.run("none", runs.resume("changed"))
    assert finished.returncode == 2 and "is not what stage quantize left" in finished.stderr
    path.unlink()
    assert "is missing" in runs.run("none", runs.resume("changed")).stderr


def test_a_run_is_only_resumed_with_the_code_that_began_it(runs, repository):
    (runs.root / "whole" / "sources.json").write_text('{"train_gpt.py": "another"}')
    command = [sys.executable, "train_gpt.py", *runs.resume("whole")]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 2 and "the code is not that of" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "there is no run 'nowhere'"),
        (["--resume", "{root}/whole", "num_layers=3"], "goes on as it was configured"),
        (["--score", "{root}"], "is not the folder of a run"),
    ],
)
def test_bad_input_of_resume_is_one_line(runs, arguments, message):
    finished = runs.run("none", [argument.format(root=runs.root) for argument in arguments])
    assert finished.returncode == 2 and message in finished.stderr and finished.stderr.count("\n") == 1


COMPILED = (
    "compile=on", "threads=2", "train_batch_tokens=2048", "micro_batch_tokens=2048", "iterations=60", "qat_enabled=0",
    "holdout_every=0", "train_log_every=1",
)  # fmt: skip
"""What the README's command runs with on two cores, which the other tests here are too many for."""


def run_sh(runs: Runs, *arguments: str) -> subprocess.Popen:
    """Starts the README's command; SIGKILL reaches the training, which takes the shell's place."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.Popen(["bash", "run.sh", *arguments], cwd=runs.repository, env=environment, **pipes)


def test_run_sh_with_the_compiler_and_two_threads_is_killed_and_goes_on(runs):
    undisturbed = run_sh(runs, *runs.start("compiled", *COMPILED))
    output, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, output
    process = run_sh(runs, *runs.start("slain", *COMPILED))
    next(line for line in process.stdout if line.startswith("step:7/"))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (runs.root / "slain" / "training.json").exists()
    resumed = run_sh(runs, *runs.resume("slain"))
    output, _ = resumed.communicate()
    assert resumed.returncode == 0 and re.search(r"^resume: from step [1-9]", output, re.MULTILINE), output
    assert runs.artifact("slain") == runs.artifact("compiled") and runs.losses("slain") == runs.losses("compiled")
    whole, other = runs.result("compiled"), runs.result("slain")
    assert other["val_bpb"] == whole["val_bpb"] and other["deterministic"] and other["valid"] and whole["compiled"]


def torchrun(runs: Runs, *arguments: str, point: str = "none") -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, "tests/kill_at.py", point, *arguments]


def test_two_processes_end_with_the_death_of_one_and_go_on(runs):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(cwd=runs.repository, capture_output=True, text=True, timeout=600, env=environment)
    assert subprocess.run(torchrun(runs, *runs.start("pair")), **options).returncode == 0
    long, one = runs.start("widow", "checkpoint_seconds=0.05"), environment | {"KILL_RANK": "1"}
    widowed = subprocess.run(torchrun(runs, *long, point="step:9"), **options | {"env": one})  # no collective's timeout
    assert widowed.returncode != 0
    assert "another process of the run was lost" in widowed.stderr or "stopped by SIGTERM" in widowed.stderr
    assert "Signal 9 (SIGKILL)" in widowed.stderr
    resumed = subprocess.run(torchrun(runs, *runs.resume("widow")), **options)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.artifact("widow") == runs.artifact("pair")
    assert runs.result("widow")["val_bpb"] == runs.result("pair")["val_bpb"]
