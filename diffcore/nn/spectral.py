"""Diff-SR's networks: the factors psi and zeta of the score, and the critic on Fourier features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffcore.nn.fourier import RandomFourierFeatures
from diffcore.nn.modules import MLP, altered, each, forced, loss_of_values, time_embedding
from diffcore.ops._checks import check_choice, check_positive_int, checked_inputs
from diffcore.ops._native import inputs_fit, same_sizes
from diffcore.ops.critic_loss import critic_loss
from diffcore.ops.mlp_ensemble import mlp_ensemble
from diffcore.ops.rff_features import KINDS

CONDITIONING = ("alpha_bar", "time_embedding")
FREQUENCIES = ("learned", "gaussian", "orthogonal")


class Psi(nn.Module):
    """psi(s, a) in R^d, features of a state and an action.

    Args:
        state_dim, action_dim: widths; the input is ``[state, action]``.
        feature_dim: d.
        hidden_dim, hidden_layers, activation, compute_dtype: see :class:`diffcore.nn.MLP`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        feature_dim: int = 256,
        hidden_dim: int = 256,
        hidden_layers: int = 1,
        activation: str = "elu",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_dim = check_positive_int("state_dim", state_dim)
        action_dim = check_positive_int("action_dim", action_dim)
        feature_dim = check_positive_int("feature_dim", feature_dim)
        self.state_dim, self.action_dim, self.feature_dim = state_dim, action_dim, feature_dim
        widths = (state_dim + action_dim, hidden_dim, feature_dim)
        self.trunk = MLP(*widths, hidden_layers, activation, "uniform", compute_dtype)

    def altered(self) -> str | None:
        """What a call does beside what the weights say, in words, or None."""
        own: Any = self._modules
        return altered(self, Psi) or altered(own["trunk"], MLP)

    def weights_and_biases(self) -> list[Tensor]:
        """See :meth:`MLP.weights_and_biases`."""
        own: Any = self._modules
        in_dim = self.state_dim + self.action_dim
        result: list[Tensor] = own["trunk"].weights_and_biases(in_dim, self.feature_dim)
        return result

    def forward(self, state: Tensor, action: Tensor, *, backend: str | None = None) -> Tensor:
        """state ``[B, S]``, action ``[B, A]`` -> ``[B, d]``."""
        psi: Tensor = self.trunk(self.inputs(state, action), **forced(backend))
        return psi

    def inputs(self, state: Tensor, action: Tensor) -> Tensor:
        """What enters the trunk."""
        inputs, widths = [state, action], (self.state_dim, self.action_dim)
        if not inputs_fit(inputs, widths, self._modules["trunk"]):
            inputs = checked_inputs(self, ("state", "action"), inputs, widths)
        return torch.cat(inputs, dim=-1)


