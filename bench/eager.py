"""What diffcore is compared with: the same mathematics in eager PyTorch, on the same parameters.

*As written* follows the shape in which research code for diffusion policies is usually released
(and DIPO's is): a GaussianDiffusion module with buffers of coefficients gathered by a tensor of t,
the time embedding computed anew at every step, noise drawn step by step; actions improved by a
``torch.optim.Adam`` after a ``backward()`` that fills the critic's parameter gradients as well.

*Hand-optimised* is what a careful author gets without leaving eager PyTorch: everything that
doesn't change from step to step is computed once, coefficients are Python floats, no autograd
bookkeeping in the sampler, no parameter gradients in the action gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mish, mse_loss

from diffcore import DiffusionSchedule
from diffcore.agents import DIPO, Batch, DiffusionPolicy, Replay
from diffcore.nn import MLP, Denoiser, TwinCritic, time_embedding

# -- as written -----------------------------------------------------------------------------------


class SinusoidalPosEmb(nn.Module):
    """``[B]`` -> ``[B, dim]``: sin, then cos of t * 10000^(-i / (dim/2 - 1))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        scale = math.log(10000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, device=t.device) * -scale)
        angle = t[:, None] * frequencies[None, :]
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Sin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


MODULES = {"mish": nn.Mish, "elu": nn.ELU, "sin": Sin, "identity": nn.Identity}


def sequential(mlp: MLP) -> nn.Sequential:
    """The layers of an MLP as one ``nn.Sequential`` that shares its parameters."""
    modules: list[nn.Module] = []
    for layer, activation in zip(mlp.layers, mlp.activations, strict=True):
        modules += [layer, MODULES[activation]()]
    return nn.Sequential(*modules[:-1])


