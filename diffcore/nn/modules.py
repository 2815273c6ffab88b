"""Denoiser and critics: plain modules whose parameters come in the order the ops expect.

``parameters()`` is weight, bias from input to output (Denoiser: time MLP, then trunk; TwinCritic:
q1, then q2). Weights start, unless said otherwise, as in DIPO's released code: normal with standard
deviation 1 / (2 sqrt(fan_in)), truncated at two standard deviations; biases at 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffcore.ops._activations import ACTIVATIONS
from diffcore.ops._checks import (
    INTEGERS,
    check_choice,
    check_compute_dtype,
    check_levels,
    check_like,
    check_positive_int,
    check_tensor,
    checked_inputs,
    out_of_autocast,
)
from diffcore.ops._compile import has_global_hooks, has_hooks
from diffcore.ops._native import (
    inputs_fit,
    linear_stack,
    mlp_stack,
    mlp_stacks,
    requires_gradient,
)
from diffcore.ops.critic_loss import critic_loss
from diffcore.ops.mlp import mlp
from diffcore.ops.mlp_ensemble import mlp_ensemble


class MLP(nn.Module):
    """``hidden_layers`` layers of ``hidden_dim`` with an activation, then a linear output.

    Args:
        in_dim, hidden_dim, out_dim: widths.
        hidden_layers: at least 1.
        activation: identity, relu, elu, silu, gelu, mish, tanh, sin or cos; one for all hidden
            layers, or a sequence with one for each.
        init: how layers start. ``truncated_normal``: see above; ``uniform``: as ``torch.nn.Linear``
            does, weights and biases within 1 / sqrt(fan_in); ``orthogonal``: biases at 0.
        compute_dtype: what its calls multiply in; see :func:`diffcore.ops.mlp`. Ops that take a whole
            network, such as losses, are told by an argument of their own.

    The layers hold weights and aren't called. Parametrized ones, such as weight_norm makes, work;
    hooks on a layer, a layer of another kind or one without a bias are refused. Hooks for all modules
    (``torch.nn.modules.module.register_module_forward_hook``) don't meet them.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        hidden_layers: int = 3,
        activation: str | Sequence[str] = "mish",
        init: str = "truncated_normal",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_dim = check_positive_int("in_dim", in_dim)
        hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        out_dim = check_positive_int("out_dim", out_dim)
        hidden_layers = check_positive_int("hidden_layers", hidden_layers)
        check_choice("init", init, _INITS)
        check_compute_dtype(compute_dtype)
        if not isinstance(activation, (str, Sequence)):
            check_choice("activation", activation, ACTIVATIONS)
        hidden = [activation] * hidden_layers if isinstance(activation, str) else [*activation]
        if len(hidden) != hidden_layers:
            raise ValueError(f"activation: expected {hidden_layers}, one a layer, got {hidden}")
        for name in hidden:
            check_choice("activation", name, ACTIVATIONS)
        self.in_dim, self.hidden_dim, self.out_dim = in_dim, hidden_dim, out_dim
        self.hidden_layers = hidden_layers
        self.activations = [*hidden, "identity"]
        self.compute_dtype = compute_dtype
        widths = [in_dim] + [hidden_dim] * hidden_layers + [out_dim]
        self.layers = nn.ModuleList(_linear(a, b, init) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[..., in_dim]`` -> ``[..., out_dim]``, on a backend of :func:`diffcore.ops.mlp`."""
        return self._through(self.hidden_layers + 1, x, backend)

    def hidden(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``[..., in_dim]`` -> ``[..., hidden_dim]``: what enters the last layer."""
        return self._through(self.hidden_layers, x, backend)

    def _through(self, layers: int, x: Tensor, backend: str | None) -> Tensor:
        if not inputs_fit([x], (self.in_dim,), self):
            [x] = checked_inputs(self, ("x",), [x], (self.in_dim,))
        parameters = self._layers_parameters()[: 2 * layers]
        activations = self.activations[:layers]
        weights, biases = parameters[::2], parameters[1::2]
        return mlp(
            x, weights, biases, activations, compute_dtype=self.compute_dtype, backend=backend
        )

    def weights_and_biases(
        self, in_dim: int | None = None, out_dim: int | None = None
    ) -> list[Tensor]:
        """Weight and bias of every layer in turn, for an op that takes the whole network.

        Args:
            in_dim, out_dim: what the widths must be.

        Raises:
            TypeError: if this network or one of its layers does more than its weights say: they would
                be read, and the rest ignored.
            ValueError: if the layers' shapes don't fit each other, or the widths asked for.
        """
        if (parameters := mlp_stack(self, MLP, in_dim, out_dim)) is not None:
            return parameters
        if (why := _altered_itself(self, MLP)) is not None:
            raise TypeError(f"{why}, but is run by its weights alone")
        return self._layers_parameters(in_dim, out_dim)

    def _layers_parameters(
        self, in_dim: int | None = None, out_dim: int | None = None
    ) -> list[Tensor]:
        # This dictionary is ten times quicker than attributes of a module.
        layers: Any = self._modules["layers"]
        quick = linear_stack(layers._modules, len(self.activations), in_dim, out_dim)
        if quick is not None:
            return quick
        result: list[Tensor] = []
        width: int | None = None
        layer: Any
        for i, layer in enumerate(layers._modules.values()):
            if (why := _altered_itself(layer, nn.Linear)) is not None:
                raise TypeError(f"MLP.layers[{i}]: {why}, but is run by its weights alone")
            own = layer._parameters
            weight, bias = own.get("weight"), own.get("bias")
            if weight is None or bias is None:  # parametrized, by spectral_norm for instance
                weight, bias = layer.weight, layer.bias
            if bias is None:
                raise TypeError(f"MLP.layers[{i}]: expected a Linear with a bias, got one without")
            out, into = weight.shape
            if bias.shape != (out,):
                raise ValueError(
                    f"MLP.layers[{i}].bias: expected shape {[out]}, got {list(bias.shape)}"
                )
            if width is not None and into != width:
                raise ValueError(
                    f"MLP.layers[{i}].weight: expected shape [out, {width}], got {[out, into]}"
                )
            result += (weight, bias)
            width = out
        if len(result) != 2 * len(self.activations):
            expected = len(self.activations)
            raise ValueError(f"MLP.layers: expected {expected} layers, got {len(result) // 2}")
        for end, wanted, got in (
            ("inputs", in_dim, result[0].shape[1]),
            ("outputs", out_dim, result[-2].shape[0]),
        ):
            if wanted is not None and got != wanted:
                raise ValueError(f"MLP: expected {wanted} {end}, got layers with {got}")
        return result


def forced(backend: str | None) -> dict[str, Any]:
    """Arguments for calling a network, which may have a forward that doesn't know of backends."""
    return {} if backend is None else {"backend": backend}


def altered(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a call of ``module`` does beside what a ``kind`` with its weights does, or None."""
    if has_global_hooks():
        return "hooks are registered for all modules"
    return _altered_itself(module, kind)


def _altered_itself(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """The same, without what a call of any module does: of one that isn't called anyway."""
    if type(module).forward is not kind.forward or "forward" in module.__dict__:
        return f"{type(module).__name__} has a forward that isn't {kind.__name__}'s"
    if has_hooks(module):
        return f"{type(module).__name__} has hooks"
    return None


def _altered_networks(module: Any, *names: str) -> str | None:
    """What is altered about the MLPs that a module with one activation was made of, or None."""
    for name in names:
        mlp = module._modules[name]
        if (why := altered(mlp, MLP)) is not None:
            return why
        hidden, last = mlp.activations[:-1], mlp.activations[-1]
        wanted = module.activation
        if hidden != ([wanted] * len(hidden) if isinstance(wanted, str) else [*wanted]):
            return f"{type(module).__name__}.{name} has activations {hidden}, not {wanted!r}"
        if last != "identity":
            return f"{type(module).__name__}.{name} ends with activation {last!r}"
    return None


def _differ(one: Any, other: Any) -> bool:
    """Whether two MLPs can't be computed as an ensemble of one kind."""
    return bool(
        one.activations != other.activations or one.compute_dtype != other.compute_dtype
    )


def each(q: Tensor) -> tuple[Tensor, Tensor]:
    """q1 and q2 of ``[2, ...]``, to do with what one likes.

    Autograd has one node for either way, but refuses to change unbind's views in place.
    """
    split: Any = torch.unbind_copy  # of which torch's annotation says that it returns nothing
    q1, q2 = split(q, 0) if requires_gradient(q) else q.unbind(0)
    return q1, q2


def loss_of_values(
    q1: Tensor, q2: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What :meth:`TwinCritic.loss` returns, of critics that are more than their weights."""
    check_tensor("target", target, tuple(q1.shape))
    if weight is not None:
        target, weight = out_of_autocast(None, target, weight)
        check_tensor("weight", weight, tuple(q1.shape[:-1]))
        check_like("weight", weight, "target", target)
    loss = _mean_square(q1, target, weight) + _mean_square(q2, target, weight)
    return loss, torch.stack([q1, q2]).detach()


def _mean_square(q: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return mse_loss(q, target)
    return (weight[..., None] * mse_loss(q, target, reduction="none")).mean()


_INITS = ("truncated_normal", "uniform", "orthogonal")


def _linear(in_dim: int, out_dim: int, init: str) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim)
    if init == "truncated_normal":
        std = 1 / (2 * math.sqrt(in_dim))
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    elif init == "orthogonal":
        nn.init.orthogonal_(layer.weight)
    if init != "uniform":
        nn.init.zeros_(layer.bias)
    return layer


def _embedding_frequencies(dim: int) -> list[float]:
    half = dim // 2
    return [10000 ** (-i / max(half - 1, 1)) for i in range(half)]


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of step indices: sin, then cos of t * 10000^(-i / (dim/2 - 1)).

    Args:
        t: integer ``[B]``.
        dim: even width.

    Returns:
        float64 ``[B, dim]``.
    """
    frequencies = torch.tensor(_embedding_frequencies(dim), dtype=torch.float64, device=t.device)
    angle = t.to(torch.float64)[:, None] * frequencies[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Denoiser(nn.Module):
    """eps(x, state, t), the noise in a perturbed action (DIPO, Section 4; the released code's MLP).

    A sinusoidal embedding of t passes through a small MLP and joins x and the state:
    ``trunk([x, time_mlp(embedding(t)), state])``.

    Args:
        state_dim, action_dim: widths of the condition and of what is denoised.
        hidden_dim, hidden_layers: of the trunk; the time MLP has one hidden layer of the same width.
        time_dim: width of the time embedding, even.
        activation: see :class:`MLP`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        hidden_layers: int = 3,
        time_dim: int = 32,
        activation: str = "mish",
    ) -> None:
        super().__init__()
        state_dim = check_positive_int("state_dim", state_dim)
        action_dim = check_positive_int("action_dim", action_dim)
        time_dim = check_positive_int("time_dim", time_dim)
        if time_dim % 2:
            raise ValueError(f"time_dim: expected an even number, got {time_dim}")
        self.state_dim, self.action_dim, self.time_dim = state_dim, action_dim, time_dim
        self.activation = activation
        self.time_mlp = MLP(time_dim, hidden_dim, time_dim, 1, activation)
        self.trunk = MLP(
            action_dim + time_dim + state_dim, hidden_dim, action_dim, hidden_layers, activation
        )

    def altered(self) -> str | None:
        """What a call does beside what weights and ``activation`` say, in words, or None."""
        return altered(self, Denoiser) or _altered_networks(self, "time_mlp", "trunk")

    def unaltered_weights_and_biases(self) -> list[Tensor] | None:
        """What :meth:`weights_and_biases` says, or None where :meth:`altered` says something."""
        found = self._quick_weights_and_biases(False)
        if found is None and self.altered() is None:
            return self.weights_and_biases()
        return found

    def plain_weights_and_biases(self) -> list[Tensor] | None:
        """The same, None as well where they aren't all plain float32 tensors on the CPU."""
        return self._quick_weights_and_biases(True)

    def _quick_weights_and_biases(self, plain: bool) -> list[Tensor] | None:
        in_dim = self.action_dim + self.time_dim + self.state_dim
        networks = (("time_mlp", self.time_dim, self.time_dim), ("trunk", in_dim, self.action_dim))
        stacks = mlp_stacks(self, Denoiser, networks, MLP, self.activation, plain)
        return None if stacks is None or len(stacks[0]) != 4 else [*stacks[0], *stacks[1]]

    def weights_and_biases(self) -> list[Tensor]:
        """The time MLP's, then the trunk's: see :meth:`MLP.weights_and_biases`."""
        own: dict[str, Any] = self._modules
        time_dim, action_dim = self.time_dim, self.action_dim
        time_parameters = own["time_mlp"].weights_and_biases(time_dim, time_dim)
        if len(time_parameters) != 4:
            raise ValueError(
                f"Denoiser.time_mlp: expected 2 layers, got {len(time_parameters) // 2}"
            )
        in_dim = action_dim + time_dim + self.state_dim
        return [*time_parameters, *own["trunk"].weights_and_biases(in_dim, action_dim)]

    def forward(self, x: Tensor, state: Tensor, t: Tensor, *, backend: str | None = None) -> Tensor:
        """x ``[B, A]``, state ``[B, S]``, t integer ``[B]`` -> eps ``[B, A]``.

        Any level is taken: a denoiser doesn't know its schedule.
        """
        inputs, widths = [x, state], (self.action_dim, self.state_dim)
        if not inputs_fit(inputs, widths, self._modules["trunk"]):
            x, state = checked_inputs(self, ("x", "state"), inputs, widths, "B")
        check_levels(t, "x", x, INTEGERS)
        embedding = time_embedding(t, self.time_dim).to(x.dtype)
        time_features = self.time_mlp(embedding, **forced(backend))
        together = torch.cat([x, time_features, state], dim=-1)
        eps: Tensor = self.trunk(together, **forced(backend))
        return eps


class TwinCritic(nn.Module):
    """Two independent Q(state, action) (Fujimoto et al. 2018).

    Args:
        state_dim, action_dim: widths; the input is ``[state, action]``.
        hidden_dim, hidden_layers, activation, compute_dtype: see :class:`MLP`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        hidden_layers: int = 3,
        activation: str = "mish",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_dim = check_positive_int("state_dim", state_dim)
        action_dim = check_positive_int("action_dim", action_dim)
        self.state_dim, self.action_dim, self.activation = state_dim, action_dim, activation
        widths = (state_dim + action_dim, hidden_dim, 1)
        self.q1, self.q2 = (
            MLP(*widths, hidden_layers, activation, compute_dtype=compute_dtype) for _ in range(2)
        )

    def altered(self) -> str | None:
        """What a call does beside what weights and ``activation`` say, in words, or None."""
        return altered(self, TwinCritic) or _altered_networks(self, "q1", "q2")

    def unaltered_networks(self) -> list[list[Tensor]] | None:
        """What :meth:`networks` says, or None where :meth:`altered` says something."""
        found = self._quick_networks(False)
        return self.networks() if found is None and self.altered() is None else found

    def plain_networks(self) -> list[list[Tensor]] | None:
        """The same, None as well where they aren't all plain float32 tensors on the CPU."""
        return self._quick_networks(True)

    def _quick_networks(self, plain: bool) -> list[list[Tensor]] | None:
        in_dim = self.state_dim + self.action_dim
        networks = (("q1", in_dim, 1), ("q2", in_dim, 1))
        return mlp_stacks(self, TwinCritic, networks, MLP, self.activation, plain)

    def networks(self) -> list[list[Tensor]]:
        """Both critics' parameters: see :meth:`MLP.weights_and_biases`."""
        own: dict[str, Any] = self._modules
        in_dim = self.state_dim + self.action_dim
        return [own[name].weights_and_biases(in_dim, 1) for name in ("q1", "q2")]

    def forward(
        self, state: Tensor, action: Tensor, *, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """state ``[B, S]``, action ``[B, A]`` -> (q1, q2), each ``[B, 1]``."""
        x = self._inputs(state, action)
        first, second = self.q1, self.q2
        networks = None if _differ(first, second) else self.unaltered_networks()
        if networks is None:
            return first(x, **forced(backend)), second(x, **forced(backend))
        kinds, dtype = first.activations, first.compute_dtype
        return each(mlp_ensemble(x, networks, kinds, compute_dtype=dtype, backend=backend))

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``mean(w (q1 - target)^2) + mean(w (q2 - target)^2)``, and q1, q2 without a gradient.

        Args:
            state: ``[B, S]``.
            action: ``[B, A]``.
            target: ``[B, 1]``.
            weight: ``w``, ``[B]``; 1 if None. See :func:`diffcore.ops.critic_loss`.
            backend: one of :func:`diffcore.ops.critic_loss`.

        Returns:
            A scalar, and ``[2, B, 1]``.
        """
        first = self.q1
        networks = None if _differ(first, self.q2) else self.unaltered_networks()
        if networks is None:
            q1, q2 = self(state, action, **forced(backend))
            return loss_of_values(q1, q2, target, weight)
        arguments = self._inputs(state, action), networks, first.activations, target
        dtype = first.compute_dtype
        return critic_loss(*arguments, weight=weight, compute_dtype=dtype, backend=backend)

    def _inputs(self, state: Tensor, action: Tensor) -> Tensor:
        inputs, widths = [state, action], (self.state_dim, self.action_dim)
        if not inputs_fit(inputs, widths, self._modules["q1"]):
            inputs = checked_inputs(self, ("state", "action"), inputs, widths)
        return torch.cat(inputs, dim=-1)
