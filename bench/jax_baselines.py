"""What diffcore is compared with in JAX: jit, and lax.scan over steps, on the same parameters.

Written as a careful JAX user would: everything that doesn't change from step to step is computed
before the scan, a whole update is one compiled function, and an agent's old arrays are donated to it.
Arguments lie in JAX's arrays before a call is timed, and a call ends when its results are there. Keys
are split within the compiled functions, where that costs nothing.

JAX's CPU backend has a thread pool of its own, as large as torch's number of threads when
:func:`use_threads` is called before JAX is first used, and no larger or smaller afterwards.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from torch import Tensor, nn

from diffcore import DiffusionSchedule
from diffcore.agents import DIPO, Batch, DiffusionPolicy
from diffcore.nn import Denoiser, TwinCritic, time_embedding
from diffcore.training import ReplayBuffer

Layers = list[tuple[Array, Array]]
"""(weight ``[in, out]``, bias ``[out]``) of every linear layer, from input to output."""
PyTree = Any


def use_threads(threads: int) -> None:
    """Size of JAX's thread pool; has an effect before JAX is first used only."""
    os.environ["NPROC"] = str(threads)


def to_jax(tensor: Tensor) -> Array:
    return jnp.array(tensor.detach().numpy())  # a copy: weights may change in place


def to_torch(array: Array) -> Tensor:
    return torch.tensor(jax.device_get(array))


def layers(module: nn.Module) -> Layers:
    """The linear layers of a module whose parameters come as weight, bias, weight, bias, ..."""
    return as_layers([to_jax(p) for p in module.parameters()])


def as_layers(parameters: Sequence[Array]) -> Layers:
    """Of parameters in torch's order and layout."""
    return [(w.T, b) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]


def flat(networks: Iterable[Layers]) -> Tensor:
    """All parameters in torch's order and layout, as one vector; see :func:`layers`."""
    pairs = [to_torch(a) for network in networks for w, b in network for a in (w.T, b)]
    return torch.cat([p.flatten() for p in pairs])


def mlp(x: Array, network: Layers, activation: Callable[[Array], Array] = jax.nn.mish) -> Array:
    for weight, bias in network[:-1]:
        x = activation(x @ weight + bias)
    weight, bias = network[-1]
    return x @ weight + bias


# -- Adam -----------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Adam's state for a tree of arrays."""

    m: PyTree
    v: PyTree
    count: Array

    @staticmethod
    def of(tree: PyTree) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return Moments(zeros, jax.tree.map(jnp.zeros_like, tree), jnp.zeros((), jnp.int32))


def adam(
    values: PyTree, gradient: PyTree, moments: Moments, lr: float, eps: float
) -> tuple[PyTree, Moments]:
    """One step of torch.optim.Adam with its default betas."""
    count = moments.count + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments.m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments.v, gradient)
    # 1 - beta^count, without its cancellation.
    step_size = lr / -jnp.expm1(count * math.log(0.9))
    root_correction = 1 / jnp.sqrt(-jnp.expm1(count * math.log(0.999)))
    values = jax.tree.map(
        lambda x, m, v: x - step_size * m / (jnp.sqrt(v) * root_correction + eps), values, m, v
    )
    return values, Moments(m, v, count)


def moved_average(old: PyTree, new: PyTree, tau: float | Array) -> PyTree:
    return jax.tree.map(lambda old, new: tau * new + (1 - tau) * old, old, new)


def limit_norm(gradient: PyTree, max_norm: float | None) -> PyTree:
    """As ``clip_grad_norm_`` does it, over all arrays together."""
    if max_norm is None:
        return gradient
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    factor = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda g: g * factor, gradient)


# -- the chain and the action gradient ------------------------------------------------------------


class Chain(NamedTuple):
    """What a DDPM chain needs beside the networks: its table of coefficients, by step."""

    coefficients: Array
    embedding: Array

    @staticmethod
    def of(schedule: DiffusionSchedule, time_dim: int) -> Chain:
        table = schedule.solver("ddpm")
        embedding = time_embedding(table.timesteps, time_dim)
        return Chain(to_jax(table.coefficients.float()), to_jax(embedding.float()))


class DenoiserLayers(NamedTuple):
    time_mlp: Layers
    trunk: Layers

    @staticmethod
    def of(denoiser: Denoiser) -> DenoiserLayers:
        return DenoiserLayers(layers(denoiser.time_mlp), layers(denoiser.trunk))


