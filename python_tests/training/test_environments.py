"""Environments as the agents see them: spaces, rescaling, ends of episodes, errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny import CountingEnv

from diffcore.training import EnvError
from diffcore.training.environments import BoxEnvironment, EnvironmentBatch, make_environment


class SpacesEnv(gym.Env[Any, Any]):
    """Any spaces; observes zeros; keeps the last action."""

    def __init__(self, observation: Any, action: Any) -> None:
        self.observation_space = observation
        self.action_space = action
        self.last_action: Any = None

    def _observe(self) -> Any:
        return np.zeros(self.observation_space.shape, dtype=self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.last_action = action
        return self._observe(), 0.0, False, False, {}


UNIT = gym.spaces.Box(-1.0, 1.0, (2,))


def test_actions_are_rescaled_to_the_bounds_and_reshaped() -> None:
    low = np.array([[-2.0, 0.0, 5.0]], dtype=np.float32)
    high = np.array([[4.0, 1.0, 5.5]], dtype=np.float32)
    inner = SpacesEnv(UNIT, gym.spaces.Box(low, high))
    env = BoxEnvironment(inner, "test")
    env.reset()
    for unit, expected in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2)):
        env.step(np.full(3, unit, dtype=np.float32))
        assert inner.last_action.dtype == np.float32
        np.testing.assert_array_equal(inner.last_action, expected)
    env.step(np.array([0.5, 0.5, 0.5], dtype=np.float32))
    np.testing.assert_allclose(inner.last_action, low + 0.75 * (high - low), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rescaled_actions_never_leave_the_bounds(dtype: type[Any]) -> None:
    low, high = dtype(-0.5), dtype(0.3)  # in float64 low plus the range is 0.30000000000000004
    env = BoxEnvironment(SpacesEnv(UNIT, gym.spaces.Box(low, high, (1,), dtype=dtype)), "test")
    for unit in np.linspace(-1.0, 1.0, 1001, dtype=np.float32):
        assert low <= env.rescale(np.array([unit]))[0] <= high


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), np.float32), ((3,), np.float64), ((2, 3, 4), np.uint8)]
)
def test_any_box_observation_is_flattened(shape: tuple[int, ...], dtype: Any) -> None:
    inner = SpacesEnv(gym.spaces.Box(0, 9, shape, dtype=dtype), UNIT)
    env = BoxEnvironment(inner, "test")
    size = int(np.prod(shape))
    observation, _ = env.reset()
    assert observation.shape == (size,)
    assert observation.dtype == np.float32
    assert env.observation_dim == size


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (gym.spaces.Dict({"a": UNIT}), UNIT, "only Box observations"),
        (gym.spaces.Discrete(3), UNIT, "only Box observations"),
        (UNIT, gym.spaces.Discrete(3), r"Discrete\(3\).*only continuous actions"),
        (UNIT, gym.spaces.MultiBinary(3), "only continuous actions"),
        (UNIT, gym.spaces.Box(0, 5, (2,), dtype=np.int64), "only continuous actions"),
        (UNIT, gym.spaces.Box(-np.inf, 1.0, (2,)), r"unbounded action space Box\(-inf"),
        (UNIT, gym.spaces.Box(-1.0, 1.0, (0,)), "empty space"),
    ],
)
def test_spaces_that_do_not_do_are_named(observation: Any, action: Any, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        BoxEnvironment(SpacesEnv(observation, action), "test")


def test_environments_that_cannot_be_made() -> None:
    with pytest.raises(EnvError, match="can't make the environment 'NoSuchEnv-v0'"):
        make_environment("NoSuchEnv-v0")
    with pytest.raises(EnvError, match="can't make the environment 'no_such_module:X-v0'"):
        make_environment("no_such_module:X-v0")
    with pytest.raises(EnvError, match=r"CartPole-v1 has the action space Discrete\(2\)"):
        make_environment("CartPole-v1")


def test_a_users_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_module.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('UsersOwn-v0',\n"
        "    entry_point='gymnasium.envs.classic_control.pendulum:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = make_environment("users_module:UsersOwn-v0")
        assert (env.observation_dim, env.action_dim) == (3, 1)
    finally:
        gym.registry.pop("UsersOwn-v0", None)
        sys.modules.pop("users_module", None)


def test_an_environment_need_not_know_of_render_modes(register_env: Any) -> None:
    class Plain(CountingEnv):
        def __init__(self) -> None:
            super().__init__()

    env_id = register_env(Plain)
    assert make_environment(env_id).observation_dim == 2
    with pytest.raises(EnvError, match="with render_mode='rgb_array'"):
        make_environment(env_id, render_mode="rgb_array")


def test_a_time_limit_can_be_set() -> None:
    env = make_environment("Pendulum-v1", max_episode_steps=2)
    env.reset(seed=0)
    assert env.step(np.zeros(1, dtype=np.float32))[2:4] == (False, False)
    assert env.step(np.zeros(1, dtype=np.float32))[2:4] == (False, True)


def test_a_closed_environment_says_so() -> None:
    env = make_environment("Pendulum-v1")
    env.reset(seed=0)
    env.close()
    with pytest.raises(EnvError, match="Pendulum-v1 is closed"):
        env.step(np.zeros(1, dtype=np.float32))
    with pytest.raises(EnvError, match="Pendulum-v1 is closed"):
        env.reset()


def test_gymnasiums_own_errors_get_the_environments_name() -> None:
    class Closed(SpacesEnv):
        def step(self, action: Any) -> Any:
            raise gym.error.ClosedEnvironmentError("the simulator is gone")

    env = BoxEnvironment(Closed(UNIT, UNIT), "test")
    env.reset()
    with pytest.raises(EnvError, match="test: the simulator is gone"):
        env.step(np.zeros(2, dtype=np.float32))


class Outcome(SpacesEnv):
    """Observes and rewards with whatever ``what`` is."""

    what: Any = (np.zeros(2), 0.0)

    def step(self, action: Any) -> Any:
        return (*self.what, False, False, {})


@pytest.mark.parametrize(
    "reward",
    [1.5, np.float32(1.5), np.array(1.5), np.array([1.5]), np.array([[1.5]]), torch.tensor([1.5])],
)
def test_a_reward_may_be_any_one_number(reward: Any) -> None:
    inner = Outcome(UNIT, UNIT)
    env = BoxEnvironment(inner, "test")
    env.reset()
    inner.what = (np.zeros(2), reward)
    value = env.step(np.zeros(2, dtype=np.float32))[1]
    assert type(value) is float
    assert value == 1.5


def test_nonsense_from_an_environment_is_stopped() -> None:
    inner = Outcome(UNIT, UNIT)
    env = BoxEnvironment(inner, "test")
    env.reset()
    for what, message in (
        ((np.array([np.nan, 0.0]), 0.0), "non-finite observation"),
        ((np.zeros(2), np.inf), "test returned the reward inf; expected a finite number"),
        ((np.zeros(2), None), "test returned the reward None; expected a finite number"),
        ((np.zeros(2), np.zeros(2)), r"test returned a reward of shape \(2,\); expected one number"),
        ((np.zeros(2), "much"), "test returned the reward 'much'; expected a number"),
        ((np.zeros(3), 0.0), r"observation of shape \(3,\), its space says \(2,\)"),
    ):
        inner.what = what
        with pytest.raises(EnvError, match=message):
            env.step(np.zeros(2, dtype=np.float32))


def batch(*envs: gym.Env[Any, Any]) -> EnvironmentBatch:
    environments = EnvironmentBatch([BoxEnvironment(env, "test") for env in envs])
    environments.reset([0] * len(envs))
    return environments


@pytest.mark.parametrize("terminates", [True, False])
def test_the_end_of_an_episode(terminates: bool) -> None:
    environments = batch(CountingEnv(length=2, terminates=terminates))
    action = np.zeros((1, 1), dtype=np.float32)
    np.testing.assert_array_equal(environments.observation, [[0, 0]])

    first = environments.step(action)
    np.testing.assert_array_equal(first.next_observation, [[0, 1]])
    np.testing.assert_array_equal(environments.observation, [[0, 1]])
    assert not first.terminated[0]
    assert not first.truncated[0]

    last = environments.step(action)
    np.testing.assert_array_equal(last.next_observation, [[0, 2]])  # the last of the old episode
    np.testing.assert_array_equal(environments.observation, [[1, 0]])  # the first of the new one
    assert last.terminated[0] == terminates
    assert last.truncated[0] != terminates


def test_environments_of_a_batch_end_independently_and_no_step_is_lost() -> None:
    inner = [CountingEnv(length=2), CountingEnv(length=3)]
    environments = batch(*inner)
    transitions = []
    for _ in range(6):
        before = environments.observation
        steps = environments.step(np.zeros((2, 1), dtype=np.float32))
        transitions += list(zip(before.tolist(), steps.next_observation.tolist(), strict=True))
    # Every transition stays in its episode and advances it by one: none straddles a reset.
    for (episode, count), (next_episode, next_count) in transitions:
        assert (next_episode, next_count) == (episode, count + 1)
    assert [len(env.actions) for env in inner] == [6, 6]


def test_rows_of_actions_go_to_their_environments() -> None:
    inner = [CountingEnv(length=9), CountingEnv(length=9)]
    batch(*inner).step(np.array([[-1.0], [1.0]], dtype=np.float32))
    assert [env.actions for env in inner] == [[-2.0], [6.0]]


def test_observations_kept_by_the_caller_do_not_change() -> None:
    environments = batch(CountingEnv(length=9))
    before = environments.observation
    kept = before.copy()
    environments.step(np.zeros((1, 1), dtype=np.float32))
    np.testing.assert_array_equal(before, kept)
