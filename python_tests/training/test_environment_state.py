"""Saving environments in mid-episode: bitwise, or a clear no."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny import CountingEnv

from diffcore.training.environment_state import (
    NotRestorableError,
    restore_environment,
    save_environment,
)
from diffcore.training.environments import BoxEnvironment, make_environment

ENVIRONMENTS = [
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "diffcore/MultiGoal-v0",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Ant-v5",
    "Humanoid-v5",
    "diffcore/Hopper-ET-v0",
    "diffcore/Humanoid-ET-v0",
    "diffcore/Reacher-MBBL-v0",
    "diffcore/InvertedPendulum-MBBL-v0",
    "diffcore/Pendulum-MBBL-v0",
    "diffcore/CartPole-MBBL-v0",
    "diffcore/HalfCheetah-masked-v0",
    "diffcore/Pendulum-masked-v0",
    "diffcore/CartPole-MBBL-masked-v0",
]


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    torch.save(state, path / "state.pt")
    loaded: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return loaded


def trace(env: BoxEnvironment, rng: np.random.Generator, steps: int) -> list[Any]:
    """Everything the environment returns, resets included, for random actions."""
    seen: list[Any] = []
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_dim).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((observation.tobytes(), reward, terminated, truncated, repr(info)))
        if terminated or truncated:
            seen.append(env.reset()[0].tobytes())
    return seen


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_goes_on_bit_for_bit(env_id: str, tmp_path: Path) -> None:
    env, other = (make_environment(env_id, max_episode_steps=40) for _ in range(2))
    env.reset(seed=3)
    trace(env, np.random.default_rng(0), 57)  # into the middle of a second or later episode
    state = through_a_file(save_environment(env), tmp_path)
    expected = trace(env, np.random.default_rng(1), 60)

    other.reset(seed=99)
    restore_environment(other, state)
    assert trace(other, np.random.default_rng(1), 60) == expected


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_history_is_saved(steps: int, tmp_path: Path) -> None:
    """The first places of a history, filled at the reset, are another case than the later ones."""
    env, other = (make_environment("diffcore/Pendulum-masked-v0") for _ in range(2))
    rng = np.random.default_rng(0)
    env.reset(seed=3)
    trace(env, rng, steps)
    state = through_a_file(save_environment(env), tmp_path)
    expected = trace(env, np.random.default_rng(1), 5)

    other.reset(seed=99)  # with a history of its own, longer than the saved one's
    trace(other, rng, 4)
    restore_environment(other, state)
    assert trace(other, np.random.default_rng(1), 5) == expected


def test_a_history_of_another_length_is_refused() -> None:
    env = gym.make("diffcore/Pendulum-masked-v0", history=2)
    other = gym.make("diffcore/Pendulum-masked-v0", history=3)
    env.reset(seed=0)
    other.reset(seed=0)
    message = r"HistoryObservation's own .* expected 3 observations and 2 actions.*got 2, 1 and 5"
    with pytest.raises(NotRestorableError, match=message):
        restore_environment(other, save_environment(env))


def test_a_wrapper_may_bring_its_own_state_dict(tmp_path: Path) -> None:
    class Wrapper(gym.Wrapper[Any, Any, Any, Any]):
        def __init__(self, env: gym.Env[Any, Any]) -> None:
            super().__init__(env)
            self.opaque: Any = Opaque()
            self.steps = 0

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.steps = state["steps"]

    env, other = Wrapper(CountingEnv()), Wrapper(CountingEnv())
    env.reset(seed=1)
    env.steps = 5
    restore_environment(other, through_a_file(save_environment(env), tmp_path))
    assert other.steps == 5
    assert other.np_random.random() == env.np_random.random()


def test_saving_changes_nothing() -> None:
    traces = []
    for saves in (False, True):
        env = make_environment("HalfCheetah-v5")
        env.reset(seed=3)
        seen = []
        for i in range(20):
            seen += trace(env, np.random.default_rng(i), 1)
            if saves:
                save_environment(env)
        traces.append(seen)
    assert traces[0] == traces[1]


class StatefulEnv(CountingEnv):
    """Has one more attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def restored(value: Any, tmp_path: Path) -> Any:
    env, other = StatefulEnv(value), StatefulEnv(None)
    restore_environment(other, through_a_file(save_environment(env), tmp_path))
    return other.value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        2**100,
        0.1,
        float("inf"),
        "text",
        b"bytes",
        (1, (2.5, "x")),
        [1, [2, 3]],
        {"a": {1: (2,)}, (1, 2): None},
        {3, 1, 2},
        np.float32(0.1),
        np.int64(7),
        np.bool_(True),
    ],
    ids=repr,
)
def test_plain_data(value: Any, tmp_path: Path) -> None:
    back = restored(value, tmp_path)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.uint64, np.bool_])
