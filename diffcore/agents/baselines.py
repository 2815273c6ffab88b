"""SAC, TD3 and PPO of stable-baselines3, behind the interface that evaluation and pictures expect.

They are there to be compared with, so nothing of theirs is written again: networks, losses, replay
and the loop that collects and learns are stable-baselines3's (SB3). Hyper-parameters carry its names
and its defaults, but where one says why not. The package is an optional one, imported when an agent
is made.

What they do at a time limit is right without a switch: SB3 bootstraps the value there.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffcore.agents.base import seeded_weights
from diffcore.agents.checks import check_integer, check_real

C = TypeVar("C", bound="BaselineConfig")


def stable_baselines3() -> ModuleType:
    """The package.

    Raises:
        ImportError: if it can't be imported; says how to install it.
    """
    try:
        import stable_baselines3
    except ImportError as error:
        raise ImportError(
            "the agents sb3-sac, sb3-td3 and sb3-ppo need the package stable-baselines3, which "
            f'can\'t be imported ({error}). To install it: pip install "stable-baselines3>=2.4", '
            'or in a copy of diffcore: pip install -c constraints.txt ".[baselines]"'
        ) from error
    return stable_baselines3


@dataclass(frozen=True)
class BaselineConfig:
    """What the three have in common. Names and defaults are SB3's.

    Raises:
        TypeError: if a number is expected and something else came.
        ValueError: if a value lies outside its range, NaN included.
    """

    learning_rate: float = 3e-4
    """Learning rate of all networks."""
    gamma: float = 0.99
    """Discount factor."""

    def __post_init__(self) -> None:
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("gamma", self.gamma, at_least=0.0, at_most=1.0)

    @classmethod
    def for_env(cls: type[C], env_id: str) -> C:
        """The defaults; they are the same for every environment."""
        return cls()


@dataclass(frozen=True)
class OffPolicyBaselineConfig(BaselineConfig):
    """What SAC and TD3 have in common."""

    buffer_size: int = 1_000_000
    """Capacity of the replay, in transitions."""
    learning_starts: int = 100
    """Environment steps with random actions before the first update."""
    batch_size: int = 256
    """Transitions per update."""
    tau: float = 0.005
    """How far a target network moves towards its network in one update."""
    train_freq: int = 1
    """Steps of every environment between two rounds of updates."""
    gradient_steps: int = -1
    """Updates per round; -1: as many as there were environment steps since the last one. SB3's own
    default, 1, means the same for one environment, but fewer updates than steps for several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("buffer_size", "batch_size", "train_freq"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("learning_starts", self.learning_starts, at_least=0)
        check_integer("gradient_steps", self.gradient_steps, at_least=-1)
        check_real("tau", self.tau, above=0.0, at_most=1.0)


@dataclass(frozen=True)
class SACConfig(OffPolicyBaselineConfig):
    """Hyper-parameters of SB3's SAC, by default its own but for ``gradient_steps``."""

    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critic."""
    ent_coef: str = "auto"
    """Entropy coefficient: auto learns it, auto_0.1 starts at 0.1, a number fixes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_widths(self.hidden_dims)
        try:
            value = 1.0 if self.ent_coef == "auto" else float(self.ent_coef.removeprefix("auto_"))
            check_real("ent_coef", value, at_least=0.0)
            if self.ent_coef.startswith("auto"):
                check_real("ent_coef", value, above=0.0)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "ent_coef must be 'auto', 'auto_' and a start above 0, or a number at least 0, "
                f"each as a string, got {self.ent_coef!r}"
            ) from error


