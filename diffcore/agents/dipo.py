"""DIPO: policy representation via diffusion probability model (arXiv 2305.13122).

A diffusion policy cannot be improved by differentiating Q through its chain of K steps at a
bearable price. DIPO turns it round: move actions known from experience uphill in Q, then fit the
policy to the moved actions. One update is

1. critic: ``Q(s, a) <- r + gamma mask min(Q1', Q2')(s', a')``, a' from the target policy;
2. action gradient: ``a <- a + eta grad_a min(Q1, Q2)(s, a)``, a few times (Eq. 15);
3. actor: fit the policy to (s, improved a) by its own loss, for diffusion the denoising loss;
4. targets: exponential moving averages of critic and actor.

The paper's Algorithm 3 and its released code differ. ``DIPOConfig.mode`` picks one of three:

==================  ========================  =========================  =======================
switch              ``fixed`` (default)       ``official``               ``paper``
==================  ========================  =========================  =======================
improved actions    kept beside the actions   thrown away after use      overwrite the actions
action step         Adam, norm cut            Adam, norm cut             plain gradient ascent
actor's batch       the one just improved     the one just improved      drawn again
time limit          value bootstrapped        treated as an end          value bootstrapped
schedule "linear"   to noise in any K         betas of 1000 steps        to noise in any K
==================  ========================  =========================  =======================

``official`` has faults kept for comparison. The released code means to store the improved actions,
but ``numpy.copyto(buffer[index], new)`` writes into a copy. And its linear schedule has the betas of
DDPM's 1000 steps whatever K is: after 100 of them abar is 0.36, and a chain from pure noise doesn't
draw from what was fitted. ``fixed`` is what it means to do.
``paper`` has a price of its own: an overwritten action keeps the reward and the next state that the
action really taken had earned, and the critic learns from that. Algorithm 3 moves every stored action
by one step at a time; here a batch of them is moved, by as many steps as in the other modes.

No mode repeats how the released code evaluates: in the training environment, whose episode that cuts.
"""

from __future__ import annotations

import copy
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
from diffcore.agents.checks import check_choice, check_integer, check_real
from diffcore.agents.environment_names import environment_base_name
from diffcore.agents.optimization import (
    ema_update_,
    frozen,
    learning,
    make_adam,
    measured_step,
)
from diffcore.agents.policies import DiffusionPolicy, MLPPolicy, Policy, VAEPolicy
from diffcore.agents.replay_protocol import Batch, Replay
from diffcore.nn import TwinCritic

Mode = Literal["fixed", "official", "paper"]
PolicyName = Literal["diffusion", "mlp", "vae"]
ScheduleName = Literal["cosine", "linear", "vp"]
SolverName = Literal["ddpm", "ddpm_unclipped", "ddim", "exponential_integrator", "dpmpp_2m"]


@dataclass(frozen=True)
class ModeSwitches:
    """Everything in which the three modes differ. The agent asks these, never the mode's name."""

    store_improved_actions: bool
    """Write improved actions back to the replay; else they live for one update."""
    overwrite_replay: bool
    """Improve and overwrite the taken actions, which the critic learns from too; else the best
    actions, a column of their own that only the actor learns from."""
    action_optimizer: Literal["adam", "ascent"]
    """``adam``: a fresh Adam each call, gradient norm cut. ``ascent``: Eq. 15 as it stands."""
    resample_actor_batch: bool
    """Fit the actor to a batch drawn after the improvement; else to the one just improved."""
    bootstrap_truncated: bool
    """Bootstrap the value of a state at which the time limit cut the episode."""
    rescale_linear_schedule: bool
    """Schedule "linear" is DDPM's diffusion in K steps; else K betas from 1e-4 to 0.02, as its 1000
    are, which end far from the noise that chains start from."""

    def __post_init__(self) -> None:
        if self.overwrite_replay and not self.store_improved_actions:
            raise ValueError("overwrite_replay needs store_improved_actions")


MODES: dict[Mode, ModeSwitches] = {
    "fixed": ModeSwitches(
        store_improved_actions=True,
        overwrite_replay=False,
        action_optimizer="adam",
        resample_actor_batch=False,
        bootstrap_truncated=True,
        rescale_linear_schedule=True,
    ),
    "official": ModeSwitches(
        store_improved_actions=False,
        overwrite_replay=False,
        action_optimizer="adam",
        resample_actor_batch=False,
        bootstrap_truncated=False,
        rescale_linear_schedule=False,
    ),
    "paper": ModeSwitches(
        store_improved_actions=True,
        overwrite_replay=True,
        action_optimizer="ascent",
        resample_actor_batch=True,
        bootstrap_truncated=True,
        rescale_linear_schedule=True,
    ),
}

