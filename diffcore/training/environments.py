"""Gymnasium environments as the agents see them: flat float32 observations, actions in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import diffcore.envs  # noqa: F401  (registers diffcore/...)
from diffcore.training.errors import EnvError

FloatArray = NDArray[np.float32]


class BoxEnvironment(gym.Wrapper[FloatArray, FloatArray, Any, Any]):
    """One environment with a flat observation and actions rescaled from ``[-1, 1]``.

    Any Box observation is flattened to float32. An action in ``[-1, 1]^A`` is mapped linearly onto
    the environment's bounds and reshaped.

    Args:
        env: the environment to wrap.
        name: how messages call it.

    Raises:
        EnvError: if the observation space isn't a Box, or the action space isn't a Box
            of floats with finite bounds.
    """

    def __init__(self, env: gym.Env[Any, Any], name: str) -> None:
        super().__init__(env)
        self.name = name
        self.closed = False
        box = env.action_space
        if not isinstance(env.observation_space, gym.spaces.Box):
            raise EnvError(
                f"{name} has the observation space {env.observation_space}; "
                "only Box observations can be trained on "
                "(gymnasium.wrappers.FlattenObservation turns a Dict into a Box)"
            )
        if not isinstance(box, gym.spaces.Box) or not np.issubdtype(box.dtype, np.floating):
            raise EnvError(
                f"{name} has the action space {box}; "
                "only continuous actions, a Box of floats, can be trained on"
            )
        if not (np.isfinite(box.low).all() and np.isfinite(box.high).all()):
            raise EnvError(
                f"{name} has the unbounded action space {box}; every bound must be finite "
                "(gymnasium.wrappers.TransformAction with an action_space can give it bounds)"
            )
        self._action_box = box
        self._low = box.low.astype(np.float64)
        self._half_range = (box.high.astype(np.float64) - self._low) / 2
        self.observation_dim = int(np.prod(env.observation_space.shape))
        self.action_dim = int(np.prod(box.shape))
        if self.observation_dim == 0 or self.action_dim == 0:
            raise EnvError(
                f"{name} has an empty space: observations {env.observation_space}, actions {box}"
            )
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.observation_dim,))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start an episode.

        Raises:
            EnvError: if the environment is closed or misbehaves.
        """
        self._check_open()
        with self._errors_named():
            observation, info = self.env.reset(seed=seed, options=options)
        return self._flat(observation), info

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """One step with ``action`` (``[A]`` in ``[-1, 1]``).

        Raises:
            EnvError: if the environment is closed or misbehaves.
        """
        self._check_open()
        with self._errors_named():
            observation, reward, terminated, truncated, info = self.env.step(self.rescale(action))
        return self._flat(observation), self._number(reward), bool(terminated), bool(truncated), info

    def rescale(self, action: FloatArray) -> NDArray[Any]:
        """Map ``[-1, 1]^A`` onto the environment's own action space."""
        box = self._action_box
        unit = np.asarray(action, dtype=np.float64).reshape(box.shape)
        scaled = (self._low + (unit + 1.0) * self._half_range).astype(box.dtype)
        return np.clip(scaled, box.low, box.high)

    def close(self) -> None:
        """Release the environment. Further steps raise."""
        if not self.closed:
            self.closed = True
            super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise EnvError(f"{self.name} is closed and can't be stepped or reset")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Gymnasium's own errors, such as that of a closed environment, with the name to them."""
        try:
            yield
        except (gym.error.Error, gym.error.ClosedEnvironmentError) as error:
            raise EnvError(f"{self.name}: {error}") from error

    def _number(self, reward: Any) -> float:
        """A reward, which environments that compute with arrays return as an array of one number."""
        try:
            array = np.asarray(reward, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's
            raise EnvError(
                f"{self.name} returned the reward {reward!r}; expected a number: {error}"
            ) from error
        if array.size != 1:
            raise EnvError(
                f"{self.name} returned a reward of shape {array.shape}; expected one number"
            )
        if not np.isfinite(array).all():
            raise EnvError(f"{self.name} returned the reward {reward!r}; expected a finite number")
        return float(array.item())

    def _flat(self, observation: Any) -> FloatArray:
        flat = np.array(observation, dtype=np.float32).reshape(-1)
        if flat.shape != (self.observation_dim,):
            raise EnvError(
                f"{self.name} returned an observation of shape {np.shape(observation)}, "
                f"its space says {self.env.observation_space.shape}"
            )
        if not np.isfinite(flat).all():
            raise EnvError(f"{self.name} returned a non-finite observation: {flat}")
        return flat


def make_environment(
    env_id: str,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
) -> BoxEnvironment:
    """Make ``env_id``, which may be ``"module:Id"``.

    Args:
        env_id: the Gymnasium id.
        env_kwargs: arguments for the environment's class.
        max_episode_steps: the time limit; None keeps the environment's own.
        render_mode: Gymnasium's.

    Raises:
        EnvError: if Gymnasium can't make it, or it can't be trained on.
    """
    expected: tuple[type[Exception], ...]
    expected = (gym.error.Error, ImportError, AttributeError, TypeError)
    kwargs: dict[str, Any] = {**(env_kwargs or {})}
    if render_mode is not None:  # which not every environment knows of
        kwargs["render_mode"] = render_mode
        expected = (Exception,)  # missing displays and drivers make for all kinds of exceptions
    try:
        env = gym.make(env_id, max_episode_steps=max_episode_steps, **kwargs)
    except expected as error:
        how = f" with render_mode={render_mode!r}" if render_mode else ""
        raise EnvError(f"can't make the environment {env_id!r}{how}: {error}") from error
    try:
        return BoxEnvironment(env, env_id)
    except EnvError:
        env.close()
        raise


class Steps(NamedTuple):
    """What ``N`` environments did in one step."""

    next_observation: FloatArray
    """``[N, O]``: where an episode ended, its last observation and not the next one's first."""
    reward: NDArray[np.float64]
    """``[N]``"""
    terminated: NDArray[np.bool_]
    """``[N]``"""
    truncated: NDArray[np.bool_]
    """``[N]``"""


class EnvironmentBatch:
    """``N`` environments stepped one after the other in this process.

    An environment whose episode ends is reset at once: :attr:`observation` then is the first of
    its next episode, while :class:`Steps` still has the last of the old one. So every step is a
    real transition and none straddles a reset.

    Args:
        environments: at least one, of equal spaces.
    """

    def __init__(self, environments: list[BoxEnvironment]) -> None:
        self.environments = environments
        self.observation_dim = environments[0].observation_dim
        self.action_dim = environments[0].action_dim
        self.observation: FloatArray = np.zeros(
            (len(environments), self.observation_dim), dtype=np.float32
        )
        """``[N, O]``: what the next actions answer to."""

    def __len__(self) -> int:
        return len(self.environments)

    @property
    def has_time_limit(self) -> bool:
        """Whether Gymnasium limits the length of an episode."""
        spec = self.environments[0].spec
        return spec is not None and spec.max_episode_steps is not None

    def reset(self, seeds: list[int]) -> None:
        """Start an episode in every environment, with one seed each."""
        for i, (environment, seed) in enumerate(zip(self.environments, seeds, strict=True)):
            self.observation[i] = environment.reset(seed=seed)[0]

    def step(self, actions: FloatArray) -> Steps:
        """Step every environment with its row of ``actions`` (``[N, A]`` in ``[-1, 1]``)."""
        count = len(self.environments)
        steps = Steps(
            next_observation=np.empty_like(self.observation),
            reward=np.empty(count),
            terminated=np.empty(count, dtype=np.bool_),
            truncated=np.empty(count, dtype=np.bool_),
        )
        following = np.empty_like(self.observation)
        for i, environment in enumerate(self.environments):
            observation, reward, terminated, truncated, _ = environment.step(actions[i])
            steps.next_observation[i] = observation
            steps.reward[i] = reward
            steps.terminated[i] = terminated
            steps.truncated[i] = truncated
            following[i] = environment.reset()[0] if terminated or truncated else observation
        self.observation = following
        return steps

    def close(self) -> None:
        """Close every environment."""
        for environment in self.environments:
            environment.close()
