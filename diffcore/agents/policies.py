"""Policies that can be fitted to a set of (observation, action) pairs by a regression-like loss.

DIPO never differentiates through its policy: it moves actions uphill in Q, then makes the policy
reproduce them. So a policy is two functions, ``sample`` and ``loss``. The diffusion policy is the
paper's (arXiv 2305.13122); the other two are its ablations.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffcore import DiffusionSchedule, ops
from diffcore.nn import MLP, Denoiser


class Policy(nn.Module, ABC):
    """A distribution over actions in ``[-1, 1]``, given an observation."""

    @abstractmethod
    def sample(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one action for each observation, without recording gradients.

        Args:
            observation: ``[B, observation_dim]`` float32.
            explore: draw from the full distribution; else from its narrow evaluation form.
            deterministic: make the action a function of its observation alone. Excludes
                ``explore``.
            generator: the source of randomness; None is torch's global one.

        Returns:
            ``[B, action_dim]``, in ``[-1, 1]``.

        Raises:
            ValueError: if both ``explore`` and ``deterministic`` are set.
        """

    @abstractmethod
    def loss(
        self, observation: Tensor, action: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """How badly the policy reproduces ``action`` at ``observation``: 0-d, differentiable."""


class DiffusionPolicy(Policy):
    """A diffusion model over actions, conditioned on the observation.

    Chains start from N(0, I): a schedule that ends elsewhere, so that samples are of another
    distribution than the one fitted, is warned of.

    Args:
        observation_dim: size of an observation.
        action_dim: size of an action.
        hidden_dim: width of the denoiser's hidden layers.
        schedule: the noise levels of training and of sampling.
        solver: which solver ``diffcore.ops.reverse_diffusion`` runs the chain with.
        noise_ratio: factor on the chain's noise when exploring; 0 is used when not.
        compute_dtype: what sampling and the loss multiply in; None follows the weights.
        deterministic_seed: seed of the one start ``x_K`` that deterministic samples share.
    """

    deterministic_x_init: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden_dim: int,
        schedule: DiffusionSchedule,
        solver: str = "ddpm",
        noise_ratio: float = 1.0,
        compute_dtype: torch.dtype | None = None,
        deterministic_seed: int = 0,
    ) -> None:
        super().__init__()
        if not schedule.ends_in_noise:
            warnings.warn(
                f"schedule: abar_K is {float(schedule.alphas_cumprod[-1]):.2g} after {schedule.K} "
                "steps, so a chain from N(0, I) doesn't draw from the fitted distribution; cosine "
                "and vp end in noise after any number of steps",
                stacklevel=2,
            )
        self.action_dim = action_dim
        self.schedule = schedule
        self.solver = solver
        self.noise_ratio = noise_ratio
        self.compute_dtype = compute_dtype
        self.denoiser = Denoiser(observation_dim, action_dim, hidden_dim=hidden_dim)
        # One row, the same for every observation: an action can't depend on its place in a batch.
        seeded = torch.Generator().manual_seed(deterministic_seed)
        self.register_buffer("deterministic_x_init", torch.randn(1, action_dim, generator=seeded))

    @torch.no_grad()
    def sample(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        x_init: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Run the whole reverse chain (Algorithm 4); see :meth:`Policy.sample`.

        Without ``explore`` the chain adds no noise, but as in the released code it still starts
        from a random ``x_K``; ``deterministic`` starts it from a fixed one.

        Args:
            x_init: ``[B, A]``, the start ``x_K``; None draws it from N(0, I).
            noise: ``[K, B, A]`` in order of execution; None draws it from N(0, I).
        """
        _check_sampling_mode(explore, deterministic)
        if deterministic:
            x_init = self.deterministic_x_init.expand(observation.shape[0], -1)
        return ops.reverse_diffusion(
            self.denoiser,
            self.schedule,
            observation,
            x_init=x_init,
            noise=noise,
            noise_scale=self.noise_ratio if explore else 0.0,
            clip=1.0,
            solver=self.solver,
            generator=generator,
            compute_dtype=self.compute_dtype,
        )

    def loss(
        self,
        observation: Tensor,
        action: Tensor,
        *,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The denoising loss at one random noise level a row; see :func:`ops.denoising_loss`.

        Args:
            t: ``[B]`` int64 in 0..K-1; None draws it uniformly.
            noise: ``[B, A]``; None draws it from N(0, I).
        """
        return ops.denoising_loss(
            self.denoiser,
            self.schedule,
            observation,
            action,
            t=t,
            noise=noise,
            generator=generator,
            compute_dtype=self.compute_dtype,
        )


class MLPPolicy(Policy):
    """One action per observation, plus Gaussian noise when exploring.

    The released code adds the exploration noise inside its loss as well, which only makes the
    gradient noisier: its expectation is that of the plain squared error used here. And it leaves the
    target policy's actions unclamped, so that its critic is asked about actions that nobody can take.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden_dim: int,
        exploration_std: float = 0.1,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.exploration_std = exploration_std
        self.mean = MLP(observation_dim, hidden_dim, action_dim, compute_dtype=compute_dtype)

    @torch.no_grad()
    def sample(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean action, with noise of ``exploration_std`` if ``explore``."""
        _check_sampling_mode(explore, deterministic)
        action: Tensor = self.mean(observation)
        if explore:
            action = action + self.exploration_std * _randn_like(action, generator)
        return action.clamp(-1.0, 1.0)

    def loss(
        self, observation: Tensor, action: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of the mean action. Nothing is drawn from ``generator``."""
        return nn.functional.mse_loss(self.mean(observation), action)


class VAEPolicy(Policy):
    """A conditional variational autoencoder: ``z ~ N(0, I)``, action = decoder(z, observation)."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden_dim: int,
        latent_dim: int,
        kl_weight: float = 0.1,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.kl_weight = kl_weight
        # The encoder returns the latent's mean and log variance, side by side.
        widths = (action_dim + observation_dim, hidden_dim, 2 * latent_dim)
        self.encoder = MLP(*widths, compute_dtype=compute_dtype)
        widths = (latent_dim + observation_dim, hidden_dim, action_dim)
        self.decoder = MLP(*widths, compute_dtype=compute_dtype)

    @torch.no_grad()
    def sample(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode ``z ~ N(0, I)`` if ``explore``, else ``z = 0``."""
        _check_sampling_mode(explore, deterministic)
        latent = observation.new_zeros(observation.shape[0], self.latent_dim)
        if explore:
            latent = _randn_like(latent, generator)
        action: Tensor = self.decoder(torch.cat([latent, observation], dim=-1))
        return action.clamp(-1.0, 1.0)

    def loss(
        self,
        observation: Tensor,
        action: Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the reconstruction + ``kl_weight`` * KL(q(z | a, s) || N(0, I)).

        The error is a mean over all entries, the KL a sum over the latent and a mean over rows.

        Args:
            noise: ``[B, latent_dim]``, the reparameterised noise; None draws it from N(0, I).
        """
        encoded: Tensor = self.encoder(torch.cat([action, observation], dim=-1))
        mean, log_variance = encoded.chunk(2, dim=-1)
        if noise is None:
            noise = _randn_like(mean, generator)
        latent = mean + (0.5 * log_variance).exp() * noise
        reconstruction = self.decoder(torch.cat([latent, observation], dim=-1))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=-1).mean()
        return nn.functional.mse_loss(reconstruction, action) + self.kl_weight * kl


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _check_sampling_mode(explore: bool, deterministic: bool) -> None:
    if explore and deterministic:
        raise ValueError("deterministic=True needs explore=False: exploring draws random actions")
