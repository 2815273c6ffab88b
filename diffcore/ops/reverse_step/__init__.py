"""One step of a reverse diffusion."""

from __future__ import annotations

from torch import Tensor

from diffcore.ops import _dispatch
from diffcore.ops._checks import check_like, check_number, check_tensor
from diffcore.ops.reverse_step import reference


def reverse_step(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    x0_previous: Tensor | None = None,
    noise_scale: float = 1.0,
    clip: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One update x_t -> x_{t-1} of any sampler of :meth:`diffcore.DiffusionSchedule.solver`.

    ``x0 = clip(c0 x - c1 eps)``, then ``c2 x0 + c3 x + c4 eps + c5 noise_scale noise +
    c6 x0_previous``. Differentiable in every tensor but the coefficients.

    Args:
        x, eps: ``[B, A]``, the current point and the noise predicted in it.
        coefficients: ``[7]``, one row of :attr:`diffcore.schedule.SolverTable.coefficients`.
        noise: ``[B, A]``, or None for no noise.
        x0_previous: ``[B, A]``, the x0 of the step before, for two-step samplers.
        noise_scale: factor on the noise.
        clip: bound on the predicted x0; ``math.inf`` for none.
        backend: "reference" is the only one; the fused form of this step is inside
            :func:`diffcore.ops.reverse_diffusion`.

    Returns:
        The next point and the predicted x0, both ``[B, A]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
    arguments = support(
        x, eps, coefficients, noise=noise, x0_previous=x0_previous, noise_scale=noise_scale, clip=clip
    )
    _dispatch.choose("reverse_step", arguments, backend)
    return reference.reverse_step(x, eps, coefficients, noise, x0_previous, noise_scale, clip)


def support(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    *,
    noise: Tensor | None = None,
    x0_previous: Tensor | None = None,
    noise_scale: float = 1.0,
    clip: float = 1.0,
    backend: str | None = None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("B", "A"))
    for name, value in (("eps", eps), ("noise", noise), ("x0_previous", x0_previous)):
        if value is not None or name == "eps":
            check_tensor(name, value, tuple(x.shape))
            check_like(name, value, "x", x)
    check_tensor("coefficients", coefficients, (7,))
    check_number("noise_scale", noise_scale)
    check_number("clip", clip, above=0.0, finite=False)
    return {"reference": None}
