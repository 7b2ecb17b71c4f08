"""Forecasts a training step on an H100 without one: counts what a step launches, reads, writes and computes.

The counts are of the code that Inductor generates for the device, and of the optimizers' calls on fake tensors; the
milliseconds are modelled from them with the rates below, which no machine of ours has shown.

B rows, T tokens of a row, M matrices of a shape, R rows, C columns.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import golf.model.gpt
import golf.optim.optimizers
import golf.quant.site_operator
from golf.config.config import Config
from golf.model.fused import install_fused
from golf.model.gpt import GPT
from golf.model.recurrence import layer_order
from golf.optim.optimizers import Optimizers, clip_gradients, orthogonal_updates
from golf.quant.qat import install_activation_quantizers, install_fake_quantization
from golf.run.trainer import count_micro_steps
from golf.runtime import Runtime
from lab.machine.fake_gpu import GPU
from lab.machine.gpu_code import Graph, capture_graphs, generate_code, module_on_gpu, on_gpu
from lab.machine.gpu_flops import own_flops, product_flops
from lab.machine.gpu_memory import Memory, memory_text, step_memory

MATRIX_FLOPS, MEMORY_BYTES, LINK_BYTES = 520e12, 2.5e12, 300e9
"""Assumed rates: of the large products (989e12 is the device's limit in bf16), of memory (limit 3.35e12), of a ring
over NVLink."""
ATTENTION_FLOPS = {"torch": 250e12, "cudnn": 400e12}
"""Assumed rates of attention at heads of 64: of FlashAttention 2, of cuDNN's kernels."""
LAUNCH_SECONDS, HOST_SECONDS = 3e-6, 15e-6
"""Least time of a kernel on the device, and assumed time of the host to launch one: it runs a step ahead, so that the
device waits only where launching takes longer than the kernels."""
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 1, 3
"""Kernels of a layer's attention."""
TENSORS_OF_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_OF_LAUNCH, CHUNK = 320, 65_536
"""Most tensors by lists, and blocks, of one launch over lists of tensors (ATen's MultiTensorApply.cuh)."""
INPUTS_OF_CONCATENATION = 128
OWN_KERNELS = ("golf.mlp_hidden", "golf.exclusive_heads")
"""How the names of the operators of golf/model/kernels.py begin; each is a launch."""
POWERS_AND_SINES = re.compile(r"(?:libdevice|tl_math)\.(pow|cos|sin)\(")
FREE = re.compile(
    r"(view|detach|alias|empty|new_empty|empty_like|unbind|split\w*|select|slice|t|transpose|permute|expand|unsqueeze|"
    r"squeeze|as_strided|_reshape_alias|lift_fresh)\."
)
"""Operators of ATen that launch nothing."""


@dataclass(frozen=True)
class Part:
    """What a part of a step costs on one GPU."""

    name: str
    launches: int
    gigabytes: float
    teraflops: float
    modelled_ms: float


@dataclass(frozen=True)
class Forecast:
    """A step by its parts, and what else was counted in its code."""

    preset: str
    world_size: int
    micro_steps: int
    parts: list[Part]
    powers_and_sines: int
    mask_elements: int
    """Of the attention mask that a layer reads."""
    memory: Memory
    programs: list[str] = field(default_factory=list, repr=False)
    """What Inductor generated: the forward pass, the backward pass."""

    @property
    def modelled_ms(self) -> float:
        return sum(part.modelled_ms for part in self.parts)

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.parts)


# ---- the graph: forward and backward of a micro step ----


