"""Evaluation: seeded, apart from training, deterministic on request, filmed on request."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import imageio
import numpy as np
import pytest
import torch
from tiny import CountingEnv, TinyAgent, TinyConfig

from diffcore.training import EnvError, Evaluation, Evaluator
from diffcore.training.evaluation import VideoFile
from diffcore.training.seeding import process_random_state


def make(env: str = "Pendulum-v1", **changes: Any) -> Evaluator:
    settings: dict[str, Any] = {
        "episodes": 3,
        "max_episode_steps": 10,
        "deterministic": False,
        "seed": 0,
    }
    return Evaluator(env, **{**settings, **changes})


def agent(observation_dim: int = 3, action_dim: int = 1) -> TinyAgent:
    return TinyAgent(observation_dim, action_dim, TinyConfig(), seed=0)


def test_statistics() -> None:
    evaluation = Evaluation([1.0, 3.0], [5, 7])
    assert (evaluation.mean_return, evaluation.std_return) == (2.0, 1.0)
    assert Evaluation([4.0], [1]).std_return == 0.0


def test_every_episode_counts_once_whatever_its_length(register_env: Any) -> None:
    lengths = iter([2, 5, 3])
    env_id = register_env(lambda **kwargs: CountingEnv(length=next(lengths)))
    evaluation = make(env_id, max_episode_steps=None).evaluate(agent(2))
    assert evaluation == Evaluation(returns=[3.0, 15.0, 6.0], lengths=[2, 5, 3])


def test_an_agent_is_shown_its_episodes_as_they_are_now(register_env: Any) -> None:
    class Watching(TinyAgent):
        def act(self, observation: Any, **how: Any) -> Any:
            shown.append(observation.tolist())
            return super().act(observation, **how)

    shown: list[list[list[float]]] = []
    lengths = iter([2, 3])
    env_id = register_env(lambda **kwargs: CountingEnv(length=next(lengths)))
    make(env_id, episodes=2).evaluate(Watching(2, 1, TinyConfig(), seed=0))
    assert shown == [[[0, 0], [0, 0]], [[0, 1], [0, 1]], [[0, 2]]]


def test_goals_are_counted_where_the_environment_tells(register_env: Any) -> None:
    class Reaching(CountingEnv):
        def __init__(self, goal: str | None, length: int) -> None:
            super().__init__(length=length)
            self.goal = goal

        def step(self, action: Any) -> Any:
            *outcome, _ = super().step(action)
            ends = self.count >= self.length
            return *outcome, {"goal_reached": self.goal if ends else None}

    episodes = iter([("left", 5), ("top", 2), (None, 3), ("top", 4), (None, 100), ("top", 1)])
    env_id = register_env(lambda **kwargs: Reaching(*next(episodes)))
    evaluation = make(env_id, episodes=6).evaluate(agent(2))
    assert evaluation is not None
    assert evaluation.goals == ["left", "top", None, "top", None, "top"]
    assert evaluation.goal_counts == {"top": 3, "none": 2, "left": 1}
    silent = register_env(lambda **kwargs: CountingEnv())
    untold = make(silent).evaluate(agent(2))
    assert untold is not None
    assert untold.goals == []
    assert untold.goal_counts == {}


@pytest.mark.parametrize("flag", [True, np.True_, np.array([True, False]), 1.5, {"left": True}])
def test_a_goal_reached_that_names_no_goal_is_not_counted(register_env: Any, flag: Any) -> None:
    class Flagging(CountingEnv):
        def step(self, action: Any) -> Any:
            *outcome, _ = super().step(action)
            return *outcome, {"goal_reached": flag}

    evaluation = make(register_env(Flagging)).evaluate(agent(2))
    assert evaluation is not None
    assert evaluation.goals == []
    assert evaluation.goal_counts == {}


def test_the_outcome_depends_on_seed_and_number_only() -> None:
    evaluator = make()
    first = evaluator.evaluate(agent(), 7)
    other_number = evaluator.evaluate(agent(), 8)
    torch.manual_seed(5)
    np.random.seed(5)
    assert evaluator.evaluate(agent(), 7) == first
    assert make().evaluate(agent(), 7) == first
    assert other_number != first
    assert make(seed=1).evaluate(agent(), 7) != first


def test_what_the_agent_draws_depends_on_seed_and_number(register_env: Any) -> None:
    """In an environment that is the same every time."""

    def actions(number: int, seed: int = 0) -> list[float]:
        evaluator = make(env_id, episodes=1, seed=seed)
        evaluator.evaluate(agent(2), number)
        inner: Any = evaluator.environments[0].unwrapped
        return list(inner.actions)

    env_id = register_env(lambda **kwargs: CountingEnv())
    assert actions(7) == actions(7)
    assert actions(7) != actions(8)
    assert actions(7) != actions(7, seed=1)


def test_training_streams_are_left_alone(register_env: Any) -> None:
    class GlobalNoise(CountingEnv):
        def __init__(self) -> None:
            super().__init__()
            np.random.random()

        def step(self, action: Any) -> Any:
            np.random.random()
            random.random()
            torch.rand(1)
            return super().step(action)

    env_id = register_env(lambda **kwargs: GlobalNoise())
    trained = agent(2)
    before = repr((process_random_state(), trained.generator.get_state().tolist()))
    make(env_id).evaluate(trained)
    assert repr((process_random_state(), trained.generator.get_state().tolist())) == before


def test_deterministic_evaluation_draws_no_actions() -> None:
    class NoNoise(TinyAgent):
        asked: bool | None = None

        def act(self, observation: Any, **how: Any) -> Any:
            assert how["explore"] is False
            self.asked = how["deterministic"]
            return super().act(observation, **how)

    for deterministic in (True, False):
        subject = NoNoise(3, 1, TinyConfig(), seed=0)
        make(deterministic=deterministic).evaluate(subject)
        assert subject.asked is deterministic


def test_an_evaluation_can_be_given_up() -> None:
    answers = iter([False, False, True])
    assert make().evaluate(agent(), stop=lambda: next(answers)) is None


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_video(tmp_path: Path, ending: str) -> None:
    evaluator = make("diffcore/MultiGoal-v0", max_episode_steps=4, render=True)
    path = tmp_path / f"video.{ending}"
    with VideoFile(path, evaluator.frames_per_second) as video:
        evaluation = evaluator.evaluate(agent(2, 2), frames=video.append)
    assert evaluation is not None
    frames = imageio.mimread(path)
    assert len(frames) == evaluation.lengths[0] + 1
    assert not np.array_equal(frames[0], frames[-1])
    # Filming changes nothing.
    assert make("diffcore/MultiGoal-v0", max_episode_steps=4).evaluate(agent(2, 2)) == evaluation


def test_an_environment_that_cannot_be_rendered_says_so(register_env: Any) -> None:
    class NoScreen(CountingEnv):
        def render(self) -> Any:
            raise RuntimeError("no display")

    class NoPicture(CountingEnv):
        def render(self) -> Any:
            return "text"

    for env, message in (
        (NoScreen, "can't be rendered here: no display"),
        (NoPicture, "returned a str, not a picture"),
    ):
        env.metadata = {"render_modes": ["rgb_array"]}
        env_id = register_env(env, disable_env_checker=True)
        with pytest.raises(EnvError, match=message):
            make(env_id, render=True).evaluate(agent(2), frames=lambda frame: None)


def test_an_environment_that_cannot_even_be_made_for_rendering_says_so(register_env: Any) -> None:
    class NoDriver(CountingEnv):
        metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode: str | None = None) -> None:
            super().__init__()
            if render_mode is not None:
                raise RuntimeError("no driver")

    with pytest.raises(EnvError, match="with render_mode='rgb_array': no driver"):
        make(register_env(NoDriver), render=True)


def test_a_video_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    frame = np.zeros((16, 16, 3), dtype=np.uint8)
    with (
        VideoFile(tmp_path / "gone" / "v.gif", 10.0) as video,
        pytest.raises(EnvError, match=r"can't write the video .*gone/v\.gif"),
    ):
        video.append(frame)
