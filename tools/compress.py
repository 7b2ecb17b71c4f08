"""Compresses any text or bytes with a model's probabilities, and gives it back exactly.

    python tools/compress.py --artifact RUN_OR_FILE [--tokenizer FILE] TEXT --out FILE.golfz
    python tools/compress.py --artifact RUN_OR_FILE [--tokenizer FILE] FILE.golfz --decompress --out TEXT

Both sides need the same artifact and tokenizer, and arithmetic that gives the same bits: the same torch on the same
kind of processor. Checksums find out where it does not. An existing file is never replaced.
Exit status: 0 done, 2 bad input, 5 the disk failed.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from golf.artifact.container import read_artifact
from golf.config.presets import PRESETS
from golf.config.scoring import ScoreConfig
from golf.run.folder import RunFolder
from golf.runtime import Log, ProgressLine, leave, start_runtime, write_file_atomically
from golf.score.scorer import ScoreSettings
from lab.cli import DeviceOptions, markdown_table, run_command
from lab.compress.comparison import measure, others
from lab.compress.container import compress_bytes, decompress_bytes
from lab.compress.stream_code import CompressionError
from lab.generate.text_model import TextModel, find_artifact, open_text_model

SUCCESSORS = PRESETS["local"]["mixture_successors"]
"""Known tokens that are weighed against each other at last."""


@dataclass(frozen=True)
class Options(DeviceOptions):
    file: tyro.conf.Positional[Path]
    """What to compress, or a .golfz file with --decompress."""
    artifact: Path
    """An artifact, or the folder of a run."""
    out: Path | None = None
    """The file to write. It must not exist."""
    tokenizer: Path | None = None
    """The artifact's tokenizer; that of its run where none is named."""
    decompress: bool = False
    """Give a .golfz file's text back."""
    mixture: bool = True
    """Mix the network's probabilities with counts of what was coded before."""
    compare: bool = False
    """Print a table beside other compressors, and write nothing."""
    dictionary: Path | None = None
    """Training text for the dictionary of one of them, with --compare."""
    threads: int = field(default=1, kw_only=True)
    """CPU threads; a file is read with as many. More are 10 % faster on an idle machine, and a crawl on a busy one."""
    streams: int = 0
    """Pieces of the text that are read beside each other: more are faster and take more bytes; 0: by its length."""


def window_settings(model: TextModel) -> ScoreSettings:
    """Returns windows of the training length that overlap by half."""
    return ScoreSettings(model.context, max(1, model.context // 2), batch_seqs=1)


def work(options: Options) -> int:
    if options.out is None and not options.compare:
        raise CompressionError("name the file to write: --out FILE")
    if options.out and options.out.exists():
        raise CompressionError(f"{options.out} exists: name another file")
    data = options.file.read_bytes()
    with start_runtime(options.run_config(), "compress", Log(sys.stderr)) as runtime:
        model = open_text_model(options.artifact, options.tokenizer, runtime)
        artifact = read_artifact(find_artifact(options.artifact, RunFolder(options.artifact))).sha256
        line = ProgressLine(shown=True)

        def progress(done: int, total: int) -> None:
            line.update(f"{done / total:.1%} of {total:,} tokens")

        def compress(text: bytes) -> bytes:
            score = ScoreConfig(mixture=options.mixture, mixture_successors=SUCCESSORS)
            return compress_bytes(model, artifact, text, window_settings(model), score, options.streams, progress)

        if options.compare:
            return compare(options, data, compress)
        started = time.perf_counter()
        made = (
            decompress_bytes(model, artifact, data, str(options.file), progress)
            if options.decompress
            else compress(data)
        )
        line.clear()
    write_file_atomically(options.out, made)
    report(options, len(data), len(made), time.perf_counter() - started)
    return 0


def compare(options: Options, data: bytes, compress: Callable[[bytes], bytes]) -> int:
    """Prints a row for each compressor."""
    training = options.dictionary.read_bytes() if options.dictionary else b""
    every = {"golfz": compress} | others(training)
    rows = [measure(name, way, data) for name, way in every.items()]
    if options.json:
        print(json.dumps(rows))
        return 0
    cells = [(r["what"], f"{r['bytes']:,}", f"{r['bits_per_byte']:.4f}", f"{r['seconds']:.1f}") for r in rows]
    print(markdown_table((options.file.name, "bytes", "bits per byte", "seconds"), cells), end="")
    return 0


def report(options: Options, read: int, written: int, seconds: float) -> None:
    text, packed = (written, read) if options.decompress else (read, written)
    figures = {
        "text_bytes": text,
        "golfz_bytes": packed,
        "bits_per_byte": 8 * packed / max(1, text),
        "seconds": seconds,
    }
    if options.json:
        print(json.dumps(figures))
    else:
        ratio = f"{figures['bits_per_byte']:.4f} bits per byte"
        print(f"{options.out}: {text:,} bytes of text, {packed:,} compressed ({ratio}), {seconds:.1f} s")


if __name__ == "__main__":
    leave(run_command(Options, __doc__, work))
