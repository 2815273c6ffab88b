"""The multi-goal toy against its definition."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import diffcore.envs
from diffcore.envs.multigoal import GOALS, MultiGoalEnv


def at(position: tuple[float, float], **settings: Any) -> MultiGoalEnv:
    env = MultiGoalEnv(position_noise=0.0, **settings)
    env.reset(seed=0)
    env.position = np.array(position)
    return env


def test_passes_gymnasiums_checker() -> None:
    for env_id in ("diffcore/MultiGoal-v0", "diffcore.envs:diffcore/MultiGoal-v0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)
    assert diffcore.envs.MultiGoalEnv is MultiGoalEnv


def test_goals_and_spaces_are_the_papers() -> None:
    assert {tuple(goal) for goal in GOALS} == {(0, 5), (0, -5), (5, 0), (-5, 0)}
    env = MultiGoalEnv()
    assert (env.observation_space.low == -7).all()
    assert (env.observation_space.high == 7).all()
    assert (env.action_space.low == -1).all()
    assert (env.action_space.high == 1).all()


def test_reward_away_from_the_goals() -> None:
    observation, reward, terminated, truncated, _ = at((1.0, 1.0)).step(np.array([0.5, -1.0]))
    np.testing.assert_allclose(observation, [1.5, 0.0])
    assert reward == pytest.approx(-(0.25 + 1.0) - 3.5**2)  # the nearest goal is (5, 0)
    assert not terminated
    assert not truncated


@pytest.mark.parametrize(
    ("name", "goal"), [("top", (0, 5)), ("bottom", (0, -5)), ("right", (5, 0)), ("left", (-5, 0))]
)
def test_reaching_a_goal_pays_and_ends(name: str, goal: tuple[int, int]) -> None:
    direction = np.array(goal) / 5.0
    env = at(tuple(np.array(goal) - 2.5 * direction))
    _, _, terminated, _, info = env.step(direction)
    assert not terminated
    assert info == {"goal_reached": None}
    _, reward, terminated, _, info = env.step(direction)
    assert terminated
    assert info == {"goal_reached": name}
    assert reward == pytest.approx(-1.0 - 0.25 + 10.0)


def test_the_goal_radius_is_exclusive() -> None:
    assert not at((3.0, 0.0)).step(np.array([1.0, 0.0]))[2]
    assert at((3.0, 0.0), goal_radius=1.01).step(np.array([1.0, 0.0]))[2]


def test_the_point_stays_in_the_arena_and_actions_are_clipped() -> None:
    env = at((6.5, -6.5))
    observation, reward, *_ = env.step(np.array([9.0, -9.0]))
    np.testing.assert_array_equal(observation, [7.0, -7.0])
    assert reward == pytest.approx(-2.0 - (2**2 + 7**2))


def test_starts_near_the_centre_and_moves_with_little_noise() -> None:
    env = MultiGoalEnv()
    starts = np.array([env.reset(seed=i)[0] for i in range(500)])
    np.testing.assert_allclose(starts.std(axis=0), 0.1, rtol=0.15)
    np.testing.assert_allclose(starts.mean(axis=0), 0.0, atol=0.02)
    moves = []
    for _ in range(500):
        before = env.position
        moves.append(env.step(np.zeros(2))[0] - before)
    np.testing.assert_allclose(np.std(moves, axis=0), 0.01, rtol=0.15)


def test_episodes_last_thirty_steps() -> None:
    env = gym.make("diffcore/MultiGoal-v0")
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, dtype=np.float32))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


def test_rendering_shows_the_point() -> None:
    env = at((0.0, 0.0), render_mode="rgb_array")
    first = env.render()
    assert first is not None
    assert first.shape == (480, 480, 3)
    assert first.dtype == np.uint8
    env.step(np.array([1.0, 0.0]))
    assert not np.array_equal(first, env.render())


@pytest.mark.parametrize(
    "settings",
    [{"render_mode": "human"}, {"goal_radius": 0.0}, {"start_std": -1.0}, {"position_noise": -1}],
)
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MultiGoalEnv(**settings)
