"""Forward corruption of a diffusion."""

from __future__ import annotations

from torch import Tensor

from diffcore.ops import _dispatch
from diffcore.ops._checks import check_levels, check_like, check_tensor
from diffcore.ops.q_sample import reference
from diffcore.schedule import DiffusionSchedule


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
        t: integer ``[B]``, levels in 0 .. K-1.
        noise: shape of ``x0``.
        schedule: the noise levels.
        backend: "reference" is the only one: torch fuses nothing here that would pay.

    Returns:
        Shape and dtype of ``x0``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
    _dispatch.choose("q_sample", support(x0, t, noise, schedule), backend)
    try:
        return reference.q_sample(x0, t, noise, schedule)
    except IndexError as error:
        raise ValueError(f"t: expected levels in 0..{schedule.K - 1}, got {t}") from error


def support(
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: DiffusionSchedule,
    *,
    backend: str | None = None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x0", x0, ("B", *x0.shape[1:]) if isinstance(x0, Tensor) else ("B",))
    check_tensor("noise", noise, tuple(x0.shape))
    check_like("noise", noise, "x0", x0)
    check_levels(t, "x0", x0)
    if not isinstance(schedule, DiffusionSchedule):
        raise TypeError(f"schedule: expected a DiffusionSchedule, got {type(schedule).__name__}")
    return {"reference": None}