@torch.library.custom_op("golf_forecast::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Stands for a library's kernel."""
    return attention_shape(q, k, v)


@attention.register_fake
def attention_shape(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    return q.new_empty(q.size(0), q.size(2), q.size(1), q.size(3)).transpose(1, 2)


@torch.library.custom_op("golf_forecast::attention_backward", mutates_args=())
def attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for a library's kernels."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@attention_backward.register_fake
def attention_backward_shape(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_autograd(
    lambda ctx, g: (*attention_backward(g, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)


def capture_step(config: Config, micro_steps: int, world_size: int) -> dict[str, Graph]:
    """Returns the graphs of a micro step of training, as the trainer compiles it on CUDA."""
    model_config = config.model
    rows = config.train.train_batch_tokens // model_config.train_seq_len // world_size // micro_steps

    def model() -> nn.Module:
        made = install_activation_quantizers(GPT(model_config, torch.bfloat16))
        made.keep_rotary(model_config.train_seq_len)
        if config.run.kernels != "off":
            install_fused(made)
        if config.quant.qat_enabled:
            install_fake_quantization(made, config.quant)
        return made

    def batch() -> tuple[Tensor, Tensor]:
        ids_BT = torch.zeros(rows, model_config.train_seq_len, dtype=torch.int64)
        return ids_BT, ids_BT

    on_cuda = dict(causal_attention=attention, flash_runs=lambda device, dtype: True)
    with mock.patch.multiple(golf.model.gpt, **on_cuda):
        return capture_graphs(model, batch)


def graph_parts(config: Config, micro_steps: int, world_size: int) -> tuple[list[Part], list[str], int, Memory]:
    """Returns the parts of all micro steps of a step, the generated programs, the elements of a mask, and memory."""
    launches, moved, programs, own = Counter(), Counter(), [], []
    graphs = capture_step(config, micro_steps, world_size)
    documents = config.model.document_attention
    flops = [product_flops(graph, documents) for graph, _ in graphs.values()]  # before they are lowered
    mask = max((masks(graph) for graph, _ in graphs.values()), default=0)
    sites = site_part([graph for graph, _ in graphs.values()], micro_steps)
    for name, (graph, inputs) in graphs.items():
        code, sizes = generate_code(graph, inputs, name == "backward")
        launches["generated"] += len(re.findall(r"\.run\(", code))
        launches["products"] += len(re.findall(r"extern_kernels\.\w+\(", code))
        programs.append(code)
        for node, size in sizes:
            kind = type(node.node).__name__
            operator = str(getattr(node.node, "op_overload", ""))
            if operator.startswith("golf.site"):
                continue  # counted by what it launches
            if operator.startswith(OWN_KERNELS):
                own.append(part(operator, micro_steps, micro_steps * size, micro_steps * own_flops(node.node)))
                continue
            moved[{"ExternKernelOut": "products", "FallbackKernel": "attention"}.get(kind, "generated")] += size
    products, attended = (micro_steps * sum(part) for part in zip(*flops, strict=True))
    rate = ATTENTION_FLOPS[config.run.attention_kernels]
    calls = micro_steps * len(layer_order(config.model)) * (FORWARD_LAUNCHES + BACKWARD_LAUNCHES)
    parts = [
        part("matrix products", micro_steps * launches["products"], micro_steps * moved["products"], products),
        part("attention", calls, micro_steps * moved["attention"], attended, rate),
        part("generated kernels", micro_steps * launches["generated"], micro_steps * moved["generated"]),
        summed("own kernels", own),
        sites,
    ]
    return parts, programs, mask, step_memory(config, programs, graphs["forward"][1])


def summed(name: str, parts: list[Part]) -> Part:
    """Returns the sum of parts that wait for each other."""
    keys = "launches", "gigabytes", "teraflops", "modelled_ms"
    return Part(name, *(sum(getattr(one, key) for one in parts) for key in keys))


def site_part(graphs: list[torch.fx.GraphModule], micro_steps: int) -> Part:
    """Returns what the operators of weights' and activations' own quantizers launch on the device."""
    counter, mode = LaunchCounter(), FakeTensorMode()

    def one_kernel(x: Tensor, site: Any, activation: bool, basis: Tensor | None = None, g: Tensor | None = None) -> Any:
        counter.launches += 1
        counter.moved += (2 + (g is not None)) * x.numel() * x.element_size()
        return x if g is None else torch.detach(x)

    with mode, mock.patch.object(golf.quant.site_operator, "site_rows", one_kernel):
        for node in (node for graph in graphs for node in graph.graph.nodes):
            name = str(node.target).split(".")[:2]
            if name[0] == "golf" and (operator := getattr(golf.quant.site_operator, name[1], None)):
                given = torch.fx.node.map_arg(node.args, lambda n: on_gpu(n.meta["val"], mode))
                with counter:
                    operator._init_fn(*given)
    return part("site quantizers", micro_steps * counter.launches, micro_steps * counter.moved)


def masks(graph: torch.fx.GraphModule) -> int:
    """Returns the elements of the attention mask that a graph's first layer reads."""
    for node in graph.graph.nodes:
        if str(node.target).startswith("golf_forecast.attention.") and len(node.args) > 3 and node.args[3] is not None:
            return node.args[3].meta["val"].numel()
    return 0


def part(name: str, launches: int, moved: float, flops: float = 0.0, rate: float = MATRIX_FLOPS) -> Part:
    """Returns a part whose time is the longest of its operations, its bytes and its launches."""
    seconds = max(flops / rate, moved / MEMORY_BYTES, launches * LAUNCH_SECONDS)
    return Part(name, launches, moved / 1e9, flops / 1e12, 1000 * seconds)


# ---- what runs between the graphs ----


class LaunchCounter(TorchDispatchMode):
    """Counts the kernels that the operators of eager code launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.moved = 0, 0

    def __call__(self, function: Callable) -> Callable:
        """Returns a function whose kernels are counted."""

        def counted(*given: Any) -> Any:
            with self:
                return function(*given)

        return counted

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function).partition(".")[2]
        unknown = name.startswith("_fused_sgd_")  # it has no form for fake tensors
        result = None if unknown else function(*args, **(kwargs or {}))
        if str(function).startswith(("aten.", "c10d.")) and not FREE.match(name):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
            written = [t for t in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(t, Tensor)]
            self.launches += launches_of(name, lists)
            self.moved += sum(t.numel() * t.element_size() for t in [*tensors, *(written or tensors[:1])])
        return result


def launches_of(name: str, lists: list[list[Tensor]]) -> int:
    """Returns how many kernels an operator launches."""
    if name.startswith("cat.") or name.startswith("stack."):
        return math.ceil(len(lists[0]) / INPUTS_OF_CONCATENATION)
    if name.startswith(("_foreach", "_fused")) and lists:
        blocks = sum(math.ceil(tensor.numel() / CHUNK) for tensor in lists[0])
        by_tensors = math.ceil(len(lists[0]) / TENSORS_OF_LAUNCH[min(len(lists), 5)])
        return max(by_tensors, math.ceil(blocks / BLOCKS_OF_LAUNCH)) + name.startswith("_foreach_norm")
    return 2 if name.startswith("constant_pad") else 1


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """Lets this process be the first of several that are not there."""
    if world_size > 1:
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    yield
    if world_size > 1:
        dist.destroy_process_group()


def update_parts(config: Config, world_size: int) -> list[Part]:
    """Returns fake quantization, the reduction of the gradients, clipping and the optimizers, of one step."""
    mode, compiled, sent = FakeTensorMode(allow_non_fake_inputs=True), [], []
    with torch.device("meta"):
        model = GPT(config.model, torch.bfloat16)
    model = module_on_gpu(model, mode)

    def clip(gradients_KN: Tensor, most: float) -> Tensor:
        compiled.append((clip_gradients, (gradients_KN, most)))
        return gradients_KN.new_empty(())

    def update(
        stacks: list[tuple[list[Tensor], Tensor, Tensor]], momentum: Tensor, optim: Any, padding_N: Tensor
    ) -> Tensor:
        compiled.append((orthogonal_updates, (stacks, momentum, optim, padding_N)))
        sent.append(padding_N.new_empty(len(padding_N) + sum(part.numel() for own, *_ in stacks for part in own)))
        return sent[-1]

    patches = mock.patch.multiple(golf.optim.optimizers, clip_gradients=clip, orthogonal_updates=update)
    with mode, fake_group(world_size), patches:
        grids = install_fake_quantization(model, config.quant)[1] if config.quant.qat_enabled else None
        optimizers = Optimizers(model, config.optim, Runtime(GPU, 0, world_size))
        for _ in range(2):  # the first step makes the state
            for parameter in optimizers.parameters:
                parameter.grad = torch.empty_like(parameter)
            compiled.clear()
            reduction = LaunchCounter()
            counted = mock.patch.object(optimizers, "sum_gradients", reduction(optimizers.sum_gradients))
            with counted, LaunchCounter() as whole:  # which counts the reduction too
                optimizers.step(0.5, 1.0)
    ring = 1000 * (world_size - 1) / LINK_BYTES  # milliseconds for a byte of each rank to reach all others
    summed = part("gradient reduction", reduction.launches, reduction.moved)
    graphs = [compiled_part(*call) for call in compiled]
    updated = part(
        "clipping and optimizers", whole.launches - reduction.launches + sum(graph.launches for graph in graphs),
        whole.moved - reduction.moved + 1e9 * sum(graph.gigabytes for graph in graphs),
        1e12 * sum(graph.teraflops for graph in graphs),
    )  # fmt: skip
    return [
        quantization_part(grids),
        on_wire(summed, 2 * ring * 4 * optimizers.message_N.numel() / world_size),
        on_wire(updated, ring * sent[-1].numel() * sent[-1].element_size()),
    ]


def on_wire(computed: Part, milliseconds: float) -> Part:
    """Returns a part that waits for a message as well."""
    return replace(computed, modelled_ms=computed.modelled_ms + milliseconds)


def quantization_part(grids: Any) -> Part:
    """Returns what putting all matrices on their grids costs: one kernel for each dtype of values."""
    pairs = list(zip(grids.weights, grids.values, strict=True)) if grids else []
    moved = sum(weight.numel() * (weight.element_size() + kept.element_size()) for weight, kept in pairs)
    return part("fake quantization", len({kept.dtype for _, kept in pairs}), moved)


def compiled_part(function: Callable, given: tuple) -> Part:
    """Returns what a function that is compiled on CUDA costs for inputs like these."""

    def inputs() -> tuple:
        return tree_map(lambda v: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, Tensor) else v, given)

    graph, flat = capture_graphs(lambda: function, inputs)["inference"]
    flops = product_flops(graph)[0]
    code, sizes = generate_code(graph, flat, False)
    launches = len(re.findall(r"\.run\(|extern_kernels\.\w+\(", code))
    return part(function.__name__, launches, sum(size for _, size in sizes), flops)


def forecast_step(config: Config, world_size: int) -> Forecast:
    """Returns the forecast of a step after warm-up, with the features of the whole recipe on. The process must pretend
    to have a GPU (lab/machine/fake_gpu.py). Raises ConfigError where the batch can't be dealt to the GPUs."""
    micro_steps = count_micro_steps(config, world_size)
    parts, programs, mask, memory = graph_parts(config, micro_steps, world_size)
    sines = sum(len(POWERS_AND_SINES.findall(program)) for program in programs)
    parts += update_parts(config, world_size)
    launching = 1000 * HOST_SECONDS * sum(part.launches for part in parts)
    waiting = max(0.0, launching - sum(part.modelled_ms for part in parts))
    parts.append(Part("host", 0, 0.0, 0.0, waiting))
    return Forecast(config.run.preset, world_size, micro_steps, parts, sines, mask, memory, programs)


def forecast_table(forecast: Forecast) -> str:
    """Returns a forecast as text."""
    gpus, micro = f"{forecast.world_size} x H100", f"{forecast.micro_steps} forward passes"
    lines = [f"modelled: a step of {forecast.preset} on {gpus}, {micro} on each"]
    lines += [f"{'part':26}{'launches':>9}{'GB':>8}{'TFLOP':>8}{'ms':>8}"]
    lines += [
        f"{part.name:26}{part.launches:9,}{part.gigabytes:8.2f}{part.teraflops:8.2f}{part.modelled_ms:8.2f}"
        for part in forecast.parts
    ]
    lines.append(f"{'step':26}{forecast.launches:9,}{'':16}{forecast.modelled_ms:8.2f}")
    lines.append(f"powers, sines, cosines: {forecast.powers_and_sines}; attention mask: {forecast.mask_elements:,}")
    return "\n".join([*lines, memory_text(forecast.memory)])
