"""Partially observable tasks: wrappers that hide parts of an observation and that remember.

Hiding the velocities makes a control task partially observable; a short history of observations
and actions gives back what can be inferred about them. This is the state-based protocol of Diff-SR
(arXiv 2406.16121, Appendices B and E), which takes a history of three observations.

>>> env = gymnasium.make("Hopper-v5")
>>> env = HistoryObservation(MaskObservation(env, velocity_indices(env)), length=3)

The registered variants, such as ``diffcore/Hopper-masked-v0``, are exactly that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

Array = NDArray[Any]

# Where velocities are in the observations of environments that don't say so themselves.
# By the name of the class, so that nothing needs to be imported to ask.
_VELOCITIES: dict[str, tuple[int, ...]] = {
    "PendulumEnv": (2,),
    "CartPoleEnv": (1, 3),
    "ReacherEnv": (6, 7),  # of the arm; the target doesn't move
    "InvertedDoublePendulumEnv": (5, 6, 7),
    "PusherEnv": tuple(range(7, 14)),  # of the arm; the object's aren't observed
}


class MaskObservation(gym.ObservationWrapper[Array, Any, Array], RecordConstructorArgs):
    """Leaves out entries of the observation.

    Args:
        env: an environment with a Box observation space of one dimension.
        indices: the entries to leave out, each at most once, in any order; at least one entry must
            remain.

    Raises:
        TypeError: if the observation space isn't a Box, or an index isn't an integer.
        ValueError: if the observation has another number of dimensions than one; if an index is
            out of range or comes twice; if nothing remains.
    """

    def __init__(self, env: gym.Env[Any, Any], indices: Sequence[int]) -> None:
        space = _flat_box(env)
        self._kept = _remaining(indices, space.shape[0])
        RecordConstructorArgs.__init__(self, indices=[int(index) for index in indices])
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = gym.spaces.Box(
            space.low[self._kept], space.high[self._kept], dtype=_dtype(space)
        )

    def observation(self, observation: Array) -> Array:
        """What remains of ``observation`` (``[O]``)."""
        return np.asarray(observation)[self._kept]


class HistoryObservation(gym.Wrapper[Array, Array, Array, Array], RecordConstructorArgs):
    """The last ``length`` observations and the actions between them, as one vector.

    With L = ``length`` the observation at time t is

        ``[o_(t-L+1), ..., o_t, a_(t-L+1), ..., a_(t-1)]``

    of size ``L * O + (L - 1) * A``; actions are as the environment was given them, in its own
    units. At a reset the first observation fills all places of observations, and zeros those of
    actions. ``length=1`` is the plain observation.

    Args:
        env: an environment with a Box observation space of one dimension and a Box of actions.
        length: L, at least 1.

    Raises:
        TypeError: if a space isn't a Box, or ``length`` isn't an integer.
        ValueError: if the observation has another number of dimensions than one, or ``length`` is
            below 1.
    """

    def __init__(self, env: gym.Env[Any, Any], length: int = 3) -> None:
        RecordConstructorArgs.__init__(self, length=length)
        gym.Wrapper.__init__(self, env)
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
            raise TypeError(f"length: expected an integer, got {type(length).__name__}")
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        observations, actions = _flat_box(env), env.action_space
        if not isinstance(actions, gym.spaces.Box):
            raise TypeError(f"env: expected a Box action space, got {actions}")
        self.length = int(length)
        between = self.length - 1
        # The zeros before the first action needn't lie within the bounds of an action.
        low, high = np.minimum(actions.low, 0).ravel(), np.maximum(actions.high, 0).ravel()
        parts = [observations.low] * self.length + [low] * between
        self._dtype = np.concatenate(parts).dtype
        self.observation_space = gym.spaces.Box(
            np.concatenate(parts),
            np.concatenate([observations.high] * self.length + [high] * between),
            dtype=self._dtype.type,
        )
        self._size = sum(part.size for part in parts)
        self._no_action = np.zeros(low.shape, dtype=_dtype(actions))
        self._observations: deque[Array] = deque(maxlen=self.length)
        self._actions: deque[Array] = deque(maxlen=between)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode, and its history."""
        observation, info = self.env.reset(seed=seed, options=options)
        first = np.array(observation)
        self._observations.extend([first] * self.length)
        self._actions.extend([self._no_action] * (self.length - 1))
        return self._history(), info

    def step(self, action: Array) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        """One step with ``action``, which becomes part of the history.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not self._observations:
            raise gym.error.ResetNeeded("step: expected a reset before the first step, got none")
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._observations.append(np.array(observation))
        self._actions.append(np.array(action).ravel())
        return self._history(), reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """The history, for a training run that is to be resumed in mid-episode."""
        return {"observations": list(self._observations), "actions": list(self._actions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`.

        Raises:
            ValueError: if it is that of another ``length`` or of differently shaped parts.
        """
        observations, actions = state["observations"], state["actions"]
        counts = (len(observations), len(actions))
        size = sum(part.size for part in (*observations, *actions))
        fits = counts == (self.length, self.length - 1) and size == self._size
        if not fits and size > 0:  # before the first reset there is nothing
            raise ValueError(
                f"state: expected {self.length} observations and {self.length - 1} actions, "
                f"together {self._size} numbers, got {counts[0]}, {counts[1]} and {size}"
            )
        self._observations.clear()
        self._observations.extend(observations)
        self._actions.clear()
        self._actions.extend(actions)

    def _history(self) -> Array:
        return np.concatenate([*self._observations, *self._actions], dtype=self._dtype)


