"""The ascent on min(Q1, Q2) on the kernels, as a torch op."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from diffcore._kept import constant_under_compile
from diffcore.ops import _native
from diffcore.ops._flops import Shape, flops, mlps, mlps_backward


@_native.op("action_gradient", differentiable=False)
def ascend(
    state: Tensor,
    action: Tensor,
    q1: list[Tensor],
    q2: list[Tensor],
    activation: str,
    precision: str,
    steps: int,
    lr: float,
    max_norm: float | None,
    clip_mode: str,
    optimizer: str,
    eps: float,
    low: float,
    high: float,
    backend: str,
) -> Tensor:
    """Improved actions ``[B, A]``."""
    module = _native._cuda if backend == "cuda" else _native._core
    state, action = state.contiguous(), action.contiguous()
    if backend != "cpu":  # whose module sees to that itself
        q1, q2 = [p.contiguous() for p in q1], [p.contiguous() for p in q2]
    improved = torch.empty_like(action)
    batch, action_dim = action.shape
    if not batch:
        return improved
    if backend == "triton":
        from diffcore.ops.action_gradient import triton

        triton.action_gradient(
            state,
            action,
            q1,
            q2,
            activation,
            precision,
            steps,
            lr,
            max_norm,
            clip_mode,
            optimizer,
            eps,
            low,
            high,
            improved,
        )
        return improved
    critics = (
        _native.layers(q1, backend),
        _native.layers(q2, backend),
        action_dim,
        state.shape[1],
        getattr(module.Activation, activation),
        getattr(module.Precision, precision),
        batch,
    )
    rest = (
        state.data_ptr(),
        action.data_ptr(),
        improved.data_ptr(),
        steps,
        lr,
        eps,
        math.inf if max_norm is None else max_norm,
        module.NormClip.none if max_norm is None else getattr(module.NormClip, clip_mode),
        getattr(module.ActionOptimizer, optimizer),
        low,
        high,
    )
    if backend == "cuda":
        with torch.cuda.device_of(action):
            workspace = _native.workspace(module.action_gradient_workspace(*critics), action)
            memory = workspace.data_ptr(), workspace.numel()
            module.action_gradient(*critics, *rest, *memory, _native.stream(action))
    else:
        module.action_gradient(*critics, *rest, torch.get_num_threads())
    return improved


@constant_under_compile
def why_not_cuda(
    widths: list[list[int]], action_dim: int, precision: str, device: int
) -> str | None:
    """Why the CUDA kernel can't take critics whose layers have these widths, or None."""
    cuda = _native._cuda
    critics = [[(0, 0, *sizes) for sizes in itertools.pairwise(critic)] for critic in widths]
    settings = action_dim, widths[0][0] - action_dim, getattr(cuda.Precision, precision)
    with torch.cuda.device(device):
        plan = cuda.action_gradient_plan(*critics, *settings, 1, 1)  # any steps, any batch
    return plan if isinstance(plan, str) else None


@_native.fake("action_gradient")
def _(action: Tensor) -> Tensor:
    return torch.empty_like(action, memory_format=torch.contiguous_format)


@flops("action_gradient")
def _(state: Shape, q1: list[Shape], q2: list[Shape], steps: int) -> int:
    forward = mlps(state[0], [*q1, *q2])
    return steps * (forward + mlps_backward(state[0], [*q1, *q2], 1, True, False))


# The gradient's norm may be limited over each batch, not over all of them.
_native.vmap("action_gradient")(_native.one_by_one(ascend))
