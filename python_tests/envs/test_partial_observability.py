"""Masking and history: against lists kept by hand, against the simulators, and as registered."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import diffcore.envs
from diffcore.envs import HistoryObservation, MaskObservation, velocity_indices

Settings = dict[str, Any]


class Recorder(gym.Env[Any, Any]):
    """Observes random numbers, and keeps all it showed and was given."""

    def __init__(self, observation: Any = None, action: Any = None) -> None:
        box = gym.spaces.Box
        self.observation_space = observation or box(-5.0, 9.0, (3,), dtype=np.float32)
        self.action_space = action or box(np.float32([0.5, -2.0]), np.float32([4.0, -1.0]))
        self.shown: list[Any] = []
        self.actions: list[Any] = []
        self.buffer = np.zeros(self.observation_space.shape, self.observation_space.dtype)

    def _observe(self) -> Any:
        self.buffer[:] = self.np_random.uniform(-1, 1, self.buffer.shape)
        self.shown.append(self.buffer.copy())
        return self.buffer  # the same memory every time, as some environments have it

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Settings]:
        super().reset(seed=seed)
        self.shown, self.actions = [], []
        return self._observe(), {"reset": True}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Settings]:
        self.actions.append(np.array(action))
        return self._observe(), 1.5, len(self.actions) >= 9, False, {"step": len(self.actions)}


# ---------------------------------------------------------------- the mask


def test_a_mask_leaves_out_entries_and_their_bounds() -> None:
    low, high = np.arange(5.0), np.arange(5.0) + 10
    env = MaskObservation(Recorder(gym.spaces.Box(low, high, dtype=np.float64)), [3, 0])
    assert env.observation_space == gym.spaces.Box(low[[1, 2, 4]], high[[1, 2, 4]], dtype=np.float64)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation, env.unwrapped.shown[-1][[1, 2, 4]])  # type: ignore[attr-defined]
    observation, *rest = env.step(np.array([1.0, -1.5]))
    np.testing.assert_array_equal(observation, env.unwrapped.shown[-1][[1, 2, 4]])  # type: ignore[attr-defined]
    assert rest == [1.5, False, False, {"step": 1}]


def test_a_mask_may_hide_nothing() -> None:
    env = MaskObservation(Recorder(), [])
    np.testing.assert_array_equal(env.reset(seed=0)[0], env.unwrapped.shown[0])  # type: ignore[attr-defined]


def test_a_mask_takes_any_sequence_of_integers() -> None:
    for indices in ((1,), range(1, 2), np.array([1]), [np.int32(1)]):
        env = MaskObservation(Recorder(), indices)  # type: ignore[arg-type]
        assert env.observation_space.shape == (2,)
        assert env._saved_kwargs == {"indices": [1]}  # as Gymnasium's specs compare them


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3], ValueError, r"indices: expected each in 0\.\.2, got 3"),
        ([0, -1], ValueError, r"indices: expected each in 0\.\.2, got -1"),
        ([1, 2, 1], ValueError, r"indices: expected each at most once, got 1 twice"),
        ([0, 1, 2], ValueError, r"indices: expected at least one of 3 entries left, got all"),
        ([1.0], TypeError, r"indices: expected integers, got float 1\.0"),
        ([True], TypeError, r"indices: expected integers, got bool True"),
        (["1"], TypeError, r"indices: expected integers, got str '1'"),
        (2, TypeError, r"indices: expected a sequence of integers, got int"),
        ("12", TypeError, r"indices: expected a sequence of integers, got str"),
        (None, TypeError, r"indices: expected a sequence of integers, got NoneType"),
    ],
)
def test_bad_indices_are_named(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskObservation(Recorder(), indices)


# ---------------------------------------------------------------- history


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 5), steps=st.integers(0, 9), episodes=st.integers(1, 2))
def test_history_by_hand(length: int, steps: int, episodes: int) -> None:
    env = HistoryObservation(Recorder(), length)
    inner: Any = env.unwrapped
    env.reset(seed=1)
    for _ in range(episodes):  # nothing of an episode reaches into the next
        observation, info = env.reset()
        assert info == {"reset": True}
        returned = [observation]
        for i in range(steps):
            observation, reward, terminated, truncated, info = env.step(np.array([1 + i, -1.5]))
            assert (reward, terminated, truncated) == (1.5, i == 8, False)
            assert info == {"step": i + 1}
            returned.append(observation)
        # What was returned earlier doesn't change later.
        for t, observation in enumerate(returned):
            times = range(t - length + 1, t + 1)
            parts = [inner.shown[max(time, 0)] for time in times]
            parts += [inner.actions[time] if time >= 0 else np.zeros(2) for time in times[:-1]]
            np.testing.assert_array_equal(observation, np.concatenate(parts).astype(np.float32))
            assert observation.dtype == np.float32


def test_history_of_one_is_the_plain_observation() -> None:
    plain, env = Recorder(), HistoryObservation(Recorder(), length=1)
    assert env.observation_space == plain.observation_space
    np.testing.assert_array_equal(env.reset(seed=0)[0], plain.reset(seed=0)[0])
    action = np.array([1.0, -1.5])
    np.testing.assert_array_equal(env.step(action)[0], plain.step(action)[0])


def test_bounds_of_a_history_hold_the_zeros_before_the_first_action() -> None:
    env = HistoryObservation(Recorder(), length=2)
    space: Any = env.observation_space
    np.testing.assert_array_equal(space.low, [-5, -5, -5, -5, -5, -5, 0, -2])
    np.testing.assert_array_equal(space.high, [9, 9, 9, 9, 9, 9, 4, 0])
    assert space.contains(env.reset(seed=0)[0])
    assert space.contains(env.step(np.array([4.0, -2.0], dtype=np.float32))[0])


@pytest.mark.parametrize(
    ("observation", "action", "expected"),
    [
        (np.float64, np.float32, np.float64),
        (np.float32, np.float32, np.float32),
        (np.uint8, np.float32, np.float32),
    ],
)
def test_a_history_is_as_precise_as_its_parts(observation: Any, action: Any, expected: Any) -> None:
    inner = Recorder(
        gym.spaces.Box(0, 9, (3,), dtype=observation), gym.spaces.Box(-1, 1, (2, 2), dtype=action)
    )
    env = HistoryObservation(inner, length=2)
    assert env.observation_space.dtype == expected
    first, _ = env.reset(seed=0)
    assert first.dtype == expected
    assert first.shape == (10,)
    second = env.step(np.arange(4.0).reshape(2, 2))[0]
    assert second.dtype == expected
    np.testing.assert_array_equal(second[-4:], np.arange(4.0))


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (0, ValueError, "length: expected at least 1, got 0"),
        (-2, ValueError, "length: expected at least 1, got -2"),
        (3.0, TypeError, "length: expected an integer, got float"),
        (True, TypeError, "length: expected an integer, got bool"),
        (None, TypeError, "length: expected an integer, got NoneType"),
    ],
)
def test_bad_lengths_are_named(length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HistoryObservation(Recorder(), length)


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(gym.error.ResetNeeded, match="expected a reset before the first step"):
        HistoryObservation(Recorder()).step(np.zeros(2))


BOX = gym.spaces.Box(-1.0, 1.0, (2,))


def test_spaces_that_do_not_do_are_named() -> None:
    for space in (gym.spaces.Discrete(3), gym.spaces.Dict({"a": BOX})):
        env: Any = gym.Env()
        env.observation_space, env.action_space = space, BOX
        for wrap in (lambda env: MaskObservation(env, [0]), HistoryObservation):
            with pytest.raises(TypeError, match=r"env: expected a Box observation space, got (D)"):
                wrap(env)
    env = gym.Env()
    env.observation_space, env.action_space = BOX, gym.spaces.Discrete(3)
    with pytest.raises(TypeError, match=r"env: expected a Box action space, got Discrete\(3\)"):
        HistoryObservation(env)
    env.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)
    for wrap in (lambda env: MaskObservation(env, [0]), HistoryObservation):
        with pytest.raises(ValueError, match=r"one dimension, got the shape \(8, 8, 3\)"):
            wrap(env)


# ---------------------------------------------------------------- velocities


def perturbed(env_id: str, what: str) -> tuple[set[int], int]:
    """Which entries of the observation change with each entry of qvel or qpos; how many there are.

    Asks the simulator, so it is independent of how the environment describes itself.
    """
    env: Any = gym.make(env_id, disable_env_checker=True).unwrapped
    env.reset(seed=0)
    qpos, qvel = env.data.qpos.copy(), np.zeros(env.model.nv)
    env.set_state(qpos, qvel)
    before = env._get_obs()
    state = {"qpos": qpos, "qvel": qvel}
    state[what] = state[what] + 0.01
    env.set_state(state["qpos"], state["qvel"])
    return set(np.flatnonzero(env._get_obs() != before).tolist()), len(before)


@pytest.mark.parametrize(
    ("env_id", "count"),
    [
        ("HalfCheetah-v5", 9),
        ("Hopper-v5", 6),
        ("Walker2d-v5", 9),
        ("Ant-v5", 14),
        ("Swimmer-v5", 5),
        ("InvertedPendulum-v5", 2),
        ("Reacher-v5", 2),
        ("Pusher-v5", 7),
        ("diffcore/HalfCheetah-MBBL-v0", 9),
        ("diffcore/Hopper-ET-v0", 6),
        ("diffcore/Walker-ET-v0", 9),
        ("diffcore/Ant-ET-v0", 14),
        ("diffcore/SlimHumanoid-ET-v0", 23),
        ("diffcore/InvertedPendulum-MBBL-v0", 2),
        ("diffcore/Reacher-MBBL-v0", 2),
    ],
)
def test_the_masked_entries_are_those_that_move_with_qvel(env_id: str, count: int) -> None:
    indices = velocity_indices(gym.make(env_id))
    moved, _ = perturbed(env_id, "qvel")
    assert set(indices) == moved
    assert len(indices) == count
    assert not set(indices) & perturbed(env_id, "qpos")[0]


@pytest.mark.parametrize(
    "env_id",
    ["Humanoid-v5", "HumanoidStandup-v5", "diffcore/Humanoid-ET-v0", "InvertedDoublePendulum-v5"],
)
def test_where_more_depends_on_velocity_only_qvel_is_masked(env_id: str) -> None:
    env: Any = gym.make(env_id).unwrapped
    env.reset(seed=0)
    qvel = np.arange(1.0, env.model.nv + 1) / 100
    env.set_state(env.init_qpos, qvel)
    np.testing.assert_array_equal(env._get_obs()[list(velocity_indices(env))], qvel)


def test_velocities_of_the_classic_tasks() -> None:
    pendulum: Any = gym.make("Pendulum-v1")
    pendulum.reset(seed=0)
    pendulum.unwrapped.state = np.array([0.5, 3.0])
    assert pendulum.unwrapped._get_obs()[list(velocity_indices(pendulum))].tolist() == [3.0]
    assert velocity_indices(gym.make("diffcore/Pendulum-MBBL-v0")) == (2,)
    assert velocity_indices(gym.make("CartPole-v1")) == (1, 3)  # documented by Gymnasium
    assert velocity_indices(gym.make("diffcore/CartPole-MBBL-v0")) == (1, 3)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"env: expected an observation_structure.*got MultiGoal"):
        velocity_indices(gym.make("diffcore/MultiGoal-v0"))


# ---------------------------------------------------------------- the registered variants

MASKED = sorted(env_id for env_id in gym.registry if env_id.endswith("-masked-v0"))
SIZES = {  # of what remains, of an action: by hand from Gymnasium's documentation
    "Pendulum": (2, 1),
    "HalfCheetah": (8, 6),
    "Hopper": (5, 3),
    "Walker2d": (8, 6),
    "Ant": (13 + 78, 8),
    "Humanoid": (348 - 23, 17),
    "Swimmer": (3, 2),
    "Hopper-ET": (5, 3),
    "Ant-ET": (13, 8),
    "Humanoid-ET": (376 - 23, 17),
    "SlimHumanoid-ET": (22, 17),
    "CartPole-MBBL": (2, 1),
    "Reacher-MBBL": (9, 2),
}


@pytest.mark.parametrize("task", SIZES)
def test_sizes_of_the_variants(task: str) -> None:
    remaining, actions = SIZES[task]
    env_id = f"diffcore/{task}-masked-v0"
    assert gym.make(env_id).observation_space.shape == (3 * remaining + 2 * actions,)
    assert gym.make(env_id, history=1).observation_space.shape == (remaining,)
    assert gym.make(env_id, history=2).observation_space.shape == (2 * remaining + actions,)


def test_every_task_has_its_variant() -> None:
    own = [env_id for env_id in gym.registry if env_id.startswith("diffcore/")]
    tasks = {env_id.removesuffix("-v0") for env_id in own if env_id.endswith(("-ET-v0", "-MBBL-v0"))}
    assert len(tasks) == 10
    assert {f"{task}-masked-v0" for task in tasks} <= set(MASKED)
    assert len(MASKED) == 22


@pytest.mark.parametrize("env_id", MASKED)
def test_variants_are_their_tasks_with_less_to_see(env_id: str) -> None:
    env, base = gym.make(env_id), gym.make(gym.spec(env_id).kwargs["base"])
    assert env.spec is not None
    assert base.spec is not None
    assert env.spec.max_episode_steps == base.spec.max_episode_steps
    kept = [
        i
        for i in range(base.observation_space.shape[0])  # type: ignore[index]
        if i not in velocity_indices(base)
    ]
    observation, _ = env.reset(seed=5)
    expected = base.reset(seed=5)[0][kept]
    np.testing.assert_array_equal(observation[: 3 * len(kept)], np.tile(expected, 3))
    assert not observation[3 * len(kept) :].any()
    base.action_space.seed(0)
    for _ in range(5):
        action = base.action_space.sample()
        observation, *rest = env.step(action)
        expected, *expected_rest = base.step(action)
        np.testing.assert_array_equal(
            observation[2 * len(kept) : 3 * len(kept)], expected[kept].astype(observation.dtype)
        )
        assert rest[:3] == expected_rest[:3]


@pytest.mark.parametrize("env_id", ["diffcore/Hopper-masked-v0", "diffcore/Pendulum-masked-v0"])
def test_variants_pass_gymnasiums_checker(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (
            "Box observation space (minimum|maximum) value is -?infinity",
            "we recommend using a symmetric and normalized space",
            "is different from the unwrapped version",
        ):
            warnings.filterwarnings("ignore", message=f".*{known}")
        check_env(gym.make(env_id), skip_render_check=True)


def test_variants_as_a_vector_environment_and_from_their_spec() -> None:
    vector = gym.make_vec("diffcore/Pendulum-masked-v0", num_envs=2, history=2)
    assert vector.reset(seed=0)[0].shape == (2, 5)
    env = gym.make("diffcore/Pendulum-masked-v0", history=2)
    again = gym.make(env.spec)  # type: ignore[arg-type]
    assert again.observation_space == env.observation_space


def test_bad_history_of_a_variant_is_named() -> None:
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        gym.make("diffcore/Pendulum-masked-v0", history=0)
    with pytest.raises(TypeError, match="length: expected an integer, got float"):
        gym.make("diffcore/Pendulum-masked-v0", history=2.0)


def test_the_documents_examples_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    try:
        for example in examples:
            exec(compile(example, "docs/environments.md", "exec"), {})
        assert gym.spec("Drone-v0").max_episode_steps == 500
        # Height and velocities of Hopper hidden: 4 of 11 remain; and 3 actions.
        assert gym.make("BlindHopper-v0").reset(seed=0)[0].shape == (5 * 4 + 4 * 3,)
    finally:
        gym.registry.pop("BlindHopper-v0", None)
        gym.registry.pop("Drone-v0", None)


def test_the_documents_list_what_is_registered() -> None:
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    own = {env_id for env_id in gym.registry if env_id.startswith("diffcore/")}
    assert own - set(MASKED) == set(re.findall(r"`(diffcore/[\w-]+-v0)`", page)) - set(MASKED) - {
        "diffcore/TASK-masked-v0"
    }


def test_public_names() -> None:
    assert diffcore.envs.HistoryObservation is HistoryObservation
    assert {"HistoryObservation", "MaskObservation", "MultiGoalEnv"} <= set(diffcore.envs.__all__)
