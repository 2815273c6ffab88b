"""What an agent needs of a replay buffer, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """``B`` transitions. Every tensor but ``index`` is float32; actions lie in ``[-1, 1]``."""

    index: Tensor
    """``[B]`` int64, where each transition lies in the replay: the handle for writing back."""
    state: Tensor
    """``[B, observation_dim]``"""
    action: Tensor
    """``[B, action_dim]``, the action that was taken."""
    best_action: Tensor
    """``[B, action_dim]``, starts as ``action`` and is moved by the action gradient."""
    reward: Tensor
    """``[B, 1]``"""
    next_state: Tensor
    """``[B, observation_dim]``"""
    mask: Tensor
    """``[B, 1]``, 0 where the value of ``next_state`` must not be bootstrapped, else 1."""

    def split(self, rows: int) -> list[Batch]:
        """Views of ``rows`` transitions each, in order; the last may have fewer."""
        columns = [getattr(self, field.name).split(rows) for field in fields(self)]
        return [Batch(*parts) for parts in zip(*columns, strict=True)]


class Replay(Protocol):
    """A store of transitions, each with the action taken and the best action known so far."""

    def __len__(self) -> int:
        """Transitions stored."""
        ...

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw transitions uniformly with replacement. ``generator`` is the only randomness.

        The generator lives on the agent's device, and so must the tensors returned.
        """
        ...

    def set_action(self, index: Tensor, action: Tensor) -> None:
        """Overwrite the stored actions ``action[index]`` (``[B]``, ``[B, action_dim]``)."""
        ...

    def set_best_action(self, index: Tensor, action: Tensor) -> None:
        """Overwrite the stored best actions ``best_action[index]``."""
        ...
