"""Forward corruption of a diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._kept import constant_under_compile, kept
from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_levels, check_like, check_tensor, out_of_autocast
from diffcore.ops.q_sample import native, reference
from diffcore.schedule import DiffusionSchedule

KERNELS = ("triton",)


def q_sample(
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: DiffusionSchedule,
    *,
    backend: str | None = None,
) -> Tensor:
    """``sqrt(abar_t) x0 + sqrt(1 - abar_t) noise`` (Ho et al. 2020, Eq. 4).

    Differentiable in ``x0`` and ``noise``.

    Args:
        x0: ``[B, ...]``.
        t: integer ``[B]``, levels in 0 .. K-1. On a GPU others aren't looked for, which would wait
            for the device: the kernel makes their rows NaN.
        noise: shape of ``x0``.
        schedule: the noise levels.
        backend: "triton" or "reference"; the fastest that can run the call if None. On a CPU that
            is the reference: torch fuses nothing there that would pay.

    Returns:
        Shape and dtype of ``x0``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
    x0, noise = out_of_autocast(None, x0, noise)
    chosen = _dispatch.choose("q_sample", support(x0, t, noise, schedule), backend)
    if chosen != "reference":
        arguments = (x0, t, noise, *_levels(schedule, x0.device), chosen)
        if _native.differentiates(x0, noise):
            sample: Tensor = _native.apply(native.QSample, *arguments)
            return sample
        return native.corrupt(*arguments)
    try:
        return reference.q_sample(x0, t, noise, schedule)
    except IndexError as error:
        raise ValueError(f"t: expected levels in 0..{schedule.K - 1}, got {t}") from error


@constant_under_compile
def _levels(schedule: DiffusionSchedule, device: torch.device) -> tuple[Tensor]:
    """``cached_levels``."""
    return (cached_levels(schedule, device),)


@kept
def cached_levels(schedule: DiffusionSchedule, device: torch.device) -> Tensor:
    """float32 ``[K, 2]`` by level: what x0 and the noise are multiplied by."""
    abar = schedule.alphas_cumprod
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1).to(device, torch.float32)


def support(x0: Tensor, t: Tensor, noise: Tensor, schedule: DiffusionSchedule) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x0", x0, ("B", *x0.shape[1:]) if isinstance(x0, Tensor) else ("B",))
    check_tensor("noise", noise, tuple(x0.shape))
    check_like("noise", noise, "x0", x0)
    check_levels(t, "x0", x0)
    if not isinstance(schedule, DiffusionSchedule):
        raise TypeError(f"schedule: expected a DiffusionSchedule, got {type(schedule).__name__}")
    return _backends.support(KERNELS, [x0])