class Zeta(nn.Module):
    """zeta(s~, level) in R^(d x S): for each feature a direction in the space of states.

    ``psi^T zeta`` is the score of the perturbed transition. Its last layer has d * S outputs, so
    :func:`diffcore.ops.representation_loss`, which takes the trunk, never holds what it gives.

    Args:
        state_dim: S, the width of the perturbed next state.
        feature_dim: d.
        hidden_dim, hidden_layers, activation, compute_dtype: see :class:`diffcore.nn.MLP`.
        conditioning: how zeta learns of the noise level. ``alpha_bar``: abar is one more input;
            ``time_embedding``: a sinusoidal embedding of its index, through a small MLP.
        time_dim: width of that embedding, even.
    """

    def __init__(
        self,
        state_dim: int,
        feature_dim: int = 256,
        hidden_dim: int = 512,
        hidden_layers: int = 1,
        activation: str = "elu",
        conditioning: str = "alpha_bar",
        time_dim: int = 32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_dim = check_positive_int("state_dim", state_dim)
        feature_dim = check_positive_int("feature_dim", feature_dim)
        check_choice("conditioning", conditioning, CONDITIONING)
        time_dim = check_positive_int("time_dim", time_dim)
        if time_dim % 2:
            raise ValueError(f"time_dim: expected an even number, got {time_dim}")
        self.state_dim, self.feature_dim = state_dim, feature_dim
        self.time_dim = time_dim
        self.time_mlp: MLP | None = None
        level_dim = 1
        if conditioning == "time_embedding":
            widths = (time_dim, 2 * time_dim, time_dim)
            self.time_mlp = MLP(*widths, 1, "relu", "uniform", compute_dtype)
            level_dim = time_dim
        self.trunk = MLP(
            state_dim + level_dim,
            hidden_dim,
            feature_dim * state_dim,
            hidden_layers,
            activation,
            "uniform",
            compute_dtype,
        )

    @property
    def last(self) -> nn.Linear:
        """The last layer. Output d * S + s is the element (d, s) of zeta."""
        layer = self.trunk.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def hidden(
        self, perturbed: Tensor, alpha_bar: Tensor, level: Tensor, *, backend: str | None = None
    ) -> Tensor:
        """What enters the last layer, ``[B, hidden_dim]``; arguments as for :meth:`inputs`."""
        inputs = self.inputs(perturbed, alpha_bar, level, backend=backend)
        return self.trunk.hidden(inputs, backend=backend)

    def inputs(
        self, perturbed: Tensor, alpha_bar: Tensor, level: Tensor, *, backend: str | None = None
    ) -> Tensor:
        """What enters the trunk.

        Args:
            perturbed: s~, ``[B, S]``.
            alpha_bar: abar, ``[B, 1]``.
            level: its index, integer ``[B]``.
        """
        inputs, widths = [perturbed], (self.state_dim,)
        if not inputs_fit(inputs, widths, self._modules["trunk"]):
            [perturbed] = checked_inputs(self, ("perturbed",), inputs, widths)
        condition = alpha_bar
        if self.time_mlp is not None:
            embedding = time_embedding(level, self.time_dim).to(perturbed.dtype)
            condition = self.time_mlp(embedding, **forced(backend))
        return torch.cat([perturbed, condition], dim=-1)

    def forward(
        self, perturbed: Tensor, alpha_bar: Tensor, level: Tensor, *, backend: str | None = None
    ) -> Tensor:
        """zeta, ``[B, d, S]``; arguments as for :meth:`inputs`."""
        inputs = self.inputs(perturbed, alpha_bar, level, backend=backend)
        flat: Tensor = self.trunk(inputs, **forced(backend))
        return flat.unflatten(-1, (self.feature_dim, self.state_dim))


class RFFCritic(nn.Module):
    """Q = phi^T xi on ``phi = elu(W2 f(W1 psi))``, f the sine or cosine: Fourier features of psi.

    Args:
        feature_dim: width of psi.
        hidden_dim: number of frequencies, and width of phi.
        frequencies: W1. ``learned``: parameters like all others, starting small; ``gaussian`` or
            ``orthogonal``: drawn once, see :class:`diffcore.nn.RandomFourierFeatures`.
        kind: f: "sin", "cos" or, twice as wide, "cos_sin".
        lengthscale: of the Gaussian kernel that drawn frequencies stand for. psi's distances grow
            with the square root of its width.
        compute_dtype: of the layers behind drawn frequencies, or of all where these are learned; see
            :class:`diffcore.nn.MLP`.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int = 256,
        frequencies: str = "learned",
        kind: str = "sin",
        lengthscale: float = 16.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("frequencies", frequencies, FREQUENCIES)
        check_choice("kind", kind, KINDS)
        self.fourier: RandomFourierFeatures | None = None
        if frequencies == "learned" and kind != "cos_sin":
            # f is an activation, and the whole critic one MLP.
            widths = (feature_dim, hidden_dim, 1)
            self.head = MLP(*widths, 2, (kind, "elu"), "uniform", compute_dtype)
            return
        self.fourier = RandomFourierFeatures(
            feature_dim,
            hidden_dim,
            kind=kind,
            lengthscale=lengthscale,
            orthogonal=frequencies == "orthogonal",
            learnable=frequencies == "learned",
            bias=kind != "cos_sin",
        )
        self.head = MLP(self.fourier.out_dim, hidden_dim, 1, 1, "elu", "uniform", compute_dtype)

    @property
    def second(self) -> nn.Linear:
        """The layer W2."""
        layer = self.head.layers[-2]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, psi: Tensor, *, backend: str | None = None) -> Tensor:
        """psi ``[B, feature_dim]`` -> Q ``[B, 1]``."""
        q: Tensor = self.head(self._fourier(psi, backend), **forced(backend))
        return q

    def phi(self, psi: Tensor, *, backend: str | None = None) -> Tensor:
        """psi ``[B, feature_dim]`` -> phi ``[B, hidden_dim]``, in which Q is linear."""
        return self.head.hidden(self._fourier(psi, backend), backend=backend)

    def _fourier(self, psi: Tensor, backend: str | None) -> Tensor:
        return psi if self.fourier is None else self.fourier(psi, backend=backend)


class TwinRFFCritic(nn.Module):
    """Two independent :class:`RFFCritic`, whose arguments it takes."""

    def __init__(
        self,
        feature_dim: int,
        hidden_dim: int = 256,
        frequencies: str = "learned",
        kind: str = "sin",
        lengthscale: float = 16.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settings = (frequencies, kind, lengthscale, compute_dtype)
        self.feature_dim = check_positive_int("feature_dim", feature_dim)
        self.q1 = RFFCritic(feature_dim, hidden_dim, *settings)
        self.q2 = RFFCritic(feature_dim, hidden_dim, *settings)

    def forward(self, psi: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """psi ``[B, feature_dim]`` -> (q1, q2), each ``[B, 1]``."""
        if self._altered_parts() is not None:
            return self.q1(psi, **forced(backend)), self.q2(psi, **forced(backend))
        psi = self._checked(psi)
        return each(mlp_ensemble(psi, *self._heads(), **self._settings(backend)))

    def loss(
        self,
        psi: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``mean(w (q1 - target)^2) + mean(w (q2 - target)^2)``, and q1, q2 without a gradient.

        Args:
            psi: ``[B, feature_dim]``.
            target: ``[B, 1]``.
            weight: ``w``, ``[B]``; 1 if None. See :func:`diffcore.ops.critic_loss`.
            backend: one of :func:`diffcore.ops.critic_loss` and :func:`diffcore.ops.mlp`.

        Returns:
            A scalar, and ``[2, B, 1]``.
        """
        if self.altered() is not None:
            q1, q2 = self(psi, **forced(backend))
            return loss_of_values(q1, q2, target, weight)
        psi = self._checked(psi)
        settings = self._settings(backend)
        return critic_loss(psi, *self._heads(), target, weight=weight, **settings)

    def _checked(self, psi: Tensor) -> Tensor:
        """psi as an input of the heads."""
        own: Any = self._modules
        if not inputs_fit([psi], (self.feature_dim,), own["q1"]._modules["head"]):
            [psi] = checked_inputs(self, ("psi",), [psi], (self.feature_dim,))
        return psi

    def altered(self) -> str | None:
        """Why a call isn't what the two heads' weights say, in words, or None."""
        return altered(self, TwinRFFCritic) or self._altered_parts()

    def _altered_parts(self) -> str | None:
        own: Any = self._modules
        for q in (own["q1"], own["q2"]):
            why = altered(q, RFFCritic)
            if why is None and "fourier" in q._modules:
                why = "the critics' frequencies are an op of their own"
            if why is None:
                why = altered(q._modules["head"], MLP)
            if why is not None:
                return why
        return None

    def networks(self) -> list[list[Tensor]]:
        """The heads' parameters, alike in shape: see :meth:`MLP.weights_and_biases`."""
        own: Any = self._modules
        head, other = (own[name]._modules["head"] for name in ("q1", "q2"))
        first, second = (h.weights_and_biases(self.feature_dim, 1) for h in (head, other))
        alike = same_sizes(first, second) or [p.shape for p in first] == [p.shape for p in second]
        if (
            other.activations != head.activations
            or other.compute_dtype != head.compute_dtype
            or not alike
        ):
            raise ValueError("q2: expected layers, activations and compute_dtype like q1's")
        return [first, second]

    def _heads(self) -> tuple[list[list[Tensor]], list[str]]:
        """Both critics' parameters and activations, where each is one MLP."""
        return self.networks(), self.q1.head.activations

    def _settings(self, backend: str | None) -> dict[str, Any]:
        return {"compute_dtype": self.q1.head.compute_dtype, "backend": backend}

    def phi(self, psi: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """psi ``[B, feature_dim]`` -> each critic's phi, ``[B, hidden_dim]``."""
        return self.q1.phi(psi, backend=backend), self.q2.phi(psi, backend=backend)
