"""The denoising loss in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffcore.ops._checks import check_denoised
from diffcore.ops.q_sample import q_sample
from diffcore.schedule import DiffusionSchedule


def denoising_loss(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: DiffusionSchedule,
    state: Tensor,
    action: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    noisy_action = q_sample(action, t, noise, schedule)
    eps = denoiser(noisy_action, state, t)
    check_denoised(eps, noisy_action)
    squares = (eps - noise).square()
    if weight is not None:
        squares = weight[:, None] * squares
    return squares.mean() if reduction == "mean" else squares.mean(dim=1)
