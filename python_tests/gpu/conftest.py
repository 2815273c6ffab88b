"""Where the GPU tests run: on a GPU if there is one, else its kernels on the CPU.

``DIFFCORE_TEST_DEVICE=cuda`` (which bench/gpu.sh sets) takes the CUDA kernels that were built, and
tensors on the GPU. Otherwise the same sources run as ordinary C++ on CPU tensors.
"""

from __future__ import annotations

import os

import cuda_builds
import emulated
import pytest
import torch
from torch import Tensor

from diffcore.ops import _native

ON_GPU = os.environ.get("DIFFCORE_TEST_DEVICE") == "cuda"
LANES = ["forward"] if ON_GPU else ["forward", "reverse"]

#: Multiprocessors, bytes of shared memory a block and major compute capability of the device that the
#: CPU plays: a small one, so that blocks have several tiles each and a launch takes few threads.
SMALL_DEVICE = "3,232448,9"


@pytest.fixture(scope="session")
def cuda_module() -> object:
    """The module with the CUDA kernels."""
    if ON_GPU:
        return _native._cuda
    return cuda_builds.load(cuda_builds.build_for_tests())


def spoiled_workspace(size: int, like: Tensor) -> Tensor:
    """Bytes that are NaN as floats and more than any counter comes to."""
    return torch.full((size,), 255, dtype=torch.uint8, device=like.device)


@pytest.fixture
def cuda(cuda_module: object, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has ``backend="cuda"`` run on the device whose name this is, in a workspace left by others."""
    monkeypatch.setattr(_native, "workspace", spoiled_workspace)
    if ON_GPU:
        return "cuda"
    monkeypatch.setattr(_native, "_cuda", cuda_module)
    monkeypatch.setattr(_native, "cuda_unavailable", None)
    monkeypatch.setenv("CUDA_ON_CPU_DEVICE", SMALL_DEVICE)
    return "cpu"


@pytest.fixture(params=["gpu"] if ON_GPU else list(emulated.DEVICES))
def way(request: pytest.FixtureRequest, cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on devices for which the launchers plan differently."""
    if not ON_GPU:
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", emulated.DEVICES[request.param])
    return str(request.param)


@pytest.fixture(params=["gpu"] if ON_GPU else list(emulated.GROUPS))
def group(request: pytest.FixtureRequest, cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with groups of every size, and with both ways of handing each other columns."""
    if not ON_GPU:
        monkeypatch.setenv("CUDA_ON_CPU_DEVICE", emulated.GROUPS[request.param])
    return str(request.param)


@pytest.fixture(params=LANES)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the lanes of every block in both orders, where that can be chosen."""
    order: str = request.param
    monkeypatch.setenv("CUDA_ON_CPU_LANES", order)
    return order
