"""Makes torch and Triton believe that an H100 is there, for generating its code on a machine without a GPU.

What is changed stays changed, so a process that called `pretend` generates code and does nothing else. It has to be
called before torch's compiler is imported, which keeps what torch.cuda is at that time. Needs the `triton` package.
"""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from golf.config.knobs import UserError

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65_536, shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472, clock_rate=1_755_000, memory_clock_rate=2_619_000,
    memory_bus_width=5120, gcnArchName="",
)  # fmt: skip
"""What torch.cuda.get_device_properties says of one."""
GPU = torch.device("cuda:0")


class NoTriton(UserError):
    """Reports that the package which generates GPU code is not installed."""


class TritonDriver:
    """Stands where Triton's driver asks a device what it is."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: dict(
            max_shared_mem=232_448, max_num_regs=65_536, multiprocessor_count=132, warpSize=32,
            sm_clock_rate=1_755_000, mem_clock_rate=2_619_000, mem_bus_width=5120,
        )
    )  # fmt: skip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> None:
        return None


def pretend() -> None:
    """Makes this process generate code for an H100. Raises NoTriton."""
    if not find_spec("triton"):
        raise NoTriton("generating GPU code needs the triton package: pip install --no-deps triton==3.7.1")
    import triton

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: H100
    torch.cuda.get_device_capability = lambda device=None: (H100.major, H100.minor)
    torch.cuda.get_device_name = lambda device=None: H100.name
    torch.cuda._lazy_init = lambda: None
    torch.cuda.synchronize = lambda device=None: None
    torch.version.cuda = "13.0"
    import torch._inductor.scheduler as scheduler  # keeps what torch.cuda says when it is imported
    import torch.utils._triton as triton_probe

    triton_probe.has_triton = triton_probe.has_triton_package = scheduler.has_triton = lambda: True
    triton.runtime.driver.set_active(TritonDriver())