ACTION_NORM_EVERY = 20
"""Updates from one to the next with the action gradient's norm among their metrics: the op that moves
actions doesn't tell it, and one gradient more would take a few percent of every update."""

# Table 3 of the paper, by the name that environment_base_name gives.
DIPO_DEFAULTS: dict[str, dict[str, Any]] = {
    "Hopper": {"ac_grad_norm": 1.0, "action_grad_norm_ratio": 0.3},
    "Walker2d": {"ac_grad_norm": 2.0, "action_grad_norm_ratio": 0.08},
    "Ant": {"ac_grad_norm": 0.8, "action_grad_norm_ratio": 0.1},
    "HalfCheetah": {
        "ac_grad_norm": 2.0,
        "action_grad_norm_ratio": 0.08,
        "action_gradient_steps": 40,
        "update_actor_target_every": 2,
    },
    "Humanoid": {"ac_grad_norm": 2.0, "action_grad_norm_ratio": 0.1},
    # Not in the paper's table: small tasks, for which 10,000 random steps are out of proportion.
    "Pendulum": {"start_steps": 1_000},
    "MultiGoal": {"start_steps": 1_000},
}


@dataclass(frozen=True)
class DIPOConfig:
    """Hyper-parameters, by default those of the paper's Table 2.

    Where the paper's values go by environment (Table 3, see for_env), the defaults are the
    released code's.

    Raises:
        TypeError: if a number is expected and something else came.
        ValueError: if a value lies outside its range, NaN included.
    """

    mode: Mode = "fixed"
    """Which DIPO: the released code as meant (fixed), as it runs (official), or Algorithm 3."""
    policy: PolicyName = "diffusion"
    """What represents the policy: the paper's diffusion model, or one of its two ablations."""
    diffusion_steps: int = 100
    """K, the number of noise levels."""
    schedule: ScheduleName = "cosine"
    """Noise schedule. linear is DDPM's in K steps or, in mode official, its betas for 1000 in K."""
    solver: SolverName = "ddpm"
    """Solver of the reverse chain."""
    noise_ratio: float = 1.0
    """Factor on the chain's noise when exploring and in the critic's target."""
    hidden_dim: int = 256
    """Width of every hidden layer."""
    batch_size: int = 256
    """Transitions per update, for the critic and again for the actor."""
    gamma: float = 0.99
    """Discount factor."""
    tau: float = 0.005
    """How far a target network moves towards its network in one update."""
    lr: float = 3e-4
    """Learning rate of actor and critic."""
    adam_eps: float = 1e-5
    """Adam's epsilon: for the actor, the critic and the action gradient."""
    ac_grad_norm: float = 2.0
    """Gradients of actor and of critic are cut to this norm; 0 leaves them uncut."""
    action_lr: float = 0.03
    """Step size of the action gradient."""
    action_gradient_steps: int = 20
    """Action-gradient steps per update."""
    action_grad_norm_ratio: float = 0.1
    """The whole batch's action gradient is cut to the norm ratio * action_dim; 0: uncut."""
    update_actor_target_every: int = 1
    """Move the target actor in every n-th update."""
    compute_dtype: ComputeDtype = "float32"
    """What all networks multiply in, forward and backward. Weights, Adam, losses stay float32."""
    start_steps: int = 10_000
    """Environment steps with random actions before the first update."""
    buffer_size: int = 1_000_000
    """Capacity of the replay, in transitions."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("policy", self.policy, PolicyName)
        check_choice("schedule", self.schedule, ScheduleName)
        check_choice("solver", self.solver, SolverName)
        check_choice("compute_dtype", self.compute_dtype, ComputeDtype)
        for name in (
            "diffusion_steps",
            "hidden_dim",
            "batch_size",
            "action_gradient_steps",
            "update_actor_target_every",
            "buffer_size",
        ):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("start_steps", self.start_steps, at_least=0)
        for name in ("lr", "adam_eps", "action_lr"):
            check_real(name, getattr(self, name), above=0.0)
        for name in ("noise_ratio", "ac_grad_norm", "action_grad_norm_ratio"):
            check_real(name, getattr(self, name), at_least=0.0)
        check_real("gamma", self.gamma, at_least=0.0, at_most=1.0)
        check_real("tau", self.tau, above=0.0, at_most=1.0)

    @classmethod
    def for_env(cls, env_id: str) -> DIPOConfig:
        """The paper's hyper-parameters for ``env_id``, else the generic ones.

        A module prefix, a namespace and the version don't matter, and a variant of a task has the
        task's (see :func:`~diffcore.agents.environment_names.environment_base_name`).

        >>> DIPOConfig.for_env("HalfCheetah-v5").action_gradient_steps
        40
        """
        return cls(**DIPO_DEFAULTS.get(environment_base_name(env_id), {}))


class DIPO(BaseAgent):
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

    name: ClassVar[str] = "dipo"
    shaped_by: ClassVar[tuple[str, ...]] = ("policy", "hidden_dim", "diffusion_steps", "schedule")
    config_type: ClassVar[type[DIPOConfig]] = DIPOConfig
    config: DIPOConfig

    @learning()
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: DIPOConfig,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        # Independent streams for the initial weights, the deterministic start and all the rest.
        super().__init__(observation_dim, action_dim, config, seed=seed, device=device, streams=3)
        self.switches = MODES[config.mode]
        compute_dtype = torch_dtype(config.compute_dtype)
        with seeded_weights(self.seeds[0]):
            self.actor = self._make_policy(deterministic_seed=self.seeds[1]).to(self.device)
            critic = TwinCritic(
                observation_dim,
                action_dim,
                hidden_dim=config.hidden_dim,
                compute_dtype=compute_dtype,
            )
            self.critic = critic.to(self.device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

        adam = {"lr": config.lr, "eps": config.adam_eps}
        self.actor_optimizer = make_adam(self.actor.parameters(), **adam)
        self.critic_optimizer = make_adam(self.critic.parameters(), **adam)

    def parts(self) -> dict[str, Saved]:
        """Everything with a state to save."""
        return {
            "actor": self.actor,
            "actor_target": self.actor_target,
            "actor_optimizer": self.actor_optimizer,
            "critic": self.critic,
            "critic_target": self.critic_target,
            "critic_optimizer": self.critic_optimizer,
        }

    @property
    def _rescales_linear(self) -> bool:
        diffusion = self.config.policy == "diffusion" and self.config.schedule == "linear"
        return diffusion and self.switches.rescale_linear_schedule

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`BaseAgent.state_dict`."""
        state = super().state_dict()
        if self._rescales_linear:
            state["betas"] = self._make_schedule().betas
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`BaseAgent.load_state_dict`."""
        if self._rescales_linear and "config" in state and "betas" not in state:
            self.check_saved_config(state["config"])
            raise ValueError(
                "state lacks the entry 'betas': it was saved when schedule 'linear' had those of "
                "1000 steps in every mode, as mode 'official' still has"
            )
        super().load_state_dict(state)

    def check_saved_config(self, saved: dict[str, Any]) -> None:
        """Raises ValueError unless weights saved under this configuration mean the same here."""
        super().check_saved_config(saved)
        if self.config.policy == "diffusion" and self.config.schedule == "linear":
            rescaled = MODES[saved["mode"]].rescale_linear_schedule
            if rescaled != self.switches.rescale_linear_schedule:
                raise ValueError(
                    f"state has mode={saved['mode']!r}, whose schedule 'linear' is another than that "
                    f"of this agent's mode {self.config.mode!r}"
                )

    @property
    def policy(self) -> Policy:
        """The network that acting needs."""
        return self.actor

    @property
    def bootstrap_truncated(self) -> bool:
        """Whether the replay's ``mask`` should be 1 where the time limit cut an episode."""
        return self.switches.bootstrap_truncated

    def act(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Choose one action for each observation.

        With ``explore=False`` the diffusion policy's chain adds no noise but still starts from a
        random ``x_K``, as in the released code. ``deterministic=True`` starts it from one ``x_K``
        drawn at construction: an observation then always gets the same action, whatever else is
        in its batch.

        Args:
            observation: ``[B, observation_dim]`` float32 on the agent's device.
            explore: draw from the full policy; else from its evaluation form.
            deterministic: see above; excludes ``explore``.
            generator: source of randomness on the agent's device. None is the agent's own, which
                the call advances: evaluation that mustn't disturb training passes its own.

        Returns:
            ``[B, action_dim]`` in ``[-1, 1]``.

        Raises:
            TypeError: if ``observation`` isn't a float32 tensor.
            ValueError: if its shape or device is wrong, or both ``explore`` and ``deterministic``.
        """
        self.check_observation(observation)
        return self.actor.sample(
            observation,
            explore=explore,
            deterministic=deterministic,
            generator=self.generator if generator is None else generator,
        )

    @learning()
    def update(self, replay: Replay) -> dict[str, float | Tensor]:
        """One whole update on batches drawn from ``replay``, also under torch.no_grad().

        Returns:
            Metrics, as 0-d tensors on the agent's device: nothing here waits for the device.
        """
        batch = self.sample(replay)
        next_action = self.actor_target.sample(
            batch.next_state, explore=True, generator=self.generator
        )
        metrics = self.update_critic(batch, next_action)

        batch = self.sample(replay)
        if self.updates % ACTION_NORM_EVERY == 0:
            metrics["action_grad_norm"] = self.action_gradient_norm(batch)
        improved = self.improve_actions(batch)
        metrics["action_change"] = (improved - self._actions_to_improve(batch)).abs().mean()
        self._store(replay, batch.index, improved)

        if self.switches.resample_actor_batch:
            batch = self.sample(replay)
            improved = self._actions_to_improve(batch)
        actor_loss = self.actor.loss(batch.state, improved, generator=self.generator)
        metrics |= self.update_actor(actor_loss)

        self.update_targets()
        return metrics

    def update_critic(self, batch: Batch, next_action: Tensor) -> dict[str, float | Tensor]:
        """One temporal-difference step of both critics.

        Args:
            batch: transitions.
            next_action: ``[B, action_dim]``, the target policy's action at ``batch.next_state``.

        Raises:
            ValueError: if a shape in ``batch`` or that of ``next_action`` is wrong.
        """
        self.check_batch(batch, next_action=next_action)
        with torch.no_grad():
            next_q = torch.minimum(*self.critic_target(batch.next_state, next_action))
            target = batch.reward + self.config.gamma * batch.mask * next_q
        loss, q = self.critic.loss(batch.state, batch.action, target)
        grad_norm = measured_step(loss, self.critic_optimizer, self.config.ac_grad_norm)
        return {
            "critic_loss": loss.detach(),
            "critic_grad_norm": grad_norm,
            "q_mean": q[0].mean(),
            "q_target_mean": target.mean(),
        }

    def improve_actions(self, batch: Batch) -> Tensor:
        """Move the batch's actions uphill in min(Q1, Q2). ``[B, action_dim]``, in ``[-1, 1]``.

        Starts from the best actions known or, in mode ``paper``, from the actions taken. Nothing
        is written back here.
        """
        config = self.config
        cut = self.switches.action_optimizer == "adam" and config.action_grad_norm_ratio > 0
        return ops.action_gradient(
            self.critic,
            batch.state,
            self._actions_to_improve(batch),
            steps=config.action_gradient_steps,
            lr=config.action_lr,
            max_norm=config.action_grad_norm_ratio * self.action_dim if cut else None,
            optimizer=self.switches.action_optimizer,
            eps=config.adam_eps,
            compute_dtype=torch_dtype(config.compute_dtype),
        )

    def action_gradient_norm(self, batch: Batch) -> Tensor:
        """Norm of what :meth:`improve_actions` climbs first, over the whole batch and uncut, 0-d.

        To be compared with ``action_grad_norm_ratio * action_dim``, to which it is cut.
        """
        action = self._actions_to_improve(batch).detach().clone().requires_grad_()
        with frozen(self.critic.parameters()):
            q = torch.minimum(*self.critic(batch.state, action)).sum()
        return torch.autograd.grad(q, action)[0].norm()

    def update_actor(self, loss: Tensor) -> dict[str, float | Tensor]:
        """One optimiser step of the actor.

        Args:
            loss: ``self.actor.loss(state, improved_action, ...)``.
        """
        grad_norm = measured_step(loss, self.actor_optimizer, self.config.ac_grad_norm)
        return {"actor_loss": loss.detach(), "actor_grad_norm": grad_norm}

    def update_targets(self) -> None:
        """Move the targets towards their networks and count the update."""
        ema_update_(self.critic_target, self.critic, self.config.tau)
        if self.updates % self.config.update_actor_target_every == 0:
            ema_update_(self.actor_target, self.actor, self.config.tau)
        self.updates += 1

    def _make_policy(self, deterministic_seed: int) -> Policy:
        config = self.config
        sizes = (self.observation_dim, self.action_dim)
        network: dict[str, Any] = {
            "hidden_dim": config.hidden_dim,
            "compute_dtype": torch_dtype(config.compute_dtype),
        }
        if config.policy == "mlp":
            return MLPPolicy(*sizes, **network)
        if config.policy == "vae":
            # As in the released code the latent is as wide as a hidden layer.
            return VAEPolicy(*sizes, **network, latent_dim=config.hidden_dim)
        return DiffusionPolicy(
            *sizes,
            **network,
            schedule=self._make_schedule(),
            solver=config.solver,
            noise_ratio=config.noise_ratio,
            deterministic_seed=deterministic_seed,
        )

    def _make_schedule(self) -> DiffusionSchedule:
        config = self.config
        if config.schedule == "linear" and self.switches.rescale_linear_schedule:
            return DiffusionSchedule.vp(config.diffusion_steps, 0.1, 20.0)
        schedule: DiffusionSchedule = getattr(DiffusionSchedule, config.schedule)(
            config.diffusion_steps
        )
        return schedule

    def _actions_to_improve(self, batch: Batch) -> Tensor:
        return batch.action if self.switches.overwrite_replay else batch.best_action

    def _store(self, replay: Replay, index: Tensor, improved: Tensor) -> None:
        if not self.switches.store_improved_actions:
            return
        if self.switches.overwrite_replay:
            replay.set_action(index, improved)
        else:
            replay.set_best_action(index, improved)
