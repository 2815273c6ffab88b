"""q(x_t | x_0) in eager PyTorch: the specification, and what runs where there is no kernel."""

from __future__ import annotations

from torch import Tensor

from diffcore.schedule import DiffusionSchedule


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: DiffusionSchedule) -> Tensor:
    abar = schedule.alphas_cumprod.to(t.device).index_select(0, t)  # negative levels are refused
    shape = (*t.shape, *[1] * (x0.ndim - 1))
    signal = abar.sqrt().to(x0.dtype).reshape(shape)
    spread = (1 - abar).sqrt().to(x0.dtype).reshape(shape)
    return signal * x0 + spread * noise
