"""Training runs of the baselines: SB3's own loop, between our environments and our logs.

SB3 is asked for one turn of its loop at a time: collect ``train_freq`` steps (PPO: a rollout of
``n_steps``), then learn from them. It steps the same environments as our own agents do, rescaled and
seeded alike, and what lies between the turns (logs, evaluations, checkpoints, signals) is the code
that those run on. At the end of a turn SB3 keeps nothing that isn't in the checkpoint, so these runs
too resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from diffcore.agents.baselines import BaselineConfig, OffPolicyBaselineConfig, SB3Agent
from diffcore.training.config import TrainConfig
from diffcore.training.environments import EnvironmentBatch, FloatArray, Steps
from diffcore.training.errors import ConfigError, TrainingError
from diffcore.training.loop import BaseTrainer, check_buffer_size
from diffcore.training.registry import agent_type
from diffcore.training.seeding import Stream, derive_seed


class BaselineTrainer(BaseTrainer):
    """A run of one of the baselines.

    Raises:
        TrainingError: if the environment, the device or a setting doesn't do.
    """

    agent: SB3Agent

    def __init__(self, config: TrainConfig, agent_config: BaselineConfig) -> None:
        if config.updates_per_step != 1.0:
            raise ConfigError(
                "updates_per_step doesn't apply to stable-baselines3, which has settings of its "
                f"own for that (see --help), got {config.updates_per_step}"
            )
        if isinstance(agent_config, OffPolicyBaselineConfig):
            check_buffer_size(agent_config.buffer_size, config.num_envs)
        super().__init__(config, agent_config)
        make_agent: Any = agent_type(self.agent_name)
        self.agent = make_agent(
            self.environments.observation_dim,
            self.environments.action_dim,
            agent_config,
            seed=derive_seed(config.seed, Stream.AGENT),
            device=self.device,
            num_envs=config.num_envs,
        )
        self.agent.model.set_env(SB3Environments(self.environments, self._record))
        replay_buffer = getattr(self.agent.model, "replay_buffer", None)
        self.replay = NoReplay() if replay_buffer is None else SB3Replay(replay_buffer)
        self._ended: list[float] = []

    def start(self) -> None:
        """Begin from scratch: start the first episodes."""
        super().start()
        if isinstance(self.agent_config, OffPolicyBaselineConfig):
            self.warn_of_random_start("learning_starts", self.agent_config.learning_starts)

    def advance(self) -> list[float]:
        """One turn of SB3's loop.

        Returns:
            The returns of the episodes that ended.
        """
        self._ended = []
        try:
            metrics = self.agent.iterate(self.environments.observation, self.episodes.at_start())
        except TrainingError:
            raise
        except ValueError as error:  # as torch's distributions raise it for a diverged network
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"stable-baselines3 failed after step {self.step:,}: {reason}"
            ) from error
        self.step = self.agent.model.num_timesteps
        self.updates = self.agent.updates
        self.metrics.add(dict(metrics))
        return self._ended

    def _record(self, steps: Steps) -> None:
        self._ended += self.episodes.add(steps.reward, steps.terminated | steps.truncated)


class SB3Environments(VecEnv):  # type: ignore[misc, unused-ignore]
    """An :class:`EnvironmentBatch` as SB3 wants to see environments.

    Args:
        environments: the batch, with its first episodes started.
        record: is told of every step.
    """

    def __init__(self, environments: EnvironmentBatch, record: Callable[[Steps], None]) -> None:
        self.environments = environments
        self.record = record
        self.actions: FloatArray = np.empty(0, dtype=np.float32)
        first = environments.environments[0]
        super().__init__(len(environments), first.observation_space, first.action_space)

    def reset(self) -> FloatArray:
        """The present observations. When an episode starts is the batch's business."""
        return self.environments.observation

    def step_async(self, actions: FloatArray) -> None:
        """Take actions ``[N, A]``.

        Raises:
            TrainingError: if they aren't finite.
        """
        if not np.isfinite(actions).all():
            raise TrainingError("training has diverged: the agent's actions are not finite")
        self.actions = actions

    def step_wait(
        self,
    ) -> tuple[FloatArray, FloatArray, np.ndarray[Any, Any], list[dict[str, Any]]]:
        """Do the step. Where an episode ended the observation is the next one's first already."""
        steps = self.environments.step(self.actions)
        self.record(steps)
        done = steps.terminated | steps.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            infos[i] = {
                "terminal_observation": steps.next_observation[i],
                "TimeLimit.truncated": bool(steps.truncated[i] and not steps.terminated[i]),
            }
        return self.environments.observation, steps.reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing: the batch is closed by whoever made it."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of some environments."""
        return [getattr(environment, attr_name) for environment in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of some environments."""
        for environment in self._chosen(indices):
            setattr(environment, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of some environments."""
        chosen = self._chosen(indices)
        return [getattr(env, method_name)(*method_args, **method_kwargs) for env in chosen]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """No wrapper of SB3's is in use."""
        return [False for _ in self._chosen(indices)]

    def _chosen(self, indices: Any) -> Sequence[gym.Env[Any, Any]]:
        return [self.environments.environments[i] for i in self._get_indices(indices)]


class SB3Replay:
    """What a checkpoint keeps of SB3's replay buffer: the rows in use.

    Args:
        buffer: a ``stable_baselines3.common.buffers.ReplayBuffer``.
    """

    COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def state_dict(self) -> dict[str, Any]:
        """Live views of the rows in use, and where the next one goes."""
        rows = self.buffer.size()
        columns = {name: torch.from_numpy(getattr(self.buffer, name)[:rows]) for name in self.COLUMNS}
        return {**columns, "position": self.buffer.pos, "full": self.buffer.full}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        for name in self.COLUMNS:
            getattr(self.buffer, name)[: len(state[name])] = state[name].numpy()
        self.buffer.pos = state["position"]
        self.buffer.full = state["full"]


class NoReplay:
    """PPO's: it has used a rollout up when its turn ends."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""
