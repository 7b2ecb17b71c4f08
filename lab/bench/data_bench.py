"""Times data on its way: text into shards, against one bare SentencePiece thread, and shards into a step's batches.

The text is that of a source, over again with a number in front of each document where it is too short; repeated
words favour the table of words a little beyond the first pass, so a long source tells most.
"""

import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from golf.config.knobs import UserError
from golf.data.loader import BatchPrefetcher, TokenStream, order_stream
from golf.data.shards import DataError
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import load_text_tokenizer

BARE_BYTES = 8_000_000
"""Text that the bare thread encodes."""
POLL_SECONDS = 0.1
CONSUMER_TOKENS_PER_SECOND = 10_000_000.0
"""About what 8xH100 train: 786,432 tokens in 91 ms are 8.7 million a second."""


class LoaderBenchError(UserError):
    """Figures that no loader can be measured with."""


def repeated_documents(source: str) -> Iterator[str]:
    """Returns the documents of `source` without end, each one different."""
    for copy in itertools.count():
        for text in iter_documents(source):
            yield f"{copy} {text}" if copy else text


def write_text(source: str, path: Path, text_bytes: int) -> int:
    """Writes `text_bytes` of text (to the document) as JSON lines; returns the bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in repeated_documents(source):
            written += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if written >= text_bytes:
                return written
    raise AssertionError("documents without end have ended")


def bare_megabytes_per_second(source: str, tokenizer_path: Path) -> float:
    """Measures one SentencePiece thread over a list of documents in memory, nothing else. Raises DataError."""
    tokenizer = load_text_tokenizer(tokenizer_path)
    if not hasattr(tokenizer, "processor"):
        raise DataError(f"{tokenizer_path}: only SentencePiece models can be compared with a bare SentencePiece thread")
    texts, held = [], 0
    for text in repeated_documents(source):
        texts.append(text)
        held += len(text.encode())
        if held >= BARE_BYTES:
            break
    started = time.perf_counter()
    tokenizer.processor.encode(texts, num_threads=1)
    return held / 1e6 / (time.perf_counter() - started)


def tree_memory(pid: int) -> int:
    """Returns the bytes that a process and its children hold, shared pages counted once; 0 where it can't be read."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in [str(pid), *children]:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    except (OSError, ValueError):  # a process that has just ended
        return total
    return total


def time_preparation(command: list[str]) -> tuple[float, int, dict]:
    """Returns seconds, most memory (bytes) and answer of a preparation in processes of its own. Raises DataError."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(POLL_SECONDS):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer, _ = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise DataError("the preparation failed; its message stands above")
    return seconds, peak, json.loads(answer)


def bench_data(
    program: Path, source: str, tokenizer_path: Path, megabytes: tuple[int, ...], workers: int, folder: Path
) -> dict[str, float]:
    """Measures `program` (data/prepare.py) on 10^6 bytes of text each of `megabytes`; writes to `folder`."""
    bare = bare_megabytes_per_second(source, tokenizer_path)
    figures = {"bare_thread_mb_per_s": bare}
    for size in megabytes:
        path, out = folder / f"text-{size}.jsonl", folder / f"out-{size}"
        text_bytes = write_text(source, path, size * 1_000_000)
        command = [sys.executable, str(program), "--input", str(path), "--tokenizer", str(tokenizer_path)]
        command += ["--out", str(out), "--workers", str(workers), "--json"]
        seconds, peak, answer = time_preparation(command)
        rate = text_bytes / 1e6 / seconds
        figures[f"prepare_{size}_mb_per_s"] = rate
        figures[f"prepare_{size}_to_bare"] = rate / bare
        figures[f"prepare_{size}_seconds"] = seconds
        figures[f"prepare_{size}_tokens"] = sum(counts["tokens"] for counts in answer["splits"].values())
        figures[f"prepare_{size}_peak_mib"] = peak / 2**20
        path.unlink()
    return figures


def bench_loader(
    paths: Sequence[str | Path],
    batch_tokens: int = 786_432,
    seq_len: int = 2048,
    order: str = "sequential",
    steps: int = 50,
    tokens_per_second: float = CONSUMER_TOKENS_PER_SECOND,
    world_size: int = 1,
    bos_id: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Measures how long rank 0 of `world_size` waits in `steps` steps of batch_tokens / tokens_per_second each.

    The consumer only sleeps, in the place of a GPU. The first step starts with nothing read ahead, so its wait stands
    alone. `wait_share` is the waiting of all others as a share of their time. Raises DataError, LoaderBenchError.
    """
    if steps < 2 or tokens_per_second <= 0:
        raise LoaderBenchError(f"{steps} steps at {tokens_per_second:g} tokens a second can't be timed: take 2 or more")
    started = time.perf_counter()
    stream = order_stream(TokenStream(paths), order, bos_id, seed)
    setup_seconds, step_seconds, waits = time.perf_counter() - started, batch_tokens / tokens_per_second, []
    with BatchPrefetcher(stream, batch_tokens, seq_len, 0, world_size, torch.device(device), order) as batches:
        asked = time.perf_counter()
        for step in range(1000, 1003):
            batches.read_ahead(step)
        read_seconds = (time.perf_counter() - asked) / 3
        for step in range(steps):
            asked = time.perf_counter()
            batches.get(step)
            waits.append(time.perf_counter() - asked)
            time.sleep(step_seconds)
    return {
        "setup_seconds": setup_seconds,
        "read_ms": 1000 * read_seconds,
        "read_tokens_per_s": batch_tokens / world_size / read_seconds,
        "step_ms": 1000 * step_seconds,
        "first_wait_ms": 1000 * waits[0],
        "median_wait_ms": 1000 * statistics.median(waits[1:]),
        "longest_wait_ms": 1000 * max(waits[1:]),
        "wait_share": sum(waits[1:]) / (sum(waits[1:]) + step_seconds * (steps - 1)),
    }
