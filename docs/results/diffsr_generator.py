"""Diff-SR's model of the transition as a generator, on a map with two possible outcomes.

``s' = (s + a) / 4 + b n(s) + 0.15 z`` in the plane, with n(s) the direction at angle pi s_1 / 4,
b = 1 with probability 0.7 and -1 with 0.3, z ~ N(0, I). The representation is trained on random
transitions; then next states are drawn by its reverse chain at states and actions of a grid and
compared with fresh ones of the map itself, by the energy distance
``2 E|x - y| - E|x - x'| - E|y - y'|``. Beside it stand the same distance between two fresh samples of
the map (what no model can beat) and that of the best Gaussian (what a unimodal model could reach).
The released code's beta-CDF levels end far from noise, so its chain starts with Langevin steps.

    python docs/results/diffsr_generator.py            # minutes; writes the table and the picture
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from diffcore.agents import DiffSR, DiffSRConfig
from diffcore.training.replay import ReplayBuffer

PLACES = torch.tensor(
    [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0], [-0.5, 0.5, 0.0, -1.0], [1.0, -0.5, -1.0, 1.0]]
)
"""State and action, a row each."""


def outcome(state: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
    """A next state of the map for each row."""
    angle = math.pi / 4 * state[:, :1]
    direction = torch.cat([angle.cos(), angle.sin()], dim=1)
    sign = torch.where(torch.rand(len(state), 1, generator=generator) < 0.7, 1.0, -1.0)
    noise = torch.randn(len(state), 2, generator=generator)
    return (state + action) / 4 + sign * direction + 0.15 * noise


def energy_distance(x: Tensor, y: Tensor) -> float:
    """0 for equal distributions; unbiased, so it may come out below."""

    def within(rows: Tensor) -> Tensor:
        return torch.cdist(rows, rows).sum() / (len(rows) * (len(rows) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


def train(levels: str, steps: int, seed: int) -> DiffSR:
    """An agent whose representation has seen ``steps`` batches of random transitions."""
    generator = torch.Generator().manual_seed(seed)
    rows = 100_000
    state = 2 * torch.rand(rows, 2, generator=generator) - 1
    action = 2 * torch.rand(rows, 2, generator=generator) - 1
    replay = ReplayBuffer(rows, 2, 2, bootstrap_truncated=True)
    nothing = torch.zeros(rows)
    next_state = outcome(state, action, generator)
    replay.add(state, action, nothing, next_state, nothing, nothing)
    config = DiffSRConfig(
        noise_levels=levels,
        noise_steps=100,
        feature_dim=64,
        psi_hidden_dim=128,
        zeta_hidden_dim=256,
    )
    agent = DiffSR(2, 2, config, seed=seed)
    for step in range(steps):
        metrics = agent.update_representation(agent.sample(replay))
        if step == 9 * steps // 10:  # Adam's steps are too long for the last digits
            for group in agent.representation_optimizer.param_groups:
                group["lr"] /= 10
        if (step + 1) % 1000 == 0:
            print(f"{levels}: step {step + 1}, loss {float(metrics['score_loss']):.4f}", flush=True)
    return agent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000, help="representation steps")
    parser.add_argument("--samples", type=int, default=1000, help="next states at each place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()

    matplotlib.use("agg")
    from matplotlib import pyplot

    generator = torch.Generator().manual_seed(arguments.seed + 1)
    samples = arguments.samples
    models = {
        levels: train(levels, arguments.steps, arguments.seed) for levels in ("cosine", "beta_cdf")
    }
    figure, axes = pyplot.subplots(
        3, len(PLACES), figsize=(3 * len(PLACES), 9), sharex=True, sharey=True, layout="constrained"
    )
    print(f"{'state, action':<26}{'cosine':>9}{'beta_cdf':>9}{'truth':>9}{'Gaussian':>10}")
    for column, place in enumerate(PLACES):
        state, action = place.expand(samples, 4).split(2, dim=1)
        state, action = state.contiguous(), action.contiguous()
        truth, fresh = (outcome(state, action, generator) for _ in range(2))
        centred = torch.linalg.cholesky(truth.T.cov())
        gaussian = truth.mean(0) + torch.randn(samples, 2, generator=generator) @ centred.T
        drawn = {
            levels: agent.sample_next_state(state, action, clip=2.5, generator=generator)
            for levels, agent in models.items()
        }
        distances = [
            energy_distance(rows, fresh) for rows in (*drawn.values(), truth, gaussian)
        ]
        cells = f"{distances[0]:9.4f}{distances[1]:9.4f}{distances[2]:9.4f}{distances[3]:10.4f}"
        print(f"{place.tolist()!s:<26}{cells}", flush=True)
        for row, (name, rows) in enumerate({"the map": fresh, **drawn}.items()):
            axes[row, column].scatter(*rows.T, s=2, alpha=0.4)
            axes[row, column].set_title(f"{name} at {place.tolist()}", fontsize=8)
    figure.savefig(arguments.output, dpi=80)
    print(arguments.output)


if __name__ == "__main__":
    main()
