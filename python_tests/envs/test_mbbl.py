"""The MBBL tasks against their definitions: rewards and ends worked out by hand."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import diffcore.envs  # noqa: F401  (registers diffcore/...)

ROBOTS = ["HalfCheetah-MBBL", "Hopper-ET", "Walker-ET", "Ant-ET", "Humanoid-ET", "SlimHumanoid-ET"]
SMALL = ["Pendulum-MBBL", "CartPole-MBBL", "InvertedPendulum-MBBL", "Reacher-MBBL"]


def make(task: str, **settings: Any) -> gym.Env[Any, Any]:
    return gym.make(f"diffcore/{task}-v0", **settings)


def put(env: gym.Env[Any, Any], qpos: dict[int, float], qvel: dict[int, float]) -> Any:
    """Reset, then the start position with these entries changed; the simulation."""
    env.reset(seed=0)
    simulation: Any = env.unwrapped
    positions, velocities = simulation.init_qpos.copy(), np.zeros(simulation.model.nv)
    for i, value in qpos.items():
        positions[i] = value
    for i, value in qvel.items():
        velocities[i] = value
    simulation.set_state(positions, velocities)
    return simulation


@pytest.mark.parametrize(
    ("task", "size", "actions", "bound", "steps"),
    [
        ("HalfCheetah-MBBL", 17, 6, 1.0, 1000),
        ("Hopper-ET", 11, 3, 1.0, 1000),
        ("Walker-ET", 17, 6, 1.0, 1000),
        ("Ant-ET", 27, 8, 1.0, 1000),
        ("Humanoid-ET", 376, 17, 0.4, 1000),
        ("SlimHumanoid-ET", 45, 17, 0.4, 1000),
        ("Pendulum-MBBL", 3, 1, 2.0, 200),
        ("CartPole-MBBL", 4, 1, 1.0, 200),
        ("InvertedPendulum-MBBL", 4, 1, 3.0, 100),
        ("Reacher-MBBL", 11, 2, 1.0, 50),
    ],
)
def test_sizes(task: str, size: int, actions: int, bound: float, steps: int) -> None:
    env = make(task)
    assert env.observation_space.shape == (size,)
    assert env.reset(seed=0)[0].shape == (size,)
    np.testing.assert_allclose(env.action_space.high, np.full(actions, bound))  # type: ignore[attr-defined]
    assert env.spec is not None
    assert env.spec.max_episode_steps == steps


@pytest.mark.parametrize("task", ROBOTS + SMALL)
def test_passes_gymnasiums_checker(task: str) -> None:
    env = make(task)
    # CartPole-MBBL is a wrapper around Gymnasium's CartPole, the others are classes of their own.
    checked = env.unwrapped if task != "CartPole-MBBL" else env.env.env.env  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (
            "Box observation space (minimum|maximum) value is -?infinity",
            "we recommend using a symmetric and normalized space",
            "is different from the unwrapped version",
            "Not able to test alternative render modes",
            "doesn't have a valid .?spec",
        ):
            warnings.filterwarnings("ignore", message=f".*{known}")
        check_env(checked, skip_render_check=True)


# ---------------------------------------------------------------- observations


@pytest.mark.parametrize(("task", "left_out"), [*zip(ROBOTS, (1, 1, 1, 2, 2, 2), strict=True)])
def test_robots_observe_qpos_without_the_root_then_qvel(task: str, left_out: int) -> None:
    env = make(task)
    env.reset(seed=0)
    simulation: Any = env.unwrapped
    rng = np.random.default_rng(0)
    qpos, qvel = rng.uniform(-1, 1, simulation.model.nq), 30 * rng.normal(size=simulation.model.nv)
    if simulation.model.nq > simulation.model.nv:  # a quaternion gives the root's orientation
        qpos[3:7] = 0.5
    simulation.set_state(qpos, qvel)
    observation = simulation._get_obs()
    positions = len(qpos) - left_out
    np.testing.assert_array_equal(observation[:positions], qpos[left_out:])
    np.testing.assert_array_equal(observation[positions : positions + len(qvel)], qvel)
    if task == "Humanoid-ET":
        parts = np.split(observation, [45, 185, 269, 292])
        data = simulation.data
        assert len(parts[4]) == 84
        for part, expected in zip(
            parts[1:], (data.cinert, data.cvel, data.qfrc_actuator, data.cfrc_ext), strict=True
        ):
            np.testing.assert_array_equal(part, expected.ravel())
    else:
        assert len(observation) == positions + len(qvel)


def test_humanoid_feels_its_contacts() -> None:
    env = make("Humanoid-ET")
    observation, _ = env.reset(seed=0)
    assert not observation[-84:].any()  # the simulator hasn't computed them yet
    for _ in range(40):  # falls to the ground
        observation, *_ = env.step(np.zeros(17, dtype=np.float32))
    assert np.abs(observation[-84:]).max() > 1.0


def test_reacher_observes_what_gyms_first_versions_did() -> None:
    simulation = put(make("Reacher-MBBL"), {0: 0.3, 1: -0.2, 2: 0.1, 3: 0.05}, {0: 1.5, 1: -2.5})
    # Two links, of 0.1 and of 0.11 to the fingertip.
    x = 0.1 * np.cos(0.3) + 0.11 * np.cos(0.1)
    y = 0.1 * np.sin(0.3) + 0.11 * np.sin(0.1)
    expected = [
        *(np.cos(0.3), np.cos(-0.2), np.sin(0.3), np.sin(-0.2)),
        *(0.1, 0.05, 1.5, -2.5, x - 0.1, y - 0.05, 0.0),
    ]
    np.testing.assert_allclose(simulation._get_obs(), expected, atol=1e-12)


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("task", "qpos", "qvel", "action", "expected"),
    [
        # velocity + height + control + alive
        ("HalfCheetah-MBBL", {0: 9.0, 1: 0.3}, {0: 2.0, 1: 7.0}, [0.1] * 6, 2.0 - 0.006),
        (
            "Hopper-ET",
            {0: 7.0, 1: 1.2, 2: -0.1},
            {0: 1.5, 1: -0.5},
            [0.5, -1.0, 0.2],
            1.5 - 0.03 - 0.129 + 1.0,
        ),
        ("Hopper-ET", {1: 0.7}, {0: 12.0}, [0.0] * 3, 12.0 - 1.08 + 0.0),  # lies; v isn't clipped
        (
            "Walker-ET",
            {0: -3.0, 1: 1.5, 2: 0.2},
            {0: -0.7, 2: 4.0},
            [1.0, -1.0, 0.5, 0.0, 0.0, 0.0],
            -0.7 - 0.12 - 0.225 + 1.0,
        ),
        ("Walker-ET", {1: 1.3, 2: -1.0}, {0: 1.0}, [0.0] * 6, 1.0),
        ("Ant-ET", {0: 5.0, 1: 6.0, 2: 0.67}, {0: 0.9, 1: 8.0}, [0.5] * 8, 0.9 - 0.03 - 0.2 + 1.0),
        ("Ant-ET", {2: 1.07}, {0: 0.9}, [0.0] * 8, 0.9 - 0.75),
        ("SlimHumanoid-ET", {2: 1.4}, {0: 0.06, 1: 3.0}, [0.2] * 17, 1.0 - 0.068 + 5.0),
        ("SlimHumanoid-ET", {2: 0.9}, {0: 0.06}, [0.0] * 17, 1.0),
        ("Humanoid-ET", {2: 1.4}, {0: 0.06, 1: 3.0}, [0.2] * 17, 1.0 - 0.068 + 5.0),
        ("InvertedPendulum-MBBL", {0: 0.5, 1: 0.3}, {0: 2.0, 1: 3.0}, [3.0], -0.09),
        ("InvertedPendulum-MBBL", {1: -2.0}, {}, [0.0], -4.0),
    ],
)
def test_reward_by_hand(
    task: str,
    qpos: dict[int, float],
    qvel: dict[int, float],
    action: list[float],
    expected: float,
) -> None:
    env = make(task)
    put(env, qpos, qvel)
    _, reward, _, truncated, info = env.step(np.array(action, dtype=np.float32))
    assert reward == pytest.approx(expected, rel=1e-6)
    assert sum(info[name] for name in info if name.startswith("reward_")) == reward
    assert not truncated


@pytest.mark.parametrize(("force", "cost"), [(1000.0, 0.5), (4000.0, 8.0), (5000.0, 10.0)])
def test_humanoid_pays_for_contacts_up_to_ten(force: float, cost: float) -> None:
    env = make("Humanoid-ET")
    simulation = put(env, {2: 1.4}, {})
    simulation.data.cfrc_ext[13, 5] = force  # the last of the 84 numbers
    assert env.step(np.zeros(17, dtype=np.float32))[1] == pytest.approx(5.0 - cost)


def test_reacher_reward_by_hand() -> None:
    env = make("Reacher-MBBL")
    # Stretched out, the fingertip is at x = 0.21; the target lies 0.03 behind and 0.04 aside.
    put(env, {0: 0.0, 1: 0.0, 2: 0.18, 3: 0.04}, {})
    _, reward, terminated, _, _ = env.step(np.array([0.6, -0.8], dtype=np.float32))
    assert reward == pytest.approx(-0.05 - 1.0, rel=1e-6)
    assert not terminated


@pytest.mark.parametrize(
    ("theta", "velocity", "torque", "expected"),
    [
        (0.0, 0.0, 0.0, -1.0),  # upright is the worst place
        (np.pi, 0.0, 0.0, 1.0),  # hanging is the best
        (np.pi / 2, 2.0, 1.0, -0.1 - 0.4 - 0.001),
        (-np.pi / 6, -1.0, -2.0, -(3**0.5) / 2 - 0.05 - 0.1 - 0.004),
        (-np.pi / 6, -1.0, -9.0, -(3**0.5) / 2 - 0.05 - 0.1 - 0.004),  # the torque is cut to 2
    ],
)
def test_pendulum_reward_by_hand(
    theta: float, velocity: float, torque: float, expected: float
) -> None:
    env = make("Pendulum-MBBL")
    env.reset(seed=0)
    env.unwrapped.state = np.array([theta, velocity])  # type: ignore[attr-defined]
    _, reward, terminated, truncated, _ = env.step(np.array([torque], dtype=np.float32))
    assert reward == pytest.approx(expected, abs=1e-12)
    assert not terminated
    assert not truncated


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([0.0, 9.0, 0.0, 9.0], 1.0),
        ([2.0, 0.0, np.pi / 3, 0.0], 0.5 - 0.04),
        ([-10.0, 0.0, np.pi, 0.0], -1.0 - 1.0),  # no end, however far or fallen
    ],
)
def test_cartpole_reward_by_hand(state: list[float], expected: float) -> None:
    env = make("CartPole-MBBL")
    env.reset(seed=0)
    env.unwrapped.state = np.array(state)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            _, reward, terminated, truncated, _ = env.step(np.zeros(1, dtype=np.float32))
            assert (terminated, truncated) == (False, False)
            if i == 0:
                assert reward == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("action", "side"), [(1.0, 1), (0.01, 1), (0.0, -1), (-1.0, -1)])
def test_cartpole_pushes_by_the_sign_of_the_action(action: float, side: int) -> None:
    env = make("CartPole-MBBL")
    env.reset(seed=0)
    env.unwrapped.state = np.zeros(4)  # type: ignore[attr-defined]
    observation, *_ = env.step(np.array([action], dtype=np.float32))
    # Barto, Sutton and Anderson's equations at rest: 10 N on 1.1 kg, for 0.02 s.
    acceleration = (10 / 1.1) * (1 + 0.05 / (0.5 * (4 / 3 - 0.1 / 1.1)) / 1.1)
    np.testing.assert_allclose(observation[1], side * 0.02 * acceleration, rtol=1e-6)


FORMULAS: dict[str, Callable[[Any, Any], float]] = {
    "HalfCheetah-MBBL": lambda o, a: o[8] - 0.1 * (a**2).sum(),
    "Hopper-ET": lambda o, a: o[5] - 3 * (o[0] - 1.3) ** 2 - 0.1 * (a**2).sum() + 1,
    "Walker-ET": lambda o, a: o[8] - 3 * (o[0] - 1.3) ** 2 - 0.1 * (a**2).sum() + 1,
    "Ant-ET": lambda o, a: o[13] - 3 * (o[0] - 0.57) ** 2 - 0.1 * (a**2).sum() + 1,
    "Humanoid-ET": lambda o, a: (
        o[22] * 0.25 / 0.015 - 0.1 * (a**2).sum() + 5 + max(-5e-7 * (o[-84:] ** 2).sum(), -10)
    ),
    "SlimHumanoid-ET": lambda o, a: o[22] * 0.25 / 0.015 - 0.1 * (a**2).sum() + 5,
    "InvertedPendulum-MBBL": lambda o, a: -(o[1] ** 2),
    "Reacher-MBBL": lambda o, a: -np.sqrt((o[8:] ** 2).sum()) - (a**2).sum(),
    "Pendulum-MBBL": lambda o, a: (
        -o[0] - 0.1 * abs(o[1]) - 0.1 * o[2] ** 2 - 0.001 * (a**2).sum()
    ),
    "CartPole-MBBL": lambda o, a: np.cos(o[2]) - 0.01 * o[0] ** 2,
}


@pytest.mark.parametrize("task", ROBOTS + SMALL)
def test_the_reward_is_a_function_of_what_was_observed_before_the_step(task: str) -> None:
    env = make(task)
    observation, _ = env.reset(seed=4)
    env.action_space.seed(4)
    for _ in range(45):
        action = env.action_space.sample()
        before, (observation, reward, terminated, _, _) = observation, env.step(action)
        expected = FORMULAS[task](before.astype(float), action.astype(float))
        assert reward == pytest.approx(expected, rel=1e-5, abs=1e-5)
        if terminated:
            observation, _ = env.reset()


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("task", "qpos", "ends"),
    [
        ("HalfCheetah-MBBL", {1: -0.5, 2: 3.0}, False),
        ("Hopper-ET", {1: 0.7}, True),
        ("Hopper-ET", {1: 0.7001}, False),
        ("Hopper-ET", {2: 0.2}, True),
        ("Hopper-ET", {2: -0.2}, True),
        ("Hopper-ET", {2: -0.1999}, False),
        ("Hopper-ET", {1: 9.0}, False),  # no height is too high
        ("Hopper-ET", {1: np.nan}, True),
        ("Walker-ET", {1: 0.8}, True),
        ("Walker-ET", {1: 0.8001}, False),
        ("Walker-ET", {1: 2.0}, True),
        ("Walker-ET", {1: 1.9999}, False),
        ("Walker-ET", {2: 1.0}, True),
        ("Walker-ET", {2: -1.0}, True),
        ("Walker-ET", {2: 0.9999}, False),
        ("Ant-ET", {2: 0.2}, False),
        ("Ant-ET", {2: 0.1999}, True),
        ("Ant-ET", {2: 1.0}, False),
        ("Ant-ET", {2: 1.0001}, True),
        ("Ant-ET", {2: np.nan}, True),
        ("Humanoid-ET", {2: 1.0}, False),
        ("Humanoid-ET", {2: 0.9999}, True),
        ("Humanoid-ET", {2: 2.0}, False),
        ("Humanoid-ET", {2: 2.0001}, True),
        ("SlimHumanoid-ET", {2: 1.0}, False),
        ("SlimHumanoid-ET", {2: 0.9999}, True),
        ("InvertedPendulum-MBBL", {1: 3.0}, False),
    ],
)
def test_ends_by_hand(
    task: str, qpos: dict[int, float], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(task, disable_env_checker=True)
    simulation = put(env, qpos, {})
    # Time stands still: the state after the step is the one set, to the last bit.
    monkeypatch.setattr(simulation, "do_simulation", lambda action, frames: None)
    for i, value in qpos.items():
        simulation.data.qpos[i] = value
    action = np.zeros(env.action_space.shape, dtype=np.float32)  # type: ignore[arg-type]
    assert env.step(action)[2:4] == (ends, False)


def test_the_end_is_that_of_the_state_after_the_step() -> None:
    env = make("Hopper-ET")
    put(env, {2: 0.19}, {2: 5.0})  # falling; the bonus is still paid
    _, _, terminated, _, info = env.step(np.zeros(3, dtype=np.float32))
    assert terminated
    assert info["reward_alive"] == 1.0


@pytest.mark.parametrize(("task", "steps"), [*zip(SMALL, (200, 200, 100, 50), strict=True)])
def test_small_tasks_last_to_their_time_limit(task: str, steps: int) -> None:
    env = make(task)
    env.reset(seed=0)
    action = env.action_space.high  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends = [env.step(action)[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("task", ROBOTS + SMALL)
def test_the_seed_decides(task: str) -> None:
    def trace(seed: int) -> list[Any]:
        env = make(task)
        env.action_space.seed(0)
        seen: list[Any] = [env.reset(seed=seed)[0].tobytes()]
        for _ in range(10):
            observation, reward, *_ = env.step(env.action_space.sample())
            seen += [observation.tobytes(), reward]
        return seen

    first = trace(7)
    assert trace(7) == first
    assert trace(8) != first


@pytest.mark.parametrize("task", ["Hopper-ET", "Humanoid-ET", "Reacher-MBBL"])
def test_a_copy_is_the_same_task(task: str) -> None:
    env = make(task).unwrapped
    other = copy.deepcopy(env)  # made anew from the recorded arguments
    assert type(other) is type(env)
    np.testing.assert_array_equal(other.reset(seed=3)[0], env.reset(seed=3)[0])


def test_rewards_cannot_be_set() -> None:
    with pytest.raises(TypeError, match="ctrl_cost_weight"):
        make("Hopper-ET", ctrl_cost_weight=1.0)


def test_rendering() -> None:
    program = (
        "import gymnasium, diffcore.envs\n"
        "for task in ('Hopper-ET', 'Reacher-MBBL-masked'):\n"
        "    env = gymnasium.make(f'diffcore/{task}-v0', render_mode='rgb_array', width=64)\n"
        "    env.reset(seed=0)\n"
        "    picture = env.render()\n"
        "    assert picture.shape == (480, 64, 3) and picture.std() > 0\n"
    )
    # MuJoCo reads this when it is first imported, so it takes a process of its own.
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 and ("EGL" in done.stderr or "OpenGL" in done.stderr):
        pytest.skip("no EGL here")
    assert done.returncode == 0, done.stderr


def test_small_tasks_render_as_gymnasiums_do() -> None:
    pytest.importorskip("pygame")
    for task in ("Pendulum-MBBL", "CartPole-MBBL", "Pendulum-MBBL-masked"):
        env = make(task, render_mode="rgb_array")
        env.reset(seed=0)
        picture: Any = env.render()
        assert picture.ndim == 3
