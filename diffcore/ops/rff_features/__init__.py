"""Random Fourier features: a linear layer and its sines and cosines in one call."""

from __future__ import annotations

from torch import Tensor

from diffcore.ops import _dispatch
from diffcore.ops._checks import (
    check_choice,
    check_like,
    check_number,
    check_tensor,
    out_of_autocast,
)
from diffcore.ops.rff_features import reference

KINDS = ("sin", "cos", "cos_sin")


def rff_features(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "sin",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``scale * f(x omega^T + bias)`` with f = sin, cos or both (Rahimi & Recht 2007, Algorithm 1).

    Differentiable in ``x``, ``omega`` and ``bias``.

    Args:
        x: ``[..., in]``.
        omega: ``[features, in]``, one frequency a row.
        bias: ``[features]``, the phases, in radians; none if None.
        kind: "sin", "cos" or "cos_sin", which is all cosines, then all sines.
        scale: a number that every feature is multiplied by.
        backend: "reference" is the only one; the fastest that can run the call if None.

    Returns:
        ``[..., features]``, for "cos_sin" ``[..., 2 * features]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    [x] = out_of_autocast(omega, x)
    available = support(x, omega, bias, kind=kind, scale=scale)
    _dispatch.choose("rff_features", available, backend)
    return reference.rff_features(x, omega, bias, kind=kind, scale=scale)


def support(
    x: Tensor,
    omega: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "sin",
    scale: float = 1.0,
    backend: str | None = None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("...", "in"))
    check_tensor("omega", omega, ("features", x.shape[-1]))
    check_like("omega", omega, "x", x)
    if bias is not None:
        check_tensor("bias", bias, (omega.shape[0],))
        check_like("bias", bias, "x", x)
    check_choice("kind", kind, KINDS)
    check_number("scale", scale)
    return {"reference": None}
