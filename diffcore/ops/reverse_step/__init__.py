"""One step of a reverse diffusion."""

from __future__ import annotations

from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_like, check_number, check_tensor, out_of_autocast
from diffcore.ops.reverse_step import native, reference

KERNELS = ("cuda", "triton", "cpu")


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
        backend: "cuda", "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        The next point and the predicted x0, both ``[B, A]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
    x, eps, noise, x0_previous = out_of_autocast(None, x, eps, noise, x0_previous)
    available = support(x, eps, coefficients, noise, x0_previous, noise_scale, clip)
    chosen = _dispatch.choose("reverse_step", available, backend)
    noise_scale, clip = float(noise_scale), float(clip)
    if chosen != "reference":
        settings = (coefficients, noise, x0_previous, noise_scale, clip, chosen)
        differentiable = [t for t in (x, eps, noise, x0_previous) if t is not None]
        if _native.differentiates(*differentiable):
            return _native.apply(native.ReverseStep, x, eps, *settings)
        return native.step(x, eps, *settings)
    return reference.reverse_step(x, eps, coefficients, noise, x0_previous, noise_scale, clip)


def support(
    x: Tensor,
    eps: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    x0_previous: Tensor | None,
    noise_scale: float,
    clip: float,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("B", "A"))
    others = {"eps": eps}
    if noise is not None:
        others["noise"] = noise
    if x0_previous is not None:
        others["x0_previous"] = x0_previous
    for name, value in others.items():
        check_tensor(name, value, tuple(x.shape))
        check_like(name, value, "x", x)
    check_tensor("coefficients", coefficients, (7,))
    if coefficients.device.type != "cpu" and coefficients.device != x.device:
        raise ValueError(
            f"coefficients: expected to be on the CPU or on {x.device} like x, is on "
            f"{coefficients.device}"
        )
    check_number("noise_scale", noise_scale)
    check_number("clip", clip, above=0.0, finite=False)
    return _backends.support(KERNELS, [x])
