"""The loss that trains Diff-SR's representation."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import (
    check_compute_dtype,
    check_like,
    check_tensor,
    out_of_autocast,
)
from diffcore.ops.score_matching_loss import native, reference

KERNELS = ("triton", "cpu")


def score_matching_loss(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean over the batch of ``|score_weight * psi^T zeta + offset|^2`` (Diff-SR, Eq. 18).

    ``psi^T zeta`` is the score of the perturbed transition, in R^S; zeta's last linear layer
    ``zeta = (hidden weight^T + bias).reshape(B, D, S)`` is part of the op. The paper's loss has
    ``score_weight = beta`` and ``offset = s~' - sqrt(1 - beta) s'``; the released code's
    ``score_weight = -(1 - abar) 0.449`` and ``offset = -sqrt(1 - abar) 0.449 eps``.

    Differentiable in ``psi``, ``hidden``, ``weight`` and ``bias``; in ``offset`` and
    ``score_weight`` too on the reference. The kernels compute the gradients in the forward pass
    and never hold zeta, ``[B, D, S]``. They can't be differentiated twice and say so; the reference
    can. As a mean over nothing, the loss of an empty batch is NaN; its parameters' gradients are
    zero.

    Args:
        psi: ``[B, D]``, features of (state, action).
        hidden: ``[B, H]``, what enters zeta's last linear layer.
        weight: ``[D * S, H]``, that layer's weight; output d * S + s is zeta's element (d, s).
        bias: ``[D * S]``.
        offset: ``[B, S]``.
        score_weight: ``[B]``.
        compute_dtype: ``torch.bfloat16`` multiplies in bfloat16 with float32 sums: the loss is then
            within 1%, the root mean square of a gradient's error within 1% of the gradient's (more
            where offsets all but cancel their scores). ``torch.float16`` likewise, on GPUs only.
            None or ``torch.float32``: float32 throughout. The reference keeps to its arguments' own
            precision.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    psi, hidden, offset, score_weight = out_of_autocast(weight, psi, hidden, offset, score_weight)
    tensors = (psi, hidden, weight, bias, offset, score_weight)
    chosen = _dispatch.choose("score_matching_loss", support(*tensors, compute_dtype), backend)
    if chosen == "reference":
        return reference.score_matching_loss(*tensors)
    precision = _backends.precision(compute_dtype, psi)
    wanted = [_native.differentiates(tensor) for tensor in (psi, hidden, weight, bias)]
    if any(wanted):
        return _native.apply(native.ScoreMatchingLoss, *tensors, precision, wanted, chosen)[0]
    return native.loss_and_gradients(*tensors, precision, wanted, chosen)[0]


def support(
    psi: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("psi", psi, ("B", "D"))
    batch, features = psi.shape
    check_tensor("hidden", hidden, (batch, "H"))
    check_tensor("offset", offset, (batch, "S"))
    check_tensor("score_weight", score_weight, (batch,))
    outputs = features * offset.shape[1]
    check_tensor("weight", weight, (outputs, hidden.shape[1]))
    check_tensor("bias", bias, (outputs,))
    others = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "offset": offset,
        "score_weight": score_weight,
    }
    for name, value in others.items():
        check_like(name, value, "psi", psi)
    check_compute_dtype(compute_dtype)
    refused = _backends.no_gradient_in(("offset", offset), ("score_weight", score_weight))
    if 0 in (features, hidden.shape[1], offset.shape[1]):
        refused = "features, hidden activations or state have no columns"
    tensors = [psi, *others.values()]
    return _backends.support(KERNELS, tensors, compute_dtype=compute_dtype, refused=refused)
