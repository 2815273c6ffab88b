"""The agents the command line knows, and what the training loop asks of an agent.

To add an agent, write a class that fits :class:`Agent` and enter it in :data:`AGENTS`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from diffcore.agents import DIPO, DiffSR, Replay
from diffcore.training.errors import ConfigError


class AgentConfig(Protocol):
    """An agent's hyper-parameters: a frozen dataclass of numbers, strings and booleans.

    A field ``mode``, if there is one, becomes part of the run's name.
    """

    @property
    def start_steps(self) -> int:
        """Environment steps with random actions before the first update."""
        ...

    @property
    def buffer_size(self) -> int:
        """Capacity of the replay buffer, in transitions."""
        ...


class Agent(Protocol):
    """What the training loop needs. Observations are float32, actions lie in ``[-1, 1]``."""

    @property
    def bootstrap_truncated(self) -> bool:
        """Whether a time limit leaves the value of the state it cut at to be bootstrapped."""
        ...

    def act(
        self,
        observation: Tensor,
        *,
        explore: bool,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Actions ``[B, A]`` for observations ``[B, O]``; ``generator`` None is the agent's own."""
        ...

    def update(self, replay: Replay) -> dict[str, float | Tensor]:
        """One update. Metrics may be 0-d tensors, read only when they are logged."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All a bitwise-equal continuation needs, as tensors and plain Python data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The tensors that acting needs, on the CPU."""
        ...


class AgentConfigType(Protocol):
    """The class of an agent's configuration."""

    def __call__(self, **fields: Any) -> AgentConfig: ...

    def for_env(self, env_id: str) -> AgentConfig:
        """The defaults for an environment."""
        ...


class AgentType(Protocol):
    """The class of an agent."""

    @property
    def config_type(self) -> Any:
        """The class of its configuration, an :class:`AgentConfigType`."""
        ...

    def __call__(
        self,
        observation_dim: int,
        action_dim: int,
        config: Any,
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> Agent: ...


AGENTS: dict[str, AgentType] = {"diffsr": DiffSR, "dipo": DIPO}


def agent_type(name: str) -> AgentType:
    """The agent called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in AGENTS:
        raise ConfigError(f"unknown agent {name!r}; there are: {', '.join(sorted(AGENTS))}")
    return AGENTS[name]


def agent_name(config: AgentConfig) -> str:
    """The name of the agent that ``config`` configures.

    Raises:
        ConfigError: if no agent has a configuration of this type.
    """
    for name, agent in AGENTS.items():
        if type(config) is agent.config_type:
            return name
    raise ConfigError(
        f"agent_config must be the configuration of one of {sorted(AGENTS)}, "
        f"got {type(config).__name__}"
    )
