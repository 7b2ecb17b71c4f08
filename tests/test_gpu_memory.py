"""Memory of a step that is counted without data equals what tensors with data hold."""

import functools
import subprocess
import sys
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import golf.model.gpt
from golf.config.config import Config, build_config
from golf.model.gpt import GPT
from lab.machine.gpu_forecast import attention, capture_step
from lab.machine.gpu_memory import AllocationCounter, Memory, memory_text, run_program

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
TOY = dict(
    vocab_size="256", model_dim="64", train_seq_len="64", short_seq_len="0", short_seq_fraction="0",
    middle_seq_len="0", middle_seq_fraction="0", seq_rewarmup_fraction="0", eval_seq_len="64", rope_dims="8",
    train_batch_tokens="512", micro_batch_tokens="512", document_attention="0", num_layers="6", loop_first="2",
    loop_last="3", loop_repeats="2", lanes_from="4", kernels="off",
)  # fmt: skip


def toy() -> Config:
    return build_config("frontier-base", {}, TOY)


def storage_bytes(tensors: list[Tensor]) -> int:
    return sum({part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in tensors}.values())


def really_saved(config: Config) -> int:
    """Bytes that autograd keeps between the passes, with the compiler's rules of what to compute again."""
    model = GPT(config.model, torch.bfloat16)
    model.keep_rotary(config.model.train_seq_len)
    ids_BT = torch.randint(2, 256, (8, 64))
    own = {part.untyped_storage()._cdata for part in [*model.parameters(), ids_BT, *sum(model.rotary.values(), ())]}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.append(tensor)
        return tensor

    def as_it_is(graph: torch.fx.GraphModule, inputs: list, **_: object) -> object:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=as_it_is, bw_compiler=as_it_is, decompositions=select_decomp_table(),
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
    )  # fmt: skip
    torch._dynamo.reset()
    with (
        mock.patch.multiple(golf.model.gpt, causal_attention=attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(ids_BT, ids_BT)
    return storage_bytes(kept)


def counted_saved(config: Config) -> int:
    """The same of the graph that the forecast captures from fake tensors."""
    graph, _ = capture_step(config, 1, 1)["forward"]
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    kept = [node.meta["val"] for node in result.all_input_nodes if node.op != "placeholder"]
    return storage_bytes([value for value in kept if isinstance(value, Tensor) and value.dim()])


def test_what_the_graph_saves_is_what_autograd_keeps():
    found = counted_saved(toy())
    assert found == really_saved(toy()) > 512 * 64 * 2 * 50


PROGRAM = """
class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def call(self, args):
        primals_1, = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            buf0 = empty_strided_cuda((4, 8), (8, 1), torch.float32)
            kernel_0.run(primals_1, buf0, stream=None)
            buf1 = empty_strided_cuda((4, 8), (8, 1), torch.bfloat16)
            kernel_1.run(buf0, buf1, stream=None)
            buf2 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0  # reuse
            buf3 = torch.ops.aten.sort.default(buf2)
            buf4 = buf3[0]
            del buf3
            del buf2
        return (buf4, buf1, )

runner = Runner(partitions=[])
"""


def test_a_program_holds_what_it_has_not_freed():
    """128 and 64 bytes; then sorted values of 128 and their places of 256, which are dropped with the first ones."""
    counter, given = AllocationCounter(), [torch.empty(4, 8, device="meta")]
    values, kept = run_program(PROGRAM, given, counter)
    assert not given and values.shape == (8, 4) and kept.dtype is torch.bfloat16
    assert counter.peak == 128 + 64 + 128 + 256 and counter.bytes_held() == 128 + 64
    del kept
    assert counter.bytes_held() == 128


FORECAST = """
import sys
from lab.machine.fake_gpu import pretend
pretend()
from golf.config.config import build_config
from lab.machine.gpu_forecast import forecast_step
from lab.machine.gpu_memory import memory_text
memory = forecast_step(build_config("frontier-base", {}, dict(word.split("=") for word in sys.argv[1:])), 1).memory
print(memory.saved, memory.standing, memory.peak)
"""


@needs_triton
@pytest.mark.slow
def test_the_generated_programs_keep_what_the_graph_saves(repository):
    words = [f"{knob}={value}" for knob, value in TOY.items()]
    command = [sys.executable, "-c", FORECAST, *words]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert finished.returncode == 0, finished.stderr
    saved, standing, peak = map(int, finished.stdout.split())
    assert saved == pytest.approx(counted_saved(toy()), rel=0.02)
    numbers = sum(part.numel() for part in GPT(toy().model).parameters())
    assert 4 * 4 * numbers < standing < 5.2 * 4 * numbers, "weights, message, average; momentum, or two means"
    assert peak > standing + saved


def test_the_text_has_every_figure():
    memory = Memory(*(int(1e9 * n) for n in (1, 2, 3, 4, 30, 31, 35)))
    assert memory.peak == 45e9
    assert memory_text(memory).endswith("in the backward pass 35.00; together at most 45.00")
