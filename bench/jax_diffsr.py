"""Diff-SR's update in JAX, one compiled function; see jax_baselines."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax_baselines import (
    Layers,
    Moments,
    Transitions,
    adam,
    layers,
    mlp,
    moved_average,
    representation_loss,
    rff_critic,
    to_jax,
    to_torch,
)
from torch import Tensor

from diffcore.agents import Batch, DiffSR


class Representation(NamedTuple):
    psi: Layers
    zeta: Layers

    def features(self, state: Array, action: Array) -> Array:
        return mlp(jnp.concatenate([state, action], axis=1), self.psi, jax.nn.elu)


class RFFCritic(NamedTuple):
    q1: Layers
    q2: Layers

    def values(self, features: Array) -> tuple[Array, Array]:
        return rff_critic(features, self.q1), rff_critic(features, self.q2)


class Agent(NamedTuple):
    """All that an update changes."""

    representation: Representation
    critic: RFFCritic
    actor: Layers
    critic_target: RFFCritic
    log_alpha: Array
    representation_moments: Moments
    critic_moments: Moments
    actor_moments: Moments
    alpha_moments: Moments
    updates: Array


class Draws(NamedTuple):
    """What an update draws: for each representation step, and for critic and actor."""

    level: Array
    noise: Array
    policy_noise: Array


class JaxDiffSR:
    """Diff-SR's update, starting from the weights of a diffcore agent."""

    def __init__(self, agent: DiffSR) -> None:
        self.config, self.action_dim = agent.config, agent.action_dim
        self.log_std_bounds = agent.actor.log_std_bounds
        self.abar = to_jax(agent.representation.alpha_bar)
        self.noise_scale = agent.representation.noise_scale
        representation = Representation(
            layers(agent.representation.psi), layers(agent.representation.zeta)
        )
        critic = RFFCritic(layers(agent.critic.q1.head), layers(agent.critic.q2.head))
        actor, log_alpha = layers(agent.actor), to_jax(agent.temperature.log)
        trained = (representation, critic, actor, log_alpha)
        moments = map(Moments.of, trained)
        target = jax.tree.map(jnp.copy, critic)  # what is donated mustn't be shared
        self.agent = Agent(
            *trained[:3], target, log_alpha, *moments, jnp.zeros((), jnp.int32)
        )
        self.key = jax.random.key(0)
        self.update_jit = jax.jit(self.drawn_update, donate_argnums=0)

    def update(self, replay: Transitions) -> None:
        self.agent, self.key = self.update_jit(self.agent, replay, self.key)
        jax.block_until_ready(self.agent)

    def drawn_update(self, agent: Agent, replay: Transitions, key: Array) -> tuple[Agent, Array]:
        steps, rows = self.config.extra_feature_steps + 1, self.config.batch_size
        key, *keys = jax.random.split(key, 5)
        index = jax.random.randint(keys[0], (steps, rows), 0, len(replay.state))
        batches = jax.tree.map(lambda column: column[index], replay)
        draws = Draws(
            jax.random.randint(keys[1], (steps, rows), 0, len(self.abar)),
            jax.random.normal(keys[2], batches.next_state.shape),
            jax.random.normal(keys[3], (2, rows, self.action_dim)),
        )
        return self.given_update(agent, batches, draws), key

    def given_update(self, agent: Agent, batches: Transitions, draws: Draws) -> Agent:
        config = self.config
        step = functools.partial(adam, lr=config.lr, eps=config.adam_eps)
        rate = {"lr": config.representation_lr, "eps": config.adam_eps}

        Carry = tuple[Representation, Moments]

        def representation_step(
            carry: Carry, given: tuple[Transitions, Array, Array]
        ) -> tuple[Carry, None]:
            representation, moments = carry
            gradient = jax.grad(self.representation_loss)(representation, *given)
            return adam(representation, gradient, moments, **rate), None

        (representation, representation_moments), _ = jax.lax.scan(
            representation_step,
            (agent.representation, agent.representation_moments),
            (batches, draws.level, draws.noise),
        )
        batch = jax.tree.map(lambda column: column[-1], batches)
        alpha = jnp.exp(agent.log_alpha)

        next_action, log_prob = self.draw(agent.actor, batch.next_state, draws.policy_noise[0])
        next_features = representation.features(batch.next_state, next_action)
        next_q = jnp.minimum(*agent.critic_target.values(next_features))
        target = batch.reward + config.gamma * batch.mask * (next_q - alpha * log_prob)
        features = representation.features(batch.state, batch.action)

        def critic_loss(critic: RFFCritic) -> Array:
            q1, q2 = critic.values(features)
            return jnp.mean((q1 - target) ** 2) + jnp.mean((q2 - target) ** 2)

        gradient = jax.grad(critic_loss)(agent.critic)
        critic, critic_moments = step(agent.critic, gradient, agent.critic_moments)

        def actor_loss(actor: Layers) -> tuple[Array, Array]:
            action, log_prob = self.draw(actor, batch.state, draws.policy_noise[1])
            q = jnp.minimum(*critic.values(representation.features(batch.state, action)))
            return jnp.mean(alpha * log_prob - q), jnp.mean(log_prob)

        gradient, log_prob = jax.grad(actor_loss, has_aux=True)(agent.actor)
        actor, actor_moments = step(agent.actor, gradient, agent.actor_moments)
        gradient = alpha * (-log_prob + self.action_dim)
        log_alpha, alpha_moments = step(agent.log_alpha, gradient, agent.alpha_moments)

        updates = agent.updates + 1
        tau = jnp.where(updates % config.update_target_every == 0, config.tau, 0.0)
        critic_target = moved_average(agent.critic_target, critic, tau)
        return Agent(
            representation,
            critic,
            actor,
            critic_target,
            log_alpha,
            representation_moments,
            critic_moments,
            actor_moments,
            alpha_moments,
            updates,
        )

    def representation_loss(
        self, representation: Representation, batch: Transitions, level: Array, noise: Array
    ) -> Array:
        abar = self.abar[level][:, None]
        scaled = jnp.sqrt(1 - abar) * self.noise_scale * noise
        perturbed = jnp.sqrt(abar) * batch.next_state + scaled
        x = jnp.concatenate([batch.state, batch.action], axis=1)
        zeta_input = jnp.concatenate([perturbed, abar], axis=1)
        score_weight = (1 - abar[:, 0]) * self.noise_scale
        return representation_loss(*representation, x, zeta_input, scaled, score_weight)

    def draw(self, actor: Layers, state: Array, noise: Array) -> tuple[Array, Array]:
        """Actions ``[B, A]`` and their log densities ``[B, 1]``."""
        mean, raw = jnp.split(mlp(state, actor, jax.nn.elu), 2, axis=1)
        low, high = self.log_std_bounds
        log_std = low + 0.5 * (high - low) * (jnp.tanh(raw) + 1)
        u = mean + jnp.exp(log_std) * noise
        gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        squash = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
        return jnp.tanh(u), (gaussian - squash).sum(axis=1, keepdims=True)

    def moved(
        self,
        batches: list[Batch],
        levels: list[Tensor],
        noises: list[Tensor],
        policy_noise: list[Tensor],
    ) -> list[Tensor]:
        """What one update adds to every parameter; see diffsr_workloads.parameters_of."""
        each = [Transitions.of(batch) for batch in batches]
        stacked = jax.tree.map(lambda *columns: jnp.stack(columns), *each)
        draws = Draws(
            *(
                jnp.stack([to_jax(t) for t in tensors])
                for tensors in ([level.int() for level in levels], noises, policy_noise)
            )
        )
        after = jax.jit(self.given_update)(self.agent, stacked, draws)
        pairs = zip(_parameters(after), _parameters(self.agent), strict=True)
        return [new - old for new, old in pairs]


def _parameters(agent: Agent) -> list[Tensor]:
    networks = [*agent.representation, *agent.critic, agent.actor, *agent.critic_target]
    pairs = [pair for network in networks for pair in network]
    arrays = [array for weight, bias in pairs for array in (weight.T, bias)]
    return [to_torch(array) for array in (*arrays, agent.log_alpha)]
