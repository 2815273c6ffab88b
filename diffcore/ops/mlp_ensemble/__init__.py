"""Several MLPs of one shape on the same input, forward and backward in one call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_sequence, check_tensor, out_of_autocast
from diffcore.ops.mlp import run_native
from diffcore.ops.mlp import support as mlp_support
from diffcore.ops.mlp_ensemble import reference


def mlp_ensemble(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`diffcore.ops.mlp` of every network, such as the two critics of an actor-critic agent.

    Differentiable like it, in ``x`` and all parameters.

    Args:
        x: ``[..., in]``.
        networks: every network's parameters as ``[weight, bias, weight, bias, ...]`` from input to
            output, weights ``[out, in]``. The networks have the same shapes.
        activations: one a layer, the same for every network; see :func:`diffcore.ops.mlp`.
        compute_dtype: what to multiply in; see :func:`diffcore.ops.mlp`.
        backend: "triton", "cpu" or "reference"; the fastest that can run the call if None.

    Returns:
        ``[N, ..., out of the last layer]``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, shape, dtype or device, or a
            forced backend that can't run this call.
    """
    plain, chosen = None, "cpu"
    if _backends.may_go_straight(compute_dtype, backend):
        settings = compute_dtype is torch.bfloat16, torch.is_grad_enabled(), torch.get_num_threads()
        plain = _native.plain_mlp_ensemble(x, networks, activations, *settings)
        if isinstance(plain, Tensor):
            return plain
    if not plain:
        [x] = out_of_autocast(networks, x)
        available = support(x, networks, activations, compute_dtype)
        chosen = _dispatch.choose("mlp_ensemble", available, backend)
    if chosen == "reference":
        return reference.mlp_ensemble(x, networks, activations)
    parameters = [p for network in networks for p in network]
    y = run_native(x, parameters, activations, compute_dtype, chosen)
    return y if x.ndim == 2 else y.reshape(len(networks), *x.shape[:-1], y.shape[-1])


def support(
    x: Tensor,
    networks: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    compute_dtype: torch.dtype | None,
) -> _dispatch.Support:
    """Checks the arguments and says which backends can take them."""
    check_sequence("networks", networks, "one a network")
    if not networks:
        raise ValueError("networks: expected at least one network, got none")
    for i, network in enumerate(networks):
        check_sequence(f"networks[{i}]", network, "of a weight and a bias a layer")
    first = networks[0]
    if len(first) % 2:
        raise ValueError(
            f"networks[0]: expected a weight and a bias for every layer, got {len(first)} tensors"
        )
    layers = [*first[::2]], [*first[1::2]]
    available = mlp_support(x, *layers, activations, compute_dtype, "networks[0]")
    for i, network in enumerate(networks[1:], start=1):
        if len(network) != len(first):
            raise ValueError(
                f"networks[{i}]: expected {len(first)} tensors like networks[0], got {len(network)}"
            )
        if _native.same_sizes(network, first):
            continue
        for j, (parameter, like) in enumerate(zip(network, first, strict=True)):
            if not (
                isinstance(parameter, Tensor)
                and parameter.shape == like.shape
                and parameter.dtype is like.dtype
                and parameter.device == like.device
            ):
                _reject(f"networks[{i}][{j}]", parameter, like)
    available.restrict("cpu", lambda: _too_many(len(networks)))
    return available


def _too_many(networks: int) -> str | None:
    most = _native._core.max_networks
    return f"{networks} networks, the CPU kernels take at most {most}" if networks > most else None


def _reject(name: str, parameter: Tensor, like: Tensor) -> None:
    check_tensor(name, parameter, tuple(like.shape))
    raise TypeError(
        f"{name}: expected {like.dtype} on {like.device} like networks[0], "
        f"got {parameter.dtype} on {parameter.device}"
    )
