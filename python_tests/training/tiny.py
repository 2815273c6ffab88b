"""A tiny agent and a tiny environment, for tests of everything above the agents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TinyConfig:
    """Hyper-parameters of :class:`TinyAgent`."""

    lr: float = 1e-2
    batch_size: int = 4
    start_steps: int = 10
    buffer_size: int = 1000
    bootstrap_truncated: bool = True

    @classmethod
    def for_env(cls, env_id: str) -> TinyConfig:
        return cls()


class TinyAgent:
    """A linear policy that imitates the replay's actions. Draws noise, so that streams matter."""

    config_type: ClassVar[type[TinyConfig]] = TinyConfig

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        config: TinyConfig,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.generator = torch.Generator(device).manual_seed(seed)
        self.weight = 0.1 * torch.randn(observation_dim, action_dim, generator=self.generator)
        self.weight.requires_grad_()
        self.optimizer = torch.optim.Adam([self.weight], lr=config.lr)

    @property
    def bootstrap_truncated(self) -> bool:
        return self.config.bootstrap_truncated

    @torch.no_grad()
    def act(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        action = torch.tanh(observation @ self.weight)
        if not deterministic:
            noise = torch.randn(action.shape, generator=generator or self.generator)
            action = action + (0.3 if explore else 0.1) * noise
        return action.clamp(-1.0, 1.0)

    def update(self, replay: Any) -> dict[str, float | Tensor]:
        batch = replay.sample(self.config.batch_size, self.generator)
        loss = (torch.tanh(batch.state @ self.weight) - batch.best_action).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        replay.set_best_action(batch.index, (batch.best_action * 0.9).clamp(-1.0, 1.0))
        return {"loss": loss.detach(), "mask": batch.mask.mean(), "one": 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight.detach(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.data.copy_(state["weight"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach().clone()}


class CountingEnv(gym.Env[Any, Any]):
    """Observes [episode, step of the episode]; rewards the step; ends as it is told to.

    Args:
        length: steps per episode.
        terminates: end by terminating; else by truncating.
    """

    def __init__(
        self, length: int = 3, terminates: bool = True, render_mode: str | None = None
    ) -> None:
        self.length = length
        self.terminates = terminates
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, 1e6, (2,), dtype=np.float64)
        self.action_space = gym.spaces.Box(-2.0, 6.0, (1,), dtype=np.float32)
        self.episode = -1
        self.count = 0
        self.actions: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.count = 0
        return np.array([self.episode, self.count], dtype=np.float64), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.actions.append(float(action[0]))
        ends = self.count >= self.length
        observation = np.array([self.episode, self.count], dtype=np.float64)
        terminated, truncated = ends and self.terminates, ends and not self.terminates
        return observation, float(self.count), terminated, truncated, {}