class NoiseModel(nn.Module):
    """eps(x, t, state), on a :class:`diffcore.nn.Denoiser`'s parameters."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(denoiser.time_dim), *sequential(denoiser.time_mlp)
        )
        self.mid_layer = sequential(denoiser.trunk)

    def forward(self, x: Tensor, t: Tensor, state: Tensor) -> Tensor:
        return self.mid_layer(torch.cat([x, self.time_mlp(t), state], dim=1))


def extract(values: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """``values[t]``, shaped to broadcast against a batch of shape ``x_shape``."""
    return values.gather(-1, t).reshape(len(t), *((1,) * (len(x_shape) - 1)))


class GaussianDiffusion(nn.Module):
    """The DDPM sampler of Ho et al. 2020, as released code writes it. Noise: torch's generator."""

    def __init__(
        self, denoiser: Denoiser, schedule: DiffusionSchedule, noise_ratio: float = 1.0
    ) -> None:
        super().__init__()
        self.model = NoiseModel(denoiser)
        self.action_dim = denoiser.action_dim
        self.n_timesteps = schedule.K
        self.noise_ratio = noise_ratio
        betas, alphas = schedule.betas, schedule.alphas
        abar, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        variance = betas * (1 - before) / (1 - abar)
        for name, value in {
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
            "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - abar),
        }.items():
            self.register_buffer(name, value.float())

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (
            extract(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - extract(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise
        )

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = (
            extract(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + extract(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = extract(self.posterior_variance, t, x_t.shape)
        log_variance = extract(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance

    def p_mean_variance(self, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_recon = self.predict_start_from_noise(x, t, noise=eps)
        x_recon.clamp_(-1.0, 1.0)
        return self.q_posterior(x_recon, x, t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.step(x, t, self.model(x, t, s), torch.randn_like(x))

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
        mean, _, log_variance = self.p_mean_variance(x, t, eps)
        nonzero_mask = (1 - (t == 0).float()).reshape(len(x), *((1,) * (x.ndim - 1)))
        return mean + nonzero_mask * (0.5 * log_variance).exp() * noise * self.noise_ratio

    @torch.no_grad()
    def p_sample_loop(self, state: Tensor, shape: Sequence[int]) -> Tensor:
        x = torch.randn(shape, device=state.device)
        for i in reversed(range(self.n_timesteps)):
            t = torch.full((shape[0],), i, device=state.device, dtype=torch.long)
            x = self.p_sample(x, t, state)
        return x

    @torch.no_grad()
    def sample(self, state: Tensor) -> Tensor:
        """Actions ``[B, A]`` for states ``[B, S]``."""
        return self.p_sample_loop(state, (len(state), self.action_dim)).clamp_(-1.0, 1.0)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (
            extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def loss(
        self, state: Tensor, action: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The denoising loss; t ``[B]`` and noise ``[B, A]`` drawn if None."""
        if t is None:
            t = torch.randint(0, self.n_timesteps, (len(action),), device=action.device)
        if noise is None:
            noise = torch.randn_like(action)
        return mse_loss(self.model(self.q_sample(action, t, noise), t, state), noise)


def action_gradient(
    critic: nn.Module,
    states: Tensor,
    actions: Tensor,
    *,
    steps: int = 20,
    lr: float = 0.03,
    max_norm: float | None = None,
) -> Tensor:
    """DIPO's improvement of actions ``[B, A]`` as its released code writes it."""
    best_actions = actions.clone()
    optimizer = torch.optim.Adam([best_actions], lr=lr, eps=1e-5)
    for _ in range(steps):
        best_actions.requires_grad_(True)
        q1, q2 = critic(states, best_actions)
        loss = -torch.min(q1, q2)
        optimizer.zero_grad()
        loss.backward(torch.ones_like(loss))
        if max_norm is not None:
            nn.utils.clip_grad_norm_([best_actions], max_norm=max_norm, norm_type=2)
        optimizer.step()
        best_actions.requires_grad_(False)
        best_actions.clamp_(-1.0, 1.0)
    return best_actions.detach()


class Critic(nn.Module):
    """Twin Q(s, a) -> (q1, q2), on a :class:`diffcore.nn.TwinCritic`'s parameters."""

    def __init__(self, critic: TwinCritic) -> None:
        super().__init__()
        self.q1_model, self.q2_model = sequential(critic.q1), sequential(critic.q2)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=-1)
        return self.q1_model(x), self.q2_model(x)


class EagerDIPO:
    """DIPO's act and update as written, starting from the weights of a diffcore agent."""

    def __init__(self, agent: DIPO) -> None:
        assert isinstance(agent.actor, DiffusionPolicy)
        self.config, self.action_dim = agent.config, agent.action_dim
        self.actor = GaussianDiffusion(copy.deepcopy(agent.actor.denoiser), agent.actor.schedule)
        self.critic = Critic(copy.deepcopy(agent.critic))
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_target = copy.deepcopy(self.critic)
        adam = {"lr": self.config.lr, "eps": self.config.adam_eps}
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.updates = 0

    def act(self, observation: Tensor) -> Tensor:
        return self.actor.sample(observation)

    def target_actions(self, state: Tensor) -> Tensor:
        return self.actor_target.sample(state)

    def update(self, replay: Replay, generator: torch.Generator) -> None:
        batch = replay.sample(self.config.batch_size, generator)
        self.update_critic(batch, self.target_actions(batch.next_state))
        batch = replay.sample(self.config.batch_size, generator)
        best_actions = self.improve_actions(batch)
        replay.set_best_action(batch.index, best_actions)
        self.update_actor(self.actor.loss(batch.state, best_actions))
        self.update_targets()

    def update_critic(self, batch: Batch, next_action: Tensor) -> None:
        with torch.no_grad():
            target_q1, target_q2 = self.critic_target(batch.next_state, next_action)
            next_q = torch.min(target_q1, target_q2)
            target_q = batch.reward + self.config.gamma * batch.mask * next_q
        current_q1, current_q2 = self.critic(batch.state, batch.action)
        loss = mse_loss(current_q1, target_q) + mse_loss(current_q2, target_q)
        self.critic_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.ac_grad_norm)
        self.critic_optimizer.step()

    def improve_actions(self, batch: Batch) -> Tensor:
        return action_gradient(
            self.critic,
            batch.state,
            batch.best_action,
            steps=self.config.action_gradient_steps,
            lr=self.config.action_lr,
            max_norm=self.config.action_grad_norm_ratio * self.action_dim,
        )

    def update_actor(self, loss: Tensor) -> None:
        self.actor_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.ac_grad_norm)
        self.actor_optimizer.step()

    def update_targets(self) -> None:
        self.move(self.critic_target, self.critic)
        if self.updates % self.config.update_actor_target_every == 0:
            self.move(self.actor_target, self.actor)
        self.updates += 1

    def move(self, target: nn.Module, model: nn.Module) -> None:
        tau = self.config.tau
        for p, target_p in zip(model.parameters(), target.parameters(), strict=True):
            target_p.data.copy_(tau * p.data + (1 - tau) * target_p.data)


# -- hand-optimised -------------------------------------------------------------------------------

COMPILED_STEPS = 10
"""Steps in one torch.compile graph: one of a whole chain of 100 takes minutes to compile."""

torch._dynamo.config.recompile_limit = 64  # one graph for every batch size compared

Network = tuple[Tensor, Tensor, list[Tensor]]
"""A critic at given states: first layer's state part ``[B, H]``, action weights, other layers."""


def mlp(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A mish MLP given as [weight, bias, weight, bias, ...]."""
    *hidden, last = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        x = mish(linear(x, weight, bias))
    return linear(x, *last)


class OptimisedSampler:
    """The DDPM chain with all that can be taken out of its loop taken out.

    The time MLP runs once for all steps, the state's part of the first layer once for all rows.
    Weights are read anew at every call, so changing them in place is safe.

    Args:
        denoiser, schedule: as for :func:`diffcore.ops.reverse_diffusion`.
        dtype: what the networks compute in; the chain's x is float32.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: DiffusionSchedule,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        table = schedule.solver("ddpm")
        self.denoiser = denoiser
        self.dtype = dtype
        self.coefficients: list[list[float]] = table.coefficients.tolist()
        self.embedding = time_embedding(table.timesteps, denoiser.time_dim).to(dtype)

    def per_call(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """What the steps share: by step ``[K, H]``, by row ``[B, H]``, x's weights, the rest."""
        model = self.denoiser
        time_parameters = [p.detach().to(self.dtype) for p in model.time_mlp.parameters()]
        first, bias, *rest = (p.detach().to(self.dtype) for p in model.trunk.parameters())
        sizes = [model.action_dim, model.time_dim, model.state_dim]
        w_x, w_time, w_state = first.split(sizes, dim=1)
        by_step = linear(mlp(self.embedding, time_parameters), w_time, bias)
        by_row = linear(state.to(self.dtype), w_state)
        return by_step, by_row, w_x.t(), rest

    def advance(
        self,
        x: Tensor,
        by_row: Tensor,
        w_x: Tensor,
        rest: list[Tensor],
        by_step: Tensor,
        coefficients: Sequence[Sequence[float]] | Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Some steps of the chain: as many as there are coefficients."""
        for c, offset, z in zip(coefficients, by_step, noise, strict=True):
            h = mish(torch.addmm(by_row + offset, x.to(self.dtype), w_x))
            eps = mlp(h, rest).float()
            x0 = (c[0] * x - c[1] * eps).clamp(-1.0, 1.0)
            x = c[2] * x0 + c[3] * x + c[5] * z
        return x

    def run(self, x: Tensor, noise: Tensor, by_step: Tensor, *shared: Any) -> Tensor:
        return self.advance(x, *shared, by_step, self.coefficients, noise)

    @torch.no_grad()
    def __call__(
        self, state: Tensor, x_init: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Actions ``[B, A]``; ``x_init`` ``[B, A]`` and ``noise`` ``[K, B, A]`` drawn if None."""
        by_step, *shared = self.per_call(state)
        shape = (len(state), self.denoiser.action_dim)
        x = torch.randn(shape) if x_init is None else x_init
        if noise is None:
            noise = torch.randn(len(self.coefficients), *shape)
        return self.run(x, noise, by_step, *shared).clamp(-1.0, 1.0)


class CompiledSampler(OptimisedSampler):
    """The hand-optimised chain under ``torch.compile``, COMPILED_STEPS steps in one graph."""

    def __init__(self, denoiser: Denoiser, schedule: DiffusionSchedule) -> None:
        super().__init__(denoiser, schedule)
        table = torch.tensor(self.coefficients)
        self.blocks = table.split(COMPILED_STEPS)

    def run(self, x: Tensor, noise: Tensor, by_step: Tensor, *shared: Any) -> Tensor:
        blocks = zip(
            by_step.split(COMPILED_STEPS), self.blocks, noise.split(COMPILED_STEPS), strict=True
        )
        for offsets, coefficients, z in blocks:
            x = compiled_advance(self, x, *shared, offsets, coefficients, z)
        return x


@torch.compile(fullgraph=True, dynamic=False)
def compiled_advance(sampler: OptimisedSampler, *arguments: Any) -> Tensor:
    return OptimisedSampler.advance(sampler, *arguments)


class OptimisedActionGradient:
    """The ascent on min(Q1, Q2) without parameter gradients and without an optimiser object.

    The state's part of each first layer is computed once. Weights are read anew at every call.

    Args:
        critic: as for :func:`diffcore.ops.action_gradient`.
        steps, lr, max_norm: as there; Adam, norm limited over the batch.
    """

    def __init__(
        self,
        critic: TwinCritic,
        *,
        steps: int = 20,
        lr: float = 0.03,
        max_norm: float | None = None,
    ) -> None:
        self.critic = critic
        self.max_norm = max_norm
        # Adam's step size and the correction of its denominator, by step.
        self.corrections = [
            (lr / (1 - 0.9**i), 1 / math.sqrt(1 - 0.999**i)) for i in range(1, steps + 1)
        ]

    def per_call(self, state: Tensor) -> list[Network]:
        networks = []
        for q in (self.critic.q1, self.critic.q2):
            first, bias, *rest = (p.detach() for p in q.parameters())
            w_state, w_action = first.split([self.critic.state_dim, self.critic.action_dim], dim=1)
            networks.append((linear(state, w_state, bias), w_action.t(), rest))
        return networks

    @staticmethod
    def objective(action: Tensor, networks: list[Network]) -> Tensor:
        q1, q2 = (
            mlp(mish(torch.addmm(by_row, action, w_action)), rest)
            for by_row, w_action, rest in networks
        )
        return -torch.min(q1, q2).sum()

    def gradient(self, action: Tensor, networks: list[Network]) -> Tensor:
        action = action.detach().requires_grad_()
        return torch.autograd.grad(self.objective(action, networks), action)[0]

    def ascend(
        self,
        action: Tensor,
        m: Tensor,
        v: Tensor,
        networks: list[Network],
        corrections: Sequence[Sequence[float]] | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Some steps of Adam: as many as there are corrections."""
        for step_size, root_correction in corrections:
            gradient = self.gradient(action, networks)
            if self.max_norm is not None:
                gradient = gradient * (self.max_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
            m = torch.lerp(m, gradient, 0.1)
            v = 0.999 * v + 0.001 * gradient * gradient
            step = step_size * m / (v.sqrt() * root_correction + 1e-5)
            action = (action.detach() - step).clamp(-1.0, 1.0)
        return action, m, v

    def run(self, action: Tensor, networks: list[Network]) -> Tensor:
        zeros = torch.zeros_like(action)
        return self.ascend(action, zeros, zeros, networks, self.corrections)[0]

    def __call__(self, state: Tensor, action: Tensor) -> Tensor:
        """Improved actions ``[B, A]``."""
        return self.run(action, self.per_call(state))


class CompiledActionGradient(OptimisedActionGradient):
    """The hand-optimised ascent under ``torch.compile``, COMPILED_STEPS steps in one graph."""

    def gradient(self, action: Tensor, networks: list[Network]) -> Tensor:
        return torch.func.grad(self.objective)(action, networks)

    @torch.no_grad()
    def run(self, action: Tensor, networks: list[Network]) -> Tensor:
        m, v = torch.zeros_like(action), torch.zeros_like(action)
        for corrections in torch.tensor(self.corrections).split(COMPILED_STEPS):
            action, m, v = compiled_ascend(self, action, m, v, networks, corrections)
        return action


@torch.compile(fullgraph=True, dynamic=False)
def compiled_ascend(ascent: OptimisedActionGradient, *arguments: Any) -> tuple[Tensor, ...]:
    return ascent.ascend(*arguments)


class OptimisedDIPO(EagerDIPO):
    """DIPO's act and update with chain and ascent hand-optimised, fused Adam, targets by foreach.

    Args:
        agent: whose weights it starts from.
        compiled: chain, ascent and the networks of both losses under ``torch.compile``.
    """

    def __init__(self, agent: DIPO, *, compiled: bool = False) -> None:
        assert isinstance(agent.actor, DiffusionPolicy)
        self.config, self.action_dim = agent.config, agent.action_dim
        config, schedule = agent.config, agent.actor.schedule
        denoiser, denoiser_target = (copy.deepcopy(agent.actor.denoiser) for _ in range(2))
        critic, critic_target = (copy.deepcopy(agent.critic) for _ in range(2))
        self.actor = GaussianDiffusion(denoiser, schedule)
        self.actor_target = GaussianDiffusion(denoiser_target, schedule)
        self.critic, self.critic_target = Critic(critic), Critic(critic_target)
        adam = {"lr": config.lr, "eps": config.adam_eps, "fused": True}
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.updates = 0
        sampler = CompiledSampler if compiled else OptimisedSampler
        self.sampler, self.target_sampler = (
            sampler(network, schedule) for network in (denoiser, denoiser_target)
        )
        ascent = CompiledActionGradient if compiled else OptimisedActionGradient
        self.ascent = ascent(
            critic,
            steps=config.action_gradient_steps,
            lr=config.action_lr,
            max_norm=config.action_grad_norm_ratio * self.action_dim,
        )
        if compiled:
            for network in (self.actor.model, self.critic, self.critic_target):
                network.compile(dynamic=False)

    def act(self, observation: Tensor) -> Tensor:
        return self.sampler(observation)

    def target_actions(self, state: Tensor) -> Tensor:
        return self.target_sampler(state)

    def improve_actions(self, batch: Batch) -> Tensor:
        return self.ascent(batch.state, batch.best_action)

    @torch.no_grad()
    def move(self, target: nn.Module, model: nn.Module) -> None:
        torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), self.config.tau)
