"""The loss that trains Diff-SR's representation, both networks included, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import nn  # which imports ops: its modules are there when an op is called
from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import (
    check_compute_dtype,
    check_like,
    check_tensor,
    out_of_autocast,
)
from diffcore.ops._compile import require_own
from diffcore.ops.representation_loss import native, reference

KERNELS = ("triton", "cpu")


def representation_loss(
    psi: nn.MLP,
    zeta: nn.MLP,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`diffcore.ops.score_matching_loss` of ``psi(x)`` and ``zeta(perturbed)``.

    Differentiable in the networks' parameters, ``x`` and ``perturbed``; in ``offset`` and
    ``score_weight`` too on the reference. The kernels take both networks forward and backward in
    one call, the gradients in the forward pass; small networks take less time than a call each. They
    can't be differentiated twice and say so; the reference can.

    Args:
        psi: D outputs, features of what ``x`` holds.
        zeta: D * S outputs; see :func:`diffcore.ops.score_matching_loss`.
        x: ``[B, psi's inputs]``.
        perturbed: ``[B, zeta's inputs]``.
        offset: ``[B, S]``.
        score_weight: ``[B]``.
        compute_dtype: of all products, the networks' as in :func:`diffcore.ops.mlp` and the loss's
            as in :func:`diffcore.ops.score_matching_loss`: with ``torch.bfloat16`` the loss is within
            2%, the root mean square of a gradient's error within 2% of the gradient's, with the
            exceptions named there.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    psi, zeta = require_own("psi", psi, nn.MLP), require_own("zeta", zeta, nn.MLP)
    inputs = out_of_autocast(psi, x, perturbed, offset, score_weight)
    available = support(psi, zeta, *inputs, compute_dtype=compute_dtype)
    chosen = _dispatch.choose("representation_loss", available, backend)
    if chosen == "reference":
        return reference.representation_loss(psi, zeta, *inputs)
    x, perturbed, offset, score_weight = inputs
    networks = psi.weights_and_biases(), zeta.weights_and_biases()
    wanted = [
        _native.differentiates(*tensors)
        for tensors in ((x,), (perturbed,), *networks)
    ]
    settings = (
        ",".join(psi.activations),
        ",".join(zeta.activations[:-1]),
        wanted,
        _backends.precision(compute_dtype, x),
        chosen,
    )
    if any(wanted):
        arguments = (*inputs, *settings, len(networks[0]), *networks[0], *networks[1])
        return _native.apply(native.RepresentationLoss, *arguments)[0]
    return native.loss_and_gradients(*inputs, *networks, *settings)[0]


def support(
    psi: nn.MLP,
    zeta: nn.MLP,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
    *,
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("B", psi.in_dim))
    batch = x.shape[0]
    check_tensor("perturbed", perturbed, (batch, zeta.in_dim))
    check_tensor("offset", offset, (batch, "S"))
    check_tensor("score_weight", score_weight, (batch,))
    outputs = psi.out_dim * offset.shape[1]
    if zeta.out_dim != outputs:
        raise ValueError(
            f"zeta: expected {outputs} outputs, psi's {psi.out_dim} times offset's "
            f"{offset.shape[1]} columns, got {zeta.out_dim}"
        )
    parameters = [
        *psi.weights_and_biases(psi.in_dim, psi.out_dim),
        *zeta.weights_and_biases(zeta.in_dim, zeta.out_dim),
    ]
    check_like("x", x, "psi", parameters[0])
    for name, value in (
        ("zeta", parameters[-1]),
        ("perturbed", perturbed),
        ("offset", offset),
        ("score_weight", score_weight),
    ):
        check_like(name, value, "x", x)
    check_compute_dtype(compute_dtype)
    return _backends.support(
        KERNELS,
        [x, perturbed, offset, score_weight, *parameters],
        [*psi.activations, *zeta.activations],
        max(psi.hidden_layers, zeta.hidden_layers) + 1,
        compute_dtype=compute_dtype,
        refused=_backends.no_gradient_in(("offset", offset), ("score_weight", score_weight)),
    )
