"""Proves the score of a run by decompression, in a process that can't read the validation text.

    python tools/prove.py RUN [--bytes 200000]

The beginning of the validation text is coded with the artifact's probabilities as the scorer scored it: its windows,
its mixture. A fresh process, to which all shards are closed, decodes it. PASS where the text comes back byte for byte
and the file has as many bits as the scorer's nats. The verdict goes to RUN/proof.json, which records take along.
Exit status: 0 PASS, 1 FAIL, 2 bad input.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro

from golf.artifact.container import read_artifact, restore_model
from golf.config.knobs import EXIT_FINDINGS
from golf.config.run import RunConfig
from golf.data.sidecar import StreamBytes
from golf.run.folder import RunFolder
from golf.run.guard import AccessGuard
from golf.runtime import ProgressLine, Runtime, write_file_atomically
from golf.score.roundtrip import stream_identity
from golf.score.scorer import count_target_bytes, sliding_settings
from lab.cli import ToolOptions, run_command
from lab.compress.proof import (
    NAME,
    CodedBeginning,
    Proof,
    count_targets,
    decode_beginning,
    encode_beginning,
    judge,
    scorer_nats,
    spell,
)
from lab.compress.stream_code import CompressionError
from lab.prepare.text_tokenizer import load_text_tokenizer
from lab.probe.scored_run import ScoredRun, load_run, score_settings, single_runtime


@dataclass(frozen=True)
class Options(ToolOptions):
    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    bytes: int = 200_000
    """How much of the validation text is proven; 0: all of it."""
    decode: Path | None = None
    """What the second process is given: the folder of the coded text, which gets the decoded one."""


def coder_runtime(config: RunConfig) -> Runtime:
    """Returns a runtime of one thread, unless the run asks for more: a coder waits for each token, and threads wait for
    each other whenever another program has a core."""
    return single_runtime(replace(config, threads=config.threads or 1))


def decode_without_text(run: Path, folder: Path) -> int:
    """Decodes what is coded in `folder` from the artifact and the tokenizer; validation and training shards are
    closed."""
    guard = AccessGuard()
    guard.stage = "pack"  # the stage in which all shards are closed
    guard.watch()
    files = RunFolder(run)
    config, coded = files.load_config(), CodedBeginning.read(folder / "coded.json")
    runtime, artifact = coder_runtime(config.run), read_artifact(files.artifact)
    model = restore_model(artifact, runtime)
    settings = sliding_settings(replace(config.score, eval_stride=coded.stride), artifact.model)
    tokens_T1 = decode_beginning(model, coded, settings, config.score)
    (folder / "decoded").write_bytes(spell(load_text_tokenizer(config.data.tokenizer_path), tokens_T1))
    return 0


def decode_in_fresh_process(run: Path, folder: Path) -> bytes:
    """Returns what another process decodes. Raises CompressionError with its complaint."""
    command = [sys.executable, __file__, str(run), "--decode", str(folder)]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        raise CompressionError(finished.stderr.strip().splitlines()[-1])
    return (folder / "decoded").read_bytes()


def prove(run: ScoredRun, wanted: int) -> Proof:
    """Codes, decodes and compares."""
    runtime, settings, score = coder_runtime(run.config.run), score_settings(run), run.config.score
    model, tokens_N1 = restore_model(run.artifact, runtime), run.tokens_N1
    ids_N1 = torch.from_numpy(tokens_N1.astype(np.int32))
    counter = run.counter if isinstance(run.counter, StreamBytes) else run.counter.to(torch.device("cpu"))
    targets = count_targets(count_target_bytes(ids_N1, counter).numpy(), wanted)
    line = ProgressLine(shown=True)
    coded = encode_beginning(
        model, tokens_N1, settings, score, targets, lambda done, total: line.update(f"coded {done / total:.1%}")
    )
    line.clear()
    nats_T = scorer_nats(model, tokens_N1, run.counter, settings, score, targets)
    identity = {"artifact_sha256": run.artifact.sha256, "val_data_id": stream_identity(tokens_N1)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coded.write(folder / "coded.json")
        text = spell(run.tokenizer, tokens_N1[: targets + 1])
        return judge(coded, nats_T, text, lambda: decode_in_fresh_process(run.folder, folder), identity)


def work(options: Options) -> int:
    if options.decode:
        return decode_without_text(options.run, options.decode)
    started = time.perf_counter()
    proof = prove(load_run(options.run), options.bytes)
    record = asdict(proof) | {"seconds": time.perf_counter() - started}
    write_file_atomically(options.run / "proof.json", json.dumps(record, indent=2) + "\n")
    print(
        json.dumps(record) if options.json else f"{proof.verdict}: {NAME}: {proof.detail} ({record['seconds']:.0f} s)"
    )
    return 0 if proof.verdict == "PASS" else EXIT_FINDINGS


if __name__ == "__main__":
    sys.exit(run_command(Options, __doc__, work))
