"""The policy of soft actor-critic: a Gaussian squashed by tanh, and its temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.nn.modules import MLP, altered, forced
from diffcore.ops._checks import (
    as_rows,
    check_bounds,
    check_like,
    check_number,
    check_positive_int,
    check_tensor,
    checked_inputs,
    out_of_autocast,
)
from diffcore.ops._native import inputs_fit
from diffcore.ops.squashed_gaussian import squashed_gaussian
from diffcore.ops.squashed_gaussian.reference import bounded, sample


class SquashedGaussian(nn.Module):
    """``a = tanh(mean(s) + std(s) z)``, z ~ N(0, I) (Haarnoja et al. 2018, Appendix C).

    The log standard deviation is kept within bounds by a tanh of its own.

    Args:
        state_dim, action_dim: widths.
        hidden_dim, hidden_layers, activation: see :class:`diffcore.nn.MLP`; weights start orthogonal.
        log_std_bounds: the lowest and the highest log standard deviation.
        compute_dtype: of the network; see :class:`diffcore.nn.MLP`. Its outputs are float32 sums, and
            everything after it is float32.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        hidden_layers: int = 2,
        activation: str = "elu",
        log_std_bounds: tuple[float, float] = (-5.0, 2.0),
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.log_std_bounds = check_bounds("log_std_bounds", log_std_bounds)
        state_dim = check_positive_int("state_dim", state_dim)
        action_dim = check_positive_int("action_dim", action_dim)
        self.state_dim, self.action_dim = state_dim, action_dim
        widths = (state_dim, hidden_dim, 2 * action_dim)
        self.trunk = MLP(*widths, hidden_layers, activation, "orthogonal", compute_dtype)

    def altered(self) -> str | None:
        """What a call does beside what the weights say, in words, or None."""
        own: Any = self._modules
        return altered(self, SquashedGaussian) or altered(own["trunk"], MLP)

    def weights_and_biases(self) -> list[Tensor]:
        """See :meth:`MLP.weights_and_biases`."""
        own: Any = self._modules
        result: list[Tensor] = own["trunk"].weights_and_biases(self.state_dim, 2 * self.action_dim)
        return result

    def forward(self, state: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """state ``[B, S]`` -> mean and log standard deviation before the tanh, ``[B, A]`` each."""
        if not inputs_fit([state], (self.state_dim,), self._modules["trunk"]):
            [state] = checked_inputs(self, ("state",), [state], (self.state_dim,))
        mean, raw = self.trunk(state, **forced(backend)).chunk(2, dim=-1)
        return mean, bounded(raw, self.log_std_bounds)

    def mode(self, state: Tensor) -> Tensor:
        """The action of z = 0, ``[B, A]``."""
        return self(state)[0].tanh()

    def sample(
        self, state: Tensor, noise: Tensor, *, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions ``[..., A]`` for z = ``noise`` (``[..., A]``), and their log densities.

        Both are differentiable in the parameters and in ``state`` (the reparameterised sample), on a
        backend of :func:`diffcore.ops.squashed_gaussian`.
        """
        inputs, widths = [state, noise], (self.state_dim, self.action_dim)
        if not inputs_fit(inputs, widths, self._modules["trunk"]):
            state, noise = self._checked(state, noise)
        if self.altered() is not None:
            mean, log_std = self(state, **forced(backend))
            return sample(mean, log_std, noise)
        parameters, rows = self.weights_and_biases(), state.shape[:-1]
        action, log_prob = squashed_gaussian(
            as_rows(state),
            parameters[::2],
            parameters[1::2],
            self.trunk.activations,
            as_rows(noise),
            log_std_bounds=self.log_std_bounds,
            compute_dtype=self.trunk.compute_dtype,
            backend=backend,
        )
        if state.ndim == 2:
            return action, log_prob
        return action.reshape(*rows, self.action_dim), log_prob.reshape(*rows, 1)

    def _checked(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As inputs of a sample, with noise for every row."""
        [state] = checked_inputs(self, ("state",), [state], (self.state_dim,))
        [noise] = out_of_autocast(self, noise)
        check_tensor("noise", noise, ("...", self.action_dim))
        check_like("noise", noise, "state", state)
        shape = (*state.shape[:-1], self.action_dim)
        try:
            return state, noise.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"noise: expected shape {list(shape)}, got {list(noise.shape)}"
            ) from None


class Temperature(nn.Module):
    """The weight of the entropy, a learned positive number, kept as its logarithm.

    Args:
        initial: above 0.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        check_number("initial", initial, above=0.0)
        self.log = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """A 0-d tensor."""
        return self.log.exp()
