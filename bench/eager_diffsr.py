"""Diff-SR in eager PyTorch.

*As written* is as research code is usually released, and as Diff-SR's is: zeta is a tensor
``[B, features, state]`` multiplied by psi with ``bmm``; the policy is a ``torch.distributions``
object; every step has its own optimisers and reads its loss back with ``item()``. It differs from the
released code in two things, both of which would make that slower or worse: the critic that is used is
also the one that is trained, and the regulariser of weight 0 isn't computed.

*Hand-optimised* is what a careful author gets without leaving eager PyTorch: a policy in closed form,
fused Adam, a target by foreach, nothing read back, and no graph or gradient that nobody uses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from eager import sequential
from torch import Tensor, nn
from torch import distributions as pyd
from torch.nn.functional import linear, mse_loss, softplus

from diffcore.agents import Batch, DiffSR, Replay
from diffcore.agents.optimization import frozen


def score_matching_loss(
    psi: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, score_weight: Tensor
) -> Tensor:
    """From psi and zeta's last hidden layer on, as :meth:`EagerDiffSR.update_representation`."""
    return _loss_of_scores(psi, linear(hidden, weight, bias), offset, score_weight)


def representation_loss(
    psi: nn.Module,
    zeta: nn.Module,
    x: Tensor,
    perturbed: Tensor,
    offset: Tensor,
    score_weight: Tensor,
) -> Tensor:
    """Both networks and their loss, as :meth:`EagerDiffSR.update_representation`."""
    return _loss_of_scores(psi(x), zeta(perturbed), offset, score_weight)


def _loss_of_scores(psi: Tensor, zeta: Tensor, offset: Tensor, score_weight: Tensor) -> Tensor:
    batch, features = psi.shape
    zeta = zeta.reshape(batch, features, offset.shape[1])
    score = torch.bmm(psi.unsqueeze(1), zeta).squeeze(1)
    difference = offset + score_weight[:, None] * score
    return (1 / batch) * torch.sum(difference**2, dim=1).sum()


class SquashedNormal(pyd.TransformedDistribution):
    """tanh of a normal; what was last drawn is remembered for its log density."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(
            pyd.Normal(loc, scale), [pyd.TanhTransform(cache_size=1)], validate_args=False
        )


class Actor(nn.Module):
    """A squashed Gaussian policy, on a :class:`diffcore.nn.SquashedGaussian`'s parameters."""

    def __init__(self, trunk: nn.Sequential, log_std_bounds: tuple[float, float]) -> None:
        super().__init__()
        self.trunk, self.log_std_bounds = trunk, log_std_bounds

    def forward(self, state: Tensor) -> SquashedNormal:
        mu, log_std = self.trunk(state).chunk(2, dim=-1)
        low, high = self.log_std_bounds
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
        return SquashedNormal(mu, log_std.exp())


class RFFCritic(nn.Module):
    """Twin Q on sines of psi, on a :class:`diffcore.nn.TwinRFFCritic`'s parameters."""

    def __init__(self, q1: nn.Sequential, q2: nn.Sequential) -> None:
        super().__init__()
        self.q1, self.q2 = q1, q2

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        return self.q1(feature), self.q2(feature)


