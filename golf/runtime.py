"""Provides a process's ranks, device, seeds, clock and log.

Only this module starts torch.distributed. Everything works the same with one process (world size 1, no process group)
and under torchrun (NCCL between CUDA devices, gloo between hosts).
"""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TextIO

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel

from golf.config.knobs import ConfigError, naming
from golf.config.run import RunConfig

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


class Log:
    """Prints lines to the terminal, with marks for what its encoding lacks, and, once a file is attached, to it too."""

    def __init__(self, terminal: TextIO | None = None):
        self.terminal = terminal or sys.stdout
        if hasattr(self.terminal, "reconfigure"):
            self.terminal.reconfigure(errors="replace")
        self.file: TextIO | None = None

    def attach(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def error(self, text: str) -> None:
        """Prints a line to stderr, and to the file too."""
        print(text, file=sys.stderr, flush=True)
        if self.file:
            with contextlib.suppress(OSError):  # the error reported may be a full disk
                print(text, file=self.file, flush=True)

    def line(self, text: str) -> None:
        for file in filter(None, (self.terminal, self.file)):
            with naming(getattr(file, "name", "standard output")):
                print(text, file=file, flush=True)


@dataclass(frozen=True)
class Runtime:
    """Describes where this process computes, and exchanges numbers with the other ranks."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    log: Log = field(default_factory=Log)
    compiles: bool = False
    """Whether the training step is compiled by torch.compile."""
    compile_fault: str = ""
    """Why it is not, where compile=auto asked for it."""
    store: dist.Store | None = None
    """Numbers that all ranks can add to; None for one rank."""

    @property
    def compiles_scoring(self) -> bool:
        """Returns whether to compile the scorer: not on a CPU, where compiling takes longer (14 s) than a small score
        (7 s)."""
        return self.compiles and self.device.type == "cuda"

    @property
    def nondeterminism(self) -> str:
        """Returns why two runs of the same steps may end in different bytes; empty where they end in the same."""
        return "CUDA sums gradients of embeddings and attention in any order" if self.device.type == "cuda" else ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of activations: bf16 on CUDA, fp32 on CPU (where bf16 has 0.5 to 0.65 times the speed)."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over all ranks, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def values_of_ranks(self, *values: float) -> list[list[float]]:
        """Returns each value on every rank, by one message between the hosts, which waits for no device."""
        table_VR = torch.zeros(len(values), self.world_size, dtype=torch.float64)
        table_VR[:, self.rank] = torch.tensor(values, dtype=torch.float64)
        return self.sum_over_ranks(table_VR).tolist()

    def max_over_ranks(self, *values: float) -> list[float]:
        """Returns the largest of each value over all ranks, in one message."""
        return [max(row) for row in self.values_of_ranks(*values)]

    def barrier(self) -> None:
        self.max_over_ranks(0.0)

    def text_of_main(self, text: str) -> str:
        """Returns the main rank's `text` on every rank."""
        data = text.encode() if self.is_main else b""
        size = int(*self.max_over_ranks(len(data)))
        return bytes(map(int, self.max_over_ranks(*data.ljust(size, b"\0")))).decode()

    def synchronize(self) -> None:
        """Waits until the device has finished its queued work, so that a clock reading means something."""
        torch.get_device_module(self.device).synchronize(self.device)

    def print(self, line: str) -> None:
        """Writes one line to the log (main rank only)."""
        if self.is_main:
            self.log.line(line)


def choose_device(wanted: str) -> torch.device:
    """Returns the device that was asked for; `auto` is CUDA where there is one. Raises ConfigError, never falls
    back."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("device=cuda was asked for, but torch sees no CUDA device: set device=cpu or mend the driver")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def explain_compile_error(error: Exception) -> str:
    """Returns the one line of many that says why torch.compile failed."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


@functools.cache
def compile_fault(device: torch.device) -> str:
    """Returns why torch.compile can't work here, from a trial, and nothing where it can.

    A mark beside what torch compiles tells other processes of a success; failures are tried again, since what they
    lacked (a header, say) may have come.
    """
    names = "g++", "clang++", "c++", "gcc", "clang", "cc", os.environ.get("CXX", ""), os.environ.get("CC", "")
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        return "no C++ compiler was found"
    identity = repr((device.type, torch.__version__, sys.version, [(path, os.stat(path).st_mtime) for path in paths]))
    key = hashlib.sha256(identity.encode()).hexdigest()[:8]
    mark = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(), f"golf_compiles_{key}")
    try:
        if not mark.exists():
            # The key is in the code, so that torch does not take what another compiler made from its cache.
            torch.compile(lambda x: x + int(key, 16), dynamic=False, fullgraph=True)(torch.ones(8, device=device))
            mark.touch()
    except (RuntimeError, ImportError, OSError) as error:
        return explain_compile_error(error)
    return ""