def test_arrays(dtype: Any, tmp_path: Path) -> None:
    value = np.arange(6).reshape(2, 3).astype(dtype)
    back = restored(value, tmp_path)
    np.testing.assert_array_equal(back, value)
    assert back.dtype == dtype
    back[:] = 1  # owns its memory


def test_a_deque_keeps_its_bound(tmp_path: Path) -> None:
    back = restored(deque([1, 2], maxlen=2), tmp_path)
    back.append(3)
    assert list(back) == [2, 3]


def test_generators_go_on(tmp_path: Path) -> None:
    for value, draw in (
        (np.random.default_rng(1), lambda g: g.standard_normal()),
        (np.random.Generator(np.random.MT19937(2)), lambda g: g.standard_normal()),
        (np.random.RandomState(3), lambda g: g.standard_normal()),
        (random.Random(4), lambda g: g.gauss(0, 1)),
    ):
        draw(value)
        back = restored(value, tmp_path)
        assert [draw(back) for _ in range(3)] == [draw(value) for _ in range(3)]


def test_objects_shared_by_two_attributes_stay_shared(tmp_path: Path) -> None:
    shared: list[Any] = [1]
    shared.append(shared)  # and may even contain themselves
    back = restored({"a": shared, "b": shared}, tmp_path)
    assert back["a"] is back["b"]
    assert back["a"][1] is back["a"]


def test_the_generator_of_a_space_is_saved(tmp_path: Path) -> None:
    env, other = CountingEnv(), CountingEnv()
    env.action_space.seed(5)
    restore_environment(other, through_a_file(save_environment(env), tmp_path))
    assert env.action_space.sample() == other.action_space.sample()


class Opaque:
    """Something that isn't plain data."""


base = np.zeros(4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Opaque(), r"StatefulEnv.value is a .*Opaque, which can't be saved"),
        ({"deep": [Opaque()]}, r"StatefulEnv.value is a .*Opaque"),
        (np.array([None]), "array of dtype object"),
        ([base, base[1:]], "shares its memory with another array"),
        (np.frombuffer(bytearray(8)), "array over memory of builtins"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, message: str) -> None:
    with pytest.raises(NotRestorableError, match=message):
        save_environment(StatefulEnv(value))


def test_an_array_over_the_simulators_memory_is_refused() -> None:
    env = make_environment("HalfCheetah-v5")
    env.reset(seed=0)
    env.unwrapped.shortcut = env.unwrapped.data.qpos  # type: ignore[attr-defined]
    with pytest.raises(NotRestorableError, match="shortcut is an array over memory of"):
        save_environment(env)


def test_a_changed_mujoco_model_is_noticed() -> None:
    env, other = make_environment("Hopper-v5"), make_environment("Hopper-v5")
    env.reset(seed=0)
    other.reset(seed=0)
    env.unwrapped.model.body_mass[1] *= 1.1  # type: ignore[attr-defined]
    with pytest.raises(NotRestorableError, match="isn't in the saved state"):
        restore_environment(other, save_environment(env))


def test_another_environment_is_refused() -> None:
    with pytest.raises(NotRestorableError, match=r"saved as .*TimeLimit.* now .*CountingEnv"):
        restore_environment(CountingEnv(), save_environment(gym.make("Pendulum-v1")))


def test_an_environment_may_bring_its_own_state_dict(tmp_path: Path) -> None:
    class OwnState(CountingEnv):
        def __init__(self) -> None:
            super().__init__()
            self.opaque = Opaque()

        def state_dict(self) -> dict[str, Any]:
            return {"episode": self.episode, "position": np.array([self.count])}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.episode = state["episode"]
            self.count = int(state["position"][0])

    env, other = OwnState(), OwnState()
    env.reset(seed=1)
    env.step(np.zeros(1))
    restore_environment(other, through_a_file(save_environment(env), tmp_path))
    assert (other.episode, other.count) == (0, 1)
    assert other.np_random.random() == env.np_random.random()


def test_a_fault_in_an_environments_own_saving_is_named() -> None:
    class Faulty(CountingEnv):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("position")

    with pytest.raises(NotRestorableError, match=r"Faulty's own .* failed: KeyError\('position'\)"):
        restore_environment(Faulty(), save_environment(Faulty()))
