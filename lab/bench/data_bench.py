"""How fast text becomes shards: against one bare SentencePiece thread, and for several amounts of text.

The text is that of a source, over again with a number in front of each document where it is too short; repeated
words favour the table of words a little beyond the first pass, so a long source tells most.
"""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from golf.data.shards import DataError
from lab.prepare.readers import iter_documents
from lab.prepare.text_tokenizer import load_text_tokenizer

BARE_BYTES = 8_000_000
"""Text that the bare thread encodes."""
POLL_SECONDS = 0.1


def repeated_documents(source: str) -> Iterator[str]:
    """The documents of `source` without end, each one different."""
    for copy in itertools.count():
        for text in iter_documents(source):
            yield f"{copy} {text}" if copy else text


def write_text(source: str, path: Path, text_bytes: int) -> int:
    """Write `text_bytes` of text (to the document) as JSON lines; returns the bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in repeated_documents(source):
            written += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if written >= text_bytes:
                return written
    raise AssertionError("documents without end have ended")


def bare_megabytes_per_second(source: str, tokenizer_path: Path) -> float:
    """One SentencePiece thread over a list of documents in memory, nothing else. Raises DataError."""
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
    """Bytes of memory of a process and its children, shared pages counted once; 0 where Linux does not tell."""
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
    """Seconds, most memory (bytes) and answer of a preparation in processes of its own. Raises DataError."""
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
    """Figures of `program` (data/prepare.py) on 10^6 bytes of text each of `megabytes`; writes to `folder`."""
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