class EagerDiffSR:
    """Diff-SR's update as written, starting from the weights of a diffcore agent."""

    fused_adam = False

    def __init__(self, agent: DiffSR) -> None:
        self.config, self.action_dim = agent.config, agent.action_dim
        representation = copy.deepcopy(agent.representation)
        self.alpha_bar, self.noise_scale = representation.alpha_bar, representation.noise_scale
        self.psi = sequential(representation.psi.trunk)
        self.zeta = sequential(representation.zeta.trunk)
        critic, actor = copy.deepcopy(agent.critic), copy.deepcopy(agent.actor)
        self.critic = RFFCritic(sequential(critic.q1.head), sequential(critic.q2.head))
        self.critic_target = copy.deepcopy(self.critic)
        self.actor = Actor(sequential(actor.trunk), actor.log_std_bounds)
        self.log_alpha = agent.temperature.log.detach().clone().requires_grad_()

        config = agent.config
        adam = {"eps": config.adam_eps, "fused": self.fused_adam}
        rate: dict[str, Any] = {"lr": config.representation_lr, **adam}
        self.psi_optimizer = torch.optim.Adam(self.psi.parameters(), **rate)
        self.zeta_optimizer = torch.optim.Adam(self.zeta.parameters(), **rate)
        rate = {"lr": config.lr, **adam}
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **rate)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **rate)
        self.log_alpha_optimizer = torch.optim.Adam([self.log_alpha], **rate)
        self.updates = 0

    @property
    def alpha(self) -> Tensor:
        return self.log_alpha.exp()

    def update(self, replay: Replay, generator: torch.Generator) -> dict[str, Any]:
        for _ in range(self.config.extra_feature_steps + 1):
            batch = replay.sample(self.config.batch_size, generator)
            info = self.update_representation(batch)
        info |= self.update_critic(batch)
        info |= self.update_actor(batch)
        self.update_target()
        return info

    def update_representation(
        self, batch: Batch, *, level: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Any]:
        rows, state_dim = batch.next_state.shape
        if level is None:
            level = torch.randint(0, len(self.alpha_bar), (rows,))
        if noise is None:
            noise = torch.randn_like(batch.next_state)
        abar = torch.index_select(self.alpha_bar, 0, level).reshape(rows, 1)
        noise = self.noise_scale * noise
        perturbed = torch.sqrt(abar) * batch.next_state + torch.sqrt(1.0 - abar) * noise
        target = -(perturbed - torch.sqrt(abar) * batch.next_state)

        psi = self.psi(torch.cat([batch.state, batch.action], dim=-1))
        zeta = self.zeta(torch.cat([perturbed, abar], dim=-1)).reshape(rows, -1, state_dim)
        score = torch.bmm(psi.unsqueeze(1), zeta).squeeze(1)
        difference = target - (1.0 - abar) * self.noise_scale * score
        loss = ((1 / rows) * torch.sum(difference**2, dim=1)).sum()

        self.zeta_optimizer.zero_grad()
        self.psi_optimizer.zero_grad()
        loss.backward()
        self.zeta_optimizer.step()
        self.psi_optimizer.step()
        return {"score_loss": loss.item()}

    def draw(self, state: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Actions ``[B, A]`` and their log densities ``[B, 1]``."""
        dist = self.actor(state)
        u = dist.base_dist.loc + dist.base_dist.scale * self._policy_noise(like)
        action = dist.transforms[0](u)
        return action, dist.log_prob(action).sum(-1, keepdim=True)

    def _policy_noise(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def update_critic(self, batch: Batch) -> dict[str, Any]:
        next_action, log_prob = self.draw(batch.next_state, batch.action)
        next_feature = self.psi(torch.cat([batch.next_state, next_action], dim=-1))
        target_q1, target_q2 = self.critic_target(next_feature)
        target_v = torch.min(target_q1, target_q2) - self.alpha.detach() * log_prob
        target_q = (batch.reward + batch.mask * self.config.gamma * target_v).detach()

        q1, q2 = self.critic(self.psi(torch.cat([batch.state, batch.action], dim=-1)))
        loss = mse_loss(q1, target_q) + mse_loss(q2, target_q)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return {"q_loss": loss.item(), "q1": q1.mean().item(), "q2": q2.mean().item()}

    def update_actor(self, batch: Batch) -> dict[str, Any]:
        action, log_prob = self.draw(batch.state, batch.action)
        q = torch.min(*self.critic(self.psi(torch.cat([batch.state, action], dim=-1))))
        loss = (self.alpha.detach() * log_prob - q).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()

        alpha_loss = (self.alpha * (-log_prob + self.action_dim).detach()).mean()
        self.log_alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.log_alpha_optimizer.step()
        return {"actor_loss": loss.item(), "alpha": self.alpha.item()}

    def update_target(self) -> None:
        self.updates += 1
        if self.updates % self.config.update_target_every == 0:
            self.move_target()

    def move_target(self) -> None:
        tau = self.config.tau
        for p, target_p in zip(
            self.critic.parameters(), self.critic_target.parameters(), strict=True
        ):
            target_p.data.copy_(tau * p.data + (1 - tau) * target_p.data)


# -- hand-optimised -------------------------------------------------------------------------------


def soft_value(
    actor: Actor,
    psi: nn.Module,
    critic: RFFCritic,
    state: Tensor,
    noise: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """``min(Q1, Q2) - temperature * log pi`` of a drawn action, ``[B, 1]``, and ``log pi``."""
    mean, raw = actor.trunk(state).chunk(2, dim=-1)
    low, high = actor.log_std_bounds
    log_std = low + 0.5 * (high - low) * (raw.tanh() + 1)
    u = mean + log_std.exp() * noise
    slope = 2 * (math.log(2) - u - softplus(-2 * u))
    density = -0.5 * noise * noise - log_std - 0.5 * math.log(2 * math.pi) - slope
    log_prob = density.sum(-1, keepdim=True)
    q1, q2 = critic(psi(torch.cat([state, u.tanh()], dim=-1)))
    return torch.min(q1, q2) - temperature * log_prob, log_prob


def critic_loss(critic: RFFCritic, feature: Tensor, target: Tensor) -> Tensor:
    q1, q2 = critic(feature)
    return mse_loss(q1, target) + mse_loss(q2, target)


class OptimisedDiffSR(EagerDiffSR):
    """Diff-SR's update hand-optimised.

    Args:
        agent: whose weights it starts from.
        compiled: losses and values, with the networks in them, under ``torch.compile``.
    """

    fused_adam = True

    def __init__(self, agent: DiffSR, *, compiled: bool = False) -> None:
        super().__init__(agent)
        self.judges = [*self.psi.parameters(), *self.critic.parameters()]

        def form(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self.representation_loss = form(representation_loss)
        self.soft_value, self.critic_loss = form(soft_value), form(critic_loss)

    def update_representation(
        self, batch: Batch, *, level: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Any]:
        if level is None:
            level = torch.randint(0, len(self.alpha_bar), batch.next_state.shape[:1])
        if noise is None:
            noise = torch.randn_like(batch.next_state)
        abar = self.alpha_bar[level].unsqueeze(1)
        offset = (1 - abar).sqrt() * self.noise_scale * noise
        perturbed = abar.sqrt() * batch.next_state + offset
        loss = self.representation_loss(
            self.psi,
            self.zeta,
            torch.cat([batch.state, batch.action], dim=-1),
            torch.cat([perturbed, abar], dim=-1),
            offset,
            (1 - abar.squeeze(1)) * self.noise_scale,
        )
        self.step(loss, self.zeta_optimizer, self.psi_optimizer)
        return {"score_loss": loss.detach()}

    @staticmethod
    def step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def update_critic(self, batch: Batch) -> dict[str, Any]:
        with torch.no_grad():
            noise = self._policy_noise(batch.action)
            value, _ = self.soft_value(
                self.actor, self.psi, self.critic_target, batch.next_state, noise, self.alpha
            )
            target = batch.reward + batch.mask * self.config.gamma * value
            feature = self.psi(torch.cat([batch.state, batch.action], dim=-1))
        loss = self.critic_loss(self.critic, feature, target)
        self.step(loss, self.critic_optimizer)
        return {"q_loss": loss.detach()}

    def update_actor(self, batch: Batch) -> dict[str, Any]:
        noise, alpha = self._policy_noise(batch.action), self.alpha.detach()
        with frozen(self.judges):
            value, log_prob = self.soft_value(
                self.actor, self.psi, self.critic, batch.state, noise, alpha
            )
            loss = -value.mean()
            self.step(loss, self.actor_optimizer)
        surplus = self.action_dim - log_prob.detach().mean()
        self.step(self.alpha * surplus, self.log_alpha_optimizer)
        return {"actor_loss": loss.detach(), "alpha": alpha}

    @torch.no_grad()
    def move_target(self) -> None:
        torch._foreach_lerp_(
            list(self.critic_target.parameters()),
            list(self.critic.parameters()),
            self.config.tau,
        )
