"""A whole MLP, forward and backward, in one call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._activations import ACTIVATIONS
from diffcore.ops._checks import (
    as_rows,
    check_choice,
    check_compute_dtype,
    check_like,
    check_sequence,
    check_tensor,
    out_of_autocast,
)
from diffcore.ops.mlp import native, reference

KERNELS = ("triton", "cpu")

_NAMES = tuple(ACTIVATIONS)  # in which what can't be hashed is looked for as well


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``f_L(W_L ... f_1(W_1 x + b_1) ... + b_L)``.

    Differentiable in ``x``, the weights and the biases. The fused kernel can't be differentiated
    twice and says so; the reference can.

    Args:
        x: ``[..., in]``.
        weights: one ``[out, in]`` a layer, as ``torch.nn.Linear`` keeps it.
        biases: one ``[out]`` a layer.
        activations: one a layer, the last often "identity": identity, relu, elu, silu, gelu, mish,
            tanh, sin or cos.
        compute_dtype: ``torch.bfloat16`` rounds both sides of every product, forward and backward,
            as torch.autocast would: x, weights, activations, and the gradients on their way back.
            Sums, biases and results are float32. With up to four layers the root mean square of an
            error is within 1% of that of the result or gradient itself: more where a sum over the
            batch all but cancels, as a bias's gradient may, and 15% behind relu, since rounding
            takes arguments across its kink. ``torch.float16`` likewise, on GPUs only. None or
            ``torch.float32``: float32 throughout; on a GPU None is autocast's dtype where that is on.
            The reference keeps to its arguments' own precision.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        ``[..., out of the last layer]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, shape, dtype or device, or a
            forced backend that can't run this call.
    """
    plain, chosen = None, "cpu"
    if _backends.may_go_straight(compute_dtype, backend):
        settings = compute_dtype is torch.bfloat16, torch.is_grad_enabled(), torch.get_num_threads()
        plain = _native.plain_mlp(x, weights, biases, activations, *settings)
        if isinstance(plain, Tensor):
            return plain
    if not plain:
        [x] = out_of_autocast(weights, x)
        available = support(x, weights, biases, activations, compute_dtype)
        chosen = _dispatch.choose("mlp", available, backend)
    if chosen == "reference":
        return reference.mlp(x, weights, biases, activations)
    parameters = [p for pair in zip(weights, biases, strict=True) for p in pair]
    y = run_native(x, parameters, activations, compute_dtype, chosen)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def run_native(
    x: Tensor,
    parameters: list[Tensor],
    activations: Sequence[str],
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    """``[N, rows of x, out]``: N networks, whose parameters come one network after the other."""
    names, settings = ",".join(activations), (_backends.precision(compute_dtype, x), backend)
    rows = as_rows(x)
    if _native.differentiates(x, *parameters):
        return _native.apply(native.MLP, rows, names, *settings, *parameters)[0]
    return native.forward(rows, parameters, names, False, *settings)[0]


def support(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activations: Sequence[str],
    compute_dtype: torch.dtype | None,
    network: str | None = None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them.

    `network`: the argument in which weights and biases came by turns, if it was one.
    """
    check_tensor("x", x, ("...", "in"))
    for name, given in (("weights", weights), ("biases", biases), ("activations", activations)):
        check_sequence(name, given, "one a layer")
        if not weights:
            raise ValueError(f"{network or 'weights'}: expected at least one layer, got none")
        if len(given) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)}, one a layer, got {len(given)}")
    width: int = x.shape[-1]
    if not (
        _native.layers_fit(weights, biases, width)
        and x.dtype is torch.float32
        and x.is_cpu
        and all(map(_NAMES.__contains__, activations))
    ):
        layers = zip(weights, biases, activations, strict=True)
        for i, (weight, bias, activation) in enumerate(layers):
            _check_layer(i, weight, bias, activation, width, x, network)
            width = weight.shape[0]
    check_compute_dtype(compute_dtype)
    return _backends.support(KERNELS, [x], activations, len(weights), compute_dtype=compute_dtype)


def _check_layer(
    i: int,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    width: int,
    x: Tensor,
    network: str | None,
) -> None:
    # Composing a message's parts for every layer of every call would cost more than a small MLP.
    if (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == width
        and bias.shape == weight.shape[:1]
        and weight.dtype is bias.dtype is x.dtype
        and weight.device == bias.device == x.device
        and weight.layout is bias.layout is torch.strided
        and activation in _NAMES
    ):
        return
    names = f"weights[{i}]", f"biases[{i}]"
    if network is not None:
        names = f"{network}[{2 * i}]", f"{network}[{2 * i + 1}]"
    check_tensor(names[0], weight, ("out", width))
    check_tensor(names[1], bias, (weight.shape[0],))
    check_like(names[0], weight, "x", x)
    check_like(names[1], bias, "x", x)
    check_choice(f"activations[{i}]", activation, ACTIVATIONS)
