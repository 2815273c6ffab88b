"""What Diff-SR's exploration bonuses do on a task whose reward is far away.

A point in the square [-1, 1]^2 starts in one corner and moves by 0.05 times the action, for 100
steps; only the opposite corner is rewarded. Counted is how much of the square was visited, in cells
of 20 x 20, and how many episodes reached the reward, without a bonus and with each.

    python docs/results/diffsr_exploration.py --seeds 3       # writes the table
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console

from diffcore.agents import DiffSRConfig
from diffcore.training import TrainConfig, train
from diffcore.training.checkpoint import load_checkpoint

CELLS = 20


class FarCorner(gym.Env[Any, Any]):
    """Observes the point; rewards 1 within 0.2 of the corner (0.9, 0.9), which ends the episode."""

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
        self.point = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.point = np.full(2, -0.9)
        return self.point.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.point = np.clip(self.point + 0.05 * np.asarray(action), -1.0, 1.0)
        arrived = bool(np.linalg.norm(self.point - 0.9) < 0.2)
        return self.point.astype(np.float32), float(arrived), arrived, False, {}


gym.register("FarCorner-v0", FarCorner, max_episode_steps=100)


def coverage(states: torch.Tensor) -> float:
    """The share of cells with a state in them."""
    cells = ((states + 1) / 2 * CELLS).long().clamp(max=CELLS - 1)
    return len(torch.unique(cells, dim=0)) / CELLS**2


def explore(bonus: Any, seed: int, steps: int, weight: float) -> tuple[list[float], int]:
    """Coverage after each quarter of the steps, and episodes that reached the reward."""
    agent_config = DiffSRConfig(
        bonus=bonus,
        bonus_weight=weight,
        bonus_ridge=0.1,
        feature_dim=64,
        psi_hidden_dim=64,
        zeta_hidden_dim=64,
        hidden_dim=64,
        lr=1e-3,
        update_target_every=1,
        extra_feature_steps=0,
        batch_size=128,
        start_steps=500,
    )
    with tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(
            env="FarCorner-v0",
            seed=seed,
            total_steps=steps,
            threads=1,
            eval_interval=steps,
            eval_episodes=1,
            tensorboard=False,
            run_dir=Path(directory) / "run",
        )
        run = train(config, agent_config, console=Console(file=io.StringIO())).run
        columns = load_checkpoint(run / "checkpoint.pt")["replay"]["columns"]
        states, arrivals = columns["state"].clone(), int(columns["terminated"].sum())
    return [coverage(states[: steps * part // 4]) for part in (1, 2, 3, 4)], arrivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--weight", type=float, default=1.0, help="of the bonus")
    arguments = parser.parse_args()
    print("bonus       seed   coverage after each quarter      arrivals")
    for seed in range(arguments.seeds):
        for bonus in ("none", "elliptical", "kernel"):
            quarters, arrivals = explore(bonus, seed, arguments.steps, arguments.weight)
            shares = "  ".join(f"{share:5.1%}" for share in quarters)
            print(f"{bonus:<12}{seed:<7}{shares:<33}{arrivals}", flush=True)


if __name__ == "__main__":
    main()
