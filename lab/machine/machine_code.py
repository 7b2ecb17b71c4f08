"""Compiles the Triton kernels of Inductor's programs to machine code, and counts instructions and spills.

The ptxas and the disassembler that the triton package brings need no GPU. Counts are static: a loop's body counts once.
"""

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
PRELUDE = (
    "import triton\nimport triton.language as tl\nfrom torch._inductor.runtime import triton_helpers\n"
    "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
)
KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\1', '''(.*?)''', device_str='cuda'\)", re.S | re.M)
SIGNATURE = re.compile(r"'signature': \{(.*?)\}")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", re.M)
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
    opcodes = [opcode for opcode in disassemble(name, text, blocks) if opcode != "NOP"]
    spills = sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes)
    lanes = 32 * WARPS
    flat = pointwise and "YBLOCK" not in text
    return KernelCode(name, len(opcodes), spills, len(opcodes) * lanes / POINTWISE_BLOCK if flat else None)


def disassemble(name: str, text: str, blocks: dict[str, int]) -> list[str]:
    """Returns a kernel's opcodes."""
    signature = dict(re.findall(r"'(\w+)': '([^']*)'", SIGNATURE.search(text)[1]))
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.py"), Path(folder, "kernel.cubin")
        source.write_text(PRELUDE + text[text.index("@triton.jit") :], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = list(signature)
        aligned = {(n,): [["tt.divisibility", 16]] for n, key in enumerate(names) if signature[key].startswith("*")}
        fixed = {(names.index(key),): size for key, size in blocks.items() if key in names}
        ast = ASTSource(getattr(module, name), signature, constexprs=fixed, attrs=aligned)
        made = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
        binary.write_bytes(made.asm["cubin"])
        command = [DISASSEMBLER, "-c", binary]
        return INSTRUCTION.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def code_table(kernels: list[KernelCode]) -> str:
    """Returns the counts as text, a line for each kernel."""
    lines = [f"{'generated kernel':60}{'instructions':>13}{'an element':>11}{'spills':>7}"]
    for kernel in kernels:
        each = "" if kernel.instructions_per_element is None else f"{kernel.instructions_per_element:.1f}"
        lines.append(f"{kernel.name[:59]:60}{kernel.instructions:13,}{each:>11}{kernel.spills:7}")
    return "\n".join(lines)
