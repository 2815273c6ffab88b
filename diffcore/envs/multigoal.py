"""The multi-goal toy of DIPO (arXiv 2305.13122, Section 3.2 and Appendix G).

A point in the plane may walk to any of four goals that are equally good from the centre, so the
optimal policy there has four modes: what a diffusion policy can represent and a Gaussian cannot.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

GOALS = np.array([[0.0, 5.0], [0.0, -5.0], [5.0, 0.0], [-5.0, 0.0]])
"""``[4, 2]``: the goals' positions."""

GOAL_NAMES = ("top", "bottom", "right", "left")
"""What the goals are called, in the same order."""

BOUND = 7.0
"""The point stays within ``[-BOUND, BOUND]`` in both coordinates."""


class MultiGoalEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A 2D point mass among four goals.

    ==============  ============================================================================
    observation     ``Box([-7, 7]^2)``: the position p
    action          ``Box([-1, 1]^2)``: the displacement a in one step
    dynamics        p' = clip(p + a + ``position_noise`` * N(0, I), -7, 7)
    reward          r1 + r2 + r3, with r1 = -|a|^2, r2 = -min over goals of |p' - goal|^2 and
                    r3 = ``goal_reward`` on reaching a goal, else 0
    termination     p' lies within ``goal_radius`` of a goal
    start           N(0, ``start_std``^2 I), clipped to the arena
    time limit      30 steps, set where the environment is registered
    info            ``goal_reached``: the goal's name in :data:`GOAL_NAMES`, None on the way
    ==============  ============================================================================

    Goals, rewards and arena are the paper's. What it leaves open follows the environment of that
    name from soft Q-learning (arXiv 1702.08165): actions bounded by 1, goal radius 1, start
    deviation 0.1, episodes of 30 steps. Distances are measured after the move.

    Args:
        render_mode: None or ``"rgb_array"``.
        goal_radius: distance at which a goal counts as reached; above 0.
        goal_reward: r3.
        start_std: standard deviation of the start about the centre; at least 0.
        position_noise: standard deviation of the noise on each move; at least 0.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        goal_radius: float = 1.0,
        goal_reward: float = 10.0,
        start_std: float = 0.1,
        position_noise: float = 0.01,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        if not goal_radius > 0:
            raise ValueError(f"goal_radius must be above 0, got {goal_radius}")
        if not (start_std >= 0 and position_noise >= 0):
            raise ValueError(
                f"start_std and position_noise must be at least 0, got {start_std} "
                f"and {position_noise}"
            )
        self.render_mode = render_mode
        self.goal_radius = goal_radius
        self.goal_reward = goal_reward
        self.start_std = start_std
        self.position_noise = position_noise
        self.observation_space = gym.spaces.Box(-BOUND, BOUND, shape=(2,), dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
        self.position = np.zeros(2)
        self._path: list[NDArray[np.float64]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Put the point near the centre."""
        super().reset(seed=seed)
        start = self.start_std * self.np_random.standard_normal(2)
        self.position = np.clip(start, -BOUND, BOUND)
        self._path = [self.position]
        return self.position.astype(np.float32), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the point by ``action`` (``[2]``, clipped to the action space)."""
        move = np.clip(np.asarray(action, dtype=np.float64).reshape(2), -1.0, 1.0)
        noise = self.position_noise * self.np_random.standard_normal(2)
        self.position = np.clip(self.position + move + noise, -BOUND, BOUND)
        self._path.append(self.position)

        squared_distances = ((GOALS - self.position) ** 2).sum(axis=1)
        nearest = int(squared_distances.argmin())
        squared_distance = float(squared_distances[nearest])
        reached = squared_distance < self.goal_radius**2
        reward = -float((move**2).sum()) - squared_distance
        if reached:
            reward += self.goal_reward
        info = {"goal_reached": GOAL_NAMES[nearest] if reached else None}
        return self.position.astype(np.float32), reward, reached, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """The arena, its goals and the path so far: ``[480, 480, 3]`` uint8."""
        if self.render_mode is None:
            gym.logger.warn("render() needs the environment made with render_mode='rgb_array'")
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle

        figure = Figure(figsize=(4.8, 4.8), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(-BOUND, BOUND), ylim=(-BOUND, BOUND), aspect="equal")
        axes.axis("off")
        for x, y in GOALS:
            axes.add_patch(Circle((x, y), self.goal_radius, color="tab:green", alpha=0.4))
        path = np.array(self._path)
        axes.plot(path[:, 0], path[:, 1], color="tab:blue")
        axes.plot(*path[-1], marker="o", color="tab:blue", markersize=10)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