def chain(
    denoiser: DenoiserLayers, table: Chain, state: Array, x_init: Array, noise: Array
) -> Array:
    """Actions ``[B, A]`` from x_init ``[B, A]`` and noise ``[K, B, A]``."""
    (first, bias), *others = denoiser.trunk
    action_dim, time_dim = x_init.shape[1], table.embedding.shape[1]
    w_x, w_time, w_state = jnp.split(first, [action_dim, action_dim + time_dim])
    by_step = mlp(table.embedding, denoiser.time_mlp) @ w_time + bias
    by_row = state @ w_state

    def step(x: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
        c, offset, z = given
        eps = mlp(jax.nn.mish(x @ w_x + by_row + offset), others)
        x0 = jnp.clip(c[0] * x - c[1] * eps, -1.0, 1.0)
        return c[2] * x0 + c[3] * x + c[5] * z, None

    x, _ = lax.scan(step, x_init, (table.coefficients, by_step, noise))
    return jnp.clip(x, -1.0, 1.0)


def draw_and_chain(
    denoiser: DenoiserLayers, table: Chain, state: Array, key: Array
) -> tuple[Array, Array]:
    """Actions ``[B, A]``, and the key for the next call."""
    shape = (len(state), denoiser.trunk[-1][1].shape[0])
    key, start, steps = jax.random.split(key, 3)
    x_init = jax.random.normal(start, shape)
    noise = jax.random.normal(steps, (len(table.coefficients), *shape))
    return chain(denoiser, table, state, x_init, noise), key


class Sampler:
    """The chain of a diffusion policy."""

    def __init__(self, denoiser: Denoiser, schedule: DiffusionSchedule, state: Tensor) -> None:
        self.denoiser = DenoiserLayers.of(denoiser)
        self.table = Chain.of(schedule, denoiser.time_dim)
        self.state = to_jax(state)
        self.key = jax.random.key(0)
        self.given, self.drawn = jax.jit(chain), jax.jit(draw_and_chain)

    def __call__(self) -> None:
        action, self.key = self.drawn(self.denoiser, self.table, self.state, self.key)
        action.block_until_ready()

    def on(self, x_init: Tensor, noise: Tensor) -> Tensor:
        given = (self.state, to_jax(x_init), to_jax(noise))
        return to_torch(self.given(self.denoiser, self.table, *given))


class Twins(NamedTuple):
    q1: Layers
    q2: Layers

    @staticmethod
    def of(critic: TwinCritic) -> Twins:
        return Twins(layers(critic.q1), layers(critic.q2))

    def values(self, state: Array, action: Array) -> tuple[Array, Array]:
        x = jnp.concatenate([state, action], axis=1)
        return mlp(x, self.q1), mlp(x, self.q2)


def action_gradient(
    critic: Twins,
    state: Array,
    action: Array,
    *,
    steps: int,
    lr: float,
    eps: float,
    max_norm: float | None,
) -> Array:
    """Adam's ascent of actions ``[B, A]`` on min(Q1, Q2), norm limited over the batch."""

    def split(network: Layers) -> tuple[Array, Array, Layers]:
        (first, bias), *others = network
        w_state, w_action = jnp.split(first, [state.shape[1]])
        return state @ w_state + bias, w_action, others

    halves = [split(network) for network in critic]

    def objective(action: Array) -> Array:
        q1, q2 = (mlp(jax.nn.mish(by_row + action @ w), rest) for by_row, w, rest in halves)
        return -jnp.minimum(q1, q2).sum()

    def step(carry: tuple[Array, Moments], _: None) -> tuple[tuple[Array, Moments], None]:
        action, moments = carry
        gradient = limit_norm(jax.grad(objective)(action), max_norm)
        action, moments = adam(action, gradient, moments, lr, eps)
        return (jnp.clip(action, -1.0, 1.0), moments), None

    return lax.scan(step, (action, Moments.of(action)), length=steps)[0][0]


class ActionGradient:
    """The ascent of one batch of actions."""

    def __init__(
        self,
        critic: TwinCritic,
        state: Tensor,
        action: Tensor,
        *,
        steps: int,
        max_norm: float,
        lr: float = 0.03,
        eps: float = 1e-5,
    ) -> None:
        self.critic, self.state, self.action = Twins.of(critic), to_jax(state), to_jax(action)
        options = {"steps": steps, "lr": lr, "eps": eps, "max_norm": max_norm}
        self.run = jax.jit(functools.partial(action_gradient, **options))

    def __call__(self) -> None:
        self.run(self.critic, self.state, self.action).block_until_ready()

    def on(self) -> Tensor:
        return to_torch(self.run(self.critic, self.state, self.action))


# -- updates of one network -----------------------------------------------------------------------


class Update:
    """One Adam step after another on ``loss(parameters, key)``; see workloads.Update."""

    def __init__(
        self,
        networks: tuple[Layers, ...],
        loss: Callable[[Any, Array], Array],
        given_loss: Callable[[Any], Array],
        lr: float,
        eps: float,
    ) -> None:
        self.lr = lr
        self.start = networks
        self.networks = jax.tree.map(jnp.copy, networks)
        self.moments = Moments.of(networks)
        self.key = jax.random.key(0)

        def step(networks: Any, moments: Moments, key: Array) -> tuple[Any, Moments, Array]:
            key, own = jax.random.split(key)
            return *adam(networks, jax.grad(loss)(networks, own), moments, lr, eps), key

        def given_step(networks: Any) -> Any:
            return adam(networks, jax.grad(given_loss)(networks), Moments.of(networks), lr, eps)[0]

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.given_step = jax.jit(given_step)

    def __call__(self) -> None:
        self.networks, self.moments, self.key = self.step(self.networks, self.moments, self.key)
        jax.block_until_ready(self.networks)

    def moved(self) -> Tensor:
        return (flat(self.given_step(self.start)) - flat(self.start)) / self.lr


def critic_loss(critic: Twins, state: Array, action: Array, target: Array) -> Array:
    q1, q2 = critic.values(state, action)
    return jnp.mean((q1 - target) ** 2) + jnp.mean((q2 - target) ** 2)


def critic_update(
    critic: TwinCritic, state: Tensor, action: Tensor, target: Tensor, lr: float, eps: float
) -> Update:
    given = [to_jax(x) for x in (state, action, target)]

    def loss(critic: Twins, key: Array | None = None) -> Array:
        return critic_loss(critic, *given)

    return Update(Twins.of(critic), loss, loss, lr, eps)


class Levels(NamedTuple):
    """What the denoising loss needs of a schedule, by level."""

    abar: Array
    embedding: Array

    @staticmethod
    def of(schedule: DiffusionSchedule, time_dim: int) -> Levels:
        embedding = time_embedding(torch.arange(schedule.K), time_dim)
        return Levels(to_jax(schedule.alphas_cumprod.float()), to_jax(embedding.float()))


def denoising_loss(
    denoiser: DenoiserLayers, levels: Levels, state: Array, action: Array, t: Array, noise: Array
) -> Array:
    abar = levels.abar[t][:, None]
    noisy = jnp.sqrt(abar) * action + jnp.sqrt(1 - abar) * noise
    time_features = mlp(levels.embedding[t], denoiser.time_mlp)
    eps = mlp(jnp.concatenate([noisy, time_features, state], axis=1), denoiser.trunk)
    return jnp.mean((eps - noise) ** 2)


def draw_level(key: Array, levels: Levels, shape: tuple[int, int]) -> tuple[Array, Array]:
    """(t ``[B]``, noise ``[B, A]``)."""
    first, second = jax.random.split(key)
    t = jax.random.randint(first, shape[:1], 0, len(levels.abar))
    return t, jax.random.normal(second, shape)


def denoising_update(
    denoiser: Denoiser,
    schedule: DiffusionSchedule,
    state: Tensor,
    action: Tensor,
    t: Tensor,
    noise: Tensor,
    lr: float,
    eps: float,
) -> Update:
    levels = Levels.of(schedule, denoiser.time_dim)
    batch = to_jax(state), to_jax(action)
    given = to_jax(t.int()), to_jax(noise)

    def loss(denoiser: DenoiserLayers, key: Array) -> Array:
        return denoising_loss(denoiser, levels, *batch, *draw_level(key, levels, action.shape))

    def given_loss(denoiser: DenoiserLayers) -> Array:
        return denoising_loss(denoiser, levels, *batch, *given)

    return Update(DenoiserLayers.of(denoiser), loss, given_loss, lr, eps)


# -- Diff-SR's ops --------------------------------------------------------------------------------


def rff_features(x: Array, omega: Array, bias: Array) -> Array:
    return jnp.sin(x @ omega.T + bias)


def score_matching_loss(
    psi: Array, hidden: Array, weight: Array, bias: Array, offset: Array, score_weight: Array
) -> Array:
    zeta = (hidden @ weight.T + bias).reshape(*psi.shape, -1)
    score = jnp.einsum("bd,bds->bs", psi, zeta)
    return jnp.square(score_weight[:, None] * score + offset).sum(axis=1).mean()


def representation_loss(
    psi: Layers,
    zeta: Layers,
    x: Array,
    perturbed: Array,
    offset: Array,
    score_weight: Array,
) -> Array:
    *hidden, (weight, bias) = zeta
    for w, b in hidden:
        perturbed = jax.nn.elu(perturbed @ w + b)
    features = mlp(x, psi, jax.nn.elu)
    return score_matching_loss(features, perturbed, weight.T, bias, offset, score_weight)


class ReverseStep:
    """One step of the chain with a row of coefficients, from x and eps; noise drawn in the call."""

    def __init__(self, coefficients: Sequence[float], x: Tensor, eps: Tensor) -> None:
        c, self.inputs, self.key = coefficients, (to_jax(x), to_jax(eps)), jax.random.key(0)

        def step(x: Array, eps: Array, z: Array) -> Array:
            return c[2] * jnp.clip(c[0] * x - c[1] * eps, -1.0, 1.0) + c[3] * x + c[5] * z

        def draw_and_step(x: Array, eps: Array, key: Array) -> tuple[Array, Array]:
            key, own = jax.random.split(key)
            return step(x, eps, jax.random.normal(own, x.shape)), key

        self.step, self.draw_and_step = jax.jit(step), jax.jit(draw_and_step)

    def __call__(self) -> Array:
        result, self.key = self.draw_and_step(*self.inputs, self.key)
        return jax.block_until_ready(result)

    def on(self, z: Tensor) -> Tensor:
        return to_torch(self.step(*self.inputs, to_jax(z)))


def squashed_gaussian(
    network: Layers, x: Array, noise: Array, log_std_bounds: tuple[float, float]
) -> Array:
    """Actions and their log density, side by side."""
    low, high = log_std_bounds
    mean, raw = jnp.split(mlp(x, network, jax.nn.elu), 2, axis=-1)
    log_std = low + 0.5 * (high - low) * (jnp.tanh(raw) + 1)
    u = mean + jnp.exp(log_std) * noise
    slope = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - slope
    return jnp.concatenate([jnp.tanh(u), density.sum(-1, keepdims=True)], axis=-1)


def rff_critic(features: Array, network: Layers) -> Array:
    (weight, bias), *others = network
    return mlp(jnp.sin(features @ weight + bias), others, jax.nn.elu)


def soft_value(
    policy: Layers,
    psi: Layers,
    critics: Sequence[Layers],
    state: Array,
    noise: Array,
    temperature: float,
    log_std_bounds: tuple[float, float],
) -> Array:
    """The loss of a policy that psi and its critics judge."""
    sample = squashed_gaussian(policy, state, noise, log_std_bounds)
    action, log_prob = sample[:, :-1], sample[:, -1:]
    features = mlp(jnp.concatenate([state, action], axis=1), psi, jax.nn.elu)
    q = functools.reduce(jnp.minimum, (rff_critic(features, critic) for critic in critics))
    return jnp.mean(temperature * log_prob - q)


class ForwardAndBackward:
    """A function's value and its gradients at ``inputs``; ``constants`` follow them."""

    def __init__(
        self,
        function: Callable[..., Array],
        inputs: Sequence[Tensor],
        grad: Tensor,
        *constants: Tensor,
    ) -> None:
        self.inputs, self.grad = [to_jax(i) for i in inputs], to_jax(grad)
        self.constants = [to_jax(c) for c in constants]

        def run(inputs: list[Array], grad: Array, constants: list[Array]) -> tuple[Array, ...]:
            y, back = jax.vjp(lambda *inputs: function(*inputs, *constants), *inputs)
            return y, *back(grad)

        self.run = jax.jit(run)

    def __call__(self) -> tuple[Array, ...]:
        results = self.run(self.inputs, self.grad, self.constants)
        return jax.block_until_ready(results)

    def on(self) -> list[Tensor]:
        return [to_torch(r) for r in self()]


# -- DIPO -----------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """A batch, or with as many rows the whole replay."""

    state: Array
    action: Array
    reward: Array
    next_state: Array
    mask: Array
    best_action: Array

    @staticmethod
    def of(batch: Batch) -> Transitions:
        return Transitions(*(to_jax(getattr(batch, name)) for name in Transitions._fields))


class Agent(NamedTuple):
    """All that an update of DIPO changes."""

    actor: DenoiserLayers
    critic: Twins
    actor_target: DenoiserLayers
    critic_target: Twins
    actor_moments: Moments
    critic_moments: Moments
    updates: Array


class JaxDIPO:
    """DIPO's act and update, starting from the weights of a diffcore agent."""

    def __init__(self, agent: DIPO) -> None:
        assert isinstance(agent.actor, DiffusionPolicy)
        self.config, self.action_dim = agent.config, agent.action_dim
        schedule, denoiser = agent.actor.schedule, agent.actor.denoiser
        self.table = Chain.of(schedule, denoiser.time_dim)
        self.levels = Levels.of(schedule, denoiser.time_dim)
        actor, critic = DenoiserLayers.of(denoiser), Twins.of(agent.critic)
        copies = jax.tree.map(jnp.copy, (actor, critic))  # what is donated mustn't be shared
        moments = Moments.of(actor), Moments.of(critic)
        self.agent = Agent(actor, critic, *copies, *moments, jnp.zeros((), jnp.int32))
        self.key = jax.random.key(0)
        self.act_jit = jax.jit(draw_and_chain)
        self.update_jit = jax.jit(self.drawn_update, donate_argnums=(0, 1))
        self.given_jit = jax.jit(self.given_update)

    def act(self, observation: Array) -> None:
        action, self.key = self.act_jit(self.agent.actor, self.table, observation, self.key)
        action.block_until_ready()

    def update(self, replay: Transitions) -> Transitions:
        """The replay with the improved actions in it."""
        self.agent, replay, self.key = self.update_jit(self.agent, replay, self.key)
        jax.block_until_ready(self.agent)
        return replay

    def drawn_update(
        self, agent: Agent, replay: Transitions, key: Array
    ) -> tuple[Agent, Transitions, Array]:
        key, *keys = jax.random.split(key, 5)
        rows = self.config.batch_size
        batch, other = (
            jax.random.randint(k, (rows,), 0, len(replay.state)) for k in (keys[0], keys[1])
        )
        critic_batch = jax.tree.map(lambda column: column[batch], replay)
        actor_batch = jax.tree.map(lambda column: column[other], replay)
        next_action, _ = draw_and_chain(
            agent.actor_target, self.table, critic_batch.next_state, keys[2]
        )
        t, noise = draw_level(keys[3], self.levels, (rows, self.action_dim))
        agent, improved = self.given_update(agent, critic_batch, next_action, actor_batch, t, noise)
        stored = replay.best_action.at[other].set(improved)
        return agent, replay._replace(best_action=stored), key

    def given_update(
        self,
        agent: Agent,
        critic_batch: Transitions,
        next_action: Array,
        actor_batch: Transitions,
        t: Array,
        noise: Array,
    ) -> tuple[Agent, Array]:
        """(the agent after one update, the improved actions)."""
        config = self.config
        step = functools.partial(adam, lr=config.lr, eps=config.adam_eps)

        next_q = jnp.minimum(*agent.critic_target.values(critic_batch.next_state, next_action))
        target = critic_batch.reward + config.gamma * critic_batch.mask * next_q

        gradient = jax.grad(critic_loss)(
            agent.critic, critic_batch.state, critic_batch.action, target
        )
        gradient = limit_norm(gradient, config.ac_grad_norm)
        critic, critic_moments = step(agent.critic, gradient, agent.critic_moments)

        state = actor_batch.state
        improved = action_gradient(
            critic,
            state,
            actor_batch.best_action,
            steps=config.action_gradient_steps,
            lr=config.action_lr,
            eps=config.adam_eps,
            max_norm=config.action_grad_norm_ratio * self.action_dim,
        )
        gradient = jax.grad(denoising_loss)(agent.actor, self.levels, state, improved, t, noise)
        gradient = limit_norm(gradient, config.ac_grad_norm)
        actor, actor_moments = step(agent.actor, gradient, agent.actor_moments)

        moves = agent.updates % config.update_actor_target_every == 0
        actor_target = moved_average(agent.actor_target, actor, jnp.where(moves, config.tau, 0.0))
        critic_target = moved_average(agent.critic_target, critic, config.tau)
        networks = actor, critic, actor_target, critic_target
        return Agent(*networks, actor_moments, critic_moments, agent.updates + 1), improved

    def moved(self, batch: Batch, next_action: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """By how many learning rates one update moves the parameters of critic, its target, actor
        and its target."""
        given = (Transitions.of(batch), to_jax(next_action))
        after, _ = self.given_jit(self.agent, *given, given[0], to_jax(t.int()), to_jax(noise))
        return (_parameters(after) - _parameters(self.agent)) / self.config.lr


def _parameters(agent: Agent) -> Tensor:
    networks = (agent.critic, agent.critic_target, agent.actor, agent.actor_target)
    return flat(network for pair in networks for network in pair)


def replay_arrays(replay: ReplayBuffer) -> Transitions:
    """Copies of all the transitions of a full buffer."""
    rows = replay.sample(len(replay), torch.Generator().manual_seed(0))
    return Transitions.of(rows)
