"""Diff-SR: diffusion spectral representation for reinforcement learning (arXiv 2406.16121).

Write the transition as an energy model whose exponent factorises, ``P(s'|s, a) ~ exp(psi(s, a)^T
nu(s'))``. Then so does its score, and that of the perturbed next state s~, into ``psi(s, a)^T
zeta(s~, beta)``. Fitting the score by denoising, as a diffusion model is trained, gives features psi
that Q can be represented on, and no chain is ever run to act or to learn. One update is

1. representation (Algorithm 1): steps on the score-matching loss (Eq. 18) in psi and zeta;
2. critic: ``Q(s, a) <- r + gamma mask (min(Q1', Q2') - alpha log pi)(s', a')``, a' from the policy
   (Eq. 21), with ``Q = phi^T xi`` on the features ``phi = elu(W2 sin(W1 psi(s, a)))``;
3. actor and temperature: soft actor-critic's, through Q and psi;
4. target: an exponential moving average of the critic. psi has none.

psi is trained by the representation loss alone. The last of its batches serves critic and actor too.

The paper and its released code differ. ``DiffSRConfig.mode`` picks one of three:

==================  =======================  =======================  ==========================
switch              ``fixed`` (default)      ``official``             ``paper``
==================  =======================  =======================  ==========================
noise levels        beta-CDF                 beta-CDF                 linear (DDPM)
noise scale         0.449                    0.449                    1 (Eq. 18 to the letter)
critic              trained                  never trained            trained
Gram regulariser    of phi                   second layer twice       of phi
==================  =======================  =======================  ==========================

``official`` has two faults kept for comparison. The released code makes its critic after the
optimiser of the one it replaces: the optimiser goes on holding parameters of a critic that nobody
uses, and the critic that everybody uses stays as it was initialised. And its Gram regulariser, which
has the weight 0 by default, feeds phi through the second layer once more. ``fixed`` is what the code
means to do.

Actions in [-1, 1] stand for the environment's whole range in every mode. The released code hands
them to the environment as they are, cut to its bounds: on Pendulum (2) the policy then has half the
torque, on Humanoid (0.4) most of what it can say is cut, and the critic is asked about actions that
it never learns of.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffcore import DiffusionSchedule, ops
from diffcore.agents.base import (
    BaseAgent,
    ComputeDtype,
    Saved,
    seeded_weights,
    torch_dtype,
)
from diffcore.agents.checks import check_choice, check_integer, check_real, check_rows
from diffcore.agents.environment_names import environment_base_name
from diffcore.agents.exploration import EllipticalBonus, kernel_bonus
from diffcore.agents.optimization import (
    ema_update_,
    frozen,
    gradient_step,
    learning,
    make_adam,
    measured_step,
)
from diffcore.agents.replay_protocol import Batch, Replay
from diffcore.agents.representation import DiffusionRepresentation, PerturbedState
from diffcore.nn import SquashedGaussian, Temperature, TwinRFFCritic

Mode = Literal["fixed", "official", "paper"]
NoiseLevels = Literal["beta_cdf", "linear", "cosine"]
NoiseLevelsOrModes = Literal["by_mode", "beta_cdf", "linear", "cosine"]
Conditioning = Literal["alpha_bar", "time_embedding"]
Frequencies = Literal["learned", "gaussian", "orthogonal"]
FourierKind = Literal["sin", "cos", "cos_sin"]
BonusName = Literal["none", "elliptical", "kernel"]


@dataclass(frozen=True)
class ModeSwitches:
    """Everything in which the three modes differ. The agent asks these, never the mode's name."""

    noise_levels: NoiseLevels
    """Which levels the next state is perturbed at, unless ``DiffSRConfig.noise_levels`` says."""
    noise_scale: float
    """sigma, the factor on all noise; 1 is Eq. 18."""
    train_critic: bool
    """Give the critic's optimiser the critic's parameters; else those of one thrown away."""
    gram_of_second_layer_twice: bool
    """Take the Gram regulariser of ``W2 phi + b2`` instead of phi."""


