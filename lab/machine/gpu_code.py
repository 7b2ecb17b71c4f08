"""Generates the code that torch.compile would run on a GPU, from fake tensors: shapes and a device, but no data.

The process must pretend to have one (lab/machine/fake_gpu.py) before this is imported.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from lab.machine.fake_gpu import GPU


def on_gpu(value: Any, mode: FakeTensorMode) -> Any:
    """Returns a fake tensor's twin on the GPU that is not there, and anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(mode, meta, GPU)


def module_on_gpu(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replaces the parameters of a module by fake ones on the GPU; returns it."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on_gpu(parameter.data, mode))
    return module


Graph = tuple[torch.fx.GraphModule, list[Any]]
"""A captured graph and its inputs."""


def capture_graphs(make_function: Callable[[], Callable], make_inputs: Callable[[], tuple]) -> dict[str, Graph]:
    """Returns the graphs of one call, "forward" and "backward" where it gives a loss that has a gradient, else
    "inference". Both arguments are called under fake tensors; the capture itself is on the CPU."""
    captured: dict[str, Graph] = {}

    def keep(name: str) -> Callable:
        def compiler(graph: torch.fx.GraphModule, inputs: list, **_: Any) -> Callable:
            captured[name] = graph, list(inputs)
            return make_boxed_func(graph.forward)

        return compiler

    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    torch._dynamo.reset()
    with FakeTensorMode():
        backend = aot_autograd(
            fw_compiler=keep("forward"), bw_compiler=keep("backward"), inference_compiler=keep("inference"),
            decompositions=select_decomp_table(),
            partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        )  # fmt: skip
        result = torch.compile(make_function(), backend=backend, dynamic=False, fullgraph=True)(*make_inputs())
        if result.requires_grad:
            result.backward()
    torch.cuda.is_available = available
    return captured


def generate_code(graph: torch.fx.GraphModule, inputs: list, is_backward: bool) -> tuple[str, list[tuple[Any, int]]]:
    """Returns Inductor's program for the GPU, and (node of its schedule, bytes that it reads and writes) for each."""
    mode = FakeTensorMode()
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
        node.args = torch.fx.node.map_aggregate(node.args, lambda a: GPU if isinstance(a, torch.device) else a)
        if "val" in node.meta:
            node.meta["val"] = tree_map(lambda value: on_gpu(value, mode), node.meta["val"])
    graph.recompile()
    fakes = [on_gpu(value, mode) for value in inputs]
    settings = {"triton.autotune_at_compile_time": False, "fx_graph_cache": False, "compile_threads": 1}
    with V.set_fake_mode(mode), inductor_config.patch(settings):
        lowering = GraphLowering(graph, example_inputs=fakes, is_backward=is_backward)
        with V.set_graph_handler(lowering), DebugContext():
            lowering.run(*fakes)
            wrapper, _ = lowering.codegen()
            _, sizes, _ = lowering.count_bytes()
    return wrapper.value, [(node, 4 * words) for node, words in sizes]
