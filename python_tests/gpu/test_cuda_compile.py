"""What nvcc made of the kernels: for every architecture, within their budgets, without spills.

Looks into the module that was built with diffcore. Where there is none this is skipped, except in CI,
which sets DIFFCORE_CUDA=on, as one does who wants the kernels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import cuda_builds
import pytest
from helpers import run_script

import diffcore
from diffcore.ops import _native

#: What `pip install` builds; bench/gpu.sh builds for the GPU at hand alone.
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}

#: Registers that a kernel's launch bounds and its comment leave it.
REGISTERS = {
    "ascend": 255,
    "prepare": 255,
    "reverse_chain": 255,
    "reverse_step_by_four": 64,
    "reverse_step_by_one": 64,
    "rff_add_pieces": 64,
    "rff_backward": 128,
    "rff_forward": 128,
}


@pytest.fixture(scope="module")
def kernels() -> list[cuda_builds.Kernel]:
    """All kernels of the built module."""
    if _native._cuda is None and os.environ.get("DIFFCORE_CUDA") == "on":
        pytest.fail(f"DIFFCORE_CUDA=on, but {_native.cuda_unavailable}")
    if _native._cuda is None:
        pytest.skip(str(_native.cuda_unavailable))
    return cuda_builds.look_into(Path(_native._cuda.__file__))


def base_name(kernel: cuda_builds.Kernel) -> str:
    return kernel.name.partition("<")[0]


def architectures() -> set[str]:
    """Those that the module says it was built for."""
    return set(re.findall(r"sm_\d+", _native._cuda.architectures))


def test_every_kernel_is_there_for_every_architecture(kernels: list[cuda_builds.Kernel]) -> None:
    if os.environ.get("DIFFCORE_TEST_DEVICE") != "cuda":
        assert architectures() == ARCHITECTURES
    assert {k.architecture for k in kernels} == architectures()
    for architecture in architectures():
        assert {base_name(k) for k in kernels if k.architecture == architecture} == set(REGISTERS)


def test_registers_are_within_budget_and_none_spills(kernels: list[cuda_builds.Kernel]) -> None:
    for k in kernels:
        assert k.registers <= REGISTERS[base_name(k)], (k.architecture, k.name, k.registers)
        assert k.stack_bytes == 0, (k.architecture, k.name, k.stack_bytes)


def test_tensor_cores_where_asked_for_and_nowhere_else(kernels: list[cuda_builds.Kernel]) -> None:
    """bfloat16, float16 and tf32 multiply by HMMA; float32 is float32."""
    seen = set()
    for k in kernels:
        math = re.search(r"(Float32|Tf32|Bfloat16|Float16)Math", k.name)
        multiplies = base_name(k) in ("ascend", "reverse_chain")  # and doesn't only pack
        wanted = multiplies and math is not None and math[1] != "Float32"
        assert ("HMMA" in k.instructions) == wanted, (k.architecture, k.name)
        if wanted:
            seen.add((k.architecture, base_name(k), math[1]))
            operand = {"Tf32": ".TF32", "Bfloat16": ".BF16", "Float16": ".F32"}[math[1]]
            assert all(operand in line for line in re.findall(r"HMMA\S*", k.instructions))
    assert len(seen) == len(architectures()) * 2 * 3


def test_without_a_gpu(kernels: list[cuda_builds.Kernel]) -> None:
    """The module imports everywhere, and says what is missing when it is called."""
    script = """
import torch
from diffcore.ops import _native
import diffcore
cuda = _native._cuda
assert not cuda.on_cpu
print(cuda.unavailable(0))
print("cuda kernels" in diffcore.show_config())
try:
    cuda.rff_features((0, 0, 1, 1), cuda.RffKind.sin, 1.0, 1, 0, 0, 0, (0, 0))
except RuntimeError as error:
    print("raised", error)
"""
    result = run_script(script, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    reason, shown, raised = result.stdout.splitlines()
    assert re.search("no CUDA driver|no CUDA-capable device|there is no CUDA device", reason)
    assert shown == "True"
    assert raised.startswith("raised CUDA kernels: ")


def test_config_names_the_architectures(kernels: list[cuda_builds.Kernel]) -> None:
    shown = diffcore.show_config()
    for architecture in architectures():
        assert architecture in shown
