"""The ascent on min(Q1, Q2) on the kernels, as a torch op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffcore.ops import _native


@_native.op("action_gradient")
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
    core = _native._core
    state, action = state.contiguous(), action.contiguous()
    q1, q2 = [p.contiguous() for p in q1], [p.contiguous() for p in q2]
    improved = torch.empty_like(action)
    if len(action):
        core.action_gradient(
            _native.addresses(q1),
            _native.addresses(q2),
            action.shape[1],
            state.shape[1],
            getattr(core.Activation, activation),
            getattr(core.Precision, precision),
            len(action),
            state.data_ptr(),
            action.data_ptr(),
            improved.data_ptr(),
            steps,
            lr,
            eps,
            math.inf if max_norm is None else max_norm,
            core.NormClip.none if max_norm is None else getattr(core.NormClip, clip_mode),
            getattr(core.ActionOptimizer, optimizer),
            low,
            high,
            torch.get_num_threads(),
        )
    return improved


@_native.fake("action_gradient")
def _(state: Tensor, action: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(action, memory_format=torch.contiguous_format)


@_native.vmap("action_gradient")
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    """One by one: the gradient's norm may be limited over each batch, not over all of them."""
    return torch.stack(_native.one_by_one(ascend, info.batch_size, in_dims, args)), 0
