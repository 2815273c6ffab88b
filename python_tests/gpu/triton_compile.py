"""Compiles what an op's Triton backend launches, for GPUs that needn't be there.

``python triton_compile.py OP`` runs every case of an op (triton_cases.py) on tensors of the CPU
with a driver that names a target instead of a device. Every kernel that would be launched is
compiled for it, with the block sizes, warps and alignments of that launch, and looked at instead of
run. One line of JSON a kernel goes to standard output.

A process of its own, since kernels imported for the interpreter can't be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

#: Bytes of shared memory that one block may have (CUDA C++ Programming Guide, "Technical
#: Specifications per Compute Capability"; LDS of AMD's CDNA3).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}


class Compiled(NamedTuple):
    """What one launch of a case became on one target."""

    case: str
    kernel: str
    target: str
    registers: int
    #: Bytes a thread of memory that should be registers.
    spilled: int
    shared_memory: int
    #: Instructions of the tensor cores (AMD: matrix cores).
    matrix_instructions: int
    #: Copies from global to shared memory that nothing waits for at once (NVIDIA: LDGSTS).
    asynchronous_copies: int
    #: Right operands of products without tensor cores, read from shared memory, and those of them
    #: whose lanes meet in the same banks.
    operands: int
    conflicting_operands: int
    #: In which it multiplies matrices, if it does.
    precision: str | None


class Driver:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target[3:]), 32)
        else:
            self.target = GPUTarget("hip", target, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        """A name: kernels are cached by device."""
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_op(op: str) -> list[Compiled]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from triton_cases import CASES

    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    results = []
    for target in TARGETS:
        driver.set_active(Driver(target))
        for case in CASES[op]():
            if case.precision == "tf32" and not target.startswith("sm_"):
                continue  # a format of NVIDIA's
            launched.clear()
            case.launch()
            assert launched, f"{case.name} launches nothing"
            for name, kernel in dict(launched).items():
                precision = case.precision if name in case.matrix_kernels else None
                looks = look_at(kernel, target), look_at_operands(kernel.asm["ttgir"])
                results.append(Compiled(case.name, name, target, *looks[0], *looks[1], precision))
    JITFunction.run = run
    return results


def look_at(kernel: Any, target: str) -> tuple[int, int, int, int, int]:
    """What `Compiled` says of a kernel, from registers to asynchronous copies."""
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            code = _tool("nvdisasm", file.name)
        # Spills lie on the stack, where nothing else of a Triton kernel should lie.
        stack, registers = _number(r"STACK:(\d+)", usage), _number(r"REG:(\d+)", usage)
        matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTC\w*MMA)\b", code))
        copies = len(re.findall(r"\bLDGSTS\b", code))
        return registers, stack, kernel.metadata.shared, matrix, copies
    code = kernel.asm["amdgcn"]
    # Both kinds of spills end in the private segment, or in lanes of further registers.
    private, spills, registers = (
        _number(rf"\.{name}:\s*(\d+)", code)
        for name in ("private_segment_fixed_size", "vgpr_spill_count", "vgpr_count")
    )
    matrix = len(re.findall("v_s?mfma", code))
    return registers, private + 4 * spills, kernel.metadata.shared, matrix, 0


def look_at_operands(code: str) -> tuple[int, int]:
    """Right operands, ``[inputs, outputs]``, that products without tensor cores read from shared
    memory; and how many of them lie there with inputs contiguous.

    Every lane reads other outputs. Neighbouring ones are in other banks, but not those whose distance
    is a block's inputs, a multiple of 32 floats with the few outputs that a lane has: Triton swizzles
    for tensor cores only.
    """
    inputs_first = set(
        re.findall(r"^(#\w+) = #ttg\.swizzled_shared<.*order = \[0, 1\]", code, re.M)
    )
    operand = r"tensor<\w+, #ttg\.dot_op<\{opIdx = 1, parent = #blocked"
    layouts = re.findall(rf"ttg\.local_load .*memdesc<\w+, (#\w+), .* -> {operand}", code)
    return len(layouts), sum(layout in inputs_first for layout in layouts)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the compiler's report"
    return int(found.group(1))


def _tool(name: str, *arguments: str) -> str:
    """Runs one of NVIDIA's tools that come with Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for result in compile_op(sys.argv[1]):
        print(json.dumps(result))