MODES: dict[Mode, ModeSwitches] = {
    "fixed": ModeSwitches(
        noise_levels="beta_cdf",
        noise_scale=0.449,
        train_critic=True,
        gram_of_second_layer_twice=False,
    ),
    "official": ModeSwitches(
        noise_levels="beta_cdf",
        noise_scale=0.449,
        train_critic=False,
        gram_of_second_layer_twice=True,
    ),
    "paper": ModeSwitches(
        noise_levels="linear",
        noise_scale=1.0,
        train_critic=True,
        gram_of_second_layer_twice=False,
    ),
}

# For states of two or three numbers, learned in some thousand steps.
_SMALL = {
    "feature_dim": 64,
    "psi_hidden_dim": 64,
    "zeta_hidden_dim": 128,
    "hidden_dim": 128,
    "start_steps": 1_000,
}
# By the name that environment_base_name gives. Pendulum's values lie in the hundreds: a target that
# moves at half the pace, and a critic at a third, would take all the while to get there. Everything
# else has the released code's settings, which are the same for every task.
DIFFSR_DEFAULTS: dict[str, dict[str, Any]] = {
    "Pendulum": {**_SMALL, "lr": 1e-3, "update_target_every": 1},
    "MultiGoal": _SMALL,
}


@dataclass(frozen=True)
class DiffSRConfig:
    """Hyper-parameters, by default those of the released code.

    Raises:
        TypeError: if a number is expected and something else came.
        ValueError: if a value lies outside its range, NaN included.
    """

    mode: Mode = "fixed"
    """Which Diff-SR: the released code as meant (fixed), as it runs (official), or the paper's."""
    feature_dim: int = 256
    """d, the width of psi."""
    psi_hidden_dim: int = 256
    """Width of psi's hidden layer."""
    zeta_hidden_dim: int = 512
    """Width of zeta's hidden layer."""
    hidden_dim: int = 256
    """Width of the actor's two hidden layers, and of the critic's Fourier features and phi."""
    fourier_frequencies: Frequencies = "learned"
    """W1 of the critic: trained, or drawn once, Gaussian or orthogonal."""
    fourier_kind: FourierKind = "sin"
    """Which Fourier features of psi the critic takes."""
    fourier_lengthscale: float = 16.0
    """Lengthscale, in psi's space, of the Gaussian kernel that drawn frequencies stand for."""
    noise_levels: NoiseLevelsOrModes = "by_mode"
    """Distribution of the noise levels: the mode's own, beta_cdf, or DDPM's linear or cosine."""
    noise_steps: int = 1000
    """K, the number of noise levels."""
    conditioning: Conditioning = "alpha_bar"
    """How zeta learns of the noise level: abar as an input, or an embedding of its index."""
    extra_feature_steps: int = 3
    """Representation steps per update, beside one; each on a batch of its own."""
    freeze_representation: bool = False
    """Leave psi and zeta as they were initialised: an ablation."""
    representation_lr: float = 3e-3
    """Learning rate of psi and zeta."""
    lr: float = 3e-4
    """Learning rate of critic, actor and temperature."""
    adam_eps: float = 1e-8
    """Adam's epsilon, everywhere."""
    batch_size: int = 256
    """Transitions per step of anything."""
    gamma: float = 0.99
    """Discount factor."""
    tau: float = 0.005
    """How far the target critic moves towards the critic at a time."""
    update_target_every: int = 2
    """Move the target critic in every n-th update."""
    gram_weight: float = 0.0
    """Weight of the Gram regulariser, which makes phi of different rows orthogonal; 0: none."""
    initial_temperature: float = 0.1
    """Weight of the entropy at the beginning; it is learned, towards an entropy of -action_dim."""
    random_action_rate: float = 0.01
    """Share of uniformly random actions when exploring."""
    bonus: BonusName = "none"
    """Exploration bonus on the reward: elliptical (Eq. 23 on phi), kernel (Eq. 22 on psi)."""
    bonus_weight: float = 1.0
    """Factor on the bonus."""
    bonus_ridge: float = 1.0
    """lambda of the bonus."""
    bonus_samples: int = 256
    """Transitions of the replay that a kernel bonus compares with, drawn anew in every update."""
    compute_dtype: ComputeDtype = "float32"
    """What all networks multiply in, forward and backward. Weights, Adam, losses stay float32."""
    start_steps: int = 25_000
    """Environment steps with random actions before the first update."""
    buffer_size: int = 1_000_000
    """Capacity of the replay, in transitions."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("noise_levels", self.noise_levels, NoiseLevelsOrModes)
        check_choice("conditioning", self.conditioning, Conditioning)
        check_choice("fourier_frequencies", self.fourier_frequencies, Frequencies)
        check_choice("fourier_kind", self.fourier_kind, FourierKind)
        check_choice("bonus", self.bonus, BonusName)
        check_choice("compute_dtype", self.compute_dtype, ComputeDtype)
        for name in (
            "feature_dim",
            "psi_hidden_dim",
            "zeta_hidden_dim",
            "hidden_dim",
            "batch_size",
            "update_target_every",
            "bonus_samples",
            "buffer_size",
        ):
            check_integer(name, getattr(self, name), at_least=1)
        # The beta-CDF's first and last level are replaced by their neighbours.
        check_integer("noise_steps", self.noise_steps, at_least=3)
        for name in ("extra_feature_steps", "start_steps"):
            check_integer(name, getattr(self, name), at_least=0)
        for name in (
            "fourier_lengthscale",
            "representation_lr",
            "lr",
            "adam_eps",
            "initial_temperature",
            "bonus_ridge",
        ):
            check_real(name, getattr(self, name), above=0.0)
        for name in ("gram_weight", "bonus_weight"):
            check_real(name, getattr(self, name), at_least=0.0)
        for name in ("gamma", "random_action_rate"):
            check_real(name, getattr(self, name), at_least=0.0, at_most=1.0)
        check_real("tau", self.tau, above=0.0, at_most=1.0)
        if self.gram_weight > 0:  # it compares rows with each other, as the kernel's bandwidth does
            check_integer("batch_size (with gram_weight above 0)", self.batch_size, at_least=2)
        if self.bonus == "kernel":
            check_integer("bonus_samples (with bonus 'kernel')", self.bonus_samples, at_least=2)
        twice = MODES[self.mode].gram_of_second_layer_twice
        if twice and self.gram_weight > 0 and self.fourier_kind == "cos_sin":
            raise ValueError(
                f"gram_weight: mode {self.mode!r} applies the second layer twice, which fits sin or "
                "cos, got fourier_kind 'cos_sin'"
            )

    @classmethod
    def for_env(cls, env_id: str) -> DiffSRConfig:
        """The hyper-parameters for ``env_id``, else the generic ones.

        A module prefix, a namespace and the version don't matter, and a variant of a task has the
        task's (see :func:`~diffcore.agents.environment_names.environment_base_name`).

        >>> DiffSRConfig.for_env("Pendulum-v1").start_steps
        1000
        """
        return cls(**DIFFSR_DEFAULTS.get(environment_base_name(env_id), {}))


class DiffSR(BaseAgent):
    """The agent.

    Args:
        observation_dim: size of an observation vector.
        action_dim: size of an action vector; actions live in ``[-1, 1]``.
        config: hyper-parameters.
        seed: of the initial weights and of everything drawn afterwards. Two agents built and used
            alike are bitwise equal.
        device: where the networks live and observations and batches are expected.

    Raises:
        TypeError: if a size or the seed isn't an integer.
        ValueError: if a size isn't positive or the seed is negative.
    """

    name: ClassVar[str] = "diffsr"
    shaped_by: ClassVar[tuple[str, ...]] = (
        "feature_dim",
        "psi_hidden_dim",
        "zeta_hidden_dim",
        "hidden_dim",
        "fourier_frequencies",
        "fourier_kind",
        "noise_steps",
        "conditioning",
        "bonus",
    )
    config_type: ClassVar[type[DiffSRConfig]] = DiffSRConfig
    config: DiffSRConfig

    @learning()
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: DiffSRConfig,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        # Independent streams for the initial weights and all the rest.
        super().__init__(observation_dim, action_dim, config, seed=seed, device=device, streams=2)
        self.switches = MODES[config.mode]
        compute_dtype = torch_dtype(config.compute_dtype)
        with seeded_weights(self.seeds[0]):
            self.representation = self._make_representation().to(self.device)
            critic = TwinRFFCritic(
                config.feature_dim,
                config.hidden_dim,
                config.fourier_frequencies,
                config.fourier_kind,
                config.fourier_lengthscale,
                compute_dtype,
            )
            self.critic = critic.to(self.device)
            actor = SquashedGaussian(
                observation_dim, action_dim, config.hidden_dim, compute_dtype=compute_dtype
            )
            self.actor = actor.to(self.device)
            self.temperature = Temperature(config.initial_temperature).to(self.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        # What judges the actor's actions, and isn't trained with it.
        self.judges = [*self.critic.parameters(), *self.representation.parameters()]
        self.elliptical_bonus: EllipticalBonus | None = None
        if config.bonus == "elliptical":
            self.elliptical_bonus = EllipticalBonus(
                config.hidden_dim, config.bonus_ridge, device=self.device
            )

        eps = config.adam_eps
        self.representation_optimizer = make_adam(
            self.representation.parameters(), lr=config.representation_lr, eps=eps
        )
        trained = self.critic if self.switches.train_critic else copy.deepcopy(self.critic)
        self.critic_optimizer = make_adam(trained.parameters(), lr=config.lr, eps=eps)
        self.actor_optimizer = make_adam(self.actor.parameters(), lr=config.lr, eps=eps)
        self.temperature_optimizer = make_adam(self.temperature.parameters(), lr=config.lr, eps=eps)

    def parts(self) -> dict[str, Saved]:
        """Everything with a state to save."""
        bonus = {} if self.elliptical_bonus is None else {"bonus": self.elliptical_bonus}
        return {
            "representation": self.representation,
            "representation_optimizer": self.representation_optimizer,
            "critic": self.critic,
            "critic_target": self.critic_target,
            "critic_optimizer": self.critic_optimizer,
            "actor": self.actor,
            "actor_optimizer": self.actor_optimizer,
            "temperature": self.temperature,
            "temperature_optimizer": self.temperature_optimizer,
            **bonus,
        }

    @property
    def policy(self) -> SquashedGaussian:
        """The network that acting needs."""
        return self.actor

    @property
    def bootstrap_truncated(self) -> bool:
        """Whether the replay's ``mask`` should be 1 where the time limit cut an episode."""
        return True

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Choose one action for each observation.

        Args:
            observation: ``[B, observation_dim]`` float32 on the agent's device.
            explore: draw from the policy, and now and then (``random_action_rate``) uniformly; else
                the policy's mode, a function of the observation.
            deterministic: excludes ``explore``; without it changes nothing.
            generator: source of randomness on the agent's device. None is the agent's own, which
                an exploring call advances.

        Returns:
            ``[B, action_dim]`` in ``[-1, 1]``.

        Raises:
            TypeError: if ``observation`` isn't a float32 tensor.
            ValueError: if its shape or device is wrong, or both ``explore`` and ``deterministic``.
        """
        self.check_observation(observation)
        if not explore:
            return self.actor.mode(observation)
        if deterministic:
            raise ValueError(
                "deterministic=True needs explore=False: exploring draws random actions"
            )
        source = self.generator if generator is None else generator
        rows = observation.shape[0]
        noise = observation.new_empty(rows, self.action_dim).normal_(generator=source)
        uniform = observation.new_empty(rows, self.action_dim).uniform_(-1, 1, generator=source)
        chance = observation.new_empty(rows, 1).uniform_(generator=source)
        action, _ = self.actor.sample(observation, noise)
        return torch.where(chance < self.config.random_action_rate, uniform, action)

    @learning()
    def update(self, replay: Replay) -> dict[str, float | Tensor]:
        """One whole update on batches drawn from ``replay``, also under torch.no_grad().

        Returns:
            Metrics, as 0-d tensors on the agent's device: nothing here waits for the device.
        """
        steps, rows = self.config.extra_feature_steps + 1, self.config.batch_size
        # Drawn and stepped on together: on small batches every call costs as much as what it does.
        drawn = replay.sample(steps * rows, self.generator)
        metrics = self.update_representation(drawn, steps=steps)
        *_, batch = drawn.split(rows)
        bonus = self.exploration_bonus(batch, replay)
        metrics |= self.update_critic(batch, bonus)
        metrics |= self.update_actor(batch)
        self.update_target()
        return metrics

    def update_representation(
        self,
        batch: Batch,
        *,
        steps: int = 1,
        level: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, float | Tensor]:
        """Optimiser steps of psi and zeta on the score-matching loss (Eq. 18).

        Args:
            batch: transitions; rewards don't matter.
            steps: into how many minibatches they are cut, one step on each in order.
            level: ``[B]`` int64, the noise levels; None draws them uniformly.
            noise: ``[B, observation_dim]``; None draws it from N(0, I).

        Returns:
            Metrics of the last step.

        Raises:
            ValueError: if a shape in ``batch`` is wrong, or it can't be cut so.
        """
        if self.config.freeze_representation:
            return {}
        self.check_batch(batch)
        check_integer("steps", steps, at_least=1)
        if len(batch.state) % steps:
            raise ValueError(f"steps must divide the batch's {len(batch.state)} rows, got {steps}")
        perturbed = self.representation.perturb(
            batch.next_state, generator=self.generator, level=level, noise=noise
        )
        state, action, *columns = [
            t.unflatten(0, (steps, -1)) for t in (batch.state, batch.action, *perturbed)
        ]
        loss, grad_norm = self.representation.step(
            state, action, PerturbedState(*columns), self.representation_optimizer
        )
        return {"score_loss": loss[-1], "representation_grad_norm": grad_norm[-1]}

    @torch.no_grad()
    def exploration_bonus(self, batch: Batch, replay: Replay) -> Tensor | None:
        """``[B, 1]``, to be added to the batch's rewards; None without a bonus.

        Eq. 23 takes the features phi of the first critic. Both sums over all that was seen are
        taken over what the replay holds, by samples of it.
        """
        config = self.config
        if config.bonus == "none":
            return None
        psi = self.representation.psi(batch.state, batch.action)
        if self.elliptical_bonus is None:
            seen = replay.sample(config.bonus_samples, self.generator)
            seen_psi = self.representation.psi(seen.state, seen.action)
            return config.bonus_weight * kernel_bonus(psi, seen_psi, config.bonus_ridge)
        phi, _ = self.critic.phi(psi)
        self.elliptical_bonus.add(phi)
        return config.bonus_weight * self.elliptical_bonus(phi, len(replay))

    def update_critic(self, batch: Batch, bonus: Tensor | None = None) -> dict[str, float | Tensor]:
        """One temporal-difference step of both critics (Eq. 21); psi stays as it is.

        Args:
            batch: transitions.
            bonus: ``[B, 1]``, added to the rewards.

        Raises:
            ValueError: if a shape in ``batch`` is wrong.
        """
        self.check_batch(batch)
        config, psi = self.config, self.representation.psi
        with torch.no_grad():
            noise, temperature = self._policy_noise(batch.action), self.temperature()
            judges = psi, self.critic_target
            _, next_value, _ = ops.soft_value(
                self.actor, *judges, batch.next_state, noise, temperature
            )
            reward = batch.reward if bonus is None else batch.reward + bonus
            target = reward + config.gamma * batch.mask * next_value
            features = psi(batch.state, batch.action)
        loss, q = self.critic.loss(features, target)
        metrics: dict[str, float | Tensor] = {
            "critic_loss": loss.detach(),
            "q_mean": q[0].mean(),
            "q_target_mean": target.mean(),
        }
        if bonus is not None:
            metrics["bonus_mean"] = bonus.mean()
        if config.gram_weight > 0:
            gram = self.gram_regularizer(features)
            metrics["gram"] = gram.detach()
            loss = loss + config.gram_weight * gram
        metrics["critic_grad_norm"] = measured_step(loss, self.critic_optimizer)
        return metrics

    def gram_regularizer(self, features: Tensor) -> Tensor:
        """How far the critics' features phi are from orthonormal over the batch, 0-d.

        Args:
            features: psi(s, a), ``[B, feature_dim]``.
        """
        phi1, phi2 = self.critic.phi(features)
        if self.switches.gram_of_second_layer_twice:
            phi1, phi2 = self.critic.q1.second(phi1), self.critic.q2.second(phi2)
        return gram_distance(phi1) + gram_distance(phi2)

    def update_actor(self, batch: Batch) -> dict[str, float | Tensor]:
        """One optimiser step of the policy and one of the temperature.

        The policy descends ``alpha log pi(a|s) - min(Q1, Q2)(s, a)``, through a = a(s, noise).
        """
        noise, temperature = self._policy_noise(batch.action), self.temperature().detach()
        with frozen(self.judges):
            judges = self.representation.psi, self.critic
            loss, _, log_prob = ops.soft_value(
                self.actor, *judges, batch.state, noise, temperature
            )
            grad_norm = measured_step(loss, self.actor_optimizer)
        entropy = -log_prob.mean()
        surplus = entropy + self.action_dim  # above -action_dim, which it is to come to
        gradient_step(self.temperature() * surplus, self.temperature_optimizer)
        return {
            "actor_loss": loss.detach(),
            "actor_grad_norm": grad_norm,
            "entropy": entropy,
            "temperature": self.temperature().detach(),
        }

    def update_target(self) -> None:
        """Count the update and move the target critic, if it is its turn."""
        self.updates += 1
        if self.updates % self.config.update_target_every == 0:
            ema_update_(self.critic_target, self.critic, self.config.tau)

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
        """Draw next states ``[B, observation_dim]`` from the learned model of the transition.

        See :meth:`diffcore.agents.DiffusionRepresentation.sample_next_state`.

        Args:
            state: ``[B, observation_dim]`` float32 on the agent's device.
            action: ``[B, action_dim]`` likewise.
            solver, steps: see :meth:`diffcore.DiffusionSchedule.solver`.
            clip: bound on the next state's entries, kept at every step of the chain.
            corrector_steps: Langevin steps before the chain, without which levels that end far from
                noise (such as those of modes ``fixed`` and ``official``) draw next states that lean
                towards ``state``. None: 200 for such levels, else none.
            generator: source of all randomness; None is the agent's own.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
        """
        check_rows("state", state, self.observation_dim, self.device)
        check_rows("action", action, self.action_dim, self.device)
        if state.shape[0] != action.shape[0]:
            raise ValueError(
                f"action must have {state.shape[0]} rows like state, got {action.shape[0]}"
            )
        if corrector_steps is not None:
            check_integer("corrector_steps", corrector_steps, at_least=0)
        if not clip > 0:
            raise ValueError(f"clip must be above 0, got {clip}")
        return self.representation.sample_next_state(
            state,
            action,
            solver=solver,
            steps=steps,
            clip=clip,
            corrector_steps=corrector_steps,
            generator=self.generator if generator is None else generator,
        )

    def _make_representation(self) -> DiffusionRepresentation:
        config = self.config
        levels: str = config.noise_levels
        if levels == "by_mode":
            levels = self.switches.noise_levels
        return DiffusionRepresentation(
            self.observation_dim,
            self.action_dim,
            schedule=getattr(DiffusionSchedule, levels)(config.noise_steps),
            noise_scale=self.switches.noise_scale,
            feature_dim=config.feature_dim,
            psi_hidden_dim=config.psi_hidden_dim,
            zeta_hidden_dim=config.zeta_hidden_dim,
            conditioning=config.conditioning,
            compute_dtype=torch_dtype(config.compute_dtype),
        )

    def _policy_noise(self, action: Tensor) -> Tensor:
        return torch.empty_like(action).normal_(generator=self.generator)


def gram_distance(phi: Tensor) -> Tensor:
    """``mean over pairs i != j of (x_i . x_j)^2 - 2 mean |x_i|^2 / F + 1 / F``.

    Smallest where the rows of phi are orthogonal and of a length that F decides.

    Args:
        phi: ``[B, F]``, B at least 2.

    Raises:
        ValueError: if there is one row, or none.
    """
    rows, width = phi.shape
    if rows < 2:
        raise ValueError(f"phi must have at least 2 rows to compare, got {rows}")
    gram = phi @ phi.T
    squared_norms = gram.diagonal()
    pairs = (gram.square().sum() - squared_norms.square().sum()) / (rows * (rows - 1))
    return pairs - 2 * squared_norms.mean() / width + 1 / width
