"""Counts the memory of a training step on a GPU without one: what stays, what the forward pass saves, and the peak.

What the two passes hold is counted by running the programs that Inductor generated on tensors without data: they
allocate, reuse and free as they would there, so what the compiler recomputes and what it fuses away does not count.
The allocator's fragments, CUDA's own half gigabyte and the libraries' workspaces are not in it.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from golf.config.config import Config
from golf.model.gpt import GPT
from golf.optim.optimizers import Muon, Optimizers
from golf.runtime import Runtime
from lab.machine.fake_gpu import GPU
from lab.machine.gpu_code import module_on_gpu

RUNNER = re.compile(r"^class Runner:.*?(?=^runner = )", re.DOTALL | re.MULTILINE)
KERNELS = re.compile(r"(\w+)\.run\(")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parameters: int
    optimizers: int
    """Momentum and AdamW's means."""
    message: int
    """The gradients of all parameters in one tensor, as they are summed over ranks."""
    average: int
    saved: int
    """What the forward pass leaves for the backward pass, of one micro step."""
    forward_peak: int
    backward_peak: int
    """Most that a pass holds at once, gradients that come out of it included."""

    @property
    def standing(self) -> int:
        return self.parameters + self.optimizers + self.message + self.average

    @property
    def peak(self) -> int:
        return self.standing + max(self.forward_peak, self.backward_peak)


class AllocationCounter:
    """Allocates tensors without data, and knows how many bytes of them are held."""

    def __init__(self) -> None:
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def note(self, tensor: Any) -> Any:
        """Counts a new tensor's storage; returns the tensor."""
        if isinstance(tensor, (tuple, list)):
            return type(tensor)(map(self.note, tensor))
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            self.held[StorageWeakRef(storage)] = storage.nbytes()
            self.peak = max(self.peak, self.bytes_held())
        return tensor

    def allocate(self, shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
        return self.note(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def bytes_held(self) -> int:
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        return sum(self.held.values())

    def operators(self, name: str) -> Any:
        """Returns a stand-in for torch.ops.<name> whose operators' results are counted."""
        return Operators(getattr(torch.ops, name), self.note)


class Operators:
    """Calls an operator of a library on tensors without data, and hands on its results."""

    def __init__(self, real: Any, note: Callable):
        self.real, self.note = real, note

    def __getattr__(self, name: str) -> "Operators":
        return Operators(getattr(self.real, name), self.note)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.note(self.real(*given, **named))


def run_program(program: str, given: list[Tensor], counter: AllocationCounter) -> tuple:
    """Runs what Inductor generated, without its kernels; `given` is emptied, as the program does."""
    libraries = SimpleNamespace(**{name: counter.operators(name) for name in ("aten", "golf", "golf_forecast")})
    stand_ins = SimpleNamespace(
        cuda=SimpleNamespace(_DeviceGuard=lambda index: nullcontext(), set_device=lambda index: None),
        ops=libraries, **{name: getattr(torch, name) for name in ("bfloat16", "float32", "bool", "int64", "int32")},
    )  # fmt: skip
    silent = SimpleNamespace(run=lambda *a, **k: None)
    names = {name: silent for name in KERNELS.findall(program)}
    names |= dict(
        torch=stand_ins, aten=libraries.aten, empty_strided_cuda=counter.allocate, get_raw_stream=lambda index: None,
        extern_kernels=Silence(), assert_size_stride=check_shape, assert_alignment=lambda *a: None,
        reinterpret_tensor=reinterpret, device=torch.device,
    )  # fmt: skip
    exec(RUNNER.search(program).group(), names)
    return names["Runner"]([]).call(given)


class Silence:
    """Stands for a library of products that write into a tensor that they are given."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *given, out: out


def reinterpret(tensor: Tensor, shape: tuple, stride: tuple, offset: int) -> Tensor:
    return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)


def check_shape(tensor: Tensor, shape: tuple, *rest: Any) -> None:
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)


def without_data(inputs: list[Any]) -> list[Any]:
    return [
        torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
        for x in inputs
    ]


def passes_memory(programs: list[str], inputs: list[Any]) -> tuple[int, int, int]:
    """Returns bytes saved between the forward and the backward pass, and the peak of each."""
    counter = AllocationCounter()
    forward, backward = programs
    loss, *saved = run_program(forward, without_data(inputs), counter)
    forward_peak, counter.peak = counter.peak, 0
    left = counter.bytes_held()
    given = [*saved, torch.empty_like(loss)]
    del saved, loss
    gradients = run_program(backward, given, counter)
    del gradients
    return left, forward_peak, counter.peak


def step_memory(config: Config, programs: list[str], inputs: list[Any]) -> Memory:
    """Returns the memory of a step whose two passes are `programs`, the first of which takes `inputs`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = GPT(config.model, torch.bfloat16)
    model = module_on_gpu(model, mode)
    with mode:
        optimizers = Optimizers(model, config.optim, Runtime(GPU))
    parameters = sum(part.nbytes for part in model.parameters())
    trained = {id(part): part.nbytes for part in optimizers.parameters}
    by_muon = [optimizer for optimizer in optimizers.all if isinstance(optimizer, Muon)]
    momenta = [(momentum_MRC, own) for muon in by_muon for own, momentum_MRC, _ in muon.stacks]
    means = 2 * (sum(trained.values()) - sum(trained[id(part)] for _, own in momenta for part in own))
    averages = config.average.swa_enabled or config.average.ema_fraction > 0
    return Memory(
        parameters, means + sum(momentum_MRC.nbytes for momentum_MRC, _ in momenta), optimizers.gradients_KN.nbytes,
        averages * parameters, *passes_memory(programs, inputs),
    )  # fmt: skip


def memory_text(memory: Memory) -> str:
    """Returns a line on the memory of one GPU."""
    gigabytes = {name: value / 1e9 for name, value in vars(memory).items()}
    return (
        "memory of a GPU, GB: {parameters:.2f} parameters, {optimizers:.2f} optimizers, {message:.2f} message, "
        "{average:.2f} average; saved by a forward pass {saved:.2f}, held at most in it {forward_peak:.2f}, in the "
        "backward pass {backward_peak:.2f}; ".format(**gigabytes)
        + f"together at most {memory.peak / 1e9:.2f}"
    )
