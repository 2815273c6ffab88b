"""Diff-SR's representation of a transition, trained as a diffusion model of the next state."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffcore import DiffusionSchedule, ops
from diffcore.nn import MLP, Psi, Zeta
from diffcore.schedule import SolverTable

DEFAULT_CORRECTOR_STEPS = 200


class PerturbedState(NamedTuple):
    """Next states with noise, and what zeta and the loss must know of it, row by row."""

    value: Tensor
    """s~, ``[..., S]``"""
    level: Tensor
    """``[...]`` int64"""
    alpha_bar: Tensor
    """abar, ``[..., 1]``"""
    noise: Tensor
    """What was added, ``sigma sqrt(1 - abar) eps``, ``[..., S]``"""
    score_weight: Tensor
    """``sigma (1 - abar)``, ``[..., 1]``"""


class DiffusionRepresentation(nn.Module):
    """psi(s, a) and zeta(s~, level), whose product is the score of the perturbed next state.

    The next state is perturbed to ``s~ = sqrt(abar) s' + sqrt(1 - abar) sigma eps``, eps ~ N(0, I).
    The loss has its minimum where ``psi^T zeta = -E[eps | s~, s, a] / sqrt(1 - abar)``: sigma times
    the score of s~, or the score of s~ / sigma. For sigma = 1 that is the paper's Eq. 18.

    Args:
        state_dim: S.
        action_dim: A.
        schedule: the noise levels abar.
        noise_scale: sigma.
        feature_dim: d, the width of psi.
        psi_hidden_dim, zeta_hidden_dim: widths of the hidden layers.
        conditioning: how zeta learns of the level; see :class:`diffcore.nn.Zeta`.
        compute_dtype: what psi, zeta and the loss multiply in; None follows the weights.
    """

    alpha_bar: Tensor
    _levels: Tensor  # [K, 4]: abar, sqrt(abar), sigma sqrt(1 - abar), sigma (1 - abar)

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        schedule: DiffusionSchedule,
        noise_scale: float = 1.0,
        feature_dim: int = 256,
        psi_hidden_dim: int = 256,
        zeta_hidden_dim: int = 512,
        conditioning: str = "alpha_bar",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self._noise_scale = noise_scale
        self.compute_dtype = compute_dtype
        self.psi = Psi(
            state_dim, action_dim, feature_dim, psi_hidden_dim, compute_dtype=compute_dtype
        )
        self.zeta = Zeta(
            state_dim,
            feature_dim,
            zeta_hidden_dim,
            conditioning=conditioning,
            compute_dtype=compute_dtype,
        )
        alpha_bar, dtype = schedule.alphas_cumprod, torch.get_default_dtype()
        spread = 1 - alpha_bar
        columns = [alpha_bar, alpha_bar.sqrt(), noise_scale * spread.sqrt(), noise_scale * spread]
        self.register_buffer("alpha_bar", alpha_bar.to(dtype), persistent=False)
        self.register_buffer("_levels", torch.stack(columns, dim=1).to(dtype), persistent=False)

    @property
    def noise_scale(self) -> float:
        """sigma."""
        return self._noise_scale

    def perturb(
        self,
        next_state: Tensor,
        *,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PerturbedState:
        """What the loss is taken of; it doesn't depend on the parameters.

        Args:
            next_state: s', ``[..., S]``.
            generator: source of what is drawn.
            level: ``[...]`` int64 in 0..K-1; None draws it uniformly.
            noise: eps, ``[..., S]``; None draws it from N(0, I).
        """
        if level is None:
            rows = next_state.shape[:-1]
            level = torch.randint(
                self.schedule.K, rows, generator=generator, device=next_state.device
            )
        if noise is None:
            noise = torch.empty_like(next_state).normal_(generator=generator)
        for name, value, shape in (
            ("level", level, next_state.shape[:-1]),
            ("noise", noise, next_state.shape),
        ):
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {[*shape]}, got {[*value.shape]}")
        at_level = torch.embedding(self._levels, level)
        alpha_bar, signal, noise_std, score_weight = at_level.split(1, dim=-1)
        scaled_noise = noise_std * noise
        perturbed = torch.addcmul(scaled_noise, signal, next_state)
        return PerturbedState(perturbed, level, alpha_bar, scaled_noise, score_weight)

    def loss(self, state: Tensor, action: Tensor, perturbed: PerturbedState) -> Tensor:
        """Batch mean of ``|sigma sqrt(1 - abar) eps + sigma (1 - abar) psi^T zeta|^2``.

        Args:
            state: ``[B, S]``.
            action: ``[B, A]``.
            perturbed: what :meth:`perturb` made of the next states.

        Returns:
            0-d, differentiable in the parameters.
        """
        arguments = self._loss_arguments(state, action, perturbed)
        return ops.representation_loss(*arguments, compute_dtype=self.compute_dtype)

    def step(
        self,
        state: Tensor,
        action: Tensor,
        perturbed: PerturbedState,
        optimizer: torch.optim.Adam,
    ) -> tuple[Tensor, Tensor]:
        """One step of ``optimizer`` on :meth:`loss`, or several.

        Args:
            state, action, perturbed: see :meth:`loss`. Or ``[N, B, ...]``: N minibatches, one step on
                each in order.
            optimizer: holds the parameters of psi and zeta.

        Returns:
            The loss before the step and its gradient's norm, 0-d or ``[N]``.
        """
        if not state.shape[:-1] == action.shape[:-1] == perturbed.value.shape[:-1]:
            shapes = [[*t.shape] for t in (state, action, perturbed.value)]
            raise ValueError(f"state, action, perturbed: expected the same rows, got shapes {shapes}")
        if state.ndim == 3 and not len(state):
            raise ValueError(f"state: expected a minibatch at least, got shape {[*state.shape]}")
        if state.ndim == 3 and self.zeta.time_mlp is not None:  # whose weights each step changes
            minibatches = zip(state, action, zip(*perturbed, strict=True), strict=True)
            results = [
                self.step(some_states, some_actions, PerturbedState(*some_perturbed), optimizer)
                for some_states, some_actions, some_perturbed in minibatches
            ]
            losses, norms = zip(*results, strict=True)
            return torch.stack(losses), torch.stack(norms)
        arguments = self._loss_arguments(state, action, perturbed)
        return ops.representation_step(
            *arguments, optimizer, compute_dtype=self.compute_dtype
        )

    def _loss_arguments(
        self, state: Tensor, action: Tensor, perturbed: PerturbedState
    ) -> tuple[MLP, MLP, Tensor, Tensor, Tensor, Tensor]:
        """Networks, their inputs, offset and score weight."""
        return (
            self.psi.trunk,
            self.zeta.trunk,
            self.psi.inputs(state, action),
            self.zeta.inputs(perturbed.value, perturbed.alpha_bar, perturbed.level),
            perturbed.noise,
            perturbed.score_weight.squeeze(-1),
        )

    def predicted_noise(self, psi: Tensor, perturbed: Tensor, level: Tensor) -> Tensor:
        """``-sqrt(1 - abar) psi^T zeta``, the expectation of eps given s~.

        Args:
            psi: psi(s, a), ``[B, d]``.
            perturbed: s~, ``[B, S]``.
            level: ``[B]`` int64 in 0..K-1.

        Returns:
            ``[B, S]``.
        """
        alpha_bar = self.alpha_bar[level].unsqueeze(-1)
        zeta = self.zeta(perturbed, alpha_bar, level)
        return -(1 - alpha_bar).sqrt() * torch.einsum("bd,bds->bs", psi, zeta)

    @torch.no_grad()
    def sample_next_state(
        self,
        state: Tensor,
        action: Tensor,
        *,
        solver: str = "ddpm",
        steps: int | None = None,
        clip: float = math.inf,
        corrector_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw next states from the learned model: the reverse chain of ``s~ / sigma``.

        The chain starts from the state itself, perturbed at the noisiest level. Where that level
        is noise almost alone (cosine, and DDPM's 1000), the start doesn't matter. Elsewhere (the
        beta-CDF's lowest abar is 0.39, that of 50 linear steps 0.60) what is drawn would lean towards
        the state; Langevin steps at that level bring the start to the model's own distribution there
        (the corrector of Song et al. 2021, Algorithm 4).

        Args:
            state: ``[B, S]``.
            action: ``[B, A]``.
            solver, steps: see :meth:`diffcore.DiffusionSchedule.solver`.
            clip: bound on the next state's entries, kept at every step of the chain. Levels that end
                in noise alone need one (cosine's most of all): there an error in the predicted
                noise is an error many times as large in the predicted state.
            corrector_steps: Langevin steps before the chain. None: 200 where the schedule doesn't
                end in noise (:attr:`diffcore.DiffusionSchedule.ends_in_noise`), else none. 200 forget
                the start where the next states of one state and action spread about as far as that
                level's noise, ``sigma sqrt(1 - abar)``; the time it takes grows with the square of
                their spread.
            generator: source of all randomness.

        Returns:
            ``[B, S]``.
        """
        table = self.schedule.solver(solver, steps=steps)
        if corrector_steps is None:
            corrector_steps = 0 if self.schedule.ends_in_noise else DEFAULT_CORRECTOR_STEPS
        if corrector_steps:
            table = _after_langevin_steps(table, self.schedule, corrector_steps)
        sigma, alpha_bar = self.noise_scale, self.alpha_bar[-1]
        noise = torch.empty_like(state).normal_(generator=generator)

        def eps(x: Tensor, psi: Tensor, level: Tensor) -> Tensor:
            return self.predicted_noise(psi, sigma * x, level)

        x = ops.reverse_diffusion(
            eps,
            self.schedule,
            self.psi(state, action),
            x_init=alpha_bar.sqrt() * state / sigma + (1 - alpha_bar).sqrt() * noise,
            clip=clip / sigma,
            solver=table,
            generator=generator,
        )
        return sigma * x


def _after_langevin_steps(
    table: SolverTable, schedule: DiffusionSchedule, steps: int, step_size: float = 0.1
) -> SolverTable:
    """The table, after Langevin steps at its noisiest level.

    ``x + h score + sqrt(2 h) z`` with ``h = step_size * (1 - abar)`` and, as for every solver,
    ``score = -eps / sqrt(1 - abar)``.
    """
    spread = math.sqrt(1 - float(schedule.alphas_cumprod[-1]))
    c4, c5 = -step_size * spread, math.sqrt(2 * step_size) * spread
    langevin = torch.tensor([[0, 0, 0, 1, c4, c5, 0]] * steps, dtype=torch.float64)
    levels = torch.full((steps,), schedule.K - 1)
    return SolverTable(
        torch.cat([levels, table.timesteps]),
        torch.cat([langevin, table.coefficients]),
        schedule,
    )
