"""The soft value of states, and the loss of the policy, all networks included, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffcore.ops import _backends, _dispatch, _native
from diffcore.ops._checks import check_like, check_number, check_tensor, out_of_autocast
from diffcore.ops._compile import require_own
from diffcore.ops.soft_value import native, reference

if TYPE_CHECKING:
    from diffcore.nn import MLP, Psi, SquashedGaussian, TwinRFFCritic

KERNELS = ("cpu",)


def soft_value(
    policy: SquashedGaussian,
    psi: Psi,
    critics: TwinRFFCritic,
    state: Tensor,
    noise: Tensor,
    temperature: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``min(Q1, Q2)(psi(s, a)) - temperature log pi(a|s)`` for an action that the policy draws.

    That is V(s). Its negative mean is the loss of soft actor-critic's policy. The kernel computes the
    loss's gradients in the forward pass, and only those of the policy's parameters: with others
    wanted, of the judges' for example, the op runs in parts, each on a backend of its own. The kernel
    can't be differentiated twice and says so; the reference can. As a mean over nothing, the loss of
    an empty batch is NaN.

    Args:
        policy: draws ``a``; see :class:`diffcore.nn.SquashedGaussian`.
        psi, critics: judge it; see :class:`diffcore.nn.Psi`, :class:`diffcore.nn.TwinRFFCritic`. All
            three networks multiply in what their ``compute_dtype`` says.
        state: ``[B, S]``.
        noise: ``[B, A]``, the policy's.
        temperature: 0-d.
        backend: "cpu" or "reference"; the fastest that can run the call if None. "reference" runs all
            parts on their references.

    Returns:
        The loss, a scalar; V ``[B, 1]`` and log pi ``[B, 1]``, which have no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a forced
            backend that can't run this call.
    """
    inputs = out_of_autocast(policy, state, noise, temperature)
    networks = _networks(policy, psi, critics)
    available, parameters, *judges = support(*networks, *inputs)
    chosen = _dispatch.choose("soft_value", available, backend)
    if chosen == "reference":
        state, noise, temperature = inputs
        return reference.soft_value(networks[0], psi, critics, state, noise, temperature, backend)
    policy, psi, critics = networks
    kinds = [",".join(n.activations) for n in (policy.trunk, psi.trunk, critics.q1.head)]
    precision = _backends.precision(policy.trunk.compute_dtype, state)
    settings = (*kinds, *policy.log_std_bounds, precision)
    if _native.differentiates(*parameters):
        arguments = (*inputs, *judges, *settings, *parameters)
        results = _native.apply(native.SoftValue, *arguments)
    else:
        results = native.values_and_gradients(*inputs, *judges, parameters, False, *settings)
    return results[0], results[1], results[2]


def _networks(
    policy: object, psi: object, critics: object
) -> tuple[SquashedGaussian, Psi, TwinRFFCritic]:
    """Out of what may wrap them."""
    from diffcore.nn import Psi, SquashedGaussian, TwinRFFCritic

    return (
        require_own("policy", policy, SquashedGaussian),
        require_own("psi", psi, Psi),
        require_own("critics", critics, TwinRFFCritic),
    )


def support(
    policy: SquashedGaussian,
    psi: Psi,
    critics: TwinRFFCritic,
    state: Tensor,
    noise: Tensor,
    temperature: Tensor,
) -> tuple[_dispatch.Support, list[Tensor], list[Tensor], list[Tensor]]:
    """Checks the arguments and says which backends can take them.

    And the parameters of the policy, of psi, and of one critic after the other.
    """
    check_tensor("state", state, ("B", policy.state_dim))
    check_tensor("noise", noise, (state.shape[0], policy.action_dim))
    check_tensor("temperature", temperature, ())
    if (psi.state_dim, psi.action_dim) != (policy.state_dim, policy.action_dim):
        raise ValueError(
            f"psi: expected states of {policy.state_dim} and actions of {policy.action_dim} numbers "
            f"like the policy's, got {psi.state_dim} and {psi.action_dim}"
        )
    if critics.feature_dim != psi.feature_dim:
        raise ValueError(
            f"critics: expected {psi.feature_dim} features like psi's, got {critics.feature_dim}"
        )
    check_like("noise", noise, "state", state)
    check_like("temperature", temperature, "state", state)
    low, high = policy.log_std_bounds
    check_number("policy.log_std_bounds[0]", low)
    check_number("policy.log_std_bounds[1]", high, above=low)
    if (why := _altered(policy, psi, critics)) is not None:
        refused = f"the parts are called, since {why}"
        return _backends.support(KERNELS, [state], refused=refused), [], [], []
    parameters, psi_parameters = policy.weights_and_biases(), psi.weights_and_biases()
    heads = [parameter for head in critics.networks() for parameter in head]
    check_like("state", state, "the policy", parameters[0])
    check_like("psi", psi_parameters[0], "state", state)
    check_like("critics", heads[0], "state", state)
    judges, networks = psi_parameters + heads, [policy.trunk, psi.trunk, critics.q1.head]
    available = _backends.support(
        KERNELS,
        [state, noise, temperature, *parameters, *judges],
        [activation for network in networks for activation in network.activations],
        max(network.hidden_layers for network in networks) + 1,
        compute_dtype=policy.trunk.compute_dtype,
        refused=_refused(networks, [state, noise, temperature, *judges]),
    )
    return available, parameters, psi_parameters, heads


def _altered(policy: SquashedGaussian, psi: Psi, critics: TwinRFFCritic) -> str | None:
    """What a call of one of them does beside what its weights say."""
    return policy.altered() or psi.altered() or critics.altered()


def _refused(networks: list[MLP], constants: list[Tensor]) -> str | None:
    """Why the kernel can't take these, or None."""
    if _native.differentiates(*constants):
        return "something beside the policy requires a gradient, which the kernel doesn't compute"
    if len({network.compute_dtype for network in networks}) > 1:
        return "the networks multiply in different compute_dtypes"
    return None
