"""The ascent on min(Q1, Q2) in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def action_gradient(
    critic: Callable[[Tensor, Tensor], Sequence[Tensor]],
    state: Tensor,
    action: Tensor,
    steps: int,
    lr: float,
    max_norm: float | None,
    clip_mode: str,
    optimizer: str,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    state = state.detach()
    action = action.detach().clone()

    def objective(action: Tensor) -> tuple[Tensor, Tensor]:
        q = _least(critic(state, action), action.shape[0])
        return -q.sum(), q

    first_moment, second_moment = torch.zeros_like(action), torch.zeros_like(action)
    for step in range(1, steps + 1):
        with torch.no_grad():
            gradient, q = torch.func.grad(objective, has_aux=True)(action)
        gradient = torch.where(q.isnan(), q, gradient)  # relu's slope at NaN would hide it
        if max_norm is not None:
            norm = gradient.norm() if clip_mode == "batch" else gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if optimizer == "adam":
            # Kingma & Ba 2015, Algorithm 1, with torch.optim.Adam's defaults for the betas.
            first_moment = 0.9 * first_moment + 0.1 * gradient
            second_moment = 0.999 * second_moment + 0.001 * gradient**2
            denominator = (second_moment / (1 - 0.999**step)).sqrt() + eps
            action = action - lr / (1 - 0.9**step) * first_moment / denominator
        else:
            action = action - lr * gradient
        action = action.clamp(low, high)
    return action


def _least(values: Any, batch: int) -> Tensor:
    """The least of what a critic returned, row by row."""
    expected = f"expected it to return one or more values [{batch}, 1]"
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"critic: {expected}, got {type(values).__name__}")
    for q in values:
        if not isinstance(q, Tensor):
            raise TypeError(f"critic: {expected}, got {type(q).__name__}")
        if q.shape != (batch, 1):
            raise ValueError(f"critic: {expected}, got shape {list(q.shape)}")
    least = functools.reduce(torch.minimum, values)
    if not least.requires_grad:
        raise ValueError(
            "critic: expected values that can be differentiated in the action, got none "
            "(from under torch.no_grad(), for instance)"
        )
    return least
