"""What nvcc made of the kernels: for every architecture, within their budgets, without spills.

Looks into the module that was built with diffcore. Where there is none this is skipped, except in CI,
which sets DIFFCORE_CUDA=on, as one does who wants the kernels.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

import cuda_builds
import pytest
from conftest import ON_GPU
from helpers import run_script

import diffcore
from diffcore.ops import _native

#: What `pip install` builds; bench/gpu.sh builds for the GPU at hand alone.
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}

#: Registers that a kernel may have by the budget that is stated at the top of its file.
REGISTERS = {
    "ascend": 255,
    "prepare": 64,
    "probe": 16,
    "reverse_chain": 255,
    "reverse_step_by_four": 40,
    "reverse_step_by_one": 40,
    "rff_add_pieces": 40,
    "rff_backward": 128,
    "rff_forward": 128,
}

#: Bytes of shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications
#: per Compute Capability"), and such a device for the launchers to plan for.
SHARED_MEMORY = {
    "sm_80": (163 << 10, "108,166912,8"),
    "sm_90": (227 << 10, "132,232448,9"),
    "sm_100": (227 << 10, "148,232448,10"),
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


def test_no_static_shared_memory(kernels: list[cuda_builds.Kernel]) -> None:
    """All there is, launchers ask for; but for what CUDA itself takes, 1 KB from sm_90 on."""
    for k in kernels:
        most = 0 if k.architecture == "sm_80" else 1024
        assert k.shared_bytes <= most, (k.architecture, k.name, k.shared_bytes)


@pytest.mark.skipif(ON_GPU, reason="plans for devices that this one is not")
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("hidden", [16, 64, 100, 256, 512, 1024])
def test_shared_memory_is_within_budget(
    cuda_module: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, hidden: int
) -> None:
    """What the launchers of the chain and of the action gradient ask for, whatever the batch; the
    features' 17,408 bytes a static_assert holds."""
    most, device = SHARED_MEMORY[architecture]
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", device)
    inner = [(hidden, hidden)] * 2
    chain = [(32, hidden), (hidden, 32), (55, hidden), *inner, (hidden, 6)]
    critic = [(23, hidden), *inner, (hidden, 1)]
    precisions = ("float32", "tf32", "bfloat16", "float16")
    for precision, batch in itertools.product(precisions, (1, 16, 256, 4096, 100_000)):
        kind = getattr(cuda_module.Precision, precision)
        sizes = (6, 17, kind, 100, batch)
        for plan, networks in (
            (cuda_module.reverse_diffusion_plan, [chain]),
            (cuda_module.action_gradient_plan, [critic, critic]),
        ):
            layers = ([(0, 0, *shape) for shape in shapes] for shapes in networks)
            planned = plan(*layers, *sizes)
            if hidden == 1024 and isinstance(planned, str):
                assert re.search("too wide for shared memory|don't fit into", planned)
                continue
            assert 0 < planned["shared_bytes"] <= most, (precision, batch)


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


def test_the_ascent_reads_nothing_as_constant(kernels: list[cuda_builds.Kernel]) -> None:
    """Its blocks read what others wrote in the same launch. A load that the compiler takes for one of
    what nobody writes may find it in a cache as it was before."""
    ascents = [k for k in kernels if base_name(k) == "ascend"]
    assert ascents
    for k in ascents:
        assert "LDG" in k.instructions
        assert not re.search(r"LDG\S*\.CONSTANT", k.instructions), (k.architecture, k.name)


def test_without_a_gpu(kernels: list[cuda_builds.Kernel]) -> None:
    """The module imports everywhere, and says what is missing when it is called."""
    script = """
import torch
from diffcore.ops import _native
import diffcore
cuda = _native._cuda
assert not cuda.on_cpu
print(cuda.unavailable())
print("cuda kernels" in diffcore.show_config())
try:
    cuda.rff_features((0, 0, 1, 1), cuda.RffKind.sin, 1.0, 1, 0, 0, 0, 0)
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