def choose_compile(wanted: str, device: torch.device) -> bool:
    """Returns whether to use torch.compile (1.3 to 1.5 times as fast on a CPU). Raises ConfigError where it can't."""
    fault = compile_fault(device) if wanted != "off" else ""
    if wanted == "on" and fault:
        needs = "a C++ compiler with OpenMP, and Python's headers (on Debian g++ and python3-dev)"
        raise ConfigError(f"compile=on: torch.compile fails here ({fault}): install {needs}, or set compile=off")
    return wanted != "off" and not fault


def check_kernels(wanted: str, device: torch.device) -> None:
    """Raises ConfigError where kernels were asked for (golf/model/fused.py) and can't run."""
    if wanted == "on" and device.type != "cuda":
        raise ConfigError("kernels=on: they run on CUDA alone, and this run is on a CPU: set kernels=off")
    if device.type == "cuda" and not find_spec("triton"):
        raise ConfigError(f"kernels={wanted}: the triton package is not installed: install it, or set kernels=off")


@contextlib.contextmanager
def start_runtime(run: RunConfig, stage: str, log: Log | None = None) -> Iterator[Runtime]:
    """Sets up device, threads, seeds and (under torchrun) the process group of one `stage`.

    Stages of one job share torchrun's key store. The stage's name keeps their keys apart, because a process that
    replaced itself for the next stage must not read addresses that the previous stage left.
    """
    device = choose_device(run.device)
    if run.kernels != "off":
        check_kernels(run.kernels, device)
    compiles = choose_compile(run.compile, device)
    fault = compile_fault(device) if run.compile == "auto" else ""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    # Without this the compiled gradients of embeddings are sums of atomic additions, in the order of the threads' race.
    torch.use_deterministic_algorithms(device.type == "cpu")
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = None
    if world_size > 1:
        store, rank, world_size = next(rendezvous("env://", rank, world_size))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore(stage, store)
        # Long enough for the main rank to prepare a corpus while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=2), world_size=world_size, rank=rank, store=store)
    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if run.attention_kernels == "cudnn" else contextlib.nullcontext():
        yield Runtime(device, rank, world_size, log or Log(), compiles, fault, store)
    if world_size > 1:  # not after an error: the others may be waiting for this rank, and torchrun ends them
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process with `status`.

    One of several ends without Python's own tidying, in which a process that had done its work was seen to abort
    ("terminate called without an active exception": a thread of the process group wants Python's lock and finds it
    gone), and torchrun called the run failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def flush_to_disk(path: Path) -> None:
    """Syncs a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write beside `path`, and moves it to `path` once it is on the disk: readers never see a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)  # the new name
    finally:
        temporary.unlink(missing_ok=True)


def write_file_atomically(path: Path, data: bytes | str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def file_sha256(path: Path) -> str:
    """Returns SHA-256 as 64 hex digits, in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class ProgressLine:
    """Rewrites one line on a terminal, at most ten times a second; does nothing where there is no terminal."""

    def __init__(self, shown: bool, now=time.monotonic):
        self.shown = shown and sys.stderr.isatty()
        self.now, self.last = now, float("-inf")

    def update(self, text: str) -> None:
        if self.shown and self.now() - self.last > 0.1:
            self.last = self.now()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Stopwatch:
    """Measures time only between start and stop, on a monotonic clock; `now` is injectable for tests."""

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.total = 0.0
        self.started: float | None = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        assert self.started is None
        self.started = self.now()

    def stop(self) -> None:
        assert self.started is not None
        self.total += self.now() - self.started
        self.started = None

    @property
    def seconds(self) -> float:
        return self.total + (self.now() - self.started if self.started is not None else 0.0)