def velocity_indices(env: gym.Env[Any, Any]) -> tuple[int, ...]:
    """Which entries of an environment's own observation are velocities.

    For Gymnasium's MuJoCo tasks these are MuJoCo's ``qvel``, found by the environment's
    ``observation_structure``; for Humanoid therefore not the velocities of its bodies (``cvel``).
    Pendulum, CartPole, Reacher, InvertedDoublePendulum and Pusher are known by name.

    Raises:
        ValueError: if the environment isn't one of these.
    """
    task = env.unwrapped
    structure = getattr(task, "observation_structure", {})
    if "qvel" in structure:
        first = structure["qpos"]
        return tuple(range(first, first + structure["qvel"]))
    for base in type(task).__mro__:
        if base.__name__ in _VELOCITIES:
            return _VELOCITIES[base.__name__]
    raise ValueError(
        "env: expected an observation_structure with qpos and qvel, or a task known by name "
        f"({', '.join(_VELOCITIES)}), got {type(task).__name__}; "
        "MaskObservation takes any indices"
    )


def make_masked(base: str, *, history: int = 3, **settings: Any) -> gym.Env[Array, Array]:
    """The task ``base`` without its velocities, and with a history: registered as ``...-masked``.

    Args:
        base: the id of a registered task. Its time limit isn't taken over.
        history: how many observations are remembered, see :class:`HistoryObservation`.
        settings: those of ``base``, such as ``render_mode``.

    Raises:
        TypeError, ValueError: as :class:`HistoryObservation` does.
    """
    spec = gym.spec(base)
    creator: Any = spec.entry_point
    if isinstance(creator, str):
        creator = load_env_creator(creator)
    env: gym.Env[Any, Any] = creator(**{**spec.kwargs, **settings})
    try:
        return HistoryObservation(MaskObservation(env, velocity_indices(env)), history)
    except (TypeError, ValueError):
        env.close()
        raise


def _flat_box(env: gym.Env[Any, Any]) -> gym.spaces.Box:
    space = env.observation_space
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(f"env: expected a Box observation space, got {space}")
    if len(space.shape) != 1:
        raise ValueError(
            f"env: expected observations of one dimension, got the shape {space.shape} "
            "(gymnasium.wrappers.FlattenObservation flattens them)"
        )
    return space


def _dtype(space: gym.spaces.Box) -> type[Any]:
    return np.dtype(space.dtype).type


def _remaining(indices: Sequence[int], size: int) -> NDArray[np.int64]:
    """The entries of ``range(size)`` that aren't among ``indices``, in order."""
    if isinstance(indices, (str, bytes)) or not isinstance(indices, (Sequence, np.ndarray)):
        raise TypeError(f"indices: expected a sequence of integers, got {type(indices).__name__}")
    masked: set[int] = set()
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"indices: expected integers, got {type(index).__name__} {index!r}")
        if not 0 <= index < size:
            raise ValueError(f"indices: expected each in 0..{size - 1}, got {index}")
        if index in masked:
            raise ValueError(f"indices: expected each at most once, got {index} twice")
        masked.add(int(index))
    if len(masked) == size:
        raise ValueError(f"indices: expected at least one of {size} entries left, got all of them")
    return np.array([i for i in range(size) if i not in masked], dtype=np.int64)
