"""Diff-SR's networks: the factors psi and zeta of the score, and the critic on Fourier features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffcore.nn.modules import MLP, time_embedding
from diffcore.ops._checks import check_choice, check_features, check_positive_int

CONDITIONING = ("alpha_bar", "time_embedding")


class Psi(nn.Module):
    """psi(s, a) in R^d, features of a state and an action.

    Args:
        state_dim, action_dim: widths; the input is ``[state, action]``.
        feature_dim: d.
        hidden_dim, hidden_layers, activation: see :class:`diffcore.nn.MLP`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        feature_dim: int = 256,
        hidden_dim: int = 256,
        hidden_layers: int = 1,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        check_positive_int("state_dim", state_dim)
        check_positive_int("action_dim", action_dim)
        check_positive_int("feature_dim", feature_dim)
        self.state_dim, self.action_dim, self.feature_dim = state_dim, action_dim, feature_dim
        self.trunk = MLP(
            state_dim + action_dim, hidden_dim, feature_dim, hidden_layers, activation, "uniform"
        )

    def forward(self, state: Tensor, action: Tensor, *, backend: str | None = None) -> Tensor:
        """state ``[B, S]``, action ``[B, A]`` -> ``[B, d]``."""
        check_features("state", state, self.state_dim)
        check_features("action", action, self.action_dim)
        return self.trunk(torch.cat([state, action], dim=-1), backend=backend)


class Zeta(nn.Module):
    """zeta(s~, level) in R^(d x S): for each feature a direction in the space of states.

    ``psi^T zeta`` is the score of the perturbed transition. Its last layer has d * S outputs, so
    :func:`diffcore.ops.score_matching_loss` takes that layer apart: :meth:`hidden` is what enters
    it, :attr:`last` the layer.

    Args:
        state_dim: S, the width of the perturbed next state.
        feature_dim: d.
        hidden_dim, hidden_layers, activation: see :class:`diffcore.nn.MLP`.
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
    ) -> None:
        super().__init__()
        check_positive_int("state_dim", state_dim)
        check_positive_int("feature_dim", feature_dim)
        check_choice("conditioning", conditioning, CONDITIONING)
        check_positive_int("time_dim", time_dim)
        if time_dim % 2:
            raise ValueError(f"time_dim: expected an even number, got {time_dim}")
        self.state_dim, self.feature_dim = state_dim, feature_dim
        self.time_dim = time_dim
        self.time_mlp: MLP | None = None
        level_dim = 1
        if conditioning == "time_embedding":
            self.time_mlp = MLP(time_dim, 2 * time_dim, time_dim, 1, "relu", "uniform")
            level_dim = time_dim
        self.trunk = MLP(
            state_dim + level_dim,
            hidden_dim,
            feature_dim * state_dim,
            hidden_layers,
            activation,
            "uniform",
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
        """What enters the last layer.

        Args:
            perturbed: s~, ``[B, S]``.
            alpha_bar: abar, ``[B, 1]``.
            level: its index, integer ``[B]``.

        Returns:
            ``[B, hidden_dim]``.
        """
        check_features("perturbed", perturbed, self.state_dim)
        condition = alpha_bar
        if self.time_mlp is not None:
            embedding = time_embedding(level, self.time_dim).to(perturbed.dtype)
            condition = self.time_mlp(embedding, backend=backend)
        return self.trunk.hidden(torch.cat([perturbed, condition], dim=-1), backend=backend)

    def forward(
        self, perturbed: Tensor, alpha_bar: Tensor, level: Tensor, *, backend: str | None = None
    ) -> Tensor:
        """zeta, ``[B, d, S]``; arguments as for :meth:`hidden`."""
        hidden = self.hidden(perturbed, alpha_bar, level, backend=backend)
        flat: Tensor = self.last(hidden)
        return flat.reshape(-1, self.feature_dim, self.state_dim)


class TwinRFFCritic(nn.Module):
    """Two independent Q = phi^T xi on Fourier features of psi: phi = elu(W2 sin(W1 psi)).

    Args:
        feature_dim: width of psi.
        hidden_dim: width of sin and of phi.
    """

    def __init__(self, feature_dim: int, hidden_dim: int = 256) -> None:
        super().__init__()
        self.q1 = MLP(feature_dim, hidden_dim, 1, 2, ("sin", "elu"), "uniform")
        self.q2 = MLP(feature_dim, hidden_dim, 1, 2, ("sin", "elu"), "uniform")

    def forward(self, psi: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """psi ``[B, d]`` -> (q1, q2), each ``[B, 1]``."""
        return self.q1(psi, backend=backend), self.q2(psi, backend=backend)

    def phi(self, psi: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """psi ``[B, d]`` -> the features on which each Q is linear, each ``[B, hidden_dim]``."""
        return self.q1.hidden(psi, backend=backend), self.q2.hidden(psi, backend=backend)
