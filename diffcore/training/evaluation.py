"""Evaluation: whole episodes in environments of its own, with random streams of its own."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from diffcore.training.environments import BoxEnvironment, FloatArray, make_environment
from diffcore.training.errors import EnvError
from diffcore.training.registry import Actor
from diffcore.training.seeding import Stream, derive_seed, preserved_process_random_state


@dataclass(frozen=True)
class Evaluation:
    """The undiscounted returns and the lengths of some episodes."""

    returns: list[float]
    lengths: list[int]
    goals: list[str | None] = field(default_factory=list)
    """The goal that each episode reached, None where it reached none. Empty if the environment
    doesn't tell: it does by ``goal_reached``, a name or None, in the info of an episode's last step.
    """

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return statistics.fmean(self.returns)

    @property
    def std_return(self) -> float:
        """Standard deviation over the episodes (of the population: 0 for a single one)."""
        return statistics.pstdev(self.returns)

    @property
    def goal_counts(self) -> dict[str, int]:
        """Episodes per goal, the most frequent first; those that reached none as ``"none"``."""
        return dict(Counter(goal or "none" for goal in self.goals).most_common())


class Evaluator:
    """Evaluates agents on one environment, all episodes of an evaluation side by side.

    What an evaluation sees depends on ``seed`` and the ``number`` it is given, on nothing before
    it; and it leaves the process-wide random states as it found them.

    Args:
        env_id: the environment.
        episodes: episodes per evaluation.
        env_kwargs: arguments for the environment's class.
        max_episode_steps: the time limit; None keeps the environment's own.
        deterministic: ask the agent for deterministic actions, instead of its evaluation form.
        seed: of start states, dynamics and actions.
        device: the agent's.
        render: make the first environment one that can be filmed.

    Raises:
        EnvError: if the environment can't be made.
    """

    def __init__(
        self,
        env_id: str,
        *,
        episodes: int,
        env_kwargs: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        deterministic: bool,
        seed: int,
        device: str | torch.device = "cpu",
        render: bool = False,
    ) -> None:
        self.deterministic = deterministic
        self.seed = seed
        self.device = torch.device(device)
        with preserved_process_random_state():
            self.environments = [
                make_environment(
                    env_id,
                    env_kwargs=env_kwargs,
                    max_episode_steps=max_episode_steps,
                    render_mode="rgb_array" if render and i == 0 else None,
                )
                for i in range(episodes)
            ]

    @property
    def frames_per_second(self) -> float:
        """The speed at which frames play in real time, as the environment has it, else 30."""
        return float(self.environments[0].metadata.get("render_fps", 30))

    def evaluate(
        self,
        agent: Actor,
        number: int = 0,
        *,
        stop: Callable[[], bool] = lambda: False,
        frames: Callable[[Any], None] | None = None,
    ) -> Evaluation | None:
        """Run one episode in every environment.

        Args:
            agent: is only asked to act, with a generator of the evaluation's own.
            number: tells evaluations of one seed apart; training passes its step.
            stop: asked before every step; once true the evaluation is given up.
            frames: if given, is handed each picture of the first episode (``[H, W, 3]`` uint8).

        Returns:
            The outcome; None if it was given up.

        Raises:
            EnvError: if an environment misbehaves, or can't be rendered for ``frames``.
        """
        with preserved_process_random_state():
            return self._evaluate(agent, number, stop, frames)

    def _evaluate(
        self,
        agent: Actor,
        number: int,
        stop: Callable[[], bool],
        frames: Callable[[Any], None] | None,
    ) -> Evaluation | None:
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.seed, Stream.EVALUATION_POLICY, number))
        observations: list[FloatArray] = []
        for i, environment in enumerate(self.environments):
            seed = derive_seed(self.seed, Stream.EVALUATION_ENVIRONMENT, number, i)
            observations.append(environment.reset(seed=seed)[0])
        returns = [0.0] * len(self.environments)
        lengths = [0] * len(self.environments)
        goals: dict[int, str | None] = {}
        running = list(range(len(self.environments)))
        if frames is not None:
            frames(render_frame(self.environments[0]))
        while running:
            if stop():
                return None
            stacked = np.stack([observations[i] for i in running])
            actions = agent.act(
                torch.from_numpy(stacked).to(self.device),
                explore=False,
                deterministic=self.deterministic,
                generator=generator,
            )
            still_running = []
            for i, action in zip(running, actions.cpu().numpy(), strict=True):
                observation, reward, terminated, truncated, info = self.environments[i].step(action)
                observations[i] = observation
                returns[i] += reward
                lengths[i] += 1
                if not (terminated or truncated):
                    still_running.append(i)
                # Other environments put a flag or an array there, which names no goal.
                elif isinstance(info.get("goal_reached", False), (str, NoneType)):
                    goals[i] = info["goal_reached"]
            if frames is not None and 0 in running:
                frames(render_frame(self.environments[0]))
            running = still_running
        return Evaluation(returns, lengths, [goals[i] for i in sorted(goals)])

    def close(self) -> None:
        """Close the environments."""
        for environment in self.environments:
            environment.close()


def render_frame(environment: BoxEnvironment) -> Any:
    """One picture, ``[H, W, 3]`` uint8.

    Raises:
        EnvError: if the environment can't render here.
    """
    try:
        frame = environment.render()
    # Missing displays, drivers and packages make renderers raise all kinds of exceptions.
    except Exception as error:
        raise EnvError(
            f"{environment.name} can't be rendered here: {error}{_advice(environment)}"
        ) from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise EnvError(
            f"{environment.name} can't be rendered to a video: "
            f"its render() returned a {type(frame).__name__}, not a picture"
        )
    return frame


def _advice(environment: BoxEnvironment) -> str:
    if "mujoco" not in type(environment.unwrapped).__module__:
        return ""
    return " (without a display MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa)"


class VideoFile:
    """An .mp4 or .gif file written frame by frame. Use as a context manager.

    The file comes into being with its first frame.

    Args:
        path: the file; its ending says which kind.
        frames_per_second: the speed at which it plays.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self.path = path
        self._options: dict[str, Any] = {"fps": frames_per_second}
        if path.suffix == ".gif":
            self._options = {"duration": 1000.0 / frames_per_second, "loop": 0}
        self._writer: Any = None

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            with self._errors_named():
                self._writer.close()

    def append(self, frame: Any) -> None:
        """Add a picture, ``[H, W, 3]`` uint8.

        Raises:
            EnvError: if the file can't be written.
        """
        with self._errors_named():
            if self._writer is None:
                import imageio

                self._writer = imageio.get_writer(self.path, **self._options)
            self._writer.append_data(frame)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            raise EnvError(f"can't write the video {self.path}: {error}") from error
