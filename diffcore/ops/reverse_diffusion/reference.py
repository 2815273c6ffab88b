"""The reverse chain in eager PyTorch: the specification, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore.ops import _philox
from diffcore.ops._checks import check_denoised
from diffcore.ops.reverse_step.reference import reverse_step


def reverse_diffusion(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    timesteps: Tensor,
    coefficients: Tensor,
    state: Tensor,
    action_dim: int,
    x_init: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    noise_scale: float,
    clip: float,
) -> Tensor:
    batch = state.shape[0]  # not its len, which an exported graph would keep as a constant

    def draw(step: int) -> Tensor:
        assert seed is not None
        return _philox.normals(
            seed, step, batch, action_dim, dtype=state.dtype, device=state.device
        )

    x = draw(0) if x_init is None else x_init
    x0 = torch.zeros_like(x)
    for i in range(len(timesteps)):
        t = timesteps[i].to(state.device).expand(batch)
        z = noise[i] if noise is not None else draw(i + 1) if noise_scale != 0 else None
        eps = denoiser(x, state, t)
        check_denoised(eps, x)
        x, x0 = reverse_step(x, eps, coefficients[i], z, x0, noise_scale, clip)
    return x.clamp(-clip, clip)
