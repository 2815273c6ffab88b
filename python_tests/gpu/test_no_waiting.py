"""Nothing on the way to a kernel waits for the device, copies between it and the host, or allocates
but through torch: what a CUDA graph can't capture, and what makes a GPU idle."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import fake_gpu
from fake_gpu import Launch

from diffcore import ops
from diffcore.ops import _fused_loss, _native

_triton = fake_gpu.triton_module()

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


class WaitsError(Exception):
    """Something waited for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses what gives the host a value or size from the device, and copies between both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known_late = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        if any(tag in func.tags for tag in known_late) and any(t.is_cuda for t in tensors):
            raise WaitsError(func)
        results = func(*args, **kwargs)
        tensors += [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        # A number on the host goes along with a launch, except where it is what is copied.
        copies = func.overloadpacket in (
            torch.ops.aten._to_copy,
            torch.ops.aten.copy,
            torch.ops.aten.copy_,
        )
        if len({t.device for t in tensors if copies or t.ndim > 0}) > 1:
            raise WaitsError(func)
        return results


@contextlib.contextmanager
def nothing_waits() -> Iterator[list[Launch]]:
    """The launches of what is run inside on :func:`fake_gpu.fake_gpu`; what waits is an error."""

    def refuse(*args: Any) -> None:
        raise WaitsError

    with pytest.MonkeyPatch.context() as patch, fake_gpu.fake_gpu() as launches, NoWaiting():
        patch.setattr(torch.cuda, "synchronize", refuse)
        for kind, names in (
            (torch.cuda.Stream, ("synchronize", "query")),
            (torch.cuda.Event, ("synchronize", "query")),
        ):
            for name in names:
                patch.setattr(kind, name, refuse)
        yield launches


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("op", "backend"), fake_gpu.CASES)
def test_nothing_waits(op: str, backend: str, dtype: torch.dtype | None) -> None:
    with nothing_waits() as launches:
        fake_gpu.call(op, backend, dtype=dtype)
    assert launches, "no kernel was reached"
    for launch in launches:
        assert all(tensor.is_cuda for tensor in launch.tensors), launch.kernel


def test_no_op_is_left_out() -> None:
    assert {op for op, _ in fake_gpu.CASES} == {*ops.__all__} - {"representation_step"}


#: Each a way to wait for the device, given a tensor on it.
WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.sum().item(),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool((t > 0).any()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numbers to the device": lambda t: torch.tensor([1.0, 2.0], device=t.device),
    "a number to the device": lambda t: torch.tensor(1.0, device="cpu").to(t.device),
    "sizes": lambda t: t.masked_select(t > 0),
    "equal": lambda t: torch.equal(t, t),
    "synchronize": lambda t: torch.cuda.synchronize(),
    "event": lambda t: torch.cuda.Event.synchronize(None),  # type: ignore[arg-type],
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("way", WAITS)
def test_waiting_before_a_launch_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _triton.launch

    def wait_and_launch(kernel: Any, programs: Any, *args: Any, **settings: Any) -> None:
        WAITS[way](args[0])
        launch(kernel, programs, *args, **settings)

    monkeypatch.setattr(_triton, "launch", wait_and_launch)
    with nothing_waits(), pytest.raises(WaitsError):
        fake_gpu.call("q_sample", "triton")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_reading_the_seed_is_noticed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "seed_words", lambda seed: (int(seed or 0), 0))
    monkeypatch.setattr(_triton, "seed_arguments", lambda seed: (int(seed or 0), None))
    with nothing_waits(), pytest.raises(WaitsError):
        fake_gpu.call("reverse_diffusion", backend)


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_a_loss_of_the_gpu_scales_its_gradients_there(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured backward does, on the CPU's memory."""

    class Elsewhere(Tensor):
        is_cpu = False

    monkeypatch.setattr(_fused_loss, "_is_last_use", lambda grad_loss: True)
    grads = [torch.randn(3, 2), torch.empty(0, 4), torch.randn(5)]
    expected = [factor * grad for grad in grads]
    grad_loss = torch.tensor(factor).as_subclass(Elsewhere)
    scaled = _fused_loss.scaled("mlp", grad_loss, grads, [])
    assert all(map(torch.equal, scaled, expected))


#: Calls of CUDA's runtime that neither allocate nor wait for what is queued. None makes a device
#: current: that is left to torch, which leaves no context behind on the device before.
HARMLESS = {
    "cudaDeviceGetAttribute",
    "cudaDriverGetVersion",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaLaunchKernelExC",
    "cudaOccupancyMaxActiveClusters",
    "cudaRuntimeGetVersion",
}


def runtime_calls(source: str) -> set[str]:
    code = re.sub(r"//.*|/\*.*?\*/", "", source)
    return set(re.findall(r"\b(cu(?:da)?[A-Z]\w*|malloc|free)\(", code))


def test_the_cuda_kernels_neither_allocate_nor_wait() -> None:
    sources = [*CUDA_SOURCES.glob("*.cu"), *CUDA_SOURCES.glob("*.cuh")]
    sources.append(CUDA_SOURCES.parent / "python" / "cuda_module.cpp")
    called = set().union(*(runtime_calls(source.read_text()) for source in sources))
    assert "cudaLaunchKernelExC" in called
    assert called <= HARMLESS
    assert runtime_calls("  check(cudaMallocAsync(&p, n, stream));") == {"cudaMallocAsync"}
