"""What the backends can take: device, dtype, activations and depth, the same for every op.

Kernels run where their tensors are. Two exceptions serve tests and debugging on machines without a
GPU: Triton's interpreter (``TRITON_INTERPRET=1`` in the environment) and a build of the CUDA sources
for the CPU take CPU tensors, when they are asked for by name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffcore._kept import constant_under_compile
from diffcore.ops import _native
from diffcore.ops._dispatch import Support

_NAMES = {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton"}
_LOWER_PRECISIONS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PRECISIONS = {
    "cpu": ("float32", "bfloat16"),
    "cuda": ("float32", "tf32", "bfloat16", "float16"),
    "triton": ("float32", "tf32", "bfloat16", "float16"),
}
_MULTIPLIED_ON_CPU = (None, torch.float32, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)  # of the CUDA and Triton kernels: Ampere


def precision(compute_dtype: torch.dtype | None, like: Tensor) -> str:
    """What a kernel multiplies in.

    On a GPU None is autocast's dtype where that is on, as it is for torch's own products, and float32
    becomes TF32 only where ``torch.set_float32_matmul_precision`` allows it.
    """
    if compute_dtype is None and like.is_cuda and torch.is_autocast_enabled("cuda"):
        compute_dtype = torch.get_autocast_dtype("cuda")
    if compute_dtype in _LOWER_PRECISIONS:
        return _LOWER_PRECISIONS[compute_dtype]
    if like.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "float32"


def may_go_straight(compute_dtype: torch.dtype | None, backend: str | None) -> bool:
    """Whether a call may go straight to the CPU's kernel, if its tensors are plain float32 there.

    Then nothing would come of asking what `support` says, and of torch's dispatcher: most calls are
    such, and a small network takes less time than the asking.
    """
    return (
        (backend is None or backend == "cpu")
        and compute_dtype in _MULTIPLIED_ON_CPU
        and _native.is_undisturbed()
    )


def support(
    kernels: tuple[str, ...],
    tensors: Sequence[Tensor],
    activations: Sequence[str] = (),
    layers: int = 1,
    *,
    compute_dtype: torch.dtype | None = None,
    refused: str | None = None,
) -> Support:
    """Which backends can take a call.

    Args:
        kernels: the op's backends beside the reference, best first, "cpu" last.
        tensors: the call's, which a kernel takes on its own device in float32; the first says which.
        activations, layers: the network's.
        compute_dtype: what to multiply in.
        refused: why no kernel can take the call, whatever the above.
    """

    def lacks(name: str) -> str | None:
        if name == "reference":
            return None
        if refused is not None:
            return refused
        if forward_ad._current_level >= 0:
            return (
                "forward-mode derivatives are being taken, "
                f"which the {_NAMES[name]} kernels don't have"
            )
        return _cannot_run(name, tensors, activations, layers, compute_dtype)

    on_cpu = kernels[-1:] if kernels[-1] == "cpu" else ()
    on_gpu = kernels[: len(kernels) - len(on_cpu)]
    first, last = (on_gpu, on_cpu) if tensors[0].is_cuda else (on_cpu, on_gpu)
    return Support([*first, "reference", *last], lacks)


def no_gradient_in(*arguments: tuple[str, Tensor | None]) -> str | None:
    """Why the kernels, which compute no gradient in these, can't take a call, or None."""
    for name, value in arguments:
        if _native.differentiates(value):
            return f"{name} requires a gradient, which the kernels don't compute"
    return None


def _cannot_run(
    name: str,
    tensors: Sequence[Tensor],
    activations: Sequence[str],
    layers: int,
    compute_dtype: torch.dtype | None,
) -> str | None:
    kind = _NAMES[name]
    reason = _not_here(name)
    if reason is not None:
        return reason
    device = "cpu" if name == "cpu" or _runs_on_cpu(name) else "cuda"
    reason = _tensors_lack(tensors, device, kind)
    if reason is not None:
        return reason
    if device == "cuda":
        reason = _device_lacks(tensors[0].device)
        if reason is None and name == "cuda":
            reason = _driver_lacks(tensors[0].device.index or 0)
        if reason is not None:
            return reason
    if precision(compute_dtype, tensors[0]) not in _PRECISIONS[name]:
        return f"compute_dtype {compute_dtype} has no {kind} kernel"
    for activation in activations:
        if activation not in _native.NATIVE_ACTIVATIONS:
            return f"activation {activation!r} has no {kind} kernel"
    if layers > _native.max_layers:
        return f"{layers} layers, the {kind} kernels take at most {_native.max_layers}"
    return None


def _tensors_lack(tensors: Sequence[Tensor], device: str, kind: str) -> str | None:
    on_cpu, float32 = device == "cpu", torch.float32
    if on_cpu and _native.are_float32_on_cpu(tensors, False):
        return None
    for tensor in tensors:
        # Zeros without memory get some from torch's dispatcher.
        if _native.lacks_memory(tensor) and not tensor._is_zerotensor():
            return "a tensor's memory was freed"
        if tensor.dtype is float32 and (tensor.is_cpu if on_cpu else tensor.is_cuda):
            continue  # quicker than a look at its device, and every call looks at every tensor
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}"
        if tensor.dtype is not torch.float32:
            return f"a tensor is {tensor.dtype}, the {kind} kernels take float32"
    return None


def _not_here(name: str) -> str | None:
    """Why a backend can't run on this machine at all."""
    if name == "cpu":
        return _native.unavailable
    if name == "cuda":
        return _native.cuda_unavailable
    return None if _has_triton() else "Triton isn't installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_on_cpu(name: str) -> bool:
    if name == "cuda":
        return bool(_native._cuda.on_cpu)
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device_lacks(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    return f"{device} has compute capability {capability[0]}.{capability[1]}, 8.0 is the least"


@constant_under_compile
def _driver_lacks(index: int) -> str | None:
    """Why the CUDA kernels can't run on a device: they were built with a CUDA of their own, and for
    some architectures."""
    try:
        return _lacks_for_good(index)
    except RuntimeError as error:  # nobody could tell, for lack of memory perhaps: that may pass
        return str(error)


@functools.cache
def _lacks_for_good(index: int) -> str | None:
    with torch.cuda.device(index):
        reason: str | None = _native._cuda.unavailable()
    return reason
