"""Every Triton kernel, compiled for GPUs that needn't be there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_cases import CASES
from triton_compile import SHARED_MEMORY, TARGETS, Compiled


@functools.cache
def compiled(op: str) -> list[Compiled]:
    script = Path(__file__).with_name("triton_compile.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, str(script), op], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return [Compiled(*json.loads(line)) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", CASES)
def test_kernels_keep_within_their_means(op: str, target: str) -> None:
    """No spills, shared memory that the target has, and tensor cores where they are meant."""
    kernels = [kernel for kernel in compiled(op) if kernel.target == target]
    assert kernels
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared_memory <= SHARED_MEMORY[target], kernel
        if kernel.precision not in (None, "float32"):
            assert kernel.matrix_instructions > 0, kernel


@pytest.mark.parametrize("op", ["reverse_diffusion", "action_gradient"])
def test_weights_stream_through_shared_memory(op: str) -> None:
    """On their way from L2 while the ones before them are multiplied."""
    kernels = [k for k in compiled(op) if k.target != "gfx942" and k.precision is not None]
    assert kernels
    for kernel in kernels:
        assert kernel.asynchronous_copies > 0, kernel
        assert kernel.shared_memory > 0, kernel


@pytest.mark.parametrize("op", [op for op in CASES if op not in ("q_sample", "reverse_step")])
def test_float32_products_read_shared_memory_without_conflicts(op: str) -> None:
    """On NVIDIA; AMD has matrix cores for float32."""
    kernels = [k for k in compiled(op) if k.target != "gfx942" and k.precision == "float32"]
    assert kernels
    for kernel in kernels:
        assert kernel.operands > 0, kernel
        assert kernel.conflicting_operands == 0, kernel
