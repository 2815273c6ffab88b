"""The loss that trains critics, networks included, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_like, check_tensor, out_of_autocast
from diffcore.ops.critic_loss import native, reference
from diffcore.ops.mlp_ensemble import support as ensemble_support


def critic_loss(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    target: Tensor,
    *,
    weight: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over the networks of ``mean(w (q_n(x) - target)^2)``, and the values q.

    With a weight ``w`` for every row it is the loss of prioritised replay, whose importance sampling
    these weights correct (Schaul et al. 2016, Section 3.4). The loss is differentiable in ``x`` and
    all parameters; in ``target`` and ``weight`` too on the reference. The kernels take every network
    forward and backward in one call, the gradients in the forward pass. They can't be differentiated
    twice and say so; the reference can. As a mean over nothing, the loss of an empty batch is NaN.

    Args:
        x: ``[B, in]``, states and actions side by side for example.
        networks: every critic's parameters, see :func:`diffcore.ops.mlp_ensemble`.
        activations: one a layer, the same for every network; see :func:`diffcore.ops.mlp`.
        target: ``[B, out]``, what every network is to come to.
        weight: ``w``, ``[B]``, of any sign, the same for every network; 1 if None. The mean is over
            the number of rows, whatever their weights add up to. Weights that require a gradient
            take the call to the reference.
        compute_dtype: of the networks' products, as in :func:`diffcore.ops.mlp`: with
            ``torch.bfloat16`` the loss is within 1%, the root mean square of a gradient's error
            within 2% of the gradient's, with the exceptions named there.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        The loss, a scalar, and q ``[N, B, out]``, which has no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, shape, dtype or device, or a
            forced backend that can't run this call.
    """
    x, target, weight = out_of_autocast(networks, x, target, weight)
    available = support(x, networks, activations, target, weight, compute_dtype)
    chosen = _dispatch.choose("critic_loss", available, backend)
    if chosen == "reference":
        return reference.critic_loss(x, networks, activations, target, weight)
    parameters = [p for network in networks for p in network]
    wanted = [
        _native.differentiates(*tensors)
        for tensors in ((x,), parameters)
    ]
    settings = (",".join(activations), wanted, _backends.precision(compute_dtype, x), chosen)
    if any(wanted):
        results = _native.apply(native.CriticLoss, x, target, weight, *settings, *parameters)
    else:
        results = native.loss_and_gradients(x, target, weight, parameters, *settings)
    return results[0], results[1]


def support(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    target: Tensor,
    weight: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("B", "in"))
    available = ensemble_support(x, networks, activations, compute_dtype)
    check_tensor("target", target, (x.shape[0], len(networks[0][-1])))
    check_like("target", target, "x", x)
    if weight is not None:
        check_tensor("weight", weight, (x.shape[0],))
        check_like("weight", weight, "x", x)
    for name in ("cpu", "triton"):
        available.restrict(
            name, lambda: _backends.no_gradient_in(("target", target), ("weight", weight))
        )
    return available