@dataclass(frozen=True)
class TD3Config(OffPolicyBaselineConfig):
    """Hyper-parameters of SB3's TD3, by default its own but for ``gradient_steps`` and the noise
    that explores."""

    learning_rate: float = 1e-3
    """Learning rate of all networks."""
    hidden_dims: tuple[int, ...] = (400, 300)
    """Widths of the hidden layers of actor and critic."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions in training. The paper's; SB3's own default, none,
    leaves a deterministic policy to explore with."""
    policy_delay: int = 2
    """The actor and the targets are updated in every n-th update."""
    target_policy_noise: float = 0.2
    """Standard deviation of the noise on the target's actions."""
    target_noise_clip: float = 0.5
    """Limit of that noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_widths(self.hidden_dims)
        check_integer("policy_delay", self.policy_delay, at_least=1)
        for name in ("exploration_noise", "target_policy_noise", "target_noise_clip"):
            check_real(name, getattr(self, name), at_least=0.0)


@dataclass(frozen=True)
class PPOConfig(BaselineConfig):
    """Hyper-parameters of SB3's PPO, by default its own."""

    hidden_dims: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and value function."""
    n_steps: int = 2048
    """Steps of every environment per rollout. Logs, evaluations, checkpoints and the run's end wait
    for the end of a rollout."""
    batch_size: int = 64
    """Transitions per update."""
    n_epochs: int = 10
    """Passes over a rollout."""
    gae_lambda: float = 0.95
    """Lambda of the generalized advantage estimate."""
    clip_range: float = 0.2
    """Limit of the change of the probability ratio."""
    ent_coef: float = 0.0
    """Weight of the entropy in the loss."""
    vf_coef: float = 0.5
    """Weight of the value function in the loss."""
    max_grad_norm: float = 0.5
    """Gradients are cut to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_widths(self.hidden_dims)
        for name in ("n_steps", "batch_size"):  # advantages are divided by their deviation
            check_integer(name, getattr(self, name), at_least=2)
        check_integer("n_epochs", self.n_epochs, at_least=1)
        check_real("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0)
        for name in ("clip_range", "max_grad_norm"):
            check_real(name, getattr(self, name), above=0.0)
        for name in ("ent_coef", "vf_coef"):
            check_real(name, getattr(self, name), at_least=0.0)


class SB3Agent:
    """A model of SB3, to act with and, once it has environments, to train.

    Args:
        observation_dim: size of an observation vector.
        action_dim: size of an action vector; actions live in ``[-1, 1]``.
        config: hyper-parameters.
        seed: of the initial weights and of the random actions at the start. All else that training
            draws comes from the process-wide generators of numpy and torch, as SB3 has it.
        device: where the networks live and observations are expected.
        num_envs: how many environments it is to be trained in; 0: none, it only acts, and takes no
            memory for a replay.

    Raises:
        ImportError: if stable-baselines3 isn't installed.
    """

    config_type: ClassVar[Any]

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: Any,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        num_envs: int = 0,
    ) -> None:
        sb3 = stable_baselines3()
        self.config = config
        self.device = torch.device(device)
        spaces = [_only_spaces(observation_dim, action_dim) for _ in range(max(num_envs, 1))]
        with seeded_weights(seed):
            self.model: Any = self._make_model(
                sb3,
                env=sb3.common.vec_env.DummyVecEnv([lambda env=env: env for env in spaces]),
                trains=num_envs > 0,
                policy="MlpPolicy",
                policy_kwargs={"net_arch": list(config.hidden_dims)},
                learning_rate=config.learning_rate,
                gamma=config.gamma,
                device=self.device,
            )
        self.model.action_space.seed(seed)
        self.model.set_logger(sb3.common.logger.Logger(folder=None, output_formats=[]))

    def _make_model(self, sb3: ModuleType, *, trains: bool, **common: Any) -> Any:
        """The model, with ``common`` arguments; its replay may be tiny unless it ``trains``."""
        raise NotImplementedError

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
            explore: act as in training; else by the mean, which is how SB3 evaluates.
            deterministic: as ``explore=False``, which is deterministic already.
            generator: seeds what is drawn. None draws from torch's process-wide generator.

        Returns:
            ``[B, action_dim]`` in ``[-1, 1]``.
        """
        if explore and deterministic:
            raise ValueError("explore and deterministic exclude each other")
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=generator is not None):
            if explore and generator is not None:
                seed = torch.randint(2**62, (), generator=generator, device=generator.device)
                torch.manual_seed(int(seed))
            return self._act(observation, explore)

    def _act(self, observation: Tensor, explore: bool) -> Tensor:
        actions, _ = self.model.predict(observation.cpu().numpy(), deterministic=not explore)
        return torch.from_numpy(actions).to(self.device)

    def iterate(
        self, observation: NDArray[np.float32], episode_starts: NDArray[np.bool_]
    ) -> dict[str, float]:
        """One turn of SB3's loop: collect some steps in the model's environments, then learn.

        Between turns nothing is half done, so this is where a run can be saved.

        Args:
            observation: ``[N, observation_dim]``, what the environments show now.
            episode_starts: ``[N]``, whether that is the first observation of an episode.

        Returns:
            SB3's own metrics of the updates, if there were any; not those that are settings.
        """
        self.model._last_obs = observation
        self.model._last_episode_starts = episode_starts
        # SB3 goes on until it has done at least one step more, and it counts in whole turns. None
        # of its schedules is used, so it doesn't matter that it takes each turn for the last one.
        self.model.learn(1, log_interval=None, reset_num_timesteps=False)
        values = self.model.logger.name_to_value
        metrics = {
            name.removeprefix("train/"): float(value)
            for name, value in values.items()
            if name.startswith("train/")
        }
        for setting in ("n_updates", "learning_rate", "clip_range"):
            metrics.pop(setting, None)
        values.clear()
        return metrics

    @property
    def updates(self) -> int:
        """SB3's count of updates: gradient steps, for PPO passes over a rollout."""
        return int(self.model._n_updates)

    def state_dict(self) -> dict[str, Any]:
        """All that SB3 keeps from turn to turn, but for the replay and process-wide generators."""
        return {
            "parameters": self.model.get_parameters(),
            "num_timesteps": self.model.num_timesteps,
            "updates": self.updates,
            "action_space": self.model.action_space.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.model.set_parameters(state["parameters"], exact_match=True)
        self.model.num_timesteps = state["num_timesteps"]
        self.model._n_updates = state["updates"]
        self.model.action_space.np_random.bit_generator.state = state["action_space"]

    def weights(self) -> dict[str, Tensor]:
        """The tensors that acting needs, on the CPU, by SB3's names."""
        return _on_cpu("actor.", self.model.actor)


class SB3SAC(SB3Agent):
    """SAC (arXiv 1812.05905) of SB3."""

    config_type: ClassVar[type[SACConfig]] = SACConfig

    def _make_model(self, sb3: ModuleType, *, trains: bool, **common: Any) -> Any:
        config: SACConfig = self.config
        return sb3.SAC(**common, **_off_policy(config, trains), ent_coef=config.ent_coef)

    def critic(self, state: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """(Q1, Q2), ``[B, 1]`` each, for actions in ``[-1, 1]``."""
        values: tuple[Tensor, ...] = self.model.critic(state, action)
        return values

    def state_dict(self) -> dict[str, Any]:
        """As :class:`SB3Agent` has it, with the learned entropy coefficient."""
        return {**super().state_dict(), "log_ent_coef": self.model.log_ent_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        if self.model.log_ent_coef is not None:
            self.model.log_ent_coef.data.copy_(state["log_ent_coef"])


class SB3TD3(SB3Agent):
    """TD3 (arXiv 1802.09477) of SB3."""

    config_type: ClassVar[type[TD3Config]] = TD3Config

    def _make_model(self, sb3: ModuleType, *, trains: bool, **common: Any) -> Any:
        config: TD3Config = self.config
        deviation = np.full(common["env"].action_space.shape, config.exploration_noise)
        return sb3.TD3(
            **common,
            **_off_policy(config, trains),
            action_noise=sb3.common.noise.NormalActionNoise(0.0 * deviation, deviation),
            policy_delay=config.policy_delay,
            target_policy_noise=config.target_policy_noise,
            target_noise_clip=config.target_noise_clip,
        )

    def _act(self, observation: Tensor, explore: bool) -> Tensor:
        action = super()._act(observation, explore)
        if explore:
            action = action + self.config.exploration_noise * torch.randn_like(action)
        return action.clamp(-1.0, 1.0)

    def critic(self, state: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        """(Q1, Q2), ``[B, 1]`` each, for actions in ``[-1, 1]``."""
        values: tuple[Tensor, ...] = self.model.critic(state, action)
        return values


class SB3PPO(SB3Agent):
    """PPO (arXiv 1707.06347) of SB3."""

    config_type: ClassVar[type[PPOConfig]] = PPOConfig

    def _make_model(self, sb3: ModuleType, *, trains: bool, **common: Any) -> Any:
        config: PPOConfig = self.config
        return sb3.PPO(
            **common,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            n_epochs=config.n_epochs,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.ent_coef,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
        )

    def weights(self) -> dict[str, Tensor]:
        """The tensors that acting needs, on the CPU, by SB3's names."""
        weights = _on_cpu("", self.model.policy)
        return {name: value for name, value in weights.items() if "value" not in name}


def _off_policy(config: OffPolicyBaselineConfig, trains: bool) -> dict[str, Any]:
    return {
        "buffer_size": config.buffer_size if trains else 1,
        "learning_starts": config.learning_starts,
        "batch_size": config.batch_size,
        "tau": config.tau,
        "train_freq": config.train_freq,
        "gradient_steps": config.gradient_steps,
    }


def _only_spaces(observation_dim: int, action_dim: int) -> gym.Env[Any, Any]:
    """What SB3 wants to see of an environment when a model is made."""
    env: gym.Env[Any, Any] = gym.Env()
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,))
    env.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,))
    return env


def _on_cpu(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + k: v.detach().cpu().clone() for k, v in module.state_dict().items()}


def _check_widths(hidden_dims: object) -> None:
    if not isinstance(hidden_dims, tuple) or not hidden_dims:
        raise TypeError(f"hidden_dims must be a tuple of at least one width, got {hidden_dims!r}")
    for width in hidden_dims:
        check_integer("hidden_dims", width, at_least=1)
