"""Evaluation: whole episodes in environments of its own, with random streams of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffcore.training.environments import BoxEnvironment, FloatArray, make_environment
from diffcore.training.errors import EnvError
from diffcore.training.registry import Agent
from diffcore.training.seeding import Stream, derive_seed, preserved_process_random_state


@dataclass(frozen=True)
class Evaluation:
    """The undiscounted returns and the lengths of some episodes."""

    returns: list[float]
    lengths: list[int]

    @property
    def mean_return(self) -> float:
        """Mean over the episodes."""
        return statistics.fmean(self.returns)

    @property
    def std_return(self) -> float:
        """Standard deviation over the episodes (of the population: 0 for a single one)."""
        return statistics.pstdev(self.returns)


class Evaluator:
    """Evaluates agents on one environment, all episodes of an evaluation side by side.

    What an evaluation sees depends on ``seed`` and the ``number`` it is given, on nothing before
    it; and it leaves the process-wide random states as it found them.

    Args:
        env_id: the environment.
        episodes: episodes per evaluation.
        max_episode_steps: the time limit; None keeps the environment's own.
        deterministic: ask the agent for deterministic actions, instead of its evaluation form.
        seed: of start states, dynamics and actions.
        device: the agent's.
        frames: if given, is handed each frame of the first episode (``[H, W, 3]`` uint8).

    Raises:
        EnvError: if the environment can't be made.
    """

    def __init__(
        self,
        env_id: str,
        *,
        episodes: int,
        max_episode_steps: int | None = None,
        deterministic: bool,
        seed: int,
        device: str | torch.device = "cpu",
        frames: Callable[[Any], None] | None = None,
    ) -> None:
        self.deterministic = deterministic
        self.seed = seed
        self.device = torch.device(device)
        self._frames = frames
        with preserved_process_random_state():
            self.environments = [
                make_environment(
                    env_id,
                    max_episode_steps=max_episode_steps,
                    render_mode="rgb_array" if frames and i == 0 else None,
                )
                for i in range(episodes)
            ]

    @property
    def frames_per_second(self) -> float:
        """The speed at which frames play in real time, as the environment has it, else 30."""
        return float(self.environments[0].metadata.get("render_fps", 30))

    def evaluate(
        self, agent: Agent, number: int = 0, *, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Run one episode in every environment.

        Args:
            agent: is only asked to act, with a generator of the evaluation's own.
            number: tells evaluations of one seed apart; training passes its step.
            stop: asked before every step; once true the evaluation is given up.

        Returns:
            The outcome; None if it was given up.
        """
        with preserved_process_random_state():
            return self._evaluate(agent, number, stop)

    def _evaluate(self, agent: Agent, number: int, stop: Callable[[], bool]) -> Evaluation | None:
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.seed, Stream.EVALUATION_POLICY, number))
        observations: list[FloatArray] = []
        for i, environment in enumerate(self.environments):
            seed = derive_seed(self.seed, Stream.EVALUATION_ENVIRONMENT, number, i)
            observations.append(environment.reset(seed=seed)[0])
        returns = [0.0] * len(self.environments)
        lengths = [0] * len(self.environments)
        running = list(range(len(self.environments)))
        self._render(running)
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
                observation, reward, terminated, truncated, _ = self.environments[i].step(action)
                observations[i] = observation
                returns[i] += reward
                lengths[i] += 1
                if not (terminated or truncated):
                    still_running.append(i)
            self._render(running)
            running = still_running
        return Evaluation(returns, lengths)

    def _render(self, running: list[int]) -> None:
        if self._frames is not None and 0 in running:
            self._frames(render_frame(self.environments[0]))

    def close(self) -> None:
        """Close the environments."""
        for environment in self.environments:
            environment.close()


def render_frame(environment: BoxEnvironment) -> Any:
    """One picture, ``[H, W, 3]`` uint8.

    Raises:
        EnvError: if the environment can't render here.
    """
    advice = "without a display, MuJoCo environments need MUJOCO_GL=egl or MUJOCO_GL=osmesa"
    try:
        frame = environment.render()
    # Missing displays, drivers and packages make renderers raise all kinds of exceptions.
    except Exception as error:
        raise EnvError(f"{environment.name} can't be rendered here: {error} ({advice})") from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise EnvError(
            f"{environment.name} can't be rendered to a video: "
            f"its render() returned a {type(frame).__name__}, not a picture"
        )
    return frame


def write_video(path: Path, frames: list[Any], frames_per_second: float) -> None:
    """Write pictures (``[H, W, 3]`` uint8) as .mp4 or .gif.

    Raises:
        EnvError: if the file's kind isn't known or it can't be written.
    """
    options: dict[str, Any] = {"fps": frames_per_second}
    if path.suffix == ".gif":
        options = {"duration": 1000.0 / frames_per_second, "loop": 0}
    try:
        import imageio

        writer: Any
        with imageio.get_writer(path, **options) as writer:
            for frame in frames:
                writer.append_data(frame)
    except (OSError, ValueError, ImportError) as error:
        raise EnvError(f"can't write the video {path}: {error}") from error
