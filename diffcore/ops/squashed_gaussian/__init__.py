"""A sample of soft actor-critic's policy, network included, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_bounds, check_like, check_tensor, out_of_autocast
from diffcore.ops.mlp import run_native
from diffcore.ops.mlp import support as mlp_support
from diffcore.ops.squashed_gaussian import native, reference


def squashed_gaussian(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    noise: Tensor,
    *,
    log_std_bounds: tuple[float, float] = (-5.0, 2.0),
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``a = tanh(mean(x) + std(x) z)`` for z = ``noise``, and its log density.

    mean and the log standard deviation, before a tanh that keeps it within its bounds, are the
    network's outputs (Haarnoja et al. 2018, Appendix C). Both results are differentiable in ``x`` and
    all parameters (the reparameterised sample); in ``noise`` too on the reference. The fused kernel
    can't be differentiated twice and says so; the reference can.

    Args:
        x: ``[B, in]``.
        weights, biases, activations: the network's, with 2 A outputs; see :func:`diffcore.ops.mlp`.
        noise: z, ``[B, A]``.
        log_std_bounds: the lowest and the highest log standard deviation.
        compute_dtype: of the network's products, as in :func:`diffcore.ops.mlp`. Its outputs are
            float32 sums, and everything after it is float32.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None. On
            "triton" the network alone has a kernel.

    Returns:
        Actions ``[B, A]``, and their log densities ``[B, 1]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, shape, dtype or device, or a
            forced backend that can't run this call.
    """
    x, noise = out_of_autocast(weights, x, noise)
    arguments = (x, weights, biases, activations, noise)
    log_std_bounds = check_bounds("log_std_bounds", log_std_bounds)
    available = support(*arguments, compute_dtype)
    chosen = _dispatch.choose("squashed_gaussian", available, backend)
    if chosen == "reference":
        return reference.squashed_gaussian(*arguments, log_std_bounds)
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    if chosen == "triton":
        outputs = run_native(x, parameters, activations, compute_dtype, chosen)[0]
        return reference.sample_outputs(outputs, noise, log_std_bounds)
    settings = (",".join(activations), *log_std_bounds, _backends.precision(compute_dtype, x))
    if _native.differentiates(x, *parameters):
        results = _native.apply(native.SquashedGaussian, x, noise, *settings, *parameters)
    else:
        results = native.forward(x, noise, parameters, False, *settings)
    return results[0], results[1]


def support(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    noise: Tensor,
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_tensor("x", x, ("B", "in"))
    available = mlp_support(x, weights, biases, activations, compute_dtype)
    outputs = weights[-1].shape[0]
    if outputs % 2:
        raise ValueError(f"weights[-1]: expected an even number of outputs, got {outputs}")
    check_tensor("noise", noise, (x.shape[0], outputs // 2))
    check_like("noise", noise, "x", x)
    available.restrict("cpu", lambda: _backends.no_gradient_in(("noise", noise)))
    return available
