"""Compiles the Triton kernels of Inductor's programs to machine code, and counts instructions and spills.

The ptxas and the disassembler that the triton package brings need no GPU. Counts are static: a loop's body counts once.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import golf.model.kernels
from golf.config.site_quantizers import parse_site
from golf.model.kernels import compiled_kernel
from golf.quant.site_grid import kernel_options, launch_shape, site_row_kernel

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
PRELUDE = (
    "import triton\nimport triton.language as tl\nfrom torch._inductor.runtime import triton_helpers\n"
    "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
)
KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\1', '''(.*?)''', device_str='cuda'\)", re.S | re.M)
SIGNATURE = re.compile(r"'signature': \{(.*?)\}")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", re.M)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", int: "i32", float: "fp32"}
WARPS, POINTWISE_BLOCK, ROWS_OF_PERSISTENT = 8, 1024, 8
OTHER_BLOCKS = {"YBLOCK": 16, "R0_BLOCK": 1024, "RSPLIT_SIZE": 64, "NUM_STAGES": 1}
"""Sizes that all kernels are compiled with, so that their counts compare."""


@dataclass(frozen=True)
class KernelCode:
    """Describes a kernel's machine code."""

    name: str
    instructions: int
    spills: int
    """Loads and stores of registers that did not fit."""
    instructions_per_element: float | None
    """Of a pointwise kernel, whose block has a known number of elements."""


def kernel_codes(program: str) -> list[KernelCode]:
    """Returns the machine code's counts of every kernel in a program."""
    return [count_kernel(name, text) for name, text in KERNEL.findall(program)]


def count_kernel(name: str, text: str) -> KernelCode:
    """Compiles one kernel for an H100 and counts."""
    pointwise = name.startswith("triton_poi_")
    blocks = {"XBLOCK": POINTWISE_BLOCK if pointwise else ROWS_OF_PERSISTENT} | OTHER_BLOCKS
    opcodes = disassemble(name, text, blocks)
    spills = sum(map(is_spill, opcodes))
    lanes = 32 * WARPS
    flat = pointwise and "YBLOCK" not in text
    return KernelCode(name, len(opcodes), spills, len(opcodes) * lanes / POINTWISE_BLOCK if flat else None)


def disassemble(name: str, text: str, blocks: dict[str, int]) -> list[str]:
    """Returns a kernel's opcodes."""
    signature = dict(re.findall(r"'(\w+)': '([^']*)'", SIGNATURE.search(text)[1]))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.py")
        source.write_text(PRELUDE + text[text.index("@triton.jit") :], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return opcodes_of(getattr(module, name), signature, blocks, {"num_warps": WARPS})


def opcodes_of(
    kernel: triton.JITFunction, signature: dict[str, str], fixed: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """Returns the opcodes of a kernel, whose pointers are aligned as torch aligns tensors."""
    return opcodes_in(machine_code(kernel, signature, fixed, options))


def machine_code(
    kernel: triton.JITFunction, signature: dict[str, str], fixed: dict[str, Any], options: dict[str, Any],
    multiples: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """Compiles a kernel for an H100, whose pointers are aligned as torch aligns tensors; `multiples` are multiples of
    16."""
    names = list(signature)
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, key in enumerate(names)
        if signature[key].startswith("*") or key in multiples
    }
    constants = {(names.index(key),): value for key, value in fixed.items() if key in names}
    ast = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)


def opcodes_in(made: Any) -> list[str]:
    """Returns the opcodes of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(made.asm["cubin"])
        finished = subprocess.run([DISASSEMBLER, "-c", binary], capture_output=True, text=True, check=True)
    return [opcode for opcode in INSTRUCTION.findall(finished.stdout) if opcode != "NOP"]


def is_spill(opcode: str) -> bool:
    return opcode.startswith(("STL", "LDL"))


def site_kernel_opcodes(text: str, activation: bool, columns: int, backward: bool, dtype: str = "bf16") -> list[str]:
    """Returns the opcodes of the kernel of a site's quantizer on rows of `columns`, as it is launched."""
    site, kernel = parse_site(text, activation), compiled_kernel(site_row_kernel)
    tile, options = launch_shape(columns)
    fixed = kernel_options(site, activation, False, backward) | tile
    types = {"gamma": "*fp32", "rows": "i32", "columns": "i32"}
    signature = {name: "constexpr" if name in fixed else types.get(name, f"*{dtype}") for name in kernel.arg_names}
    return opcodes_of(kernel, signature, fixed, options)


@dataclass(frozen=True)
class LaunchedCode:
    """Describes the machine code of a launch of a kernel of golf/model/kernels.py."""

    name: str
    opcodes: list[str]
    shared_bytes: int

    @property
    def spills(self) -> int:
        return sum(map(is_spill, self.opcodes))


def launched_codes(call: Callable[[], Any]) -> list[LaunchedCode]:
    """Returns the code of what a call launches, of golf/model/kernels.py; nothing runs."""
    found = []

    def compile_launch(function: Callable, programs: int, *given: Any, **options: Any) -> None:
        kernel, settings = compiled_kernel(function), {k: v for k, v in options.items() if k.startswith("num_")}
        fixed = {k: v for k, v in options.items() if k not in settings}
        values = dict(zip(kernel.arg_names, given, strict=False))
        whole = {name: value for name, value in values.items() if isinstance(value, int)}
        fixed |= {name: 1 for name, value in whole.items() if value == 1}
        types = {name: TYPES[getattr(value, "dtype", type(value))] for name, value in values.items()}
        signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
        multiples = tuple(name for name, value in whole.items() if value % 16 == 0)
        made = machine_code(kernel, signature, fixed, settings, multiples)
        found.append(LaunchedCode(function.__name__, opcodes_in(made), made.metadata.shared))

    with mock.patch.object(golf.model.kernels, "launch_kernel", compile_launch):
        call()
    return found


def code_table(kernels: list[KernelCode]) -> str:
    """Returns the counts as text, a line for each kernel."""
    lines = [f"{'generated kernel':60}{'instructions':>13}{'an element':>11}{'spills':>7}"]
    for kernel in kernels:
        each = "" if kernel.instructions_per_element is None else f"{kernel.instructions_per_element:.1f}"
        lines.append(f"{kernel.name[:59]:60}{kernel.instructions:13,}{each:>11}{kernel.spills:7}")
    return "\n".join(lines)
