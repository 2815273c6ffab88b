"""Random Fourier features: a linear layer and its sines and cosines in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import (
    as_rows,
    check_choice,
    check_like,
    check_number,
    check_tensor,
    checked_once,
    out_of_autocast,
)
from diffcore.ops.rff_features import native, reference

KINDS = ("sin", "cos", "cos_sin")
KERNELS = ("cuda", "triton", "cpu")


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

    Differentiable in ``x``, ``omega`` and ``bias``. The fused kernel can't be differentiated twice
    and says so; the reference can.

    The kernels' sines and cosines are within 1 ulp of those of the argument as rounded to float32,
    whatever its size; beyond 12,867 they take several times as long, on the CPU about a hundred
    times. Arguments are computed in float32 by the CPU and CUDA kernels, whatever TF32 or autocast
    would allow: the absolute error of a phase is the feature's.

    Args:
        x: ``[..., in]``.
        omega: ``[features, in]``, one frequency a row.
        bias: ``[features]``, the phases, in radians; none if None.
        kind: "sin", "cos" or "cos_sin", which is all cosines, then all sines.
        scale: a number that every feature is multiplied by.
        backend: "cuda", "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        ``[..., features]``, for "cos_sin" ``[..., 2 * features]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    _check_settings(kind, scale)
    scale = float(scale)
    plain, chosen = None, "cpu"
    if _backends.may_go_straight(None, backend):
        settings = kind, scale, torch.is_grad_enabled(), torch.get_num_threads()
        plain = _native.plain_rff_features(x, omega, bias, *settings)
        if isinstance(plain, Tensor):
            return plain
    if not plain:
        [x] = out_of_autocast(omega, x)
        chosen = _dispatch.choose("rff_features", support(x, omega, bias), backend)
    if chosen == "reference":
        return reference.rff_features(x, omega, bias, kind=kind, scale=scale)
    rows, precision = as_rows(x), _backends.precision(None, x)
    if _native.differentiates(x, omega, bias):
        arguments = (rows, omega, bias, kind, scale, precision, chosen)
        y = _native.apply(native.RffFeatures, *arguments)[0]
    else:
        y = native.forward(rows, omega, bias, kind, scale, False, precision, chosen)[0]
    return y if rows is x else y.reshape(*x.shape[:-1], y.shape[-1])


@checked_once
def _check_settings(kind: str, scale: float) -> None:
    check_choice("kind", kind, KINDS)
    check_number("scale", scale)


def support(x: Tensor, omega: Tensor, bias: Tensor | None) -> _dispatch.Support:
    """Checks the tensors and says which backends can take them."""
    check_tensor("x", x, ("...", "in"))
    check_tensor("omega", omega, ("features", x.shape[-1]))
    check_like("omega", omega, "x", x)
    if bias is not None:
        check_tensor("bias", bias, (omega.shape[0],))
        check_like("bias", bias, "x", x)
    return _backends.support(KERNELS, [x])
