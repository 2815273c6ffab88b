"""One update of a sampler in eager PyTorch: the specification, and the fallback."""

from __future__ import annotations

from torch import Tensor


def reverse_step(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    x0_previous: Tensor | None,
    noise_scale: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    c0, c1, c2, c3, c4, c5, c6 = coefficients.to(x.device, x.dtype).unbind()
    x0 = (c0 * x - c1 * eps).clamp(-clip, clip)
    x = c2 * x0 + c3 * x + c4 * eps
    if noise is not None:
        x = x + c5 * noise_scale * noise
    if x0_previous is not None:
        x = x + c6 * x0_previous
    return x, x0
